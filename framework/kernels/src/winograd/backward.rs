//! Both gradients, a chunk of tile rows at a time, from one transform of the output's gradient:
//!
//! 1. by tile: D = A dy A', `[position][channel / 16][tile][16]`, and V of each source, `[position][tile][channel]`;
//! 2. by position: dU\[p\] += V\[p\]' D\[p\] and dV\[p\] = D\[p\] U\[p\]', which overwrites V. The bias gradient is a
//!    by-product: one position of D is the sum of the tile;
//! 3. by image and channel: dx += B dV B', where neighbouring tiles overlap.
//!
//! Step by step, this is the adjoint of the forward pass. If the weight gradient is small, the batch is also
//! split into parts of whole images, each with its own sums: one thread works on a part, whose data stays in
//! that thread's cache, without waiting for others; threads without a part help with the parts of others.
//! Parts and chunks depend only on the sizes, so sums are computed in the same order for any number of
//! threads.

use super::filters::Panels;
use super::forward::transform_input;
use super::transform::{
    IN, OUT, OUT_5, POSITIONS, SUM_POSITION, input_tile_adjoint, output_tile_adjoint, output_tile_adjoint_5,
    prefetch_positions, store_positions,
};
use super::{Images, SPREAD, Tile, Tiling};
use crate::buffer::Buffer;
use crate::float::Float;
use crate::gemm::{Product, ProductTransposed, Run, Start, product, product_transposed};
use crate::parallel::{self, Shared};
use crate::simd::{Kernel, LANES, Level, Simd};

/// The source of the output's gradient.
pub(crate) trait Gradient: Copy + Send + Sync {
    /// Vectors of channels computed together.
    const VECTORS: usize;
    /// Writes A dy A' of a tile for the vectors of a group: positions `stride` floats apart, vectors `block`
    /// floats apart.
    /// # Safety
    /// `d` is writable; no other task handles the same tile. Must be `#[inline(always)]`.
    unsafe fn tile<S: Simd>(self, tile: &Tile, group: usize, d: *mut f32, stride: usize, block: usize);
}

/// The gradient is a tensor, (batch, height, width, channels).
#[derive(Clone, Copy)]
pub(crate) struct Load<'a, T> {
    pub(crate) gradient: &'a [T],
    pub(crate) height: usize,
    pub(crate) width: usize,
    pub(crate) channels: usize,
    /// 3 or 5.
    pub(crate) kernel: usize,
}

impl<T: Float> Load<'_, T> {
    /// Loads one vector of channels of a tile's pixels.
    /// # Safety
    /// The processor has the instructions of `S`.
    #[inline(always)]
    unsafe fn pixels<S: Simd, const OUT: usize>(&self, tile: &Tile, channel: usize) -> [[S; OUT]; OUT] {
        let lanes = LANES.min(self.channels - channel);
        // SAFETY: only pixels that exist are read.
        unsafe {
            let mut y = [[S::zero(); OUT]; OUT];
            for r in 0..tile.rows {
                for c in 0..tile.columns {
                    let pixel = (tile.image * self.height + tile.y + r) * self.width + tile.x + c;
                    y[r][c] =
                        T::load_lanes(self.gradient.as_ptr().add(pixel * self.channels + channel), lanes);
                }
            }
            y
        }
    }
}

impl<T: Float> Gradient for Load<'_, T> {
    const VECTORS: usize = 1;

    #[inline(always)]
    unsafe fn tile<S: Simd>(self, tile: &Tile, group: usize, d: *mut f32, stride: usize, _block: usize) {
        prefetch_positions::<S>(d, stride);
        // SAFETY: guaranteed by the caller.
        unsafe {
            let d_tile = if self.kernel == 5 {
                output_tile_adjoint_5(self.pixels::<S, OUT_5>(tile, group * LANES))
            } else {
                output_tile_adjoint(self.pixels::<S, OUT>(tile, group * LANES))
            };
            store_positions(d_tile, d, stride);
        }
    }
}

/// An input of the convolution, and which gradients are wanted for it.
pub(crate) struct Source<'a, T> {
    pub(crate) images: Images<T>,
    /// The gradient of its rows of U, to add to: one per part (see [`parts`]).
    pub(crate) filters: Option<&'a mut [Panels]>,
    pub(crate) input: Option<InputGradient<'a>>,
}

