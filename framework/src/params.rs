//! The parameters and buffers of a model: an ordered store behind candle's `VarBuilder`.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use candle_core::{DType, Device, Shape, Tensor, Var};
use candle_nn::var_builder::SimpleBackend;
use candle_nn::{Init, VarBuilder, init::NormalOrUniform};
use candlepower_kernels::updates::publish;
use indexmap::IndexMap;
use rand::Rng;
use rand_distr::{Distribution, Normal, Uniform};

use crate::error::{Error, Result};
use crate::{optim, seed, taps};

/// Named parameters, in the order in which the module requested them.
///
/// Each parameter is a working variable in the type that the module computes in, and a 32-bit master that the
/// optimizer updates; if the module computes in 32 bits, both are the same variable.
///
/// The first request for a name creates the parameter; later ones return the same. Initial values are a
/// function of (seed, name) and do not depend on construction order, device or other parameters.
#[derive(Clone)]
pub struct Params(Arc<Store>);

struct Store {
    seed: u64,
    dtype: DType,
    device: Device,
    vars: Mutex<IndexMap<String, Param>>,
    buffers: Mutex<IndexMap<String, Kept>>,
}

#[derive(Clone)]
struct Param {
    master: Var,
    working: Var,
    /// Used by a module with taps in place of the working variable; holds that variable's latest value.
    tap: Option<Tensor>,
}

/// Puts a [tap](crate::taps) on the parameter of this name.
pub(crate) type PutTap = dyn Fn(&str, &Var) -> candle_core::Result<Tensor> + Send + Sync;

/// The two values of a buffer.
#[derive(Clone)]
struct Kept {
    /// The value after the last completed step: read by evaluation and saved in checkpoints.
    kept: Var,
    /// The value in the current step.
    working: Var,
}

/// Suffix of a name requested from a `VarBuilder` that marks it as a buffer's. No parameter name contains it.
const BUFFER: char = '\0';

/// A named tensor that a module keeps from step to step and that no optimizer updates, such as the running
/// mean of a [`BatchNorm`](crate::nn::channels_last::BatchNorm).
///
/// It is part of the model's state: saved, restored, and named as in PyTorch's `state_dict`. Its type does
/// not depend on the precision. Only training steps change it: the evaluation build holds it read-only, and
/// changes made by the forward passes of a step that is not taken are discarded. With micro-batches and with
/// several optimizers, every forward pass changes it in turn, as in PyTorch. Weight averages do not include
/// it: averaged weights are evaluated with the buffers of training (PyTorch's `AveragedModel` with
/// `use_buffers=False`).
#[derive(Debug, Clone)]
pub struct Buffer(Tensor);

impl Buffer {
    /// Creates the buffer `name` under the path of `vb`, of this shape and type, filled with `value`.
    pub fn new(
        shape: impl Into<Shape>,
        name: &str,
        value: f64,
        dtype: DType,
        vb: &VarBuilder,
    ) -> Result<Self> {
        Ok(Self(vb.get_with_hints_dtype(shape, &format!("{name}{BUFFER}"), Init::Const(value), dtype)?))
    }

    /// Its value. No gradient flows into it.
    pub fn value(&self) -> Tensor {
        self.0.detach()
    }

    /// Whether this belongs to the training build, which may [`set`](Self::set) it.
    pub fn is_writable(&self) -> bool {
        self.0.is_variable()
    }

    /// Sets a value of the same shape and type. Fails in the evaluation build.
    pub fn set(&self, value: &Tensor) -> Result<()> {
        if !self.is_writable() {
            return Err(Error::msg(
                "a buffer can only be changed in a training step, and this is an evaluation",
            ));
        }
        Ok(Var::from_tensor(&self.0)?.set(&value.detach())?)
    }
}

impl Params {
    /// Creates an empty store for parameters of this type on this device.
    pub fn new(seed: u64, dtype: DType, device: &Device) -> Self {
        let (vars, buffers) = (Mutex::default(), Mutex::default());
        Self(Arc::new(Store { seed, dtype, device: device.clone(), vars, buffers }))
    }

