//! Layer normalisation over all values of a state, with one weight and one bias per value.

use crate::buffer::filled;
use crate::kept::Kept;
use crate::parallel::{self, Shared, on_pool};
use crate::simd::{Kernel, LANES, Level, Simd};
use crate::tensors::{check_in_32_bits, check_like, packed, tracked, with_values};
use candle_core::{CpuStorage, CustomOp2, Device, Layout, Result, Shape, Tensor, bail};
use std::ops::Range;
use std::sync::OnceLock;

/// Values of a state per task: 8 KiB, so the second pass finds them in the L1 cache.
const PART: usize = 1 << 11;
/// Vectors added in f32 before their sum is added in f64.
const STRETCH: usize = 16;

/// Layer normalisation (Ba, Kiros and Hinton 2016) over all axes except the batch, for a weight and a bias
/// that are used many times before they change: (x - mean) / sqrt(variance + eps) weight + bias.
///
/// On the CPU, their gradients are summed over all uses and passed on after the last of them.
#[derive(Debug, Clone)]
pub struct SharedNorm(Place);

#[derive(Debug, Clone)]
enum Place {
    Cpu(Parameters),
    #[cfg(feature = "cuda")]
    Cuda {
        weight: Tensor,
        bias: Tensor,
        epsilon: f64,
    },
}

/// The data that all uses on the CPU share.
#[derive(Debug, Clone)]
struct Parameters {
    weight: Kept,
    bias: Kept,
    number: Tensor,
    epsilon: f64,
}

impl SharedNorm {
    /// Captures a weight and a bias of the state's shape as they are now; later changes are not seen.
    ///
    /// # Errors
    /// If the shapes differ, or one is not f32 on the CPU or a CUDA device.
    pub fn new(weight: &Tensor, bias: &Tensor, epsilon: f64) -> Result<SharedNorm> {
        check_in_32_bits("shared_norm", "weight", weight)?;
        check_in_32_bits("shared_norm", "bias", bias)?;
        if weight.dims() != bias.dims() {
            bail!("shared_norm: weight is {:?}, bias is {:?}", weight.dims(), bias.dims());
        }
        #[cfg(feature = "cuda")]
        if weight.device().is_cuda() {
            let (weight, bias) = (weight.contiguous()?, bias.contiguous()?);
            return Ok(SharedNorm(Place::Cuda { weight, bias, epsilon }));
        }
        let (weight, bias) = (Kept::new(weight)?, Kept::new(bias)?);
        let number = Kept::numbers([&weight, &bias])?;
        Ok(SharedNorm(Place::Cpu(Parameters { weight, bias, number, epsilon })))
    }

    /// Normalises x (B, ..), where .. is the weight's shape. Differentiable in x, the weight and the bias.
    ///
    /// # Errors
    /// If x has another shape, or is not f32 on the weight's device.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let weight = match &self.0 {
            Place::Cpu(shared) => shared.weight.values(),
            #[cfg(feature = "cuda")]
            Place::Cuda { weight, .. } => weight,
        };
        check_like("shared_norm", "x", x, weight)?;
        let state = weight.dims();
        if x.rank() == 0 || &x.dims()[1..] != state {
            bail!("shared_norm: expected (B, ..) with the weight's {state:?}, got {:?}", x.dims());
        }
        match &self.0 {
            Place::Cpu(shared) => {
                let op = Norm { shared: shared.clone(), statistics: OnceLock::new() };
                match tracked(x) || tracked(&shared.number) {
                    true => x.apply_op2(&shared.number, op),
                    false => x.apply_op2_no_bwd(&shared.number, &op),
                }
            }
            #[cfg(feature = "cuda")]
            Place::Cuda { weight, bias, epsilon } => {
                crate::cuda::normalize::normalize_states(x, weight, bias, *epsilon)
            }
        }
    }
}

/// One use of the shared weight and bias.
struct Norm {
    shared: Parameters,
    /// Mean and 1 / sqrt(variance + eps) of each sample.
    statistics: OnceLock<Vec<(f32, f32)>>,
}

/// The number of parts of a state of `len` values.
fn parts(len: usize) -> usize {
    len.div_ceil(PART)
}

fn part(index: usize, len: usize) -> Range<usize> {
    index * PART..len.min((index + 1) * PART)
}

impl Norm {
    fn statistics_of(&self, level: Level, x: &[f32], len: usize) -> Vec<(f32, f32)> {
        let (samples, parts) = (x.len() / len, parts(len));
        // The mean of each part, and the sum of squared deviations from it.
        let mut moments = vec![(0f64, 0f64); samples * parts];
        let to = Shared::new(&mut moments);
        parallel::for_each(samples * parts, |task| {
            let sample = &x[task / parts * len..][..len];
            // SAFETY: each task has its own place.
            let to = unsafe { &mut *to.at(task) };
            level.run(Moments { values: &sample[part(task % parts, len)], to });
        });
        let of_sample = |moments: &[(f64, f64)]| {
            let counts = (0..parts).map(|index| part(index, len).len() as f64);
            let of_parts = || counts.clone().zip(moments);
            let mean = of_parts().map(|(n, (mean, _))| n * mean).sum::<f64>() / len as f64;
            // The differences between the parts' means contribute to the variance too.
            let squares: f64 =
                of_parts().map(|(n, (m, squares))| squares + n * (m - mean) * (m - mean)).sum();
            (mean as f32, (1. / (squares / len as f64 + self.shared.epsilon).sqrt()) as f32)
        };
        moments.chunks_exact(parts).map(of_sample).collect()
    }
}

