//! SVG-LP: stochastic video generation with a learned prior, a variational autoencoder (Denton and Fergus, ICML 2018).

use candle_core::{D, Tensor};
use candle_nn::Init;
use candlepower::metrics::video::{self, Pixels};
use candlepower::nn::channels_last::{
    BatchNorm, Conv2dOptions, ConvTranspose, ConvTranspose2dOptions, fold_frames, unfold_frames,
};
use candlepower::nn::{self, Activation, Conv, Linear, LstmCell, LstmState};
use candlepower::prelude::*;
use candlepower::seed::ChaCha8Rng;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::pictures::{log_futures, log_prediction};

/// How many futures of a sample are drawn in pictures.
const FUTURES_DRAWN: usize = 3;
/// Height and width of the frames that the convolutions are designed for.
const SIDE: usize = 64;

/// Statistics that encoder and decoder normalise by outside training.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Statistics {
    /// The batch's statistics, as in the reference: a sample's prediction depends on the other samples of its
    /// batch. A batch of one sample is normalised by the running statistics.
    Batch,
    /// The running statistics of training.
    Running,
}

/// Fields of `[module]` for `svg_lp`. The defaults are the published ones for Moving MNIST. The numbers of
/// input and predicted frames are the paper's `n_past` and `n_future`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct SvgLpConfig {
    /// Channels of the first convolution (`nf`); each further one doubles them.
    pub channels: usize,
    /// Features of a frame (`g_dim`).
    pub features: usize,
    /// Dimensions of the latent variable (`z_dim`).
    pub latent: usize,
    /// Width of the LSTMs (`rnn_size`).
    pub hidden: usize,
    /// Layers of the LSTM that predicts the next frame's features.
    pub predictor_layers: usize,
    /// Layers of the LSTM that infers the latent variable from the next frame (the posterior).
    pub posterior_layers: usize,
    /// Layers of the LSTM that predicts the latent variable from the previous frames (the prior).
    pub prior_layers: usize,
    /// Weight of the Kullback-Leibler divergence in the loss.
    pub beta: f64,
    /// Whether the decoder sees the previous frame's fine features in every step, instead of only those of
    /// the last input frame.
    pub last_frame_skip: bool,
    /// Statistics that encoder and decoder normalise by outside training.
    pub statistics: Statistics,
    /// Number of futures drawn for each validation sample; `mse` and `ssim` are means over them. From 2 on,
    /// `best_mse`, `best_ssim` and `best_psnr` score the best future of each sample, as in the paper.
    pub futures: usize,
}

impl Default for SvgLpConfig {
    fn default() -> Self {
        Self {
            channels: 64,
            features: 128,
            latent: 10,
            hidden: 256,
            predictor_layers: 2,
            posterior_layers: 1,
            prior_layers: 1,
            beta: 1e-4,
            last_frame_skip: false,
            statistics: Statistics::Batch,
            futures: 1,
        }
    }
}

impl SvgLpConfig {
    fn check(&self, spec: &VideoSpec) -> Result<()> {
        for (key, value) in [
            ("channels", self.channels),
            ("features", self.features),
            ("latent", self.latent),
            ("hidden", self.hidden),
            ("predictor_layers", self.predictor_layers),
            ("posterior_layers", self.posterior_layers),
            ("prior_layers", self.prior_layers),
            ("futures", self.futures),
        ] {
            if value == 0 {
                return Err(Error::setting(key, "expected at least 1, found 0"));
            }
        }
        if !(self.beta.is_finite() && self.beta >= 0.) {
            return Err(Error::setting(
                "beta",
                format!("expected a number of at least 0, found {}", self.beta),
            ));
        }
        if spec.frames_in < 2 && !self.last_frame_skip {
            let message = "with one input frame there are no skip connections otherwise: expected true";
            return Err(Error::setting("last_frame_skip", message));
        }
        if (spec.height, spec.width) != (SIDE, SIDE) {
            return Err(Error::msg(format!(
                "svg_lp is made for frames of {SIDE}x{SIDE}; the data has {}x{}",
                spec.height, spec.width
            )));
        }
        Ok(())
    }
}

/// Initial weights of convolutions and linear layers.
const DRAWN: Init = Init::Randn { mean: 0., stdev: 0.02 };

fn norm(channels: usize, vb: VarBuilder) -> Result<BatchNorm> {
    BatchNorm::new(channels, Init::Randn { mean: 1., stdev: 0.02 }, vb)
}

