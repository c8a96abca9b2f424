//! The forward and backward pass over a micro-batch.

use candle_core::{DType, Tensor};

use super::super::phase;
use crate::batch::Batch;
use crate::error::Result;
use crate::grads;
use crate::module::{Logged, Module, Sketch, Step};
use crate::optim::{Clipped, Turn};

/// What the two passes came to.
pub(super) struct Backprop {
    pub(super) loss: Tensor,
    pub(super) metrics: Logged,
    pub(super) pictures: Vec<Sketch>,
    /// Of the parameters that the optimizer moves, in their order.
    pub(super) gradients: Vec<Option<Tensor>>,
    /// Where these gradients have moved the parameters already: what was decided of them.
    pub(super) clipped: Option<Clipped>,
}

impl Backprop {
    /// Both passes over `batch`, whose loss counts `factor` times in the gradients.
    pub(super) fn over<B: Batch>(
        module: &dyn Module<Batch = B>,
        turn: &Turn,
        batch: &B,
        mut step: Step,
        factor: f64,
    ) -> Result<Self> {
        let loss = forward(module, batch, &mut step)?;
        let gradients = {
            let _phase = phase!("backward");
            grads::of_turn(turn, scaled(&loss, factor)?.backward()?)?
        };
        Ok(Self::told(&loss, step, gradients))
    }

    /// What a module returned and told, with the gradients that were found.
    pub(super) fn told(loss: &Tensor, step: Step, gradients: Vec<Option<Tensor>>) -> Self {
        let (metrics, pictures) = step.into_logged();
        Self { loss: loss.detach(), metrics, pictures, gradients, clipped: None }
    }
}

/// The loss of a batch, in 32 bits.
pub(super) fn forward<B: Batch>(
    module: &dyn Module<Batch = B>,
    batch: &B,
    step: &mut Step,
) -> Result<Tensor> {
    let _phase = phase!("forward");
    Ok(module.training_step(batch, step)?.to_dtype(DType::F32)?)
}

/// The loss `factor` times.
pub(super) fn scaled(loss: &Tensor, factor: f64) -> candle_core::Result<Tensor> {
    if factor == 1. { Ok(loss.clone()) } else { loss * factor }
}
