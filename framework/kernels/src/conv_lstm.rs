//! ConvLSTM as candle ops: a roll-out of a stack of layers over time, and the pointwise half of a cell alone.

use crate::buffer::Buffer;
use crate::cell::{self, GROUP, Order, States, packed_order};
use crate::direct::{self, Geometry, OutputImages};
use crate::float::{Float, convert};
use crate::parallel::{Shared, on_pool};
use crate::simd::{LANES, Level};
use crate::tensors::{check_convolves, check_like, check_type, packed, tracked, with_values};
use crate::winograd::{self, ColumnOrder, Filters, Images, InputGradient, OUT, Panels, Source, Tiling};
use candle_core::{CpuStorage, CustomOp2, DType, Device, Error, Layout, Result, Shape, Tensor, bail};
use half::{bf16, f16};
use std::sync::{Mutex, PoisonError};

/// The weights of a ConvLSTM layer with N hidden channels.
#[derive(Clone, Copy, Debug)]
pub struct ConvLstmLayer<'a> {
    /// (4 N, Cin + N, k, k), k odd: gates in the order i, f, o, g; input channels first, then hidden.
    pub weight: &'a Tensor,
    /// (4 N)
    pub bias: &'a Tensor,
}

/// What the first layer of a roll-out reads.
#[derive(Clone, Copy, Debug)]
pub enum ConvLstmInput<'a> {
    /// (B, T, H, W, Cin): a frame at each step.
    Frames(&'a Tensor),
    /// At the first step `first`, (B, H, W, Cin); later what the top layer's hidden state was at the step before, so that the
    /// top layer must have Cin hidden channels.
    Feedback {
        /// The input of the first step.
        first: &'a Tensor,
        /// How many steps to take.
        steps: usize,
    },
}

/// Which of the top layer's hidden states a roll-out returns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Keep {
    /// All, as (B, T, H, W, N).
    All,
    /// Only the last, as (B, H, W, N).
    Last,
}

/// Rolls a stack of ConvLSTM layers over time, all states zero at first, and returns the top layer's hidden states.
///
/// Each layer computes from its input x and its own last state: (i, f, o, g) = weight * \[x, h\] + bias, same-padded;
/// c' = sigmoid(f) c + sigmoid(i) tanh(g); h' = sigmoid(o) tanh(c') (Shi et al., "Convolutional LSTM network", 2015, equation
/// 3, without peepholes). The input of a layer above the first is the h' of the layer below.
///
/// The whole roll-out is one op of the graph. Its backward sums the weights' gradient over the steps before transforming it
/// back once. Where something is tracked, about 6 numbers a pixel, hidden channel, layer and step are kept until backward has
/// run, or the result is dropped; otherwise, and inside [`no_grad`](crate::no_grad), only the current states.
///
/// All tensors are f32, bf16 or f16. Of a half type is what is returned and what is kept for backward; sums, and the states
/// that one step hands to the next, are f32 in any case.
///
/// # Errors
/// Where the shapes do not fit together, or the tensors are not of one such type on one device; and on a second backward
/// through one result, because the first has used up what was kept.
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

