//! Records the first failure among ranks for their supervisor.

use std::fs::OpenOptions;
use std::io::Write;

/// The environment variable with the path of the file that the first failing rank creates: `rank 1: why`.
/// `candlepower launch` sets it.
pub const FAILURE_FILE: &str = "CANDLEPOWER_FAILURE_FILE";

/// Records in the failure file that `rank` has failed, unless another rank was first.
pub(crate) fn report(rank: usize, why: &str) {
    let Some(path) = std::env::var_os(FAILURE_FILE) else { return };
    // Write errors are ignored: the error that follows reports the failure, which matters more.
    if let Ok(mut file) = OpenOptions::new().write(true).create_new(true).open(path) {
        // All at once, because a supervisor may be waiting for it.
        let _ = file.write_all(format!("rank {rank}: {why}").as_bytes());
    }
}
