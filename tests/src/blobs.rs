//! Moving blobs: tiny videos, each sample different, for tests of training.

use candle_core::{Device, Tensor};
use candlepower::Result;
use candlepower::batch::{Video, VideoSpec};
use candlepower::data::{Dataset, Sample};
use candlepower::rand::Rng;

/// `samples` videos of one bright blob that moves in a straight line: 3 frames in, 2 out, 8x8 pixels.
pub struct Blobs {
    /// The number of samples.
    pub samples: usize,
}

impl Dataset for Blobs {
    type Batch = Video;

    fn len(&self) -> usize {
        self.samples
    }

    fn spec(&self) -> VideoSpec {
        VideoSpec { frames_in: 3, frames_out: 2, channels: 1, height: 8, width: 8 }
    }

    fn batch(&self, samples: &[Sample]) -> Result<Video> {
        let mut pixels = Vec::with_capacity(samples.len() * 5 * 64);
        for sample in samples {
            let mut rng = sample.rng();
            let mut draw = |low: f32, high: f32| rng.random_range(low..high);
            let ([y, x], [dy, dx]) = ([draw(1., 6.), draw(1., 6.)], [draw(-1., 1.), draw(-1., 1.)]);
            for t in 0..5 {
                let (y, x) = (y + dy * t as f32, x + dx * t as f32);
                pixels.extend((0..64).map(|p| {
                    let (py, px) = ((p / 8) as f32, (p % 8) as f32);
                    (-((py - y).powi(2) + (px - x).powi(2)) / 2.).exp()
                }));
            }
        }
        let frames = Tensor::from_vec(pixels, (samples.len(), 5, 1, 8, 8), &Device::Cpu)?;
        Ok(Video::new(frames.narrow(1, 0, 3)?.contiguous()?, frames.narrow(1, 3, 2)?.contiguous()?))
    }
}
