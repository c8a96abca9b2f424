//! Depthwise convolution, one filter per channel, on channels-last images.
//!
//! Each task copies some channels of a band of an image's rows to a [`Tile`] that stays in the cache, where
//! pixels are neighbours; in the image itself they are often a large power of two apart. Everything that
//! depends on the band is computed from the tile, so each image is read once and each result is written once.

use super::{Geometry, OutputImages, halvings};
use crate::buffer::Buffer;
use crate::float::Float;
use crate::parallel::{self, Shared};
use crate::simd::{Kernel, LANES, Level, Simd};
use crate::winograd::Images;
use std::ops::Range;

/// Floats per tile, if that is enough for more than the rows that neighbouring bands share.
const TILE: usize = 48 << 10;
/// Maximum vectors of channels in a tile; pixels with more contiguous channels are quicker to read.
const VECTORS: usize = 8;
/// Pixels summed at once.
const PIXELS: usize = 8;
/// Taps whose gradients are summed at once.
const TAPS: usize = 5;

/// y = x * w + bias, or y += x * w (then without bias).
pub(super) fn forward<T: Float>(
    level: Level,
    g: &Geometry,
    x: Images<T>,
    weight: &[f32],
    bias: Option<&[f32]>,
    y: OutputImages,
) {
    let g = &upright(g);
    let weights = Packed::new(g, weight, bias);
    let bands = Bands::new(g, g.out_height, g.stride);
    let taps: Vec<isize> = Tile::of_inputs(g, 0..1).taps(g, bands.vectors).collect();
    let scratch = || Buffer::new(bands.tiles(|band| Tile::of_inputs(g, bands.rows(band, g.out_height))));
    parallel::for_each_with(bands.tasks(g), scratch, |task, tile| {
        let part = bands.part(g, task);
        let rows = bands.rows(part.band, g.out_height);
        level.run(Forward { g, part, rows, x, filters: Filters { weights: &weights, taps: &taps }, y, tile });
    });
}

/// The gradient of the input: dx = dy * w' (+ bias, for the transposed convolution), or dx += dy * w'.
pub(super) fn backward_input<T: Float>(
    level: Level,
    g: &Geometry,
    dy: Images<T>,
    weight: &[f32],
    bias: Option<&[f32]>,
    dx: OutputImages,
) {
    let weights = Packed::new(g, weight, bias);
    backward::<f32, T>(level, &upright(g), dy, Some(InputGradient { weights: &weights, dx }), None);
}

/// Adds the gradient of the weights to dw, in PyTorch's layout.
pub(super) fn backward_weight<T: Float>(
    level: Level,
    g: &Geometry,
    x: Images<T>,
    dy: Images,
    dw: &mut [f32],
) {
    backward(level, &upright(g), dy, None, Some(WeightGradients { x, dw, db: None }));
}

/// All gradients at once: dx is written, dw and db are added to.
#[expect(clippy::too_many_arguments, reason = "a convolution's backward pass has as many operands")]
pub(crate) fn backward_depthwise<T: Float>(
    level: Level,
    g: &Geometry,
    x: Images<T>,
    weight: &[f32],
    dy: Images,
    dx: OutputImages,
    dw: &mut [f32],
    db: Option<&mut [f32]>,
) {
    let weights = Packed::new(g, weight, None);
    let input = InputGradient { weights: &weights, dx };
    backward(level, &upright(g), dy, Some(input), Some(WeightGradients { x, dw, db }));
}

/// The weights for the gradient of the input, and its destination.
#[derive(Clone, Copy)]
struct InputGradient<'a> {
    weights: &'a Packed,
    dx: OutputImages,
}

/// The input for the other gradients, and the gradients to add to.
struct WeightGradients<'a, T> {
    x: Images<T>,
    dw: &'a mut [f32],
    db: Option<&'a mut [f32]>,
}

