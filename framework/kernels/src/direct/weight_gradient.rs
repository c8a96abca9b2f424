//! The gradient of the weights: for each pair of an input and an output, the sum over pixels of their products.
//!
//! With the pixels as the inner index, this is a matrix product whose rows and columns are the inputs that a
//! pixel's taps read and its outputs, or vice versa. Blocks of pixels of both sides are packed: with the
//! channel counts of most models, pixels are a power of two apart, and only a few of them would fit into the
//! cache at once.

use super::frame::{Framed, TapRun};
use super::pass::forward_pass;
use super::{Geometry, depthwise, halvings};
use crate::buffer::Buffer;
use crate::float::Float;
use crate::gemm::{ProductTransposed, Run, product_transposed};
use crate::parallel::{self, Shared};
use crate::simd::{Kernel, LANES, Level, Simd};
use crate::winograd::Images;
use std::cmp::Reverse;
use std::ops::Range;

/// Rows per piece: a multiple of the register block's rows.
const ROWS: usize = 96;
/// Columns per panel: those of a register block.
const PANEL: usize = 2 * LANES;
/// Maximum pieces of rows, and panels, per task: a task reads no more of either side than it must, and its
/// sums stay in the L2 cache.
const LARGEST: [usize; 2] = [4, 8];
/// Pixels per block: as many as keep the packed operands of a register block in the L1 cache.
const BLOCK: usize = 128;
/// Tasks of a weight gradient, if its size does not already make more.
const TASKS: usize = 32;

/// Adds the gradient of the weights to dw, in PyTorch's layout.
pub(crate) fn backward_weight<T: Float>(
    level: Level,
    g: &Geometry,
    x: Images<T>,
    dy: Images,
    dw: &mut [f32],
) {
    if g.depthwise() {
        return depthwise::backward_weight(level, g, x, dy, dw);
    }
    let pass = forward_pass(g);
    let x = Framed::new(level, x, g.batch, g.height, g.width, std::slice::from_ref(&pass), g.groups);
    let dy = Framed::plain(dy, g.out_width, g.groups);
    let (from, to) = (g.group_inputs(), g.group_outputs());
    let runs = x.runs(&pass, from);
    let outputs = [TapRun { y: 0, run: Run { offset: 0, len: to } }];
    let inputs = Operand { pixels: &x, step: pass.in_step };
    let few_outputs = to < LANES && runs.iter().any(|taps| to < taps.run.len);
    // For a 1x1 convolution, sums by output already have the layout of the weights.
    let by_output = few_outputs || (g.taps() == 1 && from >= LANES);
    let outer = Operand { pixels: &dy, step: 1 };
    let ((a, rows), (b, columns)) = if by_output {
        ((outer, pieces_of(&outputs, ROWS)), (inputs, pieces_of(&runs, PANEL)))
    } else {
        ((inputs, pieces_of(&runs, ROWS)), (outer, pieces_of(&outputs, PANEL)))
    };
    let depth = from * g.taps();
    let height = if by_output { to } else { depth };
    let width: usize = columns.iter().map(|piece| piece.len.next_multiple_of(LANES)).sum();

    let blocks = (g.batch * g.out_height * g.out_width).div_ceil(BLOCK);
    let Grid { high, wide, parts } = Grid::new(g.groups, rows.len(), columns.len(), blocks);
    let (high_shares, wide_shares) = (rows.len().div_ceil(high), columns.len().div_ceil(wide));
    let pieces = g.groups * high_shares * wide_shares;
    // Sums are stored as whole vectors, so storing them in the weights' layout requires rows of whole vectors
    // there.
    let in_place = by_output && g.taps() == 1 && from.is_multiple_of(LANES) && parts == 1;
    let mut sums = Buffer::zeroed(if in_place { 0 } else { parts * g.groups * height * width });
    let data = Shared::new(if in_place { &mut *dw } else { &mut sums });
    let scratch = || Buffer::new(BLOCK * (high * ROWS + wide * PANEL));
    parallel::for_each_with(parts * pieces, scratch, |task, scratch| {
        let (part, piece) = (task / pieces, task % pieces);
        let (group, piece) = (piece / (high_shares * wide_shares), piece % (high_shares * wide_shares));
        let (row, column) = (piece / wide_shares * high, piece % wide_shares * wide);
        level.run(Sums {
            g,
            group,
            a,
            rows: &rows[row..rows.len().min(row + high)],
            b,
            columns: &columns[column..columns.len().min(column + wide)],
            by_output,
            blocks: part * blocks / parts..(part + 1) * blocks / parts,
            packed: !few_outputs,
            // SAFETY: this is within the sums of the part and the group.
            to: unsafe { data.offset((part * g.groups + group) * height * width) },
            height,
            row_of_c: in_place.then_some(from),
            scratch: scratch.as_mut_ptr(),
        });
    });
    if in_place {
        return;
    }
    let (total, others) = sums.split_at_mut(g.groups * height * width);
    parallel::add_all(total, others);
    let total = Total { sums: total, columns: &columns, height, width };
    if by_output { total.add_by_output(g, dw) } else { total.add_by_input(g, dw) }
}

