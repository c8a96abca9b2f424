//! Learning-rate schedules: stateless functions of the step, equal to PyTorch's.

use std::f64::consts::PI;
use std::fmt;
use std::sync::Arc;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::metrics::Criterion;

/// The rates of one optimizer step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rates {
    /// Learning rate.
    pub lr: f64,
    /// Adam's first beta, or the momentum of SGD and RMSprop, if the schedule drives it.
    pub momentum: Option<f64>,
}

/// The `[schedule]` section: how the learning rate changes over the run. `t` is the step, from 0; `lr` is the
/// optimizer's learning rate. With `interval = "epoch"` ([`Schedule::per_epoch`]), all step counts are epoch
/// counts.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Schedule {
    /// `factor * lr` for the first `steps` steps, then `lr` (torch: `ConstantLR`). The default, with factor
    /// 1, is a constant learning rate.
    Constant {
        /// Multiplier of `lr`.
        #[serde(default = "one")]
        factor: f64,
        /// Number of steps it applies to.
        #[serde(default)]
        steps: u64,
    },
    /// Linear from `start * lr` to `end * lr` over `steps` (torch: `LinearLR`).
    Linear {
        /// The factor at the first step.
        start: f64,
        /// The factor after `steps` steps.
        #[serde(default = "one")]
        end: f64,
        /// Number of steps.
        steps: u64,
    },
    /// Multiplied by `gamma` after every `every` steps (torch: `StepLR`).
    Step {
        /// Steps between two decays.
        every: u64,
        /// The factor of each decay.
        gamma: f64,
    },
    /// Multiplied by `gamma` at each milestone (torch: `MultiStepLR`).
    MultiStep {
        /// The steps at which it decays.
        milestones: Vec<u64>,
        /// The factor of each decay.
        gamma: f64,
    },
    /// Multiplied by `gamma` at every step (torch: `ExponentialLR`).
    Exponential {
        /// The factor of each step.
        gamma: f64,
    },
    /// A half cosine from `lr` to `min_lr` over `steps`, rising again after that (torch: `CosineAnnealingLR`;
    /// Loshchilov and Hutter 2017, equation 5).
    Cosine {
        /// Steps of the half cosine.
        steps: u64,
        /// The lowest learning rate.
        #[serde(default)]
        min_lr: f64,
    },
    /// Successive half cosines, each `growth` times as long as the previous one (torch:
    /// `CosineAnnealingWarmRestarts`).
    CosineRestarts {
        /// Steps of the first half cosine.
        steps: u64,
        /// The length of each half cosine relative to the previous one.
        #[serde(default = "one_times")]
        growth: u64,
        /// The lowest learning rate.
        #[serde(default)]
        min_lr: f64,
    },
    /// `lr * (1 - t / steps)^power` (torch: `PolynomialLR`).
    Polynomial {
        /// The step from which on it is zero.
        steps: u64,
        /// The exponent; 1 is linear.
        #[serde(default = "one")]
        power: f64,
    },
    /// Rises to `max_lr` and falls to nearly zero, with the momentum moving the opposite way (torch:
    /// `OneCycleLR`; Smith and Topin 2018). The optimizer's `lr` is ignored.
    OneCycle(OneCycle),
    /// `lr * min((t + 1)^-0.5, (t + 1) * warmup^-1.5)` (Vaswani et al. 2017, section 5.3; include the model
    /// width in `lr`).
    Noam {
        /// Steps until the maximum.
        warmup: u64,
    },
    /// Schedules in sequence; each starts at its own step 0 (torch: `SequentialLR`). If only some of them
    /// drive the momentum, the optimizer's own momentum applies during the others.
    Sequence {
        /// The schedules, each with its `name`, for example `{ name = "linear", start = 0.01, steps = 500 }`.
        #[serde(with = "by_name")]
        #[schemars(with = "Vec<serde_json::Map<String, serde_json::Value>>")]
        parts: Vec<Schedule>,
        /// The steps at which the second and each later schedule begins.
        milestones: Vec<u64>,
    },
    /// Any function of the step and the optimizer's learning rate (torch: `LambdaLR`). Only available in
    /// code.
    #[serde(skip)]
    Custom(CustomSchedule),
    /// One of the other schedules, counting epochs: [`Schedule::per_epoch`]. In a section, it is that
    /// schedule with `interval = "epoch"`.
    #[serde(skip)]
    PerEpoch(Box<Schedule>),
}