fn backward<T: Float, D: Float>(
    level: Level,
    g: &Geometry,
    dy: Images<D>,
    input: Option<InputGradient>,
    weight: Option<WeightGradients<T>>,
) {
    let bands = Bands::new(g, g.height.max(g.out_height * g.stride), 1);
    // Later taps read earlier outputs.
    let outer_taps: Vec<isize> =
        Tile::of_outputs(g, 0..1, 0..1).taps(g, bands.vectors).map(|offset| -offset).collect();
    let inner_taps: Vec<isize> = Tile::of_inputs(g, 0..1).taps(g, bands.vectors).collect();
    let taps = g.taps();
    let row = vectors(g) * LANES;
    // Each image and band has its own sums: one row per tap, and one for the output gradients.
    let part = (taps + 1) * row;
    let mut sums = Buffer::new(if weight.is_some() { g.batch * bands.count * part } else { 0 });
    let all_sums = Shared::new(&mut sums);
    let x = weight.as_ref().map(|of| of.x);
    let outer = |band| Tile::of_outputs(g, bands.rows(band, g.height), bands.rows(band, g.out_height));
    let inner = |band| Tile::of_inputs(g, bands.rows(band, g.out_height));
    let outer_floats = bands.tiles(outer);
    let scratch = || Buffer::new(outer_floats + if x.is_some() { bands.tiles(inner) } else { 0 });
    parallel::for_each_with(bands.tasks(g), scratch, |task, scratch| {
        let of = bands.part(g, task);
        let (tile, x_tile) = scratch.split_at_mut(outer_floats);
        // SAFETY: this is within the sums of this image and band.
        let sums = x
            .map(|x| (x, unsafe { all_sums.offset((of.image * bands.count + of.band) * part + of.channel) }));
        level.run(Backward {
            g,
            part: of,
            inputs: bands.rows(of.band, g.height),
            outputs: bands.rows(of.band, g.out_height),
            dy,
            input: input.map(|InputGradient { weights, dx }| (Filters { weights, taps: &outer_taps }, dx)),
            sums,
            taps: &inner_taps,
            tile,
            x_tile,
        });
    });
    let Some(WeightGradients { dw, db, .. }) = weight else { return };
    let (total, others) = sums.split_at_mut(part);
    parallel::add_all(total, others);
    let out = Shared::new(dw);
    parallel::for_rows(g.groups, taps, |channels| {
        for channel in channels {
            // SAFETY: each channel belongs to exactly one task.
            let weights = unsafe { std::slice::from_raw_parts_mut(out.at(channel * taps), taps) };
            weights.iter_mut().enumerate().for_each(|(tap, w)| *w += total[tap * row + channel]);
        }
    });
    if let Some(db) = db {
        db.iter_mut().zip(&total[taps * row..]).for_each(|(sum, x)| *sum += x);
    }
}

/// Turns an image that is a single row into a column with the same memory layout, because only columns are
/// split into bands.
fn upright(g: &Geometry) -> Geometry {
    let is_row = (g.height, g.kernel_height, g.padding) == (1, 1, 0);
    if !is_row {
        return *g;
    }
    Geometry {
        height: g.width,
        width: 1,
        kernel_height: g.kernel_width,
        kernel_width: 1,
        out_height: g.out_width,
        out_width: 1,
        ..*g
    }
}

/// Number of vectors that hold all channels.
fn vectors(g: &Geometry) -> usize {
    g.groups.div_ceil(LANES)
}

/// Weights and bias in blocks of 16 channels, padded with zeros after the last channel.
struct Packed {
    /// `[vector][tap][lane]`
    taps: Buffer,
    bias: Buffer,
}

impl Packed {
    fn new(g: &Geometry, weight: &[f32], bias: Option<&[f32]>) -> Self {
        let taps = g.taps();
        let mut packed = Buffer::zeroed(vectors(g) * taps * LANES);
        for (channel, weights) in weight.chunks_exact(taps).enumerate() {
            let to = &mut packed[channel / LANES * taps * LANES + channel % LANES..];
            to.iter_mut().step_by(LANES).zip(weights).for_each(|(to, weight)| *to = *weight);
        }
        let mut row = Buffer::zeroed(vectors(g) * LANES);
        if let Some(bias) = bias {
            row[..bias.len()].copy_from_slice(bias);
        }
        Packed { taps: packed, bias: row }
    }
}

/// How images are split so that each part's tile stays in the cache: into bands of rows, and by channels.
struct Bands {
    count: usize,
    /// Vectors of channels per part.
    vectors: usize,
}