/// How the work is split into tasks: enough for many threads, but depending only on the sizes.
struct Grid {
    /// Pieces of rows per task.
    high: usize,
    /// Panels per task.
    wide: usize,
    /// Parts of the pixels; each has its own sums.
    parts: usize,
}

impl Grid {
    /// The grid that reads and writes least, among those with enough tasks, or with as many as possible.
    fn new(groups: usize, rows: usize, panels: usize, blocks: usize) -> Grid {
        let [mut best, [high, wide]] = [[1, 1], LARGEST];
        let cost = |[high, wide]: [usize; 2]| {
            let (down, across) = (rows.div_ceil(high), panels.div_ceil(wide));
            let parts = TASKS.div_ceil(groups * down * across).clamp(1, blocks.max(1));
            let operands = blocks * BLOCK * (rows * ROWS * across + panels * PANEL * down);
            // The sums of each part are cleared, read and added.
            let sums = if parts > 1 { 3 * parts } else { 1 } * rows * ROWS * panels * PANEL;
            let tasks = TASKS.min(groups * down * across * parts);
            (Reverse(tasks), operands + sums, parts)
        };
        for high in halvings(high) {
            for grid in halvings(wide).map(|wide| [high, wide]) {
                best = if cost(grid) < cost(best) { grid } else { best };
            }
        }
        let [high, wide] = best;
        Grid { high, wide, parts: cost(best).2 }
    }
}

/// The pixels of one side of the product.
#[derive(Clone, Copy)]
struct Operand<'a> {
    pixels: &'a Framed,
    /// Pixels from the data of one output pixel to that of the next.
    step: usize,
}

impl Operand<'_> {
    /// The address of a group's values for an output pixel.
    #[inline(always)]
    unsafe fn at(&self, group: usize, [image, j, i]: [usize; 3]) -> *const f32 {
        // SAFETY: guaranteed by the caller: the output pixel exists.
        unsafe { self.pixels.at(image, self.step, j, i).add(group * self.pixels.group) }
    }
    #[inline(always)]
    fn row(&self) -> usize {
        self.step * self.pixels.channels
    }
}

/// Some rows or columns of the sums, whose values are contiguous in memory.
#[derive(Clone, Copy)]
struct Piece {
    /// The run of taps that it is a part of.
    taps: TapRun,
    /// The offset of its first value among a pixel's values of the group.
    offset: usize,
    /// The index of its first row or column.
    first: usize,
    len: usize,
    /// That index if every piece before it is padded to whole vectors.
    padded: usize,
}

/// Splits runs into pieces of at most `longest`.
fn pieces_of(runs: &[TapRun], longest: usize) -> Vec<Piece> {
    let (mut pieces, mut first, mut padded) = (Vec::new(), 0, 0);
    for &taps in runs {
        let run = taps.run;
        for at in (0..run.len).step_by(longest) {
            let len = longest.min(run.len - at);
            pieces.push(Piece { taps, offset: run.offset + at, first, len, padded });
            first += len;
            padded += len.next_multiple_of(LANES);
        }
    }
    pieces
}

/// The sums of some rows and some panels of columns, over some blocks of pixels.
struct Sums<'a> {
    g: &'a Geometry,
    group: usize,
    a: Operand<'a>,
    rows: &'a [Piece],
    b: Operand<'a>,
    columns: &'a [Piece],
    /// Whether `a` holds the outputs.
    by_output: bool,
    blocks: Range<usize>,
    /// False if there are too few rows to make packing worthwhile.
    packed: bool,
    /// Sums of the group, panel by panel, row by row.
    to: Shared,
    /// Number of rows of all sums.
    height: usize,
    /// Floats from one row to the next, if the sums are not stored in panels.
    row_of_c: Option<usize>,
    /// Scratch memory for one block of the columns and one of the rows.
    scratch: *mut f32,
}

