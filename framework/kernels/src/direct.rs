//! Convolution of any kernel size, stride, dilation and grouping by its definition, on channels-last images.
//!
//! For a kernel tap, the inputs of consecutive output pixels lie a fixed distance apart, so that a row of outputs is a
//! matrix product whose left operand is read where it lies (no im2col): its inner index runs over the taps and the
//! channels, and neighbouring taps of a row join into one [`Run`]. The image is copied once into a frame of zeros where
//! there is padding. A 1x1 convolution is then the plain product over all pixels.
//!
//! The gradient of the input is the same sum from the other side. With stride s, the outputs (here: pixels of the input)
//! fall into s x s phases, each of which sees its own taps; each phase is a [`Pass`] of stride 1.
//!
//! Three shapes have kernels of their own: one channel a group (depthwise), few outputs a group (dot products along the
//! channels), and everything else (register-blocked products).

use crate::buffer::Buffer;
use crate::float::{Convert, Float};
use crate::gemm::{Product, ProductTransposed, Run, Start, product, product_transposed};
use crate::parallel::{self, Shared};
use crate::simd::{Kernel, LANES, Level, Simd};
use crate::winograd::Images;

/// The sizes of a convolution.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
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
    fn taps(&self) -> usize {
        self.kernel_height * self.kernel_width
    }
    fn group_inputs(&self) -> usize {
        self.inputs / self.groups
    }
    fn group_outputs(&self) -> usize {
        self.outputs / self.groups
    }
    fn depthwise(&self) -> bool {
        self.groups > 1 && self.inputs == self.groups && self.outputs == self.groups
    }
    /// The offset of a weight in PyTorch's layout, (outputs, inputs / groups, kernel height, kernel width).
    #[inline(always)]
    fn weight(&self, group: usize, output: usize, input: usize, tap: usize) -> usize {
        ((group * self.group_outputs() + output) * self.group_inputs() + input) * self.taps() + tap
    }
}

/// Outputs at `origin + step * (j, i)`, each the sum over taps of the inputs at `in_step * (j, i) + (tap.y, tap.x)`.
struct Pass {
    origin: [usize; 2],
    step: usize,
    count: [usize; 2],
    in_step: usize,
    taps: Vec<Tap>,
}

#[derive(Clone, Copy)]
struct Tap {
    /// In the weights.
    index: usize,
    y: isize,
    x: isize,
}

fn forward_pass(g: &Geometry) -> Pass {
    let at = |k: usize| (k * g.dilation) as isize - g.padding as isize;
    let taps = (0..g.taps())
        .map(|index| Tap { index, y: at(index / g.kernel_width), x: at(index % g.kernel_width) })
        .collect();
    Pass { origin: [0, 0], step: 1, count: [g.out_height, g.out_width], in_step: g.stride, taps }
}

/// The passes of the gradient of the input: from the outputs' side, pixel y is read by output (y + padding - tap * dilation)
/// / stride, where that division leaves no rest.
fn backward_passes(g: &Geometry) -> Vec<Pass> {
    let along = |phase: usize, kernel: usize| -> Vec<(usize, isize)> {
        // Later taps see earlier outputs: in reverse, so that neighbouring outputs follow each other.
        (0..kernel)
            .rev()
            .map(|k| (k, (phase + g.padding) as isize - (k * g.dilation) as isize))
            .filter(|(_, distance)| distance.rem_euclid(g.stride as isize) == 0)
            .map(|(k, distance)| (k, distance.div_euclid(g.stride as isize)))
            .collect()
    };
    let mut passes = Vec::new();
    for phase_y in 0..g.stride.min(g.height) {
        for phase_x in 0..g.stride.min(g.width) {
            let (ys, xs) = (along(phase_y, g.kernel_height), along(phase_x, g.kernel_width));
            let mut taps = Vec::with_capacity(ys.len() * xs.len());
            for &(ky, y) in &ys {
                taps.extend(xs.iter().map(|&(kx, x)| Tap { index: ky * g.kernel_width + kx, y, x }));
            }
            let count = [(g.height - phase_y).div_ceil(g.stride), (g.width - phase_x).div_ceil(g.stride)];
            passes.push(Pass { origin: [phase_y, phase_x], step: g.stride, count, in_step: 1, taps });
        }
    }
    passes
}

