//! Normalisation of channels-last tensors, with an optional activation, as one candle op.
//!
//! A value x of a group with mean m and variance v becomes act(n w + b), where n = (x - m) / sqrt(v + eps),
//! and w and b are its channel's weight and bias. Short runs are summed in f32 and their sums in f64; the
//! partition does not depend on the number of threads.

use crate::buffer::filled;
use crate::parallel::{self, GRAIN, Shared, on_pool};
use crate::pointwise::Activation;
use crate::simd::{Kernel, LANES, Level, Simd};
use crate::tensors::{check_convolves, check_in_32_bits, check_type, packed, tracked, with_values};
use candle_core::{CpuStorage, CustomOp3, DType, Device, Layout, Result, Shape, Tensor, bail};
use std::ops::Range;

/// Pixels added in f32 before their sum is added in f64.
const STRETCH: usize = 32;

/// The values that share one mean and variance.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Over {
    /// Each channel, over all samples (Ioffe and Szegedy 2015).
    Batch,
    /// Each of this many equal groups of channels, per sample (Wu and He 2018).
    Groups(usize),
}

/// A normalised tensor and its statistics.
#[derive(Debug)]
pub struct Normalized {
    /// (B, P, C).
    pub y: Tensor,
    /// Mean of each group, f64.
    pub means: Tensor,
    /// Variance of each group, f64: the mean squared deviation from the group's mean.
    pub variances: Tensor,
    /// Number of values in a group.
    pub count: usize,
}

/// Normalises x (B, P, C) by its own statistics, scales and shifts it by weight and bias (C), and applies the
/// activation `then`, if any. Differentiable in x, weight and bias.
///
/// # Errors
/// If the shapes are incompatible, a tensor has no elements, weight or bias are not f32, or x is neither f32
/// on the CPU nor of a dtype that [`convolves`](crate::convolves) accepts on a CUDA device.
pub fn normalize(
    x: &Tensor,
    over: Over,
    weight: &Tensor,
    bias: &Tensor,
    eps: f64,
    then: Option<Activation>,
) -> Result<Normalized> {
    let op = "normalize";
    if x.device().is_cpu() {
        check_type(op, "x", x, DType::F32)?;
    }
    check_convolves(op, "x", x)?;
    for (name, tensor) in [("the weight", weight), ("the bias", bias)] {
        check_in_32_bits(op, name, tensor)?;
    }
    let (batch, pixels, channels) = x.dims3()?;
    let divides = if let Over::Groups(groups) = over { groups > 0 && channels % groups == 0 } else { true };
    if weight.dims() != [channels] || bias.dims() != [channels] || !divides {
        let (weight, bias) = (weight.dims(), bias.dims());
        bail!("{op}: {channels} channels over {over:?} with weight {weight:?} and bias {bias:?}");
    }
    #[cfg(feature = "cuda")]
    if x.device().is_cuda() {
        return crate::cuda::normalize::normalize(x, over, weight, bias, eps, then);
    }
    let rows = Rows { batch, pixels, channels, over };
    let (means, variances) = with_values(x, |x| Ok(rows.statistics(x)))?;
    let scales = variances.iter().map(|variance| 1. / (variance + eps).sqrt()).collect();
    let op = Normalize { rows, then, means: means.clone(), scales };
    let y = match [x, weight, bias].into_iter().any(tracked) {
        true => x.apply_op3(weight, bias, op)?,
        false => x.apply_op3_no_bwd(weight, bias, &op)?,
    };
    let tensor = |values: Vec<f64>| Tensor::new(values, &Device::Cpu);
    Ok(Normalized { y, means: tensor(means)?, variances: tensor(variances)?, count: rows.count() })
}

/// The layout of the values (channels within pixels within samples), and what is normalised together.
#[derive(Debug, Clone, Copy)]
struct Rows {
    batch: usize,
    pixels: usize,
    channels: usize,
    over: Over,
}

/// Per-channel numbers of one sample.
#[derive(Clone, Copy)]
struct Tables<'a> {
    means: &'a [f32],
    scales: &'a [f32],
    weight: &'a [f32],
    bias: &'a [f32],
}

