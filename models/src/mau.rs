//! MAU: cells that look further back by attention to their own inputs (Chang et al. 2021, "MAU: A
//! motion-aware unit for video prediction and beyond"), between a convolutional encoder and decoder.

use candle_core::Tensor;
use candlepower::nn::leaky_relu;
use candlepower::nn::recurrent::{DoublingConv, StateNorm, StepConv, Window, blend};
use candlepower::prelude::*;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::recurrent::sampling::Sampling;
use crate::recurrent::{FrameSize, Recurrent, RecurrentConfig, Stack};

/// The module `mau`.
pub type Mau = Recurrent<MauLayers>;

/// The slope of the activations below zero.
const LEAK: f64 = 0.2;

/// Fields of `[module]` for `mau`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct MauConfig {
    /// Channels of the states, one number per layer, all equal.
    pub hidden: Vec<usize>,
    /// Side of the cells' convolution kernels, odd.
    pub kernel: usize,
    /// Side of the pixel patches that are folded into channels.
    pub patch: usize,
    /// Factor by which the encoder reduces rows and columns: a power of two.
    pub reduction: usize,
    /// Number of past steps that a cell attends to.
    pub window: usize,
    /// Schedule that replaces true frames by predictions during training.
    pub sampling: Sampling,
}

impl Default for MauConfig {
    fn default() -> Self {
        let (hidden, kernel, patch) = (vec![64; 4], 5, 1);
        Self { hidden, kernel, patch, reduction: 4, window: 5, sampling: Sampling::default() }
    }
}

/// A convolution and layer normalisation.
struct NormConv {
    conv: StepConv,
    norm: StateNorm,
}

impl NormConv {
    fn new(hidden: usize, gates: usize, kernel: usize, state: [usize; 2], vb: VarBuilder) -> Result<Self> {
        let conv = StepConv::with_bias(&[gates * hidden, hidden, kernel, kernel], vb.pp("0"))?;
        let norm = StateNorm::new(&[gates * hidden, state[0], state[1]], vb.pp("1"))?;
        Ok(Self { conv, norm })
    }

    fn prepare(&self) -> Result<Self> {
        Ok(Self { conv: self.conv.prepare()?, norm: self.norm.prepare()? })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.norm.forward(&self.conv.forward(x)?)
    }
}

/// A motion-aware unit (section 3.2 of the paper): T is the motion state, S the spatial features.
struct Unit {
    motion_next: NormConv,
    seen_next: NormConv,
    motion: NormConv,
    seen: NormConv,
    window: usize,
}

/// T of a unit, and its last `window` values of T and S.
pub struct UnitState {
    motion: Tensor,
    motions: Window,
    seens: Window,
}

impl Unit {
    fn new(hidden: usize, config: &MauConfig, state: [usize; 2], vb: VarBuilder) -> Result<Self> {
        let conv = |name: &str, gates: usize| NormConv::new(hidden, gates, config.kernel, state, vb.pp(name));
        Ok(Self {
            motion_next: conv("conv_t_next", 1)?,
            seen_next: conv("conv_s_next", 1)?,
            motion: conv("conv_t", 3)?,
            seen: conv("conv_s", 3)?,
            window: config.window,
        })
    }

    fn prepare(&self) -> Result<Self> {
        Ok(Self {
            motion_next: self.motion_next.prepare()?,
            seen_next: self.seen_next.prepare()?,
            motion: self.motion.prepare()?,
            seen: self.seen.prepare()?,
            window: self.window,
        })
    }

    /// Past motions, weighted by the similarity of the past features to the features predicted from `seen`.
    fn trend(&self, seen: &Tensor, state: &UnitState) -> Result<Tensor> {
        let size = (seen.elem_count() / seen.dim(0)?) as f64;
        state.motions.recall(&self.seen_next.forward(seen)?, &state.seens, 1. / size.sqrt())
    }

    /// Maps this layer's S to the next layer's S.
    fn step(&self, seen: &Tensor, state: &mut UnitState) -> Result<Tensor> {
        let width = seen.dim(3)?;
        let trend = self.trend(seen, state)?;
        let keep = self.motion_next.forward(&state.motion)?;
        let fused = blend(width, (&keep, 0), (&state.motion, 0), (&trend, 0))?;
        // Parts of `motion`: a gate, the part kept in T, the part passed to S. Of `seen_here`: a gate, the
        // part passed to T, the part kept.
        let [motion, seen_here] = [self.motion.forward(&fused)?, self.seen.forward(seen)?];
        state.motion = blend(width, (&motion, 0), (&motion, 1), (&seen_here, 1))?;
        state.motions.push(&state.motion)?;
        state.seens.push(seen)?;
        blend(width, (&seen_here, 0), (&seen_here, 2), (&motion, 2))
    }

    fn weights(&self) -> usize {
        let convs = [&self.motion_next, &self.seen_next, &self.motion, &self.seen];
        convs.iter().map(|conv| conv.conv.weights()).sum()
    }
}

/// An encoder, motion-aware units, a decoder, and a 1x1 convolution to frames.
pub struct MauLayers {
    encoder: Vec<StepConv>,
    units: Vec<Unit>,
    decoder: Vec<DoublingConv>,
    to_frame: StepConv,
    hidden: usize,
    window: usize,
    frame: FrameSize,
    reduction: usize,
}

