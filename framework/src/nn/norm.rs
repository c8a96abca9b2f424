//! Normalisation over channels-last tensors, in at least 32 bits whatever the precision.
//!
//! Runs as kernels, in one graph operation with the following activation; if kernels are disabled or do not
//! apply, it is composed of candle operations. Everything, including the running statistics, stays on the
//! device, because reading a value from a device waits for all work queued before.

use candle_core::{D, DType, Tensor};
use candle_nn::{Init, VarBuilder};
use candlepower_kernels::{self as kernels, Activation, Normalized, Over};

use super::activation::activated;
use super::{convolves, fast};
use crate::error::{Error, Result};
use crate::params::Buffer;

/// Normalises each channel over the batch and its pixels, by PyTorch's rules (Ioffe and Szegedy 2015).
///
/// The buffers `running_mean`, `running_var` and `num_batches_tracked` are updated in training.
#[derive(Debug, Clone)]
pub struct BatchNorm {
    /// (C).
    weight: Tensor,
    /// (C).
    bias: Tensor,
    /// (C), f32.
    running_mean: Buffer,
    /// (C), f32: the unbiased variance.
    running_var: Buffer,
    /// A scalar, i64.
    num_batches_tracked: Buffer,
    then: Option<Activation>,
}

/// The weight of a batch in the running statistics.
const MOMENTUM: f64 = 0.1;
const EPS: f64 = 1e-5;

impl BatchNorm {
    /// Creates a layer with momentum 0.1 and eps 1e-5. `weight` initialises the weight; the bias starts at
    /// zero.
    pub fn new(channels: usize, weight: Init, vb: VarBuilder) -> Result<Self> {
        // Statistics of f64 parameters, used in tests, keep full precision.
        let dtype = if vb.dtype() == DType::F64 { DType::F64 } else { DType::F32 };
        Ok(Self {
            weight: vb.get_with_hints(channels, "weight", weight)?,
            bias: vb.get_with_hints(channels, "bias", Init::Const(0.))?,
            running_mean: Buffer::new(channels, "running_mean", 0., dtype, &vb)?,
            running_var: Buffer::new(channels, "running_var", 1., dtype, &vb)?,
            num_batches_tracked: Buffer::new((), "num_batches_tracked", 0., DType::I64, &vb)?,
            then: None,
        })
    }

    /// Adds an activation after it; in training both are one operation.
    pub fn then(self, activation: Activation) -> Self {
        Self { then: Some(activation), ..self }
    }

    /// Normalises (B, .., C) by the running statistics, as in evaluation.
    pub fn by_running(&self, x: &Tensor) -> Result<Tensor> {
        let dtype = self.running_mean.value().dtype();
        let deviation = (self.running_var.value() + EPS)?.sqrt()?;
        let scale = (self.weight.to_dtype(dtype)? / deviation)?;
        let centred = x.to_dtype(dtype)?.broadcast_sub(&self.running_mean.value())?;
        let y = centred.broadcast_mul(&scale)?.broadcast_add(&self.bias.to_dtype(dtype)?)?;
        Ok(activated(&y, self.then)?.to_dtype(x.dtype())?)
    }

    /// Normalises (B, .., C) by the statistics of the batch, as in training. The training build also updates
    /// the running statistics, as if it had seen this batch `times` times in a row. Fails if a channel has
    /// only one value.
    pub fn by_batch(&self, x: &Tensor, times: usize) -> Result<Tensor> {
        let (y, statistics) = normalize(x, Over::Batch, &self.weight, &self.bias, self.then)?;
        if statistics.count < 2 {
            return Err(Error::msg(format!(
                "batch normalisation in training needs more than one value per channel; the input is {:?}; if that is an epoch's last batch, `trainer.drop_last = true` skips it",
                x.dims()
            )));
        }
        if self.running_mean.is_writable() {
            let unbiased = statistics.unbiased()?;
            for _ in 0..times {
                follow(&self.running_mean, &statistics.means)?;
                follow(&self.running_var, &unbiased)?;
                self.num_batches_tracked.set(&(self.num_batches_tracked.value() + 1.)?)?;
            }
        }
        Ok(y)
    }

