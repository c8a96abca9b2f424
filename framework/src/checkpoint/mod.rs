//! Checkpoints: everything a run needs to continue as if it had never stopped.
//!
//! A checkpoint is a folder named after its step. It is written under a temporary name, synced, and renamed,
//! so each folder `<step>/` is complete at any time. Its manifest holds the size and the hash of every file;
//! a checkpoint that does not match its manifest is not loaded. Next to the folders, `last` and `best` are
//! links, `validations.json` records the best validations, and `<step>.old/` is a checkpoint set aside by a
//! run that resumed from an earlier step.

mod files;
mod saver;
pub(crate) mod values;

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use candle_core::{Device, Tensor, Var};
pub use files::latest;
use indexmap::IndexMap;
pub(crate) use saver::Saver;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::callback::Progress;
use crate::error::{Error, Result};
use crate::metrics::{Criterion, Sums};
use crate::optim::Average;
use crate::precision::LossScale;
use crate::schedule::PlateauState;
use crate::trainer::duration;

const MODEL: &str = "model.safetensors";
const OPTIMIZER: &str = "optimizer.safetensors";
const AVERAGE: &str = "average.safetensors";
const STATE: &str = "state.json";

/// Fields of `[checkpoint]`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct CheckpointConfig {
    /// Steps between checkpoints. Without this and `every_time`, every validated step is saved or, without
    /// validation data, the last step of every epoch. The end of training, the best validations, and the
    /// progress before an error are always saved.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub every_steps: Option<u64>,
    /// Time between checkpoints, for example `"10 min"`.
    #[serde(default, with = "duration", skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<String>")]
    pub every_time: Option<Duration>,
    /// Number of newest checkpoints to keep, in addition to the best ones.
    pub keep_last: usize,
    /// Number of best checkpoints to keep.
    pub keep_best: usize,
    /// Validation metric that determines the best checkpoints.
    pub monitor: String,
    /// Whether larger values of that metric are better; otherwise smaller ones are.
    pub maximize: bool,
}

impl Default for CheckpointConfig {
    fn default() -> Self {
        Self {
            every_steps: None,
            every_time: None,
            keep_last: 2,
            keep_best: 1,
            monitor: "loss".into(),
            maximize: false,
        }
    }
}

impl CheckpointConfig {
    /// Refuses invalid settings.
    pub fn check(&self) -> Result<()> {
        if self.keep_last == 0 {
            return Err(Error::setting("keep_last", "expected at least 1, found 0"));
        }
        if self.every_steps == Some(0) {
            return Err(Error::setting("every_steps", "expected at least 1, found 0"));
        }
        Ok(())
    }
}

/// The state of a run, apart from tensors.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct State {
    /// How far training had come.
    pub progress: Progress,
    /// Whether the validation due at this step is pending, because it was interrupted or failed.
    pub owes_validation: bool,
    /// The run's seed for the order of samples, augmentation and noise.
    pub seed: u64,
    /// The best validations so far, best first.
    pub best: Vec<Best>,
    /// The criterion for `best`.
    pub best_by: Option<Criterion>,
    /// The plateau's factor on the learning rate; absent without a plateau.
    pub lr_scale: Option<f64>,
    /// The plateau's state.
    pub plateau: PlateauState,
    /// The criterion that the plateau watches.
    pub plateau_of: Option<Criterion>,
    /// The fp16 loss scale.
    pub loss_scale: Option<LossScale>,
    /// The number of steps that each optimizer has taken, by name.
    pub optimizer_steps: IndexMap<String, u64>,
    /// The number of updates of the weight average.
    pub average_updates: u64,
    /// Seconds of training, if `max_time` limits the run.
    pub seconds: Option<f64>,
    /// Each rank's sums of the metrics of an unfinished epoch: name, and the bits of the f64 sum and weight.
    pub epoch_metrics: Vec<Sums>,
    /// The state of each callback, by name.
    pub callbacks: IndexMap<String, serde_json::Value>,
    /// What was trained on which data, if there is a configuration.
    pub origin: Option<Origin>,
}

/// The origin of a run: enough to predict with its weights without access to its data.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Origin {
    /// The configuration, as TOML with every default written out.
    pub config: String,
    /// The [`Spec`](crate::batch::Batch::Spec) of the data's batches.
    pub spec: serde_json::Value,
}

/// One of the best validations.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Best {
    /// The step of the validation.
    pub step: u64,
    /// The monitored metric; absent if it was NaN.
    pub value: Option<f64>,
}

