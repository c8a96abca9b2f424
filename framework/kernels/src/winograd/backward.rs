//! Both gradients, a chunk of tile rows at a time, from one transform of the output's gradient:
//!
//! 1. by tiles: D = A dy A', `[position][channel / 16][tile][16]`, and V of each source, `[position][tile][channel]`;
//! 2. by positions: dU\[p\] += V\[p\]' D\[p\] and dV\[p\] = D\[p\] U\[p\]', which takes V's place. The bias's gradient is a
//!    by-product: one position of D is the sum of the tile;
//! 3. by images and channels: dx += B dV B', where neighbouring tiles overlap.
//!
//! This is the adjoint of the forward pass step by step. The chunk is a function of the sizes alone, so that sums are taken
//! in the same order whatever the threads.

use super::filters::Panels;
use super::forward::transform_input;
use super::transform::{
    IN, OUT, POSITIONS, SUM_POSITION, input_tile_adjoint, load_positions, output_tile_adjoint,
    prefetch_positions, store_positions,
};
use super::{Images, SPREAD, Tile, Tiling};
use crate::buffer::Buffer;
use crate::gemm::{Product, ProductTransposed, Run, Start, product, product_transposed};
use crate::parallel::{self, Shared};
use crate::simd::{Kernel, LANES, Level, Simd};

/// Where the gradient of the output comes from.
pub(crate) trait Gradient: Copy + Send + Sync {
    /// Vectors of channels that are made together.
    const VECTORS: usize;
    /// Writes A dy A' of a tile for the vectors of a group: positions `stride` floats apart, vectors `block` floats apart.
    /// # Safety
    /// `d` is writable; no other task has the same tile. Must be `#[inline(always)]`.
    unsafe fn tile<S: Simd>(self, tile: &Tile, group: usize, d: *mut f32, stride: usize, block: usize);
}

/// The gradient is a tensor, (batch, height, width, channels).
#[derive(Clone, Copy)]
pub(crate) struct Load<'a> {
    pub(crate) gradient: &'a [f32],
    pub(crate) height: usize,
    pub(crate) width: usize,
    pub(crate) channels: usize,
}

impl Gradient for Load<'_> {
    const VECTORS: usize = 1;

    #[inline(always)]
    unsafe fn tile<S: Simd>(self, tile: &Tile, group: usize, d: *mut f32, stride: usize, _block: usize) {
        let channel = group * LANES;
        let lanes = LANES.min(self.channels - channel);
        prefetch_positions::<S>(d, stride);
        // SAFETY: only pixels that exist are read.
        unsafe {
            let mut y = [[S::zero(); OUT]; OUT];
            for r in 0..tile.rows {
                for c in 0..tile.columns {
                    let pixel = (tile.image * self.height + tile.y + r) * self.width + tile.x + c;
                    y[r][c] =
                        S::load_lanes(self.gradient.as_ptr().add(pixel * self.channels + channel), lanes);
                }
            }
            store_positions(output_tile_adjoint(y), d, stride);
        }
    }
}

/// An input of the convolution, and what is wanted for it.
pub(crate) struct Source<'a> {
    pub(crate) images: Images,
    /// The gradient of its rows of U, to add to.
    pub(crate) filters: Option<&'a mut Panels>,
    pub(crate) input: Option<InputGradient<'a>>,
}

/// The gradient of an input.
pub(crate) struct InputGradient<'a> {
    /// The transpose of its rows of U.
    pub(crate) filters: &'a Panels,
    /// To add to: images as those of the input, `image` floats apart.
    pub(crate) data: Shared,
    pub(crate) image: usize,
}

