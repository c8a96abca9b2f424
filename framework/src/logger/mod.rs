//! Loggers: write metrics, pictures, histograms and settings.
//!
//! A custom logger needs only one method. [`Loggers`] combines any number of loggers into a callback:
//!
//! ```
//! use candlepower::logger::{Logger, Loggers};
//! use candlepower::prelude::*;
//!
//! /// Says every loss.
//! struct Losses;
//!
//! impl Logger for Losses {
//!     fn log(&mut self, record: &Record) -> Result<()> {
//!         eprintln!("{} {:?}", record.step, record.metrics.get("loss"));
//!         Ok(())
//!     }
//! }
//!
//! let trainer = Trainer::new(TrainerConfig::default()).callback(Loggers::default().with(Losses));
//! ```

mod csv;
mod histogram;
mod hparams;
mod jsonl;
mod pictures;
mod tensorboard;

use std::path::Path;

use candle_core::Tensor;
pub use csv::Csv;
use indexmap::IndexMap;
pub use jsonl::Jsonl;
pub use pictures::Pictures;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
pub use tensorboard::TensorBoard;

use crate::callback::{Callback, Flow, Picture, Plan, Progress, Record, StepEnd, StopReason};
use crate::error::{Error, Result};

/// The settings of a run by their full names, for example `optimizer.lr`.
pub type HyperParameters = IndexMap<String, toml::Value>;

/// Writes metrics and other records of a run.
pub trait Logger: Send {
    /// Writes one record.
    fn log(&mut self, record: &Record) -> Result<()>;

    /// Writes a picture, if supported.
    fn picture(&mut self, _picture: &Picture) -> Result<()> {
        Ok(())
    }

    /// Writes the distribution of a tensor's values after `step` steps. The tensor may have any shape.
    fn histogram(&mut self, _step: u64, _name: &str, _values: &Tensor) -> Result<()> {
        Ok(())
    }

    /// Writes a text, to be shown verbatim, line by line.
    fn text(&mut self, _step: u64, _name: &str, _text: &str) -> Result<()> {
        Ok(())
    }

    /// Writes the run's settings.
    fn hyper_parameters(&mut self, _settings: &HyperParameters) -> Result<()> {
        Ok(())
    }

    /// Writes how the run ended. Called last.
    fn close(&mut self, _reason: &StopReason) -> Result<()> {
        Ok(())
    }
}

/// The `[logging]` section.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct LoggingConfig {
    /// Steps between pictures of predictions, which are also drawn at each validation; 0 for none.
    pub image_every: u64,
    /// Steps between TensorBoard histograms of all parameters and gradients; 0 for none.
    pub histogram_every: u64,
    /// Whether to write TensorBoard events.
    pub tensorboard: bool,
    /// Whether to show the run's progress on the terminal.
    pub progress: bool,
}

impl Default for LoggingConfig {
    fn default() -> Self {
        Self { image_every: 250, histogram_every: 0, tensorboard: true, progress: true }
    }
}

impl LoggingConfig {
    /// Checks that histograms, if requested, are written.
    pub fn check(&self) -> Result<()> {
        match self.histogram_every > 0 && !self.tensorboard {
            true => Err(Error::setting("histogram_every", "histograms need `tensorboard = true`")),
            false => Ok(()),
        }
    }
}

/// The loggers of a run, as a callback.
#[derive(Default)]
pub struct Loggers {
    loggers: Vec<Box<dyn Logger>>,
    histogram_every: u64,
    configuration: Option<String>,
    open: bool,
}

impl Loggers {
    /// Writes `metrics.jsonl`, `metrics.csv`, `images/` and TensorBoard events into a run's folder. Records
    /// of an earlier attempt after `step` are dropped, because those steps will be repeated and logged again.
    pub fn in_folder(dir: &Path, config: &LoggingConfig, step: u64) -> Result<Self> {
        let files = Self::default()
            .with(Jsonl::open(&dir.join("metrics.jsonl"), step)?)
            .with(Csv::open(&dir.join("metrics.csv"), step)?)
            .with(Pictures::new(&dir.join("images")))
            .histogram_every(config.histogram_every);
        Ok(if config.tensorboard { files.with(TensorBoard::create(dir, step)?) } else { files })
    }

    /// Adds a logger.
    pub fn with(mut self, logger: impl Logger + 'static) -> Self {
        self.loggers.push(Box::new(logger));
        self
    }

    /// Passes histograms of all parameters and gradients to the loggers every `steps` steps; 0 for never.
    pub fn histogram_every(mut self, steps: u64) -> Self {
        self.histogram_every = steps;
        self
    }

    /// Sets the run's resolved configuration, in TOML. Loggers receive its text, and its values as
    /// hyper-parameters.
    pub fn configuration(mut self, toml: impl Into<String>) -> Self {
        self.configuration = Some(toml.into());
        self
    }

