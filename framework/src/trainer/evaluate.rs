//! Evaluation: every sample of a dataset exactly once.

use std::sync::Arc;

use indexmap::IndexMap;

use super::{Trainer, evaluation_batch};
use crate::batch::Batch;
use crate::callback::{Picture, Progress};
use crate::data::{Dataset, Loader, Split, samples_in_turn};
use crate::error::Result;
use crate::metrics::Means;
use crate::module::{Model, Step};

/// The metrics of `model` on `dataset`; pictures of the first batch where they are due.
pub(super) fn evaluate<B: Batch>(
    trainer: &mut Trainer,
    model: &Model<B>,
    dataset: Arc<dyn Dataset<Batch = B>>,
    split: Split,
    workers: usize,
    progress: &Progress,
    images_due: bool,
) -> Result<IndexMap<String, f64>> {
    let (len, batch_size) = (dataset.len(), evaluation_batch(&trainer.config, &*dataset));
    let batches = Loader::new(dataset, samples_in_turn(split, trainer.seed, len, batch_size), workers);
    let mut means = Means::default();
    for (i, batch) in batches.enumerate() {
        let batch = batch?.to_device(model.params().device())?;
        let mut step = Step::evaluation(progress.step, i as u64, trainer.seed, images_due && i == 0);
        let loss = model.evaluation().validation_step(&batch, &mut step)?;
        let (metrics, pictures) = step.into_logged();
        means.add("loss", &loss, batch.len())?;
        for (name, value) in &metrics {
            means.add(name, value, batch.len())?;
        }
        for (name, pixels) in pictures {
            trainer.show(&Picture { step: progress.step, split, name, pixels })?;
        }
        for callback in &mut trainer.callbacks {
            callback.on_validation_batch(i + 1, Some(len.div_ceil(batch_size)))?;
        }
    }
    means.read()
}
