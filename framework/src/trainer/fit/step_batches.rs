//! The micro-batches of the current step.

use std::sync::Arc;

use super::phase;
use crate::batch::Batch;
use crate::data::{Loaded, Loader};
use crate::error::{Error, Result};

/// The micro-batches of the current step, loaded when they are first needed.
pub(super) struct StepBatches<B: Batch> {
    loader: Loader<B>,
    /// Whether a second optimizer or another attempt may need them again.
    keeps: bool,
    kept: Vec<Arc<Loaded<B>>>,
}

impl<B: Batch> StepBatches<B> {
    /// The batches of `loader`; `keeps`: each may be needed several times in its step.
    pub(super) fn new(loader: Loader<B>, keeps: bool) -> Self {
        Self { loader, keeps, kept: Vec::new() }
    }

    /// Micro-batch number `index` of this step: the kept one, otherwise the loader's next.
    pub(super) fn get(&mut self, index: usize) -> Result<Arc<Loaded<B>>> {
        if let Some(kept) = self.kept.get(index) {
            return Ok(kept.clone());
        }
        let _phase = phase!("data_wait");
        let loaded = self.loader.next().ok_or_else(|| Error::msg("the training data ended"))?;
        let loaded = Arc::new(loaded?);
        if self.keeps {
            self.kept.push(loaded.clone());
        }
        Ok(loaded)
    }

    /// Drops the kept ones, because their step is complete.
    pub(super) fn clear(&mut self) {
        self.kept.clear();
    }
}
