//! SimVP: video prediction without recurrence (Gao, Tan, Wu and Li, CVPR 2022; with gSTA: Tan et al. 2022).

mod incep_u;
mod meta;

use candle_core::Tensor;
use candle_nn::{Init, VarBuilder};
use candlepower::nn::channels_last::{Conv2dOptions, GroupNorm, fold_frames, pixel_shuffle, unfold_frames};
use candlepower::nn::{Activation, Conv};
use candlepower::prelude::*;
use candlepower::seed::ChaCha8Rng;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

pub(crate) use self::meta::{Gate, GateBuilder, LargeKernel, conv1x1};
use self::{incep_u::IncepU, meta::Meta};
use crate::pictures::log_prediction;

/// The network that learns how features move from frame to frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum TranslatorKind {
    /// Gated spatio-temporal attention: large kernels that gate (SimVP v2).
    Gsta,
    /// A U-Net of inception blocks (SimVP v1).
    Incepu,
}

/// Fields of `[module]` for `sim_vp`. The defaults are the published ones for Moving MNIST.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct SimVpConfig {
    /// Channels of a frame's features (`hid_S`), even.
    pub spatial_channels: usize,
    /// Channels of the translator, which sees all frames at once (`hid_T`).
    pub temporal_channels: usize,
    /// Layers of encoder and decoder (`N_S`), even: every second one halves or doubles the size.
    pub spatial_layers: usize,
    /// Blocks of the translator (`N_T`), at least 2.
    pub temporal_layers: usize,
    /// The network that learns the motion.
    pub translator: TranslatorKind,
    /// Hidden channels of a gSTA block's perceptron, as a multiple of the block's channels.
    pub mlp_ratio: f64,
    /// Stochastic depth of the first and the last gSTA block; blocks between them are interpolated linearly.
    /// The published model has 0.01 in its first block even if its `drop_path` is 0.
    pub drop_path: [f64; 2],
}

impl Default for SimVpConfig {
    fn default() -> Self {
        Self {
            spatial_channels: 64,
            temporal_channels: 512,
            spatial_layers: 4,
            temporal_layers: 8,
            translator: TranslatorKind::Gsta,
            mlp_ratio: 8.,
            drop_path: [0.01, 0.],
        }
    }
}

impl SimVpConfig {
    fn check(&self, spec: &VideoSpec) -> Result<()> {
        let even = [("spatial_channels", self.spatial_channels), ("spatial_layers", self.spatial_layers)];
        if let Some((key, value)) =
            even.into_iter().find(|(_, value)| *value == 0 || !value.is_multiple_of(2))
        {
            return Err(Error::setting(key, format!("expected an even number from 2, found {value}")));
        }
        if self.temporal_channels == 0 {
            return Err(Error::setting("temporal_channels", "expected at least 1, found 0"));
        }
        if self.temporal_layers < 2 {
            let message = format!("expected at least 2, found {}", self.temporal_layers);
            return Err(Error::setting("temporal_layers", message));
        }
        let shrunk = u32::try_from(self.spatial_layers / 2).ok().and_then(|n| 2usize.checked_pow(n));
        let VideoSpec { height, width, .. } = *spec;
        if !shrunk.is_some_and(|shrunk| height.is_multiple_of(shrunk) && width.is_multiple_of(shrunk)) {
            let message = format!(
                "frames of {height}x{width} cannot be halved {} times; expected fewer layers",
                self.spatial_layers / 2
            );
            return Err(Error::setting("spatial_layers", message));
        }
        if !(self.mlp_ratio.is_finite() && self.mlp_ratio > 0.) {
            return Err(Error::setting(
                "mlp_ratio",
                format!("expected a number above 0, found {}", self.mlp_ratio),
            ));
        }
        if !self.drop_path.iter().all(|share| (0. ..1.).contains(share)) {
            return Err(Error::setting("drop_path", "expected two numbers in [0, 1)"));
        }
        Ok(())
    }
}

/// A convolution, group normalisation and SiLU; it may halve or double the size.
struct Layer {
    conv: Conv,
    norm: GroupNorm,
    resize: Resize,
}

#[derive(Clone, Copy, PartialEq)]
enum Resize {
    Keep,
    Halve,
    Double,
}

