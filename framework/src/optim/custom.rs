//! Custom optimizers.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{Tensor, Var};
use candlepower_kernels::clipping::GradScale;
use candlepower_kernels::updates::publish;

use super::{FusedOptimizer, Param};
use crate::config::table;
use crate::data::Settings;
use crate::error::Result;
use crate::schedule::Rates;

/// A custom optimizer, created from its own section of the configuration file. [`Registry::optimizer`] gives
/// it a name; in code, use [`OptimizerConfig::custom`].
///
/// Gradients arrive clipped, without a loss scale, and in f32 like the parameters. Refused steps do not
/// arrive at all. A step may use any candle operations: on a device, it waits only for the decision whether
/// to take the step.
///
/// Example: Lion (Chen et al. 2023), whose updates are signs:
///
/// ```
/// use candlepower::candle_core::Var;
/// use candlepower::optim::Optimizer;
/// use candlepower::prelude::*;
/// use candlepower::schedule::Rates;
/// use candlepower::schemars::{self, JsonSchema};
/// use candlepower::serde::{Deserialize, Serialize};
///
/// #[derive(Clone, Serialize, Deserialize, JsonSchema)]
/// #[serde(crate = "candlepower::serde", deny_unknown_fields)]
/// struct LionConfig {
///     lr: f64,
///     weight_decay: f64,
///     betas: [f64; 2],
/// }
///
/// struct Lion {
///     config: LionConfig,
///     params: Vec<(String, Var)>,
///     averages: Vec<(String, Var)>,
/// }
///
/// impl Optimizer for Lion {
///     type Config = LionConfig;
///
///     fn rates(config: &mut LionConfig) -> (&mut f64, Option<&mut f64>) {
///         (&mut config.lr, Some(&mut config.weight_decay))
///     }
///
///     fn of(config: &LionConfig, params: &[(String, Var)]) -> Result<Self> {
///         let zeros = |(name, param): &(String, Var)| {
///             Ok((format!("average.{name}"), Var::from_tensor(&param.zeros_like()?)?))
///         };
///         let averages = params.iter().map(zeros).collect::<Result<_>>()?;
///         Ok(Self { config: config.clone(), params: params.to_vec(), averages })
///     }
///
///     fn step(&mut self, _: u64, rates: Rates, gradients: &[Tensor]) -> Result<()> {
///         let LionConfig { betas: [now, later], weight_decay, .. } = self.config;
///         for (((_, param), (_, average)), gradient) in self.params.iter().zip(&self.averages).zip(gradients) {
///             let mixed = |beta: f64| (average.as_tensor() * beta)? + (gradient * (1. - beta))?;
///             let decayed = (param.as_tensor() * (1. - rates.lr * weight_decay))?;
///             param.set(&(decayed - (mixed(now)?.sign()? * rates.lr)?)?)?;
///             average.set(&mixed(later)?)?;
///         }
///         Ok(())
///     }
///
///     fn state(&self) -> Vec<(String, Var)> {
///         self.averages.clone()
///     }
/// }
///
/// # fn main() -> Result<()> {
/// let lion = LionConfig { lr: 3e-4, weight_decay: 0., betas: [0.9, 0.99] };
/// let trainer = Trainer::new(TrainerConfig::default()).optimizer(OptimizerConfig::custom::<Lion>("lion", lion)?);
/// // Or from TOML, as `name = "lion"` in [optimizer].
/// let registry = Registry::default().optimizer::<Lion>("lion");
/// # Ok(()) }
/// ```
///
/// [`Registry::optimizer`]: crate::config::Registry::optimizer
/// [`OptimizerConfig::custom`]: super::OptimizerConfig::custom
pub trait Optimizer: Send + Sized + 'static {
    /// The fields of its configuration section.
    type Config: Settings + Clone;

    /// The learning rate and, if there is one, the weight decay. Parameter groups may have their own.
    fn rates(config: &mut Self::Config) -> (&mut f64, Option<&mut f64>);

    /// Creates the optimizer of these f32 parameters: those of one group if there are groups, or none to
    /// check a configuration. For invalid settings, returns an [`Error::Setting`](crate::Error::Setting).
    fn of(config: &Self::Config, params: &[(String, Var)]) -> Result<Self>;

    /// Moves every parameter by its gradient, in place, at these rates. `t` counts the steps taken, from 1.
    fn step(&mut self, t: u64, rates: Rates, gradients: &[Tensor]) -> Result<()>;

    /// State kept between steps, under names that contain the parameters' names. Checkpoints save it and
    /// restore it by writing to these variables. Any other state that is not a function of the step number
    /// makes a resumed run differ.
    fn state(&self) -> Vec<(String, Var)>;
}