    /// [`by_batch`](Self::by_batch) in training, otherwise [`by_running`](Self::by_running).
    pub fn forward(&self, x: &Tensor, training: bool) -> Result<Tensor> {
        if training { self.by_batch(x, 1) } else { self.by_running(x) }
    }
}

/// Moves a running statistic towards that of a batch.
fn follow(running: &Buffer, batch: &Tensor) -> Result<()> {
    let value = running.value();
    let batch = batch.to_dtype(value.dtype())?;
    running.set(&((value * (1. - MOMENTUM))? + (batch * MOMENTUM)?)?)
}

/// Normalises groups of channels in each sample (Wu and He 2018), eps 1e-5.
#[derive(Debug, Clone)]
pub struct GroupNorm {
    /// (C).
    weight: Tensor,
    /// (C).
    bias: Tensor,
    groups: usize,
    then: Option<Activation>,
}

impl GroupNorm {
    /// Creates a layer for `channels` channels in `groups` equal groups. The weight starts at one, the bias
    /// at zero.
    pub fn new(groups: usize, channels: usize, vb: VarBuilder) -> Result<Self> {
        if groups == 0 || !channels.is_multiple_of(groups) {
            return Err(Error::msg(format!("{channels} channels do not make {groups} equal groups")));
        }
        let weight = vb.get_with_hints(channels, "weight", Init::Const(1.))?;
        let bias = vb.get_with_hints(channels, "bias", Init::Const(0.))?;
        Ok(Self { weight, bias, groups, then: None })
    }

    /// Adds an activation after it; both are one operation.
    pub fn then(self, activation: Activation) -> Self {
        Self { then: Some(activation), ..self }
    }

    /// Normalises (B, .., C).
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        Ok(normalize(x, Over::Groups(self.groups), &self.weight, &self.bias, self.then)?.0)
    }
}

/// Normalises the last dimension of (.., C), each row separately (Ba, Kiros and Hinton 2016), eps 1e-5, with
/// PyTorch's names.
///
/// The layer norm of `candle_nn` has a fast path without a backward pass, so models using it do not learn.
#[derive(Debug, Clone)]
pub struct LayerNorm {
    /// (C).
    weight: Tensor,
    /// (C).
    bias: Tensor,
}

impl LayerNorm {
    /// Creates a layer for this many features. The weight starts at one, the bias at zero.
    pub fn new(features: usize, vb: VarBuilder) -> Result<Self> {
        let weight = vb.get_with_hints(features, "weight", Init::Const(1.))?;
        let bias = vb.get_with_hints(features, "bias", Init::Const(0.))?;
        Ok(Self { weight, bias })
    }

    /// (.., C) to (.., C).
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        // Each row is treated as a sample with one group.
        let rows = x.reshape(((), x.dim(D::Minus1)?))?;
        let y = normalize(&rows, Over::Groups(1), &self.weight, &self.bias, None)?.0;
        Ok(y.reshape(x.shape())?)
    }
}

/// Mean and (biased) variance of each group, f64, on the device of the values, and the number of values per
/// group.
struct Statistics {
    means: Tensor,
    variances: Tensor,
    count: usize,
}

impl Statistics {
    /// The unbiased variances.
    fn unbiased(&self) -> Result<Tensor> {
        let n = self.count as f64;
        // Divide by a tensor, because candle multiplies by a scalar's inverse, which rounds once more.
        let freedom = Tensor::full(n - 1., self.variances.shape(), self.variances.device())?;
        Ok(((&self.variances * n)? / freedom)?)
    }
}

