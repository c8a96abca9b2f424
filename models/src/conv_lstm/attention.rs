//! Attention of the decoder over the encoder's outputs, pixel by pixel.

use candle_core::{D, Tensor};
use candle_nn::ops::softmax;
use candlepower::nn::Conv;
use candlepower::prelude::*;

/// Scaled dot-product attention. Dot products between a decoder output o and the encoder's outputs at the same pixel
/// weight the latter; their weighted sum s and o become tanh(W \[o; s\]) (Luong et al. 2015, "Effective approaches to
/// attention-based neural machine translation", equations 5 and 8, with a score at each pixel).
pub(super) struct Attention {
    query: Conv,
    key: Conv,
    combine: Conv,
}

impl Attention {
    /// Creates the attention for states of `hidden` channels.
    pub(super) fn new(hidden: usize, vb: VarBuilder) -> Result<Self> {
        Ok(Self {
            query: Conv::new(&[hidden, hidden, 1, 1], vb.pp("query"))?,
            key: Conv::new(&[hidden, hidden, 1, 1], vb.pp("key"))?,
            combine: Conv::new(&[hidden, 2 * hidden, 1, 1], vb.pp("combine"))?,
        })
    }

    /// Combines outputs (B, T_out, H, W, N) with their attention over `encoded`, (B, T_in, H, W, N): (B,
    /// T_out, H, W, N).
    pub(super) fn forward(&self, outputs: &Tensor, encoded: &Tensor) -> Result<Tensor> {
        let (queries, keys) = (self.query.same(outputs)?, self.key.same(encoded)?);
        let scale = (outputs.dim(D::Minus1)? as f64).sqrt();
        let mut seen = Vec::new();
        for t in 0..outputs.dim(1)? {
            // (B, T_in, H, W, 1)
            let scores = (keys.broadcast_mul(&queries.narrow(1, t, 1)?)?.sum_keepdim(D::Minus1)? / scale)?;
            seen.push(encoded.broadcast_mul(&softmax(&scores, 1)?)?.sum(1)?);
        }
        let both = Tensor::cat(&[outputs, &Tensor::stack(&seen, 1)?], D::Minus1)?;
        Ok(self.combine.same(&both)?.tanh()?)
    }

    /// Multiply-adds per pixel.
    pub(super) fn multiply_adds(&self, frames_in: usize, frames_out: usize) -> usize {
        let weights = |conv: &Conv| conv.weight.elem_count();
        let hidden = self.query.bias.elem_count();
        let looks = 2 * frames_in * frames_out * hidden;
        frames_in * weights(&self.key) + frames_out * (weights(&self.query) + weights(&self.combine)) + looks
    }
}
