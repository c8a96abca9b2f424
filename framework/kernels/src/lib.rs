//! Fast differentiable operations for [candle](https://docs.rs/candle-core): convolutions, ConvLSTM
//! roll-outs, building blocks for other recurrent cells, normalisation and activations, as well as in-place
//! parameter updates. They run on the CPU and, with the feature `cuda`, on NVIDIA GPUs, except [`attend()`],
//! [`recall()`], [`softmax()`], [`conv_lstm_cell()`] and [`conv2d_backward`], which run only on the CPU.
#![expect(clippy::needless_range_loop, reason = "in kernels, an index names a row, a tap or a lane")]

mod activations;
mod attend;
mod blend;
mod buffer;
mod cell;
pub mod clipping;
mod conv2d;
mod conv_lstm;
mod conv_lstm_cell;
mod conv_transpose2d;
#[cfg(any(feature = "cuda", test))]
mod cuda;
mod devices;
mod direct;
mod download;
mod float;
mod gates;
mod gemm;
mod kept;
mod normalize;
mod parallel;
mod pointwise;
mod recall;
mod recording;
mod scale;
mod several;
mod shared_conv;
mod simd;
mod softmax;
mod squares;
mod state_norm;
mod tensors;
pub mod updates;
mod winograd;

pub use attend::attend;
pub use blend::{Gate, blend};
pub use buffer::{keep_freed_memory, release_scratch};
pub use conv_lstm::{ConvLstmInput, ConvLstmLayer, Keep, conv_lstm};
pub use conv_lstm_cell::conv_lstm_cell;
pub use conv_transpose2d::{ConvTranspose2dOptions, conv_transpose2d};
pub use conv2d::{Conv2dOptions, conv2d, conv2d_backward};
#[cfg(feature = "cuda")]
pub use cuda::{Communicator, Exchange, Pending};
pub use devices::{
    BUILT_WITH_CUDA, CudaDevice, allow_tf32, cuda_devices, cuda_libraries, open_cuda, peak_memory,
    reset_peak_memory, time_convolutions, to_device,
};
pub use download::Download;
pub use gates::{MemoryUpdate, OutputGate, memory_update, open_output, sum_gates};
pub use kept::Kept;
pub use normalize::{Normalized, Over, normalize};
pub use parallel::idle_soon;
pub use pointwise::{Activation, activate};
pub use recall::recall;
pub use recording::{Recording, record, rehearse};
pub use scale::scale_channels;
pub use shared_conv::SharedConv;
#[doc(hidden)]
pub use simd::Level;
pub use softmax::softmax;
pub use state_norm::SharedNorm;
pub use tensors::{convolves, in_32_bits, no_grad, supported};
