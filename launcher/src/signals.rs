//! Ctrl-C and SIGTERM: the first ends the run after its step, a second ends the process at once.

use std::sync::Arc;
use std::sync::atomic::{AtomicI32, Ordering};

use candlepower::callbacks::StopOnSignal;
use candlepower::{Error, Result};
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

/// Starts listening; the callback stops the run that it is given to.
pub(crate) fn stop_on_signal() -> Result<StopOnSignal> {
    let came = Arc::new(AtomicI32::new(0));
    let flag = came.clone();
    let mut signals =
        Signals::new([SIGINT, SIGTERM]).map_err(|error| Error::msg(format!("signals: {error}")))?;
    std::thread::spawn(move || {
        for signal in &mut signals {
            if flag.swap(signal, Ordering::Relaxed) != 0 {
                std::process::exit(128 + signal);
            }
            eprintln!("stopping after this step; once more to stop at once, without saving");
        }
    });
    Ok(StopOnSignal(came))
}
