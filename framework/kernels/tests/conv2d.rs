//! `conv2d` against f64, forward and backward.
#![allow(clippy::unwrap_used)]

mod common;

use candle_core::{DType, Tensor};
use candlepower_kernels::{Conv2dOptions, conv2d, conv2d_backward};
use common::*;
use proptest::prelude::*;

/// Compares output and all gradients with the reference.
fn check(x: &[usize; 4], outputs: usize, kernel: (usize, usize), o: Conv2dOptions, bias: bool, seed: u64) {
    let what = format!("x {x:?}, {outputs} outputs, kernel {kernel:?}, {o:?}, bias {bias}");
    let x = var(&random(x, seed));
    let w = var(&random(&[outputs, x.dims()[3] / o.groups, kernel.0, kernel.1], seed + 1));
    let b = var(&random(&[outputs], seed + 2));
    let (x64, w64, b64) = (double(&x), double(&w), double(&b));
    let wanted = common::conv2d(&x64, &w64, bias.then_some(b64.as_tensor()), o).unwrap();
    let got = conv2d(&x, &w, bias.then_some(b.as_tensor()), o).unwrap();
    assert_close(&format!("output, {what}"), &got, &wanted);
    let wanted = loss(&wanted, seed + 3).backward().unwrap();
    let got = loss(&got, seed + 3).backward().unwrap();
    assert_close(&format!("dx, {what}"), &grad(&got, &x), &grad(&wanted, &x64));
    assert_close(&format!("dw, {what}"), &grad(&got, &w), &grad(&wanted, &w64));
    if bias {
        assert_close(&format!("db, {what}"), &grad(&got, &b), &grad(&wanted, &b64));
    }
}

const SAME: Conv2dOptions = Conv2dOptions { stride: 1, padding: 1, dilation: 1, groups: 1 };

#[test]
fn all_sizes_at_each_level() {
    at_each_level(|_| {
        for (h, w) in [(1, 1), (4, 4), (5, 9), (13, 6)] {
            for (inputs, outputs) in [(16, 16), (17, 33), (48, 20), (1, 16), (64, 1), (3, 5)] {
                check(&[2, h, w, inputs], outputs, (3, 3), SAME, true, 1);
                check(&[2, h, w, inputs], outputs, (5, 5), Conv2dOptions { padding: 2, ..SAME }, true, 1);
            }
        }
        check(&[1, 5, 7, 40], 70, (1, 1), Conv2dOptions::default(), true, 2);
        // One pixel per image, with a stride that has no effect.
        check(&[3, 1, 1, 4], 6, (1, 1), Conv2dOptions { stride: 2, ..Default::default() }, true, 2);
        check(&[2, 6, 7, 3], 20, (5, 5), Conv2dOptions { padding: 2, ..SAME }, false, 3);
        check(&[1, 9, 8, 6], 6, (3, 3), Conv2dOptions { groups: 6, stride: 2, ..SAME }, true, 4);
        check(&[1, 9, 8, 32], 32, (5, 3), Conv2dOptions { groups: 32, dilation: 2, ..SAME }, true, 5);
    });
}

#[test]
fn larger_images_take_several_chunks() {
    check(&[3, 40, 36, 32], 48, (3, 3), SAME, true, 6);
    check(&[3, 24, 20, 48], 40, (5, 5), Conv2dOptions { padding: 2, ..SAME }, true, 10);
    check(&[2, 30, 50, 130], 40, (3, 3), Conv2dOptions { padding: 0, ..SAME }, true, 7);
    check(&[2, 40, 300, 8], 12, (1, 1), Conv2dOptions::default(), true, 8);
    check(&[1, 20, 300, 4], 2, (3, 3), SAME, true, 9);
    // The largest kernels of SimVP's inception blocks.
    check(&[2, 16, 14, 32], 64, (11, 11), Conv2dOptions { groups: 8, padding: 5, ..SAME }, true, 10);
}

