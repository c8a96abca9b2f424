//! Scaling of channels, and the sums of its gradients, against their definition.

use super::{Half, assert_close, at, random, run, wide};
use crate::cuda::arguments::{ProductSums, ScaleColumns};
use crate::cuda::host::Host;
use crate::cuda::sources::COLUMNS;
use half::{bf16, f16};
use std::sync::Mutex;

fn check<T: Half>(host: &Mutex<Host>, samples: usize, columns: usize, at_once: usize) {
    const ROWS: usize = 6;
    let narrow = |x: Vec<f32>| -> Vec<T> { x.into_iter().map(T::new).collect() };
    let count = ROWS * columns;
    let (x, d) = (narrow(random(count, 1)), narrow(random(count, 2)));
    let (factors, what) = (narrow(random(samples * columns, 3)), format!("{} by {at_once}", T::NAME));

    let mut y = vec![T::new(7.); count];
    let arguments = ScaleColumns {
        x: at(&x),
        factors: at(&factors),
        y: y.as_mut_ptr() as u64,
        count: count as u32,
        sample: (count / samples) as u32,
        columns: columns as u32,
    };
    run(host, &COLUMNS, &format!("scale_columns_{}_{at_once}", T::NAME), count / at_once, arguments);
    let expected: Vec<f32> = (0..count)
        .map(|i| x[i].wide() * factors[i / (count / samples) * columns + i % columns].wide())
        .collect();
    assert_close(&what, &wide(&y), &expected, T::ROUNDING);

    // The last part has fewer rows.
    for stretch in [ROWS, 4] {
        let parts = ROWS.div_ceil(stretch);
        let mut sums = vec![7f32; parts * columns];
        let arguments = ProductSums {
            x: at(&x),
            d: at(&d),
            sums: sums.as_mut_ptr() as u64,
            rows: ROWS as u32,
            columns: columns as u32,
            stretch: stretch as u32,
            parts: parts as u32,
        };
        let kernel = format!("product_sums_{}_{at_once}", T::NAME);
        run(host, &COLUMNS, &kernel, parts * columns / at_once, arguments);
        let mut expected = vec![0f32; parts * columns];
        for i in 0..count {
            expected[i / columns / stretch * columns + i % columns] += x[i].wide() * d[i].wide();
        }
        assert_close(&format!("{what}, sums"), &sums, &expected, 1e-5);
    }
}

#[test]
fn channels_are_scaled_and_their_gradients_summed() {
    let Some(host) = Host::new() else { return };
    for samples in [1, 3] {
        for (columns, at_once) in [(5, 1), (8, 1), (8, 4)] {
            check::<f32>(host, samples, columns, at_once);
            check::<bf16>(host, samples, columns, at_once);
            check::<f16>(host, samples, columns, at_once);
        }
    }
}
