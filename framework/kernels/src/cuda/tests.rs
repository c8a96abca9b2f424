//! Tests of the kernel sources, run on the processor, against expected results.

mod cells;
mod depthwise;
mod normalize;
mod scale;

use super::arguments::{
    AddBias, Approach, ApproachAt, ColumnSums, CopyColumns, Counted, CountedAt, Decide, Filters,
    GatesBackward, GatesForward, Many, Narrow, PackWeight, ParamAt, Plane, Pointwise, PublishAt, SquareSums,
    Sums, Tiles, Update,
};
use super::host::Host;
use super::sources::{COLUMNS, GATES, OPTIMIZER, POINTWISE, Source, WINOGRAD};
use crate::clipping::{Clipping, Share};
use crate::pointwise::{Activation, activate};
use crate::updates::{
    AdadeltaStep, AdagradStep, AdamStep, AdamaxStep, MOST_STATES, Placed, RmspropStep, Rule, SgdStep,
    UpdateParam, approach,
};
use candle_core::{Device, Tensor};
use half::{bf16, f16};
use rand::{Rng, SeedableRng};
use std::sync::{Mutex, PoisonError};

fn run<A: Copy>(host: &Mutex<Host>, source: &Source, name: &str, count: usize, arguments: A) {
    let host = host.lock().unwrap_or_else(PoisonError::into_inner);
    // SAFETY: the tests pass vectors of the sizes that they name.
    unsafe { host.run(source, name, count, arguments) };
}

fn random(len: usize, seed: u64) -> Vec<f32> {
    let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(seed);
    (0..len).map(|_| rng.random_range(-2f32..2.)).collect()
}

fn at<T>(values: &[T]) -> u64 {
    values.as_ptr() as u64
}

/// A float of 16 or 32 bits.
trait Half: Copy {
    const NAME: &'static str;
    /// The largest error of a rounded number near 1.
    const ROUNDING: f32;
    fn new(x: f32) -> Self;
    fn wide(self) -> f32;
}
impl Half for f32 {
    const NAME: &'static str = "float";
    const ROUNDING: f32 = 1e-6;
    fn new(x: f32) -> f32 {
        x
    }
    fn wide(self) -> f32 {
        self
    }
}
impl Half for bf16 {
    const NAME: &'static str = "bf16";
    const ROUNDING: f32 = 1. / 256.;
    fn new(x: f32) -> bf16 {
        bf16::from_f32(x)
    }
    fn wide(self) -> f32 {
        self.to_f32()
    }
}
impl Half for f16 {
    const NAME: &'static str = "f16";
    const ROUNDING: f32 = 1. / 2048.;
    fn new(x: f32) -> f16 {
        f16::from_f32(x)
    }
    fn wide(self) -> f32 {
        self.to_f32()
    }
}

fn wide<T: Half>(values: &[T]) -> Vec<f32> {
    values.iter().map(|x| x.wide()).collect()
}

fn assert_close(what: &str, ours: &[f32], expected: &[f32], tolerance: f32) {
    for (i, (a, b)) in ours.iter().zip(expected).enumerate() {
        assert!((a - b).abs() <= tolerance * (1. + b.abs()), "{what}, {i}: {a} instead of {b}");
    }
}

#[test]
fn numbers_are_rounded_as_half_does() {
    let Some(host) = Host::new() else { return };
    let mut x: Vec<f32> = random(1000, 1).iter().map(|x| x * 1e4f32.powf(x.fract())).collect();
    // Ties, the largest numbers, small ones, and NaN and infinities.
    x.extend([
        1. + 1. / 256.,
        1. + 3. / 256.,
        65504.,
        65519.,
        65520.,
        3.4e38,
        1e-7,
        -6e-8,
        -0.,
        f32::INFINITY,
        f32::NAN,
    ]);
    fn narrow<T: Half + Default>(host: &Mutex<Host>, x: &[f32]) {
        let mut to = vec![T::new(7.); x.len()];
        let arguments = Narrow { from: at(x), to: to.as_mut_ptr() as u64, count: x.len() as u32 };
        run(host, &COLUMNS, &format!("narrow_{}", T::NAME), x.len(), arguments);
        for (to, x) in wide(&to).iter().zip(x) {
            let expected = T::new(*x).wide();
            assert!(to.to_bits() == expected.to_bits() || to.is_nan() && x.is_nan(), "{x}: {to}");
        }
    }
    narrow::<bf16>(host, &x);
    narrow::<f16>(host, &x);
    narrow::<f32>(host, &x);
}