/// The statistics that a pass normalises by.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Norm {
    /// The batch's statistics, which are taken into the running ones `times` times in training.
    Batch { times: usize },
    /// The running statistics.
    Running,
}

impl Norm {
    fn apply(self, norm: &BatchNorm, x: &Tensor) -> Result<Tensor> {
        match self {
            Self::Batch { times } => norm.by_batch(x, times),
            Self::Running => norm.by_running(x),
        }
    }
}

const LEAKY: Activation = Activation::LeakyRelu(0.2);

/// Five convolutions; each except the last halves the size (DCGAN, Radford et al. 2016).
struct Encoder(Vec<(Conv, BatchNorm)>);

impl Encoder {
    fn new(config: &SvgLpConfig, inputs: usize, vb: VarBuilder) -> Result<Self> {
        let n = config.channels;
        let widths = [inputs, n, 2 * n, 4 * n, 8 * n, config.features];
        let layer = |i: usize| {
            let vb = vb.pp(format!("c{}", i + 1));
            let vb = if i < 4 { vb.pp("main") } else { vb };
            let conv = Conv::drawn(&[widths[i + 1], widths[i], 4, 4], DRAWN, vb.pp(0))?;
            let norm = norm(widths[i + 1], vb.pp(1))?;
            Ok((conv, if i < 4 { norm.then(LEAKY) } else { norm }))
        };
        Ok(Self((0..5).map(layer).collect::<Result<_>>()?))
    }

    /// (B, 64, 64, C) to features (B, g) in (-1, 1), and the outputs of all layers except the last.
    fn forward(&self, frame: &Tensor, mode: Norm) -> Result<(Tensor, Vec<Tensor>)> {
        let (mut x, mut skips) = (frame.clone(), Vec::with_capacity(4));
        for (i, (conv, norm)) in self.0.iter().enumerate() {
            let last = i == 4;
            let (stride, padding) = if last { (1, 0) } else { (2, 1) };
            x = conv.channels_last(&x, Conv2dOptions { stride, padding, ..Default::default() })?;
            x = mode.apply(norm, &x)?;
            if !last {
                skips.push(x.clone());
            }
        }
        Ok((x.flatten_from(1)?.tanh()?, skips))
    }
}

/// The mirrored encoder; each layer except the first also sees the output of the encoder layer of its size.
struct Decoder {
    layers: Vec<(ConvTranspose, BatchNorm)>,
    to_frame: ConvTranspose,
}

impl Decoder {
    fn new(config: &SvgLpConfig, outputs: usize, vb: VarBuilder) -> Result<Self> {
        let n = config.channels;
        let widths = [(config.features, 8 * n), (16 * n, 4 * n), (8 * n, 2 * n), (4 * n, n)];
        let layer = |(i, (inputs, outputs)): (usize, &(usize, usize))| {
            let vb = vb.pp(format!("upc{}", i + 1));
            let vb = if i == 0 { vb } else { vb.pp("main") };
            let conv = ConvTranspose::new([*inputs, *outputs, 4, 4], DRAWN, vb.pp(0))?;
            Ok((conv, norm(*outputs, vb.pp(1))?.then(LEAKY)))
        };
        Ok(Self {
            layers: widths.iter().enumerate().map(layer).collect::<Result<_>>()?,
            to_frame: ConvTranspose::new([2 * n, outputs, 4, 4], DRAWN, vb.pp("upc5.0"))?,
        })
    }

    /// (B, g) and the encoder's `skips` to a frame (B, 64, 64, C) in (0, 1).
    fn forward(&self, features: &Tensor, skips: &[Tensor], mode: Norm) -> Result<Tensor> {
        let double = ConvTranspose2dOptions { stride: 2, padding: 1, ..Default::default() };
        let (batch, width) = features.dims2()?;
        let mut x = features.reshape((batch, 1, 1, width))?;
        let mut skips = skips.iter().rev();
        for (i, (conv, norm)) in self.layers.iter().enumerate() {
            let options = if i == 0 { ConvTranspose2dOptions::default() } else { double };
            x = mode.apply(norm, &conv.channels_last(&x, options)?)?;
            if let Some(skip) = skips.next() {
                x = Tensor::cat(&[&x, skip], D::Minus1)?;
            }
        }
        Ok(candle_nn::ops::sigmoid(&self.to_frame.channels_last(&x, double)?)?)
    }
}

