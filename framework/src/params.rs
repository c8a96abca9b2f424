//! The parameters of a model: an ordered store behind candle's `VarBuilder`.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use candle_core::{DType, Device, Shape, Tensor, Var};
use candle_nn::var_builder::SimpleBackend;
use candle_nn::{Init, VarBuilder, init::NormalOrUniform};
use indexmap::IndexMap;
use rand::Rng;
use rand_distr::{Distribution, Normal, Uniform};

use crate::error::Result;
use crate::seed;

/// Named parameters in the order in which the module asked for them.
///
/// The first request for a name makes the parameter; a later one returns the same. Initial values are a function of
/// (seed, name): construction order, device and other parameters change nothing.
#[derive(Clone)]
pub struct Params(Arc<Store>);

struct Store {
    seed: u64,
    dtype: DType,
    device: Device,
    vars: Mutex<IndexMap<String, Var>>,
}

impl Params {
    /// An empty store whose parameters will have this type, on this device.
    pub fn new(seed: u64, dtype: DType, device: &Device) -> Self {
        Self(Arc::new(Store { seed, dtype, device: device.clone(), vars: Mutex::default() }))
    }

    /// Hands out variables that record gradients.
    pub fn var_builder(&self) -> VarBuilder<'static> {
        self.builder(false)
    }

    /// Hands out plain tensors that share the variables' memory: they follow every update and record nothing.
    pub fn detached_var_builder(&self) -> VarBuilder<'static> {
        self.builder(true)
    }

    fn builder(&self, detached: bool) -> VarBuilder<'static> {
        let backend = Backend { params: self.clone(), detached };
        VarBuilder::from_backend(Box::new(backend), self.0.dtype, self.0.device.clone())
    }

    /// Names and variables, in order.
    pub fn vars(&self) -> Vec<(String, Var)> {
        self.lock().iter().map(|(name, var)| (name.clone(), var.clone())).collect()
    }

    /// How many numbers all parameters hold together.
    pub fn count(&self) -> usize {
        self.lock().values().map(|var| var.elem_count()).sum()
    }

    /// The device that the parameters are on.
    pub fn device(&self) -> &Device {
        &self.0.device
    }

    fn lock(&self) -> MutexGuard<'_, IndexMap<String, Var>> {
        self.0.vars.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Runs `work` and then puts the values of these variables back, to the bit, whether it succeeded or not.
pub(crate) fn put_back_after<T>(vars: &[(String, Var)], work: impl FnOnce() -> Result<T>) -> Result<T> {
    let before: Vec<Tensor> = vars.iter().map(|(_, var)| var.copy()).collect::<candle_core::Result<_>>()?;
    let result = work();
    for ((_, var), value) in vars.iter().zip(&before) {
        var.set(value)?;
    }
    result
}

struct Backend {
    params: Params,
    detached: bool,
}

impl SimpleBackend for Backend {
    fn get(
        &self,
        shape: Shape,
        name: &str,
        init: Init,
        dtype: DType,
        device: &Device,
    ) -> candle_core::Result<Tensor> {
        let mut vars = self.params.lock();
        let var = match vars.get(name) {
            Some(var) if var.shape() == &shape => var.clone(),
            Some(var) => candle_core::bail!(
                "parameter `{name}` was made with shape {:?} and is now asked for with shape {shape:?}",
                var.shape()
            ),
            None => {
                let values = initial_values(&shape, init, self.params.0.seed, name)?;
                let var = Var::from_tensor(&Tensor::from_vec(values, shape, device)?.to_dtype(dtype)?)?;
                vars.insert(name.to_string(), var.clone());
                var
            }
        };
        Ok(if self.detached { var.as_detached_tensor() } else { var.as_tensor().clone() })
    }

