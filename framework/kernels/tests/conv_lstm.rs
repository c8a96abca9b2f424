//! `conv_lstm` and `conv_lstm_cell` against f64, forward and backward.
#![allow(clippy::unwrap_used)]

mod common;

use candle_core::{DType, Tensor, Var};
use candlepower_kernels::{ConvLstmInput, ConvLstmLayer, Keep, conv_lstm, conv_lstm_cell};
use common::*;
use proptest::prelude::*;

#[derive(Clone, Copy, Debug)]
struct Case<'a> {
    batch: usize,
    steps: usize,
    size: (usize, usize),
    inputs: usize,
    hidden: &'a [usize],
    kernel: usize,
    feedback: bool,
    keep: Keep,
}

const CASE: Case = Case {
    batch: 2,
    steps: 3,
    size: (6, 7),
    inputs: 2,
    hidden: &[16, 16],
    kernel: 3,
    feedback: false,
    keep: Keep::All,
};

struct Model {
    x: Var,
    layers: Vec<(Var, Var)>,
}

impl Case<'_> {
    fn model(&self, seed: u64) -> Model {
        let (h, w) = self.size;
        let x = match self.feedback {
            true => random(&[self.batch, h, w, self.inputs], seed),
            false => random(&[self.batch, self.steps, h, w, self.inputs], seed),
        };
        let mut inputs = self.inputs;
        let mut layers = Vec::new();
        for (l, &n) in self.hidden.iter().enumerate() {
            let scale = 2. / ((inputs + n) as f64).sqrt() / self.kernel as f64;
            let w = random(&[4 * n, inputs + n, self.kernel, self.kernel], seed + 10 * l as u64 + 1);
            let b = random(&[4 * n], seed + 10 * l as u64 + 2);
            layers.push((var(&(w * scale).unwrap()), var(&b)));
            inputs = n;
        }
        Model { x: var(&x), layers }
    }

    fn run(&self, m: &Model) -> candle_core::Result<Tensor> {
        let layers: Vec<ConvLstmLayer> =
            m.layers.iter().map(|(weight, bias)| ConvLstmLayer { weight, bias }).collect();
        let input = match self.feedback {
            true => ConvLstmInput::Feedback { first: &m.x, steps: self.steps },
            false => ConvLstmInput::Frames(&m.x),
        };
        conv_lstm(input, &layers, self.keep)
    }

    /// Compares output and all gradients with the reference.
    fn check(&self, seed: u64) {
        let m = self.model(seed);
        let m64 =
            Model { x: double(&m.x), layers: m.layers.iter().map(|(w, b)| (double(w), double(b))).collect() };
        let layers: Vec<(Tensor, Tensor)> =
            m64.layers.iter().map(|(w, b)| (w.as_tensor().clone(), b.as_tensor().clone())).collect();
        let all = common::conv_lstm(&m64.x, self.steps, &layers).unwrap();
        let wanted = match self.keep {
            Keep::All => all,
            Keep::Last => all.narrow(1, self.steps - 1, 1).unwrap().squeeze(1).unwrap(),
        };
        let got = self.run(&m).unwrap();
        assert_close(&format!("output, {self:?}"), &got, &wanted);
        let wanted = loss(&wanted, seed + 3).backward().unwrap();
        let got = loss(&got, seed + 3).backward().unwrap();
        assert_close(&format!("dx, {self:?}"), &grad(&got, &m.x), &grad(&wanted, &m64.x));
        for (l, ((w, b), (w64, b64))) in m.layers.iter().zip(&m64.layers).enumerate() {
            assert_close(&format!("dw of layer {l}, {self:?}"), &grad(&got, w), &grad(&wanted, w64));
            assert_close(&format!("db of layer {l}, {self:?}"), &grad(&got, b), &grad(&wanted, b64));
        }
    }
}

#[test]
fn the_tutorials_two_halves_at_each_level() {
    at_each_level(|_| {
        Case { inputs: 1, keep: Keep::Last, ..CASE }.check(1);
        Case { inputs: 16, feedback: true, ..CASE }.check(2);
        Case { inputs: 17, hidden: &[17], kernel: 5, feedback: true, ..CASE }.check(3);
    });
}

#[test]
fn images_of_several_chunks() {
    Case { batch: 3, steps: 2, size: (34, 41), inputs: 20, hidden: &[20], ..CASE }.check(1);
}

