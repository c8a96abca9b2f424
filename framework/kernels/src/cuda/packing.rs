//! The parameters of ConvLSTM layers as one tensor, in the order of a [roll-out](super::roll_out::RollOut).

use super::arguments::PackWeight;
use super::launch::{launch, type_name};
use super::memory::{address, address_of, aligned, allocate, tensor, with_address};
use super::roll_out::Layer;
use super::sources::COLUMNS;
use crate::conv_lstm::ConvLstmLayer;
use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CudaStorage, CustomOp1, Layout, Result, Shape, Tensor, bail};

/// Packs the weights of all layers, one after the other, in the layout of their convolutions, then all
/// biases. Differentiable.
pub(crate) fn pack(layers: &[ConvLstmLayer]) -> Result<Tensor> {
    let mut parts = Vec::with_capacity(2 * layers.len());
    for ConvLstmLayer { weight, .. } in layers {
        let (outputs, all, kernel, _) = weight.dims4()?;
        let layer = Layer { inputs: all - outputs / 4, hidden: outputs / 4, kernel };
        parts.push(aligned(weight)?.apply_op1(Packing(layer))?);
    }
    parts.extend(layers.iter().map(|layer| layer.bias.clone()));
    Tensor::cat(&parts, 0)
}

/// Packs a weight (outputs, all, height, width), with input channels x then h, into (outputs, height, width,
/// channels), with h, x, zeros, followed by (outputs, height, width, first channels), with x, zeros.
struct Packing(Layer);

impl Packing {
    fn arguments(&self, weight: u64, packed: u64) -> PackWeight {
        let Layer { inputs, hidden, kernel } = self.0;
        PackWeight {
            weight,
            packed,
            outputs: (4 * hidden) as u32,
            all: (inputs + hidden) as u32,
            hidden: hidden as u32,
            kernel: (kernel * kernel) as u32,
            channels: self.0.channels() as u32,
            first_channels: self.0.first_channels() as u32,
        }
    }
}

impl CustomOp1 for Packing {
    fn name(&self) -> &'static str {
        "conv_lstm's weight"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        bail!("conv_lstm: expected tensors on one CUDA device")
    }

    fn cuda_fwd(&self, weight: &CudaStorage, layout: &Layout) -> Result<(CudaStorage, Shape)> {
        let (device, dtype, len) = (weight.device(), weight.dtype(), self.0.weights_len());
        let to = allocate(device, len, dtype, false)?;
        let arguments = self.arguments(address_of(weight, layout)?, address(&to)?);
        // SAFETY: the weight has these sizes, and there is room for all packed values.
        unsafe { launch(device, &COLUMNS, &format!("pack_weight_{}", type_name(dtype)?), len, arguments)? };
        Ok((to, Shape::from(len)))
    }

    fn bwd(&self, weight: &Tensor, _: &Tensor, gradient: &Tensor) -> Result<Option<Tensor>> {
        let (device, dtype) = (weight.device().as_cuda_device()?, weight.dtype());
        let gradient = aligned(&gradient.to_dtype(dtype)?)?;
        let to = allocate(device, weight.elem_count(), dtype, false)?;
        with_address(&gradient, |from| {
            let arguments = self.arguments(address(&to)?, from);
            let kernel = format!("unpack_weight_{}", type_name(dtype)?);
            // SAFETY: same as in `cuda_fwd`.
            unsafe { launch(device, &COLUMNS, &kernel, weight.elem_count(), arguments) }
        })?;
        Ok(Some(tensor(to, weight.shape())))
    }
}
