//! Tests of normalisation, with one weight per channel and per value.

use super::{Half, Host, assert_close, at, random, run, wide};
use crate::cuda::arguments::{
    AddParts, ChannelGradients, ChannelSums, GroupGradients, Normalize, Sizes, Statistics, Tables,
    ValueGradients,
};
use crate::cuda::sources::NORMALIZE;
use crate::{Activation, Over, SharedNorm, normalize};
use candle_core::{Device, Result, Tensor, Var};
use half::{bf16, f16};
use std::sync::Mutex;

const EPS: f64 = 1e-5;
const SLOPE: f32 = 0.2;

/// Sizes to normalise: samples, pixels, channels, and groups per sample.
type Case = [usize; 4];

/// The result, and the gradients of x, weight and bias, as flat vectors.
fn on_host<T: Half>(
    host: &Mutex<Host>,
    [samples, pixels, channels, groups]: Case,
    [x, dy]: [&[T]; 2],
    [weight, bias]: [&[f32]; 2],
    then: u32,
    at_once: usize,
) -> [Vec<f32>; 4] {
    /// Pixels per part.
    const FEW: usize = 3;
    let sizes = Sizes {
        samples: samples as u32,
        pixels: pixels as u32,
        channels: channels as u32,
        groups: groups as u32,
    };
    let table = || vec![f32::NAN; samples * channels];
    let (means, scales, shifts, tilts) = (table(), table(), table(), table());
    let [wide_means, variances] = [(); 2].map(|()| vec![f64::NAN; samples * groups]);
    let stride = if weight.len() == channels { 0 } else { channels as u32 };
    let (weight_at, bias_at) = (at(weight), at(bias));
    let tables = Tables {
        means: at(&means),
        scales: at(&scales),
        weight: weight_at,
        bias: bias_at,
        stride,
        then,
        slope: SLOPE,
    };
    let kernel = |name: &str| format!("{name}_{}_{at_once}", T::NAME);
    let sums = |dy: u64| {
        let parts = pixels.div_ceil(FEW);
        let [all, total] = [parts, 1].map(|parts| vec![f64::NAN; samples * parts * 2 * channels]);
        let arguments = ChannelSums {
            x: at(x),
            dy,
            tables,
            sizes,
            sums: at(&all),
            stretch: FEW as u32,
            parts: parts as u32,
        };
        run(host, &NORMALIZE, &kernel("channel_sums"), samples * parts * channels / at_once, arguments);
        let [samples, parts, columns] = [samples, parts, 2 * channels].map(|n| n as u32);
        let arguments = AddParts { from: at(&all), to: at(&total), samples, parts, columns, fewer: 1 };
        run(host, &NORMALIZE, "add_parts", total.len(), arguments);
        total
    };
    let of_values = sums(0);
    let arguments = Statistics {
        sums: at(&of_values),
        means: at(&wide_means),
        variances: at(&variances),
        narrow_means: at(&means),
        scales: at(&scales),
        sizes,
        eps: EPS,
    };
    run(host, &NORMALIZE, "statistics", samples * groups, arguments);
    let [y, dx] = [(); 2].map(|()| vec![T::new(f32::NAN); x.len()]);
    let forwards = Normalize { x: at(x), dy: 0, to: at(&y), tables, shifts: 0, tilts: 0, sizes };
    run(host, &NORMALIZE, &kernel("normalize"), x.len() / at_once, forwards);
    let sums = sums(at(dy));
    let (weight_of, scales) = (if stride == 0 { weight_at } else { 0 }, at(&scales));
    let (shifts, tilts) = (at(&shifts), at(&tilts));
    let arguments = GroupGradients { sums: at(&sums), weight: weight_of, scales, shifts, tilts, sizes };
    run(host, &NORMALIZE, "group_gradients", samples * groups, arguments);
    let [d_weight, d_bias] = [(); 2].map(|()| vec![f32::NAN; weight.len()]);
    let (to_weight, to_bias) = (at(&d_weight), at(&d_bias));
    if stride == 0 {
        let Sizes { samples, channels: of, .. } = sizes;
        let arguments =
            ChannelGradients { sums: at(&sums), d_weight: to_weight, d_bias: to_bias, samples, channels: of };
        run(host, &NORMALIZE, "channel_gradients", channels, arguments);
    } else {
        let (d_weight, d_bias) = (to_weight, to_bias);
        let arguments = ValueGradients { x: at(x), dy: at(dy), tables, d_weight, d_bias, sizes };
        run(host, &NORMALIZE, &kernel("value_gradients"), weight.len() / at_once, arguments);
    }
    let backwards = Normalize { dy: at(dy), to: at(&dx), shifts, tilts, ..forwards };
    run(host, &NORMALIZE, &kernel("normalize"), x.len() / at_once, backwards);
    [wide(&y), wide(&dx), d_weight, d_bias]
}

