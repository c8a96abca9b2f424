//! 3x3 and 5x5 convolutions of stride 1 by Winograd's F(4x4, 3x3) and F(2x2, 5x5), forward and backward, on
//! channels-last images.
//!
//! An image is divided into tiles of 4x4 (or 2x2) outputs, which read 6x6 inputs. In the transformed domain a
//! tile has 36 positions, and the convolution is one matrix product per position: M\[p\] (tiles, outputs) =
//! V\[p\] (tiles, inputs) U\[p\] (inputs, outputs), with 36 / 16 = 2.25 multiplications per output where the
//! direct sum needs 9 (or 36 / 4 = 9 instead of 25).
//!
//! - [`transform`]: the small transform matrices.
//! - [`Filters`] to [`Panels`] and back: the weights in the layout of the products.
//! - [`forward()`]: a block of tiles at a time, from V to the output, inside the L2 cache.
//! - [`backward()`]: both gradients from one transform of the output's gradient.

mod backward;
mod filters;
mod forward;
mod transform;

pub(crate) use backward::{Gradient, InputGradient, Load, Source, backward, parts};
pub(crate) use filters::{ColumnOrder, Filters, Panels, add_filter_gradient};
pub(crate) use forward::{Epilogue, Store, forward};
pub(crate) use transform::{
    OUT, load_positions, output_tile, output_tile_adjoint, prefetch_positions, store_positions,
};

use crate::float::Float;
use crate::simd::LANES;
use transform::IN;

/// Added to strides that would otherwise be powers of two, so that data read together spreads over the
/// cache's sets.
const SPREAD: usize = LANES;

/// Channels-last images to read: (batch, height, width, channels), with contiguous pixels, and images `image`
/// values apart.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Images<T = f32> {
    pub(crate) data: *const T,
    pub(crate) image: usize,
    pub(crate) channels: usize,
}

// SAFETY: the images are only read, from any thread.
unsafe impl<T: Sync> Send for Images<T> {}
// SAFETY: as above.
unsafe impl<T: Sync> Sync for Images<T> {}

impl<T: Float> Images<T> {
    /// The same images as `f32`, if that is their type.
    pub(crate) fn wide(self) -> Option<Images> {
        T::WIDE.then(|| Images { data: self.data.cast(), image: self.image, channels: self.channels })
    }
}

/// The sizes of a convolution and its tiles, which are numbered image by image, row by row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Tiling {
    pub(crate) batch: usize,
    pub(crate) height: usize,
    pub(crate) width: usize,
    pub(crate) padding: usize,
    /// 3 or 5.
    pub(crate) kernel: usize,
}

/// A tile: its index, its image, its first output pixel, and the number of its outputs that exist.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Tile {
    pub(crate) index: usize,
    pub(crate) image: usize,
    pub(crate) y: usize,
    pub(crate) x: usize,
    pub(crate) rows: usize,
    pub(crate) columns: usize,
}

impl Tiling {
    pub(crate) fn out_height(&self) -> usize {
        self.height + 2 * self.padding + 1 - self.kernel
    }
    pub(crate) fn out_width(&self) -> usize {
        self.width + 2 * self.padding + 1 - self.kernel
    }
    /// Outputs of a tile in each direction.
    fn out(&self) -> usize {
        IN + 1 - self.kernel
    }
    /// Tiles in a row.
    fn across(&self) -> usize {
        self.out_width().div_ceil(self.out())
    }
    /// Rows of tiles in an image.
    fn down(&self) -> usize {
        self.out_height().div_ceil(self.out())
    }
    pub(crate) fn tiles(&self) -> usize {
        self.batch * self.down() * self.across()
    }
    #[inline(always)]
    fn tile(&self, index: usize) -> Tile {
        let (row, x) = (index / self.across(), index % self.across() * self.out());
        let (image, y) = (row / self.down(), row % self.down() * self.out());
        let (rows, columns) = (self.out().min(self.out_height() - y), self.out().min(self.out_width() - x));
        Tile { index, image, y, x, rows, columns }
    }
    /// The rows and columns of the tile's 6x6 inputs that lie inside the image: (rows, columns), as ranges.
    #[inline(always)]
    fn inside(&self, tile: &Tile) -> ([usize; 2], [usize; 2]) {
        let range = |start: usize, len: usize| {
            [self.padding.saturating_sub(start).min(IN), (len + self.padding).saturating_sub(start).min(IN)]
        };
        (range(tile.y, self.height), range(tile.x, self.width))
    }
}