/// Two per-channel sums over pixels: of x and its square, both after subtracting the first pixel's x; or of
/// dy and n dy, where dy is the gradient of n w + b.
struct PixelSums<'a> {
    x: &'a [f32],
    of: SumsOf<'a>,
    channels: usize,
    /// The sums of each channel, to add to.
    sums: [&'a mut [f64]; 2],
}

#[derive(Clone, Copy)]
enum SumsOf<'a> {
    Values,
    Gradients { dy: &'a [f32], tables: Tables<'a>, then: Option<Activation> },
}

/// n, n w + b, and the gradient of n w + b, given `dy`, the gradient of the activation's result.
///
/// # Safety
/// The processor has the instructions of `S`; each table has `lanes` values from `channel` on.
#[inline(always)]
unsafe fn normalized<S: Simd>(
    tables: &Tables,
    then: Option<Activation>,
    channel: usize,
    lanes: usize,
    x: S,
    dy: S,
) -> [S; 3] {
    // SAFETY: guaranteed by the caller.
    unsafe {
        let load = |of: &[f32]| S::load_lanes(of.as_ptr().add(channel), lanes);
        let n = x.sub(load(tables.means)).mul(load(tables.scales));
        let u = n.mul_add(load(tables.weight), load(tables.bias));
        let dy = match then {
            Some(then) => dy.mul(then.slope(u)),
            None => dy,
        };
        [n, u, dy]
    }
}

impl Kernel for PixelSums<'_> {
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let PixelSums { x, of, channels, sums: [first, second] } = self;
        let pixels = x.len() / channels;
        for channel in (0..channels).step_by(LANES) {
            let lanes = LANES.min(channels - channel);
            let mut totals = [[0f64; LANES]; 2];
            // SAFETY: x has `pixels` pixels of `channels` channels, and so does dy.
            unsafe {
                let load = |of: &[f32], pixel: usize| {
                    S::load_lanes(of.as_ptr().add(pixel * channels + channel), lanes)
                };
                let pivot = load(x, 0);
                for start in (0..pixels).step_by(STRETCH) {
                    let mut stretch = [S::zero(); 2];
                    for pixel in start..pixels.min(start + STRETCH) {
                        let x = load(x, pixel);
                        let added = match of {
                            SumsOf::Values => {
                                let x = x.sub(pivot);
                                [x, x.mul(x)]
                            }
                            SumsOf::Gradients { dy, tables, then } => {
                                let [n, _, dy] =
                                    normalized(&tables, then, channel, lanes, x, load(dy, pixel));
                                [dy, n.mul(dy)]
                            }
                        };
                        stretch = [stretch[0].add(added[0]), stretch[1].add(added[1])];
                    }
                    for (totals, stretch) in totals.iter_mut().zip(stretch) {
                        let mut values = [0f32; LANES];
                        stretch.store(values.as_mut_ptr());
                        totals.iter_mut().zip(values).for_each(|(total, value)| *total += f64::from(value));
                    }
                }
                if let SumsOf::Values = of {
                    // Sums of x itself, from the sums with the pivot subtracted.
                    let mut values = [0f32; LANES];
                    pivot.store(values.as_mut_ptr());
                    let n = pixels as f64;
                    let [sums, squares] = &mut totals;
                    for ((sum, square), pivot) in sums.iter_mut().zip(squares).zip(values) {
                        let pivot = f64::from(pivot);
                        *square += pivot * (2. * *sum + n * pivot);
                        *sum += n * pivot;
                    }
                }
            }
            for (to, totals) in [(&mut *first, &totals[0]), (&mut *second, &totals[1])] {
                to[channel..channel + lanes].iter_mut().zip(totals).for_each(|(to, total)| *to += total);
            }
        }
    }
}

/// Some pixels: the forward pass, or the backward pass if there is a dy.
struct Pixels<'a> {
    x: &'a [f32],
    back: Option<Back<'a>>,
    tables: Tables<'a>,
    then: Option<Activation>,
    channels: usize,
    to: Shared,
}

/// dx = gain dy - shift - tilt n
#[derive(Clone, Copy)]
struct Back<'a> {
    dy: &'a [f32],
    gain: &'a [f32],
    shift: &'a [f32],
    tilt: &'a [f32],
}