/// An image in 32 bits, with the frame of zeros that a set of passes reads beyond its edges.
struct Framed {
    data: *const f32,
    /// Floats from an image to the next.
    image: usize,
    /// Pixels in a row.
    width: usize,
    channels: usize,
    /// Rows above, columns to the left.
    before: [usize; 2],
    /// Keeps a framed copy alive; none where the image itself is wide and needs no frame.
    _copy: Option<Buffer>,
}

// SAFETY: read only.
unsafe impl Sync for Framed {}
// SAFETY: read only.
unsafe impl Send for Framed {}

impl Framed {
    fn new<T: Float>(
        level: Level,
        images: Images<T>,
        batch: usize,
        height: usize,
        width: usize,
        passes: &[Pass],
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
            let data = images.data.cast();
            return Framed { data, image: images.image, width, channels, before, _copy: None };
        }
        let full_height = before[0] + height + after[0];
        let full_width = before[1] + width + after[1];
        let mut copy = Buffer::new(batch * full_height * full_width * channels);
        let to = Shared::new(&mut copy);
        let images = &images;
        parallel::for_each(batch * full_height, |task| {
            let (image, row) = (task / full_height, task % full_height);
            // SAFETY: each task writes its own row; the row that is copied lies inside the image.
            unsafe {
                let out = std::slice::from_raw_parts_mut(
                    to.at(task * full_width * channels),
                    full_width * channels,
                );
                if row < before[0] || row >= before[0] + height {
                    out.fill(0.);
                    return;
                }
                let from = images.data.add(image * images.image + (row - before[0]) * width * channels);
                let (start, len) = (before[1] * channels, width * channels);
                out[..start].fill(0.);
                let row = Shared::new(&mut out[start..start + len]);
                level.run(Convert { from: std::slice::from_raw_parts(from, len), to: row, part: 0..len });
                out[start + len..].fill(0.);
            }
        });
        let image = full_height * full_width * channels;
        Framed { data: copy.as_ptr(), image, width: full_width, channels, before, _copy: Some(copy) }
    }

    /// The inner index of a pass: for each tap, `channels` floats; neighbours joined.
    fn runs(&self, pass: &Pass, channels: usize) -> Vec<Run> {
        let mut runs: Vec<Run> = Vec::with_capacity(pass.taps.len());
        for tap in &pass.taps {
            let y = (tap.y + self.before[0] as isize) as usize;
            let x = (tap.x + self.before[1] as isize) as usize;
            let offset = (y * self.width + x) * self.channels;
            match runs.last_mut() {
                Some(last) if last.offset + last.len == offset => last.len += channels,
                _ => runs.push(Run { offset, len: channels }),
            }
        }
        runs
    }

    /// The first float of the inputs of output (j, i) of an image, before the taps.
    #[inline(always)]
    unsafe fn at(&self, image: usize, in_step: usize, j: usize, i: usize) -> *const f32 {
        // SAFETY: the caller stays inside the frame.
        unsafe {
            self.data.add(image * self.image + (j * in_step * self.width + i * in_step) * self.channels)
        }
    }
}

/// Channels-last images to write, or to add to; `image` floats apart.
#[derive(Clone, Copy)]
pub(crate) struct OutputImages {
    pub(crate) data: Shared,
    pub(crate) image: usize,
    pub(crate) add: bool,
}

impl OutputImages {
    /// Images one after the other, to write.
    pub(crate) fn contiguous(data: Shared, image: usize) -> OutputImages {
        OutputImages { data, image, add: false }
    }
}

