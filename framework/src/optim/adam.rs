//! Adam and AdamW (Kingma and Ba 2015, algorithm 1; Loshchilov and Hutter 2019, algorithm 2), as PyTorch computes them.

use candlepower_kernels::updates::{AdamStep, MOST_STATES};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::ruled::Recipe;
use crate::schedule::{Rates, Schedule};

/// Fields of `[optimizer]` for `adam`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct AdamConfig {
    /// Learning rate.
    pub lr: f64,
    /// Decay rates of the first and the second moment.
    pub betas: [f64; 2],
    /// Added to the root of the second moment.
    pub eps: f64,
    /// L2 penalty: this times the parameter is added to its gradient.
    pub weight_decay: f64,
    /// Divide by the largest second moment so far (Reddi et al. 2018).
    pub amsgrad: bool,
}

/// Fields of `[optimizer]` for `adamw`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct AdamWConfig {
    /// Learning rate.
    pub lr: f64,
    /// Decay rates of the first and the second moment.
    pub betas: [f64; 2],
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Decoupled weight decay: each step removes the share `lr * weight_decay` of every parameter.
    pub weight_decay: f64,
    /// Divide by the largest second moment so far (Reddi et al. 2018).
    pub amsgrad: bool,
}

impl Default for AdamConfig {
    fn default() -> Self {
        Self { lr: 1e-3, betas: [0.9, 0.999], eps: 1e-8, weight_decay: 0., amsgrad: false }
    }
}

impl Default for AdamWConfig {
    fn default() -> Self {
        Self { lr: 1e-3, betas: [0.9, 0.999], eps: 1e-8, weight_decay: 1e-2, amsgrad: false }
    }
}

/// Weight decay, and what it applies to.
enum Decay {
    /// Added to the gradient, so it passes through the moments.
    Gradient(f64),
    /// Subtracted from the parameter itself, times the learning rate.
    Parameter(f64),
}

/// The numbers of step `t` for Adam and AdamW.
fn step(betas: [f64; 2], eps: f64, decay: Decay, t: u64, rates: Rates) -> AdamStep {
    let Rates { lr, momentum } = rates;
    let (beta1, beta2) = (momentum.unwrap_or(betas[0]), betas[1]);
    let (l2, keep) = match decay {
        Decay::Gradient(decay) => (decay as f32, 1.),
        Decay::Parameter(decay) => (0., (1. - lr * decay) as f32),
    };
    AdamStep {
        one_minus_beta1: (1. - beta1) as f32,
        beta2: beta2 as f32,
        one_minus_beta2: (1. - beta2) as f32,
        eps: eps as f32,
        of_moment: (lr / correction(beta1, t)) as f32,
        of_gradient: 0.,
        root_correction: correction(beta2, t).sqrt() as f32,
        l2,
        keep,
    }
}

/// Bias correction: the divisor for a running mean of `t` values that starts at zero and decays by `beta`.
pub(super) fn correction(beta: f64, t: u64) -> f64 {
    1. - beta.powf(t as f64)
}

fn kept(amsgrad: bool) -> [Option<&'static str>; MOST_STATES] {
    [Some("exp_avg"), Some("exp_avg_sq"), amsgrad.then_some("max_exp_avg_sq")]
}

impl Recipe for AdamConfig {
    type Step = AdamStep;

    fn kept(&self, _: &Schedule) -> [Option<&'static str>; MOST_STATES] {
        kept(self.amsgrad)
    }

    fn step(&self, t: u64, rates: Rates) -> AdamStep {
        step(self.betas, self.eps, Decay::Gradient(self.weight_decay), t, rates)
    }
}

impl Recipe for AdamWConfig {
    type Step = AdamStep;

    fn kept(&self, _: &Schedule) -> [Option<&'static str>; MOST_STATES] {
        kept(self.amsgrad)
    }

    fn step(&self, t: u64, rates: Rates) -> AdamStep {
        step(self.betas, self.eps, Decay::Parameter(self.weight_decay), t, rates)
    }
}
