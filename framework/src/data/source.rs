//! Sources of samples, [`Dataset`]s read by index and [`Stream`]s read in sequence, and passes over them.

use std::iter::{Peekable, Take};
use std::sync::Arc;

use super::loader::{Job, Place};
use super::{Dataset, Order, Sample, Split, sequential_batches};
use crate::batch::Batch;
use crate::error::{Error, Result};

/// Samples that arrive one after the other, in an unknown number: an archive, a queue, a generator.
///
/// If samples can be read by index, prefer a [`Dataset`], which is shuffled and resumes at once. A stream is
/// read in its own order, and a resumed run reads and drops the samples it has already used.
pub trait Stream: Send + Sync {
    /// The batch type that samples are collated into.
    type Batch: Batch;
    /// The smallest unit read in sequence: a line, a file name, compressed bytes.
    type Item: Send;

    /// The sizes common to all batches, which a module needs to be built.
    fn spec(&self) -> <Self::Batch as Batch>::Spec;

    /// The items of one pass. The same pass must yield the same items, so runs can be resumed and repeated.
    fn items(&self, pass: Pass) -> Result<Items<Self::Item>>;

    /// Collates these items into a batch on the CPU. Called from several workers at once: do the expensive
    /// work here.
    fn batch(&self, items: Vec<Self::Item>, samples: &[Sample]) -> Result<Self::Batch>;
}

/// The items that a [`Stream`] yields.
pub type Items<T> = Box<dyn Iterator<Item = Result<T>> + Send>;

/// One pass over data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pass {
    /// The split to read.
    pub split: Split,
    /// The epoch; 0 in evaluation.
    pub epoch: u64,
    /// The run's seed.
    pub seed: u64,
    /// Whether augmentations apply, as in training.
    pub augment: bool,
}

impl Pass {
    /// A pass that evaluates a split.
    pub fn evaluation(split: Split, seed: u64) -> Self {
        Self { split, epoch: 0, seed, augment: false }
    }
}

/// A dataset or a stream.
pub enum Source<B: Batch> {
    /// Samples read by index.
    Indexed(Arc<dyn Dataset<Batch = B>>),
    /// Samples read in sequence.
    Stream(Arc<dyn AnyStream<B>>),
}

impl<B: Batch> Clone for Source<B> {
    fn clone(&self) -> Self {
        match self {
            Self::Indexed(dataset) => Self::Indexed(dataset.clone()),
            Self::Stream(stream) => Self::Stream(stream.clone()),
        }
    }
}

/// Where training starts in its data, and its batch sizes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Start {
    pub(crate) epoch: u64,
    pub(crate) step_in_epoch: u64,
    pub(crate) samples_in_epoch: u64,
    /// Samples that one device processes at once.
    pub(crate) micro_batch_size: usize,
    pub(crate) share: Share,
}

/// The micro-batches of a rank: every `of`-th one of each step or evaluation, starting with number `rank`.
/// The micro-batches are therefore the same for any number of ranks.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Share {
    pub(crate) rank: usize,
    pub(crate) of: usize,
}

impl Default for Share {
    fn default() -> Self {
        Self { rank: 0, of: 1 }
    }
}

impl Share {
    /// This rank's share of a step's micro-batches. If it has none, one without samples, because every rank
    /// takes part in every step.
    fn of_step<B>(self, step: Vec<Job<B>>) -> Vec<Job<B>> {
        let Some(place) = step.first().map(|job| job.place) else { return step };
        let mut own: Vec<Job<B>> = step.into_iter().skip(self.rank).step_by(self.of).collect();
        if own.is_empty() {
            own.push(Job { make: None, place: Place { number: self.rank, ..place } });
        }
        if let Some(last) = own.last_mut() {
            last.place.ends_step = true;
        }
        own
    }
}

/// The micro-batches of a pass, to be made.
pub(crate) type Jobs<B> = Box<dyn Iterator<Item = Result<Job<B>>> + Send>;

impl<B: Batch> Source<B> {
    /// The sizes common to all batches.
    pub fn spec(&self) -> B::Spec {
        match self {
            Self::Indexed(dataset) => dataset.spec(),
            Self::Stream(stream) => stream.spec(),
        }
    }

    /// Number of samples, if known.
    pub fn len(&self) -> Option<usize> {
        match self {
            Self::Indexed(dataset) => Some(dataset.len()),
            Self::Stream(_) => None,
        }
    }

