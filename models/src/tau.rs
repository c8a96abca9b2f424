//! TAU: a temporal attention unit in place of SimVP's translator (Tan et al., CVPR 2023).

use candle_core::{DType, Tensor};
use candle_nn::Init;
use candlepower::nn::Linear;
use candlepower::nn::channels_last::scale_channels;
use candlepower::prelude::*;
use candlepower::seed::ChaCha8Rng;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::sim_vp::{Gate, LargeKernel, Network, SimVpConfig, TranslatorKind, compare, conv1x1};

/// Fields of `[module]` for `tau`. The defaults are the published ones for Moving MNIST.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct TauConfig {
    /// Channels of a frame's features (`hid_S`), even.
    pub spatial_channels: usize,
    /// Channels of the translator, which sees all frames at once (`hid_T`).
    pub temporal_channels: usize,
    /// Layers of encoder and decoder (`N_S`), even: every second one halves or doubles the size.
    pub spatial_layers: usize,
    /// Blocks of the translator (`N_T`), at least 2.
    pub temporal_layers: usize,
    /// Hidden channels of a block's perceptron, as a multiple of the block's channels.
    pub mlp_ratio: f64,
    /// Stochastic depth of the first and the last block; blocks between them are interpolated linearly.
    pub drop_path: [f64; 2],
    /// Weight of the divergence between predicted and true frame-to-frame changes in the loss.
    pub alpha: f64,
}

impl Default for TauConfig {
    fn default() -> Self {
        let SimVpConfig {
            spatial_channels,
            temporal_channels,
            spatial_layers,
            temporal_layers,
            mlp_ratio,
            drop_path,
            ..
        } = SimVpConfig::default();
        let alpha = 0.1;
        Self {
            spatial_channels,
            temporal_channels,
            spatial_layers,
            temporal_layers,
            mlp_ratio,
            drop_path,
            alpha,
        }
    }
}

impl TauConfig {
    fn network(&self) -> SimVpConfig {
        let TauConfig {
            spatial_channels,
            temporal_channels,
            spatial_layers,
            temporal_layers,
            mlp_ratio,
            drop_path,
            ..
        } = *self;
        let translator = TranslatorKind::Gsta;
        SimVpConfig {
            spatial_channels,
            temporal_channels,
            spatial_layers,
            temporal_layers,
            translator,
            mlp_ratio,
            drop_path,
        }
    }
}

/// Static attention by large kernels, times dynamic attention computed from each channel's mean.
struct TemporalAttention {
    kernel: LargeKernel,
    squeeze: Linear,
    excite: Linear,
}

fn temporal_attention(channels: usize, vb: VarBuilder) -> Result<Box<dyn Gate>> {
    let hidden = channels / (channels / 16).max(4);
    if hidden == 0 {
        let message = format!("{channels} channels are too few for attention, which needs at least 4");
        return Err(Error::setting("temporal_channels", message));
    }
    let linear = |inputs: usize, outputs, vb| {
        let bound = 1. / (inputs as f64).sqrt();
        Linear::with_init(inputs, outputs, Init::Uniform { lo: -bound, up: bound }, None, vb)
    };
    Ok(Box::new(TemporalAttention {
        kernel: LargeKernel::new(channels, channels, false, vb.clone())?,
        squeeze: linear(channels, hidden, vb.pp("fc.0"))?,
        excite: linear(hidden, channels, vb.pp("fc.2"))?,
    }))
}

impl Gate for TemporalAttention {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (batch, height, width, channels) = x.dims4()?;
        let still = conv1x1(&self.kernel.mix, &self.kernel.spread(x)?)?;
        let means = x.reshape((batch, height * width, channels))?.mean(1)?;
        let moving = candle_nn::ops::sigmoid(&self.excite.forward(&self.squeeze.forward(&means)?.relu()?)?)?;
        scale_channels(&(still * x)?, &moving)
    }

    fn weights(&self) -> usize {
        self.kernel.weights()
    }
}

/// SimVP with temporal attention, and a loss that also compares frame-to-frame changes. Parameters have
/// OpenSTL's names.
pub struct Tau {
    network: Network,
    spec: VideoSpec,
    alpha: f64,
}

