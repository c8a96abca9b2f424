//! Experiments: a configuration file, ready to train, validate or predict.

mod job;
mod schema;
mod sections;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::Device;
use indexmap::IndexMap;

use crate::batch::Batch;
use crate::bench::{Benchmark, Pass};
use crate::callback::Callback;
use crate::checkpoint::{Checkpoint, CheckpointConfig};
use crate::collective::{Collective, DistributedConfig, NCCL_ALONE, Solo};
use crate::config::{CallbackRecipe, DataRecipe, Document, ModuleRecipe, Registry, table, untag};
use crate::data::{Data, Source, Split};
use crate::error::{Error, Result};
use crate::finder::{BatchFinderConfig, BatchFinding, LrFinderConfig, LrFinding};
use crate::logger::LoggingConfig;
use crate::metrics::video::LeadTimes;
use crate::module::Model;
use crate::optim::{AverageConfig, NamedOptimizer};
use crate::run_dir::{RunConfig, RunDir};
use crate::schedule::{Plateau, Schedule};
use crate::trainer::{Outcome, Trainer, TrainerConfig};
use crate::weights::InitConfig;

pub(crate) use job::{Job, Pair};
use schema::SECTIONS;
pub use schema::schema;
use sections::{average, checked, optimizers_table, schedule, schedule_table, turns};

/// A configuration file with all sections read and checked. No data has been read yet.
pub struct Experiment {
    document: Document,
    run: RunConfig,
    init: Option<InitConfig>,
    trainer: TrainerConfig,
    turns: Vec<NamedOptimizer>,
    schedule: Schedule,
    plateau: Option<Plateau>,
    average: Option<AverageConfig>,
    checkpoint: CheckpointConfig,
    logging: LoggingConfig,
    distributed: DistributedConfig,
    ranks: Arc<dyn Collective>,
    callbacks: Vec<(String, CallbackRecipe)>,
    workers: usize,
    prefetch: usize,
    job: Box<dyn Job>,
}

/// Where training starts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Resume {
    /// At the first step, in a new folder.
    No,
    /// At the last good checkpoint of the newest run of this name, or at the first step if there is none.
    Auto,
    /// At this checkpoint, or at the last good one in this run's folder.
    From(PathBuf),
}

/// The result of a training.
#[derive(Debug)]
pub struct Report {
    /// The run's folder; `None` for a trial run (`trainer.fast_dev_run`) and on ranks other than 0.
    pub dir: Option<PathBuf>,
    /// How training ended.
    pub outcome: Outcome,
    /// The module's scores on the validation data by lead time, alongside predictors that learn nothing;
    /// `None` if the data or the run does not have them.
    pub lead_times: Option<LeadTimes>,
}

/// The maximum number of workers, and of batches that each may prefetch.
const MOST_AHEAD: usize = 1024;

impl Experiment {
    /// Reads a configuration file with `--set` overrides and checks everything that needs no data.
    pub fn read(registry: &Registry, path: &Path, sets: &[String]) -> Result<Self> {
        Self::new(registry, Document::read(path, sets)?)
    }

    /// Like [`read`](Self::read), for a document that has been read already.
    pub fn new(registry: &Registry, document: Document) -> Result<Self> {
        document.check_sections(&SECTIONS.map(|(name, _)| name))?;
        let place = |section| {
            let document = &document;
            move |error| document.place(section, error)
        };
        let run = checked(&document, "run", RunConfig::check)?;
        let init = document.has("init")?.then(|| document.section::<InitConfig>("init")).transpose()?;
        let trainer = checked(&document, "trainer", TrainerConfig::check)?;
        let checkpoint = checked(&document, "checkpoint", CheckpointConfig::check)?;
        let logging = checked(&document, "logging", LoggingConfig::check)?;
        let distributed = checked(&document, "distributed", DistributedConfig::check)?;
        if distributed.min_devices.is_some_and(|fewest| fewest > trainer.devices) {
            let message = format!("expected at most `trainer.devices`, which is {}", trainer.devices);
            return Err(place("distributed")(Error::setting("min_devices", message)));
        }
        let turns = turns(&document, registry)?;
        let (schedule, plateau) = schedule(&document, "schedule")?;
        if let Some(plateau) = &plateau {
            let mut own = turns.iter().filter_map(|turn| turn.schedule.as_ref());
            own.try_for_each(|schedule| plateau.check(schedule)).map_err(place("schedule.plateau"))?;
        }
        let average = average(&document)?;
        let callbacks = registry.callbacks(&document)?;
        for (name, callback) in &callbacks {
            (callback.make)().map_err(|error| document.place(&format!("callbacks.{name}"), error))?;
        }
        let (module, mut data) = (document.named("module", None)?, document.named("data", None)?);
        let workers = document.take_field(&mut data, "workers")?.unwrap_or(2);
        let prefetch = document.take_field(&mut data, "prefetch")?.unwrap_or(2);
        for (key, value) in [("workers", workers), ("prefetch", prefetch)] {
            if value > MOST_AHEAD {
                let message = format!("expected at most {MOST_AHEAD}, found {value}");
                return Err(place("data")(Error::setting(key, message)));
            }
        }
        let job = registry.job(&document, &module, &data)?;
        Ok(Self {
            document,
            run,
            init,
            trainer,
            turns,
            schedule,
            plateau,
            average,
            checkpoint,
            logging,
            distributed,
            ranks: Arc::new(Solo),
            callbacks,
            workers,
            prefetch,
            job,
        })
    }

