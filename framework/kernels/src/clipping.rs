//! What becomes of a step's gradients before they move anything: the loss scale is taken out, norm and values are clipped, and
//! a norm that is not finite refuses the step. All of that is decided where the gradients are, so that an update can be asked for
//! before anybody has heard of it.

use crate::updates::sum_squares_of;
use candle_core::{Result, Tensor};

/// How a step's gradients are clipped.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Clipping {
    /// What the loss, and with it each gradient, was multiplied with: it is taken out.
    pub loss_scale: f64,
    /// The L2 norm that all gradients together are scaled down to (`torch.nn.utils.clip_grad_norm_`).
    pub max_norm: Option<f64>,
    /// Then every value is brought into `[-max_value, max_value]` (`torch.nn.utils.clip_grad_value_`).
    pub max_value: Option<f64>,
    /// Whether gradients whose norm is not finite move nothing.
    pub only_finite: bool,
}

impl Default for Clipping {
    fn default() -> Self {
        Self { loss_scale: 1., max_norm: None, max_value: None, only_finite: false }
    }
}

/// What was decided of a step's gradients.
#[derive(Debug, Clone)]
pub struct Clipped {
    /// What it comes to for those who move parameters.
    pub scale: GradScale,
    /// Their norm before clipping.
    pub norm: Norm,
}

/// The L2 norm of all gradients of a step together, where they are.
#[derive(Debug, Clone)]
pub struct Norm(Place);

#[derive(Debug, Clone)]
enum Place {
    Host(f64),
    #[cfg(feature = "cuda")]
    Cuda(Tensor),
}

/// A norm on its way to the host.
#[derive(Debug)]
pub struct Reading(Way);

#[derive(Debug)]
enum Way {
    Host(f64),
    #[cfg(feature = "cuda")]
    Cuda(crate::Download),
}

/// How much of each gradient an update takes, and whether it takes place at all, as decided where the gradients are: what
/// PyTorch's fused optimizers know as `grad_scale` and `found_inf`. By default gradients count as they are.
#[derive(Debug, Clone)]
pub struct GradScale(Decision);

#[derive(Debug, Clone)]
enum Decision {
    Host {
        share: Share,
        refused: bool,
    },
    /// Norm, factor, largest value and, 0 or 1, refusal: f32, as kernels read them.
    #[cfg(feature = "cuda")]
    Cuda(Tensor),
}

/// How much of each gradient counts.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Share {
    pub(crate) factor: f32,
    /// Infinite where values are not clipped.
    pub(crate) max_value: f32,
}

impl Clipping {
    /// Decides of gradients, f32, that are on one device.
    ///
    /// # Errors
    /// Where the device fails, or a gradient on the CPU is not contiguous or of another type.
    pub fn decide(&self, gradients: &[Tensor]) -> Result<Clipped> {
        #[cfg(feature = "cuda")]
        if gradients.first().is_some_and(|x| x.device().is_cuda()) {
            let decided = crate::cuda::optimizer::decide(self, gradients)?;
            let norm = Norm(Place::Cuda(decided.narrow(0, 0, 1)?));
            return Ok(Clipped { scale: GradScale(Decision::Cuda(decided)), norm });
        }
        Ok(self.decide_by(sum_squares_of(gradients)?.sqrt() / self.loss_scale))
    }

    /// Decides by a norm, without the loss scale, that the host knows: of several ranks' gradients.
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
    /// Begins to read it; what a device is asked for afterwards does not delay that.
    ///
    /// # Errors
    /// Where the device fails.
    pub fn read(&self) -> Result<Reading> {
        Ok(Reading(match &self.0 {
            Place::Host(norm) => Way::Host(*norm),
            #[cfg(feature = "cuda")]
            Place::Cuda(norm) => Way::Cuda(crate::Download::start(norm)?),
        }))
    }
}

impl Reading {
    /// The norm; waits for it.
    ///
    /// # Errors
    /// Where the device has failed.
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
    /// The gradients as they count; of a step that is refused, as they would.
    ///
    /// # Errors
    /// Where the device fails.
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

    /// Whether the update does not take place; waits for a device that has decided.
    ///
    /// # Errors
    /// Where the device fails.
    pub fn is_refused(&self) -> Result<bool> {
        match &self.0 {
            Decision::Host { refused, .. } => Ok(*refused),
            #[cfg(feature = "cuda")]
            Decision::Cuda(decided) => Ok(decided.get(3)?.to_scalar::<f32>()? != 0.),
        }
    }

    /// What counts of gradients on the CPU, if anything does.
    pub(crate) fn on_cpu(&self) -> Result<Option<Share>> {
        match self.0 {
            Decision::Host { share, refused } => Ok((!refused).then_some(share)),
            #[cfg(feature = "cuda")]
            Decision::Cuda(_) => {
                candle_core::bail!("update: the gradients are on the CPU, and their scale is not")
            }
        }
    }

    /// Norm, factor, largest value and refusal on a device, where kernels read them.
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

    /// What counts of a gradient's value.
    pub(crate) fn of(self, gradient: f32) -> f32 {
        let x = gradient * self.factor;
        // What is not a number stays so.
        if x > self.max_value {
            self.max_value
        } else if x < -self.max_value {
            -self.max_value
        } else {
            x
        }
    }

    /// What counts of a gradient on the CPU.
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
        // Of norm 13.
        [&[3f32, -4.][..], &[12.]].map(|x| Tensor::new(x, &Device::Cpu).unwrap()).to_vec()
    }

    /// Norm, and all values that count; none where the step is refused.
    fn clipped(clipping: Clipping, gradients: &[Tensor]) -> (f64, Option<Vec<f32>>) {
        let Clipped { scale, norm } = clipping.decide(gradients).unwrap();
        let share = scale.on_cpu().unwrap();
        let counted = share.map(|_| Tensor::cat(&scale.apply(gradients).unwrap(), 0).unwrap());
        let values = counted.map(|x| x.to_vec1().unwrap());
        // What is computed value by value is the same.
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
        // By norm to half; it is the norm of what has lost its scale that counts.
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
            // Unguarded, what is not a number stays so.
            assert!(taken.is_some_and(|values| values[3].is_nan() == x.is_nan()));
        }
        assert_eq!(clipped(guarded, &gradients()), clipped(Clipping::default(), &gradients()));
    }
}
