//! The transforms of F(4x4, 3x3) and F(2x2, 5x5) and their adjoints, on 16 channels at a time.
//!
//! Interpolation points 0, 1, -1, 2, -2 and infinity (Lavin and Gray, "Fast algorithms for convolutional neural
//! networks", 2015, section 4.3): y = A' [(G g G') . (B' d B)] A. Each matrix is applied to columns, then to rows. Both
//! sizes have the same six points, and therefore the same B.

use crate::simd::Simd;
use std::mem::MaybeUninit;

/// Positions in the transformed domain: p = 6 row + column.
pub(crate) const POSITIONS: usize = 36;
/// Outputs of a tile in each direction, for 3x3 filters.
pub(crate) const OUT: usize = 4;
/// Outputs of a tile in each direction, for 5x5 filters.
pub(crate) const OUT_5: usize = 2;
/// Inputs of a tile in each direction.
pub(crate) const IN: usize = 6;
/// The position whose output transform is a plain sum (the point 1 in both directions): its adjoint is the
/// sum of a tile.
pub(crate) const SUM_POSITION: usize = 7;

#[inline(always)]
unsafe fn k<S: Simd>(x: f32) -> S {
    // SAFETY: guaranteed by the caller.
    unsafe { S::splat(x) }
}

/// B' d
#[inline(always)]
unsafe fn input<S: Simd>(d: [S; 6]) -> [S; 6] {
    // SAFETY: the arguments are vectors, so the processor has the instructions of `S`.
    unsafe {
        let even = d[2].mul_add(k(-4.), d[4]);
        let odd = d[1].mul_add(k(-4.), d[3]);
        let even2 = d[4].sub(d[2]);
        let odd2 = d[3].sub(d[1]);
        [
            d[0].mul_add(k(4.), d[2].mul_add(k(-5.), d[4])),
            even.add(odd),
            even.sub(odd),
            odd2.mul_add(k(2.), even2),
            odd2.mul_add(k(-2.), even2),
            d[1].mul_add(k(4.), d[3].mul_add(k(-5.), d[5])),
        ]
    }
}

/// B t, the adjoint of `input`.
#[inline(always)]
unsafe fn input_adjoint<S: Simd>(t: [S; 6]) -> [S; 6] {
    // SAFETY: the arguments are vectors, so the processor has the instructions of `S`.
    unsafe {
        let (sum, difference) = (t[1].add(t[2]), t[1].sub(t[2]));
        let (sum2, difference2) = (t[3].add(t[4]), t[3].sub(t[4]));
        [
            t[0].mul(k(4.)),
            t[5].sub(difference).mul_add(k(4.), difference2.mul(k(-2.))),
            t[0].mul_add(k(-5.), sum.mul_add(k(-4.), k::<S>(0.).sub(sum2))),
            difference2.mul_add(k(2.), t[5].mul_add(k(-5.), difference)),
            t[0].add(sum.add(sum2)),
            t[5],
        ]
    }
}

/// A' m
#[inline(always)]
unsafe fn output<S: Simd>(m: [S; 6]) -> [S; 4] {
    // SAFETY: the arguments are vectors, so the processor has the instructions of `S`.
    unsafe {
        let (sum, difference) = (m[1].add(m[2]), m[1].sub(m[2]));
        let (sum2, difference2) = (m[3].add(m[4]), m[3].sub(m[4]));
        [
            m[0].add(sum.add(sum2)),
            difference2.mul_add(k(2.), difference),
            sum2.mul_add(k(4.), sum),
            difference2.mul_add(k(8.), difference).add(m[5]),
        ]
    }
}

/// A y, the adjoint of `output`.
#[inline(always)]
unsafe fn output_adjoint<S: Simd>(y: [S; 4]) -> [S; 6] {
    // SAFETY: the arguments are vectors, so the processor has the instructions of `S`.
    unsafe {
        let (even, odd) = (y[0].add(y[2]), y[1].add(y[3]));
        let even4 = y[2].mul_add(k(4.), y[0]);
        let odd4 = y[3].mul_add(k(4.), y[1]).mul(k(2.));
        [y[0], even.add(odd), even.sub(odd), even4.add(odd4), even4.sub(odd4), y[3]]
    }
}

/// A' m of F(2, 5)
#[inline(always)]
unsafe fn output_5<S: Simd>(m: [S; 6]) -> [S; 2] {
    // SAFETY: the arguments are vectors, so the processor has the instructions of `S`.
    unsafe {
        let (sum, difference) = (m[1].add(m[2]), m[1].sub(m[2]));
        let (sum2, difference2) = (m[3].add(m[4]), m[3].sub(m[4]));
        [m[0].add(sum.add(sum2)), difference2.mul_add(k(2.), difference).add(m[5])]
    }
}

