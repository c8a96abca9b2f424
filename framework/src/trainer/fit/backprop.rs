//! The forward and backward pass over a micro-batch: as it comes, or recorded once and replayed.

use std::sync::atomic::Ordering;

use candle_core::{DType, Device, Shape, Tensor};
use candlepower_kernels::{Recording, record, rehearse};

use super::super::phase;
use crate::batch::Batch;
use crate::error::{Error, Result};
use crate::grads;
use crate::module::{Logged, Module, Sketch, Step};
use crate::optim::Turn;
use crate::taps::refresh;

/// What the two passes came to.
pub(super) struct Backprop {
    pub(super) loss: Tensor,
    pub(super) metrics: Logged,
    pub(super) pictures: Vec<Sketch>,
    /// Of the parameters that the optimizer moves, in their order.
    pub(super) gradients: Vec<Option<Tensor>>,
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
        Self { loss: loss.detach(), metrics, pictures, gradients }
    }

    /// The same numbers, each tensor replaced by what `f` makes of it.
    fn map(&self, f: impl Fn(&Tensor) -> candle_core::Result<Tensor>) -> candle_core::Result<Self> {
        let all = |logged: &Logged| -> candle_core::Result<Logged> {
            logged.iter().map(|(name, x)| Ok((name.clone(), f(x)?))).collect()
        };
        let sketch = |sketch: &Sketch| -> candle_core::Result<Sketch> {
            Ok(Sketch { of: sketch.of.iter().map(&f).collect::<Result<_, _>>()?, ..sketch.clone() })
        };
        Ok(Self {
            loss: f(&self.loss)?,
            metrics: all(&self.metrics)?,
            pictures: self.pictures.iter().map(sketch).collect::<Result<_, _>>()?,
            gradients: self
                .gradients
                .iter()
                .map(|x| x.as_ref().map(&f).transpose())
                .collect::<Result<_, _>>()?,
        })
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

/// How many kinds of passes are recorded: beyond that, shapes change too often for it to be worth its memory.
const MOST_KINDS: usize = 8;

/// The passes that were recorded.
///
/// The first that is like no other before rehearses, the second is recorded, and from then on it is replayed. What goes wrong
/// on the way, or cannot be replayed, ends all recording, with a warning.
pub(super) struct Replays<B> {
    device: Device,
    is_on: bool,
    known: Vec<Known<B>>,
}

/// What makes passes alike, beside the shapes of their batches.
#[derive(Clone, PartialEq)]
pub(super) struct Kind {
    /// Which optimizer's turn it is.
    pub(super) turn: usize,
    /// How often the loss counts.
    pub(super) factor: f64,
}

type Shapes = Vec<(Shape, DType)>;

/// A kind of pass that was rehearsed, and perhaps recorded.
struct Known<B> {
    kind: Kind,
    shapes: Shapes,
    recorded: Option<Recorded<B>>,
}

/// A recording, and where it finds its batch and leaves its results.
struct Recorded<B> {
    // Freed before the recording, whose memory it is.
    results: Backprop,
    batch: B,
    recording: Recording,
}

impl<B: Batch> Replays<B> {
    /// Records on `device` where that is `wanted`.
    pub(super) fn new(wanted: bool, device: &Device) -> Self {
        if wanted && !device.is_cuda() {
            tracing::warn!("trainer.cuda_graph: only CUDA devices record steps");
        }
        Self { device: device.clone(), is_on: wanted && device.is_cuda(), known: Vec::new() }
    }

    /// The passes of this kind over a batch, which `passes` computes.
    pub(super) fn backprop(
        &mut self,
        kind: Kind,
        batch: &B,
        step: impl Fn() -> Step,
        passes: impl Fn(&B, Step) -> Result<Backprop>,
    ) -> Result<Backprop> {
        if !self.is_on {
            return passes(batch, step());
        }
        let shapes = shapes(batch)?;
        let found = self.known.iter_mut().find(|known| known.kind == kind && known.shapes == shapes);
        let Some(known) = found else { return self.rehearse(kind, shapes, || passes(batch, step())) };
        if known.recorded.is_none() {
            match Recorded::new(&self.device, batch, step(), &passes) {
                Ok(recorded) => known.recorded = Some(recorded),
                Err(why) => {
                    tracing::warn!("trainer.cuda_graph: steps are not recorded: {why}");
                    (self.is_on, self.known) = (false, Vec::new());
                    return passes(batch, step());
                }
            }
        }
        known.recorded.as_ref().map_or_else(|| passes(batch, step()), |recorded| recorded.replay(batch))
    }

    /// The first pass of its kind. One that differs in its factor alone, as when a loss scale has changed, takes another's place.
    fn rehearse(
        &mut self,
        kind: Kind,
        shapes: Shapes,
        passes: impl FnOnce() -> Result<Backprop>,
    ) -> Result<Backprop> {
        self.known.retain(|known| {
            known.shapes != shapes || Kind { factor: kind.factor, ..known.kind.clone() } != kind
        });
        if self.known.len() == MOST_KINDS {
            return passes();
        }
        self.known.push(Known { kind, shapes, recorded: None });
        rehearse(&self.device, passes)
    }
}

impl<B: Batch> Recorded<B> {
    fn new(
        device: &Device,
        batch: &B,
        step: Step,
        passes: impl Fn(&B, Step) -> Result<Backprop>,
    ) -> Result<Self> {
        let _phase = phase!("recording");
        let batch = batch.map(&mut |x| Ok(x.force_contiguous()?))?;
        let was_asked = step.watch();
        let (results, recording) = record(device, || {
            // Without what they were computed from, which is freed here.
            Ok::<_, Error>(passes(&batch, step)?.map(|x| Ok(x.detach()))?)
        })?;
        if was_asked.load(Ordering::Relaxed) {
            // They have never been computed, so that there is nothing to free.
            std::mem::forget(results);
            return Err(Error::msg(
                "the module asks for the step's number or for random numbers, so that no step is like another",
            ));
        }
        tracing::info!(
            "a training step is recorded as a CUDA graph of {} operations",
            recording.operations()
        );
        Ok(Self { results, batch, recording })
    }

    fn replay(&self, batch: &B) -> Result<Backprop> {
        let _phase = phase!("replay");
        for (to, from) in tensors(&self.batch)?.iter().zip(&tensors(batch)?) {
            refresh(to, from)?;
        }
        self.recording.replay()?;
        // Others keep them for longer than until the next replay.
        Ok(self.results.map(Tensor::force_contiguous)?)
    }
}

fn tensors<B: Batch>(batch: &B) -> Result<Vec<Tensor>> {
    let mut all = Vec::new();
    batch.map(&mut |x| {
        all.push(x.clone());
        Ok(x.clone())
    })?;
    Ok(all)
}

fn shapes<B: Batch>(batch: &B) -> Result<Shapes> {
    Ok(tensors(batch)?.iter().map(|x| (x.shape().clone(), x.dtype())).collect())
}
