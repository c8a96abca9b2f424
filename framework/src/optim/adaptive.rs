//! Adagrad, Adadelta, Adamax, NAdam and RAdam, as PyTorch computes them.

use candle_core::{Tensor, Var};
use candlepower_kernels::clipping::GradScale;
use candlepower_kernels::elementwise::{zip2, zip3};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Optimizer, Param, named_state, on_host, zeros_like};
use crate::error::Result;
use crate::schedule::Rates;

/// Fields of `[optimizer]` for `adagrad`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct AdagradConfig {
    /// Learning rate.
    pub lr: f64,
    /// The learning rate of step t is divided by `1 + t * lr_decay`.
    pub lr_decay: f64,
    /// Times the parameter, added to its gradient.
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
    /// Decay of both mean squares.
    pub rho: f64,
    /// Added to both mean squares.
    pub eps: f64,
    /// Times the parameter, added to its gradient.
    pub weight_decay: f64,
}

impl Default for AdadeltaConfig {
    fn default() -> Self {
        Self { lr: 1., rho: 0.9, eps: 1e-6, weight_decay: 0. }
    }
}

/// Fields of `[optimizer]` for `adamax`, `nadam` and `radam`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct MomentsConfig {
    /// Learning rate.
    pub lr: f64,
    /// Decay of the first and the second moment.
    pub betas: [f64; 2],
    /// Added to the denominator.
    pub eps: f64,
    /// Times the parameter, added to its gradient.
    pub weight_decay: f64,
}

impl Default for MomentsConfig {
    fn default() -> Self {
        Self { lr: 2e-3, betas: [0.9, 0.999], eps: 1e-8, weight_decay: 0. }
    }
}

/// Adagrad (Duchi, Hazan and Singer 2011): divides by the root of all squares so far.
pub struct Adagrad {
    params: Vec<Param>,
    sum: Vec<Var>,
    config: AdagradConfig,
    /// Of this step.
    lr: f32,
}

impl Adagrad {
    /// The optimizer of these parameters.
    pub fn new(params: &[Param], config: &AdagradConfig) -> Result<Self> {
        Ok(Self { params: params.to_vec(), sum: zeros_like(params)?, config: config.clone(), lr: 0. })
    }
}

impl Optimizer for Adagrad {
    fn prepare(&mut self, t: u64, rates: Rates) -> Result<()> {
        self.lr = (rates.lr / (1. + (t - 1) as f64 * self.config.lr_decay)) as f32;
        Ok(())
    }

    fn step(&self, gradients: &[Tensor], scale: &GradScale) -> Result<()> {
        let (lr, eps) = (self.lr, self.config.eps as f32);
        on_host(&self.params, gradients, scale, self.config.weight_decay, |i, gradient| {
            let (param, sum) = (&self.params[i].master, &self.sum[i]);
            zip2(sum, gradient, |s: &mut f32, g| *s += g * g)?;
            Ok(zip3(param, gradient, sum, move |w: &mut f32, g, s| *w -= lr * g / (s.sqrt() + eps))?)
        })
    }

    fn state(&self) -> Vec<(String, Var)> {
        named_state("sum", &self.params, &self.sum)
    }
}

/// Adadelta (Zeiler 2012, algorithm 1): moves by the ratio of two root mean squares.
pub struct Adadelta {
    params: Vec<Param>,
    square: Vec<Var>,
    moved: Vec<Var>,
    config: AdadeltaConfig,
    /// Of this step.
    lr: f32,
}

impl Adadelta {
    /// The optimizer of these parameters.
    pub fn new(params: &[Param], config: &AdadeltaConfig) -> Result<Self> {
        let (square, moved) = (zeros_like(params)?, zeros_like(params)?);
        Ok(Self { params: params.to_vec(), square, moved, config: config.clone(), lr: 0. })
    }
}

impl Optimizer for Adadelta {
    fn prepare(&mut self, _: u64, rates: Rates) -> Result<()> {
        self.lr = rates.lr as f32;
        Ok(())
    }

