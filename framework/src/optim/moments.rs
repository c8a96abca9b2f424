//! Adamax (Kingma and Ba 2015, section 7.1), NAdam (Dozat 2016) and RAdam (Liu et al. 2020, algorithm 2), as PyTorch
//! computes them.

use candle_core::{DType, Device, Tensor, Var};
use candlepower_kernels::clipping::GradScale;
use candlepower_kernels::updates::{AdamStep, AdamaxStep, MOST_STATES};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::adam::correction;
use super::ruled::{Recipe, Ruled};
use super::{FusedOptimizer, Param};
use crate::error::Result;
use crate::schedule::{Rates, Schedule};

/// Fields of `[optimizer]` for `adamax` and `nadam`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct MomentsConfig {
    /// Learning rate.
    pub lr: f64,
    /// Decay rates of the first and the second moment.
    pub betas: [f64; 2],
    /// Added to the denominator.
    pub eps: f64,
    /// L2 penalty: this times the parameter is added to its gradient.
    pub weight_decay: f64,
}

impl Default for MomentsConfig {
    fn default() -> Self {
        Self { lr: 2e-3, betas: [0.9, 0.999], eps: 1e-8, weight_decay: 0. }
    }
}

/// Fields of `[optimizer]` for `radam`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct RadamConfig {
    /// Learning rate.
    pub lr: f64,
    /// Decay rates of the first and the second moment.
    pub betas: [f64; 2],
    /// Added to the denominator.
    pub eps: f64,
    /// L2 penalty: this times the parameter is added to its gradient.
    pub weight_decay: f64,
}

impl Default for RadamConfig {
    fn default() -> Self {
        Self { lr: 1e-3, betas: [0.9, 0.999], eps: 1e-8, weight_decay: 0. }
    }
}

/// Adam with the infinity norm of the gradients in place of the second moment.
pub(super) struct Adamax(pub(super) MomentsConfig);

impl Recipe for Adamax {
    type Step = AdamaxStep;

    fn kept(&self, _: &Schedule) -> [Option<&'static str>; MOST_STATES] {
        [Some("exp_avg"), Some("exp_inf"), None]
    }

    fn step(&self, t: u64, Rates { lr, momentum }: Rates) -> AdamaxStep {
        let MomentsConfig { betas: [beta1, beta2], eps, weight_decay, .. } = self.0;
        let beta1 = momentum.unwrap_or(beta1);
        AdamaxStep {
            one_minus_beta1: (1. - beta1) as f32,
            beta2: beta2 as f32,
            eps: eps as f32,
            of_moment: (lr / correction(beta1, t)) as f32,
            l2: weight_decay as f32,
        }
    }
}

impl Recipe for RadamConfig {
    type Step = AdamStep;

    fn kept(&self, _: &Schedule) -> [Option<&'static str>; MOST_STATES] {
        BOTH_MOMENTS
    }

    fn step(&self, t: u64, Rates { lr, momentum }: Rates) -> AdamStep {
        let Self { betas: [beta1, beta2], eps, weight_decay, .. } = *self;
        let beta1 = momentum.unwrap_or(beta1);
        let of_moment = lr / correction(beta1, t);
        let longest = 2. / (1. - beta2) - 1.;
        let length = longest - 2. * t as f64 * beta2.powf(t as f64) / correction(beta2, t);
        let plain = AdamStep { of_moment: of_moment as f32, ..plain_step([beta1, beta2], eps, weight_decay) };
        if length <= 5. {
            // Makes the denominator 1.
            return AdamStep { root_correction: f32::INFINITY, eps: 1., ..plain };
        }
        let rectified = (length - 4.) * (length - 2.) * longest / ((longest - 4.) * (longest - 2.) * length);
        // RAdam adds eps to the root before correcting it.
        let of_moment = of_moment * rectified.sqrt() * correction(beta2, t).sqrt();
        AdamStep { of_moment: of_moment as f32, ..plain }
    }
}

const BOTH_MOMENTS: [Option<&str>; MOST_STATES] = [Some("exp_avg"), Some("exp_avg_sq"), None];

/// Coefficients with step size zero and no bias correction, to be completed for each step.
fn plain_step([beta1, beta2]: [f64; 2], eps: f64, weight_decay: f64) -> AdamStep {
    AdamStep {
        one_minus_beta1: (1. - beta1) as f32,
        beta2: beta2 as f32,
        one_minus_beta2: (1. - beta2) as f32,
        eps: eps as f32,
        of_moment: 0.,
        of_gradient: 0.,
        root_correction: 1.,
        l2: weight_decay as f32,
        keep: 1.,
    }
}

/// Adam with Nesterov momentum.
pub(super) struct Nadam {
    ruled: Ruled<LookAhead>,
    /// Product of the momenta of all steps taken. Stored, because a schedule may change beta1 from step to
    /// step; under the name of each parameter, as in PyTorch.
    product: Var,
    names: Vec<String>,
}

