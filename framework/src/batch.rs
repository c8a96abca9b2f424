//! Batches: the common type of a module and a dataset, which do not know each other.

use std::path::Path;
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use candlepower_kernels::to_device;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::data::{Dataset, Pass};
use crate::error::{Error, Result};
use crate::metrics::video::{self, LeadTimes};
use crate::{nn, video_file};

/// A kind of batch: samples collated into tensors.
pub trait Batch: Send + Sync + Sized + 'static {
    /// What all batches of a dataset have in common: the sizes that a module is built from. Checkpoints store
    /// it, so the module can be built without the data.
    type Spec: Clone + std::fmt::Debug + Serialize + DeserializeOwned + Send + Sync;

    /// Number of samples.
    fn len(&self) -> usize;

    /// Returns this batch with `f` applied to each tensor: always to all of them, in the same order.
    fn map(&self, f: &mut dyn FnMut(&Tensor) -> Result<Tensor>) -> Result<Self>;

    /// Copies the batch to another device. Data workers call this ahead of time for the training device.
    fn to_device(&self, device: &Device) -> Result<Self> {
        self.map(&mut |tensor| Ok(to_device(tensor, device)?))
    }

    /// Casts the floating-point inputs to the type that the module computes in. Targets keep their type, so
    /// losses keep their precision.
    fn cast(self, _dtype: DType) -> Result<Self> {
        Ok(self)
    }

    /// Whether it holds no samples.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Reads a batch to predict from, from a user-supplied file.
    fn read(path: &Path, _spec: &Self::Spec) -> Result<Self> {
        Err(Error::msg(format!(
            "{}: this kind of data cannot be read from a file for prediction: implement `Batch::read`, or the dataset's `Open::read`",
            path.display()
        )))
    }

    /// Writes the prediction for this batch to a file, for people to look at. Default: its numbers, as `.npy`.
    fn write(&self, prediction: &Tensor, path: &Path) -> Result<()> {
        if path.extension().is_some_and(|ending| ending == "npy") {
            return video_file::write_numbers(prediction, path);
        }
        Err(Error::msg(format!(
            "{}: predictions of this kind are written as .npy; for other files, implement `Batch::write`",
            path.display()
        )))
    }

    /// Compares a module's predictions for `held_out` with predictors that learn nothing, some of which read
    /// `train`. `predict` runs the module on `batch_size` samples of `pass` at a time.
    fn compare(
        _predict: &mut dyn FnMut(&Self) -> Result<Tensor>,
        _train: &dyn Dataset<Batch = Self>,
        _held_out: &dyn Dataset<Batch = Self>,
        _pass: Pass,
        _batch_size: usize,
    ) -> Result<Option<LeadTimes>> {
        Ok(None)
    }
}

/// Video frames to predict from, and the frames that follow them. Values are in `[0, 1]`.
///
/// If every pixel is known, as in most data, [`Video::new`] is enough. For data with unknown pixels, set
/// [`mask`](Self::mask) and use [`Video::mse`] or [`Video::mae`] as the loss.
#[derive(Debug, Clone)]
pub struct Video {
    /// (B, T_in, C, H, W), f32.
    pub input: Tensor,
    /// (B, T_out, C, H, W), f32.
    pub target: Tensor,
    /// (B, T_in + T_out, 1, H, W), f32: 1 where a pixel of the input or the target is known, 0 where it is
    /// not; `None` if all are known. Unknown pixels hold an arbitrary value within range and do not count in
    /// the error.
    pub mask: Option<Tensor>,
    /// The quantity that the values represent, if they are more than brightness.
    pub quantity: Option<Arc<Quantity>>,
}

/// A measured quantity shown by frames.
#[derive(Debug, Clone, PartialEq)]
pub struct Quantity {
    /// The unit of the thresholds, for example `mm/h`.
    pub unit: &'static str,
    /// Values from which on a pixel counts as an event to predict; any number of them.
    pub thresholds: Vec<Threshold>,
    /// Minutes from one frame to the next.
    pub minutes: f64,
}

/// A threshold of a quantity.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Threshold {
    /// The value in the quantity's unit.
    pub value: f64,
    /// The value in `[0, 1]` that represents it in frames.
    pub level: f32,
}

impl Video {
    /// A batch in which every pixel is known: `input` (B, T_in, C, H, W) and `target` (B, T_out, C, H, W),
    /// f32.
    pub fn new(input: Tensor, target: Tensor) -> Self {
        Self { input, target, mask: None, quantity: None }
    }

    /// The mean squared error of frames (B, T, C, H, W) predicted for the last T frames of input and target.
    /// T is usually the length of the target; it is larger for modules that also learn to predict their input
    /// frames.
    ///
    /// Each sample's error is the mean over its known pixels, and the loss is the mean over the samples, so
    /// splitting a batch into micro-batches does not change it.
    pub fn mse(&self, prediction: &Tensor) -> Result<Tensor> {
        let (came, mask) = self.last(prediction.dim(1)?)?;
        match mask {
            None => nn::mse(prediction, &came),
            Some(mask) => known_mean(&difference(prediction, &came)?.sqr()?, &mask),
        }
    }

