//! Adam and AdamW (Kingma and Ba 2015, algorithm 1; Loshchilov and Hutter 2019, algorithm 2), as PyTorch computes them.

use candle_core::{Device, Tensor, Var};
use candlepower_kernels::clipping::GradScale;
use candlepower_kernels::updates::{AdamParam, AdamStep, Placed};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Optimizer, Param, named_state, zeros_like};
use crate::error::Result;
use crate::schedule::Rates;

/// Fields of `[optimizer]` for `adam`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct AdamConfig {
    /// Learning rate.
    pub lr: f64,
    /// Decay of the first and the second moment.
    pub betas: [f64; 2],
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Times the parameter, added to its gradient.
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
    /// Decay of the first and the second moment.
    pub betas: [f64; 2],
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Times the learning rate: the share of every parameter that is taken away at each step.
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

/// How much of a parameter is taken away, and where.
enum Decay {
    /// As a part of the gradient, so it passes through the moments.
    Gradient(f32),
    /// From the parameter itself, times the learning rate.
    Parameter(f64),
}

/// Adam with the moments of every parameter.
pub struct Adam {
    params: Vec<Param>,
    first: Vec<Var>,
    second: Vec<Var>,
    /// The largest second moment so far; empty without amsgrad.
    largest: Vec<Var>,
    betas: [f64; 2],
    eps: f64,
    decay: Decay,
    numbers: Placed<AdamStep>,
}

impl Adam {
    /// The optimizer of these parameters.
    pub fn new(params: &[Param], config: &AdamConfig) -> Result<Self> {
        let AdamConfig { betas, eps, weight_decay, amsgrad, .. } = *config;
        Self::with_decay(params, betas, eps, amsgrad, Decay::Gradient(weight_decay as f32))
    }

    fn with_decay(params: &[Param], betas: [f64; 2], eps: f64, amsgrad: bool, decay: Decay) -> Result<Self> {
        let largest = if amsgrad { zeros_like(params)? } else { Vec::new() };
        let (first, second) = (zeros_like(params)?, zeros_like(params)?);
        let numbers = Placed::on(params.first().map_or(&Device::Cpu, |it| it.master.device()))?;
        Ok(Self { params: params.to_vec(), first, second, largest, betas, eps, decay, numbers })
    }
}

impl Optimizer for Adam {
    fn prepare(&mut self, t: u64, rates: Rates) -> Result<()> {
        let Rates { lr, momentum } = rates;
        let (beta1, beta2) = (momentum.unwrap_or(self.betas[0]), self.betas[1]);
        let correction = |beta: f64| 1. - beta.powf(t as f64);
        let step_size = (lr / correction(beta1)) as f32;
        let root_correction = correction(beta2).sqrt() as f32;
        let (l2, keep) = match self.decay {
            Decay::Gradient(decay) => (decay, 1.),
            Decay::Parameter(decay) => (0., (1. - lr * decay) as f32),
        };
        Ok(self.numbers.set(AdamStep {
            one_minus_beta1: (1. - beta1) as f32,
            beta2: beta2 as f32,
            one_minus_beta2: (1. - beta2) as f32,
            eps: self.eps as f32,
            step_size,
            root_correction,
            l2,
            keep,
        })?)
    }

    fn step(&self, gradients: &[Tensor], scale: &GradScale) -> Result<()> {
        let params = gradients.iter().enumerate().map(|(i, gradient)| AdamParam {
            param: &self.params[i].master,
            copy: self.params[i].copy.as_ref().map(Var::as_tensor),
            gradient,
            first: &self.first[i],
            second: &self.second[i],
            largest: self.largest.get(i).map(Var::as_tensor),
        });
        Ok(self.numbers.apply(&params.collect::<Vec<_>>(), scale)?)
    }

    fn stays_on_device(&self) -> bool {
        true
    }

    fn state(&self) -> Vec<(String, Var)> {
        let mut state = named_state("exp_avg", &self.params, &self.first);
        state.extend(named_state("exp_avg_sq", &self.params, &self.second));
        state.extend(named_state("max_exp_avg_sq", &self.params, &self.largest));
        state
    }
}

/// Adam whose weight decay does not pass through the moments.
pub struct AdamW(Adam);

impl AdamW {
    /// The optimizer of these parameters.
    pub fn new(params: &[Param], config: &AdamWConfig) -> Result<Self> {
        let AdamWConfig { betas, eps, weight_decay, amsgrad, .. } = *config;
        Ok(Self(Adam::with_decay(params, betas, eps, amsgrad, Decay::Parameter(weight_decay))?))
    }
}

impl Optimizer for AdamW {
    fn prepare(&mut self, t: u64, rates: Rates) -> Result<()> {
        self.0.prepare(t, rates)
    }

    fn step(&self, gradients: &[Tensor], scale: &GradScale) -> Result<()> {
        self.0.step(gradients, scale)
    }

    fn stays_on_device(&self) -> bool {
        true
    }

    fn state(&self) -> Vec<(String, Var)> {
        self.0.state()
    }
}
