//! Roll-outs of ConvLSTM layers, and the pointwise half of a cell, as ops of the graph.

use super::arguments::{CopyColumns, GatesBackward, GatesForward};
use super::conv2d::column_sums;
use super::convolution;
use super::launch::{THREADS, launch, type_name};
use super::memory::{address, address_of, aligned, allocate, tensor, with_address};
use super::packing::pack;
use super::roll_out::{Kept, Layer, Operations, RollOut};
use super::sources::{COLUMNS, GATES};
use crate::conv_lstm::{ConvLstmInput, ConvLstmLayer, Keep, take_kept};
use crate::direct::Geometry;
use crate::tensors::tracked;
use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::cudarc::driver::DeviceRepr;
use candle_core::{
    CpuStorage, CudaDevice, CudaStorage, CustomOp2, DType, Layout, Result, Shape, Tensor, bail,
};
use std::sync::{Mutex, PoisonError};

/// [`conv_lstm`](crate::conv_lstm) on a device, for shapes that have been checked.
pub(crate) fn conv_lstm(input: ConvLstmInput, layers: &[ConvLstmLayer], keep: Keep) -> Result<Tensor> {
    let (x, feedback) = match input {
        ConvLstmInput::Frames(x) => (x, false),
        ConvLstmInput::Feedback { first, .. } => (first, true),
    };
    let (batch, steps, height, width) = match (input, x.dims()) {
        (ConvLstmInput::Frames(_), &[b, t, h, w, _]) => (b, t, h, w),
        (ConvLstmInput::Feedback { steps, .. }, &[b, h, w, _]) => (b, steps, h, w),
        (_, dims) => bail!("conv_lstm: unexpected shape {dims:?}"),
    };
    let mut sizes = Vec::with_capacity(layers.len());
    for ConvLstmLayer { weight, bias } in layers {
        if weight.dtype() != x.dtype() || bias.dtype() != x.dtype() {
            bail!(
                "conv_lstm: input and parameters must be of one type, got {:?} and {:?}",
                x.dtype(),
                weight.dtype()
            );
        }
        let (outputs, channels, kernel, _) = weight.dims4()?;
        sizes.push(Layer { inputs: channels - outputs / 4, hidden: outputs / 4, kernel });
    }
    let keep_all = keep == Keep::All;
    let roll_out = RollOut { batch, height, width, steps, feedback, keep_all, layers: sizes };
    let (x, parameters) = (aligned(x)?, aligned(&pack(layers)?)?);
    let gradients = tracked(&x) || tracked(&parameters);
    let op = Op { roll_out, gradients, kept: Mutex::new(None) };
    if gradients { x.apply_op2(&parameters, op) } else { x.apply_op2_no_bwd(&parameters, &op) }
}

/// The op: maps input and packed parameters to the top layer's outputs.
struct Op {
    roll_out: RollOut,
    gradients: bool,
    kept: Mutex<Option<Kept<Memory>>>,
}

impl CustomOp2 for Op {
    fn name(&self) -> &'static str {
        "conv_lstm"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        bail!("conv_lstm: expected tensors on one CUDA device")
    }

    fn cuda_fwd(
        &self,
        x: &CudaStorage,
        lx: &Layout,
        parameters: &CudaStorage,
        lp: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let RollOut { batch, height, width, steps, keep_all, layers, .. } = &self.roll_out;
        let cuda = Cuda { device: x.device(), dtype: x.dtype() };
        let mut shape = vec![*batch, *height, *width, layers[layers.len() - 1].hidden];
        if *keep_all {
            shape.insert(1, *steps);
        }
        let shape = Shape::from(shape);
        let sizes = [lx.shape().elem_count(), lp.shape().elem_count(), shape.elem_count()];
        if sizes != self.roll_out.sizes() {
            bail!("conv_lstm: expected {:?} values, got {sizes:?}", self.roll_out.sizes());
        }
        let y = allocate(cuda.device, shape.elem_count(), cuda.dtype, false)?;
        // SAFETY: the sizes were checked above, and y was allocated for them.
        let kept = unsafe {
            self.roll_out.forward(
                &cuda,
                self.gradients,
                address_of(x, lx)?,
                address_of(parameters, lp)?,
                address(&y)?,
            )?
        };
        *self.kept.lock().unwrap_or_else(PoisonError::into_inner) = kept;
        Ok((y, shape))
    }

    fn bwd(
        &self,
        x: &Tensor,
        parameters: &Tensor,
        _: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let kept = take_kept(&self.kept)?;
        let cuda = Cuda { device: x.device().as_cuda_device()?, dtype: x.dtype() };
        let gradient = |of: &Tensor, zeroed: bool| {
            of.track_op().then(|| allocate(cuda.device, of.elem_count(), cuda.dtype, zeroed)).transpose()
        };
        let (dx, dp) = (gradient(x, false)?, gradient(parameters, self.roll_out.steps == 1)?);
        let to = |gradient: &Option<CudaStorage>| gradient.as_ref().map_or(Ok(0), address);
        let (to_x, to_p) = (to(&dx)?, to(&dp)?);
        with_address(parameters, |parameters| {
            with_address(&aligned(&dy.to_dtype(cuda.dtype)?)?, |dy| {
                // SAFETY: same as in `cuda_fwd`; each gradient is as large as its tensor.
                unsafe { self.roll_out.backward(&cuda, kept, parameters, dy, to_x, to_p) }
            })
        })?;
        let tensor = |gradient: Option<CudaStorage>, of: &Tensor| gradient.map(|it| tensor(it, of.shape()));
        Ok((tensor(dx, x), tensor(dp, parameters)))
    }
}

