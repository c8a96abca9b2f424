//! Pointwise activations of network layers, one op each.

use crate::activations::{exp_below, sigmoid};
use crate::buffer::filled;
use crate::float::Float;
use crate::parallel::{Shared, for_rows, on_pool};
use crate::simd::{Kernel, LANES, Level, Simd};
use crate::tensors::{check_convolves, for_kernels, packed, tracked, with_values};
#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::{CpuStorage, CustomOp1, DType, Device, Layout, Result, Shape, Tensor};
use half::{bf16, f16};
use std::f32::consts::FRAC_1_SQRT_2;

/// Inputs below this are clamped to it: there, activations are zero or nearly so.
const NOWHERE: f32 = -1e4;

/// A pointwise activation function.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Activation {
    /// `x sigmoid(x)` (Elfwing, Uchibe and Doya 2018).
    Silu,
    /// `x/2 (1 + erf(x / sqrt 2))` (Hendrycks and Gimpel 2016), not its approximation by tanh; to 3e-7.
    Gelu,
    /// `x` if it is above zero, else this factor times `x`.
    LeakyRelu(f32),
}

/// Applies an activation to each value of x, of any shape. Differentiable.
///
/// # Errors
/// If [`convolves`](crate::convolves) does not accept x.
pub fn activate(x: &Tensor, activation: Activation) -> Result<Tensor> {
    if x.elem_count() == 0 {
        return Ok(x.clone());
    }
    check_convolves("activation", "x", x)?;
    let x = &for_kernels(x)?;
    if tracked(x) { x.apply_op1(activation) } else { x.apply_op1_no_bwd(&activation) }
}

/// Some values: the forward pass, or the backward pass if there are gradients of the results.
struct Values<'a, T> {
    activation: Activation,
    x: &'a [T],
    /// Gradients of the results, as many as there are values in `x`.
    d: Option<&'a [T]>,
    /// Room for as many results.
    to: Shared<T>,
}

impl<T: Float> Kernel for Values<'_, T> {
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let Values { activation, x, d, to } = self;
        for at in (0..x.len()).step_by(LANES) {
            let lanes = LANES.min(x.len() - at);
            // SAFETY: at least `lanes` values are left from `at` on in x, in d if present, and at the
            // destination.
            unsafe {
                let x: S = T::load_lanes(x.as_ptr().add(at), lanes);
                let result = match d {
                    None => activation.of(x),
                    Some(d) => activation.slope(x).mul(T::load_lanes(d.as_ptr().add(at), lanes)),
                };
                T::store_lanes(result, to.at(at), lanes);
            }
        }
    }
}

impl Activation {
    /// The activation at x.
    /// # Safety
    /// The processor has the instructions of `S`.
    #[inline(always)]
    pub(crate) unsafe fn of<S: Simd>(self, x: S) -> S {
        // SAFETY: guaranteed by the caller.
        unsafe {
            match self {
                Self::Silu => {
                    let x = S::splat(NOWHERE).max(x);
                    x.mul(sigmoid(x))
                }
                Self::Gelu => {
                    let it = Normal::of(x);
                    it.tail.neg_mul_add(it.size, S::zero().max(x))
                }
                Self::LeakyRelu(slope) => S::zero().min(x).mul_add(S::splat(slope), S::zero().max(x)),
            }
        }
    }

    /// The derivative at x.
    /// # Safety
    /// The processor has the instructions of `S`.
    #[inline(always)]
    pub(crate) unsafe fn slope<S: Simd>(self, x: S) -> S {
        // SAFETY: guaranteed by the caller.
        unsafe {
            let one = S::splat(1.);
            match self {
                Self::Silu => {
                    let x = S::splat(NOWHERE).max(x);
                    let s = sigmoid(x);
                    x.mul(one.sub(s)).mul_add(s, s)
                }
                Self::Gelu => {
                    let it = Normal::of(x);
                    let cumulative = x.above_zero().mul_add(it.tail.neg_mul_add(S::splat(2.), one), it.tail);
                    let near = it.size.min(S::zero().sub(it.size).max(x));
                    near.mul_add(it.density, cumulative)
                }
                Self::LeakyRelu(slope) => {
                    let (above, slope) = (x.above_zero(), S::splat(slope));
                    above.neg_mul_add(slope, slope).add(above)
                }
            }
        }
    }
}