    fn step(&self, gradients: &[Tensor], scale: &GradScale) -> Result<()> {
        let (lr, rho, eps) = (self.lr, self.config.rho as f32, self.config.eps as f32);
        on_host(&self.params, gradients, scale, self.config.weight_decay, |i, gradient| {
            let (param, square, moved) = (&self.params[i].master, &self.square[i], &self.moved[i]);
            zip2(square, gradient, move |v: &mut f32, g| *v = *v * rho + (1. - rho) * g * g)?;
            // (g, v, u) to the step g * sqrt(u + eps) / sqrt(v + eps), in a copy of the gradient.
            let step = gradient.copy()?;
            zip3(&step, moved, square, move |g: &mut f32, u, v| *g *= (u + eps).sqrt() / (v + eps).sqrt())?;
            zip2(moved, &step, move |u: &mut f32, d| *u = *u * rho + (1. - rho) * d * d)?;
            Ok(zip2(param, &step, move |w: &mut f32, d| *w -= lr * d)?)
        })
    }

    fn state(&self) -> Vec<(String, Var)> {
        let mut state = named_state("square_avg", &self.params, &self.square);
        state.extend(named_state("acc_delta", &self.params, &self.moved));
        state
    }
}

/// Which denominator and corrections a rule on two moments has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rule {
    /// Adam on the largest gradient (Kingma and Ba 2015, section 7.1).
    Adamax,
    /// Adam with Nesterov's look ahead (Dozat 2016).
    Nadam,
    /// Adam that starts without its denominator (Liu et al. 2020, algorithm 2).
    Radam,
}

/// Adamax, NAdam or RAdam with the moments of every parameter.
pub struct Moments {
    params: Vec<Param>,
    first: Vec<Var>,
    second: Vec<Var>,
    rule: Rule,
    config: MomentsConfig,
    warm_up: WarmUp,
    /// Of this step.
    numbers: Factors,
}

/// NAdam's momentum, which warms up, and its product over the steps so far.
#[derive(Clone, Copy, Default)]
struct WarmUp {
    beta1: f64,
    steps: u64,
    product: f64,
}

impl WarmUp {
    /// The momentum of step `t`.
    fn momentum(beta1: f64, t: u64) -> f64 {
        beta1 * (1. - 0.5 * 0.96f64.powf(t as f64 * 0.004))
    }

    /// The product over the first `t` steps with this beta1. From one step to the next it is one factor more.
    fn product(&mut self, beta1: f64, t: u64) -> f64 {
        if self.beta1 != beta1 || self.steps == 0 || self.steps > t {
            *self = Self { beta1, steps: 0, product: 1. };
        }
        let rest = (self.steps + 1..=t).map(|t| Self::momentum(beta1, t));
        (self.product, self.steps) = (rest.fold(self.product, |product, mu| product * mu), t);
        self.product
    }
}

/// Of a step of [`Moments`].
#[derive(Clone, Copy, Default)]
struct Factors {
    beta1: f32,
    of_moment: f32,
    of_gradient: f32,
    /// Of the root in the denominator; none: the denominator is 1.
    root: Option<f32>,
}

impl Moments {
    /// The optimizer of these parameters by this rule.
    pub fn new(params: &[Param], rule: Rule, config: &MomentsConfig) -> Result<Self> {
        let (first, second) = (zeros_like(params)?, zeros_like(params)?);
        Ok(Self {
            params: params.to_vec(),
            first,
            second,
            rule,
            config: config.clone(),
            warm_up: WarmUp::default(),
            numbers: Factors::default(),
        })
    }