/// The sizes of a layer, and where its weights begin among the parameters (the bias follows them).
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
    /// Floats of the packed gates of a pixel.
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
    /// Of all layers.
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
    /// Floats of the input and of the output.
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
    /// Floats of a step's states of a layer.
    fn state(&self, layer: usize) -> usize {
        self.batch * self.pixels() * self.layers[layer].hidden
    }
    /// Places of a step's cells of a layer: 16 channels of a pixel each.
    fn cells(&self, layer: &Layer) -> usize {
        let pixels =
            if layer.winograd() { self.tiling().tiles() * OUT * OUT } else { self.batch * self.pixels() };
        pixels * layer.hidden.div_ceil(LANES)
    }
    /// Room for each layer's last `depth` hidden states; none for the top layer's where they lie in the output.
    fn hidden_buffers<T: Float>(&self, depth: usize, top_in_output: bool) -> Vec<Buffer<T>> {
        let len = |layer| if top_in_output && layer == self.top() { 0 } else { depth * self.state(layer) };
        (0..self.layers.len()).map(|layer| Buffer::of(len(layer))).collect()
    }
    /// The top layer's states, where all are returned.
    fn output_at(&self, step: usize) -> (usize, usize) {
        let image = self.pixels() * self.layers[self.top()].hidden;
        match self.keep {
            Keep::All => (step * image, self.steps * image),
            Keep::Last => (0, image),
        }
    }
    /// The convolution of `inputs` channels to the packed gates, for layers whose kernel is not 3x3.
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
    /// The input of a layer at a step, given that of the whole stack.
    fn input<T>(&self, layer: usize, step: usize, frame: Images<T>, hidden: &Hidden<T>) -> Images<T> {
        if layer > 0 {
            return hidden.images(self, layer - 1, step);
        }
        if self.feedback && step > 0 {
            return hidden.images(self, self.top(), step - 1);
        }
        frame
    }
    /// The input of the stack at a step; with feedback, at the first.
    fn images<T>(&self, step: usize, input: &[T]) -> Images<T> {
        let (offset, image) = self.frame(step);
        Images { data: input[offset..].as_ptr(), image, channels: self.layers[0].inputs }
    }
    /// Copies the stack's input at a step, image after image.
    fn widen_frame<T: Float>(&self, level: Level, step: usize, input: &[T], wide: &mut [f32]) {
        let (offset, image) = self.frame(step);
        let len = self.pixels() * self.layers[0].inputs;
        for (from, to) in input[offset..].chunks(image).zip(wide.chunks_exact_mut(len)) {
            convert(level, &from[..len], to);
        }
    }
    /// Where the input of a step begins, and floats from an image to the next.
    fn frame(&self, step: usize) -> (usize, usize) {
        let frame = self.pixels() * self.layers[0].inputs;
        if self.feedback { (0, frame) } else { (step * frame, self.steps * frame) }
    }
}

/// Hidden states: of each layer the last `depth` steps; those of the top layer may lie in the output itself.
struct Hidden<T> {
    layers: Vec<Shared<T>>,
    depth: usize,
    output: Option<Shared<T>>,
}

impl<T> Hidden<T> {
    fn states(&self, r: &RollOut, layer: usize, step: usize) -> States<T> {
        let image = r.pixels() * r.layers[layer].hidden;
        let (data, offset, image) = match self.output {
            Some(output) if layer == r.top() => {
                let (offset, image) = r.output_at(step);
                (output, offset, image)
            }
            _ => (self.layers[layer], step % self.depth * r.state(layer), image),
        };
        // SAFETY: the step lies inside the buffer.
        States { data: unsafe { data.offset(offset) }, image }
    }
    fn images(&self, r: &RollOut, layer: usize, step: usize) -> Images<T> {
        let states = self.states(r, layer, step);
        // SAFETY: only the address is taken.
        Images { data: unsafe { states.data.at(0) }, image: states.image, channels: r.layers[layer].hidden }
    }
}

/// What backward needs of the forward pass: for each layer, all steps.
struct Kept<T> {
    activations: Vec<Buffer<T>>,
    c: Vec<Buffer<T>>,
    /// Empty for a top layer whose states are all in the output.
    h: Vec<Buffer<T>>,
}

impl<T: Float> Kept<T> {
    fn new(r: &RollOut) -> Self {
        Kept {
            activations: r.layers.iter().map(|l| Buffer::of(r.steps * r.cells(l) * GROUP)).collect(),
            c: r.layers.iter().map(|l| Buffer::of(r.steps * r.cells(l) * LANES)).collect(),
            h: r.hidden_buffers(r.steps, r.keep == Keep::All),
        }
    }
}