/// A linear layer, then stacked LSTM cells.
struct Lstm {
    embed: Linear,
    cells: Vec<LstmCell>,
}

/// The states of an LSTM's cells.
type Memory = Vec<Option<LstmState>>;

fn linear(inputs: usize, outputs: usize, vb: VarBuilder) -> Result<Linear> {
    Linear::with_init(inputs, outputs, DRAWN, Some(Init::Const(0.)), vb)
}

impl Lstm {
    fn new(inputs: usize, hidden: usize, layers: usize, vb: VarBuilder) -> Result<Self> {
        let cell = |i: usize| LstmCell::new(hidden, hidden, vb.pp("lstm").pp(i));
        let embed = linear(inputs, hidden, vb.pp("embed"))?;
        Ok(Self { embed, cells: (0..layers).map(cell).collect::<Result<_>>()? })
    }

    fn start(&self) -> Memory {
        vec![None; self.cells.len()]
    }

    /// (B, inputs) to (B, hidden), of the same dtype.
    fn step(&self, x: &Tensor, memory: &mut Memory) -> Result<Tensor> {
        let (dtype, mut x) = (x.dtype(), self.embed.forward(x)?);
        for (cell, state) in self.cells.iter().zip(memory) {
            let next = cell.step(&x, state.as_ref())?;
            x = next.h.clone();
            *state = Some(next);
        }
        Ok(x.to_dtype(dtype)?)
    }
}

/// An LSTM that outputs a distribution of the latent variable.
struct GaussianLstm {
    lstm: Lstm,
    mean: Linear,
    log_variance: Linear,
}

/// A normal distribution with independent dimensions: mean and log variance, each (B, z), at least f32.
#[derive(Debug, Clone)]
pub struct Gaussian {
    /// μ.
    pub mean: Tensor,
    /// log σ².
    pub log_variance: Tensor,
}

impl Gaussian {
    /// The sample μ + σ ε for this noise ε.
    pub fn at(&self, noise: &Tensor) -> Result<Tensor> {
        let deviation = (&self.log_variance * 0.5)?.exp()?;
        Ok((&self.mean + (deviation * noise)?)?)
    }

    /// The Kullback-Leibler divergence of this distribution from `prior`, summed over the dimensions and
    /// averaged over the batch: `½ (log σ²_p - log σ²) + (σ² + (μ - μ_p)²) / (2 σ²_p) - ½`.
    pub fn divergence(&self, prior: &Gaussian) -> Result<Tensor> {
        let logs = (&prior.log_variance - &self.log_variance)?;
        let spread = (self.log_variance.exp()? + (&self.mean - &prior.mean)?.sqr()?)?;
        let each = ((logs + (spread / prior.log_variance.exp()?)?)? * 0.5)?;
        Ok((each - 0.5)?.sum(D::Minus1)?.mean_all()?)
    }
}

impl GaussianLstm {
    fn new(config: &SvgLpConfig, layers: usize, vb: VarBuilder) -> Result<Self> {
        Ok(Self {
            lstm: Lstm::new(config.features, config.hidden, layers, vb.clone())?,
            mean: linear(config.hidden, config.latent, vb.pp("mu_net"))?,
            log_variance: linear(config.hidden, config.latent, vb.pp("logvar_net"))?,
        })
    }

    fn step(&self, x: &Tensor, memory: &mut Memory) -> Result<Gaussian> {
        let h = self.lstm.step(x, memory)?;
        let wide = |x: Tensor| if x.dtype() == DType::F64 { Ok(x) } else { x.to_dtype(DType::F32) };
        Ok(Gaussian {
            mean: wide(self.mean.forward(&h)?)?,
            log_variance: wide(self.log_variance.forward(&h)?)?,
        })
    }
}

/// The result of a pass over frames whose future is known.
pub struct Reconstruction {
    /// The reconstructed frames after the first, (B, T - 1, C, H, W).
    pub frames: Tensor,
    /// The posterior of each step, which knows the next frame.
    pub posterior: Vec<Gaussian>,
    /// The prior of each step, which does not.
    pub prior: Vec<Gaussian>,
    /// The latent variable of each step, (B, z).
    pub latent: Vec<Tensor>,
    /// The sum over the steps of the mean squared error.
    pub mse: Tensor,
    /// The sum over the steps of the posterior's divergence from the prior.
    pub divergence: Tensor,
}

