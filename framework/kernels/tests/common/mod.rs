//! References in f64, composed of candle's basic ops, and comparisons with them.
#![allow(dead_code, unreachable_pub, missing_docs, clippy::unwrap_used)]

use candle_core::{DType, Device, Result, Tensor, Var};
use candlepower_kernels::{Conv2dOptions, Level};
use rand::{Rng, SeedableRng};

/// Values in -1 .. 1, determined by the shape and the seed.
pub fn random(shape: &[usize], seed: u64) -> Tensor {
    let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(seed);
    let values: Vec<f32> = (0..shape.iter().product()).map(|_| rng.random_range(-1f32..1.)).collect();
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
}

pub fn var(x: &Tensor) -> Var {
    Var::from_tensor(x).unwrap()
}

pub fn double(x: &Tensor) -> Var {
    Var::from_tensor(&x.detach().to_dtype(DType::F64).unwrap()).unwrap()
}

/// The largest difference relative to the wanted tensor's largest value.
pub fn error(got: &Tensor, wanted: &Tensor) -> f64 {
    assert_eq!(got.dims(), wanted.dims());
    let values =
        |x: &Tensor| x.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1::<f64>().unwrap();
    let (got, wanted) = (values(got), values(wanted));
    let largest = wanted.iter().fold(0f64, |m, x| m.max(x.abs()));
    let difference = got.iter().zip(&wanted).fold(0f64, |m, (a, b)| {
        let d = (a - b).abs();
        if d.is_nan() { f64::INFINITY } else { m.max(d) }
    });
    difference / largest.max(1e-3)
}

#[track_caller]
pub fn assert_close(what: &str, got: &Tensor, wanted: &Tensor) {
    let e = error(got, wanted);
    assert!(e <= 1e-4, "{what}: off by {e:.2e} of the largest value");
}

/// The gradient of a variable; panics if there is none.
#[track_caller]
pub fn grad(grads: &candle_core::backprop::GradStore, x: &Var) -> Tensor {
    grads.get(x).expect("no gradient").clone()
}

/// A weighted sum as the loss, so that every output has a different gradient.
pub fn loss(y: &Tensor, seed: u64) -> Tensor {
    let w = random(y.dims(), seed).to_dtype(y.dtype()).unwrap();
    (y * w).unwrap().sum_all().unwrap()
}

/// The half types.
pub const HALVES: [DType; 2] = [DType::BF16, DType::F16];

/// The same values, rounded to a half type: a variable of that type, and one of f32.
pub fn rounded(x: &Tensor, dtype: DType) -> (Var, Var) {
    let half = x.detach().to_dtype(dtype).unwrap();
    (var(&half), var(&half.to_dtype(DType::F32).unwrap()))
}

/// Like `loss`, in f32; gradients that flow back have no more bits than a half type.
pub fn rounded_loss(y: &Tensor, seed: u64, dtype: DType) -> Tensor {
    let (_, w) = rounded(&random(y.dims(), seed), dtype);
    (y.to_dtype(DType::F32).unwrap() * w.as_tensor()).unwrap().sum_all().unwrap()
}

/// Asserts that a tensor of a half type has the rounded values of another.
#[track_caller]
pub fn assert_rounded(what: &str, got: &Tensor, wanted: &Tensor) {
    let wide = |x: &Tensor| bits(&x.to_dtype(DType::F32).unwrap());
    assert!(wide(got) == wide(&wanted.to_dtype(got.dtype()).unwrap()), "{what}: not the rounded values");
}

