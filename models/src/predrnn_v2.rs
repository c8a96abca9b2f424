//! PredRNN-V2: PredRNN with a loss that keeps cells and memories from learning the same, and reverse scheduled sampling
//! (Wang et al. 2021, "PredRNN: A recurrent neural network for spatiotemporal predictive learning").

use candle_core::Tensor;
use candlepower::nn::recurrent::StepConv;
use candlepower::prelude::*;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::predrnn::{Increments, PredRnnLayers, PredRnnState};
use crate::recurrent::sampling::{Reverse, Sampling};
use crate::recurrent::{FrameSize, Recurrent, RecurrentConfig, Stack};

/// The module `predrnn_v2`.
pub type PredRnnV2 = Recurrent<DecoupledLayers>;

/// Fields of `[module]` for `predrnn_v2`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct PredRnnV2Config {
    /// Channels of the hidden states, one number per layer, all equal.
    pub hidden: Vec<usize>,
    /// Side of the convolution kernels, odd.
    pub kernel: usize,
    /// Side of the pixel patches that are folded into channels.
    pub patch: usize,
    /// Layer normalisation after each gate convolution, over channels and pixels together.
    pub layer_norm: bool,
    /// Schedule that replaces true frames by predictions during training.
    pub sampling: Sampling,
    /// Weight of the decoupling loss.
    pub decoupling: f64,
}

impl Default for PredRnnV2Config {
    fn default() -> Self {
        let RecurrentConfig { hidden, kernel, patch, layer_norm, .. } = RecurrentConfig::default();
        let sampling = Sampling::Reverse(Reverse::default());
        Self { hidden, kernel, patch, layer_norm, sampling, decoupling: 0.1 }
    }
}

/// PredRNN's layers, and the convolution that maps increments before they are compared.
pub struct DecoupledLayers {
    layers: PredRnnLayers,
    adapter: StepConv,
    decoupling: f64,
}

/// PredRNN's state, and the increments of every cell at every step.
pub struct DecoupledState {
    layers: PredRnnState,
    increments: Vec<Increments>,
}

impl DecoupledLayers {
    /// Similarity of the increments of cells and memories: the mean of |cos| between them, with each channel's
    /// pixels as a vector, over steps, layers, samples and channels (section 3.3 of the paper).
    fn likeness(&self, increments: &[Increments]) -> Result<Tensor> {
        // (steps * layers * B, pixels, N)
        let adapted = |of: fn(&Increments) -> &Tensor| -> Result<Tensor> {
            let all: Vec<&Tensor> = increments.iter().map(of).collect();
            let adapted = self.adapter.forward(&Tensor::cat(&all, 0)?)?.flatten(1, 2)?;
            normalised(&adapted, 1e-12)
        };
        let (cells, memories) = (adapted(|step| &step.cell)?, adapted(|step| &step.memory)?);
        // The reference normalises twice, with different bounds.
        let (cells, memories) = (normalised(&cells, 1e-8)?, normalised(&memories, 1e-8)?);
        nn::mean_all(&(cells * memories)?.sum(1)?.abs()?)
    }
}

/// (.., pixels, N) with each channel's vector of pixels divided by its length, or by `least` if that is larger.
fn normalised(x: &Tensor, least: f64) -> Result<Tensor> {
    Ok(x.broadcast_div(&x.sqr()?.sum_keepdim(1)?.maximum(least * least)?.sqrt()?)?)
}

impl Stack for DecoupledLayers {
    type Config = PredRnnV2Config;
    type State = DecoupledState;

    fn recurrent(config: &PredRnnV2Config) -> RecurrentConfig {
        let PredRnnV2Config { hidden, kernel, patch, layer_norm, sampling, .. } = config.clone();
        RecurrentConfig { hidden, kernel, patch, layer_norm, sampling }
    }

    fn build(config: &PredRnnV2Config, frame: FrameSize, vb: VarBuilder) -> Result<Self> {
        let decoupling = config.decoupling;
        if !(decoupling.is_finite() && decoupling >= 0.) {
            return Err(Error::setting("decoupling", format!("expected at least 0, found {decoupling}")));
        }
        let layers = PredRnnLayers::build(&Self::recurrent(config), frame, vb.clone())?;
        let width = layers.hidden();
        let adapter = StepConv::new(&[width, width, 1, 1], vb.pp("adapter"))?;
        Ok(Self { layers, adapter, decoupling })
    }

    fn prepare(&self) -> Result<Self> {
        let (layers, adapter) = (self.layers.prepare()?, self.adapter.prepare()?);
        Ok(Self { layers, adapter, decoupling: self.decoupling })
    }

    fn start(&self, frame: &Tensor) -> Result<DecoupledState> {
        Ok(DecoupledState { layers: self.layers.start(frame)?, increments: Vec::new() })
    }

    fn step(&self, frame: &Tensor, state: &mut DecoupledState) -> Result<Tensor> {
        let DecoupledState { layers, increments } = state;
        self.layers.step_noting(frame, layers, |cell, gates| {
            increments.push(cell.increments(gates)?);
            Ok(())
        })
    }

    fn loss(&self, predictions: &Tensor, batch: &Video, state: &DecoupledState) -> Result<Tensor> {
        let mse = batch.mse(predictions)?;
        Ok((mse + (self.likeness(&state.increments)? * self.decoupling)?)?)
    }

    fn multiply_adds(&self) -> usize {
        let adapted = 2 * self.layers.layers() * self.adapter.weights();
        self.layers.multiply_adds() + self.layers.pixels() * adapted
    }
}