    fn factors(&mut self, t: u64, lr: f64, [beta1, beta2]: [f64; 2]) -> Factors {
        let correction = |beta: f64| 1. - beta.powf(t as f64);
        let (of_moment, of_gradient, root) = match self.rule {
            Rule::Adamax => (lr / correction(beta1), 0., Some(1.)),
            Rule::Nadam => {
                // The product replaces the power of beta1.
                let product = self.warm_up.product(beta1, t);
                let [now, next] = [t, t + 1].map(|t| WarmUp::momentum(beta1, t));
                let of_moment = lr * next / (1. - product * next);
                (of_moment, lr * (1. - now) / (1. - product), Some(1. / correction(beta2).sqrt()))
            }
            Rule::Radam => {
                let longest = 2. / (1. - beta2) - 1.;
                let length = longest - 2. * t as f64 * beta2.powf(t as f64) / correction(beta2);
                let step = lr / correction(beta1);
                if length <= 5. {
                    (step, 0., None)
                } else {
                    let rectified = ((length - 4.) * (length - 2.) * longest
                        / ((longest - 4.) * (longest - 2.) * length))
                        .sqrt();
                    // Here eps is added to the root before its correction.
                    (step * rectified * correction(beta2).sqrt(), 0., Some(1.))
                }
            }
        };
        let [beta1, of_moment, of_gradient] = [beta1, of_moment, of_gradient].map(|x| x as f32);
        Factors { beta1, of_moment, of_gradient, root: root.map(|x| x as f32) }
    }
}

impl Optimizer for Moments {
    fn prepare(&mut self, t: u64, rates: Rates) -> Result<()> {
        let beta1 = rates.momentum.unwrap_or(self.config.betas[0]);
        self.numbers = self.factors(t, rates.lr, [beta1, self.config.betas[1]]);
        Ok(())
    }

    fn step(&self, gradients: &[Tensor], scale: &GradScale) -> Result<()> {
        let Factors { beta1, of_moment, of_gradient, root } = self.numbers;
        let (beta2, eps) = (self.config.betas[1] as f32, self.config.eps as f32);
        let largest = self.rule == Rule::Adamax;
        on_host(&self.params, gradients, scale, self.config.weight_decay, |i, gradient| {
            let (param, first, second) = (&self.params[i].master, &self.first[i], &self.second[i]);
            zip2(first, gradient, move |m: &mut f32, g| *m += (g - *m) * (1. - beta1))?;
            zip2(second, gradient, move |v: &mut f32, g| {
                *v =
                    if largest { (*v * beta2).max(g.abs() + eps) } else { *v * beta2 + (1. - beta2) * g * g };
            })?;
            // The numerator, in a copy of the gradient.
            let numerator = gradient.copy()?;
            zip2(&numerator, first, move |g: &mut f32, m| *g = of_moment * m + of_gradient * *g)?;
            match root {
                None => zip2(param, &numerator, |w: &mut f32, n| *w -= n)?,
                Some(_) if largest => zip3(param, &numerator, second, |w: &mut f32, n, v| *w -= n / v)?,
                Some(factor) => zip3(param, &numerator, second, move |w: &mut f32, n, v| {
                    *w -= n / (v.sqrt() * factor + eps);
                })?,
            }
            Ok(())
        })
    }

    fn state(&self) -> Vec<(String, Var)> {
        let mut state = named_state("exp_avg", &self.params, &self.first);
        let second = if self.rule == Rule::Adamax { "exp_inf" } else { "exp_avg_sq" };
        state.extend(named_state(second, &self.params, &self.second));
        state
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_product_of_momenta_is_the_same_however_one_comes_to_a_step() {
        let from_one = |beta1, t| (1..=t).map(|t| WarmUp::momentum(beta1, t)).product::<f64>();
        let mut warm_up = WarmUp::default();
        // Step after step, the same one again, after a resume, and with another beta1.
        for (beta1, t) in [(0.9, 1), (0.9, 2), (0.9, 2), (0.9, 3), (0.9, 40), (0.8, 41), (0.8, 42), (0.8, 7)]
        {
            assert_eq!(warm_up.product(beta1, t).to_bits(), from_one(beta1, t).to_bits(), "{beta1} {t}");
        }
    }
}
