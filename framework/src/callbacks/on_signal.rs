//! Ends or saves a run when the process receives a signal.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};

use crate::callback::{Callback, Flow, Plan, StepEnd, StopReason};
use crate::error::Result;

/// Ends the run after the step or validation batch in which a signal arrived, or saves a checkpoint and
/// continues. The signal handler sets these flags.
#[derive(Debug, Clone, Default)]
pub struct OnSignal {
    /// The signal that ends the run; 0 if none has arrived.
    pub stop: Arc<AtomicI32>,
    /// Whether a checkpoint is requested.
    pub save: Arc<AtomicBool>,
    /// Whether training has begun. Before that, the signal handler may end the process directly.
    pub has_begun: Arc<AtomicBool>,
}

impl OnSignal {
    /// The request to the training loop.
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

    fn on_validation_batch_end(&mut self, _: usize, _: Option<usize>) -> Result<Flow> {
        Ok(self.flow())
    }

    fn wants_gradients(&self, _: u64) -> bool {
        false
    }
}
