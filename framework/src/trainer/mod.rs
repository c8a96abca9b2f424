//! The trainer: what the user configures, and the training loop that it runs.

mod callbacks;
mod config;
mod evaluate;
mod fit;
mod gallery;
mod limits;
mod pool;
mod ranks;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use indexmap::IndexMap;
use rayon::ThreadPool;

use callbacks::Callbacks;
pub use config::{Kernels, TrainerConfig};
use evaluate::{Evaluated, Evaluation};
use gallery::Gallery;
pub(crate) use limits::duration;
pub use limits::{Every, Limit};

use crate::batch::Batch;
use crate::callback::{Callback, Progress, Record, StopReason};
use crate::checkpoint::{Best, Checkpoint, CheckpointConfig, Origin};
use crate::collective::{Collective, DistributedConfig, Solo};
use crate::data::{Cycle, Data, Dataset, Pass, Source, Split};
use crate::error::{Error, Result};
use crate::metrics::video::LeadTimes;
use crate::module::{Model, Step};
use crate::optim::{AverageConfig, NamedOptimizer, OptimizerConfig, ParamGroup};
pub use crate::precision::Precision;
use crate::schedule::{Plateau, Schedule};

/// Opens a `tracing` span for a part of the loop. Without a subscriber it costs a few nanoseconds.
macro_rules! phase {
    ($name:literal) => {
        tracing::debug_span!(target: "candlepower::phase", $name).entered()
    };
}
pub(crate) use phase;

/// Trains any [`Model`] on any [`Data`] with the same batch type.
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
    pub(crate) turns: Vec<NamedOptimizer>,
    schedule: Schedule,
    average: Option<AverageConfig>,
    plateau: Option<Plateau>,
    checkpoint: CheckpointConfig,
    checkpoint_dir: Option<PathBuf>,
    distributed: DistributedConfig,
    /// This trainer's rank among all ranks that train together.
    ranks: Arc<dyn Collective>,
    /// The configuration, one setting per line, if it is known in more detail than here.
    description: Option<String>,
    /// What is trained on which data, if that is configured.
    origin: Option<Origin>,
    seed: u64,
    image_every: u64,
    callbacks: Callbacks,
    gallery: Gallery,
    resume: Option<Checkpoint>,
    /// Progress of the training that produced the weights to evaluate.
    progress: Progress,
    when_ready: Option<WhenReady>,
    /// The compute threads; rebuilt when their number changes.
    pool: Option<Arc<ThreadPool>>,
}

/// Work that runs once it is certain that training can begin.
type WhenReady = Box<dyn FnOnce(&mut Trainer) -> Result<()> + Send>;

/// How a run ended.
#[derive(Debug)]
pub struct Outcome {
    /// How far training came.
    pub progress: Progress,
    /// Metrics of the last validation, if there was one.
    pub validation: Option<IndexMap<String, f64>>,
    /// The best validation so far, by `monitor` in `[checkpoint]`, if checkpoints are saved.
    pub best: Option<Best>,
    /// Why the run ended.
    pub reason: StopReason,
}

impl Trainer {
    /// A trainer with Adam, without callbacks and without files.
    pub fn new(config: TrainerConfig) -> Self {
        Self {
            config,
            turns: vec![NamedOptimizer::single(OptimizerConfig::default(), Vec::new())],
            schedule: Schedule::default(),
            average: None,
            plateau: None,
            checkpoint: CheckpointConfig::default(),
            checkpoint_dir: None,
            distributed: DistributedConfig::default(),
            ranks: Arc::new(Solo),
            description: None,
            origin: None,
            seed: 0,
            image_every: 0,
            callbacks: Callbacks::default(),
            gallery: Gallery::default(),
            resume: None,
            progress: Progress::default(),
            when_ready: None,
            pool: None,
        }
    }

    /// Sets the optimizer of all parameters.
    pub fn optimizer(self, config: impl Into<OptimizerConfig>) -> Self {
        self.optimizer_with_groups(config, Vec::new())
    }

    /// Sets the optimizer, and groups of parameters with their own settings.
    pub fn optimizer_with_groups(self, config: impl Into<OptimizerConfig>, groups: Vec<ParamGroup>) -> Self {
        self.optimizers(vec![NamedOptimizer::single(config.into(), groups)])
    }

    /// Sets several optimizers, which take turns in each step.
    pub fn optimizers(mut self, turns: Vec<NamedOptimizer>) -> Self {
        self.turns = turns;
        self
    }

    /// Keeps an average of the weights: validations use it, checkpoints save it alongside the weights, and
    /// the model holds it after training.
    pub fn average(mut self, average: Option<AverageConfig>) -> Self {
        self.average = average;
        self
    }

    /// Sets the learning rate schedule.
    pub fn schedule(mut self, schedule: Schedule) -> Self {
        self.schedule = schedule;
        self
    }

    /// Lowers the learning rate, in addition to the schedule, when a validation metric stops improving.
    pub fn plateau(mut self, plateau: Option<Plateau>) -> Self {
        self.plateau = plateau;
        self
    }