fn shared<T: Float>(buffers: &mut [Buffer<T>]) -> Vec<Shared<T>> {
    buffers.iter_mut().map(|buffer| Shared::new(buffer)).collect()
}

/// Where the forward pass has its states. Those that a step hands to the next are 32 bits wide: either those that are kept
/// or returned, if they are as wide, or others, beside which the kept ones are copies.
struct Memory<T> {
    h: Hidden<f32>,
    c: Vec<Shared>,
    c_depth: usize,
    /// What is kept; these two are empty where nothing is.
    activations: Vec<Shared<T>>,
    c_kept: Vec<Shared<T>>,
    h_kept: Hidden<T>,
    /// Keeps alive the states that are not kept.
    _own: [Vec<Buffer>; 2],
}

impl<T: Float> Memory<T> {
    fn new(r: &RollOut, kept: Option<&mut Kept<T>>, output: &mut [T]) -> Self {
        let output = (r.keep == Keep::All).then(|| Shared::new(output));
        let (activations, c_kept, h) = match kept {
            Some(kept) => (shared(&mut kept.activations), shared(&mut kept.c), shared(&mut kept.h)),
            None => Default::default(),
        };
        let h_kept = Hidden { layers: h, depth: r.steps, output };
        let output = output.and_then(Shared::wide);
        if T::WIDE && !activations.is_empty() {
            let wide = |x: &[Shared<T>]| x.iter().copied().filter_map(Shared::wide).collect();
            let h = Hidden { layers: wide(&h_kept.layers), depth: r.steps, output };
            let c = wide(&c_kept);
            return Memory { h, c, c_depth: r.steps, activations, c_kept, h_kept, _own: Default::default() };
        }
        // Two hidden states, of which one is read and one written, and a cell state.
        let mut h_own = r.hidden_buffers(2, output.is_some());
        let mut c_own: Vec<Buffer> = r.layers.iter().map(|l| Buffer::new(r.cells(l) * LANES)).collect();
        let h = Hidden { layers: shared(&mut h_own), depth: 2, output };
        let c = shared(&mut c_own);
        Memory { h, c, c_depth: 1, activations, c_kept, h_kept, _own: [h_own, c_own] }
    }

    /// A step of a layer's cells.
    fn step<'a>(&self, r: &RollOut, index: usize, step: usize, bias: &'a [f32]) -> cell::Forward<'a, T> {
        let layer = &r.layers[index];
        let c_len = r.cells(layer) * LANES;
        // SAFETY: the step lies inside the buffer.
        let c_at = |step: usize| unsafe { self.c[index].offset(step % self.c_depth * c_len) };
        let copied = !T::WIDE && !self.activations.is_empty();
        let returned = !T::WIDE && index == r.top() && r.keep == Keep::All;
        cell::Forward {
            bias,
            c_before: (step > 0).then(|| c_at(step - 1)),
            c: c_at(step),
            h: self.h.states(r, index, step),
            // SAFETY: as above.
            kept: self.activations.get(index).map(|a| unsafe { a.offset(step * r.cells(layer) * GROUP) }),
            // SAFETY: as above.
            c_kept: copied.then(|| unsafe { self.c_kept[index].offset(step * c_len) }),
            h_kept: (copied || returned).then(|| self.h_kept.states(r, index, step)),
            hidden: layer.hidden,
            pixels: r.pixels(),
            width: r.width,
        }
    }
}

/// A layer's weights, as the forward pass reads them.
enum Weights {
    Winograd(Panels),
    /// For the inputs and for the hidden channels, (packed gates, channels, k, k).
    Direct(Vec<f32>, Vec<f32>),
}

/// Some of a layer's input channels, with the gates in the packed order: for kernels that are not 3x3.
fn select(layer: &Layer, weights: &[f32], first: usize, count: usize) -> Vec<f32> {
    let taps = layer.kernel * layer.kernel;
    let order = packed_order(layer.hidden);
    let mut selected = vec![0f32; order.len() * count * taps];
    for (to, output) in selected.chunks_exact_mut(count * taps).zip(&order) {
        if let Some(output) = output {
            let from = (output * (layer.inputs + layer.hidden) + first) * taps;
            to.copy_from_slice(&weights[from..from + count * taps]);
        }
    }
    selected
}

