//! The pointwise half of an LSTM cell, forwards and backwards, on 16 channels of a pixel at once.
//!
//! With pre-activations of the gates i, f, o, g: c' = sigmoid(f) c + sigmoid(i) tanh(g), h = sigmoid(o) tanh(c') (Shi et al.,
//! "Convolutional LSTM network", 2015, equation 3, without peepholes). What backward needs is the four activations and both
//! cell states; tanh(c') is computed again.

use crate::activations::{sigmoid, tanh};
use crate::parallel::{self, Shared};
use crate::simd::{Kernel, LANES, Level, Simd};
use crate::winograd::{
    Epilogue, Gradient, OUT, Tile, load_positions, output_tile, output_tile_adjoint, store_positions,
};

/// Gates of a cell: i, f, o, g.
pub(crate) const GATES: usize = 4;
/// Floats of the four gates of 16 channels, in the packed order: i, f, o and g of the first 16 channels, then of the next.
pub(crate) const GROUP: usize = GATES * LANES;

/// Which of the weights' 4 N output channels (all of i, then f, o, g) stands at each place of the packed order.
pub(crate) fn packed_order(hidden: usize) -> Vec<Option<usize>> {
    (0..hidden.div_ceil(LANES) * GROUP)
        .map(|at| {
            let channel = at / GROUP * LANES + at % LANES;
            let gate = at % GROUP / LANES;
            (channel < hidden).then_some(gate * hidden + channel)
        })
        .collect()
}

/// Where the gates of a pixel stand: floats from pixel to pixel, from 16 channels to the next, and from gate to gate.
#[derive(Clone, Copy)]
pub(crate) struct GateLayout {
    pub(crate) pixel: usize,
    pub(crate) group: usize,
    pub(crate) gate: usize,
    /// Whether channels are filled up to whole vectors.
    pub(crate) padded: bool,
}

impl GateLayout {
    pub(crate) fn packed(hidden: usize) -> GateLayout {
        GateLayout { pixel: hidden.div_ceil(LANES) * GROUP, group: GROUP, gate: LANES, padded: true }
    }
    /// (.., 4 N), as PyTorch's `chunk` splits it.
    pub(crate) fn plain(hidden: usize) -> GateLayout {
        GateLayout { pixel: GATES * hidden, group: LANES, gate: hidden, padded: false }
    }
    #[inline(always)]
    fn at(&self, pixel: usize, group: usize, gate: usize) -> usize {
        pixel * self.pixel + group * self.group + gate * self.gate
    }
    #[inline(always)]
    fn lanes(&self, lanes: usize) -> usize {
        if self.padded { LANES } else { lanes }
    }
}

/// States of all pixels at one time step: (batch, pixels, channels), images `image` floats apart.
#[derive(Clone, Copy)]
pub(crate) struct States {
    pub(crate) data: Shared,
    pub(crate) image: usize,
}

impl States {
    #[inline(always)]
    unsafe fn at(&self, image: usize, offset: usize) -> *mut f32 {
        // SAFETY: the caller asks for a pixel that exists.
        unsafe { self.data.at(image * self.image + offset) }
    }
}

/// One step forwards.
#[derive(Clone, Copy)]
pub(crate) struct Forward<'a> {
    /// Added to the pre-activations; in the packed order.
    pub(crate) bias: &'a [f32],
    /// Zero where there is none.
    pub(crate) c_before: Option<States>,
    pub(crate) c: States,
    pub(crate) h: States,
    /// Where the activations are kept for backward.
    pub(crate) kept: Option<Shared>,
    pub(crate) layout: GateLayout,
    pub(crate) hidden: usize,
    /// Pixels of an image, and of a row.
    pub(crate) pixels: usize,
    pub(crate) width: usize,
}

