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

/// The most threads, and the most devices, that a run may ask for.
const MOST: usize = 4096;

/// Fields of `[trainer]`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct TrainerConfig {
    /// Samples of one optimizer step, over all devices.
    pub batch_size: usize,
    /// Samples that one device takes at once; a step then adds up several micro-batches. Default: the batch divided by the
    /// devices.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub micro_batch_size: Option<usize>,
    /// Ends training after this many optimizer steps.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_steps: Option<u64>,
    /// Ends training after this many passes over the data.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_epochs: Option<u64>,
    /// Ends training after this time, as `"2h 30m"`; what went before an interruption counts.
    #[serde(default, with = "duration", skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<String>")]
    pub max_time: Option<Duration>,
    /// Neither a callback nor `max_time` ends training before this many optimizer steps.
    pub min_steps: u64,
    /// Neither a callback nor `max_time` ends training before this many passes over the data.
    pub min_epochs: u64,
    /// How many batches of an epoch are trained on: a count or a share. Default: all.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub limit_train_batches: Option<Limit>,
    /// How many batches a validation takes: a count or a share; 0: no validation. Default: all.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub limit_val_batches: Option<Limit>,
    /// How many batches a test takes: a count or a share. Default: all.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub limit_test_batches: Option<Limit>,
    /// How many batches of a dataset are predicted from: a count or a share. Default: all.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub limit_predict_batches: Option<Limit>,
    /// When to validate: `500` steps, `"2 epochs"`, `"0.25 epochs"`, `"30 min"`. By the clock also between the
    /// micro-batches of a step. Default: after every epoch. The end of training is validated in any case.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub val_every: Option<Every>,
    /// Batches that are validated before the first step, so that what is broken there is found now and not after an
    /// epoch. 0: none.
    pub sanity_val_batches: usize,
    /// Tries everything out: so many steps, so many batches of validation, no files. 0: off.
    pub fast_dev_run: usize,
    /// Trains, and validates, on these few batches of the training data, every epoch the same: a model that cannot
    /// learn them by heart has a bug. A count or a share; absent: off.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub overfit_batches: Option<Limit>,
    /// Ends training before a step whose gradients are not numbers, saves, and names the first bad loss or gradient.
    pub nan_guard: bool,
    /// Scales the gradients so that their global norm is at most this.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub clip_norm: Option<f64>,
    /// Clamps every gradient to at most this.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub clip_value: Option<f64>,
    /// Number format of the computation.
    pub precision: Precision,
    /// What the computation runs on.
    pub accelerator: Accelerator,
    /// How exactly CUDA devices compute with 32-bit numbers.
    pub float32_matmul_precision: MatmulPrecision,
    /// Replicas of the model, one a device.
    pub devices: usize,
    /// CPU threads of the computation. Default: one a core.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub threads: Option<usize>,
    /// Which implementation of convolutions and recurrent cells runs.
    pub kernels: Kernels,
    /// Records a training step on a CUDA device once, and replays it in all others: one call starts all its operations. The
    /// numbers are the same. With several micro-batches it is the passes alone. The recording has memory of its own, beside what
    /// other steps use. Where a step cannot be recorded, a warning says why, and
    /// training goes on without.
    pub cuda_graph: bool,
    /// On a CUDA device: when a shape first comes, times up to ten of cuDNN's engines for it and keeps the quickest (PyTorch's
    /// `cudnn.benchmark`). Worth it where shapes stay the same. Another run may pick others, so that a resumed run is not the same
    /// to the bit.
    pub benchmark: bool,
    /// Leaves out an epoch's last batch where it is smaller than the others (PyTorch's `drop_last`).
    pub drop_last: bool,
    /// Logs training metrics every so many steps.
    pub log_every: u64,
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
    /// Refuses values that cannot be trained with.
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

    /// Refuses values that nothing can be computed with, be it an evaluation alone.
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
        // More would come to nothing but a machine that is out of memory.
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

    /// What a try-out does: few steps, few batches of validation; all else as it is.
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

    /// How many batches a pass over a split outside training takes.
    pub(crate) fn evaluation_limit(&self, split: Split) -> Option<Limit> {
        match split {
            Split::Train => None,
            Split::Val => self.limit_val_batches,
            Split::Test => self.limit_test_batches,
        }
    }

    /// How many samples, of `len` where that is known, so many batches are. They are training's: a limit means the same however
    /// many samples a device takes at once.
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

    /// Whether training has come to its configured end. One that lasts `max_time` alone has none.
    pub(crate) fn is_finished(&self, progress: &Progress) -> bool {
        self.max_steps.is_some_and(|steps| progress.step >= steps)
            || self.max_epochs.is_some_and(|epochs| progress.epoch >= epochs)
    }

    /// The step that ends training, where it is known before.
    pub(crate) fn last_step(&self, steps_per_epoch: Option<u64>) -> Option<u64> {
        let by_epochs =
            self.max_epochs.zip(steps_per_epoch).map(|(epochs, steps)| epochs.saturating_mul(steps));
        match (self.max_steps, by_epochs) {
            (Some(steps), Some(by_epochs)) => Some(steps.min(by_epochs)),
            (steps, by_epochs) => steps.or(by_epochs),
        }
    }
}
