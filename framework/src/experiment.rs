//! An experiment: one configuration file, made ready to train, validate or predict.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::{DType, Device};
use candle_nn::VarBuilder;
use indexmap::{IndexMap, IndexSet};
use schemars::schema_for;
use serde_json::json;

use crate::batch::Batch;
use crate::bench::{self, Benchmark, Pass};
use crate::callback::{Callback, StopReason};
use crate::callbacks::ProgressBar;
use crate::checkpoint::{self, Checkpoint, CheckpointConfig};
use crate::collective::{Collective, DistributedConfig, NCCL_ALONE, Solo};
use crate::config::{CallbackRecipe, DataRecipe, Document, ModuleRecipe, Registry, untag};
use crate::data::{Data, Source, Split};
use crate::error::{Error, Result};
use crate::finder::{BatchFinderConfig, BatchFinding, LrFinderConfig, LrFinding};
use crate::logger::{Loggers, LoggingConfig};
use crate::metrics::video::LeadTimes;
use crate::module::Model;
use crate::optim::{AverageConfig, GroupConfig, OptimizerConfig, TurnConfig};
use crate::run_dir::{RunConfig, RunDir};
use crate::schedule::{Plateau, Schedule};
use crate::trainer::{Outcome, Trainer, TrainerConfig};

const SECTIONS: [&str; 12] = [
    "run",
    "trainer",
    "module",
    "data",
    "optimizer",
    "optimizers",
    "schedule",
    "average",
    "checkpoint",
    "logging",
    "distributed",
    "callbacks",
];

/// A configuration file whose every section has been read and checked; no data has been read yet.
pub struct Experiment {
    document: Document,
    run: RunConfig,
    trainer: TrainerConfig,
    turns: Vec<TurnConfig>,
    schedule: Schedule,
    plateau: Option<Plateau>,
    average: Option<AverageConfig>,
    checkpoint: CheckpointConfig,
    logging: LoggingConfig,
    distributed: DistributedConfig,
    ranks: Arc<dyn Collective>,
    callbacks: Vec<(String, Box<dyn CallbackRecipe>)>,
    names: [String; 2],
    workers: usize,
    prefetch: usize,
    job: Box<dyn Job>,
}

/// Where training starts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Resume {
    /// At the first step, in a new folder.
    No,
    /// At the last good checkpoint of the newest run of this name; at the first step where there is none.
    Auto,
    /// At this checkpoint, or at the last good one of this run's folder.
    From(PathBuf),
}

/// What a training came to.
#[derive(Debug)]
pub struct Report {
    /// The run's folder; a try-out (`trainer.fast_dev_run`) has none, and none but rank 0 knows it.
    pub dir: Option<PathBuf>,
    /// How training ended.
    pub outcome: Outcome,
    /// How the module does on the validation data by lead time, beside predictors that learn nothing; of data and runs
    /// that have no such thing, none.
    pub lead_times: Option<LeadTimes>,
}

impl Experiment {
    /// Reads a configuration file with `--set` overrides and checks everything that needs no data.
    pub fn read(registry: &Registry, path: &Path, sets: &[String]) -> Result<Self> {
        Self::new(registry, Document::read(path, sets)?)
    }

    /// The same for a document that has been read.
    pub fn new(registry: &Registry, document: Document) -> Result<Self> {
        document.check_sections(&SECTIONS)?;
        let place = |section| {
            let document = &document;
            move |error| document.place(section, error)
        };
        let run: RunConfig = document.section("run")?;
        run.check().map_err(place("run"))?;
        let trainer: TrainerConfig = document.section("trainer")?;
        trainer.check().map_err(place("trainer"))?;
        let checkpoint: CheckpointConfig = document.section("checkpoint")?;
        checkpoint.check().map_err(place("checkpoint"))?;
        let logging: LoggingConfig = document.section("logging")?;
        logging.check().map_err(place("logging"))?;
        let distributed: DistributedConfig = document.section("distributed")?;
        distributed.check().map_err(place("distributed"))?;
        if distributed.min_devices.is_some_and(|fewest| fewest > trainer.devices) {
            let message = format!("expected at most `trainer.devices`, which is {}", trainer.devices);
            return Err(place("distributed")(Error::setting("min_devices", message)));
        }
        let turns = turns(&document)?;
        let (schedule, plateau) = schedule(&document, "schedule")?;
        let average = average(&document)?;
        let callbacks = registry.callbacks(&document)?;
        for (name, callback) in &callbacks {
            callback.make().map_err(|error| document.place(&format!("callbacks.{name}"), error))?;
        }
        let (module, mut data) = (document.named("module", None)?, document.named("data", None)?);
        let workers = document.take_field(&mut data, "workers")?.unwrap_or(2);
        let prefetch = document.take_field(&mut data, "prefetch")?.unwrap_or(2);
        let job = registry.job(&document, &module, &data)?;
        let names = [module.name, data.name];
        Ok(Self {
            document,
            run,
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
            names,
            workers,
            prefetch,
            job,
        })
    }

