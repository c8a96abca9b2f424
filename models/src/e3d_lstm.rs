//! E3D-LSTM: states two frames deep, 3D convolutions, and a cell that recalls its own past by attention (Wang
//! et al. 2019, "Eidetic 3D LSTM: A model for video prediction and beyond").

use candle_core::Tensor;
use candlepower::nn::recurrent::{
    MemoryUpdate, OutputGate, StateNorm, StepConv, attend, open_output, sum_gates, update_memory,
};
use candlepower::prelude::*;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::recurrent::sampling::Sampling;
use crate::recurrent::{FrameSize, Recurrent, RecurrentConfig, Stack, zeros};

/// The module `e3d_lstm`.
pub type E3dLstm = Recurrent<EideticLayers>;

/// Depth of a state in frames.
const DEPTH: usize = 2;

// Positions of the gates: the cell's (R is the recall gate), the memory's, and the transformed memory (M).
const I: usize = 0;
const G: usize = 1;
const R: usize = 2;
const O: usize = 3;
const I_M: usize = 4;
const G_M: usize = 5;
const F_M: usize = 6;
const M: usize = 7;
const GATES: usize = 8;

/// c' = recalled + σ(i) tanh(g)
const CELL: MemoryUpdate = MemoryUpdate { input: I, candidate: G, forget: None, squash: false };
/// m' = σ(f' + 1) tanh(W m) + σ(i') tanh(g')
const MEMORY: MemoryUpdate =
    MemoryUpdate { input: I_M, candidate: G_M, forget: Some((F_M, 1.)), squash: true };

/// Fields of `[module]` for `e3d_lstm`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct E3dLstmConfig {
    /// Channels of the hidden states, one number per layer, all equal.
    pub hidden: Vec<usize>,
    /// Side of the convolution kernels, odd; kernels are 2 frames deep.
    pub kernel: usize,
    /// Side of the pixel patches that are folded into channels.
    pub patch: usize,
    /// Layer normalisation after each gate convolution, over channels, depth and pixels together.
    pub layer_norm: bool,
    /// Schedule that replaces true frames by predictions during training.
    pub sampling: Sampling,
    /// Whether the memory that passes up through the layers is ever written, as in the paper. In the
    /// reference implementations it stays zero, and published numbers come from those.
    pub update_global_memory: bool,
    /// Tokens for a cell's attention to its past.
    pub attention: Attention,
}

/// What attention uses as a token.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Attention {
    /// N consecutive values of a state laid out in memory as (N, D, H, W), as in OpenSTL: pixels of one channel.
    Reference,
    /// The N channels of a position, as in the paper.
    Positions,
}

impl Default for E3dLstmConfig {
    fn default() -> Self {
        let RecurrentConfig { hidden, kernel, patch, layer_norm, sampling } = RecurrentConfig::default();
        let (update_global_memory, attention) = (false, Attention::Reference);
        Self { hidden, kernel, patch, layer_norm, sampling, update_global_memory, attention }
    }
}

/// A convolution over a state's whole depth, whose result is repeated at each depth, with optional layer
/// normalisation. (B, H, W, D, Cin) to (B, H, W, D, Cout).
struct DeepConv {
    conv: StepConv,
    norm: Option<StateNorm>,
}

impl DeepConv {
    fn new(
        inputs: usize,
        outputs: usize,
        config: &E3dLstmConfig,
        frame: FrameSize,
        vb: VarBuilder,
    ) -> Result<Self> {
        let shape = [outputs, inputs, DEPTH, config.kernel, config.kernel];
        let norm = |_| StateNorm::new(&[outputs, DEPTH, frame.height, frame.width], vb.pp("1"));
        let norm = config.layer_norm.then_some(()).map(norm).transpose()?;
        Ok(Self { conv: StepConv::new(&shape, vb.pp("0").pp("conv3d"))?, norm })
    }

    fn prepare(&self) -> Result<Self> {
        let norm = self.norm.as_ref().map(StateNorm::prepare).transpose()?;
        Ok(Self { conv: self.conv.prepare()?, norm })
    }

    /// With normalisation, whose parameters differ by depth, (B, H, W, D, Cout). Without, (B, H, W, Cout), which
    /// [`at_each_depth`] expands after terms are summed.
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let y = self.conv.forward(&x.flatten_from(3)?)?;
        match &self.norm {
            Some(norm) => norm.forward(&at_each_depth(y)?),
            None => Ok(y),
        }
    }
}