/// `(x - mean) / sqrt(variance + eps) * weight + bias`, then the activation, for (B, .., C) with weight and
/// bias (C).
fn normalize(
    x: &Tensor,
    over: Over,
    weight: &Tensor,
    bias: &Tensor,
    then: Option<Activation>,
) -> Result<(Tensor, Statistics)> {
    let dims = x.dims();
    let (Some(&batch), Some(&channels), true) = (dims.first(), dims.last(), dims.len() >= 2) else {
        return Err(Error::msg(format!("expected a tensor (B, .., C) to normalise, found shape {dims:?}")));
    };
    if weight.dims() != [channels] || x.elem_count() == 0 {
        return Err(Error::msg(format!("{:?} channels to normalise, found shape {dims:?}", weight.dims())));
    }
    let wide = if x.dtype() == DType::F64 { DType::F64 } else { DType::F32 };
    let on_device = convolves(x) && x.device().is_cuda();
    // CUDA kernels read and write half types directly.
    let y = if on_device { x.clone() } else { x.to_dtype(wide)? };
    let (weight, bias) = (weight.to_dtype(wide)?, bias.to_dtype(wide)?);
    let pixels = x.elem_count() / (batch * channels);
    let rows = y.reshape((batch, pixels, channels))?.contiguous()?;
    let (y, statistics) = if on_device || fast(&rows) {
        let Normalized { y, means, variances, count } =
            kernels::normalize(&rows, over, &weight, &bias, EPS, then)?;
        (y, Statistics { means, variances, count })
    } else {
        let (y, statistics) = composed(&rows, over, &weight, &bias)?;
        (activated(&y, then)?, statistics)
    };
    Ok((y.reshape(dims)?.to_dtype(x.dtype())?, statistics))
}

