//! Callbacks: they watch a run and can end it; they never change it.

use std::path::Path;

use candle_core::Tensor;
use indexmap::IndexMap;
use serde::{Deserialize, Serialize};

use crate::data::Split;
use crate::error::Result;

/// How far training has come. Everything that counts, counts optimizer steps.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Progress {
    /// Optimizer steps done.
    pub step: u64,
    /// The epoch of the next step, from 0.
    pub epoch: u64,
    /// Steps done in that epoch.
    pub step_in_epoch: u64,
    /// Samples learned from.
    pub samples: u64,
}

impl Progress {
    /// Counts one optimizer step over `samples` samples, in epochs of `steps_per_epoch` steps.
    pub(crate) fn advance(&mut self, samples: usize, steps_per_epoch: usize) {
        self.step += 1;
        self.samples += samples as u64;
        self.step_in_epoch += 1;
        if self.step_in_epoch == steps_per_epoch as u64 {
            self.step_in_epoch = 0;
            self.epoch += 1;
        }
    }

    /// The epoch that the last step belonged to.
    pub fn epoch_of_last_step(&self) -> u64 {
        if self.step_in_epoch == 0 { self.epoch.saturating_sub(1) } else { self.epoch }
    }
}

/// What a run sets out to do.
#[derive(Debug, Clone, Copy)]
pub struct Plan {
    /// Where it starts; not at zero when it is resumed.
    pub start: Progress,
    /// The step at which it ends.
    pub last_step: u64,
    /// Steps in an epoch.
    pub steps_per_epoch: u64,
    /// Numbers in all parameters together.
    pub parameters: usize,
}

/// Metrics at one moment.
#[derive(Debug, Clone, Serialize)]
pub struct Record {
    /// Steps done.
    pub step: u64,
    /// The epoch they belong to.
    pub epoch: u64,
    /// The data that the metrics are of.
    pub split: Split,
    /// Metrics by name.
    #[serde(flatten)]
    pub metrics: IndexMap<String, f64>,
}

/// A picture at one moment.
#[derive(Debug, Clone)]
pub struct Picture {
    /// Steps done.
    pub step: u64,
    /// The data that the picture is of.
    pub split: Split,
    /// What it shows, for example `prediction`.
    pub name: String,
    /// (C, H, W), C = 1 or 3, values in `[0, 1]`.
    pub pixels: Tensor,
}

/// Whether training goes on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Flow {
    /// It goes on.
    Continue,
    /// It ends here: a checkpoint is saved, and the run says why.
    Stop(StopReason),
}

impl Flow {
    /// The first of two answers that wants to stop.
    pub fn or(self, other: Flow) -> Flow {
        if self == Flow::Continue { other } else { self }
    }
}

/// Why a run ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StopReason {
    /// It did what it set out to do.
    Finished,
    /// A callback had seen enough; the text says of what.
    Callback(String),
    /// The process was told to end, by this signal.
    Signal(i32),
}

/// Watches a run. No method is required.
pub trait Callback: Send {
    /// Before the first step.
    fn on_fit_start(&mut self, _plan: &Plan) -> Result<()> {
        Ok(())
    }

    /// After every optimizer step.
    fn on_step_end(&mut self, _progress: &Progress) -> Result<Flow> {
        Ok(Flow::Continue)
    }

    /// When training metrics have been read.
    fn on_train_metrics(&mut self, _record: &Record) -> Result<Flow> {
        Ok(Flow::Continue)
    }

    /// After `done` of `total` batches of a validation.
    fn on_validation_batch(&mut self, _done: usize, _total: usize) -> Result<()> {
        Ok(())
    }

    /// When a validation is complete.
    fn on_validation_end(&mut self, _record: &Record) -> Result<Flow> {
        Ok(Flow::Continue)
    }

    /// When a module has drawn a picture.
    fn on_picture(&mut self, _picture: &Picture) -> Result<()> {
        Ok(())
    }

    /// When a checkpoint is complete on disk.
    fn on_checkpoint(&mut self, _checkpoint: &Path) -> Result<()> {
        Ok(())
    }

    /// After the last step, the last validation and the last checkpoint.
    fn on_fit_end(&mut self, _progress: &Progress) -> Result<()> {
        Ok(())
    }
}