/// The tensor that the passes fill.
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
        // SAFETY: the caller asks for pixels of the pass, which lie inside the output.
        unsafe { self.images.data.at(image * self.images.image + (y * self.width + x) * self.channels) }
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
    let output = Output { images: dx, width: g.width, channels: g.inputs };
    let weights = Weights { data: weight, geometry: g, swapped: true };
    run_passes(level, g.batch, [g.out_height, g.out_width], dy, backward_passes(g), weights, bias, output);
}

/// The weights, seen forwards, or from the other side: inputs and outputs swapped.
#[derive(Clone, Copy)]
struct Weights<'a> {
    data: &'a [f32],
    geometry: &'a Geometry,
    swapped: bool,
}

impl Weights<'_> {
    /// (from, to) channels of a group.
    fn channels(&self) -> (usize, usize) {
        let (i, o) = (self.geometry.group_inputs(), self.geometry.group_outputs());
        if self.swapped { (o, i) } else { (i, o) }
    }
    #[inline(always)]
    fn at(&self, group: usize, from: usize, to: usize, tap: usize) -> f32 {
        let (i, o) = if self.swapped { (to, from) } else { (from, to) };
        self.data[self.geometry.weight(group, o, i, tap)]
    }
}

/// Outputs of a row in one call: a multiple of the register block's rows.
const SEGMENT: usize = 96;
/// Multiplications that are worth a task.
const TASK_WORK: usize = 1 << 20;

