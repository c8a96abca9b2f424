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
/// Each is a working variable in the type that the module computes in, and a 32-bit master that the optimizer moves; where
/// the module computes in 32 bits, both are one.
///
/// The first request for a name makes the parameter; a later one returns the same. Initial values are a function of
/// (seed, name): construction order, device and other parameters change nothing.
#[derive(Clone)]
pub struct Params(Arc<Store>);

struct Store {
    seed: u64,
    dtype: DType,
    device: Device,
    vars: Mutex<IndexMap<String, Param>>,
}

#[derive(Clone)]
struct Param {
    master: Var,
    working: Var,
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

    /// Names and masters, in order.
    pub fn vars(&self) -> Vec<(String, Var)> {
        self.lock().iter().map(|(name, param)| (name.clone(), param.master.clone())).collect()
    }

    /// The variable that the module computes with: the one that gradients are of.
    pub(crate) fn working(&self, name: &str) -> Option<Var> {
        self.lock().get(name).map(|param| param.working.clone())
    }

    /// Gives the working variables their masters' values.
    pub fn publish(&self) -> Result<()> {
        for Param { master, working } in self.lock().values() {
            if working.dtype() != master.dtype() {
                working.set(&master.to_dtype(working.dtype())?)?;
            }
        }
        Ok(())
    }

    /// Runs `work` and then puts all values back, to the bit, whether it succeeded or not.
    pub(crate) fn put_back_after<T>(&self, work: impl FnOnce() -> Result<T>) -> Result<T> {
        let vars = self.vars();
        let before: Vec<Tensor> =
            vars.iter().map(|(_, var)| var.copy()).collect::<candle_core::Result<_>>()?;
        let result = work();
        for ((_, var), value) in vars.iter().zip(&before) {
            var.set(value)?;
        }
        self.publish()?;
        result
    }

    /// How many numbers all parameters hold together.
    pub fn count(&self) -> usize {
        self.lock().values().map(|param| param.master.elem_count()).sum()
    }

    /// The type that the module computes in.
    pub fn dtype(&self) -> DType {
        self.0.dtype
    }

    /// The device that the parameters are on.
    pub fn device(&self) -> &Device {
        &self.0.device
    }

    fn lock(&self) -> MutexGuard<'_, IndexMap<String, Param>> {
        self.0.vars.lock().unwrap_or_else(PoisonError::into_inner)
    }
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
            Some(Param { working, .. }) if working.shape() == &shape => working.clone(),
            Some(Param { working, .. }) => candle_core::bail!(
                "parameter `{name}` was made with shape {:?} and is now asked for with shape {shape:?}",
                working.shape()
            ),
            None => {
                let values = initial_values(&shape, init, self.params.0.seed, name)?;
                let values = Tensor::from_vec(values, shape, device)?;
                let working = Var::from_tensor(&values.to_dtype(dtype)?)?;
                let is_half = matches!(dtype, DType::BF16 | DType::F16);
                let master = if is_half { Var::from_tensor(&values)? } else { working.clone() };
                vars.insert(name.to_string(), Param { master, working: working.clone() });
                working
            }
        };
        Ok(if self.detached { var.as_detached_tensor() } else { var.as_tensor().clone() })
    }

    fn get_unchecked(&self, name: &str, _: DType, _: &Device) -> candle_core::Result<Tensor> {
        match self.params.lock().get(name) {
            Some(Param { working, .. }) if self.detached => Ok(working.as_detached_tensor()),
            Some(Param { working, .. }) => Ok(working.as_tensor().clone()),
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
    fn what_is_put_back_reaches_the_module_also_after_an_error() {
        let params = Params::new(0, DType::BF16, &Device::Cpu);
        let working = params.detached_var_builder().get_with_hints(2, "w", Init::Const(1.1)).unwrap();
        let of_module = || working.to_dtype(DType::F32).unwrap().to_vec1::<f32>().unwrap();
        let before = (values(&params), of_module());
        let result = params.put_back_after(|| {
            params.vars()[0].1.set(&Tensor::new(&[5f32, 6.], &Device::Cpu)?)?;
            params.publish()?;
            assert_eq!(of_module(), [5., 6.]);
            Err::<(), _>(crate::Error::msg("no"))
        });
        assert!(result.is_err());
        assert_eq!((values(&params), of_module()), before);
    }

    #[test]
    fn two_shapes_under_one_name_are_refused() {
        let vb = Params::new(0, DType::F32, &Device::Cpu).var_builder();
        vb.get(2, "w").unwrap();
        let error = vb.get(3, "w").unwrap_err().to_string();
        assert!(error.contains("`w` was made with shape [2] and is now asked for with shape [3]"), "{error}");
    }
}
