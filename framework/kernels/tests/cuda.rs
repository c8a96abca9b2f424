//! Tests that need a CUDA device: the same operations on it and on the CPU. Without a device, each test
//! prints a message and passes.
#![cfg(feature = "cuda")]
#![allow(clippy::unwrap_used)]

use std::panic::{AssertUnwindSafe, catch_unwind};

use candle_core::{DType, Device, Result, Tensor, Var};
use candlepower_kernels::clipping::{Clipped, Clipping, GradScale};
use candlepower_kernels::updates::{
    AdamStep, Placed, SgdStep, UpdateParam, approach, publish, sum_squares_of,
};
use candlepower_kernels::{
    Activation, Communicator, Conv2dOptions, ConvLstmInput, ConvLstmLayer, ConvTranspose2dOptions, Download,
    Exchange, Keep, MemoryUpdate, OutputGate, Over, SharedConv, SharedNorm, activate, allow_tf32, blend,
    conv_lstm, conv_transpose2d, conv2d, cuda_devices, memory_update, normalize, open_cuda, open_output,
    peak_memory, record, rehearse, reset_peak_memory, scale_channels, sum_gates, time_convolutions,
    to_device,
};
use rand::{Rng, SeedableRng};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

const CPU: Device = Device::Cpu;
const ADAM: AdamStep = AdamStep {
    one_minus_beta1: 0.1,
    beta2: 0.99,
    one_minus_beta2: 0.01,
    eps: 1e-8,
    of_moment: 0.02,
    of_gradient: 0.01,
    root_correction: 0.3,
    l2: 0.05,
    keep: 0.97,
};
const SGD: SgdStep = SgdStep { lr: 0.1, momentum: 0.9, entering: 0.7, l2: 0.05, nesterov: true };

/// The first device, for one test at a time, because TF32 is a setting of the process.
fn device() -> Option<(Device, MutexGuard<'static, ()>)> {
    static DEVICE: OnceLock<Option<Device>> = OnceLock::new();
    static TURN: Mutex<()> = Mutex::new(());
    let open = || match cuda_devices() {
        Ok(_) => Some(open_cuda(0).unwrap()),
        Err(why) => {
            eprintln!("SKIPPED: {why}");
            None
        }
    };
    let device = DEVICE.get_or_init(open).clone()?;
    Some((device, TURN.lock().unwrap_or_else(PoisonError::into_inner)))
}

fn random(shape: impl Into<candle_core::Shape>, seed: u64) -> Tensor {
    let (shape, mut rng) = (shape.into(), rand_chacha::ChaCha8Rng::seed_from_u64(seed));
    let values: Vec<f32> = (0..shape.elem_count()).map(|_| rng.random_range(-1f32..1.)).collect();
    Tensor::from_vec(values, shape, &CPU).unwrap()
}

fn values(x: &Tensor) -> Vec<f64> {
    let x = x.to_device(&CPU).unwrap().to_dtype(DType::F64).unwrap();
    x.flatten_all().unwrap().to_vec1().unwrap()
}

/// The norm of the difference divided by the norm; infinite if a value is NaN.
fn error(ours: &Tensor, expected: &Tensor) -> f64 {
    assert_eq!(ours.dims(), expected.dims());
    let (ours, expected) = (values(ours), values(expected));
    let norm = |x: &mut dyn Iterator<Item = f64>| x.map(|x| x * x).sum::<f64>().sqrt();
    let difference = norm(&mut ours.iter().zip(&expected).map(|(a, b)| a - b));
    let error = difference / norm(&mut expected.iter().copied());
    if error.is_finite() { error } else { f64::INFINITY }
}

/// Dtypes, whether TF32 is allowed, and the allowed error. In f32 most of it is the CPU's: its Winograd
/// transforms are off by up to 4.4e-6 in these roll-outs, compared with direct sums. TF32 is off by a hundred
/// times that.
const KINDS: [(DType, bool, f64); 4] = [
    (DType::F32, false, 1.5e-5),
    (DType::F32, true, 2e-3),
    (DType::BF16, false, 1.5e-2),
    (DType::F16, false, 2e-3),
];

/// Compares an operation's result and gradients on the device, in each dtype, with the CPU's in f32, from the
/// same rounded numbers. Runs twice on the device to check for identical bits.
fn compare(case: &str, inputs: &[Tensor], op: impl Fn(&[Tensor]) -> Result<Tensor>) {
    let Some((device, _turn)) = device() else { return };
    let run = |inputs: &[Tensor], d: &dyn Fn(&Tensor) -> Tensor| {
        let vars: Vec<Var> = inputs.iter().map(|x| Var::from_tensor(x).unwrap()).collect();
        let tensors: Vec<Tensor> = vars.iter().map(|var| var.as_tensor().clone()).collect();
        let y = op(&tensors).unwrap();
        let gradients = (&y * d(&y)).unwrap().sum_all().unwrap().backward().unwrap();
        let mut all = vec![y];
        all.extend(vars.iter().map(|var| gradients.get(var).unwrap().clone()));
        all
    };
    for (dtype, tf32, tolerance) in KINDS {
        allow_tf32(tf32);
        let rounded: Vec<Tensor> =
            inputs.iter().map(|x| x.to_dtype(dtype).unwrap().to_dtype(DType::F32).unwrap()).collect();
        let direction = |y: &Tensor| random(y.shape(), 99).to_dtype(dtype).unwrap();
        let expected = run(&rounded, &|y| direction(y).to_dtype(DType::F32).unwrap());
        let there: Vec<Tensor> =
            rounded.iter().map(|x| x.to_dtype(dtype).unwrap().to_device(&device).unwrap()).collect();
        let on_device = |y: &Tensor| direction(y).to_device(&device).unwrap();
        let (ours, again) = (run(&there, &on_device), run(&there, &on_device));
        for (i, ((ours, again), expected)) in ours.iter().zip(&again).zip(&expected).enumerate() {
            let error = error(ours, expected);
            println!("{case}, {dtype:?}, TF32 {tf32}, {i}: {error:.1e}");
            assert!(error <= tolerance, "{case}, {dtype:?}, TF32 {tf32}: {error:e} in tensor {i}");
            assert_eq!(values(ours), values(again), "{case}, {dtype:?}: other bits in a second run");
        }
    }
    allow_tf32(false);
}

