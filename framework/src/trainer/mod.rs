//! The trainer: what a user configures, and the one loop that it runs.

mod config;
mod evaluate;
mod fit;

use std::path::{Path, PathBuf};

use candle_core::Tensor;
use indexmap::IndexMap;
use tracing::{Dispatch, dispatcher};

pub use config::{Kernels, Precision, TrainerConfig};

use crate::batch::Batch;
use crate::callback::{Callback, Progress, StopReason};
use crate::checkpoint::{Checkpoint, CheckpointConfig};
use crate::data::{Data, Dataset, Split};
use crate::error::Result;
use crate::module::{Model, Step};
use crate::nn;
use crate::optim::OptimizerConfig;
use crate::schedule::{Plateau, Schedule};

/// Trains any [`Model`] on any [`Data`] of the same batch.
///
/// ```no_run
/// # use candlepower::prelude::*;
/// # fn example<B: Batch>(model: &Model<B>, data: &Data<B>) -> Result<()> {
/// let outcome = Trainer::new(TrainerConfig { batch_size: 16, max_steps: Some(1000), ..Default::default() })
///     .callback(ProgressBar::default())
///     .fit(model, data)?;
/// # Ok(()) }
/// ```
pub struct Trainer {
    pub(crate) config: TrainerConfig,
    optimizer: OptimizerConfig,
    schedule: Schedule,
    plateau: Option<Plateau>,
    checkpoint: CheckpointConfig,
    checkpoint_dir: Option<PathBuf>,
    seed: u64,
    image_every: u64,
    callbacks: Vec<Box<dyn Callback>>,
    resume: Option<Checkpoint>,
}

/// How a run ended.
#[derive(Debug)]
pub struct Outcome {
    /// How far it came.
    pub progress: Progress,
    /// The metrics of the last validation, where there was one.
    pub validation: Option<IndexMap<String, f64>>,
    /// Why it ended.
    pub reason: StopReason,
}

impl Trainer {
    /// A trainer with Adam, no callbacks, and no files.
    pub fn new(config: TrainerConfig) -> Self {
        Self {
            config,
            optimizer: OptimizerConfig::default(),
            schedule: Schedule::default(),
            plateau: None,
            checkpoint: CheckpointConfig::default(),
            checkpoint_dir: None,
            seed: 0,
            image_every: 0,
            callbacks: Vec::new(),
            resume: None,
        }
    }

    /// Sets the optimizer.
    pub fn optimizer(mut self, config: impl Into<OptimizerConfig>) -> Self {
        self.optimizer = config.into();
        self
    }

    /// Sets how the learning rate moves from step to step.
    pub fn schedule(mut self, schedule: Schedule) -> Self {
        self.schedule = schedule;
        self
    }

    /// Lowers the learning rate, besides what the schedule does, when the validation loss stops falling.
    pub fn plateau(mut self, plateau: Option<Plateau>) -> Self {
        self.plateau = plateau;
        self
    }

    /// Sets the seed that order, augmentation and noise depend on.
    pub fn seed(mut self, seed: u64) -> Self {
        self.seed = seed;
        self
    }

    /// Adds a callback; callbacks are called in the order in which they were added.
    pub fn callback(self, callback: impl Callback + 'static) -> Self {
        self.boxed_callback(Box::new(callback))
    }

    /// The same for a callback whose type is not known.
    pub fn boxed_callback(mut self, callback: Box<dyn Callback>) -> Self {
        self.callbacks.push(callback);
        self
    }

    /// Asks modules for pictures every so many steps; 0: never.
    pub fn image_every(mut self, steps: u64) -> Self {
        self.image_every = steps;
        self
    }

    /// Saves checkpoints in this folder.
    pub fn checkpoints(mut self, dir: impl AsRef<Path>, config: CheckpointConfig) -> Self {
        self.checkpoint_dir = Some(dir.as_ref().to_path_buf());
        self.checkpoint = config;
        self
    }

    /// Goes on from a checkpoint instead of from the start.
    pub fn resume(mut self, checkpoint: Checkpoint) -> Self {
        self.resume = Some(checkpoint);
        self
    }

    /// Trains until the configured end, a callback's stop, or an error.
    pub fn fit<B: Batch>(&mut self, model: &Model<B>, data: &Data<B>) -> Result<Outcome> {
        self.config.check()?;
        self.optimizer.check()?;
        self.schedule.check()?;
        self.in_pool(|trainer| fit::Fit::new(trainer, model, data)?.run())
    }

    /// The metrics of a model on a dataset, every sample counted once.
    pub fn validate<B: Batch>(
        &mut self,
        model: &Model<B>,
        data: &Data<B>,
        split: Split,
    ) -> Result<IndexMap<String, f64>> {
        self.config.check()?;
        let dataset = if split == Split::Train { Some(&data.train) } else { data.val.as_ref() };
        let dataset = dataset.ok_or_else(|| crate::Error::msg("there is no data to validate on"))?.clone();
        self.in_pool(|trainer| {
            let progress = Progress::default();
            evaluate::evaluate(trainer, model, dataset, split, data.workers, &progress, false)
        })
    }

    /// What a model predicts from one batch.
    pub fn predict<B: Batch>(&mut self, model: &Model<B>, batch: &B) -> Result<Tensor> {
        self.in_pool(|trainer| {
            let batch = batch.to_device(model.params().device())?;
            model.evaluation().predict_step(&batch, &mut Step::evaluation(0, 0, trainer.seed, false))
        })
    }

    /// Runs in a thread pool of the configured size. Its threads have large stacks: candle's backward pass walks the
    /// graph recursively, and an unrolled recurrence is deeper than the usual stack.
    pub(crate) fn in_pool<T: Send>(
        &mut self,
        work: impl FnOnce(&mut Trainer) -> Result<T> + Send,
    ) -> Result<T> {
        const STACK: usize = 256 << 20; // Reserved, not used: pages are touched as the recursion needs them.
        let (threads, kernels) = (self.config.threads.unwrap_or(0), self.config.kernels);
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).stack_size(STACK);
        let pool = pool.thread_name(|i| format!("compute-{i}")).build();
        let pool =
            pool.map_err(|error| crate::Error::msg(format!("cannot start the compute threads: {error}")))?;
        // Who listens to this thread's spans and messages listens to the pool's thread that takes its place.
        let listener = dispatcher::get_default(Dispatch::clone);
        pool.install(|| dispatcher::with_default(&listener, || nn::with_kernels(kernels, || work(self))))
    }
}

/// How many samples one device takes at once in evaluation: as many as in training.
fn evaluation_batch(config: &TrainerConfig, dataset: &dyn Dataset<Batch = impl Batch>) -> usize {
    config.micro_batch_size.unwrap_or(config.batch_size).min(dataset.len().max(1))
}
