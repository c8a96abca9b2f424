//! The `[trainer]` section.

use std::time::Duration;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::limits::{Every, Limit, duration};
use crate::accelerator::{Accelerator, MatmulPrecision};
use crate::callback::Progress;
use crate::data::Split;
use crate::error::{Error, Result};
use crate::precision::Precision;

/// Maximum number of threads, and of devices, that a run may ask for.
const MOST: usize = 4096;

/// Fields of `[trainer]`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct TrainerConfig {
    /// Samples per optimizer step, over all devices.
    pub batch_size: usize,
    /// Samples that one device processes at once; a step accumulates gradients over several micro-batches.
    /// Default: `batch_size` divided by the number of devices.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub micro_batch_size: Option<usize>,
    /// End training after this many optimizer steps.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_steps: Option<u64>,
    /// End training after this many passes over the data.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_epochs: Option<u64>,
    /// End training after this time, for example `"2h 30m"`. Time before an interruption counts.
    #[serde(default, with = "duration", skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<String>")]
    pub max_time: Option<Duration>,
    /// Minimum number of optimizer steps before a callback or `max_time` may end training.
    pub min_steps: u64,
    /// Minimum number of passes over the data before a callback or `max_time` may end training.
    pub min_epochs: u64,
    /// Training batches per epoch: a count or a share. Default: all.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub limit_train_batches: Option<Limit>,
    /// Batches per validation: a count or a share; 0: no validation. Default: all.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub limit_val_batches: Option<Limit>,
    /// Batches per test: a count or a share. Default: all.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub limit_test_batches: Option<Limit>,
    /// Batches of a dataset to predict from: a count or a share. Default: all.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub limit_predict_batches: Option<Limit>,
    /// When to validate: `500` steps, `"2 epochs"`, `"0.25 epochs"`, `"30 min"`. A time also applies between
    /// the micro-batches of a step. Default: after every epoch. Training also ends with a validation, unless
    /// it is interrupted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub val_every: Option<Every>,
    /// Batches to validate before the first step, to find errors in validation early. 0: none.
    pub sanity_val_batches: usize,
    /// Try everything out with this many steps, this many batches per validation, and no files. 0: off.
    pub fast_dev_run: usize,
    /// Train and validate on these few batches of the training data, the same in every epoch: a model that
    /// cannot memorize them has a bug. A count or a share. Default: off.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub overfit_batches: Option<Limit>,
    /// Stop before a step with non-finite gradients, save, and name the first non-finite loss or gradient.
    pub nan_guard: bool,
    /// Maximum global norm of the gradients; larger gradients are scaled down to it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub clip_norm: Option<f64>,
    /// Clamp every gradient element to `[-clip_value, clip_value]`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub clip_value: Option<f64>,
    /// Number format of computations.
    pub precision: Precision,
    /// Kind of device to compute on.
    pub accelerator: Accelerator,
    /// Precision of 32-bit matrix products and convolutions on CUDA devices.
    pub float32_matmul_precision: MatmulPrecision,
    /// Number of model replicas, one per device.
    pub devices: usize,
    /// CPU threads for computation. Default: one per core.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub threads: Option<usize>,
    /// Implementation of convolutions and recurrent cells.
    pub kernels: Kernels,
    /// Record a training step once on a CUDA device, and replay it in all other steps: one call starts all
    /// its operations. The results are the same. With several micro-batches, only the forward and backward
    /// passes are recorded. A recording uses its own memory, in addition to that of other steps. If a step
    /// cannot be recorded, a warning says why and training continues without recording.
    pub cuda_graph: bool,
    /// On a CUDA device, time up to ten cuDNN engines the first time a shape occurs and keep the fastest
    /// (PyTorch's `cudnn.benchmark`). Useful if shapes stay the same. Another run may choose other engines,
    /// so a resumed run is not bit-identical.
    pub benchmark: bool,
    /// Drop an epoch's last batch if it is smaller than the others (PyTorch's `drop_last`).
    pub drop_last: bool,
    /// Steps between two logs of training metrics.
    pub log_every: u64,
}

/// Implementation of convolutions and recurrent cells.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Kernels {
    /// Candlepower's own kernels where the device and dtype have one.
    Fast,
    /// Plain candle operations: slow and simple, for comparison.
    Reference,
}

impl Default for TrainerConfig {
    fn default() -> Self {
        Self {
            batch_size: 16,
            micro_batch_size: None,
            max_steps: None,
            max_epochs: None,
            max_time: None,
            min_steps: 0,
            min_epochs: 0,
            limit_train_batches: None,
            limit_val_batches: None,
            limit_test_batches: None,
            limit_predict_batches: None,
            val_every: None,
            sanity_val_batches: 2,
            fast_dev_run: 0,
            overfit_batches: None,
            nan_guard: true,
            clip_norm: None,
            clip_value: None,
            precision: Precision::Full,
            accelerator: Accelerator::Auto,
            float32_matmul_precision: MatmulPrecision::Highest,
            devices: 1,
            threads: None,
            kernels: Kernels::Fast,
            cuda_graph: false,
            benchmark: false,
            drop_last: false,
            log_every: 10,
        }
    }
}

