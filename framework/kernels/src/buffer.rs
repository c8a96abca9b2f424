//! Scratch memory: aligned, and kept between calls.
//!
//! Touching fresh pages costs as much as the arithmetic of a small op, and training asks for the same sizes at every
//! step. A dropped [`Buffer`] therefore stays in a pool until a buffer of the same size is asked for. Before the pool
//! allocates, it frees as many idle bytes (while there are any) as it is about to take, so that it never holds more than
//! was once in use at the same time. [`release_scratch`] frees what is idle.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::collections::VecDeque;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Sizes are rounded up to whole pages, large ones to whole 64 KiB.
const PAGE: usize = 4 << 10;
const LARGE: usize = 64 << 10;
/// Buffers from here on are aligned to, and made of, huge pages where the system has them.
const HUGE: usize = 2 << 20;

/// A block of memory that the pool owns or has lent.
struct Block {
    start: NonNull<f32>,
    bytes: usize,
}

// SAFETY: a block is plain memory with one owner.
unsafe impl Send for Block {}
// SAFETY: through a shared reference a block can only be read.
unsafe impl Sync for Block {}

impl Block {
    fn layout(bytes: usize) -> Layout {
        let align = if bytes >= HUGE { HUGE } else { PAGE };
        match Layout::from_size_align(bytes, align) {
            Ok(layout) => layout,
            Err(_) => handle_alloc_error(Layout::new::<f32>()),
        }
    }

    fn allocate(bytes: usize) -> Block {
        let layout = Self::layout(bytes);
        // SAFETY: `bytes` is not zero.
        let p = unsafe { alloc_zeroed(layout) };
        let Some(start) = NonNull::new(p.cast::<f32>()) else { handle_alloc_error(layout) };
        Block { start, bytes }
    }

    fn free(self) {
        // SAFETY: allocated by `allocate` with the same layout, and owned.
        unsafe { dealloc(self.start.as_ptr().cast(), Self::layout(self.bytes)) }
    }
}

/// Idle blocks, least recently used first.
static IDLE: Mutex<VecDeque<Block>> = Mutex::new(VecDeque::new());

fn idle() -> MutexGuard<'static, VecDeque<Block>> {
    // A panic cannot leave the list half changed.
    IDLE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Gives the scratch memory that no op uses now back to the system.
pub fn release_scratch() {
    let blocks = std::mem::take(&mut *idle());
    blocks.into_iter().for_each(Block::free);
}

/// `len` floats, aligned for vectors, from the pool.
pub(crate) struct Buffer {
    block: Option<Block>,
    len: usize,
}

impl Buffer {
    /// Floats of unspecified value.
    pub(crate) fn new(len: usize) -> Buffer {
        let bytes = (len * size_of::<f32>()).max(1);
        let bytes = bytes.next_multiple_of(if bytes >= LARGE { LARGE } else { PAGE });
        let mut blocks = idle();
        let found = blocks.iter().rposition(|b| b.bytes == bytes).and_then(|i| blocks.remove(i));
        let block = found.unwrap_or_else(|| {
            let mut freed = 0;
            while freed < bytes
                && let Some(old) = blocks.pop_front()
            {
                freed += old.bytes;
                old.free();
            }
            drop(blocks);
            Block::allocate(bytes)
        });
        Buffer { block: Some(block), len }
    }

    /// Zeros.
    pub(crate) fn zeroed(len: usize) -> Buffer {
        let mut buffer = Buffer::new(len);
        crate::parallel::fill(&mut buffer, 0.);
        buffer
    }

    fn start(&self) -> *mut f32 {
        match &self.block {
            Some(block) => block.start.as_ptr(),
            None => NonNull::dangling().as_ptr(),
        }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if let Some(block) = self.block.take() {
            idle().push_back(block);
        }
    }
}

impl Deref for Buffer {
    type Target = [f32];
    fn deref(&self) -> &[f32] {
        // SAFETY: the block has room for `len` floats, initialised (zeros) when it was allocated.
        unsafe { std::slice::from_raw_parts(self.start(), self.len) }
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [f32] {
        // SAFETY: as for `deref`, and borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.start(), self.len) }
    }
}

impl std::fmt::Debug for Buffer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Buffer({} floats)", self.len)
    }
}
