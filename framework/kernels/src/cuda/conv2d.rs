//! Convolutions and transposed convolutions as ops of the graph.

use super::arguments::{AddBias, ColumnSums, Narrow};
use super::convolution;
use super::launch::{launch, type_name};
use super::memory::{address, address_of, aligned, allocate, tensor, with_address};
use super::sources::COLUMNS;
use crate::direct::Geometry;
use crate::tensors::tracked;
use candle_core::backend::BackendStorage;
use candle_core::{
    CpuStorage, CudaDevice, CudaStorage, CustomOp2, CustomOp3, D, DType, Layout, Result, Shape, Tensor, bail,
};

/// Converts a weight from PyTorch's layout, (outputs, inputs, height, width), to cuDNN's: (outputs, height,
/// width, inputs).
pub(crate) fn channels_last(weight: &Tensor) -> Result<Tensor> {
    aligned(&weight.permute((0, 2, 3, 1))?.contiguous()?)
}

/// [`conv2d`](crate::conv2d) on a device, with a weight [channels last](channels_last).
pub(crate) fn conv2d(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>, g: Geometry) -> Result<Tensor> {
    let result = [g.out_height, g.out_width, g.outputs];
    convolve(x, weight, bias, g, result, false)
}

/// [`conv_transpose2d`](crate::conv_transpose2d) on a device; `g` is the convolution that it reverses, whose
/// input is the result.
pub(crate) fn conv_transpose2d(
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    g: Geometry,
) -> Result<Tensor> {
    let result = [g.height, g.width, g.inputs];
    convolve(x, &channels_last(weight)?, bias, g, result, true)
}

/// `result` is the (height, width, channels) of the result.
fn convolve(
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    g: Geometry,
    result: [usize; 3],
    transposed: bool,
) -> Result<Tensor> {
    let shape = [&x.dims()[..x.rank() - 3], &result[..]].concat();
    let op = Convolution { g, shape: shape.into(), transposed };
    let x = aligned(x)?;
    match bias {
        None if tracked(&x) || tracked(weight) => x.apply_op2(weight, op),
        None => x.apply_op2_no_bwd(weight, &op),
        Some(bias) => {
            let bias = aligned(bias)?;
            match tracked(&x) || tracked(weight) || tracked(&bias) {
                true => x.apply_op3(weight, &bias, op),
                false => x.apply_op3_no_bwd(weight, &bias, &op),
            }
        }
    }
}

/// A convolution, or its transpose, which maps like the gradient of a convolution: from the output's to the
/// input's.
struct Convolution {
    g: Geometry,
    /// The shape of the result.
    shape: Shape,
    transposed: bool,
}

impl Convolution {
    /// Channels of the result.
    fn channels(&self) -> usize {
        if self.transposed { self.g.inputs } else { self.g.outputs }
    }

    fn run(
        &self,
        [(x, lx), (w, lw)]: [(&CudaStorage, &Layout); 2],
        bias: Option<(&CudaStorage, &Layout)>,
    ) -> Result<(CudaStorage, Shape)> {
        let (device, dtype) = (x.device(), x.dtype());
        if w.dtype() != dtype || bias.is_some_and(|(bias, _)| bias.dtype() != dtype) {
            bail!("conv2d: x, weight and bias must be of one type, got {dtype:?} and {:?}", w.dtype());
        }
        let y = allocate(device, self.shape.elem_count(), dtype, false)?;
        let (x, w, to) = (address_of(x, lx)?, address_of(w, lw)?, address(&y)?);
        // SAFETY: the shapes were checked against the geometry, and y was allocated for it.
        unsafe {
            match self.transposed {
                false => convolution::forward(device, &self.g, dtype, [x, w, to])?,
                true => convolution::backward_data(device, &self.g, dtype, [w, x, to])?,
            }
        }
        if let Some((bias, layout)) = bias {
            let (count, columns) = (self.shape.elem_count(), self.channels());
            let arguments = AddBias {
                y: to,
                bias: address_of(bias, layout)?,
                count: count as u32,
                columns: columns as u32,
            };
            // SAFETY: y is (count / columns, columns), and the bias is (columns).
            unsafe {
                launch(device, &COLUMNS, &format!("add_bias_{}", type_name(dtype)?), count, arguments)?
            };
        }
        Ok((y, self.shape.clone()))
    }

