//! Digits written by a slightly shaky pen: data that needs no download.
//!
//! A digit is a few strokes through points on a grid 7 wide and 10 high. Moving the points a little,
//! slanting, stretching and changing the pen gives any number of variants. Only additions, multiplications
//! and square roots are used, so every machine draws the same pixels.

use candlepower::data::Split;
use candlepower::seed;
use rand::Rng;

use super::{Images, SIDE};

/// Digits for training, and others for validation and test.
const TRAIN: usize = 1000;
const HELD_OUT: usize = 100;

/// The digit is written into a box of this size in the middle of the image, as in MNIST.
const BOX: f32 = 20.;
/// Straight pieces per curve between two points.
const PIECES: usize = 8;
/// Half the distance over which a line fades into the paper, in pixels.
const SOFTNESS: f32 = 0.75;

type Point = [f32; 2];
/// A line drawn without lifting the pen: smooth curves, each starting where the previous one ended, at a corner.
type Stroke = &'static [&'static [Point]];
type Glyph = &'static [Stroke];

/// The ways to write each digit: (x, y), x to the right, y down.
const GLYPHS: [&[Glyph]; 10] = [
    &[&[&[&[
        [4.0, 0.2],
        [1.6, 1.6],
        [0.4, 5.2],
        [1.4, 8.9],
        [3.6, 10.0],
        [5.8, 8.4],
        [6.7, 5.0],
        [5.8, 1.4],
        [3.9, 0.1],
        [2.4, 0.9],
    ]]]],
    &[
        &[&[&[[3.6, 0.0], [3.4, 3.3], [3.3, 6.7], [3.1, 10.0]]]],
        &[&[&[[1.9, 2.3], [3.6, 0.0]], &[[3.5, 5.0], [3.3, 10.0]]]],
    ],
    &[
        &[&[
            &[[0.7, 2.6], [1.9, 0.5], [4.3, 0.1], [5.8, 2.0], [4.9, 5.0], [2.6, 7.8], [0.4, 9.7]],
            &[[3.2, 9.4], [6.8, 9.6]],
        ]],
        &[&[&[
            [0.8, 2.2],
            [2.4, 0.3],
            [4.8, 0.5],
            [5.6, 2.8],
            [4.2, 6.0],
            [1.8, 9.1],
            [0.5, 9.2],
            [0.9, 7.7],
            [2.7, 7.8],
            [4.6, 9.3],
            [6.9, 9.0],
        ]]],
    ],
    &[&[&[
        &[[0.8, 1.5], [2.8, 0.1], [5.1, 0.8], [5.2, 3.2], [2.6, 4.7]],
        &[[5.2, 5.2], [6.2, 7.4], [4.8, 9.6], [2.2, 9.9], [0.3, 8.7]],
    ]]],
    &[
        &[
            &[&[[1.5, 0.4], [0.9, 3.0], [0.6, 5.6]], &[[3.4, 5.7], [6.8, 5.3]]],
            &[&[[5.7, 0.2], [5.4, 5.0], [4.9, 10.0]]],
        ],
        &[
            &[&[[5.0, 0.1], [2.6, 3.4], [0.3, 6.7]], &[[3.4, 6.7], [7.0, 6.4]]],
            &[&[[5.0, 0.1], [4.8, 5.0], [4.5, 10.0]]],
        ],
    ],
    &[&[&[
        &[[6.4, 0.3], [4.0, 0.3], [1.7, 0.5]],
        &[[1.4, 2.5], [1.1, 4.6]],
        &[[3.4, 3.9], [5.6, 5.0], [5.9, 7.5], [4.2, 9.6], [2.0, 9.9], [0.2, 8.9]],
    ]]],
    &[&[&[&[
        [4.9, 0.0],
        [2.5, 2.3],
        [0.8, 5.8],
        [0.9, 8.7],
        [3.0, 10.0],
        [5.3, 8.9],
        [5.8, 6.7],
        [4.0, 5.4],
        [2.0, 6.3],
        [1.0, 8.2],
    ]]]],
    &[
        &[&[&[[0.3, 0.9], [3.0, 0.7], [6.3, 0.3]], &[[4.9, 3.6], [3.5, 7.0], [2.8, 10.0]]]],
        &[
            &[&[[0.3, 0.9], [3.0, 0.7], [6.3, 0.3]], &[[4.9, 3.6], [3.5, 7.0], [2.8, 10.0]]],
            &[&[[2.0, 5.3], [6.0, 5.0]]],
        ],
    ],
    &[&[&[&[
        [5.5, 1.5],
        [3.6, 0.1],
        [1.5, 1.2],
        [1.9, 3.4],
        [4.3, 5.2],
        [5.6, 7.6],
        [4.2, 9.8],
        [2.0, 9.6],
        [1.1, 7.6],
        [2.6, 5.3],
        [4.9, 3.3],
        [5.6, 1.3],
    ]]]],
    &[
        &[&[
            &[[5.6, 1.6], [3.5, 0.1], [1.1, 1.6], [0.9, 4.1], [2.9, 5.1], [4.9, 3.7], [5.7, 1.2]],
            &[[5.5, 5.4], [5.0, 10.0]],
        ]],
        &[&[&[
            [5.5, 1.4],
            [3.3, 0.2],
            [1.1, 1.8],
            [1.1, 4.2],
            [3.1, 4.9],
            [5.0, 3.5],
            [5.7, 1.5],
            [5.6, 5.2],
            [4.6, 8.6],
            [2.8, 10.0],
            [1.0, 9.5],
        ]]],
    ],
];

