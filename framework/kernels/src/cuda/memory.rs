//! Addresses of tensors in a device's memory.

use super::failed;
use candle_core::backend::{BackendDevice, BackendStorage};
use candle_core::cuda_backend::cudarc::driver::{CudaSlice, DevicePtr};
use candle_core::cuda_backend::{CudaDType, CudaStorageSlice};
use candle_core::op::BackpropOp;
use candle_core::{CudaDevice, CudaStorage, DType, Layout, Result, Shape, Storage, Tensor, bail};

/// The alignment in bytes required by kernels that move several values at once, and by cuDNN's fast kernels.
pub(crate) const ALIGNMENT: u64 = 16;

/// The start address of a storage.
pub(crate) fn address(storage: &CudaStorage) -> Result<u64> {
    fn of<T>(slice: &CudaSlice<T>) -> u64 {
        // Events are not tracked, so the guard would record nothing.
        slice.device_ptr(slice.stream()).0
    }
    Ok(match &storage.slice {
        CudaStorageSlice::F32(slice) => of(slice),
        CudaStorageSlice::F64(slice) => of(slice),
        CudaStorageSlice::F16(slice) => of(slice),
        CudaStorageSlice::BF16(slice) => of(slice),
        // For messages between processes.
        CudaStorageSlice::U8(slice) => of(slice),
        _ => bail!("expected f32, f64, f16, bf16 or u8 on a CUDA device, got {:?}", storage.dtype()),
    })
}

/// The start address of a contiguous layout's values.
pub(crate) fn address_of(storage: &CudaStorage, layout: &Layout) -> Result<u64> {
    let Some((start, _)) = layout.contiguous_offsets() else {
        bail!("expected a contiguous tensor on a CUDA device, got {layout:?}");
    };
    Ok(address(storage)? + (start * storage.dtype().size_in_bytes()) as u64)
}

/// Calls `f` with the start address of a contiguous tensor. Work that `f` enqueues runs before the tensor's
/// memory is reused, even if the tensor is dropped right away.
pub(crate) fn with_address<R>(x: &Tensor, f: impl FnOnce(u64) -> Result<R>) -> Result<R> {
    let (storage, layout) = x.storage_and_layout();
    match &*storage {
        Storage::Cuda(storage) => f(address_of(storage, layout)?),
        _ => bail!("expected a tensor on a CUDA device, got one on {:?}", x.device().location()),
    }
}

/// The start address of a contiguous tensor; valid while the tensor lives.
pub(crate) fn at(x: &Tensor) -> Result<u64> {
    with_address(x, Ok)
}

/// The same values, contiguous and at an address from which kernels can read several of them at once.
pub(crate) fn aligned(x: &Tensor) -> Result<Tensor> {
    let x = x.contiguous()?;
    let is_aligned =
        (x.layout().start_offset() * x.dtype().size_in_bytes()).is_multiple_of(ALIGNMENT as usize);
    // Not `copy`, which copies the whole storage and so keeps the offset within it.
    if is_aligned { Ok(x) } else { x.force_contiguous() }
}

/// Allocates memory for `len` values of this dtype, zeroed or uninitialised.
pub(crate) fn allocate(device: &CudaDevice, len: usize, dtype: DType, zeroed: bool) -> Result<CudaStorage> {
    let shape = Shape::from(len);
    if zeroed {
        return device.zeros_impl(&shape, dtype);
    }
    // SAFETY: any bit pattern is a valid number; the caller decides what to write.
    unsafe { device.alloc_uninit(&shape, dtype) }
}

/// A tensor that belongs to no graph.
pub(crate) fn tensor(storage: CudaStorage, shape: impl Into<Shape>) -> Tensor {
    Tensor::from_storage(Storage::Cuda(storage), shape, BackpropOp::none(), false)
}

/// The values of a storage, after everything enqueued before is done.
pub(crate) fn read<T: CudaDType + candle_core::cuda_backend::cudarc::driver::DeviceRepr>(
    storage: &CudaStorage,
) -> Result<Vec<T>> {
    let slice = storage.as_cuda_slice::<T>()?;
    storage.device().cuda_stream().clone_dtoh(slice).map_err(failed("reading from a CUDA device"))
}