/// The mean of some values, and the sum of their squared deviations from it.
struct Moments<'a> {
    values: &'a [f32],
    to: &'a mut (f64, f64),
}

impl Kernel for Moments<'_> {
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let Moments { values, to } = self;
        let (mut sum, mut squares) = (0f64, 0f64);
        for stretch in values.chunks(STRETCH * LANES) {
            let vectors = stretch.chunks_exact(LANES);
            sum += vectors.remainder().iter().map(|&x| f64::from(x)).sum::<f64>();
            // SAFETY: only whole vectors are loaded.
            sum += f64::from(unsafe { vectors.fold(S::zero(), |sum, x| sum.add(S::load(x.as_ptr()))) }.sum());
        }
        let mean = (sum / values.len() as f64) as f32;
        for stretch in values.chunks(STRETCH * LANES) {
            let vectors = stretch.chunks_exact(LANES);
            let square = |&x: &f32| f64::from((x - mean) * (x - mean));
            squares += vectors.remainder().iter().map(square).sum::<f64>();
            // SAFETY: only whole vectors are loaded.
            let stretch = unsafe {
                let mean = S::splat(mean);
                vectors.fold(S::zero(), |sum, x| {
                    let x = S::load(x.as_ptr()).sub(mean);
                    x.mul_add(x, sum)
                })
            };
            squares += f64::from(stretch.sum());
        }
        *to = (f64::from(mean), squares);
    }
}

/// The forward pass of part of a sample.
struct Forward<'a> {
    x: &'a [f32],
    weight: &'a [f32],
    bias: &'a [f32],
    statistics: (f32, f32),
    to: Shared,
}

impl Kernel for Forward<'_> {
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let Forward { x, weight, bias, statistics: (mean, scale), to } = self;
        for at in (0..x.len()).step_by(LANES) {
            let lanes = LANES.min(x.len() - at);
            // SAFETY: all three have as many values as x, and there is room for as many.
            unsafe {
                let load = |from: &[f32]| S::load_lanes(from.as_ptr().add(at), lanes);
                let normal = load(x).sub(S::splat(mean)).mul(S::splat(scale));
                normal.mul_add(load(weight), load(bias)).store_lanes(to.at(at), lanes);
            }
        }
    }
}

/// The backward pass of part of a sample: adds to the gradients of weight and bias, and to the sums that the
/// sample's gradient needs.
struct Sums<'a> {
    x: &'a [f32],
    d: &'a [f32],
    weight: &'a [f32],
    statistics: (f32, f32),
    d_weight: Option<Shared>,
    d_bias: Option<Shared>,
    /// Sums of d weight, and of d weight (x - mean) scale.
    sums: &'a mut (f64, f64),
}

impl Kernel for Sums<'_> {
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let Sums { x, d, weight, statistics: (mean, scale), d_weight, d_bias, sums } = self;
        for start in (0..x.len()).step_by(STRETCH * LANES) {
            // SAFETY: all have as many values as x; absent lanes of d are zero, and so are their products.
            unsafe {
                let (mut one, mut two) = (S::zero(), S::zero());
                for at in (start..x.len().min(start + STRETCH * LANES)).step_by(LANES) {
                    let lanes = LANES.min(x.len() - at);
                    let load = |from: &[f32]| S::load_lanes(from.as_ptr().add(at), lanes);
                    let normal = load(x).sub(S::splat(mean)).mul(S::splat(scale));
                    let d = load(d);
                    let inner = d.mul(load(weight));
                    one = one.add(inner);
                    two = inner.mul_add(normal, two);
                    if let Some(to) = d_weight {
                        let to = to.at(at);
                        d.mul_add(normal, S::load_lanes(to, lanes)).store_lanes(to, lanes);
                    }
                    if let Some(to) = d_bias {
                        let to = to.at(at);
                        d.add(S::load_lanes(to, lanes)).store_lanes(to, lanes);
                    }
                }
                sums.0 += f64::from(one.sum());
                sums.1 += f64::from(two.sum());
            }
        }
    }
}

/// Computes part of a sample's gradient.
struct Backward<'a> {
    x: &'a [f32],
    d: &'a [f32],
    weight: &'a [f32],
    statistics: (f32, f32),
    /// The means of d weight, and of d weight (x - mean) scale.
    means: (f32, f32),
    to: Shared,
}

