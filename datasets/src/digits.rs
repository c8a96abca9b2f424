//! Single digits to classify: the smallest dataset to train on.

use candle_core::{Device, Tensor};
use candlepower::batch::{Labelled, LabelledSpec};
use candlepower::data::{Dataset, Open, Sample, Split};
use candlepower::error::{Error, Result};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::mnist::{self, Images, SIDE};

/// The fields of `[data]` for `name = "digits"`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Source of the digits: "builtin" (drawn by this program, no download) or a folder of MNIST's IDX files
    /// with images and labels, plain or .gz. If the folder holds only one of MNIST's two sets, its first 90 %
    /// are used for training and its last 10 % for validation and test.
    pub digits: String,
}

impl Default for Config {
    fn default() -> Self {
        Self { digits: mnist::BUILTIN.to_string() }
    }
}

/// Handwritten digits with their labels, for classification.
///
/// Batches: input (B, 1, 28, 28), f32 in `[0, 1]`; label (B), u32, 0 to 9. The images are the same in every
/// epoch. `"builtin"` has 1000 training digits, and 100 others for validation and test.
pub struct Digits {
    images: Images,
    labels: Vec<u8>,
}

impl Open for Digits {
    type Config = Config;

    fn open(config: &Config, split: Split) -> Result<Self> {
        let (images, labels) = mnist::labelled(&config.digits, split)?;
        Ok(Self { images, labels })
    }
}

impl Dataset for Digits {
    type Batch = Labelled;

    fn len(&self) -> usize {
        self.labels.len()
    }

    fn spec(&self) -> LabelledSpec {
        LabelledSpec { shape: vec![1, SIDE, SIDE], classes: 10 }
    }

    fn batch(&self, samples: &[Sample]) -> Result<Labelled> {
        let mut pixels = Vec::with_capacity(samples.len() * SIDE * SIDE);
        let mut labels = Vec::with_capacity(samples.len());
        for &Sample { index, .. } in samples {
            let label = self.labels.get(index).ok_or_else(|| {
                Error::msg(format!("there is no digit {index}: the split has {}", self.labels.len()))
            })?;
            labels.push(u32::from(*label));
            pixels.extend(self.images.get(index).iter().map(|&pixel| f32::from(pixel) / 255.));
        }
        let input = Tensor::from_vec(pixels, (samples.len(), 1, SIDE, SIDE), &Device::Cpu)?;
        Ok(Labelled { input, label: Tensor::new(labels, &Device::Cpu)? })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use candle_core::DType;

    use super::*;

    fn sample(index: usize) -> Sample {
        Sample { index, split: Split::Train, epoch: 0, seed: 0, repeat: 0, augment: true }
    }

    #[test]
    fn builtin_digits_come_with_labels() {
        let digits = Digits::open(&Config::default(), Split::Train).unwrap();
        assert_eq!(digits.spec(), LabelledSpec { shape: vec![1, 28, 28], classes: 10 });
        assert_eq!(digits.len(), 1000);
        let batch = digits.batch(&[sample(13), sample(0), sample(999)]).unwrap();
        assert_eq!((batch.input.dims(), batch.input.dtype()), (&[3, 1, 28, 28][..], DType::F32));
        assert_eq!(batch.label.to_vec1::<u32>().unwrap(), [3, 0, 9]);
        let first: Vec<f32> = batch.input.get(0).unwrap().flatten_all().unwrap().to_vec1().unwrap();
        let pixels = digits.images.get(13).iter().map(|&pixel| f32::from(pixel) / 255.);
        assert_eq!(first, pixels.collect::<Vec<_>>());
        let (least, most) = (batch.input.min_all().unwrap(), batch.input.max_all().unwrap());
        assert_eq!((least.to_scalar::<f32>().unwrap(), most.to_scalar::<f32>().unwrap()), (0., 1.));
        assert_eq!(Digits::open(&Config::default(), Split::Val).unwrap().len(), 100);
    }

    #[test]
    fn an_index_out_of_range_is_an_error() {
        let digits = Digits::open(&Config::default(), Split::Test).unwrap();
        let error = digits.batch(&[sample(0), sample(100)]).unwrap_err().to_string();
        assert_eq!(error, "there is no digit 100: the split has 100");
    }

    /// The digits are distinguishable: the nearest training image has the right label for most held-out ones.
    #[test]
    fn the_builtin_digits_can_be_learned() {
        let open = |split| Digits::open(&Config::default(), split).unwrap();
        let (train, val) = (open(Split::Train), open(Split::Val));
        let distance = |a: &[u8], b: &[u8]| -> i64 {
            a.iter().zip(b).map(|(&a, &b)| (i64::from(a) - i64::from(b)).pow(2)).sum()
        };
        let right = |&i: &usize| {
            let nearest = (0..train.len()).min_by_key(|&j| distance(val.images.get(i), train.images.get(j)));
            train.labels[nearest.unwrap()] == val.labels[i]
        };
        let right = (0..val.len()).filter(right).count();
        assert!(right >= 90, "{right} of {}", val.len());
    }
}
