//! Metrics of predicted frames.

use crate::batch::Video;
use crate::data::Dataset;
use crate::error::Result;

/// The result of a predictor that learns nothing.
#[derive(Debug, Clone, PartialEq)]
pub struct Baseline {
    /// What it predicts, for example `copy last frame`.
    pub name: &'static str,
    /// Its mean squared error over pixels.
    pub mse: f64,
}

/// The baselines of video prediction on `val`.
pub fn baselines(
    _train: &dyn Dataset<Batch = Video>,
    _val: &dyn Dataset<Batch = Video>,
    _seed: u64,
) -> Result<Vec<Baseline>> {
    Ok(Vec::new())
}
