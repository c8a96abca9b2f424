//! Activations of tensors of any shape and float type. Candle's versions run on one thread, use several
//! kernels, or have gradients that differ from PyTorch's.

use candle_core::{D, Tensor};
use candlepower_kernels::{self as kernels, Activation, activate};

use super::{convolves, fast};
use crate::error::Result;

/// `x/2 (1 + erf(x / sqrt 2))`: PyTorch's GELU, not the tanh approximation (Hendrycks and Gimpel 2016).
pub fn gelu(x: &Tensor) -> Result<Tensor> {
    Ok(if convolves(x) { activate(x, Activation::Gelu)? } else { x.gelu_erf()? })
}

/// `x sigmoid(x)` (Elfwing, Uchibe and Doya 2018).
pub fn silu(x: &Tensor) -> Result<Tensor> {
    Ok(if convolves(x) { activate(x, Activation::Silu)? } else { x.silu()? })
}

/// `x` if it is positive, otherwise `slope * x`.
pub fn leaky_relu(x: &Tensor, slope: f64) -> Result<Tensor> {
    if convolves(x) {
        return Ok(activate(x, Activation::LeakyRelu(slope as f32))?);
    }
    Ok(candle_nn::ops::leaky_relu(x, slope)?)
}

/// e^x divided by its sum along the last axis, (.., N) to (.., N).
pub fn softmax(x: &Tensor) -> Result<Tensor> {
    Ok(if fast(x) { kernels::softmax(x)? } else { candle_nn::ops::softmax(x, D::Minus1)? })
}

/// Applies the activation, if any.
pub(super) fn activated(x: &Tensor, activation: Option<Activation>) -> Result<Tensor> {
    match activation {
        None => Ok(x.clone()),
        Some(Activation::Gelu) => gelu(x),
        Some(Activation::Silu) => silu(x),
        Some(Activation::LeakyRelu(slope)) => leaky_relu(x, slope.into()),
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device, Var};

    use super::*;

    #[test]
    fn a_softmax_and_its_gradient_agree_with_f64() {
        let x = Var::randn(0f32, 3., (5, 7, 33), &Device::Cpu).unwrap();
        let wanted = Var::randn(0f32, 1., (5, 7, 33), &Device::Cpu).unwrap();
        let run = |dtype| {
            let x = Var::from_tensor(&x.to_dtype(dtype).unwrap()).unwrap();
            let y = softmax(&x).unwrap();
            let loss = (&y * wanted.to_dtype(dtype).unwrap()).unwrap().sum_all().unwrap();
            let dx = loss.backward().unwrap().get(&x).unwrap().clone();
            [y, dx].map(|x| x.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1::<f64>().unwrap())
        };
        for (ours, wide) in run(DType::F32).iter().zip(run(DType::F64)) {
            let off = ours.iter().zip(&wide).map(|(a, b)| (a - b).abs()).fold(0., f64::max);
            assert!(off < 1e-6, "{off:e}");
        }
    }

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
            // Candle's GELU gradient uses a constant with only six digits.
            assert!(error(&dx, &wide_dx) < 3e-6, "{name}: {:e}", error(&dx, &wide_dx));
        }
    }
}
