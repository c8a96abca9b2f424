//! Signals: the first Ctrl-C, SIGTERM or SIGHUP ends the run after its step, or at once where there is none yet; a second ends the
//! process at once; SIGUSR1 saves.

use std::sync::atomic::Ordering;

use candlepower::callbacks::OnSignal;
use candlepower::{Error, Result};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGUSR1};
use signal_hook::iterator::Signals;

use crate::say::tell;

/// Starts listening; the callback stops, or saves, the run that it is given to.
pub(crate) fn on_signal() -> Result<OnSignal> {
    let callback = OnSignal::default();
    let flags = callback.clone();
    let mut signals = Signals::new([SIGHUP, SIGINT, SIGTERM, SIGUSR1])
        .map_err(|error| Error::msg(format!("signals: {error}")))?;
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
            tell!("stopping after this step; once more to stop at once, without saving");
        }
    });
    Ok(callback)
}
