//! Checkpoints: everything a run needs to go on as if it had never stopped.
//!
//! A checkpoint is a folder named after its step. It is written beside its place, synced, and renamed, so at every
//! instant each folder `<step>/` is complete. Its manifest holds the size and the hash of every file; a checkpoint
//! that does not agree with its manifest is not loaded.

mod files;

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor, Var};
pub use files::{latest, mark_best};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::callback::Progress;
use crate::error::{Error, Result};
use crate::schedule::PlateauState;

const MODEL: &str = "model.safetensors";
const OPTIMIZER: &str = "optimizer.safetensors";
const STATE: &str = "state.json";

/// Fields of `[checkpoint]`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct CheckpointConfig {
    /// Saves every so many steps. The end of training, and every best validation, are saved in any case.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub every_steps: Option<u64>,
    /// How many of the newest checkpoints stay on disk; the best one stays besides.
    pub keep_last: usize,
}

impl Default for CheckpointConfig {
    fn default() -> Self {
        Self { every_steps: None, keep_last: 2 }
    }
}

impl CheckpointConfig {
    /// Refuses values that would lose the run.
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

/// What a run remembers besides tensors.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct State {
    /// How far training had come.
    pub progress: Progress,
    /// The run's seed: order, augmentation and noise depend on it.
    pub seed: u64,
    /// The lowest validation loss so far.
    pub best_loss: Option<f64>,
    /// The learning rate before the schedule, where a plateau may have lowered it.
    pub lr: Option<f64>,
    /// What the plateau remembers.
    pub plateau: PlateauState,
}

/// What a checkpoint is made of, borrowed from a running training.
pub struct Snapshot<'a> {
    /// Parameters by name.
    pub params: &'a [(String, Var)],
    /// Optimizer state by name.
    pub optimizer: &'a [(String, Var)],
    /// Everything else.
    pub state: &'a State,
}

impl Snapshot<'_> {
    /// Writes the checkpoint of this step into the folder `dir`, points the link `last` to it and removes old ones.
    /// Returns its path.
    pub fn save(&self, dir: &Path, config: &CheckpointConfig) -> Result<PathBuf> {
        let step = self.state.progress.step;
        let target = dir.join(step.to_string());
        let state = serde_json::to_vec_pretty(self.state).map_err(Error::content(&target))?;
        let contents =
            [(MODEL, serialize(self.params)?), (OPTIMIZER, serialize(self.optimizer)?), (STATE, state)];
        files::write(&target, &contents)?;
        files::link(dir, "last", step)?;
        files::prune(dir, config.keep_last)?;
        Ok(target)
    }
}

/// A checkpoint read from disk.
#[derive(Debug)]
pub struct Checkpoint {
    path: PathBuf,
    params: HashMap<String, Tensor>,
    optimizer: HashMap<String, Tensor>,
    state: State,
}

impl Checkpoint {
    /// Reads a checkpoint folder, after checking it against its manifest.
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
            state: serde_json::from_slice(&state).map_err(Error::content(path.join(STATE)))?,
        })
    }

    /// What the run remembered besides tensors.
    pub fn state(&self) -> &State {
        &self.state
    }

    /// Gives these parameters the checkpoint's values.
    pub fn restore_params(&self, params: &[(String, Var)]) -> Result<()> {
        self.copy("parameter", &self.params, params)
    }

    /// Gives these parameters and this optimizer the checkpoint's values; returns the rest.
    pub fn restore(&self, params: &[(String, Var)], optimizer: &[(String, Var)]) -> Result<State> {
        self.restore_params(params)?;
        self.copy("optimizer state", &self.optimizer, optimizer)?;
        Ok(self.state.clone())
    }

    /// Copies `saved` into `vars` where both hold the same names with the same shapes; nothing is copied otherwise.
    fn copy(&self, what: &str, saved: &HashMap<String, Tensor>, vars: &[(String, Var)]) -> Result<()> {
        let mut differences = Vec::new();
        for (name, var) in vars {
            match saved.get(name) {
                None => differences.push(format!("`{name}` is missing")),
                Some(tensor) if tensor.shape() != var.shape() => differences.push(format!(
                    "`{name}` has shape {:?}, the model needs {:?}",
                    tensor.dims(),
                    var.dims()
                )),
                Some(_) => {}
            }
        }
        let mut unknown: Vec<&String> =
            saved.keys().filter(|name| vars.iter().all(|(known, _)| known != *name)).collect();
        unknown.sort();
        differences.extend(unknown.iter().map(|name| format!("`{name}` is not in the model")));
        if !differences.is_empty() {
            const SHOWN: usize = 6;
            let more = match differences.len().saturating_sub(SHOWN) {
                0 => String::new(),
                more => format!("\n  and {more} more"),
            };
            differences.truncate(SHOWN);
            return Err(Error::msg(format!(
                "{}: this checkpoint is of another model; its {what}s differ:\n  {}{more}\n\
                 use the configuration that it was trained with: `config.toml` in its run's folder",
                self.path.display(),
                differences.join("\n  "),
            )));
        }
        for (name, var) in vars {
            var.set(&saved[name].to_dtype(var.dtype())?.to_device(var.device())?)?;
        }
        Ok(())
    }
}

