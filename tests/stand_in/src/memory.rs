//! The device's memory: every access is looked up, so that one outside of what is allocated is an error, not a surprise.
//!
//! Addresses are those of the host's memory, moved: the host cannot use one by mistake. Fresh memory, and memory that was
//! freed, is full of 0xff bytes, which are NaN in every floating type.

use std::alloc::{Layout, alloc, dealloc};
use std::collections::BTreeMap;

/// Added to the host's address.
const DEVICE: u64 = 1 << 56;
/// As the driver gives them.
const ALIGNMENT: usize = 512;
const POISON: u8 = 0xff;

struct Allocation {
    host: *mut u8,
    layout: Layout,
    bytes: usize,
    /// Whether the stream that asked for it has come to that, and not to its end.
    live: bool,
    /// Of a graph: kept after it is freed, for the next replay.
    reserved: bool,
}

// SAFETY: the memory belongs to the allocation, which is behind its device's lock.
unsafe impl Send for Allocation {}
// SAFETY: threads that share it are those of a kernel: which of them writes where is as much the kernel's promise as on a device.
unsafe impl Sync for Allocation {}

/// What is allocated on one device.
#[derive(Default)]
pub(crate) struct Memory {
    /// By the address at which each begins.
    allocations: BTreeMap<u64, Allocation>,
    used: usize,
    high: usize,
    capacity: usize,
}

/// Memory that is there: from `start`, `end` excluded, at `host`.
#[derive(Clone, Copy)]
pub(crate) struct Range {
    pub(crate) start: u64,
    pub(crate) end: u64,
    pub(crate) host: *mut u8,
}

impl Range {
    pub(crate) const NONE: Range = Range { start: 0, end: 0, host: std::ptr::null_mut() };

    /// Where the host finds `bytes` bytes at an address, if they are within.
    pub(crate) fn host_of(&self, address: u64, bytes: usize) -> Option<*mut u8> {
        let inside = address >= self.start && address.checked_add(bytes as u64)? <= self.end;
        // SAFETY: within the range.
        inside.then(|| unsafe { self.host.add((address - self.start) as usize) })
    }
}

impl Memory {
    pub(crate) fn new(capacity: usize) -> Self {
        Memory { capacity, ..Memory::default() }
    }

    /// An address for so many bytes; `None` where the device has no more. It may be used once it is [`begin`](Self::begin)ed.
    pub(crate) fn reserve(&mut self, bytes: usize, reserved: bool) -> Option<u64> {
        if self.used + bytes > self.capacity {
            return None;
        }
        let layout = Layout::from_size_align(bytes.max(1).next_multiple_of(ALIGNMENT), ALIGNMENT).ok()?;
        // SAFETY: the layout is not empty.
        let host = unsafe { alloc(layout) };
        if host.is_null() {
            return None;
        }
        self.used += bytes;
        self.high = self.high.max(self.used);
        let address = host as u64 + DEVICE;
        self.allocations.insert(address, Allocation { host, layout, bytes, live: false, reserved });
        Some(address)
    }

    /// From here on the memory may be used; what is in it is of no meaning.
    pub(crate) fn begin(&mut self, address: u64) -> Result<(), String> {
        let Some(it) = self.allocations.get_mut(&address) else {
            return Err(format!("{address:#x} is not allocated"));
        };
        if it.live {
            return Err(format!("{address:#x} is allocated a second time"));
        }
        it.live = true;
        // SAFETY: as many bytes as were allocated.
        unsafe { it.host.write_bytes(POISON, it.bytes) };
        Ok(())
    }

    /// From here on it may not.
    pub(crate) fn end(&mut self, address: u64) -> Result<(), String> {
        let Some(it) = self.allocations.get_mut(&address).filter(|it| it.live) else {
            return Err(format!("{address:#x} is freed, but not allocated"));
        };
        it.live = false;
        // SAFETY: as many bytes as were allocated.
        unsafe { it.host.write_bytes(POISON, it.bytes) };
        if !it.reserved {
            self.release(address);
        }
        Ok(())
    }

    /// Gives memory back to the host.
    pub(crate) fn release(&mut self, address: u64) {
        if let Some(it) = self.allocations.remove(&address) {
            self.used -= it.bytes;
            // SAFETY: allocated with this layout.
            unsafe { dealloc(it.host, it.layout) };
        }
    }

    pub(crate) fn is_live(&self, address: u64) -> bool {
        self.allocations.get(&address).is_some_and(|it| it.live)
    }

    /// The allocation around an address.
    pub(crate) fn around(&self, address: u64) -> Option<Range> {
        let (start, it) = self.allocations.range(..=address).next_back()?;
        let range = Range { start: *start, end: start + it.bytes as u64, host: it.host };
        (it.live && address < range.end.max(start + 1)).then_some(range)
    }

    /// Where the host finds so many bytes of the device.
    pub(crate) fn host_of(&self, address: u64, bytes: usize) -> Result<*mut u8, String> {
        let range = self.around(address).ok_or_else(|| self.describe(address, bytes))?;
        range.host_of(address, bytes).ok_or_else(|| self.describe(address, bytes))
    }

    /// What is wrong with an access.
    pub(crate) fn describe(&self, address: u64, bytes: usize) -> String {
        match self.allocations.range(..=address).next_back() {
            Some((start, it)) if address <= start + it.bytes as u64 => format!(
                "{bytes} bytes at {address:#x}, {} bytes into an allocation of {}{}",
                address - start,
                it.bytes,
                if it.live { "" } else { " that is freed, or not yet there" }
            ),
            _ => format!("{bytes} bytes at {address:#x}, where nothing is allocated"),
        }
    }

    pub(crate) fn used(&self) -> usize {
        self.used
    }

    pub(crate) fn high(&self) -> usize {
        self.high
    }

    pub(crate) fn reset_high(&mut self) {
        self.high = self.used;
    }

    pub(crate) fn capacity(&self) -> usize {
        self.capacity
    }
}
