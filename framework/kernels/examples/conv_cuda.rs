//! Times convolutions on the first CUDA device, in bf16 or f32: forward, and the gradients of input and
//! weight. bench/conv_gpu.py compares them with PyTorch's.
//!
//!     cargo build --release -p candlepower-kernels --features cuda --example conv_cuda
//!     target/release/examples/conv_cuda batch size inputs outputs kernel groups [bf16 | f32] [timed]
#![allow(clippy::print_stdout)]

use candle_core::{DType, Device, Result, Tensor, Var, bail};
use candlepower_kernels::{Conv2dOptions, conv2d, open_cuda, time_convolutions};
use std::time::Instant;

/// Median in milliseconds; several calls are enqueued before each wait, so that the device is what is timed.
fn median(device: &Device, mut f: impl FnMut() -> Result<()>) -> Result<f64> {
    const WARM_UP: usize = 5;
    const TIMED: usize = 30;
    const AT_ONCE: usize = 10;
    let mut times = Vec::new();
    for _ in 0..WARM_UP + TIMED {
        let start = Instant::now();
        (0..AT_ONCE).try_for_each(|_| f())?;
        device.synchronize()?;
        times.push(start.elapsed().as_secs_f64() * 1e3 / AT_ONCE as f64);
    }
    let timed = &mut times[WARM_UP..];
    timed.sort_by(f64::total_cmp);
    Ok(timed[TIMED / 2])
}

fn main() -> Result<()> {
    let args: Vec<usize> = std::env::args().skip(1).filter_map(|a| a.parse().ok()).collect();
    let &[batch, size, inputs, outputs, kernel, groups] = &args[..] else {
        bail!("expected batch, size, inputs, outputs, kernel and groups");
    };
    let asked = |word: &str| std::env::args().any(|arg| arg == word);
    time_convolutions(asked("timed"));
    let device = open_cuda(0)?;
    let dtype = if asked("f32") { DType::F32 } else { DType::BF16 };
    let random = |shape: &[usize]| Tensor::rand(-1f32, 1., shape, &device).and_then(|x| x.to_dtype(dtype));
    let x = random(&[batch, size, size, inputs])?;
    let w = random(&[outputs, inputs / groups, kernel, kernel])?;
    let dy = random(&[batch, size, size, outputs])?;
    let options = Conv2dOptions { padding: kernel / 2, groups, ..Default::default() };
    let forward = |x: &Tensor, w: &Tensor| conv2d(x, w, None, options);
    // candle's backward pass starts with ones, so the gradient of y is dy; the time for that is measured
    // separately and subtracted.
    let [x_var, w_var, y_var] = [&x, &w, &forward(&x, &w)?].map(Var::from_tensor);
    let (x_var, w_var, y_var) = (x_var?, w_var?, y_var?);
    let backward = |y: Tensor| (y * &dy)?.backward().map(drop);
    let rest = median(&device, || backward(y_var.as_tensor().clone()))?;
    let alone = median(&device, || forward(&x, &w).map(drop))?;
    let with_x = median(&device, || backward(forward(&x_var, &w)?))?;
    let with_w = median(&device, || backward(forward(&x, &w_var)?))?;
    println!("{alone:.4} {:.4} {:.4}", with_x - rest - alone, with_w - rest - alone);
    Ok(())
}
