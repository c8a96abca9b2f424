//! Windows over sequences of frames: which frames are a sample's input, and which its target.

use std::ops::Range;

use candlepower::error::{Error, Result};

/// How samples are cut from a sequence.
///
/// With 3 frames in, 2 out, `every = 2` and `gap = 1`, a sample's frames are 0, 2, 4 and then 8, 10.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Windows {
    /// Number of input frames.
    pub(crate) frames_in: usize,
    /// Number of frames to predict.
    pub(crate) frames_out: usize,
    /// Frames from the start of one sample to the start of the next. 1 takes every possible sample; the span
    /// of a sample gives samples that share no frame.
    pub(crate) stride: usize,
    /// Step between the frames of a sample. 1: every frame.
    pub(crate) every: usize,
    /// Frames left out between input and target, counted in steps of `every`.
    pub(crate) gap: usize,
}

impl Windows {
    /// Rejects values that are wrong for any sequence.
    pub(crate) fn check(&self) -> Result<()> {
        let least = [
            ("frames_in", self.frames_in),
            ("frames_out", self.frames_out),
            ("stride", self.stride),
            ("every", self.every),
        ];
        match least.into_iter().find(|(_, value)| *value == 0) {
            Some((key, _)) => Err(Error::setting(key, "expected at least 1, found 0")),
            None => Ok(()),
        }
    }

    /// Frames from a sample's first to its last, inclusive.
    pub(crate) fn span(&self) -> usize {
        (self.frames_in + self.gap + self.frames_out - 1) * self.every + 1
    }

    /// The first frames of the samples that lie entirely within `frames`.
    pub(crate) fn starts(&self, frames: Range<usize>) -> impl Iterator<Item = usize> + use<> {
        let end = (frames.end + 1).saturating_sub(self.span());
        (frames.start..end.max(frames.start)).step_by(self.stride)
    }

    /// The frames of the sample that starts at frame `start`: those of the input, then those of the target.
    pub(crate) fn frames(&self, start: usize) -> impl Iterator<Item = usize> + use<> {
        let (frames_in, gap, every) = (self.frames_in, self.gap, self.every);
        let count = frames_in + self.frames_out;
        (0..count).map(move |i| start + (if i < frames_in { i } else { i + gap }) * every)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_are_cut_with_stride_step_and_gap() {
        let plain = Windows { frames_in: 2, frames_out: 1, stride: 1, every: 1, gap: 0 };
        assert_eq!(plain.starts(0..5).collect::<Vec<_>>(), [0, 1, 2]);
        assert_eq!(plain.frames(2).collect::<Vec<_>>(), [2, 3, 4]);
        let wide = Windows { frames_in: 3, frames_out: 2, stride: 4, every: 2, gap: 1 };
        assert_eq!(wide.frames(1).collect::<Vec<_>>(), [1, 3, 5, 9, 11]);
        // Frames 1 to 11 hold one sample; frames up to 15 also hold the next one, four frames later.
        assert_eq!(wide.starts(1..12).collect::<Vec<_>>(), [1]);
        assert_eq!(wide.starts(1..16).collect::<Vec<_>>(), [1, 5]);
        assert_eq!(wide.starts(1..11).collect::<Vec<_>>(), [0_usize; 0]);
        assert_eq!(plain.starts(7..8).count(), 0);
    }

    #[test]
    fn every_sample_lies_within_its_frames() {
        for windows in [
            Windows { frames_in: 4, frames_out: 3, stride: 2, every: 3, gap: 2 },
            Windows { frames_in: 1, frames_out: 1, stride: 5, every: 1, gap: 0 },
        ] {
            let starts: Vec<usize> = windows.starts(10..70).collect();
            assert!(!starts.is_empty());
            assert!(
                starts.iter().flat_map(|&start| windows.frames(start)).all(|frame| (10..70).contains(&frame))
            );
            let last = starts[starts.len() - 1] + windows.stride;
            assert!(windows.frames(last).any(|frame| frame >= 70), "another sample would fit");
        }
    }

    #[test]
    fn nothing_is_zero_that_may_not_be() {
        let windows = Windows { frames_in: 1, frames_out: 1, stride: 1, every: 0, gap: 0 };
        assert_eq!(windows.check().unwrap_err().to_string(), "`every`: expected at least 1, found 0");
        assert!(Windows { every: 1, ..windows }.check().is_ok());
    }
}