#[test]
fn convolutions_by_winograd() {
    // Enough channels on both sides for Winograd to be worth it; sizes that are multiples of 4 and others;
    // every padding.
    for [b, h, w, i, o, padding] in
        [[2, 16, 20, 48, 48, 1], [3, 15, 13, 50, 49, 1], [1, 26, 25, 48, 64, 0], [2, 14, 17, 64, 48, 2]]
    {
        let inputs = [random((b, h, w, i), 1), (random((o, i, 3, 3), 2) * 0.2).unwrap()];
        let options = Conv2dOptions { padding, ..Default::default() };
        compare(&format!("conv2d {options:?} {b}x{h}x{w}x{i} to {o}"), &inputs, |x| {
            conv2d(&x[0], &x[1], None, options)
        });
        let inputs = [random((b, h, w, i), 1), (random((i, o, 3, 3), 2) * 0.2).unwrap()];
        let options = ConvTranspose2dOptions { padding, ..Default::default() };
        compare(&format!("conv_transpose2d {options:?} {b}x{h}x{w}x{i} to {o}"), &inputs, |x| {
            conv_transpose2d(&x[0], &x[1], None, options)
        });
    }
}

#[test]
fn a_convolution_by_winograd_of_more_images_than_are_transformed_at_once() {
    let Some((device, _turn)) = device() else { return };
    let run = |device: &Device| {
        let vars: Vec<Var> = [random((2, 200, 197, 48), 1), (random((48, 48, 3, 3), 2) * 0.2).unwrap()]
            .iter()
            .map(|x| Var::from_tensor(&x.to_device(device).unwrap()).unwrap())
            .collect();
        let y = conv2d(&vars[0], &vars[1], None, Conv2dOptions { padding: 1, ..Default::default() }).unwrap();
        let d = random(y.shape(), 3).to_device(device).unwrap();
        let gradients = (&y * d).unwrap().sum_all().unwrap().backward().unwrap();
        let of = |var: &Var| gradients.get(var).unwrap().clone();
        [y, of(&vars[0]), of(&vars[1])]
    };
    for (ours, expected) in run(&device).iter().zip(&run(&CPU)) {
        let error = error(ours, expected);
        assert!(error <= KINDS[0].2, "{error:e}");
    }
}

#[test]
fn convolutions() {
    // Batch, height, width, input channels, output channels, kernel, stride, padding, dilation, groups.
    for [b, h, w, i, o, k, stride, padding, dilation, groups] in [
        [2, 8, 8, 16, 32, 3, 1, 1, 1, 1],
        [3, 7, 9, 5, 7, 3, 2, 1, 1, 1],
        [2, 16, 16, 64, 64, 5, 1, 2, 1, 1],
        [1, 9, 9, 8, 8, 3, 1, 2, 2, 1],
        [2, 6, 6, 8, 12, 1, 1, 0, 1, 1],
        [2, 8, 8, 16, 16, 3, 1, 1, 1, 4],
        // Depthwise: with four channels per thread and with one, larger, dilated, and without or with more padding than
        // needed; the last one, with a stride, by cuDNN.
        [2, 8, 8, 16, 16, 3, 1, 1, 1, 16],
        [3, 9, 7, 20, 20, 5, 1, 2, 1, 20],
        [1, 9, 9, 6, 6, 3, 1, 2, 2, 6],
        [2, 7, 8, 8, 8, 7, 1, 9, 3, 8],
        [1, 7, 6, 8, 8, 3, 1, 0, 1, 8],
        [1, 4, 5, 8, 8, 1, 1, 1, 1, 8],
        [2, 8, 8, 16, 16, 3, 2, 1, 1, 16],
        // Enough channels for Winograd, which does not support these convolutions.
        [1, 7, 6, 48, 48, 3, 2, 1, 1, 1],
        [1, 7, 6, 48, 48, 3, 1, 2, 2, 1],
        [1, 7, 6, 96, 96, 3, 1, 1, 1, 2],
        [1, 4, 5, 48, 48, 3, 1, 3, 1, 1],
        [1, 4, 5, 48, 48, 1, 1, 1, 1, 1],
    ] {
        let inputs =
            [random((b, h, w, i), 1), (random((o, i / groups, k, k), 2) * 0.2).unwrap(), random(o, 3)];
        let options = Conv2dOptions { stride, padding, dilation, groups };
        compare(&format!("conv2d {options:?} {b}x{h}x{w}x{i} to {o}"), &inputs, |x| {
            conv2d(&x[0], &x[1], Some(&x[2]), options)
        });
    }
    // As in a layer: more leading axes, and permuted strides.
    let inputs = [random((2, 3, 8, 6, 5), 1), (random((4, 8, 3, 3), 2) * 0.2).unwrap()];
    compare("conv2d of a view", &inputs, |x| {
        let view = x[0].permute((0, 1, 4, 3, 2))?;
        conv2d(&view, &x[1], None, Conv2dOptions { padding: 1, ..Default::default() })
    });
}