impl Kernel for Pixels<'_> {
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let Pixels { x, back, tables, then, channels, to } = self;
        for first in (0..x.len()).step_by(channels) {
            for channel in (0..channels).step_by(LANES) {
                let (at, lanes) = (first + channel, LANES.min(channels - channel));
                // SAFETY: this pixel has at least `lanes` values left from `channel` on, in every slice.
                unsafe {
                    let load = |of: &[f32], at: usize| S::load_lanes(of.as_ptr().add(at), lanes);
                    let x = load(x, at);
                    let result = match back {
                        None => {
                            let [_, u, _] = normalized(&tables, None, channel, lanes, x, S::zero());
                            match then {
                                Some(then) => then.of(u),
                                None => u,
                            }
                        }
                        Some(Back { dy, gain, shift, tilt }) => {
                            let [n, _, dy] = normalized(&tables, then, channel, lanes, x, load(dy, at));
                            let straight = dy.mul(load(gain, channel)).sub(load(shift, channel));
                            n.neg_mul_add(load(tilt, channel), straight)
                        }
                    };
                    result.store_lanes(to.at(at), lanes);
                }
            }
        }
    }
}

/// Clamps small negative variances, caused by rounding, to zero; NaN stays NaN.
fn at_least_zero(variance: f64) -> f64 {
    if variance < 0. { 0. } else { variance }
}

impl Rows {
    fn groups(&self) -> usize {
        match self.over {
            Over::Batch => self.channels,
            Over::Groups(n) => self.batch * n,
        }
    }

    /// The group of a channel of a sample.
    fn group(&self, sample: usize, channel: usize) -> usize {
        match self.over {
            Over::Batch => channel,
            Over::Groups(n) => sample * n + channel / (self.channels / n),
        }
    }

    /// Number of values in a group.
    fn count(&self) -> usize {
        match self.over {
            Over::Batch => self.batch * self.pixels,
            Over::Groups(n) => self.pixels * self.channels / n,
        }
    }

    /// Pixels per part of a sample, and parts per sample; a function of the sizes only.
    fn parts(&self) -> (usize, usize) {
        let pixels = (GRAIN / self.channels).clamp(1, self.pixels);
        (pixels, self.pixels.div_ceil(pixels))
    }

    /// Calls `f` for the parts of all samples, in any order, with the part's number, its sample, and its
    /// range of values.
    fn for_parts(&self, f: impl Fn(usize, usize, Range<usize>) + Sync + Send) {
        let (pixels, parts) = self.parts();
        let work = |part: usize| {
            let (sample, first) = (part / parts, part % parts * pixels);
            let pixel = |at: usize| (sample * self.pixels + at) * self.channels;
            f(part, sample, pixel(first)..pixel(self.pixels.min(first + pixels)));
        };
        on_pool(|| parallel::for_each(self.batch * parts, work));
    }

    /// Two sums over the pixels, for each channel of each sample: (B, C) each.
    fn sums<'a>(
        &self,
        x: &'a [f32],
        of: impl Fn(usize, Range<usize>) -> SumsOf<'a> + Sync + Send,
    ) -> [Vec<f64>; 2] {
        let (level, channels, (_, parts)) = (Level::current(), self.channels, self.parts());
        let mut sums = vec![0f64; self.batch * parts * 2 * channels];
        let to = Shared::new(&mut sums);
        self.for_parts(|part, sample, values| {
            // SAFETY: each part has its own sums.
            let own = unsafe { std::slice::from_raw_parts_mut(to.at(part * 2 * channels), 2 * channels) };
            let (first, second) = own.split_at_mut(channels);
            let of = of(sample, values.clone());
            level.run(PixelSums { x: &x[values], of, channels, sums: [first, second] });
        });
        let mut totals = [vec![0f64; self.batch * channels], vec![0f64; self.batch * channels]];
        for (part, sums) in sums.chunks_exact(2 * channels).enumerate() {
            for (totals, sums) in totals.iter_mut().zip(sums.chunks_exact(channels)) {
                let totals = &mut totals[part / parts * channels..][..channels];
                totals.iter_mut().zip(sums).for_each(|(total, sum)| *total += sum);
            }
        }
        totals
    }

    /// Adds the sums of each sample's channels up over each group, each multiplied by its channel's factor.
    fn by_group(&self, sums: &[f64], factor: impl Fn(usize) -> f64) -> Vec<f64> {
        let mut groups = vec![0.; self.groups()];
        for (i, sum) in sums.iter().enumerate() {
            let (sample, channel) = (i / self.channels, i % self.channels);
            groups[self.group(sample, channel)] += factor(channel) * sum;
        }
        groups
    }

    /// Mean and (biased) variance of each group.
    fn statistics(&self, x: &[f32]) -> (Vec<f64>, Vec<f64>) {
        let [sums, squares] = self.sums(x, |_, _| SumsOf::Values);
        let count = self.count() as f64;
        let mean = |sums: &[f64]| -> Vec<f64> {
            self.by_group(sums, |_| 1.).into_iter().map(|sum| sum / count).collect()
        };
        let (means, squares) = (mean(&sums), mean(&squares));
        // In f64, the difference keeps all the precision that the f32 values had.
        let variances =
            squares.iter().zip(&means).map(|(square, mean)| at_least_zero(square - mean * mean)).collect();
        (means, variances)
    }
}

