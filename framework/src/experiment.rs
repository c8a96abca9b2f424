//! An experiment: one configuration file, made ready to train, validate or predict.

use std::path::{Path, PathBuf};

use candle_core::{DType, Device};
use indexmap::IndexMap;
use schemars::schema_for;
use serde_json::json;

use crate::batch::Batch;
use crate::bench::{self, Benchmark, Pass};
use crate::callback::{Callback, StopReason};
use crate::callbacks::ProgressBar;
use crate::checkpoint::{self, Checkpoint, CheckpointConfig};
use crate::config::{DataRecipe, Document, ModuleRecipe, Registry, untag};
use crate::data::{Data, Split};
use crate::error::{Error, Result};
use crate::logger::{Loggers, LoggingConfig};
use crate::metrics::video::Baseline;
use crate::module::Model;
use crate::optim::OptimizerConfig;
use crate::run_dir::{RunConfig, RunDir};
use crate::schedule::{Plateau, Schedule};
use crate::trainer::{Outcome, Trainer, TrainerConfig};

const SECTIONS: [&str; 8] =
    ["run", "trainer", "module", "data", "optimizer", "schedule", "checkpoint", "logging"];

/// A configuration file whose every section has been read and checked; no data has been read yet.
pub struct Experiment {
    document: Document,
    run: RunConfig,
    trainer: TrainerConfig,
    optimizer: OptimizerConfig,
    schedule: Schedule,
    plateau: Option<Plateau>,
    checkpoint: CheckpointConfig,
    logging: LoggingConfig,
    names: [String; 2],
    workers: usize,
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
    /// The run's folder.
    pub dir: PathBuf,
    /// How training ended.
    pub outcome: Outcome,
    /// What predictors that learn nothing reach on the validation data.
    pub baselines: Vec<Baseline>,
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
        let optimizer: OptimizerConfig =
            document.variant(&document.named("optimizer", Some("adam"))?, "optimizer")?;
        optimizer.check().map_err(place("optimizer"))?;
        let mut schedule = document.named("schedule", Some("constant"))?;
        let plateau = document.take_field(&mut schedule, "plateau")?;
        let schedule: Schedule = document.variant(&schedule, "schedule")?;
        schedule.check().map_err(place("schedule"))?;
        let (module, mut data) = (document.named("module", None)?, document.named("data", None)?);
        let workers = document.take_field(&mut data, "workers")?.unwrap_or(2);
        let job = registry.job(&document, &module, &data)?;
        let names = [module.name, data.name];
        Ok(Self {
            document,
            run,
            trainer,
            optimizer,
            schedule,
            plateau,
            checkpoint,
            logging,
            names,
            workers,
            job,
        })
    }

    /// The configuration with every default written out.
    pub fn resolved(&self) -> Result<String> {
        let table = |error: toml::ser::Error| Error::msg(error.to_string());
        let [mut module, mut data] = self.job.settings()?;
        module.insert("name".into(), self.names[0].clone().into());
        data.insert("name".into(), self.names[1].clone().into());
        data.insert("workers".into(), toml::Value::Integer(self.workers as i64));
        let mut all = toml::Table::new();
        all.insert("run".into(), toml::Value::try_from(&self.run).map_err(table)?);
        all.insert("trainer".into(), toml::Value::try_from(&self.trainer).map_err(table)?);
        all.insert("module".into(), module.into());
        all.insert("data".into(), data.into());
        all.insert("optimizer".into(), untag(&self.optimizer)?.into());
        let mut schedule = untag(&self.schedule)?;
        if let Some(plateau) = &self.plateau {
            schedule.insert("plateau".into(), toml::Value::try_from(plateau).map_err(table)?);
        }
        all.insert("schedule".into(), schedule.into());
        all.insert("checkpoint".into(), toml::Value::try_from(&self.checkpoint).map_err(table)?);
        all.insert("logging".into(), toml::Value::try_from(&self.logging).map_err(table)?);
        toml::to_string_pretty(&all).map_err(table)
    }

    /// Makes the module without reading a sample, so that a configuration can be tried cheaply; returns how many
    /// numbers its parameters hold.
    pub fn build(&self) -> Result<usize> {
        self.job.build(self)
    }

    /// Trains; `callbacks` come after the ones that the configuration asks for.
    pub fn train(&self, resume: &Resume, callbacks: Vec<Box<dyn Callback>>) -> Result<Report> {
        self.job.train(self, resume, callbacks)
    }

    /// The metrics of a checkpoint on the validation data.
    pub fn validate(&self, checkpoint: &Path) -> Result<IndexMap<String, f64>> {
        self.job.validate(self, checkpoint)
    }

    /// Predicts from the file `input` with a checkpoint's weights, and writes the prediction to `output`.
    pub fn predict(&self, checkpoint: &Path, input: &Path, output: &Path) -> Result<()> {
        self.job.predict(self, checkpoint, input, output)
    }

    /// Times `steps` steps after a warm-up; writes nothing. What it leaves out of training is what is not a step:
    /// validation, checkpoints, pictures, logs.
    pub fn bench(&self, steps: u64, pass: Pass) -> Result<Benchmark> {
        self.job.bench(self, steps, pass)
    }

    fn data<B: Batch>(&self, recipe: &dyn DataRecipe<B>) -> Result<Data<B>> {
        let open = |split| recipe.open(split).map_err(|error| self.document.place("data", error));
        Ok(Data { train: open(Split::Train)?, val: Some(open(Split::Val)?), workers: self.workers })
    }

    fn model<B: Batch>(&self, recipe: &dyn ModuleRecipe<B>, spec: &B::Spec) -> Result<Model<B>> {
        let model = Model::boxed(|vb| recipe.build(spec, vb), self.run.seed, &Device::Cpu);
        model.map_err(|error| self.document.place("module", error))
    }

    fn trainer(&self) -> Trainer {
        Trainer::new(self.trainer.clone())
            .optimizer(self.optimizer.clone())
            .schedule(self.schedule.clone())
            .plateau(self.plateau.clone())
            .seed(self.run.seed)
            .image_every(self.logging.image_every)
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
            "schedule": named_variants(schema_for!(Schedule)),
            "checkpoint": schema_for!(CheckpointConfig),
            "logging": schema_for!(LoggingConfig),
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
    fn validate(&self, experiment: &Experiment, checkpoint: &Path) -> Result<IndexMap<String, f64>>;
    fn predict(&self, experiment: &Experiment, checkpoint: &Path, input: &Path, output: &Path) -> Result<()>;
    fn bench(&self, experiment: &Experiment, steps: u64, pass: Pass) -> Result<Benchmark>;
}

