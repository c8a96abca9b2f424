//! Layer functions for modules: our kernels where they apply, candle operations everywhere else.
//!
//! Modules receive and return frames as (B, T, C, H, W). Inside, networks are channels last, (B, H, W, C) or
//! (B, T, H, W, C), which is the layout of the kernels, so no layer transposes its data, forward or backward.
//! Convert with [`channels_last()`] and [`channels_first()`].

mod activation;
pub mod channels_last;
mod lstm;
mod noise;
mod norm;
pub mod recurrent;

use std::cell::Cell;

pub use self::channels_last::{channels_first, channels_last};
pub use activation::{gelu, leaky_relu, silu, softmax};
use candle_core::{DType, Tensor};
use candle_nn::{Init, VarBuilder};
use candlepower_kernels::{self as kernels, Conv2dOptions, ConvLstmInput, ConvLstmLayer};
pub use candlepower_kernels::{Activation, Keep};

pub use lstm::{Linear, LstmCell, LstmState};
pub use noise::{drop_path, dropout, normal};
pub use norm::LayerNorm;

use crate::error::{Error, Result};
use crate::trainer::Kernels;

thread_local! {
    static KERNELS: Cell<Kernels> = const { Cell::new(Kernels::Fast) };
}

/// Runs `work` with this choice of kernels on the current thread.
pub fn with_kernels<T>(choice: Kernels, work: impl FnOnce() -> T) -> T {
    let before = KERNELS.replace(choice);
    let result = work();
    KERNELS.set(before);
    result
}

/// Whether kernels are enabled and support this tensor.
fn fast(x: &Tensor) -> bool {
    KERNELS.get() == Kernels::Fast && kernels::supported(x)
}

/// Like [`fast`], for the parts of recurrent cells, which also run on CUDA devices.
fn in_32_bits(x: &Tensor) -> bool {
    KERNELS.get() == Kernels::Fast && kernels::in_32_bits(x)
}

/// Like [`fast`], for convolutions, ConvLSTM roll-outs and activations, which also support half types and run
/// on CUDA devices. On CUDA devices this includes normalisation.
fn convolves(x: &Tensor) -> bool {
    KERNELS.get() == Kernels::Fast && kernels::convolves(x)
}

/// Whether operations without a kernel compute in 32 bits and narrow the result: for half types on the CPU.
fn widened(x: &Tensor) -> bool {
    x.device().is_cpu() && matches!(x.dtype(), DType::BF16 | DType::F16)
}

/// A convolution's weight (Cout, Cin, ..) and bias (Cout), initialised like PyTorch's.
#[derive(Debug, Clone)]
pub struct Conv {
    /// (Cout, Cin, kh, kw).
    pub weight: Tensor,
    /// (Cout).
    pub bias: Tensor,
}

impl Conv {
    /// Creates parameters `weight` of this shape and `bias`, initially uniform within 1/sqrt(fan-in) (the
    /// default of PyTorch's `nn.Conv2d`). If the shape has five axes, the third is the depth 1 of a Conv3d
    /// over single frames: the parameter keeps it, `self.weight` does not.
    pub fn new(shape: &[usize], vb: VarBuilder) -> Result<Self> {
        let bias = Self::uniform(shape);
        Self::with_init(shape, bias, vb)
    }

    /// Like [`new`](Self::new), with a constant initial bias.
    pub fn with_bias(shape: &[usize], bias: f64, vb: VarBuilder) -> Result<Self> {
        Self::with_init(shape, Init::Const(bias), vb)
    }

    /// Creates a weight initialised by `weight` and a bias of zero.
    pub fn drawn(shape: &[usize; 4], weight: Init, vb: VarBuilder) -> Result<Self> {
        let weight = vb.get_with_hints(shape, "weight", weight)?;
        Ok(Self { weight, bias: vb.get_with_hints(shape[0], "bias", Init::Const(0.))? })
    }

    fn uniform(shape: &[usize]) -> Init {
        let bound = 1. / (shape[1..].iter().product::<usize>() as f64).sqrt();
        Init::Uniform { lo: -bound, up: bound }
    }

    fn with_init(shape: &[usize], bias: Init, vb: VarBuilder) -> Result<Self> {
        let weight = vb.get_with_hints(shape, "weight", Self::uniform(shape))?;
        let weight = if shape.len() == 5 { weight.squeeze(2)? } else { weight };
        Ok(Self { weight, bias: vb.get_with_hints(shape[0], "bias", bias)? })
    }