/// The way back for gradients: adds `selected` to a layer's weights.
fn add_selected(layer: &Layer, selected: &[f32], first: usize, count: usize, weights: &mut [f32]) {
    let taps = layer.kernel * layer.kernel;
    for (from, output) in selected.chunks_exact(count * taps).zip(packed_order(layer.hidden)) {
        if let Some(output) = output {
            let to = (output * (layer.inputs + layer.hidden) + first) * taps;
            for (sum, x) in weights[to..to + count * taps].iter_mut().zip(from) {
                *sum += x;
            }
        }
    }
}

/// The op: input and all parameters, flat, to the top layer's hidden states; all of type `T`.
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

/// What the forward pass has kept, for the one backward pass that can use it.
pub(crate) fn take_kept<K>(kept: &Mutex<Option<K>>) -> Result<K> {
    let kept = kept.lock().unwrap_or_else(PoisonError::into_inner).take();
    kept.ok_or_else(|| {
        Error::Msg(
            "conv_lstm: backward ran before on this result, and used up what the forward pass had kept; run forward again"
                .into(),
        )
    })
}

fn forward<T: Float>(
    level: Level,
    r: &RollOut,
    gradients: bool,
    input: &[T],
    parameters: &[f32],
) -> (Vec<T>, Option<Kept<T>>) {
    // What the unsafe code below relies on.
    assert_eq!((input.len(), parameters.len()), (r.input_len(), r.parameters));
    let orders: Vec<ColumnOrder> = r.layers.iter().map(|l| packed_order(l.hidden)).collect();
    let weights: Vec<Weights> = r
        .layers
        .iter()
        .zip(&orders)
        .map(|(layer, order)| {
            let data = layer.weights(parameters);
            if layer.winograd() {
                Weights::Winograd(
                    Filters { data, inputs: layer.inputs + layer.hidden, kernel: 3 }.transform(level, order),
                )
            } else {
                let x = select(layer, data, 0, layer.inputs);
                Weights::Direct(x, select(layer, data, layer.inputs, layer.hidden))
            }
        })
        .collect();
    let biases: Vec<Vec<f32>> = r.layers.iter().map(|l| l.bias(parameters)).collect();

    let mut output = vec![T::zero(); r.output_len()];
    let mut kept = gradients.then(|| Kept::<T>::new(r));
    let memory = Memory::new(r, kept.as_mut(), &mut output);
    let mut wide_frame = Buffer::new(if T::WIDE { 0 } else { r.batch * r.pixels() * r.layers[0].inputs });

    for step in 0..r.steps {
        let frame = r.images(step, input);
        let frame = frame.wide().unwrap_or_else(|| {
            if step == 0 || !r.feedback {
                r.widen_frame(level, step, input, &mut wide_frame);
            }
            Images { data: wide_frame.as_ptr(), image: r.pixels() * frame.channels, channels: frame.channels }
        });
        for (index, layer) in r.layers.iter().enumerate() {
            let cell = memory.step(r, index, step, &biases[index]);
            let x = r.input(index, step, frame, &memory.h);
            // The first state is zero: its half of the convolution is left out.
            let before = (step > 0).then(|| memory.h.images(r, index, step - 1));
            match &weights[index] {
                Weights::Winograd(panels) => match before {
                    Some(before) => winograd::forward(level, &r.tiling(), &[x, before], panels, cell),
                    None => winograd::forward(level, &r.tiling(), &[x], panels, cell),
                },
                Weights::Direct(of_x, of_h) => {
                    let mut gates = Buffer::new(r.batch * r.pixels() * layer.gates());
                    let mut to =
                        OutputImages::contiguous(Shared::new(&mut gates), r.pixels() * layer.gates());
                    direct::forward(
                        level,
                        &r.geometry(layer, layer.inputs),
                        x,
                        of_x,
                        Some(&biases[index]),
                        to,
                    );
                    to.add = true;
                    if let Some(before) = before {
                        direct::forward(level, &r.geometry(layer, layer.hidden), before, of_h, None, to);
                    }
                    cell::forward(level, r.batch, &gates, Order::Packed, cell);
                }
            }
        }
    }
    if r.keep == Keep::Last {
        let last = memory.h.states(r, r.top(), r.steps - 1).data;
        // SAFETY: the states of a step are as many as are returned; nobody writes them any more.
        let last = unsafe { std::slice::from_raw_parts(last.at(0), r.output_len()) };
        convert(level, last, &mut output);
    }
    (output, kept)
}