/// A step of a cell and its gradients: the values that are returned, in the order of the outputs.
fn cell<T: Half>(host: &Mutex<Host>, at_once: usize) -> Vec<f32> {
    let (rows, pixels, hidden) = (6u32, 3u32, 8usize);
    let n = rows as usize * hidden;
    let narrow = |x: Vec<f32>| -> Vec<T> { x.into_iter().map(T::new).collect() };
    let (mut gates, bias) = (narrow(random(4 * n, 2)), narrow(random(4 * hidden, 3)));
    let (before, mut c, mut dc) = (random(n, 4), vec![0f32; n], random(n, 5));
    let mut sums = vec![7f32; 4 * 4 * hidden];
    // Two images of three pixels; the second output lies in wider pixels, from the fifth channel on.
    let (mut plain, mut wider) = (vec![T::new(0.); n], vec![T::new(0.); 3 * n]);
    let plane = |at: u64, channels: usize, first: usize| Plane {
        at: at + (first * size_of::<T>()) as u64,
        image: (pixels as usize * channels) as i64,
        pixel: channels as i64,
    };
    let forward = GatesForward {
        gates: gates.as_mut_ptr() as u64,
        bias: at(&bias),
        c_before: at(&before),
        c: c.as_mut_ptr() as u64,
        h: [
            plane(plain.as_mut_ptr() as u64, hidden, 0),
            Plane::default(),
            plane(wider.as_mut_ptr() as u64, 3 * hidden, 4),
        ],
        rows,
        hidden: hidden as u32,
        pixels,
    };
    let threads = n / at_once;
    run(host, &GATES, &format!("gates_forward_{}_{at_once}", T::NAME), threads, forward);
    let mut all = [c.clone(), wide(&plain), wide(&wider)].concat();
    let (one, two) = (narrow(random(n, 6)), narrow(random(3 * n, 7)));
    let backward = GatesBackward {
        gates: forward.gates,
        bias: at(&bias),
        c_before: at(&before),
        dc: at(&dc),
        dc_before: dc.as_mut_ptr() as u64,
        dh: [plane(at(&one), hidden, 0), plane(at(&two), 3 * hidden, 4), Plane::default()],
        sums: sums.as_mut_ptr() as u64,
        rows,
        hidden: hidden as u32,
        pixels,
        parts: 4,
    };
    let threads = 4 * hidden / at_once;
    run(host, &GATES, &format!("gates_backward_{}_{at_once}", T::NAME), threads, backward);
    // The first two of the four parts have two pixels, and the sums were not zero before.
    let (gates, columns) = (wide(&gates), 4 * hidden);
    for (i, sum) in sums.iter().enumerate() {
        let pixels = (i / columns..rows as usize).step_by(4);
        let expected = 7. + pixels.map(|row| gates[row * columns + i % columns]).sum::<f32>();
        assert!((sum - expected).abs() <= 6. * T::ROUNDING, "{i}: {sum} instead of {expected}");
    }
    all.extend([gates, dc, sums].concat());
    all
}

