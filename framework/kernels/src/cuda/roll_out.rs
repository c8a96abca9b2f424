//! Roll-outs of ConvLSTM layers on a device: the order of the operations, and the memory that they use.
//!
//! A layer's input of a step is one tensor (B, H, W, P): its own previous output, then its x, then zeros up
//! to a multiple of 8 channels, as tensor cores require. At the first step, which has no previous output, it
//! is only x and zeros. A step of a layer is therefore one convolution and one kernel for the gates, which
//! writes its output to where it is read next: into the inputs of its own next step and of the layer above.
//! The backward pass keeps the gates' gradients of all steps, and computes the weight gradient with one
//! convolution for the first step and one for all later steps; the bias gradient is summed while the gates'
//! gradients are computed.
//!
//! The same code runs on the processor for tests: [`Operations`] abstracts the device.

use super::arguments::{CopyColumns, GatesBackward, GatesForward, Plane};
use crate::direct::Geometry;
use candle_core::Result;

/// The operations of a device, which run in the order of the calls. "Storage" is memory of the training
/// dtype, 16 or 32 bits per value.
pub(crate) trait Operations {
    /// Memory that is freed when dropped, after all operations enqueued before.
    type Memory;

    /// Allocates `len` values of the storage type, zeroed or uninitialised.
    fn storage(&self, len: usize, zeroed: bool) -> Result<Self::Memory>;
    /// Allocates `len` f32 values, zeroed or uninitialised.
    fn floats(&self, len: usize, zeroed: bool) -> Result<Self::Memory>;
    /// The start address of memory.
    fn address(&self, memory: &Self::Memory) -> u64;
    /// Bytes per value of the storage type.
    fn item(&self) -> u64;
    /// The maximum number of values of a convolution's x and y, each.
    fn most_values(&self) -> usize;
    /// The number of threads that keep the device busy.
    fn threads(&self) -> usize;

    /// y = x * w, all storage; x and y are channels last, w is (outputs, kernel height, kernel width,
    /// inputs).
    ///
    /// # Safety
    /// All addresses point to memory as large as the geometry says.
    unsafe fn convolve(&self, geometry: &Geometry, x: u64, w: u64, y: u64) -> Result<()>;
    /// The gradient of x.
    ///
    /// # Safety
    /// Same as for `convolve`.
    unsafe fn backward_data(&self, geometry: &Geometry, w: u64, dy: u64, dx: u64) -> Result<()>;
    /// The gradient of w, overwritten or added to.
    ///
    /// # Safety
    /// Same as for `convolve`.
    unsafe fn backward_filter(&self, geometry: &Geometry, x: u64, dy: u64, dw: u64, add: bool) -> Result<()>;
    /// # Safety
    /// All addresses point to memory as large as the arguments say.
    unsafe fn gates_forward(&self, arguments: GatesForward) -> Result<()>;
    /// # Safety
    /// Same as for `gates_forward`.
    unsafe fn gates_backward(&self, arguments: GatesBackward) -> Result<()>;
    /// # Safety
    /// Same as for `gates_forward`.
    unsafe fn copy_columns(&self, arguments: CopyColumns) -> Result<()>;
    /// Writes the sums of all columns of x (rows, columns), f32, to storage.
    ///
    /// # Safety
    /// Same as for `gates_forward`.
    unsafe fn column_sums(&self, x: u64, rows: usize, columns: usize, to: u64) -> Result<()>;
}

/// The sizes of a layer, whose x has `inputs` channels.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Layer {
    pub(crate) inputs: usize,
    pub(crate) hidden: usize,
    pub(crate) kernel: usize,
}

impl Layer {
    /// Channels of the layer's input of a step: h, x, zeros.
    pub(crate) fn channels(&self) -> usize {
        (self.hidden + self.inputs).next_multiple_of(8)
    }
    /// Channels of the layer's input of the first step: x, zeros.
    pub(crate) fn first_channels(&self) -> usize {
        self.inputs.next_multiple_of(8)
    }
    fn gates(&self) -> usize {
        4 * self.hidden
    }
    /// Values of the layer's weight, (gates, kernel, kernel, channels).
    pub(crate) fn weight_len(&self) -> usize {
        self.gates() * self.kernel * self.kernel * self.channels()
    }
    /// Values of the layer's weight and of the first step's, (gates, kernel, kernel, first channels), which
    /// follows it.
    pub(crate) fn weights_len(&self) -> usize {
        self.weight_len() + self.gates() * self.kernel * self.kernel * self.first_channels()
    }
}