/// The standard normal distribution at some x.
struct Normal<S> {
    /// |x|, clamped to 10^4, beyond which the tail is zero.
    size: S,
    /// The probability of values larger than |x|.
    tail: S,
    density: S,
}

impl<S: Simd> Normal<S> {
    /// Uses formula 7.1.26 of Abramowitz and Stegun, "Handbook of Mathematical Functions" (1964), whose error
    /// is below 1.5e-7.
    /// # Safety
    /// The processor has the instructions of `S`.
    #[inline(always)]
    unsafe fn of(x: S) -> Self {
        const P: f32 = 0.327_591_1 * FRAC_1_SQRT_2;
        // Coefficients from the fifth power of t down.
        const TERMS: [f32; 5] = [1.061_405_4, -1.453_152, 1.421_413_7, -0.284_496_74, 0.254_829_6];
        /// 1 / sqrt(2 pi)
        const HIGHEST: f32 = 0.398_942_3;
        // SAFETY: guaranteed by the caller.
        unsafe {
            let size = S::splat(1e4).min(S::zero().sub(x).max(x));
            let power = exp_below(size.mul(size).mul(S::splat(-0.5)));
            let t = size.mul_add(S::splat(P), S::splat(1.)).reciprocal();
            let mut sum = S::zero();
            for term in TERMS {
                sum = sum.mul_add(t, S::splat(0.5 * term));
            }
            Self { size, tail: sum.mul(t).mul(power), density: power.mul(S::splat(HIGHEST)) }
        }
    }
}

impl Activation {
    fn run<T: Float>(self, x: &[T], d: Option<&[T]>) -> Vec<T> {
        let level = Level::current();
        let fill = |to: Shared<T>| {
            for_rows(x.len(), 1, |part| {
                // SAFETY: each part belongs to exactly one task.
                let to = unsafe { to.offset(part.start) };
                level.run(Values {
                    activation: self,
                    x: &x[part.clone()],
                    d: d.map(|d| &d[part.clone()]),
                    to,
                });
            });
        };
        // SAFETY: every part is written.
        unsafe { filled(x.len(), |to| on_pool(|| fill(to))) }
    }

    fn forward<T: Float>(self, x: &CpuStorage, layout: &Layout) -> Result<CpuStorage> {
        Ok(T::to_cpu_storage_owned(self.run::<T>(&packed(x, layout)?, None)))
    }

    fn gradient<T: Float>(self, x: &Tensor, d: &Tensor) -> Result<Tensor> {
        let dx = with_values(x, |values: &[T]| with_values(d, |d| Ok(self.run(values, Some(d)))))?;
        Tensor::from_vec(dx, x.shape(), &Device::Cpu)
    }
}