    /// A builder that returns variables that record gradients.
    pub fn var_builder(&self) -> VarBuilder<'static> {
        self.builder(For::Training)
    }

    /// A builder that returns plain tensors sharing the variables' memory: they follow every update and
    /// record nothing.
    pub fn detached_var_builder(&self) -> VarBuilder<'static> {
        self.builder(For::Evaluation)
    }

    /// A builder that returns the tensors that `put` makes from the variables, until
    /// [`remove_taps`](Self::remove_taps).
    pub(crate) fn tapped_var_builder(&self, put: Arc<PutTap>) -> VarBuilder<'static> {
        self.remove_taps();
        self.builder(For::Taps(put))
    }

    /// Removes the taps. Modules built on them keep the current values.
    pub(crate) fn remove_taps(&self) {
        self.lock().values_mut().for_each(|param| param.tap = None);
    }

    fn builder(&self, purpose: For) -> VarBuilder<'static> {
        let backend = Backend { params: self.clone(), purpose };
        VarBuilder::from_backend(Box::new(backend), self.0.dtype, self.0.device.clone())
    }

    /// Names and masters, in order.
    pub fn vars(&self) -> Vec<(String, Var)> {
        self.lock().iter().map(|(name, param)| (name.clone(), param.master.clone())).collect()
    }

    /// Names and values of the buffers, in order, as of the last completed step. Several ranks average them
    /// between [`commit_buffers`](Self::commit_buffers) and [`roll_back_buffers`](Self::roll_back_buffers).
    pub fn buffers(&self) -> Vec<(String, Var)> {
        self.lock_buffers().iter().map(|(name, buffer)| (name.clone(), buffer.kept.clone())).collect()
    }

    /// All tensors that a checkpoint of the model holds: parameters, then buffers.
    pub fn state_dict(&self) -> Vec<(String, Var)> {
        [self.vars(), self.buffers()].concat()
    }

    /// Keeps the changes that training made to the buffers.
    pub fn commit_buffers(&self) -> Result<()> {
        Ok(self.lock_buffers().values().try_for_each(|buffer| buffer.kept.set(&buffer.working))?)
    }

    /// Discards changes made to the buffers since they were last committed or restored.
    pub fn roll_back_buffers(&self) -> Result<()> {
        Ok(self.lock_buffers().values().try_for_each(|buffer| buffer.working.set(&buffer.kept))?)
    }

    /// The variable that the module computes with and that gradients refer to.
    pub(crate) fn working(&self, name: &str) -> Option<Var> {
        self.lock().get(name).map(|param| param.working.clone())
    }

    /// All parameters, in order, in the form that optimizers take.
    pub fn for_optimizer(&self) -> Vec<optim::Param> {
        self.vars().iter().map(|(name, master)| self.param(name, master)).collect()
    }

    /// One parameter in that form.
    pub(crate) fn param(&self, name: &str, master: &Var) -> optim::Param {
        let copy = self.working(name).filter(|working| working.dtype() != master.dtype());
        optim::Param { name: name.to_string(), master: master.clone(), copy }
    }

    /// Copies the masters' values to the working variables and their taps.
    pub fn publish(&self) -> Result<()> {
        let params = self.lock();
        let narrow = params.values().filter(|param| param.working.dtype() != param.master.dtype());
        let pairs = narrow.map(|param| (param.master.as_tensor(), param.working.as_tensor()));
        publish(&pairs.collect::<Vec<_>>())?;
        drop(params);
        self.refresh_taps()
    }

    /// Copies the working variables' values to the taps.
    pub(crate) fn refresh_taps(&self) -> Result<()> {
        for Param { working, tap, .. } in self.lock().values() {
            tap.as_ref().map_or(Ok(()), |tap| taps::refresh(tap, working))?;
        }
        Ok(())
    }

    /// Runs `work`, then restores all values bit for bit, whether it succeeded or not.
    pub(crate) fn put_back_after<T>(&self, work: impl FnOnce() -> Result<T>) -> Result<T> {
        let vars = self.state_dict();
        let before: Vec<Tensor> =
            vars.iter().map(|(_, var)| var.copy()).collect::<candle_core::Result<_>>()?;
        let result = work();
        for ((_, var), value) in vars.iter().zip(&before) {
            var.set(value)?;
        }
        self.publish()?;
        self.roll_back_buffers()?;
        result
    }

    /// The total number of values in all parameters.
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

    fn lock_buffers(&self) -> MutexGuard<'_, IndexMap<String, Kept>> {
        self.0.buffers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