impl Forward<'_> {
    /// A pixel's 16 channels, given the pre-activations with bias.
    /// # Safety
    /// The pixel exists; no other task has it and the group.
    #[inline(always)]
    unsafe fn pixel<S: Simd>(&self, image: usize, pixel: usize, group: usize, gates: [S; GATES]) {
        let channel = group * LANES;
        let lanes = LANES.min(self.hidden - channel);
        let offset = pixel * self.hidden + channel;
        // SAFETY: the caller's promise.
        unsafe {
            let [i, f, o, g] = gates;
            let (i, f, o, g) = (sigmoid(i), sigmoid(f), sigmoid(o), tanh(g));
            let mut c = i.mul(g);
            if let Some(before) = self.c_before {
                c = f.mul_add(S::load_lanes(before.at(image, offset), lanes), c);
            }
            c.store_lanes(self.c.at(image, offset), lanes);
            o.mul(tanh(c)).store_lanes(self.h.at(image, offset), lanes);
            if let Some(kept) = self.kept {
                for (gate, x) in [i, f, o, g].into_iter().enumerate() {
                    let to = kept.at(self.layout.at(image * self.pixels + pixel, group, gate));
                    x.store_lanes(to, self.layout.lanes(lanes));
                }
            }
        }
    }
}

impl Epilogue for Forward<'_> {
    const PANELS: usize = 2;

    #[inline(always)]
    unsafe fn tile<S: Simd>(self, tile: &Tile, group: usize, _width: usize, m: *const f32, stride: usize) {
        // SAFETY: M is readable; the tile's pixels exist, and belong to this task.
        unsafe {
            let mut gates = [[[S::zero(); OUT]; OUT]; GATES];
            for gate in 0..GATES {
                gates[gate] = output_tile(load_positions::<S>(m.add(gate * LANES), stride));
            }
            let mut bias = [S::zero(); GATES];
            for gate in 0..GATES {
                bias[gate] = S::load(self.bias.as_ptr().add(group * GROUP + gate * LANES));
            }
            for r in 0..tile.rows {
                for c in 0..tile.columns {
                    let mut x = bias;
                    for gate in 0..GATES {
                        x[gate] = x[gate].add(gates[gate][r][c]);
                    }
                    self.pixel(tile.image, (tile.y + r) * self.width + tile.x + c, group, x);
                }
            }
        }
    }
}

/// One step backwards.
#[derive(Clone, Copy)]
pub(crate) struct Backward {
    /// The activations that forward kept.
    pub(crate) kept: Shared,
    pub(crate) layout: GateLayout,
    pub(crate) c_before: Option<States>,
    pub(crate) c: States,
    /// The gradient of h; taken: zeros are left, for the sum of the step before.
    pub(crate) dh: Option<States>,
    /// More of it, only read.
    pub(crate) dh_output: Option<States>,
    /// The gradient of c' from later steps; becomes that of c.
    pub(crate) dc: States,
    pub(crate) hidden: usize,
    pub(crate) pixels: usize,
    pub(crate) width: usize,
}

impl Backward {
    /// The gradients of a pixel's pre-activations, 16 channels.
    /// # Safety
    /// The pixel exists; no other task has it and the group.
    #[inline(always)]
    unsafe fn pixel<S: Simd>(&self, image: usize, pixel: usize, group: usize) -> [S; GATES] {
        let channel = group * LANES;
        let lanes = LANES.min(self.hidden - channel);
        let offset = pixel * self.hidden + channel;
        // SAFETY: the caller's promise.
        unsafe {
            let mut gates = [S::zero(); GATES];
            for gate in 0..GATES {
                let from = self.kept.at(self.layout.at(image * self.pixels + pixel, group, gate));
                gates[gate] = S::load_lanes(from, self.layout.lanes(lanes));
            }
            let [i, f, o, g] = gates;
            let one = S::splat(1.);
            let tanh_c = tanh(S::load_lanes(self.c.at(image, offset), lanes));
            let mut dh = S::zero();
            if let Some(states) = self.dh {
                let at = states.at(image, offset);
                dh = S::load_lanes(at, lanes);
                S::zero().store_lanes(at, lanes);
            }
            if let Some(states) = self.dh_output {
                dh = dh.add(S::load_lanes(states.at(image, offset), lanes));
            }
            let at = self.dc.at(image, offset);
            let dc = dh.mul(o).mul_add(tanh_c.neg_mul_add(tanh_c, one), S::load_lanes(at, lanes));
            dc.mul(f).store_lanes(at, lanes);
            let before = match self.c_before {
                Some(before) => S::load_lanes(before.at(image, offset), lanes),
                None => S::zero(),
            };
            // The derivative of the sigmoid is s - s s, that of tanh 1 - t t.
            [
                dc.mul(g).mul(i.neg_mul_add(i, i)),
                dc.mul(before).mul(f.neg_mul_add(f, f)),
                dh.mul(tanh_c).mul(o.neg_mul_add(o, o)),
                dc.mul(i).mul(g.neg_mul_add(g, one)),
            ]
        }
    }
}