#[test]
fn cells_are_the_same_in_every_type_and_at_any_width() {
    let Some(host) = Host::new() else { return };
    let exact = cell::<f32>(host, 1);
    assert!(exact.iter().any(|x| x.abs() > 0.5));
    assert_eq!(exact, cell::<f32>(host, 4));
    fn compare<T: Half>(host: &Mutex<Host>, exact: &[f32]) {
        let ours = cell::<T>(host, 4);
        assert_eq!(ours, cell::<T>(host, 1));
        assert_close(T::NAME, &ours, exact, 6. * T::ROUNDING);
    }
    compare::<bf16>(host, &exact);
    compare::<f16>(host, &exact);
}

#[test]
fn columns_are_summed_copied_and_shifted() {
    let Some(host) = Host::new() else { return };
    let rows = 37u32;
    let x = random(rows as usize * 8, 1);
    for (columns, at_once) in [(5u32, 1), (8, 4)] {
        let (stretch, parts) = (10, 4);
        let mut sums = vec![f32::NAN; (parts * columns) as usize];
        let arguments =
            ColumnSums { x: at(&x), sums: sums.as_mut_ptr() as u64, rows, columns, stretch, parts };
        run(host, &COLUMNS, &format!("column_sums_float_{at_once}"), sums.len() / at_once, arguments);
        for (i, sum) in sums.iter().enumerate() {
            let (part, column) = (i as u32 / columns, i as u32 % columns);
            let rows = part * stretch..rows.min((part + 1) * stretch);
            let expected: f32 = rows.map(|row| x[(row * columns + column) as usize]).sum();
            assert_eq!(*sum, expected);
        }
    }

    let columns = 5;
    let x = random((rows * columns) as usize, 1);
    let (mut y, bias) = (x.clone(), random(columns as usize, 2));
    let arguments = AddBias { y: y.as_mut_ptr() as u64, bias: at(&bias), count: rows * columns, columns };
    run(host, &COLUMNS, "add_bias_float", y.len(), arguments);
    let expected: Vec<f32> = x.iter().enumerate().map(|(i, x)| x + bias[i % columns as usize]).collect();
    assert_eq!(y, expected);

    // Three channels of (2, 4 pixels, 5 channels), from the second on, to the last three of (4 pixels, 2
    // images, 4 channels).
    let mut to = [0f32; 2 * 4 * 4];
    let arguments = CopyColumns {
        from: Plane { at: at(&x[1..]), image: 20, pixel: 5 },
        to: Plane { at: to[1..].as_mut_ptr() as u64, image: 4, pixel: 8 },
        rows: 8,
        columns: 3,
        pixels: 4,
    };
    run(host, &COLUMNS, "copy_columns_float", 24, arguments);
    for (i, value) in to.iter().enumerate() {
        let (pixel, image, channel) = (i / 8, i / 4 % 2, i % 4);
        assert_eq!(*value, if channel == 0 { 0. } else { x[image * 20 + pixel * 5 + channel] });
    }
}

#[test]
fn weights_are_packed_as_convolutions_take_them() {
    let Some(host) = Host::new() else { return };
    // (4 * 2 outputs, 3 + 2 inputs, 3 taps): h, x, then zeros up to 8 channels; and for the first step x and
    // a zero.
    let (outputs, all, hidden, kernel, channels, first) = (8usize, 5usize, 2usize, 3usize, 8usize, 4usize);
    let mut weight = random(outputs * all * kernel, 1);
    let mut packed = vec![7f32; outputs * kernel * (channels + first)];
    let arguments = PackWeight {
        weight: weight.as_mut_ptr() as u64,
        packed: packed.as_mut_ptr() as u64,
        outputs: outputs as u32,
        all: all as u32,
        hidden: hidden as u32,
        kernel: kernel as u32,
        channels: channels as u32,
        first_channels: first as u32,
    };
    run(host, &COLUMNS, "pack_weight_float", packed.len(), arguments);
    let (of_all, of_first) = packed.split_at(outputs * kernel * channels);
    let rows = of_all.chunks(channels).zip(of_first.chunks(first));
    for (i, (of_all, of_first)) in rows.enumerate() {
        let of = |input: usize| weight[(i / kernel * all + input) * kernel + i % kernel];
        assert_eq!(of_all, [of(3), of(4), of(0), of(1), of(2), 0., 0., 0.], "{i}");
        assert_eq!(of_first, [of(0), of(1), of(2), 0.], "{i}");
    }
    // When unpacking, both places of x count.
    let before = std::mem::replace(&mut weight, vec![7f32; outputs * all * kernel]);
    let arguments = PackWeight { weight: weight.as_mut_ptr() as u64, ..arguments };
    run(host, &COLUMNS, "unpack_weight_float", weight.len(), arguments);
    for (i, (value, before)) in weight.iter().zip(&before).enumerate() {
        assert_eq!(*value, if i / kernel % all < all - hidden { 2. * before } else { *before }, "{i}");
    }
}

