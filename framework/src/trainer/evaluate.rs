//! Evaluation and prediction: every sample of a source exactly once over all ranks, or its first batches.

use candle_core::{DType, Device};
use indexmap::IndexMap;

use super::Trainer;
use super::limits::Limit;
use crate::batch::Batch;
use crate::callback::Progress;
use crate::data::{Loader, Pass, Share, Source};
use crate::error::{Error, Result};
use crate::metrics::Means;
use crate::module::{Model, Step};

/// Batches that each worker may be ahead of an evaluation.
const AHEAD: usize = 2;

/// The batches of a pass, and how many there are, where that is known.
fn batches<B: Batch>(
    trainer: &Trainer,
    source: &Source<B>,
    pass: Pass,
    limit: Option<Limit>,
    workers: usize,
    share: Share,
    device: &Device,
) -> Result<(Loader<B>, Option<usize>)> {
    // The same batches for any number of ranks.
    let batch_size = trainer.config.micro_batch_size.unwrap_or(trainer.config.batch_size);
    let all = source.len().map(|len| len.div_ceil(batch_size));
    if let (Some(Limit::Share(_)), None) = (limit, all) {
        return Err(Error::msg(
            "a stream's length is not known: limit its batches by a number, not by a share",
        ));
    }
    let limit = limit.map_or(usize::MAX, |limit| limit.of(all.unwrap_or(usize::MAX)));
    let jobs = source.evaluation(pass, batch_size, limit, share)?;
    Ok((Loader::new(jobs, workers, workers * AHEAD, device), all.map(|all| all.min(limit))))
}

/// The metrics of `model` on `source`; pictures of the first batch where they are due.
#[expect(clippy::too_many_arguments, reason = "what is evaluated, on what, and for whom")]
pub(super) fn evaluate<B: Batch>(
    trainer: &mut Trainer,
    model: &Model<B>,
    source: &Source<B>,
    pass: Pass,
    limit: Option<Limit>,
    workers: usize,
    progress: &Progress,
    images_due: bool,
) -> Result<IndexMap<String, f64>> {
    let ranks = trainer.ranks.clone();
    let share = Share { rank: ranks.rank(), of: ranks.world_size() };
    let (batches, total) = batches(trainer, source, pass, limit, workers, share, model.params().device())?;
    let mut means = Means::default();
    for (i, loaded) in (share.rank..).step_by(share.of).zip(batches) {
        let Some(batch) = loaded?.batch else { continue };
        let batch = batch.to_device(model.params().device())?.cast(model.params().dtype())?;
        let mut step = Step::evaluation(progress.step, i as u64, trainer.seed, images_due && i == 0);
        let loss = model.evaluation().validation_step(&batch, &mut step)?;
        let (metrics, pictures) = step.into_logged();
        means.add("loss", &loss, batch.len())?;
        for (name, value) in &metrics {
            means.add(name, value, batch.len())?;
        }
        trainer.take_pictures(progress.step, pass.split, pictures)?;
        trainer.show_ready_pictures()?;
        for callback in &mut trainer.callbacks {
            // The other ranks are about as far.
            let done = (i + share.of).min(total.unwrap_or(usize::MAX));
            callback.on_validation_batch(done, total)?;
        }
    }
    means.read_over(&*ranks)
}

/// Hands what `model` predicts from each batch of `source` to the callbacks; returns how many batches there were.
pub(super) fn predict<B: Batch>(
    trainer: &mut Trainer,
    model: &Model<B>,
    source: &Source<B>,
    pass: Pass,
    workers: usize,
) -> Result<usize> {
    let limit = trainer.config.limit_predict_batches;
    let device = model.params().device();
    let (batches, _) = batches(trainer, source, pass, limit, workers, Share::default(), device)?;
    let mut done = 0;
    for (i, loaded) in batches.enumerate() {
        let Some(batch) = loaded?.batch else { continue };
        let batch = batch.to_device(model.params().device())?.cast(model.params().dtype())?;
        let mut step = Step::evaluation(0, i as u64, trainer.seed, false);
        let prediction = model.evaluation().predict_step(&batch, &mut step)?.to_dtype(DType::F32)?;
        let prediction = prediction.to_device(&Device::Cpu)?;
        trainer.callbacks.iter_mut().try_for_each(|callback| callback.on_prediction(i, &prediction))?;
        done += 1;
    }
    Ok(done)
}