impl CustomOp1 for Activation {
    fn name(&self) -> &'static str {
        "activation"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let y = match x {
            CpuStorage::BF16(_) => self.forward::<bf16>(x, layout)?,
            CpuStorage::F16(_) => self.forward::<f16>(x, layout)?,
            _ => self.forward::<f32>(x, layout)?,
        };
        Ok((y, layout.shape().clone()))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, x: &CudaStorage, layout: &Layout) -> Result<(CudaStorage, Shape)> {
        Ok((crate::cuda::pointwise::forward(*self, x, layout)?, layout.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, d: &Tensor) -> Result<Option<Tensor>> {
        #[cfg(feature = "cuda")]
        if x.device().is_cuda() {
            return crate::cuda::pointwise::gradient(*self, x, d).map(Some);
        }
        Ok(Some(match x.dtype() {
            DType::BF16 => self.gradient::<bf16>(x, d)?,
            DType::F16 => self.gradient::<f16>(x, d)?,
            _ => self.gradient::<f32>(x, d)?,
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Var;

    /// Result and derivative in f64, by definition; the distribution function from its Taylor series.
    fn expected(activation: Activation, x: f64) -> (f64, f64) {
        match activation {
            Activation::Silu => {
                let s = 1. / (1. + (-x).exp());
                (x * s, s * (1. + x * (1. - s)))
            }
            Activation::Gelu => {
                let density = (-0.5 * x * x).exp() / (2. * std::f64::consts::PI).sqrt();
                let (mut term, mut sum, mut n) = (x, x, 1.);
                while n < 400. {
                    n += 2.;
                    term *= x * x / n;
                    sum += term;
                }
                let cumulative = 0.5 + density * sum;
                (x * cumulative, cumulative + x * density)
            }
            Activation::LeakyRelu(slope) if x <= 0. => (x * f64::from(slope), f64::from(slope)),
            Activation::LeakyRelu(_) => (x, 1.),
        }
    }

    const ALL: [Activation; 3] = [Activation::Silu, Activation::Gelu, Activation::LeakyRelu(0.2)];

    fn run(activation: Activation, x: &[f32], dtype: DType) -> [Vec<f32>; 2] {
        let x = Tensor::new(x, &Device::Cpu).unwrap().to_dtype(dtype).unwrap();
        let x = Var::from_tensor(&x).unwrap();
        let y = activate(&x, activation).unwrap();
        let dx = (&y * 2.).unwrap().sum_all().unwrap().backward().unwrap().remove(&x).unwrap();
        [y, dx].map(|it| it.to_dtype(DType::F32).unwrap().to_vec1().unwrap())
    }

    #[test]
    fn close_to_f64_everywhere_at_every_instruction_set() {
        // A count that is not a multiple of the vector size, and more than one task handles.
        let x: Vec<f32> = (0..40_003).map(|i| (i as f32 - 20_001.) * 6e-4).collect();
        for level in [Level::Portable, Level::Avx2, Level::Avx512] {
            if !Level::force(Some(level)) {
                continue;
            }
            for activation in ALL {
                for (dtype, rounding) in [(DType::F32, 6e-7), (DType::F16, 1e-3), (DType::BF16, 8e-3)] {
                    let rounded = Tensor::new(&x[..], &Device::Cpu).unwrap().to_dtype(dtype).unwrap();
                    let rounded: Vec<f32> = rounded.to_dtype(DType::F32).unwrap().to_vec1().unwrap();
                    let [y, dx] = run(activation, &x, dtype);
                    for ((x, y), dx) in rounded.iter().zip(y).zip(dx) {
                        let (value, slope) = expected(activation, f64::from(*x));
                        let off =
                            |ours: f32, value: f64| (f64::from(ours) - value).abs() / (0.5 + value.abs());
                        assert!(
                            off(y, value) < rounding,
                            "{level:?} {activation:?} {dtype:?} {x}: {y}, {value}"
                        );
                        let slope = 2. * slope;
                        assert!(
                            off(dx, slope) < 2. * rounding,
                            "{level:?} {activation:?} {x}: {dx}, {slope}"
                        );
                    }
                }
            }
        }
        Level::force(None);
    }

    #[test]
    fn what_is_not_a_number_stays_so_and_what_is_infinite_has_its_limit() {
        for activation in ALL {
            for level in [Level::Portable, Level::Avx2, Level::Avx512] {
                if !Level::force(Some(level)) {
                    continue;
                }
                let x = [f32::NAN, f32::INFINITY, f32::MAX, 0., -1e20, f32::MIN, f32::NEG_INFINITY];
                let [y, dx] = run(activation, &x, DType::F32);
                let case = format!("{level:?} {activation:?}: {y:?}, {dx:?}");
                assert!(
                    y[0].is_nan() && (dx[0].is_nan() || matches!(activation, Activation::LeakyRelu(_))),
                    "{case}"
                );
                assert!(y[1] == f32::INFINITY && y[2] == f32::MAX && y[3] == 0. && dx[2] == 2., "{case}");
                // At infinity, the derivative of SiLU is NaN in PyTorch too.
                assert!(activation == Activation::Silu || dx[1] == 2., "{case}");
                for i in 4..x.len() {
                    match activation {
                        Activation::LeakyRelu(slope) => {
                            assert_eq!((y[i], dx[i]), (slope * x[i], 2. * slope), "{case}")
                        }
                        _ => assert!(y[i].abs() < 1e-6 && dx[i].abs() < 1e-6, "{case}"),
                    }
                }
            }
            Level::force(None);
        }
    }

    #[test]
    fn other_tensors_are_refused() {
        let wide = Tensor::zeros(3, DType::F64, &Device::Cpu).unwrap();
        let error = activate(&wide, Activation::Silu).unwrap_err().to_string();
        assert!(error.contains("x must be f32, bf16 or f16 on the CPU"), "{error}");
        let empty = Tensor::zeros((0, 3), DType::F32, &Device::Cpu).unwrap();
        assert_eq!(activate(&empty, Activation::Silu).unwrap().dims(), [0, 3]);
    }
}
