//! In-place parameter updates, and the clipping decision based on the gradients' norm.

use super::arguments::{
    Approach, ApproachAt, Counted, CountedAt, Decide, MOST_TENSORS, Many, ParamAt, PublishAt, SquareSums,
    Sums, Update,
};
use super::launch::{THREADS, launch, type_name};
use super::memory::{address, aligned, allocate, at, read, tensor};
use super::sources::OPTIMIZER;
use crate::clipping::{Clipping, GradScale};
use crate::updates::UpdateParam;
use candle_core::{CudaStorage, DType, Result, Tensor, bail};

/// Calls `launch` for all tensors, as many at a time as a kernel takes. Each tensor comes with its number of
/// values.
fn in_groups<P: Copy + Default>(
    tensors: Vec<(P, usize)>,
    mut launch: impl FnMut(Many<P>) -> Result<()>,
) -> Result<()> {
    let filled: Vec<_> = tensors.into_iter().filter(|(_, count)| *count > 0).collect();
    for (_, count) in &filled {
        if *count >= 1 << 31 {
            bail!("a parameter of {count} values is too large for a CUDA device");
        }
    }
    filled.chunks(MOST_TENSORS).try_for_each(|some| launch(Many::new(some)))
}

fn at_or_0(x: Option<&Tensor>) -> Result<u64> {
    x.map_or(Ok(0), at)
}

/// Implements a rule's [`apply`](crate::updates::Placed::apply), with one kernel for many parameters: all
/// tensors are f32 and contiguous, and those of a parameter have one shape.
pub(crate) fn update(rule: &str, numbers: &Tensor, params: &[UpdateParam], scale: &GradScale) -> Result<()> {
    let device = numbers.device().as_cuda_device()?;
    let gradients = params.iter().map(|it| aligned(it.gradient)).collect::<Result<Vec<_>>>()?;
    let tensors = params.iter().zip(&gradients).map(|(it, gradient)| {
        let UpdateParam { param, copy, kept: [a, b, c], .. } = *it;
        let kept = [at_or_0(a)?, at_or_0(b)?, at_or_0(c)?];
        let place = ParamAt { param: at(param)?, gradient: at(gradient)?, kept, copy: at_or_0(copy)? };
        Ok((place, gradient.elem_count()))
    });
    let copied = params.iter().find_map(|it| it.copy).map_or(DType::F32, Tensor::dtype);
    let kernel = format!("{rule}_{}", type_name(copied)?);
    let decided = scale.on_device(numbers.device())?;
    let (step, decided_at) = (at(numbers)?, at(&decided)?);
    in_groups(tensors.collect::<Result<_>>()?, |tensors| {
        let arguments = Update { tensors, step, decided: decided_at };
        // SAFETY: all tensors of a parameter have equally many values, and copies are of one dtype, as the
        // caller has checked; nothing else on the device's only stream writes the tensors.
        unsafe { launch(device, &OPTIMIZER, &kernel, tensors.blocks() * THREADS, arguments) }
    })
}

/// Implements [`publish`](crate::updates::publish).
pub(crate) fn publish(pairs: &[(&Tensor, &Tensor)]) -> Result<()> {
    let Some((_, first)) = pairs.first() else { return Ok(()) };
    let (device, dtype) = (first.device().as_cuda_device()?, first.dtype());
    let kernel = format!("publish_{}", type_name(dtype)?);
    let tensors = pairs
        .iter()
        .map(|(master, copy)| Ok((PublishAt { master: at(master)?, copy: at(copy)? }, copy.elem_count())));
    in_groups(tensors.collect::<Result<_>>()?, |tensors| {
        // SAFETY: same as in `update`; copies have the kernel's dtype.
        unsafe { launch(device, &OPTIMIZER, &kernel, tensors.blocks() * THREADS, tensors) }
    })
}

/// Implements [`approach`](crate::updates::approach).
pub(crate) fn approach(pairs: &[(&Tensor, &Tensor)], share: f32) -> Result<()> {
    let Some((first, _)) = pairs.first() else { return Ok(()) };
    let device = first.device().as_cuda_device()?;
    let targets = pairs.iter().map(|(_, target)| aligned(target)).collect::<Result<Vec<_>>>()?;
    let tensors = pairs
        .iter()
        .zip(&targets)
        .map(|((x, _), target)| Ok((ApproachAt { x: at(x)?, target: at(target)? }, target.elem_count())));
    in_groups(tensors.collect::<Result<_>>()?, |tensors| {
        // SAFETY: same as in `update`.
        unsafe {
            launch(device, &OPTIMIZER, "approach", tensors.blocks() * THREADS, Approach { tensors, share })
        }
    })
}

