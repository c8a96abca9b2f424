//! Building blocks of recurrent models: convolutions shared by all steps of a roll-out, gates, memories.
//!
//! Tensors are channels last, (B, H, W, C), or (B, H, W, D, C) for states with a depth D, the layout of the
//! kernels; parameters keep PyTorch's shapes. `prepare` does the work that is needed once per roll-out: call
//! it at the start of each.

use candle_core::{D, DType, Tensor};
use candle_nn::ops::{sigmoid, softmax};
use candle_nn::{Init, VarBuilder};
use candlepower_kernels::{
    self as kernels, Conv2dOptions, ConvTranspose2dOptions, Kept, SharedConv, SharedNorm,
};
pub use candlepower_kernels::{Gate, MemoryUpdate, OutputGate};

use crate::error::{Error, Result};
use crate::nn::{convolves, fast, in_32_bits, widened};

/// A 'same' convolution whose weight is shared by all steps of a roll-out.
#[derive(Debug, Clone)]
pub struct StepConv {
    /// (Cout, Cin, k, k), or a Conv3d's (Cout, Cin, D, k, k).
    weight: Tensor,
    /// (Cout).
    bias: Option<Tensor>,
    stride: usize,
    /// Prepared for one roll-out.
    shared: Option<SharedConv>,
}

impl StepConv {
    /// Creates a parameter `weight` with the initial values of PyTorch's convolutions. Its shape is
    /// (Cout, Cin, k, k), or (Cout, Cin, D, k, k) for a Conv3d over a state's whole depth D.
    pub fn new(shape: &[usize], vb: VarBuilder) -> Result<Self> {
        Self::with_init(shape, uniform(shape), vb)
    }

    /// Like [`Self::new`], with custom initial values.
    pub fn with_init(shape: &[usize], init: Init, vb: VarBuilder) -> Result<Self> {
        Ok(Self { weight: vb.get_with_hints(shape, "weight", init)?, bias: None, stride: 1, shared: None })
    }

    /// Like [`Self::new`], with a parameter `bias`.
    pub fn with_bias(shape: &[usize], vb: VarBuilder) -> Result<Self> {
        let bias = vb.get_with_hints(shape[0], "bias", uniform(shape))?;
        Ok(Self { bias: Some(bias), ..Self::new(shape, vb)? })
    }

    /// Sets the stride, for rows and columns.
    pub fn strided(self, stride: usize) -> Self {
        Self { stride, ..self }
    }

    /// Output channels.
    pub fn outputs(&self) -> usize {
        self.weight.dims()[0]
    }

    /// Number of weights, which is the number of multiply-adds per output pixel.
    pub fn weights(&self) -> usize {
        self.weight.elem_count()
    }

    /// Prepares it for one roll-out.
    pub fn prepare(&self) -> Result<Self> {
        let weight = match self.weight.dims() {
            // Concatenate the channels of all depths, as they lie in a state (.., D, C).
            &[outputs, inputs, depth, rows, columns] => {
                self.weight.transpose(1, 2)?.reshape((outputs, depth * inputs, rows, columns))?
            }
            _ => self.weight.clone(),
        };
        let bias = self.bias.as_ref().map(wide).transpose()?;
        let weight = wide(&weight)?;
        let takes = if weight.device().is_cuda() { convolves(&weight) } else { fast(&weight) };
        let shared =
            (takes && self.stride == 1).then(|| SharedConv::new(&weight, bias.as_ref())).transpose()?;
        Ok(Self { weight, bias, stride: self.stride, shared })
    }

    /// (.., H, W, Cin) to (.., H / stride, W / stride, Cout).
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        if self.weight.rank() == 5 {
            return self.prepare()?.forward(x);
        }
        if let Some(shared) = &self.shared
            && convolves(x)
        {
            // States may have a wider type than the computation.
            return Ok(shared.forward(&x.to_dtype(self.weight.dtype())?)?.to_dtype(x.dtype())?);
        }
        let padding = self.weight.dims()[2] / 2;
        if convolves(x) && convolves(&self.weight) {
            let options = Conv2dOptions { padding, stride: self.stride, ..Default::default() };
            let narrow = x.to_dtype(self.weight.dtype())?;
            let y = kernels::conv2d(&narrow, &self.weight, self.bias.as_ref(), options)?;
            return Ok(y.to_dtype(x.dtype())?);
        }
        let y = planes(x, self.weight.dtype())?.conv2d(&self.weight, padding, self.stride, 1, 1)?;
        pixels(y, self.bias.as_ref(), x)
    }
}