/// The gradient of an input.
pub(crate) struct InputGradient<'a> {
    /// The transpose of its rows of U.
    pub(crate) filters: &'a Panels,
    /// Added to: images with the layout of the input's, `image` floats apart.
    pub(crate) data: Shared,
    pub(crate) image: usize,
}

/// The number of parts into which the batch is split, given the total channels of the sources and those of
/// the output.
pub(crate) fn parts(tiling: &Tiling, inputs: usize, outputs: usize) -> usize {
    /// Maximum size of the sums of all parts together.
    const FLOATS: usize = 2 << 20;
    let sums = POSITIONS * inputs.next_multiple_of(LANES) * outputs.next_multiple_of(LANES);
    let images = tiling.batch.div_ceil((FLOATS / sums).max(1));
    tiling.batch.div_ceil(images)
}

/// Adds the gradients that `sources` request, and that of the bias in the order of the panels' columns;
/// `bias` has one row of whole vectors for each of the `parts`.
pub(crate) fn backward<T: Float, G: Gradient>(
    level: Level,
    tiling: &Tiling,
    vectors: usize,
    gradient: G,
    sources: &mut [Source<T>],
    parts: usize,
    mut bias: Option<&mut [f32]>,
) {
    let mut work: Vec<Part<T>> = (0..parts)
        .map(|part| Part {
            level,
            tiling,
            rows: part * tiling.batch / parts * tiling.down()
                ..(part + 1) * tiling.batch / parts * tiling.down(),
            vectors,
            sources: Vec::with_capacity(sources.len()),
            bias: bias.as_deref_mut().map(|bias| {
                let row = vectors * LANES;
                Shared::new(&mut bias[part * row..(part + 1) * row])
            }),
        })
        .collect();
    for source in sources {
        let Source { images, filters, input } = source;
        let mut filters = filters.as_deref_mut().into_iter().flatten();
        for part in &mut work {
            let sums = filters.next().map(|f| {
                let data = Shared::new(&mut f.data);
                (&*f, data)
            });
            part.sources.push(PartSource { images: *images, filters: sums, input: input.as_ref() });
        }
    }
    parallel::for_each(parts, |part| work[part].run(gradient));
}

/// Some images of a batch.
struct Part<'a, T> {
    level: Level,
    tiling: &'a Tiling,
    /// Rows of tiles, counted over all images.
    rows: std::ops::Range<usize>,
    vectors: usize,
    sources: Vec<PartSource<'a, T>>,
    bias: Option<Shared>,
}

struct PartSource<'a, T> {
    images: Images<T>,
    /// The part's sums; their data is only written through the pointer.
    filters: Option<(&'a Panels, Shared)>,
    input: Option<&'a InputGradient<'a>>,
}

