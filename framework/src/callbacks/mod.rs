//! Callbacks that come with the library, one file each.

mod progress_bar;
mod stop_signal;

pub use progress_bar::ProgressBar;
pub use stop_signal::StopOnSignal;
