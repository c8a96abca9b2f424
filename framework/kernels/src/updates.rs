//! What optimizers do to parameters, in place: on the CPU, and by one kernel for many parameters on a CUDA device.

use crate::clipping::{GradScale, Share};
use crate::elementwise::{sum_squares, zip2, zip3};
use candle_core::{DType, Device, Result, Tensor, bail};

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

/// A parameter and what Adam knows of it: contiguous, of one shape, and f32 but for the copy.
#[derive(Debug, Clone, Copy)]
pub struct AdamParam<'a> {
    /// The parameter.
    pub param: &'a Tensor,
    /// What is given its new value in bf16 or f16, the same for all that have one.
    pub copy: Option<&'a Tensor>,
    /// Its gradient.
    pub gradient: &'a Tensor,
    /// Its first moment.
    pub first: &'a Tensor,
    /// Its second moment.
    pub second: &'a Tensor,
    /// With AMSGrad, the largest second moment so far.
    pub largest: Option<&'a Tensor>,
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

/// A parameter and what SGD knows of it: contiguous, of one shape, and f32 but for the copy.
#[derive(Debug, Clone, Copy)]
pub struct SgdParam<'a> {
    /// The parameter.
    pub param: &'a Tensor,
    /// What is given its new value in bf16 or f16, the same for all that have one.
    pub copy: Option<&'a Tensor>,
    /// Its gradient.
    pub gradient: &'a Tensor,
    /// With momentum, its last update.
    pub momentum_buffer: Option<&'a Tensor>,
}

/// An update's numbers, and on a CUDA device the memory where its kernels read them: a recorded update has those of each replay.
#[derive(Debug)]
pub struct Placed<S> {
    numbers: Option<S>,
    /// f32, of the device.
    on_device: Option<Tensor>,
}

/// Numbers that kernels read.
pub trait Numbers: Copy {
    /// In the order of the kernel's struct.
    fn in_order(&self) -> Vec<f32>;
}

impl Numbers for AdamStep {
    fn in_order(&self) -> Vec<f32> {
        let AdamStep { one_minus_beta1, beta2, one_minus_beta2, eps, step_size, root_correction, l2, keep } =
            *self;
        vec![one_minus_beta1, beta2, one_minus_beta2, eps, step_size, root_correction, l2, keep]
    }
}

impl Numbers for SgdStep {
    fn in_order(&self) -> Vec<f32> {
        let SgdStep { lr, momentum, entering, l2, nesterov } = *self;
        vec![lr, momentum, entering, l2, f32::from(u8::from(nesterov))]
    }
}

impl<S: Numbers> Placed<S> {
    /// None yet, for parameters of this device.
    ///
    /// # Errors
    /// Where the device fails.
    pub fn on(device: &Device) -> Result<Self> {
        /// As many as Adam has, which has the most.
        const MOST: usize = 8;
        let on_device = device.is_cuda().then(|| Tensor::zeros(MOST, DType::F32, device)).transpose()?;
        Ok(Self { numbers: None, on_device })
    }

    /// The numbers of the updates that come.
    ///
    /// # Errors
    /// Where the device fails.
    pub fn set(&mut self, numbers: S) -> Result<()> {
        if let Some(on_device) = &self.on_device {
            on_device.slice_set(&Tensor::new(numbers.in_order(), on_device.device())?, 0, 0)?;
        }
        self.numbers = Some(numbers);
        Ok(())
    }

    fn numbers(&self) -> Result<S> {
        match self.numbers {
            Some(numbers) => Ok(numbers),
            None => bail!("update: it has no numbers yet"),
        }
    }
}

impl Placed<AdamStep> {
    /// Moves parameters and their moments by so much of their gradients, if at all; copies follow.
    ///
    /// # Errors
    /// Where the numbers were never set, the tensors of a parameter do not fit together, or not all are on one device.
    pub fn apply(&self, params: &[AdamParam], scale: &GradScale) -> Result<()> {
        let Some(one) = params.first() else { return Ok(()) };
        let numbers = self.numbers()?;
        let copied = params.iter().find_map(|it| it.copy);
        for AdamParam { param, copy, gradient, first, second, largest } in params {
            check([Some(param), Some(gradient), Some(first), Some(second), *largest])?;
            check_copy(param, *copy, copied)?;
            on_one_device(one.param, param)?;
        }
        #[cfg(feature = "cuda")]
        if let Some(numbers) = &self.on_device {
            return crate::cuda::optimizer::adam(numbers, params, scale);
        }
        let Some(share) = scale.on_cpu()? else { return Ok(()) };
        params.iter().try_for_each(|it| numbers.apply_on_cpu(*it, share))
    }
}

