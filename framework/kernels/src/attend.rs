//! Attention to tokens that serve as both keys and values.

use crate::softmax::{softmax, softmax_gradient};
use crate::tensors::{check_type, tracked};
use candle_core::{CpuStorage, CustomOp2, DType, Layout, Result, Shape, Tensor, bail};

/// softmax(q k') k for the queries `asked`, q (B, Q, N), and the tokens k (B, K, N): (B, Q, N), unscaled.
/// Differentiable in both. The weights (B, Q, K) are saved for backward, and nothing else of that size.
///
/// # Errors
/// If the shapes are incompatible, or a tensor is not f32 on the CPU.
pub fn attend(asked: &Tensor, tokens: &Tensor) -> Result<Tensor> {
    check_type("attend", "what is asked", asked, DType::F32)?;
    check_type("attend", "tokens", tokens, DType::F32)?;
    match (asked.dims(), tokens.dims()) {
        (&[batch, _, width], &[b, _, w]) if (batch, width) == (b, w) => (),
        (asked, tokens) => bail!("attend: expected (B, Q, N) and (B, K, N), got {asked:?} and {tokens:?}"),
    }
    let (q, k) = (asked.detach(), tokens.detach());
    let weights = softmax(&q.matmul(&k.t()?)?)?;
    let y = weights.matmul(&k)?;
    if !tracked(asked) && !tracked(tokens) {
        return Ok(y);
    }
    asked.apply_op2(tokens, Attend { weights, y: y.flatten_all()?.to_vec1()? })
}

struct Attend {
    weights: Tensor,
    /// Computed before the op is created, with candle's own matrix products.
    y: Vec<f32>,
}

impl CustomOp2 for Attend {
    fn name(&self) -> &'static str {
        "attend"
    }

    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        asked: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        Ok((CpuStorage::F32(self.y.clone()), asked.shape().clone()))
    }

    fn bwd(
        &self,
        asked: &Tensor,
        tokens: &Tensor,
        _: &Tensor,
        d: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (q, k, d) = (asked.detach(), tokens.detach(), d.contiguous()?);
        let scores = softmax_gradient(&self.weights, &d.matmul(&k.t()?)?)?;
        let d_asked = asked.track_op().then(|| scores.matmul(&k)).transpose()?;
        let d_tokens = || scores.t()?.matmul(&q)? + self.weights.t()?.matmul(&d)?;
        Ok((d_asked, tokens.track_op().then(d_tokens).transpose()?))
    }
}
