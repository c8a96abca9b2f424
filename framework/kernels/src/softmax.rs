//! Softmax over the last axis as one op: candle's own has no gradient, and a composition of other ops passes
//! over memory once for each.

use crate::activations::exp_below;
use crate::buffer::filled;
use crate::parallel::{Shared, for_rows, on_pool};
use crate::simd::{Kernel, LANES, Level, Simd};
use crate::tensors::{check_type, packed, tracked, with_values};
use candle_core::{CpuStorage, CustomOp1, DType, Device, Layout, Result, Shape, Tensor, bail};
use std::ops::Range;

/// Vectors added in f32 before their sum is added in f64.
const STRETCH: usize = 16;

/// e^x / (the sum of e^x over the last axis), with the shape of x, (.., N). Differentiable.
///
/// # Errors
/// If x has no axis or no elements, or is not f32 on the CPU.
pub fn softmax(x: &Tensor) -> Result<Tensor> {
    check_type("softmax", "x", x, DType::F32)?;
    let Some(&width) = x.dims().last() else { bail!("softmax: x has no axis") };
    let op = Softmax { width };
    if tracked(x) { x.apply_op1(op) } else { x.apply_op1_no_bwd(&op) }
}

/// The gradient of the softmax's input, from its result `y` and the gradient `d` of that.
pub(crate) fn softmax_gradient(y: &Tensor, d: &Tensor) -> Result<Tensor> {
    let op = Softmax { width: y.dims().last().copied().unwrap_or(1) };
    let level = Level::current();
    let dx = with_values(y, |y| {
        with_values(d, |d| {
            let fill = |dx: Shared| {
                op.for_rows(y.len(), |row| {
                    // SAFETY: each row belongs to exactly one task.
                    let to = unsafe { dx.offset(row.start) };
                    level.run(RowBack { y: &y[row.clone()], d: &d[row], to });
                });
            };
            // SAFETY: every row is written.
            Ok(unsafe { filled(y.len(), fill) })
        })
    })?;
    Tensor::from_vec(dx, y.shape(), &Device::Cpu)
}

struct Softmax {
    width: usize,
}

impl Softmax {
    /// Calls `f` with the range of each row among `len` values.
    fn for_rows(&self, len: usize, f: impl Fn(Range<usize>) + Sync + Send) {
        let width = self.width;
        on_pool(|| {
            for_rows(len / width, width, |rows| rows.for_each(|row| f(row * width..(row + 1) * width)));
        });
    }
}

/// The forward pass of one row.
struct Row<'a> {
    x: &'a [f32],
    to: Shared,
}

impl Kernel for Row<'_> {
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let Row { x, to } = self;
        let whole = x.len() / LANES * LANES;
        // SAFETY: reads and writes whole vectors, or only the lanes that are left; there is room for as many
        // values as x has.
        unsafe {
            let mut largest = [f32::NEG_INFINITY; LANES];
            let mut vector = S::splat(f32::NEG_INFINITY);
            for at in (0..whole).step_by(LANES) {
                vector = vector.max(S::load(x.as_ptr().add(at)));
            }
            vector.store(largest.as_mut_ptr());
            let largest = largest.iter().chain(&x[whole..]).fold(f32::NEG_INFINITY, |a, &b| a.max(b));
            let largest = S::splat(largest);
            let mut sum = 0f64;
            for start in (0..whole).step_by(STRETCH * LANES) {
                let mut stretch = S::zero();
                for at in (start..whole.min(start + STRETCH * LANES)).step_by(LANES) {
                    let power = exp_below(S::load(x.as_ptr().add(at)).sub(largest));
                    power.store(to.at(at));
                    stretch = stretch.add(power);
                }
                sum += f64::from(stretch.sum());
            }
            let rest = x.len() - whole;
            if rest > 0 {
                let power = exp_below(S::load_first(x.as_ptr().add(whole), rest).sub(largest));
                power.store_first(to.at(whole), rest);
                // Reloaded, so that the lanes beyond the row are zero.
                sum += f64::from(S::load_first(to.at(whole), rest).sum());
            }
            let scale = S::splat((1. / sum) as f32);
            for at in (0..x.len()).step_by(LANES) {
                let lanes = LANES.min(x.len() - at);
                S::load_lanes(to.at(at), lanes).mul(scale).store_lanes(to.at(at), lanes);
            }
        }
    }
}

/// The backward pass of one row: y (d - the sum of y d).
struct RowBack<'a> {
    y: &'a [f32],
    d: &'a [f32],
    to: Shared,
}

impl Kernel for RowBack<'_> {
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let RowBack { y, d, to } = self;
        // SAFETY: both have the same number of values, and there is room for as many; absent lanes are zero.
        unsafe {
            let load =
                |from: &[f32], at: usize| S::load_lanes(from.as_ptr().add(at), LANES.min(from.len() - at));
            let mut sum = 0f64;
            for start in (0..y.len()).step_by(STRETCH * LANES) {
                let mut stretch = S::zero();
                for at in (start..y.len().min(start + STRETCH * LANES)).step_by(LANES) {
                    stretch = load(y, at).mul_add(load(d, at), stretch);
                }
                sum += f64::from(stretch.sum());
            }
            let sum = S::splat(sum as f32);
            for at in (0..y.len()).step_by(LANES) {
                let lanes = LANES.min(y.len() - at);
                load(y, at).mul(load(d, at).sub(sum)).store_lanes(to.at(at), lanes);
            }
        }
    }
}

impl CustomOp1 for Softmax {
    fn name(&self) -> &'static str {
        "softmax"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (x, level) = (&*packed::<f32>(x, layout)?, Level::current());
        let fill = |y: Shared| {
            self.for_rows(x.len(), |row| {
                // SAFETY: each row belongs to exactly one task.
                let to = unsafe { y.offset(row.start) };
                level.run(Row { x: &x[row], to });
            });
        };
        // SAFETY: every row is written before it is read.
        let y = unsafe { filled(x.len(), fill) };
        Ok((CpuStorage::F32(y), layout.shape().clone()))
    }

    fn bwd(&self, _: &Tensor, y: &Tensor, d: &Tensor) -> Result<Option<Tensor>> {
        Ok(Some(softmax_gradient(y, d)?))
    }
}