impl Bands {
    /// Bands for `rows` rows, each of which moves the kernel by `stride`.
    fn new(g: &Geometry, rows: usize, stride: usize) -> Self {
        // Rows of a band's tile beyond the band's own.
        let shared = g.dilation * (g.kernel_height - 1);
        let width = g.width + 2 * g.padding + g.dilation * (g.kernel_width - 1);
        let fit = |vectors: usize| TILE / (width * LANES * vectors);
        let enough = (4 * shared).clamp(1, rows * stride + shared);
        let vectors = halvings(VECTORS).find(|n| fit(*n) >= enough).unwrap_or(1);
        let vectors = vectors.min(self::vectors(g));
        let band = fit(vectors).saturating_sub(shared).max(shared) / stride;
        Bands { count: rows.div_ceil(band.max(1)).max(1), vectors }
    }
    /// The rows of a band, out of `all` rows.
    fn rows(&self, band: usize, all: usize) -> Range<usize> {
        band * all / self.count..(band + 1) * all / self.count
    }
    /// Floats of the largest tile.
    fn tiles(&self, tile: impl Fn(usize) -> Tile) -> usize {
        (0..self.count).map(|band| tile(band).pixels()).max().unwrap_or(0) * self.vectors * LANES
    }
    fn tasks(&self, g: &Geometry) -> usize {
        g.batch * self.count * vectors(g).div_ceil(self.vectors)
    }
    fn part(&self, g: &Geometry, task: usize) -> Part {
        let in_band = vectors(g).div_ceil(self.vectors);
        let channel = task % in_band * self.vectors * LANES;
        let channels = (self.vectors * LANES).min(g.groups - channel);
        let rest = task / in_band;
        let (image, band) = (rest / self.count, rest % self.count);
        Part { image, band, channel, channels, pixel: self.vectors * LANES }
    }
}

/// The work of one task: a band of an image, and some channels.
#[derive(Clone, Copy)]
struct Part {
    image: usize,
    band: usize,
    channel: usize,
    channels: usize,
    /// Floats from one pixel of a tile to the next.
    pixel: usize,
}

impl Part {
    /// The first channel of each vector, relative to the part's first channel, and its number of lanes.
    #[inline(always)]
    fn vectors(self) -> impl Iterator<Item = (usize, usize)> {
        (0..self.channels).step_by(LANES).map(move |first| (first, LANES.min(self.channels - first)))
    }
}

/// A part of an image, with zeros beyond the image's edges and between its pixels: rows from `top`, columns
/// from `left`, and some vectors of channels per pixel.
#[derive(Clone, Copy)]
struct Tile {
    top: isize,
    left: isize,
    height: usize,
    width: usize,
}

impl Tile {
    /// The inputs that these rows of outputs read.
    fn of_inputs(g: &Geometry, rows: Range<usize>) -> Tile {
        if rows.is_empty() {
            return Tile { top: 0, left: 0, height: 0, width: 0 };
        }
        let size = |outputs: usize, kernel: usize| (outputs - 1) * g.stride + g.dilation * (kernel - 1) + 1;
        Tile {
            top: (rows.start * g.stride) as isize - g.padding as isize,
            left: -(g.padding as isize),
            height: size(rows.len(), g.kernel_height),
            width: size(g.out_width, g.kernel_width),
        }
    }

    /// The outputs that read these rows of inputs, and these rows of outputs. Neighbours are `stride` apart,
    /// so the gradient of the input is a convolution of stride 1.
    fn of_outputs(g: &Geometry, inputs: Range<usize>, outputs: Range<usize>) -> Tile {
        let along = |inputs: Range<usize>, outputs: Range<usize>, kernel: usize| -> Range<isize> {
            let at = |x: usize| x as isize;
            let of_inputs =
                at(inputs.start + g.padding) - at(g.dilation * (kernel - 1))..at(inputs.end + g.padding);
            let of_outputs = at(outputs.start * g.stride)..at(outputs.end * g.stride);
            match (inputs.is_empty(), outputs.is_empty()) {
                (true, _) => of_outputs,
                (false, true) => of_inputs,
                _ => of_inputs.start.min(of_outputs.start)..of_inputs.end.max(of_outputs.end),
            }
        };
        let rows = along(inputs, outputs, g.kernel_height);
        let columns = along(0..g.width, 0..g.out_width, g.kernel_width);
        Tile { top: rows.start, left: columns.start, height: rows.len(), width: columns.len() }
    }

