//! Stochastic gradient descent with momentum (Sutskever et al. 2013), as PyTorch computes it.

use candle_core::{Device, Tensor, Var};
use candlepower_kernels::clipping::GradScale;
use candlepower_kernels::updates::{Placed, SgdParam, SgdStep};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Optimizer, Param, named_state, zeros_like};
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
    params: Vec<Param>,
    /// Empty without momentum.
    momentum_buffers: Vec<Var>,
    config: SgdConfig,
    numbers: Placed<SgdStep>,
}

impl Sgd {
    /// The optimizer of these parameters.
    pub fn new(params: &[Param], config: &SgdConfig) -> Result<Self> {
        let momentum_buffers = if config.momentum == 0. { Vec::new() } else { zeros_like(params)? };
        let numbers = Placed::on(params.first().map_or(&Device::Cpu, |it| it.master.device()))?;
        Ok(Self { params: params.to_vec(), momentum_buffers, config: config.clone(), numbers })
    }
}

impl Optimizer for Sgd {
    fn prepare(&mut self, t: u64, rates: Rates) -> Result<()> {
        let SgdConfig { momentum, dampening, weight_decay, nesterov, .. } = self.config;
        let momentum = rates.momentum.unwrap_or(momentum) as f32;
        // The first gradient enters whole: there is no update yet that it could dampen.
        let entering = if t == 1 { 1. } else { (1. - dampening) as f32 };
        let l2 = weight_decay as f32;
        Ok(self.numbers.set(SgdStep { lr: rates.lr as f32, momentum, entering, l2, nesterov })?)
    }

    fn step(&self, gradients: &[Tensor], scale: &GradScale) -> Result<()> {
        let params = gradients.iter().enumerate().map(|(i, gradient)| SgdParam {
            param: &self.params[i].master,
            copy: self.params[i].copy.as_ref().map(Var::as_tensor),
            gradient,
            momentum_buffer: self.momentum_buffers.get(i).map(Var::as_tensor),
        });
        Ok(self.numbers.apply(&params.collect::<Vec<_>>(), scale)?)
    }

    fn stays_on_device(&self) -> bool {
        true
    }

    fn state(&self) -> Vec<(String, Var)> {
        named_state("momentum_buffer", &self.params, &self.momentum_buffers)
    }
}
