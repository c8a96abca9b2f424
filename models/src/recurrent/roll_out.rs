//! Rolls out a stack of cells over time: its input at each step, and its predictions.

use candle_core::Tensor;
use candlepower::prelude::*;

use super::Stack;

/// The source of each input frame of a roll-out.
#[derive(Clone, Copy)]
pub enum Feed<'a> {
    /// The given frames, then the model's own predictions.
    FreeRunning,
    /// The given frames, then a true frame where the mask (T_out - 1 frames) is set, and the model's own
    /// prediction elsewhere.
    Teacher(&'a Mask),
    /// The first frame, then a true frame where the mask (T_in + T_out - 2 frames) is set, and the model's
    /// own prediction elsewhere.
    Reverse(&'a Mask),
}

/// Which samples see a true frame, for each frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mask {
    frames: Vec<Vec<bool>>,
}

impl Mask {
    /// Calls `draw` for each sample of each frame, with that frame's probability.
    pub fn new(samples: usize, probabilities: &[f64], mut draw: impl FnMut(f64) -> bool) -> Self {
        let mut frame = |&p: &f64| (0..samples).map(|_| draw(p)).collect();
        Self { frames: probabilities.iter().map(&mut frame).collect() }
    }

    /// The true frame for samples whose mask is set at this frame, (B, H, W, C); `own` for the others.
    fn mix(&self, frame: usize, truth: &Tensor, own: &Tensor) -> Result<Tensor> {
        let draws = self.frames.get(frame).ok_or_else(|| {
            Error::msg(format!("a mask of {} frames has none of number {frame}", self.frames.len()))
        })?;
        if draws.iter().all(|&drawn| drawn) {
            return Ok(truth.clone());
        }
        if draws.iter().all(|&drawn| !drawn) {
            return Ok(own.clone());
        }
        let drawn: Vec<f32> = draws.iter().map(|&drawn| f32::from(drawn)).collect();
        let drawn = Tensor::from_vec(drawn, (draws.len(), 1, 1, 1), own.device())?.to_dtype(own.dtype())?;
        Ok((truth.broadcast_mul(&drawn)? + own.broadcast_mul(&(1. - drawn)?)?)?)
    }
}

/// The result of a roll-out.
pub struct RollOut<S: Stack> {
    /// (steps, B, H, W, C): the predicted next frame of each step.
    pub predictions: Tensor,
    /// The state after the last step.
    pub state: S::State,
}

/// Rolls a stack out over `frames`, (T, B, H, W, C), of which the first `frames_in` are given; `feed` decides
/// whether the others are read.
pub fn roll_out<S: Stack>(
    stack: &S,
    frames: &Tensor,
    frames_in: usize,
    steps: usize,
    feed: Feed,
) -> Result<RollOut<S>> {
    let truth = |t: usize| frames.get(t);
    let mut state = stack.start(&truth(0)?)?;
    let mut predictions: Vec<Tensor> = Vec::with_capacity(steps);
    for t in 0..steps {
        let frame = match (predictions.last(), feed) {
            (None, _) => truth(t)?,
            (Some(own), Feed::Reverse(mask)) => mask.mix(t - 1, &truth(t)?, own)?,
            _ if t < frames_in => truth(t)?,
            (Some(own), Feed::Teacher(mask)) => mask.mix(t - frames_in, &truth(t)?, own)?,
            (Some(own), Feed::FreeRunning) => own.clone(),
        };
        predictions.push(stack.step(&frame, &mut state)?);
    }
    Ok(RollOut { predictions: Tensor::stack(&predictions, 0)?, state })
}