    fn pixels(&self) -> usize {
        self.height * self.width
    }

    /// The offset of each tap of a kernel from the first, in a tile with `vectors` vectors per pixel.
    fn taps(&self, g: &Geometry, vectors: usize) -> impl Iterator<Item = isize> + use<> {
        let (width, dilation, kernel) = (self.width, g.dilation, g.kernel_width);
        (0..g.taps())
            .map(move |tap| ((tap / kernel * width + tap % kernel) * dilation * vectors * LANES) as isize)
    }

    /// Copies the part's channels of an image into the tile, with pixels `step` apart.
    ///
    /// # Safety
    /// `image` points to the first of these channels of an image of that height and width, whose pixels are
    /// `channels` values apart.
    #[inline(always)]
    unsafe fn fill<S: Simd, T: Float>(
        &self,
        tile: &mut [f32],
        part: Part,
        image: *const T,
        [height, width, channels]: [usize; 3],
        step: usize,
    ) {
        let tile = &mut tile[..self.pixels() * part.pixel];
        tile.fill(0.);
        let first = |edge: isize| (edge.max(0) as usize).div_ceil(step);
        let end = |edge: isize, size: usize, all: usize| {
            all.min(((edge + size as isize).max(0) as usize).div_ceil(step))
        };
        for j in first(self.top)..end(self.top, self.height, height) {
            for i in first(self.left)..end(self.left, self.width, width) {
                let at = |x: usize, edge: isize| ((x * step) as isize - edge) as usize;
                // SAFETY: the pixel is inside the image and inside the tile.
                unsafe {
                    let from = image.add((j * width + i) * channels);
                    let to = (at(j, self.top) * self.width + at(i, self.left)) * part.pixel;
                    for (first, lanes) in part.vectors() {
                        let x: S = T::load_lanes(from.add(first), lanes);
                        x.store(tile.as_mut_ptr().add(to + first));
                    }
                }
            }
        }
    }
}

/// Weights, and the offset of each tap in a tile.
#[derive(Clone, Copy)]
struct Filters<'a> {
    weights: &'a Packed,
    taps: &'a [isize],
}

/// The forward pass of a band of outputs.
struct Forward<'a, T> {
    g: &'a Geometry,
    part: Part,
    rows: Range<usize>,
    x: Images<T>,
    filters: Filters<'a>,
    y: OutputImages,
    tile: &'a mut [f32],
}

impl<T: Float> Kernel for Forward<'_, T> {
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let Self { g, part, rows, x, filters, y, tile: data } = self;
        let tile = Tile::of_inputs(g, rows.clone());
        // SAFETY: the band lies inside both images; each task has its own outputs.
        unsafe {
            let image = x.data.add(part.image * x.image + part.channel);
            tile.fill::<S, T>(data, part, image, [g.height, g.width, g.groups], 1);
            for j in rows.clone() {
                let from = data.as_ptr().add((j - rows.start) * g.stride * tile.width * part.pixel);
                let to = y.data.at(part.image * y.image + j * g.out_width * g.groups + part.channel);
                filters.convolve::<S>(part, from, g.stride, to, [g.out_width, g.groups], y.add);
            }
        }
    }
}

