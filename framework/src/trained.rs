//! Weights that were trained, and the models that they make.

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

    /// What was trained, and on what, where that is known.
    pub(crate) fn origin(&self) -> Option<&Origin> {
        match self {
            Self::Checkpoint(checkpoint) => checkpoint.state().origin.as_ref(),
            Self::File(_) => None,
        }
    }

    /// The run's seed, where that is known.
    pub(crate) fn seed(&self) -> u64 {
        match self {
            Self::Checkpoint(checkpoint) => checkpoint.state().seed,
            Self::File(_) => 0,
        }
    }

    /// Gives the weights to a model, their averages where the run kept some; returns how far they have been trained, where that
    /// is known.
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
    /// The model of a checkpoint, with its weights, or their averages where the run kept some: to predict with, in any program, where
    /// neither the configuration nor the data is. `path` is a checkpoint, the folder of a run, or that of its versions.
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
    /// Also where the run had no configuration: build the model, and see [`Checkpoint::restore_for_evaluation`].
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

    /// What the module predicts from a batch, (B, ...), on the CPU: of its number type and device it takes care itself.
    pub fn predict(&self, batch: &B) -> Result<Tensor> {
        trainer::predicted(self, batch, &mut Step::evaluation(self.steps, 0, self.seed, false))
    }
}
