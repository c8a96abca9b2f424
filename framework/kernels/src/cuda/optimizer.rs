//! Updates of parameters in place, and the norm of gradients.

use super::arguments::{Adam, Approach, Many, Sgd, SquareSums, Sums};
use super::launch::{THREADS, launch, type_name};
use super::memory::{address, allocate, packed, read, with_address};
use super::sources::OPTIMIZER;
use crate::updates::{AdamParam, AdamStep, SgdParam, SgdStep};
use candle_core::{DType, Result, Tensor, bail};

/// Calls `launch` with all tensors, as many at once as a kernel takes. Each is the addresses of what belongs together, and how
/// many values each of that has.
fn in_groups(tensors: Vec<([u64; 5], usize)>, mut launch: impl FnMut(Many) -> Result<()>) -> Result<()> {
    let filled: Vec<_> = tensors.into_iter().filter(|(_, count)| *count > 0).collect();
    for (_, count) in &filled {
        if *count >= 1 << 31 {
            bail!("a parameter of {count} values is too large for a CUDA device");
        }
    }
    filled.chunks(Many::MOST).try_for_each(|some| launch(Many::new(some)))
}

fn at(x: &Tensor) -> Result<u64> {
    with_address(x, Ok)
}

/// As [`AdamStep::apply`], by one kernel for many parameters; all are f32, contiguous, and those of a parameter of one shape.
pub(crate) fn adam(step: &AdamStep, params: &[AdamParam]) -> Result<()> {
    let AdamStep { one_minus_beta1, beta2, one_minus_beta2, eps, step_size, root_correction, l2, keep } =
        *step;
    let Some(first) = params.first() else { return Ok(()) };
    let device = first.param.device().as_cuda_device()?;
    let gradients = params.iter().map(|it| packed(it.gradient)).collect::<Result<Vec<_>>>()?;
    let tensors = params.iter().zip(&gradients).map(|(it, gradient)| {
        let places =
            [at(it.param)?, at(gradient)?, at(it.first)?, at(it.second)?, it.largest.map_or(Ok(0), at)?];
        Ok((places, gradient.elem_count()))
    });
    in_groups(tensors.collect::<Result<_>>()?, |tensors| {
        let arguments = Adam {
            tensors,
            one_minus_beta1,
            beta2,
            one_minus_beta2,
            eps,
            step_size,
            root_correction,
            l2,
            keep,
        };
        // SAFETY: all have as many values as their parameter, which the caller has checked; each is written by nobody else on
        // the device's one stream.
        unsafe { launch(device, &OPTIMIZER, "adam", tensors.blocks() * THREADS, arguments) }
    })
}

/// As [`publish`](crate::updates::publish).
pub(crate) fn publish(pairs: &[(&Tensor, &Tensor)]) -> Result<()> {
    let Some((_, first)) = pairs.first() else { return Ok(()) };
    let (device, dtype) = (first.device().as_cuda_device()?, first.dtype());
    let kernel = format!("publish_{}", type_name(dtype)?);
    let tensors =
        pairs.iter().map(|(master, copy)| Ok(([at(master)?, at(copy)?, 0, 0, 0], copy.elem_count())));
    in_groups(tensors.collect::<Result<_>>()?, |tensors| {
        // SAFETY: as in `adam`; copies are of the kernel's type.
        unsafe { launch(device, &OPTIMIZER, &kernel, tensors.blocks() * THREADS, tensors) }
    })
}

/// As [`SgdStep::apply`], by one kernel for many parameters.
pub(crate) fn sgd(step: &SgdStep, params: &[SgdParam]) -> Result<()> {
    let SgdStep { lr, momentum, entering, l2, nesterov } = *step;
    let Some(first) = params.first() else { return Ok(()) };
    let device = first.param.device().as_cuda_device()?;
    let gradients = params.iter().map(|it| packed(it.gradient)).collect::<Result<Vec<_>>>()?;
    let tensors = params.iter().zip(&gradients).map(|(it, gradient)| {
        let buffer = it.momentum_buffer.map_or(Ok(0), at)?;
        Ok(([at(it.param)?, at(gradient)?, buffer, 0, 0], gradient.elem_count()))
    });
    in_groups(tensors.collect::<Result<_>>()?, |tensors| {
        let arguments = Sgd { tensors, lr, momentum, entering, l2, nesterov: u32::from(nesterov) };
        // SAFETY: as in `adam`.
        unsafe { launch(device, &OPTIMIZER, "sgd", tensors.blocks() * THREADS, arguments) }
    })
}

/// As [`approach`](crate::updates::approach).
pub(crate) fn approach(pairs: &[(&Tensor, &Tensor)], share: f32) -> Result<()> {
    let Some((first, _)) = pairs.first() else { return Ok(()) };
    let device = first.device().as_cuda_device()?;
    let targets = pairs.iter().map(|(_, target)| packed(target)).collect::<Result<Vec<_>>>()?;
    let tensors = pairs
        .iter()
        .zip(&targets)
        .map(|((x, _), target)| Ok(([at(x)?, at(target)?, 0, 0, 0], target.elem_count())));
    in_groups(tensors.collect::<Result<_>>()?, |tensors| {
        // SAFETY: as in `adam`.
        unsafe {
            launch(device, &OPTIMIZER, "approach", tensors.blocks() * THREADS, Approach { tensors, share })
        }
    })
}

/// The sum of the squares of all tensors' values. Waits for the device once.
pub(crate) fn sum_squares(tensors: &[Tensor]) -> Result<f64> {
    /// Sums that are read and added up here.
    const READ: usize = 1 << 10;
    let Some(first) = tensors.first() else { return Ok(0.) };
    let device = first.device().as_cuda_device()?;
    let tensors = tensors.iter().map(|x| packed(&x.to_dtype(DType::F32)?)).collect::<Result<Vec<_>>>()?;
    let all =
        tensors.iter().map(|x| Ok(([at(x)?, 0, 0, 0, 0], x.elem_count()))).collect::<Result<Vec<_>>>()?;
    let mut parts = 0;
    in_groups(all.clone(), |some| {
        parts += some.blocks() * THREADS;
        Ok(())
    })?;
    if parts == 0 {
        return Ok(0.);
    }
    let sums = allocate(device, parts, DType::F64, false)?;
    let (to, mut done) = (address(&sums)?, 0);
    in_groups(all, |tensors| {
        let (count, sums) = (tensors.blocks() * THREADS, to + (done * size_of::<f64>()) as u64);
        done += count;
        // SAFETY: the sums of each group lie behind those of the one before, one for each thread.
        unsafe { launch(device, &OPTIMIZER, "square_sums", count, SquareSums { tensors, sums }) }
    })?;
    let few = parts.min(READ);
    let totals = allocate(device, few, DType::F64, false)?;
    let arguments = Sums { x: to, sums: address(&totals)?, count: parts as u32, parts: few as u32 };
    // SAFETY: `sums` has `parts` values, `totals` has `few`.
    unsafe { launch(device, &OPTIMIZER, "sums", few, arguments)? };
    Ok(read::<f64>(&totals)?.iter().sum())
}
