//! Callbacks included in the library, one file each.

mod early_stopping;
mod on_signal;
mod prediction_writer;
mod progress_bar;
mod throughput;

pub use early_stopping::{EarlyStopping, EarlyStoppingConfig};
pub use on_signal::OnSignal;
pub use prediction_writer::PredictionWriter;
pub use progress_bar::ProgressBar;
pub use throughput::{Throughput, ThroughputConfig};
