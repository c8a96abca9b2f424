//! In-place parameter updates for optimizers: on the CPU, and with one kernel for many parameters on a CUDA
//! device.

mod rules;

use crate::clipping::{GradScale, Share};
use crate::parallel::{Shared, for_rows};
use crate::simd::{Kernel, Level, Simd};
use crate::squares::sum_squares;
use crate::tensors::{in_place, with_values};
use candle_core::{DType, Device, Result, Tensor, bail};
pub use rules::{AdadeltaStep, AdagradStep, AdamStep, AdamaxStep, MOST_STATES, RmspropStep, Rule, SgdStep};

/// A parameter with its gradient and optimizer state; all contiguous, of one shape, and f32 except for the
/// copy.
#[derive(Debug, Clone, Copy)]
pub struct UpdateParam<'a> {
    /// The parameter.
    pub param: &'a Tensor,
    /// A bf16 or f16 tensor that receives the parameter's new value; all copies have the same dtype.
    pub copy: Option<&'a Tensor>,
    /// Its gradient.
    pub gradient: &'a Tensor,
    /// The rule's state tensors for this parameter, in the rule's order.
    pub kept: [Option<&'a Tensor>; MOST_STATES],
}

/// A rule's numbers and, on a CUDA device, the memory from which its kernels read them: a recorded update
/// uses the numbers set before each replay.
#[derive(Debug)]
pub struct Placed<R> {
    rule: Option<R>,
    /// The numbers as f32 on the device.
    on_device: Option<Tensor>,
}

impl<R: Rule> Placed<R> {
    /// Creates it without numbers, for parameters on this device.
    ///
    /// # Errors
    /// If the device fails.
    pub fn on(device: &Device) -> Result<Self> {
        let on_device =
            device.is_cuda().then(|| Tensor::zeros(R::NUMBERS, DType::F32, device)).transpose()?;
        Ok(Self { rule: None, on_device })
    }

    /// Sets the numbers for subsequent updates.
    ///
    /// # Errors
    /// If the device fails.
    pub fn set(&mut self, rule: R) -> Result<()> {
        if let Some(on_device) = &self.on_device {
            on_device.slice_set(&Tensor::new(rule.numbers(), on_device.device())?, 0, 0)?;
        }
        self.rule = Some(rule);
        Ok(())
    }

    /// Updates parameters and their state by their scaled gradients, unless `scale` refuses the update, and
    /// then the copies.
    ///
    /// # Errors
    /// If the numbers were never set, the tensors of a parameter are incompatible, or not all tensors are on
    /// one device.
    pub fn apply(&self, params: &[UpdateParam], scale: &GradScale) -> Result<()> {
        let Some(one) = params.first() else { return Ok(()) };
        let Some(rule) = self.rule else { bail!("update: it has no numbers yet") };
        let copied = params.iter().find_map(|it| it.copy);
        for UpdateParam { param, copy, gradient, kept: [a, b, c] } in params {
            check([Some(param), Some(gradient), *a, *b, *c])?;
            check_copy(param, *copy, copied)?;
            on_one_device(one.param, param)?;
        }
        #[cfg(feature = "cuda")]
        if let Some(numbers) = &self.on_device {
            return crate::cuda::optimizer::update(R::NAME, numbers, params, scale);
        }
        let Some(share) = scale.on_cpu()? else { return Ok(()) };
        for UpdateParam { param, copy, gradient, kept } in params {
            update_on_cpu(rule, share, param, gradient, *kept)?;
            copy.map_or(Ok(()), |copy| give(param, copy))?;
        }
        Ok(())
    }
}

/// Updates a parameter on the CPU, in one pass over its tensors.
fn update_on_cpu(
    rule: impl Rule,
    share: Share,
    param: &Tensor,
    gradient: &Tensor,
    [a, b, c]: [Option<&Tensor>; MOST_STATES],
) -> Result<()> {
    let level = Level::current();
    with_values(gradient, |gradient: &[f32]| {
        in_place([Some(param), a, b, c], |[w, kept @ ..]| {
            for_rows(gradient.len(), 1, |part| {
                // SAFETY: all have as many values as the gradient, and each part belongs to exactly one task.
                let place = |x: Shared| unsafe { x.offset(part.start) };
                let (Some(w), kept) = (w.map(place), kept.map(|x| x.map(place))) else { return };
                level.run(Update { rule, share, w, gradient: &gradient[part.clone()], kept });
            });
        })
    })
}

