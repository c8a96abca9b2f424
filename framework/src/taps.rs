//! Taps on parameters: they report each gradient as soon as it is complete, while the backward pass is still
//! running.
//!
//! Candle returns gradients only after the whole backward pass. A tap is an identity operation between a
//! parameter and all its uses in the module; its own backward pass is called once, with the sum over all
//! uses.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp1, Layout, Shape, Tensor, Var};

use crate::error::Result;

/// Receives gradients.
pub(crate) trait Listener: Send {
    /// Called with the gradient of the parameter `name` from this backward pass.
    fn hear(&mut self, name: &str, gradient: &Tensor) -> Result<()>;
}

/// The taps of one module and their current listener.
pub(crate) struct Taps<L>(Arc<Mutex<Option<L>>>);

impl<L> Clone for Taps<L> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<L: Listener + 'static> Taps<L> {
    /// Creates taps without a listener.
    pub(crate) fn new() -> Self {
        Self(Arc::default())
    }

    /// Returns a tensor with the current value of `parameter`, whose gradients are reported under this name.
    pub(crate) fn tap(&self, name: &str, parameter: &Var) -> candle_core::Result<Tensor> {
        parameter.as_tensor().apply_op1(Tap { name: name.into(), listener: self.clone() })
    }

    /// Reports the gradients of one backward pass to `listener`, and returns it.
    pub(crate) fn during<T>(
        &self,
        listener: L,
        backward: impl FnOnce() -> candle_core::Result<T>,
    ) -> Result<L> {
        *self.lock() = Some(listener);
        let done = backward();
        let listener = self.lock().take();
        done?;
        listener.ok_or_else(|| {
            crate::Error::msg("a backward pass was started inside another one of the same module")
        })
    }

    fn lock(&self) -> MutexGuard<'_, Option<L>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The operation.
struct Tap<L> {
    name: String,
    listener: Taps<L>,
}

impl<L: Listener + 'static> CustomOp1 for Tap<L> {
    fn name(&self) -> &'static str {
        "tap"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        Ok((storage.try_clone(layout)?, layout.shape().clone()))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        storage: &candle_core::CudaStorage,
        layout: &Layout,
    ) -> candle_core::Result<(candle_core::CudaStorage, Shape)> {
        Ok((storage.try_clone(layout)?, layout.shape().clone()))
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, gradient: &Tensor) -> candle_core::Result<Option<Tensor>> {
        // The parameter itself gets no gradient: it has been reported.
        if let Some(listener) = &mut *self.listener.lock() {
            let told = listener.hear(&self.name, gradient);
            told.map_err(|error| candle_core::Error::Msg(error.to_string()))?;
        }
        Ok(None)
    }
}

/// Copies the values of `from` into `to`, a tensor of the same shape that may be shared.
pub(crate) fn refresh(to: &Tensor, from: &Tensor) -> candle_core::Result<()> {
    to.flatten_all()?.slice_set(&from.flatten_all()?, 0, 0)
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    /// Stores what it receives.
    #[derive(Default)]
    struct Heard(Vec<(String, Vec<f32>)>);

    impl Listener for Heard {
        fn hear(&mut self, name: &str, gradient: &Tensor) -> Result<()> {
            if name == "bad" {
                return Err(crate::Error::msg("no"));
            }
            self.0.push((name.into(), gradient.flatten_all()?.to_vec1()?));
            Ok(())
        }
    }

    fn var(values: [f32; 2]) -> Var {
        Var::new(&values, &Device::Cpu).unwrap()
    }

    #[test]
    fn a_gradient_is_told_once_and_complete_and_the_last_layer_comes_first() {
        let (first, second) = (var([1., 2.]), var([3., 4.]));
        let taps = Taps::<Heard>::new();
        let [a, b] = [taps.tap("first", &first).unwrap(), taps.tap("second", &second).unwrap()];
        // The first is used twice: d/da (2 a b) = 2 b, d/db = 2 a.
        let loss = || ((&a + &a)? * &b)?.sum_all();
        let heard = taps.during(Heard::default(), || loss()?.backward()).unwrap();
        let expected = [("second".to_string(), vec![2., 4.]), ("first".to_string(), vec![6., 8.])];
        assert_eq!(heard.0, expected);
        // A tap keeps its value until it is refreshed.
        second.set(&Tensor::new(&[5f32, 6.], &Device::Cpu).unwrap()).unwrap();
        assert_eq!(b.to_vec1::<f32>().unwrap(), [3., 4.]);
        refresh(&b, &second).unwrap();
        assert_eq!(b.to_vec1::<f32>().unwrap(), [5., 6.]);
        // Without a listener, the backward pass still works.
        let gradients = loss().unwrap().backward().unwrap();
        assert!(gradients.get(&first).is_none());
        let heard = taps.during(Heard::default(), || loss()?.backward()).unwrap();
        assert_eq!(heard.0[1].1, [10., 12.]);
    }

    #[test]
    fn a_scalar_can_be_tapped_and_an_error_ends_the_pass() {
        let scalar = Var::new(2f32, &Device::Cpu).unwrap();
        let taps = Taps::<Heard>::new();
        let tap = taps.tap("bad", &scalar).unwrap();
        scalar.set(&Tensor::new(7f32, &Device::Cpu).unwrap()).unwrap();
        refresh(&tap, &scalar).unwrap();
        assert_eq!(tap.to_scalar::<f32>().unwrap(), 7.);
        let error = taps.during(Heard::default(), || tap.sqr()?.backward()).err().unwrap();
        assert!(error.to_string().starts_with("no"), "{error}");
    }
}
