//! Processing of a step's gradients before the update: the loss scale is removed, norm and values are
//! clipped, and a non-finite norm can refuse the step. All of this is decided on the gradients' device, so an
//! update can be enqueued before the host knows the outcome.

use crate::updates::sum_squares_of;
use candle_core::{Result, Tensor};

/// How a step's gradients are clipped.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Clipping {
    /// The factor by which the loss, and with it each gradient, was multiplied; it is divided out.
    pub loss_scale: f64,
    /// The L2 norm to which all gradients together are scaled down (`torch.nn.utils.clip_grad_norm_`).
    pub max_norm: Option<f64>,
    /// Afterwards every value is clamped to `[-max_value, max_value]` (`torch.nn.utils.clip_grad_value_`).
    pub max_value: Option<f64>,
    /// Whether gradients with a non-finite norm refuse the update.
    pub only_finite: bool,
}

impl Default for Clipping {
    fn default() -> Self {
        Self { loss_scale: 1., max_norm: None, max_value: None, only_finite: false }
    }
}

/// The clipping decision for a step's gradients.
#[derive(Debug, Clone)]
pub struct Clipped {
    /// The scale to pass to the parameter update.
    pub scale: GradScale,
    /// The gradients' norm before clipping.
    pub norm: Norm,
}

/// The L2 norm of all gradients of a step together, stored on their device.
#[derive(Debug, Clone)]
pub struct Norm(Place);

#[derive(Debug, Clone)]
enum Place {
    Host(f64),
    #[cfg(feature = "cuda")]
    Cuda(Tensor),
}

/// A norm being transferred to the host.
#[derive(Debug)]
pub struct Reading(Way);

#[derive(Debug)]
enum Way {
    Host(f64),
    #[cfg(feature = "cuda")]
    Cuda(crate::Download),
}

/// How to scale each gradient in an update, and whether the update happens at all, as decided on the
/// gradients' device; like `grad_scale` and `found_inf` of PyTorch's fused optimizers. The default leaves
/// gradients unchanged.
#[derive(Debug, Clone)]
pub struct GradScale(Decision);

#[derive(Debug, Clone)]
enum Decision {
    Host {
        share: Share,
        refused: bool,
    },
    /// Norm, factor, largest value, and refusal (0 or 1), all f32, in the layout that the kernels read.
    #[cfg(feature = "cuda")]
    Cuda(Tensor),
}

/// The scaling and clamping of each gradient value.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Share {
    pub(crate) factor: f32,
    /// Infinite if values are not clipped.
    pub(crate) max_value: f32,
}

impl Clipping {
    /// Decides on f32 gradients that are all on one device.
    ///
    /// # Errors
    /// If the device fails, or a gradient on the CPU is not contiguous or not f32.
    pub fn decide(&self, gradients: &[Tensor]) -> Result<Clipped> {
        #[cfg(feature = "cuda")]
        if gradients.first().is_some_and(|x| x.device().is_cuda()) {
            let decided = crate::cuda::optimizer::decide(self, gradients)?;
            let norm = Norm(Place::Cuda(decided.narrow(0, 0, 1)?));
            return Ok(Clipped { scale: GradScale(Decision::Cuda(decided)), norm });
        }
        Ok(self.decide_by(sum_squares_of(gradients)?.sqrt() / self.loss_scale))
    }

    /// Decides by a norm that the host knows, with the loss scale already removed, for example over several
    /// ranks' gradients.
    pub fn decide_by(&self, norm: f64) -> Clipped {
        let share = self.max_norm.map_or(1., |max| max / (norm + 1e-6));
        let share = Share {
            factor: (if share < 1. { share } else { 1. } / self.loss_scale) as f32,
            max_value: self.max_value.map_or(f32::INFINITY, |x| x as f32),
        };
        let refused = self.only_finite && !norm.is_finite();
        Clipped { scale: GradScale(Decision::Host { share, refused }), norm: Norm(Place::Host(norm)) }
    }
}

impl Norm {
    /// Starts reading the norm; work enqueued on the device afterwards does not delay this.
    ///
    /// # Errors
    /// If the device fails.
    pub fn read(&self) -> Result<Reading> {
        Ok(Reading(match &self.0 {
            Place::Host(norm) => Way::Host(*norm),
            #[cfg(feature = "cuda")]
            Place::Cuda(norm) => Way::Cuda(crate::Download::start(norm)?),
        }))
    }
}

impl Reading {
    /// Waits for the norm and returns it.
    ///
    /// # Errors
    /// If the device has failed.
    pub fn finish(self) -> Result<f64> {
        match self.0 {
            Way::Host(norm) => Ok(norm),
            #[cfg(feature = "cuda")]
            Way::Cuda(download) => Ok(f64::from(download.finish()?.get(0)?.to_scalar::<f32>()?)),
        }
    }
}

impl Default for GradScale {
    fn default() -> Self {
        Self(Decision::Host { share: Share::WHOLE, refused: false })
    }
}

impl GradScale {
    /// The gradients after scaling and clamping; also computed for a refused step.
    ///
    /// # Errors
    /// If the device fails.
    pub fn apply(&self, gradients: &[Tensor]) -> Result<Vec<Tensor>> {
        let share = match &self.0 {
            Decision::Host { share, .. } if *share == Share::WHOLE => return Ok(gradients.to_vec()),
            Decision::Host { share, .. } => share,
            #[cfg(feature = "cuda")]
            Decision::Cuda(decided) => return crate::cuda::optimizer::counted(gradients, decided),
        };
        #[cfg(feature = "cuda")]
        if let Some(first) = gradients.first()
            && first.device().is_cuda()
        {
            return crate::cuda::optimizer::counted(gradients, &self.on_device(first.device())?);
        }
        gradients.iter().map(|x| share.of_all(x)).collect()
    }

