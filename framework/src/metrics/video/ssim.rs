//! Structural similarity (Wang, Bovik, Sheikh and Simoncelli, 2004), with the two windows used in video
//! papers.

use candle_core::Tensor;

use super::{FramePair, Pair, PerFrame};
use crate::error::{Error, Result};

/// The structural similarity of each frame, with a uniform 7x7 window, sample covariance, and only windows
/// inside the frame.
///
/// `data_range` is the difference between the largest and smallest possible values: 1 for frames in `[0, 1]`.
/// The tables of OpenSTL and related projects use 2, which gives larger numbers, so state which one you
/// report. Equals scikit-image's default `structural_similarity`, per channel, averaged. Fails for frames
/// smaller than a window.
pub fn ssim(prediction: &Tensor, target: &Tensor, data_range: f64) -> Result<PerFrame> {
    Pair::new(prediction, target)?.clipped().ssim(data_range)
}

/// The structural similarity of each frame, with a Gaussian 11x11 window of sigma 1.5 as in the original
/// paper and in SVG, population covariance, and only windows inside the frame. `data_range` as for
/// [`ssim()`].
pub fn gaussian_ssim(prediction: &Tensor, target: &Tensor, data_range: f64) -> Result<PerFrame> {
    const SIDE: usize = 11;
    const SIGMA: f64 = 1.5;
    let bell = |at: usize| (-0.5 * ((at as f64 - (SIDE / 2) as f64) / SIGMA).powi(2)).exp();
    let sum: f64 = (0..SIDE).map(bell).sum();
    let window: [f64; SIDE] = std::array::from_fn(|at| bell(at) / sum);
    Pair::new(prediction, target)?.clipped().similarity(&window, 1., data_range)
}

/// The side length of the uniform window.
pub(super) const SIDE: usize = 7;

impl Pair {
    /// [`ssim()`] for clipped frames. Only windows whose pixels are all known count.
    pub(super) fn ssim(&self, data_range: f64) -> Result<PerFrame> {
        let samples = (SIDE * SIDE) as f64;
        self.similarity(&[1. / SIDE as f64; SIDE], samples / (samples - 1.), data_range)
    }

    /// `window` holds the weights along one axis; the weights in two dimensions are their products.
    fn similarity(&self, window: &[f64], covariance_scale: f64, data_range: f64) -> Result<PerFrame> {
        let (height, width, side) = (self.height, self.width, window.len());
        if height.min(width) < side {
            return Err(Error::msg(format!(
                "frames of {height}x{width} pixels are smaller than the SSIM's window of {side}x{side}"
            )));
        }
        if !(data_range > 0. && data_range.is_finite()) {
            return Err(Error::msg(format!(
                "the data range of an SSIM is above 0, for example 1; it is {data_range}"
            )));
        }
        let (luminance, contrast) = ((0.01 * data_range).powi(2), (0.03 * data_range).powi(2));
        let blur = |values: Vec<f64>| windowed_means(&values, width, window);
        let plane = |x: &[f64], y: &[f64], known: Option<&[f64]>| {
            let product = |x: &[f64], y: &[f64]| x.iter().zip(y).map(|(x, y)| x * y).collect();
            let (mean_x, mean_y) = (blur(x.to_vec()), blur(y.to_vec()));
            let (xx, yy, xy) = (blur(product(x, x)), blur(product(y, y)), blur(product(x, y)));
            let index = |i: usize| {
                let (mx, my) = (mean_x[i], mean_y[i]);
                let variances = covariance_scale * (xx[i] - mx * mx + yy[i] - my * my);
                let covariance = covariance_scale * (xy[i] - mx * my);
                (2. * mx * my + luminance) / (mx * mx + my * my + luminance) * (2. * covariance + contrast)
                    / (variances + contrast)
            };
            let Some(known) = known else {
                return (0..mean_x.len()).map(index).sum::<f64>() / mean_x.len() as f64;
            };
            // If a window has an unknown pixel, its mean of `known` is clearly below 1.
            let whole: Vec<f64> = (0..mean_x.len()).filter(|&i| known[i] > 1. - 1e-9).map(index).collect();
            whole.iter().sum::<f64>() / whole.len() as f64
        };
        Ok(self.per_whole_frame(|FramePair { prediction, target, known }| {
            let known =
                known.map(|known| blur(known.iter().map(|&known| f64::from(u8::from(known))).collect()));
            let planes = prediction.chunks_exact(height * width).zip(target.chunks_exact(height * width));
            planes.map(|(x, y)| plane(x, y, known.as_deref())).sum::<f64>() / self.channels as f64
        }))
    }
}

/// The weighted mean in every window inside the plane, computed along the rows and then along the columns.
fn windowed_means(plane: &[f64], width: usize, window: &[f64]) -> Vec<f64> {
    let columns = width + 1 - window.len();
    let mut along_rows = vec![0.; plane.len() / width * columns];
    for (out, row) in along_rows.chunks_exact_mut(columns).zip(plane.chunks_exact(width)) {
        for (offset, weight) in window.iter().enumerate() {
            out.iter_mut().zip(&row[offset..]).for_each(|(out, value)| *out += weight * value);
        }
    }
    let mut means = vec![0.; along_rows.len() - (window.len() - 1) * columns];
    for (offset, weight) in window.iter().enumerate() {
        means.iter_mut().zip(&along_rows[offset * columns..]).for_each(|(out, value)| *out += weight * value);
    }
    means
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use candle_core::{DType, Device};

    use super::*;

    #[test]
    fn windows_are_averaged_along_both_axes() {
        // 3 rows of 4; windows of 2x2 with weights (1/4, 3/4) along each axis.
        let plane: Vec<f64> = (0..12).map(|i| f64::from(i * i)).collect();
        let window = [0.25, 0.75];
        let mut expected = Vec::new();
        for (y, x) in [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)] {
            let at = |dy: usize, dx: usize| window[dy] * window[dx] * plane[(y + dy) * 4 + x + dx];
            expected.push(at(0, 0) + at(0, 1) + at(1, 0) + at(1, 1));
        }
        assert_eq!(windowed_means(&plane, 4, &window), expected);
    }

    #[test]
    fn equal_frames_are_fully_similar_and_small_ones_are_refused() {
        let frames = Tensor::rand(0f32, 1., (2, 3, 1, 7, 9), &Device::Cpu).unwrap();
        let similar = ssim(&frames, &frames, 1.).unwrap().values;
        assert!(similar.len() == 6 && similar.iter().all(|value| (value - 1.).abs() < 1e-12), "{similar:?}");

        let message = gaussian_ssim(&frames, &frames, 1.).unwrap_err().to_string();
        assert_eq!(message, "frames of 7x9 pixels are smaller than the SSIM's window of 11x11");
        let message = ssim(&frames, &frames, 0.).unwrap_err().to_string();
        assert_eq!(message, "the data range of an SSIM is above 0, for example 1; it is 0");
    }

    #[test]
    fn constant_frames_differ_in_luminance_alone() {
        let zeros = Tensor::zeros((1, 1, 1, 8, 8), DType::F32, &Device::Cpu).unwrap();
        let similar = ssim(&zeros, &zeros.ones_like().unwrap(), 1.).unwrap().mean();
        assert!((similar - 1e-4 / (1. + 1e-4)).abs() < 1e-9, "{similar}");
    }
}
