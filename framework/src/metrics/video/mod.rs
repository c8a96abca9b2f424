//! Metrics of predicted frames: compare a prediction (B, T, C, H, W) with the observed frames.
//!
//! Every metric takes the prediction, then the target, of the same shape and any float dtype, on any device,
//! with values in `[0, 1]`. It is computed in f64 on the CPU and gives one number per frame;
//! [`PerFrame::mean`] is the number that papers report. [`psnr`], [`snr`] and the SSIMs clip the prediction
//! to `[0, 1]` first; the errors do not. These are the conventions of OpenSTL. [`Contingency`] has scores for
//! forecasts of events, such as rain. [`compare`] computes all of them by lead time.

mod events;
mod lead_times;
mod ssim;

use candle_core::{DType, Device, Tensor};
use rayon::prelude::*;

pub use events::{Contingency, contingency};
pub use lead_times::{LeadTimes, Predictor, compare};
pub use ssim::{gaussian_ssim, ssim};

use crate::error::{Error, Result};

/// A metric for each predicted frame.
#[derive(Debug, Clone, PartialEq)]
pub struct PerFrame {
    /// The B * T values, in the order of the tensor's first two axes: all frames of a sample, then the next sample.
    pub values: Vec<f64>,
}

impl PerFrame {
    /// The mean over all frames of all samples.
    pub fn mean(&self) -> f64 {
        self.values.iter().sum::<f64>() / self.values.len() as f64
    }
}

/// How an error combines the C * H * W values of a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pixels {
    /// Their sum, as in the published Moving MNIST tables: for a 64x64 frame, 4096 times the mean.
    Sum,
    /// Their mean, as in a loss.
    Mean,
}

/// The squared error of each frame. The prediction is not clipped.
pub fn mse(prediction: &Tensor, target: &Tensor, pixels: Pixels) -> Result<PerFrame> {
    Ok(Pair::new(prediction, target)?.error(pixels, |difference| difference * difference))
}

/// The absolute error of each frame. The prediction is not clipped.
pub fn mae(prediction: &Tensor, target: &Tensor, pixels: Pixels) -> Result<PerFrame> {
    Ok(Pair::new(prediction, target)?.error(pixels, f64::abs))
}

/// The square root of the mean [`mse`], which differs from the mean of the frames' roots.
pub fn rmse(prediction: &Tensor, target: &Tensor, pixels: Pixels) -> Result<f64> {
    Ok(mse(prediction, target, pixels)?.mean().sqrt())
}

/// The peak signal-to-noise ratio of each frame, in dB for a peak of 1; infinite for equal frames.
pub fn psnr(prediction: &Tensor, target: &Tensor) -> Result<PerFrame> {
    Ok(Pair::new(prediction, target)?.clipped().psnr())
}

/// The signal-to-noise ratio of each frame, in dB: the target's mean square over the error's.
pub fn snr(prediction: &Tensor, target: &Tensor) -> Result<PerFrame> {
    let frames = Pair::new(prediction, target)?.clipped();
    Ok(frames.per_frame(|prediction, target| {
        let noise = mean_square(differences(prediction, target));
        10. * (mean_square(target.iter().copied()) / noise).log10()
    }))
}

fn differences(prediction: &[f64], target: &[f64]) -> impl ExactSizeIterator<Item = f64> {
    prediction.iter().zip(target).map(|(prediction, target)| prediction - target)
}

fn mean_square(values: impl ExactSizeIterator<Item = f64>) -> f64 {
    let count = values.len() as f64;
    values.map(|value| value * value).sum::<f64>() / count
}

/// Two videos of the same shape, as f64 values.
struct Pair {
    prediction: Vec<f64>,
    target: Vec<f64>,
    /// Which pixels are known, (B, T, H, W); `None` if all are.
    known: Option<Vec<bool>>,
    channels: usize,
    height: usize,
    width: usize,
}

/// One frame of a [`Pair`], (C, H, W) in row-major order, and which of its pixels are known, (H, W).
struct FramePair<'a> {
    prediction: &'a [f64],
    target: &'a [f64],
    known: Option<&'a [bool]>,
}

impl Pair {
    fn new(prediction: &Tensor, target: &Tensor) -> Result<Self> {
        let same = prediction.dims() == target.dims();
        let &[_, _, channels, height, width] = prediction.dims() else {
            return Err(misfit(prediction, target));
        };
        if !same || prediction.elem_count() == 0 {
            return Err(misfit(prediction, target));
        }
        let (prediction, target) = (numbers(prediction)?, numbers(target)?);
        Ok(Self { prediction, target, known: None, channels, height, width })
    }

    /// Sets the mask (B, T, 1, H, W) of known pixels. Other pixels are ignored; the score of a frame without
    /// known pixels is NaN.
    fn masked(mut self, mask: Option<&Tensor>) -> Result<Self> {
        let Some(mask) = mask else { return Ok(self) };
        let known: Vec<bool> = numbers(mask)?.into_iter().map(|known| known > 0.5).collect();
        if known.len() * self.channels != self.target.len() {
            return Err(Error::msg(format!("the mask {:?} does not fit the frames", mask.dims())));
        }
        self.known = Some(known);
        Ok(self)
    }

