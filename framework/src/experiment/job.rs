//! What an experiment does with its module and its dataset.

use std::path::Path;

use candle_core::DType;
use indexmap::IndexMap;

use super::sections::differences;
use super::{Experiment, Report, Resume};
use crate::atomic_file::write_atomic;
use crate::batch::Batch;
use crate::bench::{self, Benchmark, Pass};
use crate::callback::{Callback, Progress, StopReason};
use crate::callbacks::ProgressBar;
use crate::checkpoint::{Checkpoint, Origin};
use crate::config::{DataRecipe, ModuleRecipe};
use crate::data::{Data, Split};
use crate::error::{Error, Result};
use crate::finder::{BatchFinderConfig, BatchFinding, LrFinderConfig, LrFinding};
use crate::logger::Loggers;
use crate::metrics::video::LeadTimes;
use crate::module::Model;
use crate::run_dir::{RunConfig, RunDir, RunLock};
use crate::trained::Trained;
use crate::trainer::Trainer;

/// The operations of an experiment, independent of its batch type.
pub(crate) trait Job: Send + Sync {
    fn settings(&self) -> [toml::Table; 2];
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

/// A module and a dataset with the same batch type.
pub(crate) struct Pair<B: Batch> {
    pub(crate) module: ModuleRecipe<B>,
    pub(crate) data: DataRecipe<B>,
}

impl<B: Batch> Pair<B> {
    fn model_and_data(&self, experiment: &Experiment) -> Result<(Model<B>, Data<B>)> {
        // Opened first, to report an unusable device before data is read.
        let device = experiment.device()?;
        let data = experiment.data(&self.data)?;
        Ok((experiment.model(&self.module, data.train.spec(), &device)?, data))
    }

    /// The model and data, with the weights that training starts from.
    fn initial(&self, experiment: &Experiment) -> Result<(Model<B>, Data<B>)> {
        let (model, data) = self.model_and_data(experiment)?;
        experiment.init(&model)?;
        Ok((model, data))
    }

    /// The model and data, with the weights of a checkpoint or file and with the data of this split; also how
    /// far the weights have been trained, if known.
    fn trained_on(
        &self,
        experiment: &Experiment,
        weights: &Path,
        split: Split,
    ) -> Result<(Model<B>, Data<B>, Progress)> {
        let (model, mut data) = self.model_and_data(experiment)?;
        let progress = Trained::read(weights)?.give(&model)?;
        if split == Split::Test {
            data.test = Some(experiment.open(&self.data, split)?);
        }
        Ok((model, data, progress))
    }

    /// The training's configuration and data sizes, for checkpoints.
    fn origin(&self, experiment: &Experiment, spec: &B::Spec) -> Result<Origin> {
        let as_json = |error: serde_json::Error| Error::msg(format!("the sizes of the data: {error}"));
        Ok(Origin { config: experiment.resolved()?, spec: serde_json::to_value(spec).map_err(as_json)? })
    }

