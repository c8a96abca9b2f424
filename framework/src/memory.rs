//! How much memory this process holds, and how much more it could have.

/// What Linux says of this process, in bytes.
fn status(key: &str) -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix(key))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}

/// What the process holds now; known on Linux.
pub(crate) fn resident() -> Option<u64> {
    status("VmRSS:")
}

/// The most that the process has held since it began, or since [`reset_peak`]; known on Linux.
pub(crate) fn peak() -> Option<u64> {
    status("VmHWM:")
}

/// Lets the peak begin anew with what is held now (proc(5), `clear_refs`). Where the system does not allow it, the peak
/// stays what it is and can only grow.
pub(crate) fn reset_peak() {
    let _ = std::fs::write("/proc/self/clear_refs", "5");
}

/// What the process could still get: of the machine's memory, and of its control group's, where it has one.
pub(crate) fn available() -> Option<u64> {
    let mut system = sysinfo::System::new();
    system.refresh_memory();
    if system.total_memory() == 0 {
        return None;
    }
    // What the group holds of files can be dropped: only its processes' own memory counts.
    let of_group = system.cgroup_limits().map(|limits| limits.total_memory.saturating_sub(limits.rss));
    Some(of_group.map_or(system.available_memory(), |of_group| of_group.min(system.available_memory())))
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    #[test]
    fn the_peak_sees_what_is_gone_again() {
        const SIZE: u64 = 64 << 20;
        reset_peak();
        // Touched, so that it is resident.
        drop(std::hint::black_box(vec![1u8; SIZE as usize]));
        let (now, most, room) = (resident().unwrap(), peak().unwrap(), available().unwrap());
        assert!(most >= SIZE && most >= now, "{now} now, {most} at most");
        assert!(room > SIZE && room < 1 << 50, "{room}");
    }
}
