//! RMSprop (Hinton's lecture; the centred form of Graves 2013), as PyTorch computes it.

use candle_core::{Tensor, Var};
use candlepower_kernels::clipping::GradScale;
use candlepower_kernels::elementwise::{zip2, zip3};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Optimizer, Param, named_state, on_host, zeros_like};
use crate::error::Result;
use crate::schedule::Rates;

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
    /// Share of the last update that goes on.
    pub momentum: f64,
    /// Divide by the standard deviation instead of the root mean square.
    pub centered: bool,
}

impl Default for RmspropConfig {
    fn default() -> Self {
        Self { lr: 1e-2, alpha: 0.99, eps: 1e-8, weight_decay: 0., momentum: 0., centered: false }
    }
}

/// RMSprop with the mean square of every gradient.
pub struct Rmsprop {
    params: Vec<Param>,
    square: Vec<Var>,
    /// Empty unless centred.
    mean: Vec<Var>,
    /// What a parameter moves by; kept between steps where there is momentum.
    update: Vec<Var>,
    config: RmspropConfig,
    rates: Rates,
}

impl Rmsprop {
    /// The optimizer of these parameters.
    pub fn new(params: &[Param], config: &RmspropConfig) -> Result<Self> {
        let mean = if config.centered { zeros_like(params)? } else { Vec::new() };
        let (square, update) = (zeros_like(params)?, zeros_like(params)?);
        Ok(Self { params: params.to_vec(), square, mean, update, config: config.clone(), rates: 0f64.into() })
    }
}

impl Optimizer for Rmsprop {
    fn prepare(&mut self, _: u64, rates: Rates) -> Result<()> {
        self.rates = rates;
        Ok(())
    }

    fn step(&self, gradients: &[Tensor], scale: &GradScale) -> Result<()> {
        let momentum = self.rates.momentum.unwrap_or(self.config.momentum) as f32;
        let (lr, alpha, eps) = (self.rates.lr as f32, self.config.alpha as f32, self.config.eps as f32);
        on_host(&self.params, gradients, scale, self.config.weight_decay, |i, gradient| {
            let (param, square, update) = (&self.params[i].master, &self.square[i], &self.update[i]);
            zip2(square, gradient, move |v: &mut f32, g| *v = *v * alpha + (1. - alpha) * g * g)?;
            let root = match self.mean.get(i) {
                Some(mean) => {
                    zip2(mean, gradient, move |m: &mut f32, g| *m += (g - *m) * (1. - alpha))?;
                    ((square.as_tensor() - mean.sqr()?)?.sqrt()? + f64::from(eps))?
                }
                None => (square.sqrt()? + f64::from(eps))?,
            };
            zip3(update, gradient, &root, move |u: &mut f32, g, root| *u = momentum * *u + g / root)?;
            Ok(zip2(param, update, move |w: &mut f32, u| *w -= lr * u)?)
        })
    }

    fn state(&self) -> Vec<(String, Var)> {
        let mut state = named_state("square_avg", &self.params, &self.square);
        state.extend(named_state("grad_avg", &self.params, &self.mean));
        if self.config.momentum > 0. {
            state.extend(named_state("momentum_buffer", &self.params, &self.update));
        }
        state
    }
}