/// The weights and their gradients of one of a layer's two inputs: x or its own hidden state.
struct Side {
    first: usize,
    channels: usize,
    /// For the gradient of this input, where it is wanted: transposed panels, or plain weights.
    panels: Option<Panels>,
    weights: Option<Vec<f32>>,
    /// The gradient of the weights, where it is wanted, in the same two forms.
    panel_sums: Option<Vec<Panels>>,
    weight_sums: Option<Vec<f32>>,
}

impl Side {
    fn new(
        level: Level,
        layer: &Layer,
        parts: usize,
        data: &[f32],
        [first, channels]: [usize; 2],
        wants_input: bool,
        wants_weights: bool,
    ) -> Side {
        let order = packed_order(layer.hidden);
        let filters = Filters { data, inputs: layer.inputs + layer.hidden, kernel: 3 };
        let winograd = layer.winograd();
        let taps = layer.kernel * layer.kernel;
        Side {
            first,
            channels,
            panels: (winograd && wants_input)
                .then(|| filters.transform_transposed(level, &order, first, channels)),
            weights: (!winograd && wants_input).then(|| select(layer, data, first, channels)),
            panel_sums: (winograd && wants_weights)
                .then(|| Panels::zeroed_parts(parts, channels, order.len())),
            weight_sums: (!winograd && wants_weights).then(|| vec![0f32; order.len() * channels * taps]),
        }
    }

    /// As a source of the Winograd backward pass: its values, and where the gradient of them is added, if anywhere.
    fn source<T>(&mut self, images: Images<T>, to: Option<States>) -> Source<'_, T> {
        let input = match (&self.panels, to) {
            (Some(filters), Some(to)) => Some(InputGradient { filters, data: to.data, image: to.image }),
            _ => None,
        };
        Source { images, filters: self.panel_sums.as_deref_mut(), input }
    }

    /// The same by definition, from the gradient of the gates.
    fn direct<T: Float>(
        &mut self,
        level: Level,
        g: &Geometry,
        images: Images<T>,
        gates: Images,
        to: Option<States>,
    ) {
        if let (Some(weights), Some(to)) = (&self.weights, to) {
            let to = OutputImages { data: to.data, image: to.image, add: true };
            direct::backward_input(level, g, gates, weights, None, to);
        }
        if let Some(sums) = &mut self.weight_sums {
            direct::backward_weight(level, g, images, gates, sums);
        }
    }

    /// Adds the sums to the gradient of the layer's weights.
    fn finish(self, level: Level, layer: &Layer, gradient: &mut [f32]) {
        for sums in self.panel_sums.iter().flatten() {
            let order = packed_order(layer.hidden);
            winograd::add_filter_gradient(
                level,
                sums,
                &order,
                self.first,
                gradient,
                layer.inputs + layer.hidden,
                3,
            );
        }
        if let Some(sums) = &self.weight_sums {
            add_selected(layer, sums, self.first, self.channels, gradient);
        }
    }
}

type MaybeGradients<T> = (Option<Vec<T>>, Option<Vec<T>>);

