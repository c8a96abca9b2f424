//! The forward pass, a block of tiles at a time:
//!
//! - V, `[position][channel / 16][tile][16]`: the block's transformed inputs. Consecutive operands of the product are a
//!   constant distance apart, so no further packing is needed.
//! - for each group of output channels (one or two panels): M\[p\] = V\[p\] U\[p\],
//!   `[position][tile][column]`, reading the panels of U strictly in order; then the [`Epilogue`] immediately
//!   transforms each tile's M back.
//!
//! V and M stay in the L2 cache.

use super::filters::Panels;
use super::transform::{
    IN, POSITIONS, input_tile, load_positions, output_tile, output_tile_5, prefetch_positions,
};
use super::{Images, SPREAD, Tile, Tiling};
use crate::buffer::Buffer;
use crate::float::Float;
use crate::gemm::{Product, Run, Start, product};
use crate::parallel::{self, Shared};
use crate::simd::{Kernel, LANES, Level, Simd};

/// Consumes the transformed output of each tile.
pub(crate) trait Epilogue: Copy + Send + Sync {
    /// Panels of the weights that are passed to [`tile`](Self::tile) together.
    const PANELS: usize;
    /// Takes `width` vectors of channels of a tile: `m` points to position 0; the other positions are
    /// `stride` floats apart.
    /// # Safety
    /// `m` is readable; no other task handles the same tile and group. Must be `#[inline(always)]`.
    unsafe fn tile<S: Simd>(self, tile: &Tile, group: usize, width: usize, m: *const f32, stride: usize);
}

/// Stores the output, (batch, height, width, channels); `bias` is padded to whole vectors.
#[derive(Clone, Copy)]
pub(crate) struct Store<'a, T> {
    pub(crate) output: Shared<T>,
    pub(crate) bias: &'a [f32],
    pub(crate) height: usize,
    pub(crate) width: usize,
    pub(crate) channels: usize,
    /// 3 or 5.
    pub(crate) kernel: usize,
}

impl<T: Float> Store<'_, T> {
    /// Stores one vector of channels of a tile's pixels.
    /// # Safety
    /// The pixels exist and belong to this task only.
    #[inline(always)]
    unsafe fn pixels<S: Simd, const OUT: usize>(&self, tile: &Tile, channel: usize, y: [[S; OUT]; OUT]) {
        let lanes = LANES.min(self.channels - channel);
        // SAFETY: guaranteed by the caller.
        unsafe {
            let bias = S::load(self.bias.as_ptr().add(channel));
            for r in 0..tile.rows {
                for c in 0..tile.columns {
                    let pixel = (tile.image * self.height + tile.y + r) * self.width + tile.x + c;
                    T::store_lanes(y[r][c].add(bias), self.output.at(pixel * self.channels + channel), lanes);
                }
            }
        }
    }
}

impl<T: Float> Epilogue for Store<'_, T> {
    const PANELS: usize = 1;

    #[inline(always)]
    unsafe fn tile<S: Simd>(self, tile: &Tile, group: usize, width: usize, m: *const f32, stride: usize) {
        for vector in 0..width {
            let channel = (2 * group + vector) * LANES;
            // SAFETY: M is readable; the tile's pixels exist and belong to this task only.
            unsafe {
                let m = load_positions::<S>(m.add(vector * LANES), stride);
                if self.kernel == 5 {
                    self.pixels(tile, channel, output_tile_5(m));
                } else {
                    self.pixels(tile, channel, output_tile(m));
                }
            }
        }
    }
}

/// Convolves the channels of `sources`, one source after the other, with the first rows of `filters`.
pub(crate) fn forward<T: Float, E: Epilogue>(
    level: Level,
    tiling: &Tiling,
    sources: &[Images<T>],
    filters: &Panels,
    epilogue: E,
) {
    let channel_blocks: usize = sources.iter().map(|s| s.channels.div_ceil(LANES)).sum();
    let block = block_tiles(channel_blocks * LANES, 2 * E::PANELS * LANES);
    let mut runs = Vec::with_capacity(channel_blocks);
    for source in sources {
        for first in (0..source.channels).step_by(LANES) {
            runs.push(Run { offset: runs.len() * block * LANES, len: LANES.min(source.channels - first) });
        }
    }
    let v_stride = channel_blocks * block * LANES + SPREAD;
    let m_row = 2 * E::PANELS.min(filters.count()) * LANES;
    let m_stride = block * m_row + SPREAD;
    let tiles = tiling.tiles();
    parallel::for_each_with(
        tiles.div_ceil(block),
        || (Buffer::new(POSITIONS * v_stride), Buffer::new(POSITIONS * m_stride)),
        |task, (v, m)| {
            let first = task * block;
            level.run(Block {
                tiling,
                sources,
                filters,
                epilogue,
                runs: &runs,
                tiles: first..tiles.min(first + block),
                v: v.as_mut_ptr(),
                v_stride,
                v_block: block * LANES,
                m: m.as_mut_ptr(),
                m_stride,
                m_row,
            });
        },
    );
}

