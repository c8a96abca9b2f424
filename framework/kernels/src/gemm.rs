//! The two matrix products that the other kernels are built on, register-blocked, for operands already in the
//! right layout.
//!
//! A panel is a matrix whose rows have one or two vectors (16 or 32 columns) and follow each other.

use crate::simd::{LANES, Simd};

/// A run of consecutive values of the inner index whose operands are adjacent: `len` floats from `offset` in
/// each row of A.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Run {
    pub(crate) offset: usize,
    pub(crate) len: usize,
}

/// How far ahead, in floats, the panel is prefetched: it is read in order, from the L3 cache. A step takes
/// about as many cycles as the register block has rows, and the cache's latency does not depend on that.
const fn ahead<S: Simd>() -> usize {
    (12 << 10) / S::ROWS
}

/// The initial value of a product.
#[derive(Clone, Copy)]
pub(crate) enum Start {
    Zero,
    /// This row, for each row of C (as many floats as the panel is wide).
    Row(*const f32),
    /// The current values of C.
    Add,
}

/// Calls `$f::<S, ROWS, COLUMNS>(args)` for a run-time number of rows and vectors that fit the register block.
macro_rules! for_block {
    ($rows:expr, $columns:expr, $f:ident :: <$s:ty> ( $($arg:expr),* )) => {
        if $columns == 2 {
            for_block!(@rows $rows, 2, $f, $s, ($($arg),*))
        } else {
            for_block!(@rows $rows, 1, $f, $s, ($($arg),*))
        }
    };
    (@rows $rows:expr, $c:literal, $f:ident, $s:ty, $args:tt) => {
        match $rows {
            1 => for_block!(@call $f, $s, 1, $c, $args),
            2 => for_block!(@call $f, $s, 2, $c, $args),
            3 => for_block!(@call $f, $s, 3, $c, $args),
            4 => for_block!(@call $f, $s, 4, $c, $args),
            5 => for_block!(@call $f, $s, 5, $c, $args),
            6 => for_block!(@call $f, $s, 6, $c, $args),
            7 => for_block!(@call $f, $s, 7, $c, $args),
            8 => for_block!(@call $f, $s, 8, $c, $args),
            9 => for_block!(@call $f, $s, 9, $c, $args),
            10 => for_block!(@call $f, $s, 10, $c, $args),
            11 => for_block!(@call $f, $s, 11, $c, $args),
            _ => for_block!(@call $f, $s, 12, $c, $args),
        }
    };
    (@call $f:ident, $s:ty, $r:literal, $c:literal, ($($arg:expr),*)) => {
        // Blocks larger than the instruction set's are never requested; this keeps them out of its code.
        if $r <= <$s>::ROWS && $c <= <$s>::COLUMNS { $f::<$s, $r, $c>($($arg),*) }
    };
}

/// Rows of the next register block, given the rows left. Blocks are as equal as possible, because small ones
/// do not hide the latency of the additions.
#[inline(always)]
fn block_rows<S: Simd>(left: usize) -> usize {
    left.div_ceil(left.div_ceil(S::ROWS))
}

/// The operands of [`product`].
#[derive(Clone, Copy)]
pub(crate) struct Product<'a> {
    /// The runs of the inner index.
    pub(crate) runs: &'a [Run],
    pub(crate) a: *const f32,
    /// Floats from a row of A to the next.
    pub(crate) a_row: usize,
    /// The panel, with a row for each value of the inner index.
    pub(crate) b: *const f32,
    pub(crate) c: *mut f32,
    /// Floats from a row of C to the next.
    pub(crate) c_row: usize,
    /// Vectors in a row of the panel: 1 or 2.
    pub(crate) width: usize,
    /// Number of lanes of the last vector that exist in C.
    pub(crate) lanes: usize,
    pub(crate) start: Start,
}

