//! Where training time goes: the phases of the loop as a table ([`Profiler`]) and as a Chrome trace
//! ([`Trace`]).
//!
//! The loop marks its phases with `tracing` spans of the target [`TARGET`]: `data_wait`, `forward`,
//! `backward`, `optimizer`, `logging`, `pictures` (waiting for a picture to be drawn), `validation`,
//! `checkpoint`, and on several ranks `all_reduce`. Without a listener they cost nanoseconds. To listen, add
//! a layer to the subscriber of the training thread:
//!
//! ```no_run
//! # use candlepower::prelude::*;
//! # fn example<B: Batch>(mut trainer: Trainer, model: &Model<B>, data: &Data<B>) -> Result<()> {
//! use candlepower::profiler::{Profiler, Trace};
//! use tracing_subscriber::prelude::*;
//!
//! let profiler = Profiler::default();
//! let (trace_layer, trace) = Trace::start();
//! let subscriber = tracing_subscriber::registry().with(profiler.layer()).with(trace_layer);
//! tracing::subscriber::with_default(subscriber, || trainer.fit(model, data))?;
//! println!("{}", profiler.profile());
//! trace.save("trace.json".as_ref())?;
//! # Ok(()) }
//! ```
//!
//! On a GPU, a phase measures the time to queue its work; waiting for the work shows in the phase that reads
//! a result.

use std::collections::HashMap;
use std::fmt;
use std::io::Write;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, ThreadId};
use std::time::{Duration, Instant};

use indexmap::IndexMap;
use tracing::level_filters::LevelFilter;
use tracing::span::Id;
use tracing::subscriber::Interest;
use tracing::{Metadata, Subscriber};
use tracing_chrome::{ChromeLayerBuilder, FlushGuard};
use tracing_subscriber::Layer;
use tracing_subscriber::filter::{Targets, dynamic_filter_fn};
use tracing_subscriber::layer::Context;
use tracing_subscriber::registry::LookupSpan;

use crate::atomic_file::write_atomic;
use crate::error::Result;

/// The target of the spans that mark the phases of training. Their level is DEBUG.
pub const TARGET: &str = "candlepower::phase";

/// The maximum number of phases in a [`Trace`]: about 20 MB, which trace viewers can still open.
pub const TRACED_PHASES: usize = 100_000;

/// Sums the time of each phase. A phase excludes the phases inside it, so nothing is counted twice.
#[derive(Debug, Clone, Default)]
pub struct Profiler(Arc<Mutex<Sums>>);

impl Profiler {
    /// A `tracing` layer that adds to this profiler.
    pub fn layer<S: Subscriber + for<'a> LookupSpan<'a>>(&self) -> impl Layer<S> + Send + Sync + use<S> {
        Listener(self.clone()).with_filter(Targets::new().with_target(TARGET, LevelFilter::DEBUG))
    }

    /// The sums so far.
    pub fn profile(&self) -> Profile {
        let sums = self.sums();
        let phase = |(&name, &(calls, time)): (&&'static str, &(u64, Duration))| Phase { name, calls, time };
        Profile { phases: sums.phases.iter().map(phase).collect(), rest: sums.rest }
    }

    fn sums(&self) -> MutexGuard<'_, Sums> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

struct Listener(Profiler);

impl<S: Subscriber + for<'a> LookupSpan<'a>> Layer<S> for Listener {
    fn on_enter(&self, id: &Id, context: Context<'_, S>) {
        if let Some(phase) = context.metadata(id) {
            self.0.sums().enter(phase.name(), thread::current().id(), Instant::now());
        }
    }

    fn on_exit(&self, _: &Id, _: Context<'_, S>) {
        // Read before locking: waiting for the lock is not part of the phase.
        let now = Instant::now();
        self.0.sums().exit(thread::current().id(), now);
    }
}

/// Calls and times of the phases, and the current phases of each thread.
#[derive(Debug, Default)]
struct Sums {
    phases: IndexMap<&'static str, (u64, Duration)>,
    rest: Duration,
    threads: HashMap<ThreadId, Place>,
}

/// The phases that a thread is in, innermost last, and the time of the last change.
#[derive(Debug)]
struct Place {
    phases: Vec<&'static str>,
    since: Instant,
}

impl Sums {
    fn enter(&mut self, phase: &'static str, thread: ThreadId, now: Instant) {
        self.pass(thread, now).push(phase);
        self.phases.entry(phase).or_default().0 += 1;
    }

    fn exit(&mut self, thread: ThreadId, now: Instant) {
        self.pass(thread, now).pop();
    }

    /// Adds the time up to now to the thread's innermost phase.
    fn pass(&mut self, thread: ThreadId, now: Instant) -> &mut Vec<&'static str> {
        let place = self.threads.entry(thread).or_insert(Place { phases: Vec::new(), since: now });
        let time = match place.phases.last() {
            Some(phase) => &mut self.phases.entry(phase).or_default().1,
            None => &mut self.rest,
        };
        *time += now.saturating_duration_since(place.since);
        place.since = now;
        &mut place.phases
    }
}

/// The time of each phase, in order of first appearance. Displays as a table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Profile {
    /// All recorded phases.
    pub phases: Vec<Phase>,
    /// Time between the phases, from the first to the last: everything else that the loop does.
    pub rest: Duration,
}

