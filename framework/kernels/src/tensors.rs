//! Between candle's tensors and the slices that kernels run on.

use crate::parallel::{self, Shared};
use candle_core::{CpuStorage, DType, Layout, Result, Storage, Tensor, bail};
use std::borrow::Cow;
use std::cell::Cell;

/// Whether these kernels take this tensor: f32 on the CPU.
///
/// Elsewhere every op of this crate is an error; compose it from candle's own ops instead.
pub fn supported(x: &Tensor) -> bool {
    x.device().is_cpu() && x.dtype() == DType::F32
}

/// An error that names the op and the tensor, unless these kernels take it.
pub(crate) fn check_supported(op: &str, name: &str, x: &Tensor) -> Result<()> {
    if !supported(x) {
        bail!("{op}: {name} must be f32 on the CPU, got {:?} on {:?}", x.dtype(), x.device().location());
    }
    if x.elem_count() == 0 {
        bail!("{op}: {name} has no elements, its shape is {:?}", x.dims());
    }
    Ok(())
}

/// Whether convolutions and ConvLSTM roll-outs take this tensor: f32 on the CPU; f32, bf16 and f16 on a CUDA device.
pub fn convolves(x: &Tensor) -> bool {
    let on_device = cfg!(feature = "cuda") && x.device().is_cuda();
    supported(x) || on_device && matches!(x.dtype(), DType::F32 | DType::BF16 | DType::F16)
}

/// An error that names the op and the tensor, unless convolutions take it.
pub(crate) fn check_convolves(op: &str, name: &str, x: &Tensor) -> Result<()> {
    if convolves(x) && x.elem_count() > 0 { Ok(()) } else { check_supported(op, name, x) }
}

thread_local! {
    static GRADIENTS: Cell<bool> = const { Cell::new(true) };
}

/// Runs `f` with gradients switched off for this crate's ops on this thread: their results belong to no graph, and nothing
/// is kept for a backward pass, even where the weights are variables. For validation and prediction.
pub fn no_grad<R>(f: impl FnOnce() -> R) -> R {
    struct Restore(bool);
    impl Drop for Restore {
        fn drop(&mut self) {
            GRADIENTS.set(self.0);
        }
    }
    let _restore = Restore(GRADIENTS.replace(false));
    f()
}

/// Whether a backward pass may ask for the gradient of `x`.
pub(crate) fn tracked(x: &Tensor) -> bool {
    GRADIENTS.get() && x.track_op()
}

/// The values in row-major order: borrowed where they lie so, otherwise copied.
pub(crate) fn packed<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<Cow<'a, [f32]>> {
    let data = storage.as_slice::<f32>()?;
    if let Some((start, end)) = layout.contiguous_offsets() {
        return Ok(Cow::Borrowed(&data[start..end]));
    }
    let (dims, strides) = (layout.dims(), layout.stride());
    // The last axis is one loop; before it, tasks are rows.
    let (Some(&len), Some(&stride)) = (dims.last(), strides.last()) else {
        return Ok(Cow::Owned(vec![data[layout.start_offset()]]));
    };
    let outer = &dims[..dims.len() - 1];
    let rows: usize = outer.iter().product();
    let mut copy = vec![0f32; rows * len];
    let out = Shared::new(&mut copy);
    let rows_in_task = (parallel::GRAIN / len.max(1)).clamp(1, rows.max(1));
    parallel::for_each(rows.div_ceil(rows_in_task), |task| {
        for row in task * rows_in_task..rows.min((task + 1) * rows_in_task) {
            let (mut rest, mut from) = (row, layout.start_offset());
            for (dim, stride) in outer.iter().zip(strides).rev() {
                from += rest % dim * stride;
                rest /= dim;
            }
            // SAFETY: each row belongs to one task.
            let out = unsafe { std::slice::from_raw_parts_mut(out.at(row * len), len) };
            for (i, x) in out.iter_mut().enumerate() {
                *x = data[from + i * stride];
            }
        }
    });
    Ok(Cow::Owned(copy))
}

/// `f` of a tensor's values in row-major order.
pub(crate) fn with_values<R>(x: &Tensor, f: impl FnOnce(&[f32]) -> Result<R>) -> Result<R> {
    let (storage, layout) = x.storage_and_layout();
    match &*storage {
        Storage::Cpu(storage) => f(&packed(storage, layout)?),
        _ => bail!("expected a tensor on the CPU, got one on {:?}", x.device().location()),
    }
}