    /// The batch spec for weights trained from `origin`: taken from it if `[data]` is unchanged, otherwise
    /// read from the data.
    fn spec(&self, experiment: &Experiment, origin: Option<&Origin>) -> Result<B::Spec> {
        let data = data_section(&experiment.resolved()?);
        let before = origin.map(|origin| data_section(&origin.config));
        if let Some(origin) = origin.filter(|_| before.as_ref() == Some(&data))
            && let Ok(spec) = serde_json::from_value(origin.spec.clone())
        {
            return Ok(spec);
        }
        let source = experiment.open(&self.data, Split::Train).map_err(|error| match before {
            Some(before) if before != data => Error::msg(format!("{error}\n{}", why_opened(&before, &data))),
            _ => error,
        });
        Ok(source?.spec())
    }
}

/// The `[data]` section of a configuration, without the prefetch settings.
fn data_section(config: &str) -> toml::Table {
    let mut config: toml::Table = config.parse().unwrap_or_default();
    let Some(toml::Value::Table(mut data)) = config.remove("data") else { return toml::Table::new() };
    data.retain(|key, _| !["workers", "prefetch"].contains(&key));
    data
}

/// Explains why the data is opened although the input to predict from is given.
fn why_opened(trained_on: &toml::Table, now: &toml::Table) -> String {
    let changes = differences(trained_on, now, "data").join("\n  ");
    format!(
        "opening the training data, because [data] differs from the checkpoint's:\n  {changes}\n\
         with the `config.toml` in the run's folder, it is not needed"
    )
}

/// Writes the resolved configuration into the run's folder. For a resumed run, warns about changes.
fn write_config(run: &Path, resolved: &str, resumed: bool) -> Result<()> {
    let path = run.join("config.toml");
    let parse = |text: &str| text.parse::<toml::Table>().map_err(Error::content(&path));
    if resumed
        && let Ok(old) =
            std::fs::read_to_string(&path).map_err(Error::file(&path)).and_then(|old| parse(&old))
    {
        let changes = differences(&old, &parse(resolved)?, "");
        if !changes.is_empty() {
            tracing::warn!("the configuration differs from the checkpoint's:\n  {}", changes.join("\n  "));
        }
    }
    write_atomic(&path, resolved.as_bytes())
}

/// The folder that a training writes into. No other process can use it until this is dropped.
struct OpenRun {
    dir: RunDir,
    is_new: bool,
    _lock: RunLock,
}

impl OpenRun {
    /// Locks the folder of the run that is resumed, or a new one.
    fn prepare(config: &RunConfig, resumed: Option<RunDir>) -> Result<Self> {
        let is_new = resumed.is_none();
        let dir = match resumed {
            Some(dir) => dir,
            None => RunDir::create(config)?,
        };
        let lock = dir.lock()?;
        tracing::info!("run folder: {}", dir.path().display());
        Ok(Self { dir, is_new, _lock: lock })
    }

    /// Has a trainer write its checkpoints, configuration and logs into the folder, and start from `checkpoint`.
    fn attach(
        &self,
        trainer: Trainer,
        experiment: &Experiment,
        checkpoint: Option<Checkpoint>,
    ) -> Result<Trainer> {
        let resumed_at = checkpoint.as_ref().map(|checkpoint| checkpoint.state().progress.step);
        let mut trainer = trainer.checkpoints(self.dir.checkpoints(), experiment.checkpoint.clone());
        if let Some(checkpoint) = checkpoint {
            trainer = trainer.resume(checkpoint);
        }
        let (dir, logging) = (self.dir.clone(), experiment.logging.clone());
        let resolved = experiment.resolved()?;
        // A run that cannot continue keeps its files unchanged.
        Ok(trainer.when_ready(move |trainer| {
            write_config(dir.path(), &resolved, resumed_at.is_some())?;
            let loggers = Loggers::in_folder(dir.path(), &logging, resumed_at.unwrap_or(0))?;
            // Last, so they log metrics added by the callbacks before them.
            trainer.add(loggers.configuration(resolved));
            Ok(())
        }))
    }

    /// After a failure, removes the folder if this training created it and nothing is in it.
    fn discard_if_new(&self) {
        if self.is_new {
            self.dir.discard_empty();
        }
    }
}

impl<B: Batch> Job for Pair<B> {
    fn settings(&self) -> [toml::Table; 2] {
        [self.module.settings.clone(), self.data.settings.clone()]
    }

    fn build(&self, experiment: &Experiment) -> Result<usize> {
        Ok(self.initial(experiment)?.0.params().count())
    }

