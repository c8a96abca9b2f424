//! Images with the zeros that a convolution reads beyond their edges.

use super::pass::Pass;
use crate::buffer::Buffer;
use crate::float::{Convert, Float};
use crate::gemm::Run;
use crate::parallel::{self, Shared};
use crate::simd::Level;
use crate::winograd::Images;

/// Images as f32, with the frame of zeros that a set of passes reads beyond their edges.
pub(super) struct Framed {
    pub(super) data: *const f32,
    /// Floats from one image to the next.
    pub(super) image: usize,
    /// Pixels in a row.
    pub(super) width: usize,
    /// Floats from one pixel to the next.
    pub(super) channels: usize,
    /// Floats from one group of channels to the next.
    pub(super) group: usize,
    /// Rows of zeros above, and columns of zeros to the left.
    before: [usize; 2],
    /// Keeps a framed copy alive; `None` if the images are f32 already and need no frame.
    _copy: Option<Buffer>,
}

/// The inputs that the taps of one row read for an output pixel.
#[derive(Clone, Copy)]
pub(super) struct TapRun {
    /// The input row, relative to the pixel's own.
    pub(super) y: isize,
    pub(super) run: Run,
}

impl TapRun {
    /// Whether the taps of a pixel in this row read a row inside the image; otherwise they read only zeros.
    #[inline(always)]
    pub(super) fn sees(&self, row: usize, height: usize) -> bool {
        (0..height as isize).contains(&(row as isize + self.y))
    }
}

// SAFETY: the data is only read.
unsafe impl Sync for Framed {}
// SAFETY: the data is only read.
unsafe impl Send for Framed {}

impl Framed {
    /// The images themselves, without a frame.
    pub(super) fn plain(images: Images, width: usize, groups: usize) -> Framed {
        let Images { data, image, channels } = images;
        Framed { data, image, width, channels, group: channels / groups, before: [0, 0], _copy: None }
    }

    /// Copies the images into a frame of zeros, unless they are f32 and need none. The copy stores each of
    /// the `groups` groups of channels separately, as consecutive images, so the inputs of one group that a
    /// row of taps reads are contiguous.
    pub(super) fn new<T: Float>(
        level: Level,
        images: Images<T>,
        batch: usize,
        height: usize,
        width: usize,
        passes: &[Pass],
        groups: usize,
    ) -> Framed {
        let (mut before, mut after) = ([0; 2], [0; 2]);
        for pass in passes {
            for tap in &pass.taps {
                for (axis, (e, size)) in [(tap.y, height), (tap.x, width)].into_iter().enumerate() {
                    let last = ((pass.count[axis] - 1) * pass.in_step) as isize + e;
                    before[axis] = before[axis].max((-e).max(0) as usize);
                    after[axis] = after[axis].max((last + 1 - size as isize).max(0) as usize);
                }
            }
        }
        let channels = images.channels;
        if T::WIDE && before == [0, 0] && after == [0, 0] {
            let images = Images { data: images.data.cast(), image: images.image, channels };
            return Framed::plain(images, width, groups);
        }
        let full_height = before[0] + height + after[0];
        let full_width = before[1] + width + after[1];
        let mut copy = Buffer::new(batch * full_height * full_width * channels);
        let to = Shared::new(&mut copy);
        let images = &images;
        let own = channels / groups;
        let group = batch * full_height * full_width * own;
        let scratch = || Buffer::new(if groups == 1 { 0 } else { width * channels });
        parallel::for_each_with(batch * full_height, scratch, |task, scratch| {
            let (image, row) = (task / full_height, task % full_height);
            // SAFETY: each task writes its own row of each group.
            let out = |g: usize| unsafe {
                std::slice::from_raw_parts_mut(to.at(g * group + task * full_width * own), full_width * own)
            };
            if row < before[0] || row >= before[0] + height {
                (0..groups).for_each(|g| out(g).fill(0.));
                return;
            }
            let inside = before[1] * own..(before[1] + width) * own;
            for g in 0..groups {
                let out = out(g);
                out[..inside.start].fill(0.);
                out[inside.end..].fill(0.);
            }
            // SAFETY: the row to copy lies inside the image.
            let from = unsafe {
                let row = images.data.add(image * images.image + (row - before[0]) * width * channels);
                std::slice::from_raw_parts(row, width * channels)
            };
            let wide = if groups == 1 { &mut out(0)[inside.clone()] } else { &mut scratch[..] };
            level.run(Convert { from, to: Shared::new(wide), part: 0..from.len() });
            if groups > 1 {
                for g in 0..groups {
                    let pixels = out(g)[inside.clone()].chunks_exact_mut(own);
                    for (to, from) in pixels.zip(scratch.chunks_exact(channels)) {
                        to.copy_from_slice(&from[g * own..(g + 1) * own]);
                    }
                }
            }
        });
        let image = full_height * full_width * own;
        Framed {
            data: copy.as_ptr(),
            image,
            width: full_width,
            channels: own,
            group,
            before,
            _copy: Some(copy),
        }
    }

    /// The inner index of a pass: `channels` floats for each tap; neighbouring taps of a row are joined.
    pub(super) fn runs(&self, pass: &Pass, channels: usize) -> Vec<TapRun> {
        let mut runs: Vec<TapRun> = Vec::with_capacity(pass.taps.len());
        for tap in &pass.taps {
            let row = (tap.y + self.before[0] as isize) as usize;
            let column = (tap.x + self.before[1] as isize) as usize;
            let offset = (row * self.width + column) * self.channels;
            match runs.last_mut() {
                Some(TapRun { y, run }) if *y == tap.y && run.offset + run.len == offset => {
                    run.len += channels
                }
                _ => runs.push(TapRun { y: tap.y, run: Run { offset, len: channels } }),
            }
        }
        runs
    }

    /// The address of the inputs of output (j, i) of an image, before the tap offsets are added.
    #[inline(always)]
    pub(super) unsafe fn at(&self, image: usize, in_step: usize, j: usize, i: usize) -> *const f32 {
        // SAFETY: the caller stays inside the frame.
        unsafe {
            self.data.add(image * self.image + (j * in_step * self.width + i * in_step) * self.channels)
        }
    }
}
