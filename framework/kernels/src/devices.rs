//! Which CUDA devices there are, and how one is opened. In a build without the feature `cuda` there are none.

use candle_core::{Device, Result, Tensor};

/// A CUDA device of this machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CudaDevice {
    /// What its maker calls it.
    pub name: String,
    /// Bytes of its memory.
    pub memory: u64,
    /// Its compute capability, for example (9, 0).
    pub capability: (i32, i32),
}

/// Whether this build can use CUDA devices.
pub const BUILT_WITH_CUDA: bool = cfg!(feature = "cuda");

/// The CUDA devices of this machine, in the order of their numbers.
///
/// # Errors
/// Where this build, or this machine, has no CUDA.
pub fn cuda_devices() -> Result<Vec<CudaDevice>> {
    #[cfg(feature = "cuda")]
    return crate::cuda::device::list();
    #[cfg(not(feature = "cuda"))]
    Err(without_cuda())
}

/// Whether CUDA's libraries, which the driver does not bring, are there as well.
///
/// # Errors
/// Where one is missing, by name; where this build has no CUDA.
pub fn cuda_libraries() -> Result<()> {
    #[cfg(feature = "cuda")]
    return crate::cuda::libraries::require();
    #[cfg(not(feature = "cuda"))]
    Err(without_cuda())
}

/// Opens a CUDA device: all work on it goes through one stream, in the order in which it is asked for, whichever thread
/// asks. Freed memory is kept for the next tensors.
///
/// # Errors
/// Where this build, or this machine, has no CUDA, or no device of this number.
pub fn open_cuda(ordinal: usize) -> Result<Device> {
    #[cfg(feature = "cuda")]
    return crate::cuda::device::open(ordinal);
    #[cfg(not(feature = "cuda"))]
    {
        let _ = ordinal;
        Err(without_cuda())
    }
}

/// Whether products and convolutions of 32-bit numbers on CUDA devices may round their factors to TF32's 10 bits, which is
/// several times faster. For the whole process; at first they may not.
pub fn allow_tf32(allowed: bool) {
    #[cfg(feature = "cuda")]
    crate::cuda::device::allow_tf32(allowed);
    #[cfg(not(feature = "cuda"))]
    let _ = allowed;
}

/// Whether the engines that cuDNN proposes for a convolution are timed when a shape comes for the first time, and the quickest
/// is taken, instead of the one that cuDNN thinks quickest. Which that is may differ from one process to the next, and with it the
/// last bits. For the whole process; at first none is.
pub fn time_convolutions(wanted: bool) {
    #[cfg(feature = "cuda")]
    crate::cuda::convolution::time_convolutions(wanted);
    #[cfg(not(feature = "cuda"))]
    let _ = wanted;
}

/// The most bytes that tensors on this device have held at once since it was opened, or [reset](reset_peak_memory). What
/// recordings have held is of another pool: its own peak is added, so that with them this is a bound. None on the CPU.
pub fn peak_memory(device: &Device) -> Option<u64> {
    #[cfg(feature = "cuda")]
    return crate::cuda::device::peak_memory(device);
    #[cfg(not(feature = "cuda"))]
    {
        let _ = device;
        None
    }
}

/// Forgets what was held before.
pub fn reset_peak_memory(device: &Device) {
    #[cfg(feature = "cuda")]
    crate::cuda::device::reset_peak_memory(device);
    #[cfg(not(feature = "cuda"))]
    let _ = device;
}

/// The same tensor on another device. From the CPU to a CUDA device, f32 are copied while the device computes; the call
/// returns when the copy is done.
///
/// # Errors
/// Where the device fails, or has no memory left.
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
