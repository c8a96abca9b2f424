//! `SharedNorm` against f64: outputs and gradients of several uses of one weight and bias.
#![allow(clippy::unwrap_used)]

mod common;

use candle_core::{Result, Tensor, Var};
use candlepower_kernels::{SharedNorm, no_grad};
use common::*;

const EPSILON: f64 = 1e-5;

/// `SharedNorm` composed of candle's own operations.
fn composed(x: &Tensor, weight: &Tensor, bias: &Tensor) -> Result<Tensor> {
    let flat = x.flatten_from(1)?;
    let centred = flat.broadcast_sub(&flat.mean_keepdim(1)?)?;
    let deviation = (centred.sqr()?.mean_keepdim(1)? + EPSILON)?.sqrt()?;
    centred.broadcast_div(&deviation)?.reshape(x.shape())?.broadcast_mul(weight)?.broadcast_add(bias)
}

/// Feeds a result back in, and also uses a second state with another batch size; values are around `centre`.
fn check(state: &[usize], centre: f64, seed: u64) {
    let what = format!("{state:?} around {centre}");
    let batch = |size: usize| [&[size], state].concat();
    let x = var(&(random(&batch(3), seed) + centre).unwrap());
    let other = var(&random(&batch(1), seed + 1));
    let (w, b) = (var(&random(state, seed + 2)), var(&random(state, seed + 3)));
    let (x64, other64, w64, b64) = (double(&x), double(&other), double(&w), double(&b));
    let total = |norm: &dyn Fn(&Tensor) -> Tensor, x: &Var, other: &Var| {
        (loss(&norm(&norm(x)), seed + 4) + loss(&norm(other), seed + 5)).unwrap()
    };
    let shared = SharedNorm::new(&w, &b, EPSILON).unwrap();
    assert_close(&format!("y, {what}"), &shared.forward(&x).unwrap(), &composed(&x64, &w64, &b64).unwrap());
    let got = total(&|x| shared.forward(x).unwrap(), &x, &other);
    let wanted = total(&|x| composed(x, &w64, &b64).unwrap(), &x64, &other64);
    let wanted = wanted.backward().unwrap();
    // A second backward pass through the same graph starts from zero.
    for _ in 0..2 {
        let got = got.backward().unwrap();
        for (name, x, x64) in [("x", &x, &x64), ("other", &other, &other64), ("w", &w, &w64), ("b", &b, &b64)]
        {
            assert_close(&format!("d {name}, {what}"), &grad(&got, x), &grad(&wanted, x64));
        }
    }
}

#[test]
fn uses_share_a_weight_and_a_bias_at_each_level() {
    at_each_level(|_| {
        check(&[3, 5], 0., 1);
        check(&[9, 7, 33], 0., 2);
        // Several parts, the last one with an odd size; a mean that is large compared with the deviation.
        check(&[13, 11, 2, 23], 0., 3);
        check(&[64, 64], 30., 4);
    });
}

#[test]
fn the_same_bits_on_any_threads() {
    let state = [16, 16, 37];
    let (x, w, b) = (var(&random(&[3, 16, 16, 37], 1)), var(&random(&state, 2)), var(&random(&state, 3)));
    same_bits_on_any_threads(|| {
        let norm = SharedNorm::new(&w, &b, EPSILON).unwrap();
        let y = norm.forward(&norm.forward(&x).unwrap()).unwrap();
        let grads = loss(&y, 3).backward().unwrap();
        vec![y, grad(&grads, &x), grad(&grads, &w), grad(&grads, &b)]
    });
}

#[test]
fn what_nobody_tracks_is_not_computed() {
    let (x, w, b) = (random(&[2, 20], 1), var(&random(&[20], 2)), var(&random(&[20], 3)));
    let still = b.detach();
    let norm = SharedNorm::new(&w, &still, EPSILON).unwrap();
    let grads = loss(&norm.forward(&x).unwrap(), 3).backward().unwrap();
    assert!(grads.get(&w).is_some() && grads.get(&still).is_none() && grads.get(&x).is_none());
    let x = var(&x);
    let norm = SharedNorm::new(&w.detach(), &b.detach(), EPSILON).unwrap();
    assert!(loss(&norm.forward(&x).unwrap(), 3).backward().unwrap().get(&x).is_some());
    let y = no_grad(|| SharedNorm::new(&w, &b, EPSILON).unwrap().forward(&x).unwrap());
    assert!(!y.track_op());
}

#[test]
fn errors_name_what_does_not_fit() {
    let (w, b) = (random(&[4, 5], 1), random(&[5, 4], 2));
    assert!(SharedNorm::new(&w, &b, EPSILON).unwrap_err().to_string().contains("bias is [5, 4]"));
    let norm = SharedNorm::new(&w, &w, EPSILON).unwrap();
    assert!(norm.forward(&b).unwrap_err().to_string().contains("got [5, 4]"));
}
