//! A vector of 16 `f32` for any processor, with run-time selection of the instruction set.
//!
//! Kernels are written once, generic over [`Simd`], as a [`Kernel`]: a struct that holds its arguments.
//! [`Level::run`] compiles a kernel for each instruction set and calls the best version that this processor
//! supports, so a plain `cargo build --release` is as fast as one with `-C target-cpu=native`.
//!
//! Everything below `Level::run` must be `#[inline(always)]`: a function that is not inlined is compiled
//! without the vector instructions.

use half::{bf16, f16};
use std::cell::Cell;

/// Lanes of a vector; also the channel block of every layout in this crate.
pub(crate) const LANES: usize = 16;

/// An instruction set supported by this processor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[doc(hidden)]
pub enum Level {
    /// Makes no assumption about the processor.
    Portable,
    /// AVX2 with fused multiply-add and F16C; a vector is two registers.
    Avx2,
    /// AVX-512F; a vector is one register.
    Avx512,
}

thread_local! {
    static FORCED: Cell<Option<Level>> = const { Cell::new(None) };
}

impl Level {
    /// The level forced on the calling thread, or else the best level of this processor.
    pub(crate) fn current() -> Level {
        FORCED.get().unwrap_or_else(Level::best)
    }

    fn best() -> Level {
        #[cfg(target_arch = "x86_64")]
        {
            if is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("fma") {
                return Level::Avx512;
            }
            if is_x86_feature_detected!("avx2")
                && is_x86_feature_detected!("fma")
                && is_x86_feature_detected!("f16c")
            {
                return Level::Avx2;
            }
        }
        Level::Portable
    }

    /// Makes ops called by this thread use `level` from now on (`None`: the best one again). Returns false,
    /// and changes nothing, if the processor lacks it. For tests.
    #[doc(hidden)]
    pub fn force(level: Option<Level>) -> bool {
        let possible = level.is_none_or(|l| l as u8 <= Level::best() as u8);
        if possible {
            FORCED.set(level);
        }
        possible
    }

    /// Runs `kernel` with this level's instructions.
    #[inline]
    pub(crate) fn run<K: Kernel>(self, kernel: K) {
        match self {
            // SAFETY: a `Level` above `Portable` comes from `best` or `force`, which check the processor.
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 => unsafe { x86::run_avx512(kernel) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 => unsafe { x86::run_avx2(kernel) },
            // SAFETY: the portable vector needs no special instructions.
            _ => unsafe { kernel.run::<Portable>() },
        }
    }
}

/// A function generic over the vector type, with its arguments as fields.
pub(crate) trait Kernel {
    /// The body; must be `#[inline(always)]`.
    ///
    /// # Safety
    /// The processor has the instructions of `S`; only `Level::run` calls this. The fields' pointers must be
    /// valid for everything that the kernel documents as read or written.
    unsafe fn run<S: Simd>(self);
}

/// 16 `f32`. Values are only created by unsafe constructors, whose callers guarantee that the processor has
/// the instructions; arithmetic on values is therefore safe.
pub(crate) trait Simd: Copy {
    /// Rows of the register block of a matrix product.
    const ROWS: usize;
    /// Columns of that block, in vectors.
    const COLUMNS: usize;

    /// # Safety
    /// The processor has this type's instructions.
    unsafe fn splat(x: f32) -> Self;
    /// # Safety
    /// Same as for `splat`; also, 16 floats are readable at `p`.
    unsafe fn load(p: *const f32) -> Self;
    /// Loads the first `n` lanes and sets the others to zero.
    /// # Safety
    /// Same as for `splat`; also, `n <= 16` floats are readable at `p`.
    unsafe fn load_first(p: *const f32, n: usize) -> Self;
    /// # Safety
    /// 16 floats are writable at `p`.
    unsafe fn store(self, p: *mut f32);
    /// Stores the first `n` lanes.
    /// # Safety
    /// `n <= 16` floats are writable at `p`.
    unsafe fn store_first(self, p: *mut f32, n: usize);
    /// Loads and widens 16 bfloat16 values.
    /// # Safety
    /// Same as for `splat`; also, 16 values are readable at `p`.
    unsafe fn load_bf16(p: *const bf16) -> Self;
    /// Rounds to the nearest bfloat16, ties to even, and stores; NaN stays NaN.
    /// # Safety
    /// 16 values are writable at `p`.
    unsafe fn store_bf16(self, p: *mut bf16);
    /// Loads and widens 16 float16 values.
    /// # Safety
    /// Same as for `splat`; also, 16 values are readable at `p`.
    unsafe fn load_f16(p: *const f16) -> Self;
    /// Rounds to the nearest float16, ties to even, and stores; values that are too large become infinite.
    /// # Safety
    /// 16 values are writable at `p`.
    unsafe fn store_f16(self, p: *mut f16);

