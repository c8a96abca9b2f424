//! Ranks that are processes, on one host or many, through MPI.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use candle_core::{DType, Device, Tensor, WithDType};
use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded, unbounded};
use mpi::Threading;
use mpi::collective::{CommunicatorCollectives, Root, SystemOperation};
use mpi::datatype::Equivalence;
use mpi::topology::{Communicator, SimpleCommunicator};

use super::{Collective, Started, check_addable, even_part, report};
use crate::error::{Error, Result};

/// This process as one of those that `mpirun` or `srun` has started.
///
/// MPI is called from a single thread, because not every MPI allows more; the ranks' own threads send their
/// calls to it. Dropping this finalizes MPI, which waits for the other processes.
pub struct Mpi {
    rank: usize,
    world_size: usize,
    ranks_here: usize,
    patience: Duration,
    calls: Sender<Call>,
    thread: Mutex<Option<JoinHandle<()>>>,
    /// Set once MPI must not be waited for any more.
    failed: AtomicBool,
}

/// Work for the thread that may call MPI.
type Call = Box<dyn FnOnce(&SimpleCommunicator) + Send>;

impl Mpi {
    /// Joins the other processes, at most once. A rank waited for longer than `patience` counts as failed.
    pub fn join(patience: Duration) -> Result<Self> {
        let (calls, to_do): (Sender<Call>, Receiver<Call>) = unbounded();
        let (ready, place) = bounded(1);
        let work = move || {
            let Some((universe, _)) = mpi::initialize_with_threading(Threading::Funneled) else { return };
            let world = universe.world();
            let here = world.split_shared(world.rank());
            let _ = ready.send((world.rank() as usize, world.size() as usize, here.size() as usize));
            to_do.into_iter().for_each(|call| call(&world));
        };
        let thread = std::thread::Builder::new().name("mpi".into()).spawn(work);
        let thread = thread.map_err(Error::file("the thread of MPI"))?;
        let place = place.recv();
        let (rank, world_size, ranks_here) =
            place.map_err(|_| Error::msg("MPI cannot start, or has been started by this process before"))?;
        let thread = Mutex::new(Some(thread));
        Ok(Self { rank, world_size, ranks_here, patience, calls, thread, failed: AtomicBool::new(false) })
    }

    /// Runs a call on the MPI thread and returns its result.
    fn call<T: Send + 'static>(
        &self,
        call: impl FnOnce(&SimpleCommunicator) -> T + Send + 'static,
    ) -> Result<T> {
        self.wait(&self.ask(call)?)
    }

    /// Sends a call to the MPI thread; its result arrives through the channel.
    fn ask<T: Send + 'static>(
        &self,
        call: impl FnOnce(&SimpleCommunicator) -> T + Send + 'static,
    ) -> Result<Receiver<T>> {
        let (done, result) = bounded(1);
        // Nobody receives the result if waiting for the other ranks has timed out.
        let call = Box::new(move |world: &SimpleCommunicator| drop(done.send(call(world))));
        self.calls.send(call).map_err(|_| gone())?;
        Ok(result)
    }

    fn wait<T>(&self, result: &Receiver<T>) -> Result<T> {
        result.recv_timeout(self.patience).map_err(|error| match error {
            RecvTimeoutError::Disconnected => gone(),
            RecvTimeoutError::Timeout => {
                self.failed.store(true, Ordering::Relaxed);
                let waited = humantime::format_duration(self.patience);
                Error::msg(format!("another rank hangs: rank {} has waited for {waited}", self.rank))
            }
        })
    }

    /// Runs an operation on a tensor's values on the MPI thread.
    fn on_values<T: WithDType + Equivalence>(
        &self,
        flat: &Tensor,
        operation: impl FnOnce(&SimpleCommunicator, Vec<T>) -> Vec<T> + Send + 'static,
    ) -> Result<Tensor> {
        let values = flat.to_vec1::<T>()?;
        tensor(self.call(move |world| operation(world, values))?, flat.device())
    }

    /// Starts the sum over all ranks.
    fn start_sum<T: WithDType + Equivalence + Default>(self: Arc<Self>, flat: &Tensor) -> Result<Started> {
        let (values, device, world_size) = (flat.to_vec1::<T>()?, flat.device().clone(), self.world_size);
        let sum = self.ask(move |world| sum_over_ranks(world, values, world_size))?;
        Ok(Box::new(move || tensor(self.wait(&sum)?, &device)))
    }
}

fn gone() -> Error {
    Error::msg("MPI has ended")
}