/// The unit that a schedule counts in, named as in Lightning: the field `interval` of its section.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Interval {
    /// Optimizer steps.
    #[default]
    Step,
    /// Epochs: the learning rate is constant within an epoch.
    Epoch,
}

/// A custom learning-rate function of the step, from 0, and the optimizer's learning rate. It must be pure,
/// so a resumed run continues identically.
#[derive(Clone)]
pub struct CustomSchedule(Arc<dyn Fn(u64, f64) -> f64 + Send + Sync>);

impl fmt::Debug for CustomSchedule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a function")
    }
}

impl PartialEq for CustomSchedule {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

/// Schedules in a list are written like a section: a table with a `name`.
mod by_name {
    use serde::de::Error as _;
    use serde::ser::Error as _;
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    use super::Schedule;
    use crate::config::untag;

    pub(super) fn serialize<S: Serializer>(parts: &[Schedule], serializer: S) -> Result<S::Ok, S::Error> {
        let tables: Result<Vec<toml::Table>, _> = parts.iter().map(untag).collect();
        tables.map_err(S::Error::custom)?.serialize(serializer)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<Schedule>, D::Error> {
        let part = |mut fields: toml::Table| {
            let Some(toml::Value::String(name)) = fields.remove("name") else {
                return Err(D::Error::custom(
                    "each part of a sequence needs a `name`, for example `{ name = \"cosine\", steps = 1000 }`",
                ));
            };
            let tagged = toml::Table::from_iter([(name.clone(), fields.into())]);
            Schedule::deserialize(tagged).map_err(|error| {
                let unknown = format!("unknown variant `{name}`");
                let message = error.message().replacen(&unknown, &format!("unknown schedule `{name}`"), 1);
                D::Error::custom(format!("part `{name}`: {message}"))
            })
        };
        Vec::<toml::Table>::deserialize(deserializer)?.into_iter().map(part).collect()
    }
}

/// The shape of one cycle. PyTorch's field names are accepted too.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct OneCycle {
    /// The highest learning rate.
    pub max_lr: f64,
    /// Steps of the whole cycle.
    #[serde(alias = "total_steps")]
    pub steps: u64,
    /// The fraction of the steps in which the learning rate rises.
    #[serde(default = "OneCycle::rising", alias = "pct_start")]
    pub rising: f64,
    /// The first learning rate is `max_lr / start_divisor`.
    #[serde(default = "OneCycle::start_divisor", alias = "div_factor")]
    pub start_divisor: f64,
    /// The last learning rate is the first one divided by this.
    #[serde(default = "OneCycle::end_divisor", alias = "final_div_factor")]
    pub end_divisor: f64,
    /// Linear instead of half-cosine interpolation.
    #[serde(default)]
    pub linear: bool,
    /// Whether it first returns to the initial learning rate, as quickly as it rose.
    #[serde(default, alias = "three_phase")]
    pub three_phases: bool,
    /// The momentum at the highest learning rate, and at both ends.
    #[serde(default = "OneCycle::momentum")]
    pub momentum: [f64; 2],
    /// Whether the momentum changes. If false, it stays the optimizer's own.
    #[serde(default = "OneCycle::cycles_momentum")]
    pub cycle_momentum: bool,
}

fn one() -> f64 {
    1.
}

fn one_times() -> u64 {
    1
}

impl Default for Schedule {
    fn default() -> Self {
        Self::Constant { factor: 1., steps: 0 }
    }
}

impl Schedule {
    /// A custom schedule: a function of the step `t`, from 0, and the optimizer's learning rate.
    ///
    /// ```
    /// # use candlepower::schedule::Schedule;
    /// let warm_up = Schedule::custom(|t, lr| lr * ((t + 1) as f64 / 500.).min(1.));
    /// assert_eq!(warm_up.at(249, 0.1).lr, 0.05);
    /// ```
    pub fn custom(lr: impl Fn(u64, f64) -> f64 + Send + Sync + 'static) -> Self {
        Self::Custom(CustomSchedule(Arc::new(lr)))
    }