    /// Prefetches the cache line of an address, which need not be valid.
    fn prefetch<T>(p: *const T);
    /// Like `prefetch`, for a line that will be written.
    fn prefetch_write(p: *const f32);

    fn add(self, b: Self) -> Self;
    fn sub(self, b: Self) -> Self;
    fn mul(self, b: Self) -> Self;
    /// self * b + c, with a single rounding if the processor supports it.
    fn mul_add(self, b: Self, c: Self) -> Self;
    /// c - self * b
    fn neg_mul_add(self, b: Self, c: Self) -> Self;
    fn min(self, b: Self) -> Self;
    fn max(self, b: Self) -> Self;
    /// 1 in lanes above zero, else 0.
    fn above_zero(self) -> Self;
    /// 1 / self for normal values, to about one unit in the last place.
    fn reciprocal(self) -> Self;
    /// Shifts the bits left by 23, which turns an integer in the low bits into the exponent of a float.
    fn bits_to_exponent(self) -> Self;

    /// # Safety
    /// Same as for `splat`.
    #[inline(always)]
    unsafe fn zero() -> Self {
        // SAFETY: guaranteed by the caller.
        unsafe { Self::splat(0.) }
    }
    /// `load`, or `load_first` for fewer than 16 lanes.
    /// # Safety
    /// Same as for `load_first`.
    #[inline(always)]
    unsafe fn load_lanes(p: *const f32, n: usize) -> Self {
        // SAFETY: guaranteed by the caller.
        unsafe { if n == LANES { Self::load(p) } else { Self::load_first(p, n) } }
    }
    /// `store`, or `store_first` for fewer than 16 lanes.
    /// # Safety
    /// Same as for `store_first`.
    #[inline(always)]
    unsafe fn store_lanes(self, p: *mut f32, n: usize) {
        // SAFETY: guaranteed by the caller.
        unsafe { if n == LANES { self.store(p) } else { self.store_first(p, n) } }
    }
    /// The sum of the lanes, in a fixed order.
    #[inline(always)]
    fn sum(self) -> f32 {
        let mut lanes = [0f32; LANES];
        // SAFETY: `lanes` holds 16 floats.
        unsafe { self.store(lanes.as_mut_ptr()) };
        let mut half = LANES / 2;
        while half > 0 {
            for i in 0..half {
                lanes[i] += lanes[i + half];
            }
            half /= 2;
        }
        lanes[0]
    }
}

/// 16 floats in an array, left to the compiler to vectorise.
#[derive(Clone, Copy)]
#[repr(align(64))]
pub(crate) struct Portable([f32; LANES]);

impl Portable {
    #[inline(always)]
    fn zip(self, b: Self, f: impl Fn(f32, f32) -> f32) -> Self {
        let mut r = self;
        for i in 0..LANES {
            r.0[i] = f(self.0[i], b.0[i]);
        }
        r
    }
}

impl Simd for Portable {
    const ROWS: usize = if cfg!(target_arch = "aarch64") { 6 } else { 2 };
    const COLUMNS: usize = 1;

