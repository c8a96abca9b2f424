//! Signals: the first Ctrl-C, SIGTERM or SIGHUP ends the run after its step, or at once where there is none yet; a second ends the
//! process at once; SIGUSR1 saves.

use std::sync::atomic::Ordering;

use candlepower::callbacks::OnSignal;
use candlepower::{Error, Result};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGUSR1};
use signal_hook::iterator::Signals;

use crate::say::tell;

/// The signals that end a run. SIGHUP is none where it was ignored from the start, as under `nohup`.
pub(crate) fn ending() -> Vec<i32> {
    let all = [SIGHUP, SIGINT, SIGTERM];
    all.into_iter().filter(|signal| *signal != SIGHUP || !is_ignored(SIGHUP)).collect()
}

/// Whether whoever has started this process wants it to ignore a signal; where the system does not tell, it does not.
fn is_ignored(signal: i32) -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let mask = mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    mask.is_some_and(|mask| (mask >> (signal - 1)) & 1 == 1)
}

/// Starts listening; the callback stops, or saves, the run that it is given to.
pub(crate) fn on_signal() -> Result<OnSignal> {
    let callback = OnSignal::default();
    let flags = callback.clone();
    let signals = Signals::new(ending().into_iter().chain([SIGUSR1]));
    let mut signals = signals.map_err(|error| Error::msg(format!("signals: {error}")))?;
    std::thread::spawn(move || {
        for signal in &mut signals {
            if signal == SIGUSR1 {
                flags.save.store(true, Ordering::Relaxed);
                continue;
            }
            let again = flags.stop.swap(signal, Ordering::Relaxed) != 0;
            // Before training, nothing is worth saving.
            if again || !flags.has_begun.load(Ordering::Relaxed) {
                std::process::exit(128 + signal);
            }
            tell!("stopping after this step; a second signal stops immediately, without saving");
        }
    });
    Ok(callback)
}