/// Like [`normalize`], for (B, P, C) and with candle operations only.
fn composed(x: &Tensor, over: Over, weight: &Tensor, bias: &Tensor) -> Result<(Tensor, Statistics)> {
    let (batch, pixels, channels) = x.dims3()?;
    let (grouped, axes, count) = match over {
        Over::Batch => (x.reshape((batch, pixels, channels, 1))?, vec![0, 1], batch * pixels),
        Over::Groups(n) => (x.reshape((batch, pixels, n, channels / n))?, vec![1, 3], pixels * channels / n),
    };
    let mean_of = |x: &Tensor| {
        // Candle sums sequentially, so sum in f64.
        let wide = x.to_dtype(DType::F64)?;
        let mean = match over {
            // On a CUDA device, summing a channel over all samples at once would use only one block.
            Over::Batch if !x.device().is_cpu() => wide.mean_keepdim(1)?.mean_keepdim(0),
            _ => wide.mean_keepdim(&axes[..]),
        };
        mean?.to_dtype(x.dtype())
    };
    let mean = mean_of(&grouped)?;
    let centred = grouped.broadcast_sub(&mean)?;
    let variance = mean_of(&centred.sqr()?)?;
    let y = centred.broadcast_div(&(&variance + EPS)?.sqrt()?)?.reshape((batch, pixels, channels))?;
    let y = y.broadcast_mul(weight)?.broadcast_add(bias)?;
    let flat = |x: &Tensor| x.detach().to_dtype(DType::F64)?.flatten_all();
    Ok((y, Statistics { means: flat(&mean)?, variances: flat(&variance)?, count }))
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Var};

    use super::*;
    use crate::params::Params;

    fn random(shape: impl Into<candle_core::Shape>) -> Var {
        Var::randn(3f32, 2., shape, &Device::Cpu).unwrap()
    }

    fn flat(x: &Tensor) -> Vec<f32> {
        x.flatten_all().unwrap().to_vec1().unwrap()
    }

    /// The largest difference, relative to the largest expected value.
    fn error(actual: &Tensor, expected: &Tensor) -> f32 {
        assert_eq!(actual.dims(), expected.dims());
        let (actual, expected) = (flat(actual), flat(expected));
        let largest = expected.iter().fold(0f32, |m, x| m.max(x.abs()));
        actual.iter().zip(&expected).fold(0f32, |m, (a, e)| m.max((a - e).abs())) / largest
    }

    #[test]
    fn the_fused_operation_is_the_composed_one_in_f64() {
        let leaky = Some(Activation::LeakyRelu(0.2));
        // More pixels than a thread's portion, channel counts that do and do not fill vectors, and a plain
        // (B, C).
        for (shape, over, then) in [
            (vec![3, 40, 50, 12], Over::Batch, None),
            (vec![3, 40, 50, 12], Over::Groups(3), Some(Activation::Silu)),
            (vec![3, 40, 50, 12], Over::Batch, leaky),
            (vec![2, 20, 19, 35], Over::Groups(5), None),
            (vec![2, 20, 19, 48], Over::Batch, Some(Activation::Gelu)),
            (vec![2, 5, 1, 12], Over::Groups(12), leaky),
            (vec![7, 12], Over::Batch, None),
            (vec![4, 12], Over::Groups(2), Some(Activation::Silu)),
        ] {
            let channels = *shape.last().unwrap();
            let (x, weight, bias) = (random(shape.clone()), random(channels), random(channels));
            let wanted = random(shape.clone());
            let run = |dtype| {
                let of = |var: &Var| Var::from_tensor(&var.to_dtype(dtype).unwrap()).unwrap();
                let vars = [of(&x), of(&weight), of(&bias)];
                let (y, statistics) = normalize(&vars[0], over, &vars[1], &vars[2], then).unwrap();
                let loss = (&y * wanted.to_dtype(dtype).unwrap()).unwrap().sum_all().unwrap();
                let grads = loss.backward().unwrap();
                let grads = vars.iter().map(|var| grads.get(var).unwrap().clone());
                (
                    std::iter::once(y).chain(grads).collect::<Vec<_>>(),
                    statistics.variances.to_vec1::<f64>().unwrap(),
                )
            };
            let (fast, wide) = (run(DType::F32), run(DType::F64));
            for (i, (fast, wide)) in fast.0.iter().zip(&wide.0).enumerate() {
                let error = error(fast, &wide.to_dtype(DType::F32).unwrap());
                assert!(error < 1e-5, "{shape:?}, {over:?}, {then:?}, {i}: {error:e}");
            }
            let off = fast.1.iter().zip(&wide.1).map(|(a, b)| (a / b - 1.).abs()).fold(0., f64::max);
            assert!(off < 1e-5 && fast.1.len() == wide.1.len(), "{shape:?}, {over:?}: {off:e}");
        }
    }

    #[test]
    fn values_far_from_zero_keep_their_variance() {
        let x = (random((3, 70, 20)).as_tensor() + 1000.).unwrap();
        let [weight, bias] = [random(20), random(20)];
        for over in [Over::Batch, Over::Groups(4)] {
            let variances = |dtype| {
                let [x, weight, bias] = [&x, &weight, &bias].map(|it| it.to_dtype(dtype).unwrap());
                let (_, statistics) = normalize(&x, over, &weight, &bias, None).unwrap();
                statistics.variances.to_vec1::<f64>().unwrap()
            };
            for (fast, wide) in variances(DType::F32).iter().zip(variances(DType::F64)) {
                assert!((fast / wide - 1.).abs() < 1e-5, "{over:?}: {fast} instead of {wide}");
            }
        }
    }

    #[test]
    fn means_of_many_values_are_not_rounded_by_plain_operations_either() {
        let x = (random((8, 4096, 2)).as_tensor() + 100.).unwrap();
        let [weight, bias] = [random(2), random(2)];
        let means = |dtype| {
            let [x, weight, bias] = [&x, &weight, &bias].map(|it| it.to_dtype(dtype).unwrap());
            let work = || normalize(&x, Over::Batch, &weight, &bias, None).unwrap();
            let (_, statistics) = crate::nn::with_kernels(crate::trainer::Kernels::Reference, work);
            statistics.means.to_vec1::<f64>().unwrap()
        };
        for (plain, wide) in means(DType::F32).iter().zip(means(DType::F64)) {
            assert!((plain / wide - 1.).abs() < 2e-7, "{plain} instead of {wide}");
        }
    }

    #[test]
    fn batch_norm_follows_the_batches_of_training_alone() {
        let params = Params::new(0, DType::F32, &Device::Cpu);
        let norm = |vb| BatchNorm::new(2, Init::Const(1.), vb).unwrap();
        let (training, evaluation) = (norm(params.var_builder()), norm(params.detached_var_builder()));
        let x = Tensor::new(&[[1f32, 10.], [3., 10.]], &Device::Cpu).unwrap();
        // Means 2 and 10, variances 1 and 0; unbiased ones 2 and 0.
        let y = flat(&training.forward(&x, true).unwrap());
        assert!((y[0] + 1.).abs() < 1e-4 && (y[2] - 1.).abs() < 1e-4 && y[1].abs() < 1e-4, "{y:?}");
        let state = |norm: &BatchNorm| (flat(&norm.running_mean.value()), flat(&norm.running_var.value()));
        let after = (vec![0.2, 1.], vec![0.9 + 0.1 * 2., 0.9]);
        assert_eq!(state(&training), after);
        assert_eq!(training.num_batches_tracked.value().to_scalar::<i64>().unwrap(), 1);
        assert_eq!(state(&evaluation), (vec![0.; 2], vec![1.; 2]), "before the step is taken");
        params.commit_buffers().unwrap();
        assert_eq!(state(&evaluation), after);
        // In the evaluation build, neither mode changes the statistics.
        assert_eq!(flat(&evaluation.forward(&x, true).unwrap()), y);
        let z = flat(&evaluation.forward(&x, false).unwrap());
        assert!((z[0] - 0.8 / (1.1f32 + 1e-5).sqrt()).abs() < 1e-6, "{z:?}");
        assert_eq!(state(&evaluation), after);
        // The same batch twice counts as two batches.
        let other = Params::new(0, DType::F32, &Device::Cpu);
        let twice = norm(other.var_builder());
        twice.by_batch(&x, 2).unwrap();
        training.by_batch(&x, 1).unwrap();
        assert_eq!(state(&twice), state(&training));
    }

    #[test]
    fn a_layer_norm_is_candles_slow_one_and_has_gradients() {
        let (x, wanted) = (random((3, 5, 12)), random((3, 5, 12)));
        let params = Params::new(0, DType::F32, &Device::Cpu);
        let norm = LayerNorm::new(12, params.var_builder()).unwrap();
        let vars: Vec<Var> = params.vars().into_iter().map(|(_, var)| var).collect();
        vars.iter().for_each(|var| var.set(&random(12)).unwrap());
        let of = |y: Tensor| {
            let grads = (&y * wanted.as_tensor()).unwrap().sum_all().unwrap().backward().unwrap();
            let grads = [&vars[0], &vars[1], &x].map(|var| grads.get(var).unwrap().clone());
            std::iter::once(y).chain(grads).collect::<Vec<_>>()
        };
        let slow = candle_nn::ops::layer_norm_slow(&x, &vars[0], &vars[1], EPS as f32).unwrap();
        for (ours, candles) in of(norm.forward(&x).unwrap()).iter().zip(of(slow)) {
            assert!(error(ours, &candles) < 1e-5, "{:e}", error(ours, &candles));
        }
    }

    #[test]
    fn evaluation_has_the_activation_too() {
        let norm = BatchNorm::new(3, Init::Const(1.), Params::new(0, DType::F32, &Device::Cpu).var_builder());
        let (norm, x) = (norm.unwrap(), (random((4, 3)).as_tensor() - 3.).unwrap());
        let plain = flat(&norm.by_running(&x).unwrap());
        let leaky = norm.then(Activation::LeakyRelu(0.5)).forward(&x, false).unwrap();
        assert!(plain.iter().any(|x| *x < 0.), "{plain:?}");
        let expected: Vec<f32> = plain.iter().map(|x| if *x < 0. { 0.5 * x } else { *x }).collect();
        assert_eq!(flat(&leaky), expected);
    }

    #[test]
    fn one_value_a_channel_has_no_variance() {
        let norm = BatchNorm::new(2, Init::Const(1.), Params::new(0, DType::F32, &Device::Cpu).var_builder());
        let x = Tensor::new(&[[1f32, 10.]], &Device::Cpu).unwrap();
        let error = norm.unwrap().forward(&x, true).unwrap_err().to_string();
        assert!(
            error.starts_with(
                "batch normalisation in training needs more than one value per channel; the input is [1, 2]; "
            ),
            "{error}"
        );
        assert!(GroupNorm::new(3, 4, Params::new(0, DType::F32, &Device::Cpu).var_builder()).is_err());
    }
}