impl Layer {
    fn new(inputs: usize, outputs: usize, resize: Resize, vb: VarBuilder) -> Result<Self> {
        const GROUPS: usize = 2;
        let vb = vb.pp("conv");
        // A layer that doubles the size computes four times the channels, which become pixels.
        let (conv, widen) = if resize == Resize::Double { ("conv.0", 4) } else { ("conv", 1) };
        let init = Init::Randn { mean: 0., stdev: 0.02 };
        let conv = Conv::drawn(&[widen * outputs, inputs, 3, 3], init, vb.pp(conv))?;
        Ok(Self {
            conv,
            norm: GroupNorm::new(GROUPS, outputs, vb.pp("norm"))?.then(Activation::Silu),
            resize,
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let stride = if self.resize == Resize::Halve { 2 } else { 1 };
        let mut x = self.conv.channels_last(x, Conv2dOptions { stride, padding: 1, ..Default::default() })?;
        if self.resize == Resize::Double {
            x = pixel_shuffle(&x, 2)?;
        }
        self.norm.forward(&x)
    }
}

enum Translator {
    Meta(Meta),
    IncepU(IncepU),
}

/// Encoder, translator, decoder: T_in frames to T_in frames.
pub(crate) struct Network {
    encoder: Vec<Layer>,
    translator: Translator,
    decoder: Vec<Layer>,
    to_frame: Conv,
}

impl Network {
    /// Creates the network. `gate` makes the part of a gSTA block that differs between variants.
    pub(crate) fn new(
        config: &SimVpConfig,
        spec: &VideoSpec,
        gate: &GateBuilder,
        vb: VarBuilder,
    ) -> Result<Self> {
        config.check(spec)?;
        let width = config.spatial_channels;
        let odd = |i: usize| i % 2 == 1;
        let encoder = |i: usize| {
            let inputs = if i == 0 { spec.channels } else { width };
            let resize = if odd(i) { Resize::Halve } else { Resize::Keep };
            Layer::new(inputs, width, resize, vb.pp("enc.enc").pp(i))
        };
        let decoder = |i: usize| {
            let resize = if odd(i) { Resize::Keep } else { Resize::Double };
            Layer::new(width, width, resize, vb.pp("dec.dec").pp(i))
        };
        let features = spec.frames_in * width;
        let hidden = vb.pp("hid");
        let translator = match config.translator {
            TranslatorKind::Gsta => Translator::Meta(Meta::new(config, features, gate, hidden)?),
            TranslatorKind::Incepu => Translator::IncepU(IncepU::new(config, features, hidden)?),
        };
        Ok(Self {
            encoder: (0..config.spatial_layers).map(encoder).collect::<Result<_>>()?,
            translator,
            decoder: (0..config.spatial_layers).map(decoder).collect::<Result<_>>()?,
            to_frame: Conv::new(&[spec.channels, width, 1, 1], vb.pp("dec.readout"))?,
        })
    }

    /// (B, T, C, H, W) to the T frames that follow. In training, the generator `training` selects the samples
    /// that skip a branch.
    fn frames_after(&self, frames: &Tensor, training: Option<&mut ChaCha8Rng>) -> Result<Tensor> {
        let (batch, times, ..) = frames.dims5()?;
        let mut x = fold_frames(frames)?;
        let mut first = None;
        for layer in &self.encoder {
            x = layer.forward(&x)?;
            first.get_or_insert_with(|| x.clone());
        }
        let (_, height, width, channels) = x.dims4()?;
        // Concatenate the channels of all frames: channel t*C + c.
        let x = x.reshape((batch, times, height, width, channels))?.permute((0, 2, 3, 1, 4))?;
        let x = x.reshape((batch, height, width, times * channels))?;
        let x = match &self.translator {
            Translator::Meta(meta) => meta.forward(x, training)?,
            Translator::IncepU(unet) => unet.forward(x)?,
        };
        let x = x.reshape((batch, height, width, times, channels))?.permute((0, 3, 1, 2, 4))?;
        let mut x = x.reshape((batch * times, height, width, channels))?;
        for (i, layer) in self.decoder.iter().enumerate() {
            if let (true, Some(first)) = (i + 1 == self.decoder.len(), &first) {
                x = (x + first)?;
            }
            x = layer.forward(&x)?;
        }
        unfold_frames(&self.to_frame.channels_last(&x, Conv2dOptions::default())?, times)
    }

    /// (B, T_in, C, H, W) to the `frames_out` frames that follow. The network predicts T_in frames at a time;
    /// if more are needed, it is applied to its own output.
    pub(crate) fn forward(
        &self,
        frames: &Tensor,
        frames_out: usize,
        mut training: Option<&mut ChaCha8Rng>,
    ) -> Result<Tensor> {
        let mut parts = vec![self.frames_after(frames, training.as_deref_mut())?];
        let times = frames.dim(1)?;
        while let Some(last) = parts.last().filter(|_| parts.len() * times < frames_out) {
            parts.push(self.frames_after(last, training.as_deref_mut())?);
        }
        let all = if parts.len() == 1 { parts.remove(0) } else { Tensor::cat(&parts, 1)? };
        Ok(all.narrow(1, 0, frames_out)?)
    }

    /// Operations of one sample's forward pass; see [`Module::flops`].
    pub(crate) fn flops(&self, spec: &VideoSpec) -> f64 {
        let pixels = (spec.height * spec.width) as f64;
        let (mut area, mut spatial) = (pixels, 0.);
        for layer in self.encoder.iter().chain(&self.decoder) {
            area /= if layer.resize == Resize::Halve { 4. } else { 1. };
            spatial += area * layer.conv.weight.elem_count() as f64;
            area *= if layer.resize == Resize::Double { 4. } else { 1. };
        }
        spatial += pixels * self.to_frame.weight.elem_count() as f64;
        let halvings = self.encoder.iter().filter(|layer| layer.resize == Resize::Halve).count();
        let weights = match &self.translator {
            Translator::Meta(meta) => meta.weights(),
            Translator::IncepU(unet) => unet.weights(),
        };
        let temporal = pixels / 4f64.powi(halvings as i32) * weights as f64;
        let passes = spec.frames_out.div_ceil(spec.frames_in) as f64;
        2. * passes * (spec.frames_in as f64 * spatial + temporal)
    }
}

/// Returns the mean squared error, and draws a picture if one is due. In validation, logs the error as `mse`
/// and the structural similarity (data range 1) as `ssim`.
pub(crate) fn compare(batch: &Video, prediction: &Tensor, step: &mut Step) -> Result<Tensor> {
    log_prediction("prediction", batch, prediction, step)?;
    let mse = batch.mse(prediction)?;
    if !step.is_training() {
        step.log("mse", &mse);
        let (prediction, target) = batch.known(prediction)?;
        let ssim = candlepower::metrics::video::ssim(&prediction, &target, 1.)?.mean();
        step.log("ssim", &Tensor::new(ssim as f32, &Device::Cpu)?);
    }
    Ok(mse)
}

/// SimVP. Frames are encoded one by one, a translator maps the features of all of them to those of the frames that
/// follow, and these are decoded one by one, with the first layer's features added. Parameters have OpenSTL's names.
pub struct SimVp {
    network: Network,
    spec: VideoSpec,
}

impl SimVp {
    /// Frames (B, T_in, C, H, W) to the T_out frames that follow, (B, T_out, C, H, W). With `training`, batch
    /// normalisation uses the batch's statistics, and the generator selects the samples that skip a branch.
    pub fn forward(&self, frames: &Tensor, training: Option<&mut ChaCha8Rng>) -> Result<Tensor> {
        self.network.forward(frames, self.spec.frames_out, training)
    }
}

impl Build for SimVp {
    type Config = SimVpConfig;

    fn build(config: &SimVpConfig, spec: &VideoSpec, vb: VarBuilder) -> Result<Self> {
        Ok(Self { network: Network::new(config, spec, &meta::gsta, vb)?, spec: *spec })
    }
}

impl Module for SimVp {
    type Batch = Video;

    fn training_step(&self, batch: &Video, step: &mut Step) -> Result<Tensor> {
        let prediction = self.forward(&batch.input, Some(&mut step.rng("drop path")))?;
        compare(batch, &prediction, step)
    }

    fn validation_step(&self, batch: &Video, step: &mut Step) -> Result<Tensor> {
        compare(batch, &self.forward(&batch.input, None)?, step)
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
        // Parameters, and multiply-adds in 10^9, measured on OpenSTL's models.
        for (translator, parameters, gmac) in
            [(TranslatorKind::Gsta, 46_769_665, 16.47), (TranslatorKind::Incepu, 57_946_113, 19.33)]
        {
            let config = SimVpConfig { translator, ..Default::default() };
            let model = Model::build::<SimVp>(&config, &spec, 1, &Device::Cpu).unwrap();
            assert_eq!(model.params().count(), parameters);
            let own = model.evaluation().flops().unwrap() / 2e9;
            assert!((own / gmac - 1.).abs() < 0.01, "{translator:?}: {own} GMAC, not {gmac}");
        }
    }

    #[test]
    fn sizes_that_do_not_fit_are_refused() {
        let spec = VideoSpec { frames_in: 2, frames_out: 2, channels: 1, height: 12, width: 12 };
        let refused = |config: SimVpConfig| {
            let vb = candlepower::params::Params::new(0, DType::F32, &Device::Cpu).var_builder();
            SimVp::build(&config, &spec, vb).err().unwrap().to_string()
        };
        let config = || SimVpConfig { spatial_channels: 4, temporal_channels: 8, ..Default::default() };
        assert_eq!(
            refused(SimVpConfig { spatial_layers: 6, ..config() }),
            "`spatial_layers`: frames of 12x12 cannot be halved 3 times; expected fewer layers"
        );
        assert_eq!(
            refused(SimVpConfig { spatial_channels: 3, ..config() }),
            "`spatial_channels`: expected an even number from 2, found 3"
        );
        assert_eq!(
            refused(SimVpConfig { temporal_layers: 1, ..config() }),
            "`temporal_layers`: expected at least 2, found 1"
        );
        let translator = TranslatorKind::Incepu;
        assert_eq!(
            refused(SimVpConfig { translator, spatial_channels: 6, temporal_channels: 16, ..config() }),
            "`spatial_channels`: 12 channels of 2 frames do not make 8 groups"
        );
    }
}