/// A y, the adjoint of `output_5`.
#[inline(always)]
unsafe fn output_adjoint_5<S: Simd>(y: [S; 2]) -> [S; 6] {
    // SAFETY: the arguments are vectors, so the processor has the instructions of `S`.
    unsafe {
        let two = k(2.);
        [y[0], y[0].add(y[1]), y[0].sub(y[1]), y[1].mul_add(two, y[0]), y[1].neg_mul_add(two, y[0]), y[1]]
    }
}

/// G g
#[inline(always)]
unsafe fn filter<S: Simd>(g: [S; 3]) -> [S; 6] {
    // SAFETY: the arguments are vectors, so the processor has the instructions of `S`.
    unsafe {
        let sum = g[0].add(g[2]).mul(k(-1. / 6.));
        let middle = g[1].mul(k(-1. / 6.));
        let sum2 = g[0].mul_add(k(1. / 24.), g[2].mul(k(1. / 6.)));
        let middle2 = g[1].mul(k(1. / 12.));
        [g[0].mul(k(0.25)), sum.add(middle), sum.sub(middle), sum2.add(middle2), sum2.sub(middle2), g[2]]
    }
}

/// G' u, the adjoint of `filter`.
#[inline(always)]
unsafe fn filter_adjoint<S: Simd>(u: [S; 6]) -> [S; 3] {
    // SAFETY: the arguments are vectors, so the processor has the instructions of `S`.
    unsafe {
        let (sum, difference) = (u[1].add(u[2]).mul(k(-1. / 6.)), u[2].sub(u[1]).mul(k(1. / 6.)));
        let (sum2, difference2) = (u[3].add(u[4]), u[3].sub(u[4]));
        [
            u[0].mul_add(k(0.25), sum2.mul_add(k(1. / 24.), sum)),
            difference2.mul_add(k(1. / 12.), difference),
            sum2.mul_add(k(1. / 6.), sum.add(u[5])),
        ]
    }
}

/// G g of F(2, 5)
#[inline(always)]
unsafe fn filter_5<S: Simd>(g: [S; 5]) -> [S; 6] {
    // SAFETY: the arguments are vectors, so the processor has the instructions of `S`.
    unsafe {
        let even = g[0].add(g[2]).add(g[4]).mul(k(-1. / 6.));
        let odd = g[1].add(g[3]).mul(k(-1. / 6.));
        let even2 = g[4].mul_add(k(16.), g[2].mul_add(k(4.), g[0])).mul(k(1. / 24.));
        let odd2 = g[3].mul_add(k(4.), g[1]).mul(k(1. / 12.));
        [g[0].mul(k(0.25)), even.add(odd), even.sub(odd), even2.add(odd2), even2.sub(odd2), g[4]]
    }
}

/// G' u, the adjoint of `filter_5`.
#[inline(always)]
unsafe fn filter_adjoint_5<S: Simd>(u: [S; 6]) -> [S; 5] {
    // SAFETY: the arguments are vectors, so the processor has the instructions of `S`.
    unsafe {
        let (sum, difference) = (u[1].add(u[2]).mul(k(-1. / 6.)), u[2].sub(u[1]).mul(k(1. / 6.)));
        let (sum2, difference2) = (u[3].add(u[4]), u[3].sub(u[4]));
        [
            u[0].mul_add(k(0.25), sum2.mul_add(k(1. / 24.), sum)),
            difference2.mul_add(k(1. / 12.), difference),
            sum2.mul_add(k(1. / 6.), sum),
            difference2.mul_add(k(1. / 3.), difference),
            sum2.mul_add(k(2. / 3.), sum.add(u[5])),
        ]
    }
}

