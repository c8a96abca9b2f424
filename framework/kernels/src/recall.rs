//! Attention of a whole state to the states of previous steps.

use crate::kept::Kept;
use crate::parallel::{self, Shared, on_pool};
use crate::simd::{Kernel, LANES, Level, Simd};
use crate::tensors::{check_type, packed, tracked, with_values};
use candle_core::{CpuStorage, CustomOp2, DType, Device, Layout, Result, Shape, Tensor, bail};
use std::ops::Range;
use std::sync::OnceLock;

/// Values of a state per task.
const PART: usize = 1 << 12;
/// Vectors added in f32 before their sum is added in f64.
const STRETCH: usize = 16;

/// The weighted sum of `values`; the weights are the softmax, over the states, of `scale` times the dot
/// product of `asked` with each key.
///
/// `asked`, keys and values all have the same shape (B, ..); each sample has its own weights. Differentiable
/// in all.
///
/// # Errors
/// If there are no keys, not as many keys as values, or a tensor has another shape or is not f32 on the CPU.
pub fn recall(asked: &Tensor, keys: &[Kept], values: &[Kept], scale: f64) -> Result<Tensor> {
    check_type("recall", "what is asked", asked, DType::F32)?;
    if keys.is_empty() || keys.len() != values.len() || asked.rank() == 0 {
        bail!("recall: {} keys and {} values for {:?}", keys.len(), values.len(), asked.dims());
    }
    if let Some(other) = keys.iter().chain(values).find(|kept| kept.values().dims() != asked.dims()) {
        bail!("recall: expected {:?}, got {:?}", asked.dims(), other.values().dims());
    }
    let number = Kept::numbers(keys.iter().chain(values))?;
    let (samples, len) = (asked.dims()[0], asked.dims()[1..].iter().product());
    let op = Recall {
        keys: keys.to_vec(),
        values: values.to_vec(),
        scale,
        samples,
        len,
        weights: OnceLock::new(),
    };
    if tracked(asked) || tracked(&number) {
        asked.apply_op2(&number, op)
    } else {
        asked.apply_op2_no_bwd(&number, &op)
    }
}

struct Recall {
    keys: Vec<Kept>,
    values: Vec<Kept>,
    scale: f64,
    samples: usize,
    /// Values per sample.
    len: usize,
    /// The weights of each state, one per sample.
    weights: OnceLock<Vec<Vec<f64>>>,
}

impl Recall {
    fn parts(&self) -> usize {
        self.len.div_ceil(PART)
    }

    /// A task's sample, and its range among all values.
    fn task(&self, task: usize) -> (usize, Range<usize>) {
        let (sample, part) = (task / self.parts(), task % self.parts());
        (sample, sample * self.len + part * PART..sample * self.len + self.len.min((part + 1) * PART))
    }

    /// The dot product of `a` and `b`, for each sample.
    fn products(&self, level: Level, a: &[f32], b: &[f32]) -> Vec<f64> {
        let mut sums = vec![0f64; self.samples * self.parts()];
        let to = Shared::new(&mut sums);
        on_pool(|| {
            parallel::for_each(self.samples * self.parts(), |task| {
                let (_, of) = self.task(task);
                // SAFETY: each task has its own place.
                let to = unsafe { &mut *to.at(task) };
                level.run(Product { a: &a[of.clone()], b: &b[of], to });
            });
        });
        sums.chunks_exact(self.parts()).map(|parts| parts.iter().sum()).collect()
    }

    /// The dot products of `a` with each of several states.
    fn products_with(&self, level: Level, a: &[f32], states: &[Kept]) -> Result<Vec<Vec<f64>>> {
        states.iter().map(|state| state.with_values(|b| Ok(self.products(level, a, b)))).collect()
    }

    /// Multiplies each sample's values by its factor, and adds the products to `to`, or overwrites it if
    /// `add` is false.
    fn add(&self, level: Level, from: &[f32], factors: &[f64], to: Shared, add: bool) {
        on_pool(|| {
            parallel::for_each(self.samples * self.parts(), |task| {
                let (sample, of) = self.task(task);
                // SAFETY: each task has its own part.
                let to = unsafe { to.offset(of.start) };
                level.run(Scaled { from: &from[of], factor: factors[sample] as f32, to, add });
            });
        });
    }

