//! What a step logs: gathered during the step, read when it is due.

use candle_core::Tensor;
use indexmap::IndexMap;

use super::backprop::Backprop;
use super::{Fit, Tally, phase};
use crate::batch::Batch;
use crate::callback::{Flow, Record};
use crate::data::Split;
use crate::error::Result;
use crate::module::Metric;

impl Tally {
    /// Adds to the step's logged metrics, if they are gathered.
    pub(super) fn note(&mut self, name: &str, value: &Tensor, weight: f64) -> Result<()> {
        self.means.as_mut().map_or(Ok(()), |means| means.add(name, value, weight))
    }
}

impl<B: Batch> Fit<'_, B> {
    /// A metric's name; with several optimizers, each has its own.
    pub(super) fn metric_name(&self, turn: usize, name: &str) -> String {
        if self.turns.len() == 1 { name.into() } else { format!("{name}/{}", self.turns[turn].name) }
    }

    /// Records what a module logged in a step.
    pub(super) fn log(
        &mut self,
        backprop: Backprop,
        turn: usize,
        samples: usize,
        tally: &mut Tally,
    ) -> Result<()> {
        let Backprop { loss, weight, metrics, pictures, .. } = backprop;
        let samples = samples as f64;
        tally.note(&self.metric_name(turn, "loss"), &loss, weight.unwrap_or(samples))?;
        for Metric { name, value, weight, of_epoch } in &metrics {
            let weight = weight.unwrap_or(samples);
            match of_epoch {
                true => tally.epoch_means.add(name, value, weight)?,
                false => tally.note(name, value, weight)?,
            }
        }
        self.trainer.take_pictures(self.progress.step + 1, Split::Train, pictures)
    }

    /// Reads the metrics that are due after a step and passes them to the callbacks.
    pub(super) fn log_step(&mut self, tally: Tally) -> Result<Flow> {
        let is_due = self.progress.step.is_multiple_of(self.trainer.config.log_every);
        let mut means = tally.means.filter(|_| is_due).unwrap_or_default();
        if tally.ends_epoch {
            means.replace(std::mem::take(&mut self.epoch_means));
        } else if !is_due {
            return Ok(Flow::Continue);
        }
        // At an epoch's end all ranks exchange, because none knows whether another has something to log.
        let phase = (!means.is_empty()).then(|| phase!("logging"));
        let metrics = means.read_over(&*self.ranks)?;
        drop(phase);
        self.tell_metrics(metrics)
    }

    /// Logs the metrics so far of an epoch that training ends within. A longer training continues their sums.
    pub(super) fn log_part_of_epoch(&mut self) -> Result<()> {
        let metrics = self.epoch_means.copied().read_over(&*self.ranks)?;
        self.tell_metrics(metrics).map(drop)
    }

    fn tell_metrics(&mut self, metrics: IndexMap<String, f64>) -> Result<Flow> {
        if metrics.is_empty() {
            return Ok(Flow::Continue);
        }
        let (step, epoch) = (self.progress.step, self.progress.epoch_of_last_step());
        let mut record = Record { step, epoch, split: Split::Train, metrics };
        self.trainer.callbacks.ask(|callback| callback.on_train_metrics(&mut record))
    }
}
