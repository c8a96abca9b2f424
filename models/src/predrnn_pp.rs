//! PredRNN++: causal LSTM cells, and a gradient highway above the lowest layer (Wang et al. 2018, "PredRNN++:
//! Towards a resolution of the deep-in-time dilemma in spatiotemporal predictive learning").

use candle_core::Tensor;
use candle_nn::Init;
use candle_nn::ops::sigmoid;
use candlepower::nn::recurrent::{MemoryUpdate, OutputGate, StepConv, open_output, update_memory};
use candlepower::prelude::*;

use crate::recurrent::gates::{GateConv, Gates};
use crate::recurrent::{FrameSize, Recurrent, RecurrentConfig, Stack, zeros};

/// The module `predrnn_pp`.
pub type PredRnnPp = Recurrent<CausalLayers>;

// Positions of the gates: the cell's, the memory's, the output's, and the transformed memory (M).
const I: usize = 0;
const F: usize = 1;
const G: usize = 2;
const I_M: usize = 3;
const F_M: usize = 4;
const G_M: usize = 5;
const O: usize = 6;
const M: usize = 7;

/// c' = σ(f + 1) c + σ(i) tanh(g)
const CELL: MemoryUpdate = MemoryUpdate { input: I, candidate: G, forget: Some((F, 1.)), squash: false };
/// m' = σ(f' + 1) tanh(W m) + σ(i') tanh(g')
const MEMORY: MemoryUpdate =
    MemoryUpdate { input: I_M, candidate: G_M, forget: Some((F_M, 1.)), squash: true };

/// A causal LSTM (equation 1 of the paper): the memory's update sees the updated cell.
struct CausalLstm {
    first: Gates,
    second: Gates,
    to_output: GateConv,
    to_hidden: StepConv,
}

impl CausalLstm {
    fn new(
        inputs: usize,
        hidden: usize,
        config: &RecurrentConfig,
        frame: FrameSize,
        vb: VarBuilder,
    ) -> Result<Self> {
        let conv = |name: &str, inputs: usize, gates: usize| {
            GateConv::new(inputs, gates * hidden, config, frame, vb.pp(name))
        };
        let first = Gates::new(
            7,
            vec![
                (conv("conv_x", inputs, 7)?, &[I, F, G, I_M, F_M, G_M, O]),
                (conv("conv_h", hidden, 4)?, &[I, F, G, O]),
                (conv("conv_c", hidden, 3)?, &[I, F, G]),
            ],
        );
        let second = Gates::new(
            8,
            vec![
                (conv("conv_m", hidden, 3)?, &[I_M, F_M, M]),
                (conv("conv_c2m", hidden, 4)?, &[I_M, G_M, F_M, O]),
            ],
        );
        let to_output = conv("conv_om", hidden, 1)?;
        let to_hidden = StepConv::new(&[hidden, 2 * hidden, 1, 1], vb.pp("conv_last"))?;
        // The reference creates this one and never uses it.
        conv("conv_o", 2 * hidden, 1)?;
        Ok(Self { first, second, to_output, to_hidden })
    }

    fn prepare(&self) -> Result<Self> {
        Ok(Self {
            first: self.first.prepare()?,
            second: self.second.prepare()?,
            to_output: self.to_output.prepare()?,
            to_hidden: self.to_hidden.prepare()?,
        })
    }

    fn step(&self, x: &Tensor, h: &mut Tensor, c: &mut Tensor, m: &mut Tensor) -> Result<()> {
        let gates = self.first.forward(&[x, h, c])?;
        *c = update_memory(&gates, c, CELL)?;
        let gates = self.second.forward_with(&[m, c], &[(&gates, &[I, F, G, I_M, F_M, G_M, O])])?;
        let width = c.dim(3)?;
        *m = update_memory(&gates, &gates.narrow(3, M * width, width)?, MEMORY)?;
        let y = self.to_hidden.forward(&Tensor::cat(&[&*c, &*m], 3)?)?;
        *h = open_output(OutputGate::Tanh, &gates, O, Some(&self.to_output.forward(m)?), &y)?;
        Ok(())
    }

    fn weights(&self) -> usize {
        self.first.weights() + self.second.weights() + self.to_output.weights() + self.to_hidden.weights()
    }
}

