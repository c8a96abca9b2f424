//! Batches: where a module and a dataset meet. Neither knows the other; both know the batch.

use std::path::Path;

use candle_core::{DType, Device, Tensor};
use serde::{Deserialize, Serialize};

use crate::data::Dataset;
use crate::error::{Error, Result};
use crate::metrics::video::{self, Baseline};
use crate::video_file;

/// A kind of batch: samples collated into tensors.
pub trait Batch: Send + Sync + Sized + 'static {
    /// What every batch of a dataset has in common: the sizes that a module is built from.
    type Spec: Clone + std::fmt::Debug + Send + Sync;

    /// How many samples it holds.
    fn len(&self) -> usize;

    /// The same batch on another device.
    fn to_device(&self, device: &Device) -> Result<Self>;

    /// The same batch with its floating-point inputs in the type that the module computes in. Targets keep theirs, so that
    /// losses lose nothing.
    fn cast(self, _dtype: DType) -> Result<Self> {
        Ok(self)
    }

    /// Whether it holds no sample.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// A batch to predict from, read from a file that a person gave.
    fn read(path: &Path, _spec: &Self::Spec) -> Result<Self> {
        Err(Error::msg(format!(
            "{}: this kind of data cannot be read from a file for prediction",
            path.display()
        )))
    }

    /// Writes what a module predicted from this batch, for a person to look at.
    fn write(&self, _prediction: &Tensor, path: &Path) -> Result<()> {
        Err(Error::msg(format!("{}: predictions of this kind cannot be written to a file", path.display())))
    }

    /// The losses of predictors that learn nothing, to set a trained module's result beside.
    fn baselines(
        _train: &dyn Dataset<Batch = Self>,
        _val: &dyn Dataset<Batch = Self>,
        _seed: u64,
    ) -> Result<Vec<Baseline>> {
        Ok(Vec::new())
    }
}

/// Frames to predict from and the frames that follow them. Values are in `[0, 1]`.
#[derive(Debug, Clone)]
pub struct Video {
    /// (B, T_in, C, H, W), f32.
    pub input: Tensor,
    /// (B, T_out, C, H, W), f32.
    pub target: Tensor,
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

    fn to_device(&self, device: &Device) -> Result<Self> {
        Ok(Self { input: self.input.to_device(device)?, target: self.target.to_device(device)? })
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

    fn baselines(
        train: &dyn Dataset<Batch = Self>,
        val: &dyn Dataset<Batch = Self>,
        seed: u64,
    ) -> Result<Vec<Baseline>> {
        video::baselines(train, val, seed)
    }
}

/// Inputs with a class each.
#[derive(Debug, Clone)]
pub struct Labelled {
    /// (B, ...), f32.
    pub input: Tensor,
    /// (B), u32: the class, below [`LabelledSpec::classes`].
    pub label: Tensor,
}

/// The sizes of [`Labelled`] batches.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LabelledSpec {
    /// The shape of one input, without the batch axis.
    pub shape: Vec<usize>,
    /// How many classes there are.
    pub classes: usize,
}

impl Batch for Labelled {
    type Spec = LabelledSpec;

    fn len(&self) -> usize {
        self.input.dims()[0]
    }

    fn to_device(&self, device: &Device) -> Result<Self> {
        Ok(Self { input: self.input.to_device(device)?, label: self.label.to_device(device)? })
    }

    fn cast(self, dtype: DType) -> Result<Self> {
        Ok(Self { input: self.input.to_dtype(dtype)?, ..self })
    }
}

/// Any tensors that share their first axis, for data that needs no type of its own.
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

    fn to_device(&self, device: &Device) -> Result<Self> {
        Ok(Self(self.0.iter().map(|tensor| tensor.to_device(device)).collect::<candle_core::Result<_>>()?))
    }

    fn cast(self, dtype: DType) -> Result<Self> {
        let cast =
            |tensor: Tensor| if tensor.dtype().is_float() { tensor.to_dtype(dtype) } else { Ok(tensor) };
        Ok(Self(self.0.into_iter().map(cast).collect::<candle_core::Result<_>>()?))
    }
}
