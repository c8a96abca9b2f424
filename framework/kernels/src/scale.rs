//! Scaling of channels by one factor each, as one op.

use crate::buffer::{Buffer, filled};
use crate::float::Float;
use crate::parallel::{self, GRAIN, Shared, for_each, on_pool};
use crate::simd::{Kernel, LANES, Level, Simd};
use crate::tensors::{check_convolves, check_like, for_kernels, packed, tracked, with_values};
#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::{CpuStorage, CustomOp2, DType, Device, Layout, Result, Shape, Tensor, bail};
use half::{bf16, f16};
use std::marker::PhantomData;
use std::ops::Range;

/// Multiplies x (.., N) by a factor for each of its N channels: (N), the same for all of x, or (B, N), one
/// per sample of x (B, .., N). Differentiable in both.
///
/// # Errors
/// If the shapes are incompatible, or the two do not share one device and dtype that
/// [`convolves`](crate::convolves) accepts.
pub fn scale_channels(x: &Tensor, factors: &Tensor) -> Result<Tensor> {
    let op = "scale_channels";
    check_convolves(op, "x", x)?;
    check_like(op, "factors", factors, x)?;
    let &[ref leading @ .., channels] = x.dims() else { bail!("{op}: a number has no channels") };
    let rows: usize = leading.iter().product();
    let samples = match *factors.dims() {
        [own] if own == channels => 1,
        [samples, own] if own == channels && leading.first() == Some(&samples) => samples,
        _ => bail!("{op}: factors {:?} do not fit to {:?}", factors.dims(), x.dims()),
    };
    let (x, factors) = (&for_kernels(x)?, &for_kernels(factors)?);
    match x.dtype() {
        DType::BF16 => apply::<bf16>(x, factors, rows / samples),
        DType::F16 => apply::<f16>(x, factors, rows / samples),
        _ => apply::<f32>(x, factors, rows / samples),
    }
}

fn apply<T: Float>(x: &Tensor, factors: &Tensor, rows: usize) -> Result<Tensor> {
    let op = Scale::<T> { rows, values: PhantomData };
    if tracked(x) || tracked(factors) { x.apply_op2(factors, op) } else { x.apply_op2_no_bwd(factors, &op) }
}

struct Scale<T> {
    /// Rows per sample.
    rows: usize,
    values: PhantomData<T>,
}

impl<T: Float> Scale<T> {
    /// Tasks per sample, and rows per task.
    fn parts(&self, channels: usize) -> (usize, usize) {
        let rows = (GRAIN / channels).clamp(1, self.rows);
        (self.rows.div_ceil(rows), rows)
    }

    /// Calls `f` for each task with its number, its sample and its rows.
    fn for_parts(
        &self,
        samples: usize,
        channels: usize,
        f: impl Fn(usize, usize, Range<usize>) + Sync + Send,
    ) {
        let (in_sample, rows) = self.parts(channels);
        for_each(samples * in_sample, |task| {
            let (sample, part) = (task / in_sample, task % in_sample);
            let first = sample * self.rows;
            f(task, sample, first + part * rows..first + self.rows.min((part + 1) * rows));
        });
    }

    /// x times its factors.
    fn run(&self, x: &[T], factors: &[T], channels: usize) -> Vec<T> {
        let level = Level::current();
        let factors = &*T::widened(level, factors);
        let fill = |to: Shared<T>| {
            self.for_parts(factors.len() / channels, channels, |_, sample, rows| {
                let factors = &factors[sample * channels..][..channels];
                level.run(Products { x, factors, to, rows });
            });
        };
        // SAFETY: every row is written.
        unsafe { filled(x.len(), |to| on_pool(|| fill(to))) }
    }

    /// The gradient of the factors.
    fn factors_gradient(&self, x: &[T], d: &[T], samples: usize, channels: usize) -> Vec<T> {
        let level = Level::current();
        let (parts, _) = self.parts(channels);
        let mut sums = Buffer::zeroed(samples * parts * channels);
        let mut total = T::wide_zeros(samples * channels);
        on_pool(|| {
            let data = Shared::new(&mut sums);
            self.for_parts(samples, channels, |task, _, rows| {
                // SAFETY: each task has its own sums.
                let sums = unsafe { std::slice::from_raw_parts_mut(data.at(task * channels), channels) };
                level.run(Sums { x, d, sums, rows });
            });
            for (total, sums) in total.chunks_exact_mut(channels).zip(sums.chunks_exact(parts * channels)) {
                parallel::add_all(total, sums);
            }
        });
        T::narrowed(level, total)
    }
}

