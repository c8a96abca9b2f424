//! A device's work, recorded once and then done again as often as asked, all of it started by one call.

use candle_core::{Device, Error, Result};

/// A CUDA graph: operations that were asked for once, which run again on the same memory whenever they are replayed.
///
/// What a recording reads and writes has the addresses that it had then: it sees what is put into tensors in place, and its
/// results are in the tensors that the work gave back, until the next replay. Numbers that the host computed while it was
/// recorded stay as they were. Three calls make one: [`rehearse`] does the work as always, and finds out what must be on the
/// device beforehand; [`record`] records it, without doing it; [`replay`](Self::replay) does it.
#[derive(Debug)]
pub struct Recording {
    #[cfg(feature = "cuda")]
    graph: crate::cuda::Graph,
}

/// Does work that is to be recorded: what is compiled, planned and uploaded for it is there the next time. To be called on the
/// thread that records it.
pub fn rehearse<T>(device: &Device, work: impl FnOnce() -> T) -> T {
    #[cfg(feature = "cuda")]
    if let Device::Cuda(device) = device {
        return crate::cuda::Graph::rehearse(device, work);
    }
    let _ = device;
    work()
}

/// Records work, which is not done. Results that outlive it must belong to no graph of gradients, or they keep that alive.
///
/// # Errors
/// Where the work fails, or asks for something that cannot be recorded: above all, to read a value from the device. The device
/// can be used afterwards as before.
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
    /// Does the work again, after all that the device was asked for before.
    ///
    /// # Errors
    /// Where the device fails, or has no memory for it.
    pub fn replay(&self) -> Result<()> {
        #[cfg(feature = "cuda")]
        self.graph.replay()?;
        Ok(())
    }

    /// How many operations were recorded.
    pub fn operations(&self) -> usize {
        #[cfg(feature = "cuda")]
        return self.graph.operations();
        #[cfg(not(feature = "cuda"))]
        0
    }
}
