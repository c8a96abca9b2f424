//! A small run in its own folder, and helpers that run the program there.
#![allow(dead_code, clippy::unwrap_used)] // Each test program uses only part of this.

use std::path::PathBuf;
use std::process::{Command, Output};

/// A small run: a ConvLSTM of 4 channels on one digit, 2 -> 2 frames.
pub(crate) const TINY: &str = r#"
[run]
name = "tiny"

[trainer]
batch_size = 4
max_steps = 4
log_every = 1

[module]
name = "conv_lstm"
hidden = 4
patch = 8

[data]
name = "moving_mnist"
digits_per_frame = 1
frames_in = 2
frames_out = 2
train_samples = 10
val_samples = 5

[checkpoint]
every_steps = 2
"#;

/// A folder with `tiny.toml`; commands run in it.
pub(crate) struct Place(pub(crate) tempfile::TempDir);

impl Place {
    pub(crate) fn new() -> Self {
        Self::with(TINY)
    }

    pub(crate) fn with(config: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("tiny.toml"), config.trim_start()).unwrap();
        Self(dir)
    }

    pub(crate) fn run(&self, arguments: &[&str]) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_candlepower"));
        command.current_dir(self.0.path()).args(arguments).output().unwrap()
    }

    /// Runs a command that must succeed; returns its standard output.
    #[track_caller]
    pub(crate) fn succeed(&self, arguments: &[&str]) -> String {
        let output = self.run(arguments);
        assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    /// Runs a command that must fail with this exit code; returns its standard error.
    #[track_caller]
    pub(crate) fn fail(&self, code: i32, arguments: &[&str]) -> String {
        let output = self.run(arguments);
        assert_eq!(output.status.code(), Some(code), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stderr).unwrap()
    }

    pub(crate) fn path(&self, path: &str) -> PathBuf {
        self.0.path().join(path)
    }

    pub(crate) fn read(&self, path: &str) -> String {
        std::fs::read_to_string(self.path(path)).unwrap()
    }
}

/// The records of one split in `metrics.jsonl`.
pub(crate) fn records(place: &Place, run: &str, split: &str) -> Vec<serde_json::Value> {
    let lines = place.read(&format!("{run}/metrics.jsonl"));
    let records = lines.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
    records.filter(|record| record["split"] == split).collect()
}

#[track_caller]
pub(crate) fn assert_text(actual: &str, expected: &str) {
    assert_eq!(actual.trim_end(), expected.trim_matches('\n'));
}
