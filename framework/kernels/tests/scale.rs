//! Scaled channels against candle's own operations in f64, forward and backward.
#![allow(clippy::unwrap_used)]

mod common;

use candle_core::{DType, Tensor};
use candlepower_kernels::scale_channels;
use common::*;

/// Checks factors of shape (N), or (B, N) for `samples` B.
fn check(shape: &[usize; 4], samples: Option<usize>, seed: u64) {
    let what = format!("{shape:?}, {samples:?}");
    let x = var(&random(shape, seed));
    let factors = var(&match samples {
        None => random(&[shape[3]], seed + 1),
        Some(samples) => random(&[samples, shape[3]], seed + 1),
    });
    let (x64, factors64) = (double(&x), double(&factors));
    let wide = factors64.reshape((samples.unwrap_or(1), 1, 1, shape[3])).unwrap();
    let (got, wanted) = (scale_channels(&x, &factors).unwrap(), x64.broadcast_mul(&wide).unwrap());
    assert_close(&what, &got, &wanted);
    let (got, wanted) = (loss(&got, 9).backward().unwrap(), loss(&wanted, 9).backward().unwrap());
    assert_close(&format!("gradient of x, {what}"), &grad(&got, &x), &grad(&wanted, &x64));
    assert_close(&format!("gradient of factors, {what}"), &grad(&got, &factors), &grad(&wanted, &factors64));
}

#[test]
fn any_channels_for_all_samples_or_for_each_at_each_level() {
    at_each_level(|_| {
        for channels in [1, 5, 16, 33] {
            check(&[3, 4, 5, channels], None, 1);
            check(&[3, 4, 5, channels], Some(3), 2);
        }
        // Several tasks per sample, the last one with fewer rows.
        check(&[2, 50, 37, 19], Some(2), 3);
        check(&[2, 50, 37, 19], None, 4);
    });
}

#[test]
fn half_types_are_rounded_once() {
    for dtype in [DType::BF16, DType::F16] {
        let [x, factors] = [random(&[2, 3, 21], 1), random(&[2, 21], 2)].map(|x| x.to_dtype(dtype).unwrap());
        let wide = |x: &Tensor| x.to_dtype(DType::F32).unwrap();
        let wanted = scale_channels(&wide(&x), &wide(&factors)).unwrap().to_dtype(dtype).unwrap();
        let got = scale_channels(&x, &factors).unwrap();
        let values = |x: &Tensor| wide(x).flatten_all().unwrap().to_vec1::<f32>().unwrap();
        assert_eq!(values(&got), values(&wanted), "{dtype:?}");
    }
}

#[test]
fn the_same_bits_on_any_threads() {
    let (x, factors) = (var(&random(&[2, 30, 31, 33], 1)), var(&random(&[2, 33], 2)));
    same_bits_on_any_threads(|| {
        let y = scale_channels(&x, &factors).unwrap();
        let grads = loss(&y, 3).backward().unwrap();
        vec![y, grad(&grads, &x), grad(&grads, &factors)]
    });
}

#[test]
fn what_does_not_fit_is_refused() {
    // With backtraces enabled, candle's errors include one.
    let refused = |x: &[usize], factors: &[usize]| {
        let error = scale_channels(&random(x, 1), &random(factors, 2)).unwrap_err().to_string();
        error.lines().next().unwrap_or_default().to_string()
    };
    assert_eq!(refused(&[2, 3, 4], &[3]), "scale_channels: factors [3] do not fit to [2, 3, 4]");
    assert_eq!(refused(&[2, 3, 4], &[3, 4]), "scale_channels: factors [3, 4] do not fit to [2, 3, 4]");
    assert_eq!(refused(&[2, 3, 4], &[4, 4]), "scale_channels: factors [4, 4] do not fit to [2, 3, 4]");
}
