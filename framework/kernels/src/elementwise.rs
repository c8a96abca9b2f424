//! In-place passes over tensors, for optimizers: on the CPU no allocation, all threads, no graph.
//!
//! One step of Adam, for example, is three passes over each parameter:
//!
//! ```
//! # use candle_core::{Device, Tensor, Var};
//! # use candlepower_kernels::elementwise::{zip2, zip3};
//! # let [w, g, m, v] = [1f32, 2., 3., 4.].map(|x| Tensor::full(x, 8, &Device::Cpu).unwrap());
//! # let [w, m, v] = [w, m, v].map(|x| Var::from_tensor(&x).unwrap());
//! zip2(&m, &g, |m: &mut f32, g| *m = 0.9 * *m + 0.1 * g)?;
//! zip2(&v, &g, |v: &mut f32, g| *v = 0.98 * *v + 0.02 * g * g)?;
//! zip3(&w, &m, &v, |w: &mut f32, m, v| *w -= 1e-3 * m / (v.sqrt() + 1e-8))?;
//! # Ok::<(), candle_core::Error>(())
//! ```
//!
//! A pass writes the storage that a tensor shares with its views, and with a `Var` made from it. A function of Rust does not
//! run on a CUDA device: there, a pass copies its tensors to the CPU and its result back.

use crate::parallel::GRAIN;
use crate::simd::{Kernel, LANES, Level, Simd};
use candle_core::{
    CpuStorage, InplaceOp1, InplaceOp2, InplaceOp3, Layout, Result, Storage, Tensor, WithDType, bail,
};
#[cfg(feature = "cuda")]
use candle_core::{
    CudaStorage,
    backend::{BackendDevice, BackendStorage},
};
use rayon::prelude::*;

/// The element types of these passes: f32 and f64.
pub trait Element: WithDType {
    /// The values of a storage of this type, to be changed.
    ///
    /// # Errors
    /// Where the storage is of another type.
    fn values_mut(storage: &mut CpuStorage) -> Result<&mut [Self]>;
}

impl Element for f32 {
    fn values_mut(storage: &mut CpuStorage) -> Result<&mut [f32]> {
        match storage {
            CpuStorage::F32(values) => Ok(values),
            _ => bail!("elementwise: expected f32 to write to, got another type"),
        }
    }
}

impl Element for f64 {
    fn values_mut(storage: &mut CpuStorage) -> Result<&mut [f64]> {
        match storage {
            CpuStorage::F64(values) => Ok(values),
            _ => bail!("elementwise: expected f64 to write to, got another type"),
        }
    }
}

/// f(x) for each x of `dst`, a contiguous tensor of `T`.
///
/// # Errors
/// Where the tensor is of another type, or not contiguous.
pub fn for_each<T: Element>(dst: &Tensor, f: impl Fn(&mut T) + Sync) -> Result<()> {
    dst.inplace_op1(&Pass(Zip1(f), std::marker::PhantomData::<T>))
}

/// f(x, a) for each x of `dst` and the value of `a` at its place; both contiguous tensors of `T`, of one shape, on one device.
///
/// # Errors
/// Where a tensor is of another type, not contiguous, or of another shape, or where both share their storage.
pub fn zip2<T: Element>(dst: &Tensor, a: &Tensor, f: impl Fn(&mut T, T) + Sync) -> Result<()> {
    same_shape(dst, a)?;
    dst.inplace_op2(a, &Pass(Zip2(f), std::marker::PhantomData::<T>))
}

/// f(x, a, b) for each x of `dst` and the values of `a` and `b` at its place; all contiguous tensors of `T`, of one shape, on
/// one device.
///
/// # Errors
/// As for [`zip2`].
pub fn zip3<T: Element>(dst: &Tensor, a: &Tensor, b: &Tensor, f: impl Fn(&mut T, T, T) + Sync) -> Result<()> {
    same_shape(dst, a)?;
    same_shape(dst, b)?;
    dst.inplace_op3(a, b, &Pass(Zip3(f), std::marker::PhantomData::<T>))
}

/// The sum of the squares of a tensor's values, f32 or f64, as f64; of f32 to about 1e-7 of the sum. The same bits on any
/// number of threads.
///
/// # Errors
/// Where the tensor is of another type, not on the CPU, or not contiguous.
pub fn sum_squares(x: &Tensor) -> Result<f64> {
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

fn same_shape(dst: &Tensor, a: &Tensor) -> Result<()> {
    if dst.dims() != a.dims() {
        bail!("elementwise: shapes differ: {:?} and {:?}", dst.dims(), a.dims());
    }
    Ok(())
}

fn contiguous<'a, T>(values: &'a [T], layout: &Layout) -> Result<&'a [T]> {
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(&values[start..end]),
        None => bail!("elementwise: needs contiguous tensors, got {layout:?}"),
    }
}

fn contiguous_mut<'a, T: Element>(storage: &'a mut CpuStorage, layout: &Layout) -> Result<&'a mut [T]> {
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(&mut T::values_mut(storage)?[start..end]),
        None => bail!("elementwise: needs contiguous tensors, got {layout:?}"),
    }
}

