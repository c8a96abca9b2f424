//! Updates of parameters in place, and the norm of gradients.

use super::arguments::{Adam, Approach, Sgd, Sums};
use super::launch::launch;
use super::memory::{address, allocate, packed, read, with_address};
use super::sources::OPTIMIZER;
use crate::updates::{AdamStep, SgdStep};
use candle_core::{DType, Result, Tensor};

/// As [`AdamStep::apply`]; all are f32, contiguous, and of one shape.
pub(crate) fn adam(
    step: &AdamStep,
    w: &Tensor,
    gradient: &Tensor,
    first: &Tensor,
    second: &Tensor,
    largest: Option<&Tensor>,
) -> Result<()> {
    let AdamStep { one_minus_beta1, beta2, one_minus_beta2, eps, step_size, root_correction, l2, keep } =
        *step;
    let count = w.elem_count();
    let gradient = packed(gradient)?;
    let at = |x: &Tensor| with_address(x, Ok);
    let arguments = Adam {
        w: at(w)?,
        gradient: at(&gradient)?,
        first: at(first)?,
        second: at(second)?,
        largest: largest.map_or(Ok(0), at)?,
        count: count as u32,
        one_minus_beta1,
        beta2,
        one_minus_beta2,
        eps,
        step_size,
        root_correction,
        l2,
        keep,
    };
    // SAFETY: all have as many values as the parameter, which the caller has checked; each is written by nobody else on the
    // device's one stream.
    unsafe { launch(w.device().as_cuda_device()?, &OPTIMIZER, "adam", count, arguments) }
}

/// As [`SgdStep::apply`].
pub(crate) fn sgd(
    step: &SgdStep,
    w: &Tensor,
    gradient: &Tensor,
    momentum_buffer: Option<&Tensor>,
) -> Result<()> {
    let SgdStep { lr, momentum, entering, l2, nesterov } = *step;
    let (count, gradient) = (w.elem_count(), packed(gradient)?);
    let at = |x: &Tensor| with_address(x, Ok);
    let arguments = Sgd {
        w: at(w)?,
        gradient: at(&gradient)?,
        momentum_buffer: momentum_buffer.map_or(Ok(0), at)?,
        count: count as u32,
        lr,
        momentum,
        entering,
        l2,
        nesterov: u32::from(nesterov),
    };
    // SAFETY: as in `adam`.
    unsafe { launch(w.device().as_cuda_device()?, &OPTIMIZER, "sgd", count, arguments) }
}

/// As [`approach`](crate::updates::approach).
pub(crate) fn approach(x: &Tensor, target: &Tensor, share: f32) -> Result<()> {
    let (count, target) = (x.elem_count(), packed(target)?);
    let (x_at, target_at) = (with_address(x, Ok)?, with_address(&target, Ok)?);
    let arguments = Approach { x: x_at, target: target_at, count: count as u32, share };
    // SAFETY: as in `adam`.
    unsafe { launch(x.device().as_cuda_device()?, &OPTIMIZER, "approach", count, arguments) }
}

/// The sum of the squares of all tensors' values. Waits for the device once.
pub(crate) fn sum_squares(tensors: &[Tensor]) -> Result<f64> {
    /// Values that a thread adds up, about, and the most threads of a tensor.
    const STRETCH: usize = 64;
    const MOST_PARTS: usize = 1 << 16;
    /// Sums that are read and added up here.
    const READ: usize = 1 << 10;
    let Some(first) = tensors.first() else { return Ok(0.) };
    let device = first.device().as_cuda_device()?;
    let parts_of = |x: &Tensor| x.elem_count().div_ceil(STRETCH).clamp(1, MOST_PARTS);
    let parts = tensors.iter().map(parts_of).sum::<usize>();
    let sums = allocate(device, parts, DType::F64, false)?;
    let at = address(&sums)?;
    let mut done = 0;
    for x in tensors {
        let (x, own) = (packed(&x.to_dtype(DType::F32)?)?, parts_of(x));
        let to = at + (done * size_of::<f64>()) as u64;
        with_address(&x, |from| {
            let arguments = Sums { x: from, sums: to, count: x.elem_count() as u32, parts: own as u32 };
            // SAFETY: the sums of each tensor lie behind those of the one before.
            unsafe { launch(device, &OPTIMIZER, "square_sums", own, arguments) }
        })?;
        done += own;
    }
    let few = parts.min(READ);
    let totals = allocate(device, few, DType::F64, false)?;
    let arguments = Sums { x: at, sums: address(&totals)?, count: parts as u32, parts: few as u32 };
    // SAFETY: `sums` has `parts` values, `totals` has `few`.
    unsafe { launch(device, &OPTIMIZER, "sums", few, arguments)? };
    Ok(read::<f64>(&totals)?.iter().sum())
}
