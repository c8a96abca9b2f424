//! `candlepower launch`: `train` under supervision. A failure in any part of a run ends the whole run within
//! seconds, and the run is started again from its last good checkpoint.

use std::ffi::OsString;
use std::fs;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Child, Command, ExitCode, ExitStatus};
use std::time::{Duration, Instant, SystemTime};

use candlepower::collective::{Backend, DistributedConfig, Environment, FAILURE_FILE, MEETING_PLACE};
use candlepower::{Error, Result};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGUSR1};
use signal_hook::iterator::Signals;

use crate::pulse::{PULSE_FILE, checkpoint_in};
use crate::say::tell;
use crate::signals::ending;

/// How often the run is polled.
const LOOK: Duration = Duration::from_millis(100);
/// How long a failed run may take to end by itself.
const GRACE: Duration = Duration::from_secs(3);

/// A run to supervise.
pub(crate) struct Launch {
    /// Arguments of `train`, starting with the configuration.
    pub(crate) train: Vec<OsString>,
    /// The value of `--resume`.
    pub(crate) resume: Option<String>,
    pub(crate) devices: usize,
    pub(crate) distributed: DistributedConfig,
    pub(crate) node: Option<Node>,
}

/// This machine, when several machines are launched one by one: the values that `torchrun` would set.
pub(crate) struct Node {
    rank: usize,
    nodes: usize,
    master: String,
}

impl Node {
    /// Reads this machine's place from the command line and the configuration. `None` for a single machine,
    /// or if the starter of this program already assigns ranks to its processes.
    pub(crate) fn of(distributed: &DistributedConfig, rank: Option<usize>) -> Result<Option<Self>> {
        let nodes = distributed.nodes;
        match rank {
            // With MPI, `mpirun` reaches the other machines.
            None if nodes == 1 || distributed.backend == Backend::Mpi || Environment::read()?.is_some() => {
                Ok(None)
            }
            None => Err(Error::msg(format!(
                "`distributed.nodes` is {nodes}: start `candlepower launch` on each machine, with --node-rank 0 to {} and \
                 --master HOST:PORT",
                nodes - 1
            ))),
            Some(rank) if rank >= nodes => Err(Error::msg(format!(
                "--node-rank {rank}: there are {nodes} machines, counted from 0; set their number with --nodes"
            ))),
            Some(_) if nodes == 1 => Ok(None),
            Some(rank) => match &distributed.master {
                Some(master) => Ok(Some(Self { rank, nodes, master: master.clone() })),
                None => Err(Error::msg(
                    "--master HOST:PORT is missing: where the machine of rank 0 can be reached",
                )),
            },
        }
    }

    /// The environment variables of the only process on its machine.
    fn variables(&self) -> [(&'static str, String); 5] {
        [
            ("RANK", self.rank.to_string()),
            ("WORLD_SIZE", self.nodes.to_string()),
            ("LOCAL_RANK", "0".into()),
            ("LOCAL_WORLD_SIZE", "1".into()),
            (MEETING_PLACE, self.master.clone()),
        ]
    }
}

/// How one attempt ended.
enum End {
    /// It ended by itself with this code: finished, interrupted after saving, or not worth retrying.
    Exit(u8),
    /// It ended too early, for this reason.
    Failure(String),
}

impl Launch {
    /// Runs until the training is finished, has failed too often, or is told to end.
    pub(crate) fn run(mut self) -> Result<ExitCode> {
        let signals = Signals::new(ending().into_iter().chain([SIGUSR1]));
        let mut signals = signals.map_err(|error| Error::msg(format!("signals: {error}")))?;
        let (mut restarts, mut last_checkpoint) = (0, None);
        loop {
            let files = tempfile::tempdir().map_err(Error::file("the folder for temporary files"))?;
            let end = self.attempt(files.path(), &mut signals)?;
            let why = match end {
                End::Exit(code) => return Ok(ExitCode::from(code)),
                End::Failure(why) => why,
            };
            if restarts == self.distributed.max_restarts {
                return Err(Error::msg(format!(
                    "{why}; not restarted: `distributed.max_restarts` is {restarts}"
                )));
            }
            restarts += 1;
            let checkpoint = checkpoint_in(&files.path().join(PULSE));
            if checkpoint.is_none() && restarts > 1 && self.devices > self.fewest_devices() {
                self.devices -= 1;
            }
            last_checkpoint = checkpoint.or(last_checkpoint);
            // Resume from the run's folder, not from the checkpoint: the folder may hold a newer one.
            let run = last_checkpoint.as_deref().and_then(|checkpoint: &Path| checkpoint.parent()?.parent());
            let from = match (run, &self.resume) {
                (Some(run), _) => format!("from the last good checkpoint of {}", run.display()),
                (None, Some(resume)) => format!("with --resume {resume}"),
                (None, None) if self.node.as_ref().is_some_and(|node| node.rank > 0) => {
                    "from where the first machine resumes".into()
                }
                (None, None) => "from the start: there is no checkpoint yet".into(),
            };
            if let Some(run) = run {
                self.resume = Some(run.display().to_string());
            }
            tell!(
                "{why}\nrestart {restarts} of {}, on {} device(s), {from}",
                self.distributed.max_restarts,
                self.devices
            );
        }
    }

