//! The pointwise half of an LSTM cell, forward and backward, on 16 channels of a pixel at a time.
//!
//! With pre-activations of the gates i, f, o, g: c' = sigmoid(f) c + sigmoid(i) tanh(g), h = sigmoid(o)
//! tanh(c') (Shi et al., "Convolutional LSTM network", 2015, equation 3, without peepholes). The backward
//! pass needs the four activations and both cell states; it recomputes tanh(c').

use crate::activations::{sigmoid, tanh};
use crate::float::Float;
use crate::parallel::{self, Shared};
use crate::simd::{Kernel, LANES, Level, Simd};
use crate::winograd::{
    Epilogue, Gradient, OUT, Tile, load_positions, output_tile, output_tile_adjoint, prefetch_positions,
    store_positions,
};

/// Gates of a cell: i, f, o, g.
pub(crate) const GATES: usize = 4;
/// Floats of the four gates of 16 channels in the packed order: i, f, o and g of the first 16 channels, then
/// of the next 16.
pub(crate) const GROUP: usize = GATES * LANES;

/// For each place of the packed order: which of the weights' 4 N output channels (all of i, then f, o, g)
/// belongs there.
pub(crate) fn packed_order(hidden: usize) -> Vec<Option<usize>> {
    (0..hidden.div_ceil(LANES) * GROUP)
        .map(|at| {
            let channel = at / GROUP * LANES + at % LANES;
            let gate = at % GROUP / LANES;
            (channel < hidden).then_some(gate * hidden + channel)
        })
        .collect()
}

/// Offsets of the gates and the cell state of 16 channels of a pixel; only cells use these values.
#[derive(Clone, Copy)]
pub(crate) struct Place {
    pub(crate) c: usize,
    pub(crate) gates: usize,
    /// Floats from gate to gate.
    pub(crate) gate: usize,
    pub(crate) lanes: usize,
}

impl Place {
    /// Packed: the four gates of a unit (16 channels of a pixel) are contiguous, and units follow each other.
    #[inline(always)]
    fn unit(index: usize) -> Place {
        Place { c: index * LANES, gates: index * GROUP, gate: LANES, lanes: LANES }
    }
    /// Units by pixel, then by channels.
    #[inline(always)]
    fn packed(pixel: usize, group: usize, hidden: usize) -> Place {
        Place::unit(pixel * hidden.div_ceil(LANES) + group)
    }
    /// Units by tile, then by channels, then by pixel, so the data of one tile is contiguous.
    #[inline(always)]
    fn tiled(tile: &Tile, group: usize, hidden: usize, row: usize, column: usize) -> Place {
        Place::unit((tile.index * hidden.div_ceil(LANES) + group) * OUT * OUT + row * OUT + column)
    }
    /// Tensors (.., N) and (.., 4 N), gates as PyTorch's `chunk` splits them.
    #[inline(always)]
    fn plain(pixel: usize, group: usize, hidden: usize) -> Place {
        let channel = group * LANES;
        let lanes = LANES.min(hidden - channel);
        Place { c: pixel * hidden + channel, gates: pixel * GATES * hidden + channel, gate: hidden, lanes }
    }
}

/// The order of cells whose values are read from memory.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Order {
    Packed,
    Plain,
}

impl Order {
    #[inline(always)]
    fn place(self, pixel: usize, group: usize, hidden: usize) -> Place {
        match self {
            Order::Packed => Place::packed(pixel, group, hidden),
            Order::Plain => Place::plain(pixel, group, hidden),
        }
    }
}

/// Hidden states of all pixels at one time step: (batch, pixels, channels), with images `image` values apart.
#[derive(Clone, Copy)]
pub(crate) struct States<T = f32> {
    pub(crate) data: Shared<T>,
    pub(crate) image: usize,
}

impl<T> States<T> {
    #[inline(always)]
    unsafe fn at(&self, image: usize, offset: usize) -> *mut T {
        // SAFETY: the caller passes a pixel that exists.
        unsafe { self.data.at(image * self.image + offset) }
    }
}

/// One forward step, whose states are saved as `T`.
#[derive(Clone, Copy)]
pub(crate) struct Forward<'a, T> {
    /// Added to the pre-activations; in the packed order.
    pub(crate) bias: &'a [f32],
    /// `None` means zero.
    pub(crate) c_before: Option<Shared>,
    pub(crate) c: Shared,
    pub(crate) h: States,
    /// Where the activations are saved for backward.
    pub(crate) kept: Option<Shared<T>>,
    /// Where the states are written a second time, to be saved.
    pub(crate) c_kept: Option<Shared<T>>,
    pub(crate) h_kept: Option<States<T>>,
    pub(crate) hidden: usize,
    /// Pixels of an image.
    pub(crate) pixels: usize,
    pub(crate) width: usize,
}

