//! `images/`: all pictures as PNG files.

use std::path::{Path, PathBuf};

use super::Logger;
use crate::atomic_file::write_atomic;
use crate::callback::{Picture, Record};
use crate::error::{Error, Result};

/// Writes `<split>_<name>_<step>.png` into a folder. Each `/` in the name becomes `_`.
pub struct Pictures {
    dir: PathBuf,
}

impl Pictures {
    /// Writes pictures into `dir`, which is created with the first one.
    pub fn new(dir: &Path) -> Self {
        Self { dir: dir.to_path_buf() }
    }
}

impl Logger for Pictures {
    fn log(&mut self, _: &Record) -> Result<()> {
        Ok(())
    }

    fn picture(&mut self, picture: &Picture) -> Result<()> {
        std::fs::create_dir_all(&self.dir).map_err(Error::file(&self.dir))?;
        let Picture { step, split, name, png, .. } = picture;
        let name = name.replace('/', "_");
        write_atomic(&self.dir.join(format!("{}_{name}_{step:06}.png", split.name())), png)
    }
}
