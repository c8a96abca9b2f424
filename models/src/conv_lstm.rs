//! The ConvLSTM encoder-decoder of the Moving MNIST tutorial (cells: Shi et al. 2015, without peepholes).

use candle_core::Tensor;
use candlepower::nn::{self, Conv, Feed, Keep};
use candlepower::picture::video_grid;
use candlepower::prelude::*;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// How many samples of a batch are drawn.
const SAMPLES_DRAWN: usize = 2;

/// Fields of `[module]` for `conv_lstm`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct ConvLstmConfig {
    /// Channels of the hidden states (the tutorial's `nf`).
    pub hidden: usize,
    /// Side of the cells' convolution kernels, odd.
    pub kernel: usize,
    /// Side of the patches of pixels that are folded into channels; 1: none, as in the tutorial.
    pub patch: usize,
    /// Frames to predict from. Default: what the data gives; written, it must agree.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub frames_in: Option<usize>,
    /// Frames to predict. Default: what the data gives; written, it must agree.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub frames_out: Option<usize>,
    /// The mean pixel that the untrained model predicts. The tutorial leaves it to chance (about 0.5), and then spends
    /// thousands of steps on learning that most pixels are black. About 0.05 for Moving MNIST.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mean_pixel: Option<f64>,
}

impl Default for ConvLstmConfig {
    fn default() -> Self {
        Self { hidden: 64, kernel: 3, patch: 1, frames_in: None, frames_out: None, mean_pixel: None }
    }
}

impl ConvLstmConfig {
    fn check(&self, spec: &VideoSpec) -> Result<()> {
        let VideoSpec { frames_in, frames_out, height, width, .. } = *spec;
        for (key, value) in [("hidden", self.hidden), ("patch", self.patch)] {
            if value == 0 {
                return Err(Error::setting(key, "expected at least 1, found 0"));
            }
        }
        if self.kernel.is_multiple_of(2) {
            return Err(Error::setting("kernel", format!("expected an odd number, found {}", self.kernel)));
        }
        if !height.is_multiple_of(self.patch) || !width.is_multiple_of(self.patch) {
            let message = format!("patches of {0}x{0} do not tile frames of {height}x{width}", self.patch);
            return Err(Error::setting("patch", message));
        }
        for (key, asked, given) in
            [("frames_in", self.frames_in, frames_in), ("frames_out", self.frames_out, frames_out)]
        {
            if asked.is_some_and(|asked| asked != given) {
                let message =
                    format!("the data gives {given} frames; set `data.{key}` to the same, or leave this out");
                return Err(Error::setting(key, message));
            }
        }
        if self.mean_pixel.is_some_and(|mean| !(mean > 0. && mean < 1.)) {
            return Err(Error::setting("mean_pixel", "expected a value between 0 and 1"));
        }
        Ok(())
    }
}

/// Two ConvLSTM cells read the frames; their last state is handed to two more, which write the frames that follow.
///
/// No frame is fed back: the decoder's own output is its next input, and a convolution with a sigmoid turns each output
/// into a frame. Parameters have the tutorial's `state_dict` names and shapes.
pub struct ConvLstm {
    encoder: [Conv; 2],
    decoder: [Conv; 2],
    to_frame: Conv,
    patch: usize,
    spec: VideoSpec,
}

impl ConvLstm {
    /// Frames (B, T_in, C, H, W) in `[0, 1]` to the T_out frames that follow, (B, T_out, C, H, W).
    pub fn forward(&self, frames: &Tensor) -> Result<Tensor> {
        let frames = nn::space_to_depth(frames, self.patch)?;
        let summary = nn::conv_lstm(Feed::Frames(&frames), &self.encoder, Keep::Last)?;
        let feed = Feed::Feedback { first: &summary, steps: self.spec.frames_out };
        let states = nn::conv_lstm(feed, &self.decoder, Keep::All)?;
        let logits = self.to_frame.same(&states)?;
        nn::depth_to_space(&candle_nn::ops::sigmoid(&logits)?, self.patch)
    }

