//! Decides when a checkpoint is due and which ones to keep, and writes them while training goes on.

use std::cmp::Ordering;
use std::path::{Path, PathBuf};
use std::thread::JoinHandle;
use std::time::Instant;

use super::files::Validations;
use super::{Best, CheckpointConfig, Snapshot, State, files};
use crate::error::{Error, Result};
use crate::metrics::Criterion;

/// Saves the checkpoints of one run. A snapshot is copied immediately and written by a separate thread.
pub(crate) struct Saver {
    dir: PathBuf,
    config: CheckpointConfig,
    best: Vec<Best>,
    /// The step at which the run has already ended, after its last validation.
    ended_at: Option<u64>,
    /// The step of the newest checkpoint.
    saved: Option<u64>,
    saved_at: Instant,
    writing: Option<JoinHandle<Result<Option<PathBuf>>>>,
}

impl Saver {
    /// Saves into `dir`, continuing from the checkpoint with the state `resumed`.
    pub(crate) fn new(dir: &Path, config: &CheckpointConfig, resumed: Option<&State>) -> Self {
        let mut saver = Self {
            dir: dir.to_path_buf(),
            config: config.clone(),
            best: Vec::new(),
            ended_at: None,
            saved: resumed.map(|state| state.progress.step),
            saved_at: Instant::now(),
            writing: None,
        };
        if let Some(state) = resumed {
            if !saver.take(&state.best, state.best_by.as_ref()) {
                tracing::warn!("`checkpoint.monitor` has changed: the list of best validations starts over");
            }
            // The validation at the end of a run comes after its checkpoint, so it is recorded in the folder.
            let Validations { mut best, best_by, ended_at } = Validations::read(dir);
            best.retain(|best| best.step <= state.progress.step);
            saver.take(&best, best_by.as_ref());
            // A run resumed from an earlier step has yet to reach its end.
            saver.ended_at = ended_at.filter(|step| *step == state.progress.step);
        }
        saver
    }

    /// Prepares the folder once this run is certain to train: see [`files::set_aside`].
    pub(crate) fn begin(&self) -> Result<()> {
        let aside = files::set_aside(&self.dir, self.saved)?;
        if !aside.is_empty() {
            let names: Vec<String> = aside.iter().map(|path| path.display().to_string()).collect();
            tracing::warn!("checkpoints of steps that this run repeats are kept as {}", names.join(", "));
        }
        for (link, step) in [("last", self.saved), ("best", self.best.first().map(|best| best.step))] {
            let step = step.map(|step| step.to_string()).filter(|step| self.dir.join(step).exists());
            match step {
                Some(step) => files::link(&self.dir, link, Path::new(&step))?,
                // It pointed to a checkpoint that is now set aside, or that was the best by another metric.
                None => files::unlink(&self.dir, link)?,
            }
        }
        Ok(())
    }

    /// Whether a run has already ended at `step`, after its last validation.
    pub(crate) fn has_ended_at(&self, step: u64) -> bool {
        self.ended_at == Some(step)
    }

    /// Records that a run has ended at `step`, after its last validation.
    pub(crate) fn end(&mut self, step: u64) -> Result<()> {
        self.ended_at = Some(step);
        self.validations().write(&self.dir)
    }

    fn validations(&self) -> Validations {
        let best_by = Some(self.criterion());
        Validations { best: self.best.clone(), best_by, ended_at: self.ended_at }
    }

    /// The criterion for the best validations.
    pub(crate) fn criterion(&self) -> Criterion {
        Criterion::new(&self.config.monitor, self.config.maximize)
    }

    /// The best validations so far, the best first.
    pub(crate) fn best(&self) -> &[Best] {
        &self.best
    }

    /// Whether a checkpoint of `step` is due: by number, by time or, without either, if it `is_validated`.
    pub(crate) fn is_due(&self, step: u64, is_validated: bool) -> bool {
        match (self.config.every_steps, self.config.every_time) {
            (None, None) => is_validated,
            (steps, time) => {
                steps.is_some_and(|every| step.is_multiple_of(every))
                    || time.is_some_and(|every| self.saved_at.elapsed() >= every)
            }
        }
    }

    /// Whether the checkpoint of `step` has been taken.
    pub(crate) fn has(&self, step: u64) -> bool {
        self.saved == Some(step)
    }

    /// Ranks a validation; returns whether it is among the best. Of equal values, the earlier one is better;
    /// NaN is worse than all other values.
    pub(crate) fn rank(&mut self, step: u64, value: f64) -> bool {
        let best = Best { step, value: Some(value).filter(|value| !value.is_nan()) };
        self.place(best);
        self.best.contains(&best)
    }

    /// Adds these to the best validations, if they were ranked `by` the same criterion; returns whether so.
    fn take(&mut self, best: &[Best], by: Option<&Criterion>) -> bool {
        let goes_on = self.criterion().goes_on(by);
        best.iter().filter(|_| goes_on).for_each(|best| self.place(*best));
        goes_on
    }