/// Checks a half type: the f32 op's output, rounded, and its gradients within the rounding of the saved
/// tensors.
fn check_half(case: &Case, dtype: DType, tolerance: f64) {
    let m = case.model(1);
    let (x, x32) = rounded(&m.x, dtype);
    let (layers, layers32) = m
        .layers
        .iter()
        .map(|(w, b)| {
            let ((w, w32), (b, b32)) = (rounded(w, dtype), rounded(b, dtype));
            ((w, b), (w32, b32))
        })
        .unzip();
    let (half, wide) = (Model { x, layers }, Model { x: x32, layers: layers32 });
    let (got, wanted) = (case.run(&half).unwrap(), case.run(&wide).unwrap());
    assert_eq!(got.dtype(), dtype);
    assert_rounded(&format!("output, {case:?}, {dtype:?}"), &got, &wanted);
    let inference = candlepower_kernels::no_grad(|| case.run(&half).unwrap());
    assert_rounded(&format!("output without gradients, {case:?}, {dtype:?}"), &inference, &wanted);
    let got = rounded_loss(&got, 3, dtype).backward().unwrap();
    let wanted = rounded_loss(&wanted, 3, dtype).backward().unwrap();
    let mut pairs = vec![(&half.x, &wide.x)];
    for ((w, b), (w32, b32)) in half.layers.iter().zip(&wide.layers) {
        pairs.extend([(w, w32), (b, b32)]);
    }
    for (i, (half, wide)) in pairs.into_iter().enumerate() {
        let gradient = grad(&got, half);
        assert_eq!(gradient.dtype(), dtype);
        let e = error(&gradient, &grad(&wanted, wide));
        assert!(e <= tolerance, "gradient {i}, {case:?}, {dtype:?}: off by {e:.2e} of the largest value");
    }
}

#[test]
fn half_types_at_each_level() {
    at_each_level(|_| {
        // Two or three units in the last place.
        for (dtype, tolerance) in [(DType::BF16, 1e-2), (DType::F16, 1.5e-3)] {
            for (feedback, keep) in
                [(false, Keep::Last), (false, Keep::All), (true, Keep::Last), (true, Keep::All)]
            {
                let case = Case { inputs: 17, hidden: &[20, 17], steps: 4, feedback, keep, ..CASE };
                for kernel in [1, 3, 5] {
                    check_half(&Case { kernel, ..case }, dtype, tolerance);
                }
                check_half(&Case { inputs: 16, hidden: &[16], steps: 1, ..case }, dtype, tolerance);
            }
        }
    });
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 80, max_global_rejects: 100_000, failure_persistence: None, ..Default::default() })]
    #[test]
    fn any_sizes(
        batch in 1..3usize, steps in 1..5usize, h in 1..10usize, w in 1..10usize, inputs in 1..19usize,
        hidden in prop::collection::vec(1..20usize, 1..4), kernel in 0..4usize, feedback: bool, last: bool, seed: u64,
    ) {
        let mut hidden = hidden;
        if feedback {
            hidden.pop();
            hidden.push(inputs);
        }
        let keep = if last { Keep::Last } else { Keep::All };
        // 3x3 is twice as likely.
        let kernel = [3, 1, 3, 5][kernel];
        Case { batch, steps, size: (h, w), inputs, hidden: &hidden, kernel, feedback, keep }.check(seed >> 8);
    }

    #[test]
    fn the_cell_alone(pixels in 1..300usize, hidden in 1..40usize, seed in 0..1000u64) {
        let gates = var(&(random(&[2, pixels, 4 * hidden], seed) * 4.).unwrap());
        let c = var(&random(&[2, pixels, hidden], seed + 1));
        let (gates64, c64) = (double(&gates), double(&c));
        let (h, c_after) = conv_lstm_cell(&gates, &c).unwrap();
        let (h64, c_after64) = cell(&gates64, &c64).unwrap();
        assert_close("h", &h, &h64);
        assert_close("c", &c_after, &c_after64);
        let total = |h: &Tensor, c: &Tensor| (loss(h, 5).unwrap_add(&loss(c, 6))).backward().unwrap();
        let (got, wanted) = (total(&h, &c_after), total(&h64, &c_after64));
        assert_close("d gates", &grad(&got, &gates), &grad(&wanted, &gates64));
        assert_close("dc", &grad(&got, &c), &grad(&wanted, &c64));
    }
}

trait UnwrapAdd {
    fn unwrap_add(&self, other: &Tensor) -> Tensor;
}
impl UnwrapAdd for Tensor {
    fn unwrap_add(&self, other: &Tensor) -> Tensor {
        (self + other).unwrap()
    }
}

#[test]
fn views_give_the_same_as_copies() {
    let m = CASE.model(1);
    let copied = CASE.run(&m).unwrap();
    // (B, T, C, H, W) in memory, as in datasets.
    let x =
        m.x.permute((0, 1, 4, 2, 3)).unwrap().force_contiguous().unwrap().permute((0, 1, 3, 4, 2)).unwrap();
    let viewed = Model { x: var(&x), layers: m.layers };
    let layers: Vec<ConvLstmLayer> =
        viewed.layers.iter().map(|(weight, bias)| ConvLstmLayer { weight, bias }).collect();
    let got = conv_lstm(ConvLstmInput::Frames(&x), &layers, CASE.keep).unwrap();
    assert_eq!(bits(&got), bits(&copied));
}

