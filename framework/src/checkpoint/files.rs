//! The files of a checkpoint: written completely or not at all, and verified before they are read.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

use indexmap::IndexMap;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::Best;
use crate::atomic_file::{PARTIAL, write_atomic};
use crate::error::{Error, Result};
use crate::metrics::Criterion;

const MANIFEST: &str = "manifest.json";
const VALIDATIONS: &str = "validations.json";
/// Marks a folder that is not a checkpoint yet, and never becomes one if its writer was killed.
const UNFINISHED: &str = ".tmp";

/// A file's entry in the manifest.
#[derive(Debug, Serialize, Deserialize)]
struct Entry {
    bytes: u64,
    sha256: String,
}

fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Writes the folder `target` with these files and their manifest: under a temporary name, then renamed.
pub(super) fn write(target: &Path, contents: &[(&str, Vec<u8>)]) -> Result<()> {
    let parent = target.parent().unwrap_or(Path::new("."));
    let name = target.file_name().unwrap_or_default().to_string_lossy();
    let beside = parent.join(format!(".{name}{UNFINISHED}"));
    let before = parent.join(format!(".{name}.before{UNFINISHED}"));
    remove(&beside)?;
    fs::create_dir_all(&beside).map_err(Error::file(&beside))?;
    let entry = |(name, bytes): &(&str, Vec<u8>)| {
        (name.to_string(), Entry { bytes: bytes.len() as u64, sha256: sha256(bytes) })
    };
    let manifest: IndexMap<String, Entry> = contents.iter().map(entry).collect();
    let manifest = serde_json::to_vec_pretty(&manifest).map_err(Error::content(target))?;
    for (name, bytes) in contents.iter().map(|(name, bytes)| (*name, bytes)).chain([(MANIFEST, &manifest)]) {
        let path = beside.join(name);
        let write = || -> std::io::Result<()> {
            let mut file = File::create(&path)?;
            file.write_all(bytes)?;
            file.sync_all()
        };
        write().map_err(Error::file(&path))?;
    }
    sync(&beside)?;
    if target.exists() {
        remove(&before)?;
        fs::rename(target, &before).map_err(Error::file(target))?;
    }
    fs::rename(&beside, target).map_err(Error::file(target))?;
    sync(parent)?;
    remove(&before)
}

/// Verifies that every file of a checkpoint has the size and the hash in its manifest.
pub(super) fn verify(path: &Path) -> Result<()> {
    let manifest = path.join(MANIFEST);
    let bytes = fs::read(&manifest).map_err(Error::file(&manifest))?;
    let manifest: IndexMap<String, Entry> =
        serde_json::from_slice(&bytes).map_err(Error::content(&manifest))?;
    for (name, entry) in manifest {
        let file = path.join(name);
        let bytes = fs::read(&file).map_err(Error::file(&file))?;
        let damage = match () {
            () if bytes.len() as u64 != entry.bytes => {
                format!("it has {} bytes, the manifest says {}", bytes.len(), entry.bytes)
            }
            () if sha256(&bytes) != entry.sha256 => "its hash is not the manifest's".to_string(),
            () => continue,
        };
        return Err(Error::msg(format!("{}: the file is damaged: {damage}", file.display())));
    }
    Ok(())
}

/// The steps that have a folder in `dir`, oldest first.
fn steps(dir: &Path) -> Vec<u64> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    let mut steps: Vec<u64> = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect();
    steps.sort_unstable();
    steps
}

/// The newest intact checkpoint in `dir`, or `None` without checkpoints. Skips damaged ones with a warning.
///
/// # Errors
/// If there are checkpoints, but all of them are damaged.
pub fn latest(dir: &Path) -> Result<Option<PathBuf>> {
    let mut newest = None;
    for path in steps(dir).into_iter().rev().map(|step| dir.join(step.to_string())) {
        let Err(damage) = verify(&path) else { return Ok(Some(path)) };
        tracing::warn!("skipping a checkpoint: {damage}");
        newest.get_or_insert(damage);
    }
    match newest {
        None => Ok(None),
        Some(damage) => {
            Err(Error::msg(format!("all checkpoints in {} are damaged; the newest: {damage}", dir.display())))
        }
    }
}