impl Stack for MauLayers {
    type Config = MauConfig;
    type State = Vec<UnitState>;

    fn recurrent(config: &MauConfig) -> RecurrentConfig {
        let MauConfig { hidden, kernel, patch, sampling, .. } = config.clone();
        RecurrentConfig { hidden, kernel, patch, sampling, layer_norm: true }
    }

    fn build(config: &MauConfig, frame: FrameSize, vb: VarBuilder) -> Result<Self> {
        let MauConfig { reduction, window, .. } = *config;
        let hidden = Self::recurrent(config).equal_widths()?;
        let tiled = reduction.is_power_of_two()
            && frame.height.is_multiple_of(reduction)
            && frame.width.is_multiple_of(reduction);
        if !tiled {
            let message = format!(
                "expected a power of two that divides {}x{}, found {reduction}",
                frame.height, frame.width
            );
            return Err(Error::setting("reduction", message));
        }
        if window == 0 {
            return Err(Error::setting("window", "expected at least 1, found 0"));
        }
        let halvings = reduction.ilog2() as usize;
        let state = [frame.height / reduction, frame.width / reduction];
        let (encoders, decoders) = (vb.pp("encoders"), vb.pp("decoders"));
        let mut encoder = vec![StepConv::with_bias(
            &[hidden, frame.channels, 1, 1],
            encoders.pp(0).pp("encoder_t_conv-1"),
        )?];
        let mut decoder = Vec::new();
        for index in 0..halvings {
            let vb = encoders.pp(index + 1).pp(format!("encoder_t{index}"));
            encoder.push(StepConv::with_bias(&[hidden, hidden, 3, 3], vb)?.strided(2));
            let vb = decoders.pp(index).pp(format!("c_decoder{index}"));
            decoder.push(DoublingConv::new(hidden, hidden, vb)?);
        }
        let unit = |index: usize| Unit::new(hidden, config, state, vb.pp("cell_list").pp(index));
        let units = (0..config.hidden.len()).map(unit).collect::<Result<_>>()?;
        let to_frame = StepConv::with_bias(&[frame.channels, hidden, 1, 1], vb.pp("srcnn").pp(0))?;
        // The reference creates these two and never uses them.
        StepConv::with_bias(&[hidden, 2 * hidden, 1, 1], vb.pp("merge"))?;
        StepConv::with_bias(&[frame.channels, 2 * frame.channels, 1, 1], vb.pp("conv_last_sr"))?;
        Ok(Self { encoder, units, decoder, to_frame, hidden, window, frame, reduction })
    }

    fn prepare(&self) -> Result<Self> {
        Ok(Self {
            encoder: self.encoder.iter().map(StepConv::prepare).collect::<Result<_>>()?,
            units: self.units.iter().map(Unit::prepare).collect::<Result<_>>()?,
            decoder: self.decoder.iter().map(DoublingConv::prepare).collect::<Result<_>>()?,
            to_frame: self.to_frame.prepare()?,
            ..*self
        })
    }

    fn start(&self, frame: &Tensor) -> Result<Vec<UnitState>> {
        let (height, width) = (self.frame.height / self.reduction, self.frame.width / self.reduction);
        let shape = (frame.dim(0)?, height, width, self.hidden);
        let zeros = Tensor::zeros(shape, frame.dtype(), frame.device())?;
        let past = Window::new(self.window, &zeros)?;
        let unit = |_: &Unit| UnitState { motion: zeros.clone(), motions: past.clone(), seens: past.clone() };
        Ok(self.units.iter().map(unit).collect())
    }

    fn step(&self, frame: &Tensor, state: &mut Vec<UnitState>) -> Result<Tensor> {
        let mut seen = frame.clone();
        for conv in &self.encoder {
            seen = leaky_relu(&conv.forward(&seen)?, LEAK)?;
        }
        for (unit, state) in self.units.iter().zip(state) {
            seen = unit.step(&seen, state)?;
        }
        for (index, conv) in self.decoder.iter().enumerate() {
            seen = conv.forward(&seen)?;
            // The last layer is linear.
            if index + 1 < self.decoder.len() {
                seen = leaky_relu(&seen, LEAK)?;
            }
        }
        self.to_frame.forward(&seen)
    }

    fn multiply_adds(&self) -> usize {
        let pixels = self.frame.pixels();
        let halved = |index: usize| pixels >> (2 * index);
        let encoder = self.encoder.iter().enumerate();
        let encoder: usize = encoder.map(|(index, conv)| halved(index) * conv.weights()).sum();
        let decoder = self.decoder.iter().rev().enumerate();
        let decoder: usize = decoder.map(|(index, conv)| halved(index + 1) * conv.weights()).sum();
        let units: usize = self.units.iter().map(Unit::weights).sum();
        encoder + halved(self.encoder.len() - 1) * units + decoder + pixels * self.to_frame.weights()
    }

    fn unused_parameters(&self) -> &'static [&'static str] {
        &["merge.*", "conv_last_sr.*"]
    }
}