/// Runs a function of values that lie side by side; compiled for each instruction set.
struct Loop<F: FnOnce()>(F);

impl<F: FnOnce()> Kernel for Loop<F> {
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        (self.0)();
    }
}

/// Runs a pass on a copy of a device's storage, and puts what it made in the storage's place.
#[cfg(feature = "cuda")]
fn through_the_cpu<T: Element>(
    dst: &mut CudaStorage,
    pass: impl FnOnce(&mut CpuStorage) -> Result<()>,
) -> Result<()> {
    let mut copy = dst.to_cpu_storage()?;
    pass(&mut copy)?;
    let all = Layout::contiguous(copy.as_slice::<T>()?.len());
    // Into the same memory: recorded work knows its address.
    dst.device().storage_from_cpu_storage_owned(copy)?.copy_strided_src(dst, 0, &all)
}

struct Zip1<F>(F);
struct Zip2<F>(F);
struct Zip3<F>(F);
struct Pass<Z, T>(Z, std::marker::PhantomData<T>);

impl<T: Element, F: Fn(&mut T) + Sync> InplaceOp1 for Pass<Zip1<F>, T> {
    fn name(&self) -> &'static str {
        "elementwise::for_each"
    }
    fn cpu_fwd(&self, dst: &mut CpuStorage, ld: &Layout) -> Result<()> {
        let f = &self.0.0;
        let level = Level::current();
        let dst = contiguous_mut::<T>(dst, ld)?;
        let part = |dst: &mut [T]| {
            level.run(Loop(
                #[inline(always)]
                || dst.iter_mut().for_each(f),
            ))
        };
        if dst.len() <= GRAIN {
            part(dst)
        } else {
            dst.par_chunks_mut(GRAIN).for_each(part)
        }
        Ok(())
    }
    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, dst: &mut CudaStorage, ld: &Layout) -> Result<()> {
        through_the_cpu::<T>(dst, |dst| self.cpu_fwd(dst, ld))
    }
}

impl<T: Element, F: Fn(&mut T, T) + Sync> InplaceOp2 for Pass<Zip2<F>, T> {
    fn name(&self) -> &'static str {
        "elementwise::zip2"
    }
    fn cpu_fwd(&self, dst: &mut CpuStorage, ld: &Layout, a: &CpuStorage, la: &Layout) -> Result<()> {
        let f = &self.0.0;
        let level = Level::current();
        let dst = contiguous_mut::<T>(dst, ld)?;
        let a = contiguous(a.as_slice::<T>()?, la)?;
        let part = |(dst, a): (&mut [T], &[T])| {
            level.run(Loop(
                #[inline(always)]
                || {
                    for (x, &a) in dst.iter_mut().zip(a) {
                        f(x, a);
                    }
                },
            ));
        };
        if dst.len() <= GRAIN {
            part((dst, a));
        } else {
            dst.par_chunks_mut(GRAIN).zip(a.par_chunks(GRAIN)).for_each(part);
        }
        Ok(())
    }
    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, dst: &mut CudaStorage, ld: &Layout, a: &CudaStorage, la: &Layout) -> Result<()> {
        let a = a.to_cpu_storage()?;
        through_the_cpu::<T>(dst, |dst| self.cpu_fwd(dst, ld, &a, la))
    }
}

impl<T: Element, F: Fn(&mut T, T, T) + Sync> InplaceOp3 for Pass<Zip3<F>, T> {
    fn name(&self) -> &'static str {
        "elementwise::zip3"
    }
    fn cpu_fwd(
        &self,
        dst: &mut CpuStorage,
        ld: &Layout,
        a: &CpuStorage,
        la: &Layout,
        b: &CpuStorage,
        lb: &Layout,
    ) -> Result<()> {
        let f = &self.0.0;
        let level = Level::current();
        let dst = contiguous_mut::<T>(dst, ld)?;
        let a = contiguous(a.as_slice::<T>()?, la)?;
        let b = contiguous(b.as_slice::<T>()?, lb)?;
        let part = |((dst, a), b): ((&mut [T], &[T]), &[T])| {
            level.run(Loop(
                #[inline(always)]
                || {
                    for ((x, &a), &b) in dst.iter_mut().zip(a).zip(b) {
                        f(x, a, b);
                    }
                },
            ));
        };
        if dst.len() <= GRAIN {
            part(((dst, a), b));
        } else {
            dst.par_chunks_mut(GRAIN).zip(a.par_chunks(GRAIN)).zip(b.par_chunks(GRAIN)).for_each(part);
        }
        Ok(())
    }
    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        dst: &mut CudaStorage,
        ld: &Layout,
        a: &CudaStorage,
        la: &Layout,
        b: &CudaStorage,
        lb: &Layout,
    ) -> Result<()> {
        let (a, b) = (a.to_cpu_storage()?, b.to_cpu_storage()?);
        through_the_cpu::<T>(dst, |dst| self.cpu_fwd(dst, ld, &a, la, &b, lb))
    }
}
