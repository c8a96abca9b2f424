//! The sum of a tensor's squares.

use crate::parallel::GRAIN;
use crate::simd::{Kernel, LANES, Level, Simd};
use candle_core::{CpuStorage, Layout, Result, Storage, Tensor, bail};
use rayon::prelude::*;

/// The sum of the squares of a tensor's f32 or f64 values, as f64; for f32, accurate to about 1e-7 of the
/// sum. Bit-identical for any number of threads.
///
/// # Errors
/// If the tensor has another dtype, is not on the CPU, or is not contiguous.
pub(crate) fn sum_squares(x: &Tensor) -> Result<f64> {
    let (storage, layout) = x.storage_and_layout();
    match &*storage {
        Storage::Cpu(CpuStorage::F32(values)) => {
            let values = contiguous(values, layout)?;
            let sum = sum_of(values, |x| x * x);
            // Squares overflow f32 long before the values do.
            Ok(if sum.is_finite() { sum } else { sum_of(values, |x| f64::from(x) * f64::from(x)) })
        }
        Storage::Cpu(CpuStorage::F64(values)) => Ok(sum_of(contiguous(values, layout)?, |x| x * x)),
        _ => bail!(
            "sum_squares: expected f32 or f64 on the CPU, got {:?} on {:?}",
            x.dtype(),
            x.device().location()
        ),
    }
}

/// The sum of f(x) for each x: short runs are added in the type of f(x), and their sums in f64.
fn sum_of<T: Copy + Sync, U>(values: &[T], f: impl Fn(T) -> U + Copy + Sync) -> f64
where
    U: Copy + Default + Into<f64> + std::ops::AddAssign,
{
    let level = Level::current();
    let part = |values: &[T]| {
        let mut sum = 0.;
        level.run(Sum { values, f, sum: &mut sum });
        sum
    };
    if values.len() <= GRAIN {
        return part(values);
    }
    let parts: Vec<f64> = values.par_chunks(GRAIN).map(part).collect();
    parts.iter().sum()
}

/// The sum over one part, with the instructions of one level.
struct Sum<'a, T, F> {
    values: &'a [T],
    f: F,
    sum: &'a mut f64,
}

impl<T: Copy, U, F: Fn(T) -> U> Kernel for Sum<'_, T, F>
where
    U: Copy + Default + Into<f64> + std::ops::AddAssign,
{
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        /// Additions per lane before the lane is added to the f64 sum.
        const STRETCH: usize = 16;
        for stretch in self.values.chunks(STRETCH * LANES) {
            // Independent sums that vectorise, in the same order at every level.
            let mut sums = [U::default(); LANES];
            let rows = stretch.chunks_exact(LANES);
            for (sum, &x) in sums.iter_mut().zip(rows.remainder()) {
                *sum += (self.f)(x);
            }
            for row in rows {
                for (sum, &x) in sums.iter_mut().zip(row) {
                    *sum += (self.f)(x);
                }
            }
            *self.sum += sums.iter().map(|&sum| sum.into()).sum::<f64>();
        }
    }
}

fn contiguous<'a, T>(values: &'a [T], layout: &Layout) -> Result<&'a [T]> {
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(&values[start..end]),
        None => bail!("sum_squares: needs a contiguous tensor, got {layout:?}"),
    }
}
