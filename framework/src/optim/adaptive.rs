//! Adagrad (Duchi, Hazan and Singer 2011) and Adadelta (Zeiler 2012, algorithm 1), as PyTorch computes them.

use candlepower_kernels::updates::{AdadeltaStep, AdagradStep, MOST_STATES};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::ruled::Recipe;
use crate::schedule::{Rates, Schedule};

/// Fields of `[optimizer]` for `adagrad`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct AdagradConfig {
    /// Learning rate.
    pub lr: f64,
    /// Divide the learning rate of step t, counted from 0, by `1 + t * lr_decay`.
    pub lr_decay: f64,
    /// L2 penalty: this times the parameter is added to its gradient.
    pub weight_decay: f64,
    /// Added to the root of the sum of squares.
    pub eps: f64,
}

impl Default for AdagradConfig {
    fn default() -> Self {
        Self { lr: 1e-2, lr_decay: 0., weight_decay: 0., eps: 1e-10 }
    }
}

/// Fields of `[optimizer]` for `adadelta`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct AdadeltaConfig {
    /// Learning rate.
    pub lr: f64,
    /// Decay rate of both mean squares.
    pub rho: f64,
    /// Added to both mean squares.
    pub eps: f64,
    /// L2 penalty: this times the parameter is added to its gradient.
    pub weight_decay: f64,
}

impl Default for AdadeltaConfig {
    fn default() -> Self {
        Self { lr: 1., rho: 0.9, eps: 1e-6, weight_decay: 0. }
    }
}

impl Recipe for AdagradConfig {
    type Step = AdagradStep;

    fn kept(&self, _: &Schedule) -> [Option<&'static str>; MOST_STATES] {
        [Some("sum"), None, None]
    }

    fn step(&self, t: u64, rates: Rates) -> AdagradStep {
        let lr = rates.lr / (1. + (t - 1) as f64 * self.lr_decay);
        AdagradStep { lr: lr as f32, eps: self.eps as f32, l2: self.weight_decay as f32 }
    }
}

impl Recipe for AdadeltaConfig {
    type Step = AdadeltaStep;

    fn kept(&self, _: &Schedule) -> [Option<&'static str>; MOST_STATES] {
        [Some("square_avg"), Some("acc_delta"), None]
    }

    fn step(&self, _: u64, rates: Rates) -> AdadeltaStep {
        AdadeltaStep {
            lr: rates.lr as f32,
            rho: self.rho as f32,
            one_minus_rho: (1. - self.rho) as f32,
            eps: self.eps as f32,
            l2: self.weight_decay as f32,
        }
    }
}
