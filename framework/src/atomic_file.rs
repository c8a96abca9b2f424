//! Atomic file writes.

use std::ffi::OsString;
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

/// The suffix of partially written files.
pub(crate) const PARTIAL: &str = ".partial";

/// Writes a file atomically: to a temporary file next to it, which is then renamed. Readers never see a
/// partial file, even after a power failure.
pub fn write_atomic(path: &Path, bytes: &[u8]) -> Result<()> {
    let partial = partial(path);
    let write = || {
        let mut file = File::create_new(&partial)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        std::fs::rename(&partial, path)
    };
    let written = write();
    if written.is_err() {
        // The temporary file may not exist; report the first error.
        let _ = std::fs::remove_file(&partial);
    }
    written.map_err(Error::file(path))
}

/// A unique hidden file name next to this one. Random, because processes on machines that share a folder may
/// have the same id.
pub fn partial(path: &Path) -> PathBuf {
    let mut name = OsString::from(".");
    name.push(path.file_name().unwrap_or_default());
    name.push(format!(".{:016x}{PARTIAL}", rand::random::<u64>()));
    path.with_file_name(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_write_leaves_nothing_behind() {
        let folder = tempfile::tempdir().unwrap();
        let taken = folder.path().join("taken.png");
        std::fs::create_dir(&taken).unwrap();
        let message = write_atomic(&taken, b"bytes").unwrap_err().to_string();
        assert!(message.starts_with(&format!("{}: ", taken.display())), "{message}");
        assert_eq!(std::fs::read_dir(&folder).unwrap().count(), 1);
    }
}
