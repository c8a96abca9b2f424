//! The first failure among ranks, written down for whoever supervises them.

use std::fs::OpenOptions;
use std::io::Write;

/// The environment variable that names the file which the first rank that fails makes: `rank 1: why`. Under
/// `candlepower launch` it is set.
pub const FAILURE_FILE: &str = "CANDLEPOWER_FAILURE_FILE";

/// Writes into the failure file that `rank` has failed, where nobody has come before.
pub(crate) fn report(rank: usize, why: &str) {
    let Some(path) = std::env::var_os(FAILURE_FILE) else { return };
    // What cannot be written is said by the error that follows; the failure itself matters more.
    if let Ok(mut file) = OpenOptions::new().write(true).create_new(true).open(path) {
        // At once, as somebody may be waiting for it.
        let _ = file.write_all(format!("rank {rank}: {why}").as_bytes());
    }
}