#[test]
fn activations() {
    for activation in [Activation::Silu, Activation::Gelu, Activation::LeakyRelu(0.2)] {
        for shape in [&[3usize, 5, 7][..], &[2, 300, 4]] {
            let inputs = [(random(shape, 1) * 6.).unwrap()];
            compare(&format!("{activation:?} of {shape:?}"), &inputs, |x| activate(&x[0], activation));
        }
    }
    // A view whose first value is not aligned for reading four at once.
    let inputs = [random(9, 1)];
    compare("SiLU of a view", &inputs, |x| activate(&x[0].narrow(0, 1, 8)?, Activation::Silu));
}

#[test]
fn scaled_channels() {
    // Factors that all samples share, and factors per sample; in fours and one by one, few rows and many.
    for (shape, factors) in [
        (&[2usize, 5, 6, 8][..], &[8usize][..]),
        (&[2, 5, 6, 8], &[2, 8]),
        (&[3, 7, 5], &[5]),
        (&[3, 7, 5], &[3, 5]),
        (&[1, 20, 20, 3], &[1, 3]),
        (&[4, 16, 16, 4], &[4]),
    ] {
        let inputs = [random(shape, 1), random(factors, 2)];
        compare(&format!("scale_channels of {shape:?} by {factors:?}"), &inputs, |x| {
            scale_channels(&x[0], &x[1])
        });
    }
}

#[test]
fn transposed_convolutions() {
    let inputs = [random((2, 6, 5, 16), 1), (random((16, 8, 3, 3), 2) * 0.2).unwrap(), random(8, 3)];
    let options = ConvTranspose2dOptions { stride: 2, padding: 1, output_padding: 1, ..Default::default() };
    compare("conv_transpose2d", &inputs, |x| conv_transpose2d(&x[0], &x[1], Some(&x[2]), options));
}

#[test]
fn roll_outs() {
    // In the fifth case, the steps are not aligned for cuDNN's fast engines.
    for ([batch, steps, height, width], hidden, inputs, kernel, feedback, keep) in [
        ([2, 5, 8, 12], &[16usize, 32][..], 1, 3, false, Keep::Last),
        ([2, 5, 8, 12], &[32, 32], 16, 3, false, Keep::All),
        // By Winograd, in f32.
        ([4, 3, 12, 12], &[32, 32], 16, 3, false, Keep::All),
        ([2, 5, 8, 12], &[16, 32], 32, 3, true, Keep::All),
        ([2, 5, 8, 12], &[3, 5], 5, 5, true, Keep::Last),
        ([1, 5, 3, 5], &[3], 1, 3, false, Keep::All),
        ([2, 2, 8, 12], &[16, 16], 16, 3, true, Keep::All),
        ([2, 1, 8, 12], &[16, 16], 8, 3, false, Keep::Last),
    ] {
        let x = match feedback {
            true => random((batch, height, width, inputs), 1),
            false => random((batch, steps, height, width, inputs), 1),
        };
        let mut all = vec![x];
        let mut below = inputs;
        for (i, &hidden) in hidden.iter().enumerate() {
            all.push((random((4 * hidden, below + hidden, kernel, kernel), 2 + i as u64) * 0.1).unwrap());
            all.push(random(4 * hidden, 20 + i as u64));
            below = hidden;
        }
        let case = format!(
            "conv_lstm, {steps} steps, {hidden:?} of {inputs}, kernel {kernel}, {feedback}, {keep:?}"
        );
        compare(&case, &all, |x| {
            let layers: Vec<ConvLstmLayer> =
                x[1..].chunks(2).map(|it| ConvLstmLayer { weight: &it[0], bias: &it[1] }).collect();
            let input = match feedback {
                true => ConvLstmInput::Feedback { first: &x[0], steps },
                false => ConvLstmInput::Frames(&x[0]),
            };
            conv_lstm(input, &layers, keep)
        });
    }
}

#[test]
fn without_gradients_the_result_is_the_same() {
    let Some((device, _turn)) = device() else { return };
    let there = |x: Tensor| x.to_device(&device).unwrap();
    let (x, weight) = (there(random((2, 4, 8, 8, 3), 1)), there(random((32, 11, 3, 3), 2)));
    let bias = there(random(32, 3));
    let run = |weight: &Tensor| {
        let layers = [ConvLstmLayer { weight, bias: &bias }];
        values(&conv_lstm(ConvLstmInput::Frames(&x), &layers, Keep::All).unwrap())
    };
    let tracked = Var::from_tensor(&weight).unwrap();
    assert_eq!(run(&weight), run(&tracked));
}

fn as_on_the_cpu(case: &str, device: &Device, inputs: &[Tensor], f: impl Fn(&[Var]) -> Result<Tensor>) {
    as_on_the_cpu_within(2e-6, case, device, inputs, f);
}

/// Compares the results of `f` and the gradients of its inputs on the device with the CPU's.
fn as_on_the_cpu_within(
    tolerance: f64,
    case: &str,
    device: &Device,
    inputs: &[Tensor],
    f: impl Fn(&[Var]) -> Result<Tensor>,
) {
    let run = |device: &Device| -> Vec<Tensor> {
        let vars: Vec<Var> =
            inputs.iter().map(|x| Var::from_tensor(&x.to_device(device).unwrap()).unwrap()).collect();
        let y = f(&vars).unwrap();
        let weights = random(y.elem_count(), 99).reshape(y.shape()).unwrap().to_dtype(y.dtype()).unwrap();
        let weights = weights.to_device(device).unwrap();
        let gradients = (&y * weights).unwrap().sum_all().unwrap().backward().unwrap();
        let of = |x: &Var| gradients.get(x).unwrap().clone();
        std::iter::once(y).chain(vars.iter().map(of)).collect()
    };
    let (ours, again) = (run(device), run(device));
    for (i, (ours, again)) in ours.iter().zip(&again).enumerate() {
        assert_eq!(values(ours), values(again), "{case}, tensor {i}: the second time other bits");
    }
    for (i, (ours, cpu)) in ours.iter().zip(&run(&CPU)).enumerate() {
        let error = error(ours, cpu);
        assert!(error <= tolerance, "{case}, tensor {i}: {error:e}");
    }
}