    /// The configuration with every default written out.
    pub fn resolved(&self) -> Result<String> {
        let [module, mut data] = self.job.settings();
        data.insert("workers".into(), toml::Value::Integer(self.workers as i64));
        data.insert("prefetch".into(), toml::Value::Integer(self.prefetch as i64));
        let mut schedule = schedule_table(&self.schedule)?;
        if let Some(plateau) = &self.plateau {
            schedule.insert("plateau".into(), table(plateau)?.into());
        }
        let (one_or_several, optimizers) = optimizers_table(&self.turns)?;
        let callbacks = self.callbacks.iter();
        let callbacks: toml::Table =
            callbacks.map(|(name, callback)| (name.clone(), callback.settings.clone().into())).collect();
        let sections = [
            ("run", Some(table(&self.run)?)),
            ("init", self.init.as_ref().map(table).transpose()?),
            ("trainer", Some(table(&self.trainer)?)),
            ("module", Some(module)),
            ("data", Some(data)),
            (one_or_several, Some(optimizers)),
            ("schedule", Some(schedule)),
            ("average", self.average.as_ref().map(untag).transpose()?),
            ("checkpoint", Some(table(&self.checkpoint)?)),
            ("logging", Some(table(&self.logging)?)),
            ("distributed", Some(table(&self.distributed)?)),
            ("callbacks", Some(callbacks).filter(|callbacks| !callbacks.is_empty())),
        ];
        let present = sections.into_iter().filter_map(|(name, section)| Some((name.into(), section?.into())));
        let all: toml::Table = present.collect();
        toml::to_string_pretty(&all).map_err(|error| Error::msg(error.to_string()))
    }

    /// Builds the module with its starting weights, without reading a sample: a cheap check of a
    /// configuration. Returns the total number of values in its parameters.
    pub fn build(&self) -> Result<usize> {
        self.job.build(self)
    }

    /// The settings for training on several ranks.
    pub fn distributed(&self) -> &DistributedConfig {
        &self.distributed
    }

    /// The number of devices that it trains on.
    pub fn devices(&self) -> usize {
        self.trainer.devices
    }

    /// Makes this process one of several that train, or time steps, together; only the first writes files. If
    /// each process is one rank, `trainer.devices` must be their number, in total or per machine, or 1, the
    /// default.
    pub fn ranks(self, ranks: Arc<dyn Collective>) -> Result<Self> {
        let (devices, processes) = (self.trainer.devices, ranks.world_size());
        let expected = [1, processes, processes / self.distributed.nodes];
        if processes > 1 && ranks.processes().is_none() && !expected.contains(&devices) {
            let message = format!(
                "there are {processes} processes with one device each: expected {processes}, or leave it out"
            );
            return Err(self.document.place("trainer", Error::setting("devices", message)));
        }
        Ok(Self { ranks, ..self })
    }

    /// Trains. `callbacks` come after those of the configuration.
    pub fn train(&self, resume: &Resume, callbacks: Vec<Box<dyn Callback>>) -> Result<Report> {
        let report = self.job.train(self, resume, callbacks);
        // The other ranks would wait for one that could not even begin.
        report.inspect_err(|error| self.ranks.abort(&error.to_string()))
    }

    /// Computes the metrics of a checkpoint on a split of the data.
    pub fn validate(&self, checkpoint: &Path, split: Split) -> Result<IndexMap<String, f64>> {
        self.job.validate(self, checkpoint, split)
    }

    /// Compares a checkpoint with predictors that learn nothing, on a split of the data, by lead time. `None`
    /// for data without lead times.
    pub fn compare(&self, checkpoint: &Path, split: Split) -> Result<Option<LeadTimes>> {
        self.job.compare(self, checkpoint, split)
    }

    /// Predicts from the file `input` with a checkpoint's weights, and writes the prediction to `output`. The
    /// training data need not be present if `[data]` is what the checkpoint was trained with.
    pub fn predict(&self, checkpoint: &Path, input: &Path, output: &Path) -> Result<()> {
        self.job.predict(self, checkpoint, input, output)
    }

    /// Predicts from every sample of a split with a checkpoint's weights and passes the predictions to the
    /// callbacks. Returns the number of batches.
    pub fn predict_split(
        &self,
        checkpoint: &Path,
        split: Split,
        callbacks: Vec<Box<dyn Callback>>,
    ) -> Result<usize> {
        self.job.predict_split(self, checkpoint, split, callbacks)
    }