struct LookAhead {
    config: MomentsConfig,
    /// Product of the momenta of all steps up to the prepared one.
    product: f64,
}

impl LookAhead {
    /// The momentum of step `t`; it warms up.
    fn momentum(&self, t: u64, rates: Rates) -> f64 {
        let beta1 = rates.momentum.unwrap_or(self.config.betas[0]);
        beta1 * (1. - 0.5 * 0.96f64.powf(t as f64 * 0.004))
    }
}

impl Recipe for LookAhead {
    type Step = AdamStep;

    fn kept(&self, _: &Schedule) -> [Option<&'static str>; MOST_STATES] {
        BOTH_MOMENTS
    }

    fn step(&self, t: u64, rates: Rates) -> AdamStep {
        let (Self { config, product }, lr) = (self, rates.lr);
        let MomentsConfig { betas: [beta1, beta2], eps, weight_decay, .. } = *config;
        let [now, next] = [t, t + 1].map(|t| self.momentum(t, rates));
        AdamStep {
            of_moment: (lr * next / (1. - product * next)) as f32,
            of_gradient: (lr * (1. - now) / (1. - product)) as f32,
            root_correction: correction(beta2, t).sqrt() as f32,
            ..plain_step([rates.momentum.unwrap_or(beta1), beta2], eps, weight_decay)
        }
    }
}

impl Nadam {
    pub(super) fn new(params: &[Param], config: &MomentsConfig, schedule: &Schedule) -> Result<Self> {
        let ruled = Ruled::new(params, LookAhead { config: config.clone(), product: 1. }, schedule)?;
        // On the same device as the rest of the state: ranks exchange it all together.
        let device = params.first().map_or(&Device::Cpu, |it| it.master.device());
        let names = params.iter().map(|it| format!("mu_product.{}", it.name)).collect();
        Ok(Self { ruled, product: Var::ones(1, DType::F32, device)?, names })
    }
}

impl FusedOptimizer for Nadam {
    fn prepare(&mut self, t: u64, rates: Rates) -> Result<()> {
        let product = self.product.to_vec1::<f32>()?[0] * self.ruled.recipe.momentum(t, rates) as f32;
        self.ruled.recipe.product = f64::from(product);
        self.ruled.prepare(t, rates)
    }

    fn step(&self, gradients: &[Tensor], scale: &GradScale) -> Result<()> {
        self.ruled.step(gradients, scale)
    }

    fn commit(&mut self) -> Result<()> {
        let product = Tensor::new(&[self.ruled.recipe.product as f32], self.product.device())?;
        Ok(self.product.set(&product)?)
    }

    fn state(&self) -> Vec<(String, Var)> {
        let mut state = self.ruled.state();
        state.extend(self.names.iter().map(|name| (name.clone(), self.product.clone())));
        state
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;
    use crate::optim::Clipping;

    #[test]
    fn nadams_momenta_are_those_of_the_steps_that_were_taken() {
        let w = Var::new(&[1f32], &Device::Cpu).unwrap();
        let params = [Param::from(("w".into(), w.clone()))];
        let config = MomentsConfig::default();
        let mut nadam = Nadam::new(&params, &config, &Schedule::default()).unwrap();
        let guarded = Clipping { only_finite: true, ..Default::default() };
        let (mut expected, mut m, mut v, mut product) = (1f64, 0., 0., 1.);
        let lr = 0.1;
        // As in PyTorch, with a different beta1 in each step. The second step is first refused, changing
        // nothing.
        for (t, beta1, gradient) in [(1, 0.95, 0.5), (2, 0.9, f64::NAN), (2, 0.9, -2.), (3, 0.85, 0.25)] {
            nadam.prepare(t, Rates { momentum: Some(beta1), ..lr.into() }).unwrap();
            let gradients = [Tensor::new(&[gradient as f32], &Device::Cpu).unwrap()];
            nadam.step(&gradients, &guarded.decide(&gradients).unwrap().scale).unwrap();
            if gradient.is_finite() {
                nadam.commit().unwrap();
                let mu = |t: u64| beta1 * (1. - 0.5 * 0.96f64.powf(t as f64 * 0.004));
                product *= mu(t);
                m += (gradient - m) * (1. - beta1);
                v = v * config.betas[1] + (1. - config.betas[1]) * gradient * gradient;
                let root = (v / (1. - config.betas[1].powf(t as f64))).sqrt() + config.eps;
                expected -= lr * (1. - mu(t)) / (1. - product) * gradient / root;
                expected -= lr * mu(t + 1) / (1. - product * mu(t + 1)) * m / root;
            }
            let ours = f64::from(w.to_vec1::<f32>().unwrap()[0]);
            assert!((ours - expected).abs() < 1e-6, "step {t}: {ours}, not {expected}");
        }
    }
}