impl Tau {
    /// Like [`SimVp::forward`](crate::SimVp::forward).
    pub fn forward(&self, frames: &Tensor, training: Option<&mut ChaCha8Rng>) -> Result<Tensor> {
        self.network.forward(frames, self.spec.frames_out, training)
    }

    /// The mean squared error plus alpha times the [`divergence`] of changes.
    fn loss(&self, batch: &Video, prediction: &Tensor, step: &mut Step) -> Result<Tensor> {
        let mse = compare(batch, prediction, step)?;
        let (prediction, target) = batch.known(prediction)?;
        let divergence = divergence(&prediction, &target)?;
        step.log("divergence", &divergence);
        Ok((mse + (divergence * self.alpha)?)?)
    }
}

/// The differential divergence between predicted and true frames, both (B, T, C, H, W): the mean of
/// `p log(p / q)` over all elements, where p and q are the softmax over a frame of its change from the previous
/// frame, divided by a temperature of 0.1 (equation 9). Zero for fewer than three frames, as in OpenSTL.
pub fn divergence(prediction: &Tensor, target: &Tensor) -> Result<Tensor> {
    const TEMPERATURE: f64 = 0.1;
    const EPS: f64 = 1e-12;
    let wide = if prediction.dtype() == DType::F64 { DType::F64 } else { DType::F32 };
    let (batch, times, ..) = prediction.dims5()?;
    if times < 3 {
        return Ok(Tensor::zeros((), wide, prediction.device())?);
    }
    let changes = |frames: &Tensor| -> Result<Tensor> {
        let frames = frames.to_dtype(wide)?.reshape((batch, times, ()))?;
        let change = (frames.narrow(1, 1, times - 1)? - frames.narrow(1, 0, times - 1)?)?;
        nn::softmax(&(change / TEMPERATURE)?)
    };
    let (p, q) = (changes(prediction)?, changes(target)?);
    let ratio = ((&p / (q + EPS)?)? + EPS)?;
    nn::mean_all(&(p * ratio.log()?)?)
}

impl Build for Tau {
    type Config = TauConfig;

    fn build(config: &TauConfig, spec: &VideoSpec, vb: VarBuilder) -> Result<Self> {
        if !(config.alpha.is_finite() && config.alpha >= 0.) {
            return Err(Error::setting(
                "alpha",
                format!("expected a number of at least 0, found {}", config.alpha),
            ));
        }
        let network = Network::new(&config.network(), spec, &temporal_attention, vb)?;
        Ok(Self { network, spec: *spec, alpha: config.alpha })
    }
}

impl Module for Tau {
    type Batch = Video;

    fn training_step(&self, batch: &Video, step: &mut Step) -> Result<Tensor> {
        let prediction = self.forward(&batch.input, Some(&mut step.rng("drop path")))?;
        self.loss(batch, &prediction, step)
    }

    fn validation_step(&self, batch: &Video, step: &mut Step) -> Result<Tensor> {
        let prediction = self.forward(&batch.input, None)?;
        self.loss(batch, &prediction, step)
    }

    fn predict_step(&self, batch: &Video, _: &mut Step) -> Result<Tensor> {
        self.forward(&batch.input, None)
    }

    /// Counts the convolutions only.
    fn flops(&self) -> Option<f64> {
        Some(self.network.flops(&self.spec))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_published_sizes() {
        let spec = VideoSpec { frames_in: 10, frames_out: 10, channels: 1, height: 64, width: 64 };
        let model = Model::build::<Tau>(&TauConfig::default(), &spec, 1, &Device::Cpu).unwrap();
        assert_eq!(model.params().count(), 44_656_001);
        let gmac = model.evaluation().flops().unwrap() / 2e9;
        assert!((gmac / 15.89 - 1.).abs() < 0.01, "{gmac}");
    }

    #[test]
    fn two_frames_have_no_divergence() {
        let frames = |t| Tensor::rand(0f32, 1., (2, t, 1, 4, 4), &Device::Cpu).unwrap();
        let value = |t| divergence(&frames(t), &frames(t)).unwrap().to_scalar::<f32>().unwrap();
        assert!(value(2) == 0. && value(3) > 0.);
    }
}