/// Three parameters: less than a block, several blocks, and exactly one.
const SIZES: [usize; 3] = [40, 10_000, 4096];

/// The tensors of a parameter, on the CPU and as vectors for the kernels, and the copies of its value.
struct Copied<const N: usize> {
    cpu: [Tensor; N],
    own: [Vec<f32>; N],
    cpu_copy: Tensor,
    own_copy: Vec<bf16>,
}

fn copied<const N: usize>(own: [Vec<f32>; N]) -> Copied<N> {
    let cpu = own.clone().map(|values| Tensor::new(values, &Device::Cpu).unwrap());
    let own_copy = vec![bf16::from_f32(7.); own[0].len()];
    let cpu_copy = Tensor::from_slice(&own_copy, own_copy.len(), &Device::Cpu).unwrap();
    Copied { cpu, own, cpu_copy, own_copy }
}

fn assert_same<const N: usize>(params: &[Copied<N>]) {
    for Copied { cpu, own, cpu_copy, own_copy } in params {
        for (ours, cpu) in own.iter().zip(cpu) {
            assert_eq!(ours, &cpu.to_vec1::<f32>().unwrap());
        }
        assert_eq!(own_copy, &cpu_copy.to_vec1::<bf16>().unwrap());
    }
}

/// The decision on gradients with this norm, in the kernels' layout.
fn decided(clipping: &Clipping, norm: f64) -> [f32; 4] {
    let share = clipping.decide_by(norm).scale.on_cpu().unwrap();
    share.map_or([7., 7., 7., 1.], |share| [norm as f32, share.factor, share.max_value, 0.])
}

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

