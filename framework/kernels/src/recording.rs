//! Recording a device's work once and replaying it any number of times, each time with a single call.

use candle_core::{Device, Error, Result};

/// A CUDA graph: operations recorded once, which run again on the same memory at each replay.
///
/// A recording reads and writes the addresses that its tensors had when it was recorded: it sees values
/// written into tensors in place, and its results stay in the tensors that the work returned until the next
/// replay. Numbers that the host computed during recording are fixed. Creating one takes three calls:
/// [`rehearse`] runs the work normally and prepares everything that must be on the device beforehand;
/// [`record`] records it without running it; [`replay`](Self::replay) runs it.
#[derive(Debug)]
pub struct Recording {
    #[cfg(feature = "cuda")]
    graph: crate::cuda::Graph,
}

/// Runs work that will be recorded, so that everything compiled, planned and uploaded for it is ready next
/// time. Call it on the thread that will record it.
pub fn rehearse<T>(device: &Device, work: impl FnOnce() -> T) -> T {
    #[cfg(feature = "cuda")]
    if let Device::Cuda(device) = device {
        return crate::cuda::Graph::rehearse(device, work);
    }
    let _ = device;
    work()
}

/// Records work without running it. Results that outlive it must not belong to a gradient graph, which they
/// would keep alive. Their memory is allocated by the first replay: results of a recording that is never
/// replayed must be forgotten ([`std::mem::forget`]) instead of dropped.
///
/// # Errors
/// If the work fails, or does something that cannot be recorded, above all reading a value from the device.
/// The device remains usable afterwards.
pub fn record<T, E: From<Error>>(
    device: &Device,
    work: impl FnOnce() -> std::result::Result<T, E>,
) -> std::result::Result<(T, Recording), E> {
    #[cfg(feature = "cuda")]
    if let Device::Cuda(device) = device {
        let (results, graph) = crate::cuda::Graph::record(device, work)?;
        return Ok((results, Recording { graph }));
    }
    let _ = (device, work);
    Err(Error::Msg("only a CUDA device records its work".into()).into())
}

impl Recording {
    /// Runs the recorded work again, after everything enqueued on the device before.
    ///
    /// # Errors
    /// If the device fails or is out of memory.
    pub fn replay(&self) -> Result<()> {
        #[cfg(feature = "cuda")]
        self.graph.replay()?;
        Ok(())
    }

    /// The number of recorded operations.
    pub fn operations(&self) -> usize {
        #[cfg(feature = "cuda")]
        return self.graph.operations();
        #[cfg(not(feature = "cuda"))]
        0
    }
}
