//! A CUDA device played by the processor, so that what runs on devices is tested where there is none.
//!
//! This library takes the places of `libcuda`, `libcudnn`, `libcublas`, `libcurand` and `libnccl`; the compiler `libnvrtc` is
//! NVIDIA's. It runs PTX instruction by instruction, and everything else by its definition. It is slow and strict: streams run
//! as late as they may, threads and blocks in reverse, fresh memory is full of NaN, and an access to what is not allocated is
//! an error that names kernel, thread and instruction.
//!
//! What it cannot tell: how quick something is, which engine cuDNN picks, and whether a real device rounds as it does.
#![allow(non_snake_case)]

mod backend;
mod blas;
mod convolution;
mod device;
mod driver;
mod links;
mod memory;
mod numbers;
mod ptx;
mod random;
#[cfg(test)]
mod tests;