    /// The gradients of x and weight.
    fn gradients(&self, x: &Tensor, w: &Tensor, dy: &Tensor) -> Result<[Option<Tensor>; 2]> {
        let (device, dtype, g) = (x.device().as_cuda_device()?, x.dtype(), &self.g);
        let (x, w, dy) = (&aligned(x)?, &aligned(w)?, &aligned(&dy.to_dtype(dtype)?)?);
        let gradient = |of: &Tensor, pass: &dyn Fn(u64) -> Result<()>| {
            let storage = allocate(device, of.elem_count(), dtype, false)?;
            pass(address(&storage)?)?;
            Ok::<_, candle_core::Error>(tensor(storage, of.shape()))
        };
        let of_x = |to: u64| {
            with_address(w, |w| {
                with_address(dy, |dy| {
                    // SAFETY: same as in `run`.
                    unsafe {
                        match self.transposed {
                            false => convolution::backward_data(device, g, dtype, [w, dy, to]),
                            true => convolution::forward(device, g, dtype, [dy, w, to]),
                        }
                    }
                })
            })
        };
        let of_w = |to: u64| {
            with_address(x, |x| {
                with_address(dy, |dy| {
                    let sides = if self.transposed { [dy, x, to] } else { [x, dy, to] };
                    // SAFETY: same as in `run`.
                    unsafe { convolution::backward_filter(device, g, dtype, sides, false) }
                })
            })
        };
        let dx = x.track_op().then(|| gradient(x, &of_x)).transpose()?;
        let dw = w.track_op().then(|| gradient(w, &of_w)).transpose()?;
        Ok([dx, dw])
    }
}

/// The sums over all axes but the last, added in 32 bits, in the tensor's dtype.
pub(crate) fn sums_of_channels(x: &Tensor) -> Result<Tensor> {
    let (x, channels) = (aligned(x)?, x.dim(D::Minus1)?);
    let device = x.device().as_cuda_device()?;
    let sums = allocate(device, channels, x.dtype(), false)?;
    let to = address(&sums)?;
    with_address(&x, |at| {
        // SAFETY: x is (rows, channels), and there is room for the sums.
        unsafe { column_sums(device, x.dtype(), at, [x.elem_count() / channels, channels], x.dtype(), to) }
    })?;
    Ok(tensor(sums, channels))
}

/// Writes the sums of all columns of x (rows, columns), added in 32 bits, as another dtype.
///
/// # Safety
/// The addresses point to memory of this device, with these dtypes and sizes.
pub(crate) unsafe fn column_sums(
    device: &CudaDevice,
    of: DType,
    x: u64,
    [rows, columns]: [usize; 2],
    to_type: DType,
    to: u64,
) -> Result<()> {
    /// Rows summed per thread: few, so that there are many threads.
    const STRETCH: usize = 128;
    let (mut from, mut of, mut rows) = (x, of, rows);
    // Intermediate sums could be freed once their reader is enqueued; for simplicity they are kept to the
    // end.
    let mut held = Vec::new();
    loop {
        let parts = rows.div_ceil(STRETCH).max(1);
        let sums = allocate(device, parts * columns, DType::F32, false)?;
        let arguments = ColumnSums {
            x: from,
            sums: address(&sums)?,
            rows: rows as u32,
            columns: columns as u32,
            stretch: STRETCH as u32,
            parts: parts as u32,
        };
        let four = 4 * of.size_in_bytes() as u64;
        let at_once = if columns.is_multiple_of(4) && from.is_multiple_of(four) { 4 } else { 1 };
        let kernel = format!("column_sums_{}_{at_once}", type_name(of)?);
        // SAFETY: x is (rows, columns), and the sums are (parts, columns).
        unsafe { launch(device, &COLUMNS, &kernel, parts * columns / at_once, arguments)? };
        held.push(sums);
        (from, of, rows) = (arguments.sums, DType::F32, parts);
        if parts == 1 {
            break;
        }
    }
    let arguments = Narrow { from, to, count: columns as u32 };
    // SAFETY: both have `columns` values.
    unsafe {
        launch(device, &COLUMNS, &format!("narrow_{}", type_name(to_type)?), columns, arguments)?;
    }
    Ok(())
}

impl CustomOp2 for Convolution {
    fn name(&self) -> &'static str {
        "conv2d"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        bail!("conv2d: expected tensors on one CUDA device")
    }

    fn cuda_fwd(
        &self,
        x: &CudaStorage,
        lx: &Layout,
        w: &CudaStorage,
        lw: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        self.run([(x, lx), (w, lw)], None)
    }

    fn bwd(
        &self,
        x: &Tensor,
        w: &Tensor,
        _: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let [dx, dw] = self.gradients(x, w, dy)?;
        Ok((dx, dw))
    }
}

impl CustomOp3 for Convolution {
    fn name(&self) -> &'static str {
        "conv2d"
    }

    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        bail!("conv2d: expected tensors on one CUDA device")
    }

    fn cuda_fwd(
        &self,
        x: &CudaStorage,
        lx: &Layout,
        w: &CudaStorage,
        lw: &Layout,
        bias: &CudaStorage,
        lb: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        self.run([(x, lx), (w, lw)], Some((bias, lb)))
    }

    fn bwd(
        &self,
        x: &Tensor,
        w: &Tensor,
        bias: &Tensor,
        _: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let [dx, dw] = self.gradients(x, w, dy)?;
        let db = bias.track_op().then(|| sums_of_channels(&dy.to_dtype(bias.dtype())?)).transpose()?;
        Ok((dx, dw, db))
    }
}
