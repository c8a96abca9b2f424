//! `metrics.jsonl`: one JSON object per line.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

use super::Logger;
use crate::atomic_file::write_atomic;
use crate::callback::Record;
use crate::error::{Error, Result};

/// Appends each record as a line of JSON, immediately, so `tail -f` can follow the run. NaN and infinite
/// values become `null`, because JSON cannot represent them; `metrics.csv` distinguishes them.
pub struct Jsonl {
    path: PathBuf,
    file: File,
}

impl Jsonl {
    /// Opens the file and drops the records after `step`.
    pub fn open(path: &Path, step: u64) -> Result<Self> {
        if let Ok(text) = std::fs::read_to_string(path) {
            let before = |line: &&str| {
                let record: Option<serde_json::Value> = serde_json::from_str(line).ok();
                record.and_then(|record| record["step"].as_u64()).is_some_and(|at| at <= step)
            };
            let kept: String = text.lines().filter(before).flat_map(|line| [line, "\n"]).collect();
            write_atomic(path, kept.as_bytes())?;
        }
        let file = OpenOptions::new().create(true).append(true).open(path).map_err(Error::file(path))?;
        Ok(Self { path: path.to_path_buf(), file })
    }
}

impl Logger for Jsonl {
    fn log(&mut self, record: &Record) -> Result<()> {
        let mut line = serde_json::to_vec(record).map_err(Error::content(&self.path))?;
        line.push(b'\n');
        self.file.write_all(&line).map_err(Error::file(&self.path))
    }
}
