//! Random changes of whole samples, the same for all frames of a sample, that keep the content plausible.

use candlepower::data::Sample;
use candlepower::error::{Error, Result};
use rand::Rng;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Random changes of training samples, drawn anew in every epoch. Other splits are left unchanged.
///
/// The draws depend only on the sample's generator, and are the same for all frames of the sample.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Augment {
    /// Mirror half of the samples left to right.
    pub flip: bool,
    /// Mirror half of the samples top to bottom.
    pub flip_vertical: bool,
    /// Rotate samples by a random number of quarter turns. Frames must be square.
    pub rotate: bool,
    /// Crop at a random position instead of the center, if the data is cropped.
    pub crop: bool,
    /// Multiply all values by a random factor between 1 - brightness and 1 + brightness, and clip them to
    /// `[0, 1]`. At most 1. 0: no change.
    pub brightness: f32,
}

impl Augment {
    /// Rejects settings that frames of this size, (rows, columns), do not allow.
    pub(crate) fn check(&self, size: [usize; 2]) -> Result<()> {
        if !(0. ..=1.).contains(&self.brightness) {
            let message = format!("brightness: expected 0 to 1, found {}", self.brightness);
            return Err(Error::setting("augment", message));
        }
        if self.rotate && size[0] != size[1] {
            let message =
                format!("rotate: expected frames as high as wide, they have {}x{}", size[0], size[1]);
            return Err(Error::setting("augment", message));
        }
        Ok(())
    }

    /// Draws the change of this sample.
    pub(crate) fn draw(&self, sample: &Sample) -> Change {
        if !sample.augment {
            return Change::none();
        }
        // Draw everything, even what is not used, so one setting does not change the draws of another.
        let mut rng = sample.rng();
        let (flip, flip_vertical) = (rng.random::<bool>(), rng.random::<bool>());
        let quarters: u8 = rng.random_range(0..4);
        let at: [f32; 2] = [rng.random(), rng.random()];
        let brightness = 1. + self.brightness * rng.random_range(-1.0..1.0_f32);
        Change {
            flip: self.flip && flip,
            flip_vertical: self.flip_vertical && flip_vertical,
            quarters: if self.rotate { quarters } else { 0 },
            at: if self.crop { at } else { [0.5; 2] },
            brightness: (self.brightness > 0.).then_some(brightness),
        }
    }
}

/// The change of one sample.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub(crate) struct Change {
    flip: bool,
    flip_vertical: bool,
    /// Quarter turns, counterclockwise.
    quarters: u8,
    /// Relative position of a crop's corner within its possible range, 0 to 1 along each axis.
    at: [f32; 2],
    brightness: Option<f32>,
}

impl Change {
    /// The change of samples outside training: a center crop.
    pub(crate) fn none() -> Self {
        Self { at: [0.5; 2], ..Self::default() }
    }

    /// The corner of a crop: [row, column].
    pub(crate) fn corner(&self, size: [usize; 2], crop: [usize; 2]) -> [usize; 2] {
        [0, 1].map(|axis| {
            let places = size[axis] - crop[axis] + 1;
            ((places as f32 * self.at[axis]) as usize).min(places - 1)
        })
    }

    /// Applies the change to one plane of a frame, (rows, columns), in place. `scratch` is a reusable buffer.
    pub(crate) fn turn(&self, plane: &mut [f32], [height, width]: [usize; 2], scratch: &mut Vec<f32>) {
        if self.flip {
            plane.chunks_exact_mut(width).for_each(<[f32]>::reverse);
        }
        // A half turn equals both mirrors.
        if self.flip_vertical {
            for row in 0..height / 2 {
                let (above, below) = plane.split_at_mut((height - 1 - row) * width);
                above[row * width..][..width].swap_with_slice(&mut below[..width]);
            }
        }
        if self.quarters >= 2 {
            plane.reverse();
        }
        if self.quarters % 2 == 1 {
            scratch.clear();
            scratch.extend_from_slice(plane);
            for (row, out) in plane.chunks_exact_mut(height).enumerate() {
                let column = width - 1 - row;
                out.iter_mut()
                    .zip(scratch[column..].iter().step_by(width))
                    .for_each(|(out, value)| *out = *value);
            }
        }
    }