    /// The mean absolute error, otherwise like [`Video::mse`].
    pub fn mae(&self, prediction: &Tensor) -> Result<Tensor> {
        let (came, mask) = self.last(prediction.dim(1)?)?;
        let error = difference(prediction, &came)?.abs()?;
        mask.map_or_else(|| nn::mean_all(&error), |mask| known_mean(&error, &mask))
    }

    /// A prediction and the frames that it predicts, both (B, T, C, H, W), with zeros in unknown pixels: for measures
    /// that take no mask, which then see no error there and pass no gradient to them.
    pub fn known(&self, prediction: &Tensor) -> Result<(Tensor, Tensor)> {
        let (target, mask) = self.last(prediction.dim(1)?)?;
        let Some(mask) = mask else { return Ok((prediction.clone(), target)) };
        let known = |frames: &Tensor| frames.broadcast_mul(&mask.to_dtype(frames.dtype())?);
        Ok((known(prediction)?, known(&target)?))
    }

    /// The last `times` frames of input and target, and the mask of their known pixels, (B, times, 1, H, W).
    pub fn last(&self, times: usize) -> Result<(Tensor, Option<Tensor>)> {
        let (inputs, targets) = (self.input.dim(1)?, self.target.dim(1)?);
        let Some(first) = (inputs + targets).checked_sub(times) else {
            let message = format!("{times} frames were predicted for samples of {inputs} + {targets} frames");
            return Err(Error::msg(message));
        };
        let came = if times == targets {
            self.target.clone()
        } else {
            let input = self.input.to_dtype(self.target.dtype())?;
            Tensor::cat(&[&input, &self.target], 1)?.narrow(1, first, times)?
        };
        let mask = self.mask.as_ref().map(|mask| mask.narrow(1, first, times)).transpose()?;
        Ok((came, mask))
    }
}

fn difference(prediction: &Tensor, came: &Tensor) -> Result<Tensor> {
    let wide = |x: &Tensor| if x.dtype() == DType::F64 { Ok(x.clone()) } else { x.to_dtype(DType::F32) };
    Ok((wide(prediction)? - wide(came)?)?)
}

/// The mean over samples of each sample's mean over its known pixels: `error` (B, T, C, H, W), `mask`
/// (B, T, 1, H, W). A sample without known pixels has error 0.
fn known_mean(error: &Tensor, mask: &Tensor) -> Result<Tensor> {
    let mask = mask.to_dtype(error.dtype())?;
    let known = (nn::sum_from(&mask, 1)? * error.dim(2)? as f64)?.maximum(1.)?;
    Ok((nn::sum_from(&error.broadcast_mul(&mask)?, 1)? / known)?.mean_all()?)
}

/// The sizes of [`Video`] batches.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct VideoSpec {
    /// Frames to predict from, T_in.
    pub frames_in: usize,
    /// Frames to predict, T_out.
    pub frames_out: usize,
    /// Channels C of a frame.
    pub channels: usize,
    /// Rows H of a frame.
    pub height: usize,
    /// Columns W of a frame.
    pub width: usize,
}

impl Batch for Video {
    type Spec = VideoSpec;

    fn len(&self) -> usize {
        self.input.dims()[0]
    }

    fn map(&self, f: &mut dyn FnMut(&Tensor) -> Result<Tensor>) -> Result<Self> {
        let (input, target) = (f(&self.input)?, f(&self.target)?);
        let mask = self.mask.as_ref().map(f).transpose()?;
        Ok(Self { input, target, mask, quantity: self.quantity.clone() })
    }

    fn cast(self, dtype: DType) -> Result<Self> {
        Ok(Self { input: self.input.to_dtype(dtype)?, ..self })
    }

    fn read(path: &Path, spec: &VideoSpec) -> Result<Self> {
        video_file::read(path, spec)
    }

    fn write(&self, prediction: &Tensor, path: &Path) -> Result<()> {
        video_file::write(&self.input, prediction, path)
    }

    fn compare(
        predict: &mut dyn FnMut(&Self) -> Result<Tensor>,
        train: &dyn Dataset<Batch = Self>,
        held_out: &dyn Dataset<Batch = Self>,
        pass: Pass,
        batch_size: usize,
    ) -> Result<Option<LeadTimes>> {
        video::compare(predict, train, held_out, pass, batch_size)
    }
}

/// Inputs with one class each.
#[derive(Debug, Clone)]
pub struct Labelled {
    /// (B, ...), f32.
    pub input: Tensor,
    /// (B), u32: the class, less than [`LabelledSpec::classes`].
    pub label: Tensor,
}

/// The sizes of [`Labelled`] batches.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LabelledSpec {
    /// The shape of one input, without the batch axis.
    pub shape: Vec<usize>,
    /// Number of classes.
    pub classes: usize,
}

impl Batch for Labelled {
    type Spec = LabelledSpec;

