//! Batches to a device, while it computes.

use super::failed;
use super::memory::{allocate, tensor};
use crate::tensors::with_values;
use candle_core::cuda_backend::CudaStorageSlice;
use candle_core::cuda_backend::cudarc::driver::sys::CUevent_flags;
use candle_core::cuda_backend::cudarc::driver::{CudaStream, PinnedHostSlice};
use candle_core::{CudaDevice, DType, Result, Tensor, bail};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

/// The stream that copies to a device, and memory that it can copy from while others work.
struct Uploader {
    stream: Arc<CudaStream>,
    idle: Mutex<Vec<PinnedHostSlice<f32>>>,
}

type Uploaders = HashMap<candle_core::cuda_backend::DeviceId, Arc<Uploader>>;

static UPLOADERS: Mutex<Option<Uploaders>> = Mutex::new(None);

fn uploader(device: &CudaDevice) -> Result<Arc<Uploader>> {
    let mut uploaders = UPLOADERS.lock().unwrap_or_else(PoisonError::into_inner);
    let uploaders = uploaders.get_or_insert_default();
    if let Some(uploader) = uploaders.get(&device.id()) {
        return Ok(uploader.clone());
    }
    let stream = device.cuda_stream().context().new_stream().map_err(failed("CUDA stream"))?;
    let uploader = Arc::new(Uploader { stream, idle: Mutex::default() });
    uploaders.insert(device.id(), uploader.clone());
    Ok(uploader)
}

impl Uploader {
    /// Host memory for at least so many values: one that was used before and is not too large, or a new one.
    fn staging(&self, len: usize) -> Result<PinnedHostSlice<f32>> {
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(fits) = idle.iter().position(|it| it.len() >= len && it.len() <= 2 * len) {
            return Ok(idle.swap_remove(fits));
        }
        drop(idle);
        // SAFETY: written before it is read; flags 0 are memory that the processor also reads quickly.
        let new = unsafe { self.stream.context().alloc_pinned_with_flags::<f32>(len, 0) };
        new.map_err(failed("pinned memory"))
    }
}

/// A tensor of f32 on the CPU, copied to a device by a stream of its own, without making the device's work wait. Returns when
/// the copy is done.
pub(crate) fn upload(x: &Tensor, device: &CudaDevice) -> Result<Tensor> {
    let (len, uploader, main) = (x.elem_count(), uploader(device)?, device.cuda_stream());
    let mut staging = uploader.staging(len)?;
    with_values(x, |values| {
        staging.as_mut_slice().map_err(failed("pinned memory"))?[..len].copy_from_slice(values);
        Ok(())
    })?;
    // The memory is the main stream's, which frees it after its last use; it is there when that stream comes to this point.
    let mut to = allocate(device, len, DType::F32, false)?;
    uploader.stream.join(&main).map_err(failed("CUDA stream"))?;
    let CudaStorageSlice::F32(slice) = &mut to.slice else { bail!("upload: expected f32") };
    let copied = {
        let values = staging.as_slice().map_err(failed("pinned memory"))?;
        uploader.stream.memcpy_htod(&values[..len], slice)
    };
    // Also where the copy failed: nothing may still be under way when the memory goes back.
    let event = uploader.stream.record_event(Some(CUevent_flags::CU_EVENT_BLOCKING_SYNC)); // Waiting sleeps.
    let done = event.and_then(|event| event.synchronize());
    copied.map_err(failed("copying to a CUDA device"))?;
    done.map_err(failed("copying to a CUDA device"))?;
    uploader.idle.lock().unwrap_or_else(PoisonError::into_inner).push(staging);
    Ok(tensor(to, x.shape()))
}
