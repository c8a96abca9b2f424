//! Ops of one to three tensors: candle has a trait for each number, and what they compute is the same.

use crate::tensors::{packed, tracked};
use candle_core::{CpuStorage, CustomOp1, CustomOp2, CustomOp3, Layout, Result, Shape, Tensor, bail};

/// What an op does with its tensors, f32 on the CPU.
pub(crate) trait Several: Send + Sync + 'static {
    fn name(&self) -> &'static str;

    /// The result, from all values in row-major order, and the layout of the first.
    fn run(&self, values: &[&[f32]], first: &Layout) -> (CpuStorage, Shape);

    /// The gradient of each tensor that is tracked.
    fn gradients(&self, tensors: &[&Tensor], d: &Tensor) -> Result<Vec<Option<Tensor>>>;
}

/// Applies the op; it is in the graph where a tensor is tracked.
pub(crate) fn apply<T: Several>(tensors: &[&Tensor], op: T) -> Result<Tensor> {
    let (op, gradients) = (Op(op), tensors.iter().any(|tensor| tracked(tensor)));
    match (tensors, gradients) {
        (&[a], true) => a.apply_op1(op),
        (&[a], false) => a.apply_op1_no_bwd(&op),
        (&[a, b], true) => a.apply_op2(b, op),
        (&[a, b], false) => a.apply_op2_no_bwd(b, &op),
        (&[a, b, c], true) => a.apply_op3(b, c, op),
        (&[a, b, c], false) => a.apply_op3_no_bwd(b, c, &op),
        _ => bail!("{}: takes one to three tensors, got {}", op.0.name(), tensors.len()),
    }
}

struct Op<T>(T);

impl<T: Several> CustomOp1 for Op<T> {
    fn name(&self) -> &'static str {
        self.0.name()
    }
    fn cpu_fwd(&self, a: &CpuStorage, la: &Layout) -> Result<(CpuStorage, Shape)> {
        Ok(self.0.run(&[&packed(a, la)?], la))
    }
    fn bwd(&self, a: &Tensor, _: &Tensor, d: &Tensor) -> Result<Option<Tensor>> {
        Ok(self.0.gradients(&[a], d)?.into_iter().next().flatten())
    }
}

impl<T: Several> CustomOp2 for Op<T> {
    fn name(&self) -> &'static str {
        self.0.name()
    }
    fn cpu_fwd(
        &self,
        a: &CpuStorage,
        la: &Layout,
        b: &CpuStorage,
        lb: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        Ok(self.0.run(&[&packed(a, la)?, &packed(b, lb)?], la))
    }
    fn bwd(
        &self,
        a: &Tensor,
        b: &Tensor,
        _: &Tensor,
        d: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let mut gradients = self.0.gradients(&[a, b], d)?.into_iter();
        Ok((gradients.next().flatten(), gradients.next().flatten()))
    }
}

impl<T: Several> CustomOp3 for Op<T> {
    fn name(&self) -> &'static str {
        self.0.name()
    }
    fn cpu_fwd(
        &self,
        a: &CpuStorage,
        la: &Layout,
        b: &CpuStorage,
        lb: &Layout,
        c: &CpuStorage,
        lc: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        Ok(self.0.run(&[&packed(a, la)?, &packed(b, lb)?, &packed(c, lc)?], la))
    }
    fn bwd(
        &self,
        a: &Tensor,
        b: &Tensor,
        c: &Tensor,
        _: &Tensor,
        d: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let mut gradients = self.0.gradients(&[a, b, c], d)?.into_iter();
        Ok((gradients.next().flatten(), gradients.next().flatten(), gradients.next().flatten()))
    }
}