/// SVG-LP. A frame is encoded to features. From them and a latent variable, which stands for what is
/// unpredictable, an LSTM predicts the next frame's features; these are decoded together with the fine
/// features of an input frame. In training the latent variable is inferred from the next frame, and a prior
/// learns to predict it from the previous frames. In prediction it is sampled from the prior, so each sample
/// gives another future. Parameters have the names of the authors' code.
pub struct SvgLp {
    encoder: Encoder,
    decoder: Decoder,
    predictor: Lstm,
    predicted: Linear,
    posterior: GaussianLstm,
    prior: GaussianLstm,
    config: SvgLpConfig,
    spec: VideoSpec,
}

impl SvgLp {
    fn mode(&self, batch: usize) -> Norm {
        match self.config.statistics {
            Statistics::Batch if batch > 1 => Norm::Batch { times: 0 },
            _ => Norm::Running,
        }
    }

    /// Noise for the latent variables of `steps` steps, each (B, z).
    fn noise(
        &self,
        steps: usize,
        batch: usize,
        rng: &mut ChaCha8Rng,
        device: &Device,
    ) -> Result<Vec<Tensor>> {
        (0..steps).map(|_| nn::normal((batch, self.config.latent), rng, device)).collect()
    }

    /// Predicts the next frame's features from this frame's features and the latent variable.
    fn predict_features(&self, features: &Tensor, latent: &Tensor, memory: &mut Memory) -> Result<Tensor> {
        let x = Tensor::cat(&[features, &latent.to_dtype(features.dtype())?], 1)?;
        let h = self.predictor.step(&x, memory)?;
        Ok(self.predicted.forward(&h)?.tanh()?)
    }

    /// Reconstructs frames (B, T, C, H, W) with this noise for the T - 1 latent variables. With `training`,
    /// normalises by the batch and updates the running statistics.
    pub fn reconstruct(&self, frames: &Tensor, noise: &[Tensor], training: bool) -> Result<Reconstruction> {
        let (batch, times, ..) = frames.dims5()?;
        let images = split_frames(frames)?;
        let mode = |times: usize| if training { Norm::Batch { times } } else { self.mode(batch) };
        let (mut predictor, mut posterior, mut prior) =
            (self.predictor.start(), self.posterior.lstm.start(), self.prior.lstm.start());
        let (mut frames, mut latents, mut posteriors, mut priors) = (vec![], vec![], vec![], vec![]);
        let (mut mse, mut divergence): (Option<Tensor>, Option<Tensor>) = (None, None);
        let (mut features, first_skips) = self.encoder.forward(&images[0], mode(1))?;
        let (mut skips, mut next_skips) = (first_skips.clone(), first_skips);
        for t in 1..times {
            if self.config.last_frame_skip || t < self.spec.frames_in {
                skips = next_skips;
            }
            // The reference encodes each frame twice, as the next frame and as the current one. Once is
            // enough, except that the running statistics see it twice.
            let seen = if t + 1 < times { 2 } else { 1 };
            let (next, its_skips) = self.encoder.forward(&images[t], mode(seen))?;
            let inferred = self.posterior.step(&next, &mut posterior)?;
            let guessed = self.prior.step(&features, &mut prior)?;
            let latent = inferred.at(&noise[t - 1])?;
            let predicted = self.predict_features(&features, &latent, &mut predictor)?;
            let frame = self.decoder.forward(&predicted, &skips, mode(1))?;
            add(&mut mse, nn::mse(&frame, &images[t])?)?;
            add(&mut divergence, inferred.divergence(&guessed)?)?;
            frames.push(frame);
            latents.push(latent);
            posteriors.push(inferred);
            priors.push(guessed);
            (features, next_skips) = (next, its_skips);
        }
        let (Some(mse), Some(divergence)) = (mse, divergence) else {
            return Err(Error::msg("svg_lp needs at least two frames"));
        };
        let frames = join_frames(&frames)?;
        Ok(Reconstruction { frames, posterior: posteriors, prior: priors, latent: latents, mse, divergence })
    }

