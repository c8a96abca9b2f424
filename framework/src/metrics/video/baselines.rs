//! Predictors that learn nothing: what a trained module has to beat.

use candle_core::{DType, Tensor};

use super::{PerFrame, Pixels, mse};
use crate::batch::Video;
use crate::data::{Dataset, Order, Split, samples_in_turn};
use crate::error::Result;

/// Training samples that the per-pixel mean is taken over; a mean needs no more.
const MEAN_SAMPLES: usize = 256;
const BATCH_SIZE: usize = 32;

/// The result of a predictor that learns nothing.
#[derive(Debug, Clone, PartialEq)]
pub struct Baseline {
    /// What it predicts, for example `copy last frame`.
    pub name: &'static str,
    /// Its mean squared error over pixels.
    pub mse: f64,
}

/// The baselines of video prediction, each the mean squared error over all pixels of all of `val`, every sample once:
/// `zeros`, `copy last frame` (the last input frame, for ever) and `per-pixel mean`, always in this order.
///
/// The per-pixel mean is one image (C, H, W) for all times: the mean of the target frames of the first 256 samples of
/// epoch 0 in the training order of `seed`. Empty where one of the two datasets is.
pub fn baselines(
    train: &dyn Dataset<Batch = Video>,
    val: &dyn Dataset<Batch = Video>,
    seed: u64,
) -> Result<Vec<Baseline>> {
    if train.is_empty() || val.is_empty() {
        return Ok(Vec::new());
    }
    let mean = mean_frame(train, seed)?;
    let names = ["zeros", "copy last frame", "per-pixel mean"];
    let mut errors = vec![PerFrame { values: Vec::new() }; names.len()];
    for samples in samples_in_turn(Split::Val, seed, val.len(), BATCH_SIZE) {
        let Video { input, target } = val.batch(&samples)?;
        let last = input.narrow(1, input.dim(1)? - 1, 1)?;
        let predictions = [target.zeros_like()?, last, mean.to_dtype(target.dtype())?];
        for (errors, prediction) in errors.iter_mut().zip(&predictions) {
            let prediction = prediction.broadcast_as(target.shape())?;
            errors.values.extend(mse(&prediction, &target, Pixels::Mean)?.values);
        }
    }
    Ok(names.into_iter().zip(&errors).map(|(name, errors)| Baseline { name, mse: errors.mean() }).collect())
}

fn mean_frame(train: &dyn Dataset<Batch = Video>, seed: u64) -> Result<Tensor> {
    let order = Order::new(seed, train.len(), BATCH_SIZE);
    let mut means = Vec::new();
    for (samples, _) in order.epoch(0).take(MEAN_SAMPLES / BATCH_SIZE) {
        // A whole batch at a time would give the samples of a short last batch more weight.
        let target = train.batch(&samples)?.target.to_dtype(DType::F64)?;
        means.push(target.mean(1)?);
    }
    Ok(Tensor::cat(&means, 0)?.mean(0)?)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use candle_core::Device;

    use super::*;
    use crate::batch::VideoSpec;
    use crate::data::Sample;

    const SPEC: VideoSpec = VideoSpec { frames_in: 2, frames_out: 3, channels: 1, height: 1, width: 2 };

    /// Sample i: input frames of 0 and then `last`; target frames whose two pixels are 0 and i / (len - 1).
    struct Ramp {
        len: usize,
        last: f32,
    }

    impl Dataset for Ramp {
        type Batch = Video;

        fn len(&self) -> usize {
            self.len
        }

        fn spec(&self) -> VideoSpec {
            SPEC
        }

        fn batch(&self, samples: &[Sample]) -> Result<Video> {
            let bright = |sample: &Sample| sample.index as f32 / (self.len - 1).max(1) as f32;
            let input: Vec<f32> = samples.iter().flat_map(|_| [0., 0., self.last, self.last]).collect();
            let target: Vec<f32> = samples.iter().flat_map(|s| [0., bright(s)].repeat(3)).collect();
            let tensor =
                |values, frames| Tensor::from_vec(values, (samples.len(), frames, 1, 1, 2), &Device::Cpu);
            Ok(Video { input: tensor(input, 2)?, target: tensor(target, 3)? })
        }
    }

    #[test]
    fn every_validation_sample_counts_once() {
        // 41 samples: a whole batch and a short one, in training and in validation.
        let (train, val) = (Ramp { len: 41, last: 0.9 }, Ramp { len: 41, last: 1. });
        let found = baselines(&train, &val, 5).unwrap();
        let values: Vec<f64> = (0..41).map(|i| f64::from(i) / 40.).collect();
        let expect = |left: f64, right: f64| {
            values.iter().map(|v| (left * left + (right - v).powi(2)) / 2.).sum::<f64>() / 41.
        };
        let names: Vec<_> = found.iter().map(|baseline| baseline.name).collect();
        assert_eq!(names, ["zeros", "copy last frame", "per-pixel mean"]);
        for (baseline, expected) in found.iter().zip([expect(0., 0.), expect(1., 1.), expect(0., 0.5)]) {
            assert!((baseline.mse - expected).abs() < 1e-7, "{baseline:?}, expected {expected}");
        }
    }

    #[test]
    fn nothing_to_compare_with_gives_no_baselines() {
        let (some, none) = (Ramp { len: 1, last: 0. }, Ramp { len: 0, last: 0. });
        assert_eq!(baselines(&some, &none, 0).unwrap(), []);
        assert_eq!(baselines(&none, &some, 0).unwrap(), []);
    }
}