#[expect(clippy::too_many_arguments, reason = "one private driver for both directions")]
fn run_passes<T: Float>(
    level: Level,
    batch: usize,
    [height, width]: [usize; 2],
    images: Images<T>,
    mut passes: Vec<Pass>,
    weights: Weights,
    bias: Option<&[f32]>,
    mut output: Output,
) {
    let g = weights.geometry;
    let (from, to) = weights.channels();
    let framed = Framed::new(level, images, batch, height, width, &passes);
    let mut batch = batch;
    if let [pass] = &mut *passes
        && g.taps() == 1
        && pass.in_step == 1
        && framed.image == height * width * framed.channels
        && pass.count == [height, width]
        && output.images.image == height * width * output.channels
    {
        // 1x1: all pixels are one row.
        pass.count = [1, batch * height * width];
        output.width = pass.count[1];
        batch = 1;
    }
    for pass in &passes {
        let runs = framed.runs(pass, from);
        let depth: usize = runs.iter().map(|r| r.len).sum();
        let shape = if g.depthwise() {
            Shape::Depthwise
        } else if to < 4 && depth >= 2 * LANES * runs.len() {
            Shape::Dot
        } else {
            Shape::Product
        };
        let packed = pack(weights, pass, shape);
        // The bias too, in whole panels.
        let panel_floats = to.div_ceil(LANES) * LANES;
        let mut row = Buffer::new(if shape == Shape::Depthwise {
            packed_channels(g.groups)
        } else {
            g.groups * panel_floats
        });
        row.fill(0.);
        if let Some(bias) = bias {
            if shape == Shape::Depthwise {
                row[..bias.len()].copy_from_slice(bias);
            } else {
                for (to_row, from_row) in row.chunks_mut(panel_floats).zip(bias.chunks(to)) {
                    to_row[..to].copy_from_slice(from_row);
                }
            }
        }
        let segments = pass.count[1].div_ceil(SEGMENT);
        let lines = batch * pass.count[0] * segments;
        let work = pass.count[1].min(SEGMENT) * depth * to * g.groups;
        let lines_in_task = (TASK_WORK / work.max(1)).clamp(1, lines.max(1));
        parallel::for_each(lines.div_ceil(lines_in_task), |task| {
            let first = task * lines_in_task;
            level.run(Lines {
                pass,
                framed: &framed,
                output: &output,
                runs: &runs,
                depth,
                shape,
                weights: &packed,
                bias: &row,
                groups: g.groups,
                from,
                to,
                segments,
                lines: first..lines.min(first + lines_in_task),
            });
        });
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Shape {
    Depthwise,
    Dot,
    Product,
}

fn packed_channels(channels: usize) -> usize {
    channels.next_multiple_of(LANES)
}

/// Weights of a pass in the order in which its kernel reads them:
/// product `[group][panel][k][column]`, dot `[group][output][k]`, depthwise `[tap][channel]`.
fn pack(weights: Weights, pass: &Pass, shape: Shape) -> Buffer {
    let groups = weights.geometry.groups;
    let (from, to) = weights.channels();
    let depth = pass.taps.len() * from;
    match shape {
        Shape::Depthwise => {
            let row = packed_channels(groups);
            let mut packed = Buffer::new(pass.taps.len() * row);
            packed.fill(0.);
            for (k, tap) in pass.taps.iter().enumerate() {
                for group in 0..groups {
                    packed[k * row + group] = weights.at(group, 0, 0, tap.index);
                }
            }
            packed
        }
        Shape::Dot => {
            let mut packed = Buffer::new(groups * to * depth);
            for group in 0..groups {
                for o in 0..to {
                    for (k, tap) in pass.taps.iter().enumerate() {
                        for i in 0..from {
                            packed[((group * to + o) * pass.taps.len() + k) * from + i] =
                                weights.at(group, i, o, tap.index);
                        }
                    }
                }
            }
            packed
        }
        Shape::Product => {
            let row = to.div_ceil(LANES) * LANES;
            let mut packed = Buffer::new(groups * depth * row);
            let data = Shared::new(&mut packed);
            let panels = row.div_ceil(2 * LANES);
            parallel::for_each(groups * panels, |task| {
                let (group, panel) = (task / panels, task % panels);
                let first = panel * 2 * LANES;
                let width = (row - first).min(2 * LANES);
                // SAFETY: each task has its own panel.
                let panel = unsafe {
                    std::slice::from_raw_parts_mut(
                        data.at(group * depth * row + first * depth),
                        depth * width,
                    )
                };
                for (k, line) in panel.chunks_exact_mut(width).enumerate() {
                    let (tap, i) = (pass.taps[k / from].index, k % from);
                    for (column, x) in line.iter_mut().enumerate() {
                        *x = if first + column < to { weights.at(group, i, first + column, tap) } else { 0. };
                    }
                }
            });
            packed
        }
    }
}

/// Some lines (segments of rows) of a pass.
struct Lines<'a> {
    pass: &'a Pass,
    framed: &'a Framed,
    output: &'a Output,
    runs: &'a [Run],
    depth: usize,
    shape: Shape,
    weights: &'a [f32],
    bias: &'a [f32],
    groups: usize,
    from: usize,
    to: usize,
    segments: usize,
    lines: std::ops::Range<usize>,
}

impl Kernel for Lines<'_> {
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        // SAFETY: each line belongs to one task; the frame covers all that the pass reads.
        unsafe {
            match self.shape {
                Shape::Product => self.products::<S>(),
                Shape::Dot => self.dots::<S>(),
                Shape::Depthwise => self.depthwise::<S>(),
            }
        }
    }
}