/// The part shared by all custom optimizers: refused steps, and copies in half precision.
struct Custom<O> {
    /// In a mutex because steps are taken through `&self`.
    optimizer: Mutex<O>,
    params: Vec<Param>,
    step: (u64, Rates),
}

impl<O: Optimizer> Custom<O> {
    fn new(config: &O::Config, params: &[Param]) -> Result<Self> {
        let masters: Vec<_> = params.iter().map(|it| (it.name.clone(), it.master.clone())).collect();
        let optimizer = Mutex::new(O::of(config, &masters)?);
        Ok(Self { optimizer, params: params.to_vec(), step: (0, Rates::from(0.)) })
    }
}

impl<O: Optimizer> FusedOptimizer for Custom<O> {
    fn prepare(&mut self, t: u64, rates: Rates) -> Result<()> {
        self.step = (t, rates);
        Ok(())
    }

    fn step(&self, gradients: &[Tensor], scale: &GradScale) -> Result<()> {
        if scale.is_refused()? {
            return Ok(());
        }
        let (t, rates) = self.step;
        self.optimizer.lock().unwrap_or_else(PoisonError::into_inner).step(
            t,
            rates,
            &scale.apply(gradients)?,
        )?;
        let copies =
            self.params.iter().filter_map(|it| Some((it.master.as_tensor(), it.copy.as_ref()?.as_tensor())));
        Ok(publish(&copies.collect::<Vec<_>>())?)
    }

    fn state(&self) -> Vec<(String, Var)> {
        self.optimizer.lock().unwrap_or_else(PoisonError::into_inner).state()
    }
}

/// The configuration of a custom optimizer of any type.
#[derive(Clone)]
pub struct CustomOptimizer {
    name: String,
    pub(super) lr: f64,
    pub(super) weight_decay: f64,
    /// Whether the rule has a weight decay.
    pub(super) decays: bool,
    build: Arc<Build>,
    section: Arc<Section>,
}

/// Builds the optimizer at this learning rate and weight decay.
type Build = dyn Fn([f64; 2], &[Param]) -> Result<Box<dyn FusedOptimizer>> + Send + Sync;

/// The fields of the configuration section at this learning rate and weight decay.
type Section = dyn Fn([f64; 2]) -> Result<toml::Table> + Send + Sync;

impl CustomOptimizer {
    /// An `O` with these settings. Settings that it refuses are refused here.
    pub(super) fn new<O: Optimizer>(name: &str, mut config: O::Config) -> Result<Self> {
        O::of(&config, &[])?;
        let (lr, weight_decay) = O::rates(&mut config);
        let (lr, decays, weight_decay) = (*lr, weight_decay.is_some(), weight_decay.map_or(0., |rate| *rate));
        let settings = move |rates| with_rates::<O>(config.clone(), rates);
        let build = {
            let settings = settings.clone();
            move |rates, params: &[Param]| Ok(Box::new(Custom::<O>::new(&settings(rates), params)?) as _)
        };
        let section = move |rates| table(&settings(rates));
        Ok(Self {
            name: name.into(),
            lr,
            weight_decay,
            decays,
            build: Arc::new(build),
            section: Arc::new(section),
        })
    }

    pub(super) fn build(&self, params: &[Param]) -> Result<Box<dyn FusedOptimizer>> {
        (self.build)([self.lr, self.weight_decay], params)
    }

    /// Its configuration section.
    pub(crate) fn table(&self) -> Result<toml::Table> {
        let mut table = (self.section)([self.lr, self.weight_decay])?;
        table.insert("name".into(), self.name.clone().into());
        Ok(table)
    }
}

/// The settings with a different learning rate and weight decay.
fn with_rates<O: Optimizer>(mut config: O::Config, rates: [f64; 2]) -> O::Config {
    let (lr, weight_decay) = O::rates(&mut config);
    *lr = rates[0];
    if let Some(weight_decay) = weight_decay {
        *weight_decay = rates[1];
    }
    config
}

impl fmt::Debug for CustomOptimizer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#?}", self.table())
    }
}

impl PartialEq for CustomOptimizer {
    fn eq(&self, other: &Self) -> bool {
        matches!((self.table(), other.table()), (Ok(a), Ok(b)) if a == b)
    }
}
