//! Tensors that many ops share, or that one op needs in addition to the three that candle allows.
//!
//! Each is represented in the graph by a one-element tensor, its `number`. Ops add to the shared gradient in
//! place, and the number's backward pass, which candle runs after those of all ops that depend on it, passes
//! the sum on to the tensor. Without this, candle would allocate a gradient for each use and add them up.

use crate::tensors::{check_type, tracked, with_values};
use candle_core::{CpuStorage, CustomOp1, DType, Device, Layout, Result, Shape, Tensor};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// A tensor for repeated use by later steps, f32 on the CPU.
#[derive(Clone, Debug)]
pub struct Kept {
    shared: Arc<Values>,
    /// Represents the tensor in the graph; shape (1).
    number: Tensor,
}

#[derive(Debug)]
struct Values {
    values: Tensor,
    /// The sum over all uses so far; empty before the first one.
    gradient: Mutex<Vec<f32>>,
}

impl Kept {
    /// Captures the tensor as it is now; later changes are not seen.
    ///
    /// # Errors
    /// If it is not f32 on the CPU, or has no elements.
    pub fn new(x: &Tensor) -> Result<Kept> {
        check_type("kept", "the tensor", x, DType::F32)?;
        let values = x.detach().contiguous()?;
        let shared = Arc::new(Values { values, gradient: Mutex::default() });
        let op = Number(shared.clone());
        let number = if tracked(x) { x.apply_op1(op)? } else { x.apply_op1_no_bwd(&op)? };
        Ok(Kept { shared, number })
    }

    /// The values, outside the graph.
    pub fn values(&self) -> &Tensor {
        &self.shared.values
    }

    /// Whether a backward pass may request its gradient.
    pub(crate) fn tracked(&self) -> bool {
        self.number.track_op()
    }

    /// Calls `f` with the values in row-major order.
    pub(crate) fn with_values<R>(&self, f: impl FnOnce(&[f32]) -> Result<R>) -> Result<R> {
        with_values(&self.shared.values, f)
    }

    /// The sum of the gradients so far; zeros before the first.
    pub(crate) fn gradient(&self) -> MutexGuard<'_, Vec<f32>> {
        let mut gradient = self.shared.gradient.lock().unwrap_or_else(PoisonError::into_inner);
        if gradient.is_empty() {
            *gradient = vec![0.; self.shared.values.elem_count()];
        }
        gradient
    }

    /// The numbers of several tensors as one tensor, on which an op depends; its gradient is zeros.
    pub(crate) fn numbers<'a>(kept: impl IntoIterator<Item = &'a Kept>) -> Result<Tensor> {
        let numbers: Vec<&Tensor> = kept.into_iter().map(|kept| &kept.number).collect();
        Tensor::cat(&numbers, 0)
    }
}

struct Number(Arc<Values>);

impl CustomOp1 for Number {
    fn name(&self) -> &'static str {
        "kept"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        Ok((CpuStorage::F32(vec![0.]), Shape::from(1)))
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, _: &Tensor) -> Result<Option<Tensor>> {
        let sum = std::mem::take(&mut *self.0.gradient.lock().unwrap_or_else(PoisonError::into_inner));
        Ok(Some(if sum.is_empty() {
            x.zeros_like()?
        } else {
            Tensor::from_vec(sum, x.shape(), &Device::Cpu)?
        }))
    }
}