/// A module and a dataset of one batch.
pub(crate) struct Pair<B: Batch> {
    pub(crate) module: Box<dyn ModuleRecipe<B>>,
    pub(crate) data: Box<dyn DataRecipe<B>>,
}

impl<B: Batch> Pair<B> {
    fn model_and_data(&self, experiment: &Experiment) -> Result<(Model<B>, Data<B>)> {
        let data = experiment.data(&*self.data)?;
        Ok((experiment.model(&*self.module, &data.train.spec())?, data))
    }

    fn trained(&self, experiment: &Experiment, checkpoint: &Path) -> Result<(Model<B>, Data<B>)> {
        let (model, data) = self.model_and_data(experiment)?;
        let (_, checkpoint) = RunDir::containing(checkpoint)?;
        Checkpoint::load(&checkpoint)?.restore_params(&model.params().vars())?;
        Ok((model, data))
    }
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
        let (run, checkpoint) = experiment.start(resume)?;
        let step = checkpoint.as_ref().map_or(0, |checkpoint| checkpoint.state().progress.step);
        let run = run.map_or_else(|| RunDir::create(&experiment.run), Ok)?;
        let config = run.path().join("config.toml");
        std::fs::write(&config, experiment.resolved()?).map_err(Error::file(&config))?;
        tracing::info!("{}", summary(&model));
        tracing::info!("run folder: {}", run.path().display());

        let mut trainer = experiment.trainer().checkpoints(run.checkpoints(), experiment.checkpoint.clone());
        let loggers = Loggers::in_folder(run.path(), &experiment.logging, step)?;
        trainer = trainer.callback(loggers.configuration(experiment.resolved()?));
        if experiment.logging.progress {
            trainer = trainer.callback(ProgressBar::default());
        }
        trainer = callbacks.into_iter().fold(trainer, Trainer::boxed_callback);
        if let Some(checkpoint) = checkpoint {
            trainer = trainer.resume(checkpoint);
        }
        let outcome = trainer.fit(&model, &data)?;
        let baselines = match (&data.val, &outcome.reason) {
            (Some(val), StopReason::Finished | StopReason::Callback(_)) => {
                B::baselines(&*data.train, &**val, experiment.run.seed)?
            }
            _ => Vec::new(),
        };
        Ok(Report { dir: run.path().to_path_buf(), outcome, baselines })
    }

    fn validate(&self, experiment: &Experiment, checkpoint: &Path) -> Result<IndexMap<String, f64>> {
        let (model, data) = self.trained(experiment, checkpoint)?;
        experiment.trainer().validate(&model, &data, Split::Val)
    }

    fn predict(&self, experiment: &Experiment, checkpoint: &Path, input: &Path, output: &Path) -> Result<()> {
        let (model, data) = self.trained(experiment, checkpoint)?;
        let batch = B::read(input, &data.train.spec())?;
        let prediction = experiment.trainer().predict(&model, &batch)?;
        batch.write(&prediction, output)
    }

    fn bench(&self, experiment: &Experiment, steps: u64, pass: Pass) -> Result<Benchmark> {
        let (model, data) = self.model_and_data(experiment)?;
        bench::measure(experiment.trainer(), &model, data, steps, pass)
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