/// The contents of a checkpoint: copies, so training continues while they are written.
pub struct Snapshot {
    /// The tensor files: file name, and tensors by name.
    tensors: Vec<(&'static str, Vec<(String, Tensor)>)>,
    state: State,
}

impl Snapshot {
    /// Copies the model's parameters and buffers, the optimizer state, and the averages, if there are any.
    pub fn take(
        model: &[(String, Var)],
        optimizer: &[(String, Var)],
        average: Option<&[(String, Var)]>,
        state: State,
    ) -> Result<Self> {
        let copy = |vars: &[(String, Var)]| -> Result<Vec<(String, Tensor)>> {
            let copy = |(name, var): &(String, Var)| {
                let tensor = var.as_detached_tensor();
                let copy =
                    if tensor.device().is_cpu() { tensor.copy() } else { tensor.to_device(&Device::Cpu) };
                Ok((name.clone(), copy?))
            };
            vars.iter().map(copy).collect()
        };
        let mut tensors = vec![(MODEL, copy(model)?), (OPTIMIZER, copy(optimizer)?)];
        if let Some(average) = average {
            tensors.push((AVERAGE, copy(average)?));
        }
        Ok(Self { tensors, state })
    }

    /// Writes this checkpoint into the folder `dir`, completely or not at all; returns its path.
    pub fn write(&self, dir: &Path) -> Result<PathBuf> {
        let target = dir.join(self.state.progress.step.to_string());
        let mut contents = Vec::new();
        for (name, tensors) in &self.tensors {
            contents.push((*name, serialize(tensors)?));
        }
        contents.push((STATE, serde_json::to_vec_pretty(&self.state).map_err(Error::content(&target))?));
        files::write(&target, &contents)?;
        Ok(target)
    }
}

/// A checkpoint read from disk.
#[derive(Debug)]
pub struct Checkpoint {
    path: PathBuf,
    params: HashMap<String, Tensor>,
    optimizer: HashMap<String, Tensor>,
    average: Option<HashMap<String, Tensor>>,
    state: State,
}

impl Checkpoint {
    /// Reads a checkpoint folder after verifying it against its manifest.
    pub fn load(path: &Path) -> Result<Self> {
        files::verify(path)?;
        let tensors = |file: &str| {
            let file = path.join(file);
            candle_core::safetensors::load(&file, &Device::Cpu).map_err(Error::content(&file))
        };
        let state = std::fs::read(path.join(STATE)).map_err(Error::file(path.join(STATE)))?;
        Ok(Self {
            path: path.to_path_buf(),
            params: tensors(MODEL)?,
            optimizer: tensors(OPTIMIZER)?,
            average: path.join(AVERAGE).exists().then(|| tensors(AVERAGE)).transpose()?,
            state: serde_json::from_slice(&state).map_err(Error::content(path.join(STATE)))?,
        })
    }

    /// The run's state, apart from tensors.
    pub fn state(&self) -> &State {
        &self.state
    }

    /// Sets these parameters and buffers, [`Params::state_dict`](crate::params::Params::state_dict), to the
    /// checkpoint's values.
    pub fn restore_params(&self, params: &[(String, Var)]) -> Result<()> {
        self.copy("parameter", &self.params, params)
    }

    /// Sets these parameters and buffers to the values for evaluation and prediction: the averages, if the
    /// run kept any.
    pub fn restore_for_evaluation(&self, params: &[(String, Var)]) -> Result<()> {
        self.copy("parameter", &self.evaluated(), params)
    }

    /// The values for evaluation and prediction, by name.
    pub(crate) fn evaluated(&self) -> HashMap<String, Tensor> {
        let mut values = self.params.clone();
        if self.state.average_updates > 0 {
            values.extend(self.average.clone().unwrap_or_default());
        }
        values
    }

    /// Sets this optimizer state to the checkpoint's values.
    pub(crate) fn restore_optimizer(&self, optimizer: &[(String, Var)]) -> Result<()> {
        let differences = values::differences(&self.optimizer, optimizer);
        if !differences.is_empty() {
            return Err(Error::msg(format!(
                "{}: this checkpoint is of another optimizer; their states differ:\n  {}\n\
                 resume with the optimizer in the run's `config.toml`, or start from these weights only, with [init]",
                self.path.display(),
                values::listed(differences),
            )));
        }
        values::copy(&self.optimizer, optimizer)
    }

    /// Sets these averages to the checkpoint's values. If it has none, nothing changes.
    pub(crate) fn restore_average(&self, average: &mut Average) -> Result<()> {
        if let Some(saved) = &self.average {
            self.copy("averaged parameter", saved, average.averages())?;
            average.updates = self.state.average_updates;
        }
        Ok(())
    }

