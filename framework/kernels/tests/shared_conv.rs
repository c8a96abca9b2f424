//! `SharedConv` against f64: outputs and gradients of several uses of one weight.
#![allow(clippy::unwrap_used)]

mod common;

use candle_core::{Tensor, Var};
use candlepower_kernels::{Conv2dOptions, SharedConv, no_grad};
use common::*;

/// Feeds each result back in, like a roll-out, and also uses a second image with another batch size.
fn check(size: (usize, usize), channels: usize, kernel: usize, biased: bool, seed: u64) {
    let what = format!("{size:?}, {channels} channels, kernel {kernel}, biased {biased}");
    let x = var(&random(&[2, size.0, size.1, channels], seed));
    let other = var(&random(&[3, size.0, size.1, channels], seed + 1));
    let w = var(&(random(&[channels, channels, kernel, kernel], seed + 2) * 0.1).unwrap());
    let b = biased.then(|| var(&random(&[channels], seed + 5)));
    let (x64, other64, w64) = (double(&x), double(&other), double(&w));
    let b64 = b.as_ref().map(|b| double(b));
    let options = Conv2dOptions { padding: kernel / 2, ..Default::default() };
    let total = |conv: &dyn Fn(&Tensor) -> Tensor, x: &Var, other: &Var| {
        let y = conv(&conv(&conv(x)));
        (loss(&y, seed + 3) + loss(&conv(other), seed + 4)).unwrap()
    };
    let shared = SharedConv::new(&w, b.as_ref().map(Var::as_tensor)).unwrap();
    let got = total(&|x| shared.forward(x).unwrap(), &x, &other);
    let wanted =
        total(&|x| conv2d(x, &w64, b64.as_ref().map(Var::as_tensor), options).unwrap(), &x64, &other64);
    assert_close(&format!("loss, {what}"), &got, &wanted);
    let wanted = wanted.backward().unwrap();
    // A second backward pass through the same graph starts from zero.
    for _ in 0..2 {
        let got = got.backward().unwrap();
        assert_close(&format!("dx, {what}"), &grad(&got, &x), &grad(&wanted, &x64));
        assert_close(&format!("dx of the other, {what}"), &grad(&got, &other), &grad(&wanted, &other64));
        assert_close(&format!("dw, {what}"), &grad(&got, &w), &grad(&wanted, &w64));
        if let (Some(b), Some(b64)) = (&b, &b64) {
            assert_close(&format!("db, {what}"), &grad(&got, b), &grad(&wanted, b64));
        }
    }
}

#[test]
fn uses_share_a_weight_at_each_level() {
    at_each_level(|_| {
        for biased in [false, true] {
            check((5, 9), 16, 3, biased, 1);
            check((8, 8), 20, 5, biased, 2);
            // Falls back to `conv2d`.
            check((4, 5), 7, 3, biased, 3);
            check((4, 5), 20, 1, biased, 4);
        }
    });
}

#[test]
fn the_same_bits_on_any_threads() {
    let (x, w) = (var(&random(&[4, 12, 12, 32], 1)), var(&random(&[32, 32, 5, 5], 2)));
    let b = var(&random(&[32], 3));
    same_bits_on_any_threads(|| {
        let conv = SharedConv::new(&w, Some(&b)).unwrap();
        let y = conv.forward(&conv.forward(&x).unwrap()).unwrap();
        let grads = loss(&y, 3).backward().unwrap();
        vec![y, grad(&grads, &x), grad(&grads, &w), grad(&grads, &b)]
    });
}

#[test]
fn what_nobody_tracks_is_not_computed() {
    let (x, w) = (random(&[1, 6, 6, 16], 1), var(&random(&[16, 16, 3, 3], 2)));
    let grads = loss(&SharedConv::new(&w, None).unwrap().forward(&x).unwrap(), 3).backward().unwrap();
    assert!(grads.get(&w).is_some() && grads.get(&x).is_none());
    let x = var(&x);
    let grads =
        loss(&SharedConv::new(&w.detach(), None).unwrap().forward(&x).unwrap(), 3).backward().unwrap();
    assert!(grads.get(&x).is_some());
    // Only a bias tracked, and only a weight.
    let (b, still_w, still_b) = (var(&random(&[16], 4)), w.detach(), random(&[16], 4));
    let conv = SharedConv::new(&still_w, Some(&b)).unwrap();
    let grads = loss(&conv.forward(&x).unwrap(), 3).backward().unwrap();
    assert!(grads.get(&b).is_some() && grads.get(&still_w).is_none());
    let conv = SharedConv::new(&w, Some(&still_b)).unwrap();
    let grads = loss(&conv.forward(&x).unwrap(), 3).backward().unwrap();
    assert!(grads.get(&w).is_some() && grads.get(&still_b).is_none());
    let y = no_grad(|| SharedConv::new(&w, None).unwrap().forward(&x).unwrap());
    assert!(!y.track_op());
}

#[test]
fn errors_name_what_does_not_fit() {
    let text = |shape: &[usize]| SharedConv::new(&random(shape, 1), None).unwrap_err().to_string();
    assert!(text(&[4, 4, 3]).contains("(outputs, inputs, k, k)"));
    assert!(text(&[4, 4, 3, 5]).contains("square"));
    let bias = SharedConv::new(&random(&[16, 16, 3, 3], 1), Some(&random(&[8], 1))).unwrap_err().to_string();
    assert!(bias.contains("bias must be (16)"), "{bias}");
    let conv = SharedConv::new(&random(&[16, 16, 3, 3], 1), None).unwrap();
    assert!(conv.forward(&random(&[1, 4, 4, 8], 2)).unwrap_err().to_string().contains("[1, 4, 4, 8]"));
}
