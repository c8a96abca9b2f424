//! A callback that records its calls.

use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard};

use candle_core::Tensor;
use candlepower::prelude::*;

/// All calls of a run, in order, one line each; clones share the record.
#[derive(Clone, Default)]
pub struct Recorder {
    lines: Arc<Mutex<Vec<String>>>,
    checkpoints: Arc<Mutex<Vec<u64>>>,
    records: Arc<Mutex<Vec<Record>>>,
    stopping_threshold: Option<u64>,
}

impl Recorder {
    /// A recorder that asks to stop after this step.
    pub fn stopping_at(step: u64) -> Self {
        Self { stopping_threshold: Some(step), ..Default::default() }
    }

    /// The recorded calls, except checkpoints, whose timing depends on the disk.
    pub fn lines(&self) -> Vec<String> {
        lock(&self.lines).clone()
    }

    /// The steps of the reported checkpoints, in order.
    pub fn checkpoints(&self) -> Vec<u64> {
        lock(&self.checkpoints).clone()
    }

    /// The reported metrics of training and validation.
    pub fn records(&self) -> Vec<Record> {
        lock(&self.records).clone()
    }

    /// The values of a training metric, in order.
    pub fn train(&self, metric: &str) -> Vec<f64> {
        let records = self.records().into_iter().filter(|record| record.split == Split::Train);
        records.map(|record| record.metrics[metric]).collect()
    }

    fn note(&self, line: String) {
        lock(&self.lines).push(line);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap()
}

impl Callback for Recorder {
    fn on_fit_start(&mut self, plan: &Plan) -> Result<()> {
        let last = plan.last_step.map_or("?".to_string(), |last| last.to_string());
        self.note(format!("start {}..{last}", plan.start.step));
        Ok(())
    }

    fn on_step_end(&mut self, step: &StepEnd) -> Result<Flow> {
        assert_eq!(step.params.len(), step.gradients.len());
        self.note(format!("step {}", step.progress.step));
        Ok(match self.stopping_threshold {
            Some(at) if step.progress.step >= at => Flow::Stop(StopReason::Callback("seen enough".into())),
            _ => Flow::Continue,
        })
    }

    fn on_train_metrics(&mut self, record: &mut Record) -> Result<Flow> {
        self.note(format!("train metrics {}", record.step));
        lock(&self.records).push(record.clone());
        Ok(Flow::Continue)
    }

    fn on_validation_batch_end(&mut self, done: usize, total: Option<usize>) -> Result<Flow> {
        self.note(format!("batch {done}/{}", total.map_or("?".to_string(), |total| total.to_string())));
        Ok(Flow::Continue)
    }

    fn on_validation_end(&mut self, record: &mut Record) -> Result<Flow> {
        self.note(format!("{} metrics {}", record.split.name(), record.step));
        lock(&self.records).push(record.clone());
        Ok(Flow::Continue)
    }

    fn on_prediction(&mut self, batch: usize, prediction: &Tensor) -> Result<()> {
        self.note(format!("prediction {batch} {:?}", prediction.dims()).replace(',', ""));
        Ok(())
    }

    fn on_checkpoint(&mut self, checkpoint: &Path) -> Result<()> {
        assert!(checkpoint.join("manifest.json").exists(), "a checkpoint is told of when it is complete");
        let step = checkpoint.file_name().unwrap().to_str().unwrap().parse().unwrap();
        lock(&self.checkpoints).push(step);
        Ok(())
    }

    fn on_fit_end(&mut self, progress: &Progress, _: &StopReason) -> Result<()> {
        self.note(format!("end {}", progress.step));
        Ok(())
    }
}
