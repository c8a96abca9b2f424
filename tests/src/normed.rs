//! A tiny regression with batch normalization, whose running statistics are part of the trained state.

use candle_core::{DType, Tensor};
use candle_nn::{Init, Linear, linear};
use candlepower::nn::channels_last::BatchNorm;
use candlepower::precision::Precision;
use candlepower::prelude::*;

use crate::device;

/// A steepness at which gradients do not overflow in fp16.
pub const CALM: f64 = 1.;

/// A linear layer, batch normalization, a linear layer.
pub struct Normed {
    first: Linear,
    norm: BatchNorm,
    second: Linear,
    steepness: f64,
}

impl Normed {
    /// The module with its parameters `first.*`, `norm.*` and `second.*`. Its gradients are multiplied by
    /// `steepness`.
    pub fn model(seed: u64, precision: Precision, steepness: f64) -> Model<Tensors> {
        let build = move |vb: VarBuilder| {
            Ok(Self {
                first: linear(4, 8, vb.pp("first"))?,
                norm: BatchNorm::new(8, Init::Const(1.), vb.pp("norm"))?,
                second: linear(8, 1, vb.pp("second"))?,
                steepness,
            })
        };
        Model::with_precision(build, seed, &device(), precision).unwrap()
    }

    fn forward(&self, x: &Tensor, training: bool) -> Result<Tensor> {
        let hidden = self.norm.forward(&self.first.forward(x)?, training)?.relu()?;
        Ok(self.second.forward(&hidden)?.to_dtype(DType::F32)?)
    }
}

impl Module for Normed {
    type Batch = Tensors;

    fn training_step(&self, batch: &Tensors, step: &mut Step) -> Result<Tensor> {
        let prediction = self.forward(&batch.0[0], step.is_training())?;
        step.log("mean_index", &batch.0[2].to_dtype(DType::F32)?.mean_all()?);
        let loss = (prediction - &batch.0[1].to_dtype(DType::F32)?)?.sqr()?.mean_all()?;
        Ok((loss * self.steepness)?)
    }

    fn predict_step(&self, batch: &Tensors, _: &mut Step) -> Result<Tensor> {
        self.forward(&batch.0[0], false)
    }
}
