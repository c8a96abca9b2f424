//! Callbacks: they watch a run and can end it, but never change it.

use std::fmt;
use std::path::Path;

use candle_core::{DType, Device, Tensor, Var};
use indexmap::IndexMap;
use serde::{Deserialize, Serialize};

use crate::data::{Settings, Split};
use crate::error::Result;
use crate::picture::png_bytes;

/// How far training has come. Steps are optimizer steps.
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
    /// Samples learned from in the epoch of the next step.
    #[serde(default)]
    pub samples_in_epoch: u64,
}

impl Progress {
    /// Counts one optimizer step over `samples` samples; `ends_epoch` if it was the last of its epoch.
    pub(crate) fn advance(&mut self, samples: usize, ends_epoch: bool) {
        self.step += 1;
        self.samples += samples as u64;
        self.step_in_epoch += 1;
        self.samples_in_epoch += samples as u64;
        if ends_epoch {
            (self.step_in_epoch, self.samples_in_epoch) = (0, 0);
            self.epoch += 1;
        }
    }

    /// The epoch that the last step belonged to.
    pub fn epoch_of_last_step(&self) -> u64 {
        if self.step_in_epoch == 0 { self.epoch.saturating_sub(1) } else { self.epoch }
    }
}

/// What a run is going to do.
#[derive(Debug, Clone, Copy)]
pub struct Plan {
    /// Where it starts; not zero if the run is resumed.
    pub start: Progress,
    /// The step at which it ends, if known: the length of a stream is unknown before its first end.
    pub last_step: Option<u64>,
    /// Steps per epoch, if known.
    pub steps_per_epoch: Option<u64>,
    /// Total number of values in all parameters.
    pub parameters: usize,
    /// Bytes of optimizer state on this rank.
    pub optimizer_bytes: usize,
    /// Floating-point operations of one sample's training step, if the module reports them
    /// ([`Module::flops`](crate::module::Module::flops)).
    pub flops_per_sample: Option<f64>,
}

/// The state after a step, before the next one begins.
#[derive(Debug, Clone, Copy)]
pub struct StepEnd<'a> {
    /// Progress, including this step.
    pub progress: Progress,
    /// The parameters that are trained, after the step.
    pub params: &'a [(String, Var)],
    /// The gradient of each parameter in this step, after clipping; empty unless a callback
    /// [wants them](Callback::wants_gradients). If one of several optimizers skipped the step, its gradients
    /// are the overflowed ones, or 0 if its turn was not due.
    pub gradients: &'a [Tensor],
}

/// Metrics at one point of a run.
#[derive(Debug, Clone, Serialize)]
pub struct Record {
    /// Steps completed.
    pub step: u64,
    /// The epoch that the last step belongs to.
    pub epoch: u64,
    /// The split that the metrics were computed on.
    pub split: Split,
    /// Metrics by name.
    #[serde(flatten)]
    pub metrics: IndexMap<String, f64>,
}

/// A picture at one point of a run.
#[derive(Debug, Clone)]
pub struct Picture {
    /// Steps completed.
    pub step: u64,
    /// The split that the picture belongs to.
    pub split: Split,
    /// What it shows, for example `prediction`.
    pub name: String,
    /// (C, H, W), C = 1 or 3, values in `[0, 1]`, f32 on the CPU.
    pub pixels: Tensor,
    /// The same picture as a PNG file.
    pub png: Vec<u8>,
}

impl Picture {
    /// Creates a picture from pixels, (C, H, W) with C = 1 or 3 and values in `[0, 1]`.
    ///
    /// # Errors
    /// If the pixels have another shape.
    pub fn new(step: u64, split: Split, name: &str, pixels: &Tensor) -> Result<Self> {
        let pixels = pixels.to_device(&Device::Cpu)?.to_dtype(DType::F32)?;
        let png = png_bytes(&pixels)?;
        Ok(Self { step, split, name: name.to_string(), pixels, png })
    }
}

/// Whether training continues.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Flow {
    /// Continue.
    #[default]
    Continue,
    /// Save a checkpoint and continue.
    Save,
    /// Stop: save a checkpoint and report the reason.
    Stop(StopReason),
}

impl Flow {
    /// Combines two answers: stopping takes precedence over saving, the first stop over the second.
    pub fn or(self, other: Flow) -> Flow {
        match (&self, &other) {
            (Flow::Stop(_), _) | (_, Flow::Continue) => self,
            _ => other,
        }
    }
}

