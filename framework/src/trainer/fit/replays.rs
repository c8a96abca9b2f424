//! A device's work on a micro-batch, run directly or recorded once and replayed: both passes and, if a step
//! is one micro-batch, the update.

use std::sync::atomic::Ordering;

use candle_core::{DType, Device, Shape, Tensor};
use candlepower_kernels::{Recording, record, rehearse};

use super::super::phase;
use super::backprop::Backprop;
use crate::batch::Batch;
use crate::error::{Error, Result};
use crate::module::Step;
use crate::taps::refresh;

/// Maximum number of recorded kinds. With more, shapes change too often for it to be worth the memory.
const MOST_KINDS: usize = 8;

/// Recorded work.
///
/// Work of a new kind is first run as a rehearsal, the second time recorded, and from then on replayed. If
/// anything fails on the way or cannot be replayed, recording is turned off with a warning.
pub(super) struct Replays<B> {
    device: Device,
    is_on: bool,
    known: Vec<Known<B>>,
}

/// What identifies a kind of work, besides the shapes of its batches.
#[derive(Clone, PartialEq)]
pub(super) struct Kind {
    /// Which optimizer's turn it is.
    pub(super) turn: usize,
    /// The factor of the loss in the gradients.
    pub(super) factor: f64,
    /// Whether parameters are updated too.
    pub(super) updates: bool,
}

type Shapes = Vec<(Shape, DType)>;

/// A kind of work that has been rehearsed, and possibly recorded.
struct Known<B> {
    kind: Kind,
    shapes: Shapes,
    recorded: Option<Recorded<B>>,
}

/// A recording, with the tensors that hold its input batch and its results.
struct Recorded<B> {
    // Dropped before the recording, which owns its memory.
    results: Backprop,
    batch: B,
    recording: Recording,
}

impl<B: Batch> Replays<B> {
    /// Records on `device` if `wanted`.
    pub(super) fn new(wanted: bool, device: &Device) -> Self {
        if wanted && !device.is_cuda() {
            tracing::warn!("trainer.cuda_graph: only CUDA devices record steps");
        }
        Self { device: device.clone(), is_on: wanted && device.is_cuda(), known: Vec::new() }
    }

    /// Drops all recordings, because other parameters move from now on.
    pub(super) fn forget(&mut self) {
        self.known.clear();
    }

    /// Whether work is being recorded, as far as is known.
    pub(super) fn is_on(&self) -> bool {
        self.is_on
    }

    /// Runs work of this kind on a batch.
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
        if let Some(recorded) = &known.recorded {
            return recorded.replay(batch);
        }
        match Recorded::new(&self.device, batch, step(), &work) {
            Ok((recorded, results)) => {
                known.recorded = Some(recorded);
                Ok(results)
            }
            Err(why) => {
                tracing::warn!("trainer.cuda_graph: steps are not recorded: {why}");
                (self.is_on, self.known) = (false, Vec::new());
                work(batch, step())
            }
        }
    }

    /// Runs the first work of its kind. It replaces a kind that differs only in its factor, for example after
    /// the loss scale changed.
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
    /// Records the work on a batch and replays it for the first time.
    fn new(
        device: &Device,
        batch: &B,
        step: Step,
        work: impl Fn(&B, Step) -> Result<Backprop>,
    ) -> Result<(Self, Backprop)> {
        let _phase = phase!("recording");
        let batch = batch.map(&mut |x| Ok(x.force_contiguous()?))?;
        let was_asked = step.watch();
        let (results, recording) = record(device, || {
            // Detached from their inputs, which are freed here.
            let detached = |x: &Tensor| Ok(x.detach());
            Ok::<_, Error>(work(&batch, step)?.map(&detached, &detached)?)
        })?;
        let why = match was_asked.load(Ordering::Relaxed) {
            true => Some(Error::msg(
                "the module uses the step's number or random numbers, which differ from step to step",
            )),
            false => recording.replay().err().map(Error::from),
        };
        if let Some(why) = why {
            // The results have never been computed, so there is nothing to free.
            std::mem::forget(results);
            return Err(why);
        }
        let what = if results.clipped.is_some() { "a training step" } else { "passes over a micro-batch" };
        tracing::info!("{what}: recorded as a CUDA graph of {} operations", recording.operations());
        let recorded = Self { results, batch, recording };
        let results = recorded.results()?;
        Ok((recorded, results))
    }

    fn replay(&self, batch: &B) -> Result<Backprop> {
        let _phase = phase!("replay");
        for (to, from) in tensors(&self.batch)?.iter().zip(&tensors(batch)?) {
            refresh(to, from)?;
        }
        self.recording.replay()?;
        self.results()
    }

    /// The results of the last replay.
    fn results(&self) -> Result<Backprop> {
        // Callers keep these past the next replay, ...
        let copied = &Tensor::force_contiguous;
        // ... except gradients that have already been applied.
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
