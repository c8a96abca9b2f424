//! Layers over (B, H, W, C), the layout of the kernels: a network that uses it throughout transposes nothing,
//! forward or backward. Weights keep PyTorch's shapes.

use candle_core::{DType, Tensor};
use candle_nn::{Init, VarBuilder};
use candlepower_kernels::{self as kernels};
pub use candlepower_kernels::{Conv2dOptions, ConvTranspose2dOptions};

pub use super::norm::{BatchNorm, GroupNorm};
use super::{Conv, convolves, split_dims, widened};
use crate::error::{Error, Result};

/// (B, T, C, H, W) to (B * T, H, W, C).
pub fn fold_frames(frames: &Tensor) -> Result<Tensor> {
    let (batch, times, channels, height, width) = frames.dims5()?;
    let folded = frames.reshape((batch * times, channels, height * width))?;
    Ok(folded.transpose(1, 2)?.contiguous()?.reshape((batch * times, height, width, channels))?)
}

/// (B * T, H, W, C) to (B, T, C, H, W).
pub fn unfold_frames(folded: &Tensor, times: usize) -> Result<Tensor> {
    let (images, height, width, channels) = folded.dims4()?;
    let frames = folded.reshape((images, height * width, channels))?.transpose(1, 2)?.contiguous()?;
    Ok(frames.reshape((images / times, times, channels, height, width))?)
}

/// (.., C, H, W) to (.., H, W, C), contiguous.
pub fn channels_last(x: &Tensor) -> Result<Tensor> {
    reordered(x, [1, 2, 0])
}

/// (.., H, W, C) to (.., C, H, W), contiguous.
pub fn channels_first(x: &Tensor) -> Result<Tensor> {
    reordered(x, [2, 0, 1])
}

/// Permutes the last three axes.
fn reordered(x: &Tensor, order: [usize; 3]) -> Result<Tensor> {
    let leading = split_dims(x)?.0.len();
    let axes: Vec<usize> = (0..leading).chain(order.map(|axis| leading + axis)).collect();
    Ok(x.permute(axes)?.contiguous()?)
}

/// Multiplies x (.., N) by a factor per channel: (N), or (B, N) for one per sample and channel.
pub fn scale_channels(x: &Tensor, factors: &Tensor) -> Result<Tensor> {
    if convolves(x) {
        return Ok(kernels::scale_channels(x, factors)?);
    }
    let factors = match (factors.dims(), x.rank()) {
        (&[samples, channels], 2..) => {
            let between = vec![1; x.rank() - 2];
            factors.reshape([&[samples][..], &between, &[channels]].concat())?
        }
        _ => factors.clone(),
    };
    Ok(x.broadcast_mul(&factors)?)
}

impl Conv {
    /// Convolution of (.., H, W, Cin) to (.., H', W', Cout), with PyTorch's options.
    pub fn channels_last(&self, x: &Tensor, options: Conv2dOptions) -> Result<Tensor> {
        if convolves(x) {
            return Ok(kernels::conv2d(x, &self.weight, Some(&self.bias), options)?);
        }
        if widened(x) {
            let y = self.to_dtype(DType::F32)?.channels_last(&x.to_dtype(DType::F32)?, options)?;
            return Ok(y.to_dtype(x.dtype())?);
        }
        channels_last(&self.channels_first(&channels_first(x)?, options)?)
    }

    /// The same convolution with candle operations, of (.., Cin, H, W) to (.., Cout, H', W').
    pub(super) fn channels_first(&self, x: &Tensor, options: Conv2dOptions) -> Result<Tensor> {
        let Conv2dOptions { stride, padding, dilation, groups } = options;
        let (leading, [channels, height, width]) = split_dims(x)?;
        let images = x.reshape(((), channels, height, width))?;
        let y = images.conv2d(&self.weight, padding, stride, dilation, groups)?;
        let y = y.broadcast_add(&self.bias.reshape((1, (), 1, 1))?)?;
        Ok(y.reshape([&leading, &y.dims()[1..]].concat())?)
    }
}

/// A transposed convolution's weight and bias.
#[derive(Debug, Clone)]
pub struct ConvTranspose {
    /// (Cin, Cout, kh, kw).
    pub weight: Tensor,
    /// (Cout).
    pub bias: Tensor,
}

impl ConvTranspose {
    /// Creates `weight` of this shape, initialised by `init`, and a zero `bias`.
    pub fn new(shape: [usize; 4], init: Init, vb: VarBuilder) -> Result<Self> {
        let weight = vb.get_with_hints(&shape, "weight", init)?;
        Ok(Self { weight, bias: vb.get_with_hints(shape[1], "bias", Init::Const(0.))? })
    }