    /// Copies `saved` into `vars`. If their names or shapes differ, copies nothing and returns an error.
    fn copy(&self, what: &str, saved: &HashMap<String, Tensor>, vars: &[(String, Var)]) -> Result<()> {
        let differences = values::differences(saved, vars);
        if !differences.is_empty() {
            return Err(Error::msg(format!(
                "{}: this checkpoint is of another model; its {what}s differ:\n  {}\n\
                 use the configuration it was trained with: `config.toml` in its run's folder",
                self.path.display(),
                values::listed(differences),
            )));
        }
        values::copy(saved, vars)
    }
}

/// Tensors as the bytes of a safetensors file, sorted by name, so equal states give equal files.
fn serialize(tensors: &[(String, Tensor)]) -> Result<Vec<u8>> {
    let views = tensors.iter().map(|(name, tensor)| (name, tensor));
    safetensors::serialize(views, None).map_err(|error| Error::msg(error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn var(name: &str, values: &[f32]) -> (String, Var) {
        (name.to_string(), Var::new(values, &Device::Cpu).unwrap())
    }

    fn save(dir: &Path, step: u64, params: &[(String, Var)]) -> PathBuf {
        let state = State {
            progress: Progress { step, ..Default::default() },
            seed: 3,
            best: vec![Best { step, value: Some(0.5) }],
            ..State::default()
        };
        let snapshot = Snapshot::take(params, &[var("m.w", &[9.])], None, state).unwrap();
        snapshot.write(dir).unwrap()
    }

    #[test]
    fn what_is_saved_is_restored() {
        let dir = tempfile::tempdir().unwrap();
        let path = save(dir.path(), 7, &[var("w", &[1., 2.])]);
        let (params, optimizer) = ([var("w", &[0., 0.])], [var("m.w", &[0.])]);
        let checkpoint = Checkpoint::load(&path).unwrap();
        checkpoint.restore_params(&params).unwrap();
        checkpoint.restore_optimizer(&optimizer).unwrap();
        let state = checkpoint.state();
        assert_eq!((state.progress.step, state.seed, state.best[0].value), (7, 3, Some(0.5)));
        assert_eq!(params[0].1.to_vec1::<f32>().unwrap(), [1., 2.]);
        assert_eq!(optimizer[0].1.to_vec1::<f32>().unwrap(), [9.]);
    }

    #[test]
    fn evaluation_uses_the_averages_where_there_are_any() {
        let dir = tempfile::tempdir().unwrap();
        for (updates, expected) in [(0, [1., 2.]), (5, [3., 2.])] {
            let state = State { average_updates: updates, ..State::default() };
            let params = [var("w", &[1.]), var("frozen", &[2.])];
            let path = Snapshot::take(&params, &[], Some(&[var("w", &[3.])]), state)
                .unwrap()
                .write(dir.path())
                .unwrap();
            let read = [var("w", &[0.]), var("frozen", &[0.])];
            Checkpoint::load(&path).unwrap().restore_for_evaluation(&read).unwrap();
            assert_eq!(read.each_ref().map(|(_, v)| v.to_vec1::<f32>().unwrap()[0]), expected);
        }
    }

    #[test]
    fn another_models_checkpoint_is_refused_and_changes_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let path = save(dir.path(), 1, &[var("a", &[1.]), var("b", &[1., 2.]), var("c", &[1.])]);
        let params = [var("a", &[0.]), var("b", &[0.]), var("d", &[0.])];
        let error = Checkpoint::load(&path).unwrap().restore_params(&params).unwrap_err().to_string();
        let expected = "this checkpoint is of another model; its parameters differ:\n  \
                        `b` has shape [2], the model needs [1]\n  `d` is missing\n  `c` is not in the model\n\
                        use the configuration";
        assert!(error.contains(expected), "{error}");
        assert_eq!(params[0].1.to_vec1::<f32>().unwrap(), [0.]);
    }

    #[test]
    fn a_damaged_checkpoint_is_passed_over_for_the_last_good_one() {
        let dir = tempfile::tempdir().unwrap();
        for step in [5, 10] {
            save(dir.path(), step, &[var("w", &[step as f32])]);
        }
        assert_eq!(latest(dir.path()).unwrap(), Some(dir.path().join("10")));
        let file = dir.path().join("10").join(MODEL);
        let mut bytes = std::fs::read(&file).unwrap();
        *bytes.last_mut().unwrap() ^= 1;
        std::fs::write(&file, bytes).unwrap();
        let error = Checkpoint::load(&dir.path().join("10")).unwrap_err().to_string();
        assert!(
            error.ends_with("model.safetensors: the file is damaged: its hash is not the manifest's"),
            "{error}"
        );
        assert_eq!(latest(dir.path()).unwrap(), Some(dir.path().join("5")));
        std::fs::remove_file(dir.path().join("5").join(STATE)).unwrap();
        let error = latest(dir.path()).unwrap_err().to_string();
        assert!(
            error.starts_with("all checkpoints in ") && error.contains("10/model.safetensors"),
            "{error}"
        );
        assert_eq!(latest(&dir.path().join("elsewhere")).unwrap(), None);
    }
}