    /// Generates one future: the `frames_out` frames after `frames` (B, T_in, C, H, W), with this noise for the T_in +
    /// frames_out - 1 latent variables. Those of the input frames are inferred, the others are sampled from the prior.
    pub fn generate(
        &self,
        frames: &Tensor,
        frames_out: usize,
        noise: &[Tensor],
        mode: Statistics,
    ) -> Result<Tensor> {
        let (batch, given, ..) = frames.dims5()?;
        let mode = match mode {
            Statistics::Batch if batch > 1 => Norm::Batch { times: 0 },
            _ => Norm::Running,
        };
        let images = split_frames(frames)?;
        let (mut predictor, mut posterior, mut prior) =
            (self.predictor.start(), self.posterior.lstm.start(), self.prior.lstm.start());
        let mut made = Vec::with_capacity(frames_out);
        let (mut features, mut next_skips) = self.encoder.forward(&images[0], mode)?;
        let mut skips = next_skips.clone();
        for t in 1..given + frames_out {
            if self.config.last_frame_skip || t < given {
                skips = next_skips;
            }
            let guessed = self.prior.step(&features, &mut prior)?;
            let next = match images.get(t) {
                Some(image) => {
                    let next = self.encoder.forward(image, mode)?;
                    let latent = self.posterior.step(&next.0, &mut posterior)?.at(&noise[t - 1])?;
                    self.predict_features(&features, &latent, &mut predictor)?;
                    next
                }
                None => {
                    let latent = guessed.at(&noise[t - 1])?;
                    let predicted = self.predict_features(&features, &latent, &mut predictor)?;
                    made.push(self.decoder.forward(&predicted, &skips, mode)?);
                    if t + 1 == given + frames_out {
                        break;
                    }
                    self.encoder.forward(&made[t - given], mode)?
                }
            };
            (features, next_skips) = next;
        }
        join_frames(&made)
    }

    /// One future of a batch, (B, T_out, C, H, W).
    fn future(&self, frames: &Tensor, step: &Step, index: usize) -> Result<Tensor> {
        let VideoSpec { frames_in, frames_out, .. } = self.spec;
        let mut rng = step.rng(&format!("future {index}"));
        let noise = self.noise(frames_in + frames_out - 1, frames.dim(0)?, &mut rng, frames.device())?;
        self.generate(frames, frames_out, &noise, self.config.statistics)
    }

    /// The reconstruction error plus beta times the divergence of the posterior from the prior.
    fn loss(&self, batch: &Video, step: &mut Step) -> Result<Tensor> {
        let frames = Tensor::cat(&[&batch.input, &batch.target.to_dtype(batch.input.dtype())?], 1)?;
        let (size, times, ..) = frames.dims5()?;
        let noise = self.noise(times - 1, size, &mut step.rng("posterior"), frames.device())?;
        let pass = self.reconstruct(&frames, &noise, step.is_training())?;
        let mse = match batch.mask {
            // Masked values have no error.
            Some(_) => (batch.mse(&pass.frames)? * (times - 1) as f64)?,
            None => pass.mse,
        };
        step.log("reconstruction", &(&mse / (times - 1) as f64)?);
        step.log("divergence", &pass.divergence);
        if step.is_training() {
            let future = pass.frames.narrow(1, self.spec.frames_in - 1, self.spec.frames_out)?;
            log_prediction("reconstruction", batch, &future, step)?;
        }
        Ok((mse + (pass.divergence * self.config.beta)?)?)
    }
}

/// The frames of a batch (B, T, C, H, W), one tensor per time, channels last.
fn split_frames(frames: &Tensor) -> Result<Vec<Tensor>> {
    (0..frames.dim(1)?).map(|t| fold_frames(&frames.narrow(1, t, 1)?.contiguous()?)).collect()
}

/// Undoes [`split_frames`].
fn join_frames(frames: &[Tensor]) -> Result<Tensor> {
    let frames = frames.iter().map(|frame| unfold_frames(frame, 1)).collect::<Result<Vec<_>>>()?;
    Ok(Tensor::cat(&frames, 1)?)
}

fn add(sum: &mut Option<Tensor>, x: Tensor) -> Result<()> {
    *sum = Some(match sum.take() {
        Some(sum) => (sum + x)?,
        None => x,
    });
    Ok(())
}

impl Build for SvgLp {
    type Config = SvgLpConfig;

    fn build(config: &SvgLpConfig, spec: &VideoSpec, vb: VarBuilder) -> Result<Self> {
        config.check(spec)?;
        let predictor = vb.pp("frame_predictor");
        let (features, hidden) = (config.features, config.hidden);
        let inputs = features + config.latent;
        Ok(Self {
            encoder: Encoder::new(config, spec.channels, vb.pp("encoder"))?,
            decoder: Decoder::new(config, spec.channels, vb.pp("decoder"))?,
            predictor: Lstm::new(inputs, hidden, config.predictor_layers, predictor.clone())?,
            predicted: linear(hidden, features, predictor.pp("output.0"))?,
            posterior: GaussianLstm::new(config, config.posterior_layers, vb.pp("posterior"))?,
            prior: GaussianLstm::new(config, config.prior_layers, vb.pp("prior"))?,
            config: config.clone(),
            spec: *spec,
        })
    }
}

