//! Translators made of blocks with large-kernel attention: SimVP's gSTA, and the variant that [`Tau`](crate::Tau) uses.

use candle_core::Tensor;
use candle_nn::Init;
use candlepower::nn::channels_last::{BatchNorm, Conv2dOptions, scale_channels};
use candlepower::nn::{self, Conv};
use candlepower::prelude::*;
use candlepower::seed::ChaCha8Rng;

use super::SimVpConfig;

/// The initial values of the published blocks: normal, with standard deviation sqrt(2 / fan-out).
fn init(outputs: usize, side: usize, groups: usize) -> Init {
    Init::Randn { mean: 0., stdev: (2. * groups as f64 / (side * side * outputs) as f64).sqrt() }
}

/// A 1x1 convolution.
pub(crate) fn conv1x1(conv: &Conv, x: &Tensor) -> Result<Tensor> {
    conv.channels_last(x, Conv2dOptions::default())
}

/// A depthwise convolution with 'same' padding.
fn depthwise(conv: &Conv, x: &Tensor, dilation: usize) -> Result<Tensor> {
    let (groups, side) = (conv.weight.dim(0)?, conv.weight.dim(2)?);
    let padding = dilation * (side - 1) / 2;
    conv.channels_last(x, Conv2dOptions { padding, dilation, groups, ..Default::default() })
}

/// The attention inside a block: (B, H, W, C) to the same shape.
pub(crate) trait Gate: Send + Sync {
    fn forward(&self, x: &Tensor) -> Result<Tensor>;

    /// The number of weights, each used once per pixel.
    fn weights(&self) -> usize;
}

/// Makes the gate of a block with the given number of channels.
pub(crate) type GateBuilder = dyn Fn(usize, VarBuilder) -> Result<Box<dyn Gate>>;

/// A 21x21 kernel in three parts: depthwise 5x5, depthwise 7x7 with dilation 3, and 1x1.
pub(crate) struct LargeKernel {
    near: Conv,
    far: Conv,
    pub(crate) mix: Conv,
}

impl LargeKernel {
    /// Creates a kernel from `channels` to `outputs` channels. With `drawn`, initial values are those of the
    /// published blocks, otherwise PyTorch's.
    pub(crate) fn new(channels: usize, outputs: usize, drawn: bool, vb: VarBuilder) -> Result<Self> {
        let conv = |name: &str, shape: [usize; 4], groups: usize| match drawn {
            true => Conv::drawn(&shape, init(shape[0], shape[2], groups), vb.pp(name)),
            false => Conv::new(&shape, vb.pp(name)),
        };
        Ok(Self {
            near: conv("conv0", [channels, 1, 5, 5], channels)?,
            far: conv("conv_spatial", [channels, 1, 7, 7], channels)?,
            mix: conv("conv1", [outputs, channels, 1, 1], 1)?,
        })
    }

    /// Applies the two spatial convolutions.
    pub(crate) fn spread(&self, x: &Tensor) -> Result<Tensor> {
        depthwise(&self.far, &depthwise(&self.near, x, 1)?, 3)
    }

    pub(crate) fn weights(&self) -> usize {
        [&self.near, &self.far, &self.mix].iter().map(|conv| conv.weight.elem_count()).sum()
    }
}

/// The gate of gSTA: half of the channels, after a sigmoid, gate the other half.
struct Gsta {
    kernel: LargeKernel,
    /// The two halves of `kernel.mix`.
    value: Conv,
    gate: Conv,
}

pub(super) fn gsta(channels: usize, vb: VarBuilder) -> Result<Box<dyn Gate>> {
    let kernel = LargeKernel::new(channels, 2 * channels, true, vb)?;
    let half = |i: usize| -> Result<Conv> {
        let part = |x: &Tensor| x.narrow(0, i * channels, channels);
        Ok(Conv { weight: part(&kernel.mix.weight)?, bias: part(&kernel.mix.bias)? })
    };
    Ok(Box::new(Gsta { value: half(0)?, gate: half(1)?, kernel }))
}

impl Gate for Gsta {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let x = self.kernel.spread(x)?;
        let gate = candle_nn::ops::sigmoid(&conv1x1(&self.gate, &x)?)?;
        Ok((gate * conv1x1(&self.value, &x)?)?)
    }

    fn weights(&self) -> usize {
        self.kernel.weights()
    }
}

/// `x + s1 attention(norm(x))`, then `x + s2 perceptron(norm(x))`, and a 1x1 convolution if the width changes.
struct Block {
    norm1: BatchNorm,
    enter: Conv,
    gate: Box<dyn Gate>,
    leave: Conv,
    scale1: Tensor,
    norm2: BatchNorm,
    widen: Conv,
    mix: Conv,
    narrow: Conv,
    scale2: Tensor,
    reduction: Option<Conv>,
    drop_path: f64,
}

