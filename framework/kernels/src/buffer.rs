//! Scratch memory: aligned, and reused between calls.
//!
//! Touching fresh pages costs as much as the arithmetic of a small op, and training requests the same sizes
//! at every step. A dropped [`Buffer`] therefore stays in a pool until a buffer of the same size, or a
//! slightly smaller one, is requested. Lent and idle memory together stay below the peak of lent memory plus
//! an eighth of it, or plus 32 MiB if that is more: before a fresh allocation would exceed this, the blocks
//! that were idle longest are freed. [`release_scratch`] frees all idle blocks.

use std::alloc::{Layout, handle_alloc_error};
use std::cmp::Reverse;
use std::collections::VecDeque;
use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::sync::{Mutex, MutexGuard, PoisonError};

#[cfg(target_os = "linux")]
use memmap2::Advice;
use memmap2::MmapMut;

use crate::float::Float;
use crate::parallel::Shared;

/// Sizes are rounded up to whole pages, large ones to multiples of 64 KiB.
const PAGE: usize = 4 << 10;
const LARGE: usize = 64 << 10;
/// Buffers of this size or more are aligned to huge pages, and use them if the system has them.
const HUGE: usize = 2 << 20;
/// Memory that may always stay idle: the ops of a step need many sizes, of which only a few are lent at once,
/// and the next step needs each of them again.
const SPARE: usize = 32 << 20;

/// A block of memory that the pool owns or has lent. It has its own pages, so it leaves no holes between
/// tensors and returns to the system as a whole.
struct Block {
    /// Unmapped when this is dropped.
    _pages: MmapMut,
    start: NonNull<u8>,
    bytes: usize,
}

// SAFETY: a block is plain memory with one owner.
unsafe impl Send for Block {}
// SAFETY: a shared reference to a block only allows reading.
unsafe impl Sync for Block {}

impl Block {
    /// A block filled with zeros.
    fn allocate(bytes: usize) -> Block {
        let align = if bytes >= HUGE { HUGE } else { 1 };
        let Ok(mut pages) = MmapMut::map_anon(bytes + align - 1) else {
            handle_alloc_error(Layout::array::<u8>(bytes).unwrap_or(Layout::new::<u8>()))
        };
        let start = pages.as_ptr().align_offset(align);
        #[cfg(target_os = "linux")]
        if bytes >= HUGE {
            // Only a hint; failure does no harm.
            let _ = pages.advise_range(Advice::HugePage, start, bytes);
        }
        let block = &mut pages[start..start + bytes];
        // After the hint, because this touches the pages.
        block.fill(0);
        Block { start: NonNull::from(block).cast(), bytes, _pages: pages }
    }
}

/// The idle blocks, least recently used first, and the byte counts.
struct Pool {
    idle: VecDeque<Block>,
    idle_bytes: usize,
    lent_bytes: usize,
    /// The peak of `lent_bytes`.
    peak_bytes: usize,
}

static POOL: Mutex<Pool> = Mutex::new(Pool::new());

fn pool() -> MutexGuard<'static, Pool> {
    // No code that holds the lock panics half-way.
    POOL.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Pool {
    const fn new() -> Self {
        Self { idle: VecDeque::new(), idle_bytes: 0, lent_bytes: 0, peak_bytes: 0 }
    }

    /// Takes an idle block of this size or up to an eighth larger; otherwise makes room for a fresh one and
    /// returns `None`.
    fn lend(&mut self, bytes: usize) -> Option<Block> {
        let fits = |block: &Block| (bytes..=bytes + bytes / 8).contains(&block.bytes);
        // The tightest fit, and of equal ones the most recent, which may still be in a cache.
        let fitting = self.idle.iter().enumerate().filter(|(_, block)| fits(block));
        let found = fitting.min_by_key(|(i, block)| (block.bytes, Reverse(*i))).map(|(i, _)| i);
        let found = found.and_then(|i| self.idle.remove(i));
        self.lent_bytes += found.as_ref().map_or(bytes, |block| block.bytes);
        self.peak_bytes = self.peak_bytes.max(self.lent_bytes);
        if let Some(block) = found {
            self.idle_bytes -= block.bytes;
            return Some(block);
        }
        let most = self.peak_bytes + (self.peak_bytes / 8).max(SPARE);
        while self.lent_bytes + self.idle_bytes > most
            && let Some(old) = self.idle.pop_front()
        {
            self.idle_bytes -= old.bytes;
        }
        None
    }

    fn take_back(&mut self, block: Block) {
        self.lent_bytes -= block.bytes;
        self.idle_bytes += block.bytes;
        self.idle.push_back(block);
    }
}

/// Returns unused scratch memory, and memory retained by [`keep_freed_memory`], to the system.
pub fn release_scratch() {
    let mut pool = pool();
    pool.idle_bytes = 0;
    pool.peak_bytes = pool.lent_bytes;
    pool.idle.clear();
    // SAFETY: only asks the allocator to return unused memory.
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    unsafe {
        libc::malloc_trim(0);
    }
}

/// Tells the C library's allocator to keep freed memory for later tensors instead of returning it to the
/// system and fetching fresh pages a moment later. candle allocates and drops a tensor for each operation,
/// and fresh pages cost more than most operations compute. All threads share one heap, because glibc always
/// returns memory of its per-thread heaps, and no block gets its own mapping, because glibc returns those at
/// once. Call it at the start of a training program. Does nothing and returns false if the C library is not
/// glibc.
pub fn keep_freed_memory() -> bool {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    {
        // The end of the heap is never trimmed.
        const NEVER: i32 = -1;
        // SAFETY: only sets parameters of the allocator.
        unsafe {
            libc::mallopt(libc::M_ARENA_MAX, 1) == 1
                && libc::mallopt(libc::M_MMAP_MAX, 0) == 1
                && libc::mallopt(libc::M_TRIM_THRESHOLD, NEVER) == 1
        }
    }
    #[cfg(not(all(target_os = "linux", target_env = "gnu")))]
    false
}