/// Applies a column transform in both directions, from `N` x `N` to `M` x `M` values.
macro_rules! both_directions {
    ($(#[$doc:meta])* $name:ident, $one:ident, $n:literal, $m:literal) => {
        $(#[$doc])*
        /// # Safety
        /// The processor has the instructions of `S`.
        #[inline(always)]
        pub(crate) unsafe fn $name<S: Simd>(x: [[S; $n]; $n]) -> [[S; $m]; $m] {
            // SAFETY: the arguments are vectors, so the processor has the instructions of `S`.
            unsafe {
                let zero = S::zero();
                let mut rows = [[zero; $m]; $n];
                for r in 0..$n {
                    rows[r] = $one(x[r]);
                }
                let mut y = [[zero; $m]; $m];
                for c in 0..$m {
                    let mut column = [zero; $n];
                    for r in 0..$n {
                        column[r] = rows[r][c];
                    }
                    let column = $one(column);
                    for r in 0..$m {
                        y[r][c] = column[r];
                    }
                }
                y
            }
        }
    };
}

/// Like the macro, for the two transforms from 36 to 36 values, which do not fit into the registers: values
/// are read with `load` and written with `store`, each by row and column, and the intermediate rows are in
/// memory that is not cleared first.
/// # Safety
/// Same as for `load` and `store`.
#[inline(always)]
unsafe fn both_directions<S: Simd>(
    one: impl Fn([S; 6]) -> [S; 6],
    load: impl Fn(usize, usize) -> S,
    store: impl Fn(usize, usize, S),
) {
    let mut rows = MaybeUninit::<[[S; 6]; 6]>::uninit();
    let row_at = rows.as_mut_ptr().cast::<[S; 6]>();
    // SAFETY: all six rows are written before they are read.
    unsafe {
        for r in 0..6 {
            let x = [load(r, 0), load(r, 1), load(r, 2), load(r, 3), load(r, 4), load(r, 5)];
            row_at.add(r).write(one(x));
        }
        for c in 0..6 {
            let at = |r: usize| row_at.add(r).cast::<S>().add(c).read();
            let y = one([at(0), at(1), at(2), at(3), at(4), at(5)]);
            for r in 0..6 {
                store(r, c, y[r]);
            }
        }
    }
}

/// V = B' d B
/// # Safety
/// The processor has the instructions of `S`.
#[inline(always)]
pub(crate) unsafe fn input_tile<S: Simd>(load: impl Fn(usize, usize) -> S, store: impl Fn(usize, usize, S)) {
    // SAFETY: guaranteed by the caller.
    unsafe {
        both_directions(
            #[inline(always)]
            |x| input(x),
            load,
            store,
        );
    }
}

/// dd = B dV B'
/// # Safety
/// The processor has the instructions of `S`.
#[inline(always)]
pub(crate) unsafe fn input_tile_adjoint<S: Simd>(
    load: impl Fn(usize, usize) -> S,
    store: impl Fn(usize, usize, S),
) {
    // SAFETY: guaranteed by the caller.
    unsafe {
        both_directions(
            #[inline(always)]
            |x| input_adjoint(x),
            load,
            store,
        );
    }
}

both_directions!(
    /// y = A' m A
    output_tile, output, 6, 4
);
both_directions!(
    /// dm = A dy A'
    output_tile_adjoint, output_adjoint, 4, 6
);
both_directions!(
    /// U = G g G'
    filter_tile, filter, 3, 6
);
both_directions!(
    /// dg = G' dU G
    filter_tile_adjoint, filter_adjoint, 6, 3
);

both_directions!(
    /// y = A' m A of F(2x2, 5x5)
    output_tile_5, output_5, 6, 2
);
both_directions!(
    /// dm = A dy A' of F(2x2, 5x5)
    output_tile_adjoint_5, output_adjoint_5, 2, 6
);
both_directions!(
    /// U = G g G' of F(2x2, 5x5)
    filter_tile_5, filter_5, 5, 6
);
both_directions!(
    /// dg = G' dU G of F(2x2, 5x5)
    filter_tile_adjoint_5, filter_adjoint_5, 6, 5
);

/// Loads the 36 positions of a tile, `stride` floats apart.
/// # Safety
/// 16 floats are readable at each position.
#[inline(always)]
pub(crate) unsafe fn load_positions<S: Simd>(from: *const f32, stride: usize) -> [[S; 6]; 6] {
    // SAFETY: guaranteed by the caller.
    unsafe {
        let mut x = [[S::zero(); 6]; 6];
        for r in 0..6 {
            for c in 0..6 {
                x[r][c] = S::load(from.add((r * 6 + c) * stride));
            }
        }
        x
    }
}

/// Prefetches the lines for a later `store_positions`, so that they arrive while the transform is computed.
#[inline(always)]
pub(crate) fn prefetch_positions<S: Simd>(to: *const f32, stride: usize) {
    for position in 0..POSITIONS {
        S::prefetch_write(to.wrapping_add(position * stride));
    }
}

/// Stores the 36 positions of a tile, `stride` floats apart.
/// # Safety
/// 16 floats are writable at each position.
#[inline(always)]
pub(crate) unsafe fn store_positions<S: Simd>(x: [[S; 6]; 6], to: *mut f32, stride: usize) {
    // SAFETY: guaranteed by the caller.
    unsafe {
        for r in 0..6 {
            for c in 0..6 {
                x[r][c].store(to.add((r * 6 + c) * stride));
            }
        }
    }
}