    #[inline(always)]
    unsafe fn splat(x: f32) -> Self {
        Portable([x; LANES])
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self {
        // SAFETY: the caller guarantees 16 readable floats; an array of f32 needs only the alignment of f32.
        Portable(unsafe { p.cast::<[f32; LANES]>().read() })
    }
    #[inline(always)]
    unsafe fn load_first(p: *const f32, n: usize) -> Self {
        let mut r = Portable([0.; LANES]);
        // SAFETY: the caller guarantees n readable floats, n <= 16.
        unsafe { std::ptr::copy_nonoverlapping(p, r.0.as_mut_ptr(), n) };
        r
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32) {
        // SAFETY: the caller guarantees 16 writable floats.
        unsafe { p.cast::<[f32; LANES]>().write(self.0) }
    }
    #[inline(always)]
    unsafe fn store_first(self, p: *mut f32, n: usize) {
        // SAFETY: the caller guarantees n writable floats, n <= 16.
        unsafe { std::ptr::copy_nonoverlapping(self.0.as_ptr(), p, n) }
    }
    #[inline(always)]
    unsafe fn load_bf16(p: *const bf16) -> Self {
        // SAFETY: the caller guarantees 16 readable values.
        let x = unsafe { p.cast::<[u16; LANES]>().read() };
        Portable(x.map(|x| f32::from_bits(u32::from(x) << 16)))
    }
    #[inline(always)]
    unsafe fn store_bf16(self, p: *mut bf16) {
        let narrow = self.0.map(bf16::from_f32);
        // SAFETY: the caller guarantees 16 writable values.
        unsafe { p.cast::<[bf16; LANES]>().write(narrow) }
    }
    #[inline(always)]
    unsafe fn load_f16(p: *const f16) -> Self {
        // SAFETY: the caller guarantees 16 readable values.
        let x = unsafe { p.cast::<[f16; LANES]>().read() };
        Portable(x.map(f16::to_f32))
    }
    #[inline(always)]
    unsafe fn store_f16(self, p: *mut f16) {
        let narrow = self.0.map(f16::from_f32);
        // SAFETY: the caller guarantees 16 writable values.
        unsafe { p.cast::<[f16; LANES]>().write(narrow) }
    }
    #[inline(always)]
    fn prefetch<T>(_: *const T) {}
    #[inline(always)]
    fn prefetch_write(_: *const f32) {}
    #[inline(always)]
    fn add(self, b: Self) -> Self {
        self.zip(b, |x, y| x + y)
    }
    #[inline(always)]
    fn sub(self, b: Self) -> Self {
        self.zip(b, |x, y| x - y)
    }
    #[inline(always)]
    fn mul(self, b: Self) -> Self {
        self.zip(b, |x, y| x * y)
    }
    #[inline(always)]
    fn mul_add(self, b: Self, c: Self) -> Self {
        // Without an FMA instruction, f32::mul_add is a slow call into the C library.
        let mut r = self;
        for i in 0..LANES {
            r.0[i] = if cfg!(target_arch = "aarch64") {
                self.0[i].mul_add(b.0[i], c.0[i])
            } else {
                self.0[i] * b.0[i] + c.0[i]
            };
        }
        r
    }
    #[inline(always)]
    fn neg_mul_add(self, b: Self, c: Self) -> Self {
        let mut minus = self;
        for x in &mut minus.0 {
            *x = -*x;
        }
        minus.mul_add(b, c)
    }
    #[inline(always)]
    fn min(self, b: Self) -> Self {
        self.zip(b, |x, y| if x < y { x } else { y })
    }
    #[inline(always)]
    fn max(self, b: Self) -> Self {
        self.zip(b, |x, y| if x > y { x } else { y })
    }
    #[inline(always)]
    fn above_zero(self) -> Self {
        self.zip(self, |x, _| if x > 0. { 1. } else { 0. })
    }
    #[inline(always)]
    fn reciprocal(self) -> Self {
        self.zip(self, |x, _| 1. / x)
    }
    #[inline(always)]
    fn bits_to_exponent(self) -> Self {
        self.zip(self, |x, _| f32::from_bits(x.to_bits() << 23))
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{Kernel, LANES, Simd};
    use half::{bf16, f16};
    use std::arch::x86_64::*;

    #[target_feature(enable = "avx512f,avx2,fma")]
    pub(super) unsafe fn run_avx512<K: Kernel>(kernel: K) {
        // SAFETY: the caller guarantees that the processor has these instructions.
        unsafe { kernel.run::<Avx512>() }
    }

    #[target_feature(enable = "avx2,fma,f16c")]
    pub(super) unsafe fn run_avx2<K: Kernel>(kernel: K) {
        // SAFETY: the caller guarantees that the processor has these instructions.
        unsafe { kernel.run::<Avx2>() }
    }

    #[derive(Clone, Copy)]
    pub(crate) struct Avx512(__m512);

    /// Wraps an expression of intrinsics on existing vectors.
    macro_rules! op {
        ($e:expr) => {
            // SAFETY: a vector exists, so the processor has the instructions (see `Simd`); loads and stores
            // stay within what the caller guaranteed.
            unsafe { $e }
        };
    }

    impl Simd for Avx512 {
        const ROWS: usize = 12;
        const COLUMNS: usize = 2;

        #[inline(always)]
        unsafe fn splat(x: f32) -> Self {
            Avx512(op!(_mm512_set1_ps(x)))
        }
        #[inline(always)]
        unsafe fn load(p: *const f32) -> Self {
            Avx512(op!(_mm512_loadu_ps(p)))
        }
        #[inline(always)]
        unsafe fn load_first(p: *const f32, n: usize) -> Self {
            Avx512(op!(_mm512_maskz_loadu_ps(((1u32 << n) - 1) as u16, p)))
        }
        #[inline(always)]
        unsafe fn store(self, p: *mut f32) {
            op!(_mm512_storeu_ps(p, self.0))
        }
        #[inline(always)]
        unsafe fn store_first(self, p: *mut f32, n: usize) {
            op!(_mm512_mask_storeu_ps(p, ((1u32 << n) - 1) as u16, self.0))
        }
        #[inline(always)]
        unsafe fn load_bf16(p: *const bf16) -> Self {
            op!({
                let bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256(p.cast()));
                Avx512(_mm512_castsi512_ps(_mm512_slli_epi32::<16>(bits)))
            })
        }
        #[inline(always)]
        unsafe fn store_bf16(self, p: *mut bf16) {
            op!({
                // Round to nearest even: add half a unit of the last kept place, less one bit if that place
                // is even.
                let bits = _mm512_castps_si512(self.0);
                let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
                let rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
                // NaN must not round to infinity.
                let nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(self.0, self.0);
                let quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x40_0000));
                let narrow = _mm512_srli_epi32::<16>(_mm512_mask_mov_epi32(rounded, nan, quiet));
                _mm256_storeu_si256(p.cast(), _mm512_cvtepi32_epi16(narrow));
            })
        }
        #[inline(always)]
        unsafe fn load_f16(p: *const f16) -> Self {
            Avx512(op!(_mm512_cvtph_ps(_mm256_loadu_si256(p.cast()))))
        }
        #[inline(always)]
        unsafe fn store_f16(self, p: *mut f16) {
            op!(_mm256_storeu_si256(p.cast(), _mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(self.0)))
        }
        #[inline(always)]
        fn prefetch<T>(p: *const T) {
            op!(_mm_prefetch::<_MM_HINT_T0>(p.cast()))
        }
        #[inline(always)]
        fn prefetch_write(p: *const f32) {
            op!(_mm_prefetch::<_MM_HINT_ET0>(p.cast()))
        }
        #[inline(always)]
        fn add(self, b: Self) -> Self {
            Avx512(op!(_mm512_add_ps(self.0, b.0)))
        }
        #[inline(always)]
        fn sub(self, b: Self) -> Self {
            Avx512(op!(_mm512_sub_ps(self.0, b.0)))
        }
        #[inline(always)]
        fn mul(self, b: Self) -> Self {
            Avx512(op!(_mm512_mul_ps(self.0, b.0)))
        }
        #[inline(always)]
        fn mul_add(self, b: Self, c: Self) -> Self {
            Avx512(op!(_mm512_fmadd_ps(self.0, b.0, c.0)))
        }
        #[inline(always)]
        fn neg_mul_add(self, b: Self, c: Self) -> Self {
            Avx512(op!(_mm512_fnmadd_ps(self.0, b.0, c.0)))
        }
        #[inline(always)]
        fn min(self, b: Self) -> Self {
            Avx512(op!(_mm512_min_ps(self.0, b.0)))
        }
        #[inline(always)]
        fn max(self, b: Self) -> Self {
            Avx512(op!(_mm512_max_ps(self.0, b.0)))
        }
        #[inline(always)]
        fn above_zero(self) -> Self {
            op!({
                let above = _mm512_cmp_ps_mask::<_CMP_GT_OQ>(self.0, _mm512_setzero_ps());
                Avx512(_mm512_maskz_mov_ps(above, _mm512_set1_ps(1.)))
            })
        }
        #[inline(always)]
        fn reciprocal(self) -> Self {
            // 14 bits, then one Newton step: r (2 - x r) = r + r (1 - x r)
            op!({
                let r = _mm512_rcp14_ps(self.0);
                let e = _mm512_fnmadd_ps(self.0, r, _mm512_set1_ps(1.));
                Avx512(_mm512_fmadd_ps(r, e, r))
            })
        }
        #[inline(always)]
        fn bits_to_exponent(self) -> Self {
            Avx512(op!(_mm512_castsi512_ps(_mm512_slli_epi32::<23>(_mm512_castps_si512(self.0)))))
        }
    }