impl AdamStep {
    fn apply_on_cpu(&self, it: AdamParam, share: Share) -> Result<()> {
        let AdamParam { param, copy, gradient, first, second, largest } = it;
        let AdamStep { one_minus_beta1, beta2, one_minus_beta2, eps, step_size, root_correction, l2, keep } =
            *self;
        zip3(first, gradient, param, move |m: &mut f32, g, w| {
            *m += (share.of(g) + l2 * w - *m) * one_minus_beta1;
        })?;
        zip3(second, gradient, param, move |v: &mut f32, g, w| {
            let g = share.of(g) + l2 * w;
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
        })?;
        copy.map_or(Ok(()), |copy| give(param, copy))
    }
}

impl Placed<SgdStep> {
    /// Moves parameters, and their momentum, where they have one, by so much of their gradients, if at all; copies follow.
    ///
    /// # Errors
    /// As for Adam.
    pub fn apply(&self, params: &[SgdParam], scale: &GradScale) -> Result<()> {
        let Some(one) = params.first() else { return Ok(()) };
        let numbers = self.numbers()?;
        let copied = params.iter().find_map(|it| it.copy);
        for SgdParam { param, copy, gradient, momentum_buffer } in params {
            check([Some(param), Some(gradient), *momentum_buffer, None, None])?;
            check_copy(param, *copy, copied)?;
            on_one_device(one.param, param)?;
        }
        #[cfg(feature = "cuda")]
        if let Some(numbers) = &self.on_device {
            return crate::cuda::optimizer::sgd(numbers, params, scale);
        }
        let Some(share) = scale.on_cpu()? else { return Ok(()) };
        params.iter().try_for_each(|it| numbers.apply_on_cpu(*it, share))
    }
}

impl SgdStep {
    fn apply_on_cpu(&self, it: SgdParam, share: Share) -> Result<()> {
        let SgdParam { param, copy, gradient, momentum_buffer } = it;
        let SgdStep { lr, momentum, entering, l2, nesterov } = *self;
        match momentum_buffer {
            None => zip2(param, gradient, move |w: &mut f32, g| *w -= lr * (share.of(g) + l2 * *w))?,
            Some(buffer) => {
                zip3(buffer, gradient, param, move |b: &mut f32, g, w| {
                    *b = momentum * *b + entering * (share.of(g) + l2 * w);
                })?;
                if nesterov {
                    zip3(param, gradient, buffer, move |w: &mut f32, g, b| {
                        *w -= lr * (share.of(g) + l2 * *w + momentum * b);
                    })?;
                } else {
                    zip2(param, buffer, move |w: &mut f32, b| *w -= lr * b)?;
                }
            }
        }
        copy.map_or(Ok(()), |copy| give(param, copy))
    }
}

/// Moves the first tensor of each pair this share of the way to the second: on a CUDA device many by one kernel.
///
/// # Errors
/// Where a pair's tensors are not f32 of one shape, or not all are on one device.
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
        check_copy(master, Some(copy), Some(pairs[0].1))?;
    }
    #[cfg(feature = "cuda")]
    if let Some((master, copy)) = pairs.first()
        && master.device().is_cuda()
        && matches!(copy.dtype(), DType::BF16 | DType::F16)
    {
        return crate::cuda::optimizer::publish(pairs);
    }
    pairs.iter().try_for_each(|(master, copy)| give(master, copy))
}

/// Gives a tensor its master's values.
fn give(master: &Tensor, copy: &Tensor) -> Result<()> {
    copy.flatten_all()?.slice_set(&master.to_dtype(copy.dtype())?.flatten_all()?, 0, 0)
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

/// Checks what a parameter is copied to, where it is; all copies are of the type of `like`.
fn check_copy(param: &Tensor, copy: Option<&Tensor>, like: Option<&Tensor>) -> Result<()> {
    let Some(copy) = copy else { return Ok(()) };
    if like.is_some_and(|like| like.dtype() != copy.dtype()) {
        bail!("update: expected copies of one type, got {copy:?} and {like:?}");
    }
    on_one_device(param, copy)?;
    let fits = param.dims() == copy.dims() && param.dtype() == DType::F32;
    if !fits || !copy.is_contiguous() || !param.is_contiguous() {
        bail!("update: expected a copy of the shape of its master, which is f32, got {copy:?} of {param:?}");
    }
    Ok(())
}
