//! Devices that exchange tensors, by NCCL.

use super::failed;
use super::memory::{packed, tensor};
use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::CudaDType;
use candle_core::cuda_backend::cudarc::driver::DeviceRepr;
use candle_core::cuda_backend::cudarc::nccl::result::NcclError;
use candle_core::cuda_backend::cudarc::nccl::{Comm, Id, NcclType, ReduceOp};
use candle_core::{CudaDevice, CudaStorage, DType, Device, Result, Storage, Tensor, bail};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// What is said of NCCL's errors.
const NCCL: &str = "NCCL";

/// How often the end of an exchange is looked for: at first as often as possible, later not to keep a core busy.
const BRISK: Duration = Duration::from_millis(2);
const NAP: Duration = Duration::from_micros(100);

/// One of several devices that exchange tensors. All call the same operations in the same order, with tensors of one length;
/// each waits for all.
pub struct Communicator {
    /// Gone after [`abort`](Self::abort).
    link: Mutex<Option<Link>>,
    device: CudaDevice,
    rank: usize,
    world_size: usize,
}

struct Link(Comm);
// SAFETY: NCCL's communicators may be used by any thread, by one at a time, and the lock around this sees to that.
unsafe impl Send for Link {}

/// What NCCL can exchange.
trait Element: CudaDType + NcclType + DeviceRepr {}
impl Element for f32 {}
impl Element for f64 {}
impl Element for u8 {}

/// What is asked of all devices.
#[derive(Clone, Copy)]
enum Exchange {
    AllReduce,
    ReduceScatter,
    AllGather,
    Broadcast,
}

impl Communicator {
    /// What all that will exchange tensors must know: bytes that one of them makes, and hands to the others.
    ///
    /// # Errors
    /// Where NCCL is not found, or fails.
    pub fn id() -> Result<Vec<u8>> {
        let id = Id::new().map_err(failed(NCCL))?;
        Ok(id.internal().iter().map(|byte| *byte as u8).collect())
    }

    /// Joins the others: waits until all `world_size` of them have done the same with the same id.
    ///
    /// # Errors
    /// Where the device is not a CUDA device, `id` is none, or NCCL fails.
    pub fn join(device: &Device, id: &[u8], rank: usize, world_size: usize) -> Result<Self> {
        let device = device.as_cuda_device()?.clone();
        let mut bytes = [0; 128];
        if id.len() != bytes.len() {
            bail!("NCCL: expected an id of {} bytes, got {}", bytes.len(), id.len());
        }
        bytes.iter_mut().zip(id).for_each(|(to, from)| *to = *from as _);
        let stream = device.cuda_stream();
        stream.context().bind_to_thread().map_err(failed("CUDA context"))?;
        let comm = Comm::from_rank(stream, rank, world_size, Id::uninit(bytes)).map_err(failed(NCCL))?;
        Ok(Self { link: Mutex::new(Some(Link(comm))), device, rank, world_size })
    }

    /// Which device this is, from 0.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// The sum over all devices, on each of them; f32 or f64.
    ///
    /// # Errors
    /// As for all exchanges: where the tensor is elsewhere or of another type, NCCL fails, or `check`, which is asked again
    /// and again while others are waited for, fails; then no more can be exchanged.
    pub fn all_reduce(&self, x: &Tensor, check: &dyn Fn() -> Result<()>) -> Result<Tensor> {
        self.exchange(Exchange::AllReduce, x, x.elem_count(), check)
    }

    /// Of the sum over all devices this one's part: the length is divided evenly, in the order of ranks.
    ///
    /// # Errors
    /// As for [`all_reduce`](Self::all_reduce).
    pub fn reduce_scatter(&self, x: &Tensor, check: &dyn Fn() -> Result<()>) -> Result<Tensor> {
        self.exchange(Exchange::ReduceScatter, x, x.elem_count() / self.world_size, check)
    }

