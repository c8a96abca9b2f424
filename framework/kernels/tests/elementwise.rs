//! The in-place passes.
#![allow(clippy::unwrap_used)]

mod common;

use candle_core::{DType, Device, Tensor, Var};
use candlepower_kernels::elementwise::{for_each, sum_squares, zip2, zip3};
use common::*;

/// Below and above the size from which threads are used.
const SIZES: [usize; 3] = [1, 1000, 100_003];

#[test]
fn adam_is_three_passes() {
    for n in SIZES {
        let [w, g] = [1, 2].map(|seed| random(&[n], seed));
        let [m, v] = [(); 2].map(|()| Var::zeros(n, DType::F32, &Device::Cpu).unwrap());
        let w = var(&w);
        let before = w.as_tensor().copy().unwrap();
        zip2(&m, &g, |m: &mut f32, g| *m = 0.9 * *m + 0.1 * g).unwrap();
        zip2(&v, &g, |v: &mut f32, g| *v = 0.98 * *v + 0.02 * g * g).unwrap();
        zip3(&w, &m, &v, |w: &mut f32, m, v| *w -= 1e-3 * m / (v.sqrt() + 1e-8)).unwrap();
        let m = (&g * 0.1).unwrap();
        let v = (g.sqr().unwrap() * 0.02).unwrap();
        let wanted = (before - ((m / (v.sqrt().unwrap() + 1e-8).unwrap()).unwrap() * 1e-3).unwrap()).unwrap();
        assert!(error(&w, &wanted) < 1e-6);
    }
}

#[test]
fn f64_and_a_part_of_a_storage() {
    let x = Tensor::arange(0f64, 10., &Device::Cpu).unwrap();
    let part = x.narrow(0, 2, 3).unwrap();
    for_each(&part, |x: &mut f64| *x = -*x).unwrap();
    assert_eq!(x.to_vec1::<f64>().unwrap(), [0., 1., -2., -3., -4., 5., 6., 7., 8., 9.]);
    assert_eq!(sum_squares(&part).unwrap(), 29.);
}

#[test]
fn sums_are_the_same_on_any_threads() {
    for n in SIZES {
        let x = random(&[n], 3);
        let wanted: f64 = x.to_vec1::<f32>().unwrap().iter().map(|&x| f64::from(x).powi(2)).sum();
        let sum = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| sum_squares(&x).unwrap())
        };
        assert!((sum(1) - wanted).abs() <= 1e-7 * wanted);
        assert_eq!(sum(1).to_bits(), sum(3).to_bits());
    }
}

#[test]
fn squares_beyond_the_range_of_f32_are_summed_all_the_same() {
    let x = Tensor::new(&[3e30f32, 4e30], &Device::Cpu).unwrap();
    assert!((sum_squares(&x).unwrap().sqrt() / 5e30 - 1.).abs() < 1e-6);
    for bad in [f32::NAN, f32::INFINITY] {
        assert!(!sum_squares(&Tensor::new(&[1f32, bad], &Device::Cpu).unwrap()).unwrap().is_finite());
    }
}

#[test]
fn errors_name_what_does_not_fit() {
    let (a, b) = (random(&[4, 3], 1), random(&[3, 4], 2));
    let add = |x: &mut f32, a: f32| *x += a;
    let text = zip2(&a, &b, add).unwrap_err().to_string();
    assert!(text.contains("shapes differ: [4, 3] and [3, 4]"), "{text}");
    assert!(zip2(&a, &b.t().unwrap(), add).unwrap_err().to_string().contains("contiguous"));
    assert!(zip2(&a, &a, add).is_err());
    assert!(for_each(&a, |_: &mut f64| ()).unwrap_err().to_string().contains("expected f64"));
    assert!(sum_squares(&Tensor::zeros(3, DType::U8, &Device::Cpu).unwrap()).is_err());
}