/// The images of one split, and the digit that each shows. Training images differ from those of the other splits.
pub(super) fn draw(split: Split) -> (Images, Vec<u8>) {
    let range = if split == Split::Train { 0..TRAIN } else { TRAIN..TRAIN + HELD_OUT };
    let mut pixels = vec![0; range.len() * SIDE * SIDE];
    let labels: Vec<u8> = range.clone().map(|index| (index % GLYPHS.len()) as u8).collect();
    for ((image, index), &label) in pixels.chunks_exact_mut(SIDE * SIDE).zip(range).zip(&labels) {
        let rng = seed::generator(0, [seed::name("builtin digits"), index as u64, 0]);
        write(label, rng, image);
    }
    (Images { side: SIDE, pixels }, labels)
}

/// Writes one digit onto an empty image.
fn write(digit: u8, mut rng: impl Rng, image: &mut [u8]) {
    let ways = GLYPHS[usize::from(digit)];
    let glyph = ways[rng.random_range(0..ways.len() as u32) as usize];
    // Most people lean to the right; few are upright or lean left.
    let slant = rng.random_range(-0.1..0.45_f32);
    let tilt = rng.random_range(-0.08..0.08_f32);
    let width = rng.random_range(0.85..1.2_f32);
    let size = BOX * rng.random_range(0.88..1_f32);
    let pen = rng.random_range(0.95..1.7_f32);
    let place = |[x, y]: Point, rng: &mut dyn FnMut() -> f32| {
        let [x, y] = [width * x + rng(), y + rng()];
        [x - slant * y, y + tilt * x]
    };
    let mut shake = || rng.random_range(-0.4..0.4_f32);
    let mut lines: Vec<[Point; 2]> = Vec::new();
    for stroke in glyph {
        let mut corner = None;
        for curve in *stroke {
            let points: Vec<Point> =
                corner.into_iter().chain(curve.iter().map(|&point| place(point, &mut shake))).collect();
            corner = points.last().copied();
            lines.extend(smooth(&points));
        }
    }
    fit(&mut lines, size - 2. * pen);
    for [from, to] in lines {
        ink(image, from, to, pen);
    }
}

/// A Catmull-Rom curve through the points, as straight pieces.
fn smooth(points: &[Point]) -> Vec<[Point; 2]> {
    let at = |i: usize| points[i.min(points.len() - 1)];
    let mut lines = Vec::with_capacity(points.len() * PIECES);
    for i in 1..points.len() {
        let [before, from, to, after] = [at(i.saturating_sub(2)), at(i - 1), at(i), at(i + 1)];
        let on_curve = |t: f32| {
            [0, 1].map(|axis| {
                let [a, b, c, d] = [before[axis], from[axis], to[axis], after[axis]];
                let (linear, square, cube) = (c - a, 2. * a - 5. * b + 4. * c - d, 3. * (b - c) + d - a);
                b + 0.5 * t * (linear + t * (square + t * cube))
            })
        };
        let step = |piece: usize| on_curve(piece as f32 / PIECES as f32);
        lines.extend((0..PIECES).map(|piece| [step(piece), step(piece + 1)]));
    }
    lines
}