    fn len(&self) -> usize {
        self.input.dims()[0]
    }

    fn map(&self, f: &mut dyn FnMut(&Tensor) -> Result<Tensor>) -> Result<Self> {
        Ok(Self { input: f(&self.input)?, label: f(&self.label)? })
    }

    fn cast(self, dtype: DType) -> Result<Self> {
        Ok(Self { input: self.input.to_dtype(dtype)?, ..self })
    }
}

/// Any tensors that share their first axis, for data that needs no custom type. If there are several, the
/// last is the target and keeps its type when the module computes in half precision.
#[derive(Debug, Clone)]
pub struct Tensors(
    /// Each (B, ...).
    pub Vec<Tensor>,
);

impl Batch for Tensors {
    type Spec = ();

    fn len(&self) -> usize {
        self.0.first().map_or(0, |tensor| tensor.dims()[0])
    }

    fn map(&self, f: &mut dyn FnMut(&Tensor) -> Result<Tensor>) -> Result<Self> {
        Ok(Self(self.0.iter().map(f).collect::<Result<_>>()?))
    }

    fn cast(self, dtype: DType) -> Result<Self> {
        let inputs = if self.0.len() > 1 { self.0.len() - 1 } else { 1 };
        let cast = |(i, tensor): (usize, Tensor)| match i < inputs && tensor.dtype().is_float() {
            true => tensor.to_dtype(dtype),
            false => Ok(tensor),
        };
        Ok(Self(self.0.into_iter().enumerate().map(cast).collect::<candle_core::Result<_>>()?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frames(values: &[f32], times: usize) -> Tensor {
        let samples = values.len() / times / 2;
        Tensor::from_slice(values, (samples, times, 1, 1, 2), &Device::Cpu).unwrap()
    }

    /// Two samples with one input and one target frame of two pixels each.
    fn video(mask: Option<&[f32]>) -> Video {
        let video = Video::new(frames(&[0.5; 4], 1), frames(&[0., 0., 1., 1.], 1));
        Video { mask: mask.map(|mask| frames(mask, 2)), ..video }
    }

    fn number(tensor: Tensor) -> f32 {
        tensor.to_scalar().unwrap()
    }

    #[test]
    fn what_is_not_known_has_no_error_and_samples_count_alike() {
        let prediction = frames(&[0.5, 1., 0., 0.], 1);
        assert_eq!(number(video(None).mse(&prediction).unwrap()), (0.25 + 1. + 1. + 1.) / 4.);
        assert_eq!(number(video(None).mae(&prediction).unwrap()), (0.5 + 1. + 1. + 1.) / 4.);
        // One pixel of the first sample's target is known, both of the second's.
        let masked = video(Some(&[1., 1., 1., 0., 1., 1., 1., 1.]));
        assert_eq!(number(masked.mse(&prediction).unwrap()), (0.25 + 1.) / 2.);
        assert_eq!(number(masked.mae(&prediction).unwrap()), (0.5 + 1.) / 2.);
        let nothing = video(Some(&[1., 1., 0., 0., 1., 1., 0., 0.]));
        assert_eq!(number(nothing.mse(&prediction).unwrap()), 0.);
    }

    #[test]
    fn predictions_of_frames_that_were_given_count_too() {
        let prediction = frames(&[0.5, 0., 0.5, 1., 1., 0.5, 1., 1.], 2);
        assert_eq!(number(video(None).mse(&prediction).unwrap()), (0.25 + 0.25 + 1. + 0.25) / 8.);
        let masked = video(Some(&[1., 0., 1., 1., 0., 0., 1., 1.]));
        assert_eq!(number(masked.mse(&prediction).unwrap()), ((0.25 + 1.) / 3. + 0.) / 2.);
        assert!(video(None).mse(&frames(&[0.; 12], 3)).is_err());
    }

    #[test]
    fn no_gradient_comes_from_what_is_not_known() {
        let prediction = candle_core::Var::from_tensor(&frames(&[0.5, 1., 0., 0.], 1)).unwrap();
        let masked = video(Some(&[1., 1., 1., 0., 1., 1., 1., 1.]));
        let gradients = masked.mse(&prediction).unwrap().backward().unwrap();
        let gradient: Vec<f32> =
            gradients.get(&prediction).unwrap().flatten_all().unwrap().to_vec1().unwrap();
        assert_eq!(gradient, [0.5, 0., -0.5, -0.5]);
        let (known, target) = masked.known(&prediction).unwrap();
        let gradients = known.sqr().unwrap().sum_all().unwrap().backward().unwrap();
        let values = |x: &Tensor| x.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let unknown: Vec<bool> =
            values(&target).iter().zip(values(&known)).map(|(t, p)| (*t, p) == (0., 0.)).collect();
        let gradient = values(gradients.get(&prediction).unwrap());
        assert_eq!(unknown, [false, true, false, false], "{gradient:?}");
        assert!(unknown.iter().zip(&gradient).all(|(unknown, g)| !unknown || *g == 0.), "{gradient:?}");
    }
}
