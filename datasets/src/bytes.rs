//! Bytes in memory, or in a file that is read on demand.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use candlepower::error::{Error, Result};

/// Bytes that any thread can read at any position.
///
/// Files are read at the requested position instead of being memory-mapped. Both go through the page cache, but if a
/// mapped file is truncated while in use, the system kills the process; a read returns an error that names the file.
pub(crate) enum Bytes {
    Memory(Vec<u8>),
    File { file: File, path: PathBuf, len: u64 },
}

impl Bytes {
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(Error::file(path))?;
        let len = file.metadata().map_err(Error::file(path))?.len();
        Ok(Self::File { file, path: path.to_path_buf(), len })
    }

    pub(crate) fn len(&self) -> u64 {
        match self {
            Self::Memory(bytes) => bytes.len() as u64,
            Self::File { len, .. } => *len,
        }
    }

    /// Fills `out` with the bytes starting at `start`.
    pub(crate) fn read(&self, start: u64, out: &mut [u8]) -> Result<()> {
        match self {
            Self::Memory(bytes) => {
                let end = start as usize + out.len();
                let part = bytes.get(start as usize..end).ok_or_else(|| {
                    Error::msg(format!("bytes up to {end} were asked for, of {}", bytes.len()))
                })?;
                out.copy_from_slice(part);
                Ok(())
            }
            Self::File { file, path, .. } => file.read_exact_at(out, start).map_err(Error::file(path)),
        }
    }
}
