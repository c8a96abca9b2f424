//! Ranks of several processes that are connected only by their CUDA devices.

use std::sync::Arc;

use candle_core::Tensor;

use super::{Collective, Environment, Solo, Threads, report};
use crate::error::{Error, Result};

/// One of several processes started by `torchrun`, a PyTorchJob, `srun` or `candlepower launch`. Each process
/// has as many ranks as devices.
///
/// Ranks know their numbers immediately. They exchange data through NCCL, so nothing can be exchanged before
/// each rank has its device; `Nccl`, of the feature `cuda`, then takes over.
pub struct Processes {
    index: usize,
    count: usize,
    /// The number of processes on this machine.
    here: usize,
    /// Connects the ranks of this process.
    near: Arc<dyn Collective>,
}

impl Processes {
    /// The process that the environment describes, with one rank.
    pub fn new(environment: &Environment) -> Self {
        let Environment { rank, world_size, local_size, .. } = *environment;
        Self { index: rank, count: world_size, here: local_size.unwrap_or(1), near: Arc::new(Solo) }
    }

    /// The same process if each process has as many ranks as there are threads; this is one of them.
    pub(crate) fn with(&self, rank: Arc<Threads>) -> Self {
        Self { near: rank, ..*self }
    }

    /// On how many of a machine's devices this process trains: all, unless other processes use the rest.
    pub(crate) fn devices(&self, of_machine: usize) -> usize {
        if self.here > 1 { 1 } else { of_machine }
    }

    /// Connects the ranks of this process.
    #[cfg(feature = "cuda")]
    pub(super) fn near(&self) -> Arc<dyn Collective> {
        self.near.clone()
    }
}

/// The error message if such processes have no CUDA devices for NCCL to connect.
pub(crate) const NCCL_ALONE: &str = "these processes communicate through NCCL, which needs a CUDA device for each rank: expected \"cuda\", or for the CPU `distributed.backend = \"mpi\"`";

fn not_yet<T>() -> Result<T> {
    Err(Error::setting("accelerator", NCCL_ALONE))
}

impl Collective for Processes {
    fn rank(&self) -> usize {
        self.index * self.near.world_size() + self.near.rank()
    }

    fn world_size(&self) -> usize {
        self.count * self.near.world_size()
    }

    fn ranks_here(&self) -> usize {
        self.here * self.near.world_size()
    }

    fn all_reduce(&self, _: &Tensor) -> Result<Tensor> {
        not_yet()
    }

    fn reduce_scatter(&self, _: &Tensor) -> Result<Tensor> {
        not_yet()
    }

    fn all_gather(&self, _: &Tensor) -> Result<Tensor> {
        not_yet()
    }

    fn broadcast(&self, _: &Tensor) -> Result<Tensor> {
        not_yet()
    }

    fn barrier(&self) -> Result<()> {
        not_yet()
    }

    fn check_ranks(&self) -> Result<()> {
        self.near.check_ranks()
    }

    fn processes(&self) -> Option<&Processes> {
        Some(self)
    }

    fn abort(&self, why: &str) {
        // Report first, with the rank among all ranks: `near` only numbers this process's ranks.
        report(self.rank(), why);
        self.near.abort(why);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use candle_core::{DType, Device};

    use super::super::Starter;
    use super::*;

    fn process(rank: usize, local_size: Option<usize>) -> Processes {
        let (starter, world_size) = (Starter::Torch, 3);
        Processes::new(&Environment { starter, rank, world_size, local_rank: None, local_size, master: None })
    }

    #[test]
    fn ranks_are_counted_over_processes_and_their_devices() {
        let mut ranks = Vec::new();
        for index in 0..3 {
            let process = process(index, Some(1));
            assert_eq!(process.devices(2), 2);
            for thread in Threads::new(2, Duration::from_secs(60)) {
                let rank = process.with(Arc::new(thread));
                assert_eq!((rank.world_size(), rank.ranks_here()), (6, 2));
                ranks.push(rank.rank());
            }
        }
        assert_eq!(ranks, [0, 1, 2, 3, 4, 5]);
        // One process per device: other processes use the other devices.
        let shared = process(1, Some(3));
        assert_eq!(
            (shared.devices(4), shared.rank(), shared.world_size(), shared.ranks_here()),
            (1, 1, 3, 3)
        );
    }

    #[test]
    fn without_devices_nothing_is_exchanged() {
        let zeros = Tensor::zeros(3, DType::F32, &Device::Cpu).unwrap();
        let process = process(0, None);
        let said = [process.all_reduce(&zeros), process.broadcast(&zeros), process.all_gather(&zeros)];
        for error in said.map(|result| result.unwrap_err().to_string()) {
            assert!(error.starts_with("`accelerator`: these processes communicate through NCCL"), "{error}");
        }
        assert!(process.barrier().is_err() && process.check_ranks().is_ok());
    }
}