    fn clipped(mut self) -> Self {
        self.prediction.iter_mut().for_each(|value| *value = value.clamp(0., 1.));
        self
    }

    fn error(&self, pixels: Pixels, of: fn(f64) -> f64) -> PerFrame {
        self.per_frame(|prediction, target| {
            let sum: f64 = differences(prediction, target).map(of).sum();
            match pixels {
                Pixels::Sum => sum,
                Pixels::Mean => sum / target.len() as f64,
            }
        })
    }

    /// The PSNR of clipped frames.
    fn psnr(&self) -> PerFrame {
        self.per_frame(|prediction, target| -10. * mean_square(differences(prediction, target)).log10())
    }

    /// Calls `metric` with the predicted and target values of each frame's known pixels.
    fn per_frame(&self, metric: impl Fn(&[f64], &[f64]) -> f64 + Sync) -> PerFrame {
        self.per_whole_frame(|frame| {
            let Some(known) = frame.known else { return metric(frame.prediction, frame.target) };
            let of_known = |values: &[f64]| -> Vec<f64> {
                values
                    .iter()
                    .zip(known.iter().cycle())
                    .filter(|(_, known)| **known)
                    .map(|(value, _)| *value)
                    .collect()
            };
            let (prediction, target) = (of_known(frame.prediction), of_known(frame.target));
            if target.is_empty() { f64::NAN } else { metric(&prediction, &target) }
        })
    }

    /// Calls `metric` with each frame.
    fn per_whole_frame(&self, metric: impl Fn(FramePair<'_>) -> f64 + Sync) -> PerFrame {
        let plane = self.height * self.width;
        let frame = self.channels * plane;
        let pairs = self.prediction.par_chunks_exact(frame).zip(self.target.par_chunks_exact(frame));
        let values = pairs.enumerate().map(|(i, (prediction, target))| {
            let known = self.known.as_ref().map(|known| &known[i * plane..][..plane]);
            metric(FramePair { prediction, target, known })
        });
        PerFrame { values: values.collect() }
    }
}

fn numbers(tensor: &Tensor) -> Result<Vec<f64>> {
    Ok(tensor.to_device(&Device::Cpu)?.to_dtype(DType::F64)?.flatten_all()?.to_vec1::<f64>()?)
}

fn misfit(prediction: &Tensor, target: &Tensor) -> Error {
    Error::msg(format!(
        "metrics compare two videos of one shape (B, T, C, H, W) that hold at least one pixel; \
         the prediction is {:?} and the target {:?}",
        prediction.dims(),
        target.dims()
    ))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    /// Two frames of one row: one sample, (1, 2, 1, 1, 2).
    fn video(values: [f32; 4]) -> Tensor {
        Tensor::new(&values, &Device::Cpu).unwrap().reshape((1, 2, 1, 1, 2)).unwrap()
    }

    #[test]
    fn errors_take_the_prediction_as_it_is() {
        let (prediction, target) = (video([2., 0., 0.5, 0.5]), video([0., 0., 0., 1.]));
        assert_eq!(mse(&prediction, &target, Pixels::Sum).unwrap().values, [4., 0.5]);
        assert_eq!(mse(&prediction, &target, Pixels::Mean).unwrap().values, [2., 0.25]);
        assert_eq!(mae(&prediction, &target, Pixels::Sum).unwrap().values, [2., 1.]);
        assert_eq!(mae(&prediction, &target, Pixels::Mean).unwrap().mean(), 0.75);
        assert_eq!(rmse(&prediction, &target, Pixels::Sum).unwrap(), 1.5);
    }

    #[test]
    fn ratios_clip_the_prediction() {
        // After clipping, the first frame is off by 1 in one of two pixels, and the second is correct.
        let (prediction, target) = (video([2., 1., 5., 1.]), video([0., 1., 1., 1.]));
        let psnr = psnr(&prediction, &target).unwrap().values;
        assert!((psnr[0] - 10. * 2f64.log10()).abs() < 1e-12, "{psnr:?}");
        assert_eq!(psnr[1], f64::INFINITY);
        let snr = snr(&prediction, &target).unwrap().values;
        assert_eq!(snr, [0., f64::INFINITY]);
    }

    #[test]
    fn shapes_that_do_not_fit_are_named() {
        let flat = Tensor::zeros((2, 3), DType::F32, &Device::Cpu).unwrap();
        let message = mse(&video([0.; 4]), &flat, Pixels::Mean).unwrap_err().to_string();
        assert_eq!(
            message,
            "metrics compare two videos of one shape (B, T, C, H, W) that hold at least one pixel; \
             the prediction is [1, 2, 1, 1, 2] and the target [2, 3]"
        );
        assert!(mse(&flat, &flat, Pixels::Mean).is_err());
        let none = Tensor::zeros((0, 2, 1, 4, 4), DType::F32, &Device::Cpu).unwrap();
        assert!(mse(&none, &none, Pixels::Mean).is_err());
    }
}