/// Memory of a device, and its start address.
struct Memory {
    _storage: CudaStorage,
    at: u64,
}

impl Memory {
    fn new(storage: CudaStorage) -> Result<Memory> {
        Ok(Memory { at: address(&storage)?, _storage: storage })
    }
}

/// A device, and the dtype in which it computes.
struct Cuda<'a> {
    device: &'a CudaDevice,
    dtype: DType,
}

impl Cuda<'_> {
    /// Runs a kernel on the channels of `pixels`, four at a time if all addresses allow it.
    ///
    /// # Safety
    /// Same as for [`launch`].
    unsafe fn run<A: DeviceRepr>(
        &self,
        name: &str,
        [pixels, hidden]: [u32; 2],
        places: &[u64],
        arguments: A,
    ) -> Result<()> {
        let four = 4 * self.dtype.size_in_bytes() as u64;
        let at_once =
            if hidden.is_multiple_of(4) && places.iter().all(|at| at.is_multiple_of(four)) { 4 } else { 1 };
        let name = format!("{name}_{}_{at_once}", type_name(self.dtype)?);
        let count = pixels as usize * hidden as usize / at_once;
        // SAFETY: guaranteed by the caller.
        unsafe { launch(self.device, &GATES, &name, count, arguments) }
    }
}

impl Operations for Cuda<'_> {
    type Memory = Memory;

    fn storage(&self, len: usize, zeroed: bool) -> Result<Memory> {
        Memory::new(allocate(self.device, len, self.dtype, zeroed)?)
    }
    fn floats(&self, len: usize, zeroed: bool) -> Result<Memory> {
        Memory::new(allocate(self.device, len, DType::F32, zeroed)?)
    }
    fn address(&self, memory: &Memory) -> u64 {
        memory.at
    }
    fn item(&self) -> u64 {
        self.dtype.size_in_bytes() as u64
    }
    fn most_values(&self) -> usize {
        // Kernels count values with 31 bits.
        1 << 30
    }
    fn threads(&self) -> usize {
        // Three blocks, as many as the gates' kernels request at once, for each multiprocessor of an H200.
        // The same number is used on every device, because the number of parts affects the bits of the sums.
        3 * 132 * THREADS
    }

    unsafe fn convolve(&self, geometry: &Geometry, x: u64, w: u64, y: u64) -> Result<()> {
        // SAFETY: guaranteed by the caller.
        unsafe { convolution::forward(self.device, geometry, self.dtype, [x, w, y]) }
    }
    unsafe fn backward_data(&self, geometry: &Geometry, w: u64, dy: u64, dx: u64) -> Result<()> {
        // SAFETY: guaranteed by the caller.
        unsafe { convolution::backward_data(self.device, geometry, self.dtype, [w, dy, dx]) }
    }
    unsafe fn backward_filter(&self, geometry: &Geometry, x: u64, dy: u64, dw: u64, add: bool) -> Result<()> {
        // SAFETY: guaranteed by the caller.
        unsafe { convolution::backward_filter(self.device, geometry, self.dtype, [x, dy, dw], add) }
    }
    unsafe fn gates_forward(&self, a: GatesForward) -> Result<()> {
        let places = [a.gates, a.bias, a.h[0].at, a.h[1].at, a.h[2].at];
        // SAFETY: guaranteed by the caller.
        unsafe { self.run("gates_forward", [a.rows, a.hidden], &places, a) }
    }
    unsafe fn gates_backward(&self, a: GatesBackward) -> Result<()> {
        let places = [a.gates, a.bias, a.dh[0].at, a.dh[1].at, a.dh[2].at];
        // SAFETY: guaranteed by the caller.
        unsafe { self.run("gates_backward", [a.parts, a.hidden], &places, a) }
    }
    unsafe fn copy_columns(&self, a: CopyColumns) -> Result<()> {
        let name = format!("copy_columns_{}", type_name(self.dtype)?);
        // SAFETY: guaranteed by the caller.
        unsafe { launch(self.device, &COLUMNS, &name, a.rows as usize * a.columns as usize, a) }
    }
    unsafe fn column_sums(&self, x: u64, rows: usize, columns: usize, to: u64) -> Result<()> {
        // SAFETY: guaranteed by the caller.
        unsafe { column_sums(self.device, DType::F32, x, [rows, columns], self.dtype, to) }
    }
}
