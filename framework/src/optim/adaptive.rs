//! Adagrad, Adadelta, Adamax, NAdam and RAdam, as PyTorch computes them.

use candle_core::{DType, Tensor, Var};
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
    /// Of NAdam: the product of the momenta of all steps, for each parameter.
    products: Vec<Var>,
    /// Of this step: its number, its learning rate, and the decays of both moments.
    step: (u64, f64, [f64; 2]),
}

/// Of a step of [`Moments`].
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
        let ones = params.iter().filter(|_| rule == Rule::Nadam);
        let ones = ones.map(|it| Ok(Var::ones(1, DType::F32, it.master.device())?));
        Ok(Self {
            params: params.to_vec(),
            first,
            second,
            rule,
            config: config.clone(),
            products: ones.collect::<Result<_>>()?,
            step: (0, 0., config.betas),
        })
    }

    /// NAdam's momentum of step `t`: it warms up.
    fn momentum(&self, t: u64) -> f64 {
        let (_, _, [beta1, _]) = self.step;
        beta1 * (1. - 0.5 * 0.96f64.powf(t as f64 * 0.004))
    }

    /// Multiplies this step's momentum into a parameter's product, and returns it; 1 for other rules. It is kept, as a schedule
    /// may change beta1 from step to step.
    fn advance_product(&self, param: usize) -> Result<f64> {
        let Some(product) = self.products.get(param) else { return Ok(1.) };
        let (t, ..) = self.step;
        let taken = product.to_vec1::<f32>()?[0] * self.momentum(t) as f32;
        product.slice_set(&Tensor::new(&[taken], product.device())?, 0, 0)?;
        Ok(f64::from(taken))
    }

    /// The factors of a parameter whose momenta have come to this product.
    fn factors(&self, product: f64) -> Factors {
        let (t, lr, [beta1, beta2]) = self.step;
        let correction = |beta: f64| 1. - beta.powf(t as f64);
        let (of_moment, of_gradient, root) = match self.rule {
            Rule::Adamax => (lr / correction(beta1), 0., Some(1.)),
            Rule::Nadam => {
                // The product replaces the power of beta1.
                let [now, next] = [t, t + 1].map(|t| self.momentum(t));
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
        let [beta1, beta2] = self.config.betas;
        self.step = (t, rates.lr, [rates.momentum.unwrap_or(beta1), beta2]);
        Ok(())
    }

    fn step(&self, gradients: &[Tensor], scale: &GradScale) -> Result<()> {
        let (beta2, eps) = (self.config.betas[1] as f32, self.config.eps as f32);
        let largest = self.rule == Rule::Adamax;
        on_host(&self.params, gradients, scale, self.config.weight_decay, |i, gradient| {
            let (param, first, second) = (&self.params[i].master, &self.first[i], &self.second[i]);
            let Factors { beta1, of_moment, of_gradient, root } = self.factors(self.advance_product(i)?);
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
        state.extend(named_state("mu_product", &self.params, &self.products));
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
        let mut nadam = Moments::new(&params, Rule::Nadam, &config).unwrap();
        let guarded = Clipping { only_finite: true, ..Default::default() };
        let (mut expected, mut m, mut v, mut product) = (1f64, 0., 0., 1.);
        let lr = 0.1;
        // By PyTorch's lines, with another beta1 in each step. The second step is refused first, and changes nothing.
        for (t, beta1, gradient) in [(1, 0.95, 0.5), (2, 0.9, f64::NAN), (2, 0.9, -2.), (3, 0.85, 0.25)] {
            nadam.prepare(t, Rates { momentum: Some(beta1), ..lr.into() }).unwrap();
            let gradients = [Tensor::new(&[gradient as f32], &Device::Cpu).unwrap()];
            nadam.step(&gradients, &guarded.decide(&gradients).unwrap().scale).unwrap();
            if gradient.is_finite() {
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