/// C[r][..] = start + sum over k of A[r][k] B[k][..], for `rows` rows.
///
/// # Safety
/// The pointers cover what `p` describes; C overlaps neither A nor B.
#[inline(always)]
pub(crate) unsafe fn product<S: Simd>(rows: usize, p: Product) {
    let columns = p.width.min(S::COLUMNS);
    let mut first = 0;
    while first < p.width {
        let last = first + columns == p.width;
        let lanes = if last { p.lanes } else { LANES };
        let mut row = 0;
        while row < rows {
            let r = block_rows::<S>(rows - row);
            // SAFETY: within the operands: rows row .. row + r, vectors first .. first + columns.
            unsafe {
                let a = p.a.add(row * p.a_row);
                let b = p.b.add(first * LANES);
                let c = p.c.add(row * p.c_row + first * LANES);
                let start = match p.start {
                    Start::Row(x) => Start::Row(x.add(first * LANES)),
                    other => other,
                };
                for_block!(
                    r,
                    columns,
                    product_block::<S>(p.runs, a, p.a_row, b, p.width * LANES, c, p.c_row, lanes, start)
                );
            }
            row += r;
        }
        first += columns;
    }
}

#[inline(always)]
#[expect(clippy::too_many_arguments, reason = "the inner loop: everything in registers")]
unsafe fn product_block<S: Simd, const R: usize, const C: usize>(
    runs: &[Run],
    a: *const f32,
    a_row: usize,
    mut b: *const f32,
    b_row: usize,
    c: *mut f32,
    c_row: usize,
    lanes: usize,
    start: Start,
) {
    // SAFETY: guaranteed by the caller.
    unsafe {
        // Only loops without branches are unrolled, and only unrolled loops keep the sums in registers.
        let mut acc = [[S::zero(); C]; R];
        match start {
            Start::Zero => {}
            Start::Row(row) => {
                for r in 0..R {
                    for j in 0..C {
                        acc[r][j] = S::load(row.add(j * LANES));
                    }
                }
            }
            Start::Add if lanes == LANES => {
                for r in 0..R {
                    for j in 0..C {
                        acc[r][j] = S::load(c.add(r * c_row + j * LANES));
                    }
                }
            }
            Start::Add => {
                for r in 0..R {
                    for j in 0..C - 1 {
                        acc[r][j] = S::load(c.add(r * c_row + j * LANES));
                    }
                    acc[r][C - 1] = S::load_first(c.add(r * c_row + (C - 1) * LANES), lanes);
                }
            }
        }
        for run in runs {
            let mut a = a.add(run.offset);
            for _ in 0..run.len {
                let mut bv = [S::zero(); C];
                for j in 0..C {
                    bv[j] = S::load(b.add(j * LANES));
                    S::prefetch(b.wrapping_add(const { ahead::<S>() } + j * LANES));
                }
                for r in 0..R {
                    let x = S::splat(*a.add(r * a_row));
                    for j in 0..C {
                        acc[r][j] = x.mul_add(bv[j], acc[r][j]);
                    }
                }
                a = a.add(1);
                b = b.add(b_row);
            }
        }
        if lanes == LANES {
            for r in 0..R {
                for j in 0..C {
                    acc[r][j].store(c.add(r * c_row + j * LANES));
                }
            }
        } else {
            for r in 0..R {
                for j in 0..C - 1 {
                    acc[r][j].store(c.add(r * c_row + j * LANES));
                }
                acc[r][C - 1].store_first(c.add(r * c_row + (C - 1) * LANES), lanes);
            }
        }
    }
}

/// The operands of [`product_transposed`].
#[derive(Clone, Copy)]
pub(crate) struct ProductTransposed {
    /// Row k of A; its columns are the rows of C.
    pub(crate) a: *const f32,
    /// Floats from a row of A to the next.
    pub(crate) a_row: usize,
    pub(crate) b: *const f32,
    /// Floats from a row of B to the next.
    pub(crate) b_row: usize,
    /// Floats from the first vector of a row of B to the second.
    pub(crate) b_vector: usize,
    /// Number of lanes of the last vector that exist in B; C has all of them.
    pub(crate) lanes: usize,
    pub(crate) c: *mut f32,
    /// Floats from a row of C to the next.
    pub(crate) c_row: usize,
    /// Vectors in a row: 1 or 2.
    pub(crate) width: usize,
}