impl Kernel for Sums<'_> {
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        for block in self.blocks.clone() {
            // SAFETY: the pixels exist, and the scratch has room for a block of both sides; each task has its own sums.
            unsafe {
                if self.packed { self.add_packed::<S>(block) } else { self.add_as_they_lie::<S>(block) }
            }
        }
    }
}

impl Sums<'_> {
    /// The pixels of a block as stretches of rows: image, row and column of the first pixel, and the count.
    /// Rows whose taps all lie outside the image are skipped.
    #[inline(always)]
    fn stretches(&self, block: usize) -> impl Iterator<Item = ([usize; 3], usize)> + use<'_> {
        let Geometry { batch, height, stride, out_height, out_width, .. } = *self.g;
        let inputs = if self.by_output { self.columns } else { self.rows };
        let end = (batch * out_height * out_width).min((block + 1) * BLOCK);
        let mut pixel = block * BLOCK;
        std::iter::from_fn(move || {
            let (row, i) = (pixel / out_width, pixel % out_width);
            let len = (out_width - i).min(end - pixel);
            pixel += len;
            (len > 0).then_some(([row / out_height, row % out_height, i], len))
        })
        .filter(move |([_, j, _], _)| inputs.iter().any(|piece| piece.taps.sees(j * stride, height)))
    }

    #[inline(always)]
    unsafe fn add_as_they_lie<S: Simd>(&self, block: usize) {
        for (pixel, len) in self.stretches(block) {
            for (row, column) in self.rows.iter().flat_map(|row| self.columns.iter().map(move |c| (row, c))) {
                // SAFETY: guaranteed by the caller.
                unsafe {
                    let a = self.a.at(self.group, pixel).add(row.offset);
                    let b = self.b.at(self.group, pixel).add(column.offset);
                    self.add::<S>(len, row, (a, self.a.row()), column, (b, self.b.row()));
                }
            }
        }
    }

    #[inline(always)]
    unsafe fn add_packed<S: Simd>(&self, block: usize) {
        let b = self.scratch;
        // SAFETY: guaranteed by the caller.
        unsafe {
            let a = b.add(BLOCK * PANEL * self.columns.len());
            self.pack::<S>(block, self.a, self.rows, a, ROWS);
            let len = self.pack::<S>(block, self.b, self.columns, b, PANEL);
            for (i, column) in self.columns.iter().enumerate() {
                let b = b.add(i * BLOCK * PANEL).cast_const();
                for (i, row) in self.rows.iter().enumerate() {
                    let a = a.add(i * BLOCK * ROWS).cast_const();
                    self.add::<S>(len, row, (a, row.len), column, (b, column.len));
                }
            }
        }
    }

    /// Copies pieces, of at most `longest` values, of a block's pixels: piece by piece, and pixel by pixel
    /// within a piece. Returns the number of pixels.
    /// # Safety
    /// `to` has room for them.
    #[inline(always)]
    unsafe fn pack<S: Simd>(
        &self,
        block: usize,
        from: Operand,
        pieces: &[Piece],
        to: *mut f32,
        longest: usize,
    ) -> usize {
        let mut pixels = 0;
        for (pixel, len) in self.stretches(block) {
            // SAFETY: guaranteed by the caller.
            unsafe {
                let values = from.at(self.group, pixel);
                for i in 0..len {
                    for (n, piece) in pieces.iter().enumerate() {
                        let from = values.add(i * from.row() + piece.offset);
                        let to = to.add(n * BLOCK * longest + (pixels + i) * piece.len);
                        copy::<S>(from, to, piece.len);
                    }
                }
            }
            pixels += len;
        }
        pixels
    }

    /// Adds the products of `len` pixels; for each side, the first value's address and the floats from pixel
    /// to pixel are given.
    #[inline(always)]
    unsafe fn add<S: Simd>(
        &self,
        len: usize,
        row: &Piece,
        (a, a_row): (*const f32, usize),
        column: &Piece,
        (b, b_row): (*const f32, usize),
    ) {
        let width = column.len.div_ceil(LANES);
        let (at, c_row) = match self.row_of_c {
            Some(whole) => (row.first * whole + column.first, whole),
            None => (column.padded * self.height + row.first * width * LANES, width * LANES),
        };
        let lanes = column.len - (width - 1) * LANES;
        // SAFETY: guaranteed by the caller.
        unsafe {
            let c = self.to.at(at);
            let operands = ProductTransposed { a, a_row, b, b_row, b_vector: LANES, lanes, c, c_row, width };
            product_transposed::<S>(row.len, len, operands);
        }
    }
}