#[test]
fn the_same_bits_on_any_threads() {
    for (kernel, feedback) in [(3, false), (3, true), (5, false)] {
        let case = Case { size: (30, 33), inputs: 18, hidden: &[17, 18], kernel, feedback, ..CASE };
        same_bits_on_any_threads(|| {
            let m = case.model(1);
            let y = case.run(&m).unwrap();
            let grads = loss(&y, 2).backward().unwrap();
            let mut all = vec![y, grad(&grads, &m.x)];
            for (w, b) in &m.layers {
                all.extend([grad(&grads, w), grad(&grads, b)]);
            }
            all
        });
    }
}

#[test]
fn inference_gives_the_same_bits_and_no_graph() {
    for keep in [Keep::All, Keep::Last] {
        for feedback in [false, true] {
            let case = Case { inputs: 16, steps: 4, keep, feedback, ..CASE };
            let m = case.model(1);
            let y = candlepower_kernels::no_grad(|| case.run(&m).unwrap());
            assert!(!y.track_op());
            assert_eq!(bits(&y), bits(&case.run(&m).unwrap()));
        }
    }
}

#[test]
fn gradients_only_where_tracked() {
    let m = CASE.model(1);
    let layers: Vec<(Tensor, Tensor)> = m.layers.iter().map(|(w, b)| (w.detach(), b.detach())).collect();
    let layers: Vec<ConvLstmLayer> =
        layers.iter().map(|(weight, bias)| ConvLstmLayer { weight, bias }).collect();
    let y = conv_lstm(ConvLstmInput::Frames(&m.x), &layers, Keep::All).unwrap();
    let grads = loss(&y, 1).backward().unwrap();
    let all = loss(&CASE.run(&m).unwrap(), 1).backward().unwrap();
    assert_eq!(bits(&grad(&grads, &m.x)), bits(&grad(&all, &m.x)));
    let x = m.x.detach();
    let m = Model { x: var(&x), layers: m.layers };
    let layers: Vec<ConvLstmLayer> =
        m.layers.iter().map(|(weight, bias)| ConvLstmLayer { weight, bias }).collect();
    let y = conv_lstm(ConvLstmInput::Frames(&x), &layers, Keep::All).unwrap();
    let grads = loss(&y, 1).backward().unwrap();
    assert_eq!(bits(&grad(&grads, &m.layers[0].0)), bits(&grad(&all, &m.layers[0].0)));
}

#[test]
fn a_second_backward_is_an_error_that_says_so() {
    let m = CASE.model(1);
    let y = CASE.run(&m).unwrap();
    let loss = loss(&y, 1);
    loss.backward().unwrap();
    let text = loss.backward().unwrap_err().to_string();
    assert!(text.contains("conv_lstm: backward ran before on this result"), "{text}");
}

#[test]
fn errors_name_what_does_not_fit() {
    let message = |input: ConvLstmInput, w: &[usize], b: &[usize]| {
        let (weight, bias) = (random(w, 1), random(b, 2));
        let text = conv_lstm(input, &[ConvLstmLayer { weight: &weight, bias: &bias }], Keep::All)
            .unwrap_err()
            .to_string();
        text.lines().next().unwrap_or_default().to_string()
    };
    let frames = random(&[1, 2, 5, 5, 3], 3);
    let input = ConvLstmInput::Frames(&frames);
    assert_eq!(
        message(input, &[32, 10, 3, 3], &[32]),
        "conv_lstm: weight of layer 0 must be (4 N, 3 + N, k, k) for 3 input channels, got [32, 10, 3, 3]"
    );
    assert!(message(input, &[32, 11, 2, 2], &[32]).contains("square kernel of odd size, got [32, 11, 2, 2]"));
    assert!(message(input, &[32, 11, 3, 3], &[31]).contains("bias of layer 0 must be (32)"));
    let first = random(&[1, 5, 5, 3], 3);
    let input = ConvLstmInput::Feedback { first: &first, steps: 2 };
    assert!(message(input, &[32, 11, 3, 3], &[32]).contains("fed back"));
    assert!(
        message(ConvLstmInput::Feedback { first: &first, steps: 0 }, &[12, 6, 3, 3], &[12])
            .contains("one step")
    );
    assert!(message(ConvLstmInput::Frames(&first), &[12, 6, 3, 3], &[12]).contains("frames must be"));
    let (gates, c) = (random(&[2, 8], 1), random(&[2, 3], 1));
    let text = conv_lstm_cell(&gates, &c).unwrap_err().to_string();
    assert!(text.contains("got [2, 8] and [2, 3]"), "{text}");
}