/// A gradient highway unit (equation 2 of the paper): z' = σ(u) tanh(p) + (1 - σ(u)) z.
struct Highway {
    gates: Gates,
}

impl Highway {
    fn new(hidden: usize, config: &RecurrentConfig, frame: FrameSize, vb: VarBuilder) -> Result<Self> {
        // Very small initial values, as in the reference.
        let init = Init::Uniform { lo: -1e-3, up: 1e-3 };
        let conv = |name: &str| {
            let (shape, vb) = ([2 * hidden, hidden, config.kernel, config.kernel], vb.pp(name));
            GateConv::of(StepConv::with_init(&shape, init, vb.pp("0"))?, config, frame, vb)
        };
        Ok(Self { gates: Gates::new(2, vec![(conv("x_concat")?, &[0, 1]), (conv("z_concat")?, &[0, 1])]) })
    }

    fn step(&self, x: &Tensor, z: &Tensor) -> Result<Tensor> {
        let gates = self.gates.forward(&[x, z])?;
        let width = z.dim(3)?;
        let (p, u) = (gates.narrow(3, 0, width)?.tanh()?, sigmoid(&gates.narrow(3, width, width)?)?);
        Ok((z + (u * (p - z)?)?)?)
    }
}

/// Layers of causal LSTM cells with a highway above the lowest, and a 1x1 convolution that produces frames.
pub struct CausalLayers {
    cells: Vec<CausalLstm>,
    highway: Highway,
    to_frame: StepConv,
    hidden: usize,
    pixels: usize,
}

/// The state of all layers.
pub struct CausalState {
    /// h and c of each layer.
    layers: Vec<(Tensor, Tensor)>,
    memory: Tensor,
    /// The highway's state.
    z: Tensor,
}

impl Stack for CausalLayers {
    type Config = RecurrentConfig;
    type State = CausalState;

    fn recurrent(config: &RecurrentConfig) -> RecurrentConfig {
        config.clone()
    }

    fn build(config: &RecurrentConfig, frame: FrameSize, vb: VarBuilder) -> Result<Self> {
        let hidden = config.equal_widths()?;
        if config.hidden.len() < 2 {
            return Err(Error::setting("hidden", "the highway lies between layers: expected at least two"));
        }
        let cell = |layer: usize| {
            let inputs = if layer == 0 { frame.channels } else { hidden };
            CausalLstm::new(inputs, hidden, config, frame, vb.pp("cell_list").pp(layer))
        };
        Ok(Self {
            cells: (0..config.hidden.len()).map(cell).collect::<Result<_>>()?,
            highway: Highway::new(hidden, config, frame, vb.pp("gradient_highway"))?,
            to_frame: StepConv::new(&[frame.channels, hidden, 1, 1], vb.pp("conv_last"))?,
            hidden,
            pixels: frame.pixels(),
        })
    }

    fn prepare(&self) -> Result<Self> {
        Ok(Self {
            cells: self.cells.iter().map(CausalLstm::prepare).collect::<Result<_>>()?,
            highway: Highway { gates: self.highway.gates.prepare()? },
            to_frame: self.to_frame.prepare()?,
            ..*self
        })
    }

    fn start(&self, frame: &Tensor) -> Result<CausalState> {
        let zeros = zeros(frame, self.hidden)?;
        let layers = vec![(zeros.clone(), zeros.clone()); self.cells.len()];
        Ok(CausalState { layers, memory: zeros.clone(), z: zeros })
    }

    fn step(&self, frame: &Tensor, state: &mut CausalState) -> Result<Tensor> {
        let CausalState { layers, memory, z } = state;
        let mut input = frame.clone();
        for (layer, (cell, (h, c))) in self.cells.iter().zip(layers).enumerate() {
            cell.step(&input, h, c, memory)?;
            input = h.clone();
            if layer == 0 {
                *z = self.highway.step(&input, z)?;
                input = z.clone();
            }
        }
        self.to_frame.forward(&input)
    }

    fn multiply_adds(&self) -> usize {
        let weights = self.cells.iter().map(CausalLstm::weights).sum::<usize>();
        self.pixels * (weights + self.highway.gates.weights() + self.to_frame.weights())
    }

    fn unused_parameters(&self) -> &'static [&'static str] {
        &["cell_list.*.conv_o.*"]
    }
}
