//! The element types of tensors: `f32`, or a half type that halves the memory but not the precision of sums.
//!
//! Kernels compute on vectors of `f32` and are generic over the [`Float`] that they load and store; half
//! types are widened on load and rounded on store.

use crate::buffer::{Buffer, filled};
use crate::parallel::{self, GRAIN, Shared};
use crate::simd::{Kernel, LANES, Level, Simd};
use candle_core::WithDType;
use half::{bf16, f16};
use std::borrow::Cow;
use std::ops::DerefMut;

/// An element type. All bits zero must mean the number zero.
pub(crate) trait Float: WithDType {
    /// Whether this is `f32` itself, so values are stored exactly as computed.
    const WIDE: bool = false;
    /// The f32 values used to compute a tensor: its own values if this is `f32`, scratch memory otherwise.
    type Wide: DerefMut<Target = [f32]> + Send;

    /// # Safety
    /// Same as for [`Simd::load`].
    unsafe fn load<S: Simd>(p: *const Self) -> S;
    /// # Safety
    /// Same as for [`Simd::store`].
    unsafe fn store<S: Simd>(x: S, p: *mut Self);

    /// Loads the first `n` lanes and sets the others to zero.
    /// # Safety
    /// Same as for [`Simd::load_first`].
    #[inline(always)]
    unsafe fn load_first<S: Simd>(p: *const Self, n: usize) -> S {
        let mut lanes = [Self::zero(); LANES];
        // SAFETY: the caller guarantees n readable values, n <= 16.
        unsafe {
            std::ptr::copy_nonoverlapping(p, lanes.as_mut_ptr(), n);
            Self::load(lanes.as_ptr())
        }
    }
    /// Stores the first `n` lanes.
    /// # Safety
    /// Same as for [`Simd::store_first`].
    #[inline(always)]
    unsafe fn store_first<S: Simd>(x: S, p: *mut Self, n: usize) {
        let mut lanes = [Self::zero(); LANES];
        // SAFETY: the caller guarantees n writable values, n <= 16.
        unsafe {
            Self::store(x, lanes.as_mut_ptr());
            std::ptr::copy_nonoverlapping(lanes.as_ptr(), p, n);
        }
    }
    /// `load`, or `load_first` for fewer than 16 lanes.
    /// # Safety
    /// Same as for `load_first`.
    #[inline(always)]
    unsafe fn load_lanes<S: Simd>(p: *const Self, n: usize) -> S {
        // SAFETY: guaranteed by the caller.
        unsafe { if n == LANES { Self::load(p) } else { Self::load_first(p, n) } }
    }
    /// `store`, or `store_first` for fewer than 16 lanes.
    /// # Safety
    /// Same as for `store_first`.
    #[inline(always)]
    unsafe fn store_lanes<S: Simd>(x: S, p: *mut Self, n: usize) {
        // SAFETY: guaranteed by the caller.
        unsafe { if n == LANES { Self::store(x, p) } else { Self::store_first(x, p, n) } }
    }

    /// The values as f32: borrowed if they already are, otherwise a copy.
    fn widened(level: Level, x: &[Self]) -> Cow<'_, [f32]> {
        let mut wide = vec![0f32; x.len()];
        convert(level, x, &mut wide);
        Cow::Owned(wide)
    }
    /// Zeros, as f32.
    fn wide_zeros(len: usize) -> Self::Wide;
    /// f32 values, all of which `fill` writes.
    /// # Safety
    /// `fill` writes every one of the `len` values before it reads it.
    unsafe fn wide_filled(len: usize, fill: impl FnOnce(Shared)) -> Self::Wide;
    /// The f32 values rounded to this type.
    fn narrowed(level: Level, x: Self::Wide) -> Vec<Self>;
}

impl Float for f32 {
    const WIDE: bool = true;
    type Wide = Vec<f32>;

    #[inline(always)]
    unsafe fn load<S: Simd>(p: *const f32) -> S {
        // SAFETY: guaranteed by the caller.
        unsafe { S::load(p) }
    }
    #[inline(always)]
    unsafe fn store<S: Simd>(x: S, p: *mut f32) {
        // SAFETY: guaranteed by the caller.
        unsafe { x.store(p) }
    }
    #[inline(always)]
    unsafe fn load_first<S: Simd>(p: *const f32, n: usize) -> S {
        // SAFETY: guaranteed by the caller.
        unsafe { S::load_first(p, n) }
    }
    #[inline(always)]
    unsafe fn store_first<S: Simd>(x: S, p: *mut f32, n: usize) {
        // SAFETY: guaranteed by the caller.
        unsafe { x.store_first(p, n) }
    }
    fn widened(_: Level, x: &[f32]) -> Cow<'_, [f32]> {
        Cow::Borrowed(x)
    }
    fn wide_zeros(len: usize) -> Vec<f32> {
        vec![0.; len]
    }
    unsafe fn wide_filled(len: usize, fill: impl FnOnce(Shared)) -> Vec<f32> {
        // SAFETY: guaranteed by the caller.
        unsafe { filled(len, fill) }
    }
    fn narrowed(_: Level, x: Vec<f32>) -> Vec<f32> {
        x
    }
}

