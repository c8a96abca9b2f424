//! Ends a run, or saves it, when the process is told to.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};

use crate::callback::{Callback, Flow, Plan, StepEnd, StopReason};
use crate::error::Result;

/// Stops after the step, or the batch of a validation, during which a signal came, or saves and goes on. Whoever receives signals
/// sets these flags.
#[derive(Debug, Clone, Default)]
pub struct OnSignal {
    /// The signal that ends the run; 0: none came.
    pub stop: Arc<AtomicI32>,
    /// Whether a checkpoint is asked for.
    pub save: Arc<AtomicBool>,
    /// Whether training has begun: before it, whoever receives a signal may end the process.
    pub has_begun: Arc<AtomicBool>,
}

impl OnSignal {
    /// Whether training goes on.
    fn flow(&self) -> Flow {
        match self.stop.load(Ordering::Relaxed) {
            0 => Flow::Continue,
            signal => Flow::Stop(StopReason::Signal(signal)),
        }
    }
}

impl Callback for OnSignal {
    fn on_every_rank(&self) -> bool {
        true
    }

    fn on_fit_start(&mut self, _: &Plan) -> Result<()> {
        self.has_begun.store(true, Ordering::Relaxed);
        Ok(())
    }

    fn on_step_end(&mut self, _: &StepEnd) -> Result<Flow> {
        Ok(match self.flow() {
            Flow::Continue if self.save.swap(false, Ordering::Relaxed) => Flow::Save,
            flow => flow,
        })
    }

    fn on_validation_batch(&mut self, _: usize, _: Option<usize>) -> Result<Flow> {
        Ok(self.flow())
    }

    fn wants_gradients(&self, _: u64) -> bool {
        false
    }
}
