//! A device's work on a micro-batch, as it comes, or recorded once and replayed: both passes and, where a step is one
//! micro-batch, the update.

use std::sync::atomic::Ordering;

use candle_core::{DType, Device, Shape, Tensor};
use candlepower_kernels::{Recording, record, rehearse};

use super::super::phase;
use super::backprop::Backprop;
use crate::batch::Batch;
use crate::error::{Error, Result};
use crate::module::Step;
use crate::taps::refresh;

/// How many kinds of work are recorded: beyond that, shapes change too often for it to be worth its memory.
const MOST_KINDS: usize = 8;

/// The work that was recorded.
///
/// The first that is like no other before rehearses, the second is recorded, and from then on it is replayed. What goes wrong
/// on the way, or cannot be replayed, ends all recording, with a warning.
pub(super) struct Replays<B> {
    device: Device,
    is_on: bool,
    known: Vec<Known<B>>,
}

/// What makes work alike, beside the shapes of its batches.
#[derive(Clone, PartialEq)]
pub(super) struct Kind {
    /// Which optimizer's turn it is.
    pub(super) turn: usize,
    /// How often the loss counts.
    pub(super) factor: f64,
    /// Whether parameters move as well.
    pub(super) updates: bool,
}

type Shapes = Vec<(Shape, DType)>;

/// A kind of work that was rehearsed, and perhaps recorded.
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

    /// Whether work is recorded, as far as is known.
    pub(super) fn is_on(&self) -> bool {
        self.is_on
    }

    /// Does work of this kind on a batch.
    pub(super) fn run(
        &mut self,
        kind: Kind,
        batch: &B,
        step: impl Fn() -> Step,
        work: impl Fn(&B, Step) -> Result<Backprop>,
    ) -> Result<Backprop> {
        if !self.is_on {
            return work(batch, step());
        }
        let shapes = shapes(batch)?;
        let found = self.known.iter_mut().find(|known| known.kind == kind && known.shapes == shapes);
        let Some(known) = found else { return self.rehearse(kind, shapes, || work(batch, step())) };
        if known.recorded.is_none() {
            match Recorded::new(&self.device, batch, step(), &work) {
                Ok(recorded) => known.recorded = Some(recorded),
                Err(why) => {
                    tracing::warn!("trainer.cuda_graph: steps are not recorded: {why}");
                    (self.is_on, self.known) = (false, Vec::new());
                    return work(batch, step());
                }
            }
        }
        known.recorded.as_ref().map_or_else(|| work(batch, step()), |recorded| recorded.replay(batch))
    }

    /// The first work of its kind. One that differs in its factor alone, as when a loss scale has changed, takes another's place.
    fn rehearse(
        &mut self,
        kind: Kind,
        shapes: Shapes,
        work: impl FnOnce() -> Result<Backprop>,
    ) -> Result<Backprop> {
        self.known.retain(|known| {
            known.shapes != shapes || Kind { factor: kind.factor, ..known.kind.clone() } != kind
        });
        if self.known.len() == MOST_KINDS {
            return work();
        }
        self.known.push(Known { kind, shapes, recorded: None });
        rehearse(&self.device, work)
    }
}

impl<B: Batch> Recorded<B> {
    fn new(
        device: &Device,
        batch: &B,
        step: Step,
        work: impl Fn(&B, Step) -> Result<Backprop>,
    ) -> Result<Self> {
        let _phase = phase!("recording");
        let batch = batch.map(&mut |x| Ok(x.force_contiguous()?))?;
        let was_asked = step.watch();
        let (results, recording) = record(device, || {
            // Without what they were computed from, which is freed here.
            let detached = |x: &Tensor| Ok(x.detach());
            Ok::<_, Error>(work(&batch, step)?.map(&detached, &detached)?)
        })?;
        if was_asked.load(Ordering::Relaxed) {
            // They have never been computed, so that there is nothing to free.
            std::mem::forget(results);
            return Err(Error::msg(
                "the module uses the step's number or random numbers, which differ from step to step",
            ));
        }
        let what = if results.clipped.is_some() { "a training step" } else { "passes over a micro-batch" };
        tracing::info!("{what}: recorded as a CUDA graph of {} operations", recording.operations());
        Ok(Self { results, batch, recording })
    }

    fn replay(&self, batch: &B) -> Result<Backprop> {
        let _phase = phase!("replay");
        for (to, from) in tensors(&self.batch)?.iter().zip(&tensors(batch)?) {
            refresh(to, from)?;
        }
        self.recording.replay()?;
        // Others keep these for longer than until the next replay, ...
        let copied = &Tensor::force_contiguous;
        // ... but not gradients that have done what they are for.
        let shared = &|x: &Tensor| Ok(x.clone());
        Ok(self.results.map(copied, if self.results.clipped.is_some() { shared } else { copied })?)
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
