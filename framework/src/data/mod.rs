//! Data: samples by index ([`Dataset`]) or in sequence ([`Stream`]), their order in an epoch ([`Order`]), and
//! prefetching.

mod cycle;
mod loader;
mod order;
mod source;

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

pub(crate) use cycle::Cycle;
pub(crate) use loader::{Loaded, Loader, Place};
pub use order::{Order, sequential_batches};
use schemars::JsonSchema;
use serde::{Serialize, de::DeserializeOwned};
pub use source::{AnyStream, Items, Pass, Source, Stream};
pub(crate) use source::{Share, Start};

use crate::batch::Batch;
use crate::error::{Error, Result};
use crate::seed;

/// A part of the data: for training, for validation during training, or for testing at the end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Split {
    /// Training data.
    Train,
    /// Validation data, evaluated during training.
    Val,
    /// Test data, evaluated at the end.
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

/// A sample to read: its position and its source of randomness.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sample {
    /// Position in the dataset, less than its length.
    pub index: usize,
    /// The split that the sample belongs to.
    pub split: Split,
    /// The epoch it is read for; 0 in evaluation, so every evaluation sees the same samples.
    pub epoch: u64,
    /// The run's seed.
    pub seed: u64,
    /// How often the epoch has drawn this sample before; 0 unless sampling is [weighted](Dataset::weights).
    pub repeat: u32,
    /// Whether augmentations apply: in training, but not if the training split is evaluated.
    pub augment: bool,
}

impl Sample {
    /// A sample of a pass, drawn for the first time.
    pub fn new(index: usize, pass: Pass) -> Self {
        let Pass { split, epoch, seed, augment } = pass;
        Self { index, split, epoch, seed, repeat: 0, augment }
    }

    /// The sample's random generator, a function of (seed, split, epoch, index, repeat) and thus independent of
    /// threads and timing. Use it for generated data and augmentations.
    pub fn rng(&self) -> seed::ChaCha8Rng {
        seed::generator(
            self.seed,
            [self.split as u64 | u64::from(self.repeat) << 8, self.epoch, self.index as u64],
        )
    }
}

/// Samples that can be read by index, several at once and from any thread.
pub trait Dataset: Send + Sync {
    /// The batch type that samples are collated into; must match the module's.
    type Batch: Batch;

    /// Number of samples in an epoch.
    fn len(&self) -> usize;

    /// The sizes common to all batches, which a module needs to be built.
    fn spec(&self) -> <Self::Batch as Batch>::Spec;

    /// Collates these samples, in this order, into a batch on the CPU.
    fn batch(&self, samples: &[Sample]) -> Result<Self::Batch>;

    /// Sampling weights for training, one per sample. An epoch then draws [`len`](Self::len) samples with replacement, each
    /// with a probability proportional to its weight; see [`balanced_weights`]. Default: every sample once per epoch.
    fn weights(&self) -> Option<Vec<f64>> {
        None
    }

    /// Whether there is nothing to read.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

fn json(spec: &impl Serialize) -> Result<serde_json::Value> {
    serde_json::to_value(spec).map_err(|error| Error::msg(format!("the sizes of the data: {error}")))
}

/// Inverse class frequencies, for [`Dataset::weights`]: every class is drawn equally often.
///
/// ```
/// assert_eq!(candlepower::data::balanced_weights(&[0, 1, 1, 1]), [1., 1. / 3., 1. / 3., 1. / 3.]);
/// ```
pub fn balanced_weights(classes: &[u32]) -> Vec<f64> {
    let mut counts = HashMap::new();
    classes.iter().for_each(|class| *counts.entry(class).or_insert(0) += 1);
    classes.iter().map(|class| 1. / f64::from(counts[class])).collect()
}

/// A dataset that is opened from its own section of the configuration file, one split at a time.
pub trait Open: Dataset + Sized + 'static {
    /// The fields of its `[data]` section.
    type Config: Settings;

    /// Opens one split. Invalid files should be detected here rather than during training.
    fn open(config: &Self::Config, split: Split) -> Result<Self>;

