//! The devices that computations run on.

use candle_core::Device;
use candlepower_kernels as kernels;
pub use candlepower_kernels::idle_soon;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::collective::Environment;
use crate::error::{Error, Result};

/// The kind of device to train on, named as in Lightning.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Accelerator {
    /// CUDA if this program is built with it and the machine has a device, otherwise the CPU.
    Auto,
    /// The CPU.
    Cpu,
    /// An NVIDIA device. Needs the feature `cuda`.
    Cuda,
}

/// The precision of 32-bit matrix products and convolutions on CUDA devices, named as in PyTorch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum MatmulPrecision {
    /// Full 32-bit precision.
    Highest,
    /// Factors are rounded to TF32's 10 bits: several times faster, accurate to three decimal digits.
    High,
}

impl Accelerator {
    /// Opens the device of this process's first rank. The process will have `devices` ranks, each on its own
    /// device.
    pub fn open(self, devices: usize) -> Result<Device> {
        if self == Self::Cuda && !kernels::BUILT_WITH_CUDA {
            let message =
                "this program has no CUDA: expected \"auto\" or \"cpu\", or build it with `--features cuda`";
            return Err(Error::setting("accelerator", message));
        }
        if self == Self::Cpu || !kernels::BUILT_WITH_CUDA {
            return Ok(Device::Cpu);
        }
        let found = match kernels::cuda_devices() {
            Ok(found) => found.len(),
            Err(_) if self == Self::Auto => return Ok(Device::Cpu),
            Err(why) => {
                let message = format!("{why}; expected \"auto\" or \"cpu\", or a machine with such a device");
                return Err(Error::setting("accelerator", message));
            }
        };
        // A process started for one of several devices takes the one assigned to it.
        let first = Environment::read()?.map_or(0, |own| own.local_rank.unwrap_or(own.rank % found));
        if first + devices > found {
            return Err(Error::setting("devices", too_many(first + devices, found)));
        }
        if let Err(why) = kernels::cuda_libraries() {
            return Err(Error::setting("accelerator", format!("{why}. Or train on the \"cpu\"")));
        }
        Ok(kernels::open_cuda(first)?)
    }
}

fn too_many(asked: usize, found: usize) -> String {
    format!("expected at most {found}, the number of CUDA devices found; found {asked}")
}

/// The device of another rank of this process. The CPU is shared by all ranks; a CUDA device is not.
pub(crate) fn of_rank(rank: usize, first: &Device) -> Result<Device> {
    if !first.is_cuda() {
        return Ok(first.clone());
    }
    let found = kernels::cuda_devices()?.len();
    if rank >= found {
        return Err(Error::setting("devices", too_many(rank + 1, found)));
    }
    Ok(kernels::open_cuda(rank)?)
}

/// Sets the precision of 32-bit matrix products and convolutions from now on.
pub(crate) fn set_matmul_precision(precision: MatmulPrecision) {
    kernels::allow_tf32(precision == MatmulPrecision::High);
}

/// Sets whether convolution engines are timed from now on.
pub(crate) fn set_benchmark(wanted: bool) {
    kernels::time_convolutions(wanted);
}

/// One line per kind of device: what this program can use, or why it cannot.
pub fn describe_devices() -> Vec<String> {
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let mut lines = vec![format!("cpu       {threads} threads")];
    match kernels::cuda_devices() {
        Err(why) => lines.push(format!("cuda      {why}")),
        Ok(devices) => {
            lines.extend(devices.iter().enumerate().map(|(i, device)| {
                let kernels::CudaDevice { name, memory, capability: (major, minor) } = device;
                let gigabytes = *memory as f64 / 1e9;
                format!("cuda:{i:<4} {name}, {gigabytes:.1} GB, compute capability {major}.{minor}")
            }));
            let missing = kernels::cuda_libraries().err();
            lines.extend(missing.map(|why| format!("cuda      {why}")));
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_share_the_cpu() {
        assert!(of_rank(3, &Device::Cpu).unwrap().is_cpu());
        assert!(Accelerator::Cpu.open(7).unwrap().is_cpu());
    }

    #[test]
    fn what_there_is_not_is_named() {
        if kernels::cuda_devices().is_ok() {
            return;
        }
        // `Auto` falls back to the CPU.
        assert!(Accelerator::Auto.open(2).unwrap().is_cpu());
        let error = Accelerator::Cuda.open(1).unwrap_err().to_string();
        let expected = if kernels::BUILT_WITH_CUDA {
            "`accelerator`: no CUDA device is found: "
        } else {
            "`accelerator`: this program has no CUDA: "
        };
        assert!(error.starts_with(expected), "{error}");
        assert_eq!(describe_devices().len(), 2);
    }
}