    /// Changes the brightness of a frame's values, in place.
    pub(crate) fn brighten(&self, values: &mut [f32]) {
        if let Some(factor) = self.brightness {
            values.iter_mut().for_each(|value| *value = (*value * factor).clamp(0., 1.));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candlepower::data::Split;

    fn sample(index: usize, epoch: u64) -> Sample {
        Sample { index, split: Split::Train, epoch, seed: 3, repeat: 0, augment: true }
    }

    fn all() -> Augment {
        Augment { flip: true, flip_vertical: true, rotate: true, crop: true, brightness: 0.3 }
    }

    fn turned(change: Change, size: [usize; 2], plane: &[f32]) -> Vec<f32> {
        let mut plane = plane.to_vec();
        change.turn(&mut plane, size, &mut Vec::new());
        plane
    }

    #[test]
    fn mirrors_and_turns() {
        let plane = [1., 2., 3., 4., 5., 6.];
        let flip = Change { flip: true, ..Change::default() };
        assert_eq!(turned(flip, [2, 3], &plane), [3., 2., 1., 6., 5., 4.]);
        let vertical = Change { flip_vertical: true, ..Change::default() };
        assert_eq!(turned(vertical, [2, 3], &plane), [4., 5., 6., 1., 2., 3.]);
        assert_eq!(turned(vertical, [3, 2], &plane), [5., 6., 3., 4., 1., 2.]);
        let square = [1., 2., 3., 4.];
        let quarters = |quarters| turned(Change { quarters, ..Change::default() }, [2, 2], &square);
        assert_eq!(quarters(1), [2., 4., 1., 3.]);
        assert_eq!(quarters(2), [4., 3., 2., 1.]);
        assert_eq!(quarters(3), [3., 1., 4., 2.]);
    }

    #[test]
    fn a_change_is_a_function_of_its_sample_and_of_training_alone() {
        let changes: Vec<Change> = (0..64).map(|i| all().draw(&sample(i, 1))).collect();
        assert!(changes.iter().enumerate().all(|(i, change)| *change == all().draw(&sample(i, 1))));
        assert_ne!(changes[0], all().draw(&sample(0, 2)));
        let [flips, turns] =
            [changes.iter().filter(|c| c.flip).count(), changes.iter().filter(|c| c.quarters == 3).count()];
        assert!((20..44).contains(&flips) && (6..28).contains(&turns), "{flips} flips, {turns} turns");
        assert!(changes.iter().all(|c| c.brightness.is_some_and(|b| (0.7..=1.3).contains(&b))));
        // A setting on its own draws what it draws together with all others.
        let alone = Augment { rotate: true, ..Augment::default() };
        assert!((0..64).all(|i| alone.draw(&sample(i, 1)).quarters == changes[i].quarters));
        let still = Change { at: [0.5; 2], ..Change::default() };
        assert!((0..64).all(|i| all().draw(&Sample { augment: false, ..sample(i, 0) }) == still));
        assert_eq!(Augment::default().draw(&sample(0, 0)), still);
    }

    #[test]
    fn crops_are_in_the_middle_or_anywhere() {
        let middle = Change { at: [0.5; 2], ..Change::default() };
        assert_eq!(middle.corner([10, 8], [4, 8]), [3, 0]);
        let mut corners = [false; 7];
        (0..200).for_each(|i| corners[all().draw(&sample(i, 0)).corner([10, 4], [4, 4])[0]] = true);
        assert_eq!(corners, [true; 7]);
    }

    #[test]
    fn brightness_is_clipped() {
        let mut values = [0.2, 0.5, 1.];
        Change { brightness: Some(1.5), ..Change::default() }.brighten(&mut values);
        assert_eq!(values, [0.3, 0.75, 1.]);
    }

    #[test]
    fn what_cannot_be_done_is_refused() {
        let refusal = |augment: Augment| augment.check([4, 5]).unwrap_err().to_string();
        assert_eq!(
            refusal(Augment { rotate: true, ..Augment::default() }),
            "`augment`: rotate: expected frames as high as wide, they have 4x5"
        );
        assert_eq!(
            refusal(Augment { brightness: 2., ..Augment::default() }),
            "`augment`: brightness: expected 0 to 1, found 2"
        );
        assert!(all().check([4, 4]).is_ok());
    }
}