/// A transposed convolution that doubles rows and columns: kernel 3, stride 2.
#[derive(Debug, Clone)]
pub struct DoublingConv {
    /// (Cin, Cout, 3, 3).
    weight: Tensor,
    /// (Cout).
    bias: Tensor,
}

impl DoublingConv {
    const STRIDE: usize = 2;
    const PADDING: usize = 1;
    const OUTPUT_PADDING: usize = 1;

    /// Parameters `weight` (Cin, Cout, 3, 3) and `bias` with the initial values of PyTorch's `nn.ConvTranspose2d`.
    pub fn new(inputs: usize, outputs: usize, vb: VarBuilder) -> Result<Self> {
        let shape = [inputs, outputs, 3, 3];
        let weight = vb.get_with_hints(&shape, "weight", uniform(&shape))?;
        Ok(Self { weight, bias: vb.get_with_hints(outputs, "bias", uniform(&shape))? })
    }

    /// Number of weights, which is the number of multiply-adds per input pixel.
    pub fn weights(&self) -> usize {
        self.weight.elem_count()
    }

    /// Prepares it for one roll-out.
    pub fn prepare(&self) -> Result<Self> {
        Ok(Self { weight: wide(&self.weight)?, bias: wide(&self.bias)? })
    }

    /// (B, H, W, Cin) to (B, 2H, 2W, Cout).
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let Self { weight, bias } = self;
        if convolves(x) && convolves(weight) && !widened(weight) {
            let options = ConvTranspose2dOptions {
                stride: Self::STRIDE,
                padding: Self::PADDING,
                output_padding: Self::OUTPUT_PADDING,
                ..Default::default()
            };
            let y = kernels::conv_transpose2d(&x.to_dtype(weight.dtype())?, weight, Some(bias), options)?;
            return Ok(y.to_dtype(x.dtype())?);
        }
        let (padding, more, stride) = (Self::PADDING, Self::OUTPUT_PADDING, Self::STRIDE);
        let y = planes(x, weight.dtype())?.conv_transpose2d(weight, padding, more, stride, 1)?;
        pixels(y, Some(bias), x)
    }
}

/// Converts (.., H, W, C) to (B, C, H, W) of this type.
fn planes(x: &Tensor, dtype: DType) -> Result<Tensor> {
    Ok(x.flatten_to(x.rank() - 4)?.permute((0, 3, 1, 2))?.to_dtype(dtype)?.contiguous()?)
}

/// The inverse of [`planes`], after adding a bias: with the leading axes and the type of `like`.
fn pixels(y: Tensor, bias: Option<&Tensor>, like: &Tensor) -> Result<Tensor> {
    let y = match bias {
        Some(bias) => y.broadcast_add(&bias.reshape((1, (), 1, 1))?)?,
        None => y,
    };
    let y = y.permute((0, 2, 3, 1))?.contiguous()?;
    let shape = [&like.dims()[..like.rank() - 3], &y.dims()[1..]].concat();
    Ok(y.reshape(shape)?.to_dtype(like.dtype())?)
}

/// Uniform within 1/sqrt(fan-in), like PyTorch's convolutions.
fn uniform(shape: &[usize]) -> Init {
    let bound = 1. / (shape[1..].iter().product::<usize>() as f64).sqrt();
    Init::Uniform { lo: -bound, up: bound }
}

/// A parameter in the type of the computation: 32 bits for half types on the CPU.
fn wide(x: &Tensor) -> Result<Tensor> {
    Ok(if widened(x) { x.to_dtype(DType::F32)? } else { x.clone() })
}

/// Layer normalisation over all axes but the batch, with a weight and a bias for each value.
#[derive(Debug, Clone)]
pub struct StateNorm {
    weight: Tensor,
    bias: Tensor,
    /// Prepared for one roll-out.
    shared: Option<SharedNorm>,
}

impl StateNorm {
    const EPSILON: f64 = 1e-5;

