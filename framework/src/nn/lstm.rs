//! Layers over vectors: (B, features).

use candle_core::{DType, Tensor};
use candle_nn::{Init, VarBuilder};

use super::recurrent::{MemoryUpdate, OutputGate, open_output, update_memory};
use super::widened;
use crate::error::Result;

/// A linear layer with weight (Cout, Cin) and optional bias (Cout), with PyTorch's names and default initial
/// values.
#[derive(Debug, Clone)]
pub struct Linear {
    weight: Tensor,
    bias: Option<Tensor>,
}

impl Linear {
    /// Creates a layer with weight and bias initially uniform within 1/sqrt(Cin).
    pub fn new(inputs: usize, outputs: usize, vb: VarBuilder) -> Result<Self> {
        let bound = 1. / (inputs as f64).sqrt();
        let init = Init::Uniform { lo: -bound, up: bound };
        Self::with_init(inputs, outputs, init, Some(init), vb)
    }

    /// Creates a layer with these initial values, without a bias if `bias` is `None`.
    pub fn with_init(
        inputs: usize,
        outputs: usize,
        weight: Init,
        bias: Option<Init>,
        vb: VarBuilder,
    ) -> Result<Self> {
        let weight = vb.get_with_hints((outputs, inputs), "weight", weight)?;
        let bias = bias.map(|bias| vb.get_with_hints(outputs, "bias", bias)).transpose()?;
        Ok(Self { weight, bias })
    }

    /// (B, Cin) to (B, Cout).
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        if widened(x) {
            let bias = self.bias.as_ref().map(|bias| bias.to_dtype(DType::F32)).transpose()?;
            let wide = Self { weight: self.weight.to_dtype(DType::F32)?, bias };
            return Ok(wide.forward(&x.to_dtype(DType::F32)?)?.to_dtype(x.dtype())?);
        }
        let y = x.matmul(&self.weight.t()?)?;
        Ok(match &self.bias {
            Some(bias) => y.broadcast_add(bias)?,
            None => y,
        })
    }
}

/// An LSTM cell (Hochreiter and Schmidhuber 1997) with the names, gates (i, f, g, o) and two biases of
/// PyTorch's `nn.LSTMCell`. Its state has at least 32 bits, whatever the precision.
#[derive(Debug, Clone)]
pub struct LstmCell {
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor,
    bias_hh: Tensor,
    hidden: usize,
}

/// The state of an [`LstmCell`]: output h and cell c, each (B, hidden).
#[derive(Debug, Clone)]
pub struct LstmState {
    /// The output.
    pub h: Tensor,
    /// The cell.
    pub c: Tensor,
}

impl LstmCell {
    /// Creates parameters `weight_ih`, `weight_hh`, `bias_ih`, `bias_hh`, initially uniform within
    /// 1/sqrt(hidden).
    pub fn new(inputs: usize, hidden: usize, vb: VarBuilder) -> Result<Self> {
        let bound = 1. / (hidden as f64).sqrt();
        let init = Init::Uniform { lo: -bound, up: bound };
        Ok(Self {
            weight_ih: vb.get_with_hints((4 * hidden, inputs), "weight_ih", init)?,
            weight_hh: vb.get_with_hints((4 * hidden, hidden), "weight_hh", init)?,
            bias_ih: vb.get_with_hints(4 * hidden, "bias_ih", init)?,
            bias_hh: vb.get_with_hints(4 * hidden, "bias_hh", init)?,
            hidden,
        })
    }

    /// One step with input (B, inputs), from `state` or from zeros.
    pub fn step(&self, x: &Tensor, state: Option<&LstmState>) -> Result<LstmState> {
        let wide = if x.dtype() == DType::F64 { DType::F64 } else { DType::F32 };
        let of = |parameter: &Tensor| parameter.to_dtype(wide);
        let bias = (of(&self.bias_ih)? + of(&self.bias_hh)?)?;
        let mut gates = x.to_dtype(wide)?.matmul(&of(&self.weight_ih)?.t()?)?.broadcast_add(&bias)?;
        if let Some(LstmState { h, .. }) = state {
            gates = (gates + h.matmul(&of(&self.weight_hh)?.t()?)?)?;
        }
        // Gates i, f, g, o, in PyTorch's order.
        let [i, f, g, o] = [0, 1, 2, 3];
        let update = MemoryUpdate { input: i, candidate: g, forget: state.map(|_| (f, 0.)), squash: false };
        let before = match state {
            Some(LstmState { c, .. }) => c.clone(),
            None => Tensor::zeros((x.dim(0)?, self.hidden), wide, x.device())?,
        };
        let c = update_memory(&gates, &before, update)?;
        Ok(LstmState { h: open_output(OutputGate::Sigmoid, &gates, o, None, &c)?, c })
    }
}