impl Lines<'_> {
    /// (input of the first pixel, its output, pixels) of a line.
    #[inline(always)]
    unsafe fn line(&self, line: usize) -> (*const f32, *mut f32, usize) {
        let (row, first) = (line / self.segments, line % self.segments * SEGMENT);
        let (image, j) = (row / self.pass.count[0], row % self.pass.count[0]);
        let len = SEGMENT.min(self.pass.count[1] - first);
        // SAFETY: the line exists.
        unsafe {
            (
                self.framed.at(image, self.pass.in_step, j, first),
                self.output.at(self.pass, image, j, first),
                len,
            )
        }
    }

    #[inline(always)]
    unsafe fn products<S: Simd>(&self) {
        let vectors = self.to.div_ceil(LANES);
        for group in 0..self.groups {
            for panel in 0..vectors.div_ceil(2) {
                let first = panel * 2 * LANES;
                let width = (vectors - 2 * panel).min(2);
                let lanes = (self.to - first - (width - 1) * LANES).min(LANES);
                for line in self.lines.clone() {
                    // SAFETY: as for `run`.
                    unsafe {
                        let (x, y, len) = self.line(line);
                        let row = group * vectors * LANES + first;
                        product::<S>(
                            len,
                            Product {
                                runs: self.runs,
                                a: x.add(group * self.from),
                                a_row: self.pass.in_step * self.framed.channels,
                                b: self.weights.as_ptr().add(row * self.depth),
                                c: y.add(group * self.to + first),
                                c_row: self.pass.step * self.output.channels,
                                width,
                                lanes,
                                start: if self.output.images.add {
                                    Start::Add
                                } else {
                                    Start::Row(self.bias.as_ptr().add(row))
                                },
                            },
                        );
                    }
                }
            }
        }
    }

    #[inline(always)]
    unsafe fn dots<S: Simd>(&self) {
        let a_row = self.pass.in_step * self.framed.channels;
        let c_row = self.pass.step * self.output.channels;
        for line in self.lines.clone() {
            for group in 0..self.groups {
                for o in 0..self.to {
                    let channel = group * self.to + o;
                    // SAFETY: as for `run`.
                    unsafe {
                        let (x, y, len) = self.line(line);
                        let x = x.add(group * self.from);
                        let w = self.weights.as_ptr().add(channel * self.depth);
                        let bias = self.bias[group * packed_channels(self.to) + o];
                        let mut i = 0;
                        while i < len {
                            // Four pixels at a time share the weights and hide the latency of the sums.
                            let n = if len - i >= 4 { 4 } else { 1 };
                            let from = x.add(i * a_row);
                            let sums = if n == 4 {
                                dot::<S, 4>(self.runs, from, a_row, w)
                            } else {
                                [dot::<S, 1>(self.runs, from, a_row, w)[0], 0., 0., 0.]
                            };
                            for (k, sum) in sums.iter().enumerate().take(n) {
                                let to = y.add((i + k) * c_row + channel);
                                *to = if self.output.images.add { *to + sum } else { bias + sum };
                            }
                            i += n;
                        }
                    }
                }
            }
        }
    }

    #[inline(always)]
    unsafe fn depthwise<S: Simd>(&self) {
        for line in self.lines.clone() {
            for channel in (0..self.groups).step_by(LANES) {
                // SAFETY: as for `run`.
                unsafe {
                    let (x, y, len) = self.line(line);
                    let mut i = 0;
                    while i < len {
                        let n = if len - i >= 8 { 8 } else { 1 };
                        let x = x.add(i * self.pass.in_step * self.framed.channels + channel);
                        let y = y.add(i * self.pass.step * self.output.channels + channel);
                        if n == 8 {
                            self.depthwise_block::<S, 8>(channel, x, y)
                        } else {
                            self.depthwise_block::<S, 1>(channel, x, y)
                        }
                        i += n;
                    }
                }
            }
        }
    }

    /// 16 channels of `N` pixels.
    #[inline(always)]
    unsafe fn depthwise_block<S: Simd, const N: usize>(&self, channel: usize, x: *const f32, y: *mut f32) {
        let (x_row, y_row) =
            (self.pass.in_step * self.framed.channels, self.pass.step * self.output.channels);
        let lanes = LANES.min(self.groups - channel);
        // SAFETY: as for `run`.
        unsafe {
            let mut sums = [S::load(self.bias.as_ptr().add(channel)); N];
            if self.output.images.add {
                for i in 0..N {
                    sums[i] = S::load_lanes(y.add(i * y_row), lanes);
                }
            }
            let mut w = self.weights.as_ptr().add(channel);
            // Each run is one tap: there are more channels than one, so neighbours are not joined.
            for run in self.runs {
                let weight = S::load(w);
                let x = x.add(run.offset);
                if lanes == LANES {
                    for i in 0..N {
                        sums[i] = S::load(x.add(i * x_row)).mul_add(weight, sums[i]);
                    }
                } else {
                    for i in 0..N {
                        sums[i] = S::load_first(x.add(i * x_row), lanes).mul_add(weight, sums[i]);
                    }
                }
                w = w.add(packed_channels(self.groups));
            }
            for i in 0..N {
                sums[i].store_lanes(y.add(i * y_row), lanes);
            }
        }
    }
}