    fn loss(&self, batch: &Video, step: &mut Step) -> Result<Tensor> {
        let prediction = self.forward(&batch.input)?;
        if step.images_due() {
            step.log_image(
                "prediction",
                &video_grid(&batch.input, &prediction, &batch.target, SAMPLES_DRAWN)?,
            );
        }
        batch.mse(&prediction)
    }
}

impl Build for ConvLstm {
    type Config = ConvLstmConfig;

    fn build(config: &ConvLstmConfig, spec: &VideoSpec, vb: VarBuilder) -> Result<Self> {
        config.check(spec)?;
        let (hidden, kernel) = (config.hidden, config.kernel);
        let channels = spec.channels * config.patch * config.patch;
        let cell = |name: &str, inputs: usize| {
            Conv::new(&[4 * hidden, inputs + hidden, kernel, kernel], vb.pp(name).pp("conv"))
        };
        // A Conv3d of depth 1 in the tutorial; over single frames that is a plain convolution.
        let frame = &[channels, hidden, 1, 3, 3];
        let to_frame = match config.mean_pixel {
            None => Conv::new(frame, vb.pp("decoder_CNN"))?,
            Some(mean) => Conv::with_bias(frame, (mean / (1. - mean)).ln(), vb.pp("decoder_CNN"))?,
        };
        Ok(Self {
            encoder: [cell("encoder_1_convlstm", channels)?, cell("encoder_2_convlstm", hidden)?],
            decoder: [cell("decoder_1_convlstm", hidden)?, cell("decoder_2_convlstm", hidden)?],
            to_frame,
            patch: config.patch,
            spec: *spec,
        })
    }
}

impl Module for ConvLstm {
    type Batch = Video;

    fn training_step(&self, batch: &Video, step: &mut Step) -> Result<Tensor> {
        self.loss(batch, step)
    }

    fn validation_step(&self, batch: &Video, step: &mut Step) -> Result<Tensor> {
        let mse = self.loss(batch, step)?;
        step.log("mse", &mse);
        Ok(mse)
    }

    fn predict_step(&self, batch: &Video, _: &mut Step) -> Result<Tensor> {
        self.forward(&batch.input)
    }

    /// Of the convolutions: every weight is used once a frame at every pixel, beyond the edges too. What happens
    /// between them is below one in a hundred.
    fn flops(&self) -> Option<f64> {
        let VideoSpec { frames_in, frames_out, height, width, .. } = self.spec;
        let weights = |convs: &[Conv]| convs.iter().map(|conv| conv.weight.elem_count()).sum::<usize>();
        let decoding = weights(&self.decoder) + self.to_frame.weight.elem_count();
        let a_pixel = frames_in * weights(&self.encoder) + frames_out * decoding;
        let pixels = (height / self.patch) * (width / self.patch);
        Some(2. * (pixels * a_pixel) as f64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gflops(config: ConvLstmConfig) -> f64 {
        let spec = VideoSpec { frames_in: 10, frames_out: 10, channels: 1, height: 64, width: 64 };
        let model = Model::build::<ConvLstm>(&config, &spec, 1, &Device::Cpu).unwrap();
        model.evaluation().flops().unwrap() / 1e9
    }

    #[test]
    fn operations_of_the_tutorials_model() {
        // Ten frames of 64 x 64 pixels, 3 x 3 kernels, two operations a multiply-add: three cells of 64 + 64 channels
        // to 4 x 64, one of 1 + 64, and a convolution of 64 channels to one.
        let by_hand = 10. * 4096. * 9. * 2. * (3. * 128. * 256. + 65. * 256. + 64.) / 1e9;
        let tutorial = gflops(ConvLstmConfig::default());
        assert!((tutorial - by_hand).abs() < 1e-9 && (tutorial - 84.8).abs() < 0.05, "{tutorial} GFLOP");
        // Patches of 4 x 4: a sixteenth of the pixels, a little more channels.
        let patched = gflops(ConvLstmConfig { patch: 4, ..Default::default() });
        assert!(patched > tutorial / 16. && patched < tutorial / 15., "{patched} GFLOP");
    }
}