#[test]
fn the_pointwise_parts_of_cells() {
    let Some((device, _turn)) = device() else { return };
    let input = |rows: usize, columns: usize, seed: u64| {
        random(rows * columns, seed).reshape((1, rows, columns)).unwrap()
    };
    for (rows, width) in [(1, 1), (7, 16), (300, 12), (33, 5)] {
        let case = format!("{rows} x {width}");
        // Five terms; the first does not contribute to a gate to which another does.
        let terms: [&[usize]; 5] = [&[2, 0], &[1], &[0, 1, 2, 3], &[3, 2], &[0]];
        let inputs: Vec<Tensor> =
            terms.iter().enumerate().map(|(i, it)| input(rows, it.len() * width, i as u64)).collect();
        as_on_the_cpu(&case, &device, &inputs, |x| {
            sum_gates(4, &x.iter().map(Var::as_tensor).zip(terms).collect::<Vec<_>>())
        });
        // A part of each row, and one that begins where several values cannot be read at once.
        as_on_the_cpu(&case, &device, &[input(rows, 3 * width + 1, 1), input(rows + 1, width, 2)], |x| {
            let (part, later) =
                (x[0].narrow(2, 1, 2 * width)?, x[1].flatten_all()?.narrow(0, 1, rows * width)?);
            sum_gates(2, &[(&part, &[1, 0]), (&later.reshape((1, rows, width))?, &[1])])
        });
        let inputs = [input(rows, 4 * width, 1), input(rows, width, 2), input(rows, width, 3)];
        for (forget, squash) in [(None, false), (Some((3, 1.)), true), (Some((0, 0.)), false)] {
            let update = MemoryUpdate { input: 2, candidate: 1, forget, squash };
            as_on_the_cpu(&format!("{case}, {update:?}"), &device, &inputs[..2], |x| {
                memory_update(&x[0], &x[1], update)
            });
        }
        for gate in [OutputGate::Sigmoid, OutputGate::Tanh, OutputGate::SigmoidOfTanh] {
            for inputs in [&inputs[..2], &inputs] {
                as_on_the_cpu(&format!("{case}, {gate:?}"), &device, inputs, |x| {
                    open_output(gate, &x[0], 1, x.get(2).map(Var::as_tensor), &x[1])
                });
            }
        }
        type Roles = [(usize, usize); 3];
        let roles: [Roles; 3] =
            [[(1, 0), (2, 0), (0, 3)], [(0, 1), (2, 0), (0, 0)], [(0, 2), (0, 0), (0, 3)]];
        for roles in roles {
            as_on_the_cpu(&format!("{case}, {roles:?}"), &device, &inputs, |x| {
                let [gate, a, b] = roles.map(|(tensor, place)| (x[tensor].as_tensor(), place));
                // All inputs have a gradient.
                let all = x.iter().map(|x| x.mean_all()).reduce(|a, b| a? + b?).unwrap()?;
                blend(width, gate, a, b)?.broadcast_add(&all)
            });
        }
    }
}

#[test]
fn normalisation_with_its_activation() {
    let Some((device, _turn)) = device() else { return };
    let thens = [None, Some(Activation::Silu), Some(Activation::Gelu), Some(Activation::LeakyRelu(0.2))];
    // Samples of less than a stretch, of several, and of more than a thread adds up; channels in multiples of
    // four, and others.
    for ([batch, pixels, channels], over) in [
        ([3, 7, 12], Over::Batch),
        ([2, 100, 5], Over::Batch),
        ([40, 60, 4], Over::Batch),
        ([3, 70, 12], Over::Groups(3)),
        ([2, 1100, 6], Over::Groups(2)),
        ([2, 5, 8], Over::Groups(1)),
    ] {
        let x = random(batch * pixels * channels, 1).reshape((batch, pixels, channels)).unwrap();
        // Far from zero, where squares would lose the differences between the values.
        let x = ((x * 0.5).unwrap() + 30.).unwrap();
        let inputs = [x, random(channels, 2), random(channels, 3)];
        for then in thens {
            let case = format!("{batch} x {pixels} x {channels}, {over:?}, {then:?}");
            let of = |x: &[Var]| normalize(&x[0], over, &x[1], &x[2], 1e-5, then);
            as_on_the_cpu_within(2e-5, &case, &device, &inputs, |x| Ok(of(x)?.y));
            let statistics = |device: &Device| {
                let [x, weight, bias] = inputs.each_ref().map(|x| x.to_device(device).unwrap());
                let it = normalize(&x, over, &weight, &bias, 1e-5, then).unwrap();
                assert_eq!(it.count * it.means.elem_count(), batch * pixels * channels);
                [it.means, it.variances]
            };
            for (ours, cpu) in statistics(&device).iter().zip(&statistics(&CPU)) {
                assert!(ours.dtype() == DType::F64 && error(ours, cpu) < 1e-6, "{case}");
            }
        }
        // With half types, a device computes the rounded results for the same values.
        for (dtype, rounding) in [(DType::BF16, 1. / 256.), (DType::F16, 1. / 2048.)] {
            let of = |x: &Tensor| {
                let vars =
                    [x, &inputs[1].to_device(&device).unwrap(), &inputs[2].to_device(&device).unwrap()]
                        .map(|x| Var::from_tensor(x).unwrap());
                let y = normalize(&vars[0], over, &vars[1], &vars[2], 1e-5, thens[1]).unwrap().y;
                let gradients =
                    y.to_dtype(DType::F32).unwrap().sqr().unwrap().sum_all().unwrap().backward().unwrap();
                let of = |x: &Var| gradients.get(x).unwrap().to_dtype(DType::F32).unwrap();
                std::iter::once(y.to_dtype(DType::F32).unwrap())
                    .chain(vars.iter().map(of))
                    .collect::<Vec<_>>()
            };
            let narrow = inputs[0].to_device(&device).unwrap().to_dtype(dtype).unwrap();
            for (i, (ours, wide)) in
                of(&narrow).iter().zip(&of(&narrow.to_dtype(DType::F32).unwrap())).enumerate()
            {
                let error = error(ours, &wide.to_device(&CPU).unwrap());
                assert!(error < 4. * rounding, "{dtype:?}, {over:?}, tensor {i}: {error:e}");
            }
        }
    }
}

