//! Ops with one to three tensors; candle has a separate trait for each count, but the implementation is the
//! same.

use crate::tensors::{for_kernels, packed, tracked, with_values};
use candle_core::{CpuStorage, CustomOp1, CustomOp2, CustomOp3, Layout, Result, Shape, Tensor, bail};
#[cfg(feature = "cuda")]
use candle_core::{CudaDevice, CudaStorage, backend::BackendStorage};

/// The implementation of an op on f32 tensors, all on the CPU or all on a CUDA device.
pub(crate) trait Several: Send + Sync + 'static {
    fn name(&self) -> &'static str;

    /// Computes the result from all values, in row-major order, and the tensors' layouts.
    fn run(&self, values: &[&[f32]], layouts: &[&Layout]) -> (CpuStorage, Shape);

    /// Computes the result on a CUDA device; `at` are the addresses of the tensors' values.
    #[cfg(feature = "cuda")]
    fn run_on_cuda(
        &self,
        device: &CudaDevice,
        at: &[u64],
        layouts: &[&Layout],
    ) -> Result<(CudaStorage, Shape)>;

    /// The gradient of each tensor that is tracked.
    fn gradients(&self, tensors: &[&Tensor], d: &Tensor) -> Result<Vec<Option<Tensor>>>;
}

/// Calls `f` with the values of one to three tensors on the CPU, in row-major order.
pub(crate) fn with_all_values<R>(tensors: &[&Tensor], f: impl FnOnce(&[&[f32]]) -> Result<R>) -> Result<R> {
    match tensors {
        [a] => with_values(a, |a| f(&[a])),
        [a, b] => with_values(a, |a| with_values(b, |b| f(&[a, b]))),
        [a, b, c] => with_values(a, |a| with_values(b, |b| with_values(c, |c| f(&[a, b, c])))),
        _ => bail!("expected one to three tensors, got {}", tensors.len()),
    }
}

/// Applies the op; it is part of the graph if a tensor is tracked.
pub(crate) fn apply<T: Several>(tensors: &[&Tensor], op: T) -> Result<Tensor> {
    let tensors = tensors.iter().map(|x| for_kernels(x)).collect::<Result<Vec<_>>>()?;
    let (op, gradients) = (Op(op), tensors.iter().any(tracked));
    match (&tensors[..], gradients) {
        ([a], true) => a.apply_op1(op),
        ([a], false) => a.apply_op1_no_bwd(&op),
        ([a, b], true) => a.apply_op2(b, op),
        ([a, b], false) => a.apply_op2_no_bwd(b, &op),
        ([a, b, c], true) => a.apply_op3(b, c, op),
        ([a, b, c], false) => a.apply_op3_no_bwd(b, c, &op),
        _ => bail!("{}: takes one to three tensors, got {}", op.0.name(), tensors.len()),
    }
}

struct Op<T>(T);

#[cfg(feature = "cuda")]
impl<T: Several> Op<T> {
    fn on_cuda(&self, tensors: &[(&CudaStorage, &Layout)]) -> Result<(CudaStorage, Shape)> {
        let at = tensors
            .iter()
            .map(|(x, layout)| crate::cuda::address_of(x, layout))
            .collect::<Result<Vec<_>>>()?;
        let layouts: Vec<&Layout> = tensors.iter().map(|(_, layout)| *layout).collect();
        self.0.run_on_cuda(tensors[0].0.device(), &at, &layouts)
    }
}

impl<T: Several> CustomOp1 for Op<T> {
    fn name(&self) -> &'static str {
        self.0.name()
    }
    fn cpu_fwd(&self, a: &CpuStorage, la: &Layout) -> Result<(CpuStorage, Shape)> {
        Ok(self.0.run(&[&packed(a, la)?], &[la]))
    }
    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, a: &CudaStorage, la: &Layout) -> Result<(CudaStorage, Shape)> {
        self.on_cuda(&[(a, la)])
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
        Ok(self.0.run(&[&packed(a, la)?, &packed(b, lb)?], &[la, lb]))
    }
    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        a: &CudaStorage,
        la: &Layout,
        b: &CudaStorage,
        lb: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        self.on_cuda(&[(a, la), (b, lb)])
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
        Ok(self.0.run(&[&packed(a, la)?, &packed(b, lb)?, &packed(c, lc)?], &[la, lb, lc]))
    }
    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        a: &CudaStorage,
        la: &Layout,
        b: &CudaStorage,
        lb: &Layout,
        c: &CudaStorage,
        lc: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        self.on_cuda(&[(a, la), (b, lb), (c, lc)])
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