#[test]
fn single_channels_are_cut_by_rows_and_by_channels() {
    let by_themselves = |channels| Conv2dOptions { groups: channels, ..SAME };
    at_each_level(|_| {
        // Several bands of rows; several tasks of channels, the last one with fewer channels.
        check(&[2, 50, 40, 20], 20, (3, 3), by_themselves(20), true, 11);
        check(&[2, 16, 14, 300], 300, (3, 3), by_themselves(300), true, 12);
        let o = Conv2dOptions { stride: 2, dilation: 2, padding: 3, ..by_themselves(24) };
        check(&[1, 70, 45, 24], 24, (5, 5), o, true, 13);
        // SimVP's large kernel.
        let o = Conv2dOptions { dilation: 3, padding: 9, ..by_themselves(40) };
        check(&[1, 16, 15, 40], 40, (7, 7), o, true, 14);
        // A single row, which is processed as a column.
        let o = Conv2dOptions { stride: 2, dilation: 2, padding: 0, ..by_themselves(20) };
        check(&[2, 1, 3000, 20], 20, (1, 9), o, true, 18);
        // Only the weight gradient, and only the input gradient.
        let x = random(&[1, 6, 5, 18], 15);
        let w = random(&[18, 1, 3, 3], 16);
        let both = conv2d(&var(&x), &w, None, by_themselves(18)).unwrap();
        assert_eq!(bits(&both), bits(&conv2d(&x, &w, None, by_themselves(18)).unwrap()));
        let gradients = |x: &Tensor, w: &Tensor| {
            loss(&conv2d(x, w, None, by_themselves(18)).unwrap(), 17).backward().unwrap()
        };
        let (vx, vw) = (var(&x), var(&w));
        let both = gradients(&vx, &vw);
        assert_eq!(bits(&grad(&gradients(&vx, &w), &vx)), bits(&grad(&both, &vx)));
        assert_eq!(bits(&grad(&gradients(&x, &vw), &vw)), bits(&grad(&both, &vw)));
    });
}

#[test]
fn products_are_cut_by_rows_by_panels_and_by_pixels() {
    // The weight gradient of a 1x1 convolution, summed in place and, for other widths, separately; few
    // weights, many pixels.
    check(&[2, 9, 8, 512], 1030, (1, 1), Conv2dOptions::default(), true, 18);
    check(&[2, 9, 8, 500], 1030, (1, 1), Conv2dOptions::default(), true, 19);
    check(&[2, 60, 50, 40], 70, (1, 1), Conv2dOptions::default(), true, 20);
    check(&[1, 30, 20, 96], 160, (3, 3), Conv2dOptions { groups: 2, stride: 2, ..SAME }, true, 21);
    // Taps that read only the frame of zeros, above and below.
    check(&[2, 3, 20, 48], 64, (11, 3), Conv2dOptions { padding: 5, ..SAME }, true, 22);
}

/// Checks that with a half type the op returns the rounded f32 results: output and gradients.
fn check_half(x: &[usize; 4], outputs: usize, kernel: usize, o: Conv2dOptions, dtype: DType) {
    let what = format!("x {x:?}, {outputs} outputs, kernel {kernel}, {o:?}, {dtype:?}");
    let (x, x32) = rounded(&random(x, 1), dtype);
    let (w, w32) = rounded(&random(&[outputs, x.dims()[3] / o.groups, kernel, kernel], 2), dtype);
    let (b, b32) = rounded(&random(&[outputs], 3), dtype);
    let got = conv2d(&x, &w, Some(&b), o).unwrap();
    let wanted = conv2d(&x32, &w32, Some(&b32), o).unwrap();
    assert_eq!(got.dtype(), dtype);
    assert_rounded(&format!("output, {what}"), &got, &wanted);
    let got = rounded_loss(&got, 4, dtype).backward().unwrap();
    let wanted = rounded_loss(&wanted, 4, dtype).backward().unwrap();
    for (name, half, wide) in [("dx", &x, &x32), ("dw", &w, &w32), ("db", &b, &b32)] {
        assert_rounded(&format!("{name}, {what}"), &grad(&got, half), &grad(&wanted, wide));
    }
}

