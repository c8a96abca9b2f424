//! Convolutions that compute gates, each with its own order of gates.

use candle_core::Tensor;
use candlepower::nn::recurrent::{StateNorm, StepConv, sum_gates};
use candlepower::prelude::*;

use super::{FrameSize, RecurrentConfig};

/// A convolution with optional layer normalisation. Parameters: `0.weight`, and `1.weight` and `1.bias`.
pub struct GateConv {
    conv: StepConv,
    norm: Option<StateNorm>,
}

impl GateConv {
    /// Creates a convolution from `inputs` to `outputs` channels.
    pub fn new(
        inputs: usize,
        outputs: usize,
        config: &RecurrentConfig,
        frame: FrameSize,
        vb: VarBuilder,
    ) -> Result<Self> {
        let shape = [outputs, inputs, config.kernel, config.kernel];
        Self::of(StepConv::new(&shape, vb.pp("0"))?, config, frame, vb)
    }

    /// Wraps an existing convolution.
    pub fn of(conv: StepConv, config: &RecurrentConfig, frame: FrameSize, vb: VarBuilder) -> Result<Self> {
        let norm = |_| StateNorm::new(&[conv.outputs(), frame.height, frame.width], vb.pp("1"));
        let norm = config.layer_norm.then_some(()).map(norm).transpose()?;
        Ok(Self { conv, norm })
    }

    /// A copy for one roll-out, whose steps share work; see [`StepConv::prepare`].
    pub fn prepare(&self) -> Result<Self> {
        let norm = self.norm.as_ref().map(StateNorm::prepare).transpose()?;
        Ok(Self { conv: self.conv.prepare()?, norm })
    }

    /// (B, H, W, Cin) to (B, H, W, Cout).
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let y = self.conv.forward(x)?;
        self.norm.as_ref().map_or(Ok(y.clone()), |norm| norm.forward(&y))
    }

    /// Multiply-adds per pixel.
    pub fn weights(&self) -> usize {
        self.conv.weights()
    }
}

/// Several convolutions that contribute to the same gates, each in its own order.
pub struct Gates {
    count: usize,
    convs: Vec<(GateConv, &'static [usize])>,
}

impl Gates {
    /// Creates gates from convolutions, each with the positions of its output's gates among `count` gates.
    pub fn new(count: usize, convs: Vec<(GateConv, &'static [usize])>) -> Self {
        Self { count, convs }
    }

    /// A copy for one roll-out, whose steps share work; see [`StepConv::prepare`].
    pub fn prepare(&self) -> Result<Self> {
        let prepare = |(conv, places): &(GateConv, &'static [usize])| Ok((conv.prepare()?, *places));
        Ok(Self { count: self.count, convs: self.convs.iter().map(prepare).collect::<Result<_>>()? })
    }

    /// The gates' pre-activations, (B, H, W, count N), from one input per convolution.
    pub fn forward(&self, inputs: &[&Tensor]) -> Result<Tensor> {
        self.forward_with(inputs, &[])
    }

    /// Like [`forward`](Self::forward), with additional terms.
    pub fn forward_with(&self, inputs: &[&Tensor], more: &[(&Tensor, &[usize])]) -> Result<Tensor> {
        let said = self.convs.iter().zip(inputs);
        let said: Vec<Tensor> = said.map(|((conv, _), x)| conv.forward(x)).collect::<Result<_>>()?;
        let terms = said.iter().zip(&self.convs).map(|(values, (_, places))| (values, *places));
        sum_gates(self.count, &terms.chain(more.iter().copied()).collect::<Vec<_>>())
    }

    /// Multiply-adds per pixel.
    pub fn weights(&self) -> usize {
        self.convs.iter().map(|(conv, _)| conv.weights()).sum()
    }
}