/// The time of one phase.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Phase {
    /// The span's name.
    pub name: &'static str,
    /// How often it was entered.
    pub calls: u64,
    /// The time spent in it, excluding phases inside it.
    pub time: Duration,
}

impl Profile {
    /// The time of all phases and between them, summed over training threads.
    pub fn total(&self) -> Duration {
        self.phases.iter().map(|phase| phase.time).sum::<Duration>() + self.rest
    }

    /// The fraction of the total time, from 0 to 1, spent in this phase.
    pub fn share(&self, phase: &str) -> f64 {
        let time = self.phases.iter().find(|found| found.name == phase).map_or(Duration::ZERO, |p| p.time);
        self.of_total(time)
    }

    fn of_total(&self, time: Duration) -> f64 {
        time.as_secs_f64() / self.total().as_secs_f64().max(f64::MIN_POSITIVE)
    }
}

impl fmt::Display for Profile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{:16} {:>9} {:>12} {:>8} {:>12}", "phase", "calls", "time", "share", "mean")?;
        let mut line = |name: &str, calls: &str, time: Duration, mean: &str| {
            let (seconds, percent) = (time.as_secs_f64(), 100. * self.of_total(time));
            let row = format!("{name:16} {calls:>9} {seconds:>10.3} s {percent:>6.1} % {mean:>12}");
            writeln!(f, "{}", row.trim_end())
        };
        for Phase { name, calls, time } in &self.phases {
            let mean = format!("{:.3} ms", 1e3 * time.as_secs_f64() / *calls as f64);
            line(name, &calls.to_string(), *time, &mean)?;
        }
        line("everything else", "", self.rest, "")?;
        line("total", "", self.total(), "")
    }
}

/// The sequence of phases, for <https://ui.perfetto.dev> or `chrome://tracing`. Holds the first
/// [`TRACED_PHASES`].
pub struct Trace {
    json: Buffer,
    writer: FlushGuard,
    left: Arc<AtomicUsize>,
}

impl Trace {
    /// Starts a trace. Returns the layer to install, and the trace to save.
    pub fn start<S>() -> (impl Layer<S> + Send + Sync + use<S>, Self)
    where
        S: Subscriber + for<'a> LookupSpan<'a> + Send + Sync,
    {
        Self::of_first(TRACED_PHASES)
    }

    fn of_first<S>(phases: usize) -> (impl Layer<S> + Send + Sync + use<S>, Self)
    where
        S: Subscriber + for<'a> LookupSpan<'a> + Send + Sync,
    {
        let json = Buffer::default();
        let builder = ChromeLayerBuilder::new().writer(json.clone()).include_locations(false);
        let (layer, writer) = builder.build();
        let left = Arc::new(AtomicUsize::new(phases));
        let budget = left.clone();
        let is_phase = |metadata: &Metadata<'_>| metadata.target() == TARGET;
        // Called once per span, before it begins, so a phase is traced with both its begin and its end or not
        // at all.
        let first = dynamic_filter_fn(move |metadata: &Metadata<'_>, _: &Context<'_, S>| {
            let take = |left: usize| left.checked_sub(1);
            is_phase(metadata) && budget.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take).is_ok()
        });
        let first = first.with_max_level_hint(LevelFilter::DEBUG).with_callsite_filter(move |metadata| {
            if is_phase(metadata) { Interest::sometimes() } else { Interest::never() }
        });
        (layer.with_filter(first), Self { json, writer, left })
    }

    /// Whether the trace has reached its maximum.
    pub fn is_full(&self) -> bool {
        self.left.load(Ordering::Relaxed) == 0
    }

    /// Ends the trace and writes it to a file.
    pub fn save(self, path: &Path) -> Result<()> {
        // Waits until all events are in the buffer.
        drop(self.writer);
        write_atomic(path, &self.json.bytes())
    }
}