    /// Creates `weight`, initially one, and `bias`, initially zero, of PyTorch's shape (C, H, W) or
    /// (C, D, H, W).
    pub fn new(shape: &[usize], vb: VarBuilder) -> Result<Self> {
        let parameter = |name: &str, value: f64| -> Result<Tensor> {
            let parameter = vb.get_with_hints(shape, name, Init::Const(value))?;
            Ok(if shape.len() == 4 {
                parameter.permute((2, 3, 1, 0))?
            } else {
                parameter.permute((1, 2, 0))?
            })
        };
        Ok(Self { weight: parameter("weight", 1.)?, bias: parameter("bias", 0.)?, shared: None })
    }

    /// Prepares it for one roll-out.
    pub fn prepare(&self) -> Result<Self> {
        // Normalisation runs in 32 or 64 bits.
        let of = |x: &Tensor| match x.dtype() {
            DType::F64 => x.contiguous(),
            _ => x.to_dtype(DType::F32)?.contiguous(),
        };
        let [weight, bias] = [of(&self.weight)?, of(&self.bias)?];
        let shared =
            in_32_bits(&weight).then(|| SharedNorm::new(&weight, &bias, Self::EPSILON)).transpose()?;
        Ok(Self { weight, bias, shared })
    }

    /// (B, H, W, C) or (B, H, W, D, C) to the same shape. Candle's own layer norm has no gradient.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        if matches!(x.dtype(), DType::BF16 | DType::F16) {
            // Sums in half precision lose too much accuracy.
            return Ok(self.forward(&x.to_dtype(DType::F32)?)?.to_dtype(x.dtype())?);
        }
        if let Some(shared) = &self.shared
            && in_32_bits(x)
        {
            return Ok(shared.forward(x)?);
        }
        let flat = x.flatten_from(1)?;
        let centred = flat.broadcast_sub(&flat.mean_keepdim(1)?)?;
        let variance = centred.sqr()?.mean_keepdim(1)?;
        let normal = centred.broadcast_div(&(variance + Self::EPSILON)?.sqrt()?)?.reshape(x.shape())?;
        let [weight, bias] = [&self.weight, &self.bias].map(|parameter| parameter.to_dtype(x.dtype()));
        Ok(normal.broadcast_mul(&weight?)?.broadcast_add(&bias?)?)
    }
}

/// The pre-activations of gates: the results of several convolutions, summed gate by gate.
///
/// Each term is (.., k N), k gates of N channels side by side, with the position of each gate among the
/// `gates` of the result, (.., gates N). A single term need not have all gates; together they must.
pub fn sum_gates(gates: usize, terms: &[(&Tensor, &[usize])]) -> Result<Tensor> {
    if terms.iter().all(|(values, _)| in_32_bits(values)) {
        return Ok(kernels::sum_gates(gates, terms)?);
    }
    let mut sums: Vec<Option<Tensor>> = vec![None; gates];
    for (values, places) in terms {
        let width = values.dim(D::Minus1)? / places.len();
        for (gate, &place) in places.iter().enumerate() {
            let values = values.narrow(D::Minus1, gate * width, width)?;
            sums[place] = Some(match sums[place].take() {
                Some(sum) => (sum + values)?,
                None => values,
            });
        }
    }
    let sums: Option<Vec<Tensor>> = sums.into_iter().collect();
    let sums = sums.ok_or_else(|| Error::msg(format!("{gates} gates, of which not all have a value")))?;
    Ok(Tensor::cat(&sums, D::Minus1)?)
}

/// The memory (.., N) after a step, from the gates' pre-activations (.., gates N) and the previous memory:
/// m' = σ(f + bias) m + σ(i) tanh(g).
pub fn update_memory(gates: &Tensor, memory: &Tensor, update: MemoryUpdate) -> Result<Tensor> {
    if in_32_bits(gates) && in_32_bits(memory) {
        return Ok(kernels::memory_update(gates, memory, update)?);
    }
    let kept = if update.squash { memory.tanh()? } else { memory.clone() };
    let kept = match update.forget {
        Some((place, bias)) => (sigmoid(&(gate(gates, place, memory)? + f64::from(bias))?)? * kept)?,
        None => kept,
    };
    let taken_in =
        (sigmoid(&gate(gates, update.input, memory)?)? * gate(gates, update.candidate, memory)?.tanh()?)?;
    Ok((kept + taken_in)?)
}