    /// The configuration with every default written out.
    pub fn resolved(&self) -> Result<String> {
        let [mut module, mut data] = self.job.settings()?;
        module.insert("name".into(), self.names[0].clone().into());
        data.insert("name".into(), self.names[1].clone().into());
        data.insert("workers".into(), toml::Value::Integer(self.workers as i64));
        data.insert("prefetch".into(), toml::Value::Integer(self.prefetch as i64));
        let mut all = toml::Table::new();
        all.insert("run".into(), table(&self.run)?.into());
        all.insert("trainer".into(), table(&self.trainer)?.into());
        all.insert("module".into(), module.into());
        all.insert("data".into(), data.into());
        match &self.turns[..] {
            [only] if only.name == ONLY => {
                all.insert("optimizer".into(), optimizer_table(only)?.into());
            }
            turns => {
                let mut optimizers = toml::Table::new();
                for turn in turns {
                    let mut fields = optimizer_table(turn)?;
                    fields.insert("params".into(), turn.params.clone().into());
                    if let Some(schedule) = &turn.schedule {
                        fields.insert("schedule".into(), untag(schedule)?.into());
                    }
                    optimizers.insert(turn.name.clone(), fields.into());
                }
                all.insert("optimizers".into(), optimizers.into());
            }
        }
        let mut schedule = untag(&self.schedule)?;
        if let Some(plateau) = &self.plateau {
            schedule.insert("plateau".into(), table(plateau)?.into());
        }
        all.insert("schedule".into(), schedule.into());
        if let Some(average) = &self.average {
            all.insert("average".into(), untag(average)?.into());
        }
        all.insert("checkpoint".into(), table(&self.checkpoint)?.into());
        all.insert("logging".into(), table(&self.logging)?.into());
        all.insert("distributed".into(), table(&self.distributed)?.into());
        if !self.callbacks.is_empty() {
            let callbacks = self.callbacks.iter();
            let callbacks = callbacks.map(|(name, c)| Ok((name.clone(), c.settings()?.into())));
            all.insert("callbacks".into(), callbacks.collect::<Result<toml::Table>>()?.into());
        }
        toml::to_string_pretty(&all).map_err(|error| Error::msg(error.to_string()))
    }

    /// Makes the module without reading a sample, so that a configuration can be tried cheaply; returns how many
    /// numbers its parameters hold.
    pub fn build(&self) -> Result<usize> {
        self.job.build(self)
    }

    /// How ranks work together.
    pub fn distributed(&self) -> &DistributedConfig {
        &self.distributed
    }

    /// On how many devices it trains.
    pub fn devices(&self) -> usize {
        self.trainer.devices
    }

    /// Trains, or times steps, as one of several processes, of which the first alone writes. Where each is a rank, `trainer.devices` is
    /// their number on a machine, or 1, the default.
    pub fn ranks(self, ranks: Arc<dyn Collective>) -> Result<Self> {
        let (devices, processes) = (self.trainer.devices, ranks.world_size());
        let expected = [1, processes, processes / self.distributed.nodes];
        if processes > 1 && ranks.processes().is_none() && !expected.contains(&devices) {
            let message =
                format!("there are {processes} processes, a device each: expected {processes}, or nothing");
            return Err(self.document.place("trainer", Error::setting("devices", message)));
        }
        Ok(Self { ranks, ..self })
    }

