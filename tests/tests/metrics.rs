//! Video metrics compared with numbers from OpenSTL's own code (scikit-image 0.19.3).
#![allow(clippy::unwrap_used)]

use candle_core::{DType, Tensor};
use candlepower::metrics::video::{Pixels, gaussian_ssim, mae, mse, psnr, rmse, snr, ssim};
use candlepower_tests::{Golden, golden};

/// The references average in float32, these metrics in float64.
const TOLERANCE: f64 = 1e-6;

fn cases(golden: &Golden) -> Vec<&str> {
    let mut cases: Vec<&str> = golden.tensors.keys().filter_map(|name| name.strip_suffix(".pred")).collect();
    cases.sort_unstable();
    assert!(!cases.is_empty(), "the fixture has no `<case>.pred`");
    cases
}

/// Compares with `<case>.<name>` of the fixture, value by value.
fn check(golden: &Golden, case: &str, name: &str, actual: &[f64]) {
    let name = format!("{case}.{name}");
    let expected =
        golden.get(&name).to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1::<f64>().unwrap();
    assert_eq!(actual.len(), expected.len(), "{name}");
    for (actual, expected) in actual.iter().zip(&expected) {
        let close = (actual - expected).abs() <= TOLERANCE * expected.abs();
        assert!(actual == expected || close, "{name}: {actual}, expected {expected}");
    }
}

/// Each channel as a separate frame.
fn channels_apart(video: &Tensor) -> Tensor {
    let (b, t, c, h, w) = video.dims5().unwrap();
    video.reshape((b, t * c, 1, h, w)).unwrap()
}

/// The values of frames stored as bytes, rounded down.
fn as_bytes(video: &Tensor) -> Tensor {
    let clipped = video.clamp(0., 1.).unwrap();
    clipped
        .affine(255., 0.)
        .unwrap()
        .floor()
        .unwrap()
        .to_dtype(DType::F64)
        .unwrap()
        .affine(1. / 255., 0.)
        .unwrap()
}

#[test]
fn metrics_agree_with_openstl() {
    let golden = golden("metrics");
    for case in cases(&golden) {
        let check = |name: &str, actual: &[f64]| check(&golden, case, name, actual);
        let (p, t) = (golden.get(&format!("{case}.pred")), golden.get(&format!("{case}.true")));

        let sums = mse(p, t, Pixels::Sum).unwrap();
        check("mse", &[sums.mean()]);
        check("mse_per_frame", &sums.values);
        check("mse_spatial_norm", &[mse(p, t, Pixels::Mean).unwrap().mean()]);
        check("seed_mean_mse", &[mse(p, t, Pixels::Mean).unwrap().mean()]);
        check("rmse", &[rmse(p, t, Pixels::Sum).unwrap()]);
        check("rmse_spatial_norm", &[rmse(p, t, Pixels::Mean).unwrap()]);
        let sums = mae(p, t, Pixels::Sum).unwrap();
        check("mae", &[sums.mean()]);
        check("mae_per_frame", &sums.values);
        check("mae_spatial_norm", &[mae(p, t, Pixels::Mean).unwrap().mean()]);

        let ratios = psnr(p, t).unwrap();
        check("psnr", &[ratios.mean()]);
        check("psnr_per_frame", &ratios.values);
        check("snr", &[snr(p, t).unwrap().mean()]);

        // OpenSTL's own number uses a range of 2: scikit-image assumed float frames to lie within -1 and 1.
        let similar = ssim(p, t, 2.).unwrap();
        check("ssim", &[similar.mean()]);
        check("ssim_per_frame", &similar.values);
        check("ssim_data_range_2", &[similar.mean()]);
        check("ssim_data_range_1", &[ssim(p, t, 1.).unwrap().mean()]);
        let gaussian = gaussian_ssim(p, t, 1.).unwrap().mean();
        check("ssim_gaussian_data_range_1", &[gaussian]);
        check("svg_finn_ssim", &[gaussian]);
    }
}

/// Other papers' numbers follow from ours: PredRNN clips first and stores bytes, SVG treats channels
/// separately.
#[test]
fn metrics_agree_with_predrnn_and_svg() {
    let golden = golden("metrics");
    for case in cases(&golden) {
        let check = |name: &str, actual: &[f64]| check(&golden, case, name, actual);
        let (p, t) = (golden.get(&format!("{case}.pred")), golden.get(&format!("{case}.true")));

        let clipped = p.clamp(0., 1.).unwrap();
        check("predrnn_mse_clipped_sum_per_frame", &[mse(&clipped, t, Pixels::Sum).unwrap().mean()]);
        let (bytes, true_bytes) = (as_bytes(p), as_bytes(t));
        check("predrnn_psnr_uint8", &[psnr(&bytes, &true_bytes).unwrap().mean()]);
        check("predrnn_ssim_uint8", &[ssim(&bytes, &true_bytes, 1.).unwrap().mean()]);

        let (p, t) = (channels_apart(p), channels_apart(t));
        check("svg_psnr", &[psnr(&p, &t).unwrap().mean()]);
        check("svg_ssim_compare_ssim_range2", &[ssim(&p, &t, 2.).unwrap().mean()]);
    }
}