fn tensor<T: WithDType>(values: Vec<T>, device: &Device) -> Result<Tensor> {
    let len = values.len();
    Ok(Tensor::from_vec(values, len, &Device::Cpu)?.to_device(device)?)
}

/// The sum over all ranks, as a reduce-scatter and an all-gather, which together guarantee bit-identical
/// results: each element is summed on one rank.
fn sum_over_ranks<T: Equivalence + Clone + Default>(
    world: &SimpleCommunicator,
    mut values: Vec<T>,
    world_size: usize,
) -> Vec<T> {
    let len = values.len();
    values.resize(len.next_multiple_of(world_size), T::default());
    let sums = sum_of_part(world, &values, world_size);
    world.all_gather_into(&sums[..], &mut values[..]);
    values.truncate(len);
    values
}

/// This rank's part of the sum over all ranks.
fn sum_of_part<T: Equivalence + Clone + Default>(
    world: &SimpleCommunicator,
    values: &[T],
    world_size: usize,
) -> Vec<T> {
    let mut sums = vec![T::default(); values.len() / world_size];
    world.reduce_scatter_block_into(values, &mut sums[..], SystemOperation::sum());
    sums
}

/// Runs an operation on the values of a tensor of any dtype that ranks can exchange.
macro_rules! of_any_type {
    ($self:ident, $flat:ident, $operation:expr) => {
        match $flat.dtype() {
            DType::F32 => $self.on_values::<f32>($flat, $operation),
            DType::F64 => $self.on_values::<f64>($flat, $operation),
            DType::U8 => $self.on_values::<u8>($flat, $operation),
            dtype => Err(Error::msg(format!("ranks exchange f32, f64 and u8; found {dtype:?}"))),
        }
    };
}

impl Collective for Mpi {
    fn rank(&self) -> usize {
        self.rank
    }

    fn world_size(&self) -> usize {
        self.world_size
    }

    fn ranks_here(&self) -> usize {
        self.ranks_here
    }

    fn all_reduce(&self, flat: &Tensor) -> Result<Tensor> {
        check_addable(flat)?;
        let world_size = self.world_size;
        match flat.dtype() {
            DType::F64 => self.on_values::<f64>(flat, move |world, x| sum_over_ranks(world, x, world_size)),
            _ => self.on_values::<f32>(flat, move |world, x| sum_over_ranks(world, x, world_size)),
        }
    }

    fn start_all_reduce(self: Arc<Self>, flat: Tensor) -> Result<Started> {
        check_addable(&flat)?;
        match flat.dtype() {
            DType::F64 => self.start_sum::<f64>(&flat),
            _ => self.start_sum::<f32>(&flat),
        }
    }

    fn reduce_scatter(&self, flat: &Tensor) -> Result<Tensor> {
        check_addable(flat)?;
        even_part(flat.elem_count(), self.rank, self.world_size)?;
        let world_size = self.world_size;
        match flat.dtype() {
            DType::F64 => self.on_values::<f64>(flat, move |world, x| sum_of_part(world, &x, world_size)),
            _ => self.on_values::<f32>(flat, move |world, x| sum_of_part(world, &x, world_size)),
        }
    }

    fn all_gather(&self, part: &Tensor) -> Result<Tensor> {
        let len = part.elem_count() * self.world_size;
        of_any_type!(self, part, move |world, values| {
            let mut all = vec![Default::default(); len];
            world.all_gather_into(&values[..], &mut all[..]);
            all
        })
    }

    fn broadcast(&self, flat: &Tensor) -> Result<Tensor> {
        of_any_type!(self, flat, |world, mut values| {
            world.process_at_rank(0).broadcast_into(&mut values[..]);
            values
        })
    }

    fn barrier(&self) -> Result<()> {
        self.call(|world| world.barrier())
    }

    /// Ends the processes of all ranks, including this one: MPI has no other way to release the others.
    fn abort(&self, why: &str) {
        report(self.rank, why);
        tracing::error!("rank {} failed: {why}", self.rank);
        if !self.failed.swap(true, Ordering::Relaxed) {
            let _ = self.calls.send(Box::new(|world: &SimpleCommunicator| {
                world.abort(1);
            }));
            // MPI ends this process in the meantime.
            std::thread::sleep(Duration::from_secs(1));
        }
    }
}

impl Drop for Mpi {
    fn drop(&mut self) {
        // Without a sender, the thread ends and finalizes MPI. If it waits for a failed rank, leave it.
        self.calls = unbounded().0;
        let thread = self.thread.lock().map(|mut thread| thread.take());
        if let (false, Ok(Some(thread))) = (self.failed.load(Ordering::Relaxed), thread) {
            let _ = thread.join();
        }
    }
}
