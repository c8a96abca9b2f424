//! The tutorial's rules: 32x32 digits move by whole pixels; where they overlap, they add up to at most white.
//!
//! E. Denton, R. Fergus, "Stochastic Video Generation with a Learned Prior", ICML 2018, and its code.

use candlepower::seed::ChaCha8Rng;
use rand::Rng;

use super::Track;

/// Rows and columns of a digit.
pub const DIGIT: usize = 32;
/// Sequences in an epoch.
pub const EPOCH: usize = 60_000;
/// Maximum speed of a digit along each axis, in pixels per frame.
const FASTEST: i32 = 4;

/// The random draws for one digit of a sequence, in this order.
#[derive(Debug, Clone, Copy)]
pub struct Draws {
    /// Index of the digit's image.
    pub digit: usize,
    /// Start column.
    pub x: i32,
    /// Start row.
    pub y: i32,
    /// Columns per frame.
    pub dx: i32,
    /// Rows per frame.
    pub dy: i32,
}

/// How a digit leaves a wall.
pub enum Bounce<'a> {
    /// The velocity is mirrored.
    Mirror,
    /// Both components are drawn again; the one perpendicular to the wall points away from it and is not
    /// zero.
    Redraw(&'a mut ChaCha8Rng),
}

impl Draws {
    /// Draws one of `digits` images, a start position whose corner is below `room`, and a velocity.
    pub fn new(rng: &mut ChaCha8Rng, digits: usize, room: usize) -> Self {
        Self {
            digit: rng.random_range(0..digits as u64) as usize,
            x: rng.random_range(0..room as i32),
            y: rng.random_range(0..room as i32),
            dx: rng.random_range(-FASTEST..=FASTEST),
            dy: rng.random_range(-FASTEST..=FASTEST),
        }
    }

    /// The digit's track. Each frame first moves the digit back from behind a wall, then shows it, then moves
    /// it on.
    pub fn track(self, frames: usize, room: usize, mut bounce: Bounce) -> Track {
        let Self { digit, mut x, mut y, mut dx, mut dy } = self;
        let mut show = |_| {
            if let Some(inward) = back_inside(&mut y, room) {
                bounce.turn(inward, &mut dy, &mut dx);
            }
            if let Some(inward) = back_inside(&mut x, room) {
                bounce.turn(inward, &mut dx, &mut dy);
            }
            let corner = [y as usize, x as usize];
            (y, x) = (y + dy, x + dx);
            corner
        };
        Track { digit, corners: (0..frames).map(&mut show).collect() }
    }
}

/// Moves a position back into `0..room`. If it was outside, returns the inward direction, 1 or -1.
fn back_inside(position: &mut i32, room: usize) -> Option<i32> {
    let last = room as i32 - 1;
    let inward = match *position {
        p if p < 0 => 1,
        p if p > last => -1,
        _ => return None,
    };
    *position = (*position).clamp(0, last);
    Some(inward)
}

impl Bounce<'_> {
    fn turn(&mut self, inward: i32, toward_wall: &mut i32, along_wall: &mut i32) {
        match self {
            Bounce::Mirror => *toward_wall = -*toward_wall,
            Bounce::Redraw(rng) => {
                *toward_wall = inward * rng.random_range(1..=FASTEST);
                *along_wall = rng.random_range(-FASTEST..=FASTEST);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn track(draws: Draws, bounce: Bounce) -> Vec<[usize; 2]> {
        draws.track(4, 32, bounce).corners
    }

    #[test]
    fn walls_are_at_0_and_31() {
        let draws = Draws { digit: 0, x: 30, y: 2, dx: 4, dy: -4 };
        assert_eq!(track(draws, Bounce::Mirror), [[2, 30], [0, 31], [4, 27], [8, 23]]);
        let still = Draws { digit: 0, x: 30, y: 2, dx: 0, dy: 0 };
        assert_eq!(track(still, Bounce::Mirror), [[2, 30]; 4]);
    }

    #[test]
    fn a_stochastic_bounce_leads_away_from_the_wall() {
        for seed in 0..200 {
            let mut rng = candlepower::seed::generator(seed, [0; 3]);
            let draws = Draws { digit: 0, x: 16, y: 31, dx: 0, dy: 1 };
            let corners = track(draws, Bounce::Redraw(&mut rng));
            assert_eq!(corners[..2], [[31, 16], [31, 16]]);
            assert!((27..31).contains(&corners[2][0]), "{corners:?}");
            assert!((12..=20).contains(&corners[2][1]), "{corners:?}");
        }
    }

    #[test]
    fn draws_reach_every_start_and_velocity() {
        let mut rng = candlepower::seed::generator(0, [0; 3]);
        let draws: Vec<Draws> = (0..5000).map(|_| Draws::new(&mut rng, 10, 32)).collect();
        let range = |of: fn(&Draws) -> i32| {
            let values = draws.iter().map(of);
            (values.clone().min(), values.max())
        };
        assert_eq!(range(|draws| draws.digit as i32), (Some(0), Some(9)));
        assert_eq!(range(|draws| draws.x), (Some(0), Some(31)));
        assert_eq!(range(|draws| draws.y), (Some(0), Some(31)));
        assert_eq!(range(|draws| draws.dx), (Some(-4), Some(4)));
        assert_eq!(range(|draws| draws.dy), (Some(-4), Some(4)));
    }
}
