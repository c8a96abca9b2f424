//! Files that are there whole or not at all.

use std::ffi::OsString;
use std::path::Path;

use crate::error::{Error, Result};

/// Writes a file beside and renames it, so that nobody ever finds half of it.
pub(crate) fn write_whole(path: &Path, bytes: &[u8]) -> Result<()> {
    let mut name = OsString::from(".");
    name.push(path.file_name().unwrap_or_default());
    name.push(format!(".{}.partial", std::process::id()));
    let partial = path.with_file_name(name);
    let written = std::fs::write(&partial, bytes).and_then(|()| std::fs::rename(&partial, path));
    if written.is_err() {
        // What could not be written may not be there to remove: the first error is the one to tell.
        let _ = std::fs::remove_file(&partial);
    }
    written.map_err(Error::file(path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_write_leaves_nothing_behind() {
        let folder = tempfile::tempdir().unwrap();
        let taken = folder.path().join("taken.png");
        std::fs::create_dir(&taken).unwrap();
        let message = write_whole(&taken, b"bytes").unwrap_err().to_string();
        assert!(message.starts_with(&format!("{}: ", taken.display())), "{message}");
        assert_eq!(std::fs::read_dir(&folder).unwrap().count(), 1);
    }
}