impl Block {
    fn new(
        channels: usize,
        outputs: usize,
        mlp_ratio: f64,
        drop_path: f64,
        gate: &GateBuilder,
        vb: VarBuilder,
    ) -> Result<Self> {
        let block = vb.pp("block");
        let hidden = (channels as f64 * mlp_ratio) as usize;
        let (attention, perceptron) = (block.pp("attn"), block.pp("mlp"));
        let conv = |shape: [usize; 4], groups, vb| Conv::drawn(&shape, init(shape[0], shape[2], groups), vb);
        let norm = |name| BatchNorm::new(channels, Init::Const(1.), block.pp(name));
        let scale = |name| block.get_with_hints(channels, name, Init::Const(0.01));
        let reduction = (channels != outputs)
            .then(|| Conv::new(&[outputs, channels, 1, 1], vb.pp("reduction")))
            .transpose()?;
        Ok(Self {
            norm1: norm("norm1")?,
            enter: conv([channels, channels, 1, 1], 1, attention.pp("proj_1"))?,
            gate: gate(channels, attention.pp("spatial_gating_unit"))?,
            leave: conv([channels, channels, 1, 1], 1, attention.pp("proj_2"))?,
            scale1: scale("layer_scale_1")?,
            norm2: norm("norm2")?,
            widen: conv([hidden, channels, 1, 1], 1, perceptron.pp("fc1"))?,
            mix: conv([hidden, 1, 3, 3], hidden, perceptron.pp("dwconv.dwconv"))?,
            narrow: conv([channels, hidden, 1, 1], 1, perceptron.pp("fc2"))?,
            scale2: scale("layer_scale_2")?,
            reduction,
            drop_path,
        })
    }

    fn forward(&self, x: Tensor, mut training: Option<&mut ChaCha8Rng>) -> Result<Tensor> {
        let normed = self.norm1.forward(&x, training.is_some())?;
        let inner = self.gate.forward(&nn::gelu(&conv1x1(&self.enter, &normed)?)?)?;
        let attended = (conv1x1(&self.leave, &inner)? + normed)?;
        let x = (x + self.branch(scale_channels(&attended, &self.scale1)?, training.as_deref_mut())?)?;

        let normed = self.norm2.forward(&x, training.is_some())?;
        let hidden = nn::gelu(&depthwise(&self.mix, &conv1x1(&self.widen, &normed)?, 1)?)?;
        let scaled = scale_channels(&conv1x1(&self.narrow, &hidden)?, &self.scale2)?;
        let x = (x + self.branch(scaled, training)?)?;
        self.reduction.as_ref().map_or(Ok(x.clone()), |reduction| conv1x1(reduction, &x))
    }

    /// In training, randomly drops the branch for some samples.
    fn branch(&self, x: Tensor, training: Option<&mut ChaCha8Rng>) -> Result<Tensor> {
        training.map_or(Ok(x.clone()), |rng| nn::drop_path(&x, self.drop_path, rng))
    }

    fn weights(&self) -> usize {
        let convs = [&self.enter, &self.leave, &self.widen, &self.mix, &self.narrow];
        let convs = convs.into_iter().chain(&self.reduction).map(|conv| conv.weight.elem_count());
        convs.sum::<usize>() + self.gate.weights()
    }
}

/// A sequence of blocks.
pub(super) struct Meta(Vec<Block>);

impl Meta {
    /// Creates the blocks, with `features` channels in and out.
    pub(super) fn new(
        config: &SimVpConfig,
        features: usize,
        gate: &GateBuilder,
        vb: VarBuilder,
    ) -> Result<Self> {
        let SimVpConfig { temporal_channels: width, temporal_layers: blocks, mlp_ratio, .. } = *config;
        let [first, last] = config.drop_path;
        let block = |i: usize| {
            let inputs = if i == 0 { features } else { width };
            let outputs = if i + 1 == blocks { features } else { width };
            let drop_path = first + (last - first) * i as f64 / (blocks - 1) as f64;
            Block::new(inputs, outputs, mlp_ratio, drop_path, gate, vb.pp("enc").pp(i))
        };
        Ok(Self((0..blocks).map(block).collect::<Result<_>>()?))
    }

    pub(super) fn forward(&self, mut x: Tensor, mut training: Option<&mut ChaCha8Rng>) -> Result<Tensor> {
        for block in &self.0 {
            x = block.forward(x, training.as_deref_mut())?;
        }
        Ok(x)
    }

    pub(super) fn weights(&self) -> usize {
        self.0.iter().map(Block::weights).sum()
    }
}
