//! How much and how often: values of `[trainer]` that can be counts, shares or times.

use std::borrow::Cow;
use std::fmt;
use std::time::Duration;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::de::{self, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::callback::Progress;

/// How many batches of a pass to use: an integer is a count, a fraction up to 1.0 is a share.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Limit {
    /// At most this many; 0 skips the pass.
    Batches(usize),
    /// This share of the batches, rounded down, but at least one; 0.0 skips the pass.
    Share(f64),
}

impl Limit {
    /// The number of batches to use, out of `batches`.
    pub fn of(self, batches: usize) -> usize {
        match self {
            Self::Batches(n) => n.min(batches),
            Self::Share(0.) => 0,
            Self::Share(share) => ((share * batches as f64 + ROUNDING) as usize).clamp(1, batches.max(1)),
        }
    }
}

/// Makes up for products that should be whole numbers but come out slightly below.
const ROUNDING: f64 = 1e-9;

/// How often something happens: `500` or `"500 steps"`, `"2 epochs"`, `"0.25 epochs"`, `"30 min"`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Every {
    /// Every this many optimizer steps.
    Steps(u64),
    /// Every this many passes over the data; a fraction is a point within a pass.
    Epochs(f64),
    /// Every time this much time has passed.
    Time(Duration),
}

impl Every {
    /// Whether this is due after the step that led to `progress`; by the clock, `waited` is the time since it
    /// last happened. `steps_per_epoch` is unknown for streams, which therefore only support whole epochs.
    pub(crate) fn is_due(
        self,
        progress: &Progress,
        steps_per_epoch: Option<u64>,
        waited: impl FnOnce() -> Duration,
    ) -> bool {
        match (self, steps_per_epoch) {
            (Self::Steps(n), _) => progress.step.is_multiple_of(n),
            (Self::Time(every), _) => waited() >= every,
            (Self::Epochs(epochs), Some(steps_per_epoch)) => {
                let interval = epochs * steps_per_epoch as f64;
                let passed = |step: u64| (step as f64 / interval + ROUNDING).floor();
                passed(progress.step) > passed(progress.step.saturating_sub(1))
            }
            (Self::Epochs(epochs), None) => {
                progress.step_in_epoch == 0 && progress.epoch.is_multiple_of(epochs as u64)
            }
        }
    }
}

impl<'de> Deserialize<'de> for Limit {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Reader;
        impl Visitor<'_> for Reader {
            type Value = Limit;
            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("a number of batches such as 100, or a fraction of them such as 0.25")
            }
            fn visit_i64<E: de::Error>(self, n: i64) -> Result<Limit, E> {
                let wrong = |_| E::invalid_value(de::Unexpected::Signed(n), &self);
                n.try_into().map(Limit::Batches).map_err(wrong)
            }
            fn visit_u64<E: de::Error>(self, n: u64) -> Result<Limit, E> {
                Ok(Limit::Batches(n as usize))
            }
            fn visit_f64<E: de::Error>(self, share: f64) -> Result<Limit, E> {
                match (0. ..=1.).contains(&share) {
                    true => Ok(Limit::Share(share)),
                    false => Err(E::invalid_value(de::Unexpected::Float(share), &self)),
                }
            }
        }
        deserializer.deserialize_any(Reader)
    }
}

impl Serialize for Limit {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match *self {
            Self::Batches(n) => serializer.serialize_u64(n as u64),
            Self::Share(share) => serializer.serialize_f64(share),
        }
    }
}

impl JsonSchema for Limit {
    fn schema_name() -> Cow<'static, str> {
        "Limit".into()
    }
    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({"type": "number", "minimum": 0})
    }
}

const EVERY: &str = "a number of steps such as 500, or a string such as \"500 steps\", \"2 epochs\", \"0.25 epochs\" or \"30 min\"";

impl std::str::FromStr for Every {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("invalid value: \"{text}\", expected {EVERY}");
        let (number, unit) = text.split_once(' ').unwrap_or((text, ""));
        match unit.trim() {
            "step" | "steps" => number.parse().ok().filter(|n| *n > 0).map(Self::Steps),
            "epoch" | "epochs" => number.parse().ok().filter(|n| *n > 0.).map(Self::Epochs),
            _ => humantime::parse_duration(text).ok().filter(|time| !time.is_zero()).map(Self::Time),
        }
        .ok_or_else(wrong)
    }
}

