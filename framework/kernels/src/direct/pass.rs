//! Which taps each output of a convolution, or of its gradient, reads.

use super::Geometry;

/// Outputs at `origin + step * (j, i)`, each the sum over taps of the inputs at `in_step * (j, i) + (tap.y, tap.x)`.
pub(super) struct Pass {
    pub(super) origin: [usize; 2],
    pub(super) step: usize,
    pub(super) count: [usize; 2],
    pub(super) in_step: usize,
    pub(super) taps: Vec<Tap>,
}

#[derive(Clone, Copy)]
pub(super) struct Tap {
    /// Index in the weights.
    pub(super) index: usize,
    pub(super) y: isize,
    pub(super) x: isize,
}

pub(super) fn forward_pass(g: &Geometry) -> Pass {
    let at = |k: usize| (k * g.dilation) as isize - g.padding as isize;
    let taps = (0..g.taps())
        .map(|index| Tap { index, y: at(index / g.kernel_width), x: at(index % g.kernel_width) })
        .collect();
    Pass { origin: [0, 0], step: 1, count: [g.out_height, g.out_width], in_step: g.stride, taps }
}

/// The passes of the gradient of the input: pixel y is read by output (y + padding - tap * dilation) /
/// stride, for each tap for which this division has no remainder.
pub(super) fn backward_passes(g: &Geometry) -> Vec<Pass> {
    let along = |phase: usize, kernel: usize| -> Vec<(usize, isize)> {
        // Later taps read earlier outputs: reversed, so that neighbouring outputs are in ascending order.
        (0..kernel)
            .rev()
            .map(|k| (k, (phase + g.padding) as isize - (k * g.dilation) as isize))
            .filter(|(_, distance)| distance.rem_euclid(g.stride as isize) == 0)
            .map(|(k, distance)| (k, distance.div_euclid(g.stride as isize)))
            .collect()
    };
    let mut passes = Vec::new();
    for phase_y in 0..g.stride.min(g.height) {
        for phase_x in 0..g.stride.min(g.width) {
            let (ys, xs) = (along(phase_y, g.kernel_height), along(phase_x, g.kernel_width));
            let mut taps = Vec::with_capacity(ys.len() * xs.len());
            for &(ky, y) in &ys {
                taps.extend(xs.iter().map(|&(kx, x)| Tap { index: ky * g.kernel_width + kx, y, x }));
            }
            let count = [(g.height - phase_y).div_ceil(g.stride), (g.width - phase_x).div_ceil(g.stride)];
            passes.push(Pass { origin: [phase_y, phase_x], step: g.stride, count, in_step: 1, taps });
        }
    }
    passes
}
