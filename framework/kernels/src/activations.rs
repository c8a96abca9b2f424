//! Sigmoid and tanh of 16 values at once, to a few units in the last place.
//!
//! Both use e^x - 1 = 2^n (e^r - 1) + (2^n - 1), where x = n ln 2 + r and |r| <= ln 2 / 2: seven terms of the
//! Taylor series leave an error of 2e-8 there, and no precision is lost for small x. NaN stays NaN.

use crate::simd::Simd;

/// Adding 1.5 * 2^23 rounds a float to an integer; the extra 127 makes the low bits a float's exponent.
const MAGIC: f32 = 12_582_912. + 127.;
const LN_2_HIGH: f32 = 0.693_359_4;
const LN_2_LOW: f32 = -2.121_944_4e-4;

/// e^r - 1 and 2^n, from which e^x - 1 follows by scaling. |x| must be below 87.
#[inline(always)]
unsafe fn reduced_exp<S: Simd>(x: S) -> (S, S) {
    // SAFETY: guaranteed by the caller.
    unsafe {
        let shifted = x.mul_add(S::splat(std::f32::consts::LOG2_E), S::splat(MAGIC));
        let n = shifted.sub(S::splat(MAGIC));
        let r = n.neg_mul_add(S::splat(LN_2_HIGH), x);
        let r = n.neg_mul_add(S::splat(LN_2_LOW), r);
        let mut p = S::splat(1. / 5040.);
        for c in [1. / 720., 1. / 120., 1. / 24., 1. / 6., 1. / 2.] {
            p = p.mul_add(r, S::splat(c));
        }
        (r.mul(r).mul_add(p, r), shifted.bits_to_exponent())
    }
}

/// 1 / (1 + e^-x)
#[inline(always)]
pub(crate) unsafe fn sigmoid<S: Simd>(x: S) -> S {
    // SAFETY: guaranteed by the caller.
    unsafe {
        // The operand that may be NaN comes second, because `min` and `max` return that one.
        let x = S::splat(87.).min(S::splat(-87.).max(x));
        let (q, scale) = reduced_exp(S::zero().sub(x));
        // 1 + e^-x = 2^n q + (2^n + 1)
        scale.mul_add(q, scale.add(S::splat(1.))).reciprocal()
    }
}

/// (e^2x - 1) / (e^2x + 1)
#[inline(always)]
pub(crate) unsafe fn tanh<S: Simd>(x: S) -> S {
    // SAFETY: guaranteed by the caller.
    unsafe {
        // tanh(10) rounds to 1.
        let x = S::splat(10.).min(S::splat(-10.).max(x));
        let (q, scale) = reduced_exp(x.add(x));
        let e = scale.mul_add(q, scale.sub(S::splat(1.)));
        e.mul(e.add(S::splat(2.)).reciprocal())
    }
}

/// e^x, for x up to 87; 2e-38 if x is below -87.
#[inline(always)]
pub(crate) unsafe fn exp_below<S: Simd>(x: S) -> S {
    // SAFETY: guaranteed by the caller.
    unsafe {
        let (q, scale) = reduced_exp(S::splat(-87.).max(x));
        scale.mul_add(q, scale)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::{Kernel, LANES, Level};

    struct Both<'a> {
        x: &'a [f32],
        y: &'a mut [(f32, f32)],
    }
    impl Kernel for Both<'_> {
        #[inline(always)]
        unsafe fn run<S: Simd>(self) {
            for (x, y) in self.x.chunks_exact(LANES).zip(self.y.chunks_exact_mut(LANES)) {
                let (mut s, mut t) = ([0.; LANES], [0.; LANES]);
                // SAFETY: both chunks and both arrays have 16 floats.
                unsafe {
                    sigmoid(S::load(x.as_ptr())).store(s.as_mut_ptr());
                    tanh(S::load(x.as_ptr())).store(t.as_mut_ptr());
                }
                for i in 0..LANES {
                    y[i] = (s[i], t[i]);
                }
            }
        }
    }

    #[test]
    fn close_to_f64_everywhere() {
        let mut x: Vec<f32> = (-4000..4000).map(|i| i as f32 * 0.031).collect();
        x.extend((0..64).map(|i| 10f32.powf(-0.3 * i as f32 / 2.) * if i % 2 == 0 { 1. } else { -1. }));
        for level in [Level::Portable, Level::Avx2, Level::Avx512] {
            if !Level::force(Some(level)) {
                continue;
            }
            let mut y = vec![(0., 0.); x.len()];
            level.run(Both { x: &x, y: &mut y });
            for (&x, &(s, t)) in x.iter().zip(&y) {
                let (x64, wanted) = (f64::from(x), 1. / (1. + f64::exp(-f64::from(x))));
                assert!(
                    (f64::from(s) - wanted).abs() <= 3e-7 * wanted + 1e-37,
                    "{level:?} sigmoid({x}) = {s}"
                );
                let wanted = x64.tanh();
                assert!((f64::from(t) - wanted).abs() <= 3e-7 * wanted.abs(), "{level:?} tanh({x}) = {t}");
            }
            let mut y = vec![(0., 0.); LANES];
            level.run(Both { x: &[f32::NAN; LANES], y: &mut y });
            assert!(y.iter().all(|(s, t)| s.is_nan() && t.is_nan()), "{level:?}");
        }
        Level::force(None);
    }
}