/// Adds the gradients that `sources` ask for, and that of the bias, in the order of the panels' columns.
pub(crate) fn backward<G: Gradient>(
    level: Level,
    tiling: &Tiling,
    vectors: usize,
    gradient: G,
    sources: &mut [Source],
    mut bias: Option<&mut [f32]>,
) {
    let rows = tiling.batch * tiling.down();
    let inputs: usize = sources.iter().map(|s| s.images.channels.next_multiple_of(LANES) + SPREAD).sum();
    let chunk_rows = chunk_tiles(vectors * LANES, inputs).div_ceil(tiling.across()).min(rows).max(1);
    let chunk_rows = rows.div_ceil(rows.div_ceil(chunk_rows));
    let max_tiles = chunk_rows * tiling.across();
    let d_block = max_tiles * LANES;
    let d_stride = vectors * d_block + SPREAD;
    let mut d = Buffer::new(POSITIONS * d_stride);
    let runs: Vec<Run> = (0..vectors).map(|i| Run { offset: i * d_block, len: LANES }).collect();
    let mut scratch: Vec<Transformed> =
        sources.iter().map(|s| Transformed::new(s.images.channels, max_tiles)).collect();

    for first_row in (0..rows).step_by(chunk_rows) {
        let chunk_rows = chunk_rows.min(rows - first_row);
        let first = first_row * tiling.across();
        let tiles = chunk_rows * tiling.across();

        // 1. Transforms, by tiles.
        let d_shared = Shared::new(&mut d);
        let v: Vec<(Images, Transposed)> = sources
            .iter()
            .zip(&mut scratch)
            .filter(|(s, _)| s.filters.is_some())
            .map(|(s, t)| (s.images, t.share()))
            .collect();
        parallel::for_each(tiles.div_ceil(TASK_TILES), |task| {
            let from = task * TASK_TILES;
            let tiles = from..tiles.min(from + TASK_TILES);
            level.run(Transforms {
                tiling,
                gradient,
                first,
                tiles,
                d: d_shared,
                d_stride,
                d_block,
                vectors,
                v: &v,
            });
        });

        // 2. Products, by positions.
        let products: Vec<SourceProducts> = sources
            .iter_mut()
            .zip(&mut scratch)
            .map(|(s, t)| SourceProducts {
                v: t.share(),
                channels: s.images.channels,
                filters: s.filters.as_mut().map(|f| {
                    let data = Shared::new(&mut f.data);
                    (&**f, data)
                }),
                transposed: s.input.as_ref().map(|i| i.filters),
            })
            .collect();
        let bias = bias.as_deref_mut().map(Shared::new);
        let (d_data, runs) = (&*d, &*runs);
        parallel::for_each(POSITIONS, |position| {
            let d = d_data[position * d_stride..].as_ptr();
            level.run(Products { position, tiles, d, d_block, runs, sources: &products, bias });
        });

        // 3. Back to pixels, by images and channels.
        for (source, t) in sources.iter().zip(&scratch) {
            let Some(input) = &source.input else { continue };
            let blocks = source.images.channels.div_ceil(LANES);
            let (first_image, last_image) =
                (first_row / tiling.down(), (first_row + chunk_rows - 1) / tiling.down());
            parallel::for_each((last_image - first_image + 1) * blocks, |task| {
                let image = first_image + task / blocks;
                let rows = first_row.max(image * tiling.down())
                    ..(first_row + chunk_rows).min((image + 1) * tiling.down());
                let tiles = rows.start * tiling.across()..rows.end * tiling.across();
                level.run(Scatter {
                    tiling,
                    first,
                    tiles,
                    dv: &t.data,
                    stride: t.stride,
                    row: t.row,
                    input,
                    channels: source.images.channels,
                    channel: task % blocks * LANES,
                });
            });
        }
    }
}

/// Tiles of the transforms in one task.
const TASK_TILES: usize = 8;

/// About how many tiles a chunk has: for one position, D and V fill half of the second-level cache.
fn chunk_tiles(outputs: usize, inputs: usize) -> usize {
    const FLOATS: usize = 144 << 10;
    (FLOATS / (outputs + inputs)).clamp(16, 1024)
}

/// V of one source, or its gradient: `[position][tile][channel]`.
struct Transformed {
    data: Buffer,
    row: usize,
    stride: usize,
}

/// The same, shared by tasks.
#[derive(Clone, Copy)]
struct Transposed {
    data: Shared,
    row: usize,
    stride: usize,
}

