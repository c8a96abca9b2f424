//! What a launched run tells its supervisor: that it lives, and which checkpoint is its newest.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use candlepower::callback::{Callback, Flow, Plan, Progress, StepEnd, StopReason};
use candlepower::{Error, Result};
use nix::unistd::{Pid, getppid};
use signal_hook::consts::SIGTERM;

/// The environment variable that names the file which a launched run keeps young.
pub(crate) const PULSE_FILE: &str = "CANDLEPOWER_PULSE_FILE";

/// For how long a run that has trained needs no pulse: a year.
const REST: Duration = Duration::from_secs(365 * 24 * 3600);

/// Keeps a file young while the run goes on; its content is the path of the newest complete checkpoint.
pub(crate) struct Pulse {
    path: PathBuf,
    file: File,
    supervisor: Pid,
    /// Beats as long as it is kept: to open the data takes as long as it takes.
    opening: Option<Arc<()>>,
}

impl Pulse {
    /// Where a supervisor asks for it.
    pub(crate) fn asked_for() -> Result<Option<Self>> {
        let Some(path) = std::env::var_os(PULSE_FILE).map(PathBuf::from) else { return Ok(None) };
        let file = File::options().append(true).create(true).open(&path).map_err(Error::file(&path))?;
        let opening = beat_while_opening(&path, OPENING)?;
        Ok(Some(Self { path, file, supervisor: getppid(), opening: Some(opening) }))
    }

    fn beat(&self) -> Result<()> {
        self.beat_at(SystemTime::now())
    }

    fn beat_at(&self, time: SystemTime) -> Result<()> {
        self.file.set_modified(time).map_err(Error::file(&self.path))
    }
}

impl Callback for Pulse {
    fn on_fit_start(&mut self, _: &Plan) -> Result<()> {
        self.opening = None;
        self.beat()
    }

    fn on_step_end(&mut self, _: &StepEnd) -> Result<Flow> {
        self.beat()?;
        // Whoever starts the run again, where its supervisor was killed, must not find it still training.
        if getppid() != self.supervisor {
            return Ok(Flow::Stop(StopReason::Signal(SIGTERM)));
        }
        Ok(Flow::Continue)
    }

    fn on_validation_batch(&mut self, _: usize, _: Option<usize>) -> Result<Flow> {
        self.beat()?;
        Ok(Flow::Continue)
    }

    fn on_checkpoint(&mut self, checkpoint: &Path) -> Result<()> {
        let beside = self.path.with_extension("new");
        fs::write(&beside, checkpoint.as_os_str().as_encoded_bytes()).map_err(Error::file(&beside))?;
        fs::rename(&beside, &self.path).map_err(Error::file(&self.path))?;
        // The file has another place on the disk now.
        self.file = File::options().append(true).open(&self.path).map_err(Error::file(&self.path))?;
        Ok(())
    }

    fn on_fit_end(&mut self, _: &Progress, _: &StopReason) -> Result<()> {
        // What is computed after the last step takes as long as it takes.
        self.beat_at(SystemTime::now() + REST)
    }

    fn wants_gradients(&self, _: u64) -> bool {
        false
    }

    /// Each machine may have a supervisor of its own.
    fn on_every_rank(&self) -> bool {
        true
    }
}

/// How often a run that has not begun yet beats.
const OPENING: Duration = Duration::from_secs(5);

/// Keeps a file young, as long as the answer is kept.
fn beat_while_opening(path: &Path, period: Duration) -> Result<Arc<()>> {
    let file = File::options().append(true).open(path).map_err(Error::file(path))?;
    let kept = Arc::new(());
    let is_kept = Arc::downgrade(&kept);
    std::thread::spawn(move || {
        while is_kept.strong_count() > 0 && file.set_modified(SystemTime::now()).is_ok() {
            std::thread::sleep(period);
        }
    });
    Ok(kept)
}

/// The newest checkpoint that a run has told of.
pub(crate) fn checkpoint_in(pulse: &Path) -> Option<PathBuf> {
    fs::read_to_string(pulse).ok().filter(|text| !text.is_empty()).map(PathBuf::from)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn what_comes_after_training_needs_no_pulse() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let open = File::options().append(true).open(file.path()).unwrap();
        let mut pulse = Pulse { path: file.path().into(), file: open, supervisor: getppid(), opening: None };
        let age = || file.path().metadata().unwrap().modified().unwrap().elapsed();
        pulse.on_validation_batch(1, None).unwrap();
        assert!(age().is_ok_and(|age| age < Duration::from_secs(60)));
        pulse.on_fit_end(&Progress::default(), &StopReason::Finished).unwrap();
        // It lies in the future.
        assert!(age().unwrap_err().duration() > Duration::from_secs(24 * 3600));
    }

    #[test]
    fn what_comes_before_training_is_no_hang() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let is_old = || {
            let seen = file.path().metadata().unwrap().modified().unwrap();
            seen.elapsed().is_ok_and(|age| age > Duration::from_secs(1800))
        };
        let grow_old = || file.as_file().set_modified(SystemTime::now() - Duration::from_secs(3600)).unwrap();
        let opening = beat_while_opening(file.path(), Duration::from_millis(1)).unwrap();
        grow_old();
        while is_old() {
            std::thread::sleep(Duration::from_millis(1));
        }
        drop(opening);
        // It may be about to beat once more.
        let stays_old = |_| {
            grow_old();
            std::thread::sleep(Duration::from_millis(20));
            is_old()
        };
        assert!((0..100).any(stays_old));
    }
}