#[test]
fn a_weight_that_many_steps_use() {
    let Some((device, _turn)) = device() else { return };
    for (inputs, outputs, kernel, with_bias) in [(3, 5, 3, true), (16, 32, 5, false), (8, 8, 1, true)] {
        let x = random(2 * 6 * 7 * inputs, 1).reshape((2, 6, 7, inputs)).unwrap();
        let weight =
            random(outputs * inputs * kernel * kernel, 2).reshape((outputs, inputs, kernel, kernel)).unwrap();
        let mut all = vec![x, weight];
        all.extend(with_bias.then(|| random(outputs, 3)));
        let case = format!("{inputs} to {outputs}, {kernel}x{kernel}");
        as_on_the_cpu_within(5e-5, &case, &device, &all, |x| {
            let conv = SharedConv::new(&x[1], x.get(2).map(Var::as_tensor))?;
            conv.forward(&x[0])? + conv.forward(&(x[0].as_tensor() * 0.5)?)?.sqr()?
        });
    }
}

#[test]
fn states_are_normalised() {
    let Some((device, _turn)) = device() else { return };
    for shape in [[1, 5, 4], [3, 40, 8], [2, 1100, 3]] {
        let [samples, pixels, channels] = shape;
        let x =
            ((random(samples * pixels * channels, 1).reshape(&shape).unwrap() * 0.5).unwrap() + 3.).unwrap();
        let parameter = |seed| random(pixels * channels, seed).reshape((pixels, channels)).unwrap();
        // Applied twice, like the steps of a roll-out.
        as_on_the_cpu_within(1e-5, &format!("{shape:?}"), &device, &[x, parameter(2), parameter(3)], |x| {
            let norm = SharedNorm::new(&x[1], &x[2], 1e-5)?;
            norm.forward(&norm.forward(&x[0])?)
        });
    }
}

#[test]
fn updates() {
    let Some((device, _turn)) = device() else { return };
    let there = |x: &Tensor| x.to_device(&device).unwrap();
    for n in [1, 1000, 100_003] {
        let [w, g, m] = [1, 2, 3].map(|seed| random(n, seed));
        let v = random(n, 5).sqr().unwrap();
        let [w2, g2, m2, v2] = [&w, &g, &m, &v].map(there);
        // Another view of the same memory sees the values written by the kernel.
        let view = w2.reshape((n, 1)).unwrap();
        // More tensors than one kernel handles, each with a different length.
        let rest = |device: &Device| -> Vec<[Tensor; 4]> {
            (0..70)
                .map(|i| {
                    [6, 7, 8, 9]
                        .map(|seed| random(1 + 97 * i, seed).abs().unwrap().to_device(device).unwrap())
                })
                .collect()
        };
        let (others, others2) = (rest(&CPU), rest(&device));
        let all = |own: [&Tensor; 4], others: &[[Tensor; 4]]| {
            let others: Vec<[Tensor; 4]> = others.to_vec();
            let sets = std::iter::once(own.map(Clone::clone)).chain(others).collect::<Vec<_>>();
            let params = sets.iter().map(|[param, gradient, m, v]| UpdateParam {
                param,
                copy: None,
                gradient,
                kept: [Some(m), Some(v), None],
            });
            let mut placed = Placed::on(own[0].device()).unwrap();
            placed.set(ADAM).unwrap();
            placed.apply(&params.collect::<Vec<_>>(), &GradScale::default()).unwrap();
        };
        all([&w, &g, &m, &v], &others);
        all([&w2, &g2, &m2, &v2], &others2);
        for (cpu, cuda) in others.iter().flatten().zip(others2.iter().flatten()) {
            assert!(error(cuda, cpu) < 1e-6);
        }
        for dtype in [DType::BF16, DType::F16] {
            let copies: Vec<Tensor> =
                others2.iter().map(|it| it[0].zeros_like().unwrap().to_dtype(dtype).unwrap()).collect();
            publish(&others2.iter().map(|it| &it[0]).zip(&copies).collect::<Vec<_>>()).unwrap();
            for (copy, [master, ..]) in copies.iter().zip(&others2) {
                assert_eq!(values(copy), values(&master.to_dtype(dtype).unwrap()));
            }
        }
        for (cpu, cuda) in [(&w, &w2), (&m, &m2), (&v, &v2), (&w, &view.reshape(n).unwrap())] {
            assert!(error(cuda, cpu) < 1e-6);
        }
        let move_all = |own: [&Tensor; 4], others: &[[Tensor; 4]]| {
            let sets = std::iter::once(own).chain(others.iter().map(|it| it.each_ref())).collect::<Vec<_>>();
            let params = sets.iter().map(|[param, gradient, m, _]| UpdateParam {
                param,
                copy: None,
                gradient,
                kept: [Some(m), None, None],
            });
            let mut placed = Placed::on(own[0].device()).unwrap();
            placed.set(SGD).unwrap();
            placed.apply(&params.collect::<Vec<_>>(), &GradScale::default()).unwrap();
            // Neither is below zero, so that no small difference of large numbers is compared.
            let targets: Vec<Tensor> = sets.iter().map(|[_, g, ..]| g.abs().unwrap()).collect();
            let pairs = sets.iter().map(|[.., v]| *v).zip(&targets).collect::<Vec<_>>();
            approach(&pairs, 0.3).unwrap();
        };
        move_all([&w, &g, &m, &v], &others);
        move_all([&w2, &g2, &m2, &v2], &others2);
        for (cpu, cuda) in [(&w, &w2), (&m, &m2), (&v, &v2)] {
            assert!(error(cuda, cpu) < 1e-6);
        }
        for (cpu, cuda) in others.iter().flatten().zip(others2.iter().flatten()) {
            assert!(error(cuda, cpu) < 1e-6);
        }
        assert_eq!(sum_squares_of(&[w2.narrow(0, 0, 0).unwrap()]).unwrap(), 0.);
        let (one, two) = (sum_squares_of(&[w.clone(), g]).unwrap(), sum_squares_of(&[w2, g2]).unwrap());
        assert!((two / one - 1.).abs() < 1e-6, "{two} {one}");
    }
}

