//! One event: its composites on a regular grid of times, some of which may be missing.

use std::path::{Path, PathBuf};

use candlepower::error::{Error, Result};

use super::composite;

pub(super) struct Event {
    pub(super) path: PathBuf,
    /// The available composites, in order of time.
    pub(super) files: Vec<PathBuf>,
    /// For each time, the index of its composite; `None` if it is missing.
    pub(super) slots: Vec<Option<usize>>,
    /// The index of the event's first composite among those of all events.
    pub(super) first: usize,
    /// Minutes of the first and the last composite.
    times: [i64; 2],
}

impl Event {
    /// Lists the composites (.gif) in a folder, one every `minutes` minutes.
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

    /// Whether the time spans of both events overlap.
    pub(super) fn overlaps(&self, other: &Self) -> bool {
        self.times[0] <= other.times[1] && other.times[0] <= self.times[1]
    }

    /// The composite to show at a time, and whether it is the composite of that time; a missing one is
    /// replaced by the previous one.
    pub(super) fn at(&self, slot: usize) -> (usize, bool) {
        let before = self.slots[..=slot].iter().rev().flatten().next();
        (before.copied().unwrap_or(0), self.slots[slot].is_some())
    }
}