    /// Counts epochs instead of steps: the learning rate is constant within an epoch, like a PyTorch
    /// scheduler that is stepped after each epoch.
    ///
    /// ```
    /// # use candlepower::schedule::Schedule;
    /// let tenth_every_thirty_epochs = Schedule::Step { every: 30, gamma: 0.1 }.per_epoch();
    /// ```
    pub fn per_epoch(self) -> Self {
        match self {
            Self::PerEpoch(_) => self,
            of_steps => Self::PerEpoch(Box::new(of_steps)),
        }
    }

    /// The unit that it counts in.
    pub fn interval(&self) -> Interval {
        match self {
            Self::PerEpoch(_) => Interval::Epoch,
            _ => Interval::Step,
        }
    }

    /// The rates of step `t`, from 0; of epoch `t` if it counts epochs.
    pub fn at(&self, t: u64, lr: f64) -> Rates {
        let time = t as f64;
        let factor = match self {
            Self::Constant { factor, steps } => {
                if t < *steps {
                    *factor
                } else {
                    1.
                }
            }
            Self::Linear { start, end, steps } => start + (end - start) * (time / *steps as f64).min(1.),
            Self::Step { every, gamma } => gamma.powf((t / every) as f64),
            Self::Custom(CustomSchedule(own)) => return own(t, lr).into(),
            Self::PerEpoch(of) => return of.at(t, lr),
            Self::MultiStep { milestones, gamma } => {
                gamma.powf(milestones.iter().filter(|milestone| **milestone <= t).count() as f64)
            }
            Self::Exponential { gamma } => gamma.powf(time),
            Self::Cosine { steps, min_lr } => return half_cosine(lr, *min_lr, time / *steps as f64).into(),
            Self::CosineRestarts { steps, growth, min_lr } => {
                let (mut start, mut length) = (0, *steps);
                while t - start >= length {
                    start += length;
                    length = length.saturating_mul(*growth);
                }
                return half_cosine(lr, *min_lr, (t - start) as f64 / length as f64).into();
            }
            Self::Polynomial { steps, power } => (1. - (time / *steps as f64).min(1.)).powf(*power),
            Self::OneCycle(cycle) => return cycle.at(t),
            Self::Noam { warmup } => (time + 1.).powf(-0.5).min((time + 1.) * (*warmup as f64).powf(-1.5)),
            Self::Sequence { parts, milestones } => {
                let begun = milestones.iter().take_while(|milestone| **milestone <= t).count();
                let start = if begun == 0 { 0 } else { milestones[begun - 1] };
                return parts[begun].at(t - start, lr);
            }
        };
        (lr * factor).into()
    }

    /// Checks lengths and factors.
    pub fn check(&self) -> Result<()> {
        let steps = |key: &str, steps: u64| match steps {
            0 => Err(Error::setting(key, "expected at least 1, found 0")),
            _ => Ok(()),
        };
        // A negative learning rate would climb, and a non-finite one would ruin the weights.
        let from_zero = |key: &str, value: f64| match value.is_finite() && value >= 0. {
            true => Ok(()),
            false => Err(Error::setting(key, format!("expected a number of at least 0, found {value}"))),
        };
        match self {
            Self::Constant { factor, .. } => from_zero("factor", *factor),
            Self::Exponential { gamma } => from_zero("gamma", *gamma),
            Self::Linear { start, end, steps: n } => {
                from_zero("start", *start).and(from_zero("end", *end)).and(steps("steps", *n))
            }
            Self::Cosine { steps: n, min_lr } => from_zero("min_lr", *min_lr).and(steps("steps", *n)),
            Self::Polynomial { steps: n, power } => from_zero("power", *power).and(steps("steps", *n)),
            Self::CosineRestarts { steps: n, growth, min_lr } => {
                from_zero("min_lr", *min_lr).and(steps("steps", *n)).and(steps("growth", *growth))
            }
            Self::Step { every, gamma } => from_zero("gamma", *gamma).and(steps("every", *every)),
            Self::Noam { warmup } => steps("warmup", *warmup),
            Self::Custom(_) => Ok(()),
            Self::PerEpoch(of) => of.check(),
            Self::MultiStep { milestones, gamma } => from_zero("gamma", *gamma).and(rising(milestones)),
            Self::OneCycle(cycle) => cycle.check().and(steps("steps", cycle.steps)),
            Self::Sequence { parts, milestones } if parts.len() != milestones.len() + 1 => {
                let message =
                    format!("{} parts need {} milestones", parts.len(), parts.len().saturating_sub(1));
                Err(Error::setting("milestones", message))
            }
            Self::Sequence { parts, milestones } => {
                rising(milestones)?;
                parts.iter().enumerate().try_for_each(|(i, part)| {
                    if part.interval() == Interval::Epoch {
                        let message = "`interval` belongs to the sequence, not to a part";
                        return Err(Error::setting("parts", message));
                    }
                    part.check().map_err(|error| Error::setting("parts", format!("part {}: {error}", i + 1)))
                })
            }
        }
    }

