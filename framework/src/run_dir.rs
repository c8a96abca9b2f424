//! The folder of a run: `<run.dir>/<run.name>/version_N/`.

use std::fs::{File, TryLockError};
use std::path::{Path, PathBuf};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::checkpoint;
use crate::error::{Error, Result};

/// The `[run]` section.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct RunConfig {
    /// The run's name: a folder below `dir`.
    pub name: String,
    /// The folder that contains the folders of runs.
    pub dir: PathBuf,
    /// The seed of everything random: initial values, order, augmentation, noise.
    pub seed: u64,
}

impl Default for RunConfig {
    fn default() -> Self {
        Self { name: "run".into(), dir: "runs".into(), seed: 0 }
    }
}

impl RunConfig {
    /// Checks that the name is a single folder and that `dir` needs no shell expansion.
    pub fn check(&self) -> Result<()> {
        if self.dir.starts_with("~") {
            return Err(Error::setting(
                "dir",
                format!(
                    "only shells expand `~`; here it would be the name of a folder: write the full path, {}",
                    home(&self.dir)
                ),
            ));
        }
        if i64::try_from(self.seed).is_err() {
            return Err(Error::setting(
                "seed",
                format!("expected at most {}, found {}", i64::MAX, self.seed),
            ));
        }
        if self.name.contains(char::is_control) {
            return Err(Error::setting("name", "expected the name of a folder: no line breaks"));
        }
        if self.name.is_empty() || self.name.contains(['/', '\\']) || self.name.starts_with('.') {
            return Err(Error::setting(
                "name",
                "expected the name of a folder: no slash, no dot in front, not empty",
            ));
        }
        Ok(())
    }
}

/// Expands `~` as a shell does.
fn home(path: &Path) -> String {
    let below = path.strip_prefix("~").unwrap_or(path);
    std::env::home_dir().unwrap_or_else(|| "/home/me".into()).join(below).display().to_string()
}

/// Prevents other processes from training in a run's folder.
#[derive(Debug)]
pub struct RunLock(#[expect(dead_code, reason = "locked as long as it is open")] Option<File>);

/// One version of a run on disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RunDir(PathBuf);

impl RunDir {
    /// Creates the folder of the next version.
    pub fn create(config: &RunConfig) -> Result<Self> {
        let parent = config.dir.join(&config.name);
        std::fs::create_dir_all(&parent).map_err(Error::file(&parent))?;
        let mut next = versions(&parent).last().map_or(0, |newest| newest + 1);
        loop {
            let dir = parent.join(format!("version_{next}"));
            match std::fs::create_dir(&dir) {
                Ok(()) => return Ok(Self(dir)),
                // Another run of this name has just taken the number.
                Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => next += 1,
                Err(error) => return Err(Error::file(&dir)(error)),
            }
        }
    }

    /// The newest version of a run that has a checkpoint, and its last good checkpoint.
    ///
    /// # Errors
    /// If that version has checkpoints but none of them is good.
    pub fn newest_with_checkpoint(config: &RunConfig) -> Result<Option<(Self, PathBuf)>> {
        newest_with_checkpoint(&config.dir.join(&config.name))
    }

    /// Finds the run and the checkpoint that a path refers to. The path may be a checkpoint; the folder of
    /// checkpoints or the run's folder, for its last good checkpoint; or the folder of all versions, for the
    /// newest version with a checkpoint.
    pub fn containing(path: &Path) -> Result<(Self, PathBuf)> {
        let path = path.canonicalize().map_err(Error::file(path))?;
        if path.is_file() {
            return Err(Error::msg(format!(
                "{}: expected a run's folder or a checkpoint; to start training from a weights file, set `weights` in [init]",
                path.display()
            )));
        }
        if let Some(found) = newest_with_checkpoint(&path)? {
            return Ok(found);
        }
        let nothing = || Error::msg(format!("{}: there is no good checkpoint here", path.display()));
        let is_checkpoint = path.join("manifest.json").exists();
        let checkpoints = match path.file_name() {
            Some(name) if !is_checkpoint && name != "checkpoints" => path.join("checkpoints"),
            _ if is_checkpoint => path.parent().unwrap_or(&path).to_path_buf(),
            _ => path.clone(),
        };
        let checkpoint = if is_checkpoint {
            path.clone()
        } else {
            checkpoint::latest(&checkpoints)?.ok_or_else(nothing)?
        };
        let run = checkpoints.parent().unwrap_or(&checkpoints).to_path_buf();
        Ok((Self(run), checkpoint))
    }

    /// Makes this process the only one that trains in the folder, as long as the returned lock is held.
    ///
    /// # Errors
    /// If another process is training in it.
    pub fn lock(&self) -> Result<RunLock> {
        // File systems without locks, and Windows, where folders cannot be opened as files, are not locked.
        let Ok(folder) = File::open(&self.0) else { return Ok(RunLock(None)) };
        match folder.try_lock() {
            Err(TryLockError::WouldBlock) => {
                Err(Error::msg(format!("{}: another process is training in this folder", self.0.display())))
            }
            Ok(()) | Err(TryLockError::Error(_)) => Ok(RunLock(Some(folder))),
        }
    }

    /// Removes the folder if it is empty.
    pub fn discard_empty(&self) {
        // Fails if it is not empty or does not exist.
        let _ = std::fs::remove_dir(&self.0);
    }

    /// The folder itself.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// The folder of its checkpoints.
    pub fn checkpoints(&self) -> PathBuf {
        self.0.join("checkpoints")
    }
}

/// The newest version in a folder of versions that has a checkpoint, and its last good checkpoint. An error if that
/// version has checkpoints but none of them is good: an older version must not silently take its place.
fn newest_with_checkpoint(parent: &Path) -> Result<Option<(RunDir, PathBuf)>> {
    for version in versions(parent).into_iter().rev() {
        let run = RunDir(parent.join(format!("version_{version}")));
        if let Some(checkpoint) = checkpoint::latest(&run.checkpoints())? {
            return Ok(Some((run, checkpoint)));
        }
        tracing::warn!("{}: it has no checkpoint", run.path().display());
    }
    Ok(None)
}

/// The version numbers in a run's folder, oldest first.
fn versions(parent: &Path) -> Vec<u64> {
    let entries = std::fs::read_dir(parent).into_iter().flatten().flatten();
    let number =
        |entry: std::fs::DirEntry| entry.file_name().to_str()?.strip_prefix("version_")?.parse().ok();
    let mut versions: Vec<u64> = entries.filter_map(number).collect();
    versions.sort_unstable();
    versions
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_count_up_numerically() {
        let dir = tempfile::tempdir().unwrap();
        let config = RunConfig { name: "a".into(), dir: dir.path().into(), seed: 0 };
        for version in 0..12 {
            let run = RunDir::create(&config).unwrap();
            assert!(run.path().ends_with(format!("a/version_{version}")));
        }
    }
}
