//! The `[distributed]` section.

use std::sync::Arc;
use std::time::Duration;

use candlepower_kernels::BUILT_WITH_CUDA;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Collective, Environment, Processes, Solo, Starter};
use crate::error::{Error, Result};
use crate::trainer::duration;

/// Fields of `[distributed]`. The number of devices per machine is `trainer.devices`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct DistributedConfig {
    /// Transport between ranks.
    pub backend: Backend,
    /// Number of machines that `candlepower launch` trains on, with `trainer.devices` on each.
    pub nodes: usize,
    /// Address of the first machine for the others, as `"HOST:PORT"`. Default: from the environment.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub master: Option<String>,
    /// What to divide among ranks, besides the samples.
    pub shard: Shard,
    /// Timeout, for example `"10 min"`: a rank that keeps the others waiting for longer, or a launched run without
    /// a step for longer, has failed.
    #[serde(with = "duration", skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<String>")]
    pub hang_timeout: Option<Duration>,
    /// Maximum restarts of a failed run by `candlepower launch`, from its last good checkpoint.
    pub max_restarts: u32,
    /// Minimum number of devices for `candlepower launch`: a run that fails twice without a new checkpoint in
    /// between continues with one device fewer. Default: `trainer.devices`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub min_devices: Option<usize>,
}

/// Transport between ranks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Backend {
    /// Between processes started together: MPI, or NCCL without MPI. In one process: threads.
    Auto,
    /// Shared memory of one process, with one thread per device.
    Threads,
    /// MPI, with one process per device. Needs the feature `mpi`.
    Mpi,
    /// NCCL without MPI, between CUDA devices of processes started by `torchrun`, a PyTorchJob, `srun`, or
    /// `candlepower launch` on each machine: one process per device, or one per machine. Needs the feature
    /// `cuda`.
    Nccl,
}

/// What to divide among ranks, besides the samples.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Shard {
    /// Nothing: each rank holds everything.
    None,
    /// The optimizer state (ZeRO-1, Rajbhandari et al. 2020, section 5.1): each rank updates some parameters.
    Optimizer,
}

impl Default for DistributedConfig {
    fn default() -> Self {
        Self {
            backend: Backend::Auto,
            nodes: 1,
            master: None,
            shard: Shard::None,
            hang_timeout: Some(Self::HANG_TIMEOUT),
            max_restarts: 3,
            min_devices: None,
        }
    }
}

/// Whether this program was built with MPI.
const BUILT_WITH_MPI: bool = cfg!(feature = "mpi");

/// The environment variable that tells NCCL where its ranks meet.
pub const MEETING_PLACE: &str = "NCCL_COMM_ID";

impl DistributedConfig {
    const HANG_TIMEOUT: Duration = Duration::from_secs(600);

    /// Refuses invalid settings.
    pub fn check(&self) -> Result<()> {
        if self.hang_timeout.is_some_and(|timeout| timeout.is_zero()) {
            return Err(Error::setting("hang_timeout", "expected a time above 0"));
        }
        if self.min_devices == Some(0) {
            return Err(Error::setting("min_devices", "expected at least 1, found 0"));
        }
        if self.nodes == 0 {
            return Err(Error::setting("nodes", "expected at least 1, found 0"));
        }
        let is_place = |master: &String| {
            master
                .rsplit_once(':')
                .is_some_and(|(host, port)| !host.is_empty() && port.parse::<u16>().is_ok())
        };
        if let Some(master) = self.master.as_ref().filter(|master| !is_place(master)) {
            let message = format!("expected a host and a port, as \"node1:29500\", found \"{master}\"");
            return Err(Error::setting("master", message));
        }
        for (backend, is_built, name, feature) in
            [(Backend::Mpi, BUILT_WITH_MPI, "MPI", "mpi"), (Backend::Nccl, BUILT_WITH_CUDA, "NCCL", "cuda")]
        {
            if self.backend == backend && !is_built {
                return Err(Error::setting(
                    "backend",
                    format!(
                        "this binary has no {name}; expected \"auto\" or \"threads\", or a build with `--features \
                         {feature}`"
                    ),
                ));
            }
        }
        Ok(())
    }

    /// How long to wait for a rank, or for a step.
    pub fn patience(&self) -> Duration {
        self.hang_timeout.unwrap_or(Self::HANG_TIMEOUT)
    }