/// Tensors as the bytes of a safetensors file; sorted by name, so equal states are equal files.
fn serialize(vars: &[(String, Var)]) -> Result<Vec<u8>> {
    let mut tensors = Vec::with_capacity(vars.len());
    for (name, var) in vars {
        let tensor = var.as_detached_tensor().to_device(&Device::Cpu)?.to_dtype(DType::F32)?;
        let bytes: Vec<u8> =
            tensor.flatten_all()?.to_vec1::<f32>()?.iter().flat_map(|x| x.to_le_bytes()).collect();
        tensors.push((name, tensor.dims().to_vec(), bytes));
    }
    let views = tensors.iter().map(|(name, shape, bytes)| {
        Ok((*name, safetensors::tensor::TensorView::new(safetensors::Dtype::F32, shape.clone(), bytes)?))
    });
    let views = views.collect::<Result<Vec<_>, safetensors::SafeTensorError>>();
    let views = views.map_err(|error| Error::msg(error.to_string()))?;
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
            best_loss: Some(0.5),
            ..State::default()
        };
        let snapshot = Snapshot { params, optimizer: &[var("m.w", &[9.])], state: &state };
        snapshot.save(dir, &CheckpointConfig { every_steps: None, keep_last: 2 }).unwrap()
    }

    #[test]
    fn what_is_saved_is_restored() {
        let dir = tempfile::tempdir().unwrap();
        let path = save(dir.path(), 7, &[var("w", &[1., 2.])]);
        let (params, optimizer) = ([var("w", &[0., 0.])], [var("m.w", &[0.])]);
        let state = Checkpoint::load(&path).unwrap().restore(&params, &optimizer).unwrap();
        assert_eq!((state.progress.step, state.seed, state.best_loss), (7, 3, Some(0.5)));
        assert_eq!(params[0].1.to_vec1::<f32>().unwrap(), [1., 2.]);
        assert_eq!(optimizer[0].1.to_vec1::<f32>().unwrap(), [9.]);
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
        assert_eq!(latest(dir.path()), Some(dir.path().join("10")));
        let file = dir.path().join("10").join(MODEL);
        let mut bytes = std::fs::read(&file).unwrap();
        *bytes.last_mut().unwrap() ^= 1;
        std::fs::write(&file, bytes).unwrap();
        let error = Checkpoint::load(&dir.path().join("10")).unwrap_err().to_string();
        assert!(
            error.ends_with("model.safetensors: the file is damaged: its hash is not the manifest's"),
            "{error}"
        );
        assert_eq!(latest(dir.path()), Some(dir.path().join("5")));
    }

    #[test]
    fn old_checkpoints_go_and_the_best_stays() {
        let dir = tempfile::tempdir().unwrap();
        for step in [1, 2, 3, 4, 5] {
            save(dir.path(), step, &[var("w", &[step as f32])]);
            if step == 2 {
                mark_best(dir.path(), 2).unwrap();
            }
        }
        let exists = |name: &str| dir.path().join(name).join(MODEL).exists();
        assert_eq!(
            [1, 2, 3, 4, 5].map(|step: u64| exists(&step.to_string())),
            [false, true, false, true, true]
        );
        assert!(exists("best") && exists("last"));
        let target = |link: &str| std::fs::read_link(dir.path().join(link)).unwrap();
        assert_eq!((target("best"), target("last")), ("2".into(), "5".into()));
    }
}
