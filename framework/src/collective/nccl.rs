//! Ranks on CUDA devices: NCCL carries what lies on the devices, another collective the rest.

use std::sync::Arc;
use std::time::{Duration, Instant};

use candle_core::{Device, Tensor};
use candlepower_kernels::Communicator;

use super::{Collective, check_addable, even_part};
use crate::error::Result;

/// One of several ranks, each on a CUDA device of its own.
///
/// Tensors on devices go from one to the other by NCCL. Numbers on the CPU, which are few, go by the collective that the
/// ranks have found each other with: threads of one process, or MPI. By it they also hear of a rank that has failed.
pub struct Nccl {
    others: Arc<dyn Collective>,
    communicator: Communicator,
    /// How long a rank is waited for.
    patience: Duration,
}

impl Nccl {
    /// Joins the other ranks on their devices; all of them must come here.
    pub fn join(others: Arc<dyn Collective>, device: &Device, patience: Duration) -> Result<Self> {
        let own = if others.rank() == 0 { Communicator::id()? } else { Vec::new() };
        let id = others.broadcast_bytes(&own)?;
        // Joining cannot be given up: a rank that failed before is known here.
        others.barrier()?;
        let communicator = Communicator::join(device, &id, others.rank(), others.world_size())?;
        Ok(Self { others, communicator, patience })
    }

    /// What `exchange` makes of a tensor on the device, unless another rank fails or does not come.
    fn on_device(
        &self,
        exchange: impl FnOnce(&Communicator, &dyn Fn() -> candle_core::Result<()>) -> candle_core::Result<Tensor>,
    ) -> Result<Tensor> {
        let since = Instant::now();
        let check = || {
            self.others.check_ranks().map_err(|error| candle_core::Error::Msg(error.to_string()))?;
            if since.elapsed() > self.patience {
                let patience = humantime::format_duration(self.patience);
                candle_core::bail!("a rank hangs: rank {} has waited for {patience}", self.others.rank());
            }
            Ok(())
        };
        Ok(exchange(&self.communicator, &check)?)
    }
}

impl Collective for Nccl {
    fn rank(&self) -> usize {
        self.others.rank()
    }

    fn world_size(&self) -> usize {
        self.others.world_size()
    }

    fn ranks_here(&self) -> usize {
        self.others.ranks_here()
    }

    fn all_reduce(&self, flat: &Tensor) -> Result<Tensor> {
        if !flat.device().is_cuda() {
            return self.others.all_reduce(flat);
        }
        check_addable(flat)?;
        self.on_device(|devices, check| devices.all_reduce(flat, check))
    }

    fn reduce_scatter(&self, flat: &Tensor) -> Result<Tensor> {
        if !flat.device().is_cuda() {
            return self.others.reduce_scatter(flat);
        }
        check_addable(flat)?;
        even_part(flat.elem_count(), self.rank(), self.world_size())?;
        self.on_device(|devices, check| devices.reduce_scatter(flat, check))
    }

    fn all_gather(&self, part: &Tensor) -> Result<Tensor> {
        if !part.device().is_cuda() {
            return self.others.all_gather(part);
        }
        self.on_device(|devices, check| devices.all_gather(part, check))
    }

    fn broadcast(&self, flat: &Tensor) -> Result<Tensor> {
        if !flat.device().is_cuda() {
            return self.others.broadcast(flat);
        }
        self.on_device(|devices, check| devices.broadcast(flat, check))
    }

    fn barrier(&self) -> Result<()> {
        self.others.barrier()
    }

    fn check_ranks(&self) -> Result<()> {
        self.others.check_ranks()
    }

    fn abort(&self, why: &str) {
        self.others.abort(why);
        self.communicator.abort();
    }
}