    /// The value to set `NCCL_COMM_ID` to before this process restarts, if it is not set: NCCL reads the address
    /// only from the environment. `None` if another backend is used.
    pub fn meeting_place(&self) -> Result<Option<String>> {
        let Some(environment) = Environment::read()? else { return Ok(None) };
        if std::env::var_os(MEETING_PLACE).is_some() || self.carrier(&environment) != Backend::Nccl {
            return Ok(None);
        }
        let Environment { starter, rank, world_size, master, .. } = environment;
        let nowhere = || {
            Error::msg(format!(
                "this process is rank {rank} of {world_size} ({}), and does not know the address of the first one: set \
                 `distributed.master` to its \"HOST:PORT\"",
                starter.name()
            ))
        };
        self.master.clone().or(master).ok_or_else(nowhere).map(Some)
    }

    /// The transport between processes that were started together.
    fn carrier(&self, environment: &Environment) -> Backend {
        carrier(self.backend, environment.starter, BUILT_WITH_MPI, BUILT_WITH_CUDA)
    }

    /// Joins the processes that were started together: by `mpirun`, `srun`, or any program that sets the
    /// variables known to [`Environment`]. If NCCL connects them, see [`meeting_place`](Self::meeting_place)
    /// first.
    pub fn join(&self) -> Result<Arc<dyn Collective>> {
        let environment = Environment::read()?;
        #[cfg(feature = "mpi")]
        if environment.as_ref().map_or(self.backend, |environment| self.carrier(environment)) == Backend::Mpi
        {
            return self.join_mpi(environment);
        }
        match environment {
            Some(environment) if self.carrier(&environment) == Backend::Nccl => {
                Ok(Arc::new(Processes::new(&environment)))
            }
            // Each process would train by itself, and all would write the same files.
            Some(Environment { starter, rank, world_size, .. }) => Err(Error::msg(format!(
                "this process is rank {rank} of {world_size} ({}), and cannot communicate with the others: build it with \
                 `--features mpi`, or for CUDA devices with `--features cuda`, and leave `distributed.backend` at \"auto\"; or \
                 start one process with `trainer.devices = {world_size}`",
                starter.name()
            ))),
            None if self.nodes > 1 => Err(Error::msg(format!(
                "`distributed.nodes` is {}, and this process was started alone: start `candlepower launch` on each machine, or \
                 `torchrun`, `srun` or `mpirun`",
                self.nodes
            ))),
            None => Ok(Arc::new(Solo)),
        }
    }

    #[cfg(feature = "mpi")]
    fn join_mpi(&self, environment: Option<Environment>) -> Result<Arc<dyn Collective>> {
        let ranks = super::Mpi::join(self.patience())?;
        match environment {
            Some(Environment { starter, world_size, .. }) if world_size != ranks.world_size() => {
                Err(Error::msg(format!(
                    "{} started {world_size} processes, but MPI sees {}: start them with `mpirun`, or with \
                     `srun --mpi=pmix`",
                    starter.name(),
                    ranks.world_size()
                )))
            }
            _ => Ok(Arc::new(ranks)),
        }
    }
}

/// The transport between processes that `starter` has started.
fn carrier(backend: Backend, starter: Starter, mpi: bool, cuda: bool) -> Backend {
    match backend {
        // MPI does not connect the processes that `torchrun` starts.
        Backend::Auto if cuda && (starter == Starter::Torch || !mpi) => Backend::Nccl,
        Backend::Auto if mpi => Backend::Mpi,
        Backend::Auto => Backend::Threads,
        asked => asked,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processes_are_connected_by_what_there_is() {
        use Backend::{Auto, Mpi, Nccl, Threads};
        use Starter::{OpenMpi, Slurm, Torch};
        for (starter, mpi, cuda, expected) in [
            (Torch, false, false, Threads),
            (Torch, true, false, Mpi),
            (Torch, false, true, Nccl),
            (Torch, true, true, Nccl),
            (Slurm, true, true, Mpi),
            (Slurm, false, true, Nccl),
            (OpenMpi, true, false, Mpi),
            (OpenMpi, false, false, Threads),
        ] {
            assert_eq!(carrier(Auto, starter, mpi, cuda), expected, "{starter:?}, {mpi}, {cuda}");
            assert_eq!(carrier(Nccl, starter, mpi, cuda), Nccl);
        }
    }

    #[test]
    fn machines_and_places_are_checked() {
        let error = |config: DistributedConfig| config.check().unwrap_err().to_string();
        let nowhere = DistributedConfig { nodes: 0, ..Default::default() };
        assert_eq!(error(nowhere), "`nodes`: expected at least 1, found 0");
        for master in ["node1", "node1:", ":29500", "node1:99999"] {
            let said = error(DistributedConfig { master: Some(master.into()), ..Default::default() });
            let expected = "expected a host and a port, as \"node1:29500\"";
            assert_eq!(said, format!("`master`: {expected}, found \"{master}\""));
        }
        let good =
            DistributedConfig { master: Some("10.0.0.1:29500".into()), nodes: 2, ..Default::default() };
        good.check().unwrap();
    }
}