    fn each(&mut self, write: impl FnMut(&mut Box<dyn Logger>) -> Result<()>) -> Result<()> {
        self.loggers.iter_mut().try_for_each(write)
    }

    fn log(&mut self, record: &Record) -> Result<Flow> {
        self.each(|logger| logger.log(record))?;
        Ok(Flow::Continue)
    }

    fn close(&mut self, reason: &StopReason) -> Result<()> {
        match std::mem::take(&mut self.open) {
            true => self.each(|logger| logger.close(reason)),
            false => Ok(()),
        }
    }
}

impl Callback for Loggers {
    fn on_fit_start(&mut self, plan: &Plan) -> Result<()> {
        self.open = true;
        let Some(text) = self.configuration.take() else { return Ok(()) };
        let table = text.parse().map_err(|error| Error::msg(format!("configuration: {error}")))?;
        let settings = flatten(table);
        self.each(|logger| {
            logger.text(plan.start.step, "configuration", &text)?;
            logger.hyper_parameters(&settings)
        })
    }

    fn on_step_end(&mut self, step: &StepEnd) -> Result<Flow> {
        let at = step.progress.step;
        if self.histogram_every == 0 || !at.is_multiple_of(self.histogram_every) {
            return Ok(Flow::Continue);
        }
        for ((name, param), gradient) in step.params.iter().zip(step.gradients) {
            self.each(|logger| logger.histogram(at, &format!("weights/{name}"), param))?;
            self.each(|logger| logger.histogram(at, &format!("gradients/{name}"), gradient))?;
        }
        Ok(Flow::Continue)
    }

    fn on_train_metrics(&mut self, record: &mut Record) -> Result<Flow> {
        self.log(record)
    }

    fn on_validation_end(&mut self, record: &mut Record) -> Result<Flow> {
        self.log(record)
    }

    fn on_picture(&mut self, picture: &Picture) -> Result<()> {
        self.each(|logger| logger.picture(picture))
    }

    fn on_fit_end(&mut self, _: &Progress, reason: &StopReason) -> Result<()> {
        self.close(reason)
    }

    fn wants_gradients(&self, step: u64) -> bool {
        self.histogram_every > 0 && step.is_multiple_of(self.histogram_every)
    }
}

/// Closes the loggers after an error, which ends training without [`Callback::on_fit_end`].
impl Drop for Loggers {
    fn drop(&mut self) {
        if let Err(error) = self.close(&StopReason::Failed("an error ended training".into())) {
            tracing::warn!("loggers: {error}");
        }
    }
}

/// Flattens a configuration; the values of `[a.b]` are named `a.b.<key>`.
fn flatten(table: toml::Table) -> HyperParameters {
    let under = |(key, value): (String, toml::Value)| match value {
        toml::Value::Table(inner) => flatten(inner)
            .into_iter()
            .map(|(name, value)| (format!("{key}.{name}"), value))
            .collect::<Vec<_>>(),
        value => vec![(key, value)],
    };
    table.into_iter().flat_map(under).collect()
}

#[cfg(test)]
mod tests {
    use indexmap::IndexMap;

    use super::*;
    use crate::data::Split;

    const CPU: candle_core::Device = candle_core::Device::Cpu;

    fn record(step: u64, split: Split, metrics: &[(&str, f64)]) -> Record {
        let metrics: IndexMap<String, f64> = metrics.iter().map(|(name, x)| (name.to_string(), *x)).collect();
        Record { step, epoch: 0, split, metrics }
    }

    fn read(path: std::path::PathBuf) -> String {
        std::fs::read_to_string(path).unwrap()
    }

    #[test]
    fn metrics_are_written_a_line_each_and_resume_drops_what_will_be_repeated() {
        let dir = tempfile::tempdir().unwrap();
        let config = LoggingConfig { tensorboard: false, ..Default::default() };
        let mut loggers = Loggers::in_folder(dir.path(), &config, 0).unwrap();
        for step in [10, 20] {
            loggers
                .on_train_metrics(&mut record(step, Split::Train, &[("loss", 0.5), ("lr", 0.001)]))
                .unwrap();
        }
        loggers.on_validation_end(&mut record(20, Split::Val, &[("loss", 0.25), ("mse", f64::NAN)])).unwrap();
        let mut loggers = Loggers::in_folder(dir.path(), &config, 10).unwrap();
        loggers.on_validation_end(&mut record(20, Split::Val, &[("loss", 0.125), ("mse", 2.)])).unwrap();
        assert_eq!(
            read(dir.path().join("metrics.jsonl")),
            "{\"step\":10,\"epoch\":0,\"split\":\"train\",\"loss\":0.5,\"lr\":0.001}\n\
             {\"step\":20,\"epoch\":0,\"split\":\"val\",\"loss\":0.125,\"mse\":2.0}\n"
        );
        assert_eq!(
            read(dir.path().join("metrics.csv")),
            "step,epoch,split,loss,lr,mse\n10,0,train,0.5,0.001,\n20,0,val,0.125,,2\n"
        );
    }

