//! Shared parts of the recurrent models that feed their frames back: gates, the roll-out, scheduled sampling,
//! and the module around a stack of cells.

pub mod gates;
pub mod roll_out;
pub mod sampling;

use candle_core::{DType, Tensor};
use candlepower::nn::{channels_first, channels_last};
use candlepower::prelude::*;
use candlepower::{data::Settings, rand::Rng};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use roll_out::{Feed, Mask, RollOut, roll_out};
use sampling::Sampling;

use crate::pictures::log_prediction;

/// Stacked cells that turn a frame into a prediction of the next one. Frames and states are channels last.
pub trait Stack: Sized + Send + Sync + 'static {
    /// The fields of the `[module]` section.
    type Config: Settings;
    /// The state carried from step to step.
    type State;

    /// The fields of `config` that all recurrent models share.
    fn recurrent(config: &Self::Config) -> RecurrentConfig;

    /// Builds the stack for frames of this size; `config` has been checked.
    fn build(config: &Self::Config, frame: FrameSize, vb: VarBuilder) -> Result<Self>;

    /// A copy for one roll-out, whose steps share work; see [`StepConv::prepare`](nn::recurrent::StepConv::prepare).
    fn prepare(&self) -> Result<Self>;

    /// The state before a roll-out's first frame, (B, H, W, C).
    fn start(&self, frame: &Tensor) -> Result<Self::State>;

    /// Maps a frame (B, H, W, C) to the predicted next frame, (B, H, W, C).
    fn step(&self, frame: &Tensor, state: &mut Self::State) -> Result<Tensor>;

    /// The loss of the predictions of all frames but the first, (B, T - 1, C, H, W), and of the final state.
    fn loss(&self, predictions: &Tensor, batch: &Video, _state: &Self::State) -> Result<Tensor> {
        batch.mse(predictions)
    }

    /// Multiply-adds of one step of one sample.
    fn multiply_adds(&self) -> usize;

    /// Parameters that the reference has and never uses, as patterns; see [`Module::unused_parameters`].
    fn unused_parameters(&self) -> &'static [&'static str] {
        &[]
    }
}

/// The size of the frames that a stack sees, after patches are folded into channels.
#[derive(Debug, Clone, Copy)]
pub struct FrameSize {
    /// Channels: those of all pixels of a patch.
    pub channels: usize,
    /// Rows.
    pub height: usize,
    /// Columns.
    pub width: usize,
}

impl FrameSize {
    /// The number of patches.
    pub fn pixels(&self) -> usize {
        self.height * self.width
    }
}

/// Fields of `[module]` that most recurrent models have.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct RecurrentConfig {
    /// Channels of the hidden states, one number per layer.
    pub hidden: Vec<usize>,
    /// Side of the convolution kernels, odd.
    pub kernel: usize,
    /// Side of the pixel patches that are folded into channels.
    pub patch: usize,
    /// Layer normalisation after each gate convolution, over channels and pixels together.
    pub layer_norm: bool,
    /// Schedule that replaces true frames by predictions during training.
    pub sampling: Sampling,
}

impl Default for RecurrentConfig {
    fn default() -> Self {
        Self { hidden: vec![128; 4], kernel: 5, patch: 4, layer_norm: false, sampling: Sampling::default() }
    }
}

impl RecurrentConfig {
    fn check(&self, spec: &VideoSpec) -> Result<()> {
        let VideoSpec { height, width, .. } = *spec;
        if self.hidden.is_empty() || self.hidden.contains(&0) {
            let message = format!("expected a number from 1 up for each layer, found {:?}", self.hidden);
            return Err(Error::setting("hidden", message));
        }
        if self.kernel.is_multiple_of(2) {
            return Err(Error::setting("kernel", format!("expected an odd number, found {}", self.kernel)));
        }
        if self.patch == 0 || !height.is_multiple_of(self.patch) || !width.is_multiple_of(self.patch) {
            let message = format!("patches of {0}x{0} do not tile frames of {height}x{width}", self.patch);
            return Err(Error::setting("patch", message));
        }
        self.sampling.check()
    }