impl Filters<'_> {
    /// Computes a row of pixels, each a weighted sum over the taps; the places that consecutive pixels read
    /// are `step` pixels apart in the tile.
    #[inline(always)]
    unsafe fn convolve<S: Simd>(
        &self,
        part: Part,
        from: *const f32,
        step: usize,
        to: *mut f32,
        [pixels, channels]: [usize; 2],
        add: bool,
    ) {
        let mut i = 0;
        while i < pixels {
            let many = pixels - i >= PIXELS;
            for (first, lanes) in part.vectors() {
                // SAFETY: guaranteed by the caller.
                unsafe {
                    let from = (from.add(i * step * part.pixel + first), step * part.pixel);
                    let to = (to.add(i * channels + first), channels);
                    if many {
                        self.block::<S, PIXELS>(part.channel + first, lanes, from, to, add);
                    } else {
                        self.block::<S, 1>(part.channel + first, lanes, from, to, add);
                    }
                }
            }
            i += if many { PIXELS } else { 1 };
        }
    }

    /// Computes one vector of channels of `N` pixels; `from` and `to` each give the first pixel's address and
    /// the floats from pixel to pixel.
    #[inline(always)]
    unsafe fn block<S: Simd, const N: usize>(
        &self,
        channel: usize,
        lanes: usize,
        (from, step): (*const f32, usize),
        (to, to_step): (*mut f32, usize),
        add: bool,
    ) {
        // SAFETY: guaranteed by the caller.
        unsafe {
            let mut sums = [S::load(self.weights.bias.as_ptr().add(channel)); N];
            if add {
                for i in 0..N {
                    sums[i] = S::load_lanes(to.add(i * to_step), lanes);
                }
            }
            let mut weight = self.weights.taps.as_ptr().add(channel * self.taps.len());
            for tap in self.taps {
                let (w, from) = (S::load(weight), from.offset(*tap));
                for i in 0..N {
                    sums[i] = S::load(from.add(i * step)).mul_add(w, sums[i]);
                }
                weight = weight.add(LANES);
            }
            if lanes == LANES {
                for i in 0..N {
                    sums[i].store(to.add(i * to_step));
                }
            } else {
                for i in 0..N {
                    sums[i].store_first(to.add(i * to_step), lanes);
                }
            }
        }
    }
}

/// The input gradients of a band, and the contribution of a band of outputs to the weight gradients.
struct Backward<'a, T, D> {
    g: &'a Geometry,
    part: Part,
    inputs: Range<usize>,
    outputs: Range<usize>,
    dy: Images<D>,
    input: Option<(Filters<'a>, OutputImages)>,
    sums: Option<(Images<T>, Shared)>,
    /// Offset of each tap in the tile of inputs.
    taps: &'a [isize],
    tile: &'a mut [f32],
    x_tile: &'a mut [f32],
}

impl<T: Float, D: Float> Kernel for Backward<'_, T, D> {
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let Self { g, part, inputs, outputs, dy, input, sums, taps, tile: data, x_tile } = self;
        let tile = Tile::of_outputs(g, inputs.clone(), outputs.clone());
        // SAFETY: the band lies inside all images; each task has its own gradients and its own sums.
        unsafe {
            let image = dy.data.add(part.image * dy.image + part.channel);
            tile.fill::<S, D>(data, part, image, [g.out_height, g.out_width, g.groups], g.stride);
            // The address of a row and column of the tile.
            let at = |row: usize, column: usize| {
                let (row, column) = (row as isize - tile.top, column as isize - tile.left);
                data.as_ptr().offset((row * tile.width as isize + column) * part.pixel as isize)
            };
            if let Some((filters, dx)) = input {
                for y in inputs {
                    let from = at(y + g.padding, g.padding);
                    let to = dx.data.at(part.image * dx.image + y * g.width * g.groups + part.channel);
                    filters.convolve::<S>(part, from, 1, to, [g.width, g.groups], dx.add);
                }
            }
            let Some((x, sums)) = sums else { return };
            let inner = Tile::of_inputs(g, outputs.clone());
            let image = x.data.add(part.image * x.image + part.channel);
            inner.fill::<S, T>(x_tile, part, image, [g.height, g.width, g.groups], 1);
            let row = vectors(g) * LANES;
            let pixels = Pixels { count: g.out_width, step: g.stride * part.pixel };
            for (first, _) in part.vectors() {
                let rows = || {
                    outputs.clone().map(|j| {
                        let x = (j - outputs.start) * g.stride * inner.width * part.pixel;
                        (at(j * g.stride, 0).add(first), x_tile.as_ptr().add(x + first))
                    })
                };
                for (i, taps) in taps.chunks(TAPS).enumerate() {
                    let to = sums.at(i * TAPS * row + first);
                    match *taps {
                        [a, b, c, d, e] => pixels.products::<S, 5>(rows(), [a, b, c, d, e], to, row),
                        [a, b, c, d] => pixels.products::<S, 4>(rows(), [a, b, c, d], to, row),
                        [a, b, c] => pixels.products::<S, 3>(rows(), [a, b, c], to, row),
                        [a, b] => pixels.products::<S, 2>(rows(), [a, b], to, row),
                        _ => pixels.products::<S, 1>(rows(), [taps[0]], to, row),
                    }
                }
                pixels.sum::<S>(rows().map(|(dy, _)| dy), sums.at(taps.len() * row + first));
            }
        }
    }
}