/// A part of a parameter and of its state; each has as many values as `gradient`.
struct Update<'a, R> {
    rule: R,
    share: Share,
    w: Shared,
    gradient: &'a [f32],
    kept: [Option<Shared>; MOST_STATES],
}

impl<R: Rule> Kernel for Update<'_, R> {
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        /// Values per block. State is copied here, and zero-filled if the parameter lacks it, so that one
        /// loop serves all cases.
        const BLOCK: usize = 128;
        let Update { rule, share, w, gradient, kept } = self;
        let mut here = [[0f32; BLOCK]; MOST_STATES];
        for start in (0..gradient.len()).step_by(BLOCK) {
            let gradient = &gradient[start..gradient.len().min(start + BLOCK)];
            // SAFETY: `gradient.len()` values follow `start`, and they belong to this task only.
            let place = |x: Shared| unsafe { std::slice::from_raw_parts_mut(x.at(start), gradient.len()) };
            for (here, kept) in here.iter_mut().zip(kept) {
                match kept {
                    Some(kept) => here[..gradient.len()].copy_from_slice(place(kept)),
                    None => here.fill(0.),
                }
            }
            let [a, b, c] = &mut here;
            for ((((w, g), a), b), c) in place(w).iter_mut().zip(gradient).zip(a).zip(b).zip(c) {
                let mut kept = [*a, *b, *c];
                *w = rule.step(*w, share.of(*g), &mut kept);
                [*a, *b, *c] = kept;
            }
            for (here, kept) in here.iter().zip(kept) {
                if let Some(kept) = kept {
                    place(kept).copy_from_slice(&here[..gradient.len()]);
                }
            }
        }
    }
}

/// Moves the first tensor of each pair by the fraction `share` towards the second; on a CUDA device, one
/// kernel handles many.
///
/// # Errors
/// If a pair's tensors are not f32 of one shape, or not all tensors are on one device.
pub fn approach(pairs: &[(&Tensor, &Tensor)], share: f32) -> Result<()> {
    for (x, target) in pairs {
        check([Some(x), Some(target), None, None, None])?;
        on_one_device(pairs[0].0, x)?;
    }
    #[cfg(feature = "cuda")]
    if pairs.first().is_some_and(|(x, _)| x.device().is_cuda()) {
        return crate::cuda::optimizer::approach(pairs, share);
    }
    let nothing = [None; MOST_STATES];
    pairs.iter().try_for_each(|(x, target)| update_on_cpu(Approach(share), Share::WHOLE, x, target, nothing))
}

/// Moves a value by this fraction towards a target, which is passed as the gradient.
#[derive(Clone, Copy)]
struct Approach(f32);

impl Rule for Approach {
    const NAME: &'static str = "approach";
    const NUMBERS: usize = 1;

    fn numbers(&self) -> Vec<f32> {
        vec![self.0]
    }

    #[inline(always)]
    fn step(&self, w: f32, target: f32, _: &mut [f32; MOST_STATES]) -> f32 {
        w + (target - w) * self.0
    }
}

/// Copies master values into tensors, in place and in the tensors' own dtype; on a CUDA device, one kernel
/// handles many half-precision tensors. Each pair is an f32 master and a contiguous tensor of the same shape;
/// all are on one device, and all destinations have the same dtype.
///
/// # Errors
/// If the tensors do not meet these conditions.
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

/// Copies a master's values into a tensor.
fn give(master: &Tensor, copy: &Tensor) -> Result<()> {
    copy.flatten_all()?.slice_set(&master.to_dtype(copy.dtype())?.flatten_all()?, 0, 0)
}

/// The sum of the squares of all values of tensors on one device. Bit-identical on every call; waits for the
/// device once.
///
/// # Errors
/// If a tensor on the CPU is not contiguous, or neither f32 nor f64.
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
    // Tensors that share a storage would deadlock on its lock.
    let storage = |x: &Tensor| std::ptr::from_ref(&*x.storage_and_layout().0);
    let storages = tensors.map(|x| x.map(storage));
    let again = |i: usize| storages[i].is_some() && storages[..i].contains(&storages[i]);
    if (0..storages.len()).any(again) {
        bail!("update: expected tensors that share no memory");
    }
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

/// Checks a parameter's copy, if it has one; all copies have the dtype of `like`.
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
