//! Where samples come from: [`Dataset`]s read by index, [`Stream`]s read in turn; and the passes over them.

use std::sync::Arc;

use super::loader::{Job, Place};
use super::{Dataset, Order, Sample, Split, samples_in_turn};
use crate::batch::Batch;
use crate::error::{Error, Result};

/// Samples that come one after the other, in a number that nobody knows before: an archive, a queue, a generator.
///
/// Where samples can be read by index, a [`Dataset`] shuffles them and resumes at once; a stream is read in the order in
/// which it comes, and a resumed run reads and drops what it has had.
pub trait Stream: Send + Sync {
    /// What the samples are collated into.
    type Batch: Batch;
    /// What is read in turn, as small as can be: a line, a file's name, compressed bytes.
    type Item: Send;

    /// What every batch of this stream looks like: sizes that a module needs to be built.
    fn spec(&self) -> <Self::Batch as Batch>::Spec;

    /// The items of one pass. The same pass must give the same items, for a run to be resumed and repeated.
    fn items(&self, pass: Pass) -> Result<Items<Self::Item>>;

    /// The batch made of these items, on the CPU. Called by several workers at once: the costly part belongs here.
    fn batch(&self, items: Vec<Self::Item>, samples: &[Sample]) -> Result<Self::Batch>;
}

/// What a [`Stream`] reads.
pub type Items<T> = Box<dyn Iterator<Item = Result<T>> + Send>;

/// One pass over data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pass {
    /// The split that is read.
    pub split: Split,
    /// The epoch; 0 in evaluation.
    pub epoch: u64,
    /// The run's seed.
    pub seed: u64,
}

/// A dataset or a stream.
pub enum Source<B: Batch> {
    /// Samples by index.
    Indexed(Arc<dyn Dataset<Batch = B>>),
    /// Samples in turn.
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

/// Where training goes on in its data, and in what portions.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Start {
    pub(crate) epoch: u64,
    pub(crate) step_in_epoch: u64,
    pub(crate) samples_in_epoch: u64,
    /// Samples that one device takes at once.
    pub(crate) micro_batch_size: usize,
    pub(crate) share: Share,
}

/// Which micro-batches are a rank's: of each step, and of an evaluation, every `of`-th one from number `rank` on. So the
/// micro-batches are the same for any number of ranks.
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
    /// This rank's of a step's micro-batches. Where there is none for it, one without samples: every rank hears of every
    /// step.
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
    /// What every batch looks like.
    pub fn spec(&self) -> B::Spec {
        match self {
            Self::Indexed(dataset) => dataset.spec(),
            Self::Stream(stream) => stream.spec(),
        }
    }

    /// How many samples there are, where that is known.
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
                    let pass = Pass { split: Split::Train, epoch, seed };
                    let portions = Portions { skip: std::mem::take(&mut skip), step, micro, items, share };
                    stream
                        .clone()
                        .jobs(pass, portions)
                        .unwrap_or_else(|error| Box::new([Err(error)].into_iter()))
                }))
            }
        }
    }

    /// One pass over the first `samples` of the data, in batches of which `share` is made.
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
                let batches = samples_in_turn(pass.split, pass.seed, len, batch_size);
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
                // Perhaps it is one of them.
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

/// A batch of so many samples: of all that were asked for, as each counts as much in the loss. Else why it is none.
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

/// How a stream is cut.
#[derive(Debug, Clone, Copy)]
pub struct Portions {
    /// Items that are read and dropped first.
    skip: usize,
    /// Items of one step.
    step: usize,
    /// Items of one micro-batch.
    micro: usize,
    /// Items of a pass, at most, the skipped ones included.
    items: usize,
    share: Share,
}

/// A [`Stream`] whose items nobody needs to name.
pub trait AnyStream<B: Batch>: Send + Sync {
    /// What every batch of this stream looks like.
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
        let mut items = self.items(pass)?.take(portions.items).peekable();
        for item in items.by_ref().take(portions.skip) {
            item?;
        }
        if items.peek().is_none() {
            let (split, skip) = (pass.split.name(), portions.skip);
            return Err(Error::msg(match skip {
                0 => format!("the {split} stream is empty"),
                _ => {
                    format!("the {split} stream has nothing after the {skip} samples already trained on")
                }
            }));
        }
        let mut index = portions.skip;
        Ok(Box::new(
            std::iter::from_fn(move || {
                let step: Result<Vec<S::Item>> = items.by_ref().take(portions.step).collect();
                match step {
                    Err(error) => Some(vec![Err(Error::msg(format!("after sample {index}: {error}")))]),
                    Ok(step) if step.is_empty() => None,
                    Ok(step) => {
                        let (step_samples, ends_epoch) = (step.len(), items.peek().is_none());
                        let mut jobs = Vec::new();
                        let mut step = step.into_iter().peekable();
                        while step.peek().is_some() {
                            let items: Vec<_> = step.by_ref().take(portions.micro).collect();
                            let sample = |index| Sample {
                                index,
                                split: pass.split,
                                epoch: pass.epoch,
                                seed: pass.seed,
                                repeat: 0,
                            };
                            let samples: Vec<Sample> = (index..index + items.len()).map(sample).collect();
                            index += items.len();
                            let stream = self.clone();
                            let make = move || {
                                whole(stream.batch(items, &samples), samples.len())
                                    .map_err(|why| unreadable(&samples, &why))
                            };
                            let number = jobs.len();
                            let place = Place { number, ends_step: false, step_samples, ends_epoch };
                            jobs.push(Job { make: Some(Box::new(make) as _), place });
                        }
                        Some(portions.share.of_step(jobs).into_iter().map(Ok).collect())
                    }
                }
            })
            .flatten(),
        ))
    }
}