/// Some rows times their factors.
struct Products<'a, T> {
    x: &'a [T],
    factors: &'a [f32],
    to: Shared<T>,
    rows: Range<usize>,
}

impl<T: Float> Kernel for Products<'_, T> {
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let Products { x, factors, to, rows } = self;
        for row in rows {
            for channel in (0..factors.len()).step_by(LANES) {
                let lanes = LANES.min(factors.len() - channel);
                let at = row * factors.len() + channel;
                // SAFETY: the row exists and belongs to this task only.
                unsafe {
                    let factors = S::load_lanes(factors.as_ptr().add(channel), lanes);
                    let y = factors.mul(T::load_lanes(x.as_ptr().add(at), lanes));
                    T::store_lanes(y, to.at(at), lanes);
                }
            }
        }
    }
}

/// The contribution of some rows, given their results' gradients `d`, to the gradients of the factors.
struct Sums<'a, T> {
    x: &'a [T],
    d: &'a [T],
    sums: &'a mut [f32],
    rows: Range<usize>,
}

impl<T: Float> Kernel for Sums<'_, T> {
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let Sums { x, d, sums, rows } = self;
        for row in rows {
            for channel in (0..sums.len()).step_by(LANES) {
                let lanes = LANES.min(sums.len() - channel);
                let at = row * sums.len() + channel;
                // SAFETY: the row exists; each task has its own sums.
                unsafe {
                    let sum = sums.as_mut_ptr().add(channel);
                    let [x, d]: [S; 2] = [x, d].map(|values| T::load_lanes(values.as_ptr().add(at), lanes));
                    x.mul_add(d, S::load_lanes(sum, lanes)).store_lanes(sum, lanes);
                }
            }
        }
    }
}

impl<T: Float> CustomOp2 for Scale<T> {
    fn name(&self) -> &'static str {
        "scale_channels"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        lx: &Layout,
        factors: &CpuStorage,
        lf: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let channels = lx.dims()[lx.dims().len() - 1];
        let y = self.run(&packed::<T>(x, lx)?, &packed::<T>(factors, lf)?, channels);
        Ok((T::to_cpu_storage_owned(y), lx.shape().clone()))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        x: &CudaStorage,
        lx: &Layout,
        factors: &CudaStorage,
        lf: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let channels = lx.dims()[lx.dims().len() - 1];
        let y = crate::cuda::scale::forward((x, lx), (factors, lf), channels)?;
        Ok((y, lx.shape().clone()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        factors: &Tensor,
        _: &Tensor,
        d: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let channels = x.dims()[x.rank() - 1];
        let samples = factors.elem_count() / channels;
        #[cfg(feature = "cuda")]
        if x.device().is_cuda() {
            use crate::cuda::scale::{gradient_of_factors, gradient_of_x};
            let dx = x.track_op().then(|| gradient_of_x(factors, d, channels)).transpose()?;
            let of_factors = factors.track_op().then(|| gradient_of_factors(x, factors, d)).transpose()?;
            return Ok((dx, of_factors));
        }
        let of_x = || {
            let dx = with_values(d, |d: &[T]| with_values(factors, |f| Ok(self.run(d, f, channels))))?;
            Tensor::from_vec(dx, x.shape(), &Device::Cpu)
        };
        let of_factors = || {
            let df = with_values(x, |x: &[T]| {
                with_values(d, |d| Ok(self.factors_gradient(x, d, samples, channels)))
            })?;
            Tensor::from_vec(df, factors.shape(), &Device::Cpu)
        };
        let wanted = |tensor: &Tensor, gradient: &dyn Fn() -> Result<Tensor>| {
            tensor.track_op().then(gradient).transpose()
        };
        Ok((wanted(x, &of_x)?, wanted(factors, &of_factors)?))
    }
}
