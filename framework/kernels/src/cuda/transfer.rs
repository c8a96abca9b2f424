//! Between the host and a device, while it computes.

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

/// The streams that copy to and from a device, and memory of the host that they can use while others work.
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
    /// Host memory for at least so many values: one that was used before and is not too large, or a new one.
    fn staging(&self, len: usize) -> Result<PinnedHostSlice<f32>> {
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(fits) = idle.iter().position(|it| it.len() >= len && it.len() <= 2 * len) {
            return Ok(idle.swap_remove(fits));
        }
        drop(idle);
        // SAFETY: written before it is read; flags 0 are memory that the processor also reads quickly.
        let new = unsafe { self.up.context().alloc_pinned_with_flags::<f32>(len, 0) };
        new.map_err(failed("pinned memory"))
    }

    fn give_back(&self, staging: PinnedHostSlice<f32>) {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner).push(staging);
    }
}

/// Who waits for it sleeps, or looks again and again, which is quicker.
fn event(stream: &CudaStream, sleeps: bool) -> Result<CudaEvent> {
    stream.record_event(sleeps.then_some(CUevent_flags::CU_EVENT_BLOCKING_SYNC)).map_err(failed("CUDA event"))
}

/// A tensor of f32 on the CPU, copied to a device by a stream of its own, without making the device's work wait. Returns when
/// the copy is done.
pub(crate) fn upload(x: &Tensor, device: &CudaDevice) -> Result<Tensor> {
    let (len, transfers, main) = (x.elem_count(), transfers(device)?, device.cuda_stream());
    let mut staging = transfers.staging(len)?;
    with_values(x, |values| {
        staging.as_mut_slice().map_err(failed("pinned memory"))?[..len].copy_from_slice(values);
        Ok(())
    })?;
    // The memory is the main stream's, which frees it after its last use; it is there when that stream comes to this point.
    let mut to = allocate(device, len, DType::F32, false)?;
    transfers.up.join(&main).map_err(failed("CUDA stream"))?;
    let CudaStorageSlice::F32(slice) = &mut to.slice else { bail!("upload: expected f32") };
    let copied = {
        let values = staging.as_slice().map_err(failed("pinned memory"))?;
        transfers.up.memcpy_htod(&values[..len], slice)
    };
    // Also where the copy failed: nothing may still be under way when the memory goes back.
    let done = event(&transfers.up, true).and_then(|event| event.synchronize().map_err(failed("CUDA event")));
    copied.map_err(failed("copying to a CUDA device"))?;
    done?;
    transfers.give_back(staging);
    Ok(tensor(to, x.shape()))
}

/// As [`Download`](crate::Download), by a stream of its own.
pub(crate) struct Download {
    transfers: Arc<Transfers>,
    /// Until it is given back.
    staging: Option<PinnedHostSlice<f32>>,
    done: CudaEvent,
    /// What is read, kept: its own stream would give the memory away while another reads it.
    source: Tensor,
}

impl Download {
    pub(crate) fn start(x: &Tensor, device: &CudaDevice) -> Result<Self> {
        // A copy: the device may change the tensor while it is read.
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
            // As many as the place has are copied, and the memory may have room for more.
            let to = &mut staging.as_mut_slice().map_err(failed("pinned memory"))?[..words];
            let copied = if x.dtype() == DType::F64 {
                let values = storage.as_cuda_slice::<f64>()?.slice(start..end);
                // SAFETY: two words each, which nobody computes with.
                let Some(halves) = (unsafe { values.transmute::<f32>(words) }) else {
                    bail!("download: expected {words} words of {} values", end - start);
                };
                transfers.down.memcpy_dtoh(&halves, to)
            } else {
                transfers.down.memcpy_dtoh(&storage.as_cuda_slice::<f32>()?.slice(start..end), to)
            };
            copied.map_err(failed("copying from a CUDA device"))
        };
        // The training waits for one in each step, and by then the device has little left to do.
        match copied.and_then(|()| event(&transfers.down, false)) {
            Ok(done) => Ok(Self { transfers, staging: Some(staging), done, source: x }),
            Err(error) => {
                // Nothing may still be under way when the memory goes; the first error is the one to tell.
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
        // Also where nobody wanted the values in the end: the copy must be over before the memory on both sides goes.
        let _ = self.done.synchronize();
        if let Some(staging) = self.staging.take() {
            self.transfers.give_back(staging);
        }
    }
}
