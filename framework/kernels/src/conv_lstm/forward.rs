//! The forward pass of a roll-out.

use super::memory::{Kept, Memory};
use super::{Keep, Layer, RollOut};
use crate::buffer::Buffer;
use crate::cell::{self, Order, packed_order};
use crate::direct::{self, OutputImages};
use crate::float::{Float, convert};
use crate::parallel::Shared;
use crate::simd::Level;
use crate::winograd::{self, ColumnOrder, Filters, Images, Panels};

/// A layer's weights in the layout that the forward pass reads.
enum Weights {
    Winograd(Panels),
    /// For the inputs and for the hidden channels: (packed gates, channels, k, k) each.
    Direct(Vec<f32>, Vec<f32>),
}

/// The weights of some of a layer's input channels, with gates in the packed order, for kernels that are not
/// 3x3.
pub(super) fn select(layer: &Layer, weights: &[f32], first: usize, count: usize) -> Vec<f32> {
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

pub(super) fn forward<T: Float>(
    level: Level,
    r: &RollOut,
    gradients: bool,
    input: &[T],
    parameters: &[f32],
) -> (Vec<T>, Option<Kept<T>>) {
    // The unsafe code below relies on these lengths.
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
            // The initial state is zero, so its half of the convolution is skipped.
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
        // SAFETY: one step's states have as many values as the output, and nothing writes them any more.
        let last = unsafe { std::slice::from_raw_parts(last.at(0), r.output_len()) };
        convert(level, last, &mut output);
    }
    (output, kept)
}
