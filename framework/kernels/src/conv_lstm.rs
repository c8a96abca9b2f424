//! ConvLSTM as a candle op: a roll-out of a stack of layers over time.

mod backward;
mod forward;
mod memory;

use crate::buffer::Buffer;
use crate::cell::{GROUP, packed_order};
use crate::direct::Geometry;
use crate::float::{Float, convert};
use crate::parallel::on_pool;
use crate::simd::{LANES, Level};
use crate::tensors::{check_convolves, check_like, packed, tracked, with_values};
use crate::winograd::{Images, OUT, Tiling};
use backward::backward;
use candle_core::{CpuStorage, CustomOp2, DType, Device, Error, Layout, Result, Shape, Tensor, bail};
use forward::forward;
use half::{bf16, f16};
use memory::{Hidden, Kept};
use std::sync::{Mutex, PoisonError};

/// The weights of a ConvLSTM layer with N hidden channels.
#[derive(Clone, Copy, Debug)]
pub struct ConvLstmLayer<'a> {
    /// (4 N, Cin + N, k, k), k odd: gates in the order i, f, o, g; input channels first, then hidden.
    pub weight: &'a Tensor,
    /// (4 N)
    pub bias: &'a Tensor,
}

/// The input of a roll-out's first layer.
#[derive(Clone, Copy, Debug)]
pub enum ConvLstmInput<'a> {
    /// One frame per step, (B, T, H, W, Cin).
    Frames(&'a Tensor),
    /// `first`, (B, H, W, Cin), at the first step; at later steps the top layer's hidden state of the
    /// previous step, so the top layer must have Cin hidden channels.
    Feedback {
        /// The input of the first step.
        first: &'a Tensor,
        /// Number of steps.
        steps: usize,
    },
}

/// Which of the top layer's hidden states a roll-out returns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Keep {
    /// All steps, as (B, T, H, W, N).
    All,
    /// The last step only, as (B, H, W, N).
    Last,
}

/// Rolls a stack of ConvLSTM layers out over time, from zero states, and returns the top layer's hidden
/// states.
///
/// Each layer computes from its input x and its own previous state: (i, f, o, g) = weight * \[x, h\] + bias,
/// same-padded; c' = sigmoid(f) c + sigmoid(i) tanh(g); h' = sigmoid(o) tanh(c') (Shi et al., "Convolutional
/// LSTM network", 2015, equation 3, without peepholes). The input of each layer above the first is the h' of
/// the layer below.
///
/// The whole roll-out is one op of the graph. Its backward pass sums the weight gradient over the steps and
/// transforms it back once. If a gradient is tracked, about 6 numbers per pixel, hidden channel, layer and
/// step are saved until the backward pass has run or the result is dropped; otherwise, and inside
/// [`no_grad`](crate::no_grad), only the current states are held.
///
/// All tensors are f32, bf16 or f16. With a half type, the result and the tensors saved for backward have
/// that type; sums, and the states passed from step to step, are always f32.
///
/// # Errors
/// If the shapes are incompatible, or the tensors do not share one supported dtype and one device. A second
/// backward pass through the same result also fails, because the first one consumes the saved tensors.
pub fn conv_lstm(input: ConvLstmInput, layers: &[ConvLstmLayer], keep: Keep) -> Result<Tensor> {
    let roll_out = RollOut::new(input, layers, keep)?;
    let (ConvLstmInput::Frames(x) | ConvLstmInput::Feedback { first: x, .. }) = input;
    #[cfg(feature = "cuda")]
    if x.device().is_cuda() {
        return crate::cuda::conv_lstm(input, layers, keep);
    }
    let mut parameters = Vec::with_capacity(2 * layers.len());
    for layer in layers {
        parameters.push(layer.weight.flatten_all()?);
        parameters.push(layer.bias.clone());
    }
    let parameters = Tensor::cat(&parameters, 0)?;
    match x.dtype() {
        DType::BF16 => ConvLstm::<bf16>::apply(roll_out, x, &parameters),
        DType::F16 => ConvLstm::<f16>::apply(roll_out, x, &parameters),
        _ => ConvLstm::<f32>::apply(roll_out, x, &parameters),
    }
}

/// The sizes of a layer, and the offset of its weights among the parameters (the bias follows them).
#[derive(Clone, Copy, Debug)]
struct Layer {
    inputs: usize,
    hidden: usize,
    kernel: usize,
    weight: usize,
}

impl Layer {
    fn weight_len(&self) -> usize {
        4 * self.hidden * (self.inputs + self.hidden) * self.kernel * self.kernel
    }
    fn weights<'a>(&self, parameters: &'a [f32]) -> &'a [f32] {
        &parameters[self.weight..self.weight + self.weight_len()]
    }
    fn bias_at(&self) -> usize {
        self.weight + self.weight_len()
    }
    /// The bias in the packed order.
    fn bias(&self, parameters: &[f32]) -> Vec<f32> {
        let at = self.bias_at();
        packed_order(self.hidden).iter().map(|o| o.map_or(0., |o| parameters[at + o])).collect()
    }
    fn winograd(&self) -> bool {
        self.kernel == 3
    }
    /// Floats in the packed gates of one pixel.
    fn gates(&self) -> usize {
        self.hidden.div_ceil(LANES) * GROUP
    }
}

