//! OpenSTL's rules: 28x28 digits move on straight lines at constant speed; where they overlap, the brighter pixel wins.
//!
//! C. Tan et al., "OpenSTL: A Comprehensive Benchmark of Spatio-Temporal Predictive Learning", NeurIPS 2023.

use std::f64::consts::PI;

use candlepower::seed::ChaCha8Rng;
use rand::Rng;

use super::Track;

/// Sequences in an epoch.
pub const EPOCH: usize = 10_000;
/// Distance that a digit moves per frame, relative to the distance between the walls.
const STEP: f64 = 0.1;

/// The random draws for one digit of a sequence, in this order.
#[derive(Debug, Clone, Copy)]
pub struct Draws {
    /// Start position between left and right, 0 to 1.
    pub x: f64,
    /// Start position between top and bottom, 0 to 1.
    pub y: f64,
    /// Direction in full turns, 0 to 1: 0 is right, 0.25 is down.
    pub turn: f64,
    /// Index of the digit's image.
    pub digit: usize,
}

impl Draws {
    /// Draws a position and direction, then one of `digits` images.
    pub fn new(rng: &mut ChaCha8Rng, digits: usize) -> Self {
        Self {
            x: rng.random(),
            y: rng.random(),
            turn: rng.random(),
            digit: rng.random_range(0..digits as u64) as usize,
        }
    }

    /// The digit's track, with corners from 0 to `room`. The digit moves before its first frame, too.
    pub fn track(self, frames: usize, room: usize) -> Track {
        let Self { mut x, mut y, turn, digit } = self;
        let (sin, cos) = (turn * 2. * PI).sin_cos();
        let (mut dx, mut dy) = (cos * STEP, sin * STEP);
        let mut show = |_| {
            advance(&mut y, &mut dy);
            advance(&mut x, &mut dx);
            [y, x].map(|position| (position * room as f64) as usize)
        };
        Track { digit, corners: (0..frames).map(&mut show).collect() }
    }
}

/// Moves a position. At a wall it stops and its velocity is reversed.
fn advance(position: &mut f64, velocity: &mut f64) {
    *position += *velocity;
    if *position <= 0. || *position >= 1. {
        *position = position.clamp(0., 1.);
        *velocity = -*velocity;
    }
}
