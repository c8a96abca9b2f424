//! Checks of candle tensors, and access to their values as slices for the kernels.

use crate::float::Float;
use crate::parallel::{self, Shared};
use candle_core::{CpuStorage, DType, InplaceOp1, Layout, Result, Storage, Tensor, bail};
use std::borrow::Cow;
use std::cell::{Cell, RefCell};

/// Whether this crate's ops accept this tensor: f32 on the CPU.
///
/// With other tensors every op of this crate returns an error, except the ops named in [`convolves`] and
/// [`in_32_bits`]; compose them from candle's own ops instead.
pub fn supported(x: &Tensor) -> bool {
    x.device().is_cpu() && x.dtype() == DType::F32
}

/// Whether [`conv2d`](crate::conv2d()), [`conv_lstm`](crate::conv_lstm()) and [`activate`](crate::activate())
/// accept this tensor: f32, bf16 or f16, on the CPU or, with the feature `cuda`, on a CUDA device.
/// [`normalize`](crate::normalize()) accepts such a tensor on a CUDA device.
pub fn convolves(x: &Tensor) -> bool {
    let device = x.device().is_cpu() || cfg!(feature = "cuda") && x.device().is_cuda();
    device && matches!(x.dtype(), DType::F32 | DType::BF16 | DType::F16)
}

/// Whether the pointwise parts of recurrent cells ([`sum_gates`](crate::sum_gates),
/// [`memory_update`](crate::memory_update), [`open_output`](crate::open_output()), [`blend`](crate::blend()),
/// [`SharedNorm`](crate::SharedNorm)) accept this tensor: f32, on the CPU or, with the feature `cuda`, on a
/// CUDA device.
pub fn in_32_bits(x: &Tensor) -> bool {
    x.dtype() == DType::F32 && convolves(x)
}

/// Returns an error that names the op and the tensor, unless it is f32 on the CPU or a CUDA device and has
/// elements.
pub(crate) fn check_in_32_bits(op: &str, name: &str, x: &Tensor) -> Result<()> {
    if !in_32_bits(x) {
        bail!("{op}: {name} must be f32 on {}, got {:?} on {:?}", place(), x.dtype(), x.device().location());
    }
    check_elements(op, name, x)
}

/// The devices that tensors may be on, for error messages.
fn place() -> &'static str {
    if cfg!(feature = "cuda") { "the CPU or a CUDA device" } else { "the CPU" }
}

/// Returns an error that names the op and the tensor, unless convolutions accept it and it has elements.
pub(crate) fn check_convolves(op: &str, name: &str, x: &Tensor) -> Result<()> {
    if !convolves(x) {
        let place = place();
        let (dtype, location) = (x.dtype(), x.device().location());
        bail!("{op}: {name} must be f32, bf16 or f16 on {place}, got {dtype:?} on {location:?}");
    }
    check_elements(op, name, x)
}

/// Returns an error that names the op and the tensor, unless it has the dtype and device of `x` and has
/// elements.
pub(crate) fn check_like(op: &str, name: &str, tensor: &Tensor, x: &Tensor) -> Result<()> {
    if tensor.dtype() != x.dtype() || !tensor.device().same_device(x.device()) {
        bail!(
            "{op}: {name} must be {} on {:?} as the input is, got {:?} on {:?}",
            x.dtype().as_str(),
            x.device().location(),
            tensor.dtype(),
            tensor.device().location()
        );
    }
    check_elements(op, name, tensor)
}

/// Returns an error that names the op and the tensor, unless it is on the CPU, has this dtype, and has
/// elements.
pub(crate) fn check_type(op: &str, name: &str, x: &Tensor, dtype: DType) -> Result<()> {
    if !x.device().is_cpu() || x.dtype() != dtype {
        bail!(
            "{op}: {name} must be {} on the CPU, got {:?} on {:?}",
            dtype.as_str(),
            x.dtype(),
            x.device().location()
        );
    }
    check_elements(op, name, x)
}

fn check_elements(op: &str, name: &str, x: &Tensor) -> Result<()> {
    if x.elem_count() == 0 {
        bail!("{op}: {name} has no elements, its shape is {:?}", x.dims());
    }
    Ok(())
}

thread_local! {
    static GRADIENTS: Cell<bool> = const { Cell::new(true) };
}

/// Runs `f` with gradients disabled for this crate's ops on this thread: their results belong to no graph,
/// and nothing is saved for a backward pass, even if the weights are variables. For validation and
/// prediction.
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

