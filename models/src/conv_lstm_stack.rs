//! Stacked ConvLSTM on patches that feeds its frames back, as in OpenSTL (cells: Shi et al. 2015, without peepholes).

use candle_core::Tensor;
use candlepower::nn::recurrent::{MemoryUpdate, OutputGate, StepConv, open_output, update_memory};
use candlepower::prelude::*;

use crate::recurrent::gates::{GateConv, Gates};
use crate::recurrent::{FrameSize, Recurrent, RecurrentConfig, Stack};

/// The module `conv_lstm_stack`.
pub type ConvLstmStack = Recurrent<ConvLstmLayers>;

// Positions of the gates.
const I: usize = 0;
const F: usize = 1;
const G: usize = 2;
const O: usize = 3;

/// c' = σ(f) c + σ(i) tanh(g). The reference defines a bias for f but does not add it.
const CELL: MemoryUpdate = MemoryUpdate { input: I, candidate: G, forget: Some((F, 0.)), squash: false };

struct Layer {
    gates: Gates,
    hidden: usize,
}

impl Layer {
    fn new(
        inputs: usize,
        hidden: usize,
        config: &RecurrentConfig,
        frame: FrameSize,
        vb: VarBuilder,
    ) -> Result<Self> {
        let conv = |name: &str, inputs: usize, outputs: usize| {
            GateConv::new(inputs, outputs, config, frame, vb.pp(name))
        };
        let gates = Gates::new(
            4,
            vec![
                (conv("conv_x", inputs, 4 * hidden)?, &[I, F, G, O]),
                (conv("conv_h", hidden, 4 * hidden)?, &[I, F, G, O]),
            ],
        );
        // The reference creates these two and never uses them.
        conv("conv_o", 2 * hidden, hidden)?;
        StepConv::new(&[hidden, 2 * hidden, 1, 1], vb.pp("conv_last"))?;
        Ok(Self { gates, hidden })
    }
}

/// Layers of ConvLSTM cells, and a 1x1 convolution to frames.
pub struct ConvLstmLayers {
    layers: Vec<Layer>,
    to_frame: StepConv,
    pixels: usize,
}

impl Stack for ConvLstmLayers {
    type Config = RecurrentConfig;
    /// h and c of each layer.
    type State = Vec<(Tensor, Tensor)>;

    fn recurrent(config: &RecurrentConfig) -> RecurrentConfig {
        config.clone()
    }

    fn build(config: &RecurrentConfig, frame: FrameSize, vb: VarBuilder) -> Result<Self> {
        let mut inputs = frame.channels;
        let mut layers = Vec::new();
        for (index, &hidden) in config.hidden.iter().enumerate() {
            layers.push(Layer::new(inputs, hidden, config, frame, vb.pp("cell_list").pp(index))?);
            inputs = hidden;
        }
        let to_frame = StepConv::new(&[frame.channels, inputs, 1, 1], vb.pp("conv_last"))?;
        Ok(Self { layers, to_frame, pixels: frame.pixels() })
    }

    fn prepare(&self) -> Result<Self> {
        let prepare = |layer: &Layer| Ok(Layer { gates: layer.gates.prepare()?, hidden: layer.hidden });
        let layers = self.layers.iter().map(prepare).collect::<Result<_>>()?;
        Ok(Self { layers, to_frame: self.to_frame.prepare()?, pixels: self.pixels })
    }

    fn start(&self, frame: &Tensor) -> Result<Self::State> {
        let zeros = |layer: &Layer| {
            let zeros = crate::recurrent::zeros(frame, layer.hidden)?;
            Ok((zeros.clone(), zeros))
        };
        self.layers.iter().map(zeros).collect()
    }

    fn step(&self, frame: &Tensor, state: &mut Self::State) -> Result<Tensor> {
        let mut input = frame.clone();
        for (layer, (h, c)) in self.layers.iter().zip(state) {
            let gates = layer.gates.forward(&[&input, h])?;
            *c = update_memory(&gates, c, CELL)?;
            *h = open_output(OutputGate::Sigmoid, &gates, O, None, c)?;
            input = h.clone();
        }
        self.to_frame.forward(&input)
    }

    fn multiply_adds(&self) -> usize {
        let weights = self.layers.iter().map(|layer| layer.gates.weights()).sum::<usize>();
        self.pixels * (weights + self.to_frame.weights())
    }

    fn unused_parameters(&self) -> &'static [&'static str] {
        &["cell_list.*.conv_o.*", "cell_list.*.conv_last.*"]
    }
}
