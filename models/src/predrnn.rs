//! PredRNN: a memory that passes up through the layers of a step and on to the next step (Wang et al. 2017,
//! "PredRNN: Recurrent neural networks for predictive learning using spatiotemporal LSTMs").

use candle_core::Tensor;
use candlepower::nn::recurrent::{MemoryUpdate, OutputGate, StepConv, open_output, update_memory};
use candlepower::prelude::*;

use crate::recurrent::gates::{GateConv, Gates};
use crate::recurrent::{FrameSize, Recurrent, RecurrentConfig, Stack, zeros};

/// The module `predrnn`.
pub type PredRnn = Recurrent<PredRnnLayers>;

// Positions of the gates: the cell's, the memory's, the output's.
const I: usize = 0;
const F: usize = 1;
const G: usize = 2;
const I_M: usize = 3;
const F_M: usize = 4;
const G_M: usize = 5;
const O: usize = 6;

/// c' = σ(f + 1) c + σ(i) tanh(g)
const CELL: MemoryUpdate = MemoryUpdate { input: I, candidate: G, forget: Some((F, 1.)), squash: false };
/// m' = σ(f' + 1) m + σ(i') tanh(g')
const MEMORY: MemoryUpdate =
    MemoryUpdate { input: I_M, candidate: G_M, forget: Some((F_M, 1.)), squash: false };

/// A spatiotemporal LSTM (ST-LSTM, equation 3 of the paper).
pub(crate) struct StLstm {
    gates: Gates,
    to_output: GateConv,
    to_hidden: StepConv,
}

/// What a step adds to the cell and to the memory: σ(i) tanh(g) and σ(i') tanh(g').
pub(crate) struct Increments {
    pub(crate) cell: Tensor,
    pub(crate) memory: Tensor,
}

impl StLstm {
    pub(crate) fn new(
        inputs: usize,
        hidden: usize,
        config: &RecurrentConfig,
        frame: FrameSize,
        vb: VarBuilder,
    ) -> Result<Self> {
        let conv = |name: &str, inputs: usize, gates: usize| {
            GateConv::new(inputs, gates * hidden, config, frame, vb.pp(name))
        };
        let gates = Gates::new(
            7,
            vec![
                (conv("conv_x", inputs, 7)?, &[I, F, G, I_M, F_M, G_M, O]),
                (conv("conv_h", hidden, 4)?, &[I, F, G, O]),
                (conv("conv_m", hidden, 3)?, &[I_M, F_M, G_M]),
            ],
        );
        let to_output = conv("conv_o", 2 * hidden, 1)?;
        let to_hidden = StepConv::new(&[hidden, 2 * hidden, 1, 1], vb.pp("conv_last"))?;
        Ok(Self { gates, to_output, to_hidden })
    }

    pub(crate) fn prepare(&self) -> Result<Self> {
        Ok(Self {
            gates: self.gates.prepare()?,
            to_output: self.to_output.prepare()?,
            to_hidden: self.to_hidden.prepare()?,
        })
    }

    /// Advances h, c and the memory by one step; returns the gates' pre-activations.
    pub(crate) fn step(&self, x: &Tensor, h: &mut Tensor, c: &mut Tensor, m: &mut Tensor) -> Result<Tensor> {
        let gates = self.gates.forward(&[x, h, m])?;
        *c = update_memory(&gates, c, CELL)?;
        *m = update_memory(&gates, m, MEMORY)?;
        let both = Tensor::cat(&[&*c, &*m], 3)?;
        let more = self.to_output.forward(&both)?;
        *h = open_output(OutputGate::Sigmoid, &gates, O, Some(&more), &self.to_hidden.forward(&both)?)?;
        Ok(gates)
    }

    /// The increments of the step that had these gates.
    pub(crate) fn increments(&self, gates: &Tensor) -> Result<Increments> {
        let width = gates.dim(3)? / 7;
        let (batch, height, columns, _) = gates.dims4()?;
        let nothing = Tensor::zeros((batch, height, columns, width), gates.dtype(), gates.device())?;
        let taken_in =
            |update: MemoryUpdate| update_memory(gates, &nothing, MemoryUpdate { forget: None, ..update });
        Ok(Increments { cell: taken_in(CELL)?, memory: taken_in(MEMORY)? })
    }

    pub(crate) fn weights(&self) -> usize {
        self.gates.weights() + self.to_output.weights() + self.to_hidden.weights()
    }
}

/// Layers of ST-LSTM cells, and a 1x1 convolution that produces frames.
pub struct PredRnnLayers {
    cells: Vec<StLstm>,
    to_frame: StepConv,
    hidden: usize,
    pixels: usize,
}

/// The state of all layers.
pub struct PredRnnState {
    /// h and c of each layer.
    layers: Vec<(Tensor, Tensor)>,
    memory: Tensor,
}

impl PredRnnLayers {
    /// A step that passes each cell and its gates to `note`.
    pub(crate) fn step_noting(
        &self,
        frame: &Tensor,
        state: &mut PredRnnState,
        mut note: impl FnMut(&StLstm, &Tensor) -> Result<()>,
    ) -> Result<Tensor> {
        let mut input = frame.clone();
        for (cell, (h, c)) in self.cells.iter().zip(&mut state.layers) {
            let gates = cell.step(&input, h, c, &mut state.memory)?;
            note(cell, &gates)?;
            input = h.clone();
        }
        self.to_frame.forward(&input)
    }

    pub(crate) fn hidden(&self) -> usize {
        self.hidden
    }

    pub(crate) fn layers(&self) -> usize {
        self.cells.len()
    }

    pub(crate) fn pixels(&self) -> usize {
        self.pixels
    }
}

impl Stack for PredRnnLayers {
    type Config = RecurrentConfig;
    type State = PredRnnState;

    fn recurrent(config: &RecurrentConfig) -> RecurrentConfig {
        config.clone()
    }

    fn build(config: &RecurrentConfig, frame: FrameSize, vb: VarBuilder) -> Result<Self> {
        let hidden = config.equal_widths()?;
        let cell = |layer: usize| {
            let inputs = if layer == 0 { frame.channels } else { hidden };
            StLstm::new(inputs, hidden, config, frame, vb.pp("cell_list").pp(layer))
        };
        let cells = (0..config.hidden.len()).map(cell).collect::<Result<_>>()?;
        let to_frame = StepConv::new(&[frame.channels, hidden, 1, 1], vb.pp("conv_last"))?;
        Ok(Self { cells, to_frame, hidden, pixels: frame.pixels() })
    }

    fn prepare(&self) -> Result<Self> {
        let cells = self.cells.iter().map(StLstm::prepare).collect::<Result<_>>()?;
        Ok(Self { cells, to_frame: self.to_frame.prepare()?, hidden: self.hidden, pixels: self.pixels })
    }

    fn start(&self, frame: &Tensor) -> Result<PredRnnState> {
        let zeros = zeros(frame, self.hidden)?;
        let layers = vec![(zeros.clone(), zeros.clone()); self.cells.len()];
        Ok(PredRnnState { layers, memory: zeros })
    }

    fn step(&self, frame: &Tensor, state: &mut PredRnnState) -> Result<Tensor> {
        self.step_noting(frame, state, |_, _| Ok(()))
    }

    fn multiply_adds(&self) -> usize {
        let weights = self.cells.iter().map(StLstm::weights).sum::<usize>();
        self.pixels * (weights + self.to_frame.weights())
    }
}