/// The sizes of a roll-out.
///
/// The parameters are one tensor: the weights of all layers, one after the other, then all biases. The input
/// is (B, T, H, W, C), or with `feedback` the first step's x, (B, H, W, C); at later steps x is the top
/// layer's previous output.
#[derive(Clone, Debug)]
pub(crate) struct RollOut {
    pub(crate) batch: usize,
    pub(crate) height: usize,
    pub(crate) width: usize,
    pub(crate) steps: usize,
    pub(crate) feedback: bool,
    /// Whether the output has all steps, (B, T, H, W, N), or only the last one, (B, H, W, N).
    pub(crate) keep_all: bool,
    pub(crate) layers: Vec<Layer>,
}

impl Plane {
    /// The same pixels from a channel on; each channel has `item` bytes.
    fn from(self, item: u64, channel: usize) -> Plane {
        Plane { at: self.at + item * channel as u64, ..self }
    }
}

/// Memory of a forward pass, saved for backward.
pub(crate) struct Kept<M> {
    layers: Vec<LayerMemory<M>>,
}

/// A layer's memory, step after step.
struct LayerMemory<M> {
    /// (B, H, W, first channels): the input of the first step.
    first: M,
    /// (steps - 1, B, H, W, channels): the inputs of all later steps.
    inputs: M,
    /// (steps, B, H, W, gates): pre-activations without their bias; in backward, their gradients.
    gates: M,
    /// (steps - 1, B, H, W, hidden), f32; the last step's state is not needed.
    c: M,
}

