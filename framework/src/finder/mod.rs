//! Finders: they train a little to find a good setting, and leave the model and the trainer as they found them.

mod batch_size;
mod learning_rate;

pub use batch_size::{BatchFinderConfig, BatchFinding, BatchTrial};
pub use learning_rate::{LrFinderConfig, LrFinding, LrPoint};
