//! Optimizers: PyTorch's update rules, applied in place to all parameters in one pass.

mod adam;
mod adaptive;
mod average;
mod custom;
mod moments;
mod rmsprop;
mod ruled;
mod sgd;
mod turn;
mod turn_config;

pub use adam::{AdamConfig, AdamWConfig};
pub use adaptive::{AdadeltaConfig, AdagradConfig};
pub(crate) use average::Average;
pub use average::{AverageConfig, EmaConfig, SwaConfig};
use candle_core::{Tensor, Var};
pub use candlepower_kernels::clipping::{Clipped, Clipping, GradScale};
pub use custom::{CustomOptimizer, Optimizer};
use moments::{Adamax, Nadam};
pub use moments::{MomentsConfig, RadamConfig};
pub use rmsprop::RmspropConfig;
use ruled::Ruled;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
pub use sgd::SgdConfig;
pub(crate) use turn::Turn;
pub use turn_config::{NamedOptimizer, ParamGroup};

use crate::error::{Error, Result};
use crate::schedule::{Rates, Schedule};

/// A built-in optimizer, which updates many parameters at once. Custom ones implement [`Optimizer`].
pub trait FusedOptimizer: Send {
    /// Sets the hyper-parameters of step `t`; `rates` come from the schedule. `t` counts the steps that this
    /// optimizer has taken, from 1, so a refused step is prepared again with the same `t`.
    fn prepare(&mut self, t: u64, rates: Rates) -> Result<()>;

    /// Updates the parameters and their half-precision copies with gradients scaled and clipped by `scale`, or
    /// changes nothing if `scale` refuses the step. `gradients` are in the order of the parameters. On a device
    /// it needs nothing from the host: it can be recorded, and replayed after [`prepare`](Self::prepare) with
    /// other hyper-parameters.
    fn step(&self, gradients: &[Tensor], scale: &GradScale) -> Result<()>;

    /// Called after the prepared step has been taken.
    fn commit(&mut self) -> Result<()> {
        Ok(())
    }

    /// The state kept between steps, by name. The tensors share memory with the optimizer: writing to them
    /// restores the state.
    fn state(&self) -> Vec<(String, Var)>;
}

/// A parameter as seen by optimizers.
#[derive(Debug, Clone)]
pub struct Param {
    /// The parameter's name.
    pub name: String,
    /// The values that are moved, in f32.
    pub master: Var,
    /// The module's half-precision copy, if it has one; it follows the master.
    pub copy: Option<Var>,
}

impl From<(String, Var)> for Param {
    fn from((name, master): (String, Var)) -> Self {
        Self { name, master, copy: None }
    }
}

/// The `[optimizer]` section: the kind of optimizer, and its fields.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum OptimizerConfig {
    /// Adam (Kingma and Ba, 2015), weight decay as an L2 term.
    Adam(AdamConfig),
    /// AdamW (Loshchilov and Hutter, 2019), decoupled weight decay.
    AdamW(AdamWConfig),
    /// Stochastic gradient descent, optionally with momentum.
    Sgd(SgdConfig),
    /// RMSprop (Hinton's lecture).
    Rmsprop(RmspropConfig),
    /// Adagrad (Duchi, Hazan and Singer 2011).
    Adagrad(AdagradConfig),
    /// Adadelta (Zeiler 2012).
    Adadelta(AdadeltaConfig),
    /// Adamax (Kingma and Ba, 2015).
    Adamax(MomentsConfig),
    /// NAdam (Dozat 2016).
    Nadam(MomentsConfig),
    /// RAdam (Liu et al. 2020).
    Radam(RadamConfig),
    /// A custom optimizer ([`Optimizer`]). Configurations can name it if it is in a
    /// [`Registry`](crate::config::Registry).
    #[serde(skip)]
    Custom(CustomOptimizer),
}

impl OptimizerConfig {
    /// A custom optimizer; `name` is what messages and configurations call it.
    ///
    /// # Errors
    /// If the optimizer refuses its settings.
    pub fn custom<O: Optimizer>(name: &str, config: O::Config) -> Result<Self> {
        CustomOptimizer::new::<O>(name, config).map(Self::Custom)
    }

    /// The learning rate that the schedule scales.
    pub fn lr(&self) -> f64 {
        *self.clone().rates().0
    }