impl fmt::Display for Every {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Self::Steps(n) => write!(f, "{n} steps"),
            Self::Epochs(n) => write!(f, "{n} epochs"),
            Self::Time(time) => humantime::format_duration(*time).fmt(f),
        }
    }
}

impl<'de> Deserialize<'de> for Every {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Reader;
        impl Visitor<'_> for Reader {
            type Value = Every;
            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str(EVERY)
            }
            fn visit_i64<E: de::Error>(self, n: i64) -> Result<Every, E> {
                match u64::try_from(n) {
                    Ok(n) if n > 0 => Ok(Every::Steps(n)),
                    _ => Err(E::invalid_value(de::Unexpected::Signed(n), &self)),
                }
            }
            fn visit_u64<E: de::Error>(self, n: u64) -> Result<Every, E> {
                self.visit_i64(n as i64)
            }
            fn visit_str<E: de::Error>(self, text: &str) -> Result<Every, E> {
                text.parse().map_err(E::custom)
            }
        }
        deserializer.deserialize_any(Reader)
    }
}

impl Serialize for Every {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Steps(n) => serializer.serialize_u64(*n),
            _ => serializer.collect_str(self),
        }
    }
}

impl JsonSchema for Every {
    fn schema_name() -> Cow<'static, str> {
        "Every".into()
    }
    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({"anyOf": [{"type": "integer", "minimum": 1}, {"type": "string"}], "description": EVERY})
    }
}

/// A duration, written like `"2h 30m"`.
pub(crate) mod duration {
    use super::*;

    pub(crate) fn serialize<S: Serializer>(
        time: &Option<Duration>,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        time.map(|time| humantime::format_duration(time).to_string()).serialize(serializer)
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Option<Duration>, D::Error> {
        let text = String::deserialize(deserializer)?;
        let wrong = || {
            let expected = "a duration above 0 such as \"2h 30m\" or \"45 min\"";
            de::Error::invalid_value(de::Unexpected::Str(&text), &expected)
        };
        let parsed = humantime::parse_duration(&text).ok().filter(|time| !time.is_zero());
        parsed.map(Some).ok_or_else(wrong)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_count_or_share() {
        assert_eq!(
            [Limit::Batches(3).of(10), Limit::Batches(30).of(10), Limit::Batches(0).of(10)],
            [3, 10, 0]
        );
        // In floating point, 0.3 * 10 is slightly above 3, and 0.29 * 100 is slightly below 29.
        let shares = [(0.3, 10), (0.29, 100), (0.01, 10), (1., 7), (0., 7)];
        assert_eq!(shares.map(|(share, n)| Limit::Share(share).of(n)), [3, 29, 1, 7, 0]);
    }

    #[test]
    fn what_happens_every_so_often() {
        let due = |every: Every, steps: std::ops::RangeInclusive<u64>| -> Vec<u64> {
            let progress = |step: u64| Progress {
                step,
                epoch: step / 10,
                step_in_epoch: step % 10,
                ..Default::default()
            };
            steps.filter(|step| every.is_due(&progress(*step), Some(10), || Duration::ZERO)).collect()
        };
        assert_eq!(due(Every::Steps(4), 1..=12), [4, 8, 12]);
        assert_eq!(due(Every::Epochs(2.), 1..=40), [20, 40]);
        assert_eq!(due(Every::Epochs(0.3), 1..=12), [3, 6, 9, 12]);
        assert_eq!(due(Every::Epochs(0.25), 1..=10), [3, 5, 8, 10]);
        assert!(due(Every::Time(Duration::from_secs(1)), 1..=10).is_empty());
    }

    #[test]
    fn texts_and_numbers() {
        let read = |text: &str| text.parse::<Every>();
        assert_eq!(read("500 steps"), Ok(Every::Steps(500)));
        assert_eq!(read("0.5 epochs"), Ok(Every::Epochs(0.5)));
        assert_eq!(read("1h 30min"), Ok(Every::Time(Duration::from_secs(5400))));
        for wrong in ["often", "0 steps", "-1 epochs", "3 eons", "0s"] {
            let error = read(wrong).unwrap_err();
            assert!(
                error.starts_with(&format!("invalid value: \"{wrong}\", expected a number of steps")),
                "{error}"
            );
        }
        for every in [Every::Steps(7), Every::Epochs(0.25), Every::Time(Duration::from_secs(90))] {
            assert_eq!(every.to_string().parse(), Ok(every));
        }
    }
}
