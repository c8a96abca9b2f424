//! Callbacks: they watch a run and can end it; they never change it.

use std::path::Path;

use candle_core::{DType, Device, Tensor, Var};
use indexmap::IndexMap;
use serde::{Deserialize, Serialize};

use crate::data::{Settings, Split};
use crate::error::Result;
use crate::picture::png_bytes;

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
    /// Samples learned from in the epoch of the next step.
    #[serde(default)]
    pub samples_in_epoch: u64,
}

impl Progress {
    /// Counts one optimizer step over `samples` samples, which may have been the last of its epoch.
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

/// What a run sets out to do.
#[derive(Debug, Clone, Copy)]
pub struct Plan {
    /// Where it starts; not at zero when it is resumed.
    pub start: Progress,
    /// The step at which it ends, where that is known: a stream has no length before its first end.
    pub last_step: Option<u64>,
    /// Steps in an epoch, where that is known.
    pub steps_per_epoch: Option<u64>,
    /// Numbers in all parameters together.
    pub parameters: usize,
    /// Bytes of what the optimizers remember, on this rank.
    pub optimizer_bytes: usize,
    /// Floating-point operations of one sample's training step, where the module says
    /// ([`Module::flops`](crate::module::Module::flops)).
    pub flops_per_sample: Option<f64>,
}

/// What a step leaves to look at, before the next one begins.
#[derive(Debug, Clone, Copy)]
pub struct StepEnd<'a> {
    /// How far training has come, this step included.
    pub progress: Progress,
    /// The parameters that are trained, after the step.
    pub params: &'a [(String, Var)],
    /// The gradient of each of them in this step, after clipping; none unless a callback
    /// [wants them](Callback::wants_gradients). Where one of several optimizers sat the step out, its gradients are those that
    /// overflowed, or, where its turn was not due, 0.
    pub gradients: &'a [Tensor],
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
    /// (C, H, W), C = 1 or 3, values in `[0, 1]`, f32 on the CPU.
    pub pixels: Tensor,
    /// The same as a PNG file.
    pub png: Vec<u8>,
}

impl Picture {
    /// A picture of these pixels, (C, H, W) with C = 1 or 3 and values in `[0, 1]`.
    ///
    /// # Errors
    /// Where the pixels have another shape.
    pub fn new(step: u64, split: Split, name: &str, pixels: &Tensor) -> Result<Self> {
        let pixels = pixels.to_device(&Device::Cpu)?.to_dtype(DType::F32)?;
        let png = png_bytes(&pixels)?;
        Ok(Self { step, split, name: name.to_string(), pixels, png })
    }
}

/// Whether training goes on.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Flow {
    /// It goes on.
    #[default]
    Continue,
    /// A checkpoint is saved, and it goes on.
    Save,
    /// It ends here: a checkpoint is saved, and the run says why.
    Stop(StopReason),
}

impl Flow {
    /// What two answers come to: stopping counts more than saving, the first stop more than the second.
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
    /// It did what it set out to do.
    Finished,
    /// A callback had seen enough; the text says of what.
    Callback(String),
    /// It was no use to go on: the text says why. What came before is saved.
    Failed(String),
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
    fn on_step_end(&mut self, _step: &StepEnd) -> Result<Flow> {
        Ok(Flow::Continue)
    }

    /// When training metrics have been read; those that a callback adds reach the callbacks after it, loggers among them. Mostly they
    /// are those of a step, and where it ends an epoch those of the epoch ([`Step::log_epoch`]) too. The latter come alone where the
    /// step is not logged, and where training ends within an epoch: without `loss`, `lr` and `grad_norm`.
    ///
    /// [`Step::log_epoch`]: crate::module::Step::log_epoch
    fn on_train_metrics(&mut self, _record: &mut Record) -> Result<Flow> {
        Ok(Flow::Continue)
    }

    /// After `done` of `total` batches of an evaluation; a stream's total is not known. What it asks for happens
    /// when the evaluation is complete. A signal alone ends it here, where one rank is alone; a run that is resumed makes up for it.
    fn on_validation_batch(&mut self, _done: usize, _total: Option<usize>) -> Result<Flow> {
        Ok(Flow::Continue)
    }

    /// When an evaluation is complete: of the validation data, or, outside training, of any split.
    fn on_validation_end(&mut self, _record: &mut Record) -> Result<Flow> {
        Ok(Flow::Continue)
    }

    /// What was predicted from batch number `batch` of a dataset, (B, ...).
    fn on_prediction(&mut self, _batch: usize, _prediction: &Tensor) -> Result<()> {
        Ok(())
    }

    /// When a picture that a module logged is drawn: perhaps some steps after the one that it is of, but before the next
    /// checkpoint.
    fn on_picture(&mut self, _picture: &Picture) -> Result<()> {
        Ok(())
    }

    /// When a checkpoint is complete on disk: some steps after the one that it is of.
    fn on_checkpoint(&mut self, _checkpoint: &Path) -> Result<()> {
        Ok(())
    }

    /// After the last step, the last validation and the last checkpoint; `reason` says why it was the last.
    fn on_fit_end(&mut self, _progress: &Progress, _reason: &StopReason) -> Result<()> {
        Ok(())
    }

    /// Whether it looks at the gradients of this step, which are otherwise clipped within the optimizer's own pass, and not
    /// exchanged by ranks that share out its state.
    fn wants_gradients(&self, _step: u64) -> bool {
        true
    }

    /// Whether, in a training of several processes, each of them asks it, and not that of rank 0 alone.
    fn on_every_rank(&self) -> bool {
        false
    }

    /// The validation metric that it cannot do without. Whether there is one of that name is known before the first step.
    fn monitors(&self) -> Option<&str> {
        None
    }

    /// The names of the validation metrics that it adds to records, for others to monitor.
    fn adds(&self) -> Vec<String> {
        Vec::new()
    }

    /// The name under which checkpoints keep its state. Of a callback that a configuration asks for it is its section's, whatever this
    /// says.
    fn name(&self) -> &'static str {
        std::any::type_name::<Self>()
    }

    /// What it must remember when the run is interrupted; a checkpoint keeps it.
    fn state(&self) -> Option<serde_json::Value> {
        None
    }

    /// Takes up the state that a checkpoint kept, before [`Callback::on_fit_start`].
    fn restore(&mut self, _state: serde_json::Value) -> Result<()> {
        Ok(())
    }
}

/// A callback that is made from its own section of the configuration file, `[callbacks.NAME]`.
pub trait Watch: Callback + Sized + 'static {
    /// The fields of its section.
    type Config: Settings;

    /// Makes the callback. Values that do not fit are an [`Error::Setting`](crate::Error::Setting).
    fn watch(config: &Self::Config) -> Result<Self>;
}