    /// The convolution with parameters converted to this type.
    fn to_dtype(&self, dtype: DType) -> Result<Self> {
        Ok(Self { weight: self.weight.to_dtype(dtype)?, bias: self.bias.to_dtype(dtype)? })
    }

    /// 'Same' convolution of (.., H, W, Cin) to (.., H, W, Cout) with stride 1. The kernel's sides must be
    /// odd.
    pub fn same(&self, x: &Tensor) -> Result<Tensor> {
        self.channels_last(x, self.same_padded())
    }

    fn same_padded(&self) -> Conv2dOptions {
        Conv2dOptions { padding: self.weight.dims()[2] / 2, ..Default::default() }
    }
}

/// The input of a stack of ConvLSTM layers.
pub enum Feed<'a> {
    /// (B, T, H, W, C): one frame per step.
    Frames(&'a Tensor),
    /// (B, H, W, C) as the input of the first step; each later step gets the top layer's previous output.
    Feedback {
        /// The first step's input.
        first: &'a Tensor,
        /// Number of steps.
        steps: usize,
    },
}

impl Feed<'_> {
    /// The contained tensor.
    fn first(&self) -> &Tensor {
        match self {
            Self::Frames(x) | Self::Feedback { first: x, .. } => x,
        }
    }
}

/// Rolls a stack of ConvLSTM layers over time, with all states starting at zero. Returns the top layer's
/// outputs: (B, T, H, W, N) if all are kept, (B, H, W, N) if only the last is.
///
/// A layer's weight is (4N, C + N, k, k), over its input and its own previous output; gates i, f, o, g:
/// `c' = σ(f) c + σ(i) tanh(g)`, `h' = σ(o) tanh(c')` (Shi et al. 2015, equation 3, without peepholes).
pub fn conv_lstm(feed: Feed, layers: &[Conv], keep: Keep) -> Result<Tensor> {
    let x = feed.first();
    if convolves(x) {
        let input = match feed {
            Feed::Frames(frames) => ConvLstmInput::Frames(frames),
            Feed::Feedback { first, steps } => ConvLstmInput::Feedback { first, steps },
        };
        let layers: Vec<ConvLstmLayer> =
            layers.iter().map(|conv| ConvLstmLayer { weight: &conv.weight, bias: &conv.bias }).collect();
        return Ok(kernels::conv_lstm(input, &layers, keep)?);
    }
    // Candle's operations are channels first: convert once for all steps.
    let dtype = if widened(x) { DType::F32 } else { x.dtype() };
    let first = channels_first(&x.to_dtype(dtype)?)?;
    let feed = match feed {
        Feed::Frames(_) => Feed::Frames(&first),
        Feed::Feedback { steps, .. } => Feed::Feedback { first: &first, steps },
    };
    let layers = layers.iter().map(|layer| layer.to_dtype(dtype)).collect::<Result<Vec<_>>>()?;
    channels_last(&conv_lstm_reference(feed, &layers, keep)?.to_dtype(x.dtype())?)
}

/// Like [`conv_lstm`], for channels-first tensors and with candle operations only.
fn conv_lstm_reference(feed: Feed, layers: &[Conv], keep: Keep) -> Result<Tensor> {
    let (steps, mut input) = match feed {
        Feed::Frames(frames) => (frames.dim(1)?, frames.narrow(1, 0, 1)?.squeeze(1)?),
        Feed::Feedback { first, steps } => (steps, first.clone()),
    };
    let mut states: Vec<Option<(Tensor, Tensor)>> = vec![None; layers.len()];
    let mut outputs = Vec::with_capacity(steps);
    for t in 0..steps {
        if let Feed::Frames(frames) = feed {
            input = frames.narrow(1, t, 1)?.squeeze(1)?;
        }
        for (layer, state) in layers.iter().zip(&mut states) {
            let (h, c) = conv_lstm_cell(layer, &input, state.take())?;
            input = h.clone();
            *state = Some((h, c));
        }
        outputs.push(input.clone());
    }
    Ok(if keep == Keep::Last { input } else { Tensor::stack(&outputs, 1)? })
}

