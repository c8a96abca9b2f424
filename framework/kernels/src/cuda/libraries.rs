//! Checks for the CUDA libraries: the driver includes none of them, and the program starts even if they are
//! missing.

use candle_core::cuda_backend::cudarc::{cublas, cudnn, curand, nvrtc};
use candle_core::{Error, Result};

/// Returns an error if a required library is missing.
pub(crate) fn require() -> Result<()> {
    let (mut version, mut part) = (0, 0);
    let major = cublas::sys::libraryPropertyType::MAJOR_VERSION;
    // SAFETY: each call writes one or two numbers to valid places, and needs no device.
    let found = unsafe {
        [
            ("cuBLAS", cublas::sys::cublasGetProperty(major, &mut version).result().is_ok()),
            ("cuRAND", curand::sys::curandGetVersion(&mut version).result().is_ok()),
            ("NVRTC", nvrtc::sys::nvrtcVersion(&mut version, &mut part).result().is_ok()),
            // If cuDNN is missing, its stub returns a status instead of a version, which is a smaller number.
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
