//! The forward and backward pass over a micro-batch, optionally followed by the update.

use candle_core::{DType, Tensor};

use super::super::evaluate::one_number;
use super::super::phase;
use crate::batch::Batch;
use crate::collective::Solo;
use crate::error::Result;
use crate::grads::{self, Grads};
use crate::module::{Metric, Module, Sketch, Step};
use crate::optim::{Clipped, Clipping, Turn};

/// The results of both passes.
pub(super) struct Backprop {
    pub(super) loss: Tensor,
    /// How many items the loss averages over, if the module reports it (`Step::weigh_loss`).
    pub(super) weight: Option<f64>,
    pub(super) metrics: Vec<Metric>,
    pub(super) pictures: Vec<Sketch>,
    /// Gradients of the parameters that the optimizer moves, in their order.
    pub(super) gradients: Vec<Option<Tensor>>,
    /// If the update was made too: how these gradients, which are then complete, were clipped.
    pub(super) clipped: Option<Clipped>,
}

impl Backprop {
    /// Runs both passes over `batch`. `factor` maps the loss's weight, if any, to the factor on the loss.
    pub(super) fn over<B: Batch>(
        module: &dyn Module<Batch = B>,
        turn: &Turn,
        batch: &B,
        mut step: Step,
        factor: impl Fn(Option<f64>) -> f64,
    ) -> Result<Self> {
        let loss = forward(module, batch, &mut step)?;
        let factor = factor(step.loss_weight());
        let gradients = {
            let _phase = phase!("backward");
            grads::of_turn(turn, scaled(&loss, factor)?.backward()?)?
        };
        Self::new(&loss, step, gradients)
    }

    /// Also moves the optimizer's parameters, by gradients that are complete after this one micro-batch.
    pub(super) fn then_update(self, turn: &Turn, clipping: &Clipping) -> Result<Self> {
        // Logged tensors may share memory with the parameters that now move.
        let copied = self.map(&Tensor::force_contiguous, &|gradient| Ok(gradient.clone()))?;
        let mut grads = Grads::new(&turn.params);
        grads.add(&copied.gradients)?;
        let gradients = grads.complete(&turn.params)?;
        let _phase = phase!("optimizer");
        let clipped = clipping.decide(&gradients)?;
        turn.step(&gradients, &clipped.scale, &Solo)?;
        Ok(Self { gradients: gradients.into_iter().map(Some).collect(), clipped: Some(clipped), ..copied })
    }

    /// A copy with `logged` applied to the loss, metrics and pictures, and `gradient` to each gradient.
    pub(super) fn map(&self, logged: MapTensor, gradient: MapTensor) -> candle_core::Result<Self> {
        let metric = |metric: &Metric| Ok(Metric { value: logged(&metric.value)?, ..metric.clone() });
        let picture = |sketch: &Sketch| {
            let of = sketch.of.iter().map(logged).collect::<candle_core::Result<_>>()?;
            Ok(Sketch { of, ..sketch.clone() })
        };
        let of_some = |x: &Option<Tensor>| x.as_ref().map(gradient).transpose();
        Ok(Self {
            loss: logged(&self.loss)?,
            metrics: self.metrics.iter().map(metric).collect::<candle_core::Result<_>>()?,
            pictures: self.pictures.iter().map(picture).collect::<candle_core::Result<_>>()?,
            gradients: self.gradients.iter().map(of_some).collect::<candle_core::Result<_>>()?,
            weight: self.weight,
            clipped: self.clipped.clone(),
        })
    }

    /// Combines what a module returned and logged with its gradients.
    pub(super) fn new(loss: &Tensor, step: Step, gradients: Vec<Option<Tensor>>) -> Result<Self> {
        let weight = step.loss_weight();
        let (metrics, pictures) = step.into_logged()?;
        Ok(Self { loss: loss.detach(), weight, metrics, pictures, gradients, clipped: None })
    }
}

/// A function applied to a tensor.
type MapTensor<'a> = &'a dyn Fn(&Tensor) -> candle_core::Result<Tensor>;

/// The loss of a batch, in f32.
pub(super) fn forward<B: Batch>(
    module: &dyn Module<Batch = B>,
    batch: &B,
    step: &mut Step,
) -> Result<Tensor> {
    let _phase = phase!("forward");
    let number = step.number();
    let loss = module.training_step(batch, step);
    let loss = loss.and_then(|loss| one_number(&loss));
    let loss = loss.map_err(|error| error.within(&format!("training_step, step {number}")))?;
    Ok(loss.to_dtype(DType::F32)?)
}

/// The loss multiplied by `factor`.
pub(super) fn scaled(loss: &Tensor, factor: f64) -> candle_core::Result<Tensor> {
    if factor == 1. { Ok(loss.clone()) } else { loss * factor }
}