#[test]
fn steps_are_decided_on_where_their_gradients_are() {
    let Some((device, _turn)) = device() else { return };
    let plain = Clipping::default();
    let clipped = Clipping { loss_scale: 8., max_norm: Some(0.5), max_value: Some(4e-3), only_finite: true };
    for (clipping, spoilt) in
        [(plain, None), (clipped, None), (clipped, Some(f32::NAN)), (plain, Some(f32::INFINITY))]
    {
        for dtype in [DType::BF16, DType::F16] {
            // Parameters, gradients, moments and copies; more of them than one kernel handles, one with
            // several blocks.
            let sets = |device: &Device| -> Vec<[Tensor; 5]> {
                let set = |i: usize| {
                    let n = if i == 3 { 10_000 } else { 1 + 9 * i };
                    let [w, g, m, v] = [1, 2, 3, 4].map(|seed| random(n, seed + 10 * i as u64));
                    let spoil = |x: f32| {
                        Tensor::cat(&[&g.narrow(0, 1, n - 1).unwrap(), &Tensor::new(&[x], &CPU).unwrap()], 0)
                    };
                    let g = match spoilt.filter(|_| i == 65) {
                        Some(x) => spoil(x).unwrap(),
                        None => g.clone(),
                    };
                    let copy = w.zeros_like().unwrap().to_dtype(dtype).unwrap();
                    [w, g, m, v.abs().unwrap(), copy].map(|x| x.to_device(device).unwrap())
                };
                (0..70).map(set).collect()
            };
            let run = |device: &Device| {
                let sets = sets(device);
                let gradients: Vec<Tensor> = sets.iter().map(|[_, g, ..]| g.clone()).collect();
                let Clipped { scale, norm } = clipping.decide(&gradients).unwrap();
                let norm = norm.read().unwrap();
                let mut placed = Placed::on(device).unwrap();
                // The last numbers set are used.
                placed.set(AdamStep { keep: 7., ..ADAM }).unwrap();
                placed.set(ADAM).unwrap();
                // The first one has no copy.
                let params = sets.iter().enumerate().map(|(i, [param, gradient, m, v, copy])| UpdateParam {
                    param,
                    copy: (i > 0).then_some(copy),
                    gradient,
                    kept: [Some(m), Some(v), None],
                });
                placed.apply(&params.collect::<Vec<_>>(), &scale).unwrap();
                let mut placed = Placed::on(device).unwrap();
                placed.set(SGD).unwrap();
                let params = sets.iter().enumerate().map(|(i, [param, gradient, m, _, copy])| UpdateParam {
                    param,
                    copy: (i > 0).then_some(copy),
                    gradient,
                    kept: [Some(m), None, None],
                });
                placed.apply(&params.collect::<Vec<_>>(), &scale).unwrap();
                let shown = scale.apply(&gradients).unwrap();
                (norm.finish().unwrap(), sets, shown)
            };
            let ((norm, cpu, shown), (norm2, cuda, shown2)) = (run(&CPU), run(&device));
            assert!(
                norm == norm2 || norm.is_nan() && norm2.is_nan() || (norm2 / norm - 1.).abs() < 1e-6,
                "{norm2} {norm}"
            );
            let refused = clipping.only_finite && spoilt.is_some();
            let same = |ours: &Tensor, theirs: &Tensor, tolerance: f64| {
                let pairs = values(ours).into_iter().zip(values(theirs));
                pairs.into_iter().all(|(a, b)| {
                    a == b || a.is_nan() && b.is_nan() || (a - b).abs() <= tolerance * (1. + b.abs())
                })
            };
            // Gradients of a refused step are returned all the same.
            for (ours, theirs) in shown2.iter().zip(&shown) {
                assert!(same(ours, theirs, 1e-6));
            }
            for (set, ((ours, theirs), before)) in cuda.iter().zip(&cpu).zip(sets(&CPU)).enumerate() {
                for (i, tolerance) in [(0, 2e-6), (2, 1e-6), (3, 1e-6)] {
                    assert!(same(&ours[i], &theirs[i], tolerance), "{clipping:?} {spoilt:?}, tensor {i}");
                    assert_eq!(values(&ours[i]) == values(&before[i]), refused);
                }
                let master =
                    if refused || set == 0 { before[4].clone() } else { ours[0].to_dtype(dtype).unwrap() };
                assert!(same(&ours[4], &master, 0.));
            }
        }
    }
}

