//! Direct convolution with any kernel size, stride, dilation and grouping, on channels-last images.
//!
//! For one kernel tap, the inputs of consecutive output pixels are a fixed distance apart. A row of outputs
//! is therefore a matrix product whose left operand is read in place (no im2col): its inner index runs over
//! the taps and the channels, and neighbouring taps of a row join into one [`Run`](crate::gemm::Run). If
//! there is padding, the image is copied once into a frame of zeros. A 1x1 convolution is then the plain
//! product over all pixels.
//!
//! The gradient of the input is the transposed sum. With stride s, its outputs (the pixels of the input) fall
//! into s x s phases, each of which reads its own taps; each phase is a [`Pass`] of stride 1.
//!
//! Three shapes have dedicated kernels: one channel per group ([`depthwise`]), few outputs per group (dot
//! products along the channels), and everything else (register-blocked products).

mod bias_gradient;
mod depthwise;
mod frame;
mod lines;
mod pass;
mod weight_gradient;

pub(crate) use bias_gradient::backward_bias;
pub(crate) use depthwise::backward_depthwise;
pub(crate) use weight_gradient::backward_weight;

use crate::float::Float;
use crate::parallel::Shared;
use crate::simd::{LANES, Level};
use crate::winograd::Images;
use lines::run_passes;
use pass::{Pass, backward_passes, forward_pass};

/// The sizes of a convolution.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Geometry {
    pub(crate) batch: usize,
    pub(crate) height: usize,
    pub(crate) width: usize,
    pub(crate) inputs: usize,
    pub(crate) outputs: usize,
    pub(crate) kernel_height: usize,
    pub(crate) kernel_width: usize,
    pub(crate) stride: usize,
    pub(crate) padding: usize,
    pub(crate) dilation: usize,
    pub(crate) groups: usize,
    pub(crate) out_height: usize,
    pub(crate) out_width: usize,
}

impl Geometry {
    /// Square images and 3x3 filters, padded so that the output has the same size.
    #[cfg(all(test, feature = "cuda"))]
    pub(crate) fn of_3x3(batch: usize, size: usize, inputs: usize, outputs: usize) -> Self {
        Self {
            batch,
            height: size,
            width: size,
            inputs,
            outputs,
            kernel_height: 3,
            kernel_width: 3,
            stride: 1,
            padding: 1,
            dilation: 1,
            groups: 1,
            out_height: size,
            out_width: size,
        }
    }
    fn taps(&self) -> usize {
        self.kernel_height * self.kernel_width
    }
    fn group_inputs(&self) -> usize {
        self.inputs / self.groups
    }
    fn group_outputs(&self) -> usize {
        self.outputs / self.groups
    }
    /// Whether each channel is its own group.
    pub(crate) fn depthwise(&self) -> bool {
        self.groups > 1 && self.inputs == self.groups && self.outputs == self.groups
    }
    /// The offset of a weight in PyTorch's layout, (outputs, inputs / groups, kernel height, kernel width).
    #[inline(always)]
    fn weight(&self, group: usize, output: usize, input: usize, tap: usize) -> usize {
        ((group * self.group_outputs() + output) * self.group_inputs() + input) * self.taps() + tap
    }
}

/// Channels-last images to write or add to, `image` floats apart.
#[derive(Clone, Copy)]
pub(crate) struct OutputImages {
    pub(crate) data: Shared,
    pub(crate) image: usize,
    pub(crate) add: bool,
}

impl OutputImages {
    /// Consecutive images, to write.
    pub(crate) fn contiguous(data: Shared, image: usize) -> OutputImages {
        OutputImages { data, image, add: false }
    }
}

/// y = x * w + bias, or y += x * w (then without bias).
pub(crate) fn forward<T: Float>(
    level: Level,
    g: &Geometry,
    x: Images<T>,
    weight: &[f32],
    bias: Option<&[f32]>,
    y: OutputImages,
) {
    if g.depthwise() {
        return depthwise::forward(level, g, x, weight, bias, y);
    }
    let output = Output { images: y, width: g.out_width, channels: g.outputs };
    let weights = Weights { data: weight, geometry: g, swapped: false };
    run_passes(level, g.batch, [g.height, g.width], x, vec![forward_pass(g)], weights, bias, output);
}

/// The gradient of the input: dx = dy * w' (+ bias, for the transposed convolution), or dx += dy * w'.
pub(crate) fn backward_input<T: Float>(
    level: Level,
    g: &Geometry,
    dy: Images<T>,
    weight: &[f32],
    bias: Option<&[f32]>,
    dx: OutputImages,
) {
    if g.depthwise() {
        return depthwise::backward_input(level, g, dy, weight, bias, dx);
    }
    let output = Output { images: dx, width: g.width, channels: g.inputs };
    let weights = Weights { data: weight, geometry: g, swapped: true };
    run_passes(level, g.batch, [g.out_height, g.out_width], dy, backward_passes(g), weights, bias, output);
}

/// The tensor that the passes write.
struct Output {
    images: OutputImages,
    /// Pixels in a row.
    width: usize,
    channels: usize,
}

impl Output {
    #[inline(always)]
    unsafe fn at(&self, pass: &Pass, image: usize, j: usize, i: usize) -> *mut f32 {
        let (y, x) = (pass.origin[0] + j * pass.step, pass.origin[1] + i * pass.step);
        // SAFETY: the caller passes pixels of the pass, which lie inside the output.
        unsafe { self.images.data.at(image * self.images.image + (y * self.width + x) * self.channels) }
    }
}

/// The weights as the forward pass reads them, or with inputs and outputs swapped.
#[derive(Clone, Copy)]
struct Weights<'a> {
    data: &'a [f32],
    geometry: &'a Geometry,
    swapped: bool,
}

impl Weights<'_> {
    /// The (from, to) channels of a group.
    fn channels(&self) -> (usize, usize) {
        let (i, o) = (self.geometry.group_inputs(), self.geometry.group_outputs());
        if self.swapped { (o, i) } else { (i, o) }
    }
    /// All taps between two channels.
    #[inline(always)]
    fn taps(&self, group: usize, from: usize, to: usize) -> &[f32] {
        let (i, o) = if self.swapped { (to, from) } else { (from, to) };
        &self.data[self.geometry.weight(group, o, i, 0)..][..self.geometry.taps()]
    }
    #[inline(always)]
    fn at(&self, group: usize, from: usize, to: usize, tap: usize) -> f32 {
        self.taps(group, from, to)[tap]
    }
}

/// n, n / 2, n / 4 .. 1
fn halvings(n: usize) -> impl Iterator<Item = usize> {
    std::iter::successors(Some(n), |n| (*n > 1).then_some(n / 2))
}

fn packed_channels(channels: usize) -> usize {
    channels.next_multiple_of(LANES)
}