/// Whether a backward pass may request the gradient of `x`.
pub(crate) fn tracked(x: &Tensor) -> bool {
    GRADIENTS.get() && x.track_op()
}

/// Prepares a tensor for kernels: on a CUDA device it must be contiguous, and aligned for vector loads.
pub(crate) fn for_kernels(x: &Tensor) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if x.device().is_cuda() {
        return crate::cuda::aligned(x);
    }
    Ok(x.clone())
}

/// The values in row-major order: borrowed if they are contiguous, otherwise copied.
pub(crate) fn packed<'a, T: Float>(storage: &'a CpuStorage, layout: &Layout) -> Result<Cow<'a, [T]>> {
    let data = storage.as_slice::<T>()?;
    if let Some((start, end)) = layout.contiguous_offsets() {
        return Ok(Cow::Borrowed(&data[start..end]));
    }
    let (dims, strides) = (layout.dims(), layout.stride());
    // One loop over the last axis; tasks are rows of the other axes.
    let (Some(&len), Some(&stride)) = (dims.last(), strides.last()) else {
        return Ok(Cow::Owned(vec![data[layout.start_offset()]]));
    };
    let outer = &dims[..dims.len() - 1];
    let rows: usize = outer.iter().product();
    let mut copy = vec![T::zero(); rows * len];
    let out = Shared::new(&mut copy);
    let rows_in_task = (parallel::GRAIN / len.max(1)).clamp(1, rows.max(1));
    parallel::for_each(rows.div_ceil(rows_in_task), |task| {
        for row in task * rows_in_task..rows.min((task + 1) * rows_in_task) {
            let (mut rest, mut from) = (row, layout.start_offset());
            for (dim, stride) in outer.iter().zip(strides).rev() {
                from += rest % dim * stride;
                rest /= dim;
            }
            // SAFETY: each row belongs to exactly one task.
            let out = unsafe { std::slice::from_raw_parts_mut(out.at(row * len), len) };
            for (i, x) in out.iter_mut().enumerate() {
                *x = data[from + i * stride];
            }
        }
    });
    Ok(Cow::Owned(copy))
}

/// Calls `f` with a tensor's values in row-major order.
pub(crate) fn with_values<T: Float, R>(x: &Tensor, f: impl FnOnce(&[T]) -> Result<R>) -> Result<R> {
    let (storage, layout) = x.storage_and_layout();
    match &*storage {
        Storage::Cpu(storage) => f(&packed::<T>(storage, layout)?),
        _ => bail!("expected a tensor on the CPU, got one on {:?}", x.device().location()),
    }
}

/// Calls `f` with pointers to the values of the tensors that are present: f32 on the CPU, contiguous, each
/// with its own storage. The storages are locked meanwhile, so nothing else uses them.
pub(crate) fn in_place<const N: usize>(
    tensors: [Option<&Tensor>; N],
    f: impl FnOnce([Option<Shared>; N]),
) -> Result<()> {
    let mut f = Some(f);
    hold(&tensors, [None; N], &mut |places| f.take().map_or((), |f| f(places)))
}

/// Locks the storages of these tensors, one after the other, and then calls `f` with the pointers of all.
fn hold<const N: usize>(
    tensors: &[Option<&Tensor>],
    mut places: [Option<Shared>; N],
    f: &mut dyn FnMut([Option<Shared>; N]),
) -> Result<()> {
    match tensors {
        [] => {
            f(places);
            Ok(())
        }
        [None, rest @ ..] => hold(rest, places, f),
        [Some(x), rest @ ..] => {
            let and_then = |values: &mut [f32]| {
                places[N - tensors.len()] = Some(Shared::new(values));
                hold(rest, places, f)
            };
            x.inplace_op1(&InPlace(RefCell::new(and_then)))
        }
    }
}

/// A function of a tensor's values, called while the storage is locked.
struct InPlace<F>(RefCell<F>);

impl<F: FnMut(&mut [f32]) -> Result<()>> InplaceOp1 for InPlace<F> {
    fn name(&self) -> &'static str {
        "in place"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> Result<()> {
        match (storage, layout.contiguous_offsets()) {
            (CpuStorage::F32(values), Some((start, end))) => (self.0.borrow_mut())(&mut values[start..end]),
            _ => bail!("in place: expected a contiguous tensor of f32"),
        }
    }
}
