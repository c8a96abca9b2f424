//! Frames in files.

use std::path::Path;

use candle_core::Tensor;

use crate::batch::{Video, VideoSpec};
use crate::error::{Error, Result};

/// Reads frames to predict from.
pub fn read(path: &Path, _spec: &VideoSpec) -> Result<Video> {
    Err(Error::msg(format!("{}: not yet", path.display())))
}

/// Writes predicted frames.
pub fn write(_input: &Tensor, _prediction: &Tensor, path: &Path) -> Result<()> {
    Err(Error::msg(format!("{}: not yet", path.display())))
}
