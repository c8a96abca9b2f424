//! MIM: separate memories for what changes and what stays (Wang et al. 2019, "Memory in memory: A predictive
//! neural network for learning higher-order non-stationarity from spatiotemporal dynamics").

use candle_core::Tensor;
use candle_nn::Init;
use candlepower::nn::recurrent::{MemoryUpdate, OutputGate, StepConv, open_output, update_memory};
use candlepower::prelude::*;

use crate::predrnn::StLstm;
use crate::recurrent::gates::{GateConv, Gates};
use crate::recurrent::{FrameSize, Recurrent, RecurrentConfig, Stack, zeros};

/// The module `mim`.
pub type Mim = Recurrent<MimLayers>;

// Positions of the gates. In a block, the memory's gates are the primed ones.
const I: usize = 0;
const G: usize = 1;
const F: usize = 2;
const O: usize = 3;
const I_C: usize = 0;
const G_C: usize = 1;
const I_M: usize = 2;
const G_M: usize = 3;
const F_M: usize = 4;
const O_B: usize = 5;

/// c' = σ(f + 1) c + σ(i) tanh(g)
const PEEPHOLE_CELL: MemoryUpdate =
    MemoryUpdate { input: I, candidate: G, forget: Some((F, 1.)), squash: false };
/// c' = output of MIM-S + σ(i) tanh(g)
const CELL: MemoryUpdate = MemoryUpdate { input: I_C, candidate: G_C, forget: None, squash: false };
/// m' = σ(f' + 1) m + σ(i') tanh(g')
const MEMORY: MemoryUpdate =
    MemoryUpdate { input: I_M, candidate: G_M, forget: Some((F_M, 1.)), squash: false };

/// An LSTM with peepholes, one weight per value of the cell: MIM-N and MIM-S (equations 2 and 3 of the paper).
struct PeepholeLstm {
    gates: Gates,
    /// (H, W, 2N): peepholes of i and f.
    before: Tensor,
    /// (H, W, N): peepholes of o.
    after: Tensor,
}

impl PeepholeLstm {
    fn new(hidden: usize, config: &RecurrentConfig, frame: FrameSize, vb: VarBuilder) -> Result<Self> {
        let conv = |name: &str| GateConv::new(hidden, 4 * hidden, config, frame, vb.pp(name));
        let peephole = |name: &str, channels: usize| -> Result<Tensor> {
            let shape = (channels, frame.height, frame.width);
            Ok(vb.get_with_hints(shape, name, Init::Const(0.))?.permute((1, 2, 0))?)
        };
        let gates =
            vec![(conv("conv_h_concat")?, &[I, G, F, O][..]), (conv("conv_x_concat")?, &[I, G, F, O])];
        let (before, after) = (peephole("ct_weight", 2 * hidden)?, peephole("oc_weight", hidden)?);
        Ok(Self { gates: Gates::new(4, gates), before, after })
    }

    fn prepare(&self) -> Result<Self> {
        let [before, after] = [&self.before, &self.after].map(|weight| weight.contiguous());
        Ok(Self { gates: self.gates.prepare()?, before: before?, after: after? })
    }

    /// Returns the new h and c.
    fn step(&self, x: &Tensor, h: &Tensor, c: &Tensor) -> Result<(Tensor, Tensor)> {
        let weight = |weight: &Tensor| weight.to_dtype(c.dtype());
        let before = Tensor::cat(&[c, c], 3)?.broadcast_mul(&weight(&self.before)?)?;
        let gates = self.gates.forward_with(&[h, x], &[(&before, &[I, F])])?;
        let c = update_memory(&gates, c, PEEPHOLE_CELL)?;
        let after = c.broadcast_mul(&weight(&self.after)?)?;
        Ok((open_output(OutputGate::Sigmoid, &gates, O, Some(&after), &c)?, c))
    }
}

/// A layer above the lowest one (figure 3 of the paper).
struct Block {
    x: GateConv,
    gates: Gates,
    stays: PeepholeLstm,
    to_hidden: StepConv,
}

impl Block {
    fn new(hidden: usize, config: &RecurrentConfig, frame: FrameSize, vb: VarBuilder) -> Result<Self> {
        let conv =
            |name: &str, gates: usize| GateConv::new(hidden, gates * hidden, config, frame, vb.pp(name));
        let gates = vec![
            (conv("conv_t_cc", 3)?, &[I_C, G_C, O_B][..]),
            (conv("conv_s_cc", 4)?, &[I_M, G_M, F_M, O_B]),
        ];
        Ok(Self {
            x: conv("conv_x_cc", 4)?,
            gates: Gates::new(6, gates),
            stays: PeepholeLstm::new(hidden, config, frame, vb.clone())?,
            to_hidden: StepConv::new(&[hidden, 2 * hidden, 1, 1], vb.pp("conv_last"))?,
        })
    }

    fn prepare(&self) -> Result<Self> {
        Ok(Self {
            x: self.x.prepare()?,
            gates: self.gates.prepare()?,
            stays: self.stays.prepare()?,
            to_hidden: self.to_hidden.prepare()?,
        })
    }

