//! Exchanges of tensors between devices, with NCCL.

use super::failed;
use super::memory::{aligned, allocate, tensor, with_address};
use candle_core::cuda_backend::cudarc::driver::{CudaEvent, CudaStream};
use candle_core::cuda_backend::cudarc::nccl::Id;
use candle_core::cuda_backend::cudarc::nccl::{result, sys};
use candle_core::{CudaDevice, DType, Device, Result, Tensor, bail};
use std::ffi::{CStr, c_void};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Prefix of messages about NCCL errors.
const NCCL: &str = "NCCL";

/// Converts an NCCL error into a candle error with its code and NCCL's last message.
fn refused(what: &str) -> impl Fn(result::NcclError) -> candle_core::Error + '_ {
    move |result::NcclError(code)| {
        // SAFETY: NCCL accepts null for the communicator, and returns null or a text that stays valid until
        // its next call.
        let words = unsafe {
            let words = sys::ncclGetLastError(std::ptr::null_mut());
            if words.is_null() { String::new() } else { CStr::from_ptr(words).to_string_lossy().into_owned() }
        };
        candle_core::Error::Msg(format!("{what}: {code:?} {words}").trim_end().to_string())
    }
}

/// How to poll for the end of an exchange: at first continuously, later with pauses so as not to keep a core
/// busy.
const BRISK: Duration = Duration::from_millis(2);
const NAP: Duration = Duration::from_micros(100);

/// One of several devices that exchange tensors. All of them must start the same exchanges in the same order,
/// with tensors of the same length; each exchange waits for all devices. Exchanges run on a separate stream,
/// in parallel with the device's other work.
pub struct Communicator {
    /// `None` after [`abort`](Self::abort).
    link: Mutex<Option<Link>>,
    device: CudaDevice,
    stream: Arc<CudaStream>,
    rank: usize,
    world_size: usize,
}

/// NCCL's communicator.
struct Link(sys::ncclComm_t);
// SAFETY: NCCL's communicators may be used by any thread, but only one at a time, which the lock around this
// ensures.
unsafe impl Send for Link {}

impl Drop for Link {
    fn drop(&mut self) {
        // SAFETY: NCCL created it, and nothing else uses it any more. Every exchange whose result is wanted
        // is over by now, so aborting the rest is intended; if that fails, nothing more can be done.
        let _ = unsafe { result::comm_abort(self.0) };
    }
}

/// A collective operation of all devices, on f32, f64 or u8 tensors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exchange {
    /// The sum over all devices, on each of them.
    AllReduce,
    /// Like [`AllReduce`](Self::AllReduce), in the memory of the given tensor, which nothing else may need.
    AllReduceInPlace,
    /// This device's part of the sum over all devices: the length is divided evenly, in the order of ranks.
    ReduceScatter,
    /// The tensors of all devices, concatenated in the order of ranks.
    AllGather,
    /// The first device's tensor, on each device.
    Broadcast,
}

/// An exchange in progress. Keeps the tensors that it reads and writes alive until it is over.
pub struct Pending {
    _from: Tensor,
    to: Tensor,
    arrived: CudaEvent,
    main: Arc<CudaStream>,
}

impl Drop for Pending {
    fn drop(&mut self) {
        // Memory is freed in the order of the main stream, which must not reach that point before the
        // exchange is over. After an error there is nothing to wait for.
        let _ = self.main.wait(&self.arrived);
    }
}

impl Communicator {
    /// Creates the id that all devices of a communicator share: bytes that one of them creates and passes to
    /// the others or, if the environment variable `NCCL_COMM_ID` names a meeting point, that each of them
    /// creates.
    ///
    /// # Errors
    /// If NCCL is not found, or fails.
    pub fn id() -> Result<Vec<u8>> {
        let id = Id::new().map_err(refused(NCCL))?;
        Ok(id.internal().iter().map(|byte| *byte as u8).collect())
    }

    /// Joins the other devices: waits until all `world_size` of them have called this with the same id.
    ///
    /// # Errors
    /// If the device is not a CUDA device, `id` is not a valid id, NCCL fails, or `check` fails, which is
    /// called repeatedly while waiting for the others. A background thread then keeps waiting for them.
    pub fn join(
        device: &Device,
        id: &[u8],
        rank: usize,
        world_size: usize,
        check: &dyn Fn() -> Result<()>,
    ) -> Result<Self> {
        let device = device.as_cuda_device()?.clone();
        let mut bytes = [0; 128];
        if id.len() != bytes.len() {
            bail!("NCCL: expected an id of {} bytes, got {}", bytes.len(), id.len());
        }
        bytes.iter_mut().zip(id).for_each(|(to, from)| *to = *from as _);
        let (ranks, own) = (world_size as i32, rank as i32);
        let context = device.cuda_stream().context().clone();
        let stream = context.new_stream().map_err(failed("CUDA stream"))?;
        let (done, joined) = channel::<Result<Link>>();
        // NCCL cannot be interrupted here, so a separate thread waits.
        let join = move || {
            let join = || {
                context.bind_to_thread().map_err(failed("CUDA context"))?;
                let mut link = std::ptr::null_mut();
                // SAFETY: the pointer is to a local communicator, which NCCL creates.
                unsafe {
                    result::comm_init_rank(&mut link, ranks, sys::ncclUniqueId { internal: bytes }, own)
                }
                .map_err(refused(NCCL))?;
                Ok(Link(link))
            };
            // If nothing waits for it any more, the communicator is dropped.
            let _ = done.send(join());
        };
        let thread = std::thread::Builder::new().name("nccl".into()).spawn(join);
        thread.map_err(|error| candle_core::Error::Msg(format!("the thread of NCCL: {error}")))?;
        let link = loop {
            match joined.recv_timeout(NAP) {
                Ok(link) => break link?,
                Err(RecvTimeoutError::Timeout) => check()?,
                Err(RecvTimeoutError::Disconnected) => bail!("NCCL: joining ended without a word"),
            }
        };
        Ok(Self { link: Mutex::new(Some(link)), device, stream, rank, world_size })
    }