/// Scales the lines to fit into a square of `size` in the middle of the image, keeping their proportions.
fn fit(lines: &mut [[Point; 2]], size: f32) {
    let points = || lines.iter().flatten();
    let bounds = [0, 1].map(|axis| {
        let low = points().fold(f32::INFINITY, |low, point| low.min(point[axis]));
        let high = points().fold(f32::NEG_INFINITY, |high, point| high.max(point[axis]));
        (low, high)
    });
    let scale = size / bounds.iter().fold(1e-3, |most, (low, high)| (high - low).max(most));
    for point in lines.iter_mut().flatten() {
        for (x, (low, high)) in point.iter_mut().zip(bounds) {
            *x = SIDE as f32 / 2. + scale * (*x - (low + high) / 2.);
        }
    }
}

/// Draws a straight line with a round pen of radius `pen`. Existing ink is never lightened.
fn ink(image: &mut [u8], from: Point, to: Point, pen: f32) {
    let reach = pen + SOFTNESS;
    let [columns, rows] = [0, 1].map(|axis| {
        let (low, high) = (from[axis].min(to[axis]) - reach, from[axis].max(to[axis]) + reach);
        low.max(0.) as usize..(high.max(0.) as usize + 1).min(SIDE)
    });
    let along = [to[0] - from[0], to[1] - from[1]];
    let length2 = (along[0] * along[0] + along[1] * along[1]).max(1e-6);
    for row in rows {
        for column in columns.clone() {
            let pixel = [column as f32 + 0.5 - from[0], row as f32 + 0.5 - from[1]];
            let nearest = ((pixel[0] * along[0] + pixel[1] * along[1]) / length2).clamp(0., 1.);
            let gap = [pixel[0] - nearest * along[0], pixel[1] - nearest * along[1]];
            let distance = (gap[0] * gap[0] + gap[1] * gap[1]).sqrt();
            let cover = ((reach - distance) / (2. * SOFTNESS)).clamp(0., 1.);
            let value = &mut image[row * SIDE + column];
            *value = (*value).max((255. * cover + 0.5) as u8);
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn digits_are_as_dark_as_mnist_and_keep_to_the_middle() {
        let (images, labels) = draw(Split::Train);
        assert_eq!((images.len(), labels.len(), images.side()), (TRAIN, TRAIN, SIDE));
        let mean = images.pixels.iter().map(|&pixel| f64::from(pixel)).sum::<f64>();
        let mean = mean / 255. / images.pixels.len() as f64;
        assert!((0.12..0.14).contains(&mean), "MNIST's mean is 0.1307, this one's is {mean:.4}");
        for (index, pixel) in images.pixels.iter().enumerate() {
            let (row, column) = (index / SIDE % SIDE, index % SIDE);
            let margin = row.min(column).min(SIDE - 1 - row).min(SIDE - 1 - column);
            assert!(*pixel == 0 || margin >= 3, "digit {} has ink at {row}, {column}", index / SIDE / SIDE);
        }
    }

    #[test]
    fn every_digit_is_drawn_as_often_and_no_two_are_the_same() {
        let (train, labels) = draw(Split::Train);
        let (held_out, _) = draw(Split::Val);
        assert_eq!(draw(Split::Test).0, held_out);
        assert_eq!(draw(Split::Train).0, train);
        for digit in 0..10 {
            assert_eq!(labels.iter().filter(|&&label| label == digit).count(), TRAIN / 10);
        }
        let both = train.pixels.chunks(SIDE * SIDE).chain(held_out.pixels.chunks(SIDE * SIDE));
        let different: std::collections::HashSet<_> = both.collect();
        assert_eq!(different.len(), TRAIN + HELD_OUT);
    }
}