/// Updates parameters by a rule that stores the states in `kept`, under every kind of clipping.
fn moves_as_on_the_cpu<R: Rule>(host: &Mutex<Host>, rule: R, kept: [bool; MOST_STATES]) {
    let plain = Clipping::default();
    let clipped = Clipping { loss_scale: 4., max_norm: Some(1.), max_value: Some(0.06), only_finite: true };
    // Gradients are up to 2: a factor of 1 / 40 leaves them at 0.05, one of 1 / 20 does not.
    let clippings = [(plain, 1.), (clipped, 10.), (clipped, 5.), (clipped, f64::NAN), (clipped, 0.5)];
    let mut placed = Placed::on(&Device::Cpu).unwrap();
    placed.set(rule).unwrap();
    for (with_copy, (clipping, norm)) in [false, true].into_iter().flat_map(|x| clippings.map(|y| (x, y))) {
        let mut params = SIZES.map(|n| {
            let mut own = [random(n, 1), random(n, 2), random(n, 3), random(n, 4), random(n, 5)];
            // Mean squares are above zero, and above the squares of means.
            own[2].iter_mut().for_each(|x| *x = x.abs() + 4.);
            own[3].iter_mut().for_each(|x| *x = x.abs());
            copied(own)
        });
        let of_cpu = params.each_ref().map(|Copied { cpu, cpu_copy, .. }| {
            let [param, gradient, a, b, c] = cpu;
            let those = [(kept[0], a), (kept[1], b), (kept[2], c)].map(|(is_kept, x)| is_kept.then_some(x));
            UpdateParam { param, copy: with_copy.then_some(cpu_copy), gradient, kept: those }
        });
        placed.apply(&of_cpu, &clipping.decide_by(norm).scale).unwrap();
        let tensors = params.each_mut().map(|Copied { own, own_copy, .. }| {
            let [param, gradient, a, b, c] = own.each_mut().map(|values| values.as_mut_ptr() as u64);
            let copy = own_copy.as_mut_ptr() as u64 * u64::from(with_copy);
            let those = [(kept[0], a), (kept[1], b), (kept[2], c)].map(|(is_kept, x)| x * u64::from(is_kept));
            (ParamAt { param, gradient, kept: those, copy }, own[0].len())
        });
        let kernel = format!("{}_{}", R::NAME, if with_copy { "bf16" } else { "float" });
        let (step, decided) = (rule.numbers(), decided(&clipping, norm));
        let arguments = Update { tensors: Many::new(&tensors), step: at(&step), decided: at(&decided) };
        run(host, &OPTIMIZER, &kernel, arguments.tensors.blocks() * Host::THREADS, arguments);
        assert_same(&params);
        let moved = params[0].own[0] != random(SIZES[0], 1);
        assert_eq!(moved, norm.is_finite());
    }
}

#[test]
fn parameters_move_as_on_the_cpu() {
    let Some(host) = Host::new() else { return };
    for amsgrad in [false, true] {
        moves_as_on_the_cpu(host, ADAM, [true, true, amsgrad]);
    }
    for (momentum, nesterov) in [(0., false), (0.9, false), (0.9, true)] {
        let sgd = SgdStep { lr: 0.1, momentum, entering: 0.7, l2: 0.05, nesterov };
        moves_as_on_the_cpu(host, sgd, [momentum > 0., false, false]);
    }
    for (momentum, centered) in [(0., false), (0.9, false), (0., true), (0.9, true)] {
        let rmsprop = RmspropStep {
            lr: 0.1,
            alpha: 0.9,
            one_minus_alpha: 0.1,
            eps: 1e-3,
            momentum,
            l2: 0.05,
            centered,
        };
        moves_as_on_the_cpu(host, rmsprop, [true, momentum > 0., centered]);
    }
    moves_as_on_the_cpu(host, AdagradStep { lr: 0.1, eps: 1e-3, l2: 0.05 }, [true, false, false]);
    let adadelta = AdadeltaStep { lr: 0.5, rho: 0.9, one_minus_rho: 0.1, eps: 1e-3, l2: 0.05 };
    moves_as_on_the_cpu(host, adadelta, [true, true, false]);
    let adamax = AdamaxStep { one_minus_beta1: 0.1, beta2: 0.3, eps: 1e-3, of_moment: 0.1, l2: 0.05 };
    moves_as_on_the_cpu(host, adamax, [true, true, false]);
}

#[test]
fn tensors_approach_others_as_on_the_cpu() {
    let Some(host) = Host::new() else { return };
    let mut params = SIZES.map(|n| copied([random(n, 6), random(n, 7)]));
    approach(&params.each_ref().map(|Copied { cpu: [x, target], .. }| (x, target)), 0.25).unwrap();
    let tensors = params.each_mut().map(|Copied { own, .. }| {
        let [x, target] = own.each_mut().map(|values| values.as_mut_ptr() as u64);
        (ApproachAt { x, target }, own[0].len())
    });
    let arguments = Approach { tensors: Many::new(&tensors), share: 0.25 };
    run(host, &OPTIMIZER, "approach", arguments.tensors.blocks() * Host::THREADS, arguments);
    assert_same(&params);
}