    /// Reads a batch to predict from, from a user-supplied file or folder, with the same processing as the
    /// dataset's samples. `spec` is the dataset's; the dataset itself need not be present. By default, reads
    /// it with [`Batch::read`].
    fn read(
        _config: &Self::Config,
        spec: &<Self::Batch as Batch>::Spec,
        input: &Path,
    ) -> Result<Self::Batch> {
        Self::Batch::read(input, spec)
    }
}

/// A stream opened from its own section of the configuration file, one split at a time.
pub trait OpenStream: Stream + Sized + 'static {
    /// The fields of its `[data]` section.
    type Config: Settings;

    /// Opens one split. Invalid files should be detected here rather than during training.
    fn open(config: &Self::Config, split: Split) -> Result<Self>;

    /// Reads a batch to predict from, like [`Open::read`].
    fn read(
        _config: &Self::Config,
        spec: &<Self::Batch as Batch>::Spec,
        input: &Path,
    ) -> Result<Self::Batch> {
        Self::Batch::read(input, spec)
    }
}

/// Settings of a section: can be read from TOML, written with their defaults, and described by a JSON Schema.
///
/// Implemented by every type that derives `Serialize`, `Deserialize` and `JsonSchema`.
pub trait Settings: Serialize + DeserializeOwned + JsonSchema + Send + Sync + 'static {}
impl<T: Serialize + DeserializeOwned + JsonSchema + Send + Sync + 'static> Settings for T {}

/// The data of a run: for training, validation and testing.
pub struct Data<B: Batch> {
    /// The training split.
    pub train: Source<B>,
    /// The validation split, if any.
    pub val: Option<Source<B>>,
    /// The test split, if any.
    pub test: Option<Source<B>>,
    /// Threads that prefetch batches; with 0, the training thread makes them. The batches do not depend on
    /// it.
    pub workers: usize,
    /// Micro-batches that each worker may prefetch.
    pub prefetch: usize,
}

impl<B: Batch> Data<B> {
    /// Training data only, read by two workers.
    pub fn new(train: impl Dataset<Batch = B> + 'static) -> Self {
        Self::from_source(Source::Indexed(Arc::new(train)))
    }

    /// Like [`new`](Self::new), for a stream.
    pub fn stream(train: impl Stream<Batch = B> + 'static) -> Self {
        Self::from_source(Source::Stream(Arc::new(train)))
    }

    /// Like [`new`](Self::new), for a [`Source`].
    pub fn from_source(train: Source<B>) -> Self {
        Self { train, val: None, test: None, workers: 2, prefetch: 2 }
    }

    /// Adds validation data.
    pub fn val(mut self, val: impl Dataset<Batch = B> + 'static) -> Self {
        self.val = Some(Source::Indexed(Arc::new(val)));
        self
    }

    /// Adds test data.
    pub fn test(mut self, test: impl Dataset<Batch = B> + 'static) -> Self {
        self.test = Some(Source::Indexed(Arc::new(test)));
        self
    }

    /// Adds a validation stream.
    pub fn val_stream(mut self, val: impl Stream<Batch = B> + 'static) -> Self {
        self.val = Some(Source::Stream(Arc::new(val)));
        self
    }

    /// Adds a test stream.
    pub fn test_stream(mut self, test: impl Stream<Batch = B> + 'static) -> Self {
        self.test = Some(Source::Stream(Arc::new(test)));
        self
    }

    /// Sets the number of threads that prefetch batches.
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

    /// The source of a split to evaluate.
    ///
    /// # Errors
    /// If there is nothing to read, or its batches differ from the training data's, for which the module is built.
    pub(crate) fn evaluated(&self, split: Split) -> Result<&Source<B>> {
        let (source, name) = (self.split(split)?, split.name());
        if source.is_empty() {
            return Err(Error::msg(format!("the {name} data is empty")));
        }
        let (found, expected) = (source.spec(), self.train.spec());
        if json(&found)? != json(&expected)? {
            return Err(Error::msg(format!(
                "the {name} data differs from the training data: expected {expected:?}, found {found:?}"
            )));
        }
        Ok(source)
    }
}
