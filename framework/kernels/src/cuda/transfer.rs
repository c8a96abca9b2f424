//! Copies between the host and a device while the device computes.

use super::failed;
use super::memory::{allocate, tensor};
use crate::download::travels_as;
use crate::tensors::with_values;
use candle_core::cuda_backend::CudaStorageSlice;
use candle_core::cuda_backend::cudarc::driver::sys::CUevent_flags;
use candle_core::cuda_backend::cudarc::driver::{CudaEvent, CudaStream, PinnedHostSlice};
use candle_core::{CudaDevice, DType, Device, Result, Storage, Tensor, bail};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

/// The streams that copy to and from a device, and pinned host memory for reuse.
struct Transfers {
    up: Arc<CudaStream>,
    down: Arc<CudaStream>,
    idle: Mutex<Vec<PinnedHostSlice<f32>>>,
}

type ByDevice = HashMap<candle_core::cuda_backend::DeviceId, Arc<Transfers>>;

static TRANSFERS: Mutex<Option<ByDevice>> = Mutex::new(None);

fn transfers(device: &CudaDevice) -> Result<Arc<Transfers>> {
    let mut all = TRANSFERS.lock().unwrap_or_else(PoisonError::into_inner);
    let all = all.get_or_insert_default();
    if let Some(transfers) = all.get(&device.id()) {
        return Ok(transfers.clone());
    }
    let stream = || device.cuda_stream().context().new_stream().map_err(failed("CUDA stream"));
    let transfers = Arc::new(Transfers { up: stream()?, down: stream()?, idle: Mutex::default() });
    all.insert(device.id(), transfers.clone());
    Ok(transfers)
}

impl Transfers {
    /// Host memory for at least `len` values: a previously used one that is not too large, or a new one.
    fn staging(&self, len: usize) -> Result<PinnedHostSlice<f32>> {
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(fits) = idle.iter().position(|it| it.len() >= len && it.len() <= 2 * len) {
            return Ok(idle.swap_remove(fits));
        }
        drop(idle);
        // SAFETY: it is written before it is read; flags 0 request memory that the processor can also read
        // quickly.
        let new = unsafe { self.up.context().alloc_pinned_with_flags::<f32>(len, 0) };
        new.map_err(failed("pinned memory"))
    }

    fn give_back(&self, staging: PinnedHostSlice<f32>) {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner).push(staging);
    }
}

/// Records an event. Threads that wait for it sleep if `sleeps`; otherwise they poll, which is quicker.
fn event(stream: &CudaStream, sleeps: bool) -> Result<CudaEvent> {
    stream.record_event(sleeps.then_some(CUevent_flags::CU_EVENT_BLOCKING_SYNC)).map_err(failed("CUDA event"))
}

/// Copies an f32 tensor on the CPU to a device on a separate stream, without making the device's work wait.
/// Returns when the copy is done.
pub(crate) fn upload(x: &Tensor, device: &CudaDevice) -> Result<Tensor> {
    let (len, transfers, main) = (x.elem_count(), transfers(device)?, device.cuda_stream());
    let mut staging = transfers.staging(len)?;
    with_values(x, |values| {
        staging.as_mut_slice().map_err(failed("pinned memory"))?[..len].copy_from_slice(values);
        Ok(())
    })?;
    // The memory belongs to the main stream, which frees it after its last use; it is available once that
    // stream reaches this point.
    let mut to = allocate(device, len, DType::F32, false)?;
    transfers.up.join(&main).map_err(failed("CUDA stream"))?;
    let CudaStorageSlice::F32(slice) = &mut to.slice else { bail!("upload: expected f32") };
    let copied = {
        let values = staging.as_slice().map_err(failed("pinned memory"))?;
        transfers.up.memcpy_htod(&values[..len], slice)
    };
    // Even if the copy failed: nothing may be in flight when the memory is returned.
    let done = event(&transfers.up, true).and_then(|event| event.synchronize().map_err(failed("CUDA event")));
    copied.map_err(failed("copying to a CUDA device"))?;
    done?;
    transfers.give_back(staging);
    Ok(tensor(to, x.shape()))
}