/// The text of a trace, kept in memory until training has a folder for it.
#[derive(Clone, Default)]
struct Buffer(Arc<Mutex<Vec<u8>>>);

impl Buffer {
    fn bytes(&self) -> MutexGuard<'_, Vec<u8>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Write for Buffer {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.bytes().write(bytes)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use serde_json::Value;
    use tracing_subscriber::prelude::*;

    use super::*;

    macro_rules! phase {
        ($name:literal) => {
            tracing::debug_span!(target: TARGET, $name).entered()
        };
    }

    /// The events of a saved trace, without thread names.
    fn events(trace: Trace) -> Vec<(String, String)> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("trace.json");
        trace.save(&path).unwrap();
        let events: Vec<Value> = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
        let text = |value: &Value| value.as_str().unwrap().to_string();
        let phases = events.iter().filter(|event| event["ph"] != "M");
        phases.map(|event| (text(&event["ph"]), text(&event["name"]))).collect()
    }

    #[test]
    fn a_phase_inside_another_counts_for_itself_alone() {
        let (mut sums, start) = (Sums::default(), Instant::now());
        let (here, elsewhere) =
            (thread::current().id(), thread::spawn(|| thread::current().id()).join().unwrap());
        let at = |ms| start + Duration::from_millis(ms);
        sums.enter("validation", here, at(100));
        sums.enter("forward", elsewhere, at(105));
        sums.enter("checkpoint", here, at(110));
        sums.exit(here, at(140));
        sums.exit(here, at(145));
        sums.exit(elsewhere, at(155));
        sums.enter("forward", here, at(152));
        sums.exit(here, at(153));
        let profile = Profiler(Arc::new(Mutex::new(sums))).profile();
        let phase = |name, calls, ms| Phase { name, calls, time: Duration::from_millis(ms) };
        assert_eq!(
            profile.phases,
            [phase("validation", 1, 15), phase("forward", 2, 51), phase("checkpoint", 1, 30)]
        );
        assert_eq!(profile.rest, Duration::from_millis(7));
        assert_eq!(profile.total(), Duration::from_millis(103));
        assert_eq!(profile.share("checkpoint"), 30. / 103.);
        assert_eq!(profile.share("optimizer"), 0.);
        assert_eq!(
            profile.to_string(),
            "\
phase                calls         time    share         mean
validation               1      0.015 s   14.6 %    15.000 ms
forward                  2      0.051 s   49.5 %    25.500 ms
checkpoint               1      0.030 s   29.1 %    30.000 ms
everything else                 0.007 s    6.8 %
total                           0.103 s  100.0 %
"
        );
    }

    #[test]
    fn other_spans_are_not_heard() {
        let profiler = Profiler::default();
        let (layer, trace) = Trace::start();
        let everything = tracing_subscriber::layer::Identity::new().with_filter(LevelFilter::TRACE);
        let subscriber = tracing_subscriber::registry().with(profiler.layer()).with(layer).with(everything);
        tracing::subscriber::with_default(subscriber, || {
            let _other = tracing::debug_span!("forward").entered();
            let _phase = phase!("backward");
            tracing::warn!("a message");
        });
        assert_eq!(
            profiler.profile().phases.iter().map(|phase| phase.name).collect::<Vec<_>>(),
            ["backward"]
        );
        assert_eq!(events(trace).len(), 2);
    }

    #[test]
    fn a_full_trace_is_whole_and_the_table_goes_on() {
        let profiler = Profiler::default();
        let (layer, trace) = Trace::of_first(2);
        let subscriber = tracing_subscriber::registry().with(profiler.layer()).with(layer);
        tracing::subscriber::with_default(subscriber, || {
            let _validation = phase!("validation");
            let checkpoint = phase!("checkpoint");
            assert!(trace.is_full());
            let forward = phase!("forward");
            drop(forward);
            drop(checkpoint);
            drop(phase!("forward"));
        });
        let calls = |name| profiler.profile().phases.iter().find(|phase| phase.name == name).unwrap().calls;
        assert_eq!(["validation", "checkpoint", "forward"].map(calls), [1, 1, 2]);
        let expected = [("B", "validation"), ("B", "checkpoint"), ("E", "checkpoint"), ("E", "validation")];
        assert_eq!(events(trace), expected.map(|(ph, name)| (ph.to_string(), name.to_string())));
    }
}