/// (B, H, W, C) to (B, H, W, D, C). A tensor that already has a depth is returned unchanged.
fn at_each_depth(y: Tensor) -> Result<Tensor> {
    Ok(if y.rank() == 5 { y } else { Tensor::stack(&[&y; DEPTH], 3)? })
}

/// The cell of section 3.2 of the paper.
struct Eidetic {
    x: DeepConv,
    h: DeepConv,
    memory: DeepConv,
    cell_to_output: DeepConv,
    memory_to_output: DeepConv,
    to_hidden: StepConv,
    recalled: StateNorm,
    update_global_memory: bool,
    attention: Attention,
}

/// The state of a cell.
pub struct EideticState {
    h: Tensor,
    c: Tensor,
    /// The cell states of all steps before the last, as tokens (B, D*H*W, N).
    past: Vec<Tensor>,
}

impl Eidetic {
    fn new(
        inputs: usize,
        hidden: usize,
        config: &E3dLstmConfig,
        frame: FrameSize,
        vb: VarBuilder,
    ) -> Result<Self> {
        let conv = |name: &str, inputs: usize, gates: usize| {
            DeepConv::new(inputs, gates * hidden, config, frame, vb.pp(name))
        };
        let state = [hidden, DEPTH, frame.height, frame.width];
        Ok(Self {
            x: conv("conv_x", inputs, 7)?,
            h: conv("conv_h", hidden, 4)?,
            memory: conv("conv_gm", hidden, 4)?,
            cell_to_output: conv("conv_new_cell", hidden, 1)?,
            memory_to_output: conv("conv_new_gm", hidden, 1)?,
            to_hidden: StepConv::new(&[hidden, 2 * hidden, 1, 1, 1], vb.pp("conv_last").pp("conv3d"))?,
            recalled: StateNorm::new(&state, vb.pp("_norm_c_t"))?,
            update_global_memory: config.update_global_memory,
            attention: config.attention,
        })
    }

    fn prepare(&self) -> Result<Self> {
        Ok(Self {
            x: self.x.prepare()?,
            h: self.h.prepare()?,
            memory: self.memory.prepare()?,
            cell_to_output: self.cell_to_output.prepare()?,
            memory_to_output: self.memory_to_output.prepare()?,
            to_hidden: self.to_hidden.prepare()?,
            recalled: self.recalled.prepare()?,
            ..*self
        })
    }

    /// A state (B, H, W, D, N) as tokens (B, D*H*W, N).
    fn tokens(&self, state: &Tensor) -> Result<Tensor> {
        let (batch, channels) = (state.dim(0)?, state.dim(4)?);
        let state = match self.attention {
            // (B, N, D, H, W)
            Attention::Reference => state.permute((0, 4, 3, 1, 2))?.contiguous()?,
            Attention::Positions => state.clone(),
        };
        Ok(state.reshape((batch, (), channels))?)
    }

    /// Undoes [`Self::tokens`].
    fn state(&self, tokens: &Tensor, like: &Tensor) -> Result<Tensor> {
        let (batch, height, width, depth, channels) = like.dims5()?;
        Ok(match self.attention {
            Attention::Reference => {
                let state = tokens.reshape((batch, channels, depth, height, width))?;
                state.permute((0, 3, 4, 2, 1))?.contiguous()?
            }
            Attention::Positions => tokens.reshape(like.shape())?,
        })
    }

    /// Attention of `asked` to `past`: softmax(q k') k, without the usual scale.
    fn recall(&self, asked: &Tensor, past: &[Tensor]) -> Result<Tensor> {
        self.state(&attend(&self.tokens(asked)?, &Tensor::cat(past, 1)?)?, asked)
    }