impl<T: Float> Part<'_, T> {
    fn run<G: Gradient>(&self, gradient: G) {
        let Part { level, tiling, vectors, .. } = *self;
        let across = tiling.across();
        let inputs = self.sources.iter().map(|s| s.images.channels.next_multiple_of(LANES)).sum();
        let most = chunk_tiles(level, vectors * LANES, inputs).div_ceil(across);
        // Chunks of about the same size.
        let chunk_rows = self.rows.len().div_ceil(self.rows.len().div_ceil(most));
        let max_tiles = chunk_rows * across;
        let d_block = max_tiles * LANES;
        let d_stride = vectors * d_block + SPREAD;
        let mut d = Buffer::new(POSITIONS * d_stride);
        let d = Shared::new(&mut d);
        let runs: Vec<Run> = (0..vectors).map(|i| Run { offset: i * d_block, len: LANES }).collect();
        let mut scratch: Vec<Buffer> = Vec::with_capacity(self.sources.len());
        let mut v: Vec<Transformed> = Vec::with_capacity(self.sources.len());
        for source in &self.sources {
            let row = transformed_row(source.images.channels);
            let mut buffer = Buffer::new(POSITIONS * max_tiles * row);
            v.push(Transformed { data: Shared::new(&mut buffer), row, stride: max_tiles * row });
            scratch.push(buffer);
        }

        for first_row in self.rows.clone().step_by(chunk_rows) {
            let rows = first_row..self.rows.end.min(first_row + chunk_rows);
            let (first, tiles) = (first_row * across, rows.len() * across);

            // 1. Transforms, by tile.
            parallel::for_each(tiles.div_ceil(TASK_TILES), |task| {
                let from = task * TASK_TILES;
                let tiles = from..tiles.min(from + TASK_TILES);
                let (sources, v) = (&self.sources, &v);
                level.run(Transforms {
                    tiling,
                    gradient,
                    first,
                    tiles,
                    d,
                    d_stride,
                    d_block,
                    vectors,
                    sources,
                    v,
                });
            });

            // 2. Products, by position.
            parallel::for_each(POSITIONS, |position| {
                // SAFETY: the position exists.
                let d = unsafe { d.at(position * d_stride) };
                let (runs, sources, v, bias) = (&*runs, &self.sources, &v, self.bias);
                level.run(Products { position, tiles, d, d_block, runs, sources, v, bias });
            });

            // 3. Back to pixels, by image and channel.
            for (source, v) in self.sources.iter().zip(&v) {
                let Some(input) = source.input else { continue };
                let blocks = source.images.channels.div_ceil(LANES);
                let (first_image, last_image) = (rows.start / tiling.down(), (rows.end - 1) / tiling.down());
                parallel::for_each((last_image - first_image + 1) * blocks, |task| {
                    let image = first_image + task / blocks;
                    let rows =
                        rows.start.max(image * tiling.down())..rows.end.min((image + 1) * tiling.down());
                    level.run(Scatter {
                        tiling,
                        first,
                        tiles: rows.start * across..rows.end * across,
                        dv: *v,
                        input,
                        channels: source.images.channels,
                        channel: task % blocks * LANES,
                    });
                });
            }
        }
    }
}

/// Tiles per task of the transforms.
const TASK_TILES: usize = 8;

/// Approximate number of tiles per chunk. Large chunks read and write the weight gradient less often; small
/// ones keep D and V in closer caches.
fn chunk_tiles(level: Level, outputs: usize, inputs: usize) -> usize {
    if level == Level::Avx512 {
        // For one position, D and V fill half of a large L2 cache.
        const FLOATS: usize = 144 << 10;
        (FLOATS / (outputs + inputs)).clamp(16, 1024)
    } else {
        // D and V together are twice as large as the weight gradient.
        (2 * inputs * outputs / (inputs + outputs)).clamp(16, 1024)
    }
}

/// Floats from one tile to the next in V: long rows are padded, so that they do not map to the same sets of
/// the cache.
fn transformed_row(channels: usize) -> usize {
    let row = channels.next_multiple_of(LANES);
    if row >= 4 * LANES { row + SPREAD } else { row }
}

/// V of one source, or its gradient: `[position][tile][channel]`.
#[derive(Clone, Copy)]
struct Transformed {
    data: Shared,
    row: usize,
    stride: usize,
}

struct Transforms<'a, T, G> {
    tiling: &'a Tiling,
    gradient: G,
    /// The chunk's first tile.
    first: usize,
    /// Tile indices in the chunk.
    tiles: std::ops::Range<usize>,
    d: Shared,
    d_stride: usize,
    d_block: usize,
    vectors: usize,
    sources: &'a [PartSource<'a, T>],
    v: &'a [Transformed],
}

impl<T: Float, G: Gradient> Kernel for Transforms<'_, T, G> {
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        for i in self.tiles {
            let tile = self.tiling.tile(self.first + i);
            // SAFETY: each tile has its own place in D and V, and belongs to exactly one task.
            unsafe {
                for group in 0..self.vectors / G::VECTORS {
                    let to = self.d.at(group * G::VECTORS * self.d_block + i * LANES);
                    self.gradient.tile::<S>(&tile, group, to, self.d_stride, self.d_block);
                }
                for (source, v) in self.sources.iter().zip(self.v) {
                    if source.filters.is_none() {
                        continue;
                    }
                    for channel in (0..source.images.channels).step_by(LANES) {
                        let to = v.data.at(i * v.row + channel);
                        transform_input::<S, T>(self.tiling, &tile, &source.images, channel, to, v.stride);
                    }
                }
            }
        }
    }
}

