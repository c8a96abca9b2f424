//! Convolutions that say what gates do, and which gate stands where in each.

use candle_core::Tensor;
use candlepower::nn::recurrent::{StateNorm, StepConv, sum_gates};
use candlepower::prelude::*;

use super::{FrameSize, RecurrentConfig};

/// A convolution, and layer normalisation where it is asked for: parameters `0.weight`, and `1.weight` and `1.bias`.
pub struct GateConv {
    conv: StepConv,
    norm: Option<StateNorm>,
}

impl GateConv {
    /// From `inputs` to `outputs` channels.
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

    /// The same around a convolution that was made already.
    pub fn of(conv: StepConv, config: &RecurrentConfig, frame: FrameSize, vb: VarBuilder) -> Result<Self> {
        let norm = |_| StateNorm::new(&[conv.outputs(), frame.height, frame.width], vb.pp("1"));
        let norm = config.layer_norm.then_some(()).map(norm).transpose()?;
        Ok(Self { conv, norm })
    }

    /// The same for one roll-out.
    pub fn prepare(&self) -> Result<Self> {
        let norm = self.norm.as_ref().map(StateNorm::prepare).transpose()?;
        Ok(Self { conv: self.conv.prepare()?, norm })
    }

    /// (B, H, W, Cin) to (B, H, W, Cout).
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let y = self.conv.forward(x)?;
        self.norm.as_ref().map_or(Ok(y.clone()), |norm| norm.forward(&y))
    }

    /// Multiply-adds a pixel.
    pub fn weights(&self) -> usize {
        self.conv.weights()
    }
}

/// Several convolutions that speak about the same gates, each in an order of its own.
pub struct Gates {
    count: usize,
    convs: Vec<(GateConv, &'static [usize])>,
}

impl Gates {
    /// Convolutions, each with the places among `count` gates at which its output's gates stand.
    pub fn new(count: usize, convs: Vec<(GateConv, &'static [usize])>) -> Self {
        Self { count, convs }
    }

    /// The same for one roll-out.
    pub fn prepare(&self) -> Result<Self> {
        let prepare = |(conv, places): &(GateConv, &'static [usize])| Ok((conv.prepare()?, *places));
        Ok(Self { count: self.count, convs: self.convs.iter().map(prepare).collect::<Result<_>>()? })
    }

    /// The gates' pre-activations, (B, H, W, count N), from an input for each convolution.
    pub fn forward(&self, inputs: &[&Tensor]) -> Result<Tensor> {
        self.forward_with(inputs, &[])
    }

    /// The same, with more terms.
    pub fn forward_with(&self, inputs: &[&Tensor], more: &[(&Tensor, &[usize])]) -> Result<Tensor> {
        let said = self.convs.iter().zip(inputs);
        let said: Vec<Tensor> = said.map(|((conv, _), x)| conv.forward(x)).collect::<Result<_>>()?;
        let terms = said.iter().zip(&self.convs).map(|(values, (_, places))| (values, *places));
        sum_gates(self.count, &terms.chain(more.iter().copied()).collect::<Vec<_>>())
    }

    /// Multiply-adds a pixel.
    pub fn weights(&self) -> usize {
        self.convs.iter().map(|(conv, _)| conv.weights()).sum()
    }
}