    /// Trains; `callbacks` come after the ones that the configuration asks for.
    pub fn train(&self, resume: &Resume, callbacks: Vec<Box<dyn Callback>>) -> Result<Report> {
        let report = self.job.train(self, resume, callbacks);
        // The others would wait for a rank that could not even begin.
        report.inspect_err(|error| self.ranks.abort(&error.to_string()))
    }

    /// The metrics of a checkpoint on a split of the data.
    pub fn validate(&self, checkpoint: &Path, split: Split) -> Result<IndexMap<String, f64>> {
        self.job.validate(self, checkpoint, split)
    }

    /// How a checkpoint does on a split of the data by lead time, beside predictors that learn nothing; none for data that
    /// has no such thing.
    pub fn compare(&self, checkpoint: &Path, split: Split) -> Result<Option<LeadTimes>> {
        self.job.compare(self, checkpoint, split)
    }

    /// Predicts from the file `input` with a checkpoint's weights, and writes the prediction to `output`.
    pub fn predict(&self, checkpoint: &Path, input: &Path, output: &Path) -> Result<()> {
        self.job.predict(self, checkpoint, input, output)
    }

    /// Predicts from every sample of a split with a checkpoint's weights, and hands the predictions to the callbacks;
    /// returns how many batches there were.
    pub fn predict_split(
        &self,
        checkpoint: &Path,
        split: Split,
        callbacks: Vec<Box<dyn Callback>>,
    ) -> Result<usize> {
        self.job.predict_split(self, checkpoint, split, callbacks)
    }

    /// Times `steps` steps after a warm-up; writes nothing. What it leaves out of training is what is not a step:
    /// validation, checkpoints, pictures, logs.
    pub fn bench(&self, steps: u64, pass: Pass) -> Result<Benchmark> {
        self.job.bench(self, steps, pass)
    }

    /// Looks for a learning rate ([`Trainer::find_lr`]) from the initial weights; writes nothing.
    pub fn find_lr(&self, config: &LrFinderConfig) -> Result<LrFinding> {
        self.job.find_lr(self, config)
    }

    /// Looks for a batch size ([`Trainer::find_batch_size`]); writes nothing.
    pub fn find_batch_size(&self, config: &BatchFinderConfig) -> Result<BatchFinding> {
        self.job.find_batch_size(self, config)
    }

    fn data<B: Batch>(&self, recipe: &dyn DataRecipe<B>) -> Result<Data<B>> {
        let mut data = Data::from_source(self.open(recipe, Split::Train)?);
        data.val = Some(self.open(recipe, Split::Val)?);
        (data.workers, data.prefetch) = (self.workers, self.prefetch);
        Ok(data)
    }

