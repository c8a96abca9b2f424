//! `conv_transpose2d` against f64: it is the gradient of a convolution, and its own gradients are a
//! convolution and that convolution's weight gradient.
#![allow(clippy::unwrap_used)]

mod common;

use candle_core::{DType, Device, Tensor};
use candlepower_kernels::{Conv2dOptions, ConvTranspose2dOptions, conv_transpose2d};
use common::*;
use proptest::prelude::*;

fn check(
    x: [usize; 4],
    outputs: usize,
    kernel: (usize, usize),
    o: ConvTranspose2dOptions,
    bias: bool,
    seed: u64,
) {
    let what = format!("x {x:?}, {outputs} outputs, kernel {kernel:?}, {o:?}, bias {bias}");
    let [batch, h, w, inputs] = x;
    let x = var(&random(&x, seed));
    let weight = var(&random(&[inputs, outputs / o.groups, kernel.0, kernel.1], seed + 1));
    let b = var(&random(&[outputs], seed + 2));
    let y = conv_transpose2d(&x, &weight, bias.then_some(b.as_tensor()), o).unwrap();

    let size =
        |n: usize, k: usize| (n - 1) * o.stride + o.dilation * (k - 1) + o.output_padding + 1 - 2 * o.padding;
    let (out_h, out_w) = (size(h, kernel.0), size(w, kernel.1));
    let (x64, w64, b64) = (double(&x), double(&weight), double(&b));
    let options =
        Conv2dOptions { stride: o.stride, padding: o.padding, dilation: o.dilation, groups: o.groups };
    // The convolution from the op's output to its input; it has extra rows if output_padding exceeds the
    // stride.
    let conv = |z: &Tensor, weight: &Tensor| -> Tensor {
        let y = common::conv2d(z, weight, None, options).unwrap();
        y.narrow(1, 0, h).unwrap().narrow(2, 0, w).unwrap()
    };
    let z = double(&Tensor::zeros((batch, out_h, out_w, outputs), DType::F64, &Device::Cpu).unwrap());
    let adjoint = (conv(&z, &w64) * x64.as_tensor()).unwrap().sum_all().unwrap().backward().unwrap();
    let mut wanted = grad(&adjoint, &z);
    if bias {
        wanted = wanted.broadcast_add(&b64).unwrap();
    }
    assert_close(&format!("output, {what}"), &y, &wanted);

    let grads = loss(&y, seed + 3).backward().unwrap();
    let dy = double(&random(y.dims(), seed + 3));
    assert_close(&format!("dx, {what}"), &grad(&grads, &x), &conv(&dy, &w64));
    let adjoint = (conv(&dy, &w64) * x64.as_tensor()).unwrap().sum_all().unwrap().backward().unwrap();
    assert_close(&format!("dw, {what}"), &grad(&grads, &weight), &grad(&adjoint, &w64));
    if bias {
        let wanted = dy.sum((0, 1, 2)).unwrap();
        assert_close(&format!("db, {what}"), &grad(&grads, &b), &wanted);
    }
}

#[test]
fn usual_upsampling_at_each_level() {
    at_each_level(|_| {
        let two = ConvTranspose2dOptions { stride: 2, padding: 1, ..Default::default() };
        check([2, 5, 7, 20], 17, (4, 4), two, true, 1);
        check([1, 8, 9, 32], 3, (3, 3), ConvTranspose2dOptions { output_padding: 1, ..two }, true, 2);
        // No input writes the last row and column of the output.
        let beyond =
            ConvTranspose2dOptions { output_padding: 1, dilation: 2, groups: 2, ..Default::default() };
        check([1, 1, 2, 4], 6, (1, 1), beyond, true, 4);
        // One pixel per image, with a stride that has no effect.
        let strided = ConvTranspose2dOptions { stride: 2, ..Default::default() };
        check([3, 1, 1, 4], 6, (1, 1), strided, true, 5);
        check(
            [2, 9, 10, 40],
            24,
            (3, 3),
            ConvTranspose2dOptions { padding: 1, ..Default::default() },
            true,
            3,
        );
    });
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, max_global_rejects: 100_000, failure_persistence: None, ..Default::default() })]
    #[test]
    fn any_options(
        batch in 1..3usize, h in 1..9usize, w in 1..9usize, gi in 1..20usize, go in 1..20usize, groups in 1..4usize,
        kh in 1..6usize, kw in 1..6usize, stride in 1..4usize, padding in 0..3usize, dilation in 1..3usize,
        output_padding in 0..3usize, bias: bool, seed: u64,
    ) {
        prop_assume!(output_padding < stride.max(dilation));
        let room = |n: usize, k: usize| (n - 1) * stride + dilation * (k - 1) + output_padding + 1 > 2 * padding;
        prop_assume!(room(h, kh) && room(w, kw));
        let o = ConvTranspose2dOptions { stride, padding, output_padding, dilation, groups };
        check([batch, h, w, gi * groups], go * groups, (kh, kw), o, bias, seed >> 8);
    }
}

#[test]
fn errors_name_what_does_not_fit() {
    let (x, w) = (random(&[1, 5, 5, 4], 1), random(&[3, 4, 3, 3], 2));
    let message = |w: &Tensor, o| conv_transpose2d(&x, w, None, o).unwrap_err().to_string();
    let o = ConvTranspose2dOptions::default();
    assert!(message(&w, o).contains("channels do not fit: x is [1, 5, 5, 4], weight is [3, 4, 3, 3]"));
    let w = random(&[4, 4, 3, 3], 2);
    assert!(message(&w, ConvTranspose2dOptions { output_padding: 1, ..o }).contains("less than the stride"));
    assert!(message(&w, ConvTranspose2dOptions { padding: 4, ..o }).contains("leaves no output"));
}
