//! The training step of bench/tutorial.toml, in burn with its `ndarray` backend. Prints its time and memory
//! as one JSON line. Arguments: batch, hidden channels, timed steps. The number of threads is rayon's.
//!
//! The model is that of bench/pytorch_conv_lstm.py. Frames are random numbers, generated before the first step.

use std::time::Instant;

use burn::backend::{Autodiff, NdArray};
use burn::nn::PaddingConfig2d;
use burn::nn::conv::{Conv2d, Conv2dConfig};
use burn::optim::{AdamConfig, GradientsParams, Optimizer};
use burn::prelude::*;
use burn::tensor::Distribution;
use burn::tensor::activation::{sigmoid, tanh};

type Cpu = Autodiff<NdArray>;

const FRAMES: usize = 10;
const SIZE: usize = 64;
/// Same as in `candlepower bench`.
const WARM_UP: usize = 2;

#[derive(Module, Debug)]
struct Cell<B: Backend> {
    conv: Conv2d<B>,
}

type State<B> = (Tensor<B, 4>, Tensor<B, 4>);

impl<B: Backend> Cell<B> {
    fn new(inputs: usize, hidden: usize, device: &B::Device) -> Self {
        let conv = Conv2dConfig::new([inputs + hidden, 4 * hidden], [3, 3]);
        Self { conv: conv.with_padding(PaddingConfig2d::Explicit(1, 1)).init(device) }
    }

    /// c' = s(f) c + s(i) tanh(g), h' = s(o) tanh(c').
    fn forward(&self, x: Tensor<B, 4>, (h, c): State<B>) -> State<B> {
        let mut gates = self.conv.forward(Tensor::cat(vec![x, h], 1)).chunk(4, 1).into_iter();
        let mut gate = || gates.next().expect("four gates");
        let (i, f, o, g) = (sigmoid(gate()), sigmoid(gate()), sigmoid(gate()), tanh(gate()));
        let c = f * c + i * g;
        (o * tanh(c.clone()), c)
    }
}

#[derive(Module, Debug)]
struct EncoderDecoder<B: Backend> {
    encoder: [Cell<B>; 2],
    decoder: [Cell<B>; 2],
    to_frame: Conv2d<B>,
}

impl<B: Backend> EncoderDecoder<B> {
    fn new(hidden: usize, device: &B::Device) -> Self {
        let cell = |inputs| Cell::new(inputs, hidden, device);
        let to_frame = Conv2dConfig::new([hidden, 1], [3, 3]).with_padding(PaddingConfig2d::Explicit(1, 1));
        Self {
            encoder: [cell(1), cell(hidden)],
            decoder: [cell(hidden), cell(hidden)],
            to_frame: to_frame.init(device),
        }
    }

    /// The mean squared error of predicting `target` from `frames`, both (B, T, H, W).
    fn loss(&self, frames: Tensor<B, 4>, target: Tensor<B, 4>, hidden: usize) -> Tensor<B, 1> {
        let [batch, ..] = frames.dims();
        let start = || {
            let zeros = Tensor::zeros([batch, hidden, SIZE, SIZE], &frames.device());
            [(zeros.clone(), zeros.clone()), (zeros.clone(), zeros)]
        };
        let step = |cells: &[Cell<B>; 2], mut x: Tensor<B, 4>, states: [State<B>; 2]| {
            let mut k = 0;
            let states = states.map(|state| {
                let state = cells[k].forward(x.clone(), state);
                x = state.0.clone();
                k += 1;
                state
            });
            (x, states)
        };
        let mut states = start();
        let mut v = Tensor::zeros([batch, hidden, SIZE, SIZE], &frames.device());
        for t in 0..FRAMES {
            (v, states) = step(&self.encoder, frames.clone().narrow(1, t, 1), states);
        }
        let mut states = start();
        let mut outputs = Vec::new();
        for _ in 0..FRAMES {
            (v, states) = step(&self.decoder, v, states);
            outputs.push(sigmoid(self.to_frame.forward(v.clone())));
        }
        (Tensor::cat(outputs, 1) - target).powi_scalar(2).mean()
    }
}

fn main() {
    let numbers: Vec<usize> = std::env::args().skip(1).filter_map(|argument| argument.parse().ok()).collect();
    let [batch, hidden, steps] = numbers[..] else {
        panic!("expected three numbers: batch, hidden channels, steps")
    };
    let device = Default::default();
    let mut model = EncoderDecoder::<Cpu>::new(hidden, &device);
    let mut optimizer = AdamConfig::new().with_beta_2(0.98).init();
    let random = || Tensor::random([batch, FRAMES, SIZE, SIZE], Distribution::Uniform(0., 1.), &device);
    let (frames, target) = (random(), random());
    let mut times = Vec::new();
    for _ in 0..WARM_UP + steps {
        let start = Instant::now();
        let gradients = model.loss(frames.clone(), target.clone(), hidden).backward();
        let gradients = GradientsParams::from_grads(gradients, &model);
        model = optimizer.step(1e-4, model, gradients);
        times.push(1e3 * start.elapsed().as_secs_f64());
    }
    let mut times = times.split_off(WARM_UP);
    times.sort_by(f64::total_cmp);
    println!(r#"{{"ms_per_step": {}, "peak_rss_mb": {}}}"#, times[times.len() / 2], peak_rss_mb());
}

/// The process's peak resident memory in 10^6 bytes. Linux reports it in KiB.
fn peak_rss_mb() -> f64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let kib = status
        .lines()
        .find_map(|line| line.strip_prefix("VmHWM:")?.trim().strip_suffix("kB")?.trim().parse().ok());
    kib.map_or(f64::NAN, |kib: f64| kib * 1024. / 1e6)
}