    /// The width of all layers; an error if widths differ, because one memory passes through all layers.
    pub(crate) fn equal_widths(&self) -> Result<usize> {
        let width = self.hidden[0];
        if self.hidden.iter().any(|&other| other != width) {
            let message =
                format!("one memory goes through all layers: expected equal widths, found {:?}", self.hidden);
            return Err(Error::setting("hidden", message));
        }
        Ok(width)
    }
}

/// A zero state with this many channels and the size of a frame (B, H, W, C).
pub(crate) fn zeros(frame: &Tensor, channels: usize) -> Result<Tensor> {
    let (batch, height, width, _) = frame.dims4()?;
    Ok(Tensor::zeros((batch, height, width, channels), frame.dtype(), frame.device())?)
}

/// A model that sees one frame at a time and predicts the next. Beyond the given frames it sees its own predictions.
pub struct Recurrent<S> {
    stack: S,
    sampling: Sampling,
    patch: usize,
    spec: VideoSpec,
}

impl<S: Stack> Recurrent<S> {
    /// Frames (B, T_in, C, H, W) to the T_out frames that follow, (B, T_out, C, H, W), which are not clipped.
    pub fn forward(&self, frames: &Tensor) -> Result<Tensor> {
        self.last_frames(&self.roll_out(frames, Feed::FreeRunning)?.predictions)
    }

    /// The loss of one roll-out over all frames of the batch, and its predictions of all but the first,
    /// (B, T_in + T_out - 1, C, H, W).
    pub fn train(&self, batch: &Video, feed: Feed) -> Result<(Tensor, Tensor)> {
        let frames = Tensor::cat(&[&batch.input, &batch.target.to_dtype(batch.input.dtype())?], 1)?;
        let RollOut { predictions, state } = self.roll_out(&frames, feed)?;
        let predictions = self.unfold(&predictions)?;
        Ok((self.stack.loss(&predictions, batch, &state)?, predictions))
    }

    /// (B, T, C, H, W) to (T, B, H/p, W/p, p*p*C).
    fn fold(&self, frames: &Tensor) -> Result<Tensor> {
        let dtype = if frames.dtype() == DType::F64 { DType::F64 } else { DType::F32 };
        let folded = nn::space_to_depth(&frames.to_dtype(dtype)?, self.patch)?;
        channels_last(&folded.transpose(0, 1)?)
    }

    /// Undoes [`Self::fold`].
    fn unfold(&self, frames: &Tensor) -> Result<Tensor> {
        nn::depth_to_space(&channels_first(&frames.transpose(0, 1)?)?, self.patch)
    }

    /// The predictions of the frames after the given ones.
    fn last_frames(&self, predictions: &Tensor) -> Result<Tensor> {
        let frames_out = self.spec.frames_out;
        self.unfold(&predictions.narrow(0, predictions.dim(0)? - frames_out, frames_out)?)
    }

    fn roll_out(&self, frames: &Tensor, feed: Feed) -> Result<RollOut<S>> {
        let steps = self.spec.frames_in + self.spec.frames_out - 1;
        roll_out(&self.stack.prepare()?, &self.fold(frames)?, self.spec.frames_in, steps, feed)
    }