/// The pixels of a row of outputs, in both tiles.
#[derive(Clone, Copy)]
struct Pixels {
    count: usize,
    /// Floats from one pixel to the next.
    step: usize,
}

impl Pixels {
    /// For each of `N` taps, adds up over the pixels the output gradient times the input at the tap; `rows`
    /// yields the rows of both.
    #[inline(always)]
    unsafe fn products<S: Simd, const N: usize>(
        self,
        rows: impl Iterator<Item = (*const f32, *const f32)>,
        taps: [isize; N],
        to: *mut f32,
        row: usize,
    ) {
        // SAFETY: guaranteed by the caller.
        unsafe {
            // Two sums per tap hide the latency of the additions.
            let mut sums = [[S::zero(); N]; 2];
            for (dy, x) in rows {
                for i in 0..self.count / 2 {
                    for half in 0..2 {
                        let at = (2 * i + half) * self.step;
                        let d = S::load(dy.add(at));
                        for tap in 0..N {
                            let x = S::load(x.add(at).offset(taps[tap]));
                            sums[half][tap] = x.mul_add(d, sums[half][tap]);
                        }
                    }
                }
                if self.count % 2 == 1 {
                    let at = (self.count - 1) * self.step;
                    let d = S::load(dy.add(at));
                    for tap in 0..N {
                        sums[0][tap] = S::load(x.add(at).offset(taps[tap])).mul_add(d, sums[0][tap]);
                    }
                }
            }
            for tap in 0..N {
                sums[0][tap].add(sums[1][tap]).store(to.add(tap * row));
            }
        }
    }

    /// The sum over pixels of the output gradients.
    #[inline(always)]
    unsafe fn sum<S: Simd>(self, rows: impl Iterator<Item = *const f32>, to: *mut f32) {
        // SAFETY: guaranteed by the caller.
        unsafe {
            let mut sum = S::zero();
            for dy in rows {
                for i in 0..self.count {
                    sum = sum.add(S::load(dy.add(i * self.step)));
                }
            }
            sum.store(to);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bands(
        [height, width]: [usize; 2],
        channels: usize,
        [kernel_height, kernel_width]: [usize; 2],
    ) -> Bands {
        let g = Geometry {
            batch: 1,
            height,
            width,
            inputs: channels,
            outputs: channels,
            kernel_height,
            kernel_width,
            stride: 1,
            padding: 0,
            dilation: 1,
            groups: channels,
            out_height: height - kernel_height + 1,
            out_width: width - kernel_width + 1,
        };
        let g = upright(&g);
        Bands::new(&g, g.out_height, 1)
    }

    #[test]
    fn tiles_fit_and_bands_share_at_most_half_of_them() {
        for (size, channels, kernel) in [
            ([16, 16], 4096, [3, 3]),
            ([64, 64], 64, [3, 3]),
            ([64, 64], 64, [7, 7]),
            ([500, 300], 20, [5, 5]),
            ([2, 3000], 64, [1, 9]),
            ([1, 16_000], 64, [1, 9]),
        ] {
            let Bands { count, vectors } = bands(size, channels, kernel);
            let what = format!("{size:?}, {channels} channels, {kernel:?}: {count} x {vectors}");
            let turned = size[0] == 1;
            let [rows, columns] = if turned { [size[1], 1] } else { size };
            let shared = kernel[usize::from(turned)] - 1;
            let in_band = (rows - shared).div_ceil(count) + shared;
            assert!(in_band * columns * vectors * LANES <= TILE, "{what}");
            assert!(count == 1 || in_band >= 2 * shared, "{what}");
        }
        // For small images, a tile has many channels.
        assert_eq!(bands([16, 16], 4096, [3, 3]).vectors, VECTORS);
        assert_eq!(bands([16, 16], 20, [3, 3]).vectors, 2);
    }
}