/// The gradients of the input and of the parameters.
#[expect(clippy::too_many_arguments, reason = "the arguments of the op's backward")]
fn backward<T: Float>(
    level: Level,
    r: &RollOut,
    mut kept: Kept<T>,
    input: &[T],
    parameters: &[f32],
    output: &[T],
    d_output: &[T],
    (wants_input, wants_parameters): (bool, bool),
) -> MaybeGradients<T> {
    // What the unsafe code below relies on.
    assert_eq!((input.len(), parameters.len()), (r.input_len(), r.parameters));
    assert_eq!((output.len(), d_output.len()), (r.output_len(), r.output_len()));
    let mut d_input = wants_input.then(|| T::wide_zeros(input.len()));
    let mut d_parameters = wants_parameters.then(|| T::wide_zeros(parameters.len()));
    let d_input_shared = d_input.as_mut().map(|d| Shared::new(d));

    let parts: Vec<usize> =
        r.layers.iter().map(|l| winograd::parts(&r.tiling(), l.inputs + l.hidden, l.gates())).collect();
    let mut sides: Vec<[Side; 2]> = r
        .layers
        .iter()
        .enumerate()
        .map(|(index, layer)| {
            let data = layer.weights(parameters);
            let wants_x = index > 0 || r.feedback || wants_input;
            [
                Side::new(level, layer, parts[index], data, [0, layer.inputs], wants_x, wants_parameters),
                Side::new(
                    level,
                    layer,
                    parts[index],
                    data,
                    [layer.inputs, layer.hidden],
                    true,
                    wants_parameters,
                ),
            ]
        })
        .collect();
    let mut biases: Vec<Option<Vec<f32>>> = r
        .layers
        .iter()
        .zip(&parts)
        .map(|(l, p)| wants_parameters.then(|| vec![0f32; p * l.gates()]))
        .collect();

    // The gradients of the hidden states of this step and of the one before, by turns (cell::Backward leaves zeros behind), and
    // of the cell states.
    let mut dh: Vec<Buffer> = (0..r.layers.len()).map(|l| Buffer::zeroed(2 * r.state(l))).collect();
    let dh = shared(&mut dh);
    // SAFETY: a layer's gradients are those of two steps.
    let dh_at = |layer: usize, step: usize| unsafe { dh[layer].offset(step % 2 * r.state(layer)) };
    let mut dc: Vec<Buffer> = r.layers.iter().map(|l| Buffer::zeroed(r.cells(l) * LANES)).collect();
    let hidden = Hidden {
        layers: shared(&mut kept.h),
        depth: r.steps,
        output: (r.keep == Keep::All).then(|| Shared::read(output)),
    };
    let d_output = Shared::read(d_output);
    // Of one step, for layers whose kernel is not 3x3.
    let direct = r.layers.iter().filter(|layer| !layer.winograd());
    let mut gates = Buffer::new(direct.map(|layer| r.cells(layer) * GROUP).max().unwrap_or(0));

    for step in (0..r.steps).rev() {
        for index in (0..r.layers.len()).rev() {
            let layer = &r.layers[index];
            let image = r.pixels() * layer.hidden;
            let c = Shared::new(&mut kept.c[index]);
            // SAFETY: the step lies inside the buffer.
            let c_at = |step: usize| unsafe { c.offset(step * r.cells(layer) * LANES) };
            let gates_len = r.cells(layer) * GROUP;
            // SAFETY: as above.
            let activations = unsafe { Shared::new(&mut kept.activations[index]).offset(step * gates_len) };
            let returned = index == r.top() && (r.keep == Keep::All || step + 1 == r.steps);
            let dh_output = returned.then(|| {
                let (offset, image) = r.output_at(step);
                // SAFETY: the step lies inside the gradient of the output.
                States { data: unsafe { d_output.offset(offset) }, image }
            });
            let cell = cell::Backward {
                kept: activations,
                c_before: (step > 0).then(|| c_at(step - 1)),
                c: c_at(step),
                dh: Some(States { data: dh_at(index, step), image }),
                dh_output,
                dc: Shared::new(&mut dc[index]),
                hidden: layer.hidden,
                pixels: r.pixels(),
                width: r.width,
            };
            // Where the gradients of x and of the last hidden state go.
            let to_x = if index > 0 {
                let image = r.pixels() * layer.inputs;
                Some(States { data: dh_at(index - 1, step), image })
            } else if r.feedback && step > 0 {
                let image = r.pixels() * layer.inputs;
                Some(States { data: dh_at(r.top(), step - 1), image })
            } else {
                d_input_shared.map(|d| {
                    let (offset, image) = r.frame(step);
                    // SAFETY: the step lies inside the gradient of the input.
                    States { data: unsafe { d.offset(offset) }, image }
                })
            };
            let to_h = (step > 0).then(|| States { data: dh_at(index, step - 1), image });

            let x = r.input(index, step, r.images(step, input), &hidden);
            let before = (step > 0).then(|| hidden.images(r, index, step - 1));
            let [side_x, side_h] = &mut sides[index];
            if layer.winograd() {
                let mut sources = vec![side_x.source(x, to_x)];
                sources.extend(before.map(|before| side_h.source(before, to_h)));
                let vectors = layer.gates() / LANES;
                winograd::backward(
                    level,
                    &r.tiling(),
                    vectors,
                    cell,
                    &mut sources,
                    parts[index],
                    biases[index].as_deref_mut(),
                );
            } else {
                let gates = &mut gates[..gates_len];
                cell::backward(level, r.batch, Shared::new(gates), Order::Packed, cell);
                let gates = &*gates;
                let images = Images {
                    data: gates.as_ptr(),
                    image: r.pixels() * layer.gates(),
                    channels: layer.gates(),
                };
                side_x.direct(level, &r.geometry(layer, layer.inputs), x, images, to_x);
                if let Some(before) = before {
                    side_h.direct(level, &r.geometry(layer, layer.hidden), before, images, to_h);
                }
                if let Some(bias) = &mut biases[index] {
                    direct::backward_bias(level, gates, bias);
                }
            }
        }
    }

    if let Some(gradient) = &mut d_parameters {
        for ((layer, [side_x, side_h]), bias) in r.layers.iter().zip(sides).zip(biases) {
            let weights = &mut gradient[layer.weight..layer.weight + layer.weight_len()];
            side_x.finish(level, layer, weights);
            side_h.finish(level, layer, weights);
            for part in bias.iter().flat_map(|bias| bias.chunks_exact(layer.gates())) {
                for (sum, o) in part.iter().zip(packed_order(layer.hidden)) {
                    if let Some(o) = o {
                        gradient[layer.bias_at() + o] += sum;
                    }
                }
            }
        }
    }
    let narrow = |wide| T::narrowed(level, wide);
    (d_input.map(narrow), d_parameters.map(narrow))
}