    /// The sampling weights of a dataset that has some.
    pub(crate) fn weights(&self) -> Option<Vec<f64>> {
        match self {
            Self::Indexed(dataset) => dataset.weights(),
            Self::Stream(_) => None,
        }
    }

    /// Whether it is known that there is nothing to read.
    pub fn is_empty(&self) -> bool {
        self.len() == Some(0)
    }

    /// All micro-batches of training from `start` on, epoch after epoch, without end. `order` is a dataset's; of a
    /// stream only its seed, batch size and limit count.
    pub(crate) fn training(&self, order: &Order, start: Start) -> Jobs<B> {
        let (micro, share) = (start.micro_batch_size, start.share);
        match self {
            Self::Indexed(dataset) => {
                let dataset = dataset.clone();
                let batches = order.from(start.epoch, start.step_in_epoch as usize);
                Box::new(batches.flat_map(move |(samples, ends_epoch)| {
                    share.of_step(jobs(&dataset, samples, micro, ends_epoch).collect()).into_iter().map(Ok)
                }))
            }
            Self::Stream(stream) => {
                let (stream, mut skip) = (stream.clone(), start.samples_in_epoch as usize);
                let (seed, step) = (order.seed, order.batch_size);
                let items = order.limit.saturating_mul(step);
                Box::new((start.epoch..).flat_map(move |epoch| -> Jobs<B> {
                    let pass = Pass { split: Split::Train, epoch, seed, augment: true };
                    let portions = Portions { skip: std::mem::take(&mut skip), step, micro, items, share };
                    stream
                        .clone()
                        .jobs(pass, portions)
                        .unwrap_or_else(|error| Box::new([Err(error)].into_iter()))
                }))
            }
        }
    }

    /// One pass over the first `samples` of the data; only the batches of `share` are made.
    pub(crate) fn evaluation(
        &self,
        pass: Pass,
        batch_size: usize,
        samples: usize,
        share: Share,
    ) -> Result<Jobs<B>> {
        let all: Jobs<B> = match self {
            Self::Indexed(dataset) => {
                let (dataset, len) = (dataset.clone(), dataset.len().min(samples));
                let batches = sequential_batches(pass, len, batch_size);
                Box::new(batches.flat_map(move |samples| {
                    jobs(&dataset, samples, batch_size, false).map(Ok).collect::<Vec<_>>()
                }))
            }
            Self::Stream(stream) => {
                let share = Share::default();
                let portions =
                    Portions { skip: 0, step: batch_size, micro: batch_size, items: samples, share };
                stream.clone().jobs(pass, portions)?
            }
        };
        Ok(Box::new(all.skip(share.rank).step_by(share.of)))
    }
}

/// The micro-batches of one step over a dataset.
fn jobs<B: Batch>(
    dataset: &Arc<dyn Dataset<Batch = B>>,
    samples: Vec<Sample>,
    micro: usize,
    ends_epoch: bool,
) -> impl Iterator<Item = Job<B>> {
    let step_samples = samples.len();
    let micro_batches: Vec<Vec<Sample>> = samples.chunks(micro).map(<[_]>::to_vec).collect();
    micro_batches.into_iter().enumerate().map(move |(number, samples)| {
        let dataset = dataset.clone();
        let make = move || {
            whole(dataset.batch(&samples), samples.len()).map_err(|why| {
                // Try each sample separately, to name the one that fails.
                let alone =
                    |sample: &&Sample| whole(dataset.batch(&[**sample]), 1).is_err_and(|its| its == why);
                match samples.iter().find(alone) {
                    Some(sample) => unreadable(&[*sample], &why),
                    None => unreadable(&samples, &why),
                }
            })
        };
        Job {
            make: Some(Box::new(make)),
            place: Place { number, ends_step: false, step_samples, ends_epoch },
        }
    })
}

/// Checks that a batch has the requested number of samples, because each counts equally in the loss. Returns
/// the reason if it does not.
fn whole<B: Batch>(batch: Result<B>, samples: usize) -> Result<B, String> {
    match batch {
        Ok(batch) if batch.len() == samples => Ok(batch),
        Ok(batch) => Err(format!("the batch has {} samples, expected {samples}", batch.len())),
        Err(error) => Err(error.to_string()),
    }
}

