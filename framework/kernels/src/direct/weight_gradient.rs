//! The gradient of the weights.

use super::frame::Framed;
use super::pass::{Pass, forward_pass};
use super::{Geometry, Shape, packed_channels};
use crate::buffer::Buffer;
use crate::float::Float;
use crate::gemm::{ProductTransposed, Run, product_transposed};
use crate::parallel::{self, Shared};
use crate::simd::{Kernel, LANES, Level, Simd};
use crate::winograd::Images;

/// Adds to dw, in PyTorch's layout, the gradient of the weights.
pub(crate) fn backward_weight<T: Float>(
    level: Level,
    g: &Geometry,
    x: Images<T>,
    dy: Images,
    dw: &mut [f32],
) {
    let pass = forward_pass(g);
    let groups = if g.depthwise() { 1 } else { g.groups };
    let framed = Framed::new(level, x, g.batch, g.height, g.width, std::slice::from_ref(&pass), groups);
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
    let parts = (TASKS / (groups * pieces.len())).clamp(1, lines.max(1));
    let (rows_of_c, row_of_c) = match shape {
        Shape::Depthwise => (g.taps(), packed_channels(g.groups)),
        Shape::Dot => (to, pieces.iter().map(|p| p.len.next_multiple_of(LANES)).sum()),
        Shape::Product => (depth, to.next_multiple_of(LANES)),
    };
    let part_floats = groups * rows_of_c * row_of_c;
    let mut sums = Buffer::zeroed(parts * part_floats);
    let data = Shared::new(&mut sums);
    let scratch = || Buffer::new(LINE * (PIECE + PANEL));
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
    // By panels of outputs, as they lie in the sums of products.
    let (panels, chunks) = (to.div_ceil(PANEL), from.div_ceil(PANEL));
    parallel::for_each(g.groups * panels * chunks, |task| {
        let (group, panel, chunk) = (task / (panels * chunks), task / chunks % panels, task % chunks);
        let first = panel * PANEL;
        let outputs = PANEL.min(to - first);
        if g.taps() == 1 && shape == Shape::Product {
            // A matrix, turned around in blocks that stay in the cache.
            let width = PANEL.min(row_of_c - first);
            let inputs = chunk * PANEL..from.min((chunk + 1) * PANEL);
            let sums = &total[group * rows_of_c * row_of_c + first * depth..];
            for o in 0..outputs {
                // SAFETY: each weight belongs to one panel and chunk, and these to one task.
                let row = unsafe {
                    std::slice::from_raw_parts_mut(
                        out.at(g.weight(group, first + o, inputs.start, 0)),
                        inputs.len(),
                    )
                };
                for (x, i) in row.iter_mut().zip(inputs.clone()) {
                    *x += sums[i * width + o];
                }
            }
            return;
        }
        // All taps of a channel to these outputs: a tile that stays in the cache, as neither side's strides do.
        let mut tile = vec![0f32; g.taps() * outputs];
        for i in chunk * PANEL..from.min((chunk + 1) * PANEL) {
            for (tap, line) in tile.chunks_exact_mut(outputs).enumerate() {
                let k = tap * from + i;
                match shape {
                    Shape::Depthwise => line[0] = total[tap * row_of_c + group],
                    Shape::Dot => {
                        for (o, x) in line.iter_mut().enumerate() {
                            *x = total[(group * rows_of_c + first + o) * row_of_c + columns[k]];
                        }
                    }
                    Shape::Product => {
                        let width = PANEL.min(row_of_c - first);
                        let at = group * rows_of_c * row_of_c + first * depth + k * width;
                        line.copy_from_slice(&total[at..][..outputs]);
                    }
                }
            }
            for o in 0..outputs {
                // SAFETY: each weight belongs to one panel and chunk, and these to one task.
                let taps = unsafe {
                    std::slice::from_raw_parts_mut(out.at(g.weight(group, first + o, i, 0)), g.taps())
                };
                taps.iter_mut().enumerate().for_each(|(tap, x)| *x += tile[tap * outputs + o]);
            }
        }
    });
}

/// Values of the inner index whose gradients one task sums.
const PIECE: usize = 96;
/// Pixels of a line: so many that the operands of its products stay in the L1 cache.
const LINE: usize = 64;
/// Outputs of a panel of products.
const PANEL: usize = 2 * LANES;
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
                        let x = x.add(self.group * self.framed.group + self.piece.offset);
                        // Both operands are packed: with the channels of most models, pixels lie a power of two apart,
                        // and few of them would fit into the cache at once.
                        let (a, b) = self.scratch.split_at_mut(LINE * PIECE);
                        copy_rows::<S>(x, x_row, a.as_mut_ptr(), self.piece.len, len);
                        for panel in 0..self.row_of_c.div_ceil(PANEL) {
                            let column = panel * PANEL;
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
                        let x = x.add(self.group * self.framed.group + self.piece.offset);
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
