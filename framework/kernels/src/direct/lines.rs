//! The lines of a pass: rows of outputs as products, or as dot products.

use super::frame::{Framed, TapRun};
use super::pass::Pass;
use super::{Output, Weights, halvings, packed_channels};
use std::cmp::Reverse;
use std::ops::Range;

use crate::buffer::Buffer;
use crate::float::Float;
use crate::gemm::{Product, Run, Start, product};
use crate::parallel::{self, Shared};
use crate::simd::{Kernel, LANES, Level, Simd};
use crate::winograd::Images;

/// Outputs of a row per call: a multiple of the register block's rows.
const SEGMENT: usize = 96;
/// Minimum multiplications per task.
const TASK_WORK: usize = 1 << 20;
/// Maximum tasks of a pass, if it has enough work.
const TASKS: usize = 128;

/// Which kernel serves a shape.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Shape {
    Dot,
    Product,
}

#[expect(clippy::too_many_arguments, reason = "one private driver for both directions")]
pub(super) fn run_passes<T: Float>(
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
    let framed = Framed::new(level, images, batch, height, width, &passes, g.groups);
    let mut batch = batch;
    if let [pass] = &mut *passes
        && g.taps() == 1
        && pass.in_step == 1
        && framed.image == height * width * framed.channels
        && pass.count == [height, width]
        && output.images.image == height * width * output.channels
    {
        // 1x1: all pixels form one row of neighbours, even if one-pixel images had a larger step.
        pass.count = [1, batch * height * width];
        pass.step = 1;
        output.width = pass.count[1];
        batch = 1;
    }
    for pass in &passes {
        let taps = framed.runs(pass, from);
        let runs: Vec<Run> = taps.iter().map(|taps| taps.run).collect();
        let depth: usize = runs.iter().map(|r| r.len).sum();
        let shape = if to < 4 && depth >= 2 * LANES * runs.len() { Shape::Dot } else { Shape::Product };
        let packed = pack(weights, pass, shape);
        // The bias is padded to whole vectors too.
        let row_floats = packed_channels(to);
        let mut row = Buffer::zeroed(g.groups * row_floats);
        if let Some(bias) = bias {
            for (to_row, from_row) in row.chunks_mut(row_floats).zip(bias.chunks(to)) {
                to_row[..to].copy_from_slice(from_row);
            }
        }
        let segments = pass.count[1].div_ceil(SEGMENT);
        let lines = batch * pass.count[0] * segments;
        let panels = match shape {
            Shape::Product => g.groups * row_floats.div_ceil(2 * LANES),
            Shape::Dot => g.groups,
        };
        let work = pass.count[1] * batch * pass.count[0] * depth * to * g.groups;
        let [by_lines, by_panels] =
            tasks_by((work / TASK_WORK).clamp(1, TASKS), lines, panels, |by_lines, by_panels| {
                // Each task along the lines reads the weights again; each task along the panels reads the
                // images again.
                by_lines * depth * to * g.groups
                    + by_panels.div_ceil(g.groups) * batch * height * width * from * g.groups
            });
        parallel::for_each(by_lines * by_panels, |task| {
            let (task, panel) = (task / by_panels, task % by_panels);
            level.run(Lines {
                pass,
                framed: &framed,
                output: &output,
                runs: &runs,
                taps: &taps,
                height,
                depth,
                shape,
                weights: &packed,
                bias: &row,
                to,
                panels: panel * panels / by_panels..(panel + 1) * panels / by_panels,
                segments,
                lines: task * lines / by_lines..(task + 1) * lines / by_lines,
            });
        });
    }
}

/// The number of tasks along lines and along panels into which to split a pass: about `tasks` in total,
/// reading as little as possible.
fn tasks_by(tasks: usize, lines: usize, panels: usize, read: impl Fn(usize, usize) -> usize) -> [usize; 2] {
    let cuts = halvings(tasks).map(|n| {
        let by_panels = n.min(panels);
        [(tasks / by_panels).clamp(1, lines.max(1)), by_panels]
    });
    // Threads must finish together, so the first criterion is at least half of `tasks`, or as many as
    // possible.
    let cost = |&[by_lines, by_panels]: &[usize; 2]| {
        (Reverse(tasks.min(2 * by_lines * by_panels)), read(by_lines, by_panels))
    };
    cuts.min_by_key(cost).unwrap_or([1, 1])
}

/// Input channels transposed at once: one cache line.
const BLOCK: usize = 16;

/// Packs these columns of a 1x1 convolution's weights, which are a matrix, as `[k][column]`, padded with
/// zeros.
fn pack_matrix(weights: &Weights, group: usize, columns: Range<usize>, panel: &mut [f32], width: usize) {
    let (from, to) = weights.channels();
    let matrix = &weights.data[weights.geometry.weight(group, 0, 0, 0)..][..from * to];
    if weights.swapped {
        // (from, to): already in the right order.
        for (line, row) in panel.chunks_exact_mut(width).zip(matrix.chunks_exact(to)) {
            let (line, behind) = line.split_at_mut(columns.len());
            line.copy_from_slice(&row[columns.clone()]);
            behind.fill(0.);
        }
        return;
    }
    // (to, from): transposed in blocks that stay in the cache.
    for first in (0..from).step_by(BLOCK) {
        let last = from.min(first + BLOCK);
        let block = &mut panel[first * width..last * width];
        for (column, to) in columns.clone().enumerate() {
            let row = &matrix[to * from + first..to * from + last];
            for (line, x) in block.chunks_exact_mut(width).zip(row) {
                line[column] = *x;
            }
        }
        block.chunks_exact_mut(width).for_each(|line| line[columns.len()..].fill(0.));
    }
}