fn unreadable(samples: &[Sample], why: &str) -> Error {
    let indices: Vec<String> = samples.iter().map(|s| s.index.to_string()).collect();
    let plural = if indices.len() == 1 { "" } else { "s" };
    Error::msg(format!("cannot read sample{plural} {}: {why}", indices.join(", ")))
}

/// How a stream is divided.
#[derive(Debug, Clone, Copy)]
pub struct Portions {
    /// Items to read and drop first.
    skip: usize,
    /// Items per step.
    step: usize,
    /// Items per micro-batch.
    micro: usize,
    /// Maximum number of items in a pass, including skipped ones.
    items: usize,
    share: Share,
}

/// A [`Stream`] without its item type.
pub trait AnyStream<B: Batch>: Send + Sync {
    /// The sizes common to all batches.
    fn spec(&self) -> B::Spec;
    #[doc(hidden)]
    #[expect(private_interfaces, reason = "implemented here alone, for every stream")]
    fn jobs(self: Arc<Self>, pass: Pass, portions: Portions) -> Result<Jobs<B>>;
}

impl<S: Stream + 'static> AnyStream<S::Batch> for S {
    fn spec(&self) -> <S::Batch as Batch>::Spec {
        Stream::spec(self)
    }

    #[expect(private_interfaces, reason = "implemented here alone, for every stream")]
    fn jobs(self: Arc<Self>, pass: Pass, portions: Portions) -> Result<Jobs<S::Batch>> {
        Ok(Box::new(StreamSteps::start(self, pass, portions)?.flatten()))
    }
}

/// The steps of a pass over a stream: of each, the micro-batches that are this rank's share.
struct StreamSteps<S: Stream> {
    stream: Arc<S>,
    pass: Pass,
    portions: Portions,
    items: Peekable<Take<Items<S::Item>>>,
    /// The index of the next sample.
    index: usize,
}

impl<S: Stream + 'static> StreamSteps<S> {
    /// Starts a pass, after the items to skip.
    fn start(stream: Arc<S>, pass: Pass, portions: Portions) -> Result<Self> {
        let (split, skip) = (pass.split.name(), portions.skip);
        let mut items = stream.items(pass)?.take(portions.items).peekable();
        for item in items.by_ref().take(skip) {
            item?;
        }
        if items.peek().is_none() {
            return Err(Error::msg(if skip == 0 {
                format!("the {split} stream is empty")
            } else {
                format!("the {split} stream has nothing after the {skip} samples already trained on")
            }));
        }
        Ok(Self { stream, pass, portions, items, index: skip })
    }

    /// This rank's share of a step with these items.
    fn step(&mut self, items: Vec<S::Item>) -> Vec<Job<S::Batch>> {
        let (step_samples, ends_epoch) = (items.len(), self.items.peek().is_none());
        let mut items = items.into_iter().peekable();
        let mut jobs = Vec::new();
        while items.peek().is_some() {
            let place = Place { number: jobs.len(), ends_step: false, step_samples, ends_epoch };
            let items = items.by_ref().take(self.portions.micro).collect();
            jobs.push(self.micro_batch(items, place));
        }
        self.portions.share.of_step(jobs)
    }

    /// The micro-batch of the next items.
    fn micro_batch(&mut self, items: Vec<S::Item>, place: Place) -> Job<S::Batch> {
        let pass = self.pass;
        let indices = self.index..self.index + items.len();
        self.index = indices.end;
        let samples: Vec<Sample> = indices.map(|index| Sample::new(index, pass)).collect();
        let stream = self.stream.clone();
        let make = move || {
            whole(stream.batch(items, &samples), samples.len()).map_err(|why| unreadable(&samples, &why))
        };
        Job { make: Some(Box::new(make)), place }
    }
}

impl<S: Stream + 'static> Iterator for StreamSteps<S> {
    type Item = Vec<Result<Job<S::Batch>>>;

    fn next(&mut self) -> Option<Self::Item> {
        let items: Result<Vec<S::Item>> = self.items.by_ref().take(self.portions.step).collect();
        match items {
            Ok(items) if items.is_empty() => None,
            Ok(items) => Some(self.step(items).into_iter().map(Ok).collect()),
            Err(error) => Some(vec![Err(Error::msg(format!("after sample {}: {error}", self.index)))]),
        }
    }
}