impl Transformed {
    fn new(channels: usize, tiles: usize) -> Transformed {
        let row = channels.next_multiple_of(LANES) + SPREAD;
        let stride = tiles * row;
        Transformed { data: Buffer::new(POSITIONS * stride), row, stride }
    }
    fn share(&mut self) -> Transposed {
        Transposed { data: Shared::new(&mut self.data), row: self.row, stride: self.stride }
    }
}

struct Transforms<'a, G> {
    tiling: &'a Tiling,
    gradient: G,
    /// The chunk's first tile.
    first: usize,
    /// Counted in the chunk.
    tiles: std::ops::Range<usize>,
    d: Shared,
    d_stride: usize,
    d_block: usize,
    vectors: usize,
    v: &'a [(Images, Transposed)],
}

impl<G: Gradient> Kernel for Transforms<'_, G> {
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        for i in self.tiles {
            let tile = self.tiling.tile(self.first + i);
            // SAFETY: each tile has its own place in D and V, and belongs to one task.
            unsafe {
                for group in 0..self.vectors / G::VECTORS {
                    let to = self.d.at(group * G::VECTORS * self.d_block + i * LANES);
                    self.gradient.tile::<S>(&tile, group, to, self.d_stride, self.d_block);
                }
                for (images, v) in self.v {
                    for channel in (0..images.channels).step_by(LANES) {
                        let to = v.data.at(i * v.row + channel);
                        transform_input::<S>(self.tiling, &tile, images, channel, to, v.stride);
                    }
                }
            }
        }
    }
}

struct SourceProducts<'a> {
    v: Transposed,
    channels: usize,
    filters: Option<(&'a Panels, Shared)>,
    transposed: Option<&'a Panels>,
}

struct Products<'a> {
    position: usize,
    tiles: usize,
    /// Of this position.
    d: *const f32,
    d_block: usize,
    runs: &'a [Run],
    sources: &'a [SourceProducts<'a>],
    bias: Option<Shared>,
}

/// Tiles that a panel of D and the rows of V keep in the first-level cache.
const DEPTH: usize = 128;

impl Kernel for Products<'_> {
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        // SAFETY: this task alone has this position of D, V, dU; all are large enough for the chunk.
        unsafe {
            for source in self.sources {
                let v = source.v.data.at(self.position * source.v.stride);
                if let Some((panels, data)) = source.filters {
                    for first in (0..self.tiles).step_by(DEPTH) {
                        for panel in 0..panels.count() {
                            product_transposed::<S>(
                                source.channels,
                                DEPTH.min(self.tiles - first),
                                ProductTransposed {
                                    a: v.add(first * source.v.row),
                                    a_row: source.v.row,
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
                if let Some(panels) = source.transposed {
                    for panel in 0..panels.count() {
                        product::<S>(
                            self.tiles,
                            Product {
                                runs: self.runs,
                                a: self.d,
                                a_row: LANES,
                                b: panels.data.as_ptr().add(panels.offset(panel, self.position)),
                                c: v.add(2 * panel * LANES),
                                c_row: source.v.row,
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
    /// Of one image.
    tiles: std::ops::Range<usize>,
    dv: &'a [f32],
    stride: usize,
    row: usize,
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
            let from = self.dv[(index - self.first) * self.row + self.channel..].as_ptr();
            // SAFETY: this task alone has these channels of this image, and touches only pixels inside it.
            unsafe {
                let d = input_tile_adjoint(load_positions::<S>(from, self.stride));
                let pixel = |r: usize, c: usize| {
                    let (y, x) = (tile.y + r - self.tiling.padding, tile.x + c - self.tiling.padding);
                    let offset = (y * self.tiling.width + x) * self.channels + self.channel;
                    self.input.data.at(tile.image * self.input.image + offset)
                };
                if rows == [0, IN] && columns == [0, IN] && lanes == LANES {
                    for r in 0..IN {
                        for c in 0..IN {
                            let to = pixel(r, c);
                            S::load(to).add(d[r][c]).store(to);
                        }
                    }
                } else {
                    for r in rows[0]..rows[1] {
                        for c in columns[0]..columns[1] {
                            let to = pixel(r, c);
                            S::load_lanes(to, lanes).add(d[r][c]).store_lanes(to, lanes);
                        }
                    }
                }
            }
        }
    }
}