    /// Whether it ignores the optimizer's learning rate at any step.
    fn has_its_own_lr(&self) -> bool {
        match self {
            Self::OneCycle(_) => true,
            Self::PerEpoch(of) => of.has_its_own_lr(),
            Self::Sequence { parts, .. } => parts.iter().any(Self::has_its_own_lr),
            _ => false,
        }
    }

    /// Whether it drives the momentum at any step.
    pub fn drives_momentum(&self) -> bool {
        match self {
            Self::OneCycle(cycle) => cycle.cycle_momentum,
            Self::PerEpoch(of) => of.drives_momentum(),
            Self::Sequence { parts, .. } => parts.iter().any(Self::drives_momentum),
            _ => false,
        }
    }
}

impl From<f64> for Rates {
    fn from(lr: f64) -> Self {
        Rates { lr, momentum: None }
    }
}

impl OneCycle {
    /// A cycle of `steps` steps with peak `max_lr`, with PyTorch's default shape.
    pub fn new(max_lr: f64, steps: u64) -> Self {
        Self {
            max_lr,
            steps,
            rising: Self::rising(),
            start_divisor: Self::start_divisor(),
            end_divisor: Self::end_divisor(),
            linear: false,
            three_phases: false,
            momentum: Self::momentum(),
            cycle_momentum: Self::cycles_momentum(),
        }
    }

    fn check(&self) -> Result<()> {
        let within = |key: &str, value: f64, least: f64, most: f64| match value > least && value < most {
            true => Ok(()),
            false if most.is_finite() => Err(Error::setting(
                key,
                format!("expected a number between {least} and {most}, found {value}"),
            )),
            false => Err(Error::setting(key, format!("expected a number above {least}, found {value}"))),
        };
        within("rising", self.rising, 0., 1.)?;
        for (key, value) in [
            ("max_lr", self.max_lr),
            ("start_divisor", self.start_divisor),
            ("end_divisor", self.end_divisor),
        ] {
            within(key, value, 0., f64::INFINITY)?;
        }
        match self.momentum.iter().all(|momentum| (0. ..1.).contains(momentum)) {
            true => Ok(()),
            false => {
                let message = format!("expected numbers between 0 and 1, found {:?}", self.momentum);
                Err(Error::setting("momentum", message))
            }
        }
    }

    fn rising() -> f64 {
        0.3
    }

    fn start_divisor() -> f64 {
        25.
    }

    fn end_divisor() -> f64 {
        1e4
    }

    fn momentum() -> [f64; 2] {
        [0.85, 0.95]
    }

    fn cycles_momentum() -> bool {
        true
    }