/// Why a run ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StopReason {
    /// The run reached its configured end.
    Finished,
    /// A callback stopped it; the text is the reason.
    Callback(String),
    /// Continuing would be useless; the text is the reason. Earlier progress is saved.
    Failed(String),
    /// The process received this signal.
    Signal(i32),
}

impl fmt::Display for StopReason {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Self::Finished => f.write_str("finished"),
            Self::Callback(why) | Self::Failed(why) => f.write_str(why),
            Self::Signal(number) => write!(f, "signal {number}"),
        }
    }
}

/// Watches a run. All methods have defaults.
pub trait Callback: Send {
    /// Called before the first step.
    fn on_fit_start(&mut self, _plan: &Plan) -> Result<()> {
        Ok(())
    }

    /// Called after every optimizer step.
    fn on_step_end(&mut self, _step: &StepEnd) -> Result<Flow> {
        Ok(Flow::Continue)
    }

    /// Called when training metrics have been read. Metrics that a callback adds are visible to the callbacks
    /// after it, including loggers. The record usually holds a step's metrics, plus the epoch's
    /// ([`Step::log_epoch`]) if the step ends an epoch. It holds only the epoch's, without `loss`, `lr` and
    /// `grad_norm`, if the step is not logged or training ends within an epoch.
    ///
    /// [`Step::log_epoch`]: crate::module::Step::log_epoch
    fn on_train_metrics(&mut self, _record: &mut Record) -> Result<Flow> {
        Ok(Flow::Continue)
    }

    /// Called after `done` of `total` batches of an evaluation; `total` is `None` for a stream. The returned
    /// request takes effect when the evaluation is complete. Only a signal ends the evaluation early, and
    /// only with a single rank; a resumed run then repeats the validation.
    fn on_validation_batch_end(&mut self, _done: usize, _total: Option<usize>) -> Result<Flow> {
        Ok(Flow::Continue)
    }

    /// Called when an evaluation is complete: of the validation data or, outside training, of any split.
    fn on_validation_end(&mut self, _record: &mut Record) -> Result<Flow> {
        Ok(Flow::Continue)
    }

    /// Called with the prediction for batch number `batch` of a dataset, (B, ...).
    fn on_prediction(&mut self, _batch: usize, _prediction: &Tensor) -> Result<()> {
        Ok(())
    }

    /// Called when a logged picture has been drawn, possibly some steps after the step that logged it, but
    /// before the next checkpoint.
    fn on_picture(&mut self, _picture: &Picture) -> Result<()> {
        Ok(())
    }

    /// Called when a checkpoint is complete on disk, some steps after the step that it holds.
    fn on_checkpoint(&mut self, _checkpoint: &Path) -> Result<()> {
        Ok(())
    }

    /// Called after the last step, validation and checkpoint; `reason` is why training ended.
    fn on_fit_end(&mut self, _progress: &Progress, _reason: &StopReason) -> Result<()> {
        Ok(())
    }

    /// Whether it reads the gradients of this step. If no callback does, gradients are clipped inside the
    /// optimizer's update, and ranks with sharded optimizer state do not exchange them.
    fn wants_gradients(&self, _step: u64) -> bool {
        true
    }

    /// Whether every process of a multi-process training calls it, instead of only rank 0.
    fn on_every_rank(&self) -> bool {
        false
    }

    /// The validation metric that it requires, if any. Its existence is checked before the first step.
    fn monitored_metric(&self) -> Option<&str> {
        None
    }

    /// The names of validation metrics that it adds to records, for others to monitor.
    fn added_metrics(&self) -> Vec<String> {
        Vec::new()
    }

    /// The name under which checkpoints store its state. For a callback made from a configuration it is the
    /// name of its section, regardless of this method.
    fn name(&self) -> &'static str {
        std::any::type_name::<Self>()
    }

    /// State to store in checkpoints, so an interrupted run can restore it.
    fn state(&self) -> Option<serde_json::Value> {
        None
    }

    /// Restores the state from a checkpoint. Called before [`Callback::on_fit_start`].
    fn restore(&mut self, _state: serde_json::Value) -> Result<()> {
        Ok(())
    }
}

/// A callback built from its own section of the configuration file, `[callbacks.NAME]`.
pub trait BuildCallback: Callback + Sized + 'static {
    /// The fields of its section.
    type Config: Settings;

    /// Builds the callback. Returns [`Error::Setting`](crate::Error::Setting) for invalid values.
    fn watch(config: &Self::Config) -> Result<Self>;
}
