//! The tutorial's second variant: a decoder that reads each frame that it has predicted.

use candle_core::{D, DType, Tensor};
use candlepower::nn::Conv;
use candlepower::nn::recurrent::{MemoryUpdate, OutputGate, open_output, update_memory};
use candlepower::prelude::*;

use super::ToFrame;

// Positions of the gates.
const I: usize = 0;
const F: usize = 1;
const O: usize = 2;
const G: usize = 3;

/// c' = σ(f) c + σ(i) tanh(g)
const CELL: MemoryUpdate = MemoryUpdate { input: I, candidate: G, forget: Some((F, 0.)), squash: false };

/// The cells of encoder and decoder, run one step at a time, because each step's input depends on the
/// previous step.
pub(super) struct FramesBack {
    encoder: [Conv; 2],
    decoder: [Conv; 2],
}

/// h and c.
type State = (Tensor, Tensor);

impl FramesBack {
    pub(super) fn new(encoder: &[Conv; 2], decoder: &[Conv; 2]) -> Self {
        Self { encoder: encoder.clone(), decoder: decoder.clone() }
    }

    /// Frames (B, T_in, H, W, C) to the `steps` frames that follow, (B, steps, H, W, C).
    pub(super) fn forward(&self, frames: &Tensor, steps: usize, to_frame: &ToFrame) -> Result<Tensor> {
        let frame_at = |t: usize| -> Result<Tensor> { Ok(frames.narrow(1, t, 1)?.squeeze(1)?) };
        let frames_in = frames.dim(1)?;
        let mut states = [None, None];
        let mut encoded = Vec::with_capacity(frames_in);
        for t in 0..frames_in {
            encoded.push(step(&self.encoder, &frame_at(t)?, &mut states)?);
        }
        let encoded = Tensor::stack(&encoded, 1)?;
        let mut frame = frame_at(frames_in - 1)?;
        let mut predicted = Vec::with_capacity(steps);
        for _ in 0..steps {
            let output = step(&self.decoder, &frame, &mut states)?;
            frame = to_frame.forward(&output.unsqueeze(1)?, &encoded)?.squeeze(1)?;
            predicted.push(frame.clone());
        }
        Ok(Tensor::stack(&predicted, 1)?)
    }
}

/// One step of both cells; returns the upper one's output, (B, H, W, N). A state of `None` means zeros.
fn step(cells: &[Conv; 2], frame: &Tensor, states: &mut [Option<State>; 2]) -> Result<Tensor> {
    let mut input = frame.clone();
    for (conv, state) in cells.iter().zip(states) {
        let (h, c) = match state.take() {
            Some(state) => state,
            None => zeros(conv, frame)?,
        };
        let gates = conv.same(&Tensor::cat(&[&input, &h], D::Minus1)?)?;
        // Memories always have at least 32 bits.
        let gates = gates.to_dtype(c.dtype())?;
        let c = update_memory(&gates, &c, CELL)?;
        let h = open_output(OutputGate::Sigmoid, &gates, O, None, &c)?;
        input = h.to_dtype(frame.dtype())?;
        *state = Some((input.clone(), c));
    }
    Ok(input)
}

fn zeros(conv: &Conv, frame: &Tensor) -> Result<State> {
    let (batch, height, width, _) = frame.dims4()?;
    let size = (batch, height, width, conv.bias.elem_count() / 4);
    let wide = if frame.dtype() == DType::F64 { DType::F64 } else { DType::F32 };
    let h = Tensor::zeros(size, frame.dtype(), frame.device())?;
    Ok((h, Tensor::zeros(size, wide, frame.device())?))
}
