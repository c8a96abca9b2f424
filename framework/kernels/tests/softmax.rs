//! The softmax against f64, forward and backward.
#![allow(clippy::unwrap_used)]

mod common;

use candle_core::{D, Result, Tensor};
use candlepower_kernels::softmax;
use common::*;

/// The softmax composed of candle's own operations.
fn composed(x: &Tensor) -> Result<Tensor> {
    let powers = x.broadcast_sub(&x.max_keepdim(D::Minus1)?)?.exp()?;
    powers.broadcast_div(&powers.sum_keepdim(D::Minus1)?)
}

/// Checks values within `range` of `centre`.
fn check(shape: &[usize], centre: f64, range: f64, seed: u64) {
    let what = format!("{shape:?}, {centre} +- {range}");
    let x = var(&((random(shape, seed) * range).unwrap() + centre).unwrap());
    let x64 = double(&x);
    let (got, wanted) = (softmax(&x).unwrap(), composed(&x64).unwrap());
    assert_close(&what, &got, &wanted);
    let (got, wanted) = (loss(&got, 9).backward().unwrap(), loss(&wanted, 9).backward().unwrap());
    assert_close(&format!("gradient, {what}"), &grad(&got, &x), &grad(&wanted, &x64));
}

#[test]
fn rows_of_any_width_at_each_level() {
    at_each_level(|_| {
        for width in [1, 5, 16, 33, 700] {
            check(&[7, width], 0., 1., 1);
        }
        // All below zero, where absent lanes would be the largest; and values far apart.
        check(&[2, 3, 19], -50., 2., 2);
        check(&[200, 300], 20., 200., 3);
    });
}

#[test]
fn not_a_number_spreads_over_its_row_alone() {
    let x = Tensor::new(&[[0f32, f32::NAN, 1.], [0., 1., 2.]], &candle_core::Device::Cpu).unwrap();
    let y = softmax(&x).unwrap().to_vec2::<f32>().unwrap();
    assert!(y[0].iter().all(|y| y.is_nan()) && y[1].iter().all(|y| y.is_finite()), "{y:?}");
}

#[test]
fn the_same_bits_on_any_threads() {
    let x = var(&random(&[3, 90, 333], 1));
    same_bits_on_any_threads(|| {
        let y = softmax(&x).unwrap();
        let grads = loss(&y, 3).backward().unwrap();
        vec![y, grad(&grads, &x)]
    });
}

#[test]
fn a_number_has_no_axis_and_nothing_no_elements() {
    let text = |shape: &[usize]| softmax(&random(shape, 1)).unwrap_err().to_string();
    assert!(text(&[]).contains("no axis"));
    assert!(text(&[0, 5]).contains("no elements") && text(&[3, 0]).contains("no elements"));
}
