//! Parallel work on rayon's current pool, so a caller's `ThreadPool::install` decides the threads.
//!
//! Every result depends only on the inputs: work is split by output, or into parts whose sums are added in a
//! fixed order, never by thread.

use crate::float::Float;
use crate::simd::Simd;
use rayon::prelude::*;
use std::ops::Range;

/// Makes candle's own threads, which share the cores with rayon's, sleep soon after an operation. By default
/// they spin for half a millisecond on cores that kernels need. Call it at the start of a training program.
/// Does nothing and returns false if the program already has a second thread, if the user has set candle's
/// variable, or on systems other than Linux.
pub fn idle_soon() -> bool {
    const VARIABLE: &str = "CANDLE_BARRIER_POOL_SPIN_LIMIT";
    /// Polls for new work before a thread sleeps: about two microseconds.
    const LIMIT: &str = "100";
    let alone = std::fs::read_dir("/proc/self/task").is_ok_and(|threads| threads.count() == 1);
    if !alone || std::env::var_os(VARIABLE).is_some() {
        return false;
    }
    // SAFETY: there is no other thread that could read the environment meanwhile.
    unsafe { std::env::set_var(VARIABLE, LIMIT) };
    true
}

/// Floats per task of a memory-bound pass; smaller arrays are not worth a thread.
pub(crate) const GRAIN: usize = 1 << 14;

/// Runs `f` on a thread of the pool, so parallel passes inside it start at once.
pub(crate) fn on_pool<R: Send>(f: impl FnOnce() -> R + Send) -> R {
    rayon::scope(|_| f())
}

/// Calls f(0), f(1), .. f(n - 1), in any order, on any thread.
pub(crate) fn for_each(n: usize, f: impl Fn(usize) + Sync + Send) {
    match n {
        0 => {}
        1 => f(0),
        _ => (0..n).into_par_iter().with_max_len(1).for_each(f),
    }
}

/// Calls `f` for ranges that cover `rows` rows of `floats` floats each, in tasks large enough to be worth a
/// thread.
pub(crate) fn for_rows(rows: usize, floats: usize, f: impl Fn(Range<usize>) + Sync + Send) {
    let in_task = (GRAIN / floats.max(1)).clamp(1, rows.max(1));
    for_each(rows.div_ceil(in_task), |task| f(task * in_task..rows.min((task + 1) * in_task)));
}

/// Like `for_each`, but each task also gets a scratch value, which it may leave dirty for the next task.
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

/// Sets all of `x` to `value`.
pub(crate) fn fill(x: &mut [f32], value: f32) {
    if x.len() <= GRAIN {
        x.fill(value);
    } else {
        x.par_chunks_mut(GRAIN).for_each(|part| part.fill(value));
    }
}

/// Adds to `total` each of the arrays of the same length that `others` concatenates.
pub(crate) fn add_all(total: &mut [f32], others: &[f32]) {
    const PART: usize = 1 << 12;
    let len = total.len();
    total.par_chunks_mut(PART).enumerate().for_each(|(part, total)| {
        for other in others.chunks_exact(len) {
            total.iter_mut().zip(&other[part * PART..]).for_each(|(sum, x)| *sum += x);
        }
    });
}

/// A pointer shared by tasks; what one task writes must not overlap what others access.
pub(crate) struct Shared<T = f32>(*mut T);

impl<T> Clone for Shared<T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Shared<T> {}

// SAFETY: code that dereferences the pointer guarantees that tasks do not overlap.
unsafe impl<T: Send> Send for Shared<T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for Shared<T> {}

impl<T> Shared<T> {
    pub(crate) fn new(x: &mut [T]) -> Self {
        Shared(x.as_mut_ptr())
    }
    /// A pointer to memory that is only read.
    pub(crate) fn read(x: &[T]) -> Self {
        Shared(x.as_ptr().cast_mut())
    }
    /// A pointer to a vector's spare capacity; the vector has no elements yet.
    pub(crate) fn capacity(x: &mut Vec<T>) -> Self {
        Shared(x.as_mut_ptr())
    }
    /// The slice from `offset` on.
    /// # Safety
    /// Same as for `at`.
    pub(crate) unsafe fn offset(self, offset: usize) -> Self {
        // SAFETY: guaranteed by the caller.
        Shared(unsafe { self.0.add(offset) })
    }
    /// The address of the value at `offset`.
    /// # Safety
    /// `offset` is within the slice that this was created from.
    #[inline(always)]
    pub(crate) unsafe fn at(self, offset: usize) -> *mut T {
        // SAFETY: guaranteed by the caller.
        unsafe { self.0.add(offset) }
    }
    /// Prefetches the cache line of the value at `offset`, which need not exist.
    #[inline(always)]
    pub(crate) fn prefetch<S: Simd>(self, offset: usize) {
        S::prefetch(self.0.wrapping_add(offset));
    }
}

impl<T: Float> Shared<T> {
    /// The same memory as `f32`, if that is its type.
    pub(crate) fn wide(self) -> Option<Shared> {
        T::WIDE.then(|| Shared(self.0.cast()))
    }
}