    /// The parts of all devices, one after the other.
    ///
    /// # Errors
    /// As for [`all_reduce`](Self::all_reduce).
    pub fn all_gather(&self, x: &Tensor, check: &dyn Fn() -> Result<()>) -> Result<Tensor> {
        self.exchange(Exchange::AllGather, x, x.elem_count() * self.world_size, check)
    }

    /// What the first device has, on each.
    ///
    /// # Errors
    /// As for [`all_reduce`](Self::all_reduce).
    pub fn broadcast(&self, x: &Tensor, check: &dyn Fn() -> Result<()>) -> Result<Tensor> {
        self.exchange(Exchange::Broadcast, x, x.elem_count(), check)
    }

    /// Ends whatever this device is waiting in, with an error.
    pub fn abort(&self) {
        // Dropping it is what aborts it. Whoever waits in an exchange holds the lock, and lets go of the link itself.
        if let Ok(mut link) = self.link.try_lock() {
            link.take();
        }
    }

    fn exchange(
        &self,
        what: Exchange,
        x: &Tensor,
        len: usize,
        check: &dyn Fn() -> Result<()>,
    ) -> Result<Tensor> {
        match x.dtype() {
            DType::F32 => self.exchange_of::<f32>(what, x, len, check),
            DType::F64 => self.exchange_of::<f64>(what, x, len, check),
            DType::U8 => self.exchange_of::<u8>(what, x, len, check),
            other => bail!("NCCL: expected f32, f64 or u8, got {other:?}"),
        }
    }

    fn exchange_of<T: Element>(
        &self,
        what: Exchange,
        x: &Tensor,
        len: usize,
        check: &dyn Fn() -> Result<()>,
    ) -> Result<Tensor> {
        let stream = self.device.cuda_stream();
        stream.context().bind_to_thread().map_err(failed("CUDA context"))?;
        let x = packed(x)?;
        // SAFETY: every value is received below.
        let mut to = unsafe { self.device.alloc::<T>(len)? };
        let mut link = self.link.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(Link(comm)) = link.as_ref() else { bail!("NCCL: an earlier exchange was given up") };
        {
            let (storage, layout) = x.storage_and_layout();
            let (Storage::Cuda(storage), Some((start, end))) = (&*storage, layout.contiguous_offsets())
            else {
                bail!("NCCL: expected a tensor on a CUDA device, got one on {:?}", x.device().location());
            };
            if storage.device().id() != self.device.id() {
                bail!("NCCL: expected a tensor on this rank's device");
            }
            let from = storage.as_cuda_slice::<T>()?.slice(start..end);
            let done: std::result::Result<_, NcclError> = match what {
                Exchange::AllReduce => comm.all_reduce(&from, &mut to, &ReduceOp::Sum),
                Exchange::ReduceScatter => comm.reduce_scatter(&from, &mut to, &ReduceOp::Sum),
                Exchange::AllGather => comm.all_gather(&from, &mut to),
                Exchange::Broadcast => comm.broadcast(Some(&from), &mut to, 0),
            };
            done.map_err(failed(NCCL))?;
        }
        // A device whose neighbour is gone would wait for ever, and the host with it, were it not for this.
        let arrived = stream.record_event(None).map_err(failed("CUDA event"))?;
        let since = Instant::now();
        loop {
            match arrived.try_is_complete() {
                Ok(true) => break,
                Ok(false) => {}
                Err(error) => return Err(failed(NCCL)(error)),
            }
            if let Err(error) = check() {
                link.take();
                return Err(error);
            }
            match since.elapsed() < BRISK {
                true => std::thread::yield_now(),
                false => std::thread::sleep(NAP),
            }
        }
        Ok(tensor(CudaStorage::wrap_cuda_slice(to, self.device.clone()), len))
    }
}

impl std::fmt::Debug for Communicator {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Communicator({} of {})", self.rank, self.world_size)
    }
}
