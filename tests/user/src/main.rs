//! Classifies pictures of horizontal and vertical bars: a custom model and dataset, selected in TOML.
//!
//!     cargo run -- train bars.toml

use candlepower::candle_nn::{Init, loss::cross_entropy};
use candlepower::nn::channels_last::{BatchNorm, Conv2dOptions};
use candlepower::nn::{Conv, Linear};
use candlepower::prelude::*;
use candlepower::rand::Rng;
use candlepower::schemars::{self, JsonSchema};
use candlepower::serde::{Deserialize, Serialize};

/// Rows and columns of a picture.
const SIDE: usize = 8;

/// The fields of `[data]`, besides `name` and `workers`.
#[derive(Clone, Serialize, Deserialize, JsonSchema)]
#[serde(crate = "candlepower::serde", deny_unknown_fields)]
struct BarsConfig {
    /// Pictures per training epoch.
    samples: usize,
    /// Amplitude of the noise.
    noise: f32,
}

/// Noisy pictures of one bar, (B, 1, 8, 8): label 0 if it is horizontal, 1 if it is vertical.
struct Bars {
    samples: usize,
    noise: f32,
}

impl Open for Bars {
    type Config = BarsConfig;

    fn open(config: &BarsConfig, split: Split) -> Result<Self> {
        if config.noise < 0. {
            return Err(Error::setting(
                "noise",
                format!("expected a number of at least 0, found {}", config.noise),
            ));
        }
        let samples = if split == Split::Train { config.samples } else { 100 };
        Ok(Self { samples, noise: config.noise })
    }
}

impl Dataset for Bars {
    type Batch = Labelled;

    fn len(&self) -> usize {
        self.samples
    }

    fn spec(&self) -> LabelledSpec {
        LabelledSpec { shape: vec![1, SIDE, SIDE], classes: 2 }
    }

    fn batch(&self, samples: &[Sample]) -> Result<Labelled> {
        let (mut pixels, mut labels) = (Vec::new(), Vec::new());
        for sample in samples {
            let mut rng = sample.rng();
            let (stands, place) = (rng.random_bool(0.5), rng.random_range(0..SIDE));
            labels.push(u32::from(stands));
            pixels.extend((0..SIDE * SIDE).map(|p| {
                let on_bar = if stands { p % SIDE == place } else { p / SIDE == place };
                f32::from(on_bar) + self.noise * rng.random_range(-1.0..1.0f32)
            }));
        }
        let input = Tensor::from_vec(pixels, (samples.len(), 1, SIDE, SIDE), &Device::Cpu)?;
        Ok(Labelled { input, label: Tensor::new(labels, &Device::Cpu)? })
    }
}

/// The fields of `[module]`, besides `name`.
#[derive(Clone, Serialize, Deserialize, JsonSchema)]
#[serde(crate = "candlepower::serde", deny_unknown_fields)]
struct BarNetConfig {
    /// Channels of the convolution.
    channels: usize,
}

/// A convolution, batch normalisation, ReLU, the mean over the pixels, and a linear layer.
struct BarNet {
    conv: Conv,
    norm: BatchNorm,
    class: Linear,
}

impl Build for BarNet {
    type Config = BarNetConfig;

    fn build(config: &BarNetConfig, spec: &LabelledSpec, vb: VarBuilder) -> Result<Self> {
        if config.channels == 0 {
            return Err(Error::setting("channels", "expected at least 1, found 0"));
        }
        Ok(Self {
            conv: Conv::new(&[config.channels, spec.shape[0], 5, 5], vb.pp("conv"))?,
            norm: BatchNorm::new(config.channels, Init::Const(1.), vb.pp("norm"))?,
            class: Linear::new(config.channels, spec.classes, vb.pp("class"))?,
        })
    }
}

impl Module for BarNet {
    type Batch = Labelled;

    fn training_step(&self, batch: &Labelled, step: &mut Step) -> Result<Tensor> {
        let x = batch.input.permute((0, 2, 3, 1))?.contiguous()?;
        let x = self.conv.channels_last(&x, Conv2dOptions { padding: 2, ..Default::default() })?;
        let x = self.norm.forward(&x, step.is_training())?.relu()?.mean((1, 2))?;
        let logits = self.class.forward(&x)?;
        let right = logits.argmax(1)?.eq(&batch.label)?.to_dtype(DType::F32)?;
        step.log("accuracy", &right.mean_all()?);
        Ok(cross_entropy(&logits, &batch.label)?)
    }
}

fn main() -> std::process::ExitCode {
    let registry = candlepower_launcher::registry().module::<BarNet>("bar_net").dataset::<Bars>("bars");
    candlepower_launcher::run(registry)
}