/// The convolution as a sum over taps; channels last.
pub fn conv2d(x: &Tensor, w: &Tensor, bias: Option<&Tensor>, o: Conv2dOptions) -> Result<Tensor> {
    let (b, h, width, c) = x.dims4()?;
    let (outputs, _, kh, kw) = w.dims4()?;
    let x = x.pad_with_zeros(1, o.padding, o.padding)?.pad_with_zeros(2, o.padding, o.padding)?;
    let size = |n: usize, k: usize| (n + 2 * o.padding - o.dilation * (k - 1) - 1) / o.stride + 1;
    let (oh, ow) = (size(h, kh), size(width, kw));
    let indices = |n: usize, tap: usize| {
        let at: Vec<u32> = (0..n).map(|i| (i * o.stride + tap * o.dilation) as u32).collect();
        Tensor::from_vec(at, n, &Device::Cpu)
    };
    let mut groups = Vec::new();
    let (gi, go) = (c / o.groups, outputs / o.groups);
    for g in 0..o.groups {
        let mut sum = Tensor::zeros((b * oh * ow, go), x.dtype(), x.device())?;
        let xg = x.narrow(3, g * gi, gi)?;
        let wg = w.narrow(0, g * go, go)?;
        for ky in 0..kh {
            for kx in 0..kw {
                let rows = xg.contiguous()?.index_select(&indices(oh, ky)?, 1)?;
                let tap = rows.contiguous()?.index_select(&indices(ow, kx)?, 2)?;
                let tap = tap.contiguous()?.reshape((b * oh * ow, gi))?;
                let weight = wg.narrow(2, ky, 1)?.narrow(3, kx, 1)?.reshape((go, gi))?.t()?;
                sum = (sum + tap.matmul(&weight.contiguous()?)?)?;
            }
        }
        groups.push(sum.reshape((b, oh, ow, go))?);
    }
    let y = Tensor::cat(&groups, 3)?;
    match bias {
        Some(bias) => y.broadcast_add(bias),
        None => Ok(y),
    }
}

fn sigmoid(x: &Tensor) -> Result<Tensor> {
    ((x.neg()?.exp()? + 1.)?).recip()
}

pub fn cell(gates: &Tensor, c: &Tensor) -> Result<(Tensor, Tensor)> {
    let last = gates.rank() - 1;
    let g = gates.chunk(4, last)?;
    let c = ((sigmoid(&g[1])? * c)? + (sigmoid(&g[0])? * g[3].tanh()?)?)?;
    Ok(((sigmoid(&g[2])? * c.tanh()?)?, c))
}

/// Rolls layers (weight, bias) out over `steps` steps, from frames (B, T, H, W, C) or from a first input (B,
/// H, W, C). Returns all hidden states of the top layer, (B, T, H, W, N).
pub fn conv_lstm(x: &Tensor, steps: usize, layers: &[(Tensor, Tensor)]) -> Result<Tensor> {
    let frames = x.rank() == 5;
    let mut states: Vec<(Tensor, Tensor)> = Vec::new();
    let mut outputs: Vec<Tensor> = Vec::new();
    for t in 0..steps {
        let mut input = match outputs.last() {
            _ if frames => x.narrow(1, t, 1)?.squeeze(1)?,
            Some(last) => last.clone(),
            None => x.clone(),
        };
        for (l, (w, b)) in layers.iter().enumerate() {
            let (batch, h, width, _) = input.dims4()?;
            if t == 0 {
                let zero = Tensor::zeros((batch, h, width, w.dim(0)? / 4), x.dtype(), x.device())?;
                states.push((zero.clone(), zero));
            }
            let o = Conv2dOptions { padding: w.dim(2)? / 2, ..Default::default() };
            let gates = conv2d(&Tensor::cat(&[&input, &states[l].0], 3)?, w, Some(b), o)?;
            states[l] = cell(&gates, &states[l].1)?;
            input = states[l].0.clone();
        }
        outputs.push(input);
    }
    Tensor::stack(&outputs, 1)
}

/// Runs `f` with each instruction set supported by this processor.
pub fn at_each_level(f: impl Fn(Level)) {
    for level in [Level::Portable, Level::Avx2, Level::Avx512] {
        if Level::force(Some(level)) {
            f(level);
        }
    }
    Level::force(None);
}

/// The values' bits.
pub fn bits(x: &Tensor) -> Vec<u32> {
    let values = x.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    values.into_iter().map(f32::to_bits).collect()
}

/// Runs `f` on pools of 1, 2 and 3 threads and asserts that the results are bit-identical.
pub fn same_bits_on_any_threads(f: impl Fn() -> Vec<Tensor> + Sync) {
    let run = |threads: usize| -> Vec<Vec<u32>> {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| f().iter().map(bits).collect())
    };
    let one = run(1);
    for threads in [2, 3, 2] {
        assert_eq!(one, run(threads), "{threads} threads");
    }
}