#[test]
fn gradients_count_as_on_the_cpu() {
    let Some(host) = Host::new() else { return };
    let clipping = Clipping { loss_scale: 4., max_norm: Some(1.), max_value: Some(0.06), only_finite: false };
    for norm in [0.5, 5., f64::NAN] {
        let scale = clipping.decide_by(norm).scale;
        let gradients = SIZES.map(|n| {
            let mut x = random(n, 1);
            x[n / 2] = f32::NAN;
            x
        });
        let mut to = SIZES.map(|n| vec![7f32; n]);
        let tensors: Vec<_> = gradients
            .iter()
            .zip(&mut to)
            .map(|(x, to)| (CountedAt { gradient: at(x), to: to.as_mut_ptr() as u64 }, x.len()))
            .collect();
        let decided = decided(&clipping, norm);
        let arguments = Counted { tensors: Many::new(&tensors), decided: at(&decided) };
        run(host, &OPTIMIZER, "counted", arguments.tensors.blocks() * Host::THREADS, arguments);
        let gradients = gradients.map(|x| Tensor::new(x, &Device::Cpu).unwrap());
        for (ours, cpu) in to.iter().zip(scale.apply(&gradients).unwrap()) {
            let bits = |x: &f32| if x.is_nan() { f32::NAN.to_bits() } else { x.to_bits() };
            let cpu = cpu.to_vec1::<f32>().unwrap();
            assert!(ours.iter().map(bits).eq(cpu.iter().map(bits)), "{norm}");
            assert!(ours[ours.len() / 2].is_nan());
        }
    }
}

#[test]
fn copies_are_given_their_masters_values() {
    let Some(host) = Host::new() else { return };
    fn publish<T: Half>(host: &Mutex<Host>) {
        let masters = SIZES.map(|n| random(n, 1));
        let mut copies = SIZES.map(|n| vec![T::new(7.); n]);
        let tensors: Vec<_> = masters
            .iter()
            .zip(&mut copies)
            .map(|(x, to)| (PublishAt { master: at(x), copy: to.as_mut_ptr() as u64 }, x.len()))
            .collect();
        let arguments = Many::new(&tensors);
        let kernel = format!("publish_{}", T::NAME);
        run(host, &OPTIMIZER, &kernel, arguments.blocks() * Host::THREADS, arguments);
        for (copy, master) in copies.iter().zip(&masters) {
            let expected: Vec<f32> = master.iter().map(|x| T::new(*x).wide()).collect();
            assert_eq!(wide(copy), expected);
        }
    }
    publish::<bf16>(host);
    publish::<f16>(host);
}

#[test]
fn a_step_is_decided_on_as_on_the_cpu() {
    let Some(host) = Host::new() else { return };
    for sums in [[9., 16.], [1e-40, 0.], [f64::INFINITY, 1.], [f64::NAN, 1.], [1e80, 0.]] {
        for (max_norm, max_value, only_finite) in [
            (None, None, false),
            (None, None, true),
            (Some(0.5), None, true),
            (Some(0.5), Some(0.1), false),
            (Some(100.), Some(0.1), true),
        ] {
            let clipping = Clipping { loss_scale: 2., max_norm, max_value, only_finite };
            let mut ours = [7f32; 4];
            let arguments = Decide {
                sums: at(&sums),
                decided: ours.as_mut_ptr() as u64,
                loss_scale: 2.,
                max_norm: max_norm.unwrap_or(f64::INFINITY),
                max_value: max_value.map_or(f32::INFINITY, |value| value as f32),
                count: 2,
                only_finite: u32::from(only_finite),
            };
            run(host, &OPTIMIZER, "decide", 1, arguments);
            // A norm that is finite only in 64 bits is too large as well.
            let of_host = (sums[0] + sums[1]).sqrt() / 2.;
            let refused = only_finite && !(of_host as f32).is_finite();
            let share =
                Clipping { only_finite: false, ..clipping }.decide_by(of_host).scale.on_cpu().unwrap();
            let Some(Share { factor, max_value }) = share else { panic!("nothing refuses it") };
            let expected = [of_host as f32, factor, max_value, f32::from(u8::from(refused))];
            let bits = |x: [f32; 4]| x.map(|x| if x.is_nan() { f32::NAN.to_bits() } else { x.to_bits() });
            assert_eq!(bits(ours), bits(expected), "{sums:?} {clipping:?}: {ours:?} {expected:?}");
        }
    }
}

