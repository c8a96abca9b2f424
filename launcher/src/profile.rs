//! `--profile`: records the phases of training and prints a summary at the end.

use std::path::Path;

use candlepower::Result;
use candlepower::profiler::{Profiler, TRACED_PHASES, Trace};
use tracing_subscriber::Registry;
use tracing_subscriber::layer::Layer;

use crate::say::say;

/// The layer that receives every phase.
pub(crate) type Listener = Box<dyn Layer<Registry> + Send + Sync>;

/// The share of time spent waiting for data from which a hint is printed.
const WAITS: f64 = 0.1;

/// The profile of one training.
pub(crate) struct Profile {
    profiler: Profiler,
    trace: Trace,
}

impl Profile {
    /// Starts a profile; also returns the layer that feeds it.
    pub(crate) fn start() -> (Listener, Self) {
        let profiler = Profiler::default();
        let (trace_layer, trace) = Trace::start();
        (profiler.layer().and_then(trace_layer).boxed(), Self { profiler, trace })
    }

    /// Prints the table, and writes `trace.json` into the run's folder if there is one.
    pub(crate) fn finish(self, run: Option<&Path>) -> Result<()> {
        let profile = self.profiler.profile();
        say!("{}", profile.to_string().trim_end());
        let waited = profile.share("data_wait");
        if waited >= WAITS {
            let percent = 100. * waited;
            say!("training waited for data {percent:.0} % of the time: more `data.workers` may shorten it");
        }
        let Some(run) = run else { return Ok(()) };
        let (path, full) = (run.join("trace.json"), self.trace.is_full());
        self.trace.save(&path)?;
        let part = if full { format!(", the first {TRACED_PHASES} phases") } else { String::new() };
        say!("trace{part}: {}; open it in https://ui.perfetto.dev", path.display());
        Ok(())
    }
}
