//! Ranks on CUDA devices, connected by NCCL.

use std::sync::Arc;
use std::time::{Duration, Instant};

use candle_core::{DType, Device, Tensor};
use candlepower_kernels::{Communicator, Exchange};

use super::{Collective, MEETING_PLACE, Processes, Started, check_addable, even_part, report};
use crate::error::{Error, Result};

/// One of several ranks, each on its own CUDA device.
pub struct Nccl {
    communicator: Communicator,
    device: Device,
    /// The ranks that can also be reached without NCCL: threads of this process, or through MPI. Through them
    /// a rank learns that another has failed.
    near: Arc<dyn Collective>,
    ranks_here: usize,
    /// How long to wait for a rank.
    patience: Duration,
}

impl Nccl {
    /// Joins ranks that are already connected as threads or through MPI. All of them must call this.
    pub fn join(near: Arc<dyn Collective>, device: &Device, patience: Duration) -> Result<Self> {
        let own = if near.rank() == 0 { Communicator::id()? } else { Vec::new() };
        let id = near.broadcast_bytes(&own)?;
        let place = [near.rank(), near.world_size(), near.ranks_here()];
        Self::with_id(&id, near, place, device, patience)
    }

    /// Joins ranks of other processes at the place set in the environment. All of them must call this.
    pub fn meet(processes: &Processes, device: &Device, patience: Duration) -> Result<Self> {
        if std::env::var_os(MEETING_PLACE).is_none() {
            return Err(Error::msg(format!(
                "the environment variable {MEETING_PLACE} is not set: expected HOST:PORT of the first process"
            )));
        }
        let place = [processes.rank(), processes.world_size(), processes.ranks_here()];
        Self::with_id(&Communicator::id()?, processes.near(), place, device, patience)
    }

    fn with_id(
        id: &[u8],
        near: Arc<dyn Collective>,
        [rank, world_size, ranks_here]: [usize; 3],
        device: &Device,
        patience: Duration,
    ) -> Result<Self> {
        let check = patient(&near, rank, patience);
        let communicator = Communicator::join(device, id, rank, world_size, &check)?;
        drop(check);
        Ok(Self { communicator, device: device.clone(), near, ranks_here, patience })
    }

    /// Whether all ranks can be reached without NCCL.
    fn all_are_near(&self) -> bool {
        self.near.world_size() == self.world_size()
    }

    /// Exchanges a tensor; on the CPU, with `nearby` instead of NCCL, if that reaches all ranks.
    fn exchange(
        &self,
        what: Exchange,
        x: &Tensor,
        nearby: impl FnOnce(&dyn Collective) -> Result<Tensor>,
    ) -> Result<Tensor> {
        if !x.device().is_cuda() && self.all_are_near() {
            return nearby(&*self.near);
        }
        let pending = self.communicator.start(what, &x.to_device(&self.device)?)?;
        let check = patient(&self.near, self.rank(), self.patience);
        Ok(self.communicator.finish(pending, &check)?.to_device(x.device())?)
    }
}

/// A check that fails if a rank is known to have failed, or once `patience` has passed from now.
fn patient(
    near: &Arc<dyn Collective>,
    rank: usize,
    patience: Duration,
) -> impl Fn() -> candle_core::Result<()> {
    let since = Instant::now();
    move || {
        near.check_ranks().map_err(|error| candle_core::Error::Msg(error.to_string()))?;
        if since.elapsed() > patience {
            let patience = humantime::format_duration(patience);
            candle_core::bail!("a rank hangs: rank {rank} has waited for {patience}");
        }
        Ok(())
    }
}

impl Collective for Nccl {
    fn rank(&self) -> usize {
        self.communicator.rank()
    }

    fn world_size(&self) -> usize {
        self.communicator.world_size()
    }

    fn ranks_here(&self) -> usize {
        self.ranks_here
    }

    fn all_reduce(&self, flat: &Tensor) -> Result<Tensor> {
        check_addable(flat)?;
        self.exchange(Exchange::AllReduce, flat, |near| near.all_reduce(flat))
    }

    fn start_all_reduce(self: Arc<Self>, flat: Tensor) -> Result<Started> {
        check_addable(&flat)?;
        let pending = self.communicator.start(Exchange::AllReduceInPlace, &flat)?;
        Ok(Box::new(move || {
            let check = patient(&self.near, self.rank(), self.patience);
            Ok(self.communicator.finish(pending, &check)?)
        }))
    }

    fn reduce_scatter(&self, flat: &Tensor) -> Result<Tensor> {
        check_addable(flat)?;
        even_part(flat.elem_count(), self.rank(), self.world_size())?;
        self.exchange(Exchange::ReduceScatter, flat, |near| near.reduce_scatter(flat))
    }

    fn all_gather(&self, part: &Tensor) -> Result<Tensor> {
        self.exchange(Exchange::AllGather, part, |near| near.all_gather(part))
    }

    fn broadcast(&self, flat: &Tensor) -> Result<Tensor> {
        self.exchange(Exchange::Broadcast, flat, |near| near.broadcast(flat))
    }

    fn barrier(&self) -> Result<()> {
        if self.all_are_near() {
            return self.near.barrier();
        }
        self.all_reduce(&Tensor::zeros(1, DType::F32, &self.device)?).map(drop)
    }

    fn check_ranks(&self) -> Result<()> {
        self.near.check_ranks()
    }

    fn abort(&self, why: &str) {
        // Report first, with the rank among all ranks: nearby ranks are numbered only among themselves.
        report(self.rank(), why);
        self.near.abort(why);
        self.communicator.abort();
    }
}
