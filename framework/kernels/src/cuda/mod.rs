//! The ops on CUDA devices, implemented with cuDNN and custom kernels.
//!
//! A device has one stream. Its operations run in the order of the calls, so none needs to wait for another,
//! and memory can be passed from one operation to the next as soon as both are enqueued. The parts that need
//! no device, the order of a roll-out's operations and the kernel sources, are tested on the CPU.

pub(crate) mod arguments;
#[cfg(feature = "cuda")]
mod backend;
#[cfg(feature = "cuda")]
pub(crate) mod cells;
#[cfg(feature = "cuda")]
mod communicator;
#[cfg(feature = "cuda")]
mod conv2d;
#[cfg(feature = "cuda")]
mod conv_lstm;
#[cfg(feature = "cuda")]
pub(crate) mod convolution;
#[cfg(feature = "cuda")]
mod depthwise;
#[cfg(feature = "cuda")]
pub(crate) mod device;
#[cfg(feature = "cuda")]
mod graph;
#[cfg(test)]
mod host;
#[cfg(feature = "cuda")]
mod launch;
#[cfg(feature = "cuda")]
pub(crate) mod libraries;
#[cfg(feature = "cuda")]
mod memory;
#[cfg(feature = "cuda")]
pub(crate) mod normalize;
#[cfg(feature = "cuda")]
pub(crate) mod optimizer;
#[cfg(feature = "cuda")]
mod packing;
#[cfg(feature = "cuda")]
mod plan;
#[cfg(feature = "cuda")]
pub(crate) mod pointwise;
pub(crate) mod roll_out;
#[cfg(feature = "cuda")]
pub(crate) mod scale;
pub(crate) mod sources;
#[cfg(test)]
mod tests;
#[cfg(feature = "cuda")]
pub(crate) mod transfer;
#[cfg(feature = "cuda")]
mod winograd;

#[cfg(feature = "cuda")]
pub use communicator::{Communicator, Exchange, Pending};
#[cfg(feature = "cuda")]
pub(crate) use conv_lstm::conv_lstm;
#[cfg(feature = "cuda")]
pub(crate) use conv2d::{channels_last, conv_transpose2d, conv2d};
#[cfg(feature = "cuda")]
pub(crate) use graph::{Graph, is_recording, unrecorded};
#[cfg(feature = "cuda")]
pub(crate) use memory::{address_of, aligned};

/// Converts an error of a CUDA library into a candle error.
#[cfg(feature = "cuda")]
pub(crate) fn failed<E: std::fmt::Debug>(what: &str) -> impl Fn(E) -> candle_core::Error + '_ {
    move |error| candle_core::Error::Msg(format!("{what}: {error:?}"))
}
