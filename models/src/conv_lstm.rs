//! The ConvLSTM encoder-decoder of the Moving MNIST tutorial (cells: Shi et al. 2015, without peepholes).

mod attention;
mod frames_back;

use attention::Attention;
use candle_core::Tensor;
use candlepower::nn::{self, Conv, Feed, Keep};
use candlepower::prelude::*;
use frames_back::FramesBack;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::pictures::log_prediction;

/// Fields of `[module]` for `conv_lstm`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct ConvLstmConfig {
    /// Channels of the hidden states (the tutorial's `nf`).
    pub hidden: usize,
    /// Side of the cells' convolution kernels, odd.
    pub kernel: usize,
    /// Side of the pixel patches that are folded into channels. 1: no folding, as in the tutorial.
    pub patch: usize,
    /// Number of input frames. Default: taken from the data; if set, it must match the data.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub frames_in: Option<usize>,
    /// Number of frames to predict. Default: taken from the data; if set, it must match the data.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub frames_out: Option<usize>,
    /// Mean pixel that the untrained model predicts. The tutorial leaves it to chance (about 0.5), and then
    /// spends thousands of steps learning that most pixels are black. About 0.05 for Moving MNIST.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mean_pixel: Option<f64>,
    /// Whether the decoder reads each frame that it has predicted, instead of its own last output. It starts
    /// from the encoder's states and the last input frame.
    pub feed_frames_back: bool,
    /// Whether the decoder attends to all of the encoder's outputs before it makes each frame.
    pub attention: bool,
}