impl<T: Float> Forward<'_, T> {
    /// Computes a pixel's 16 channels, given the pre-activations with bias.
    /// # Safety
    /// The pixel exists, and no other task handles this pixel and group.
    #[inline(always)]
    unsafe fn pixel<S: Simd>(&self, image: usize, pixel: usize, group: usize, at: Place, gates: [S; GATES]) {
        let channel = group * LANES;
        let lanes = LANES.min(self.hidden - channel);
        let offset = pixel * self.hidden + channel;
        // SAFETY: guaranteed by the caller.
        unsafe {
            let [i, f, o, g] = gates;
            let (i, f, o, g) = (sigmoid(i), sigmoid(f), sigmoid(o), tanh(g));
            let mut c = i.mul(g);
            if let Some(before) = self.c_before {
                c = f.mul_add(S::load_lanes(before.at(at.c), at.lanes), c);
            }
            c.store_lanes(self.c.at(at.c), at.lanes);
            let h = o.mul(tanh(c));
            h.store_lanes(self.h.at(image, offset), lanes);
            if let Some(kept) = self.kept {
                for (gate, x) in [i, f, o, g].into_iter().enumerate() {
                    T::store_lanes(x, kept.at(at.gates + gate * at.gate), at.lanes);
                }
            }
            if let Some(kept) = self.c_kept {
                T::store_lanes(c, kept.at(at.c), at.lanes);
            }
            if let Some(kept) = self.h_kept {
                T::store_lanes(h, kept.at(image, offset), lanes);
            }
        }
    }
}

impl<T: Float> Epilogue for Forward<'_, T> {
    const PANELS: usize = 2;

    #[inline(always)]
    unsafe fn tile<S: Simd>(self, tile: &Tile, group: usize, _width: usize, m: *const f32, stride: usize) {
        // SAFETY: M is readable; the tile's pixels exist and belong to this task only.
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
                    let at = Place::tiled(tile, group, self.hidden, r, c);
                    self.pixel(tile.image, (tile.y + r) * self.width + tile.x + c, group, at, x);
                }
            }
        }
    }
}

/// One backward step, from the values that the forward pass saved as `T`.
#[derive(Clone, Copy)]
pub(crate) struct Backward<T> {
    /// The activations saved by the forward pass.
    pub(crate) kept: Shared<T>,
    pub(crate) c_before: Option<Shared<T>>,
    pub(crate) c: Shared<T>,
    /// The gradient of h; read and reset to zero, ready to accumulate the gradient of an earlier step.
    pub(crate) dh: Option<States>,
    /// A second contribution to the gradient of h; only read.
    pub(crate) dh_output: Option<States<T>>,
    /// In: the gradient of c' from later steps. Out: the gradient of c.
    pub(crate) dc: Shared,
    pub(crate) hidden: usize,
    pub(crate) pixels: usize,
    pub(crate) width: usize,
}

impl<T: Float> Backward<T> {
    /// The gradients of a pixel's pre-activations, 16 channels.
    /// # Safety
    /// The pixel exists, and no other task handles this pixel and group.
    #[inline(always)]
    unsafe fn pixel<S: Simd>(&self, image: usize, pixel: usize, group: usize, at: Place) -> [S; GATES] {
        let channel = group * LANES;
        let lanes = LANES.min(self.hidden - channel);
        let offset = pixel * self.hidden + channel;
        // SAFETY: guaranteed by the caller.
        unsafe {
            let mut gates = [S::zero(); GATES];
            for gate in 0..GATES {
                gates[gate] = T::load_lanes(self.kept.at(at.gates + gate * at.gate), at.lanes);
            }
            let [i, f, o, g] = gates;
            let one = S::splat(1.);
            let tanh_c = tanh::<S>(T::load_lanes(self.c.at(at.c), at.lanes));
            let mut dh = S::zero();
            if let Some(states) = self.dh {
                let taken = states.at(image, offset);
                dh = S::load_lanes(taken, lanes);
                S::zero().store_lanes(taken, lanes);
            }
            if let Some(states) = self.dh_output {
                dh = dh.add(T::load_lanes(states.at(image, offset), lanes));
            }
            let later = self.dc.at(at.c);
            let dc = dh.mul(o).mul_add(tanh_c.neg_mul_add(tanh_c, one), S::load_lanes(later, at.lanes));
            dc.mul(f).store_lanes(later, at.lanes);
            let before = match self.c_before {
                Some(before) => T::load_lanes(before.at(at.c), at.lanes),
                None => S::zero(),
            };
            // The derivative of the sigmoid s is s - s s, that of tanh t is 1 - t t.
            [
                dc.mul(g).mul(i.neg_mul_add(i, i)),
                dc.mul(before).mul(f.neg_mul_add(f, f)),
                dh.mul(tanh_c).mul(o.neg_mul_add(o, o)),
                dc.mul(i).mul(g.neg_mul_add(g, one)),
            ]
        }
    }
}

