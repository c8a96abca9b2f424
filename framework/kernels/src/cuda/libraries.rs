//! CUDA's libraries: the driver brings none of them, and a program may have started without.

use candle_core::cuda_backend::cudarc::{cublas, cudnn, curand, nvrtc};
use candle_core::{Error, Result};

/// Refuses to go on where one that is needed is missing.
pub(crate) fn require() -> Result<()> {
    let (mut version, mut part) = (0, 0);
    let major = cublas::sys::libraryPropertyType::MAJOR_VERSION;
    // SAFETY: each writes a number or two in places that there are, and needs no device.
    let found = unsafe {
        [
            ("cuBLAS", cublas::sys::cublasGetProperty(major, &mut version).result().is_ok()),
            ("cuRAND", curand::sys::curandGetVersion(&mut version).result().is_ok()),
            ("NVRTC", nvrtc::sys::nvrtcVersion(&mut version, &mut part).result().is_ok()),
            // Instead of a version, what stands in for it where it is missing gives a status, which is smaller.
            ("cuDNN 9", cudnn::sys::cudnnGetVersion() >= 90_000),
        ]
    };
    for (name, is_there) in found {
        if !is_there {
            return Err(Error::Msg(format!(
                "there is a CUDA device, but not the library {name}: of cuBLAS, cuRAND, NVRTC and cuDNN each is needed. \
                 They come with CUDA (cuDNN apart), and with a PyTorch from pip; LD_LIBRARY_PATH must name the folders of those \
                 that the system does not know"
            )));
        }
    }
    Ok(())
}
