//! In-place updates.
#![allow(clippy::unwrap_used)]

mod common;

use candle_core::{DType, Device, Tensor};
use candlepower_kernels::Level;
use candlepower_kernels::clipping::GradScale;
use candlepower_kernels::updates::{AdagradStep, Placed, SgdStep, UpdateParam, approach, sum_squares_of};
use common::*;

/// Sizes below and above the threshold for using threads; none is a multiple of the block size.
const SIZES: [usize; 3] = [1, 1000, 100_003];

fn only<'a>(param: &'a Tensor, gradient: &'a Tensor, kept: Option<&'a Tensor>) -> [UpdateParam<'a>; 1] {
    [UpdateParam { param, copy: None, gradient, kept: [kept, None, None] }]
}

#[test]
fn every_value_moves_and_nothing_beside_a_view() {
    let mut adagrad = Placed::on(&Device::Cpu).unwrap();
    adagrad.set(AdagradStep { lr: 0.5, eps: 0., l2: 0. }).unwrap();
    for n in SIZES {
        let all = random(&[n + 2], 1).contiguous().unwrap();
        let (before, g) = (all.copy().unwrap(), random(&[n], 2));
        let w = all.narrow(0, 1, n).unwrap();
        let sum = Tensor::zeros(n, DType::F32, &Device::Cpu).unwrap();
        for level in [Level::Portable, Level::Avx2, Level::Avx512] {
            if !Level::force(Some(level)) {
                continue;
            }
            let (w0, s0) = (w.copy().unwrap(), sum.copy().unwrap());
            adagrad.apply(&only(&w, &g, Some(&sum)), &GradScale::default()).unwrap();
            let s = (s0 + g.sqr().unwrap()).unwrap();
            let wanted = (w0 - ((&g / s.sqrt().unwrap()).unwrap() * 0.5).unwrap()).unwrap();
            assert!(error(&sum, &s) < 1e-6 && error(&w, &wanted) < 1e-6, "{level:?}, {n}");
        }
        Level::force(None);
        for end in [0, n + 1] {
            let [now, then] = [&all, &before].map(|x| x.get(end).unwrap().to_scalar::<f32>().unwrap());
            assert_eq!(now, then);
        }
    }
}

#[test]
fn tensors_approach_others() {
    let pairs = SIZES.map(|n| [random(&[n], 1), random(&[n], 2)]);
    let wanted =
        pairs.each_ref().map(|[x, target]| ((x * 0.75).unwrap() + (target * 0.25).unwrap()).unwrap());
    approach(&pairs.each_ref().map(|[x, target]| (x, target)), 0.25).unwrap();
    for ([x, _], wanted) in pairs.iter().zip(&wanted) {
        assert!(error(x, wanted) < 1e-6);
    }
}

#[test]
fn sums_are_the_same_on_any_threads() {
    for n in SIZES {
        let x = random(&[n], 3);
        let wanted: f64 = x.to_vec1::<f32>().unwrap().iter().map(|&x| f64::from(x).powi(2)).sum();
        let sum = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| sum_squares_of(std::slice::from_ref(&x)).unwrap())
        };
        assert!((sum(1) - wanted).abs() <= 1e-7 * wanted);
        assert_eq!(sum(1).to_bits(), sum(3).to_bits());
    }
}

#[test]
fn squares_are_summed_of_f64_of_views_and_beyond_the_range_of_f32() {
    let part = Tensor::arange(0f64, 10., &Device::Cpu).unwrap().narrow(0, 2, 3).unwrap();
    assert_eq!(sum_squares_of(&[part]).unwrap(), 29.);
    let x = Tensor::new(&[3e30f32, 4e30], &Device::Cpu).unwrap();
    assert!((sum_squares_of(&[x]).unwrap().sqrt() / 5e30 - 1.).abs() < 1e-6);
    for bad in [f32::NAN, f32::INFINITY] {
        assert!(!sum_squares_of(&[Tensor::new(&[1f32, bad], &Device::Cpu).unwrap()]).unwrap().is_finite());
    }
}

#[test]
fn errors_name_what_does_not_fit() {
    let (a, b) = (random(&[4, 3], 1), random(&[3, 4], 2));
    let mut sgd = Placed::on(&Device::Cpu).unwrap();
    let error = |sgd: &Placed<SgdStep>, param: &[UpdateParam]| {
        sgd.apply(param, &GradScale::default()).unwrap_err().to_string()
    };
    assert!(error(&sgd, &only(&a, &a.copy().unwrap(), None)).contains("no numbers yet"));
    sgd.set(SgdStep { lr: 0.1, momentum: 0.9, entering: 1., l2: 0., nesterov: false }).unwrap();
    let text = error(&sgd, &only(&a, &b, None));
    assert!(text.contains("F32 [4, 3] and F32 [3, 4]"), "{text}");
    assert!(error(&sgd, &only(&a.t().unwrap(), &b, None)).contains("contiguous"));
    // Locking the same storage twice would deadlock.
    assert!(error(&sgd, &only(&a, &a, None)).contains("share no memory"));
    let view = a.reshape((2, 6)).unwrap().reshape((4, 3)).unwrap();
    assert!(error(&sgd, &only(&a, &random(&[4, 3], 2), Some(&view))).contains("share no memory"));
    assert!(sum_squares_of(&[Tensor::zeros(3, DType::U8, &Device::Cpu).unwrap()]).is_err());
}
