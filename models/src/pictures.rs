//! Pictures of a model's predictions.

use candle_core::Tensor;
use candlepower::picture::{video_grid, video_rows};
use candlepower::prelude::*;

/// How many samples of a batch are drawn.
const SAMPLES: usize = 2;

/// Logs the batch's inputs, `prediction` and target, the last two (B, T_out, C, H, W), as a picture if one is due.
pub(crate) fn log_prediction(name: &str, batch: &Video, prediction: &Tensor, step: &mut Step) -> Result<()> {
    if !step.images_due() {
        return Ok(());
    }
    let [input, prediction, target] = [first(&batch.input)?, first(prediction)?, first(&batch.target)?];
    step.draw_image(name, &[&input, &prediction, &target], |of| video_grid(&of[0], &of[1], &of[2], SAMPLES));
    Ok(())
}

/// Logs several futures of a batch, each (B, T_out, C, H, W): for each sample, a row for the truth and one per future.
pub(crate) fn log_futures(name: &str, batch: &Video, futures: &[Tensor], step: &mut Step) -> Result<()> {
    let of = [&batch.input, &batch.target].into_iter().chain(futures).map(first);
    let of = of.collect::<Result<Vec<_>>>()?;
    step.draw_image(name, &of.iter().collect::<Vec<_>>(), |of| {
        let (mut inputs, mut rows) = (Vec::new(), Vec::new());
        for sample in 0..of[0].dim(0)? {
            for future in &of[1..] {
                inputs.push(of[0].narrow(0, sample, 1)?);
                rows.push(future.narrow(0, sample, 1)?);
            }
        }
        video_rows(&Tensor::cat(&inputs, 0)?, &Tensor::cat(&rows, 0)?, rows.len())
    });
    Ok(())
}

/// The samples that are drawn.
fn first(x: &Tensor) -> Result<Tensor> {
    Ok(x.narrow(0, 0, x.dim(0)?.min(SAMPLES))?)
}