    #[derive(Clone, Copy)]
    pub(crate) struct Avx2(__m256, __m256);

    impl Avx2 {
        /// Lane masks for the first `n` of 16 lanes.
        #[inline(always)]
        fn masks(n: usize) -> (__m256i, __m256i) {
            op!({
                let n = _mm256_set1_epi32(n as i32);
                let lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
                let high = _mm256_add_epi32(lanes, _mm256_set1_epi32(8));
                (_mm256_cmpgt_epi32(n, lanes), _mm256_cmpgt_epi32(n, high))
            })
        }
    }

    /// Rounds 8 floats to bfloat16, in the low half of each lane: adds half a unit of the last kept place,
    /// less one bit if that place is even, and truncates.
    /// # Safety
    /// The processor has AVX2.
    #[inline(always)]
    unsafe fn bf16_bits(x: __m256) -> __m256i {
        op!({
            let bits = _mm256_castps_si256(x);
            let odd = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
            let rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
            // NaN must not round to infinity.
            let nan = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_UNORD_Q>(x, x));
            let quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x40_0000));
            _mm256_srli_epi32::<16>(_mm256_blendv_epi8(rounded, quiet, nan))
        })
    }

    impl Simd for Avx2 {
        const ROWS: usize = 6;
        const COLUMNS: usize = 1;

        #[inline(always)]
        unsafe fn splat(x: f32) -> Self {
            let v = op!(_mm256_set1_ps(x));
            Avx2(v, v)
        }
        #[inline(always)]
        unsafe fn load(p: *const f32) -> Self {
            op!(Avx2(_mm256_loadu_ps(p), _mm256_loadu_ps(p.add(LANES / 2))))
        }
        #[inline(always)]
        unsafe fn load_first(p: *const f32, n: usize) -> Self {
            let (low, high) = Self::masks(n);
            op!(Avx2(_mm256_maskload_ps(p, low), _mm256_maskload_ps(p.wrapping_add(LANES / 2), high)))
        }
        #[inline(always)]
        unsafe fn store(self, p: *mut f32) {
            op!({
                _mm256_storeu_ps(p, self.0);
                _mm256_storeu_ps(p.add(LANES / 2), self.1);
            })
        }
        #[inline(always)]
        unsafe fn store_first(self, p: *mut f32, n: usize) {
            let (low, high) = Self::masks(n);
            op!({
                _mm256_maskstore_ps(p, low, self.0);
                _mm256_maskstore_ps(p.wrapping_add(LANES / 2), high, self.1);
            })
        }
        #[inline(always)]
        unsafe fn load_bf16(p: *const bf16) -> Self {
            op!({
                let p = p.cast::<__m128i>();
                let widen = |x| _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(x)));
                Avx2(widen(_mm_loadu_si128(p)), widen(_mm_loadu_si128(p.add(1))))
            })
        }
        #[inline(always)]
        unsafe fn store_bf16(self, p: *mut bf16) {
            op!({
                let (low, high) = (bf16_bits(self.0), bf16_bits(self.1));
                // `packus` packs within each 128-bit half, so the quarters come out in the order 0, 2, 1, 3.
                let packed = _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_packus_epi32(low, high));
                _mm256_storeu_si256(p.cast(), packed);
            })
        }
        #[inline(always)]
        unsafe fn load_f16(p: *const f16) -> Self {
            op!({
                let p = p.cast::<__m128i>();
                Avx2(_mm256_cvtph_ps(_mm_loadu_si128(p)), _mm256_cvtph_ps(_mm_loadu_si128(p.add(1))))
            })
        }
        #[inline(always)]
        unsafe fn store_f16(self, p: *mut f16) {
            op!({
                let p = p.cast::<__m128i>();
                _mm_storeu_si128(p, _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(self.0));
                _mm_storeu_si128(p.add(1), _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(self.1));
            })
        }
        #[inline(always)]
        fn prefetch<T>(p: *const T) {
            op!(_mm_prefetch::<_MM_HINT_T0>(p.cast()))
        }
        #[inline(always)]
        fn prefetch_write(p: *const f32) {
            op!(_mm_prefetch::<_MM_HINT_ET0>(p.cast()))
        }
        #[inline(always)]
        fn add(self, b: Self) -> Self {
            op!(Avx2(_mm256_add_ps(self.0, b.0), _mm256_add_ps(self.1, b.1)))
        }
        #[inline(always)]
        fn sub(self, b: Self) -> Self {
            op!(Avx2(_mm256_sub_ps(self.0, b.0), _mm256_sub_ps(self.1, b.1)))
        }
        #[inline(always)]
        fn mul(self, b: Self) -> Self {
            op!(Avx2(_mm256_mul_ps(self.0, b.0), _mm256_mul_ps(self.1, b.1)))
        }
        #[inline(always)]
        fn mul_add(self, b: Self, c: Self) -> Self {
            op!(Avx2(_mm256_fmadd_ps(self.0, b.0, c.0), _mm256_fmadd_ps(self.1, b.1, c.1)))
        }
        #[inline(always)]
        fn neg_mul_add(self, b: Self, c: Self) -> Self {
            op!(Avx2(_mm256_fnmadd_ps(self.0, b.0, c.0), _mm256_fnmadd_ps(self.1, b.1, c.1)))
        }
        #[inline(always)]
        fn min(self, b: Self) -> Self {
            op!(Avx2(_mm256_min_ps(self.0, b.0), _mm256_min_ps(self.1, b.1)))
        }
        #[inline(always)]
        fn max(self, b: Self) -> Self {
            op!(Avx2(_mm256_max_ps(self.0, b.0), _mm256_max_ps(self.1, b.1)))
        }
        #[inline(always)]
        fn above_zero(self) -> Self {
            op!({
                let (zero, one) = (_mm256_setzero_ps(), _mm256_set1_ps(1.));
                let above = |x| _mm256_and_ps(_mm256_cmp_ps::<_CMP_GT_OQ>(x, zero), one);
                Avx2(above(self.0), above(self.1))
            })
        }
        #[inline(always)]
        fn reciprocal(self) -> Self {
            op!({
                let one = _mm256_set1_ps(1.);
                Avx2(_mm256_div_ps(one, self.0), _mm256_div_ps(one, self.1))
            })
        }
        #[inline(always)]
        fn bits_to_exponent(self) -> Self {
            op!(Avx2(
                _mm256_castsi256_ps(_mm256_slli_epi32::<23>(_mm256_castps_si256(self.0))),
                _mm256_castsi256_ps(_mm256_slli_epi32::<23>(_mm256_castps_si256(self.1))),
            ))
        }
    }
}
