//! Generates frames from random numbers: first the tracks of digits, then their pixels.

use candlepower::seed::ChaCha8Rng;

use super::svg::Bounce;
use super::{Protocol, openstl, svg};
use crate::mnist::Images;

/// The path of one digit through a sequence.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Track {
    /// Index of the digit's image.
    pub digit: usize,
    /// The digit's top left corner in each frame, [row, column].
    pub corners: Vec<[usize; 2]>,
}

/// Generates sequences of moving digits.
pub struct Generator {
    protocol: Protocol,
    stochastic: bool,
    digits: Images,
    digits_per_frame: usize,
    image_size: usize,
}

impl Generator {
    /// A generator of square frames of `image_size` rows, at least 33, with `digits_per_frame` of these 28x28
    /// `digits` in each.
    pub fn new(protocol: Protocol, digits: &Images, digits_per_frame: usize, image_size: usize) -> Self {
        let digits = match protocol {
            Protocol::Svg => digits.enlarged(svg::DIGIT),
            Protocol::Openstl => digits.clone(),
        };
        Self { protocol, stochastic: false, digits, digits_per_frame, image_size }
    }

    /// Whether digits leave a wall with a new random velocity; only [`Protocol::Svg`] supports this.
    pub fn stochastic(mut self, stochastic: bool) -> Self {
        self.stochastic = stochastic;
        self
    }

    /// Draws the tracks of all digits of a sequence from `rng`.
    pub fn tracks(&self, frames: usize, rng: &mut ChaCha8Rng) -> Vec<Track> {
        let (room, digits) = (self.image_size - self.digits.side(), self.digits.len());
        let track = |_| match self.protocol {
            Protocol::Svg => {
                let draws = svg::Draws::new(rng, digits, room);
                draws.track(frames, room, if self.stochastic { Bounce::Redraw(rng) } else { Bounce::Mirror })
            }
            Protocol::Openstl => openstl::Draws::new(rng, digits).track(frames, room),
        };
        (0..self.digits_per_frame).map(track).collect()
    }

    /// Draws a sequence into `frames`, which must be black: each (H, W), f32, in order of time.
    pub fn draw<'a>(&self, tracks: &[Track], frames: impl Iterator<Item = &'a mut [f32]>) {
        let grey = |track: &Track| -> Vec<f32> {
            self.digits.get(track.digit).iter().map(|&pixel| f32::from(pixel) / 255.).collect()
        };
        let digits: Vec<Vec<f32>> = tracks.iter().map(grey).collect();
        for (time, frame) in frames.enumerate() {
            for (track, digit) in tracks.iter().zip(&digits) {
                match self.protocol {
                    // Clipping after every digit equals clipping once at the end, because values never decrease.
                    Protocol::Svg => self.stamp(frame, digit, track.corners[time], |a, b| (a + b).min(1.)),
                    Protocol::Openstl => self.stamp(frame, digit, track.corners[time], f32::max),
                }
            }
        }
    }

    fn stamp(&self, frame: &mut [f32], digit: &[f32], [y, x]: [usize; 2], blend: impl Fn(f32, f32) -> f32) {
        let side = self.digits.side();
        let rows = frame[y * self.image_size..].chunks_mut(self.image_size);
        for (row, ink) in rows.zip(digit.chunks_exact(side)) {
            for (pixel, &ink) in row[x..x + side].iter_mut().zip(ink) {
                *pixel = blend(*pixel, ink);
            }
        }
    }
}