/// The sizes of a roll-out.
#[derive(Clone, Debug)]
struct RollOut {
    batch: usize,
    height: usize,
    width: usize,
    steps: usize,
    feedback: bool,
    keep: Keep,
    layers: Vec<Layer>,
    /// Number of parameters of all layers.
    parameters: usize,
}

impl RollOut {
    fn new(input: ConvLstmInput, layers: &[ConvLstmLayer], keep: Keep) -> Result<RollOut> {
        let op = "conv_lstm";
        let (x, feedback) = match input {
            ConvLstmInput::Frames(x) => (x, false),
            ConvLstmInput::Feedback { first, .. } => (first, true),
        };
        check_convolves(op, "the input", x)?;
        let (batch, steps, height, width, channels) = match (input, x.dims()) {
            (ConvLstmInput::Frames(_), &[b, t, h, w, c]) => (b, t, h, w, c),
            (ConvLstmInput::Frames(_), dims) => {
                bail!("{op}: frames must be (batch, time, height, width, channels), got {dims:?}")
            }
            (ConvLstmInput::Feedback { steps, .. }, &[b, h, w, c]) => (b, steps, h, w, c),
            (ConvLstmInput::Feedback { .. }, dims) => {
                bail!("{op}: the first input must be (batch, height, width, channels), got {dims:?}")
            }
        };
        if layers.is_empty() || steps == 0 {
            bail!(
                "{op}: needs at least one layer and one step, got {} layers and {steps} steps",
                layers.len()
            );
        }
        let mut roll_out =
            RollOut { batch, height, width, steps, feedback, keep, layers: Vec::new(), parameters: 0 };
        let mut inputs = channels;
        for (index, layer) in layers.iter().enumerate() {
            check_like(op, "weight", layer.weight, x)?;
            check_like(op, "bias", layer.bias, x)?;
            let (weight, bias) = (layer.weight.dims(), layer.bias.dims());
            let &[outputs, channels, kernel, kernel_width] = weight else {
                bail!("{op}: weight of layer {index} must be (4 N, inputs + N, k, k), got {weight:?}");
            };
            let hidden = outputs / 4;
            if outputs % 4 != 0 || channels != inputs + hidden {
                bail!(
                    "{op}: weight of layer {index} must be (4 N, {inputs} + N, k, k) for {inputs} input channels, got {weight:?}"
                );
            }
            if kernel != kernel_width || kernel % 2 == 0 {
                bail!("{op}: weight of layer {index} must have a square kernel of odd size, got {weight:?}");
            }
            if bias != [outputs] {
                bail!(
                    "{op}: bias of layer {index} must be ({outputs}) for a weight of {weight:?}, got {bias:?}"
                );
            }
            let layer = Layer { inputs, hidden, kernel, weight: roll_out.parameters };
            roll_out.parameters += layer.weight_len() + outputs;
            roll_out.layers.push(layer);
            inputs = hidden;
        }
        if feedback && inputs != channels {
            bail!(
                "{op}: the top layer's hidden state is fed back, so it must have as many channels as the first input: {inputs}, \
                 got an input of {:?}",
                x.dims()
            );
        }
        Ok(roll_out)
    }

