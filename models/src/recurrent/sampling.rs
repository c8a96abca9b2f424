//! Scheduled sampling: the probability that a model sees a true frame instead of its own prediction, by step.

use candlepower::prelude::*;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Schedule that replaces true frames by predictions during training.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Sampling {
    /// No true frames beyond the given ones, as in prediction.
    None,
    /// Fewer and fewer true frames beyond the given ones (Bengio et al. 2015).
    Linear(Linear),
    /// More and more of the given frames, and fewer and fewer true frames beyond them (Wang et al. 2021,
    /// "PredRNN", section 3.4).
    Reverse(Reverse),
}

impl Default for Sampling {
    fn default() -> Self {
        Self::Linear(Linear::default())
    }
}

/// A probability that falls linearly to zero.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Linear {
    /// Probability before the first step.
    pub start: f64,
    /// Decrease per step.
    pub rate: f64,
    /// Step from which the probability is zero.
    pub stop: u64,
}

impl Default for Linear {
    fn default() -> Self {
        Self { start: 1., rate: 2e-5, stop: 50_000 }
    }
}

/// Two probabilities that start at one half: for given frames, and for true frames beyond them.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Reverse {
    /// Step until which both are one half.
    pub start: u64,
    /// Step from which all given frames are seen, and no true frames beyond them.
    pub stop: u64,
    /// Time constant in steps: the probability of not seeing a given frame falls by a factor of e in this many steps.
    pub decay: f64,
}

impl Default for Reverse {
    fn default() -> Self {
        Self { start: 25_000, stop: 50_000, decay: 5_000. }
    }
}

impl Sampling {
    pub(crate) fn check(&self) -> Result<()> {
        let wrong = |message: String| Err(Error::setting("sampling", message));
        match self {
            Self::Linear(Linear { start, rate, .. }) if !((0. ..=1.).contains(start) && *rate >= 0.) => {
                wrong(format!("expected a start from 0 to 1 and a rate from 0 up, found {start} and {rate}"))
            }
            Self::Reverse(Reverse { start, stop, .. }) if start >= stop => {
                wrong(format!("expected a start before the stop, found {start} and {stop}"))
            }
            Self::Reverse(Reverse { decay, .. }) if decay.is_nan() || *decay <= 0. => {
                wrong(format!("expected a decay above 0, found {decay}"))
            }
            _ => Ok(()),
        }
    }

    /// The probability, in the step after `step` steps, that each replaceable frame is a true one: T_out - 1
    /// frames, or T_in + T_out - 2 with reverse sampling.
    pub fn probabilities(&self, step: u64, frames_in: usize, frames_out: usize) -> Vec<f64> {
        match self {
            Self::None => Vec::new(),
            Self::Linear(linear) => vec![linear.at(step); frames_out - 1],
            Self::Reverse(reverse) => {
                let (given, beyond) = reverse.at(step);
                [vec![given; frames_in - 1], vec![beyond; frames_out - 1]].concat()
            }
        }
    }
}

impl Linear {
    /// The probability in the step after `step` steps. It already falls once before the first step.
    pub fn at(&self, step: u64) -> f64 {
        if step < self.stop { (self.start - self.rate * (step as f64 + 1.)).max(0.) } else { 0. }
    }
}

impl Reverse {
    /// The probabilities of given frames and of true frames beyond them, in the step after `step` steps.
    pub fn at(&self, step: u64) -> (f64, f64) {
        if step < self.start {
            (0.5, 0.5)
        } else if step < self.stop {
            let into = (step - self.start) as f64;
            let beyond = 0.5 - 0.5 * into / (self.stop - self.start) as f64;
            (1. - 0.5 * (-into / self.decay).exp(), beyond)
        } else {
            (1., 0.)
        }
    }
}
