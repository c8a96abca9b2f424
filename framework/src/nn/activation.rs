//! Activations that candle computes on one thread, or without a gradient that agrees with PyTorch's.

use candle_core::cpu::erf::erf_f32;
use candle_core::{CpuStorage, CustomOp1, D, Layout, Shape, Storage, Tensor};
use candlepower_kernels as kernels;
use rayon::prelude::*;

use super::fast;
use crate::error::Result;

/// Values that a thread takes at once.
const GRAIN: usize = 1 << 14;

/// `x/2 (1 + erf(x / sqrt 2))`: PyTorch's GELU, not the tanh approximation (Hendrycks and Gimpel 2016).
pub fn gelu(x: &Tensor) -> Result<Tensor> {
    if !fast(x) {
        return Ok(x.gelu_erf()?);
    }
    let cumulative = |x: f32| 0.5 * (1. + erf_f32(x * std::f32::consts::FRAC_1_SQRT_2));
    let density = |x: f32| 0.398_942_3 * (-0.5 * x * x).exp();
    pointwise(x, move |x| x * cumulative(x), move |x| cumulative(x) + x * density(x))
}

/// `x sigmoid(x)` (Elfwing, Uchibe and Doya 2018).
pub fn silu(x: &Tensor) -> Result<Tensor> {
    if !fast(x) {
        return Ok(x.silu()?);
    }
    let sigmoid = |x: f32| 1. / (1. + (-x).exp());
    let slope = move |x: f32| {
        let s = sigmoid(x);
        s * (1. + x * (1. - s))
    };
    pointwise(x, move |x| x * sigmoid(x), slope)
}

/// `x` where it is above zero, else `slope * x`.
pub fn leaky_relu(x: &Tensor, slope: f64) -> Result<Tensor> {
    if !fast(x) {
        return Ok(candle_nn::ops::leaky_relu(x, slope)?);
    }
    let slope = slope as f32;
    pointwise(x, move |x| if x > 0. { x } else { slope * x }, move |x| if x > 0. { 1. } else { slope })
}

/// `e^x / (the sum of e^x over the last axis)`. Candle's own softmax over the last axis has no gradient.
pub fn softmax(x: &Tensor) -> Result<Tensor> {
    Ok(if fast(x) { kernels::softmax(x)? } else { candle_nn::ops::softmax(x, D::Minus1)? })
}

/// `f` of each value, whose derivative is `slope`.
fn pointwise(
    x: &Tensor,
    f: impl Fn(f32) -> f32 + Send + Sync + 'static,
    slope: impl Fn(f32) -> f32 + Send + Sync + 'static,
) -> Result<Tensor> {
    Ok(x.contiguous()?.apply_op1(Pointwise { f, slope })?)
}

struct Pointwise<F, S> {
    f: F,
    slope: S,
}

impl<F, S> CustomOp1 for Pointwise<F, S>
where
    F: Fn(f32) -> f32 + Send + Sync,
    S: Fn(f32) -> f32 + Send + Sync,
{
    fn name(&self) -> &'static str {
        "pointwise"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        let x = values(x, layout)?;
        let mut y = vec![0f32; x.len()];
        y.par_chunks_mut(GRAIN).zip(x.par_chunks(GRAIN)).for_each(|(y, x)| {
            y.iter_mut().zip(x).for_each(|(y, &x)| *y = (self.f)(x));
        });
        Ok((CpuStorage::F32(y), layout.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, _y: &Tensor, dy: &Tensor) -> candle_core::Result<Option<Tensor>> {
        let dy = dy.contiguous()?;
        let (xs, dys) = (x.storage_and_layout(), dy.storage_and_layout());
        let (Storage::Cpu(x_values), Storage::Cpu(dy_values)) = (&*xs.0, &*dys.0) else {
            candle_core::bail!("pointwise: expected tensors on the CPU");
        };
        let (x_values, dy_values) = (values(x_values, xs.1)?, values(dy_values, dys.1)?);
        let mut dx = vec![0f32; x_values.len()];
        let parts = x_values.par_chunks(GRAIN).zip(dy_values.par_chunks(GRAIN));
        dx.par_chunks_mut(GRAIN).zip(parts).for_each(|(dx, (x, dy))| {
            for (dx, (&x, &dy)) in dx.iter_mut().zip(x.iter().zip(dy)) {
                *dx = dy * (self.slope)(x);
            }
        });
        Ok(Some(Tensor::from_vec(dx, x.shape(), x.device())?))
    }
}

fn values<'a>(storage: &'a CpuStorage, layout: &Layout) -> candle_core::Result<&'a [f32]> {
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(&storage.as_slice::<f32>()?[start..end]),
        None => candle_core::bail!("pointwise: needs a contiguous tensor, got {layout:?}"),
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device, Var};

    use super::*;

    #[test]
    fn values_and_slopes_agree_with_f64() {
        let n = 40_000;
        let x: Vec<f32> = (0..n).map(|i| (i as f32 - 19_999.5) * 5e-4).collect();
        let x = Var::from_vec(x, n, &Device::Cpu).unwrap();
        let wide = Var::from_tensor(&x.to_dtype(DType::F64).unwrap()).unwrap();
        type Activation = fn(&Tensor) -> Result<Tensor>;
        let leaky: Activation = |x| leaky_relu(x, 0.2);
        for (name, f) in [("gelu", gelu as Activation), ("silu", silu), ("leaky_relu", leaky)] {
            let run = |x: &Var| {
                let y = f(x).unwrap();
                let dx =
                    y.sum_all().unwrap().backward().unwrap().get(x).unwrap().to_dtype(DType::F64).unwrap();
                (y.to_dtype(DType::F64).unwrap().to_vec1::<f64>().unwrap(), dx.to_vec1::<f64>().unwrap())
            };
            let ((y, dx), (wide_y, wide_dx)) = (run(&x), run(&wide));
            let error = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0., f64::max);
            assert!(error(&y, &wide_y) < 2e-6, "{name}: {:e}", error(&y, &wide_y));
            // Candle's own slope of GELU has its constant to six digits.
            assert!(error(&dx, &wide_dx) < 3e-6, "{name}: {:e}", error(&dx, &wide_dx));
        }
    }
}