/// Gradients after scaling and clamping, according to the decision.
pub(crate) fn counted(gradients: &[Tensor], decided: &Tensor) -> Result<Vec<Tensor>> {
    let device = decided.device().as_cuda_device()?;
    let decided_at = at(decided)?;
    let gradients = gradients.iter().map(aligned).collect::<Result<Vec<_>>>()?;
    let to = gradients.iter().map(|x| {
        if x.dtype() != DType::F32 {
            bail!("expected gradients in f32, got {:?}", x.dtype());
        }
        Ok(tensor(allocate(device, x.elem_count(), DType::F32, false)?, x.shape()))
    });
    let to = to.collect::<Result<Vec<_>>>()?;
    let tensors = gradients
        .iter()
        .zip(&to)
        .map(|(x, to)| Ok((CountedAt { gradient: at(x)?, to: at(to)? }, x.elem_count())));
    in_groups(tensors.collect::<Result<_>>()?, |tensors| {
        let arguments = Counted { tensors, decided: decided_at };
        // SAFETY: each gradient has as many f32 values as its target, which nothing else uses yet.
        unsafe { launch(device, &OPTIMIZER, "counted", tensors.blocks() * THREADS, arguments) }
    })?;
    Ok(to)
}

/// Norm, factor, largest value and refusal of gradients, as [`Clipping::decide`] defines them.
pub(crate) fn decide(clipping: &Clipping, gradients: &[Tensor]) -> Result<Tensor> {
    /// Number of sums that one thread adds up.
    const LAST: usize = 1 << 6;
    let Clipping { loss_scale, max_norm, max_value, only_finite } = *clipping;
    let Some(first) = gradients.first() else { bail!("there is no gradient to decide of") };
    let device = first.device().as_cuda_device()?;
    let sums = square_sums(gradients, LAST)?;
    let decided = allocate(device, 4, DType::F32, false)?;
    let arguments = Decide {
        sums: address(&sums.values)?,
        decided: address(&decided)?,
        loss_scale,
        max_norm: max_norm.unwrap_or(f64::INFINITY),
        max_value: max_value.map_or(f32::INFINITY, |value| value as f32),
        count: sums.count as u32,
        only_finite: u32::from(only_finite),
    };
    // SAFETY: there are `count` sums, and room for four numbers.
    unsafe { launch(device, &OPTIMIZER, "decide", 1, arguments)? };
    Ok(tensor(decided, 4))
}

/// The sum of the squares of all tensors' values. Waits for the device once.
pub(crate) fn sum_squares(tensors: &[Tensor]) -> Result<f64> {
    /// Maximum number of sums that are read and added up on the host.
    const READ: usize = 1 << 10;
    Ok(read::<f64>(&square_sums(tensors, READ)?.values)?.iter().sum())
}

/// Sums on a device, in 64 bits.
struct PartialSums {
    values: CudaStorage,
    count: usize,
}

/// Between 1 and `most` sums that add up to the sum of the squares of all tensors' values; always in the same
/// order.
fn square_sums(tensors: &[Tensor], most: usize) -> Result<PartialSums> {
    /// Number of sums that each thread adds up.
    const EACH: usize = 1 << 6;
    let Some(first) = tensors.first() else { bail!("there is no tensor to take the squares of") };
    let device = first.device().as_cuda_device()?;
    let tensors = tensors.iter().map(|x| aligned(&x.to_dtype(DType::F32)?)).collect::<Result<Vec<_>>>()?;
    let all = tensors.iter().map(|x| Ok((at(x)?, x.elem_count()))).collect::<Result<Vec<_>>>()?;
    let mut count = 0;
    in_groups(all.clone(), |some| {
        count += some.blocks() * THREADS;
        Ok(())
    })?;
    if count == 0 {
        return Ok(PartialSums { values: allocate(device, 1, DType::F64, true)?, count: 1 });
    }
    let mut values = allocate(device, count, DType::F64, false)?;
    let (to, mut done) = (address(&values)?, 0);
    in_groups(all, |tensors| {
        let (threads, sums) = (tensors.blocks() * THREADS, to + (done * size_of::<f64>()) as u64);
        done += threads;
        // SAFETY: the sums of each group follow those of the previous one, one for each thread.
        unsafe { launch(device, &OPTIMIZER, "square_sums", threads, SquareSums { tensors, sums }) }
    })?;
    while count > most {
        let fewer = (count / EACH).max(most);
        let sums = allocate(device, fewer, DType::F64, false)?;
        let arguments =
            Sums { x: address(&values)?, sums: address(&sums)?, count: count as u32, parts: fewer as u32 };
        // SAFETY: there are `count` values, and room for `fewer`.
        unsafe { launch(device, &OPTIMIZER, "sums", fewer, arguments)? };
        (values, count) = (sums, fewer);
    }
    Ok(PartialSums { values, count })
}