/// Tiles per block, such that V and M fill most of the L2 cache (1 MiB here, less on other processors).
fn block_tiles(inputs: usize, group: usize) -> usize {
    const FLOATS: usize = 200 << 10;
    (FLOATS / (POSITIONS * (inputs + group)) / 12 * 12).clamp(12, 48)
}

struct Block<'a, T, E> {
    tiling: &'a Tiling,
    sources: &'a [Images<T>],
    filters: &'a Panels,
    epilogue: E,
    runs: &'a [Run],
    tiles: std::ops::Range<usize>,
    v: *mut f32,
    v_stride: usize,
    v_block: usize,
    m: *mut f32,
    m_stride: usize,
    m_row: usize,
}

impl<T: Float, E: Epilogue> Kernel for Block<'_, T, E> {
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let count = self.tiles.len();
        // SAFETY: V and M belong to this task only and are large enough; the sources cover their images, the
        // panels their rows.
        unsafe {
            for (i, index) in self.tiles.clone().enumerate() {
                let tile = self.tiling.tile(index);
                let mut to = self.v.add(i * LANES);
                for source in self.sources {
                    for channel in (0..source.channels).step_by(LANES) {
                        transform_input::<S, T>(self.tiling, &tile, source, channel, to, self.v_stride);
                        to = to.add(self.v_block);
                    }
                }
            }
            let groups = self.filters.count().div_ceil(E::PANELS);
            for group in 0..groups {
                let mut width = 0;
                for panel in group * E::PANELS..self.filters.count().min((group + 1) * E::PANELS) {
                    let panel_width = self.filters.width(panel);
                    for position in 0..POSITIONS {
                        product::<S>(
                            count,
                            Product {
                                runs: self.runs,
                                a: self.v.add(position * self.v_stride),
                                a_row: LANES,
                                b: self.filters.data.as_ptr().add(self.filters.offset(panel, position)),
                                c: self.m.add(position * self.m_stride + width * LANES),
                                c_row: self.m_row,
                                width: panel_width,
                                lanes: LANES,
                                start: Start::Zero,
                            },
                        );
                    }
                    width += panel_width;
                }
                for (i, index) in self.tiles.clone().enumerate() {
                    let tile = self.tiling.tile(index);
                    self.epilogue.tile::<S>(&tile, group, width, self.m.add(i * self.m_row), self.m_stride);
                }
            }
        }
    }
}

/// Transforms 16 channels (or the last few) of a tile's inputs and stores the positions `stride` floats
/// apart.
/// # Safety
/// The images cover `tiling`; `to` is writable.
#[inline(always)]
pub(super) unsafe fn transform_input<S: Simd, T: Float>(
    tiling: &Tiling,
    tile: &Tile,
    images: &Images<T>,
    channel: usize,
    to: *mut f32,
    stride: usize,
) {
    let lanes = LANES.min(images.channels - channel);
    let all_inside = tiling.inside(tile) == ([0, IN], [0, IN]);
    prefetch_positions::<S>(to, stride);
    // SAFETY: only pixels inside the image are read.
    unsafe {
        let image = images.data.add(tile.image * images.image + channel);
        // Coordinates outside the image wrap around to values beyond its size.
        let pixel = |r: usize, c: usize| {
            let y = (tile.y + r).wrapping_sub(tiling.padding);
            let x = (tile.x + c).wrapping_sub(tiling.padding);
            let inside = all_inside || (y < tiling.height && x < tiling.width);
            if inside { image.add((y * tiling.width + x) * images.channels) } else { ZEROS.as_ptr().cast() }
        };
        if lanes == LANES {
            input_tile(
                #[inline(always)]
                |r, c| T::load::<S>(pixel(r, c)),
                #[inline(always)]
                |r, c, x| x.store(to.add((r * IN + c) * stride)),
            );
        } else {
            input_tile(
                #[inline(always)]
                |r, c| T::load_first::<S>(pixel(r, c), lanes),
                #[inline(always)]
                |r, c, x| x.store(to.add((r * IN + c) * stride)),
            );
        }
    }
}

/// The values outside an image, for any element type.
static ZEROS: [f32; LANES] = [0.; LANES];