/// # Safety
/// `len` floats are readable at `from` and writable at `to`.
#[inline(always)]
unsafe fn copy<S: Simd>(from: *const f32, to: *mut f32, len: usize) {
    for at in (0..len).step_by(LANES) {
        let lanes = LANES.min(len - at);
        // SAFETY: guaranteed by the caller.
        unsafe { S::load_lanes(from.add(at), lanes).store_lanes(to.add(at), lanes) }
    }
}

/// The sums of all groups: panel by panel, row by row.
struct Total<'a> {
    sums: &'a [f32],
    columns: &'a [Piece],
    height: usize,
    width: usize,
}

impl Total<'_> {
    /// One row of a panel.
    fn row(&self, group: usize, column: &Piece, row: usize) -> &[f32] {
        let padded = column.len.next_multiple_of(LANES);
        &self.sums[(group * self.width + column.padded) * self.height + row * padded..][..column.len]
    }

    /// For sums whose rows are outputs and whose columns are the inputs of the taps.
    fn add_by_output(&self, g: &Geometry, dw: &mut [f32]) {
        let (from, taps) = (g.group_inputs(), g.taps());
        let out = Shared::new(dw);
        parallel::for_rows(g.outputs, from * taps, |outputs| {
            for output in outputs {
                let (group, row) = (output / self.height, output % self.height);
                // SAFETY: each output belongs to exactly one task.
                let weights =
                    unsafe { std::slice::from_raw_parts_mut(out.at(output * from * taps), from * taps) };
                for column in self.columns {
                    for (k, sum) in (column.first..).zip(self.row(group, column, row)) {
                        weights[k % from * taps + k / from] += sum;
                    }
                }
            }
        });
    }

    /// For sums whose rows are the inputs of the taps and whose columns are outputs.
    fn add_by_input(&self, g: &Geometry, dw: &mut [f32]) {
        let (from, taps) = (g.group_inputs(), g.taps());
        let out = Shared::new(dw);
        let chunks = from.div_ceil(PANEL);
        let in_group = self.columns.len() * chunks;
        parallel::for_each(g.groups * in_group, |task| {
            let (group, panel, chunk) = (task / in_group, task / chunks % self.columns.len(), task % chunks);
            let column = &self.columns[panel];
            // All taps of a channel for these outputs are gathered in a tile that stays in the cache, which
            // strided accesses on either side would not.
            let mut tile = vec![0f32; taps * column.len];
            for i in chunk * PANEL..from.min((chunk + 1) * PANEL) {
                for (tap, line) in tile.chunks_exact_mut(column.len).enumerate() {
                    line.copy_from_slice(self.row(group, column, tap * from + i));
                }
                for o in 0..column.len {
                    // SAFETY: each weight belongs to one panel and chunk, and these belong to exactly one
                    // task.
                    let weights = unsafe {
                        std::slice::from_raw_parts_mut(out.at(g.weight(group, column.first + o, i, 0)), taps)
                    };
                    weights.iter_mut().enumerate().for_each(|(tap, x)| *x += tile[tap * column.len + o]);
                }
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_are_enough_tasks_and_sums_of_their_own_for_few_weights_alone() {
        let tasks = |[groups, rows, panels, blocks]: [usize; 4]| {
            let Grid { high, wide, parts } = Grid::new(groups, rows, panels, blocks);
            (groups * rows.div_ceil(high) * panels.div_ceil(wide) * parts, parts)
        };
        // 1x1 convolutions between 512 and 4096 channels, in both directions, on 512 pixels; 8 groups of 32
        // to 64 channels, 11x11.
        for sizes in [[1, 43, 16, 4], [1, 6, 128, 4], [8, 44, 2, 4]] {
            let (tasks, parts) = tasks(sizes);
            assert!(tasks >= TASKS && parts == 1, "{sizes:?}: {tasks} tasks, {parts} parts");
        }
        // Few weights, with many pixels and with few.
        assert_eq!(tasks([1, 1, 1, 1000]), (TASKS, TASKS));
        assert_eq!(tasks([1, 1, 1, 3]), (3, 3));
        // Few pixels, and more weights.
        assert_eq!(tasks([1, 3, 8, 1]), (24, 1));
    }
}
