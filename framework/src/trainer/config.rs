//! The `[trainer]` section.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// Fields of `[trainer]`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct TrainerConfig {
    /// Samples of one optimizer step, over all devices.
    pub batch_size: usize,
    /// Samples that one device takes at once; a step then adds up several micro-batches. Default: the whole batch.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub micro_batch_size: Option<usize>,
    /// Ends training after this many optimizer steps.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_steps: Option<u64>,
    /// Ends training after this many passes over the data.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_epochs: Option<u64>,
    /// Validates every so many steps. Default: after every epoch. The end of training is validated in any case.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub val_every: Option<u64>,
    /// Scales the gradients so that their global norm is at most this.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub clip_norm: Option<f64>,
    /// Clamps every gradient to at most this.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub clip_value: Option<f64>,
    /// Number format of the computation.
    pub precision: Precision,
    /// Replicas of the model, one a device.
    pub devices: usize,
    /// CPU threads of the computation. Default: one a core.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub threads: Option<usize>,
    /// Which implementation of convolutions and recurrent cells runs.
    pub kernels: Kernels,
    /// Logs training metrics every so many steps.
    pub log_every: u64,
}

/// Number format of the computation, by Lightning's names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Precision {
    /// 32-bit floating point throughout.
    #[serde(rename = "32")]
    Full,
    /// bfloat16 where it is safe, 32-bit masters.
    #[serde(rename = "bf16-mixed")]
    Bf16Mixed,
    /// float16 where it is safe, with loss scaling, 32-bit masters.
    #[serde(rename = "16-mixed")]
    Fp16Mixed,
}

/// Which implementation of convolutions and recurrent cells runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Kernels {
    /// Our own where the device and the type have one.
    Fast,
    /// Plain candle operations: slow, simple, for comparison.
    Reference,
}

impl Default for TrainerConfig {
    fn default() -> Self {
        Self {
            batch_size: 16,
            micro_batch_size: None,
            max_steps: None,
            max_epochs: None,
            val_every: None,
            clip_norm: None,
            clip_value: None,
            precision: Precision::Full,
            devices: 1,
            threads: None,
            kernels: Kernels::Fast,
            log_every: 10,
        }
    }
}

impl TrainerConfig {
    /// Refuses values that cannot be trained with.
    pub fn check(&self) -> Result<()> {
        let at_least_one = [
            ("batch_size", Some(self.batch_size as u64)),
            ("micro_batch_size", self.micro_batch_size.map(|n| n as u64)),
            ("max_steps", self.max_steps),
            ("max_epochs", self.max_epochs),
            ("val_every", self.val_every),
            ("threads", self.threads.map(|n| n as u64)),
            ("log_every", Some(self.log_every)),
            ("devices", Some(self.devices as u64)),
        ];
        if let Some((key, _)) = at_least_one.iter().find(|(_, value)| *value == Some(0)) {
            return Err(Error::setting(*key, "expected at least 1, found 0"));
        }
        for (key, value) in [("clip_norm", self.clip_norm), ("clip_value", self.clip_value)] {
            if let Some(value) = value.filter(|value| !(value.is_finite() && *value > 0.)) {
                return Err(Error::setting(key, format!("expected a number above 0, found {value}")));
            }
        }
        if self.micro_batch_size.is_some_and(|micro| micro > self.batch_size) {
            let message = format!("expected at most `batch_size`, which is {}", self.batch_size);
            return Err(Error::setting("micro_batch_size", message));
        }
        if self.max_steps.is_none() && self.max_epochs.is_none() {
            return Err(Error::setting(
                "max_steps",
                "training needs an end: set `max_steps` or `max_epochs`",
            ));
        }
        if self.precision != Precision::Full {
            return Err(Error::setting("precision", "mixed precision is not there yet; what works: \"32\""));
        }
        if self.devices > 1 {
            return Err(Error::setting("devices", "several devices are not there yet; what works: 1"));
        }
        Ok(())
    }

    /// The step that ends training, for epochs of this many steps.
    pub fn last_step(&self, steps_per_epoch: u64) -> u64 {
        let by_epochs = self.max_epochs.map_or(u64::MAX, |epochs| epochs.saturating_mul(steps_per_epoch));
        self.max_steps.unwrap_or(u64::MAX).min(by_epochs)
    }
}