/// The dot product of the weights with the runs of `N` pixels.
#[inline(always)]
unsafe fn dot<S: Simd, const N: usize>(
    runs: &[Run],
    x: *const f32,
    row: usize,
    mut w: *const f32,
) -> [f32; N] {
    // SAFETY: the caller's promise: the runs of N pixels are readable.
    unsafe {
        let mut acc = [S::zero(); N];
        for run in runs {
            let x = x.add(run.offset);
            let whole = run.len / LANES * LANES;
            for k in (0..whole).step_by(LANES) {
                let wv = S::load(w.add(k));
                for i in 0..N {
                    acc[i] = S::load(x.add(i * row + k)).mul_add(wv, acc[i]);
                }
            }
            if whole < run.len {
                let wv = S::load_first(w.add(whole), run.len - whole);
                for i in 0..N {
                    acc[i] = S::load_first(x.add(i * row + whole), run.len - whole).mul_add(wv, acc[i]);
                }
            }
            w = w.add(run.len);
        }
        let mut sums = [0f32; N];
        for i in 0..N {
            sums[i] = acc[i].sum();
        }
        sums
    }
}

/// Adds to dw, in PyTorch's layout, the gradient of the weights.
pub(crate) fn backward_weight<T: Float>(
    level: Level,
    g: &Geometry,
    x: Images<T>,
    dy: Images,
    dw: &mut [f32],
) {
    let pass = forward_pass(g);
    let framed = Framed::new(level, x, g.batch, g.height, g.width, std::slice::from_ref(&pass));
    let (from, to) = (g.group_inputs(), g.group_outputs());
    let runs = framed.runs(&pass, from);
    let depth = from * g.taps();
    let longest = runs.iter().map(|r| r.len).max().unwrap_or(0);
    let shape = if g.depthwise() {
        Shape::Depthwise
    } else if to < LANES && to < longest {
        Shape::Dot
    } else {
        Shape::Product
    };
    // The pieces of the gradient: which run, from where, how long.
    let mut pieces = Vec::new();
    let mut k = 0;
    for run in &runs {
        for first in (0..run.len).step_by(PIECE) {
            let len = PIECE.min(run.len - first);
            pieces.push(Piece { offset: run.offset + first, k: k + first, len });
        }
        k += run.len;
    }
    if shape == Shape::Depthwise {
        // All taps of 16 channels.
        pieces = (0..g.groups)
            .step_by(LANES)
            .map(|c| Piece { offset: c, k: c, len: LANES.min(g.groups - c) })
            .collect();
    }
    // The lines of pixels to sum over: rows, or segments of one long row.
    let flat = g.taps() == 1
        && g.stride == 1
        && (g.height, g.width) == (g.out_height, g.out_width)
        && framed.image == g.height * g.width * g.inputs
        && dy.image == g.out_height * g.out_width * g.outputs;
    let (rows, line) =
        if flat { (1, g.batch * g.height * g.width) } else { (g.batch * g.out_height, g.out_width) };
    let segments = line.div_ceil(LINE);
    let lines = rows * segments;

    // Enough tasks for many threads, but a function of the sizes alone.
    let groups = if shape == Shape::Depthwise { 1 } else { g.groups };
    let parts = (TASKS / (groups * pieces.len())).clamp(1, lines.max(1));
    let (rows_of_c, row_of_c) = match shape {
        Shape::Depthwise => (g.taps(), packed_channels(g.groups)),
        Shape::Dot => (to, pieces.iter().map(|p| p.len.next_multiple_of(LANES)).sum()),
        Shape::Product => (depth, to.next_multiple_of(LANES)),
    };
    let part_floats = groups * rows_of_c * row_of_c;
    let mut sums = Buffer::zeroed(parts * part_floats);
    let data = Shared::new(&mut sums);
    let scratch = || Buffer::new(LINE * (PIECE + 2 * LANES));
    parallel::for_each_with(parts * groups * pieces.len(), scratch, |task, scratch| {
        let (part, piece) = (task / (groups * pieces.len()), task % (groups * pieces.len()));
        let (group, piece) = (piece / pieces.len(), piece % pieces.len());
        level.run(WeightSums {
            g,
            pass: &pass,
            framed: &framed,
            dy,
            shape,
            piece: pieces[piece],
            // In the dot layout each piece has its own columns.
            column: pieces[..piece].iter().map(|p| p.len.next_multiple_of(LANES)).sum(),
            group,
            runs: &runs,
            lines: part * lines / parts..(part + 1) * lines / parts,
            segments,
            line,
            flat,
            data,
            at: part * part_floats + group * rows_of_c * row_of_c,
            row_of_c,
            depth,
            scratch,
        });
    });

    // Back into PyTorch's layout.
    let columns: Vec<usize> = {
        // Where value k of the inner index stands in the dot layout.
        let mut columns = vec![0; depth];
        let mut first = 0;
        for p in &pieces {
            if shape == Shape::Dot {
                (0..p.len).for_each(|i| columns[p.k + i] = first + i);
            }
            first += p.len.next_multiple_of(LANES);
        }
        columns
    };
    let (total, others) = sums.split_at_mut(part_floats);
    parallel::add_all(total, others);
    let out = Shared::new(dw);
    parallel::for_each(g.outputs, |o| {
        let (group, o) = (o / to, o % to);
        for i in 0..from {
            for tap in 0..g.taps() {
                let k = tap * from + i;
                let at = match shape {
                    Shape::Depthwise => tap * row_of_c + group,
                    Shape::Dot => (group * rows_of_c + o) * row_of_c + columns[k],
                    Shape::Product => {
                        let first = o / (2 * LANES) * 2 * LANES;
                        let width = (row_of_c - first).min(2 * LANES);
                        group * rows_of_c * row_of_c + first * depth + k * width + o - first
                    }
                };
                // SAFETY: each weight belongs to one output channel, and that to one task.
                unsafe { *out.at(g.weight(group, o, i, tap)) += total[at] };
            }
        }
    });
}

