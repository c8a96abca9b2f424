//! Normalisation over channels-last tensors, in 32 bits whatever the precision.
//!
//! One operation of the graph with a backward pass of its own; sums are f64, over parts that do not depend on the number of
//! threads. Where the kernels are not wanted, or not on the CPU, it is composed of candle's operations. These leave everything
//! on the device, the running statistics too: who reads a value of a device waits for all that was asked of it before.

use candle_core::{CpuStorage, CustomOp3, DType, Layout, Shape, Storage, Tensor};
use candle_nn::{Init, VarBuilder};
use rayon::prelude::*;

use super::fast;
use crate::error::{Error, Result};
use crate::params::Buffer;

/// Values that a thread takes at once.
const GRAIN: usize = 1 << 14;

/// Normalises each channel over the batch and its pixels, by PyTorch's rules (Ioffe and Szegedy 2015).
///
/// Buffers `running_mean`, `running_var` and `num_batches_tracked` follow the batches of training.
#[derive(Debug, Clone)]
pub struct BatchNorm {
    /// (C).
    weight: Tensor,
    /// (C).
    bias: Tensor,
    /// (C), f32.
    running_mean: Buffer,
    /// (C), f32: of the unbiased variance.
    running_var: Buffer,
    /// A scalar, i64.
    num_batches_tracked: Buffer,
}

/// The share of a batch in the running statistics.
const MOMENTUM: f64 = 0.1;
const EPS: f64 = 1e-5;

impl BatchNorm {
    /// Over so many channels, momentum 0.1, eps 1e-5; the weight is drawn as `weight` says, the bias is zero at first.
    pub fn new(channels: usize, weight: Init, vb: VarBuilder) -> Result<Self> {
        // The statistics of f64 parameters, which are there for tests, lose nothing either.
        let dtype = if vb.dtype() == DType::F64 { DType::F64 } else { DType::F32 };
        Ok(Self {
            weight: vb.get_with_hints(channels, "weight", weight)?,
            bias: vb.get_with_hints(channels, "bias", Init::Const(0.))?,
            running_mean: Buffer::new(channels, "running_mean", 0., dtype, &vb)?,
            running_var: Buffer::new(channels, "running_var", 1., dtype, &vb)?,
            num_batches_tracked: Buffer::new((), "num_batches_tracked", 0., DType::I64, &vb)?,
        })
    }

    /// Normalises (B, .., C) by the running statistics: what evaluation does.
    pub fn by_running(&self, x: &Tensor) -> Result<Tensor> {
        let dtype = self.running_mean.value().dtype();
        let deviation = (self.running_var.value() + EPS)?.sqrt()?;
        let scale = (self.weight.to_dtype(dtype)? / deviation)?;
        let centred = x.to_dtype(dtype)?.broadcast_sub(&self.running_mean.value())?;
        let y = centred.broadcast_mul(&scale)?.broadcast_add(&self.bias.to_dtype(dtype)?)?;
        Ok(y.to_dtype(x.dtype())?)
    }