#[test]
fn uploads_while_the_device_computes() {
    let Some((device, _turn)) = device() else { return };
    let busy = Tensor::ones((1024, 1024), DType::F32, &device).unwrap();
    std::thread::scope(|scope| {
        for worker in 0..3 {
            let device = &device;
            scope.spawn(move || {
                for i in 0..20 {
                    let x = random((7, 1000 + 300 * i), (worker * 100 + i) as u64);
                    let there = to_device(&x, device).unwrap();
                    // Frees the memory while others compute, and checks the values that arrived.
                    assert_eq!(values(&there.affine(1., 0.).unwrap()), values(&x));
                }
            });
        }
        for _ in 0..50 {
            busy.matmul(&busy).unwrap();
        }
    });
}

#[test]
fn downloads_bring_what_was_there_when_they_began() {
    let Some((device, _turn)) = device() else { return };
    let busy = Tensor::ones((1024, 1024), DType::F32, &device).unwrap();
    for i in 0..20 {
        let x = random((7, 1000 + 300 * i), i as u64);
        let there = x.to_device(&device).unwrap();
        busy.matmul(&busy).unwrap();
        let download = Download::start(&there).unwrap();
        // The tensor changes and is dropped, and its memory is reused.
        approach(&[(&there, &there.zeros_like().unwrap())], 1.).unwrap();
        drop(there);
        let next = Tensor::zeros((7, 1000 + 300 * i), DType::F32, &device).unwrap();
        busy.matmul(&busy).unwrap();
        if i % 3 == 0 {
            device.synchronize().unwrap();
        }
        if i % 2 == 0 {
            while !download.is_done().unwrap() {
                std::thread::yield_now();
            }
        }
        assert_eq!(values(&download.finish().unwrap()), values(&x));
        drop(next);
    }
    // With larger staging memory than needed, and with downloads that are dropped.
    for len in [3000, 2000, 1800] {
        let x = random(len, len as u64);
        drop(Download::start(&x.to_device(&device).unwrap()).unwrap());
        device.synchronize().unwrap();
        let there = x.to_device(&device).unwrap();
        assert_eq!(values(&Download::start(&there).unwrap().finish().unwrap()), values(&x));
    }
    let wide = (random((3, 5), 1).to_dtype(DType::F64).unwrap() / 3.).unwrap();
    let there = wide.to_device(&device).unwrap().narrow(0, 1, 2).unwrap();
    let here = Download::start(&there).unwrap().finish().unwrap();
    assert_eq!((here.dtype(), values(&here)), (DType::F64, values(&wide.narrow(0, 1, 2).unwrap())));
    let half = random((3, 5), 1).to_dtype(DType::BF16).unwrap();
    let there = half.to_device(&device).unwrap();
    let first = there.narrow(0, 1, 2).unwrap();
    let here = Download::start(&first).unwrap().finish().unwrap();
    assert_eq!((here.dtype(), values(&here)), (DType::F32, values(&half.narrow(0, 1, 2).unwrap())));
}

#[test]
fn what_the_quickest_engines_compute_is_right() {
    time_convolutions(true);
    // Shapes that no other test uses: each is timed once.
    let inputs = [random((2, 7, 8, 8), 1), (random((24, 8, 3, 3), 2) * 0.2).unwrap(), random(24, 3)];
    let options = Conv2dOptions { padding: 1, ..Default::default() };
    compare("timed conv2d", &inputs, |x| conv2d(&x[0], &x[1], Some(&x[2]), options));
    let inputs = [random((1, 4, 7, 8, 2), 1), (random((32, 10, 3, 3), 2) * 0.1).unwrap(), random(32, 3)];
    compare("timed conv_lstm", &inputs, |x| {
        let layers = [ConvLstmLayer { weight: &x[1], bias: &x[2] }];
        conv_lstm(ConvLstmInput::Frames(&x[0]), &layers, Keep::All)
    });
    time_convolutions(false);
}

#[test]
fn halves_are_rounded_as_on_the_cpu() {
    let Some((device, _turn)) = device() else { return };
    // Ties, the largest numbers, small ones, and NaN and infinities.
    let special = [
        1. + 1. / 256.,
        1. + 3. / 256.,
        1. + 1. / 2048.,
        65504.,
        65519.,
        65520.,
        3.4e38,
        1e-7,
        -6e-8,
        1e-40,
        -0.,
        f32::INFINITY,
        f32::NAN,
    ];
    let master = Tensor::new(&special, &device).unwrap();
    for dtype in [DType::BF16, DType::F16] {
        let copy = Tensor::zeros(special.len(), dtype, &device).unwrap();
        publish(&[(&master, &copy)]).unwrap();
        let expected = Tensor::new(&special, &CPU).unwrap().to_dtype(dtype).unwrap();
        let bits = |x: f64| if x.is_nan() { f64::NAN.to_bits() } else { x.to_bits() };
        let (ours, expected) = (values(&copy), values(&expected));
        assert!(ours.iter().zip(&expected).all(|(a, b)| bits(*a) == bits(*b)), "{ours:?} {expected:?}");
    }
}