/// The pointwise half of an LSTM cell, fused: for models that make their gates in another way.
///
/// `gates` (.., 4 N) are the pre-activations in the order i, f, o, g, and `c` (.., N) is the cell state; returns (h', c'),
/// both (.., N): c' = sigmoid(f) c + sigmoid(i) tanh(g), h' = sigmoid(o) tanh(c'). f32 on the CPU, of any strides.
///
/// # Errors
/// Where the shapes do not fit together, or a tensor is not f32 on the CPU.
pub fn conv_lstm_cell(gates: &Tensor, c: &Tensor) -> Result<(Tensor, Tensor)> {
    let op = "conv_lstm_cell";
    check_type(op, "gates", gates, DType::F32)?;
    check_type(op, "c", c, DType::F32)?;
    let fits = match (gates.dims(), c.dims()) {
        ([leading @ .., gates], [leading_c @ .., c]) => leading == leading_c && *gates == 4 * c,
        _ => false,
    };
    if !fits {
        bail!("{op}: gates must be (.., 4 N) and c (.., N), got {:?} and {:?}", gates.dims(), c.dims());
    }
    let states = if tracked(gates) || tracked(c) {
        gates.apply_op2(c, ConvLstmCell)?
    } else {
        gates.apply_op2_no_bwd(c, &ConvLstmCell)?
    };
    Ok((states.get(0)?, states.get(1)?))
}