    /// Sets the seed for the order of samples, augmentation and noise.
    pub fn seed(mut self, seed: u64) -> Self {
        self.seed = seed;
        self
    }

    /// Adds a callback. Callbacks are called in the order in which they were added.
    pub fn callback(self, callback: impl Callback + 'static) -> Self {
        self.boxed_callback(Box::new(callback))
    }

    /// Like [`callback`](Self::callback), for a boxed callback.
    pub fn boxed_callback(self, callback: Box<dyn Callback>) -> Self {
        let name = callback.name();
        self.named_callback(name, callback)
    }

    /// Like [`boxed_callback`](Self::boxed_callback), under the name of its section.
    pub(crate) fn named_callback(mut self, name: &str, callback: Box<dyn Callback>) -> Self {
        self.callbacks.add(name, callback);
        self
    }

    /// Requests pictures from modules every `steps` steps; 0 means never.
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

    /// Resumes from a checkpoint instead of starting at step 0.
    pub fn resume(mut self, checkpoint: Checkpoint) -> Self {
        self.resume = Some(checkpoint);
        self
    }

    /// Sets how far the weights used for validation and prediction have been trained, for modules that use
    /// [`Step::global_step`]. [`fit`](Self::fit) sets this by itself.
    pub fn trained(mut self, progress: Progress) -> Self {
        self.progress = progress;
        self
    }

    /// Sets how several ranks train together.
    pub fn distributed(mut self, config: DistributedConfig) -> Self {
        self.distributed = config;
        self
    }

    /// Trains as one of several existing ranks, for example processes. Only rank 0 resumes, writes files and
    /// has callbacks, except for callbacks that run [on every rank](Callback::on_every_rank).
    ///
    /// Without it, `devices` in the configuration starts that many ranks in this process.
    pub fn ranks(mut self, ranks: Arc<dyn Collective>) -> Self {
        self.ranks = ranks;
        self
    }

    /// A trainer for this trainer's first `steps` steps and nothing else: no validation, files or callbacks.
    pub(crate) fn trial(&self, steps: u64) -> Trainer {
        let config = TrainerConfig {
            max_steps: Some(steps),
            max_epochs: None,
            max_time: None,
            min_steps: 0,
            min_epochs: 0,
            limit_train_batches: self.config.overfit_batches.or(self.config.limit_train_batches),
            limit_val_batches: Some(Limit::Batches(0)),
            // Would also validate.
            overfit_batches: None,
            fast_dev_run: 0,
            nan_guard: false,
            ..self.config.clone()
        };
        Trainer::new(config)
            .optimizers(self.turns.clone())
            .average(self.average.clone())
            .schedule(self.schedule.clone())
            .distributed(self.distributed.clone())
            .ranks(self.ranks.clone())
            .seed(self.seed)
    }

    /// The trainer of another rank in rank 0's process: the same training, without callbacks.
    fn replica(&self, ranks: Arc<dyn Collective>) -> Trainer {
        let mut replica = Trainer::new(self.config.clone())
            .optimizers(self.turns.clone())
            .average(self.average.clone())
            .schedule(self.schedule.clone())
            .plateau(self.plateau.clone())
            .distributed(self.distributed.clone())
            .ranks(ranks)
            .seed(self.seed)
            .image_every(self.image_every);
        (replica.checkpoint, replica.description) = (self.checkpoint.clone(), self.description.clone());
        replica
    }

    /// Adds a callback after the existing ones.
    pub(crate) fn add(&mut self, callback: impl Callback + 'static) {
        self.callbacks.add_own(callback);
    }

    /// Sets work to run once training is certain to begin. Files that it overwrites are needed until then.
    pub(crate) fn when_ready(
        mut self,
        work: impl FnOnce(&mut Trainer) -> Result<()> + Send + 'static,
    ) -> Self {
        self.when_ready = Some(Box::new(work));
        self
    }

    /// Sets the configuration that ranks must agree on before they train.
    pub(crate) fn described(mut self, configuration: String) -> Self {
        self.description = Some(configuration);
        self
    }

    /// Sets what checkpoints record about what was trained on which data.
    pub(crate) fn origin(mut self, origin: Origin) -> Self {
        self.origin = Some(origin);
        self
    }

    /// Everything that ranks must agree on before they train, one setting per line.
    fn configuration(&self) -> String {
        if let Some(description) = &self.description {
            return description.clone();
        }
        let (optimizers, average, seed) = (&self.turns, &self.average, self.seed);
        format!(
            "{:#?}\noptimizers: {optimizers:#?}\nschedule: {:#?}\nplateau: {:#?}\naverage: {average:#?}\n{:#?}\n\
             seed: {seed}",
            self.config, self.schedule, self.plateau, self.distributed
        )
    }

    /// Trains until the configured end, a callback's stop, or an error. Each call begins at step 0 with the
    /// model's current weights, unless it [resumes](Self::resume).
    ///
    /// # Errors
    /// Also if training cannot usefully continue, for example after a loss that is not finite; the progress
    /// before that is saved.
    pub fn fit<B: Batch>(&mut self, model: &Model<B>, data: &Data<B>) -> Result<Outcome> {
        let outcome = self.fit_as_far_as_it_goes(model, data)?;
        match outcome.reason {
            StopReason::Failed(why) => Err(Error::msg(why)),
            _ => Ok(outcome),
        }
    }

