//! Stochastic gradient descent with momentum (Sutskever et al. 2013), as PyTorch computes it.

use candlepower_kernels::updates::{MOST_STATES, SgdStep};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::ruled::Recipe;
use crate::schedule::{Rates, Schedule};

/// Fields of `[optimizer]` for `sgd`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct SgdConfig {
    /// Learning rate.
    pub lr: f64,
    /// Momentum factor.
    pub momentum: f64,
    /// Share of the gradient that does not enter the momentum.
    pub dampening: f64,
    /// L2 penalty: this times the parameter is added to its gradient.
    pub weight_decay: f64,
    /// Look ahead along the momentum (Nesterov).
    pub nesterov: bool,
}

impl Default for SgdConfig {
    fn default() -> Self {
        Self { lr: 1e-3, momentum: 0., dampening: 0., weight_decay: 0., nesterov: false }
    }
}

impl Recipe for SgdConfig {
    type Step = SgdStep;

    fn kept(&self, schedule: &Schedule) -> [Option<&'static str>; MOST_STATES] {
        let has_momentum = self.momentum != 0. || schedule.drives_momentum();
        [has_momentum.then_some("momentum_buffer"), None, None]
    }

    fn step(&self, t: u64, rates: Rates) -> SgdStep {
        let momentum = rates.momentum.unwrap_or(self.momentum);
        // The first gradient enters whole: there is no earlier update yet.
        let entering = if t == 1 || momentum == 0. { 1. } else { 1. - self.dampening };
        SgdStep {
            lr: rates.lr as f32,
            momentum: momentum as f32,
            entering: entering as f32,
            l2: self.weight_decay as f32,
            nesterov: self.nesterov,
        }
    }
}