/// The same results by the CPU op on x (samples, pixels, channels), weight and bias.
fn on_cpu(
    [samples, pixels, channels, _]: Case,
    [x, dy]: [Vec<f32>; 2],
    [weight, bias]: [&Tensor; 2],
    op: impl Fn(&[Var]) -> Result<Tensor>,
) -> Vec<Vec<f32>> {
    let shape = (samples, pixels, channels);
    let [x, dy] = [x, dy].map(|values| Tensor::from_vec(values, shape, &Device::Cpu).unwrap());
    let vars = [&x, weight, bias].map(|x| Var::from_tensor(x).unwrap());
    let y = op(&vars).unwrap();
    let gradients = (&y * dy).unwrap().sum_all().unwrap().backward().unwrap();
    let all = std::iter::once(&y).chain(vars.iter().map(|x| gradients.get(x).unwrap()));
    all.map(|x| x.flatten_all().unwrap().to_vec1().unwrap()).collect()
}

fn compare<T: Half>(
    host: &Mutex<Host>,
    case: Case,
    at_once: usize,
    per_value: bool,
    over: Over,
    then: usize,
) {
    let [samples, pixels, channels, _] = case;
    let thens = [None, Some(Activation::Silu), Some(Activation::Gelu), Some(Activation::LeakyRelu(SLOPE))];
    let values = |seed| -> Vec<T> {
        random(samples * pixels * channels, seed).into_iter().map(|x| T::new(x + 1.)).collect()
    };
    let (x, dy) = (values(1), values(2));
    let shape = if per_value { vec![pixels, channels] } else { vec![channels] };
    let parameter =
        |seed| Tensor::from_vec(random(shape.iter().product(), seed), &shape[..], &Device::Cpu).unwrap();
    let (weight, bias) = (parameter(3), parameter(4));
    let flat = |x: &Tensor| -> Vec<f32> { x.flatten_all().unwrap().to_vec1().unwrap() };
    let ours = on_host(host, case, [&x, &dy], [&flat(&weight), &flat(&bias)], then as u32, at_once);
    let expected = on_cpu(case, [wide(&x), wide(&dy)], [&weight, &bias], |x| match per_value {
        true => SharedNorm::new(&x[1], &x[2], EPS)?.forward(&x[0]),
        false => Ok(normalize(&x[0], over, &x[1], &x[2], EPS, thens[then])?.y),
    });
    for (i, (ours, expected)) in ours.iter().zip(&expected).enumerate() {
        let what = format!("{case:?}, {at_once} {} at once, {:?}, tensor {i}", T::NAME, thens[then]);
        assert_close(&what, ours, expected, 1e-5f32.max(T::ROUNDING));
    }
}

#[test]
fn is_that_of_the_cpu() {
    let Some(host) = Host::new() else { return };
    for then in 0..4 {
        for at_once in [1, 4] {
            // A batch is one sample whose channels are groups.
            compare::<f32>(host, [1, 10, 8, 8], at_once, false, Over::Batch, then);
            compare::<f32>(host, [2, 7, 12, 3], at_once, false, Over::Groups(3), then);
            compare::<bf16>(host, [2, 7, 8, 2], at_once, false, Over::Groups(2), then);
            compare::<f16>(host, [1, 7, 4, 4], at_once, false, Over::Batch, then);
        }
    }
    for at_once in [1, 4] {
        compare::<f32>(host, [3, 10, 8, 1], at_once, true, Over::Groups(1), 0);
    }
}