#[test]
fn half_types_at_each_level() {
    at_each_level(|_| {
        for dtype in HALVES {
            for (inputs, outputs) in [(16, 16), (17, 33), (48, 20), (1, 16), (64, 1), (3, 5)] {
                check_half(&[2, 5, 9, inputs], outputs, 3, SAME, dtype);
            }
            check_half(&[2, 6, 7, 20], 20, 5, Conv2dOptions { padding: 2, ..SAME }, dtype);
            check_half(&[2, 5, 7, 40], 70, 1, Conv2dOptions::default(), dtype);
            check_half(&[2, 5, 70, 33], 2, 1, Conv2dOptions { stride: 2, ..Default::default() }, dtype);
            check_half(&[1, 9, 8, 6], 6, 3, Conv2dOptions { groups: 6, stride: 2, ..SAME }, dtype);
            check_half(&[2, 9, 8, 40], 40, 5, Conv2dOptions { groups: 40, padding: 2, ..SAME }, dtype);
            check_half(&[2, 9, 8, 12], 20, 5, Conv2dOptions { groups: 4, padding: 2, ..SAME }, dtype);
            check_half(&[2, 9, 8, 12], 20, 1, Conv2dOptions { groups: 4, ..Default::default() }, dtype);
        }
    });
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, max_global_rejects: 100_000, failure_persistence: None, ..Default::default() })]
    #[test]
    fn any_options(
        batch in 1..3usize, h in 1..14usize, w in 1..14usize, gi in 1..20usize, go in 1..20usize, groups in 1..4usize,
        kh in 1..6usize, kw in 1..6usize, stride in 1..4usize, padding in 0..3usize, dilation in 1..3usize,
        bias: bool, seed: u64,
    ) {
        let o = Conv2dOptions { stride, padding, dilation, groups };
        prop_assume!(h + 2 * padding > dilation * (kh - 1) && w + 2 * padding > dilation * (kw - 1));
        check(&[batch, h, w, gi * groups], go * groups, (kh, kw), o, bias, seed >> 8);
    }

    #[test]
    fn any_options_of_single_channels(
        batch in 1..3usize, h in 1..14usize, w in 1..14usize, channels in 2..40usize, kh in 1..6usize, kw in 1..6usize,
        stride in 1..4usize, padding in 0..6usize, dilation in 1..3usize, bias: bool, seed: u64,
    ) {
        let o = Conv2dOptions { stride, padding, dilation, groups: channels };
        prop_assume!(h + 2 * padding > dilation * (kh - 1) && w + 2 * padding > dilation * (kw - 1));
        check(&[batch, h, w, channels], channels, (kh, kw), o, bias, seed >> 8);
    }

    #[test]
    fn winograd_shapes(
        batch in 1..4usize, h in 1..20usize, w in 1..20usize, inputs in 10..70usize, outputs in 10..70usize,
        kernel in prop_oneof![Just(3usize), Just(5usize)], padding in 0..5usize, seed: u64,
    ) {
        prop_assume!(h + 2 * padding >= kernel && w + 2 * padding >= kernel);
        let o = Conv2dOptions { padding, ..SAME };
        check(&[batch, h, w, inputs], outputs, (kernel, kernel), o, true, seed >> 8);
    }
}

#[test]
fn views_give_the_same_as_copies() {
    let base = random(&[2, 20, 6, 9], 1);
    let x = base.permute((0, 2, 3, 1)).unwrap();
    let w = random(&[3, 3, 20, 40], 2).permute((3, 2, 0, 1)).unwrap();
    let b = random(&[40, 2], 3).narrow(1, 1, 1).unwrap().squeeze(1).unwrap();
    let got = conv2d(&x, &w, Some(&b), SAME).unwrap();
    let copies = [&x, &w, &b].map(|t| t.force_contiguous().unwrap());
    let wanted = conv2d(&copies[0], &copies[1], Some(&copies[2]), SAME).unwrap();
    assert_eq!(bits(&got), bits(&wanted));
    // The gradient arrives as a view too.
    let v = var(&base);
    let y =
        conv2d(&v.permute((0, 2, 3, 1)).unwrap(), &w, Some(&b), SAME).unwrap().permute((0, 3, 1, 2)).unwrap();
    let got = grad(&loss(&y, 4).backward().unwrap(), &v);
    let v = var(&copies[0]);
    let y = conv2d(&v, &w, Some(&b), SAME).unwrap();
    let weights = random(&[2, 40, 6, 9], 4).permute((0, 2, 3, 1)).unwrap();
    let wanted = grad(&(y * weights).unwrap().sum_all().unwrap().backward().unwrap(), &v);
    assert_eq!(bits(&got.permute((0, 2, 3, 1)).unwrap()), bits(&wanted));
}

#[test]
fn leading_axes_are_one_batch() {
    let (x, w) = (random(&[2, 3, 5, 6, 16], 1), random(&[17, 16, 3, 3], 2));
    let got = conv2d(&x, &w, None, SAME).unwrap();
    assert_eq!(got.dims(), [2, 3, 5, 6, 17]);
    let flat = conv2d(&x.reshape((6, 5, 6, 16)).unwrap(), &w, None, SAME).unwrap();
    assert_eq!(bits(&got), bits(&flat));
    let single = conv2d(
        &x.narrow(0, 0, 1).unwrap().narrow(1, 0, 1).unwrap().reshape((5, 6, 16)).unwrap(),
        &w,
        None,
        SAME,
    );
    assert_eq!(single.unwrap().dims(), [5, 6, 17]);
}

#[test]
fn the_same_bits_on_any_threads() {
    for (channels, outputs, kernel, options) in [
        (33, 48, 3, SAME),
        (8, 12, 5, Conv2dOptions { padding: 2, ..SAME }),
        (24, 40, 5, Conv2dOptions { padding: 2, ..SAME }),
        (32, 48, 1, Conv2dOptions::default()),
        (24, 24, 3, Conv2dOptions { groups: 24, ..SAME }),
        (32, 64, 7, Conv2dOptions { groups: 8, padding: 3, ..SAME }),
        (64, 1, 3, SAME),
    ] {
        let (x, w) = (
            random(&[2, 37, 30, channels], 1),
            random(&[outputs, channels / options.groups, kernel, kernel], 2),
        );
        let b = random(&[outputs], 3);
        same_bits_on_any_threads(|| {
            let (x, w, b) = (var(&x), var(&w), var(&b));
            let y = conv2d(&x, &w, Some(&b), options).unwrap();
            let grads = loss(&y, 4).backward().unwrap();
            vec![y, grad(&grads, &x), grad(&grads, &w), grad(&grads, &b)]
        });
    }
}