    fn open<B: Batch>(&self, recipe: &dyn DataRecipe<B>, split: Split) -> Result<Source<B>> {
        recipe.open(split).map_err(|error| self.document.place("data", error))
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

    fn model<B: Batch>(
        &self,
        recipe: &Arc<dyn ModuleRecipe<B>>,
        spec: B::Spec,
        device: &Device,
    ) -> Result<Model<B>> {
        let recipe = recipe.clone();
        let build = move |vb: VarBuilder| recipe.build(&spec, vb);
        let model = Model::boxed(build, self.run.seed, device, self.trainer.precision);
        model.map_err(|error| self.document.place("module", error))
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

    /// Writes the resolved configuration into the run's folder; of a resumed run, says what has changed in it.
    fn write_config(&self, run: &RunDir, resumed: bool) -> Result<()> {
        let (path, resolved) = (run.path().join("config.toml"), self.resolved()?);
        if resumed && let Ok(old) = std::fs::read_to_string(&path) {
            let parse = |text: &str| text.parse::<toml::Table>().map_err(Error::content(&path));
            let changes = differences(&parse(&old)?, &parse(&resolved)?, "");
            if !changes.is_empty() {
                tracing::warn!("the configuration is not the checkpoint's:\n  {}", changes.join("\n  "));
            }
        }
        std::fs::write(&path, resolved).map_err(Error::file(&path))
    }

    /// Gives a setting that only training could find wrong its place in the file.
    fn place_training_error(&self, error: Error) -> Error {
        let section = match &error {
            Error::Setting { key, .. } if key == "monitor" => "checkpoint",
            Error::Setting { key, .. } if key == "params" || key == "lr" => "optimizer",
            _ => "trainer",
        };
        self.document.place(section, error)
    }

    /// The folder to train in, and the checkpoint to start from.
    fn start(&self, resume: &Resume) -> Result<(Option<RunDir>, Option<Checkpoint>)> {
        let (run, checkpoint) = match resume {
            Resume::No => return Ok((None, None)),
            Resume::From(path) => RunDir::containing(path)?,
            Resume::Auto => {
                let newest = RunDir::newest(&self.run);
                match newest.and_then(|run| Some((run.clone(), checkpoint::latest(&run.checkpoints())?))) {
                    Some(found) => found,
                    None => return Ok((None, None)),
                }
            }
        };
        tracing::info!("going on from {}", checkpoint.display());
        Ok((Some(run), Some(Checkpoint::load(&checkpoint)?)))
    }
}

/// The name of the only optimizer, which modules and logs do not see.
const ONLY: &str = "optimizer";

/// The optimizers: the one in `[optimizer]`, or those in `[optimizers.*]`.
fn turns(document: &Document) -> Result<Vec<TurnConfig>> {
    let several = document.sections_in("optimizers")?;
    let Some((_, span)) = several.first() else {
        let only = turn(document, ONLY.into(), "optimizer", Some("adam"))?;
        return Ok(vec![TurnConfig { params: "*".into(), schedule: None, ..only }]);
    };
    if document.has("optimizer")? {
        let message = "either [optimizer] or [optimizers.*]: a run has one optimizer, or several with names";
        return Err(document.error_at(Some(span.clone()), message.into()).into());
    }
    let turn = |(name, _): (String, _)| {
        let section = format!("optimizers.{name}");
        turn(document, name, &section, None)
    };
    several.into_iter().map(turn).collect()
}

fn turn(document: &Document, name: String, section: &str, default: Option<&str>) -> Result<TurnConfig> {
    let mut named = document.named(section, default)?;
    let groups: Option<Vec<GroupConfig>> = document.take_field(&mut named, "groups")?;
    let (params, schedule_table): (Option<String>, Option<toml::Table>) = match default {
        Some(_) => (None, None),
        None => (document.take_field(&mut named, "params")?, document.take_field(&mut named, "schedule")?),
    };
    let Some(params) = params.or(default.map(|_| "*".into())) else {
        let message =
            format!("[{section}] needs `params`: a pattern of names, for example params = \"{name}.*\"");
        return Err(document.error_at(named.span, message).into());
    };
    let schedule = match schedule_table {
        Some(_) => Some(schedule(document, &format!("{section}.schedule"))?.0),
        None => None,
    };
    let optimizer = document.variant(&named, "optimizer")?;
    let turn = TurnConfig { name, params, optimizer, groups: groups.unwrap_or_default(), schedule };
    turn.check().map_err(|error| document.place(section, error))?;
    Ok(turn)
}

/// A section that describes a schedule, with the plateau that it may hold.
fn schedule(document: &Document, section: &str) -> Result<(Schedule, Option<Plateau>)> {
    let mut named = document.named(section, Some("constant"))?;
    let plateau = document.take_field(&mut named, "plateau")?;
    let schedule: Schedule = document.variant(&named, "schedule")?;
    schedule.check().map_err(|error| document.place(section, error))?;
    Ok((schedule, plateau))
}

fn average(document: &Document) -> Result<Option<AverageConfig>> {
    if !document.has("average")? {
        return Ok(None);
    }
    let average: AverageConfig = document.variant(&document.named("average", None)?, "average")?;
    average.check().map_err(|error| document.place("average", error))?;
    Ok(Some(average))
}

fn optimizer_table(turn: &TurnConfig) -> Result<toml::Table> {
    let mut fields = untag(&turn.optimizer)?;
    if !turn.groups.is_empty() {
        let groups = turn.groups.iter().map(|group| Ok(table(group)?.into()));
        fields.insert("groups".into(), groups.collect::<Result<Vec<toml::Value>>>()?.into());
    }
    Ok(fields)
}

fn table(section: &impl serde::Serialize) -> Result<toml::Table> {
    toml::Table::try_from(section).map_err(|error| Error::msg(error.to_string()))
}

/// What is set otherwise in `new` than in `old`, a line each: `trainer.batch_size: 8, was 16`.
fn differences(old: &toml::Table, new: &toml::Table, path: &str) -> Vec<String> {
    let mut lines = Vec::new();
    let keys: IndexSet<&String> = old.keys().chain(new.keys()).collect();
    for key in keys {
        let path = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
        match (old.get(key), new.get(key)) {
            (Some(old), Some(new)) if old == new => {}
            (Some(toml::Value::Table(old)), Some(toml::Value::Table(new))) => {
                lines.extend(differences(old, new, &path));
            }
            (Some(old), Some(new)) => lines.push(format!("{path}: {new}, was {old}")),
            (None, Some(new)) => lines.push(format!("{path}: {new}, was not set")),
            (Some(old), None) => lines.push(format!("{path}: not set, was {old}")),
            (None, None) => {}
        }
    }
    lines
}

/// A JSON Schema of configuration files, for editors.
pub fn schema(registry: &Registry) -> serde_json::Value {
    let [module, data] = registry.schemas();
    json!({
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Candlepower configuration",
        "type": "object",
        "required": ["module", "data"],
        "additionalProperties": false,
        "properties": {
            "run": schema_for!(RunConfig),
            "trainer": schema_for!(TrainerConfig),
            "module": module,
            "data": data,
            "optimizer": named_variants(schema_for!(OptimizerConfig)),
            "optimizers": {
                "type": "object",
                "additionalProperties": named_variants(schema_for!(OptimizerConfig)),
            },
            "schedule": named_variants(schema_for!(Schedule)),
            "average": named_variants(schema_for!(AverageConfig)),
            "checkpoint": schema_for!(CheckpointConfig),
            "logging": schema_for!(LoggingConfig),
            "distributed": schema_for!(DistributedConfig),
            "callbacks": registry.callback_schemas(),
        },
    })
}

/// The schema of an enum whose variants are chosen by `name`, their fields beside it.
fn named_variants(schema: schemars::Schema) -> serde_json::Value {
    let mut schema = schema.to_value();
    let definitions = schema["$defs"].take();
    let variants = schema["oneOf"].take().as_array().cloned().unwrap_or_default();
    let variant = |tagged: serde_json::Value| {
        let (name, fields) = tagged["properties"].as_object()?.iter().next()?;
        let definition = fields["$ref"].as_str().and_then(|path| definitions.get(path.rsplit('/').next()?));
        let mut fields = definition.unwrap_or(fields).clone();
        fields["properties"]["name"] = json!({"const": name});
        Some(fields)
    };
    json!({"type": "object", "anyOf": variants.into_iter().filter_map(variant).collect::<Vec<_>>()})
}

/// What an experiment does once the batch that its module and its data meet in is known.
pub(crate) trait Job: Send + Sync {
    fn settings(&self) -> Result<[toml::Table; 2]>;
    fn build(&self, experiment: &Experiment) -> Result<usize>;
    fn train(
        &self,
        experiment: &Experiment,
        resume: &Resume,
        callbacks: Vec<Box<dyn Callback>>,
    ) -> Result<Report>;
    fn validate(
        &self,
        experiment: &Experiment,
        checkpoint: &Path,
        split: Split,
    ) -> Result<IndexMap<String, f64>>;
    fn compare(&self, experiment: &Experiment, checkpoint: &Path, split: Split) -> Result<Option<LeadTimes>>;
    fn predict(&self, experiment: &Experiment, checkpoint: &Path, input: &Path, output: &Path) -> Result<()>;
    fn predict_split(
        &self,
        experiment: &Experiment,
        checkpoint: &Path,
        split: Split,
        callbacks: Vec<Box<dyn Callback>>,
    ) -> Result<usize>;
    fn bench(&self, experiment: &Experiment, steps: u64, pass: Pass) -> Result<Benchmark>;
    fn find_lr(&self, experiment: &Experiment, config: &LrFinderConfig) -> Result<LrFinding>;
    fn find_batch_size(&self, experiment: &Experiment, config: &BatchFinderConfig) -> Result<BatchFinding>;
}

/// A module and a dataset of one batch.
pub(crate) struct Pair<B: Batch> {
    pub(crate) module: Arc<dyn ModuleRecipe<B>>,
    pub(crate) data: Box<dyn DataRecipe<B>>,
}

impl<B: Batch> Pair<B> {
    fn model_and_data(&self, experiment: &Experiment) -> Result<(Model<B>, Data<B>)> {
        // Before anything is read: what cannot be trained on is known at once.
        let device = experiment.device()?;
        let data = experiment.data(&*self.data)?;
        Ok((experiment.model(&self.module, data.train.spec(), &device)?, data))
    }

    fn trained(&self, experiment: &Experiment, checkpoint: &Path) -> Result<(Model<B>, Data<B>)> {
        let (model, data) = self.model_and_data(experiment)?;
        restore(&model, &RunDir::containing(checkpoint)?.1)?;
        Ok((model, data))
    }

    /// The same with the data of this split too.
    fn trained_on(
        &self,
        experiment: &Experiment,
        checkpoint: &Path,
        split: Split,
    ) -> Result<(Model<B>, Data<B>)> {
        let (model, mut data) = self.trained(experiment, checkpoint)?;
        if split == Split::Test {
            data.test = Some(experiment.open(&*self.data, split)?);
        }
        Ok((model, data))
    }
}

/// Gives the model a checkpoint's weights: their average, where it has one.
fn restore<B: Batch>(model: &Model<B>, checkpoint: &Path) -> Result<()> {
    Checkpoint::load(checkpoint)?.restore_for_evaluation(&model.params().state_dict())?;
    model.params().publish()
}

impl<B: Batch> Job for Pair<B> {
    fn settings(&self) -> Result<[toml::Table; 2]> {
        Ok([self.module.settings()?, self.data.settings()?])
    }

    fn build(&self, experiment: &Experiment) -> Result<usize> {
        Ok(self.model_and_data(experiment)?.0.params().count())
    }

    fn train(
        &self,
        experiment: &Experiment,
        resume: &Resume,
        callbacks: Vec<Box<dyn Callback>>,
    ) -> Result<Report> {
        let (model, data) = self.model_and_data(experiment)?;
        let mut trainer = experiment.trainer().described(experiment.resolved()?);
        for (_, callback) in &experiment.callbacks {
            trainer = trainer.boxed_callback(callback.make()?);
        }
        trainer = callbacks.into_iter().fold(trainer, Trainer::boxed_callback);
        if experiment.logging.progress {
            trainer = trainer.callback(ProgressBar::default());
        }
        tracing::info!("{}", summary(&model));
        let mut dir = None;
        if experiment.trainer.fast_dev_run == 0 && experiment.ranks.rank() == 0 {
            let (run, checkpoint) = experiment.start(resume)?;
            let step = checkpoint.as_ref().map_or(0, |checkpoint| checkpoint.state().progress.step);
            let run = run.map_or_else(|| RunDir::create(&experiment.run), Ok)?;
            experiment.write_config(&run, checkpoint.is_some())?;
            tracing::info!("run folder: {}", run.path().display());
            // Last, so that they log what the callbacks before them add.
            trainer = trainer.checkpoints(run.checkpoints(), experiment.checkpoint.clone());
            let loggers = Loggers::in_folder(run.path(), &experiment.logging, step)?;
            trainer = trainer.callback(loggers.configuration(experiment.resolved()?));
            if let Some(checkpoint) = checkpoint {
                trainer = trainer.resume(checkpoint);
            }
            dir = Some(run.path().to_path_buf());
        }
        let outcome = trainer.fit(&model, &data).map_err(|error| experiment.place_training_error(error))?;
        let trained = matches!(outcome.reason, StopReason::Finished | StopReason::Callback(_));
        let lead_times = match &dir {
            Some(dir) if trained => {
                if experiment.average.is_some() {
                    // What was validated, and is the run's result, is the average.
                    restore(&model, &RunDir::containing(dir)?.1)?;
                }
                let lead_times = trainer.compare(&model, &data, Split::Val)?;
                lead_times.as_ref().map_or(Ok(()), |scores| scores.save(&dir.join("lead_times")))?;
                lead_times
            }
            _ => None,
        };
        Ok(Report { dir, outcome, lead_times })
    }

    fn validate(
        &self,
        experiment: &Experiment,
        checkpoint: &Path,
        split: Split,
    ) -> Result<IndexMap<String, f64>> {
        let (model, data) = self.trained_on(experiment, checkpoint, split)?;
        experiment.trainer().validate(&model, &data, split)
    }

    fn compare(&self, experiment: &Experiment, checkpoint: &Path, split: Split) -> Result<Option<LeadTimes>> {
        let (model, data) = self.trained_on(experiment, checkpoint, split)?;
        experiment.trainer().compare(&model, &data, split)
    }

    fn predict_split(
        &self,
        experiment: &Experiment,
        checkpoint: &Path,
        split: Split,
        callbacks: Vec<Box<dyn Callback>>,
    ) -> Result<usize> {
        let (model, data) = self.trained_on(experiment, checkpoint, split)?;
        let mut trainer = callbacks.into_iter().fold(experiment.trainer(), Trainer::boxed_callback);
        trainer.predict_split(&model, &data, split)
    }

    fn predict(&self, experiment: &Experiment, checkpoint: &Path, input: &Path, output: &Path) -> Result<()> {
        let (model, data) = self.trained(experiment, checkpoint)?;
        let batch = B::read(input, &data.train.spec())?;
        let prediction = experiment.trainer().predict(&model, &batch)?;
        batch.write(&prediction, output)
    }

    fn bench(&self, experiment: &Experiment, steps: u64, pass: Pass) -> Result<Benchmark> {
        let (model, data) = self.model_and_data(experiment)?;
        bench::measure(&experiment.trainer(), &model, &data, steps, pass)
    }

    fn find_lr(&self, experiment: &Experiment, config: &LrFinderConfig) -> Result<LrFinding> {
        // Before the configuration's own values are looked at, whose errors have a place in the file.
        config.check()?;
        let (model, data) = self.model_and_data(experiment)?;
        let finding = experiment.trainer().find_lr(&model, &data, config);
        finding.map_err(|error| experiment.place_training_error(error))
    }

    fn find_batch_size(&self, experiment: &Experiment, config: &BatchFinderConfig) -> Result<BatchFinding> {
        let (model, data) = self.model_and_data(experiment)?;
        experiment.trainer().find_batch_size(&model, &data, config)
    }
}

/// The parameters of a model as a table: name, shape, how many.
fn summary<B: Batch>(model: &Model<B>) -> String {
    let vars = model.params().vars();
    let width = vars.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
    let row = |(name, var): &(String, candle_core::Var)| {
        format!("  {name:width$}  {:>9}  {:?}\n", thousands(var.elem_count()), var.dims())
    };
    let rows: String = vars.iter().map(row).collect();
    let total = model.params().count();
    let megabytes = (total * DType::F32.size_in_bytes()) as f64 / 1e6;
    format!("{} parameters in {} tensors ({megabytes:.1} MB)\n{rows}", thousands(total), vars.len())
}

/// 1036097 as 1,036,097.
fn thousands(n: usize) -> String {
    let digits = n.to_string();
    let group = |(i, digit): (usize, char)| {
        let comma = i > 0 && (digits.len() - i).is_multiple_of(3);
        comma.then_some(',').into_iter().chain([digit])
    };
    digits.chars().enumerate().flat_map(group).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn thousands_are_grouped() {
        assert_eq!([0, 12, 123, 1234, 1036097].map(thousands), ["0", "12", "123", "1,234", "1,036,097"]);
    }
}