/// One step of one layer: the new output and cell, each (B, N, H, W).
fn conv_lstm_cell(conv: &Conv, x: &Tensor, state: Option<(Tensor, Tensor)>) -> Result<(Tensor, Tensor)> {
    let width = conv.bias.dims()[0] / 4;
    let (h, c) = match state {
        Some(state) => state,
        None => {
            let (batch, _, height, columns) = x.dims4()?;
            let zeros = Tensor::zeros((batch, width, height, columns), x.dtype(), x.device())?;
            (zeros.clone(), zeros)
        }
    };
    let gates = conv.channels_first(&Tensor::cat(&[x, &h], 1)?, conv.same_padded())?;
    let gate = |i: usize| gates.narrow(1, i * width, width);
    let sigmoid = candle_nn::ops::sigmoid;
    let (i, f, o, g) = (sigmoid(&gate(0)?)?, sigmoid(&gate(1)?)?, sigmoid(&gate(2)?)?, gate(3)?.tanh()?);
    let c = ((f * c)? + (i * g)?)?;
    Ok(((o * c.tanh()?)?, c))
}

/// Folds patches of p x p pixels into channels: (.., C, H, W) to (.., p*p*C, H/p, W/p), channel
/// `(y*p + x)*C + c`.
pub fn space_to_depth(x: &Tensor, patch: usize) -> Result<Tensor> {
    if patch == 1 {
        return Ok(x.clone());
    }
    let (leading, [channels, height, width]) = split_dims(x)?;
    if !height.is_multiple_of(patch) || !width.is_multiple_of(patch) {
        return Err(Error::msg(format!("patches of {patch} pixels do not tile frames of {height}x{width}")));
    }
    let (rows, columns) = (height / patch, width / patch);
    let folded = x.reshape((leading.iter().product::<usize>(), channels, rows, patch, columns, patch))?;
    let folded = folded.permute([0, 3, 5, 1, 2, 4])?;
    Ok(folded.reshape([&leading[..], &[patch * patch * channels, rows, columns]].concat())?)
}

/// The inverse of [`space_to_depth`].
pub fn depth_to_space(x: &Tensor, patch: usize) -> Result<Tensor> {
    if patch == 1 {
        return Ok(x.clone());
    }
    let (leading, [depth, rows, columns]) = split_dims(x)?;
    if !depth.is_multiple_of(patch * patch) {
        return Err(Error::msg(format!("{depth} channels do not hold patches of {patch} pixels")));
    }
    let channels = depth / (patch * patch);
    let unfolded = x.reshape((leading.iter().product::<usize>(), patch, patch, channels, rows, columns))?;
    let unfolded = unfolded.permute([0, 3, 4, 1, 5, 2])?;
    Ok(unfolded.reshape([&leading[..], &[channels, rows * patch, columns * patch]].concat())?)
}

/// The leading axes of a tensor, and its last three.
fn split_dims(x: &Tensor) -> Result<(Vec<usize>, [usize; 3])> {
    match x.dims() {
        [leading @ .., c, h, w] => Ok((leading.to_vec(), [*c, *h, *w])),
        dims => Err(Error::msg(format!("expected a tensor (.., C, H, W), found shape {dims:?}"))),
    }
}

/// The mean of squared differences, computed in f32 or f64.
pub fn mse(prediction: &Tensor, target: &Tensor) -> Result<Tensor> {
    let wide = |x: &Tensor| if x.dtype() == DType::F64 { Ok(x.clone()) } else { x.to_dtype(DType::F32) };
    mean_all(&(wide(prediction)? - wide(target)?)?.sqr()?)
}

/// The mean of all values.
pub fn mean_all(x: &Tensor) -> Result<Tensor> {
    if x.device().is_cpu() { Ok(x.mean_all()?) } else { Ok((sum_from(x, 0)? / x.elem_count() as f64)?) }
}

/// Enough values to occupy one block of threads.
const RUN: usize = 2048;

/// The sums over all axes from `first` on.
///
/// On a CUDA device, candle computes each sum in one block of threads while the others are idle. There, sum
/// the last axes first, so many blocks take part and few values are left for the final sum.
pub(crate) fn sum_from(x: &Tensor, first: usize) -> Result<Tensor> {
    if x.device().is_cpu() {
        return Ok(x.flatten_from(first)?.sum(first)?);
    }
    let (mut split, mut run) = (x.rank(), 1);
    while split > first && run < RUN {
        split -= 1;
        run *= x.dims()[split];
    }
    let axes = |from: usize| (from..x.rank()).collect::<Vec<_>>();
    let parts = if split > first { x.sum_keepdim(axes(split))? } else { x.clone() };
    Ok(parts.sum(axes(first))?)
}