struct Backend {
    params: Params,
    purpose: For,
}

/// What a module is built for.
enum For {
    /// Variables that record gradients.
    Training,
    /// Variables that record gradients, through taps.
    Taps(Arc<PutTap>),
    /// Plain tensors.
    Evaluation,
}

impl Backend {
    /// The tensor that a module receives for a parameter.
    fn handed_out(&self, name: &str, param: &mut Param) -> candle_core::Result<Tensor> {
        Ok(match &self.purpose {
            For::Training => param.working.as_tensor().clone(),
            For::Evaluation => param.working.as_detached_tensor(),
            // One tap per parameter, however often it is requested: it reports the sum over all uses.
            For::Taps(put) => match &param.tap {
                Some(tap) => tap.clone(),
                None => param.tap.insert(put(name, &param.working)?).clone(),
            },
        })
    }

    /// The buffer of this name: a variable for training, a plain tensor for evaluation.
    fn buffer(
        &self,
        shape: Shape,
        name: &str,
        init: Init,
        dtype: DType,
        device: &Device,
    ) -> candle_core::Result<Tensor> {
        if self.params.lock().contains_key(name) {
            candle_core::bail!("`{name}` is a parameter and was requested as a buffer");
        }
        let mut buffers = self.params.lock_buffers();
        if !buffers.contains_key(name) {
            let values = initial_values(&shape, init, self.params.0.seed, name)?;
            let values = Tensor::from_vec(values, &shape, device)?.to_dtype(dtype)?;
            let kept = Kept { kept: Var::from_tensor(&values)?, working: Var::from_tensor(&values)? };
            buffers.insert(name.to_string(), kept);
        }
        let Kept { kept, working } = &buffers[name];
        if (kept.shape(), kept.dtype()) != (&shape, dtype) {
            candle_core::bail!(
                "buffer `{name}` was created with shape {:?} and type {:?} and was then requested with shape {shape:?} and type \
                 {dtype:?}",
                kept.shape(),
                kept.dtype()
            );
        }
        Ok(match self.purpose {
            For::Evaluation => kept.as_detached_tensor(),
            For::Training | For::Taps(_) => working.as_tensor().clone(),
        })
    }
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
        if let Some(name) = name.strip_suffix(BUFFER) {
            return self.buffer(shape, name, init, dtype, device);
        }
        if self.params.lock_buffers().contains_key(name) {
            candle_core::bail!("`{name}` is a buffer and was requested as a parameter");
        }
        let mut vars = self.params.lock();
        match vars.get(name) {
            Some(Param { working, .. }) if working.shape() == &shape => {}
            Some(Param { working, .. }) => candle_core::bail!(
                "parameter `{name}` was created with shape {:?} and was then requested with shape {shape:?}",
                working.shape()
            ),
            None => {
                let values = initial_values(&shape, init, self.params.0.seed, name)?;
                let values = Tensor::from_vec(values, shape, device)?;
                let working = Var::from_tensor(&values.to_dtype(dtype)?)?;
                let is_half = matches!(dtype, DType::BF16 | DType::F16);
                let master = if is_half { Var::from_tensor(&values)? } else { working.clone() };
                vars.insert(name.to_string(), Param { master, working, tap: None });
            }
        }
        self.handed_out(name, &mut vars[name])
    }

    fn get_unchecked(&self, name: &str, _: DType, _: &Device) -> candle_core::Result<Tensor> {
        match self.params.lock().get_mut(name) {
            Some(param) => self.handed_out(name, param),
            None => candle_core::bail!("parameter `{name}` has no shape yet: request it with a shape first"),
        }
    }

    fn contains_tensor(&self, name: &str) -> bool {
        self.params.lock().contains_key(name)
    }
}