#[test]
fn squares_are_summed_in_64_bits() {
    let Some(host) = Host::new() else { return };
    // Values of very different magnitudes, whose squares do not fit into 32 bits.
    let x: Vec<f32> =
        random(1000, 1).iter().enumerate().map(|(i, x)| x * 10f32.powi(i as i32 % 40 - 20)).collect();
    let tensors = Many::new(&[&x[..300], &x[300..]].map(|some| (at(some), some.len())));
    let parts = tensors.blocks() * Host::THREADS;
    let (mut sums, mut total) = (vec![f64::NAN; parts], vec![f64::NAN; 1]);
    let arguments = SquareSums { tensors, sums: sums.as_mut_ptr() as u64 };
    run(host, &OPTIMIZER, "square_sums", parts, arguments);
    let parts = parts as u32;
    let arguments = Sums { x: at(&sums), sums: total.as_mut_ptr() as u64, count: parts, parts: 1 };
    run(host, &OPTIMIZER, "sums", 1, arguments);
    let expected: f64 = x.iter().map(|x| f64::from(*x).powi(2)).sum();
    assert!((total[0] / expected - 1.).abs() < 1e-12, "{} {expected}", total[0]);
}

#[test]
fn winograds_transforms_and_products_between_them_are_convolutions() {
    let Some(host) = Host::new() else { return };
    const POSITIONS: usize = 36;
    let (images, height, width, inputs, outputs, padding) = (2, 5, 9, 3, 2, 1);
    // As many outputs as pixels, in tiles of 4x4.
    let (down, across) = (2, 3);
    let (tiles, pixels) = (images * down * across, images * height * width);
    let (x, w, dy) =
        (random(pixels * inputs, 1), random(outputs * 9 * inputs, 2), random(pixels * outputs, 3));
    let transform = |kernel: &str, images: &[f32], transformed: &[f32], channels: usize, padding: u32| {
        let count = (tiles * channels) as u32;
        let [height, width, channels, down, across] =
            [height, width, channels, down, across].map(|n| n as u32);
        let (images, transformed) = (at(images), at(transformed));
        let arguments = Tiles { images, transformed, count, height, width, channels, down, across, padding };
        run(host, &WINOGRAD, kernel, count as usize, arguments);
    };
    let filters = |kernel: &str, weight: &[f32], transformed: &[f32], turned: bool| {
        let (weight, transformed) = (at(weight), at(transformed));
        let (outputs, inputs) = (outputs as u32, inputs as u32);
        let arguments = Filters { weight, transformed, outputs, inputs, turned: turned.into() };
        run(host, &WINOGRAD, kernel, (outputs * inputs) as usize, arguments);
    };
    // Calls `product` with the indices into x, w and y for each product of the direct convolution.
    let products = |turned: bool, product: &mut dyn FnMut(usize, usize, usize)| {
        for (pixel, tap) in (0..pixels).flat_map(|pixel| (0..9).map(move |tap| (pixel, tap))) {
            let (row, column) = (pixel / width % height + tap / 3, pixel % width + tap % 3);
            if (padding..height + padding).contains(&row) && (padding..width + padding).contains(&column) {
                let of = pixel / (height * width) * height + row - padding;
                let (of, tap) = (of * width + column - padding, if turned { 8 - tap } else { tap });
                for (o, i) in (0..outputs).flat_map(|o| (0..inputs).map(move |i| (o, i))) {
                    product(of * inputs + i, (o * 9 + tap) * inputs + i, pixel * outputs + o);
                }
            }
        }
    };
    let of_x = vec![f32::NAN; POSITIONS * tiles * inputs];
    let mut of_y = vec![f32::NAN; POSITIONS * tiles * outputs];
    let mut of_w = vec![f32::NAN; POSITIONS * outputs * inputs];
    transform("winograd_input", &x, &of_x, inputs, padding as u32);
    for turned in [false, true] {
        filters("winograd_filter", &w, &of_w, turned);
        of_y.fill(0.);
        for (to, at) in of_y.iter_mut().zip(0..) {
            let (position, tile, o) = (at / outputs / tiles, at / outputs % tiles, at % outputs);
            let x = &of_x[(position * tiles + tile) * inputs..][..inputs];
            let w = &of_w[(position * outputs + o) * inputs..][..inputs];
            *to = x.iter().zip(w).map(|(x, w)| x * w).sum();
        }
        let (y, mut expected) = (vec![f32::NAN; pixels * outputs], vec![0.; pixels * outputs]);
        transform("winograd_output", &y, &of_y, outputs, 0);
        products(turned, &mut |i, j, k| expected[k] += x[i] * w[j]);
        assert_close("output", &y, &expected, 1e-4);
    }
    transform("winograd_output_adjoint", &dy, &of_y, outputs, 0);
    for (to, at) in of_w.iter_mut().zip(0..) {
        let (position, o, i) = (at / inputs / outputs, at / inputs % outputs, at % inputs);
        let tile = |tile| {
            of_y[(position * tiles + tile) * outputs + o] * of_x[(position * tiles + tile) * inputs + i]
        };
        *to = (0..tiles).map(tile).sum();
    }
    let (dw, mut expected) = (vec![f32::NAN; w.len()], vec![0.; w.len()]);
    filters("winograd_filter_adjoint", &dw, &of_w, false);
    products(false, &mut |i, j, k| expected[j] += x[i] * dy[k]);
    assert_close("weight's gradient", &dw, &expected, 1e-4);
}