    #[test]
    fn a_number_that_is_none_is_null_in_json_and_named_in_csv() {
        let dir = tempfile::tempdir().unwrap();
        let config = LoggingConfig { tensorboard: false, ..Default::default() };
        let mut loggers = Loggers::in_folder(dir.path(), &config, 0).unwrap();
        let metrics = [("loss", f64::NAN), ("mse", f64::INFINITY), ("low", f64::NEG_INFINITY)];
        loggers.on_train_metrics(&mut record(1, Split::Train, &metrics)).unwrap();
        let line = read(dir.path().join("metrics.jsonl"));
        assert_eq!(
            line,
            "{\"step\":1,\"epoch\":0,\"split\":\"train\",\"loss\":null,\"mse\":null,\"low\":null}\n"
        );
        serde_json::from_str::<serde_json::Value>(&line).unwrap();
        let csv = read(dir.path().join("metrics.csv"));
        assert!(csv.ends_with("\n1,0,train,NaN,inf,-inf\n"), "{csv}");
    }

    #[test]
    fn histograms_that_nobody_would_write_are_refused() {
        let config = |histogram_every, tensorboard| LoggingConfig {
            histogram_every,
            tensorboard,
            ..Default::default()
        };
        assert!(config(0, false).check().is_ok() && config(5, true).check().is_ok());
        let said = config(5, false).check().unwrap_err().to_string();
        assert_eq!(said, "`histogram_every`: histograms need `tensorboard = true`");
    }

    /// Records its calls.
    struct Notes(std::sync::Arc<std::sync::Mutex<Vec<String>>>);

    impl Notes {
        fn note(&self, what: String) -> Result<()> {
            self.0.lock().unwrap().push(what);
            Ok(())
        }
    }

    impl Logger for Notes {
        fn log(&mut self, record: &Record) -> Result<()> {
            self.note(format!("{:?}", record.metrics))
        }
        fn histogram(&mut self, step: u64, name: &str, values: &Tensor) -> Result<()> {
            self.note(format!("{step} {name} {:?}", values.dims()))
        }
        fn text(&mut self, step: u64, name: &str, text: &str) -> Result<()> {
            self.note(format!("{step} {name} {text}"))
        }
        fn hyper_parameters(&mut self, settings: &HyperParameters) -> Result<()> {
            self.note(settings.iter().map(|(name, value)| format!("{name}={value} ")).collect())
        }
        fn close(&mut self, reason: &StopReason) -> Result<()> {
            self.note(format!("{reason:?}"))
        }
    }

    fn plan(step: u64) -> Plan {
        let start = Progress { step, ..Default::default() };
        Plan {
            start,
            last_step: None,
            steps_per_epoch: None,
            parameters: 6,
            optimizer_bytes: 0,
            flops_per_sample: None,
        }
    }

    #[test]
    fn loggers_are_told_settings_histograms_when_due_and_the_end() {
        let notes = std::sync::Arc::default();
        let loggers = Loggers::default().with(Notes(std::sync::Arc::clone(&notes))).histogram_every(2);
        let mut loggers = loggers.configuration("[a]\nx = 1\n[a.b]\ny = 'z'");
        loggers.on_fit_start(&plan(3)).unwrap();
        let params = [("w".to_string(), candle_core::Var::new(&[[1f32, 2.], [3., 4.]], &CPU).unwrap())];
        let gradients = [Tensor::new(&[[0f32, 2.], [3., 4.]], &CPU).unwrap()];
        for step in [3, 4] {
            let progress = Progress { step, ..Default::default() };
            loggers.on_step_end(&StepEnd { progress, params: &params, gradients: &gradients }).unwrap();
        }
        loggers.on_fit_end(&Progress::default(), &StopReason::Finished).unwrap();
        drop(loggers);
        let expected = [
            "3 configuration [a]\nx = 1\n[a.b]\ny = 'z'",
            "a.x=1 a.b.y=\"z\" ",
            "4 weights/w [2, 2]",
            "4 gradients/w [2, 2]",
            "Finished",
        ];
        assert_eq!(*notes.lock().unwrap(), expected);
    }

    #[test]
    fn an_error_that_ends_training_is_a_failure_for_loggers() {
        let notes = std::sync::Arc::default();
        let mut loggers = Loggers::default().with(Notes(std::sync::Arc::clone(&notes)));
        loggers.on_fit_start(&plan(0)).unwrap();
        drop(loggers);
        drop(Loggers::default().with(Notes(std::sync::Arc::clone(&notes))));
        assert_eq!(*notes.lock().unwrap(), ["Failed(\"an error ended training\")"]);
    }
}
