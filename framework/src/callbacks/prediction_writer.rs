//! Writes predictions to files.

use std::path::{Path, PathBuf};

use candle_core::Tensor;

use crate::callback::Callback;
use crate::error::{Error, Result};

/// Writes the prediction for each batch, (B, ...), into a folder as `000000.npy` and so on.
pub struct PredictionWriter {
    dir: PathBuf,
}

impl PredictionWriter {
    /// Creates the folder. If it exists, it must be empty.
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
        // Written to a temporary file first, so readers never see a partial file.
        let partial = path.with_extension("partial");
        prediction.contiguous()?.write_npy(&partial).map_err(Error::content(&partial))?;
        std::fs::rename(&partial, &path).map_err(Error::file(&path))
    }
}