/// The op: gates and c to h' and c', stacked as (2, .., N).
struct ConvLstmCell;

impl CustomOp2 for ConvLstmCell {
    fn name(&self) -> &'static str {
        "conv_lstm_cell"
    }

    fn cpu_fwd(
        &self,
        a: &CpuStorage,
        la: &Layout,
        c: &CpuStorage,
        lc: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (gates, c) = (packed(a, la)?, packed(c, lc)?);
        let hidden = lc.dims().last().copied().unwrap_or(1);
        let mut states = vec![0f32; 2 * c.len()];
        let (h, c_after) = states.split_at_mut(c.len());
        let level = Level::current();
        on_pool(|| cell_forward(level, &gates, &c, hidden, h, c_after, None));
        Ok((CpuStorage::F32(states), [&[2], lc.dims()].concat().into()))
    }

    fn bwd(
        &self,
        gates: &Tensor,
        c: &Tensor,
        states: &Tensor,
        d: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (level, hidden) = (Level::current(), c.dims().last().copied().unwrap_or(1));
        let (mut d_gates, mut dc) = (vec![0f32; gates.elem_count()], vec![0f32; c.elem_count()]);
        with_values(gates, |a| {
            with_values(c, |before| {
                with_values(states, |states| {
                    with_values(d, |d| {
                        on_pool(|| cell_backward(level, a, before, states, d, hidden, &mut d_gates, &mut dc));
                        Ok(())
                    })
                })
            })
        })?;
        let d_gates = Tensor::from_vec(d_gates, gates.shape(), &Device::Cpu)?;
        Ok((Some(d_gates), Some(Tensor::from_vec(dc, c.shape(), &Device::Cpu)?)))
    }
}

fn cell_forward(
    level: Level,
    gates: &[f32],
    c: &[f32],
    hidden: usize,
    h: &mut [f32],
    c_after: &mut [f32],
    kept: Option<Shared>,
) {
    let pixels = c.len() / hidden;
    let step = cell::Forward {
        bias: &[],
        c_before: Some(Shared::read(c)),
        c: Shared::new(c_after),
        h: States { data: Shared::new(h), image: 0 },
        kept,
        c_kept: None,
        h_kept: None,
        hidden,
        pixels,
        width: 1,
    };
    cell::forward(level, 1, gates, Order::Plain, step);
}

#[expect(clippy::too_many_arguments, reason = "the tensors of the op's backward")]
fn cell_backward(
    level: Level,
    gates: &[f32],
    c: &[f32],
    states: &[f32],
    d: &[f32],
    hidden: usize,
    d_gates: &mut [f32],
    dc: &mut [f32],
) {
    let len = c.len();
    // The activations again: cheaper than keeping them.
    let (mut h, mut c_after) = (Buffer::new(len), Buffer::new(len));
    let activations = Shared::new(d_gates);
    cell_forward(level, gates, c, hidden, &mut h, &mut c_after, Some(activations));
    dc.copy_from_slice(&d[len..]);
    let step = cell::Backward {
        kept: activations,
        c_before: Some(Shared::read(c)),
        c: Shared::read(&states[len..]),
        dh: None,
        dh_output: Some(States { data: Shared::read(&d[..len]), image: 0 }),
        dc: Shared::new(dc),
        hidden,
        pixels: len / hidden,
        width: 1,
    };
    cell::backward(level, 1, activations, Order::Plain, step);
}
