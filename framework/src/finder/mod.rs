//! Finders: they train briefly to find a good setting, and leave the model and the trainer unchanged.

mod batch_size;
mod learning_rate;

pub use batch_size::{BatchFinderConfig, BatchFinding, BatchTrial};
pub use learning_rate::{LrFinderConfig, LrFinding, LrPoint};