struct Products<'a, T> {
    position: usize,
    tiles: usize,
    /// D of this position.
    d: *const f32,
    d_block: usize,
    runs: &'a [Run],
    sources: &'a [PartSource<'a, T>],
    v: &'a [Transformed],
    bias: Option<Shared>,
}

/// Tiles per block: a panel of D and the rows of V for this many tiles stay in the L1 cache.
const DEPTH: usize = 128;

impl<T: Float> Kernel for Products<'_, T> {
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        // SAFETY: only this task accesses this position of D, V and dU; all are large enough for the chunk.
        unsafe {
            for (source, transformed) in self.sources.iter().zip(self.v) {
                let v = transformed.data.at(self.position * transformed.stride);
                let v_row = transformed.row;
                if let Some((panels, data)) = source.filters {
                    for first in (0..self.tiles).step_by(DEPTH) {
                        for panel in 0..panels.count() {
                            product_transposed::<S>(
                                source.images.channels,
                                DEPTH.min(self.tiles - first),
                                ProductTransposed {
                                    a: v.add(first * v_row),
                                    a_row: v_row,
                                    b: self.d.add(2 * panel * self.d_block + first * LANES),
                                    b_row: LANES,
                                    b_vector: self.d_block,
                                    lanes: LANES,
                                    c: data.at(panels.offset(panel, self.position)),
                                    c_row: panels.width(panel) * LANES,
                                    width: panels.width(panel),
                                },
                            );
                        }
                    }
                }
                if let Some(InputGradient { filters: panels, .. }) = source.input {
                    for panel in 0..panels.count() {
                        product::<S>(
                            self.tiles,
                            Product {
                                runs: self.runs,
                                a: self.d,
                                a_row: LANES,
                                b: panels.data.as_ptr().add(panels.offset(panel, self.position)),
                                c: v.add(2 * panel * LANES),
                                c_row: v_row,
                                width: panels.width(panel),
                                lanes: LANES,
                                start: Start::Zero,
                            },
                        );
                    }
                }
            }
            if let (SUM_POSITION, Some(bias)) = (self.position, self.bias) {
                for (vector, run) in self.runs.iter().enumerate() {
                    let mut sum = S::zero();
                    for tile in 0..self.tiles {
                        sum = sum.add(S::load(self.d.add(run.offset + tile * LANES)));
                    }
                    let to = bias.at(vector * LANES);
                    S::load(to).add(sum).store(to);
                }
            }
        }
    }
}

struct Scatter<'a> {
    tiling: &'a Tiling,
    /// The chunk's first tile.
    first: usize,
    /// Tiles of one image.
    tiles: std::ops::Range<usize>,
    dv: Transformed,
    input: &'a InputGradient<'a>,
    channels: usize,
    channel: usize,
}

impl Kernel for Scatter<'_> {
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let lanes = LANES.min(self.channels - self.channel);
        for index in self.tiles {
            let tile = self.tiling.tile(index);
            let (rows, columns) = self.tiling.inside(&tile);
            // SAFETY: only this task accesses these channels of this image, and it touches only pixels inside
            // the image.
            unsafe {
                let from = self.dv.data.at((index - self.first) * self.dv.row + self.channel);
                let position = |r: usize, c: usize| from.add((r * IN + c) * self.dv.stride).cast_const();
                let pixel = |r: usize, c: usize| {
                    let (y, x) = (tile.y + r - self.tiling.padding, tile.x + c - self.tiling.padding);
                    let offset = (y * self.tiling.width + x) * self.channels + self.channel;
                    self.input.data.at(tile.image * self.input.image + offset)
                };
                if rows == [0, IN] && columns == [0, IN] && lanes == LANES {
                    input_tile_adjoint(
                        #[inline(always)]
                        |r, c| S::load(position(r, c)),
                        #[inline(always)]
                        |r, c, d| {
                            let to = pixel(r, c);
                            S::load(to).add(d).store(to);
                        },
                    );
                } else {
                    input_tile_adjoint(
                        #[inline(always)]
                        |r, c| S::load(position(r, c)),
                        #[inline(always)]
                        |r, c, d| {
                            if (rows[0]..rows[1]).contains(&r) && (columns[0]..columns[1]).contains(&c) {
                                let to = pixel(r, c);
                                S::load_lanes(to, lanes).add(d).store_lanes(to, lanes);
                            }
                        },
                    );
                }
            }
        }
    }
}
