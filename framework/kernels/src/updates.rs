//! What optimizers do to parameters, in place: on the CPU, and by one kernel on a CUDA device.

use crate::elementwise::{sum_squares, zip2, zip3};
use candle_core::{DType, Result, Tensor, bail};

/// A step of Adam (Kingma and Ba 2015, algorithm 1) or AdamW (Loshchilov and Hutter 2019, algorithm 2), as PyTorch
/// computes it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamStep {
    /// 1 less the decay of the first moment.
    pub one_minus_beta1: f32,
    /// The decay of the second moment.
    pub beta2: f32,
    /// 1 less that.
    pub one_minus_beta2: f32,
    /// Added to the root of the second moment.
    pub eps: f32,
    /// The learning rate over the first moment's correction.
    pub step_size: f32,
    /// The root of the second moment's correction.
    pub root_correction: f32,
    /// Times the parameter, added to its gradient.
    pub l2: f32,
    /// What decay leaves of the parameter itself.
    pub keep: f32,
}

impl AdamStep {
    /// Moves a parameter and its moments; `largest`, with AMSGrad, is the largest second moment so far.
    ///
    /// # Errors
    /// Where the tensors are not f32 of one shape on one device, or one that is changed is not contiguous.
    pub fn apply(
        &self,
        param: &Tensor,
        gradient: &Tensor,
        first: &Tensor,
        second: &Tensor,
        largest: Option<&Tensor>,
    ) -> Result<()> {
        check([Some(param), Some(gradient), Some(first), Some(second), largest])?;
        #[cfg(feature = "cuda")]
        if param.device().is_cuda() {
            return crate::cuda::optimizer::adam(self, param, gradient, first, second, largest);
        }
        let AdamStep { one_minus_beta1, beta2, one_minus_beta2, eps, step_size, root_correction, l2, keep } =
            *self;
        zip3(first, gradient, param, move |m: &mut f32, g, w| *m += (g + l2 * w - *m) * one_minus_beta1)?;
        zip3(second, gradient, param, move |v: &mut f32, g, w| {
            let g = g + l2 * w;
            *v = *v * beta2 + one_minus_beta2 * g * g;
        })?;
        let second = match largest {
            None => second,
            Some(largest) => {
                zip2(largest, second, |max: &mut f32, v| *max = max.max(v))?;
                largest
            }
        };
        zip3(param, first, second, move |w: &mut f32, m, v| {
            *w = *w * keep - step_size * (m / (v.sqrt() / root_correction + eps));
        })
    }
}

/// A step of stochastic gradient descent, with or without momentum (Sutskever et al. 2013), as PyTorch computes it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SgdStep {
    /// The learning rate.
    pub lr: f32,
    /// The share of the last update that goes on.
    pub momentum: f32,
    /// The share of the gradient that enters the momentum.
    pub entering: f32,
    /// Times the parameter, added to its gradient.
    pub l2: f32,
    /// Looks ahead along the momentum.
    pub nesterov: bool,
}

impl SgdStep {
    /// Moves a parameter, and its momentum, where it has one.
    ///
    /// # Errors
    /// As for [`AdamStep::apply`].
    pub fn apply(&self, param: &Tensor, gradient: &Tensor, momentum_buffer: Option<&Tensor>) -> Result<()> {
        check([Some(param), Some(gradient), momentum_buffer, None, None])?;
        #[cfg(feature = "cuda")]
        if param.device().is_cuda() {
            return crate::cuda::optimizer::sgd(self, param, gradient, momentum_buffer);
        }
        let SgdStep { lr, momentum, entering, l2, nesterov } = *self;
        let Some(buffer) = momentum_buffer else {
            return zip2(param, gradient, move |w: &mut f32, g| *w -= lr * (g + l2 * *w));
        };
        zip3(buffer, gradient, param, move |b: &mut f32, g, w| *b = momentum * *b + entering * (g + l2 * w))?;
        if nesterov {
            zip3(param, gradient, buffer, move |w: &mut f32, g, b| *w -= lr * (g + l2 * *w + momentum * b))
        } else {
            zip2(param, buffer, move |w: &mut f32, b| *w -= lr * b)
        }
    }
}

/// Moves x this share of the way to `target`.
///
/// # Errors
/// As for [`AdamStep::apply`].
pub fn approach(x: &Tensor, target: &Tensor, share: f32) -> Result<()> {
    check([Some(x), Some(target), None, None, None])?;
    #[cfg(feature = "cuda")]
    if x.device().is_cuda() {
        return crate::cuda::optimizer::approach(x, target, share);
    }
    zip2(x, target, move |x: &mut f32, target| *x += (target - *x) * share)
}

/// The sum of the squares of the values of tensors that are on one device. The same bits every time; waits for the device
/// once.
///
/// # Errors
/// Where a tensor on the CPU is not contiguous, or neither f32 nor f64.
pub fn sum_squares_of(tensors: &[Tensor]) -> Result<f64> {
    #[cfg(feature = "cuda")]
    if tensors.first().is_some_and(|x| x.device().is_cuda()) {
        return crate::cuda::optimizer::sum_squares(tensors);
    }
    let mut sum = 0.;
    for x in tensors {
        sum += sum_squares(x)?;
    }
    Ok(sum)
}

fn check(tensors: [Option<&Tensor>; 5]) -> Result<()> {
    let mut tensors = tensors.into_iter().flatten();
    let Some(first) = tensors.next() else { return Ok(()) };
    for x in tensors {
        if x.dims() != first.dims() || x.dtype() != DType::F32 || first.dtype() != DType::F32 {
            bail!(
                "update: expected f32 of one shape, got {:?} {:?} and {:?} {:?}",
                first.dtype(),
                first.dims(),
                x.dtype(),
                x.dims()
            );
        }
        if !x.device().same_device(first.device()) {
            bail!("update: expected tensors on one device");
        }
    }
    Ok(())
}
