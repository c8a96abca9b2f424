//! Depthwise convolutions against their definition.

use super::{Half, assert_close, at, random, run, wide};
use crate::cuda::arguments::{AddTaps, Depthwise, PackTaps, TapSums, Window};
use crate::cuda::host::Host;
use crate::cuda::sources::DEPTHWISE;
use half::{bf16, f16};
use std::sync::Mutex;

/// Images to read (height, width), their outputs, the kernel, the dilation, and the position of the first tap.
struct Case {
    from: [usize; 2],
    to: [usize; 2],
    kernel: [usize; 2],
    dilation: usize,
    before: [i32; 2],
}

const IMAGES: usize = 2;

/// All (output pixel, tap, input pixel) of a sum; pixels are numbered over all images.
fn terms(case: &Case) -> Vec<[usize; 3]> {
    let (mut terms, [rows, columns]) = (Vec::new(), case.kernel);
    for (image, y, x) in product([IMAGES, case.to[0], case.to[1]]) {
        for (_, down, right) in product([1, rows, columns]) {
            let at = |out: usize, before: i32, tap: usize| out as i32 + before + (tap * case.dilation) as i32;
            let (from_y, from_x) = (at(y, case.before[0], down), at(x, case.before[1], right));
            if (0..case.from[0] as i32).contains(&from_y) && (0..case.from[1] as i32).contains(&from_x) {
                let from = (image * case.from[0] + from_y as usize) * case.from[1] + from_x as usize;
                terms.push([(image * case.to[0] + y) * case.to[1] + x, down * columns + right, from]);
            }
        }
    }
    terms
}

fn product(sizes: [usize; 3]) -> impl Iterator<Item = (usize, usize, usize)> {
    (0..sizes[0]).flat_map(move |a| (0..sizes[1]).flat_map(move |b| (0..sizes[2]).map(move |c| (a, b, c))))
}

fn check<T: Half>(host: &Mutex<Host>, case: &Case, channels: usize, at_once: usize) {
    let narrow = |x: Vec<f32>| -> Vec<T> { x.into_iter().map(T::new).collect() };
    let taps = case.kernel[0] * case.kernel[1];
    let [inputs, outputs] = [case.from, case.to].map(|[height, width]| IMAGES * height * width * channels);
    let (x, dy, weight) =
        (narrow(random(inputs, 1)), narrow(random(outputs, 2)), narrow(random(taps * channels, 3)));
    let window = Window {
        height: case.from[0] as u32,
        width: case.from[1] as u32,
        to_height: case.to[0] as u32,
        to_width: case.to[1] as u32,
        channels: channels as u32,
        kernel_height: case.kernel[0] as u32,
        kernel_width: case.kernel[1] as u32,
        dilation: case.dilation as u32,
        above: case.before[0],
        left: case.before[1],
    };
    let (terms, rows, name) = (terms(case), IMAGES * case.to[0], T::NAME);
    let what = format!("{name}, {channels} channels, {at_once} at once, {:?}", case.kernel);

    for rotated in [false, true] {
        let mut packed = vec![7f32; taps * channels];
        let pack = PackTaps {
            weight: at(&weight),
            taps: packed.as_mut_ptr() as u64,
            channels: channels as u32,
            count: taps as u32,
            rotated: u32::from(rotated),
        };
        run(host, &DEPTHWISE, &format!("pack_taps_{name}"), packed.len(), pack);
        let mut y = vec![T::new(7.); outputs];
        let arguments =
            Depthwise { from: at(&x), taps: pack.taps, to: y.as_mut_ptr() as u64, window, rows: rows as u32 };
        let count = rows * case.to[1].div_ceil(4) * (channels / at_once);
        run(host, &DEPTHWISE, &format!("depthwise_{name}_{at_once}"), count, arguments);
        let mut expected = vec![0f32; outputs];
        for [to, tap, from] in &terms {
            let tap = if rotated { taps - 1 - tap } else { *tap };
            for c in 0..channels {
                expected[to * channels + c] += x[from * channels + c].wide() * weight[c * taps + tap].wide();
            }
        }
        assert_close(&what, &wide(&y), &expected, 8. * T::ROUNDING);
    }

    for (stretch, add) in [(rows, false), (2, false), (3, true)] {
        let parts = rows.div_ceil(stretch);
        let mut sums = vec![7f32; parts * taps * channels];
        let arguments = TapSums {
            x: at(&x),
            dy: at(&dy),
            sums: sums.as_mut_ptr() as u64,
            window,
            rows: rows as u32,
            stretch: stretch as u32,
            parts: parts as u32,
        };
        run(host, &DEPTHWISE, &format!("tap_sums_{name}_{at_once}"), sums.len() / at_once, arguments);
        let mut gradient = vec![T::new(3.); taps * channels];
        let arguments = AddTaps {
            sums: at(&sums),
            gradient: gradient.as_mut_ptr() as u64,
            channels: channels as u32,
            count: taps as u32,
            parts: parts as u32,
            add: u32::from(add),
        };
        run(host, &DEPTHWISE, &format!("add_taps_{name}"), gradient.len(), arguments);
        let mut expected = vec![if add { 3f32 } else { 0. }; taps * channels];
        for [to, tap, from] in &terms {
            for c in 0..channels {
                expected[c * taps + tap] += x[from * channels + c].wide() * dy[to * channels + c].wide();
            }
        }
        assert_close(&format!("{what}, gradient"), &wide(&gradient), &expected, 8. * T::ROUNDING);
    }
}

#[test]
fn depthwise_convolutions_and_their_gradients_are_their_definition() {
    let Some(host) = Host::new() else { return };
    for case in [
        Case { from: [5, 6], to: [5, 6], kernel: [3, 3], dilation: 1, before: [-1, -1] },
        Case { from: [4, 9], to: [4, 9], kernel: [5, 3], dilation: 1, before: [-2, -1] },
        // Dilated, so that some taps never lie in the image; outputs fewer than inputs, and more.
        Case { from: [7, 8], to: [7, 8], kernel: [3, 3], dilation: 5, before: [-5, -5] },
        Case { from: [6, 5], to: [4, 3], kernel: [3, 3], dilation: 1, before: [0, 0] },
        Case { from: [2, 3], to: [4, 5], kernel: [1, 1], dilation: 1, before: [-1, -1] },
        Case { from: [4, 5], to: [2, 3], kernel: [1, 1], dilation: 1, before: [1, 1] },
    ] {
        for (channels, at_once) in [(3, 1), (8, 1), (8, 4)] {
            check::<f32>(host, &case, channels, at_once);
            check::<bf16>(host, &case, channels, at_once);
            check::<f16>(host, &case, channels, at_once);
        }
    }
}
