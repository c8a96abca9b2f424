//! The CUDA devices of this machine.

use super::failed;
use crate::devices::CudaDevice;
use candle_core::cuda_backend::cudarc::driver::{CudaContext, result, sys};
use candle_core::{Device, Error, Result};
use std::sync::atomic::{AtomicBool, Ordering};

static TF32: AtomicBool = AtomicBool::new(false);

pub(crate) fn list() -> Result<Vec<CudaDevice>> {
    let none = |error: result::DriverError| {
        Error::Msg(format!("no CUDA device is found: the driver says {:?}", error.0))
    };
    let count = CudaContext::device_count().map_err(none)?;
    if count == 0 {
        return Err(Error::Msg("no CUDA device is found: the driver counts 0".into()));
    }
    (0..count).map(describe).collect()
}

fn describe(ordinal: i32) -> Result<CudaDevice> {
    let failed = failed("CUDA device");
    let device = result::device::get(ordinal).map_err(&failed)?;
    let name = result::device::get_name(device).map_err(&failed)?;
    let attribute = |attribute| {
        // SAFETY: the driver has just returned this device.
        unsafe { result::device::get_attribute(device, attribute) }.map_err(&failed)
    };
    let major = attribute(sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
    let minor = attribute(sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
    // SAFETY: as above.
    let memory = unsafe { result::device::total_mem(device) }.map_err(&failed)? as u64;
    Ok(CudaDevice { name, memory, capability: (major, minor) })
}

pub(crate) fn open(ordinal: usize) -> Result<Device> {
    let found = list()?.len();
    if ordinal >= found {
        return Err(Error::Msg(format!("there is no CUDA device {ordinal}: {found} are found")));
    }
    let device = Device::new_cuda_with_stream(ordinal)?;
    let cuda = device.as_cuda_device()?;
    // SAFETY: one stream does all work on tensors. The two other streams, for copies up and down, wait for
    // that one before they begin; their callers wait for the copy before the tensor involved is passed on or
    // dropped.
    unsafe { cuda.disable_event_tracking() };
    keep_freed_memory(ordinal)?;
    Ok(device)
}

/// Lets the driver keep memory freed by tensors, instead of releasing it whenever the host waits for the
/// device.
fn keep_freed_memory(ordinal: usize) -> Result<()> {
    let failed = failed("CUDA memory pool");
    let mut threshold = u64::MAX;
    // SAFETY: the device exists, and the attribute has 64 bits.
    unsafe {
        let device = result::device::get(ordinal as i32).map_err(&failed)?;
        let pool = result::device::get_default_mem_pool(device).map_err(&failed)?;
        let attribute = sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
        result::mem_pool::set_attribute(pool, attribute, (&raw mut threshold).cast()).map_err(&failed)
    }
}

/// The memory pool of this device's tensors.
fn pool(device: &Device) -> Option<sys::CUmemoryPool> {
    let stream = device.as_cuda_device().ok()?.cuda_stream();
    // SAFETY: the context's device exists.
    unsafe { result::device::get_default_mem_pool(stream.context().cu_device()).ok() }
}

pub(crate) fn peak_memory(device: &Device) -> Option<u64> {
    let (pool, mut bytes) = (pool(device)?, 0u64);
    let attribute = sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_USED_MEM_HIGH;
    // SAFETY: the attribute has 64 bits.
    unsafe { result::mem_pool::get_attribute(pool, attribute, (&raw mut bytes).cast()).ok()? };
    Some(bytes + recorded_memory(device).unwrap_or(0))
}

/// The peak memory of recorded work, which uses a separate pool.
fn recorded_memory(device: &Device) -> Option<u64> {
    let (stream, mut bytes) = (device.as_cuda_device().ok()?.cuda_stream(), 0u64);
    let attribute = sys::CUgraphMem_attribute::CU_GRAPH_MEM_ATTR_USED_MEM_HIGH;
    // SAFETY: the context's device exists, and the attribute has 64 bits.
    let asked = unsafe {
        sys::cuDeviceGetGraphMemAttribute(stream.context().cu_device(), attribute, (&raw mut bytes).cast())
    };
    asked.result().ok()?;
    Some(bytes)
}

pub(crate) fn reset_peak_memory(device: &Device) {
    let (Some(pool), mut zero) = (pool(device), 0u64) else { return };
    let attribute = sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_USED_MEM_HIGH;
    // SAFETY: the attribute has 64 bits, and may be set to 0. On failure, the older peak stays.
    let _ = unsafe { result::mem_pool::set_attribute(pool, attribute, (&raw mut zero).cast()) };
    let Ok(device) = device.as_cuda_device() else { return };
    let attribute = sys::CUgraphMem_attribute::CU_GRAPH_MEM_ATTR_USED_MEM_HIGH;
    // SAFETY: as above.
    let _ = unsafe {
        sys::cuDeviceSetGraphMemAttribute(
            device.cuda_stream().context().cu_device(),
            attribute,
            (&raw mut zero).cast(),
        )
    };
}

pub(crate) fn allow_tf32(allowed: bool) {
    TF32.store(allowed, Ordering::Relaxed);
    candle_core::cuda::set_gemm_reduced_precision_f32(allowed);
}

pub(crate) fn tf32_allowed() -> bool {
    TF32.load(Ordering::Relaxed)
}