    /// Times `steps` steps after a warm-up; writes nothing. Validation, checkpoints, pictures and logs are
    /// left out.
    pub fn bench(&self, steps: u64, pass: Pass) -> Result<Benchmark> {
        self.job.bench(self, steps, pass)
    }

    /// Searches for a learning rate ([`Trainer::find_lr`]), starting from the weights that training starts
    /// from. Writes nothing.
    pub fn find_lr(&self, config: &LrFinderConfig) -> Result<LrFinding> {
        self.job.find_lr(self, config)
    }

    /// Searches for a batch size ([`Trainer::find_batch_size`]). Writes nothing.
    pub fn find_batch_size(&self, config: &BatchFinderConfig) -> Result<BatchFinding> {
        self.job.find_batch_size(self, config)
    }

    fn data<B: Batch>(&self, recipe: &DataRecipe<B>) -> Result<Data<B>> {
        let mut data = Data::from_source(self.open(recipe, Split::Train)?);
        data.val = Some(self.open(recipe, Split::Val)?);
        (data.workers, data.prefetch) = (self.workers, self.prefetch);
        Ok(data)
    }

    fn open<B: Batch>(&self, recipe: &DataRecipe<B>, split: Split) -> Result<Source<B>> {
        (recipe.open)(split).map_err(|error| self.document.place("data", error))
    }

    /// The device of this process's first rank.
    fn device(&self) -> Result<Device> {
        let here = self.ranks.devices_here(self.trainer.devices);
        let device = self.trainer.accelerator.open(here);
        let device = device.and_then(|device| match self.ranks.processes() {
            Some(_) if !device.is_cuda() => Err(Error::setting("accelerator", NCCL_ALONE)),
            _ => Ok(device),
        });
        device.map_err(|error| self.document.place("trainer", error))
    }

    fn model<B: Batch>(&self, recipe: &ModuleRecipe<B>, spec: B::Spec, device: &Device) -> Result<Model<B>> {
        let build = recipe.build.clone();
        let model = Model::boxed(move |vb| build(&spec, vb), self.run.seed, device, self.trainer.precision);
        model.map_err(|error| self.document.place("module", error))
    }

    /// Loads the starting weights into a model, if any are configured.
    fn init<B: Batch>(&self, model: &Model<B>) -> Result<()> {
        let Some(init) = &self.init else { return Ok(()) };
        init.apply(model.params()).map_err(|error| self.document.place("init", error))
    }

    fn trainer(&self) -> Trainer {
        Trainer::new(self.trainer.clone())
            .optimizers(self.turns.clone())
            .average(self.average.clone())
            .schedule(self.schedule.clone())
            .plateau(self.plateau.clone())
            .distributed(self.distributed.clone())
            .ranks(self.ranks.clone())
            .seed(self.run.seed)
            .image_every(self.logging.image_every)
    }

    /// The trainer with the callbacks of the configuration.
    fn watched(&self) -> Result<Trainer> {
        let make = |trainer: Trainer, (name, callback): &(String, CallbackRecipe)| {
            Ok(trainer.named_callback(name, (callback.make)()?))
        };
        self.callbacks.iter().try_fold(self.trainer(), make)
    }

    /// Adds the place in the file to a setting error that was only found in training.
    fn place_training_error(&self, error: Error) -> Error {
        let error = match error {
            // The error names its section.
            Error::Setting { key, message } if key.contains('.') => {
                let (section, key) = key.rsplit_once('.').unwrap_or(("", &key));
                return self.document.place(section, Error::setting(key, message));
            }
            other => other,
        };
        let section = match &error {
            Error::Setting { key, .. } if ["params", "lr", "groups", "every"].contains(&key.as_str()) => {
                "optimizer"
            }
            _ => "trainer",
        };
        self.document.place(section, error)
    }

    /// The folder to train in, and the checkpoint to start from.
    fn start(&self, resume: &Resume) -> Result<(Option<RunDir>, Option<Checkpoint>)> {
        let (run, checkpoint) = match resume {
            Resume::No => return Ok((None, None)),
            Resume::From(path) => {
                let (run, checkpoint) = RunDir::containing(path)?;
                if checkpoint.parent() != Some(&run.checkpoints()) {
                    return Err(Error::msg(format!(
                        "{}: expected a checkpoint in the `checkpoints` folder of its run, where training goes on; to start \
                         a new run from these weights, set `weights` in [init]",
                        checkpoint.display()
                    )));
                }
                (run, checkpoint)
            }
            Resume::Auto => match RunDir::newest_with_checkpoint(&self.run)
                .map_err(|error| Error::msg(format!("{error}\nomit `--resume` to start a new run")))?
            {
                Some(found) => found,
                None => return Ok((None, None)),
            },
        };
        tracing::info!("resuming from {}", checkpoint.display());
        Ok((Some(run), Some(Checkpoint::load(&checkpoint)?)))
    }
}
