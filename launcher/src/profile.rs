//! `--profile`: what is listened to during training, and what is said of it at the end.

use std::path::Path;

use candlepower::Result;
use candlepower::profiler::{Profiler, TRACED_PHASES, Trace};
use tracing_subscriber::Registry;
use tracing_subscriber::layer::Layer;

use crate::say::say;

/// Hears of every phase.
pub(crate) type Listener = Box<dyn Layer<Registry> + Send + Sync>;

/// A share of the time from which on waiting for data is worth a word.
const WAITS: f64 = 0.1;

/// The profile of one training.
pub(crate) struct Profile {
    profiler: Profiler,
    trace: Trace,
}

impl Profile {
    /// A profile, and the layer that it listens through.
    pub(crate) fn start() -> (Listener, Self) {
        let profiler = Profiler::default();
        let (trace_layer, trace) = Trace::start();
        (profiler.layer().and_then(trace_layer).boxed(), Self { profiler, trace })
    }

    /// Prints the table and writes `trace.json` into the run's folder, where there is one.
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