    fn step(&self, x: &Tensor, state: &mut EideticState, memory: &mut Tensor) -> Result<()> {
        let EideticState { h, c, past } = state;
        let gates = sum_gates(
            GATES,
            &[
                (&self.x.forward(x)?, &[I, G, R, O, I_M, G_M, F_M]),
                (&self.h.forward(h)?, &[I, G, R, O]),
                (&self.memory.forward(memory)?, &[I_M, F_M, G_M, M]),
            ],
        )?;
        let gates = at_each_depth(gates)?;
        let width = c.dim(4)?;
        let asked = candle_nn::ops::sigmoid(&gates.narrow(4, R * width, width)?)?;
        past.push(self.tokens(c)?);
        let recalled = self.recalled.forward(&(&*c + self.recall(&asked, past)?)?)?;
        *c = update_memory(&gates, &recalled, CELL)?;
        let written = update_memory(&gates, &gates.narrow(4, M * width, width)?, MEMORY)?;
        let more = (self.cell_to_output.forward(c)? + self.memory_to_output.forward(&written)?)?;
        let more = at_each_depth(more)?;
        let y = self.to_hidden.forward(&Tensor::cat(&[&*c, &written], 4)?)?;
        *h = open_output(OutputGate::SigmoidOfTanh, &gates, O, Some(&more), &y)?;
        if self.update_global_memory {
            *memory = written;
        }
        Ok(())
    }

    /// Multiply-adds per pixel, not counting attention.
    fn weights(&self) -> usize {
        let deep = [&self.x, &self.h, &self.memory, &self.cell_to_output, &self.memory_to_output];
        deep.iter().map(|conv| conv.conv.weights()).sum::<usize>() + DEPTH * self.to_hidden.weights()
    }
}

/// Layers of eidetic cells, and a convolution over the depth that produces frames.
pub struct EideticLayers {
    cells: Vec<Eidetic>,
    to_frame: StepConv,
    hidden: usize,
    frame: FrameSize,
}

/// The state of all layers.
pub struct EideticStates {
    cells: Vec<EideticState>,
    memory: Tensor,
    frame_before: Tensor,
}

impl Stack for EideticLayers {
    type Config = E3dLstmConfig;
    type State = EideticStates;

    fn recurrent(config: &E3dLstmConfig) -> RecurrentConfig {
        let E3dLstmConfig { hidden, kernel, patch, layer_norm, sampling, .. } = config.clone();
        RecurrentConfig { hidden, kernel, patch, layer_norm, sampling }
    }

    fn build(config: &E3dLstmConfig, frame: FrameSize, vb: VarBuilder) -> Result<Self> {
        let hidden = Self::recurrent(config).equal_widths()?;
        let cell = |layer: usize| {
            let inputs = if layer == 0 { frame.channels } else { hidden };
            Eidetic::new(inputs, hidden, config, frame, vb.pp("cell_list").pp(layer))
        };
        let cells = (0..config.hidden.len()).map(cell).collect::<Result<_>>()?;
        let to_frame = StepConv::new(&[frame.channels, hidden, DEPTH, 1, 1], vb.pp("conv_last"))?;
        Ok(Self { cells, to_frame, hidden, frame })
    }

    fn prepare(&self) -> Result<Self> {
        let cells = self.cells.iter().map(Eidetic::prepare).collect::<Result<_>>()?;
        Ok(Self { cells, to_frame: self.to_frame.prepare()?, ..*self })
    }

    fn start(&self, frame: &Tensor) -> Result<EideticStates> {
        let zeros = Tensor::stack(&[&zeros(frame, self.hidden)?; DEPTH], 3)?;
        let cell = |_: &Eidetic| EideticState { h: zeros.clone(), c: zeros.clone(), past: Vec::new() };
        let cells = self.cells.iter().map(cell).collect();
        Ok(EideticStates { cells, memory: zeros, frame_before: frame.zeros_like()? })
    }

    fn step(&self, frame: &Tensor, state: &mut EideticStates) -> Result<Tensor> {
        let EideticStates { cells, memory, frame_before } = state;
        let mut input = Tensor::stack(&[&*frame_before, frame], 3)?;
        for (cell, state) in self.cells.iter().zip(cells) {
            cell.step(&input, state, memory)?;
            input = state.h.clone();
        }
        *frame_before = frame.clone();
        self.to_frame.forward(&input.flatten_from(3)?)
    }

    fn loss(&self, predictions: &Tensor, batch: &Video, _: &EideticStates) -> Result<Tensor> {
        Ok((batch.mse(predictions)? + batch.mae(predictions)?)?)
    }

    fn multiply_adds(&self) -> usize {
        let weights = self.cells.iter().map(Eidetic::weights).sum::<usize>();
        self.frame.pixels() * (weights + self.to_frame.weights())
    }
}
