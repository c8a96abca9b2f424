//! Loggers: where metrics and pictures are written.

mod csv;
mod jsonl;
mod pictures;
mod tensorboard;

use std::path::Path;

pub use csv::Csv;
pub use jsonl::Jsonl;
pub use pictures::Pictures;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
pub use tensorboard::TensorBoard;

use crate::callback::{Callback, Flow, Picture, Record};
use crate::error::Result;

/// Writes metrics somewhere.
pub trait Logger: Send {
    /// Writes one record.
    fn log(&mut self, record: &Record) -> Result<()>;

    /// Writes a picture, where this logger can.
    fn picture(&mut self, _picture: &Picture) -> Result<()> {
        Ok(())
    }
}

/// Fields of `[logging]`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct LoggingConfig {
    /// Draws pictures of predictions every so many steps, and at each validation; 0: never.
    pub image_every: u64,
    /// Writes TensorBoard events.
    pub tensorboard: bool,
    /// Shows the progress of the run on the terminal.
    pub progress: bool,
}

impl Default for LoggingConfig {
    fn default() -> Self {
        Self { image_every: 250, tensorboard: true, progress: true }
    }
}

/// The loggers of a run, as a callback.
pub struct Loggers(Vec<Box<dyn Logger>>);

impl Loggers {
    /// Writes `metrics.jsonl`, `metrics.csv`, `images/` and TensorBoard events into a run's folder. What an earlier
    /// attempt logged after `step` is dropped: those steps will be done, and logged, again.
    pub fn in_folder(dir: &Path, config: &LoggingConfig, step: u64) -> Result<Self> {
        let mut loggers: Vec<Box<dyn Logger>> = vec![
            Box::new(Jsonl::open(&dir.join("metrics.jsonl"), step)?),
            Box::new(Csv::open(&dir.join("metrics.csv"), step)?),
            Box::new(Pictures::new(&dir.join("images"))),
        ];
        if config.tensorboard {
            loggers.push(Box::new(TensorBoard::create(dir)?));
        }
        Ok(Self(loggers))
    }

    fn log(&mut self, record: &Record) -> Result<Flow> {
        self.0.iter_mut().try_for_each(|logger| logger.log(record))?;
        Ok(Flow::Continue)
    }
}

impl Callback for Loggers {
    fn on_train_metrics(&mut self, record: &mut Record) -> Result<Flow> {
        self.log(record)
    }

    fn on_validation_end(&mut self, record: &mut Record) -> Result<Flow> {
        self.log(record)
    }

    fn on_picture(&mut self, picture: &Picture) -> Result<()> {
        self.0.iter_mut().try_for_each(|logger| logger.picture(picture))
    }
}

/// Replaces a file in one move, so that a reader, or a crash, never sees half of it.
fn replace(path: &Path, content: &[u8]) -> Result<()> {
    let beside = path.with_extension("tmp");
    std::fs::write(&beside, content).map_err(crate::Error::file(&beside))?;
    std::fs::rename(&beside, path).map_err(crate::Error::file(path))
}

#[cfg(test)]
mod tests {
    use indexmap::IndexMap;

    use super::*;
    use crate::data::Split;

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
    fn tensorboard_reads_what_was_written() {
        use tfrecord::EventIter;
        let dir = tempfile::tempdir().unwrap();
        let mut logger = TensorBoard::create(dir.path()).unwrap();
        logger.log(&record(10, Split::Train, &[("loss", 0.5)])).unwrap();
        let pixels =
            candle_core::Tensor::zeros((1, 4, 6), candle_core::DType::F32, &candle_core::Device::Cpu);
        let picture =
            Picture { step: 10, split: Split::Val, name: "prediction".into(), pixels: pixels.unwrap() };
        logger.picture(&picture).unwrap();
        let file = std::fs::read_dir(dir.path()).unwrap().next().unwrap().unwrap().path();
        let events: Vec<_> = EventIter::open(file, Default::default()).unwrap().map(Result::unwrap).collect();
        let text = format!("{events:?}");
        assert_eq!(events.len(), 3, "{text}");
        for part in
            ["brain.Event:2", "train/loss", "SimpleValue(0.5)", "val/prediction", "width: 6", "step: 10"]
        {
            assert!(text.contains(part), "`{part}` is not in {text}");
        }
    }
}