    /// The loss of a training step; the step's own generator draws the mask.
    fn scheduled(&self, batch: &Video, step: &mut Step) -> Result<Tensor> {
        let VideoSpec { frames_in, frames_out, .. } = self.spec;
        // A step that draws nothing does not ask for a generator, so it can be recorded.
        let draw = || {
            let mut rng = step.rng("scheduled sampling");
            let probabilities = self.sampling.probabilities(step.global_step(), frames_in, frames_out);
            Mask::new(batch.len(), &probabilities, |p| rng.random::<f64>() < p)
        };
        let mask;
        let feed = match &self.sampling {
            Sampling::None => Feed::FreeRunning,
            Sampling::Linear(_) => {
                mask = draw();
                Feed::Teacher(&mask)
            }
            Sampling::Reverse(_) => {
                mask = draw();
                Feed::Reverse(&mask)
            }
        };
        let (loss, predictions) = self.train(batch, feed)?;
        if step.images_due() {
            let first = predictions.dim(1)? - frames_out;
            let prediction = predictions.narrow(1, first, frames_out)?.clamp(0., 1.)?;
            log_prediction("prediction", batch, &prediction, step)?;
        }
        Ok(loss)
    }
}

impl<S: Stack> Build for Recurrent<S> {
    type Config = S::Config;

    fn build(config: &S::Config, spec: &VideoSpec, vb: VarBuilder) -> Result<Self> {
        let recurrent = S::recurrent(config);
        recurrent.check(spec)?;
        let RecurrentConfig { patch, sampling, .. } = recurrent;
        let frame = FrameSize {
            channels: spec.channels * patch * patch,
            height: spec.height / patch,
            width: spec.width / patch,
        };
        let stack = S::build(config, frame, vb)?;
        Ok(Self { stack, sampling, patch, spec: *spec })
    }
}

impl<S: Stack> Module for Recurrent<S> {
    type Batch = Video;

    /// The reference's loss: over all predictions, including those of given frames.
    fn training_step(&self, batch: &Video, step: &mut Step) -> Result<Tensor> {
        self.scheduled(batch, step)
    }

    /// The mean squared error of the frames after the given ones, with no true frames as input.
    fn validation_step(&self, batch: &Video, step: &mut Step) -> Result<Tensor> {
        let prediction = self.forward(&batch.input)?;
        if step.images_due() {
            log_prediction("prediction", batch, &prediction.clamp(0., 1.)?, step)?;
        }
        let mse = batch.mse(&prediction)?;
        step.log("mse", &mse);
        Ok(mse)
    }

    fn predict_step(&self, batch: &Video, _: &mut Step) -> Result<Tensor> {
        self.forward(&batch.input)
    }

    fn flops(&self) -> Option<f64> {
        let steps = self.spec.frames_in + self.spec.frames_out - 1;
        Some(2. * (steps * self.stack.multiply_adds()) as f64)
    }

    fn unused_parameters(&self) -> &[&str] {
        self.stack.unused_parameters()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::conv_lstm_stack::ConvLstmLayers;
    use crate::predrnn::PredRnnLayers;
    use crate::predrnn_pp::CausalLayers;
    use crate::predrnn_v2::DecoupledLayers;
    use crate::{mau::MauLayers, mim::MimLayers};

    /// Multiply-adds of one sample's forward pass at the published size, in 10^9.
    fn gmac<S: Stack<Config: Clone>>(config: &S::Config) -> f64 {
        let spec = VideoSpec { frames_in: 10, frames_out: 10, channels: 1, height: 64, width: 64 };
        let model = Model::build::<Recurrent<S>>(config, &spec, 1, &Device::Cpu).unwrap();
        model.evaluation().flops().unwrap() / 2e9
    }

    #[test]
    fn operations_are_those_that_openstl_counts() {
        for (name, counted, expected) in [
            ("conv_lstm_stack", gmac::<ConvLstmLayers>(&Default::default()), 56.79),
            ("predrnn", gmac::<PredRnnLayers>(&Default::default()), 115.95),
            ("predrnn_v2", gmac::<DecoupledLayers>(&Default::default()), 116.59),
            ("predrnn_pp", gmac::<CausalLayers>(&Default::default()), 171.74),
            ("mim", gmac::<MimLayers>(&Default::default()), 181.70),
            ("mau", gmac::<MauLayers>(&Default::default()), 17.74),
        ] {
            assert!((counted / expected - 1.).abs() < 0.02, "{name}: {counted}, not {expected}");
        }
    }
}
