//! A tiny regression that uses every source of randomness: augmented samples, dropout, a changing learning
//! rate.

use candle_core::{DType, Device, Tensor};
use candle_nn::{Linear, linear};
use candlepower::precision::Precision;
use candlepower::prelude::*;
use candlepower::rand::Rng;

use crate::device;

/// Points on a line in four dimensions; every sample is different, with new noise in every epoch.
pub struct Points {
    /// The number of samples.
    pub samples: usize,
}

/// One sample's input and target.
fn point(sample: &Sample) -> ([f32; 4], f32) {
    let mut rng = sample.rng();
    let i = sample.index as f32;
    let x = [i.sin(), (2. * i).cos(), (0.3 * i).sin(), rng.random_range(-0.1..0.1)];
    (x, x[0] - 2. * x[1] + 0.5 * x[2])
}

fn collate(samples: &[Sample]) -> Result<Tensors> {
    let points: Vec<_> = samples.iter().map(point).collect();
    let x = Tensor::from_iter(points.iter().flat_map(|(x, _)| *x), &Device::Cpu)?.reshape(((), 4))?;
    let y = Tensor::from_iter(points.iter().map(|(_, y)| *y), &Device::Cpu)?.reshape(((), 1))?;
    let index = Tensor::from_iter(samples.iter().map(|s| s.index as f32), &Device::Cpu)?;
    Ok(Tensors(vec![x, y, index]))
}

impl Dataset for Points {
    type Batch = Tensors;

    fn len(&self) -> usize {
        self.samples
    }

    fn spec(&self) {}

    fn batch(&self, samples: &[Sample]) -> Result<Tensors> {
        collate(samples)
    }
}

/// The same points in order, as a stream of unknown length.
pub struct PointStream {
    /// The number of samples.
    pub samples: usize,
}

impl Stream for PointStream {
    type Batch = Tensors;
    type Item = usize;

    fn spec(&self) {}

    fn items(&self, _: candlepower::data::Pass) -> Result<candlepower::data::Items<usize>> {
        Ok(Box::new((0..self.samples).map(Ok)))
    }

    fn batch(&self, items: Vec<usize>, samples: &[Sample]) -> Result<Tensors> {
        assert!(items.iter().zip(samples).all(|(item, sample)| *item == sample.index));
        collate(samples)
    }
}

/// Two layers with dropout between them.
pub struct Dropped {
    first: Linear,
    second: Linear,
    /// Whether the mean index is also logged for the epoch.
    logs_epochs: bool,
}

impl Dropped {
    /// The module with its parameters `first.*` and `second.*`.
    pub fn model(seed: u64) -> Model<Tensors> {
        Self::in_precision(seed, Precision::Full)
    }

    /// Like [`model`](Self::model), with the given number format.
    pub fn in_precision(seed: u64, precision: Precision) -> Model<Tensors> {
        Self::logging(false, seed, precision)
    }

    /// Like [`in_precision`](Self::in_precision), and also logs the mean index of each epoch as
    /// `epoch_index`.
    pub fn logging_epochs(seed: u64, precision: Precision) -> Model<Tensors> {
        Self::logging(true, seed, precision)
    }

    fn logging(logs_epochs: bool, seed: u64, precision: Precision) -> Model<Tensors> {
        let build = move |vb: VarBuilder| Ok(Self { logs_epochs, ..Self::build(vb)? });
        Model::with_precision(build, seed, &device(), precision).unwrap()
    }

    /// Builds the module itself.
    pub fn build(vb: VarBuilder) -> Result<Self> {
        let (first, second) = (linear(4, 8, vb.pp("first"))?, linear(8, 1, vb.pp("second"))?);
        Ok(Self { first, second, logs_epochs: false })
    }
}

impl Module for Dropped {
    type Batch = Tensors;

    fn training_step(&self, batch: &Tensors, step: &mut Step) -> Result<Tensor> {
        let mut hidden = self.first.forward(&batch.0[0])?.relu()?;
        if step.is_training() {
            let mut rng = step.rng("dropout");
            let keep = (0..hidden.elem_count()).map(|_| if rng.random_bool(0.8) { 1.25f32 } else { 0. });
            hidden = (&hidden
                * Tensor::from_iter(keep, hidden.device())?
                    .reshape(hidden.shape())?
                    .to_dtype(hidden.dtype())?)?;
        }
        let loss = (self.second.forward(&hidden)? - &batch.0[1])?.sqr()?.mean_all()?;
        step.log("mean_index", &batch.0[2].mean_all()?);
        if self.logs_epochs {
            step.log_epoch("epoch_index", &batch.0[2].mean_all()?);
        }
        Ok(loss)
    }

    fn predict_step(&self, batch: &Tensors, _: &mut Step) -> Result<Tensor> {
        Ok(self.second.forward(&self.first.forward(&batch.0[0])?.relu()?)?)
    }
}

/// The values of a model's parameters, by name.
pub fn weights<B: Batch>(model: &Model<B>) -> Vec<(String, Vec<f32>)> {
    let values = |(name, var): (String, candle_core::Var)| {
        let flat = var.as_tensor().to_dtype(DType::F32).unwrap().flatten_all().unwrap();
        (name, flat.to_vec1().unwrap())
    };
    model.params().vars().into_iter().map(values).collect()
}