    fn get_unchecked(&self, name: &str, _: DType, _: &Device) -> candle_core::Result<Tensor> {
        match self.params.lock().get(name) {
            Some(var) if self.detached => Ok(var.as_detached_tensor()),
            Some(var) => Ok(var.as_tensor().clone()),
            None => candle_core::bail!("parameter `{name}` has no shape yet: ask for it with one first"),
        }
    }

    fn contains_tensor(&self, name: &str) -> bool {
        self.params.lock().contains_key(name)
    }
}

/// The values that `init` describes, drawn from the parameter's own generator.
fn initial_values(shape: &Shape, init: Init, seed: u64, name: &str) -> candle_core::Result<Vec<f32>> {
    let mut rng = seed::generator(seed, [seed::name(name), seed::name("initial value"), 0]);
    let n = shape.elem_count();
    let (mean, spread, dist) = match init {
        Init::Const(value) => return Ok(vec![value as f32; n]),
        Init::Uniform { lo, up } => return sample(n, Uniform::new_inclusive(lo, up), &mut rng),
        Init::Randn { mean, stdev } => (mean, stdev, NormalOrUniform::Normal),
        Init::Kaiming { dist, fan, non_linearity } => {
            (0., non_linearity.gain() / (fan.for_shape(shape) as f64).sqrt(), dist)
        }
    };
    match dist {
        NormalOrUniform::Normal => sample(n, Normal::new(mean, spread), &mut rng),
        NormalOrUniform::Uniform => {
            let bound = 3f64.sqrt() * spread;
            sample(n, Uniform::new_inclusive(mean - bound, mean + bound), &mut rng)
        }
    }
}

fn sample<D: Distribution<f64>, E: std::fmt::Display>(
    n: usize,
    distribution: std::result::Result<D, E>,
    rng: &mut impl Rng,
) -> candle_core::Result<Vec<f32>> {
    let distribution =
        distribution.map_err(|error| candle_core::Error::Msg(format!("initial values: {error}")))?;
    Ok((0..n).map(|_| distribution.sample(rng) as f32).collect())
}

#[cfg(test)]
mod tests {
    use candle_nn::{Init, linear};

    use super::*;

    fn values(params: &Params) -> Vec<(String, Vec<f32>)> {
        let mut all: Vec<_> = params
            .vars()
            .into_iter()
            .map(|(name, var)| (name, var.flatten_all().unwrap().to_vec1().unwrap()))
            .collect();
        all.sort_by(|a, b| a.0.cmp(&b.0));
        all
    }

    #[test]
    fn construction_order_does_not_change_initial_values() {
        let build = |names: [&str; 2], seed| {
            let params = Params::new(seed, DType::F32, &Device::Cpu);
            let _ = names.map(|name| linear(3, 4, params.var_builder().pp(name)).unwrap());
            values(&params)
        };
        assert_eq!(build(["a", "b"], 1), build(["b", "a"], 1));
        assert_ne!(build(["a", "b"], 1), build(["a", "b"], 2));
    }

    #[test]
    fn detached_tensors_follow_the_variables() {
        let params = Params::new(0, DType::F32, &Device::Cpu);
        let var = params.var_builder().get_with_hints(2, "w", Init::Const(1.)).unwrap();
        let plain = params.detached_var_builder().get_with_hints(2, "w", Init::Const(1.)).unwrap();
        assert!(var.is_variable() && !plain.is_variable());
        params.vars()[0].1.set(&Tensor::new(&[5f32, 6.], &Device::Cpu).unwrap()).unwrap();
        assert_eq!(plain.to_vec1::<f32>().unwrap(), [5., 6.]);
    }

    #[test]
    fn two_shapes_under_one_name_are_refused() {
        let vb = Params::new(0, DType::F32, &Device::Cpu).var_builder();
        vb.get(2, "w").unwrap();
        let error = vb.get(3, "w").unwrap_err().to_string();
        assert!(error.contains("`w` was made with shape [2] and is now asked for with shape [3]"), "{error}");
    }
}