/// The methods that both half types implement with scratch memory.
macro_rules! through_scratch {
    () => {
        type Wide = Buffer;

        fn wide_zeros(len: usize) -> Buffer {
            Buffer::zeroed(len)
        }
        unsafe fn wide_filled(len: usize, fill: impl FnOnce(Shared)) -> Buffer {
            let mut wide = Buffer::new(len);
            fill(Shared::new(&mut wide));
            wide
        }
        fn narrowed(level: Level, x: Buffer) -> Vec<Self> {
            let mut narrow = vec![Self::ZERO; x.len()];
            convert(level, &x, &mut narrow);
            narrow
        }
    };
}

impl Float for bf16 {
    through_scratch!();

    #[inline(always)]
    unsafe fn load<S: Simd>(p: *const bf16) -> S {
        // SAFETY: guaranteed by the caller.
        unsafe { S::load_bf16(p) }
    }
    #[inline(always)]
    unsafe fn store<S: Simd>(x: S, p: *mut bf16) {
        // SAFETY: guaranteed by the caller.
        unsafe { x.store_bf16(p) }
    }
}

impl Float for f16 {
    through_scratch!();

    #[inline(always)]
    unsafe fn load<S: Simd>(p: *const f16) -> S {
        // SAFETY: guaranteed by the caller.
        unsafe { S::load_f16(p) }
    }
    #[inline(always)]
    unsafe fn store<S: Simd>(x: S, p: *mut f16) {
        // SAFETY: guaranteed by the caller.
        unsafe { x.store_f16(p) }
    }
}

/// Converts values from one type to another; both slices have the same length.
pub(crate) fn convert<A: Float, B: Float>(level: Level, from: &[A], to: &mut [B]) {
    let len = from.len();
    assert_eq!(len, to.len());
    let to = Shared::new(to);
    parallel::for_each(len.div_ceil(GRAIN), |task| {
        let part = task * GRAIN..len.min((task + 1) * GRAIN);
        level.run(Convert { from, to, part });
    });
}

/// Converts a part of the values.
pub(crate) struct Convert<'a, A, B> {
    pub(crate) from: &'a [A],
    pub(crate) to: Shared<B>,
    pub(crate) part: std::ops::Range<usize>,
}

impl<A: Float, B: Float> Kernel for Convert<'_, A, B> {
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let whole = self.part.len() / LANES * LANES;
        // SAFETY: both have values up to the end of the part; each task has its own part.
        unsafe {
            let (from, to) = (self.from.as_ptr().add(self.part.start), self.to.at(self.part.start));
            for at in (0..whole).step_by(LANES) {
                B::store(A::load::<S>(from.add(at)), to.add(at));
            }
            let rest = self.part.len() - whole;
            if rest > 0 {
                B::store_first(A::load_first::<S>(from.add(whole), rest), to.add(whole), rest);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn narrowed<T: Float>(level: Level, values: &[f32]) -> Vec<T> {
        let mut wide = T::wide_zeros(values.len());
        wide.copy_from_slice(values);
        T::narrowed(level, wide)
    }

    /// Checks every value of a half type in both directions, and values around the midpoints between
    /// neighbours.
    fn check<T: Float>(from_bits: impl Fn(u16) -> T, to_bits: impl Fn(T) -> u16, narrow: impl Fn(f32) -> T) {
        let all: Vec<T> = (0..=u16::MAX).map(from_bits).collect();
        for level in [Level::Portable, Level::Avx2, Level::Avx512] {
            if !Level::force(Some(level)) {
                continue;
            }
            let wide = T::widened(level, &all);
            for (x, wide) in all.iter().zip(&*wide) {
                assert!(x.to_f64() == f64::from(*wide) || wide.is_nan() && x.to_f64().is_nan(), "{level:?}");
            }
            let mut values = Vec::new();
            for x in &*wide {
                // A quarter, half and three quarters of the way to the next bfloat16 and float16, and
                // slightly off those points.
                for part in [0, 1, 1 << 12, 1 << 13, 1 << 14, 1 << 15, 3 << 14] {
                    values.extend([part, part + 1].map(|p| f32::from_bits(x.to_bits().wrapping_add(p))));
                    values.push(f32::from_bits(x.to_bits().wrapping_add(part).wrapping_sub(1)));
                }
            }
            values.push(f32::from_bits(u32::MAX));
            for (x, narrowed) in values.iter().zip(narrowed::<T>(level, &values)) {
                let wanted = narrow(*x);
                let same = to_bits(narrowed) == to_bits(wanted);
                assert!(same || x.is_nan() && narrowed.to_f64().is_nan(), "{level:?}: {x:e} {narrowed}");
            }
        }
        Level::force(None);
    }

    #[test]
    fn halves_are_widened_exactly_and_rounded_to_nearest_even() {
        check(bf16::from_bits, bf16::to_bits, bf16::from_f32);
        check(f16::from_bits, f16::to_bits, f16::from_f32);
    }
}