/// An output gate times tanh(y), (.., N). The gate is the sum of gate `place` of `gates`, (.., gates N), and
/// `more`, (.., N).
pub fn open_output(
    output: OutputGate,
    gates: &Tensor,
    place: usize,
    more: Option<&Tensor>,
    y: &Tensor,
) -> Result<Tensor> {
    if in_32_bits(gates) && in_32_bits(y) {
        return Ok(kernels::open_output(output, gates, place, more, y)?);
    }
    let o = gate(gates, place, y)?;
    let o = match more {
        Some(more) => (o + more)?,
        None => o,
    };
    let open = match output {
        OutputGate::Sigmoid => sigmoid(&o)?,
        OutputGate::Tanh => o.tanh()?,
        OutputGate::SigmoidOfTanh => sigmoid(&o.tanh()?)?,
    };
    Ok((open * y.tanh()?)?)
}

/// σ(gate) a + (1 - σ(gate)) b, (.., N), for gates of N channels from the same or from different tensors.
pub fn blend(width: usize, gate: Gate, a: Gate, b: Gate) -> Result<Tensor> {
    if [gate, a, b].iter().all(|(values, _)| in_32_bits(values)) {
        return Ok(kernels::blend(width, gate, a, b)?);
    }
    let part = |(values, place): Gate| values.narrow(D::Minus1, place * width, width);
    let (a, b) = (part(a)?, part(b)?);
    Ok((&b + (sigmoid(&part(gate)?)? * (a - &b)?)?)?)
}

/// Attention without the usual scale: softmax(q k') k for queries q (B, Q, N) and tokens k (B, K, N), giving
/// (B, Q, N).
pub fn attend(asked: &Tensor, tokens: &Tensor) -> Result<Tensor> {
    if fast(asked) && fast(tokens) {
        return Ok(kernels::attend(asked, tokens)?);
    }
    Ok(softmax(&asked.matmul(&tokens.t()?)?, 2)?.matmul(tokens)?)
}

/// The states of the last steps, for attention over time.
#[derive(Debug, Clone)]
pub struct Window(Vec<Moment>);

#[derive(Debug, Clone)]
struct Moment {
    state: Tensor,
    /// Prepared for the kernel.
    kept: Option<Kept>,
}

impl Moment {
    fn new(state: &Tensor) -> Result<Self> {
        let kept = fast(state).then(|| Kept::new(state)).transpose()?;
        Ok(Self { state: state.clone(), kept })
    }
}

impl Window {
    /// A window of `steps` steps that all have this state, (B, ..).
    pub fn new(steps: usize, state: &Tensor) -> Result<Self> {
        Ok(Self(vec![Moment::new(state)?; steps]))
    }

    /// Replaces the oldest state with this one.
    pub fn push(&mut self, state: &Tensor) -> Result<()> {
        self.0.rotate_left(1);
        if let Some(last) = self.0.last_mut() {
            *last = Moment::new(state)?;
        }
        Ok(())
    }

    /// The weighted sum of these states. The weights, separate for each sample, are the softmax over the
    /// steps of `scale` times the product of the query `asked`, (B, ..), and the step's key.
    pub fn recall(&self, asked: &Tensor, keys: &Window, scale: f64) -> Result<Tensor> {
        let kept = |window: &Window| -> Option<Vec<Kept>> {
            window.0.iter().map(|moment| moment.kept.clone()).collect()
        };
        if let (Some(keys), Some(values), true) = (kept(keys), kept(self), fast(asked)) {
            return Ok(kernels::recall(asked, &keys, &values, scale)?);
        }
        // (steps, B, all values)
        let stacked = |window: &Window| {
            let states: Vec<&Tensor> = window.0.iter().map(|moment| &moment.state).collect();
            Tensor::stack(&states, 0)?.flatten_from(2)
        };
        let alike = stacked(keys)?.broadcast_mul(&asked.flatten_from(1)?.unsqueeze(0)?)?.sum_keepdim(2)?;
        let weights = softmax(&(alike * scale)?, 0)?;
        Ok(stacked(self)?.broadcast_mul(&weights)?.sum(0)?.reshape(asked.shape())?)
    }
}

/// One gate, with as many channels as `like`.
fn gate(gates: &Tensor, place: usize, like: &Tensor) -> Result<Tensor> {
    let width = like.dim(D::Minus1)?;
    Ok(gates.narrow(D::Minus1, place * width, width)?)
}
