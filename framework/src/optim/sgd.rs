//! Stochastic gradient descent with momentum (Sutskever et al. 2013), as PyTorch computes it.

use candle_core::{Tensor, Var};
use candlepower_kernels::updates::{SgdParam, SgdStep};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Optimizer, named_state, zeros_like};
use crate::error::Result;
use crate::schedule::Rates;

/// Fields of `[optimizer]` for `sgd`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct SgdConfig {
    /// Learning rate.
    pub lr: f64,
    /// Share of the last update that goes on.
    pub momentum: f64,
    /// Share of the gradient that does not enter the momentum.
    pub dampening: f64,
    /// Times the parameter, added to its gradient.
    pub weight_decay: f64,
    /// Look ahead along the momentum (Nesterov).
    pub nesterov: bool,
}

impl Default for SgdConfig {
    fn default() -> Self {
        Self { lr: 1e-3, momentum: 0., dampening: 0., weight_decay: 0., nesterov: false }
    }
}

/// SGD with the momentum of every parameter.
pub struct Sgd {
    params: Vec<(String, Var)>,
    /// Empty without momentum.
    momentum_buffers: Vec<Var>,
    config: SgdConfig,
}

impl Sgd {
    /// The optimizer of these parameters.
    pub fn new(params: &[(String, Var)], config: &SgdConfig) -> Result<Self> {
        let momentum_buffers = if config.momentum == 0. { Vec::new() } else { zeros_like(params)? };
        Ok(Self { params: params.to_vec(), momentum_buffers, config: config.clone() })
    }
}

impl Optimizer for Sgd {
    fn step(&mut self, gradients: &[Tensor], t: u64, rates: Rates) -> Result<()> {
        let SgdConfig { momentum, dampening, weight_decay, nesterov, .. } = self.config;
        let momentum = rates.momentum.unwrap_or(momentum) as f32;
        // The first gradient enters whole: there is no update yet that it could dampen.
        let entering = if t == 1 { 1. } else { (1. - dampening) as f32 };
        let step = SgdStep { lr: rates.lr as f32, momentum, entering, l2: weight_decay as f32, nesterov };
        let params = gradients.iter().enumerate().map(|(i, gradient)| SgdParam {
            param: &self.params[i].1,
            gradient,
            momentum_buffer: self.momentum_buffers.get(i).map(Var::as_tensor),
        });
        Ok(step.apply(&params.collect::<Vec<_>>())?)
    }

    fn state(&self) -> Vec<(String, Var)> {
        named_state("momentum_buffer", &self.params, &self.momentum_buffers)
    }
}