impl Default for ConvLstmConfig {
    fn default() -> Self {
        Self {
            hidden: 64,
            kernel: 3,
            patch: 1,
            frames_in: None,
            frames_out: None,
            mean_pixel: None,
            feed_frames_back: false,
            attention: false,
        }
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

/// The ConvLSTM encoder-decoder: two cells read the input frames, and their last states initialize two more
/// cells, which produce the frames that follow.
///
/// By default no frame is fed back: the decoder's own output is its next input, and a convolution with a
/// sigmoid turns each output into a frame. Parameters have the tutorial's `state_dict` names and shapes.
pub struct ConvLstm {
    encoder: [Conv; 2],
    decoder: [Conv; 2],
    to_frame: ToFrame,
    /// The same cells, used if frames are fed back.
    frames_back: Option<FramesBack>,
    patch: usize,
    spec: VideoSpec,
}

/// Turns the decoder's output into frames.
struct ToFrame {
    conv: Conv,
    attention: Option<Attention>,
}

impl ToFrame {
    /// Outputs of the decoder (B, T, H, W, N), and of the encoder, to frames (B, T, H, W, C) in `[0, 1]`.
    fn forward(&self, outputs: &Tensor, encoded: &Tensor) -> Result<Tensor> {
        let outputs = match &self.attention {
            Some(attention) => attention.forward(outputs, encoded)?,
            None => outputs.clone(),
        };
        Ok(candle_nn::ops::sigmoid(&self.conv.same(&outputs)?)?)
    }
}

impl ConvLstm {
    /// Frames (B, T_in, C, H, W) in `[0, 1]` to the T_out frames that follow, (B, T_out, C, H, W).
    pub fn forward(&self, frames: &Tensor) -> Result<Tensor> {
        let frames = nn::channels_last(&nn::space_to_depth(frames, self.patch)?)?;
        let steps = self.spec.frames_out;
        let predicted = match &self.frames_back {
            Some(frames_back) => frames_back.forward(&frames, steps, &self.to_frame)?,
            None => {
                let (summary, encoded) = self.encode(&frames)?;
                let feed = Feed::Feedback { first: &summary, steps };
                let outputs = nn::conv_lstm(feed, &self.decoder, Keep::All)?;
                self.to_frame.forward(&outputs, &encoded)?
            }
        };
        nn::depth_to_space(&nn::channels_first(&predicted)?, self.patch)
    }

    /// Returns the encoder's last output, and all its outputs if attention needs them.
    fn encode(&self, frames: &Tensor) -> Result<(Tensor, Tensor)> {
        let keep = if self.to_frame.attention.is_some() { Keep::All } else { Keep::Last };
        let encoded = nn::conv_lstm(Feed::Frames(frames), &self.encoder, keep)?;
        let summary = match keep {
            Keep::All => encoded.narrow(1, self.spec.frames_in - 1, 1)?.squeeze(1)?,
            Keep::Last => encoded.clone(),
        };
        Ok((summary, encoded))
    }

    fn loss(&self, batch: &Video, step: &mut Step) -> Result<Tensor> {
        let prediction = self.forward(&batch.input)?;
        log_prediction("prediction", batch, &prediction, step)?;
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
        // A Conv3d of depth 1 in the tutorial, which equals a plain convolution over single frames.
        let frame = &[channels, hidden, 1, 3, 3];
        let conv = match config.mean_pixel {
            None => Conv::new(frame, vb.pp("decoder_CNN"))?,
            Some(mean) => Conv::with_bias(frame, (mean / (1. - mean)).ln(), vb.pp("decoder_CNN"))?,
        };
        let attention = config.attention.then_some(vb.pp("attention"));
        let attention = attention.map(|vb| Attention::new(hidden, vb)).transpose()?;
        let read = if config.feed_frames_back { channels } else { hidden };
        let encoder = [cell("encoder_1_convlstm", channels)?, cell("encoder_2_convlstm", hidden)?];
        let decoder = [cell("decoder_1_convlstm", read)?, cell("decoder_2_convlstm", hidden)?];
        let frames_back = config.feed_frames_back.then(|| FramesBack::new(&encoder, &decoder));
        let to_frame = ToFrame { conv, attention };
        Ok(Self { encoder, decoder, to_frame, frames_back, patch: config.patch, spec: *spec })
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

    /// Counts the convolutions: every weight is used once per frame at every pixel, including padding beyond
    /// the edges. The operations between them are less than 1 %.
    fn flops(&self) -> Option<f64> {
        let VideoSpec { frames_in, frames_out, height, width, .. } = self.spec;
        let weights = |convs: &[Conv]| convs.iter().map(|conv| conv.weight.elem_count()).sum::<usize>();
        let decoding = weights(&self.decoder) + self.to_frame.conv.weight.elem_count();
        let attention = self.to_frame.attention.as_ref();
        let attention = attention.map_or(0, |attention| attention.multiply_adds(frames_in, frames_out));
        let a_pixel = frames_in * weights(&self.encoder) + frames_out * decoding + attention;
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

    const SPEC: VideoSpec = VideoSpec { frames_in: 3, frames_out: 4, channels: 1, height: 8, width: 12 };

    /// Asserts that gradients of a loss reach every parameter, and that predictions have the shape of frames.
    fn learns(config: &ConvLstmConfig) {
        let params = candlepower::params::Params::new(3, DType::F32, &Device::Cpu);
        let model = ConvLstm::build(config, &SPEC, params.var_builder()).unwrap();
        let frames = Tensor::rand(0f32, 1., (2, 3, 1, 8, 12), &Device::Cpu).unwrap();
        let predicted = model.forward(&frames).unwrap();
        assert_eq!(predicted.dims(), [2, 4, 1, 8, 12]);
        let gradients = predicted.sqr().unwrap().mean_all().unwrap().backward().unwrap();
        for (name, var) in params.vars() {
            let gradient = gradients.get(&var).unwrap_or_else(|| panic!("no gradient of {name}"));
            let largest = gradient.abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
            // A key's bias shifts the scores of all times alike, so its gradient is zero.
            assert!(largest > 0. || name == "attention.key.bias", "the gradient of {name} is zero");
        }
    }

    #[test]
    fn gradients_reach_everything_with_either_option_and_both() {
        for (feed_frames_back, attention) in [(true, false), (false, true), (true, true)] {
            for patch in [1, 2] {
                let config =
                    ConvLstmConfig { hidden: 4, patch, feed_frames_back, attention, ..Default::default() };
                learns(&config);
            }
        }
    }

    /// Weight and bias of the convolution `name`.
    fn conv(params: &candlepower::params::Params, name: &str) -> (Tensor, Tensor) {
        let vars = params.vars();
        let get = |part: &str| {
            let name = format!("{name}.{part}");
            vars.iter().find(|(own, _)| *own == name).unwrap().1.as_tensor().clone()
        };
        (get("weight"), get("bias"))
    }

    #[test]
    fn frames_fed_back_are_those_of_a_loop_by_hand() {
        let params = candlepower::params::Params::new(3, DType::F32, &Device::Cpu);
        let config = ConvLstmConfig { hidden: 4, feed_frames_back: true, ..Default::default() };
        let model = ConvLstm::build(&config, &SPEC, params.var_builder()).unwrap();
        let frames = Tensor::rand(0f32, 1., (2, 3, 1, 8, 12), &Device::Cpu).unwrap();
        let convolve = |name: &str, x: &Tensor| {
            let (weight, bias) = conv(&params, name);
            let weight = if weight.rank() == 5 { weight.squeeze(2).unwrap() } else { weight };
            let y = x.conv2d(&weight, 1, 1, 1, 1).unwrap();
            y.broadcast_add(&bias.reshape((1, (), 1, 1)).unwrap()).unwrap()
        };
        let sigmoid = |x: &Tensor| candle_nn::ops::sigmoid(x).unwrap();
        let cell = |name: &str, x: &Tensor, (h, c): &(Tensor, Tensor)| {
            let gates = convolve(&format!("{name}_convlstm.conv"), &Tensor::cat(&[x, h], 1).unwrap());
            let gates = gates.chunk(4, 1).unwrap();
            let kept = (sigmoid(&gates[1]) * c).unwrap();
            let c = (kept + (sigmoid(&gates[0]) * gates[3].tanh().unwrap()).unwrap()).unwrap();
            ((sigmoid(&gates[2]) * c.tanh().unwrap()).unwrap(), c)
        };
        let zeros = Tensor::zeros((2, 4, 8, 12), DType::F32, &Device::Cpu).unwrap();
        let mut states = [(zeros.clone(), zeros.clone()), (zeros.clone(), zeros)];
        for t in 0..3 {
            let frame = frames.narrow(1, t, 1).unwrap().squeeze(1).unwrap();
            states[0] = cell("encoder_1", &frame, &states[0]);
            states[1] = cell("encoder_2", &states[0].0.clone(), &states[1]);
        }
        let mut frame = frames.narrow(1, 2, 1).unwrap().squeeze(1).unwrap();
        let mut expected = Vec::new();
        for _ in 0..4 {
            states[0] = cell("decoder_1", &frame, &states[0]);
            states[1] = cell("decoder_2", &states[0].0.clone(), &states[1]);
            frame = sigmoid(&convolve("decoder_CNN", &states[1].0));
            expected.push(frame.clone());
        }
        let expected = Tensor::stack(&expected, 1).unwrap();
        let difference = (model.forward(&frames).unwrap() - expected).unwrap().abs().unwrap();
        assert!(difference.max_all().unwrap().to_scalar::<f32>().unwrap() < 1e-6);
    }

    #[test]
    fn attention_to_equal_states_is_one_look_at_them() {
        let params = candlepower::params::Params::new(3, DType::F32, &Device::Cpu);
        let attention = Attention::new(4, params.var_builder()).unwrap();
        let outputs = Tensor::rand(-1f32, 1., (2, 3, 5, 6, 4), &Device::Cpu).unwrap();
        let state = Tensor::rand(-1f32, 1., (2, 1, 5, 6, 4), &Device::Cpu).unwrap();
        let often = attention.forward(&outputs, &state.repeat((1, 7, 1, 1, 1)).unwrap()).unwrap();
        let once = attention.forward(&outputs, &state).unwrap();
        let difference = (often - once).unwrap().abs().unwrap().max_all().unwrap();
        assert!(difference.to_scalar::<f32>().unwrap() < 1e-5);
    }

    #[test]
    fn operations_of_the_tutorials_model() {
        // Ten frames of 64 x 64 pixels, 3 x 3 kernels, two operations per multiply-add: three cells of 64 +
        // 64 channels to 4 x 64, one of 1 + 64, and a convolution of 64 channels to one.
        let by_hand = 10. * 4096. * 9. * 2. * (3. * 128. * 256. + 65. * 256. + 64.) / 1e9;
        let tutorial = gflops(ConvLstmConfig::default());
        assert!((tutorial - by_hand).abs() < 1e-9 && (tutorial - 84.8).abs() < 0.05, "{tutorial} GFLOP");
        // Patches of 4 x 4: a sixteenth of the pixels, and slightly more channels.
        let patched = gflops(ConvLstmConfig { patch: 4, ..Default::default() });
        assert!(patched > tutorial / 16. && patched < tutorial / 15., "{patched} GFLOP");
    }
}