    /// Learning rate and weight decay.
    fn rates(&mut self) -> (&mut f64, &mut f64) {
        match self {
            Self::Adam(AdamConfig { lr, weight_decay, .. })
            | Self::AdamW(AdamWConfig { lr, weight_decay, .. })
            | Self::Sgd(SgdConfig { lr, weight_decay, .. })
            | Self::Rmsprop(RmspropConfig { lr, weight_decay, .. })
            | Self::Adagrad(AdagradConfig { lr, weight_decay, .. })
            | Self::Adadelta(AdadeltaConfig { lr, weight_decay, .. })
            | Self::Adamax(MomentsConfig { lr, weight_decay, .. })
            | Self::Nadam(MomentsConfig { lr, weight_decay, .. })
            | Self::Radam(RadamConfig { lr, weight_decay, .. })
            | Self::Custom(CustomOptimizer { lr, weight_decay, .. }) => (lr, weight_decay),
        }
    }

    /// The same rule with a different learning rate or weight decay.
    fn with(&self, new_lr: Option<f64>, decay: Option<f64>) -> Self {
        let mut config = self.clone();
        let (lr, weight_decay) = config.rates();
        *lr = new_lr.unwrap_or(*lr);
        *weight_decay = decay.unwrap_or(*weight_decay);
        config
    }

    /// Refuses settings that no optimizer can work with.
    pub fn check(&self) -> Result<()> {
        let lr = self.lr();
        if !(lr.is_finite() && lr >= 0.) {
            return Err(Error::setting("lr", format!("expected a learning rate of at least 0, found {lr}")));
        }
        let share = |key, value: f64| match (0. ..1.).contains(&value) {
            true => Ok(()),
            false => Err(Error::setting(key, format!("expected a number in [0, 1); found {value}"))),
        };
        let from_zero = |key, value: f64| match value.is_finite() && value >= 0. {
            true => Ok(()),
            false => Err(Error::setting(key, format!("expected a number of at least 0, found {value}"))),
        };
        from_zero("weight_decay", *self.clone().rates().1)?;
        let moments = |betas: &[f64; 2], eps| {
            betas.iter().try_for_each(|beta| share("betas", *beta)).and(from_zero("eps", eps))
        };
        match self {
            Self::Adam(config) => moments(&config.betas, config.eps)?,
            Self::AdamW(config) => moments(&config.betas, config.eps)?,
            Self::Adamax(config) | Self::Nadam(config) => moments(&config.betas, config.eps)?,
            Self::Radam(config) => moments(&config.betas, config.eps)?,
            Self::Rmsprop(config) => {
                share("alpha", config.alpha).and(share("momentum", config.momentum))?;
                from_zero("eps", config.eps)?;
            }
            Self::Adagrad(config) => {
                from_zero("eps", config.eps).and(from_zero("lr_decay", config.lr_decay))?
            }
            Self::Adadelta(config) => share("rho", config.rho).and(from_zero("eps", config.eps))?,
            Self::Sgd(SgdConfig { momentum, nesterov, dampening, .. }) => {
                from_zero("momentum", *momentum)?;
                if *nesterov && (*momentum == 0. || *dampening != 0.) {
                    return Err(Error::setting("nesterov", "needs a momentum above 0 and no dampening"));
                }
            }
            // Checked when it was created.
            Self::Custom(_) => {}
        }
        Ok(())
    }

    /// Builds the optimizer of these parameters. Its rates will come from `schedule`.
    pub fn build(&self, params: &[Param], schedule: &Schedule) -> Result<Box<dyn FusedOptimizer>> {
        Ok(match self {
            Self::Adam(config) => Box::new(Ruled::new(params, config.clone(), schedule)?),
            Self::AdamW(config) => Box::new(Ruled::new(params, config.clone(), schedule)?),
            Self::Sgd(config) => Box::new(Ruled::new(params, config.clone(), schedule)?),
            Self::Rmsprop(config) => Box::new(Ruled::new(params, config.clone(), schedule)?),
            Self::Adagrad(config) => Box::new(Ruled::new(params, config.clone(), schedule)?),
            Self::Adadelta(config) => Box::new(Ruled::new(params, config.clone(), schedule)?),
            Self::Adamax(config) => Box::new(Ruled::new(params, Adamax(config.clone()), schedule)?),
            Self::Nadam(config) => Box::new(Nadam::new(params, config, schedule)?),
            Self::Radam(config) => Box::new(Ruled::new(params, config.clone(), schedule)?),
            Self::Custom(own) => own.build(params)?,
        })
    }
}

impl Default for OptimizerConfig {
    fn default() -> Self {
        Self::Adam(AdamConfig::default())
    }
}