    /// The fewest devices to restart with. Machines launched one by one could not agree on a smaller number.
    fn fewest_devices(&self) -> usize {
        self.distributed.min_devices.filter(|_| self.node.is_none()).unwrap_or(self.devices)
    }

    /// Starts `train` and watches it until it ends. None of its processes is left running afterwards.
    fn attempt(&self, files: &Path, signals: &mut Signals) -> Result<End> {
        let (failure, pulse) = (files.join("failure"), files.join(PULSE));
        let mut command = self.command()?;
        command.env(FAILURE_FILE, &failure).env(PULSE_FILE, &pulse).process_group(0);
        command.envs(self.node.iter().flat_map(Node::variables));
        let child = command.spawn().map_err(Error::file(command.get_program()))?;
        let mut run = Run { child, ended: None };
        let started = SystemTime::now();
        let mut told_to_end = None;
        let why = loop {
            for signal in signals.pending() {
                // As in `train`: the first signal lets it finish its step and save, the second ends it immediately.
                let again = told_to_end.is_some() && signal != SIGUSR1;
                run.signal(if again { Signal::SIGKILL } else { named(signal) });
                told_to_end = told_to_end.or(Some(signal).filter(|signal| *signal != SIGUSR1));
            }
            if let Some(status) = run.poll()? {
                let was_told = |code| [SIGHUP, SIGINT, SIGTERM].map(interrupted).contains(&code);
                match (code(status), told_to_end) {
                    (Some(code @ (0 | 2)), _) => return Ok(End::Exit(code)),
                    (Some(code), told) if told.is_some() || was_told(code) => return Ok(End::Exit(code)),
                    (None, Some(signal)) => return Ok(End::Exit(interrupted(signal))),
                    _ => break first_failure(&failure).unwrap_or_else(|| describe(status)),
                }
            }
            if let Some(why) = first_failure(&failure) {
                break why;
            }
            let seen = fs::metadata(&pulse).and_then(|pulse| pulse.modified()).unwrap_or(started);
            let patience = self.distributed.patience() + GRACE;
            if seen.elapsed().is_ok_and(|waited| waited > patience) {
                break format!("the run hangs: no step for {}", humantime::format_duration(patience));
            }
            std::thread::sleep(LOOK);
        };
        run.end()?;
        let why = format!("the run failed: {why}");
        Ok(match told_to_end {
            None => End::Failure(why),
            // The user asked it to end, so it is not retried.
            Some(signal) => {
                tell!("{why}");
                End::Exit(interrupted(signal))
            }
        })
    }

    /// The command for `train` on all devices: threads of one process, or the processes of `mpirun`.
    fn command(&self) -> Result<Command> {
        let program = std::env::current_exe().map_err(Error::file("this program"))?;
        let mut command = match self.distributed.backend {
            Backend::Mpi => {
                let mut command = Command::new("mpirun");
                let processes = self.devices * self.distributed.nodes;
                command.args(["-n", &processes.to_string()]).arg(program);
                command
            }
            Backend::Auto | Backend::Threads | Backend::Nccl => Command::new(program),
        };
        command.arg("train").args(&self.train).args(["--devices", &self.devices.to_string()]);
        command.args(self.resume.iter().flat_map(|resume| ["--resume", resume]));
        Ok(command)
    }
}

const PULSE: &str = "pulse";

/// A running `train`, with all processes that it has started.
struct Run {
    child: Child,
    ended: Option<ExitStatus>,
}

impl Run {
    fn poll(&mut self) -> Result<Option<ExitStatus>> {
        if self.ended.is_none() {
            self.ended = self.child.try_wait().map_err(Error::file("the run's process"))?;
        }
        Ok(self.ended)
    }

    fn signal(&self, signal: Signal) {
        // A process that has ended needs no signal.
        if self.ended.is_none() {
            let _ = killpg(Pid::from_raw(self.child.id() as i32), signal);
        }
    }

    /// Waits a short while for all processes to end, then kills them.
    fn end(&mut self) -> Result<()> {
        let since = Instant::now();
        // Only once: a second SIGTERM ends it immediately, and it may be saving.
        self.signal(Signal::SIGTERM);
        while self.poll()?.is_none() {
            if since.elapsed() > GRACE {
                // A hanging rank may block the rest of its process, which has reported everything already.
                self.signal(Signal::SIGKILL);
            }
            std::thread::sleep(LOOK);
        }
        Ok(())
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        // After an error in the supervisor itself, leave nothing running.
        let _ = self.end();
    }
}

/// The first failure that a rank has recorded.
fn first_failure(path: &Path) -> Option<String> {
    fs::read_to_string(path).ok().filter(|text| !text.is_empty())
}

/// The exit code of a process that ended by itself.
fn code(status: ExitStatus) -> Option<u8> {
    status.code().map(|code| code as u8)
}

/// The exit code of `train` after `signal`.
fn interrupted(signal: i32) -> u8 {
    128 + signal as u8
}

fn describe(status: ExitStatus) -> String {
    match (status.signal(), status.code()) {
        (Some(signal), _) => format!("its process was killed by signal {signal}"),
        (_, Some(code)) => format!("its process ended with code {code}; its message is above"),
        _ => status.to_string(),
    }
}

fn named(signal: i32) -> Signal {
    match signal {
        SIGHUP => Signal::SIGHUP,
        SIGINT => Signal::SIGINT,
        SIGUSR1 => Signal::SIGUSR1,
        _ => Signal::SIGTERM,
    }
}
