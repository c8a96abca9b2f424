//! Predictions as files.

use std::path::{Path, PathBuf};

use candle_core::Tensor;

use crate::callback::Callback;
use crate::error::{Error, Result};

/// Writes what is predicted from each batch as `000000.npy`, (B, ...), into a folder.
pub struct PredictionWriter {
    dir: PathBuf,
}

impl PredictionWriter {
    /// Makes the folder, which must not hold anything yet.
    pub fn new(dir: &Path) -> Result<Self> {
        std::fs::create_dir_all(dir).map_err(Error::file(dir))?;
        if std::fs::read_dir(dir).map_err(Error::file(dir))?.next().is_some() {
            return Err(Error::msg(format!(
                "{}: expected an empty folder for the predictions",
                dir.display()
            )));
        }
        Ok(Self { dir: dir.to_path_buf() })
    }
}

impl Callback for PredictionWriter {
    fn on_prediction(&mut self, batch: usize, prediction: &Tensor) -> Result<()> {
        let path = self.dir.join(format!("{batch:06}.npy"));
        // Beside it first, so that nobody takes half of one for whole.
        let partial = path.with_extension("partial");
        prediction.contiguous()?.write_npy(&partial).map_err(Error::content(&partial))?;
        std::fs::rename(&partial, &path).map_err(Error::file(&path))
    }
}