/// The best of several futures of each sample, averaged over samples. `values[future][sample]` is a metric,
/// averaged over frames.
fn best(values: &[Vec<f64>], better: fn(f64, f64) -> f64) -> f64 {
    let samples = values.first().map_or(0, Vec::len);
    let of = |sample: usize| values.iter().map(|future| future[sample]).reduce(better).unwrap_or(f64::NAN);
    (0..samples).map(of).sum::<f64>() / samples as f64
}

impl Module for SvgLp {
    type Batch = Video;

    fn training_step(&self, batch: &Video, step: &mut Step) -> Result<Tensor> {
        self.loss(batch, step)
    }

    fn validation_step(&self, batch: &Video, step: &mut Step) -> Result<Tensor> {
        let loss = self.loss(batch, step)?;
        let drawn = if step.images_due() { FUTURES_DRAWN } else { 0 };
        let futures = (0..self.config.futures.max(drawn)).map(|i| self.future(&batch.input, step, i));
        let futures = futures.collect::<Result<Vec<_>>>()?;
        if step.images_due() {
            log_futures("futures", batch, &futures[..drawn], step)?;
        }
        let futures = futures[..self.config.futures].iter().map(|future| batch.known(future));
        let futures = futures.collect::<Result<Vec<_>>>()?;
        let by_sample =
            |metric: &dyn Fn(&Tensor, &Tensor) -> Result<video::PerFrame>| -> Result<Vec<Vec<f64>>> {
                let frames = self.spec.frames_out;
                let means = |values: Vec<f64>| {
                    values.chunks(frames).map(|c| c.iter().sum::<f64>() / frames as f64).collect()
                };
                futures.iter().map(|(future, target)| Ok(means(metric(future, target)?.values))).collect()
            };
        let mse = by_sample(&|future, target| video::mse(future, target, Pixels::Mean))?;
        let ssim = by_sample(&|future, target| video::ssim(future, target, 1.))?;
        let mean = |values: &[Vec<f64>]| {
            values.iter().flatten().sum::<f64>() / values.iter().flatten().count() as f64
        };
        let mut log = |name: &str, value: f64| -> Result<()> {
            step.log(name, &Tensor::new(value as f32, &Device::Cpu)?);
            Ok(())
        };
        log("mse", mean(&mse))?;
        log("ssim", mean(&ssim))?;
        if futures.len() > 1 {
            let psnr = by_sample(&|future, target| video::psnr(future, target))?;
            log("best_mse", best(&mse, f64::min))?;
            log("best_ssim", best(&ssim, f64::max))?;
            log("best_psnr", best(&psnr, f64::max))?;
        }
        Ok(loss)
    }

    /// Predicts one future.
    fn predict_step(&self, batch: &Video, step: &mut Step) -> Result<Tensor> {
        self.future(&batch.input, step, 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_published_size() {
        let spec = VideoSpec { frames_in: 5, frames_out: 10, channels: 1, height: 64, width: 64 };
        let model = Model::build::<SvgLp>(&SvgLpConfig::default(), &spec, 1, &Device::Cpu).unwrap();
        assert_eq!(model.params().count(), 12_614_057);
    }

    #[test]
    fn the_best_of_each_sample_counts() {
        let values = [vec![1., 5.], vec![2., 3.]];
        assert_eq!((best(&values, f64::min), best(&values, f64::max)), (2., 3.5));
    }

    #[test]
    fn equal_distributions_do_not_diverge() {
        let tensor = |x: f32| Tensor::new(&[[x, 2. * x]], &Device::Cpu).unwrap();
        let gaussian =
            |mean, log_variance| Gaussian { mean: tensor(mean), log_variance: tensor(log_variance) };
        let divergence = |a: Gaussian, b: Gaussian| a.divergence(&b).unwrap().to_scalar::<f32>().unwrap();
        assert!(divergence(gaussian(0.3, 0.5), gaussian(0.3, 0.5)).abs() < 1e-6);
        // Means differ by 1 and 2, variances are 1: half of 1 + 4.
        assert!((divergence(gaussian(1., 0.), gaussian(0., 0.)) - 2.5).abs() < 1e-6);
    }
}
