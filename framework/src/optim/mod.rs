//! Optimizers: PyTorch's update rules, in place, over all parameters in one pass.

mod adam;
mod sgd;

pub use adam::{Adam, AdamConfig, AdamW, AdamWConfig};
use candle_core::{DType, Tensor, Var};
use candlepower_kernels::elementwise;
use schemars::schema_for;
pub use sgd::{Sgd, SgdConfig};

use crate::config::{Document, Named, unknown_name};
use crate::error::{Error, Result};

/// A rule that moves parameters against their gradients.
pub trait Optimizer: Send {
    /// Moves every parameter. `gradients` are in the order of the parameters; `t` counts this optimizer's steps
    /// from 1; `lr` is the learning rate of this step.
    fn step(&mut self, gradients: &[Tensor], t: u64, lr: f64) -> Result<()>;

    /// What it remembers between steps, by name. The tensors share memory with the optimizer: writing to them
    /// restores it.
    fn state(&self) -> Vec<(String, Var)>;
}

/// The `[optimizer]` section: which optimizer, and its own fields.
#[derive(Debug, Clone)]
pub enum OptimizerConfig {
    /// Adam (Kingma and Ba, 2015), weight decay as an L2 term.
    Adam(AdamConfig),
    /// AdamW (Loshchilov and Hutter, 2019), decoupled weight decay.
    AdamW(AdamWConfig),
    /// Stochastic gradient descent, optionally with momentum.
    Sgd(SgdConfig),
}

impl OptimizerConfig {
    /// The names that `[optimizer] name` can have.
    pub const NAMES: [&str; 3] = ["adam", "adamw", "sgd"];

    /// Reads the section's fields for the optimizer that it names.
    pub fn parse(document: &Document, named: &Named) -> Result<Self> {
        let config = match named.name.as_str() {
            "adam" => Self::Adam(document.fields(named)?),
            "adamw" => Self::AdamW(document.fields(named)?),
            "sgd" => Self::Sgd(document.fields(named)?),
            _ => return Err(unknown_name(document, named, "optimizer", &Self::NAMES)),
        };
        config.check()?;
        Ok(config)
    }

    /// The learning rate that the schedule scales.
    pub fn lr(&self) -> f64 {
        match self {
            Self::Adam(config) => config.lr,
            Self::AdamW(config) => config.lr,
            Self::Sgd(config) => config.lr,
        }
    }

    /// Refuses values that no optimizer can work with.
    pub fn check(&self) -> Result<()> {
        let lr = self.lr();
        if !(lr.is_finite() && lr >= 0.) {
            return Err(Error::setting("lr", format!("a learning rate is a number from 0 up, not {lr}")));
        }
        match self {
            Self::Adam(AdamConfig { betas, eps, .. }) | Self::AdamW(AdamWConfig { betas, eps, .. }) => {
                if betas.iter().any(|beta| !(0. ..1.).contains(beta)) {
                    let message = format!("both are from 0 up to, not including, 1; not {betas:?}");
                    return Err(Error::setting("betas", message));
                }
                if !(eps.is_finite() && *eps >= 0.) {
                    return Err(Error::setting("eps", format!("a number from 0 up, not {eps}")));
                }
            }
            Self::Sgd(SgdConfig { momentum, nesterov, dampening, .. }) => {
                if !(momentum.is_finite() && *momentum >= 0.) {
                    return Err(Error::setting("momentum", format!("a number from 0 up, not {momentum}")));
                }
                if *nesterov && (*momentum == 0. || *dampening != 0.) {
                    return Err(Error::setting("nesterov", "needs a momentum above 0 and no dampening"));
                }
            }
        }
        Ok(())
    }

    /// The fields with their defaults, and the name, as TOML.
    pub fn resolved(&self) -> Result<toml::Table> {
        let (name, fields) = match self {
            Self::Adam(config) => ("adam", toml::Table::try_from(config)),
            Self::AdamW(config) => ("adamw", toml::Table::try_from(config)),
            Self::Sgd(config) => ("sgd", toml::Table::try_from(config)),
        };
        let mut fields = fields.map_err(|error| Error::msg(error.to_string()))?;
        fields.insert("name".into(), name.into());
        Ok(fields)
    }

    /// A JSON Schema of the section.
    pub fn schema() -> serde_json::Value {
        let named = |name: &str, schema: schemars::Schema| {
            let mut schema = schema.to_value();
            schema["properties"]["name"] = serde_json::json!({"const": name});
            schema
        };
        serde_json::json!({"type": "object", "anyOf": [
            named("adam", schema_for!(AdamConfig)),
            named("adamw", schema_for!(AdamWConfig)),
            named("sgd", schema_for!(SgdConfig)),
        ]})
    }

    /// The optimizer of these parameters.
    pub fn build(&self, params: &[(String, Var)]) -> Result<Box<dyn Optimizer>> {
        Ok(match self {
            Self::Adam(config) => Box::new(Adam::new(params, config)?),
            Self::AdamW(config) => Box::new(AdamW::new(params, config)?),
            Self::Sgd(config) => Box::new(Sgd::new(params, config)?),
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

/// A zeroed f32 tensor for each parameter: what moments start as.
fn zeros_like(params: &[(String, Var)]) -> Result<Vec<Var>> {
    let zeros = |(_, var): &(String, Var)| Ok(Var::zeros(var.shape(), DType::F32, var.device())?);
    params.iter().map(zeros).collect()
}

/// Names of one kind of state, `<kind>.<parameter>`, beside its tensors.
fn named_state(kind: &str, params: &[(String, Var)], state: &[Var]) -> Vec<(String, Var)> {
    params.iter().zip(state).map(|((name, _), var)| (format!("{kind}.{name}"), var.clone())).collect()
}

/// Scales gradients so that their global L2 norm is at most `max_norm` (`torch.nn.utils.clip_grad_norm_`); returns
/// the norm before.
pub fn clip_norm(gradients: &mut [Tensor], max_norm: f64) -> Result<f64> {
    let norm = global_norm(gradients)?;
    let scale = max_norm / (norm + 1e-6);
    if scale < 1. {
        for gradient in gradients {
            *gradient = (&*gradient * scale)?;
        }
    }
    Ok(norm)
}

/// Clamps every gradient to `[-max, max]` (`torch.nn.utils.clip_grad_value_`).
pub fn clip_value(gradients: &mut [Tensor], max: f64) -> Result<()> {
    for gradient in gradients {
        *gradient = gradient.clamp(-max, max)?;
    }
    Ok(())
}

/// The L2 norm of all gradients together.
pub fn global_norm(gradients: &[Tensor]) -> Result<f64> {
    let mut sum = 0.;
    for gradient in gradients {
        sum += sum_squares(gradient)?;
    }
    Ok(sum.sqrt())
}

/// The sum of a gradient's squares, in f64.
fn sum_squares(gradient: &Tensor) -> Result<f64> {
    if gradient.device().is_cpu() && matches!(gradient.dtype(), DType::F32 | DType::F64) {
        return Ok(elementwise::sum_squares(gradient)?);
    }
    Ok(gradient.to_dtype(DType::F64)?.sqr()?.sum_all()?.to_scalar()?)
}