struct Normalize {
    rows: Rows,
    then: Option<Activation>,
    /// Mean of each group.
    means: Vec<f64>,
    /// 1 / sqrt(variance + eps) of each group.
    scales: Vec<f64>,
}

impl Normalize {
    /// One number for each channel of each sample.
    fn table(&self, number: impl Fn(usize, usize) -> f64) -> Vec<f32> {
        let Rows { batch, channels, .. } = self.rows;
        let of = |i: usize| number(self.rows.group(i / channels, i % channels), i % channels) as f32;
        (0..batch * channels).map(of).collect()
    }

    fn forward(&self, x: &[f32], weight: &[f32], bias: &[f32]) -> Vec<f32> {
        let (level, channels, then) = (Level::current(), self.rows.channels, self.then);
        let means = self.table(|group, _| self.means[group]);
        let scales = self.table(|group, _| self.scales[group]);
        let fill = |y: Shared| {
            self.rows.for_parts(|_, sample, values| {
                let own = sample * channels..(sample + 1) * channels;
                let tables = Tables { means: &means[own.clone()], scales: &scales[own], weight, bias };
                // SAFETY: each part belongs to exactly one task.
                let to = unsafe { y.offset(values.start) };
                level.run(Pixels { x: &x[values], back: None, tables, then, channels, to });
            });
        };
        // SAFETY: every part is written.
        unsafe { filled(x.len(), fill) }
    }