    /// Transposed convolution of (B, H, W, Cin) to (B, H', W', Cout), with PyTorch's options.
    pub fn channels_last(&self, x: &Tensor, options: ConvTranspose2dOptions) -> Result<Tensor> {
        if widened(x) {
            let weight = self.weight.to_dtype(DType::F32)?;
            let wide = Self { weight, bias: self.bias.to_dtype(DType::F32)? };
            return Ok(wide.channels_last(&x.to_dtype(DType::F32)?, options)?.to_dtype(x.dtype())?);
        }
        if convolves(x) {
            return Ok(kernels::conv_transpose2d(x, &self.weight, Some(&self.bias), options)?);
        }
        let ConvTranspose2dOptions { stride, padding, output_padding, dilation, groups } = options;
        if groups != 1 {
            return Err(Error::msg("candle has no grouped transposed convolution"));
        }
        let x = channels_first(x)?;
        let y = x.conv_transpose2d(&self.weight, padding, output_padding, stride, dilation)?;
        Ok(channels_last(&y)?.broadcast_add(&self.bias)?)
    }
}

/// (B, H, W, r*r*C) to (B, r*H, r*W, C): channel `c*r*r + y*r + x` becomes the pixel (y, x) of a patch (PyTorch's
/// `PixelShuffle`).
pub fn pixel_shuffle(x: &Tensor, factor: usize) -> Result<Tensor> {
    let (batch, height, width, channels) = x.dims4()?;
    if factor == 0 || !channels.is_multiple_of(factor * factor) {
        return Err(Error::msg(format!("{channels} channels do not hold patches of {factor} pixels")));
    }
    let depth = channels / (factor * factor);
    let patches = x.reshape(&[batch, height, width, depth, factor, factor][..])?;
    let pixels = patches.permute([0, 1, 4, 2, 5, 3])?;
    Ok(pixels.reshape((batch, height * factor, width * factor, depth))?)
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    #[test]
    fn frames_are_folded_and_unfolded() {
        let frames = Tensor::arange(0f32, 48., &Device::Cpu).unwrap().reshape((1, 2, 3, 2, 4)).unwrap();
        let folded = fold_frames(&frames).unwrap();
        assert_eq!(folded.dims(), [2, 2, 4, 3]);
        // Frame 1, row 1, column 2: channels 0, 1, 2 of 8 pixels each.
        let pixel = folded.get(1).unwrap().get(1).unwrap().get(2).unwrap();
        assert_eq!(pixel.to_vec1::<f32>().unwrap(), [24. + 6., 24. + 14., 24. + 22.]);
        let back = unfold_frames(&folded, 2).unwrap();
        assert_eq!(
            back.flatten_all().unwrap().to_vec1::<f32>().unwrap(),
            (0..48).map(|i| i as f32).collect::<Vec<_>>()
        );
    }

    #[test]
    fn one_image_is_convolved_as_a_batch_of_one_is_by_both_kernels() {
        use crate::nn::with_kernels;
        use crate::params::Params;
        use crate::trainer::Kernels;

        let params = Params::new(1, DType::F32, &Device::Cpu);
        let conv = Conv::new(&[5, 3, 3, 3], params.var_builder()).unwrap();
        let image = Tensor::rand(-1f32, 1., (6, 4, 3), &Device::Cpu).unwrap();
        let batch = conv.same(&image.unsqueeze(0).unwrap()).unwrap().squeeze(0).unwrap();
        for kernels in [Kernels::Fast, Kernels::Reference] {
            let y = with_kernels(kernels, || conv.same(&image)).unwrap();
            assert_eq!(y.dims(), [6, 4, 5]);
            let difference = (y - &batch).unwrap().abs().unwrap().max_all().unwrap();
            assert!(difference.to_scalar::<f32>().unwrap() < 1e-5);
            // Anything but an image is an error.
            assert!(with_kernels(kernels, || conv.same(&image.get(0).unwrap())).is_err());
        }
    }

    #[test]
    fn pixels_are_shuffled_as_in_pytorch() {
        // torch.nn.PixelShuffle(2)(torch.arange(8.).reshape(1, 8, 1, 1)): channel c holds rows (4c, 4c+1), (4c+2, 4c+3).
        let x = Tensor::arange(0f32, 8., &Device::Cpu).unwrap().reshape((1, 1, 1, 8)).unwrap();
        let y = pixel_shuffle(&x, 2).unwrap().permute((0, 3, 1, 2)).unwrap();
        assert_eq!(y.dims(), [1, 2, 2, 2]);
        assert_eq!(y.flatten_all().unwrap().to_vec1::<f32>().unwrap(), [0., 1., 2., 3., 4., 5., 6., 7.]);
        assert!(pixel_shuffle(&x, 3).is_err());
    }
}