/// Values of the inner index whose gradients one task sums.
const PIECE: usize = 96;
/// Pixels of a line: so many that the operands of its products stay in the L1 cache.
const LINE: usize = 64;
/// Tasks of a weight gradient, where its size does not already make more.
const TASKS: usize = 32;

#[derive(Clone, Copy)]
struct Piece {
    offset: usize,
    k: usize,
    len: usize,
}

struct WeightSums<'a> {
    g: &'a Geometry,
    pass: &'a Pass,
    framed: &'a Framed,
    dy: Images,
    shape: Shape,
    piece: Piece,
    column: usize,
    group: usize,
    runs: &'a [Run],
    lines: std::ops::Range<usize>,
    segments: usize,
    line: usize,
    flat: bool,
    data: Shared,
    at: usize,
    row_of_c: usize,
    depth: usize,
    /// Room for a line of the piece, and of two vectors of outputs.
    scratch: &'a mut [f32],
}

impl Kernel for WeightSums<'_> {
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let to = self.g.group_outputs();
        let x_row = self.pass.in_step * self.framed.channels;
        for line in self.lines.clone() {
            let (row, first) = (line / self.segments, line % self.segments * LINE);
            let len = LINE.min(self.line - first);
            // SAFETY: the line exists; each task has its own sums.
            unsafe {
                let (x, dy) = if self.flat {
                    (self.framed.data.add(first * self.g.inputs), self.dy.data.add(first * self.g.outputs))
                } else {
                    let (image, j) = (row / self.g.out_height, row % self.g.out_height);
                    let dy = self
                        .dy
                        .data
                        .add(image * self.dy.image + (j * self.g.out_width + first) * self.g.outputs);
                    (self.framed.at(image, self.pass.in_step, j, first), dy)
                };
                match self.shape {
                    Shape::Product => {
                        let x = x.add(self.group * self.g.group_inputs() + self.piece.offset);
                        // Both operands are packed: with the channels of most models, pixels lie a power of two apart,
                        // and few of them would fit into the cache at once.
                        let (a, b) = self.scratch.split_at_mut(LINE * PIECE);
                        copy_rows::<S>(x, x_row, a.as_mut_ptr(), self.piece.len, len);
                        for panel in 0..self.row_of_c.div_ceil(2 * LANES) {
                            let column = panel * 2 * LANES;
                            let width = ((self.row_of_c - column) / LANES).min(2);
                            let outputs = (to - column).min(width * LANES);
                            let dy = dy.add(self.group * to + column);
                            copy_rows::<S>(dy, self.g.outputs, b.as_mut_ptr(), outputs, len);
                            let at = self.at + column * self.depth + self.piece.k * width * LANES;
                            product_transposed::<S>(
                                self.piece.len,
                                len,
                                ProductTransposed {
                                    a: a.as_ptr(),
                                    a_row: self.piece.len,
                                    b: b.as_ptr(),
                                    b_row: outputs,
                                    b_vector: LANES,
                                    lanes: outputs - (width - 1) * LANES,
                                    c: self.data.at(at),
                                    c_row: width * LANES,
                                    width,
                                },
                            );
                        }
                    }
                    Shape::Dot => {
                        let x = x.add(self.group * self.g.group_inputs() + self.piece.offset);
                        for column in (0..self.piece.len).step_by(2 * LANES) {
                            let rest = self.piece.len - column;
                            let width = rest.div_ceil(LANES).min(2);
                            product_transposed::<S>(
                                to,
                                len,
                                ProductTransposed {
                                    a: dy.add(self.group * to),
                                    a_row: self.g.outputs,
                                    b: x.add(column),
                                    b_row: x_row,
                                    b_vector: LANES,
                                    lanes: (rest - (width - 1) * LANES).min(LANES),
                                    c: self.data.at(self.at + self.column + column),
                                    c_row: self.row_of_c,
                                    width,
                                },
                            );
                        }
                    }
                    Shape::Depthwise => {
                        let lanes = self.piece.len;
                        let dy = dy.add(self.piece.offset);
                        for (tap, run) in self.runs.iter().enumerate() {
                            // Four sums hide the latency of the additions.
                            let x = x.add(run.offset + self.piece.offset);
                            let mut sums = [S::zero(); 4];
                            for i in 0..len {
                                let d = S::load_lanes(dy.add(i * self.g.outputs), lanes);
                                sums[i % 4] = S::load_lanes(x.add(i * x_row), lanes).mul_add(d, sums[i % 4]);
                            }
                            let to = self.data.at(self.at + self.piece.k + tap * self.row_of_c);
                            let sum = sums[0].add(sums[1]).add(sums[2].add(sums[3]));
                            S::load(to).add(sum).store(to);
                        }
                    }
                }
            }
        }
    }
}

/// Copies `rows` rows of `len` floats, `stride` apart, so that each follows the one before.
/// # Safety
/// The rows are readable, and there is room for them.
#[inline(always)]
unsafe fn copy_rows<S: Simd>(from: *const f32, stride: usize, to: *mut f32, len: usize, rows: usize) {
    for row in 0..rows {
        for column in (0..len).step_by(LANES) {
            let lanes = LANES.min(len - column);
            // SAFETY: the caller's promise.
            unsafe {
                let values = S::load_lanes(from.add(row * stride + column), lanes);
                values.store_lanes(to.add(row * len + column), lanes);
            }
        }
    }
}

/// Adds to db the sum over all pixels of (pixels, channels).
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
