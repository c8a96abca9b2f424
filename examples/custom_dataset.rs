//! Custom frames for the tutorial's model: implement `Dataset` and `Open`, register the dataset, and use it
//! in TOML.
//!
//!     cargo run --release --example custom_dataset

use candlepower::config::Document;
use candlepower::prelude::*;
use candlepower::schemars::{self, JsonSchema};
use candlepower::serde::{Deserialize, Serialize};

/// The fields of `[data]`, apart from `name` and `workers`.
#[derive(Clone, Serialize, Deserialize, JsonSchema)]
#[serde(crate = "candlepower::serde", deny_unknown_fields)]
struct WavesConfig {
    /// Number of videos in the training split.
    samples: usize,
    /// Distance between wave crests, in pixels.
    wavelength: f32,
}

/// Plane waves that move across a 32x32 frame. Each sample has its own direction, speed and phase.
struct Waves {
    samples: usize,
    wavelength: f32,
}

const SPEC: VideoSpec = VideoSpec { frames_in: 4, frames_out: 4, channels: 1, height: 32, width: 32 };

impl Open for Waves {
    type Config = WavesConfig;

    fn open(config: &WavesConfig, split: Split) -> Result<Self> {
        if config.wavelength <= 0. {
            // The key is reported with file, line and column.
            return Err(Error::setting("wavelength", "expected a length above 0"));
        }
        let samples = if split == Split::Train { config.samples } else { 64 };
        Ok(Self { samples, wavelength: config.wavelength })
    }
}

impl Dataset for Waves {
    type Batch = Video;

    fn len(&self) -> usize {
        self.samples
    }

    fn spec(&self) -> VideoSpec {
        SPEC
    }

    fn batch(&self, samples: &[Sample]) -> Result<Video> {
        use candlepower::rand::Rng;
        let frames = SPEC.frames_in + SPEC.frames_out;
        let mut pixels = Vec::with_capacity(samples.len() * frames * 32 * 32);
        for sample in samples {
            let mut rng = sample.rng();
            let direction: f32 = rng.random_range(0.0..std::f32::consts::TAU);
            let (speed, phase) = (rng.random_range(0.5..2.0f32), rng.random_range(0.0..self.wavelength));
            for t in 0..frames {
                pixels.extend((0..32 * 32).map(|p| {
                    let (y, x) = ((p / 32) as f32, (p % 32) as f32);
                    let along = y * direction.sin() + x * direction.cos() + phase - speed * t as f32;
                    0.5 + 0.5 * (along / self.wavelength * std::f32::consts::TAU).sin()
                }));
            }
        }
        let all = Tensor::from_vec(pixels, (samples.len(), frames, 1, 32, 32), &Device::Cpu)?;
        let input = all.narrow(1, 0, SPEC.frames_in)?.contiguous()?;
        Ok(Video::new(input, all.narrow(1, SPEC.frames_in, SPEC.frames_out)?.contiguous()?))
    }
}

const CONFIG: &str = r#"
[run]
name = "waves"

[trainer]
batch_size = 8
max_steps = 200

[module]
name = "conv_lstm"
hidden = 16
patch = 4

[data]
name = "waves"
samples = 800
wavelength = 12.0

[optimizer]
lr = 3e-3
"#;

fn main() -> Result<()> {
    let registry = candlepower_launcher::registry().dataset::<Waves>("waves");
    // A real program would call `candlepower_launcher::run(registry)`: the whole command line, with your
    // names.
    let document = Document::parse("waves.toml", CONFIG.into(), &[])?;
    let report = Experiment::new(&registry, document)?.train(&Resume::No, Vec::new())?;
    println!("{:?}", report.outcome.validation);
    report.lead_times.iter().for_each(|scores| println!("{scores}"));
    Ok(())
}
