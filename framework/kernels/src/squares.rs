//! The sum of a tensor's squares.

use crate::parallel::GRAIN;
use crate::simd::{Kernel, LANES, Level, Simd};
use candle_core::{CpuStorage, Layout, Result, Storage, Tensor, bail};
use rayon::prelude::*;

/// The sum of the squares of a tensor's values, f32 or f64, as f64; of f32 to about 1e-7 of the sum. The same bits on any
/// number of threads.
///
/// # Errors
/// Where the tensor is of another type, not on the CPU, or not contiguous.
pub(crate) fn sum_squares(x: &Tensor) -> Result<f64> {
    let (storage, layout) = x.storage_and_layout();
    match &*storage {
        Storage::Cpu(CpuStorage::F32(values)) => {
            let values = contiguous(values, layout)?;
            let sum = sum_of(values, |x| x * x);
            // Squares leave the range of f32 long before the values do.
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

/// The sum of f(x) for each x: in the type of f(x) over short stretches, in f64 over those.
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

/// The same over one part, with the instructions of a level.
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
        /// So many additions in one lane before it is added up in f64.
        const STRETCH: usize = 16;
        for stretch in self.values.chunks(STRETCH * LANES) {
            // Independent sums, for vectors; the same ones at every level.
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
