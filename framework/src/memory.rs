//! Memory of this process: current, peak and available; and advice for out-of-memory errors.

use crate::error::Error;

/// A value of this process from Linux's `/proc/self/status`, in bytes.
fn status(key: &str) -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix(key))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}

/// Current resident memory; only known on Linux.
pub(crate) fn resident() -> Option<u64> {
    status("VmRSS:")
}

/// Peak resident memory since the process started, or since [`reset_peak`]; only known on Linux.
pub(crate) fn peak() -> Option<u64> {
    status("VmHWM:")
}

/// Resets the peak to the current value (proc(5), `clear_refs`). If the system does not allow it, the peak
/// remains and can only grow.
pub(crate) fn reset_peak() {
    let _ = std::fs::write("/proc/self/clear_refs", "5");
}

/// Memory that the process can still allocate, limited by the machine and by its control group, if any.
pub(crate) fn available() -> Option<u64> {
    let mut system = sysinfo::System::new();
    system.refresh_memory();
    if system.total_memory() == 0 {
        return None;
    }
    // The group's page cache can be dropped, so only its processes' own memory counts.
    let of_group = system.cgroup_limits().map(|limits| limits.total_memory.saturating_sub(limits.rss));
    Some(of_group.map_or(system.available_memory(), |of_group| of_group.min(system.available_memory())))
}

/// Whether a device's memory is full. Only the message tells: `CUDA_ERROR_OUT_OF_MEMORY`, "out of memory".
pub(crate) fn is_full(error: &Error) -> bool {
    error.to_string().to_lowercase().replace('_', " ").contains("out of memory")
}

/// Adds advice to an error about a full device. A device currently takes `at_once` samples at once.
pub(crate) fn explain(error: Error, at_once: usize) -> Error {
    if !is_full(&error) {
        return error;
    }
    Error::msg(format!(
        "{error}\nthe device is out of memory: set `trainer.micro_batch_size` below {at_once}, the current number of samples at a time; results do not change, because gradients are accumulated. `precision = \"bf16-mixed\"` halves the memory of activations"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_device_is_understood() {
        let full = "DriverError(CUDA_ERROR_OUT_OF_MEMORY, \"out of memory\")";
        let explained = explain(Error::msg(full), 16).to_string();
        assert!(explained.starts_with(full) && explained.contains("set `trainer.micro_batch_size` below 16"));
        assert!(is_full(&Error::msg("Out of memory")));
        assert_eq!(explain(Error::msg("shape mismatch"), 16).to_string(), "shape mismatch");
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn the_peak_sees_what_is_gone_again() {
        const SIZE: u64 = 64 << 20;
        reset_peak();
        // Written to, so it is resident.
        drop(std::hint::black_box(vec![1u8; SIZE as usize]));
        let (now, most, room) = (resident().unwrap(), peak().unwrap(), available().unwrap());
        assert!(most >= SIZE && most >= now, "{now} now, {most} at most");
        assert!(room > SIZE && room < 1 << 50, "{room}");
    }
}
