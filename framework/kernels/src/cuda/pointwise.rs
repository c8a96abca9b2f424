//! Activations on a device.

use super::arguments::Pointwise;
use super::launch::{check_count, launch, type_name};
use super::memory::{address, address_of, aligned, allocate, tensor, with_address};
use super::sources::POINTWISE;
use crate::pointwise::Activation;
use candle_core::backend::BackendStorage;
use candle_core::{CudaDevice, CudaStorage, DType, Layout, Result, Tensor};

/// Applies an activation to contiguous values that are [aligned](super::memory::aligned).
pub(crate) fn forward(activation: Activation, x: &CudaStorage, layout: &Layout) -> Result<CudaStorage> {
    run(activation, x.device(), x.dtype(), layout.shape().elem_count(), address_of(x, layout)?, 0)
}

/// The gradient of x, given the gradient of its activation.
pub(crate) fn gradient(activation: Activation, x: &Tensor, d: &Tensor) -> Result<Tensor> {
    let (device, dtype) = (x.device().as_cuda_device()?, x.dtype());
    let (x, d) = (aligned(x)?, aligned(&d.to_dtype(dtype)?)?);
    let dx =
        with_address(&x, |at| with_address(&d, |d| run(activation, device, dtype, x.elem_count(), at, d)))?;
    Ok(tensor(dx, x.shape()))
}

/// The forward pass, or the backward pass if `d`, the results' gradients, is not 0; all addresses are
/// aligned.
fn run(
    activation: Activation,
    device: &CudaDevice,
    dtype: DType,
    count: usize,
    x: u64,
    d: u64,
) -> Result<CudaStorage> {
    check_count("activation", count)?;
    let to = allocate(device, count, dtype, false)?;
    let (name, slope) = match activation {
        Activation::Silu => ("silu", 0.),
        Activation::Gelu => ("gelu", 0.),
        Activation::LeakyRelu(slope) => ("leaky_relu", slope),
    };
    let arguments = Pointwise { x, d, to: address(&to)?, slope, count: count as u32 };
    let at_once = if count.is_multiple_of(4) { 4 } else { 1 };
    let kernel = format!("{name}_{}_{at_once}", type_name(dtype)?);
    // SAFETY: `count` values of this type are at each address.
    unsafe { launch(device, &POINTWISE, &kernel, count / at_once, arguments)? };
    Ok(to)
}
