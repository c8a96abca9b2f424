//! One event: its composites on a grid of times, some of which may be missing.

use std::path::{Path, PathBuf};

use candlepower::error::{Error, Result};

use super::composite;

pub(super) struct Event {
    pub(super) path: PathBuf,
    /// The composites that there are, in order of time.
    pub(super) files: Vec<PathBuf>,
    /// Which of the composites is the one of each time; none where it is missing.
    pub(super) slots: Vec<Option<usize>>,
    /// The number of its first composite among those of all events.
    pub(super) first: usize,
    /// Minutes of its first and its last composite.
    times: [i64; 2],
}

impl Event {
    /// Lists the composites (.gif) in a folder, which come every so many minutes.
    pub(super) fn list(path: &Path, minutes: i64) -> Result<Self> {
        let mut composites = Vec::new();
        for entry in std::fs::read_dir(path).map_err(Error::file(path))? {
            let file = entry.map_err(Error::file(path))?.path();
            if file.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("gif")) {
                composites.push((composite::minutes(&file)?, file));
            }
        }
        composites.sort();
        let (Some(first), Some(last)) = (composites.first(), composites.last()) else {
            return Err(Error::msg(format!("{}: holds no composites; expected .gif files", path.display())));
        };
        let times = [first.0, last.0];
        let mut slots = vec![None; ((times[1] - times[0]) / minutes) as usize + 1];
        for (i, (time, file)) in composites.iter().enumerate() {
            let since = time - times[0];
            if since % minutes != 0 {
                return Err(Error::msg(format!(
                    "{}: is {since} minutes after the first composite; expected one every {minutes} minutes",
                    file.display()
                )));
            }
            if let Some(other) = slots[(since / minutes) as usize].replace(i) {
                let other: &(i64, PathBuf) = &composites[other];
                let message = format!("{}: has the same time as {}", file.display(), other.1.display());
                return Err(Error::msg(message));
            }
        }
        let files = composites.into_iter().map(|(_, file)| file).collect();
        Ok(Self { path: path.to_path_buf(), files, slots, first: 0, times })
    }

    /// Whether a time belongs to both.
    pub(super) fn overlaps(&self, other: &Self) -> bool {
        self.times[0] <= other.times[1] && other.times[0] <= self.times[1]
    }

    /// The composite of a time, and whether it is of that time; a missing one is replaced with the one before.
    pub(super) fn at(&self, slot: usize) -> (usize, bool) {
        let before = self.slots[..=slot].iter().rev().flatten().next();
        (before.copied().unwrap_or(0), self.slots[slot].is_some())
    }
}