#[test]
fn backward_alone_gives_the_gradients_of_the_graph() {
    for (kernel, groups, stride) in [(1, 1, 1), (3, 1, 1), (3, 1, 2), (5, 1, 1), (3, 32, 1)] {
        let o = Conv2dOptions { stride, padding: kernel / 2, groups, ..Default::default() };
        let (x, b) = (var(&random(&[2, 9, 10, 32], 1)), var(&random(&[32], 3)));
        let w = var(&random(&[32, 32 / groups, kernel, kernel], 2));
        let y = conv2d(&x, &w, Some(&b), o).unwrap();
        let dy = random(y.dims(), 4);
        let graph = (&y * &dy).unwrap().sum_all().unwrap().backward().unwrap();
        let (dx, dw, db) = conv2d_backward(&x, &w, &dy, o).unwrap();
        for (alone, var) in [(dx, &x), (dw, &w), (db, &b)] {
            assert_eq!(bits(&alone), bits(&grad(&graph, var)), "kernel {kernel}, {groups} groups");
        }
        let error = conv2d_backward(&x, &w, &dy.narrow(0, 0, 1).unwrap(), o).unwrap_err().to_string();
        assert!(error.starts_with("conv2d_backward: dy must be [2, "), "{error}");
    }
}

#[test]
fn untracked_arguments_get_no_gradient_and_no_graph() {
    let (x, w) = (random(&[1, 5, 5, 16], 1), var(&random(&[16, 16, 3, 3], 2)));
    let y = conv2d(&x, &w, None, SAME).unwrap();
    let grads = y.sum_all().unwrap().backward().unwrap();
    assert!(grads.get(&x).is_none());
    assert!(grads.get(&w).is_some());
    let y = candlepower_kernels::no_grad(|| conv2d(&x, &w, None, SAME).unwrap());
    assert!(!y.track_op());
    assert!(conv2d(&x, &w, None, SAME).unwrap().track_op());
}

#[test]
fn nan_and_infinity_are_not_hidden() {
    for channels in [4, 16] {
        let mut x = vec![0f32; 8 * 8 * channels];
        x[3 * 8 * channels + 5] = f32::NAN;
        let x = Tensor::from_vec(x, (1, 8, 8, channels), &candle_core::Device::Cpu).unwrap();
        let y = conv2d(&x, &random(&[16, channels, 3, 3], 1), None, SAME).unwrap();
        assert!(y.sum_all().unwrap().to_scalar::<f32>().unwrap().is_nan());
    }
}

#[test]
fn errors_name_what_does_not_fit() {
    let x = random(&[1, 5, 5, 4], 1);
    let message = |x: &Tensor, w: &Tensor, b: Option<&Tensor>, o| {
        let text = conv2d(x, w, b, o).unwrap_err().to_string();
        text.lines().next().unwrap_or_default().to_string()
    };
    let w = random(&[6, 3, 3, 3], 2);
    assert_eq!(
        message(&x, &w, None, SAME),
        "conv2d: channels do not fit: x is [1, 5, 5, 4], weight is [6, 3, 3, 3], groups 1"
    );
    let w = random(&[6, 4, 3, 3], 2);
    assert_eq!(
        message(&x, &w, Some(&random(&[5], 3)), SAME),
        "conv2d: bias must be (6) for 6 output channels, got [5]"
    );
    assert!(message(&x, &random(&[6, 4, 9, 3], 2), None, SAME).contains("larger than the padded image"));
    assert!(message(&x, &w.flatten_all().unwrap(), None, SAME).contains("weight must be"));
    assert!(
        message(&random(&[5, 4], 1), &w, None, SAME)
            .contains("x must be (.., height, width, channels), got [5, 4]")
    );
    assert!(message(&x, &w, None, Conv2dOptions { stride: 0, ..SAME }).contains("at least 1"));
    let double = x.to_dtype(DType::F64).unwrap();
    assert!(message(&double, &w, None, SAME).contains("x must be f32, bf16 or f16 on the CPU, got F64"));
    let half = x.to_dtype(DType::BF16).unwrap();
    assert!(message(&half, &w, None, SAME).contains("weight must be bf16 on Cpu as the input is, got F32"));
    assert!(message(&random(&[0, 5, 5, 4], 1), &w, None, SAME).contains("no elements"));
}