    /// The sum of states weighted by their factors.
    fn mixture(&self, level: Level, states: &[Kept], factors: &[Vec<f64>]) -> Result<Vec<f32>> {
        let mut mixture = vec![0f32; self.samples * self.len];
        for (index, (state, factors)) in states.iter().zip(factors).enumerate() {
            let to = Shared::new(&mut mixture);
            state.with_values(|from| {
                self.add(level, from, factors, to, index > 0);
                Ok(())
            })?;
        }
        Ok(mixture)
    }

    /// Adds a tensor to the gradients of states, multiplied by each state's factors.
    fn spread(&self, level: Level, from: &[f32], states: &[Kept], factors: &[Vec<f64>]) {
        for (state, factors) in states.iter().zip(factors).filter(|(state, _)| state.tracked()) {
            self.add(level, from, factors, Shared::new(&mut state.gradient()), true);
        }
    }
}

struct Product<'a> {
    a: &'a [f32],
    b: &'a [f32],
    to: &'a mut f64,
}

impl Kernel for Product<'_> {
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let Product { a, b, to } = self;
        for (a, b) in a.chunks(STRETCH * LANES).zip(b.chunks(STRETCH * LANES)) {
            // SAFETY: `a` and `b` have equally many values; absent lanes are zero.
            unsafe {
                let mut sum = S::zero();
                for at in (0..a.len()).step_by(LANES) {
                    let lanes = LANES.min(a.len() - at);
                    let load = |from: &[f32]| S::load_lanes(from.as_ptr().add(at), lanes);
                    sum = load(a).mul_add(load(b), sum);
                }
                *to += f64::from(sum.sum());
            }
        }
    }
}

struct Scaled<'a> {
    from: &'a [f32],
    factor: f32,
    to: Shared,
    add: bool,
}

impl Kernel for Scaled<'_> {
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let Scaled { from, factor, to, add } = self;
        for at in (0..from.len()).step_by(LANES) {
            let lanes = LANES.min(from.len() - at);
            // SAFETY: there is room for as many values as `from` has.
            unsafe {
                let to = to.at(at);
                let before = if add { S::load_lanes(to, lanes) } else { S::zero() };
                let sum = S::load_lanes(from.as_ptr().add(at), lanes).mul_add(S::splat(factor), before);
                sum.store_lanes(to, lanes);
            }
        }
    }
}

impl CustomOp2 for Recall {
    fn name(&self) -> &'static str {
        "recall"
    }

    fn cpu_fwd(
        &self,
        asked: &CpuStorage,
        layout: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (asked, level) = (packed(asked, layout)?, Level::current());
        let mut weights = self.products_with(level, &asked, &self.keys)?;
        for sample in 0..self.samples {
            let largest = weights.iter().map(|state| state[sample]).fold(f64::NEG_INFINITY, f64::max);
            let mut sum = 0.;
            for state in &mut weights {
                state[sample] = (self.scale * (state[sample] - largest)).exp();
                sum += state[sample];
            }
            weights.iter_mut().for_each(|state| state[sample] /= sum);
        }
        let y = self.mixture(level, &self.values, &weights)?;
        let _ = self.weights.set(weights);
        Ok((CpuStorage::F32(y), layout.shape().clone()))
    }

    fn bwd(
        &self,
        asked: &Tensor,
        number: &Tensor,
        _: &Tensor,
        d: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let Some(weights) = self.weights.get() else { bail!("recall: backward before forward") };
        let level = Level::current();
        // The gradients of the weights, then those of the products before the softmax.
        let mut scores = with_values(d, |d| {
            self.spread(level, d, &self.values, weights);
            self.products_with(level, d, &self.values)
        })?;
        for sample in 0..self.samples {
            let mean: f64 = scores.iter().zip(weights).map(|(d, weights)| d[sample] * weights[sample]).sum();
            for (d, weights) in scores.iter_mut().zip(weights) {
                d[sample] = self.scale * weights[sample] * (d[sample] - mean);
            }
        }
        with_values(asked, |asked| {
            self.spread(level, asked, &self.keys, &scores);
            Ok(())
        })?;
        let d_asked =
            || Tensor::from_vec(self.mixture(level, &self.keys, &scores)?, asked.shape(), &Device::Cpu);
        let d_asked = asked.track_op().then(d_asked).transpose()?;
        let number = number.track_op().then(|| number.zeros_like()).transpose()?;
        Ok((d_asked, number))
    }
}