/// Implements [`Download`](crate::Download) on a separate stream.
pub(crate) struct Download {
    transfers: Arc<Transfers>,
    /// `None` once it has been returned.
    staging: Option<PinnedHostSlice<f32>>,
    done: CudaEvent,
    /// The tensor being read, kept alive: the main stream would reuse its memory while another stream reads
    /// it.
    source: Tensor,
}

impl Download {
    pub(crate) fn start(x: &Tensor, device: &CudaDevice) -> Result<Self> {
        // A copy, because the device may modify the tensor while it is read.
        let (x, transfers) = (x.detach().to_dtype(travels_as(x))?.force_contiguous()?, transfers(device)?);
        let words = x.elem_count() * x.dtype().size_in_bytes() / size_of::<f32>();
        let mut staging = transfers.staging(words)?;
        transfers.down.join(&device.cuda_stream()).map_err(failed("CUDA stream"))?;
        let copied = {
            let (storage, layout) = x.storage_and_layout();
            let (Storage::Cuda(storage), Some((start, end))) = (&*storage, layout.contiguous_offsets())
            else {
                bail!("download: expected a contiguous tensor on a CUDA device, got {layout:?}");
            };
            // The copy has the length of the destination slice, and the staging memory may be larger.
            let to = &mut staging.as_mut_slice().map_err(failed("pinned memory"))?[..words];
            let copied = if x.dtype() == DType::F64 {
                let values = storage.as_cuda_slice::<f64>()?.slice(start..end);
                // SAFETY: each f64 is treated as two 32-bit words, which are only copied.
                let Some(halves) = (unsafe { values.transmute::<f32>(words) }) else {
                    bail!("download: expected {words} words of {} values", end - start);
                };
                transfers.down.memcpy_dtoh(&halves, to)
            } else {
                transfers.down.memcpy_dtoh(&storage.as_cuda_slice::<f32>()?.slice(start..end), to)
            };
            copied.map_err(failed("copying from a CUDA device"))
        };
        // Training waits for one download per step, at a time when the device has little work left.
        match copied.and_then(|()| event(&transfers.down, false)) {
            Ok(done) => Ok(Self { transfers, staging: Some(staging), done, source: x }),
            Err(error) => {
                // Nothing may be in flight when the memory is freed; the first error is the one to report.
                let _ = transfers.down.synchronize();
                Err(error)
            }
        }
    }

    pub(crate) fn is_done(&self) -> Result<bool> {
        self.done.try_is_complete().map_err(failed("copying from a CUDA device"))
    }

    pub(crate) fn finish(self) -> Result<Tensor> {
        self.done.synchronize().map_err(failed("copying from a CUDA device"))?;
        let Some(staging) = &self.staging else { bail!("download: the values are gone") };
        let (words, source) = (staging.as_slice().map_err(failed("pinned memory"))?, &self.source);
        if source.dtype() != DType::F64 {
            return Tensor::from_slice(&words[..source.elem_count()], source.shape(), &Device::Cpu);
        }
        let whole = |halves: &[f32]| {
            f64::from_bits(u64::from(halves[0].to_bits()) | u64::from(halves[1].to_bits()) << u32::BITS)
        };
        let values = words[..2 * source.elem_count()].chunks_exact(2).map(whole).collect();
        Tensor::from_vec(values, source.shape(), &Device::Cpu)
    }
}

impl Drop for Download {
    fn drop(&mut self) {
        // Even if the values are not used: the copy must be over before the memory on both sides is freed.
        let _ = self.done.synchronize();
        if let Some(staging) = self.staging.take() {
            self.transfers.give_back(staging);
        }
    }
}
