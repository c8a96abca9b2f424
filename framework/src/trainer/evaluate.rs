//! Evaluation and prediction: every sample of a source, or of its first batches, exactly once over all ranks.

use candle_core::{DType, Device, Tensor};
use indexmap::IndexMap;

use super::Trainer;
use super::limits::Limit;
use crate::batch::Batch;
use crate::callback::{Flow, Progress, StopReason};
use crate::data::{Loader, Pass, Share, Source};
use crate::error::{Error, Result};
use crate::metrics::{Collected, Means};
use crate::module::{Metric, Model, Step, TAKEN};

/// Batches that each worker may prefetch during an evaluation.
const AHEAD: usize = 2;

/// What is evaluated or predicted from, with which model.
pub(super) struct Evaluation<'a, B: Batch> {
    pub(super) model: &'a Model<B>,
    pub(super) source: &'a Source<B>,
    pub(super) pass: Pass,
    pub(super) limit: Option<Limit>,
    /// Workers that load the data.
    pub(super) workers: usize,
    /// How far the model has been trained.
    pub(super) progress: Progress,
}

/// The result of an evaluation.
pub(super) enum Evaluated {
    /// The metrics of the whole pass, and what callbacks asked for.
    Complete(IndexMap<String, f64>, Flow),
    /// A signal ended it early.
    Stopped(StopReason),
}

impl<B: Batch> Evaluation<'_, B> {
    /// Computes the metrics; takes pictures of the first batch if they are due.
    pub(super) fn run(&self, trainer: &mut Trainer, images_due: bool) -> Result<Evaluated> {
        let (model, step) = (self.model, self.progress.step);
        let ranks = trainer.ranks.clone();
        let share = Share { rank: ranks.rank(), of: ranks.world_size() };
        let (batches, total) = self.batches(trainer, share)?;
        let (mut means, mut collected, mut flow) = (Means::default(), Collected::default(), Flow::Continue);
        for (i, loaded) in (share.rank..).step_by(share.of).zip(batches) {
            let Some(batch) = loaded?.batch else { continue };
            let batch = model.prepared(&batch)?;
            let mut context = Step::evaluation(step, i as u64, trainer.seed, images_due && i == 0);
            let evaluated = model.evaluation().validation_step(&batch, &mut context);
            let weight = context.loss_weight();
            let kept = context.take_collected();
            let logged = evaluated.and_then(|loss| Ok((one_number(&loss)?, context.into_logged()?)));
            let (loss, (metrics, pictures)) =
                logged.map_err(|error| in_batch(trainer, "validation_step", i, error))?;
            let kept = kept.iter().try_for_each(|(name, rows)| collected.add(i, batch.len(), name, rows));
            kept.map_err(|error| in_batch(trainer, "validation_step", i, error))?;
            let samples = batch.len() as f64;
            means.add("loss", &loss, weight.unwrap_or(samples))?;
            for Metric { name, value, weight, .. } in &metrics {
                means.add(name, value, weight.unwrap_or(samples))?;
            }
            trainer.take_pictures(step, self.pass.split, pictures)?;
            trainer.show_ready_pictures()?;
            // The other ranks are assumed to be about as far.
            let done = (i + share.of).min(total.unwrap_or(usize::MAX));
            flow =
                flow.or(trainer.callbacks.ask(|callback| callback.on_validation_batch_end(done, total))?);
            if let Flow::Stop(signal @ StopReason::Signal(_)) = &flow
                && ranks.is_alone()
            {
                return Ok(Evaluated::Stopped(signal.clone()));
            }
        }
        let mut metrics = means.read_over(&*ranks)?;
        let collected = collected.over(&*ranks)?;
        if !collected.is_empty() {
            add_metrics(&mut metrics, model.evaluation().metrics(&collected)?)?;
        }
        Ok(Evaluated::Complete(metrics, flow))
    }

    /// Passes what the model predicts from each batch to the callbacks; returns the number of batches.
    pub(super) fn predict(&self, trainer: &mut Trainer) -> Result<usize> {
        let (batches, _) = self.batches(trainer, Share::default())?;
        let mut done = 0;
        for (i, loaded) in batches.enumerate() {
            let Some(batch) = loaded?.batch else { continue };
            let batch = self.model.prepared(&batch)?;
            let mut context = Step::evaluation(self.progress.step, i as u64, trainer.seed, false);
            let prediction = self.model.evaluation().predict_step(&batch, &mut context);
            let prediction = prediction.map_err(|error| in_batch(trainer, "predict_step", i, error))?;
            let prediction = prediction.to_dtype(DType::F32)?.to_device(&Device::Cpu)?;
            trainer.callbacks.tell(|callback| callback.on_prediction(i, &prediction))?;
            done += 1;
        }
        Ok(done)
    }

    /// A rank's share of the batches, and the number of all batches if it is known.
    fn batches(&self, trainer: &Trainer, share: Share) -> Result<(Loader<B>, Option<usize>)> {
        let Self { model, source, pass, workers, .. } = *self;
        // The same batches for any number of ranks.
        let at_once = trainer.config.micro_batch_size.unwrap_or(trainer.config.batch_size);
        let samples = trainer.config.samples_of(self.limit, source.len())?;
        let jobs = source.evaluation(pass, at_once, samples, share)?;
        let total = source.len().map(|_| samples.div_ceil(at_once));
        Ok((Loader::new(jobs, workers, workers * AHEAD, model.params().device()), total))
    }
}

/// Adds the metrics that a module computes over all samples to the means.
fn add_metrics(metrics: &mut IndexMap<String, f64>, more: Vec<(String, f64)>) -> Result<()> {
    for (name, value) in more {
        if TAKEN.contains(&name.as_str()) || metrics.contains_key(&name) {
            let message =
                format!("`Module::metrics` returns `{name}`, which is logged already; use another name");
            return Err(Error::msg(message));
        }
        metrics.insert(name, value);
    }
    Ok(())
}

/// The loss without axes; modules may return it with axes of length 1.
pub(super) fn one_number(loss: &Tensor) -> Result<Tensor> {
    if loss.elem_count() != 1 {
        let shape = loss.dims();
        return Err(Error::msg(format!(
            "the loss has shape {shape:?}; expected a scalar, for example its mean"
        )));
    }
    Ok(loss.reshape(())?)
}

/// Adds the function, the batch (`i` counts from 0) and the probable cause to a module's error.
fn in_batch(trainer: &Trainer, function: &str, i: usize, error: Error) -> Error {
    trainer.config.precision.explain(error.within(&format!("{function}, batch {}", i + 1)))
}
