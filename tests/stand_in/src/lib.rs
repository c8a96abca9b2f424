//! A CUDA device emulated on the CPU, to test device code on machines without one.
//!
//! This library replaces `libcuda`, `libcudnn`, `libcublas`, `libcurand` and `libnccl`; the compiler `libnvrtc` is
//! NVIDIA's. It interprets PTX instruction by instruction, and implements everything else by its definition. It is slow
//! and strict: streams run as late as possible, threads and blocks in reverse order, fresh memory is filled with NaN,
//! and an access to unallocated memory is an error that names kernel, thread and instruction.
//!
//! It cannot tell how fast something is, which engine cuDNN picks, or whether a real device rounds the same way.
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
