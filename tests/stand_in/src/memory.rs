//! Device memory. Every access is checked, so an access outside an allocation is an error instead of
//! undefined behavior.
//!
//! Device addresses are host addresses plus an offset, so the host cannot use one by mistake. Fresh and freed
//! memory is filled with 0xff bytes, which are NaN in every floating type.

use std::alloc::{Layout, alloc, dealloc};
use std::collections::BTreeMap;

/// Added to the host address.
const DEVICE: u64 = 1 << 56;
/// The driver's alignment.
const ALIGNMENT: usize = 512;
const POISON: u8 = 0xff;

struct Allocation {
    host: *mut u8,
    layout: Layout,
    bytes: usize,
    /// Whether the stream has executed the allocation, and not yet the free.
    live: bool,
    /// Belongs to a graph: kept after it is freed, for the next replay.
    reserved: bool,
}

// SAFETY: the allocation owns its memory, and is behind its device's lock.
unsafe impl Send for Allocation {}
// SAFETY: only a kernel's threads share it; as on a device, the kernel is responsible for avoiding data races.
unsafe impl Sync for Allocation {}

/// All allocations on one device.
#[derive(Default)]
pub(crate) struct Memory {
    /// Keyed by start address.
    allocations: BTreeMap<u64, Allocation>,
    used: usize,
    high: usize,
    capacity: usize,
}

/// An allocated range of device addresses, from `start` to `end` (exclusive), stored at `host`.
#[derive(Clone, Copy)]
pub(crate) struct Range {
    pub(crate) start: u64,
    pub(crate) end: u64,
    pub(crate) host: *mut u8,
}

impl Range {
    pub(crate) const NONE: Range = Range { start: 0, end: 0, host: std::ptr::null_mut() };

    /// The host address of `bytes` bytes at a device address, if they lie within the range.
    pub(crate) fn host_of(&self, address: u64, bytes: usize) -> Option<*mut u8> {
        let inside = address >= self.start && address.checked_add(bytes as u64)? <= self.end;
        // SAFETY: the offset is within the range.
        inside.then(|| unsafe { self.host.add((address - self.start) as usize) })
    }
}

impl Memory {
    pub(crate) fn new(capacity: usize) -> Self {
        Memory { capacity, ..Memory::default() }
    }

    /// Reserves an address for this many bytes; `None` if the device is full. Usable after [`begin`](Self::begin).
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

    /// Makes reserved memory usable. Its content is undefined.
    pub(crate) fn begin(&mut self, address: u64) -> Result<(), String> {
        let Some(it) = self.allocations.get_mut(&address) else {
            return Err(format!("{address:#x} is not allocated"));
        };
        if it.live {
            return Err(format!("{address:#x} is allocated a second time"));
        }
        it.live = true;
        // SAFETY: this many bytes were allocated.
        unsafe { it.host.write_bytes(POISON, it.bytes) };
        Ok(())
    }

    /// Makes memory unusable, and releases it unless it is reserved by a graph.
    pub(crate) fn end(&mut self, address: u64) -> Result<(), String> {
        let Some(it) = self.allocations.get_mut(&address).filter(|it| it.live) else {
            return Err(format!("{address:#x} is freed, but not allocated"));
        };
        it.live = false;
        // SAFETY: this many bytes were allocated.
        unsafe { it.host.write_bytes(POISON, it.bytes) };
        if !it.reserved {
            self.release(address);
        }
        Ok(())
    }

    /// Returns memory to the host.
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

    /// The allocation that contains an address.
    pub(crate) fn around(&self, address: u64) -> Option<Range> {
        let (start, it) = self.allocations.range(..=address).next_back()?;
        let range = Range { start: *start, end: start + it.bytes as u64, host: it.host };
        (it.live && address < range.end.max(start + 1)).then_some(range)
    }

    /// The host address of this many bytes of the device.
    pub(crate) fn host_of(&self, address: u64, bytes: usize) -> Result<*mut u8, String> {
        let range = self.around(address).ok_or_else(|| self.describe(address, bytes))?;
        range.host_of(address, bytes).ok_or_else(|| self.describe(address, bytes))
    }

    /// Describes an invalid access.
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