impl Kernel for Backward<'_> {
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let Backward { x, d, weight, statistics: (mean, scale), means, to } = self;
        for at in (0..x.len()).step_by(LANES) {
            let lanes = LANES.min(x.len() - at);
            // SAFETY: all three have as many values as x, and there is room for as many.
            unsafe {
                let load = |from: &[f32]| S::load_lanes(from.as_ptr().add(at), lanes);
                let normal = load(x).sub(S::splat(mean)).mul(S::splat(scale));
                let inner = load(d).mul(load(weight)).sub(S::splat(means.0));
                let dx = normal.neg_mul_add(S::splat(means.1), inner).mul(S::splat(scale));
                dx.store_lanes(to.at(at), lanes);
            }
        }
    }
}

impl CustomOp2 for Norm {
    fn name(&self) -> &'static str {
        "shared_norm"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        lx: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let x = &*packed::<f32>(x, lx)?;
        let level = Level::current();
        let y = self.shared.weight.with_values(|weight| {
            self.shared.bias.with_values(|bias| {
                let (len, parts) = (weight.len(), parts(weight.len()));
                let statistics = on_pool(|| self.statistics_of(level, x, len));
                let fill = |y: Shared| {
                    parallel::for_each(x.len() / len * parts, |task| {
                        let (sample, of) = (task / parts, part(task % parts, len));
                        // SAFETY: each task has its own part.
                        let to = unsafe { y.offset(sample * len + of.start) };
                        let (weight, bias) = (&weight[of.clone()], &bias[of.clone()]);
                        let (x, statistics) = (&x[sample * len..][of], statistics[sample]);
                        level.run(Forward { x, weight, bias, statistics, to });
                    });
                };
                // SAFETY: every part of every sample is written.
                let y = unsafe { filled(x.len(), |y| on_pool(|| fill(y))) };
                let _ = self.statistics.set(statistics);
                Ok(y)
            })
        })?;
        Ok((CpuStorage::F32(y), lx.shape().clone()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        number: &Tensor,
        _: &Tensor,
        d: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let Parameters { weight, bias, .. } = &self.shared;
        let Some(statistics) = self.statistics.get() else { bail!("shared_norm: backward before forward") };
        let level = Level::current();
        let mut d_weight = weight.tracked().then(|| weight.gradient());
        let mut d_bias = bias.tracked().then(|| bias.gradient());
        let [d_weight, d_bias] =
            [&mut d_weight, &mut d_bias].map(|sum| sum.as_mut().map(|sum| Shared::new(sum)));
        let gradient = with_values(x, |x| {
            with_values(d, |d| {
                weight.with_values(|weight| {
                    let (len, parts, samples) = (weight.len(), parts(weight.len()), statistics.len());
                    let mut sums = vec![(0f64, 0f64); parts * samples];
                    let to = Shared::new(&mut sums);
                    on_pool(|| {
                        parallel::for_each(parts, |index| {
                            let of = part(index, len);
                            for (sample, &statistics) in statistics.iter().enumerate() {
                                let at = sample * len + of.start..sample * len + of.end;
                                // SAFETY: each task has its own part of the gradients, and its own places
                                // among the sums.
                                let (d_weight, d_bias, sums) = unsafe {
                                    let part = |sum: Shared| sum.offset(of.start);
                                    (
                                        d_weight.map(part),
                                        d_bias.map(part),
                                        &mut *to.at(sample * parts + index),
                                    )
                                };
                                let (x, d, weight) = (&x[at.clone()], &d[at], &weight[of.clone()]);
                                level.run(Sums { x, d, weight, statistics, d_weight, d_bias, sums });
                            }
                        });
                    });
                    let mean = |sums: &[(f64, f64)]| {
                        let (one, two) = sums.iter().fold((0., 0.), |a, b| (a.0 + b.0, a.1 + b.1));
                        ((one / len as f64) as f32, (two / len as f64) as f32)
                    };
                    let means: Vec<(f32, f32)> = sums.chunks_exact(parts).map(mean).collect();
                    let fill = |dx: Shared| {
                        parallel::for_each(samples * parts, |task| {
                            let (sample, of) = (task / parts, part(task % parts, len));
                            let at = sample * len + of.start..sample * len + of.end;
                            // SAFETY: each task has its own part.
                            let to = unsafe { dx.offset(at.start) };
                            let (statistics, means) = (statistics[sample], means[sample]);
                            let (x, d, weight) = (&x[at.clone()], &d[at], &weight[of]);
                            level.run(Backward { x, d, weight, statistics, means, to });
                        });
                    };
                    // SAFETY: every part of every sample is written.
                    Ok(unsafe { filled(x.len(), |dx| on_pool(|| fill(dx))) })
                })
            })
        })?;
        let dx = Tensor::from_vec(gradient, x.shape(), &Device::Cpu)?;
        let number = number.track_op().then(|| number.zeros_like()).transpose()?;
        Ok((x.track_op().then_some(dx), number))
    }
}