    /// Adds it to the best validations, if it is among them.
    fn place(&mut self, best: Best) {
        // Validations by the clock within a step can come to the same step again: the newer one counts.
        self.best.retain(|other| other.step != best.step);
        self.best.push(best);
        let sign = if self.config.maximize { -1. } else { 1. };
        self.best.sort_by(|a, b| match (a.value, b.value) {
            (Some(a), Some(b)) => (sign * a).total_cmp(&(sign * b)),
            (None, None) => Ordering::Equal,
            (a, b) => b.is_some().cmp(&a.is_some()),
        });
        self.best.truncate(self.config.keep_best);
    }

    /// Takes a checkpoint: waits for the previous one to be on disk, and leaves the writing to another
    /// thread. Without a snapshot, only updates the links and deletes old checkpoints. Returns the previous
    /// checkpoint.
    pub(crate) fn save(&mut self, snapshot: Option<Snapshot>) -> Result<Option<PathBuf>> {
        let before = self.finish()?;
        if let Some(snapshot) = &snapshot {
            self.saved = Some(snapshot.state.progress.step);
            self.saved_at = Instant::now();
        }
        let (dir, keep) = (self.dir.clone(), self.config.keep_last);
        let validations = self.validations();
        self.writing = Some(std::thread::spawn(move || {
            let best: Vec<u64> = validations.best.iter().map(|best| best.step).collect();
            validations.write(&dir)?;
            let path = snapshot.map(|snapshot| snapshot.write(&dir)).transpose()?;
            if let Some(step) = path.as_deref().and_then(Path::file_name) {
                files::link(&dir, "last", Path::new(step))?;
            }
            // The best checkpoint may not be on disk if a run is continued in another folder.
            if let Some(step) = best.first().map(u64::to_string).filter(|step| dir.join(step).exists()) {
                files::link(&dir, "best", Path::new(&step))?;
            }
            files::prune(&dir, keep, &best)?;
            Ok(path)
        }));
        Ok(before)
    }

    /// The checkpoint completed since the last call, if any. Does not wait.
    pub(crate) fn poll(&mut self) -> Result<Option<PathBuf>> {
        match self.writing.as_ref().is_some_and(JoinHandle::is_finished) {
            true => self.finish(),
            false => Ok(None),
        }
    }

    /// Waits until the last checkpoint is on disk, and returns its path.
    pub(crate) fn finish(&mut self) -> Result<Option<PathBuf>> {
        let Some(writing) = self.writing.take() else { return Ok(None) };
        writing.join().unwrap_or_else(|_| Err(Error::msg("saving a checkpoint failed; the message is above")))
    }
}

impl Drop for Saver {
    fn drop(&mut self) {
        // After an error elsewhere, still finish the checkpoint, but report that error.
        let _ = self.finish();
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Var};

    use super::*;
    use crate::callback::Progress;

    fn saver(dir: &Path, config: CheckpointConfig) -> Saver {
        Saver::new(dir, &config, None)
    }

    fn save(saver: &mut Saver, step: u64) {
        let params = [("w".to_string(), Var::new(&[step as f32], &Device::Cpu).unwrap())];
        let state = State { progress: Progress { step, ..Default::default() }, ..State::default() };
        saver.save(Some(Snapshot::take(&params, &[], None, state).unwrap())).unwrap();
    }

    #[test]
    fn the_newest_and_the_best_stay() {
        let dir = tempfile::tempdir().unwrap();
        let config = CheckpointConfig { keep_last: 2, keep_best: 2, ..Default::default() };
        let mut saver = saver(dir.path(), config);
        // NaN is worse than any number.
        let losses = [(1, 3.), (2, 1.), (3, f64::NAN), (4, 2.), (5, 2.), (6, 9.)];
        for (step, loss) in losses {
            let best = saver.rank(step, loss);
            assert_eq!(best, [1, 2, 4].contains(&step), "step {step}");
            save(&mut saver, step);
        }
        saver.finish().unwrap();
        let exists = |name: &str| dir.path().join(name).join("model.safetensors").exists();
        assert_eq!(
            [1, 2, 3, 4, 5, 6].map(|s: u64| exists(&s.to_string())),
            [false, true, false, true, true, true]
        );
        let target = |link: &str| std::fs::read_link(dir.path().join(link)).unwrap();
        assert_eq!((target("best"), target("last")), ("2".into(), "6".into()));
        assert_eq!(saver.best().iter().map(|best| best.step).collect::<Vec<_>>(), [2, 4]);
    }

    #[test]
    fn the_largest_is_best_where_asked_for() {
        let dir = tempfile::tempdir().unwrap();
        let config = CheckpointConfig { maximize: true, ..Default::default() };
        let mut saver = saver(dir.path(), config);
        let mut rank = |step, value| saver.rank(step, value);
        assert_eq!([rank(1, f64::NAN), rank(2, 0.5), rank(3, 0.4), rank(4, 0.6)], [true, true, false, true]);
    }

    #[test]
    fn a_failed_write_is_reported_by_the_next_call() {
        let dir = tempfile::tempdir().unwrap();
        let blocked = dir.path().join("file");
        std::fs::write(&blocked, "").unwrap();
        let mut saver = saver(&blocked, CheckpointConfig::default());
        save(&mut saver, 1);
        assert!(saver.finish().unwrap_err().to_string().contains("file"));
    }
}
