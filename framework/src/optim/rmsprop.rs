//! RMSprop (Hinton's lecture; the centred form of Graves 2013), as PyTorch computes it.

use candlepower_kernels::updates::{MOST_STATES, RmspropStep};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::ruled::Recipe;
use crate::schedule::{Rates, Schedule};

/// Fields of `[optimizer]` for `rmsprop`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct RmspropConfig {
    /// Learning rate.
    pub lr: f64,
    /// Decay of the mean square.
    pub alpha: f64,
    /// Added to the root of the mean square.
    pub eps: f64,
    /// Times the parameter, added to its gradient.
    pub weight_decay: f64,
    /// Momentum factor.
    pub momentum: f64,
    /// Divide by the standard deviation instead of the root mean square.
    pub centered: bool,
}

impl Default for RmspropConfig {
    fn default() -> Self {
        Self { lr: 1e-2, alpha: 0.99, eps: 1e-8, weight_decay: 0., momentum: 0., centered: false }
    }
}

impl Recipe for RmspropConfig {
    type Step = RmspropStep;

    fn kept(&self, schedule: &Schedule) -> [Option<&'static str>; MOST_STATES] {
        let has_momentum = self.momentum != 0. || schedule.drives_momentum();
        [Some("square_avg"), has_momentum.then_some("momentum_buffer"), self.centered.then_some("grad_avg")]
    }

    fn step(&self, _: u64, rates: Rates) -> RmspropStep {
        RmspropStep {
            lr: rates.lr as f32,
            alpha: self.alpha as f32,
            one_minus_alpha: (1. - self.alpha) as f32,
            eps: self.eps as f32,
            momentum: rates.momentum.unwrap_or(self.momentum) as f32,
            l2: self.weight_decay as f32,
            centered: self.centered,
        }
    }
}