impl RollOut {
    fn top(&self) -> usize {
        self.layers.len() - 1
    }
    fn pixels(&self) -> usize {
        self.height * self.width
    }
    /// Pixels of a step.
    pub(crate) fn rows(&self) -> usize {
        self.batch * self.pixels()
    }
    /// Values of input, parameters and output.
    pub(crate) fn sizes(&self) -> [usize; 3] {
        let frames = self.rows() * if self.feedback { 1 } else { self.steps };
        let outputs = self.rows() * if self.keep_all { self.steps } else { 1 };
        let parameters = self.layers.iter().map(|layer| layer.weights_len() + layer.gates()).sum();
        [frames * self.layers[0].inputs, parameters, outputs * self.layers[self.top()].hidden]
    }
    /// The offset of a layer's weight for a step.
    fn weight(&self, index: usize, step: usize) -> usize {
        let before = self.layers[..index].iter().map(Layer::weights_len).sum::<usize>();
        before + if step == 0 { self.layers[index].weight_len() } else { 0 }
    }
    /// The offset of a layer's bias.
    fn bias(&self, index: usize) -> usize {
        let weights = self.layers.iter().map(Layer::weights_len).sum::<usize>();
        weights + self.layers[..index].iter().map(Layer::gates).sum::<usize>()
    }
    /// The convolution of a layer over `steps` steps at once, from `step` on; the first step is always
    /// separate.
    fn geometry(&self, layer: &Layer, step: usize, steps: usize) -> Geometry {
        Geometry {
            batch: steps * self.batch,
            height: self.height,
            width: self.width,
            inputs: if step == 0 { layer.first_channels() } else { layer.channels() },
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
    /// A tensor (B, H, W, channels) at an address.
    fn plane(&self, at: u64, channels: usize) -> Plane {
        Plane { at, image: (self.pixels() * channels) as i64, pixel: channels as i64 }
    }
    /// A step of a tensor (B, steps, H, W, channels).
    fn step_of(&self, at: u64, item: u64, steps: usize, step: usize, channels: usize) -> Plane {
        let frame = self.pixels() * channels;
        Plane { at: at + item * (step * frame) as u64, image: (steps * frame) as i64, pixel: channels as i64 }
    }
    /// The first layer's x of a step, in the input or in its gradient.
    fn frame(&self, at: u64, item: u64, step: usize) -> Plane {
        let channels = self.layers[0].inputs;
        if self.feedback {
            self.plane(at, channels)
        } else {
            self.step_of(at, item, self.steps, step, channels)
        }
    }
    /// The top layer's output of a step, in the output or in its gradient; empty if that step is not
    /// returned.
    fn returned(&self, at: u64, item: u64, step: usize) -> Plane {
        let hidden = self.layers[self.top()].hidden;
        match self.keep_all {
            true => self.step_of(at, item, self.steps, step, hidden),
            false if step + 1 == self.steps => self.plane(at, hidden),
            false => Plane::default(),
        }
    }
    /// How many steps a convolution over several steps can handle at once, given the maximum number of
    /// values.
    fn steps_at_once(&self, layer: &Layer, most_values: usize) -> usize {
        (most_values / (self.rows() * layer.channels().max(layer.gates()))).max(1)
    }

    /// The number of parts of a step's pixels over which the gates' gradients are summed: enough for a
    /// device, but few sums to read.
    fn parts(&self, layer: &Layer, threads: usize) -> usize {
        const PIXELS: usize = 16;
        // A thread handles four channels.
        (self.rows() / PIXELS).max(4 * threads / layer.hidden).clamp(1, self.rows())
    }

    /// Computes the output and, if `gradients`, returns the memory that the backward pass needs.
    ///
    /// # Safety
    /// The addresses point to storage as large as input, parameters and output.
    pub(crate) unsafe fn forward<E: Operations>(
        &self,
        device: &E,
        gradients: bool,
        input: u64,
        parameters: u64,
        output: u64,
    ) -> Result<Option<Kept<E::Memory>>> {
        let (rows, item) = (self.rows(), device.item());
        // Without gradients, only the previous step is needed, and the state is updated in place.
        let later = (self.steps - 1).max(1);
        let [input_slots, gate_slots, c_slots] =
            if gradients { [later, self.steps, later] } else { [2, 1, 1] };
        let memory = |layer: &Layer| -> Result<LayerMemory<E::Memory>> {
            // Padding channels stay zero. Everything else is written before it is read.
            let inputs = |slots: usize, channels: usize, used: usize| {
                device.storage(slots * rows * channels, channels > used)
            };
            Ok(LayerMemory {
                first: inputs(1, layer.first_channels(), layer.inputs)?,
                inputs: inputs(input_slots, layer.channels(), layer.hidden + layer.inputs)?,
                gates: device.storage(gate_slots * rows * layer.gates(), false)?,
                c: device.floats(c_slots * rows * layer.hidden, false)?,
            })
        };
        let memories = self.layers.iter().map(memory).collect::<Result<Vec<_>>>()?;
        // Locations, in a layer's input of a step, of the layer's previous output (absent at the first step)
        // and of x.
        let h_of = |index: usize, step: usize| {
            let channels = self.layers[index].channels();
            let at = (step - 1) % input_slots * rows * channels;
            self.plane(device.address(&memories[index].inputs) + item * at as u64, channels)
        };
        let x_of = |index: usize, step: usize| match step {
            0 => self.plane(device.address(&memories[index].first), self.layers[index].first_channels()),
            _ => h_of(index, step).from(item, self.layers[index].hidden),
        };
        let gates_of = |index: usize, step: usize| {
            let at = step % gate_slots * rows * self.layers[index].gates();
            device.address(&memories[index].gates) + item * at as u64
        };
        let c_of = |index: usize, step: usize| {
            let at = step % c_slots * rows * self.layers[index].hidden;
            device.address(&memories[index].c) + size_of::<f32>() as u64 * at as u64
        };
        for step in 0..self.steps {
            if !self.feedback || step == 0 {
                let first = &self.layers[0];
                let copy = CopyColumns {
                    from: self.frame(input, item, step),
                    to: x_of(0, step),
                    rows: rows as u32,
                    columns: first.inputs as u32,
                    pixels: self.pixels() as u32,
                };
                // SAFETY: both lie within the input and the first layer's inputs.
                unsafe { device.copy_columns(copy)? };
            }
            for (index, layer) in self.layers.iter().enumerate() {
                let (top, last) = (index == self.top(), step + 1 == self.steps);
                let h = [
                    if last { Plane::default() } else { h_of(index, step + 1) },
                    match (top, self.feedback && !last) {
                        (false, _) => x_of(index + 1, step),
                        (true, true) => x_of(0, step + 1),
                        (true, false) => Plane::default(),
                    },
                    if top { self.returned(output, item, step) } else { Plane::default() },
                ];
                let gates = GatesForward {
                    gates: gates_of(index, step),
                    bias: parameters + item * self.bias(index) as u64,
                    c_before: if step > 0 { c_of(index, step - 1) } else { 0 },
                    c: if last { 0 } else { c_of(index, step) },
                    h,
                    rows: rows as u32,
                    hidden: layer.hidden as u32,
                    pixels: self.pixels() as u32,
                };
                let weight = parameters + item * self.weight(index, step) as u64;
                let input = if step == 0 { x_of(index, 0) } else { h_of(index, step) };
                // SAFETY: all addresses are for this step and layer, within memory allocated for them.
                unsafe {
                    device.convolve(&self.geometry(layer, step, 1), input.at, weight, gates.gates)?;
                    device.gates_forward(gates)?;
                }
            }
        }
        Ok(gradients.then_some(Kept { layers: memories }))
    }

    /// Writes the gradients of input and parameters to these addresses; 0 for a gradient that is not wanted.
    /// With a single step, the memory for the parameters' gradient must be zeroed: the weights of later steps
    /// are not written.
    ///
    /// # Safety
    /// The addresses point to storage as large as parameters, output and input.
    pub(crate) unsafe fn backward<E: Operations>(
        &self,
        device: &E,
        kept: Kept<E::Memory>,
        parameters: u64,
        d_output: u64,
        d_input: u64,
        d_parameters: u64,
    ) -> Result<()> {
        let (rows, item) = (self.rows(), device.item());
        // For each layer: the gradient of its input at the step processed last, of its state and, in parts,
        // of its bias.
        let d_inputs = |layer: &Layer| device.storage(rows * layer.channels(), false);
        let d_inputs = self.layers.iter().map(d_inputs).collect::<Result<Vec<_>>>()?;
        let dc = self.layers.iter().map(|layer| device.floats(rows * layer.hidden, false));
        let dc = dc.collect::<Result<Vec<_>>>()?;
        let parts: Vec<usize> = self.layers.iter().map(|layer| self.parts(layer, device.threads())).collect();
        let sums =
            self.layers.iter().zip(&parts).map(|(layer, parts)| device.floats(parts * layer.gates(), true));
        let sums = sums.collect::<Result<Vec<_>>>()?;
        let d_h_of =
            |index: usize| self.plane(device.address(&d_inputs[index]), self.layers[index].channels());
        let d_x_of = |index: usize, step: usize| match step {
            0 => self.plane(device.address(&d_inputs[index]), self.layers[index].first_channels()),
            _ => d_h_of(index).from(item, self.layers[index].hidden),
        };
        let gates_of = |index: usize, step: usize| {
            device.address(&kept.layers[index].gates)
                + item * (step * rows * self.layers[index].gates()) as u64
        };
        let c_of = |index: usize, step: usize| {
            let at = step * rows * self.layers[index].hidden;
            device.address(&kept.layers[index].c) + size_of::<f32>() as u64 * at as u64
        };
        for step in (0..self.steps).rev() {
            for (index, layer) in self.layers.iter().enumerate().rev() {
                let (top, last) = (index == self.top(), step + 1 == self.steps);
                // The readers of this output: the layer itself at the next step, whose gradient the buffer
                // still holds; the layer above at this step, or the first layer at the next; and the returned
                // result.
                let dh = [
                    if last { Plane::default() } else { d_h_of(index) },
                    match (top, self.feedback && !last) {
                        (false, _) => d_x_of(index + 1, step),
                        (true, true) => d_x_of(0, step + 1),
                        (true, false) => Plane::default(),
                    },
                    if top { self.returned(d_output, item, step) } else { Plane::default() },
                ];
                let gates = GatesBackward {
                    gates: gates_of(index, step),
                    bias: parameters + item * self.bias(index) as u64,
                    c_before: if step > 0 { c_of(index, step - 1) } else { 0 },
                    dc: if last { 0 } else { device.address(&dc[index]) },
                    dc_before: if step > 0 { device.address(&dc[index]) } else { 0 },
                    dh,
                    sums: device.address(&sums[index]),
                    rows: rows as u32,
                    hidden: layer.hidden as u32,
                    pixels: self.pixels() as u32,
                    parts: parts[index] as u32,
                };
                let weight = parameters + item * self.weight(index, step) as u64;
                // SAFETY: all addresses are for this step and layer, within memory allocated for them.
                unsafe {
                    device.gates_backward(gates)?;
                    if index > 0 || step > 0 || d_input != 0 {
                        let to = device.address(&d_inputs[index]);
                        device.backward_data(&self.geometry(layer, step, 1), weight, gates.gates, to)?;
                    }
                }
            }
            if d_input != 0 && (!self.feedback || step == 0) {
                let first = &self.layers[0];
                let copy = CopyColumns {
                    from: d_x_of(0, step),
                    to: self.frame(d_input, item, step),
                    rows: rows as u32,
                    columns: first.inputs as u32,
                    pixels: self.pixels() as u32,
                };
                // SAFETY: both lie within the gradients of the first layer and of the input.
                unsafe { device.copy_columns(copy)? };
            }
        }
        if d_parameters == 0 {
            return Ok(());
        }
        for (index, (layer, memory)) in self.layers.iter().zip(&kept.layers).enumerate() {
            let at_once = self.steps_at_once(layer, device.most_values());
            for from in std::iter::once(0).chain((1..self.steps).step_by(at_once)) {
                let (x, steps) = match from {
                    0 => (device.address(&memory.first), 1),
                    _ => {
                        let at = (from - 1) * rows * layer.channels();
                        (device.address(&memory.inputs) + item * at as u64, at_once.min(self.steps - from))
                    }
                };
                let dw = d_parameters + item * self.weight(index, from) as u64;
                let geometry = self.geometry(layer, from, steps);
                // SAFETY: the steps are consecutive in memory.
                unsafe { device.backward_filter(&geometry, x, gates_of(index, from), dw, from > 1)? };
            }
            let to = d_parameters + item * self.bias(index) as u64;
            // SAFETY: the sums are (parts, gates).
            unsafe { device.column_sums(device.address(&sums[index]), parts[index], layer.gates(), to)? };
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::conv_lstm::{ConvLstmInput, ConvLstmLayer, Keep, conv_lstm};
    use crate::cuda::host::Host;
    use crate::tensors::with_values;
    use candle_core::{Device, Tensor, Var};
    use std::sync::Mutex;

    const DEVICE: Device = Device::Cpu;

    fn random(shape: impl Into<candle_core::Shape>, seed: u64) -> Tensor {
        use rand::{Rng, SeedableRng};
        let (shape, mut rng) = (shape.into(), rand_chacha::ChaCha8Rng::seed_from_u64(seed));
        let values: Vec<f32> = (0..shape.elem_count()).map(|_| rng.random_range(-1f32..1.)).collect();
        Tensor::from_vec(values, shape, &DEVICE).unwrap()
    }

    /// The parameters of layers in a roll-out's order, packed with candle's operations.
    fn pack(layers: &[ConvLstmLayer]) -> Result<Tensor> {
        let mut parts = Vec::with_capacity(3 * layers.len());
        for ConvLstmLayer { weight, .. } in layers {
            let (hidden, all) = (weight.dim(0)? / 4, weight.dim(1)?);
            let (x, h) = (weight.narrow(1, 0, all - hidden)?, weight.narrow(1, all - hidden, hidden)?);
            for channels in [Tensor::cat(&[&h, &x], 1)?, x] {
                let used = channels.dim(1)?;
                let rest = used.next_multiple_of(8) - used;
                let channels = if rest > 0 { channels.pad_with_zeros(1, 0, rest)? } else { channels };
                parts.push(channels.permute((0, 2, 3, 1))?.flatten_all()?);
            }
        }
        parts.extend(layers.iter().map(|layer| layer.bias.clone()));
        Tensor::cat(&parts, 0)
    }

    fn values(x: &Tensor) -> Vec<f32> {
        x.flatten_all().unwrap().to_vec1().unwrap()
    }

    fn assert_close(name: &str, ours: &[f32], expected: &[f32]) {
        assert_eq!(ours.len(), expected.len(), "{name}");
        let scale = expected.iter().fold(0f32, |most, x| most.max(x.abs()));
        let worst = ours.iter().zip(expected).fold(0f32, |worst, (a, b)| {
            // NaN counts as the worst error.
            if a.is_finite() { worst.max((a - b).abs()) } else { f32::INFINITY }
        });
        assert!(scale > 0. && worst <= 2e-5 * scale, "{name}: {worst:e} of {scale:e}");
    }

    /// Compares a roll-out through the kernel sources with the CPU op.
    fn compare(
        host: &Mutex<Host>,
        hidden: &[usize],
        [inputs, kernel, steps]: [usize; 3],
        feedback: bool,
        keep: Keep,
    ) {
        let (batch, height, width) = (2, 3, 5);
        let case = format!("{steps} steps, {hidden:?} of {inputs}, kernel {kernel}, {feedback}, {keep:?}");
        let x = match feedback {
            true => random((batch, height, width, inputs), 1),
            false => random((batch, steps, height, width, inputs), 1),
        };
        let x = Var::from_tensor(&x).unwrap();
        let mut below = inputs;
        let parameters: Vec<(Var, Var)> = hidden
            .iter()
            .enumerate()
            .map(|(i, &hidden)| {
                let weight =
                    (random((4 * hidden, below + hidden, kernel, kernel), 2 + i as u64) * 0.3).unwrap();
                below = hidden;
                let bias = random(4 * hidden, 20 + i as u64);
                (Var::from_tensor(&weight).unwrap(), Var::from_tensor(&bias).unwrap())
            })
            .collect();
        let layers: Vec<ConvLstmLayer> =
            parameters.iter().map(|(weight, bias)| ConvLstmLayer { weight, bias }).collect();
        let input = match feedback {
            true => ConvLstmInput::Feedback { first: &x, steps },
            false => ConvLstmInput::Frames(&x),
        };
        let expected = conv_lstm(input, &layers, keep).unwrap();
        let d = random(expected.shape(), 40);
        let of_expected = (&expected * &d).unwrap().sum_all().unwrap().backward().unwrap();

        let layer = |(hidden, inputs): (&usize, usize)| Layer { hidden: *hidden, inputs, kernel };
        let all_inputs = std::iter::once(inputs).chain(hidden.iter().copied());
        let roll_out = RollOut {
            batch,
            height,
            width,
            steps,
            feedback,
            keep_all: keep == Keep::All,
            layers: hidden.iter().zip(all_inputs).map(layer).collect(),
        };
        let packed = pack(&layers).unwrap();
        let sizes = roll_out.sizes();
        assert_eq!(sizes, [x.elem_count(), packed.elem_count(), d.elem_count()]);
        let [mut dx, mut dp, mut y] = sizes.map(|len| vec![f32::NAN; len]);
        if steps == 1 {
            dp.fill(0.);
        }
        let [mut dx_alone, mut dp_alone, mut y_alone] = [&dx, &dp, &y].map(Clone::clone);
        let to = |values: &mut Vec<f32>| values.as_mut_ptr() as u64;
        with_values(&packed, |p| {
            with_values(&x, |x| {
                with_values(&d, |d| {
                    let [x, p, d] = [x, p, d].map(|values: &[f32]| values.as_ptr() as u64);
                    for (dx, dp) in
                        [(to(&mut dx), to(&mut dp)), (to(&mut dx_alone), 0), (0, to(&mut dp_alone))]
                    {
                        // SAFETY: all have the roll-out's sizes.
                        unsafe {
                            let kept = roll_out.forward(host, true, x, p, to(&mut y))?;
                            roll_out.backward(host, kept.unwrap(), p, d, dx, dp)?;
                        }
                    }
                    // SAFETY: as above.
                    let none = unsafe { roll_out.forward(host, false, x, p, to(&mut y_alone))? };
                    assert!(none.is_none());
                    Ok(())
                })
            })
        })
        .unwrap();
        assert_eq!((&dx, &dp), (&dx_alone, &dp_alone), "{case}: one gradient alone");
        assert_close(&format!("{case}: output"), &y, &values(&expected));
        assert_eq!(y, y_alone, "{case}: without gradients");
        assert_close(&format!("{case}: input's gradient"), &dx, &values(of_expected.get(&x).unwrap()));
        // The backward pass through the packing assigns each parameter its gradient.
        let dp = Tensor::from_vec(dp, packed.shape(), &DEVICE).unwrap();
        let of_packed = (packed * dp).unwrap().sum_all().unwrap().backward().unwrap();
        for (i, (weight, bias)) in parameters.iter().enumerate() {
            for (what, var) in [("weight", weight), ("bias", bias)] {
                let (ours, expected) = (of_packed.get(var).unwrap(), of_expected.get(var).unwrap());
                assert_close(&format!("{case}: {what} {i}"), &values(ours), &values(expected));
            }
        }
    }

    #[test]
    fn is_the_cpu_op() {
        let Some(host) = Host::new() else { return };
        // Widths that are multiples of four channels, and others; one layer that reads its own output.
        compare(host, &[4, 8], [1, 3, 4], false, Keep::Last);
        compare(host, &[4, 8], [3, 3, 4], false, Keep::All);
        compare(host, &[8, 4], [4, 3, 4], true, Keep::All);
        compare(host, &[3, 5], [5, 5, 4], true, Keep::Last);
        compare(host, &[4], [4, 1, 4], true, Keep::All);
        compare(host, &[3, 2, 4], [2, 3, 4], false, Keep::All);
        compare(host, &[8, 4], [8, 3, 1], false, Keep::Last);
        compare(host, &[4, 8], [8, 3, 1], true, Keep::All);
        compare(host, &[4, 8], [8, 3, 2], true, Keep::All);
    }
}
