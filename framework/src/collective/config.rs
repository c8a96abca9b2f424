//! The `[distributed]` section.

use std::sync::Arc;
use std::time::Duration;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Collective, Environment, Solo};
use crate::error::{Error, Result};
use crate::trainer::duration;

/// Fields of `[distributed]`. How many devices there are is `trainer.devices`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct DistributedConfig {
    /// What carries the ranks' traffic.
    pub backend: Backend,
    /// What ranks share out besides the samples.
    pub shard: Shard,
    /// A rank that the others have waited for so long counts as failed, as does a launched run that has made no step for
    /// so long, as `"10 min"`.
    #[serde(with = "duration", skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<String>")]
    pub hang_timeout: Option<Duration>,
    /// How often `candlepower launch` starts a failed run again, from its last good checkpoint.
    pub max_restarts: u32,
    /// With how few devices `candlepower launch` may go on: a run that fails twice without a new checkpoint between goes on
    /// with one device less. Default: as many as `trainer.devices`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub min_devices: Option<usize>,
}

/// What carries the ranks' traffic.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Backend {
    /// MPI where `mpirun` or `srun` has started several processes, else threads.
    Auto,
    /// The memory of one process: a thread for each device.
    Threads,
    /// MPI: a process for each device. Needs the feature `mpi`.
    Mpi,
}

/// What ranks share out besides the samples.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Shard {
    /// Nothing: each rank holds everything.
    None,
    /// The optimizer's state (ZeRO-1, Rajbhandari et al. 2020, section 5.1): each rank updates a part of the parameters.
    Optimizer,
}

impl Default for DistributedConfig {
    fn default() -> Self {
        Self {
            backend: Backend::Auto,
            shard: Shard::None,
            hang_timeout: Some(Self::HANG_TIMEOUT),
            max_restarts: 3,
            min_devices: None,
        }
    }
}

impl DistributedConfig {
    const HANG_TIMEOUT: Duration = Duration::from_secs(600);

    /// Refuses values that no ranks could work with.
    pub fn check(&self) -> Result<()> {
        if self.hang_timeout.is_some_and(|timeout| timeout.is_zero()) {
            return Err(Error::setting("hang_timeout", "expected a time above 0"));
        }
        if self.min_devices == Some(0) {
            return Err(Error::setting("min_devices", "expected at least 1, found 0"));
        }
        if self.backend == Backend::Mpi && !cfg!(feature = "mpi") {
            let message =
                "this binary has no MPI; expected \"auto\" or \"threads\", or a build with `--features mpi`";
            return Err(Error::setting("backend", message));
        }
        Ok(())
    }

    /// How long a rank, or a step, is waited for.
    pub fn patience(&self) -> Duration {
        self.hang_timeout.unwrap_or(Self::HANG_TIMEOUT)
    }

    /// This process's rank among those that were started together with it: by `mpirun`, `srun`, or whatever sets the
    /// variables that [`Environment`] knows.
    pub fn join(&self) -> Result<Arc<dyn Collective>> {
        let environment = Environment::read()?;
        #[cfg(feature = "mpi")]
        if self.backend == Backend::Mpi || (self.backend == Backend::Auto && environment.is_some()) {
            let ranks = super::Mpi::join(self.patience())?;
            return match environment {
                Some(Environment { starter, world_size, .. }) if world_size != ranks.world_size() => {
                    Err(Error::msg(format!(
                        "{} started {world_size} processes, and MPI knows of {}: start them with `mpirun`, or with \
                         `srun --mpi=pmix`",
                        starter.name(),
                        ranks.world_size()
                    )))
                }
                _ => Ok(Arc::new(ranks)),
            };
        }
        match environment {
            // Each would train on its own, and all would write the same files.
            Some(Environment { starter, rank, world_size, .. }) => Err(Error::msg(format!(
                "this process is rank {rank} of {world_size} ({}), and has nothing to reach the others with: build it with \
                 `--features mpi` and leave `distributed.backend` at \"auto\", or start one process with \
                 `trainer.devices = {world_size}`",
                starter.name()
            ))),
            None => Ok(Arc::new(Solo)),
        }
    }
}