    /// The index of this device, from 0.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// The number of devices.
    pub fn world_size(&self) -> usize {
        self.world_size
    }

    /// Starts an exchange of `x`, with its values after all work enqueued on the device so far.
    ///
    /// # Errors
    /// If the tensor is on another device or has another dtype, or NCCL fails.
    pub fn start(&self, what: Exchange, x: &Tensor) -> Result<Pending> {
        let dtype = match x.dtype() {
            DType::F32 => sys::ncclDataType_t::ncclFloat32,
            DType::F64 => sys::ncclDataType_t::ncclFloat64,
            DType::U8 => sys::ncclDataType_t::ncclUint8,
            other => bail!("NCCL: expected f32, f64 or u8, got {other:?}"),
        };
        if !x.device().as_cuda_device().is_ok_and(|device| device.id() == self.device.id()) {
            bail!("NCCL: expected a tensor on this rank's device, got one on {:?}", x.device().location());
        }
        let main = self.device.cuda_stream();
        main.context().bind_to_thread().map_err(failed("CUDA context"))?;
        let from = aligned(x)?;
        let own = from.elem_count();
        let len = match what {
            Exchange::AllReduce | Exchange::AllReduceInPlace | Exchange::Broadcast => own,
            Exchange::ReduceScatter => own / self.world_size,
            Exchange::AllGather => own * self.world_size,
        };
        let to = match what {
            Exchange::AllReduceInPlace => from.clone(),
            _ => tensor(allocate(&self.device, len, x.dtype(), false)?, len),
        };
        // When the other stream reaches this point, the source has been computed and the target is allocated.
        self.stream.join(&main).map_err(failed("CUDA stream"))?;
        let link = self.lock();
        let Some(Link(link)) = &*link else { bail!("NCCL: an earlier exchange was given up") };
        with_address(&from, |source| {
            with_address(&to, |target| {
                let (source, target) = (source as *const c_void, target as *mut c_void);
                let (sum, stream) = (sys::ncclRedOp_t::ncclSum, self.stream.cu_stream().cast());
                // SAFETY: both are memory of this device, with as many values as each exchange reads and
                // writes, and `Pending` keeps them alive until the exchange is over. The lock ensures that
                // only one thread uses the communicator.
                let started = unsafe {
                    match what {
                        Exchange::AllReduce | Exchange::AllReduceInPlace => {
                            result::all_reduce(source, target, own, dtype, sum, *link, stream)
                        }
                        Exchange::ReduceScatter => {
                            result::reduce_scatter(source, target, len, dtype, sum, *link, stream)
                        }
                        Exchange::AllGather => result::all_gather(source, target, own, dtype, *link, stream),
                        Exchange::Broadcast => {
                            result::broadcast(source, target, own, dtype, 0, *link, stream)
                        }
                    }
                };
                started.map_err(refused(NCCL)).map(drop)
            })
        })?;
        let arrived = self.stream.record_event(None).map_err(failed("CUDA event"))?;
        Ok(Pending { _from: from, to, arrived, main })
    }

    /// Waits for an exchange and returns its result.
    ///
    /// # Errors
    /// If NCCL fails, here or on another device, or `check` fails, which is called repeatedly while waiting
    /// for the others; no further exchanges are possible then.
    pub fn finish(&self, pending: Pending, check: &dyn Fn() -> Result<()>) -> Result<Tensor> {
        let since = Instant::now();
        // If a neighbour is gone, the device would wait for ever, and without this check so would the host.
        while !pending.arrived.try_is_complete().map_err(failed(NCCL))? {
            if let Err(error) = self.check_link().and_then(|()| check()) {
                // Aborts before the memory that the exchange may still write to is freed.
                self.lock().take();
                return Err(error);
            }
            match since.elapsed() < BRISK {
                true => std::thread::yield_now(),
                false => std::thread::sleep(NAP),
            }
        }
        Ok(pending.to.clone())
    }

    /// Checks for errors that NCCL encountered in the background.
    fn check_link(&self) -> Result<()> {
        let link = self.lock();
        let Some(Link(link)) = &*link else { bail!("NCCL: an earlier exchange was given up") };
        let mut state = sys::ncclResult_t::ncclSuccess;
        // SAFETY: the communicator lives, and its state is written to `state`.
        unsafe { sys::ncclCommGetAsyncError(*link, &mut state) }.result().map_err(refused(NCCL))?;
        state.result().map(drop).map_err(refused("NCCL, a rank is gone"))
    }

    /// Aborts whatever this device is waiting for, with an error.
    pub fn abort(&self) {
        self.lock().take();
    }

    fn lock(&self) -> MutexGuard<'_, Option<Link>> {
        self.link.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl std::fmt::Debug for Communicator {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Communicator({} of {})", self.rank, self.world_size)
    }
}
