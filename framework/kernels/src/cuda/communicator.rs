//! Devices that exchange tensors, by NCCL.

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

/// What is said of NCCL's errors.
const NCCL: &str = "NCCL";

/// What NCCL says, as an error of candle: its code, and the last words that it had.
fn refused(what: &str) -> impl Fn(result::NcclError) -> candle_core::Error + '_ {
    move |result::NcclError(code)| {
        // SAFETY: NCCL takes null for its communicator, and gives null or a text that stays until its next call.
        let words = unsafe {
            let words = sys::ncclGetLastError(std::ptr::null_mut());
            if words.is_null() { String::new() } else { CStr::from_ptr(words).to_string_lossy().into_owned() }
        };
        candle_core::Error::Msg(format!("{what}: {code:?} {words}").trim_end().to_string())
    }
}

/// How often the end of an exchange is looked for: at first as often as possible, later not to keep a core busy.
const BRISK: Duration = Duration::from_millis(2);
const NAP: Duration = Duration::from_micros(100);

/// One of several devices that exchange tensors. All start the same exchanges in the same order, with tensors of one length;
/// each waits for all. Exchanges have a stream of their own: they run beside the device's other work.
pub struct Communicator {
    /// Gone after [`abort`](Self::abort).
    link: Mutex<Option<Link>>,
    device: CudaDevice,
    stream: Arc<CudaStream>,
    rank: usize,
    world_size: usize,
}

/// NCCL's communicator.
struct Link(sys::ncclComm_t);
// SAFETY: NCCL's communicators may be used by any thread, by one at a time, and the lock around this sees to that.
unsafe impl Send for Link {}

impl Drop for Link {
    fn drop(&mut self) {
        // SAFETY: NCCL has made it, and nobody uses it any more. Every exchange that is wanted is over by now, so that giving
        // the rest up is what is meant; where it fails, there is nothing left to do about it.
        let _ = unsafe { result::comm_abort(self.0) };
    }
}

/// What is asked of all devices; f32, f64 or u8.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exchange {
    /// The sum over all devices, on each of them.
    AllReduce,
    /// The same, in the memory of the tensor that is given: nobody else may need it.
    AllReduceInPlace,
    /// Of the sum over all devices this one's part: the length is divided evenly, in the order of ranks.
    ReduceScatter,
    /// The parts of all devices, one after the other.
    AllGather,
    /// What the first device has, on each.
    Broadcast,
}

/// An exchange under way. What it reads and writes is kept until it is over.
pub struct Pending {
    _from: Tensor,
    to: Tensor,
    arrived: CudaEvent,
    main: Arc<CudaStream>,
}

impl Drop for Pending {
    fn drop(&mut self) {
        // Memory is given back in the order of the main stream, which must not come to that before the exchange is over. After
        // an error there is nothing to wait for.
        let _ = self.main.wait(&self.arrived);
    }
}

impl Communicator {
    /// What all that will exchange tensors must know: bytes that one of them makes and hands to the others, or, where the
    /// environment says in `NCCL_COMM_ID` where they meet, that all make.
    ///
    /// # Errors
    /// Where NCCL is not found, or fails.
    pub fn id() -> Result<Vec<u8>> {
        let id = Id::new().map_err(refused(NCCL))?;
        Ok(id.internal().iter().map(|byte| *byte as u8).collect())
    }

    /// Joins the others: waits until all `world_size` of them have done the same with the same id.
    ///
    /// # Errors
    /// Where the device is not a CUDA device, `id` is none, NCCL fails, or `check`, which is asked again and again while
    /// others are waited for, fails. A thread then still waits for them.
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
        // NCCL cannot be told to give up here, so that a thread of its own waits.
        let join = move || {
            let join = || {
                context.bind_to_thread().map_err(failed("CUDA context"))?;
                let mut link = std::ptr::null_mut();
                // SAFETY: the pointer is to a communicator of this function, which NCCL makes.
                unsafe {
                    result::comm_init_rank(&mut link, ranks, sys::ncclUniqueId { internal: bytes }, own)
                }
                .map_err(refused(NCCL))?;
                Ok(Link(link))
            };
            // Where nobody waits any more, the communicator is dropped.
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

    /// Which device this is, from 0.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// How many there are.
    pub fn world_size(&self) -> usize {
        self.world_size
    }

    /// Starts an exchange of `x`, as it is once the device has done what it was asked for so far.
    ///
    /// # Errors
    /// Where the tensor is elsewhere or of another type, or NCCL fails.
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
        // What is read has been computed, and what is written is there, when the other stream comes to this point.
        self.stream.join(&main).map_err(failed("CUDA stream"))?;
        let link = self.lock();
        let Some(Link(link)) = &*link else { bail!("NCCL: an earlier exchange was given up") };
        with_address(&from, |source| {
            with_address(&to, |target| {
                let (source, target) = (source as *const c_void, target as *mut c_void);
                let (sum, stream) = (sys::ncclRedOp_t::ncclSum, self.stream.cu_stream().cast());
                // SAFETY: both are this device's memory, of as many values as each exchange reads and writes, and `Pending`
                // keeps it until the exchange is over. The lock sees to it that one thread alone uses the communicator.
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

    /// What an exchange comes to.
    ///
    /// # Errors
    /// Where NCCL fails, here or at another device, or `check`, which is asked again and again while others are waited for,
    /// fails; then no more can be exchanged.
    pub fn finish(&self, pending: Pending, check: &dyn Fn() -> Result<()>) -> Result<Tensor> {
        let since = Instant::now();
        // A device whose neighbour is gone would wait for ever, and the host with it, were it not for this.
        while !pending.arrived.try_is_complete().map_err(failed(NCCL))? {
            if let Err(error) = self.check_link().and_then(|()| check()) {
                // Before the memory that it may still write to is given back.
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

    /// What NCCL has met with while others were waited for.
    fn check_link(&self) -> Result<()> {
        let link = self.lock();
        let Some(Link(link)) = &*link else { bail!("NCCL: an earlier exchange was given up") };
        let mut state = sys::ncclResult_t::ncclSuccess;
        // SAFETY: the communicator lives, and `state` is where its state is written to.
        unsafe { sys::ncclCommGetAsyncError(*link, &mut state) }.result().map_err(refused(NCCL))?;
        state.result().map(drop).map_err(refused("NCCL, a rank is gone"))
    }

    /// Ends whatever this device is waiting in, with an error.
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
