//! Layer functions that modules call: our kernels where they apply, plain candle operations everywhere else.
//!
//! What modules get and give, frames, is (B, T, C, H, W). Between its first layer and its last a network is channels last,
//! (B, H, W, C) or (B, T, H, W, C), the order that the kernels run on: so nothing is turned around, neither forward nor
//! backward. [`channels_last()`] and [`channels_first()`] are the way in and out.

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

/// Whether our kernels are wanted, and take this tensor.
fn fast(x: &Tensor) -> bool {
    KERNELS.get() == Kernels::Fast && kernels::supported(x)
}

/// The same for the parts of recurrent cells, which also run on CUDA devices.
fn in_32_bits(x: &Tensor) -> bool {
    KERNELS.get() == Kernels::Fast && kernels::in_32_bits(x)
}

/// The same for convolutions, ConvLSTM roll-outs and activations, which also take half types, and run on CUDA devices. There
/// normalisation does, too.
fn convolves(x: &Tensor) -> bool {
    KERNELS.get() == Kernels::Fast && kernels::convolves(x)
}

/// Whether what no kernel takes is computed in 32 bits and narrowed afterwards: half types on the CPU.
fn widened(x: &Tensor) -> bool {
    x.device().is_cpu() && matches!(x.dtype(), DType::BF16 | DType::F16)
}

/// A convolution's weight (Cout, Cin, ..) and bias (Cout), with PyTorch's initial values.
#[derive(Debug, Clone)]
pub struct Conv {
    /// (Cout, Cin, kh, kw).
    pub weight: Tensor,
    /// (Cout).
    pub bias: Tensor,
}

impl Conv {
    /// Parameters `weight` of this shape and `bias`, both uniform within 1/sqrt(fan-in) at first (the default of
    /// PyTorch's `nn.Conv2d`). The third of five axes, a Conv3d's depth of 1 over single frames, is kept in the
    /// parameter and left out of `self.weight`.
    pub fn new(shape: &[usize], vb: VarBuilder) -> Result<Self> {
        let bias = Self::uniform(shape);
        Self::with_init(shape, bias, vb)
    }

    /// The same with a bias that starts at one value.
    pub fn with_bias(shape: &[usize], bias: f64, vb: VarBuilder) -> Result<Self> {
        Self::with_init(shape, Init::Const(bias), vb)
    }

    /// A weight that is drawn as `weight` says, and a bias that is zero at first.
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

    /// The same with parameters of this type.
    fn to_dtype(&self, dtype: DType) -> Result<Self> {
        Ok(Self { weight: self.weight.to_dtype(dtype)?, bias: self.bias.to_dtype(dtype)? })
    }

    /// 'Same' convolution of (.., H, W, Cin) to (.., H, W, Cout), stride 1; the kernel's sides are odd.
    pub fn same(&self, x: &Tensor) -> Result<Tensor> {
        self.channels_last(x, self.same_padded())
    }

    fn same_padded(&self) -> Conv2dOptions {
        Conv2dOptions { padding: self.weight.dims()[2] / 2, ..Default::default() }
    }
}

/// What a stack of ConvLSTM layers is fed with.
pub enum Feed<'a> {
    /// (B, T, H, W, C): one frame a step.
    Frames(&'a Tensor),
    /// (B, H, W, C) as the first step's input, and the top layer's last output as each later one's.
    Feedback {
        /// The first step's input.
        first: &'a Tensor,
        /// How many steps.
        steps: usize,
    },
}

impl Feed<'_> {
    /// The tensor in it.
    fn first(&self) -> &Tensor {
        match self {
            Self::Frames(x) | Self::Feedback { first: x, .. } => x,
        }
    }
}

/// Rolls a stack of ConvLSTM layers over time, all states starting at zero; returns the top layer's outputs: (B, T, H, W, N)
/// where all are kept, (B, H, W, N) where only the last is.
///
/// A layer's weight is (4N, C + N, k, k) over its input and its own last output; gates i, f, o, g:
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
    // Here candle's operations run, whose order is channels first: it is changed once for all steps.
    let dtype = if widened(x) { DType::F32 } else { x.dtype() };
    let first = channels_first(&x.to_dtype(dtype)?)?;
    let feed = match feed {
        Feed::Frames(_) => Feed::Frames(&first),
        Feed::Feedback { steps, .. } => Feed::Feedback { first: &first, steps },
    };
    let layers = layers.iter().map(|layer| layer.to_dtype(dtype)).collect::<Result<Vec<_>>>()?;
    channels_last(&conv_lstm_reference(feed, &layers, keep)?.to_dtype(x.dtype())?)
}

/// The same on tensors that are channels first, one candle operation after the other.
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

/// Folds patches of p x p pixels into channels: (.., C, H, W) to (.., p*p*C, H/p, W/p), channel `(y*p + x)*C + c`.
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

/// Undoes [`space_to_depth`].
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

/// The mean of squared differences, in f32 at least.
pub fn mse(prediction: &Tensor, target: &Tensor) -> Result<Tensor> {
    let wide = |x: &Tensor| if x.dtype() == DType::F64 { Ok(x.clone()) } else { x.to_dtype(DType::F32) };
    mean_all(&(wide(prediction)? - wide(target)?)?.sqr()?)
}

/// The mean of all values.
pub fn mean_all(x: &Tensor) -> Result<Tensor> {
    if x.device().is_cpu() { Ok(x.mean_all()?) } else { Ok((sum_from(x, 0)? / x.elem_count() as f64)?) }
}

/// So many values, or somewhat more, are enough work for one block of threads.
const RUN: usize = 2048;

/// The sums over all axes from `first` on.
///
/// On a CUDA device candle makes each sum in one block of threads, while the others have nothing to do. There the last axes go
/// first, so that many blocks take part, and few values are left to the one.
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