    fn top(&self) -> usize {
        self.layers.len() - 1
    }
    /// Floats in the input.
    fn input_len(&self) -> usize {
        let frames = self.batch * if self.feedback { 1 } else { self.steps };
        frames * self.pixels() * self.layers[0].inputs
    }
    fn output_len(&self) -> usize {
        self.state(self.top()) * if self.keep == Keep::All { self.steps } else { 1 }
    }
    /// Pixels of an image.
    fn pixels(&self) -> usize {
        self.height * self.width
    }
    fn tiling(&self) -> Tiling {
        Tiling { batch: self.batch, height: self.height, width: self.width, padding: 1, kernel: 3 }
    }
    /// Floats in one step's hidden states of a layer.
    fn state(&self, layer: usize) -> usize {
        self.batch * self.pixels() * self.layers[layer].hidden
    }
    /// Number of cell units in one step of a layer: 16 channels of one pixel each.
    fn cells(&self, layer: &Layer) -> usize {
        let pixels =
            if layer.winograd() { self.tiling().tiles() * OUT * OUT } else { self.batch * self.pixels() };
        pixels * layer.hidden.div_ceil(LANES)
    }
    /// Buffers for each layer's last `depth` hidden states; empty for the top layer if its states are stored
    /// in the output.
    fn hidden_buffers<T: Float>(&self, depth: usize, top_in_output: bool) -> Vec<Buffer<T>> {
        let len = |layer| if top_in_output && layer == self.top() { 0 } else { depth * self.state(layer) };
        (0..self.layers.len()).map(|layer| Buffer::of(len(layer))).collect()
    }
    /// Offset of a step in the output, and floats from one image to the next; the top layer's states live
    /// there for `Keep::All`.
    fn output_at(&self, step: usize) -> (usize, usize) {
        let image = self.pixels() * self.layers[self.top()].hidden;
        match self.keep {
            Keep::All => (step * image, self.steps * image),
            Keep::Last => (0, image),
        }
    }
    /// The convolution of `inputs` channels into the packed gates, for layers whose kernel is not 3x3.
    fn geometry(&self, layer: &Layer, inputs: usize) -> Geometry {
        Geometry {
            batch: self.batch,
            height: self.height,
            width: self.width,
            inputs,
            outputs: layer.gates(),
            kernel_height: layer.kernel,
            kernel_width: layer.kernel,
            stride: 1,
            padding: layer.kernel / 2,
            dilation: 1,
            groups: 1,
            out_height: self.height,
            out_width: self.width,
        }
    }
    /// The input of a layer at a step; `frame` is the input of the whole stack.
    fn input<T>(&self, layer: usize, step: usize, frame: Images<T>, hidden: &Hidden<T>) -> Images<T> {
        if layer > 0 {
            return hidden.images(self, layer - 1, step);
        }
        if self.feedback && step > 0 {
            return hidden.images(self, self.top(), step - 1);
        }
        frame
    }
    /// The input of the stack at a step; with feedback, always that of the first step.
    fn images<T>(&self, step: usize, input: &[T]) -> Images<T> {
        let (offset, image) = self.frame(step);
        Images { data: input[offset..].as_ptr(), image, channels: self.layers[0].inputs }
    }
    /// Copies the stack's input at a step into `wide`, image after image.
    fn widen_frame<T: Float>(&self, level: Level, step: usize, input: &[T], wide: &mut [f32]) {
        let (offset, image) = self.frame(step);
        let len = self.pixels() * self.layers[0].inputs;
        for (from, to) in input[offset..].chunks(image).zip(wide.chunks_exact_mut(len)) {
            convert(level, &from[..len], to);
        }
    }
    /// The offset of a step's input, and floats from one image to the next.
    fn frame(&self, step: usize) -> (usize, usize) {
        let frame = self.pixels() * self.layers[0].inputs;
        if self.feedback { (0, frame) } else { (step * frame, self.steps * frame) }
    }
}

/// The op: takes the input and all parameters, flattened, and returns the top layer's hidden states; all of
/// type `T`.
struct ConvLstm<T> {
    roll_out: RollOut,
    gradients: bool,
    kept: Mutex<Option<Kept<T>>>,
}

impl<T: Float> ConvLstm<T> {
    fn apply(roll_out: RollOut, x: &Tensor, parameters: &Tensor) -> Result<Tensor> {
        let gradients = tracked(x) || tracked(parameters);
        let op = ConvLstm::<T> { roll_out, gradients, kept: Mutex::new(None) };
        if gradients { x.apply_op2(parameters, op) } else { x.apply_op2_no_bwd(parameters, &op) }
    }
}

impl<T: Float> CustomOp2 for ConvLstm<T> {
    fn name(&self) -> &'static str {
        "conv_lstm"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        lx: &Layout,
        p: &CpuStorage,
        lp: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let r = &self.roll_out;
        let (x, parameters) = (packed::<T>(x, lx)?, packed(p, lp)?);
        let level = Level::current();
        let (output, kept) = on_pool(|| {
            let parameters = T::widened(level, &parameters);
            forward(level, r, self.gradients, &x, &parameters)
        });
        *self.kept.lock().unwrap_or_else(PoisonError::into_inner) = kept;
        let channels = r.layers[r.top()].hidden;
        let shape = match r.keep {
            Keep::All => Shape::from((r.batch, r.steps, r.height, r.width, channels)),
            Keep::Last => Shape::from((r.batch, r.height, r.width, channels)),
        };
        Ok((T::to_cpu_storage_owned(output), shape))
    }

    fn bwd(
        &self,
        x: &Tensor,
        p: &Tensor,
        y: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let kept = take_kept(&self.kept)?;
        let wants = (x.track_op(), p.track_op());
        let level = Level::current();
        let (dx, dp) = with_values(x, |x: &[T]| {
            with_values(p, |p: &[T]| {
                with_values(y, |y| {
                    with_values(dy, |dy| {
                        Ok(on_pool(|| {
                            let p = T::widened(level, p);
                            backward(level, &self.roll_out, kept, x, &p, y, dy, wants)
                        }))
                    })
                })
            })
        })?;
        let dx = dx.map(|dx| Tensor::from_vec(dx, x.shape(), &Device::Cpu)).transpose()?;
        let dp = dp.map(|dp| Tensor::from_vec(dp, p.shape(), &Device::Cpu)).transpose()?;
        Ok((dx, dp))
    }
}

/// Takes the tensors saved by the forward pass; only one backward pass can use them.
pub(crate) fn take_kept<K>(kept: &Mutex<Option<K>>) -> Result<K> {
    let kept = kept.lock().unwrap_or_else(PoisonError::into_inner).take();
    kept.ok_or_else(|| {
        Error::Msg(
            "conv_lstm: backward ran before on this result, and used up what the forward pass had kept; run forward again"
                .into(),
        )
    })
}
