//! Times one training step of the tutorial's model, two ConvLSTM layers in and two out, and its parts.
//!
//!     cargo run --release -p candlepower-kernels --example tutorial -- [batch] [channels] [train|infer|parts] [runs]
#![allow(clippy::print_stdout)]

use candle_core::{Device, Result, Tensor, Var};
use candlepower_kernels::{Conv2dOptions, ConvLstmInput, ConvLstmLayer, Keep, conv_lstm, conv2d, no_grad};
use std::time::Instant;

const STEPS: usize = 10;
const SIZE: usize = 64;

struct Model {
    layers: Vec<(Var, Var)>,
    out: (Var, Var),
}

fn uniform(shape: &[usize], fan_in: usize) -> Result<Var> {
    let bound = 1. / (fan_in as f64).sqrt();
    Var::from_tensor(&Tensor::rand(-bound as f32, bound as f32, shape, &Device::Cpu)?)
}

impl Model {
    fn new(n: usize) -> Result<Model> {
        let mut layers = Vec::new();
        for inputs in [1, n, n, n] {
            let fan_in = 9 * (inputs + n);
            layers.push((uniform(&[4 * n, inputs + n, 3, 3], fan_in)?, uniform(&[4 * n], fan_in)?));
        }
        Ok(Model { layers, out: (uniform(&[1, n, 3, 3], 9 * n)?, uniform(&[1], 9 * n)?) })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let layers: Vec<ConvLstmLayer> =
            self.layers.iter().map(|(weight, bias)| ConvLstmLayer { weight, bias }).collect();
        let v = conv_lstm(ConvLstmInput::Frames(x), &layers[..2], Keep::Last)?;
        let h = conv_lstm(ConvLstmInput::Feedback { first: &v, steps: STEPS }, &layers[2..], Keep::All)?;
        let y =
            conv2d(&h, &self.out.0, Some(&self.out.1), Conv2dOptions { padding: 1, ..Default::default() })?;
        (y.neg()?.exp()? + 1.)?.recip()
    }
}

fn main() -> Result<()> {
    candlepower_kernels::keep_freed_memory();
    let args: Vec<String> = std::env::args().skip(1).collect();
    let number = |i: usize, default: usize| args.get(i).and_then(|a| a.parse().ok()).unwrap_or(default);
    let (batch, n, runs) = (number(0, 2), number(1, 64), number(3, 7));
    let mode = args.get(2).map_or("train", String::as_str);
    let model = Model::new(n)?;
    let x = Tensor::rand(0f32, 1., (batch, STEPS, SIZE, SIZE, 1), &Device::Cpu)?;
    let target = Tensor::rand(0f32, 1., (batch, STEPS, SIZE, SIZE, 1), &Device::Cpu)?;
    let mut times = Vec::new();
    for _ in 0..=runs {
        let start = Instant::now();
        if mode == "infer" {
            no_grad(|| model.forward(&x.detach()))?;
        } else {
            let y = model.forward(&x)?;
            let forward = start.elapsed().as_secs_f64();
            let loss = (y - &target)?.sqr()?.mean_all()?;
            loss.backward()?;
            if mode == "parts" {
                println!("forward {:.3}, backward {:.3}", forward, start.elapsed().as_secs_f64() - forward);
            }
        }
        times.push(start.elapsed().as_secs_f64());
    }
    times.remove(0);
    times.sort_by(f64::total_cmp);
    let threads = rayon::current_num_threads();
    println!(
        "{mode}, batch {batch}, {n} channels, {threads} threads: min {:.3} s, median {:.3} s, peak {} MB",
        times[0],
        times[times.len() / 2],
        peak_memory()
    );
    Ok(())
}

/// Peak memory of this process, in MB.
fn peak_memory() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find(|l| l.starts_with("VmHWM")).unwrap_or_default();
    line.split_whitespace().nth(1).and_then(|kb| kb.parse::<usize>().ok()).unwrap_or(0) / 1024
}
