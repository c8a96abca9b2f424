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

/// A parameter and what Adam knows of it: f32 of one shape.
#[derive(Debug, Clone, Copy)]
pub struct AdamParam<'a> {
    /// The parameter.
    pub param: &'a Tensor,
    /// Its gradient.
    pub gradient: &'a Tensor,
    /// Its first moment.
    pub first: &'a Tensor,
    /// Its second moment.
    pub second: &'a Tensor,
    /// With AMSGrad, the largest second moment so far.
    pub largest: Option<&'a Tensor>,
}

impl AdamStep {
    /// Moves parameters and their moments: on a CUDA device many by one kernel.
    ///
    /// # Errors
    /// Where a parameter's tensors are not f32 of one shape, not all are on one device, or one that is changed is not
    /// contiguous.
    pub fn apply(&self, params: &[AdamParam]) -> Result<()> {
        for AdamParam { param, gradient, first, second, largest } in params {
            check([Some(param), Some(gradient), Some(first), Some(second), *largest])?;
            on_one_device(params[0].param, param)?;
        }
        #[cfg(feature = "cuda")]
        if params.first().is_some_and(|it| it.param.device().is_cuda()) {
            return crate::cuda::optimizer::adam(self, params);
        }
        params.iter().try_for_each(|it| self.apply_on_cpu(*it))
    }

    fn apply_on_cpu(&self, AdamParam { param, gradient, first, second, largest }: AdamParam) -> Result<()> {
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

/// A parameter and what SGD knows of it: f32 of one shape.
#[derive(Debug, Clone, Copy)]
pub struct SgdParam<'a> {
    /// The parameter.
    pub param: &'a Tensor,
    /// Its gradient.
    pub gradient: &'a Tensor,
    /// With momentum, its last update.
    pub momentum_buffer: Option<&'a Tensor>,
}

impl SgdStep {
    /// Moves parameters, and their momentum, where they have one: on a CUDA device many by one kernel.
    ///
    /// # Errors
    /// As for [`AdamStep::apply`].
    pub fn apply(&self, params: &[SgdParam]) -> Result<()> {
        for SgdParam { param, gradient, momentum_buffer } in params {
            check([Some(param), Some(gradient), *momentum_buffer, None, None])?;
            on_one_device(params[0].param, param)?;
        }
        #[cfg(feature = "cuda")]
        if params.first().is_some_and(|it| it.param.device().is_cuda()) {
            return crate::cuda::optimizer::sgd(self, params);
        }
        params.iter().try_for_each(|it| self.apply_on_cpu(*it))
    }

    fn apply_on_cpu(&self, SgdParam { param, gradient, momentum_buffer }: SgdParam) -> Result<()> {
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

/// Moves the first tensor of each pair this share of the way to the second: on a CUDA device many by one kernel.
///
/// # Errors
/// As for [`AdamStep::apply`].
pub fn approach(pairs: &[(&Tensor, &Tensor)], share: f32) -> Result<()> {
    for (x, target) in pairs {
        check([Some(x), Some(target), None, None, None])?;
        on_one_device(pairs[0].0, x)?;
    }
    #[cfg(feature = "cuda")]
    if pairs.first().is_some_and(|(x, _)| x.device().is_cuda()) {
        return crate::cuda::optimizer::approach(pairs, share);
    }
    pairs
        .iter()
        .try_for_each(|(x, target)| zip2(x, target, move |x: &mut f32, target| *x += (target - *x) * share))
}

/// Gives tensors the values that their masters have now, in their own type, in place: on a CUDA device many half-precision ones
/// by one kernel. Pairs are a master, f32, and a contiguous tensor of its shape; all are on one device, and all that are given
/// values are of one type.
///
/// # Errors
/// Where that is not so.
pub fn publish(pairs: &[(&Tensor, &Tensor)]) -> Result<()> {
    for (master, copy) in pairs {
        on_one_device(pairs[0].0, master)?;
        on_one_device(master, copy)?;
        let fits = master.dims() == copy.dims() && master.dtype() == DType::F32;
        if !fits || copy.dtype() != pairs[0].1.dtype() || !copy.is_contiguous() || !master.is_contiguous() {
            bail!("publish: expected pairs of one shape, the first f32, got {master:?} and {copy:?}");
        }
    }
    #[cfg(feature = "cuda")]
    if let Some((master, copy)) = pairs.first()
        && master.device().is_cuda()
        && matches!(copy.dtype(), DType::BF16 | DType::F16)
    {
        return crate::cuda::optimizer::publish(pairs);
    }
    for (master, copy) in pairs {
        copy.flatten_all()?.slice_set(&master.to_dtype(copy.dtype())?.flatten_all()?, 0, 0)?;
    }
    Ok(())
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

fn on_one_device(a: &Tensor, b: &Tensor) -> Result<()> {
    if !a.device().same_device(b.device()) {
        bail!("update: expected tensors on one device");
    }
    Ok(())
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
        on_one_device(first, x)?;
    }
    Ok(())
}
