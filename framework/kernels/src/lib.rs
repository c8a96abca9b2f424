//! Fast differentiable operations for [candle](https://docs.rs/candle-core) on the CPU: convolutions and ConvLSTM roll-outs.
#![expect(clippy::needless_range_loop, reason = "in kernels, an index names a row, a tap or a lane")]

mod activations;
mod buffer;
mod cell;
mod conv2d;
mod conv_lstm;
mod conv_transpose2d;
mod direct;
pub mod elementwise;
mod float;
mod gates;
mod gemm;
mod parallel;
mod shared_conv;
mod simd;
mod tensors;
mod winograd;

pub use buffer::{keep_freed_memory, release_scratch};
pub use conv_lstm::{ConvLstmInput, ConvLstmLayer, Keep, conv_lstm, conv_lstm_cell};
pub use conv_transpose2d::{ConvTranspose2dOptions, conv_transpose2d};
pub use conv2d::{Conv2dOptions, conv2d, conv2d_backward};
pub use gates::{MemoryUpdate, OutputGate, memory_update, open_output, sum_gates};
pub use shared_conv::SharedConv;
#[doc(hidden)]
pub use simd::Level;
pub use tensors::{no_grad, supported, supported_half};
