//! Listing and opening CUDA devices. A build without the feature `cuda` has none.

use candle_core::{Device, Result, Tensor};

/// A CUDA device of this machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CudaDevice {
    /// The device's product name.
    pub name: String,
    /// Memory size in bytes.
    pub memory: u64,
    /// Compute capability, for example (9, 0).
    pub capability: (i32, i32),
}

/// Whether this build can use CUDA devices.
pub const BUILT_WITH_CUDA: bool = cfg!(feature = "cuda");

/// The CUDA devices of this machine, by ordinal.
///
/// # Errors
/// If this build or this machine has no CUDA.
pub fn cuda_devices() -> Result<Vec<CudaDevice>> {
    #[cfg(feature = "cuda")]
    return crate::cuda::device::list();
    #[cfg(not(feature = "cuda"))]
    Err(without_cuda())
}

/// Checks that the CUDA libraries that do not come with the driver are installed too.
///
/// # Errors
/// If a library is missing (the error names it), or this build has no CUDA.
pub fn cuda_libraries() -> Result<()> {
    #[cfg(feature = "cuda")]
    return crate::cuda::libraries::require();
    #[cfg(not(feature = "cuda"))]
    Err(without_cuda())
}

/// Opens a CUDA device. All work on it goes through one stream, in the order of the calls, from whichever
/// thread. Freed memory is reused for later tensors.
///
/// # Errors
/// If this build or this machine has no CUDA, or there is no device with this ordinal.
pub fn open_cuda(ordinal: usize) -> Result<Device> {
    #[cfg(feature = "cuda")]
    return crate::cuda::device::open(ordinal);
    #[cfg(not(feature = "cuda"))]
    {
        let _ = ordinal;
        Err(without_cuda())
    }
}

/// Sets whether f32 matrix products and convolutions on CUDA devices may round their factors to TF32's 10
/// mantissa bits, which is several times faster. Applies to the whole process; off by default.
pub fn allow_tf32(allowed: bool) {
    #[cfg(feature = "cuda")]
    crate::cuda::device::allow_tf32(allowed);
    #[cfg(not(feature = "cuda"))]
    let _ = allowed;
}

/// Sets whether to time the engines that cuDNN proposes for a convolution, when a shape is first seen, and
/// use the fastest, instead of the one that cuDNN expects to be fastest. The choice, and with it the last
/// bits of the results, may differ between processes. Applies to the whole process; off by default.
pub fn time_convolutions(wanted: bool) {
    #[cfg(feature = "cuda")]
    crate::cuda::convolution::time_convolutions(wanted);
    #[cfg(not(feature = "cuda"))]
    let _ = wanted;
}

/// The peak number of bytes held by tensors on this device since it was opened or [reset](reset_peak_memory).
/// Recordings use a separate pool whose peak is added, so with recordings this is an upper bound. `None` on
/// the CPU.
pub fn peak_memory(device: &Device) -> Option<u64> {
    #[cfg(feature = "cuda")]
    return crate::cuda::device::peak_memory(device);
    #[cfg(not(feature = "cuda"))]
    {
        let _ = device;
        None
    }
}

/// Restarts the peak from the memory in use now.
pub fn reset_peak_memory(device: &Device) {
    #[cfg(feature = "cuda")]
    crate::cuda::device::reset_peak_memory(device);
    #[cfg(not(feature = "cuda"))]
    let _ = device;
}

/// Copies a tensor to another device. From the CPU to a CUDA device, f32 values are copied while the device
/// computes; the call returns when the copy is done.
///
/// # Errors
/// If the device fails or is out of memory.
pub fn to_device(x: &Tensor, device: &Device) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    let unrecorded = device.is_cuda().then(crate::cuda::unrecorded).flatten();
    #[cfg(feature = "cuda")]
    if let Device::Cuda(device) = device
        && unrecorded.is_some()
        && x.device().is_cpu()
        && x.dtype() == candle_core::DType::F32
        && x.elem_count() > 0
        && !x.track_op()
    {
        return crate::cuda::transfer::upload(x, device);
    }
    x.to_device(device)
}

#[cfg(not(feature = "cuda"))]
fn without_cuda() -> candle_core::Error {
    candle_core::Error::Msg("this program was built without CUDA".into())
}
