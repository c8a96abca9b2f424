//! Trained weights, and loading a model with them.

use std::path::Path;

use candle_core::{Device, Tensor};

use crate::batch::Batch;
use crate::callback::Progress;
use crate::checkpoint::{Checkpoint, Origin};
use crate::config::Document;
use crate::error::{Error, Result};
use crate::module::{Build, Model, Step};
use crate::run_dir::RunDir;
use crate::trainer;
use crate::weights::Weights;

/// A checkpoint, or a file of weights.
pub(crate) enum Trained {
    Checkpoint(Box<Checkpoint>),
    File(Weights),
}

impl Trained {
    /// Reads a checkpoint, the last good one of a run's folder, or a file of weights.
    pub(crate) fn read(path: &Path) -> Result<Self> {
        match path.is_file() {
            true => Ok(Self::File(Weights::read(path)?)),
            false => Ok(Self::Checkpoint(Box::new(Checkpoint::load(&RunDir::containing(path)?.1)?))),
        }
    }

    /// The configuration and data sizes of the training, if known.
    pub(crate) fn origin(&self) -> Option<&Origin> {
        match self {
            Self::Checkpoint(checkpoint) => checkpoint.state().origin.as_ref(),
            Self::File(_) => None,
        }
    }

    /// The run's seed, or 0 if unknown.
    pub(crate) fn seed(&self) -> u64 {
        match self {
            Self::Checkpoint(checkpoint) => checkpoint.state().seed,
            Self::File(_) => 0,
        }
    }

    /// Loads the weights into a model: their averages, if the run kept any. Returns how far they have been
    /// trained, or the default if unknown.
    pub(crate) fn give<B: Batch>(&self, model: &Model<B>) -> Result<Progress> {
        match self {
            Self::Checkpoint(checkpoint) => {
                checkpoint.restore_for_evaluation(&model.params().state_dict())?;
                model.params().publish()?;
                Ok(checkpoint.state().progress)
            }
            Self::File(weights) => {
                weights.give(model.params())?;
                Ok(Progress::default())
            }
        }
    }
}

impl<B: Batch> Model<B> {
    /// Loads the model of a checkpoint with its weights, or their averages if the run kept any, to predict
    /// with it in any program. Needs neither the configuration file nor the data. `path` is a checkpoint, a
    /// run's folder, or the folder of its versions.
    ///
    /// ```no_run
    /// # use candlepower::prelude::*;
    /// # fn example<M: Build<Batch = Video>>(clip: &Video) -> Result<()> {
    /// let model = Model::load::<M>("runs/moving_mnist", &Device::Cpu)?;
    /// let frames = model.predict(clip)?;
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    /// Also if the run had no configuration. Then build the model and use
    /// [`Checkpoint::restore_for_evaluation`].
    pub fn load<M: Build<Batch = B>>(path: impl AsRef<Path>, device: &Device) -> Result<Self> {
        let path = path.as_ref();
        let trained = Trained::read(path)?;
        let Some(Origin { config, spec }) = trained.origin() else {
            let message =
                "it does not record what was trained; only checkpoints of runs from a configuration do";
            return Err(Error::msg(format!("{}: {message}", path.display())));
        };
        let spec: B::Spec = serde_json::from_value(spec.clone()).map_err(Error::content(path))?;
        let document = Document::parse(&path.display().to_string(), config.clone(), &[])?;
        let config: M::Config = document.fields(&document.named("module", None)?)?;
        let seed = trained.seed();
        let mut model = Self::new(move |vb| M::build(&config, &spec, vb), seed, device)?;
        model.steps = trained.give(&model)?.step;
        Ok(model)
    }

    /// Predicts from a batch; returns (B, ...) on the CPU. Converts the batch to the model's type and device
    /// itself.
    pub fn predict(&self, batch: &B) -> Result<Tensor> {
        trainer::predicted(self, batch, &mut Step::evaluation(self.steps, 0, self.seed, false))
    }
}