    /// Like [`fit`](Self::fit), but ends with [`StopReason::Failed`] instead of an error if training cannot
    /// usefully continue.
    pub(crate) fn fit_as_far_as_it_goes<B: Batch>(
        &mut self,
        model: &Model<B>,
        data: &Data<B>,
    ) -> Result<Outcome> {
        self.config.check()?;
        self.turns.iter().try_for_each(NamedOptimizer::check)?;
        self.schedule.check()?;
        if let Some(plateau) = &self.plateau {
            let own = self.turns.iter().filter_map(|turn| turn.schedule.as_ref());
            own.chain([&self.schedule]).try_for_each(|schedule| plateau.check(schedule))?;
        }
        self.checkpoint.check()?;
        if let Some(average) = &self.average {
            average.check()?;
        }
        self.distributed.check()?;
        match self.ranks.devices_here(self.config.devices) {
            1 => ranks::fit_as_rank(self, model, data),
            devices => ranks::fit_on_threads(self, model, data, devices),
        }
    }

    /// Computes a model's metrics on a split, counting every sample once. Callbacks receive them as a
    /// validation's.
    pub fn validate<B: Batch>(
        &mut self,
        model: &Model<B>,
        data: &Data<B>,
        split: Split,
    ) -> Result<IndexMap<String, f64>> {
        let source = data.evaluated(split)?.clone();
        let pass = Pass::evaluation(split, self.seed);
        let limit = self.config.evaluation_limit(split);
        self.in_pool(|trainer| {
            trainer.gallery = Gallery::default();
            let progress = trainer.progress;
            let evaluation =
                Evaluation { model, source: &source, pass, limit, workers: data.workers, progress };
            let metrics = match evaluation.run(trainer, false)? {
                Evaluated::Complete(metrics, _) => metrics,
                Evaluated::Stopped(reason) => {
                    return Err(Error::msg(format!("the evaluation was stopped: {reason}")));
                }
            };
            trainer.show_all_pictures()?;
            let mut record =
                Record { step: progress.step, epoch: progress.epoch_of_last_step(), split, metrics };
            trainer.callbacks.ask(|callback| callback.on_validation_end(&mut record))?;
            Ok(record.metrics)
        })
    }

    /// Predicts from a split, up to `limit_predict_batches`, and passes the predictions to
    /// [`Callback::on_prediction`]. Returns the number of batches.
    pub fn predict_split<B: Batch>(
        &mut self,
        model: &Model<B>,
        data: &Data<B>,
        split: Split,
    ) -> Result<usize> {
        let source = data.evaluated(split)?.clone();
        let pass = Pass::evaluation(split, self.seed);
        self.in_pool(|trainer| {
            let (limit, progress) = (trainer.config.limit_predict_batches, trainer.progress);
            let evaluation =
                Evaluation { model, source: &source, pass, limit, workers: data.workers, progress };
            evaluation.predict(trainer)
        })
    }

    /// A model's prediction from one batch, on the CPU.
    pub fn predict<B: Batch>(&mut self, model: &Model<B>, batch: &B) -> Result<Tensor> {
        self.in_pool(|trainer| trainer.predicted(model, batch))
    }

    /// Compares a model's predictions on a split, or on as many of its batches as are evaluated, by lead
    /// time, with predictors that learn nothing. `None` if the batch type has no such comparison, for
    /// streams, and if no batch is evaluated.
    pub fn compare<B: Batch>(
        &mut self,
        model: &Model<B>,
        data: &Data<B>,
        split: Split,
    ) -> Result<Option<LeadTimes>> {
        let (Source::Indexed(train), Source::Indexed(held_out)) = (&data.train, data.split(split)?) else {
            return Ok(None);
        };
        self.in_pool(|trainer| {
            let config = &trainer.config;
            let at_once = config.micro_batch_size.unwrap_or(config.batch_size);
            let samples = config.samples_of(config.evaluation_limit(split), Some(held_out.len()))?;
            let held_out = Cycle { dataset: held_out.clone(), len: samples };
            if held_out.is_empty() {
                return Ok(None);
            }
            let mut predict = |batch: &B| trainer.predicted(model, batch);
            let pass = Pass::evaluation(split, trainer.seed);
            B::compare(&mut predict, &**train, &held_out, pass, at_once)
        })
    }

    fn predicted<B: Batch>(&self, model: &Model<B>, batch: &B) -> Result<Tensor> {
        predicted(model, batch, &mut Step::evaluation(self.progress.step, 0, self.seed, false))
    }
}

/// A model's prediction from one batch, on the CPU.
pub(crate) fn predicted<B: Batch>(model: &Model<B>, batch: &B, step: &mut Step) -> Result<Tensor> {
    let batch = model.prepared(batch)?;
    let prediction = model.evaluation().predict_step(&batch, step)?.to_dtype(DType::F32)?;
    Ok(prediction.to_device(&Device::Cpu)?)
}
