//! Pillow's bilinear scaling of 8-bit images with the same integer arithmetic, so scaled digits equal the tutorial's.

use super::Images;

/// Weights are fixed-point numbers with this many bits after the point.
const BITS: u32 = 22;

/// The inputs of one output pixel: the index of the first input pixel, and the weights from there on.
struct Taps {
    first: usize,
    weights: Vec<u32>,
}

pub(super) fn enlarge(images: &Images, side: usize) -> Images {
    let from = images.side();
    debug_assert!(side >= from, "the filter has to be wider to make images smaller");
    let taps: Vec<Taps> = (0..side).map(|i| taps(i, from, side)).collect();
    let mut wide = vec![0; from * side];
    let mut pixels = vec![0; images.len() * side * side];
    for (index, image) in pixels.chunks_exact_mut(side * side).enumerate() {
        // Rows first, then columns: Pillow rounds to bytes in between, so the order matters.
        for (row, wide) in images.get(index).chunks_exact(from).zip(wide.chunks_exact_mut(side)) {
            for (pixel, taps) in wide.iter_mut().zip(&taps) {
                *pixel = taps.apply(row[taps.first..].iter());
            }
        }
        for (row, taps) in image.chunks_exact_mut(side).zip(&taps) {
            for (column, pixel) in row.iter_mut().enumerate() {
                *pixel = taps.apply(wide[taps.first * side + column..].iter().step_by(side));
            }
        }
    }
    Images { side, pixels }
}

/// The weights of a triangle of half-width 1 around the output pixel's center, cut off at the image's edge.
fn taps(output: usize, from: usize, to: usize) -> Taps {
    let centre = (output as f64 + 0.5) * from as f64 / to as f64;
    let first = (centre - 0.5).max(0.) as usize;
    let last = ((centre + 1.5) as usize).min(from);
    let heights: Vec<f64> = (first..last).map(|j| (1. - (j as f64 - centre + 0.5).abs()).max(0.)).collect();
    let sum: f64 = heights.iter().sum();
    let fixed = |height| (height / sum * f64::from(1 << BITS) + 0.5) as u32;
    Taps { first, weights: heights.into_iter().map(fixed).collect() }
}

impl Taps {
    fn apply<'a>(&self, pixels: impl Iterator<Item = &'a u8>) -> u8 {
        let weighted = pixels.zip(&self.weights).map(|(&pixel, weight)| u32::from(pixel) * weight);
        let sum = weighted.sum::<u32>() + (1 << (BITS - 1));
        (sum >> BITS).min(255) as u8
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn even_paper_stays_even_and_an_edge_is_spread() {
        let even = Images::new(28, vec![200; 2 * 28 * 28]).unwrap();
        assert_eq!(even.enlarged(32), Images::new(32, vec![200; 2 * 32 * 32]).unwrap());
        let edge = Images::new(2, vec![0, 160, 0, 160]).unwrap();
        assert_eq!(edge.enlarged(4).get(0), [0, 40, 120, 160].repeat(4));
    }
}