#[test]
fn activations_are_those_of_the_cpu() {
    fn compare<T: Half>(host: &Mutex<Host>, name: &str, activation: Activation, at_once: usize) {
        let narrow = |x: Vec<f32>| -> Vec<T> { x.into_iter().map(|x| T::new(3. * x)).collect() };
        let (x, d, to) = (narrow(random(52, 1)), narrow(random(52, 2)), narrow(vec![f32::NAN; 52]));
        let var = candle_core::Var::new(wide(&x), &Device::Cpu).unwrap();
        let y = activate(&var, activation).unwrap();
        let dy = Tensor::new(wide(&d), &Device::Cpu).unwrap();
        let dx = (&y * dy).unwrap().sum_all().unwrap().backward().unwrap().remove(&var).unwrap();
        let slope = if let Activation::LeakyRelu(slope) = activation { slope } else { f32::NAN };
        for (expected, d) in [(y, 0), (dx, at(&d))] {
            let arguments = Pointwise { x: at(&x), d, to: at(&to), slope, count: x.len() as u32 };
            let kernel = format!("{name}_{}_{at_once}", T::NAME);
            run(host, &POINTWISE, &kernel, x.len() / at_once, arguments);
            assert_close(&kernel, &wide(&to), &expected.to_vec1::<f32>().unwrap(), T::ROUNDING);
        }
    }
    let Some(host) = Host::new() else { return };
    for (name, activation) in
        [("silu", Activation::Silu), ("gelu", Activation::Gelu), ("leaky_relu", Activation::LeakyRelu(0.2))]
    {
        for at_once in [1, 4] {
            compare::<f32>(host, name, activation, at_once);
            compare::<bf16>(host, name, activation, at_once);
            compare::<f16>(host, name, activation, at_once);
        }
    }
}