/// C[r][..] += sum over k < `len` of A[k][r] B[k][..], for `rows` rows.
///
/// # Safety
/// The pointers cover what `p` describes; C overlaps neither A nor B.
#[inline(always)]
pub(crate) unsafe fn product_transposed<S: Simd>(rows: usize, len: usize, p: ProductTransposed) {
    let columns = p.width.min(S::COLUMNS);
    let mut first = 0;
    while first < p.width {
        let last = first + columns == p.width;
        let lanes = if last { p.lanes } else { LANES };
        let mut row = 0;
        while row < rows {
            let r = block_rows::<S>(rows - row);
            // SAFETY: within the operands: rows row .. row + r of C, vectors first .. first + columns.
            unsafe {
                let a = p.a.add(row);
                let b = p.b.add(first * p.b_vector);
                let c = p.c.add(row * p.c_row + first * LANES);
                if lanes == LANES {
                    for_block!(
                        r,
                        columns,
                        transposed_full::<S>(len, a, p.a_row, b, p.b_row, p.b_vector, c, p.c_row)
                    );
                } else {
                    for_block!(
                        r,
                        columns,
                        transposed_part::<S>(len, a, p.a_row, b, p.b_row, p.b_vector, lanes, c, p.c_row)
                    );
                }
            }
            row += r;
        }
        first += columns;
    }
}

#[inline(always)]
#[expect(clippy::too_many_arguments, reason = "the inner loop: everything in registers")]
unsafe fn transposed_full<S: Simd, const R: usize, const C: usize>(
    len: usize,
    a: *const f32,
    a_row: usize,
    b: *const f32,
    b_row: usize,
    b_vector: usize,
    c: *mut f32,
    c_row: usize,
) {
    // SAFETY: guaranteed by the caller.
    unsafe { transposed_block::<S, R, C, false>(len, a, a_row, b, b_row, b_vector, LANES, c, c_row) }
}

#[inline(always)]
#[expect(clippy::too_many_arguments, reason = "the inner loop: everything in registers")]
unsafe fn transposed_part<S: Simd, const R: usize, const C: usize>(
    len: usize,
    a: *const f32,
    a_row: usize,
    b: *const f32,
    b_row: usize,
    b_vector: usize,
    lanes: usize,
    c: *mut f32,
    c_row: usize,
) {
    // SAFETY: guaranteed by the caller.
    unsafe { transposed_block::<S, R, C, true>(len, a, a_row, b, b_row, b_vector, lanes, c, c_row) }
}

#[inline(always)]
#[expect(clippy::too_many_arguments, reason = "the inner loop: everything in registers")]
unsafe fn transposed_block<S: Simd, const R: usize, const C: usize, const PART: bool>(
    len: usize,
    mut a: *const f32,
    a_row: usize,
    mut b: *const f32,
    b_row: usize,
    b_vector: usize,
    lanes: usize,
    c: *mut f32,
    c_row: usize,
) {
    // SAFETY: guaranteed by the caller.
    unsafe {
        let mut acc = [[S::zero(); C]; R];
        // C may not be cached if it is a weight gradient, so it is prefetched while the sums are computed.
        for r in 0..R {
            for j in 0..C {
                S::prefetch(c.add(r * c_row + j * LANES));
            }
        }
        for _ in 0..len {
            let mut bv = [S::zero(); C];
            for j in 0..C {
                let from = b.add(j * b_vector);
                bv[j] = if PART && j + 1 == C { S::load_first(from, lanes) } else { S::load(from) };
            }
            for r in 0..R {
                let x = S::splat(*a.add(r));
                for j in 0..C {
                    acc[r][j] = x.mul_add(bv[j], acc[r][j]);
                }
            }
            a = a.wrapping_add(a_row);
            b = b.wrapping_add(b_row);
        }
        for r in 0..R {
            for j in 0..C {
                let to = c.add(r * c_row + j * LANES);
                S::load(to).add(acc[r][j]).store(to);
            }
        }
    }
}
