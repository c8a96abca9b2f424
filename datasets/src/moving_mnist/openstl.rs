//! OpenSTL's rules: digits of 28x28 move on straight lines at one speed; where they cross, the brighter pixel shows.
//!
//! C. Tan et al., "OpenSTL: A Comprehensive Benchmark of Spatio-Temporal Predictive Learning", NeurIPS 2023.

use std::f64::consts::PI;

use candlepower::seed::ChaCha8Rng;
use rand::Rng;

use super::Track;

/// Sequences in an epoch.
pub const EPOCH: usize = 10_000;
/// How far a digit moves in a frame; the way from wall to wall is 1.
const STEP: f64 = 0.1;

/// What is drawn for one digit of a sequence, in this order.
#[derive(Debug, Clone, Copy)]
pub struct Draws {
    /// Where it starts between left and right, 0 to 1.
    pub x: f64,
    /// Where it starts between top and bottom, 0 to 1.
    pub y: f64,
    /// Its direction in full turns, 0 to 1: from right over down.
    pub turn: f64,
    /// Which image it shows.
    pub digit: usize,
}

impl Draws {
    /// Draws a way, then one of `digits` images.
    pub fn new(rng: &mut ChaCha8Rng, digits: usize) -> Self {
        Self {
            x: rng.random(),
            y: rng.random(),
            turn: rng.random(),
            digit: rng.random_range(0..digits as u64) as usize,
        }
    }

    /// The digit's way, with corners from 0 to `room`. It moves before its first frame too.
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

/// Moves a position, which stops at a wall and turns round there.
fn advance(position: &mut f64, velocity: &mut f64) {
    *position += *velocity;
    if *position <= 0. || *position >= 1. {
        *position = position.clamp(0., 1.);
        *velocity = -*velocity;
    }
}
