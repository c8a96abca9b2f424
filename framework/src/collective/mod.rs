//! Ranks that train together: the operations between them ([`Collective`]), and its implementations.
//!
//! A rank is one replica of the model on one device. Anything that it cannot know by itself (the gradient of
//! the whole batch, metrics over all samples, whether to stop) comes from a collective operation, which all
//! ranks call in the same order.

mod agreement;
mod config;
mod environment;
mod failure;
mod flat;
#[cfg(feature = "mpi")]
mod mpi;
#[cfg(feature = "cuda")]
mod nccl;
mod processes;
pub(crate) mod shard;
mod threads;

use std::sync::Arc;

use candle_core::{DType, Device, Tensor};

#[cfg(feature = "mpi")]
pub use self::mpi::Mpi;
pub(crate) use agreement::{Identity, check};
pub use config::{Backend, DistributedConfig, MEETING_PLACE, Shard};
pub use environment::{Environment, Starter};
pub use failure::FAILURE_FILE;
pub(crate) use failure::report;
pub(crate) use flat::{all_reduce, broadcast, buckets, pack, unpack};
#[cfg(feature = "cuda")]
pub use nccl::Nccl;
pub(crate) use processes::NCCL_ALONE;
pub use processes::Processes;
pub use threads::Threads;

use crate::error::{Error, Result};

/// Waits for a started operation and returns its result.
pub type Started = Box<dyn FnOnce() -> Result<Tensor> + Send>;

/// Operations between ranks. Every rank calls the same operations in the same order, with tensors of the same
/// length.
///
/// Tensors are flat, (n). f32 and f64 can be summed; u8 can only be gathered and broadcast. Values that an
/// operation promises to be the same on all ranks are bit-identical. If a rank has failed, the others get an
/// error instead of waiting for it.
pub trait Collective: Send + Sync {
    /// This rank's number, from 0.
    fn rank(&self) -> usize;

    /// The number of ranks.
    fn world_size(&self) -> usize;

    /// The number of ranks that share this machine's processors.
    fn ranks_here(&self) -> usize {
        self.world_size()
    }

    /// The sum over all ranks, on every rank.
    fn all_reduce(&self, flat: &Tensor) -> Result<Tensor>;

    /// Starts the sum over all ranks, which may reuse the memory of `flat`, and returns a function that waits
    /// for it. Until then, only more of these sums may be started, in the same order on all ranks. A
    /// collective that cannot do this in the background computes the sum immediately.
    fn start_all_reduce(self: Arc<Self>, flat: Tensor) -> Result<Started> {
        let sum = self.all_reduce(&flat)?;
        Ok(Box::new(move || Ok(sum)))
    }

    /// This rank's part of the sum over all ranks: the length is divided evenly, in the order of ranks.
    fn reduce_scatter(&self, flat: &Tensor) -> Result<Tensor>;

    /// The parts of all ranks, concatenated in the order of ranks. All parts have the same length.
    fn all_gather(&self, part: &Tensor) -> Result<Tensor>;

    /// Rank 0's values, on every rank.
    fn broadcast(&self, flat: &Tensor) -> Result<Tensor>;

    /// Waits until all ranks have reached this call.
    fn barrier(&self) -> Result<()>;

    /// Returns an error if a rank is known to have failed. Does not wait.
    fn check_ranks(&self) -> Result<()> {
        Ok(())
    }

    /// The processes of the ranks, if only their devices connect them. They cannot exchange anything yet.
    fn processes(&self) -> Option<&Processes> {
        None
    }

    /// Notifies the other ranks that this one has failed, and why: operations that they wait for fail.
    fn abort(&self, why: &str);
}

/// A single rank: every operation returns its input.
#[derive(Debug, Clone, Copy, Default)]
pub struct Solo;

impl Collective for Solo {
    fn rank(&self) -> usize {
        0
    }

    fn world_size(&self) -> usize {
        1
    }

    fn all_reduce(&self, flat: &Tensor) -> Result<Tensor> {
        Ok(flat.clone())
    }

