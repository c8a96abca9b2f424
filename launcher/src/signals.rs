//! Signal handling. The first Ctrl-C, SIGTERM or SIGHUP ends the run after its current step, or immediately
//! if training has not begun; a second one ends the process immediately. SIGUSR1 saves a checkpoint.

use std::sync::atomic::Ordering;

use candlepower::callbacks::OnSignal;
use candlepower::{Error, Result};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGUSR1};
use signal_hook::iterator::Signals;

use crate::say::tell;

/// The signals that end a run. SIGHUP is not one of them if it was ignored from the start, as under `nohup`.
pub(crate) fn ending() -> Vec<i32> {
    let all = [SIGHUP, SIGINT, SIGTERM];
    all.into_iter().filter(|signal| *signal != SIGHUP || !is_ignored(SIGHUP)).collect()
}

/// Whether the parent process had this one start with `signal` ignored; false if the system does not report it.
fn is_ignored(signal: i32) -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let mask = mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    mask.is_some_and(|mask| (mask >> (signal - 1)) & 1 == 1)
}

/// Starts listening for signals. The returned callback stops or saves the run that it is attached to.
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
            // Before training there is nothing to save.
            if again || !flags.has_begun.load(Ordering::Relaxed) {
                std::process::exit(128 + signal);
            }
            tell!("stopping after this step; a second signal stops immediately, without saving");
        }
    });
    Ok(callback)
}
