//! Transfers of tensor values to the host.

use candle_core::{DType, Result, Tensor};

/// A transfer of a tensor's values to the host. The values are those at the start of the transfer; later
/// changes to the tensor do not matter.
pub struct Download(Way);

enum Way {
    /// The values were already on the host.
    There(Tensor),
    #[cfg(feature = "cuda")]
    Cuda(crate::cuda::transfer::Download),
}

impl Download {
    /// Starts copying a tensor of any float type: f64 as it is, others as f32. From a CUDA device, the call
    /// waits neither for the device nor for the copy, and the device keeps computing.
    ///
    /// # Errors
    /// If the device fails, or the host is out of memory.
    pub fn start(x: &Tensor) -> Result<Self> {
        #[cfg(feature = "cuda")]
        if let candle_core::Device::Cuda(device) = x.device()
            && x.elem_count() > 0
        {
            return Ok(Self(Way::Cuda(crate::cuda::transfer::Download::start(x, device)?)));
        }
        let x = x.detach().to_dtype(travels_as(x))?.force_contiguous()?;
        Ok(Self(Way::There(x.to_device(&candle_core::Device::Cpu)?)))
    }

    /// Whether [`Download::finish`] would return without waiting.
    ///
    /// # Errors
    /// If the device has failed.
    pub fn is_done(&self) -> Result<bool> {
        match &self.0 {
            Way::There(_) => Ok(true),
            #[cfg(feature = "cuda")]
            Way::Cuda(download) => download.is_done(),
        }
    }

    /// Waits for the values and returns them, f32 or f64 on the CPU.
    ///
    /// # Errors
    /// If the device has failed.
    pub fn finish(self) -> Result<Tensor> {
        match self.0 {
            Way::There(x) => Ok(x),
            #[cfg(feature = "cuda")]
            Way::Cuda(download) => download.finish(),
        }
    }
}

/// The dtype of a tensor's values on the host.
pub(crate) fn travels_as(x: &Tensor) -> DType {
    if x.dtype() == DType::F64 { DType::F64 } else { DType::F32 }
}

impl std::fmt::Debug for Download {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Download")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::updates::approach;
    use candle_core::{Device, Var};

    #[test]
    fn what_changes_afterwards_is_not_seen() {
        let x = Var::new(&[[1f32, 2., 3.], [4., 5., 6.]], &Device::Cpu).unwrap();
        let download = Download::start(&x.t().unwrap()).unwrap();
        approach(&[(&x, &x.zeros_like().unwrap())], 1.).unwrap();
        assert!(download.is_done().unwrap());
        assert_eq!(download.finish().unwrap().to_vec2::<f32>().unwrap(), [[1., 4.], [2., 5.], [3., 6.]]);
        let wide = Tensor::new(&[1f64 / 3.], &Device::Cpu).unwrap();
        assert_eq!(Download::start(&wide).unwrap().finish().unwrap().to_vec1::<f64>().unwrap(), [1. / 3.]);
        let empty = Tensor::zeros((0, 3), DType::F64, &Device::Cpu).unwrap();
        assert_eq!(Download::start(&empty).unwrap().finish().unwrap().dims(), [0, 3]);
    }
}