/// The weights of a pass in the order in which its kernel reads them: `[group][panel][k][column]` for
/// products, `[group][output][k]` for dot products.
fn pack(weights: Weights, pass: &Pass, shape: Shape) -> Buffer {
    let groups = weights.geometry.groups;
    let (from, to) = weights.channels();
    let depth = pass.taps.len() * from;
    match shape {
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
                let columns = width.min(to - first);
                if weights.geometry.taps() == 1 {
                    return pack_matrix(&weights, group, first..first + columns, panel, width);
                }
                // The taps of a channel are contiguous in the weights; here columns are. They are transposed
                // through a tile that stays in the cache, which strided accesses on either side would not.
                let mut tile = vec![0f32; pass.taps.len() * width];
                for i in 0..from {
                    for column in 0..columns {
                        let taps = weights.taps(group, i, first + column);
                        for (k, tap) in pass.taps.iter().enumerate() {
                            tile[k * width + column] = taps[tap.index];
                        }
                    }
                    for (k, line) in tile.chunks_exact(width).enumerate() {
                        panel[(k * from + i) * width..][..width].copy_from_slice(line);
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
    /// The runs with the rows that they read.
    taps: &'a [TapRun],
    /// Height of the images that the pass reads.
    height: usize,
    depth: usize,
    shape: Shape,
    weights: &'a [f32],
    bias: &'a [f32],
    to: usize,
    /// For products, panels over all groups; for dot products, groups.
    panels: Range<usize>,
    segments: usize,
    lines: Range<usize>,
}

impl Kernel for Lines<'_> {
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        // SAFETY: each line belongs to exactly one task; the frame covers everything that the pass reads.
        unsafe {
            match self.shape {
                Shape::Product => self.products::<S>(),
                Shape::Dot => self.dots::<S>(),
            }
        }
    }
}

impl Lines<'_> {
    /// Input address of the first pixel, its output address, and the number of pixels of a line.
    #[inline(always)]
    unsafe fn line(&self, line: usize) -> (*const f32, *mut f32, usize) {
        let (row, first) = (line / self.segments, line % self.segments * SEGMENT);
        let (image, j) = (row / self.pass.count[0], row % self.pass.count[0]);
        let len = SEGMENT.min(self.pass.count[1] - first);
        // SAFETY: the caller passes a line that exists.
        unsafe {
            (
                self.framed.at(image, self.pass.in_step, j, first),
                self.output.at(self.pass, image, j, first),
                len,
            )
        }
    }

    /// The runs that read rows inside the image, and the number of floats in the runs before them.
    #[inline(always)]
    fn runs_inside(&self, line: usize) -> (&[Run], usize) {
        let row = line / self.segments % self.pass.count[0] * self.pass.in_step;
        let outside = |taps: &&TapRun| !taps.sees(row, self.height);
        let first = self.taps.iter().take_while(outside).count();
        let last = self.taps.len() - self.taps[first..].iter().rev().take_while(outside).count();
        (&self.runs[first..last], self.runs[..first].iter().map(|run| run.len).sum())
    }

    #[inline(always)]
    unsafe fn products<S: Simd>(&self) {
        let vectors = self.to.div_ceil(LANES);
        let in_group = vectors.div_ceil(2);
        for panel in self.panels.clone() {
            let (group, panel) = (panel / in_group, panel % in_group);
            let first = panel * 2 * LANES;
            let width = (vectors - 2 * panel).min(2);
            let lanes = (self.to - first - (width - 1) * LANES).min(LANES);
            for line in self.lines.clone() {
                // SAFETY: same as for `run`.
                unsafe {
                    let (x, y, len) = self.line(line);
                    let row = group * vectors * LANES + first;
                    let (runs, before) = self.runs_inside(line);
                    product::<S>(
                        len,
                        Product {
                            runs,
                            a: x.add(group * self.framed.group),
                            a_row: self.pass.in_step * self.framed.channels,
                            b: self.weights.as_ptr().add(row * self.depth + before * width * LANES),
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

    #[inline(always)]
    unsafe fn dots<S: Simd>(&self) {
        let a_row = self.pass.in_step * self.framed.channels;
        let c_row = self.pass.step * self.output.channels;
        for line in self.lines.clone() {
            for group in self.panels.clone() {
                for o in 0..self.to {
                    let channel = group * self.to + o;
                    // SAFETY: same as for `run`.
                    unsafe {
                        let (x, y, len) = self.line(line);
                        let x = x.add(group * self.framed.group);
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
}

/// The dot products of the weights with the runs of `N` pixels.
#[inline(always)]
unsafe fn dot<S: Simd, const N: usize>(
    runs: &[Run],
    x: *const f32,
    row: usize,
    mut w: *const f32,
) -> [f32; N] {
    // SAFETY: guaranteed by the caller: the runs of N pixels are readable.
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tasks_read_the_smaller_side_again() {
        // The floats that all tasks of a side read: weights and images.
        let cut = |lines, panels, weights: usize, images: usize| {
            tasks_by(TASKS, lines, panels, |by_lines, by_panels| by_lines * weights + by_panels * images)
        };
        assert_eq!(cut(1000, 1000, 1, 1000), [TASKS, 1]);
        assert_eq!(cut(1000, 1000, 1000, 1), [1, TASKS]);
        // At least half as many tasks, whatever they read, so that threads finish together.
        assert_eq!(cut(6, 1000, 1, 1000), [6, 16]);
        assert_eq!(cut(6, 3, 1, 1), [6, 3]);
    }
}