impl<T: Float> Backward<T> {
    /// Prefetches the values of the next tile or group: it begins on another page, which the hardware
    /// prefetcher does not reach by itself.
    #[inline(always)]
    fn prefetch_next<S: Simd>(&self, at: Place) {
        const UNITS: usize = OUT * OUT;
        for gate in 0..GATES {
            self.kept.prefetch::<S>(at.gates + UNITS * GROUP + gate * LANES);
        }
        for c in [Some(self.c), self.c_before].into_iter().flatten() {
            c.prefetch::<S>(at.c + UNITS * LANES);
        }
    }
}

impl<T: Float> Gradient for Backward<T> {
    const VECTORS: usize = GATES;

    #[inline(always)]
    unsafe fn tile<S: Simd>(self, tile: &Tile, group: usize, d: *mut f32, stride: usize, block: usize) {
        for gate in 0..GATES {
            prefetch_positions::<S>(d.wrapping_add(gate * block), stride);
        }
        // SAFETY: D is writable; the tile's pixels exist and belong to this task only.
        unsafe {
            let mut gates = [[[S::zero(); OUT]; OUT]; GATES];
            for r in 0..tile.rows {
                for c in 0..tile.columns {
                    let at = Place::tiled(tile, group, self.hidden, r, c);
                    self.prefetch_next::<S>(at);
                    let x = self.pixel::<S>(tile.image, (tile.y + r) * self.width + tile.x + c, group, at);
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

/// Pixels per task.
const PIXELS: usize = 256;

/// One forward step from pre-activations in memory.
pub(crate) fn forward<T: Float>(level: Level, images: usize, gates: &[f32], order: Order, step: Forward<T>) {
    parallel::for_each((images * step.pixels).div_ceil(PIXELS), |task| {
        let pixels = task * PIXELS..(images * step.pixels).min((task + 1) * PIXELS);
        level.run(ForwardPixels { step, gates, order, pixels });
    });
}

struct ForwardPixels<'a, T> {
    step: Forward<'a, T>,
    gates: &'a [f32],
    order: Order,
    pixels: std::ops::Range<usize>,
}

impl<T: Float> Kernel for ForwardPixels<'_, T> {
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        for pixel in self.pixels {
            for group in 0..self.step.hidden.div_ceil(LANES) {
                let at = self.order.place(pixel, group, self.step.hidden);
                // SAFETY: the pixel exists and belongs to this task only.
                unsafe {
                    let mut x = [S::zero(); GATES];
                    for gate in 0..GATES {
                        x[gate] = S::load_lanes(self.gates.as_ptr().add(at.gates + gate * at.gate), at.lanes);
                    }
                    self.step.pixel(pixel / self.step.pixels, pixel % self.step.pixels, group, at, x);
                }
            }
        }
    }
}

/// One backward step: writes the gradients of the pre-activations, which may overwrite the activations.
pub(crate) fn backward<T: Float>(
    level: Level,
    images: usize,
    gradients: Shared,
    order: Order,
    step: Backward<T>,
) {
    parallel::for_each((images * step.pixels).div_ceil(PIXELS), |task| {
        let pixels = task * PIXELS..(images * step.pixels).min((task + 1) * PIXELS);
        level.run(BackwardPixels { step, gradients, order, pixels });
    });
}

struct BackwardPixels<T> {
    step: Backward<T>,
    gradients: Shared,
    order: Order,
    pixels: std::ops::Range<usize>,
}

impl<T: Float> Kernel for BackwardPixels<T> {
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        for pixel in self.pixels {
            for group in 0..self.step.hidden.div_ceil(LANES) {
                let at = self.order.place(pixel, group, self.step.hidden);
                // SAFETY: the pixel exists and belongs to this task only.
                unsafe {
                    let x =
                        self.step.pixel::<S>(pixel / self.step.pixels, pixel % self.step.pixels, group, at);
                    for gate in 0..GATES {
                        x[gate].store_lanes(self.gradients.at(at.gates + gate * at.gate), at.lanes);
                    }
                }
            }
        }
    }
}
