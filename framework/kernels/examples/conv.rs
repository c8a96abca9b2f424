//! Times convolutions: forward, backward (all three gradients), and both through the graph, from a sum.
//!
//!     cargo run --release -p candlepower-kernels --example conv [-- batch size inputs outputs kernel stride groups]
#![allow(clippy::print_stdout)]

use candle_core::{Device, Result, Tensor, Var};
use candlepower_kernels::{Conv2dOptions, conv2d, conv2d_backward};
use std::time::Instant;

/// Batch, height and width, inputs, outputs, kernel, stride, groups.
const SHAPES: [(usize, usize, usize, usize, usize, usize, usize); 17] = [
    (2, 64, 128, 256, 3, 1, 1),
    (2, 64, 32, 64, 3, 1, 1),
    (8, 32, 64, 64, 3, 1, 1),
    (20, 64, 64, 1, 3, 1, 1),
    (20, 64, 1, 16, 3, 1, 1),
    (8, 64, 8, 8, 3, 1, 1),
    (8, 64, 3, 32, 3, 1, 1),
    (8, 64, 64, 64, 1, 1, 1),
    (8, 32, 256, 256, 1, 1, 1),
    (2, 64, 64, 64, 5, 1, 1),
    (8, 64, 64, 64, 5, 1, 1),
    (16, 16, 128, 512, 5, 1, 1),
    (16, 16, 128, 128, 1, 1, 1),
    (8, 32, 16, 32, 5, 1, 1),
    (8, 64, 32, 64, 3, 2, 1),
    (8, 64, 64, 64, 3, 1, 64),
    (8, 64, 64, 64, 3, 1, 4),
];

fn fastest(mut f: impl FnMut() -> Result<()>) -> Result<f64> {
    let mut best = f64::INFINITY;
    let begin = Instant::now();
    for run in 0.. {
        let start = Instant::now();
        f()?;
        if run > 1 {
            best = best.min(start.elapsed().as_secs_f64());
        }
        if run > 4 && begin.elapsed().as_secs_f64() > 1. {
            break;
        }
    }
    Ok(best * 1e3)
}

fn main() -> Result<()> {
    candlepower_kernels::keep_freed_memory();
    let args: Vec<usize> = std::env::args().skip(1).filter_map(|a| a.parse().ok()).collect();
    let mut shapes = SHAPES.to_vec();
    if let &[batch, size, inputs, outputs, kernel, stride, groups] = &*args {
        shapes = vec![(batch, size, inputs, outputs, kernel, stride, groups)];
    }
    println!(
        "batch size inputs outputs kernel stride groups: forward ms, backward ms, both through the graph ms"
    );
    for (batch, size, inputs, outputs, kernel, stride, groups) in shapes {
        let random = |shape: &[usize]| -> Result<Var> {
            Var::from_tensor(&Tensor::rand(-1f32, 1., shape, &Device::Cpu)?)
        };
        let x = random(&[batch, size, size, inputs])?;
        let w = random(&[outputs, inputs / groups, kernel, kernel])?;
        let b = random(&[outputs])?;
        let options = Conv2dOptions { stride, padding: kernel / 2, groups, ..Default::default() };
        let forward = fastest(|| conv2d(&x, &w, Some(&b), options).map(|_| ()))?;
        let dy = conv2d(&x, &w, Some(&b), options)?.detach();
        let backward = fastest(|| conv2d_backward(&x, &w, &dy, options).map(drop))?;
        let both = fastest(|| conv2d(&x, &w, Some(&b), options)?.sum_all()?.backward().map(|_| ()))?;
        println!(
            "{batch} {size} {inputs} {outputs} {kernel} {stride} {groups}: {forward:.3} {backward:.3} {both:.3}"
        );
    }
    Ok(())
}