#[test]
fn gates_that_are_far_open_or_shut_stay_numbers() {
    let Some((device, _turn)) = device() else { return };
    for dtype in [DType::F32, DType::BF16, DType::F16] {
        for far in [-200., 200.] {
            let run = |device: &Device| {
                let there = |x: Tensor| {
                    Var::from_tensor(&x.to_dtype(dtype).unwrap().to_device(device).unwrap()).unwrap()
                };
                let (x, weight) = (there(random((1, 3, 8, 8, 4), 1)), there(random((32, 12, 3, 3), 2)));
                let bias = there(Tensor::full(far, 32, &CPU).unwrap());
                let layers = [ConvLstmLayer { weight: &weight, bias: &bias }];
                let y = conv_lstm(ConvLstmInput::Frames(&x), &layers, Keep::All).unwrap();
                let gradients = y.sum_all().unwrap().backward().unwrap();
                [y.clone(), gradients.get(&weight).unwrap().clone()].map(|x| values(&x))
            };
            for (ours, expected) in run(&device).iter().zip(&run(&CPU)) {
                assert!(ours.iter().zip(expected).all(|(a, b)| (a - b).abs() <= 1e-2 * (1. + b.abs())));
            }
        }
    }
}

#[test]
fn a_recording_keeps_the_memory_that_its_convolutions_work_in() {
    let Some((device, _turn)) = device() else { return };
    // No test has convolved so many images before; the workspace grows with the number of images.
    let [x, larger] = [40, 80].map(|batch| random((batch, 8, 8, 16), 1).to_device(&device).unwrap());
    let weight = random((16, 16, 3, 3), 2).to_device(&device).unwrap();
    let convolve = |x: &Tensor| conv2d(x, &weight, None, Conv2dOptions { padding: 1, ..Default::default() });
    let expected = values(&rehearse(&device, || convolve(&x)).unwrap());
    let (y, recording) = record(&device, || convolve(&x)).unwrap();
    device.synchronize().unwrap();
    convolve(&larger).unwrap();
    // Freed memory is reused by other tensors now.
    let others: Vec<Tensor> = (0..64).map(|i| Tensor::full(i as f32, 40 << 10, &device).unwrap()).collect();
    recording.replay().unwrap();
    assert_eq!(values(&y), expected);
    drop(y); // its memory belongs to the recording
    for (i, other) in others.iter().enumerate() {
        assert!(values(other).iter().all(|x| *x == i as f64), "{i}");
    }
}

#[test]
fn a_device_is_usable_after_a_recording_that_failed() {
    let Some((device, _turn)) = device() else { return };
    let x = Tensor::ones((8, 8), DType::F32, &device).unwrap();
    let work = |disturb: &dyn Fn() -> candle_core::Result<()>| {
        let y = ((&x + 1.)? * 2.)?;
        disturb()?;
        y + 1.
    };
    let well = || Ok(());
    let expected = values(&rehearse(&device, || work(&well)).unwrap());
    // The driver gives up the recording, so that the work cannot free its tensors; or the work panics.
    let waits = || device.synchronize();
    let panics = || panic!("a panic in a recording");
    assert!(record(&device, || work(&waits)).is_err());
    assert_eq!(values(&work(&well).unwrap()), expected);
    let panicked = catch_unwind(AssertUnwindSafe(|| record(&device, || work(&panics)).is_err()));
    assert!(panicked.is_err());
    assert_eq!(values(&work(&well).unwrap()), expected);
    let (y, recording) = record(&device, || work(&well)).unwrap();
    recording.replay().unwrap();
    assert_eq!(values(&y), expected);
    drop(y); // its memory belongs to the recording
}

#[test]
fn memory_is_counted() {
    let Some((device, _turn)) = device() else { return };
    device.synchronize().unwrap();
    reset_peak_memory(&device);
    let before = peak_memory(&device).unwrap();
    drop(Tensor::zeros(64 << 20, DType::U8, &device).unwrap());
    let peak = peak_memory(&device).unwrap();
    assert!(peak >= before + (64 << 20), "{before} {peak}");
}

#[test]
fn a_device_alone_exchanges_with_itself() {
    let Some((device, _turn)) = device() else { return };
    let check = || Ok(());
    let alone = Communicator::join(&device, &Communicator::id().unwrap(), 0, 1, &check).unwrap();
    let x = random(1000, 1).to_device(&device).unwrap();
    let exchange = |what, x: &Tensor| alone.finish(alone.start(what, x)?, &check);
    for what in [
        Exchange::AllReduce,
        Exchange::AllReduceInPlace,
        Exchange::ReduceScatter,
        Exchange::AllGather,
        Exchange::Broadcast,
    ] {
        assert_eq!(values(&exchange(what, &x).unwrap()), values(&x), "{what:?}");
        let doubled = exchange(what, &(x.to_dtype(DType::F64).unwrap() * 2.).unwrap()).unwrap();
        assert_eq!(values(&doubled), values(&(&x * 2.).unwrap()), "{what:?}");
        let bytes = Tensor::from_vec((0..=255).collect::<Vec<u8>>(), 256, &device).unwrap();
        assert_eq!(values(&exchange(what, &bytes).unwrap()), values(&bytes), "{what:?}");
    }
    // Several at once, in parallel with other work: each sees the work enqueued before it.
    let started: Vec<_> = (0..8)
        .map(|i| alone.start(Exchange::AllReduceInPlace, &(&x + f64::from(i)).unwrap()).unwrap())
        .collect();
    for (i, started) in started.into_iter().enumerate() {
        let sum = alone.finish(started, &check).unwrap();
        assert_eq!(values(&sum), values(&(&x + i as f64).unwrap()));
    }
    alone.abort();
    let error = exchange(Exchange::AllReduce, &x).unwrap_err().to_string();
    assert!(error.contains("an earlier exchange was given up"), "{error}");
}