    fn at(&self, t: u64) -> Rates {
        let first = self.max_lr / self.start_divisor;
        let last = first / self.end_divisor;
        let [low, high] = self.momentum;
        let (end, top) = (self.steps as f64 - 1., self.rising * self.steps as f64 - 1.);
        // Each phase: its last step, and the first and last learning rate and momentum.
        let up = (top, [first, self.max_lr], [high, low]);
        let phases = if self.three_phases {
            vec![up, (2. * top, [self.max_lr, first], [low, high]), (end, [first, last], [high, high])]
        } else {
            vec![up, (end, [self.max_lr, last], [low, high])]
        };
        let time = t as f64;
        let current = phases.iter().position(|(end, ..)| time <= *end).unwrap_or(phases.len() - 1);
        let start = if current == 0 { 0. } else { phases[current - 1].0 };
        let (end, lr, momentum) = phases[current];
        let share = ((time - start) / (end - start)).min(1.);
        let between = |[from, to]: [f64; 2]| match self.linear {
            true => from + (to - from) * share,
            false => half_cosine(from, to, share),
        };
        Rates { lr: between(lr), momentum: self.cycle_momentum.then(|| between(momentum)) }
    }
}

/// Interpolates from `high` to `low` along a half cosine; `share` is the fraction covered.
fn half_cosine(high: f64, low: f64, share: f64) -> f64 {
    low + (high - low) * (1. + (PI * share).cos()) / 2.
}

fn rising(milestones: &[u64]) -> Result<()> {
    if milestones.is_sorted_by(|a, b| a < b) {
        return Ok(());
    }
    Err(Error::setting("milestones", "expected steps in rising order"))
}

/// Lowers the learning rate when a metric stops improving (torch: `ReduceLROnPlateau`).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Plateau {
    /// The validation metric to watch.
    pub monitor: String,
    /// Multiplier of the learning rate.
    pub factor: f64,
    /// Validations without improvement to tolerate.
    pub patience: u64,
    /// The smallest change that counts as an improvement.
    pub threshold: f64,
    /// Whether `threshold` is an absolute difference. If false, it is a fraction of the best value; if that
    /// is negative, slightly worse values then count as better (as in PyTorch), so use an absolute difference
    /// there.
    pub absolute: bool,
    /// Whether larger is better.
    pub maximize: bool,
    /// Validations to ignore after a reduction.
    pub cooldown: u64,
    /// The lowest learning rate.
    pub min_lr: f64,
    /// The smallest change of the learning rate to apply.
    pub eps: f64,
}

impl Default for Plateau {
    fn default() -> Self {
        Self {
            monitor: "loss".into(),
            factor: 0.1,
            patience: 10,
            threshold: 1e-4,
            absolute: false,
            maximize: false,
            cooldown: 0,
            min_lr: 0.,
            eps: 1e-8,
        }
    }
}

/// State of a [`Plateau`] between validations, to be saved in checkpoints.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct PlateauState {
    /// The best value so far.
    pub best: Option<f64>,
    /// Validations since the last improvement.
    pub waited: u64,
    /// Validations left to ignore.
    pub cooling: u64,
}

impl Plateau {
    /// Checks that it can lower the learning rate under this schedule.
    pub fn check(&self, schedule: &Schedule) -> Result<()> {
        if !(self.factor > 0. && self.factor < 1.) {
            let message = format!("expected a number between 0 and 1, found {}", self.factor);
            return Err(Error::setting("factor", message));
        }
        if schedule.has_its_own_lr() {
            let message = "a plateau lowers the optimizer's `lr`, which `one_cycle` does not use";
            return Err(Error::setting("factor", message));
        }
        Ok(())
    }

    /// The criterion that it watches.
    pub(crate) fn criterion(&self) -> Criterion {
        Criterion::new(&self.monitor, self.maximize)
    }

    /// Returns the learning rate after a validation with this `metric`.
    pub fn next(&self, state: &mut PlateauState, metric: f64, lr: f64) -> f64 {
        let sign = if self.maximize { 1. } else { -1. };
        let margin = |best: f64| if self.absolute { self.threshold } else { self.threshold * best };
        // NaN is no improvement.
        if state.best.is_none_or(|best| sign * metric > sign * best + margin(best)) && !metric.is_nan() {
            state.best = Some(metric);
            state.waited = 0;
        } else {
            state.waited += 1;
        }
        if state.cooling > 0 {
            state.cooling -= 1;
            state.waited = 0;
        }
        if state.waited <= self.patience {
            return lr;
        }
        state.cooling = self.cooldown;
        state.waited = 0;
        let lower = (lr * self.factor).max(self.min_lr);
        if lr - lower > self.eps { lower } else { lr }
    }
}