impl From<AdamConfig> for OptimizerConfig {
    fn from(config: AdamConfig) -> Self {
        Self::Adam(config)
    }
}

impl From<AdamWConfig> for OptimizerConfig {
    fn from(config: AdamWConfig) -> Self {
        Self::AdamW(config)
    }
}

impl From<SgdConfig> for OptimizerConfig {
    fn from(config: SgdConfig) -> Self {
        Self::Sgd(config)
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device};

    use super::*;

    fn every_rule() -> [OptimizerConfig; 9] {
        let moments = MomentsConfig { weight_decay: 0.1, ..Default::default() };
        [
            AdamConfig { weight_decay: 0.1, ..Default::default() }.into(),
            AdamWConfig::default().into(),
            SgdConfig { lr: 0.1, momentum: 0.9, ..Default::default() }.into(),
            OptimizerConfig::Rmsprop(RmspropConfig { momentum: 0.9, ..Default::default() }),
            OptimizerConfig::Adagrad(AdagradConfig::default()),
            OptimizerConfig::Adadelta(AdadeltaConfig::default()),
            OptimizerConfig::Adamax(moments.clone()),
            OptimizerConfig::Nadam(moments),
            OptimizerConfig::Radam(RadamConfig { weight_decay: 0.1, ..Default::default() }),
        ]
    }

    fn values(var: &Var) -> Vec<f32> {
        var.to_dtype(DType::F32).unwrap().to_vec1().unwrap()
    }

    #[test]
    fn default_rates_are_pytorchs() {
        let rates = [1e-3, 1e-3, 1e-3, 1e-2, 1e-2, 1., 2e-3, 2e-3, 1e-3];
        let names = ["adam", "adamw", "sgd", "rmsprop", "adagrad", "adadelta", "adamax", "nadam", "radam"];
        for (name, rate) in names.into_iter().zip(rates) {
            let config: OptimizerConfig = serde_json::from_str(&format!(r#"{{"{name}": {{}}}}"#)).unwrap();
            assert_eq!(config.lr(), rate, "{name}");
        }
    }

    #[test]
    fn every_rule_takes_what_counts_and_its_copies_follow() {
        let gradients = [Tensor::new(&[0.5f32, -2., 0.25], &Device::Cpu).unwrap()];
        let scaled = [(&gradients[0] * 4.).unwrap()];
        for config in every_rule() {
            // Takes this many steps; returns parameter, copy and state.
            let run = |steps: u64, gradients: &[Tensor], clipping: Clipping| {
                let master = Var::new(&[1f32, 2., -3.], &Device::Cpu).unwrap();
                let copy = Var::zeros(3, DType::BF16, &Device::Cpu).unwrap();
                let param = Param { name: "w".into(), master: master.clone(), copy: Some(copy.clone()) };
                // Next to parameters that the module keeps in f32.
                let whole = || {
                    let master = Var::new(&[1f32], &Device::Cpu).unwrap();
                    Param { name: "whole".into(), master, copy: None }
                };
                let mut optimizer = config.build(&[whole(), param, whole()], &Schedule::default()).unwrap();
                let zero = [Tensor::zeros(1, DType::F32, &Device::Cpu).unwrap()];
                let gradients = [&zero[..], gradients, &zero].concat();
                for t in 1..=steps {
                    optimizer.prepare(t, config.lr().into()).unwrap();
                    let Clipped { scale, norm } = clipping.decide(&gradients).unwrap();
                    optimizer.step(&gradients, &scale).unwrap();
                    if norm.read().unwrap().finish().unwrap().is_finite() {
                        optimizer.commit().unwrap();
                    }
                }
                let state = optimizer.state().iter().map(|(_, var)| values(var)).collect::<Vec<_>>();
                (values(&master), values(&copy), state)
            };
            let (plain, guarded) =
                (Clipping::default(), Clipping { loss_scale: 4., only_finite: true, ..Default::default() });
            let (master, copy, state) = run(3, &gradients, plain);
            assert_ne!(master, [1., 2., -3.], "{config:?}");
            let rounded = Tensor::new(&master[..], &Device::Cpu).unwrap().to_dtype(DType::BF16).unwrap();
            assert_eq!(copy, rounded.to_dtype(DType::F32).unwrap().to_vec1::<f32>().unwrap(), "{config:?}");
            assert_eq!(run(3, &scaled, guarded), (master, copy, state), "{config:?}");
            let infinite = [(&gradients[0] / 0.).unwrap()];
            assert_eq!(run(3, &infinite, guarded), run(0, &infinite, guarded), "{config:?}");
        }
    }
}
