//! Layers and losses give the same results on a device, or with candle's operations, as with the CPU kernels.
#![allow(clippy::unwrap_used)]

use candlepower::candle_core::Var;
use candlepower::candle_nn::Init;
use candlepower::nn::channels_last::{BatchNorm, GroupNorm};
use candlepower::params::Params;
use candlepower::prelude::*;
use candlepower::rand::{Rng, SeedableRng};
use candlepower::seed::ChaCha8Rng;
use candlepower::trainer::Kernels;
use candlepower_tests::{assert_close, device};

const CHANNELS: usize = 6;

/// Values whose channels have different means and deviations, none of them those that running statistics
/// start with.
fn random(shape: &[usize], seed: u64, device: &Device) -> Tensor {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let count: usize = shape.iter().product();
    let value = |i| (i % CHANNELS) as f32 + (1. + (i % CHANNELS) as f32) * rng.random_range(-1f32..1.);
    let values: Vec<f32> = (0..count).map(value).collect();
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap().to_device(device).unwrap()
}

/// A layer's forward pass in training.
type Forward = dyn Fn(&Tensor) -> Result<Tensor>;
/// Builds a layer over the channels.
type Layer = fn(VarBuilder) -> Result<Box<Forward>>;

/// The results of three training batches: outputs, gradients, and the buffers afterwards.
fn trained(device: &Device, shape: &[usize], build: Layer) -> Vec<(String, Tensor)> {
    let params = Params::new(3, DType::F32, device);
    let forward = build(params.var_builder()).unwrap();
    for (i, (_, var)) in params.vars().iter().enumerate() {
        var.set(&random(&[CHANNELS], 90 + i as u64, device)).unwrap();
    }
    let mut all = Vec::new();
    for batch in 0..3 {
        let x = Var::from_tensor(&random(shape, batch, device)).unwrap();
        let y = forward(&x).unwrap();
        let wanted = random(shape, 50 + batch, device);
        let grads = (&y * wanted).unwrap().sum_all().unwrap().backward().unwrap();
        all.push((format!("output {batch}"), y.detach()));
        all.push((format!("gradient {batch}"), grads.get(&x).unwrap().clone()));
        for (name, var) in params.vars() {
            all.push((format!("gradient {batch} of {name}"), grads.get(&var).unwrap().clone()));
        }
    }
    params.commit_buffers().unwrap();
    all.extend(params.buffers().into_iter().map(|(name, var)| (name, var.as_tensor().clone())));
    all
}

fn batch_norm(vb: VarBuilder) -> Result<Box<Forward>> {
    let norm = BatchNorm::new(CHANNELS, Init::Const(1.), vb)?;
    // The second batch counts as if it had come twice.
    let seen = std::cell::Cell::new(0);
    Ok(Box::new(move |x| norm.by_batch(x, if seen.replace(seen.get() + 1) == 1 { 2 } else { 1 })))
}

fn group_norm(vb: VarBuilder) -> Result<Box<Forward>> {
    // For a plain (B, C) too, use more than two values per group: two would always become 1 and -1.
    let norm = GroupNorm::new(2, CHANNELS, vb)?;
    Ok(Box::new(move |x| norm.forward(x)))
}

#[test]
fn normalisation_is_the_cpus() {
    let cases: [(Layer, usize); 2] = [(batch_norm, 3), (group_norm, 0)];
    for (build, buffers) in cases {
        // Also for a plain (B, C).
        for shape in [&[3, 2, 7, 5, CHANNELS][..], &[11, CHANNELS]] {
            let expected = trained(&Device::Cpu, shape, build);
            for kernels in [Kernels::Reference, Kernels::Fast] {
                let actual = candlepower::nn::with_kernels(kernels, || trained(&device(), shape, build));
                assert_eq!((actual.len(), expected.len()), (3 * 4 + buffers, 3 * 4 + buffers));
                for ((name, actual), (_, expected)) in actual.iter().zip(&expected) {
                    let actual = actual.to_device(&Device::Cpu).unwrap();
                    assert_close(&format!("{shape:?}, {kernels:?}, {name}"), &actual, expected, 1e-5);
                }
            }
        }
    }
}

#[test]
fn losses_are_the_cpus() {
    // Less than one block of threads, and more, with long and short last axes.
    for (samples, [height, width]) in [(3, [4, 6]), (2, [64, 32]), (2, [3, 3000])] {
        let shape = [samples, 3, 2, height, width];
        let [input, target, predicted] = [1, 2, 3].map(|seed| random(&shape, seed, &Device::Cpu));
        let mask = random(&[samples, 6, 1, height, width], 4, &Device::Cpu).gt(2f64).unwrap();
        for mask in [None, Some(mask.to_dtype(DType::F32).unwrap())] {
            let losses = |device: &Device| {
                let batch = Video { mask: mask.clone(), ..Video::new(input.clone(), target.clone()) };
                let (batch, loss) = (batch.to_device(device).unwrap(), [Video::mse, Video::mae]);
                loss.map(|loss| {
                    let predicted = Var::from_tensor(&predicted.to_device(device).unwrap()).unwrap();
                    let loss = loss(&batch, &predicted).unwrap();
                    (loss.detach(), loss.backward().unwrap().get(&predicted).unwrap().clone())
                })
            };
            for (actual, expected) in losses(&device()).iter().zip(&losses(&Device::Cpu)) {
                let what = format!("{shape:?}, {} mask", if mask.is_some() { "a" } else { "no" });
                assert_close(&what, &actual.0, &expected.0, 1e-6);
                assert_close(&format!("gradient of {what}"), &actual.1, &expected.1, 1e-6);
            }
        }
    }
}
