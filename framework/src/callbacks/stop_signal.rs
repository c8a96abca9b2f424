//! Ends a run when the process is told to end.

use std::sync::Arc;
use std::sync::atomic::{AtomicI32, Ordering};

use crate::callback::{Callback, Flow, StepEnd, StopReason};
use crate::error::Result;

/// Stops after the step during which a signal came. Whoever receives signals writes their number into the flag.
pub struct StopOnSignal(
    /// The signal that came; 0: none.
    pub Arc<AtomicI32>,
);

impl Callback for StopOnSignal {
    fn on_step_end(&mut self, _: &StepEnd) -> Result<Flow> {
        Ok(match self.0.load(Ordering::Relaxed) {
            0 => Flow::Continue,
            signal => Flow::Stop(StopReason::Signal(signal)),
        })
    }
}
