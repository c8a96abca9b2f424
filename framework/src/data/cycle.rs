//! A dataset with a different length.

use std::sync::Arc;

use super::{Dataset, Sample};
use crate::batch::Batch;
use crate::error::Result;

/// A dataset truncated or repeated to a length, for callers that read the whole of a dataset.
pub(crate) struct Cycle<B> {
    pub(crate) dataset: Arc<dyn Dataset<Batch = B>>,
    pub(crate) len: usize,
}

impl<B: Batch> Dataset for Cycle<B> {
    type Batch = B;

    fn len(&self) -> usize {
        self.len
    }

    fn spec(&self) -> B::Spec {
        self.dataset.spec()
    }

    fn batch(&self, samples: &[Sample]) -> Result<B> {
        let inside = |sample: &Sample| Sample { index: sample.index % self.dataset.len(), ..*sample };
        self.dataset.batch(&samples.iter().map(inside).collect::<Vec<_>>())
    }
}
