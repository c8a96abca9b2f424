//! The gradient of a bias.

use super::packed_channels;
use crate::buffer::Buffer;
use crate::parallel::{self, Shared};
use crate::simd::{Kernel, LANES, Level, Simd};

/// Adds to db the sum over all pixels of dy, (pixels, channels).
pub(crate) fn backward_bias(level: Level, dy: &[f32], db: &mut [f32]) {
    const PIXELS: usize = 1024;
    let channels = db.len();
    let pixels = dy.len() / channels.max(1);
    let parts = pixels.div_ceil(PIXELS);
    let row = packed_channels(channels);
    let mut sums = Buffer::zeroed(parts * row);
    let data = Shared::new(&mut sums);
    parallel::for_each(parts, |part| {
        let pixels = part * PIXELS..pixels.min((part + 1) * PIXELS);
        level.run(PixelSums { dy, channels, pixels, data, at: part * row });
    });
    for part in sums.chunks_exact(row) {
        for (sum, x) in db.iter_mut().zip(part) {
            *sum += x;
        }
    }
}

struct PixelSums<'a> {
    dy: &'a [f32],
    channels: usize,
    pixels: std::ops::Range<usize>,
    data: Shared,
    at: usize,
}

impl Kernel for PixelSums<'_> {
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        for channel in (0..self.channels).step_by(LANES) {
            let lanes = LANES.min(self.channels - channel);
            // SAFETY: the pixels exist; each task has its own sums.
            unsafe {
                let mut sum = S::zero();
                for pixel in self.pixels.clone() {
                    sum =
                        sum.add(S::load_lanes(self.dy.as_ptr().add(pixel * self.channels + channel), lanes));
                }
                sum.store(self.data.at(self.at + channel));
            }
        }
    }
}
