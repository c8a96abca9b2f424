//! Attention to tokens against f64, forward and backward.
#![allow(clippy::unwrap_used)]

mod common;

use candle_core::{D, Result, Tensor};
use candlepower_kernels::{attend, no_grad};
use common::*;

/// Attention composed of candle's own operations.
fn composed(asked: &Tensor, tokens: &Tensor) -> Result<Tensor> {
    let scores = asked.matmul(&tokens.t()?.contiguous()?)?;
    let powers = scores.broadcast_sub(&scores.max_keepdim(D::Minus1)?)?.exp()?;
    powers.broadcast_div(&powers.sum_keepdim(D::Minus1)?)?.matmul(tokens)
}

/// Checks `asked` queries and `tokens` tokens of `width` channels per sample; the tokens are transposed in
/// memory.
fn check(batch: usize, asked: usize, tokens: usize, width: usize, seed: u64) {
    let what = format!("{batch} x {asked} of {tokens}, {width} wide");
    let (q, k) =
        (var(&random(&[batch, asked, width], seed)), var(&random(&[batch, width, tokens], seed + 1)));
    let (q64, k64) = (double(&q), double(&k));
    let got = attend(&q, &k.t().unwrap()).unwrap();
    let wanted = composed(&q64, &k64.t().unwrap().contiguous().unwrap()).unwrap();
    assert_close(&what, &got, &wanted);
    let (got, wanted) = (loss(&got, 9).backward().unwrap(), loss(&wanted, 9).backward().unwrap());
    assert_close(&format!("asked, {what}"), &grad(&got, &q), &grad(&wanted, &q64));
    assert_close(&format!("tokens, {what}"), &grad(&got, &k), &grad(&wanted, &k64));
}

#[test]
fn all_sizes_at_each_level() {
    at_each_level(|_| {
        check(1, 1, 1, 1, 1);
        check(3, 5, 7, 9, 2);
        check(2, 40, 130, 16, 3);
    });
}

#[test]
fn the_same_bits_on_any_threads() {
    let (q, k) = (var(&random(&[3, 64, 32], 1)), var(&random(&[3, 200, 32], 2)));
    same_bits_on_any_threads(|| {
        let y = attend(&q, &k).unwrap();
        let grads = loss(&y, 3).backward().unwrap();
        vec![y, grad(&grads, &q), grad(&grads, &k)]
    });
}

#[test]
fn what_nobody_tracks_is_not_computed() {
    let (q, k) = (random(&[1, 4, 8], 1), var(&random(&[1, 6, 8], 2)));
    let grads = loss(&attend(&q, &k).unwrap(), 3).backward().unwrap();
    assert!(grads.get(&k).is_some() && grads.get(&q).is_none());
    let (q, k) = (var(&q), k.detach());
    let grads = loss(&attend(&q, &k).unwrap(), 3).backward().unwrap();
    assert!(grads.get(&q).is_some() && grads.get(&k).is_none());
    assert!(!no_grad(|| attend(&q, &k).unwrap()).track_op());
}

#[test]
fn errors_name_what_does_not_fit() {
    let text = |q: &[usize], k: &[usize]| attend(&random(q, 1), &random(k, 2)).unwrap_err().to_string();
    assert!(text(&[2, 3, 4], &[2, 3, 5]).contains("(B, K, N)"));
    assert!(text(&[2, 3, 4], &[1, 3, 4]).contains("[1, 3, 4]"));
}