    /// `change` is the output of MIM-N for the change of the layer below.
    fn step(&self, x: &Tensor, change: &Tensor, state: &mut BlockState, m: &mut Tensor) -> Result<()> {
        let BlockState { h, c, stays } = state;
        let width = c.dim(3)?;
        let said = self.x.forward(x)?;
        // The cell and the memory share the input's values for i and g.
        let of_cell = said.narrow(3, 0, 2 * width)?;
        let gates =
            self.gates.forward_with(&[h, m], &[(&of_cell, &[I_C, G_C]), (&said, &[I_M, G_M, F_M, O_B])])?;
        *m = update_memory(&gates, m, MEMORY)?;
        // As in the reference, no gradient passes through MIM-S's cell from step to step.
        let (staying, after) = self.stays.step(change, c, &stays.detach())?;
        *stays = after;
        *c = update_memory(&gates, &staying, CELL)?;
        let y = self.to_hidden.forward(&Tensor::cat(&[&*c, &*m], 3)?)?;
        *h = open_output(OutputGate::Sigmoid, &gates, O_B, None, &y)?;
        Ok(())
    }

    fn weights(&self) -> usize {
        self.x.weights() + self.gates.weights() + self.stays.gates.weights() + self.to_hidden.weights()
    }
}

/// The state of a block.
pub struct BlockState {
    h: Tensor,
    c: Tensor,
    /// The cell of MIM-S.
    stays: Tensor,
}

/// The state of all layers.
pub struct MimState {
    /// h of the lowest layer; c is its cell.
    h: Tensor,
    c: Tensor,
    blocks: Vec<BlockState>,
    /// h and c of the MIM-N below each block.
    changes: Vec<(Tensor, Tensor)>,
    memory: Tensor,
    is_first: bool,
}

/// An ST-LSTM cell, blocks above it, and a 1x1 convolution to frames.
pub struct MimLayers {
    lowest: StLstm,
    blocks: Vec<Block>,
    changes: Vec<PeepholeLstm>,
    to_frame: StepConv,
    hidden: usize,
    pixels: usize,
}

impl Stack for MimLayers {
    type Config = RecurrentConfig;
    type State = MimState;

    fn recurrent(config: &RecurrentConfig) -> RecurrentConfig {
        config.clone()
    }

    fn build(config: &RecurrentConfig, frame: FrameSize, vb: VarBuilder) -> Result<Self> {
        let (hidden, layers) = (config.equal_widths()?, config.hidden.len());
        if layers < 2 {
            return Err(Error::setting("hidden", "changes are seen between layers: expected at least two"));
        }
        let (layer, change) = (vb.pp("stlstm_layer"), vb.pp("stlstm_layer_diff"));
        let changes = |index: usize| {
            // The reference creates this one and never uses it.
            StepConv::new(&[hidden, 2 * hidden, 1, 1], change.pp(index).pp("conv_last"))?;
            PeepholeLstm::new(hidden, config, frame, change.pp(index))
        };
        Ok(Self {
            lowest: StLstm::new(frame.channels, hidden, config, frame, layer.pp(0))?,
            blocks: (1..layers)
                .map(|index| Block::new(hidden, config, frame, layer.pp(index)))
                .collect::<Result<_>>()?,
            changes: (0..layers - 1).map(changes).collect::<Result<_>>()?,
            to_frame: StepConv::new(&[frame.channels, hidden, 1, 1], vb.pp("conv_last"))?,
            hidden,
            pixels: frame.pixels(),
        })
    }

    fn prepare(&self) -> Result<Self> {
        Ok(Self {
            lowest: self.lowest.prepare()?,
            blocks: self.blocks.iter().map(Block::prepare).collect::<Result<_>>()?,
            changes: self.changes.iter().map(PeepholeLstm::prepare).collect::<Result<_>>()?,
            to_frame: self.to_frame.prepare()?,
            ..*self
        })
    }

    fn start(&self, frame: &Tensor) -> Result<MimState> {
        let zeros = zeros(frame, self.hidden)?;
        let block = |_: &Block| BlockState { h: zeros.clone(), c: zeros.clone(), stays: zeros.clone() };
        Ok(MimState {
            h: zeros.clone(),
            c: zeros.clone(),
            blocks: self.blocks.iter().map(block).collect(),
            changes: vec![(zeros.clone(), zeros.clone()); self.changes.len()],
            memory: zeros,
            is_first: true,
        })
    }

    fn step(&self, frame: &Tensor, state: &mut MimState) -> Result<Tensor> {
        let MimState { h, c, blocks, changes, memory, is_first } = state;
        let before = h.clone();
        self.lowest.step(frame, h, c, memory)?;
        // Before the second step nothing has changed.
        if !*is_first {
            let mut change = (&*h - before)?;
            for (cell, (h, c)) in self.changes.iter().zip(changes.iter_mut()) {
                (*h, *c) = cell.step(&change, h, c)?;
                change = h.clone();
            }
        }
        *is_first = false;
        let mut input = h.clone();
        for ((block, state), (change, _)) in self.blocks.iter().zip(blocks).zip(changes) {
            block.step(&input, change, state, memory)?;
            input = state.h.clone();
        }
        self.to_frame.forward(&input)
    }

    fn multiply_adds(&self) -> usize {
        let blocks = self.blocks.iter().map(Block::weights).sum::<usize>();
        let changes = self.changes.iter().map(|cell| cell.gates.weights()).sum::<usize>();
        self.pixels * (self.lowest.weights() + blocks + changes + self.to_frame.weights())
    }

    fn unused_parameters(&self) -> &'static [&'static str] {
        &["stlstm_layer_diff.*.conv_last.*"]
    }
}
