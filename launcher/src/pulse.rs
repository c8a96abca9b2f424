//! The pulse of a launched run: tells its supervisor that it is alive and which checkpoint is its newest.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use candlepower::callback::{Callback, Flow, Plan, Progress, StepEnd, StopReason};
use candlepower::{Error, Result};
use nix::unistd::{Pid, getppid};
use signal_hook::consts::SIGTERM;

/// The environment variable that names the pulse file, which a launched run keeps touching.
pub(crate) const PULSE_FILE: &str = "CANDLEPOWER_PULSE_FILE";

/// How long a run needs no pulse after training: a year.
const REST: Duration = Duration::from_secs(365 * 24 * 3600);

/// Updates a file's modification time while the run goes on. The file contains the path of the newest
/// complete checkpoint.
pub(crate) struct Pulse {
    path: PathBuf,
    file: File,
    supervisor: Pid,
    /// The heartbeat until training starts, stopped when this is dropped: opening the data may take any
    /// amount of time.
    opening: Option<Arc<()>>,
}

impl Pulse {
    /// Creates the pulse, if a supervisor asks for one.
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
        // If the supervisor was killed, the run may be started again, so it must not keep training.
        if getppid() != self.supervisor {
            return Ok(Flow::Stop(StopReason::Signal(SIGTERM)));
        }
        Ok(Flow::Continue)
    }

    fn on_validation_batch_end(&mut self, _: usize, _: Option<usize>) -> Result<Flow> {
        self.beat()?;
        Ok(Flow::Continue)
    }

    fn on_checkpoint(&mut self, checkpoint: &Path) -> Result<()> {
        let beside = self.path.with_extension("new");
        fs::write(&beside, checkpoint.as_os_str().as_encoded_bytes()).map_err(Error::file(&beside))?;
        fs::rename(&beside, &self.path).map_err(Error::file(&self.path))?;
        // The rename replaced the file, so open the new one.
        self.file = File::options().append(true).open(&self.path).map_err(Error::file(&self.path))?;
        Ok(())
    }

    fn on_fit_end(&mut self, _: &Progress, _: &StopReason) -> Result<()> {
        // Work after the last step may take any amount of time.
        self.beat_at(SystemTime::now() + REST)
    }

    fn wants_gradients(&self, _: u64) -> bool {
        false
    }

    /// Each machine may have its own supervisor.
    fn on_every_rank(&self) -> bool {
        true
    }
}

/// How often the pulse beats before training starts.
const OPENING: Duration = Duration::from_secs(5);

/// Keeps updating a file's modification time until the returned value is dropped.
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

/// The newest checkpoint that a run has reported.
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
        pulse.on_validation_batch_end(1, None).unwrap();
        assert!(age().is_ok_and(|age| age < Duration::from_secs(60)));
        pulse.on_fit_end(&Progress::default(), &StopReason::Finished).unwrap();
        // The modification time is in the future.
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
        // The thread may beat once more.
        let stays_old = |_| {
            grow_old();
            std::thread::sleep(Duration::from_millis(20));
            is_old()
        };
        assert!((0..100).any(stays_old));
    }
}
