//! Custom kernels, compiled on first use for the device that needs them.

use super::failed;
use super::sources::Source;
use candle_core::cuda_backend::DeviceId;
use candle_core::cuda_backend::cudarc::driver::{DeviceRepr, LaunchConfig, PushKernelArg};
use candle_core::cuda_backend::cudarc::nvrtc::{CompileError, CompileOptions, compile_ptx_with_opts};
use candle_core::{CudaDevice, DType, Error, Result, bail};
use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

/// Threads per block.
pub(crate) const THREADS: usize = 256;
/// Kernels cannot count this many threads or values.
const TOO_MANY: usize = 1 << 31;

type Compiled = HashMap<(&'static str, DeviceId), &'static str>;

/// Compiled kernels by source name and device; a few texts, never freed.
static COMPILED: Mutex<Option<Compiled>> = Mutex::new(None);

fn compiled(device: &CudaDevice, source: &Source) -> Result<&'static str> {
    let mut compiled = COMPILED.lock().unwrap_or_else(PoisonError::into_inner);
    let compiled = compiled.get_or_insert_default();
    if let Some(ptx) = compiled.get(&(source.name, device.id())) {
        return Ok(ptx);
    }
    let stream = device.cuda_stream();
    let (major, minor) = stream.context().compute_capability().map_err(failed("compute capability"))?;
    let options = CompileOptions {
        options: vec![format!("--gpu-architecture=compute_{major}{minor}"), "--std=c++17".into()],
        name: Some(format!("{}.cu", source.name)),
        ..Default::default()
    };
    let ptx = compile_ptx_with_opts(source.text, options).map_err(|error| match error {
        CompileError::CompileError { log, .. } => {
            Error::Msg(format!("{}.cu does not compile: {}", source.name, log.to_string_lossy()))
        }
        other => Error::Msg(format!("{}.cu does not compile: {other:?}", source.name)),
    })?;
    let ptx: &'static str = Box::leak(ptx.to_src().into_boxed_str());
    compiled.insert((source.name, device.id()), ptx);
    Ok(ptx)
}

/// Returns an error if kernels cannot count this many values.
pub(crate) fn check_count(kernel: &str, count: usize) -> Result<()> {
    if count >= TOO_MANY {
        bail!("{kernel}: {count} values are too many at once: lower `trainer.micro_batch_size`");
    }
    Ok(())
}

/// Launches a kernel with at least `count` threads; its only argument is one struct, passed by value.
///
/// # Safety
/// `arguments` is the kernel's struct, and its addresses point to memory on this device that is as large as
/// the struct says.
pub(crate) unsafe fn launch<A: DeviceRepr>(
    device: &CudaDevice,
    source: &Source,
    kernel: &str,
    count: usize,
    arguments: A,
) -> Result<()> {
    check_count(kernel, count)?;
    if count == 0 {
        return Ok(());
    }
    // Loaded modules are found by name; the text is needed only the first time.
    let function = device.get_or_load_custom_func(kernel, source.name, compiled(device, source)?);
    let function = function.map_err(explain_loading)?;
    let blocks = count.div_ceil(THREADS) as u32;
    let config =
        LaunchConfig { grid_dim: (blocks, 1, 1), block_dim: (THREADS as u32, 1, 1), shared_mem_bytes: 0 };
    let mut call = function.builder();
    call.arg(&arguments);
    // SAFETY: guaranteed by the caller.
    unsafe { call.launch(config) }.map_err(failed(kernel))?;
    Ok(())
}

/// If the driver is too old for the compiled kernels, adds to its error what to do about it.
fn explain_loading(error: Error) -> Error {
    if !error.to_string().contains("UNSUPPORTED_PTX_VERSION") {
        return error;
    }
    Error::Msg(
        "the driver is older than CUDA's compiler, NVRTC, and cannot read what it makes: update the driver, or take the NVRTC of \
         the CUDA version that `nvidia-smi` shows, by a folder in LD_LIBRARY_PATH"
            .into(),
    )
}

/// The name of a dtype in the kernels.
pub(crate) fn type_name(dtype: DType) -> Result<&'static str> {
    match dtype {
        DType::F32 => Ok("float"),
        DType::BF16 => Ok("bf16"),
        DType::F16 => Ok("f16"),
        other => bail!("expected f32, bf16 or f16, got {other:?}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_driver_that_is_too_old_is_told_of() {
        let of =
            |code: &str| explain_loading(Error::Msg(format!("DriverError(CUDA_ERROR_{code})"))).to_string();
        assert!(of("UNSUPPORTED_PTX_VERSION").starts_with("the driver is older"));
        assert!(of("OUT_OF_MEMORY").contains("OUT_OF_MEMORY"));
    }
}
