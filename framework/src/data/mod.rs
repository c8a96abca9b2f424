//! Data: samples by index ([`Dataset`]) or in turn ([`Stream`]), their order in an epoch ([`Order`]), and reading ahead.

mod cycle;
mod loader;
mod order;
mod source;

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

pub(crate) use cycle::Cycle;
pub(crate) use loader::{Loaded, Loader, Place};
pub use order::{Order, samples_in_turn};
use schemars::JsonSchema;
use serde::{Serialize, de::DeserializeOwned};
pub use source::{AnyStream, Items, Pass, Source, Stream};
pub(crate) use source::{Share, Start};

use crate::batch::Batch;
use crate::error::{Error, Result};
use crate::seed;

/// Which part of the data: what is learned from, what is watched during training, what is reported at the end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Split {
    /// Learned from.
    Train,
    /// Watched during training.
    Val,
    /// Reported at the end.
    Test,
}

impl Split {
    /// `train`, `val` or `test`.
    pub fn name(self) -> &'static str {
        match self {
            Split::Train => "train",
            Split::Val => "val",
            Split::Test => "test",
        }
    }
}

/// One sample to be read: where it is, and its own source of randomness.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sample {
    /// Position in the dataset, below its length.
    pub index: usize,
    /// The split that the sample belongs to.
    pub split: Split,
    /// The epoch it is read for; 0 in evaluation, so that every evaluation sees the same samples.
    pub epoch: u64,
    /// The run's seed.
    pub seed: u64,
    /// How often the epoch has drawn this sample before; 0 unless sampling is [weighted](Dataset::weights).
    pub repeat: u32,
}

impl Sample {
    /// The sample's own generator, a function of (seed, split, epoch, index, repeat): which thread draws from it, and
    /// when, changes nothing. Generated data and augmentations draw from it.
    pub fn rng(&self) -> seed::ChaCha8Rng {
        seed::generator(
            self.seed,
            [self.split as u64 | u64::from(self.repeat) << 8, self.epoch, self.index as u64],
        )
    }
}

/// Samples that can be read by index, several at once, from any thread.
pub trait Dataset: Send + Sync {
    /// What the samples are collated into; it must be the batch of the module that they train.
    type Batch: Batch;

    /// How many samples an epoch has.
    fn len(&self) -> usize;

    /// What every batch of this dataset looks like: sizes that a module needs to be built.
    fn spec(&self) -> <Self::Batch as Batch>::Spec;

    /// The batch made of these samples, in this order, on the CPU.
    fn batch(&self, samples: &[Sample]) -> Result<Self::Batch>;

    /// Sampling weights for training, one per sample. An epoch then draws [`len`](Self::len) samples with replacement, each
    /// with a probability proportional to its weight; see [`balanced`]. Default: every sample once per epoch.
    fn weights(&self) -> Option<Vec<f64>> {
        None
    }

    /// Whether there is nothing to read.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Weights by which every class is drawn equally often, whatever its share of the samples: for [`Dataset::weights`].
///
/// ```
/// assert_eq!(candlepower::data::balanced(&[0, 1, 1, 1]), [1., 1. / 3., 1. / 3., 1. / 3.]);
/// ```
pub fn balanced(classes: &[u32]) -> Vec<f64> {
    let mut counts = HashMap::new();
    classes.iter().for_each(|class| *counts.entry(class).or_insert(0) += 1);
    classes.iter().map(|class| 1. / f64::from(counts[class])).collect()
}

/// A dataset that is opened from its own section of the configuration file, one split at a time.
pub trait Open: Dataset + Sized + 'static {
    /// The fields of its `[data]` section.
    type Config: Settings;

    /// Opens one split. Everything that can be wrong with the files should be found here, not in mid-training.
    fn open(config: &Self::Config, split: Split) -> Result<Self>;

    /// A batch to predict from, of a file or a folder that a person gave, made as the dataset's samples are. `spec` is the
    /// dataset's; nothing of the dataset itself needs to be there. Default: what [`Batch::read`] reads, as it is.
    fn read(
        _config: &Self::Config,
        spec: &<Self::Batch as Batch>::Spec,
        input: &Path,
    ) -> Result<Self::Batch> {
        Self::Batch::read(input, spec)
    }
}

/// A stream that is opened from its own section of the configuration file, one split at a time.
pub trait OpenStream: Stream + Sized + 'static {
    /// The fields of its `[data]` section.
    type Config: Settings;

    /// Opens one split. Everything that can be wrong with the files should be found here, not in mid-training.
    fn open(config: &Self::Config, split: Split) -> Result<Self>;

    /// A batch to predict from, as [`Open::read`].
    fn read(
        _config: &Self::Config,
        spec: &<Self::Batch as Batch>::Spec,
        input: &Path,
    ) -> Result<Self::Batch> {
        Self::Batch::read(input, spec)
    }
}

/// What the fields of a section can do: be read from TOML, be printed with their defaults, describe themselves.
///
/// Implemented by every type that derives `Serialize`, `Deserialize` and `JsonSchema`.
pub trait Settings: Serialize + DeserializeOwned + JsonSchema + Send + Sync + 'static {}
impl<T: Serialize + DeserializeOwned + JsonSchema + Send + Sync + 'static> Settings for T {}

/// The data of one run: what is learned from, what it is watched on, what is reported at the end.
pub struct Data<B: Batch> {
    /// The training split.
    pub train: Source<B>,
    /// The validation split, where there is one.
    pub val: Option<Source<B>>,
    /// The test split, where there is one.
    pub test: Option<Source<B>>,
    /// Threads that make batches ahead; 0 makes them in the training thread. The batches do not depend on it.
    pub workers: usize,
    /// Micro-batches that each worker may be ahead of training.
    pub prefetch: usize,
}

impl<B: Batch> Data<B> {
    /// Training data alone, made by two workers.
    pub fn new(train: impl Dataset<Batch = B> + 'static) -> Self {
        Self::from_source(Source::Indexed(Arc::new(train)))
    }

    /// The same for a stream.
    pub fn stream(train: impl Stream<Batch = B> + 'static) -> Self {
        Self::from_source(Source::Stream(Arc::new(train)))
    }

    /// The same for a source whose type is not known.
    pub fn from_source(train: Source<B>) -> Self {
        Self { train, val: None, test: None, workers: 2, prefetch: 2 }
    }

    /// Adds data to validate on.
    pub fn val(mut self, val: impl Dataset<Batch = B> + 'static) -> Self {
        self.val = Some(Source::Indexed(Arc::new(val)));
        self
    }

    /// Adds data to test on.
    pub fn test(mut self, test: impl Dataset<Batch = B> + 'static) -> Self {
        self.test = Some(Source::Indexed(Arc::new(test)));
        self
    }

    /// The same for streams: adds one to validate on.
    pub fn val_stream(mut self, val: impl Stream<Batch = B> + 'static) -> Self {
        self.val = Some(Source::Stream(Arc::new(val)));
        self
    }

    /// Adds a stream to test on.
    pub fn test_stream(mut self, test: impl Stream<Batch = B> + 'static) -> Self {
        self.test = Some(Source::Stream(Arc::new(test)));
        self
    }

    /// Sets how many threads make batches ahead.
    pub fn workers(mut self, workers: usize) -> Self {
        self.workers = workers;
        self
    }

    /// The source of a split.
    pub fn split(&self, split: Split) -> Result<&Source<B>> {
        let source = match split {
            Split::Train => Some(&self.train),
            Split::Val => self.val.as_ref(),
            Split::Test => self.test.as_ref(),
        };
        source.ok_or_else(|| Error::msg(format!("there is no {} data", split.name())))
    }
}