/// A tensor's values, all of which `fill` writes through the pointer that it receives: clearing them first
/// would cost a small convolution as much as its products.
///
/// # Safety
/// `fill` writes every one of the `len` values before it reads it.
pub(crate) unsafe fn filled<T: Float>(len: usize, fill: impl FnOnce(Shared<T>)) -> Vec<T> {
    let mut values = Vec::with_capacity(len);
    fill(Shared::capacity(&mut values));
    // SAFETY: the capacity is at least `len`, and the caller guarantees that `fill` has written all values.
    unsafe { values.set_len(len) };
    values
}

/// `len` numbers, aligned for vectors, from the pool.
pub(crate) struct Buffer<T = f32> {
    block: Option<Block>,
    len: usize,
    values: PhantomData<T>,
}

impl Buffer {
    /// `len` floats of unspecified value.
    pub(crate) fn new(len: usize) -> Buffer {
        Buffer::of(len)
    }

    /// `len` zeros.
    pub(crate) fn zeroed(len: usize) -> Buffer {
        let mut buffer = Buffer::new(len);
        crate::parallel::fill(&mut buffer, 0.);
        buffer
    }
}

impl<T: Float> Buffer<T> {
    /// `len` numbers of unspecified value.
    pub(crate) fn of(len: usize) -> Buffer<T> {
        let bytes = (len * size_of::<T>()).max(1);
        let bytes = bytes.next_multiple_of(if bytes >= LARGE { LARGE } else { PAGE });
        let lent = pool().lend(bytes);
        let block = lent.unwrap_or_else(|| Block::allocate(bytes));
        Buffer { block: Some(block), len, values: PhantomData }
    }

    fn start(&self) -> *mut T {
        match &self.block {
            Some(block) => block.start.as_ptr().cast(),
            None => NonNull::dangling().as_ptr(),
        }
    }
}

impl<T> Drop for Buffer<T> {
    fn drop(&mut self) {
        if let Some(block) = self.block.take() {
            pool().take_back(block);
        }
    }
}

impl<T: Float> Deref for Buffer<T> {
    type Target = [T];
    fn deref(&self) -> &[T] {
        // SAFETY: the block holds at least `len` numbers, zeroed when allocated; any bit pattern is a valid
        // number.
        unsafe { std::slice::from_raw_parts(self.start(), self.len) }
    }
}

impl<T: Float> DerefMut for Buffer<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: same as for `deref`, and borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.start(), self.len) }
    }
}

impl<T> std::fmt::Debug for Buffer<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Buffer({} numbers)", self.len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_ones_of_many_sizes_stay_though_one_is_lent_at_a_time() {
        let mut pool = Pool::new();
        // 18 MiB in total; no size fits another.
        let sizes: Vec<usize> = (1..=8).map(|i| (i << 19) + PAGE).collect();
        let fresh = |pool: &mut Pool| {
            let count_fresh = |fresh: usize, &bytes: &usize| {
                let found = pool.lend(bytes);
                let count = fresh + usize::from(found.is_none());
                pool.take_back(found.unwrap_or_else(|| Block::allocate(bytes)));
                count
            };
            sizes.iter().fold(0, count_fresh)
        };
        assert_eq!(fresh(&mut pool), sizes.len());
        assert_eq!(fresh(&mut pool), 0);
        assert_eq!((pool.lent_bytes, pool.idle_bytes), (0, sizes.iter().sum()));
        // A large block that is used once does not stay next to them for ever.
        let large = pool.lend(2 * SPARE).unwrap_or_else(|| Block::allocate(2 * SPARE));
        pool.take_back(large);
        for bytes in (0..40).map(|i| (3 << 20) + (i << 19)) {
            let block = pool.lend(bytes).unwrap_or_else(|| Block::allocate(bytes));
            pool.take_back(block);
        }
        assert!(pool.idle.iter().all(|block| block.bytes < 2 * SPARE) && pool.idle_bytes <= 3 * SPARE);
    }

    /// Other tests of this process use the pool too; only this test uses these sizes.
    #[test]
    fn reuses_memory_and_forgets_the_oldest() {
        let megabyte = (1 << 20) / size_of::<f32>();
        let first = Buffer::new(301 * megabyte);
        let address = first.as_ptr();
        drop(first);
        let again = Buffer::new(301 * megabyte - 1);
        assert_eq!(again.as_ptr(), address);
        assert_eq!(again.as_ptr() as usize % HUGE, 0);
        drop(again);
        let smaller = Buffer::new(270 * megabyte);
        assert_eq!(smaller.as_ptr(), address, "a little less is asked for");
        drop(smaller);
        // Another 300 MB: the first block must be freed, because 600 MB were never lent at once.
        let other = Buffer::new(302 * megabyte);
        assert!(other.block.as_ref().unwrap().bytes >= 302 << 20);
        assert!(!pool().idle.iter().any(|b| b.bytes == 301 << 20));
        assert!(Buffer::zeroed(100_000).iter().all(|&x| x == 0.));
        drop(Buffer::new(0));
    }
}