    /// Normalises (B, .., C) by the statistics of the batch: what training does. The build for training also takes them
    /// into the running statistics, as if it had seen this batch `times` times in a row. Fails where a channel has one
    /// value alone.
    pub fn by_batch(&self, x: &Tensor, times: usize) -> Result<Tensor> {
        let (y, statistics) = normalize(x, Over::Batch, &self.weight, &self.bias, EPS)?;
        if statistics.count < 2 {
            return Err(Error::msg(format!(
                "batch normalisation in training needs more than one value a channel; the input is {:?}",
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

    /// [`by_batch`](Self::by_batch) in training, else [`by_running`](Self::by_running).
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
}

impl GroupNorm {
    /// So many channels in so many equal groups; the weight is one and the bias zero at first.
    pub fn new(groups: usize, channels: usize, vb: VarBuilder) -> Result<Self> {
        if groups == 0 || !channels.is_multiple_of(groups) {
            return Err(Error::msg(format!("{channels} channels do not make {groups} equal groups")));
        }
        let weight = vb.get_with_hints(channels, "weight", Init::Const(1.))?;
        Ok(Self { weight, bias: vb.get_with_hints(channels, "bias", Init::Const(0.))?, groups })
    }

    /// Normalises (B, .., C).
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        Ok(normalize(x, Over::Groups(self.groups), &self.weight, &self.bias, EPS)?.0)
    }
}

/// What has a mean and a variance of its own.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Over {
    /// Each channel.
    Batch,
    /// Each of so many groups of channels, in each sample.
    Groups(usize),
}

/// Mean and (biased) variance of each group, f64, on the device of the values, and of how many values.
struct Statistics {
    means: Tensor,
    variances: Tensor,
    count: usize,
}

impl Statistics {
    /// The variances as estimates of those that the values were drawn with.
    fn unbiased(&self) -> Result<Tensor> {
        let n = self.count as f64;
        // A tensor to divide by, since candle multiplies by the inverse of a number, which rounds once more.
        let freedom = Tensor::full(n - 1., self.variances.shape(), self.variances.device())?;
        Ok(((&self.variances * n)? / freedom)?)
    }
}

/// `(x - mean) / sqrt(variance + eps) * weight + bias` for (B, .., C), with weight and bias (C).
fn normalize(
    x: &Tensor,
    over: Over,
    weight: &Tensor,
    bias: &Tensor,
    eps: f64,
) -> Result<(Tensor, Statistics)> {
    let dims = x.dims();
    let (Some(&batch), Some(&channels), true) = (dims.first(), dims.last(), dims.len() >= 2) else {
        return Err(Error::msg(format!("expected a tensor (B, .., C) to normalise, found shape {dims:?}")));
    };
    if weight.dims() != [channels] || x.elem_count() == 0 {
        return Err(Error::msg(format!("{:?} channels to normalise, found shape {dims:?}", weight.dims())));
    }
    let wide = if x.dtype() == DType::F64 { DType::F64 } else { DType::F32 };
    let (y, weight, bias) = (x.to_dtype(wide)?, weight.to_dtype(wide)?, bias.to_dtype(wide)?);
    let pixels = x.elem_count() / (batch * channels);
    let rows = y.reshape((batch, pixels, channels))?.contiguous()?;
    let (y, statistics) = if fast(&rows) {
        let rows_of = Rows { batch, pixels, channels };
        let [means, variances] = with_values(&rows, |x| Ok(rows_of.statistics(over, x)))?;
        let tensor = |values: &[f64]| Tensor::from_slice(values, values.len(), rows.device());
        let statistics =
            Statistics { means: tensor(&means)?, variances: tensor(&variances)?, count: rows_of.count(over) };
        let scales = variances.iter().map(|variance| 1. / (variance + eps).sqrt()).collect();
        let op = Normalize { rows: rows_of, over, means, scales };
        (rows.apply_op3(&weight.contiguous()?, &bias.contiguous()?, op)?, statistics)
    } else {
        composed(&rows, over, &weight, &bias, eps)?
    };
    Ok((y.reshape(dims)?.to_dtype(x.dtype())?, statistics))
}

/// The same for (B, P, C), one candle operation after the other.
fn composed(
    x: &Tensor,
    over: Over,
    weight: &Tensor,
    bias: &Tensor,
    eps: f64,
) -> Result<(Tensor, Statistics)> {
    let (batch, pixels, channels) = x.dims3()?;
    let (grouped, axes, count) = match over {
        Over::Batch => (x.reshape((batch, pixels, channels, 1))?, vec![0, 1], batch * pixels),
        Over::Groups(n) => (x.reshape((batch, pixels, n, channels / n))?, vec![1, 3], pixels * channels / n),
    };
    let mean_of = |x: &Tensor| match over {
        // On a device the sum of a channel over all samples would be one block's work.
        Over::Batch if !x.device().is_cpu() => x.mean_keepdim(1)?.mean_keepdim(0),
        _ => x.mean_keepdim(&axes[..]),
    };
    let mean = mean_of(&grouped)?;
    let centred = grouped.broadcast_sub(&mean)?;
    let variance = mean_of(&centred.sqr()?)?;
    let y = centred.broadcast_div(&(&variance + eps)?.sqrt()?)?.reshape((batch, pixels, channels))?;
    let y = y.broadcast_mul(weight)?.broadcast_add(bias)?;
    let flat = |x: &Tensor| x.detach().to_dtype(DType::F64)?.flatten_all();
    Ok((y, Statistics { means: flat(&mean)?, variances: flat(&variance)?, count }))
}

/// How values lie in memory: channels within pixels within samples.
#[derive(Debug, Clone, Copy)]
struct Rows {
    batch: usize,
    pixels: usize,
    channels: usize,
}

impl Rows {
    /// The group of a sample's channel.
    fn group(&self, over: Over, sample: usize, channel: usize) -> usize {
        match over {
            Over::Batch => channel,
            Over::Groups(n) => sample * n + channel / (self.channels / n),
        }
    }

    /// How many values a group has.
    fn count(&self, over: Over) -> usize {
        match over {
            Over::Batch => self.batch * self.pixels,
            Over::Groups(n) => self.pixels * self.channels / n,
        }
    }

    fn groups(&self, over: Over) -> usize {
        match over {
            Over::Batch => self.channels,
            Over::Groups(n) => self.batch * n,
        }
    }

    /// Pixels that a thread takes at once.
    fn pixels_at_once(&self) -> usize {
        (GRAIN / self.channels).clamp(1, self.pixels)
    }

    /// Two sums over the pixels of each sample's channels: `add` adds a pixel of `a` and `b` to those of its sample.
    fn sums(
        &self,
        a: &[f32],
        b: &[f32],
        add: impl Fn(usize, &[f32], &[f32], &mut [f64], &mut [f64]) + Sync,
    ) -> [Vec<f64>; 2] {
        let Self { batch, pixels, channels } = *self;
        let part = self.pixels_at_once();
        let parts = pixels.div_ceil(part);
        let sums: Vec<[Vec<f64>; 2]> = (0..batch * parts)
            .into_par_iter()
            .map(|task| {
                let (sample, first) = (task / parts, task % parts * part);
                let at = (sample * pixels + first) * channels
                    ..(sample * pixels + pixels.min(first + part)) * channels;
                let mut sums = [vec![0.; channels], vec![0.; channels]];
                let [one, two] = &mut sums;
                for (a, b) in a[at.clone()].chunks_exact(channels).zip(b[at].chunks_exact(channels)) {
                    add(sample, a, b, one, two);
                }
                sums
            })
            .collect();
        let mut total = [vec![0.; batch * channels], vec![0.; batch * channels]];
        for (task, sums) in sums.iter().enumerate() {
            let sample = task / parts;
            for (total, sums) in total.iter_mut().zip(sums) {
                let total = &mut total[sample * channels..(sample + 1) * channels];
                total.iter_mut().zip(sums).for_each(|(total, sum)| *total += sum);
            }
        }
        total
    }

    /// Adds up, over each group, what was summed for each sample's channels, each with a factor of its channel.
    fn by_group(&self, over: Over, sums: &[f64], factor: impl Fn(usize) -> f64) -> Vec<f64> {
        let mut groups = vec![0.; self.groups(over)];
        for (i, sum) in sums.iter().enumerate() {
            let (sample, channel) = (i / self.channels, i % self.channels);
            groups[self.group(over, sample, channel)] += factor(channel) * sum;
        }
        groups
    }

    /// Mean and (biased) variance of each group.
    fn statistics(&self, over: Over, x: &[f32]) -> [Vec<f64>; 2] {
        let [sums, squares] = self.sums(x, x, |_, x, _, sums, squares| {
            for ((sum, square), &x) in sums.iter_mut().zip(squares).zip(x) {
                let x = f64::from(x);
                *sum += x;
                *square += x * x;
            }
        });
        let count = self.count(over);
        let mean = |sums: &[f64]| -> Vec<f64> {
            self.by_group(over, sums, |_| 1.).into_iter().map(|sum| sum / count as f64).collect()
        };
        let (means, squares) = (mean(&sums), mean(&squares));
        // In f64 the difference loses nothing that f32 values had.
        let variances =
            squares.iter().zip(&means).map(|(square, mean)| (square - mean * mean).max(0.)).collect();
        [means, variances]
    }

    /// Fills values sample by sample: `fill` is told the sample, and some of its pixels by their place among all.
    fn fill(&self, fill: impl Fn(usize, usize, &mut [f32]) + Sync) -> Vec<f32> {
        let Self { batch, pixels, channels } = *self;
        let mut out = vec![0f32; batch * pixels * channels];
        let part = self.pixels_at_once() * channels;
        out.par_chunks_mut(pixels * channels).enumerate().for_each(|(sample, out)| {
            out.par_chunks_mut(part).enumerate().for_each(|(i, out)| {
                fill(sample, sample * pixels * channels + i * part, out);
            });
        });
        out
    }
}

struct Normalize {
    rows: Rows,
    over: Over,
    /// Of each group.
    means: Vec<f64>,
    /// 1 / sqrt(variance + eps) of each group.
    scales: Vec<f64>,
}

impl Normalize {
    /// A value for each channel of each sample.
    fn table(&self, value: impl Fn(usize, usize) -> f64) -> Vec<f32> {
        let Rows { batch, channels, .. } = self.rows;
        let of =
            |i: usize| value(self.rows.group(self.over, i / channels, i % channels), i % channels) as f32;
        (0..batch * channels).map(of).collect()
    }

    fn forward(&self, x: &[f32], weight: &[f32], bias: &[f32]) -> Vec<f32> {
        let channels = self.rows.channels;
        let means = self.table(|group, _| self.means[group]);
        let factors = self.table(|group, channel| self.scales[group] * f64::from(weight[channel]));
        self.rows.fill(|sample, at, y| {
            let row = sample * channels..(sample + 1) * channels;
            let (means, factors) = (&means[row.clone()], &factors[row]);
            for (y, x) in y.chunks_exact_mut(channels).zip(x[at..].chunks_exact(channels)) {
                for c in 0..channels {
                    y[c] = (x[c] - means[c]) * factors[c] + bias[c];
                }
            }
        })
    }

    /// The gradients of x, weight and bias.
    fn backward(&self, x: &[f32], weight: &[f32], dy: &[f32]) -> [Vec<f32>; 3] {
        let (rows, channels) = (self.rows, self.rows.channels);
        let means = self.table(|group, _| self.means[group]);
        let scales = self.table(|group, _| self.scales[group]);
        // Of each sample's channels: the sums of dy, and of dy times the normalised x.
        let [plain, projected] = rows.sums(dy, x, |sample, dy, x, plain, projected| {
            let row = sample * channels..(sample + 1) * channels;
            let (means, scales) = (&means[row.clone()], &scales[row]);
            for c in 0..channels {
                plain[c] += f64::from(dy[c]);
                projected[c] += f64::from(dy[c] * ((x[c] - means[c]) * scales[c]));
            }
        });
        let over_batch = |sums: &[f64]| -> Vec<f32> {
            rows.by_group(Over::Batch, sums, |_| 1.).into_iter().map(|sum| sum as f32).collect()
        };
        // dx = scale (w dy - mean(w dy) - n mean(w dy n)), n being the normalised x.
        let mean = |sums: &[f64]| -> Vec<f64> {
            let sums = rows.by_group(self.over, sums, |channel| f64::from(weight[channel]));
            sums.into_iter().map(|sum| sum / rows.count(self.over) as f64).collect()
        };
        let (along, tilt) = (mean(&plain), mean(&projected));
        let gain = self.table(|group, channel| self.scales[group] * f64::from(weight[channel]));
        let shift = self.table(|group, _| self.scales[group] * along[group]);
        let slope = self.table(|group, _| self.scales[group].powi(2) * tilt[group]);
        let dx = rows.fill(|sample, at, dx| {
            let row = sample * channels..(sample + 1) * channels;
            let (means, gain) = (&means[row.clone()], &gain[row.clone()]);
            let (shift, slope) = (&shift[row.clone()], &slope[row]);
            let inputs = x[at..].chunks_exact(channels).zip(dy[at..].chunks_exact(channels));
            for (dx, (x, dy)) in dx.chunks_exact_mut(channels).zip(inputs) {
                for c in 0..channels {
                    dx[c] = gain[c] * dy[c] - shift[c] - slope[c] * (x[c] - means[c]);
                }
            }
        });
        [dx, over_batch(&projected), over_batch(&plain)]
    }
}

impl CustomOp3 for Normalize {
    fn name(&self) -> &'static str {
        "normalize"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        lx: &Layout,
        weight: &CpuStorage,
        lw: &Layout,
        bias: &CpuStorage,
        lb: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let y = self.forward(values(x, lx)?, values(weight, lw)?, values(bias, lb)?);
        Ok((CpuStorage::F32(y), lx.shape().clone()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        weight: &Tensor,
        bias: &Tensor,
        _y: &Tensor,
        dy: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let dy = dy.contiguous()?;
        let [dx, dw, db] = with_values(x, |x| {
            with_values(weight, |weight| with_values(&dy, |dy| Ok(self.backward(x, weight, dy))))
        })?;
        let tensor =
            |values: Vec<f32>, like: &Tensor| Tensor::from_vec(values, like.shape(), like.device()).map(Some);
        Ok((tensor(dx, x)?, tensor(dw, weight)?, tensor(db, bias)?))
    }
}

/// The values of a contiguous tensor.
fn values<'a>(storage: &'a CpuStorage, layout: &Layout) -> candle_core::Result<&'a [f32]> {
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(&storage.as_slice::<f32>()?[start..end]),
        None => candle_core::bail!("normalize: needs contiguous tensors, got {layout:?}"),
    }
}

fn with_values<R>(x: &Tensor, f: impl FnOnce(&[f32]) -> candle_core::Result<R>) -> candle_core::Result<R> {
    match &*x.storage_and_layout().0 {
        Storage::Cpu(storage) => f(values(storage, x.layout())?),
        _ => candle_core::bail!(
            "normalize: expected a tensor on the CPU, got one on {:?}",
            x.device().location()
        ),
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Var};

    use super::*;
    use crate::params::Params;

    fn random(shape: impl Into<Shape>) -> Var {
        Var::randn(3f32, 2., shape, &Device::Cpu).unwrap()
    }

    fn flat(x: &Tensor) -> Vec<f32> {
        x.flatten_all().unwrap().to_vec1().unwrap()
    }

    /// The largest difference, relative to the largest value expected.
    fn error(actual: &Tensor, expected: &Tensor) -> f32 {
        assert_eq!(actual.dims(), expected.dims());
        let (actual, expected) = (flat(actual), flat(expected));
        let largest = expected.iter().fold(0f32, |m, x| m.max(x.abs()));
        actual.iter().zip(&expected).fold(0f32, |m, (a, e)| m.max((a - e).abs())) / largest
    }

    #[test]
    fn the_fused_operation_is_the_composed_one_in_f64() {
        // More pixels than a thread takes at once; and a plain (B, C).
        for (shape, over) in [
            (vec![3, 40, 50, 12], Over::Batch),
            (vec![3, 40, 50, 12], Over::Groups(3)),
            (vec![2, 5, 1, 12], Over::Groups(12)),
            (vec![7, 12], Over::Batch),
            (vec![4, 12], Over::Groups(2)),
        ] {
            let (x, weight, bias) = (random(shape.clone()), random(12), random(12));
            let wanted = random(shape.clone());
            let run = |dtype| {
                let of = |var: &Var| Var::from_tensor(&var.to_dtype(dtype).unwrap()).unwrap();
                let vars = [of(&x), of(&weight), of(&bias)];
                let (y, statistics) = normalize(&vars[0], over, &vars[1], &vars[2], EPS).unwrap();
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
                assert!(error < 1e-5, "{shape:?}, {over:?}, {i}: {error:e}");
            }
            let off = fast.1.iter().zip(&wide.1).map(|(a, b)| (a / b - 1.).abs()).fold(0., f64::max);
            assert!(off < 1e-6 && fast.1.len() == wide.1.len(), "{shape:?}, {over:?}: {off:e}");
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
        // By the batch's statistics, and by the running ones: neither changes them.
        assert_eq!(flat(&evaluation.forward(&x, true).unwrap()), y);
        let z = flat(&evaluation.forward(&x, false).unwrap());
        assert!((z[0] - 0.8 / (1.1f32 + 1e-5).sqrt()).abs() < 1e-6, "{z:?}");
        assert_eq!(state(&evaluation), after);
        // Twice the same batch is two batches.
        let other = Params::new(0, DType::F32, &Device::Cpu);
        let twice = norm(other.var_builder());
        twice.by_batch(&x, 2).unwrap();
        training.by_batch(&x, 1).unwrap();
        assert_eq!(state(&twice), state(&training));
    }

    #[test]
    fn one_value_a_channel_has_no_variance() {
        let norm = BatchNorm::new(2, Init::Const(1.), Params::new(0, DType::F32, &Device::Cpu).var_builder());
        let x = Tensor::new(&[[1f32, 10.]], &Device::Cpu).unwrap();
        let error = norm.unwrap().forward(&x, true).unwrap_err().to_string();
        assert_eq!(
            error,
            "batch normalisation in training needs more than one value a channel; the input is [1, 2]"
        );
        assert!(GroupNorm::new(3, 4, Params::new(0, DType::F32, &Device::Cpu).var_builder()).is_err());
    }
}