    /// The gradients of x, weight and bias.
    fn backward(&self, x: &[f32], weight: &[f32], bias: &[f32], dy: &[f32]) -> [Vec<f32>; 3] {
        let (rows, level, channels, then) = (self.rows, Level::current(), self.rows.channels, self.then);
        let means = self.table(|group, _| self.means[group]);
        let scales = self.table(|group, _| self.scales[group]);
        let tables = |sample: usize| {
            let own = sample * channels..(sample + 1) * channels;
            Tables { means: &means[own.clone()], scales: &scales[own], weight, bias }
        };
        let [plain, projected] = rows.sums(x, |sample, values| SumsOf::Gradients {
            dy: &dy[values],
            tables: tables(sample),
            then,
        });
        // dx = scale (w dy - mean(w dy) - n mean(w dy n))
        let mean = |sums: &[f64]| -> Vec<f64> {
            let sums = rows.by_group(sums, |channel| f64::from(weight[channel]));
            sums.into_iter().map(|sum| sum / rows.count() as f64).collect()
        };
        let (along, across) = (mean(&plain), mean(&projected));
        let gain = self.table(|group, channel| self.scales[group] * f64::from(weight[channel]));
        let shift = self.table(|group, _| self.scales[group] * along[group]);
        let tilt = self.table(|group, _| self.scales[group] * across[group]);
        let fill = |dx: Shared| {
            rows.for_parts(|_, sample, values| {
                let own = sample * channels..(sample + 1) * channels;
                let back = Back {
                    dy: &dy[values.clone()],
                    gain: &gain[own.clone()],
                    shift: &shift[own.clone()],
                    tilt: &tilt[own],
                };
                // SAFETY: each part belongs to exactly one task.
                let to = unsafe { dx.offset(values.start) };
                let (x, tables) = (&x[values], tables(sample));
                level.run(Pixels { x, back: Some(back), tables, then, channels, to });
            });
        };
        // SAFETY: every part is written.
        let dx = unsafe { filled(x.len(), fill) };
        let of_channels = |sums: &[f64]| -> Vec<f32> {
            let over = Rows { over: Over::Batch, ..rows };
            over.by_group(sums, |_| 1.).into_iter().map(|sum| sum as f32).collect()
        };
        [dx, of_channels(&projected), of_channels(&plain)]
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
    ) -> Result<(CpuStorage, Shape)> {
        let y = self.forward(&packed(x, lx)?, &packed(weight, lw)?, &packed(bias, lb)?);
        Ok((CpuStorage::F32(y), lx.shape().clone()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        weight: &Tensor,
        bias: &Tensor,
        _: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let [dx, dw, db] = with_values(x, |x| {
            with_values(weight, |weight| {
                with_values(bias, |bias| with_values(dy, |dy| Ok(self.backward(x, weight, bias, dy))))
            })
        })?;
        let tensor = |values: Vec<f32>, like: &Tensor| Tensor::from_vec(values, like.shape(), &Device::Cpu);
        Ok((Some(tensor(dx, x)?), Some(tensor(dw, weight)?), Some(tensor(db, bias)?)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Var;

    const LEAKY: Option<Activation> = Some(Activation::LeakyRelu(0.2));

    fn random(shape: impl Into<Shape>) -> Tensor {
        Tensor::randn(1f32, 2., shape, &Device::Cpu).unwrap()
    }

    /// The result and the gradients.
    fn run(x: &Tensor, weight: &Tensor, bias: &Tensor, over: Over) -> Vec<Vec<f32>> {
        let vars = [x, weight, bias].map(|it| Var::from_tensor(it).unwrap());
        let y = normalize(&vars[0], over, &vars[1], &vars[2], 1e-5, LEAKY).unwrap().y;
        let gradients = (&y * &y).unwrap().sum_all().unwrap().backward().unwrap();
        let of = vars.iter().map(|var| gradients.get(var).unwrap());
        std::iter::once(&y).chain(of).map(|it| it.flatten_all().unwrap().to_vec1().unwrap()).collect()
    }

    #[test]
    fn the_same_bits_on_any_number_of_threads_and_nearly_at_every_instruction_set() {
        // Several parts per sample, and a channel count that is not a multiple of the vector size.
        let (x, weight, bias) = (random((2, 2000, 21)), random(21), random(21));
        for over in [Over::Batch, Over::Groups(3)] {
            let expected = run(&x, &weight, &bias, over);
            for threads in [1, 3] {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                assert!(
                    pool.install(|| run(&x, &weight, &bias, over)) == expected,
                    "{over:?}, {threads} threads"
                );
            }
            for level in [Level::Portable, Level::Avx2] {
                if !Level::force(Some(level)) {
                    continue;
                }
                for (ours, expected) in run(&x, &weight, &bias, over).iter().zip(&expected) {
                    let largest = expected.iter().fold(0f32, |most, x| most.max(x.abs()));
                    let close = ours.iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-5 * largest);
                    assert!(close, "{level:?}, {over:?}");
                }
            }
            Level::force(None);
        }
    }

    #[test]
    fn parameters_learn_where_x_does_not() {
        let weight = Var::from_tensor(&random(4)).unwrap();
        let it = normalize(&random((2, 3, 4)), Over::Batch, &weight, &random(4), 1e-5, None).unwrap();
        let gradients = (&it.y * &it.y).unwrap().sum_all().unwrap().backward().unwrap();
        assert!(gradients.get(&weight).is_some() && it.count == 6 && it.means.elem_count() == 4);
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let (x, four) = (random((2, 3, 4)), random(4));
        let error = |x: &Tensor, over, bias: &Tensor| {
            normalize(x, over, &four, bias, 1e-5, None).unwrap_err().to_string()
        };
        let groups = error(&x, Over::Groups(3), &four);
        assert!(groups.contains("4 channels over Groups(3) with weight [4] and bias [4]"), "{groups}");
        assert!(error(&x, Over::Groups(0), &four).contains("Groups(0)"));
        assert!(error(&x, Over::Batch, &random(3)).contains("bias [3]"));
        assert!(
            error(&x.to_dtype(DType::F64).unwrap(), Over::Batch, &four).contains("x must be f32 on the CPU")
        );
    }
}