    fn reduce_scatter(&self, flat: &Tensor) -> Result<Tensor> {
        Ok(flat.clone())
    }

    fn all_gather(&self, part: &Tensor) -> Result<Tensor> {
        Ok(part.clone())
    }

    fn broadcast(&self, flat: &Tensor) -> Result<Tensor> {
        Ok(flat.clone())
    }

    fn barrier(&self) -> Result<()> {
        Ok(())
    }

    fn abort(&self, _: &str) {}
}

impl dyn Collective + '_ {
    /// The number of a machine's devices that this process uses, with one rank on each.
    pub(crate) fn devices_here(&self, of_machine: usize) -> usize {
        match self.processes() {
            Some(processes) => processes.devices(of_machine),
            None if self.is_alone() => of_machine,
            None => 1,
        }
    }

    /// Whether there is no other rank.
    pub(crate) fn is_alone(&self) -> bool {
        self.world_size() == 1
    }

    /// Every rank's bytes, of any length, in the order of ranks.
    pub(crate) fn gather_bytes(&self, own: &[u8]) -> Result<Vec<Vec<u8>>> {
        let lengths = self.gather_numbers(&[own.len() as f64])?;
        let longest = lengths.iter().map(|length| length[0] as usize).max().unwrap_or(0).max(1);
        let mut padded = own.to_vec();
        padded.resize(longest, 0);
        let all = self.all_gather(&Tensor::from_vec(padded, longest, &Device::Cpu)?)?.to_vec1::<u8>()?;
        let cut = |(bytes, length): (&[u8], &Vec<f64>)| bytes[..length[0] as usize].to_vec();
        Ok(all.chunks(longest).zip(&lengths).map(cut).collect())
    }

    /// Every rank's numbers, in the order of ranks. Each rank passes equally many, at least one.
    pub(crate) fn gather_numbers(&self, own: &[f64]) -> Result<Vec<Vec<f64>>> {
        let all = self.all_gather(&Tensor::new(own, &Device::Cpu)?)?.to_vec1::<f64>()?;
        Ok(all.chunks(own.len()).map(<[_]>::to_vec).collect())
    }

    /// Rank 0's bytes, of any length, on every rank.
    pub(crate) fn broadcast_bytes(&self, own: &[u8]) -> Result<Vec<u8>> {
        let length = Tensor::new(&[own.len() as f64], &Device::Cpu)?;
        let length = self.broadcast(&length)?.to_vec1::<f64>()?[0] as usize;
        let mut bytes = own.to_vec();
        bytes.resize(length.max(1), 0);
        let mut bytes =
            self.broadcast(&Tensor::from_vec(bytes, length.max(1), &Device::Cpu)?)?.to_vec1::<u8>()?;
        bytes.truncate(length);
        Ok(bytes)
    }

    /// Rank 0's decision, on every rank.
    pub(crate) fn decide(&self, own: bool) -> Result<bool> {
        if self.is_alone() {
            return Ok(own);
        }
        let decision = self.broadcast(&Tensor::new(&[f64::from(u8::from(own))], &Device::Cpu)?)?;
        Ok(decision.to_vec1::<f64>()?[0] != 0.)
    }
}

/// The start and length of `rank`'s part of `len` elements, or an error if they cannot be divided evenly.
fn even_part(len: usize, rank: usize, world_size: usize) -> Result<(usize, usize)> {
    if !len.is_multiple_of(world_size) {
        return Err(Error::msg(format!("{len} numbers cannot be divided evenly among {world_size} ranks")));
    }
    let part = len / world_size;
    Ok((rank * part, part))
}

/// Refuses tensors that cannot be summed over ranks.
fn check_addable(flat: &Tensor) -> Result<()> {
    match (flat.dtype(), flat.rank()) {
        (DType::F32 | DType::F64, 1) => Ok(()),
        (dtype, _) => Err(Error::msg(format!(
            "ranks add flat tensors of f32 or f64; found {dtype:?} of shape {:?}",
            flat.dims()
        ))),
    }
}
