//! Work on rayon's current pool, so that a caller's `ThreadPool::install` decides the threads.
//!
//! Every result is a function of the inputs alone: work is cut by output, or into parts whose sums are added in a fixed
//! order; never by thread.

use crate::float::Float;
use crate::simd::Simd;
use rayon::prelude::*;
use std::ops::Range;

/// Tells candle's own threads, which share the processor's cores with rayon's, to sleep soon after an operation: by default
/// they wait at full speed for half a millisecond, on cores that kernels need. For the start of a program that trains; does
/// nothing, and returns false, once the program has a second thread, where the user has set candle's variable, and off Linux.
pub fn idle_soon() -> bool {
    const VARIABLE: &str = "CANDLE_BARRIER_POOL_SPIN_LIMIT";
    /// Looks for new work: about two microseconds.
    const LIMIT: &str = "100";
    let alone = std::fs::read_dir("/proc/self/task").is_ok_and(|threads| threads.count() == 1);
    if !alone || std::env::var_os(VARIABLE).is_some() {
        return false;
    }
    // SAFETY: there is no other thread that could read the environment meanwhile.
    unsafe { std::env::set_var(VARIABLE, LIMIT) };
    true
}

/// Floats that one task of a memory-bound pass handles; smaller arrays do not pay for a thread.
pub(crate) const GRAIN: usize = 1 << 14;

/// Runs `f` on a thread of the pool, so that the parallel passes inside start at once.
pub(crate) fn on_pool<R: Send>(f: impl FnOnce() -> R + Send) -> R {
    rayon::scope(|_| f())
}

/// f(0), f(1), .. f(n - 1), in any order, on any thread.
pub(crate) fn for_each(n: usize, f: impl Fn(usize) + Sync + Send) {
    match n {
        0 => {}
        1 => f(0),
        _ => (0..n).into_par_iter().with_max_len(1).for_each(f),
    }
}

/// `f` of all of so many rows of `floats` floats, in tasks that pay for a thread.
pub(crate) fn for_rows(rows: usize, floats: usize, f: impl Fn(Range<usize>) + Sync + Send) {
    let in_task = (GRAIN / floats.max(1)).clamp(1, rows.max(1));
    for_each(rows.div_ceil(in_task), |task| f(task * in_task..rows.min((task + 1) * in_task)));
}

/// As `for_each`, where each task also gets a scratch that it may leave dirty for the next.
pub(crate) fn for_each_with<T>(
    n: usize,
    scratch: impl Fn() -> T + Sync + Send,
    f: impl Fn(usize, &mut T) + Sync + Send,
) {
    match n {
        0 => {}
        1 => f(0, &mut scratch()),
        _ => (0..n).into_par_iter().with_max_len(1).for_each_init(scratch, |s, i| f(i, s)),
    }
}

/// Sets all of `x`.
pub(crate) fn fill(x: &mut [f32], value: f32) {
    if x.len() <= GRAIN {
        x.fill(value);
    } else {
        x.par_chunks_mut(GRAIN).for_each(|part| part.fill(value));
    }
}

/// Adds to `total` the arrays of its length that `others` holds, one after the other.
pub(crate) fn add_all(total: &mut [f32], others: &[f32]) {
    const PART: usize = 1 << 12;
    let len = total.len();
    total.par_chunks_mut(PART).enumerate().for_each(|(part, total)| {
        for other in others.chunks_exact(len) {
            total.iter_mut().zip(&other[part * PART..]).for_each(|(sum, x)| *sum += x);
        }
    });
}

/// A pointer that tasks share; what each writes must not overlap what others touch.
pub(crate) struct Shared<T = f32>(*mut T);

impl<T> Clone for Shared<T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Shared<T> {}

// SAFETY: whoever dereferences the pointer promises that tasks do not overlap.
unsafe impl<T: Send> Send for Shared<T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for Shared<T> {}

impl<T> Shared<T> {
    pub(crate) fn new(x: &mut [T]) -> Self {
        Shared(x.as_mut_ptr())
    }
    /// Of memory that is only read.
    pub(crate) fn read(x: &[T]) -> Self {
        Shared(x.as_ptr().cast_mut())
    }
    /// Of a vector that has capacity, and no elements yet.
    pub(crate) fn capacity(x: &mut Vec<T>) -> Self {
        Shared(x.as_mut_ptr())
    }
    /// The rest of the slice.
    /// # Safety
    /// As for `at`.
    pub(crate) unsafe fn offset(self, offset: usize) -> Self {
        // SAFETY: the caller's promise.
        Shared(unsafe { self.0.add(offset) })
    }
    /// The address `offset` values further.
    /// # Safety
    /// Within the slice that this was made from.
    #[inline(always)]
    pub(crate) unsafe fn at(self, offset: usize) -> *mut T {
        // SAFETY: the caller's promise.
        unsafe { self.0.add(offset) }
    }
    /// Asks for the cache line `offset` values further, which need not exist.
    #[inline(always)]
    pub(crate) fn prefetch<S: Simd>(self, offset: usize) {
        S::prefetch(self.0.wrapping_add(offset));
    }
}

impl<T: Float> Shared<T> {
    /// The same memory as `f32`, where that is what it holds.
    pub(crate) fn wide(self) -> Option<Shared> {
        T::WIDE.then(|| Shared(self.0.cast()))
    }
}