/// Draws the values that `init` describes from the parameter's own generator.
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
    fn a_parameter_that_is_asked_for_twice_has_one_tap_which_follows_the_masters() {
        let params = Params::new(0, DType::BF16, &Device::Cpu);
        params.var_builder().get_with_hints(2, "w", Init::Const(1.)).unwrap();
        let put = |_: &str, var: &Var| var.as_tensor().copy();
        let vb = params.tapped_var_builder(Arc::new(put));
        let [tap, again] = [(); 2].map(|()| vb.get(2, "w").unwrap());
        assert_eq!(tap.id(), again.id());
        let value = || tap.to_dtype(DType::F32).unwrap().to_vec1::<f32>().unwrap();
        let move_to = |x: f32| {
            params.vars()[0].1.set(&Tensor::new(&[x, x], &Device::Cpu).unwrap()).unwrap();
            params.publish().unwrap();
        };
        move_to(5.);
        assert_eq!(value(), [5.; 2]);
        params.remove_taps();
        move_to(7.);
        assert_eq!(value(), [5.; 2]);
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
    fn buffers_are_kept_forgotten_and_read_only_in_evaluation() {
        // Buffers keep their type in half precision too.
        let params = Params::new(0, DType::F16, &Device::Cpu);
        let buffer = |vb: VarBuilder| Buffer::new(2, "m", 0.5, DType::F32, &vb.pp("norm")).unwrap();
        let (training, evaluation) = (buffer(params.var_builder()), buffer(params.detached_var_builder()));
        let values = |buffer: &Buffer| buffer.value().to_vec1::<f32>().unwrap();
        let set = |x: f32| training.set(&Tensor::new(&[x, x], &Device::Cpu).unwrap()).unwrap();
        set(1.);
        assert_eq!((values(&training), values(&evaluation)), (vec![1.; 2], vec![0.5; 2]));
        params.roll_back_buffers().unwrap();
        assert_eq!(values(&training), [0.5; 2]);
        set(2.);
        params.commit_buffers().unwrap();
        assert_eq!(values(&evaluation), [2.; 2]);
        let error = evaluation.set(&training.value()).unwrap_err().to_string();
        assert_eq!(error, "a buffer can only be changed in a training step, and this is an evaluation");
        assert!(!training.value().track_op());
        // No optimizer sees the buffer; a checkpoint does, and a trial restores it.
        assert_eq!(
            (params.vars().len(), params.count(), params.state_dict()[0].0.as_str()),
            (0, 0, "norm.m")
        );
        let trial = || {
            set(9.);
            params.commit_buffers()
        };
        params.put_back_after(trial).unwrap();
        assert_eq!((values(&training), values(&evaluation)), (vec![2.; 2], vec![2.; 2]));
    }

    #[test]
    fn a_name_is_a_parameters_or_a_buffers() {
        let vb = Params::new(0, DType::F32, &Device::Cpu).var_builder();
        Buffer::new(2, "b", 0., DType::F32, &vb).unwrap();
        vb.get(2, "w").unwrap();
        let buffer = |name: &str, dtype| Buffer::new(2, name, 0., dtype, &vb).unwrap_err().to_string();
        let error = vb.get(2, "b").unwrap_err().to_string();
        assert!(error.contains("`b` is a buffer and was requested as a parameter"), "{error}");
        let error = buffer("w", DType::F32);
        assert!(error.contains("`w` is a parameter and was requested as a buffer"), "{error}");
        assert!(buffer("b", DType::I64).contains("requested with shape [2] and type I64"));
    }

    #[test]
    fn two_shapes_under_one_name_are_refused() {
        let vb = Params::new(0, DType::F32, &Device::Cpu).var_builder();
        vb.get(2, "w").unwrap();
        let error = vb.get(3, "w").unwrap_err().to_string();
        assert!(
            error.contains("`w` was created with shape [2] and was then requested with shape [3]"),
            "{error}"
        );
    }
}