impl TrainerConfig {
    /// Refuses settings that cannot be used for training.
    pub fn check(&self) -> Result<()> {
        self.check_sizes()?;
        for (key, value) in [("clip_norm", self.clip_norm), ("clip_value", self.clip_value)] {
            if let Some(value) = value.filter(|value| !(value.is_finite() && *value > 0.)) {
                return Err(Error::setting(key, format!("expected a number above 0, found {value}")));
            }
        }
        let zero = |limit: Option<Limit>| limit.is_some_and(|limit| limit.of(usize::MAX) == 0);
        for (key, limit) in
            [("limit_train_batches", self.limit_train_batches), ("overfit_batches", self.overfit_batches)]
        {
            if zero(limit) {
                return Err(Error::setting(key, "expected at least one batch, found none"));
            }
        }
        let ends = self.max_steps.is_some() || self.max_epochs.is_some() || self.max_time.is_some();
        if !ends && self.fast_dev_run == 0 {
            let message = "training needs an end: set `max_steps`, `max_epochs` or `max_time`";
            return Err(Error::setting("max_steps", message));
        }
        Ok(())
    }

    /// Refuses settings that cannot be used for any computation, including evaluation.
    pub(crate) fn check_sizes(&self) -> Result<()> {
        let at_least_one = [
            ("batch_size", Some(self.batch_size as u64)),
            ("micro_batch_size", self.micro_batch_size.map(|n| n as u64)),
            ("max_steps", self.max_steps),
            ("max_epochs", self.max_epochs),
            ("threads", self.threads.map(|n| n as u64)),
            ("log_every", Some(self.log_every)),
            ("devices", Some(self.devices as u64)),
        ];
        if let Some((key, _)) = at_least_one.iter().find(|(_, value)| *value == Some(0)) {
            return Err(Error::setting(*key, "expected at least 1, found 0"));
        }
        // More would only exhaust the machine's memory.
        let at_most = [("threads", self.threads.unwrap_or(1)), ("devices", self.devices)];
        if let Some((key, value)) = at_most.iter().find(|(_, value)| *value > MOST) {
            return Err(Error::setting(*key, format!("expected at most {MOST}, found {value}")));
        }
        if self.micro_batch_size.is_some_and(|micro| micro > self.batch_size) {
            let message = format!("expected at most `batch_size`, which is {}", self.batch_size);
            return Err(Error::setting("micro_batch_size", message));
        }
        Ok(())
    }

    /// Applies `fast_dev_run`: few steps and few batches per pass; everything else is unchanged.
    pub(crate) fn resolve_fast_dev_run(&mut self) {
        if self.fast_dev_run > 0 {
            let few = Some(Limit::Batches(self.fast_dev_run));
            self.max_steps = Some(self.fast_dev_run as u64);
            self.max_epochs = None;
            self.val_every = None;
            self.sanity_val_batches = 0;
            self.log_every = 1;
            for limit in [
                &mut self.limit_train_batches,
                &mut self.limit_val_batches,
                &mut self.limit_test_batches,
                &mut self.limit_predict_batches,
            ] {
                *limit = few;
            }
        }
    }

    /// The limit on batches of an evaluation on a split.
    pub(crate) fn evaluation_limit(&self, split: Split) -> Option<Limit> {
        match split {
            Split::Train => None,
            Split::Val => self.limit_val_batches,
            Split::Test => self.limit_test_batches,
        }
    }

    /// Number of samples in the batches that `limit` allows, out of `len` samples if known. These are batches
    /// of `batch_size`, so a limit means the same for any micro-batch size.
    pub(crate) fn samples_of(&self, limit: Option<Limit>, len: Option<usize>) -> Result<usize> {
        let all = len.unwrap_or(usize::MAX);
        match limit {
            None => Ok(all),
            Some(Limit::Share(_)) if len.is_none() => Err(Error::msg(
                "a stream's length is not known: limit its batches by a number, not by a fraction",
            )),
            Some(limit) => {
                Ok(limit.of(all.div_ceil(self.batch_size)).saturating_mul(self.batch_size).min(all))
            }
        }
    }

    /// Whether training has reached its configured number of steps or epochs. `max_time` is not checked here.
    pub(crate) fn is_finished(&self, progress: &Progress) -> bool {
        self.max_steps.is_some_and(|steps| progress.step >= steps)
            || self.max_epochs.is_some_and(|epochs| progress.epoch >= epochs)
    }

    /// The last step of training, if it is known in advance.
    pub(crate) fn last_step(&self, steps_per_epoch: Option<u64>) -> Option<u64> {
        let by_epochs =
            self.max_epochs.zip(steps_per_epoch).map(|(epochs, steps)| epochs.saturating_mul(steps));
        match (self.max_steps, by_epochs) {
            (Some(steps), Some(by_epochs)) => Some(steps.min(by_epochs)),
            (steps, by_epochs) => steps.or(by_epochs),
        }
    }
}
