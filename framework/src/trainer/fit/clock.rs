//! How long a run has trained.

use std::time::Instant;

/// Measures how long a run has trained, over all its attempts.
pub(super) struct Clock {
    /// When this attempt started.
    started: Instant,
    /// How many seconds earlier attempts trained.
    seconds_before: f64,
}

impl Clock {
    /// Starts a new attempt.
    pub(super) fn start(seconds_before: f64) -> Self {
        Self { started: Instant::now(), seconds_before }
    }

    /// Seconds that earlier attempts trained.
    pub(super) fn seconds_before(&self) -> f64 {
        self.seconds_before
    }

    /// Seconds of training, including those before an interruption.
    pub(super) fn seconds(&self) -> f64 {
        self.seconds_before + self.started.elapsed().as_secs_f64()
    }
}