    /// Whether the update is refused; waits for the device if it made the decision.
    ///
    /// # Errors
    /// If the device fails.
    pub fn is_refused(&self) -> Result<bool> {
        match &self.0 {
            Decision::Host { refused, .. } => Ok(*refused),
            #[cfg(feature = "cuda")]
            Decision::Cuda(decided) => Ok(decided.get(3)?.to_scalar::<f32>()? != 0.),
        }
    }

    /// The scaling for gradients on the CPU, or `None` if the update is refused.
    pub(crate) fn on_cpu(&self) -> Result<Option<Share>> {
        match self.0 {
            Decision::Host { share, refused } => Ok((!refused).then_some(share)),
            #[cfg(feature = "cuda")]
            Decision::Cuda(_) => {
                candle_core::bail!("update: the gradients are on the CPU, and their scale is not")
            }
        }
    }

    /// Norm, factor, largest value and refusal on a device, in the layout that the kernels read.
    #[cfg(feature = "cuda")]
    pub(crate) fn on_device(&self, device: &candle_core::Device) -> Result<Tensor> {
        match &self.0 {
            Decision::Host { share: Share { factor, max_value }, refused } => {
                Tensor::new(&[f32::NAN, *factor, *max_value, f32::from(u8::from(*refused))], device)
            }
            Decision::Cuda(decided) if decided.device().same_device(device) => Ok(decided.clone()),
            Decision::Cuda(_) => {
                candle_core::bail!("update: the gradients and their scale are on two devices")
            }
        }
    }
}

impl Share {
    pub(crate) const WHOLE: Self = Self { factor: 1., max_value: f32::INFINITY };

    /// A gradient value after scaling and clamping.
    pub(crate) fn of(self, gradient: f32) -> f32 {
        let x = gradient * self.factor;
        // NaN stays NaN.
        if x > self.max_value {
            self.max_value
        } else if x < -self.max_value {
            -self.max_value
        } else {
            x
        }
    }

    /// A gradient on the CPU after scaling and clamping.
    fn of_all(self, gradient: &Tensor) -> Result<Tensor> {
        let x = (gradient * f64::from(self.factor))?;
        if self.max_value.is_finite() { x.clamp(-self.max_value, self.max_value) } else { Ok(x) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    fn gradients() -> Vec<Tensor> {
        // Norm 13.
        [&[3f32, -4.][..], &[12.]].map(|x| Tensor::new(x, &Device::Cpu).unwrap()).to_vec()
    }

    /// The norm, and all gradient values after clipping; `None` for the values if the step is refused.
    fn clipped(clipping: Clipping, gradients: &[Tensor]) -> (f64, Option<Vec<f32>>) {
        let Clipped { scale, norm } = clipping.decide(gradients).unwrap();
        let share = scale.on_cpu().unwrap();
        let counted = share.map(|_| Tensor::cat(&scale.apply(gradients).unwrap(), 0).unwrap());
        let values = counted.map(|x| x.to_vec1().unwrap());
        // Clipping value by value gives the same result.
        if let (Some(share), Some(values)) = (share, &values) {
            let all: Vec<f32> = Tensor::cat(gradients, 0).unwrap().to_vec1().unwrap();
            let bits = |x: f32| x.to_bits();
            assert!(all.iter().zip(values).all(|(x, y)| bits(share.of(*x)) == bits(*y)), "{values:?}");
        }
        (norm.read().unwrap().finish().unwrap(), values)
    }

    #[test]
    fn the_loss_scale_goes_first_then_the_norm_then_values() {
        let plain = Clipping::default();
        assert_eq!(clipped(plain, &gradients()), (13., Some(vec![3., -4., 12.])));
        let scaled = Clipping { loss_scale: 4., ..plain };
        assert_eq!(clipped(scaled, &gradients()), (3.25, Some(vec![0.75, -1., 3.])));
        // Halved by norm; the norm without the loss scale counts.
        let by_norm = Clipping { max_norm: Some(1.625 * (1. + 1e-6 / 3.25)), ..scaled };
        assert_eq!(clipped(by_norm, &gradients()), (3.25, Some(vec![0.375, -0.5, 1.5])));
        assert_eq!(
            clipped(Clipping { max_norm: Some(4.), ..scaled }, &gradients()),
            clipped(scaled, &gradients())
        );
        let by_value = Clipping { max_value: Some(0.4), ..by_norm };
        assert_eq!(clipped(by_value, &gradients()), (3.25, Some(vec![0.375, -0.4, 0.4])));
    }

    #[test]
    fn what_is_not_finite_is_refused_where_that_is_asked_for() {
        let with = |x: f32| [gradients(), vec![Tensor::new(&[x], &Device::Cpu).unwrap()]].concat();
        let guarded = Clipping { only_finite: true, ..Default::default() };
        for x in [f32::NAN, f32::INFINITY] {
            let (norm, taken) = clipped(guarded, &with(x));
            assert!(!norm.is_finite() && taken.is_none());
            let (_, taken) = clipped(Clipping { max_value: Some(1.), ..Default::default() }, &with(x));
            // Without the check, NaN stays NaN.
            assert!(taken.is_some_and(|values| values[3].is_nan() == x.is_nan()));
        }
        assert_eq!(clipped(guarded, &gradients()), clipped(Clipping::default(), &gradients()));
    }
}
