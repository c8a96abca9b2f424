//! Storage for a roll-out's states and for the tensors saved for its backward pass.

use super::{Keep, RollOut};
use crate::buffer::Buffer;
use crate::cell::{self, GROUP, States};
use crate::float::Float;
use crate::parallel::Shared;
use crate::simd::LANES;
use crate::winograd::Images;

/// Hidden states: the last `depth` steps of each layer; the top layer's states may be stored in the output
/// itself.
pub(super) struct Hidden<T> {
    pub(super) layers: Vec<Shared<T>>,
    pub(super) depth: usize,
    pub(super) output: Option<Shared<T>>,
}

impl<T> Hidden<T> {
    pub(super) fn states(&self, r: &RollOut, layer: usize, step: usize) -> States<T> {
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
    pub(super) fn images(&self, r: &RollOut, layer: usize, step: usize) -> Images<T> {
        let states = self.states(r, layer, step);
        // SAFETY: only the address is taken.
        Images { data: unsafe { states.data.at(0) }, image: states.image, channels: r.layers[layer].hidden }
    }
}

/// Tensors saved by the forward pass for the backward pass: all steps of each layer.
pub(super) struct Kept<T> {
    pub(super) activations: Vec<Buffer<T>>,
    pub(super) c: Vec<Buffer<T>>,
    /// Empty for a top layer whose states are all in the output.
    pub(super) h: Vec<Buffer<T>>,
}

impl<T: Float> Kept<T> {
    pub(super) fn new(r: &RollOut) -> Self {
        Kept {
            activations: r.layers.iter().map(|l| Buffer::of(r.steps * r.cells(l) * GROUP)).collect(),
            c: r.layers.iter().map(|l| Buffer::of(r.steps * r.cells(l) * LANES)).collect(),
            h: r.hidden_buffers(r.steps, r.keep == Keep::All),
        }
    }
}

pub(super) fn shared<T: Float>(buffers: &mut [Buffer<T>]) -> Vec<Shared<T>> {
    buffers.iter_mut().map(|buffer| Shared::new(buffer)).collect()
}

/// Where the forward pass stores its states. The states passed from step to step are f32. If the saved or
/// returned states are f32 too, they share that memory; otherwise they are separate copies.
pub(super) struct Memory<T> {
    pub(super) h: Hidden<f32>,
    pub(super) c: Vec<Shared>,
    pub(super) c_depth: usize,
    /// Saved for backward; `activations` and `c_kept` are empty if nothing is saved.
    pub(super) activations: Vec<Shared<T>>,
    pub(super) c_kept: Vec<Shared<T>>,
    pub(super) h_kept: Hidden<T>,
    /// Keeps the buffers of unsaved states alive.
    _own: [Vec<Buffer>; 2],
}

impl<T: Float> Memory<T> {
    pub(super) fn new(r: &RollOut, kept: Option<&mut Kept<T>>, output: &mut [T]) -> Self {
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
        // Two hidden states, one read and one written, and one cell state.
        let mut h_own = r.hidden_buffers(2, output.is_some());
        let mut c_own: Vec<Buffer> = r.layers.iter().map(|l| Buffer::new(r.cells(l) * LANES)).collect();
        let h = Hidden { layers: shared(&mut h_own), depth: 2, output };
        let c = shared(&mut c_own);
        Memory { h, c, c_depth: 1, activations, c_kept, h_kept, _own: [h_own, c_own] }
    }

    /// One step of a layer's cells.
    pub(super) fn step<'a>(
        &self,
        r: &RollOut,
        index: usize,
        step: usize,
        bias: &'a [f32],
    ) -> cell::Forward<'a, T> {
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