impl Gradient for Backward {
    const VECTORS: usize = GATES;

    #[inline(always)]
    unsafe fn tile<S: Simd>(self, tile: &Tile, group: usize, d: *mut f32, stride: usize, block: usize) {
        // SAFETY: D is writable; the tile's pixels exist, and belong to this task.
        unsafe {
            let mut gates = [[[S::zero(); OUT]; OUT]; GATES];
            for r in 0..tile.rows {
                for c in 0..tile.columns {
                    let x = self.pixel::<S>(tile.image, (tile.y + r) * self.width + tile.x + c, group);
                    for gate in 0..GATES {
                        gates[gate][r][c] = x[gate];
                    }
                }
            }
            for gate in 0..GATES {
                store_positions(output_tile_adjoint(gates[gate]), d.add(gate * block), stride);
            }
        }
    }
}

/// Pixels of a task.
const PIXELS: usize = 256;

/// One step forwards from pre-activations in memory.
pub(crate) fn forward(level: Level, images: usize, gates: &[f32], step: Forward) {
    parallel::for_each((images * step.pixels).div_ceil(PIXELS), |task| {
        let pixels = task * PIXELS..(images * step.pixels).min((task + 1) * PIXELS);
        level.run(ForwardPixels { step, gates, pixels });
    });
}

struct ForwardPixels<'a> {
    step: Forward<'a>,
    gates: &'a [f32],
    pixels: std::ops::Range<usize>,
}

impl Kernel for ForwardPixels<'_> {
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let layout = self.step.layout;
        for pixel in self.pixels {
            let (image, pixel_in_image) = (pixel / self.step.pixels, pixel % self.step.pixels);
            for group in 0..self.step.hidden.div_ceil(LANES) {
                let lanes = layout.lanes(LANES.min(self.step.hidden - group * LANES));
                // SAFETY: the pixel exists, and belongs to this task.
                unsafe {
                    let mut x = [S::zero(); GATES];
                    for gate in 0..GATES {
                        x[gate] = S::load_lanes(self.gates.as_ptr().add(layout.at(pixel, group, gate)), lanes);
                    }
                    self.step.pixel(image, pixel_in_image, group, x);
                }
            }
        }
    }
}

/// One step backwards: writes the gradients of the pre-activations, which may take the activations' place.
pub(crate) fn backward(level: Level, images: usize, gradients: Shared, step: Backward) {
    parallel::for_each((images * step.pixels).div_ceil(PIXELS), |task| {
        let pixels = task * PIXELS..(images * step.pixels).min((task + 1) * PIXELS);
        level.run(BackwardPixels { step, gradients, pixels });
    });
}

struct BackwardPixels {
    step: Backward,
    gradients: Shared,
    pixels: std::ops::Range<usize>,
}

impl Kernel for BackwardPixels {
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let layout = self.step.layout;
        for pixel in self.pixels {
            for group in 0..self.step.hidden.div_ceil(LANES) {
                let lanes = layout.lanes(LANES.min(self.step.hidden - group * LANES));
                // SAFETY: the pixel exists, and belongs to this task.
                unsafe {
                    let x = self.step.pixel::<S>(pixel / self.step.pixels, pixel % self.step.pixels, group);
                    for gate in 0..GATES {
                        x[gate].store_lanes(self.gradients.at(layout.at(pixel, group, gate)), lanes);
                    }
                }
            }
        }
    }
}