/// A checkpoint folder's record of the run's validations: some come after the checkpoint of their step.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub(super) struct Validations {
    /// The best validations, best first.
    pub(super) best: Vec<Best>,
    /// The criterion for `best`.
    pub(super) best_by: Option<Criterion>,
    /// The step at which the run ended, after its last validation.
    pub(super) ended_at: Option<u64>,
}

impl Validations {
    pub(super) fn read(dir: &Path) -> Self {
        let path = dir.join(VALIDATIONS);
        let Ok(text) = fs::read(&path) else { return Self::default() };
        serde_json::from_slice(&text).unwrap_or_else(|error| {
            tracing::warn!("{}: {error}; the best validations so far are unknown", path.display());
            Self::default()
        })
    }

    pub(super) fn write(&self, dir: &Path) -> Result<()> {
        let path = dir.join(VALIDATIONS);
        fs::create_dir_all(dir).map_err(Error::file(dir))?;
        write_atomic(&path, &serde_json::to_vec(self).map_err(Error::content(&path))?)
    }
}

/// Prepares the folder for a run that has taken `done` steps: deletes unfinished files, and renames
/// checkpoints of steps that the run will take again, so they are neither mistaken for its own nor lost.
/// Returns their new paths.
pub(super) fn set_aside(dir: &Path, done: Option<u64>) -> Result<Vec<PathBuf>> {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let is_unfinished = |name: &str| name.ends_with(UNFINISHED) || name.ends_with(PARTIAL);
        if name.to_str().is_some_and(|name| name.starts_with('.') && is_unfinished(name)) {
            remove(&entry.path())?;
        }
    }
    let mut aside = Vec::new();
    for step in steps(dir).into_iter().filter(|step| done.is_none_or(|done| *step > done)) {
        let path = dir.join(step.to_string());
        // Checkpoints that were set aside earlier keep their names.
        let names = std::iter::once(format!("{step}.old")).chain((2..).map(|n| format!("{step}.old{n}")));
        let Some(name) = names.map(|name| dir.join(name)).find(|name| !name.exists()) else { continue };
        fs::rename(&path, &name).map_err(Error::file(&path))?;
        aside.push(name);
    }
    Ok(aside)
}

/// Points a link in `dir` to the checkpoint folder `step`, replacing an old link atomically.
pub(super) fn link(dir: &Path, name: &str, step: &Path) -> Result<()> {
    let (link, beside) = (dir.join(name), dir.join(format!(".{name}{UNFINISHED}")));
    remove(&beside)?;
    #[cfg(unix)]
    std::os::unix::fs::symlink(step, &beside).map_err(Error::file(&beside))?;
    #[cfg(windows)]
    std::os::windows::fs::symlink_dir(step, &beside).map_err(Error::file(&beside))?;
    fs::rename(&beside, &link).map_err(Error::file(&link))?;
    sync(dir)
}

/// Removes a link, if it exists.
pub(super) fn unlink(dir: &Path, name: &str) -> Result<()> {
    let link = dir.join(name);
    if link.is_symlink() { remove(&link) } else { Ok(()) }
}

/// Removes all but the newest `keep` checkpoints and those of the steps in `stay`.
pub(super) fn prune(dir: &Path, keep: usize, stay: &[u64]) -> Result<()> {
    let steps = steps(dir);
    let old = &steps[..steps.len().saturating_sub(keep)];
    for step in old.iter().filter(|step| !stay.contains(step)) {
        remove(&dir.join(step.to_string()))?;
    }
    Ok(())
}

fn remove(path: &Path) -> Result<()> {
    let gone = match fs::symlink_metadata(path) {
        Ok(meta) if meta.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(_) => Ok(()),
    };
    gone.map_err(Error::file(path))
}

/// Makes the entries of a folder durable.
fn sync(dir: &Path) -> Result<()> {
    #[cfg(unix)]
    File::open(dir).and_then(|dir| dir.sync_all()).map_err(Error::file(dir))?;
    Ok(())
}
