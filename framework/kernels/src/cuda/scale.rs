//! Scaling of channels on a device.

use super::arguments::{Narrow, ProductSums, ScaleColumns};
use super::conv2d::column_sums;
use super::launch::{check_count, launch, type_name};
use super::memory::{ALIGNMENT, address, address_of, aligned, allocate, at, tensor};
use super::sources::COLUMNS;
use candle_core::backend::BackendStorage;
use candle_core::{CudaDevice, CudaStorage, D, DType, Layout, Result, Tensor};

/// Multiplies contiguous values by contiguous factors, (samples, channels).
pub(crate) fn forward(
    (x, lx): (&CudaStorage, &Layout),
    (factors, lf): (&CudaStorage, &Layout),
    channels: usize,
) -> Result<CudaStorage> {
    let (count, samples) = (lx.shape().elem_count(), lf.shape().elem_count() / channels);
    let places = [address_of(x, lx)?, address_of(factors, lf)?];
    scaled(x.device(), x.dtype(), places, [count, samples, channels])
}

/// The gradient of x.
pub(crate) fn gradient_of_x(factors: &Tensor, d: &Tensor, channels: usize) -> Result<Tensor> {
    let (factors, d) = (aligned(factors)?, aligned(&d.to_dtype(factors.dtype())?)?);
    let sizes = [d.elem_count(), factors.elem_count() / channels, channels];
    let dx = scaled(d.device().as_cuda_device()?, d.dtype(), [at(&d)?, at(&factors)?], sizes)?;
    Ok(tensor(dx, d.shape()))
}

/// The gradient of the factors: sums over each sample's rows, in 32 bits.
pub(crate) fn gradient_of_factors(x: &Tensor, factors: &Tensor, d: &Tensor) -> Result<Tensor> {
    /// Rows summed per thread, where all rows share their factors: few, so that there are many threads.
    const STRETCH: usize = 128;
    let (x, d) = (aligned(x)?, aligned(&d.to_dtype(x.dtype())?)?);
    let (device, dtype, columns) = (x.device().as_cuda_device()?, x.dtype(), x.dim(D::Minus1)?);
    let (rows, samples) = (x.elem_count() / columns, factors.elem_count() / columns);
    let stretch = if samples == 1 { STRETCH } else { rows / samples };
    let parts = rows.div_ceil(stretch);
    let sums = allocate(device, parts * columns, DType::F32, false)?;
    let arguments = ProductSums {
        x: at(&x)?,
        d: at(&d)?,
        sums: address(&sums)?,
        rows: rows as u32,
        columns: columns as u32,
        stretch: stretch as u32,
        parts: parts as u32,
    };
    let (name, at_once) = (type_name(dtype)?, at_once(columns));
    let of_factors = allocate(device, samples * columns, dtype, false)?;
    let to = address(&of_factors)?;
    // SAFETY: x and d are (rows, columns), and there is room for the sums and for the gradient.
    unsafe {
        let kernel = format!("product_sums_{name}_{at_once}");
        launch(device, &COLUMNS, &kernel, parts * columns / at_once, arguments)?;
        if samples == 1 {
            column_sums(device, DType::F32, arguments.sums, [parts, columns], dtype, to)?;
        } else {
            let count = samples * columns;
            let narrow = Narrow { from: arguments.sums, to, count: count as u32 };
            launch(device, &COLUMNS, &format!("narrow_{name}"), count, narrow)?;
        }
    }
    Ok(tensor(of_factors, factors.shape()))
}

/// Channels per thread; all tensors here are aligned for four.
fn at_once(channels: usize) -> usize {
    if channels.is_multiple_of(4) { 4 } else { 1 }
}

fn scaled(
    device: &CudaDevice,
    dtype: DType,
    [x, factors]: [u64; 2],
    [count, samples, channels]: [usize; 3],
) -> Result<CudaStorage> {
    check_count("scale_channels", count)?;
    debug_assert!([x, factors].iter().all(|at| at.is_multiple_of(ALIGNMENT)));
    let y = allocate(device, count, dtype, false)?;
    let arguments = ScaleColumns {
        x,
        factors,
        y: address(&y)?,
        count: count as u32,
        sample: (count / samples) as u32,
        columns: channels as u32,
    };
    let at_once = at_once(channels);
    let kernel = format!("scale_columns_{}_{at_once}", type_name(dtype)?);
    // SAFETY: x and y have `count` values, and the factors are (samples, channels).
    unsafe { launch(device, &COLUMNS, &kernel, count / at_once, arguments)? };
    Ok(y)
}