    fn train(
        &self,
        experiment: &Experiment,
        resume: &Resume,
        callbacks: Vec<Box<dyn Callback>>,
    ) -> Result<Report> {
        let (model, data) = self.model_and_data(experiment)?;
        let origin = self.origin(experiment, &data.train.spec())?;
        let mut trainer = experiment.watched()?.described(experiment.resolved()?).origin(origin);
        trainer = callbacks.into_iter().fold(trainer, Trainer::boxed_callback);
        if experiment.logging.progress {
            trainer = trainer.callback(ProgressBar::default());
        }
        tracing::info!("{}", summary(&model));
        let writes = experiment.trainer.fast_dev_run == 0 && experiment.ranks.rank() == 0;
        if experiment.trainer.fast_dev_run > 0 && *resume != Resume::No {
            tracing::warn!("`trainer.fast_dev_run` starts at step 0: `--resume` is ignored");
        }
        let (resumed, checkpoint) = if writes { experiment.start(resume)? } else { (None, None) };
        if checkpoint.is_none() && experiment.ranks.rank() == 0 {
            // Before the folder is created. Other ranks receive the weights from rank 0.
            experiment.init(&model)?;
        }
        let run = if writes { Some(OpenRun::prepare(&experiment.run, resumed)?) } else { None };
        if let Some(run) = &run {
            trainer = run.attach(trainer, experiment, checkpoint)?;
        }
        let outcome = trainer.fit(&model, &data).map_err(|error| {
            if let Some(run) = &run {
                run.discard_if_new();
            }
            experiment.place_training_error(error)
        })?;
        let trained = matches!(outcome.reason, StopReason::Finished | StopReason::Callback(_));
        let lead_times = match &run {
            Some(run) if trained => {
                let lead_times = trainer.compare(&model, &data, Split::Val)?;
                if let Some(scores) = &lead_times {
                    scores.save(&run.dir.path().join("lead_times"))?;
                }
                lead_times
            }
            _ => None,
        };
        let dir = run.map(|run| run.dir.path().to_path_buf());
        Ok(Report { dir, outcome, lead_times })
    }

    fn validate(
        &self,
        experiment: &Experiment,
        checkpoint: &Path,
        split: Split,
    ) -> Result<IndexMap<String, f64>> {
        let (model, data, progress) = self.trained_on(experiment, checkpoint, split)?;
        experiment.watched()?.trained(progress).validate(&model, &data, split)
    }

    fn compare(&self, experiment: &Experiment, checkpoint: &Path, split: Split) -> Result<Option<LeadTimes>> {
        let (model, data, progress) = self.trained_on(experiment, checkpoint, split)?;
        experiment.trainer().trained(progress).compare(&model, &data, split)
    }

    fn predict_split(
        &self,
        experiment: &Experiment,
        checkpoint: &Path,
        split: Split,
        callbacks: Vec<Box<dyn Callback>>,
    ) -> Result<usize> {
        let (model, data, progress) = self.trained_on(experiment, checkpoint, split)?;
        let mut trainer = callbacks.into_iter().fold(experiment.watched()?, Trainer::boxed_callback);
        trainer = trainer.trained(progress);
        trainer.predict_split(&model, &data, split)
    }

    fn predict(&self, experiment: &Experiment, checkpoint: &Path, input: &Path, output: &Path) -> Result<()> {
        let device = experiment.device()?;
        let weights = Trained::read(checkpoint)?;
        let spec = self.spec(experiment, weights.origin())?;
        let batch = (self.data.read)(&spec, input)?;
        let model = experiment.model(&self.module, spec, &device)?;
        let progress = weights.give(&model)?;
        let prediction = experiment.trainer().trained(progress).predict(&model, &batch)?;
        batch.write(&prediction, output)
    }

    fn bench(&self, experiment: &Experiment, steps: u64, pass: Pass) -> Result<Benchmark> {
        let (model, data) = self.model_and_data(experiment)?;
        bench::measure(&experiment.trainer(), &model, &data, steps, pass)
    }

    fn find_lr(&self, experiment: &Experiment, config: &LrFinderConfig) -> Result<LrFinding> {
        // Checked first: only errors in the values of the configuration file have a place in it.
        config.check()?;
        let (model, data) = self.initial(experiment)?;
        let finding = experiment.trainer().find_lr(&model, &data, config);
        finding.map_err(|error| experiment.place_training_error(error))
    }

    fn find_batch_size(&self, experiment: &Experiment, config: &BatchFinderConfig) -> Result<BatchFinding> {
        let (model, data) = self.model_and_data(experiment)?;
        experiment.trainer().find_batch_size(&model, &data, config)
    }
}

/// A table of the model's parameters: name, size, shape.
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

/// Groups digits: 1036097 becomes 1,036,097.
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
