//! What a launched run tells its supervisor: that it lives, and which checkpoint is its newest.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
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
}

impl Pulse {
    /// Where a supervisor asks for it.
    pub(crate) fn asked_for() -> Result<Option<Self>> {
        let Some(path) = std::env::var_os(PULSE_FILE).map(PathBuf::from) else { return Ok(None) };
        let file = File::options().append(true).create(true).open(&path).map_err(Error::file(&path))?;
        Ok(Some(Self { path, file, supervisor: getppid() }))
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
        let mut pulse = Pulse { path: file.path().into(), file: open, supervisor: getppid() };
        let age = || file.path().metadata().unwrap().modified().unwrap().elapsed();
        pulse.on_validation_batch(1, None).unwrap();
        assert!(age().is_ok_and(|age| age < Duration::from_secs(60)));
        pulse.on_fit_end(&Progress::default(), &StopReason::Finished).unwrap();
        // It lies in the future.
        assert!(age().unwrap_err().duration() > Duration::from_secs(24 * 3600));
    }
}
