//! The backward pass of a roll-out.

use super::forward::select;
use super::memory::{Hidden, Kept, shared};
use super::{Keep, Layer, RollOut};
use crate::buffer::Buffer;
use crate::cell::{self, GROUP, Order, States, packed_order};
use crate::direct::{self, Geometry, OutputImages};
use crate::float::Float;
use crate::parallel::Shared;
use crate::simd::{LANES, Level};
use crate::winograd::{self, Filters, Images, InputGradient, Panels, Source};

/// The inverse of `select` for gradients: adds `selected` to a layer's weight gradient.
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

/// The weights, and their gradients, of one of a layer's two inputs: x or its own hidden state.
struct Side {
    first: usize,
    channels: usize,
    /// If the gradient of this input is wanted: transposed panels (3x3 kernels) or plain weights.
    panels: Option<Panels>,
    weights: Option<Vec<f32>>,
    /// If the gradient of the weights is wanted: its sums, in the same two forms.
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

    /// This side as a source of the Winograd backward pass: its values, and where their gradient is added, if
    /// anywhere.
    fn source<T>(&mut self, images: Images<T>, to: Option<States>) -> Source<'_, T> {
        let input = match (&self.panels, to) {
            (Some(filters), Some(to)) => Some(InputGradient { filters, data: to.data, image: to.image }),
            _ => None,
        };
        Source { images, filters: self.panel_sums.as_deref_mut(), input }
    }

    /// The direct backward pass of this side, from the gradient of the gates.
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

    /// Adds the sums to the layer's weight gradient.
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

/// The gradients of the input and of the parameters, if wanted.
#[expect(clippy::too_many_arguments, reason = "the arguments of the op's backward")]
pub(super) fn backward<T: Float>(
    level: Level,
    r: &RollOut,
    mut kept: Kept<T>,
    input: &[T],
    parameters: &[f32],
    output: &[T],
    d_output: &[T],
    (wants_input, wants_parameters): (bool, bool),
) -> MaybeGradients<T> {
    // The unsafe code below relies on these lengths.
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

    // The gradients of the hidden states of this step and the previous one, in alternating halves
    // (cell::Backward leaves zeros behind), and of the cell states.
    let mut dh: Vec<Buffer> = (0..r.layers.len()).map(|l| Buffer::zeroed(2 * r.state(l))).collect();
    let dh = shared(&mut dh);
    // SAFETY: the buffer of a layer holds two steps.
    let dh_at = |layer: usize, step: usize| unsafe { dh[layer].offset(step % 2 * r.state(layer)) };
    let mut dc: Vec<Buffer> = r.layers.iter().map(|l| Buffer::zeroed(r.cells(l) * LANES)).collect();
    let hidden = Hidden {
        layers: shared(&mut kept.h),
        depth: r.steps,
        output: (r.keep == Keep::All).then(|| Shared::read(output)),
    };
    let d_output = Shared::read(d_output);
    // Gate gradients of one step, for layers whose kernel is not 3x3.
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
            // Destinations of the gradients of x and of the previous hidden state.
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
