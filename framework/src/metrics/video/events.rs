//! Event forecasts: whether a value reaches a threshold, counted per pixel (Wilks, "Statistical Methods in
//! the Atmospheric Sciences", the chapter on forecast verification).

use std::ops::AddAssign;

use candle_core::Tensor;

use super::Pair;
use crate::error::Result;

/// Counts of predicted and observed events. Counts can be added; scores are computed from the sums.
///
/// A score is `None` if its denominator is zero.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Contingency {
    /// Predicted and observed.
    pub hits: u64,
    /// Observed but not predicted.
    pub misses: u64,
    /// Predicted but not observed.
    pub false_alarms: u64,
    /// Neither predicted nor observed.
    pub correct_negatives: u64,
}

impl Contingency {
    /// The critical success index: hits among all predicted or observed events, 0 to 1.
    pub fn csi(&self) -> Option<f64> {
        ratio(self.hits, self.hits + self.misses + self.false_alarms)
    }

    /// The probability of detection: hits among all observed events, 0 to 1.
    pub fn pod(&self) -> Option<f64> {
        ratio(self.hits, self.hits + self.misses)
    }

    /// The false alarm ratio: false alarms among all predicted events, 0 to 1; lower is better.
    pub fn far(&self) -> Option<f64> {
        ratio(self.false_alarms, self.hits + self.false_alarms)
    }

    /// The Heidke skill score: the fraction of correct answers beyond chance, at most 1; 0 is chance.
    pub fn hss(&self) -> Option<f64> {
        let [a, b, c, d] =
            [self.hits, self.false_alarms, self.misses, self.correct_negatives].map(|count| count as f64);
        let below = (a + c) * (c + d) + (a + b) * (b + d);
        (below > 0.).then(|| 2. * (a * d - b * c) / below)
    }

    fn count(&mut self, predicted: bool, came: bool) {
        *match (predicted, came) {
            (true, true) => &mut self.hits,
            (false, true) => &mut self.misses,
            (true, false) => &mut self.false_alarms,
            (false, false) => &mut self.correct_negatives,
        } += 1;
    }
}

fn ratio(part: u64, of: u64) -> Option<f64> {
    (of > 0).then(|| part as f64 / of as f64)
}

impl AddAssign for Contingency {
    fn add_assign(&mut self, other: Self) {
        self.hits += other.hits;
        self.misses += other.misses;
        self.false_alarms += other.false_alarms;
        self.correct_negatives += other.correct_negatives;
    }
}

/// Counts for each frame where a value of at least `level` was predicted and where it was observed.
/// `prediction` and `target` are (B, T, C, H, W); the result has all frames of a sample, then the next
/// sample's. Pixels where `mask` (B, T, 1, H, W) is 0 are unknown and not counted.
pub fn contingency(
    prediction: &Tensor,
    target: &Tensor,
    mask: Option<&Tensor>,
    level: f32,
) -> Result<Vec<Contingency>> {
    Ok(Pair::new(prediction, target)?.masked(mask)?.contingency(level))
}

impl Pair {
    pub(super) fn contingency(&self, level: f32) -> Vec<Contingency> {
        let (level, plane) = (f64::from(level), self.height * self.width);
        let frame = self.channels * plane;
        let pairs = self.prediction.chunks_exact(frame).zip(self.target.chunks_exact(frame));
        let counts = pairs.enumerate().map(|(i, (prediction, target))| {
            let mut counts = Contingency::default();
            for (at, (&prediction, &target)) in prediction.iter().zip(target).enumerate() {
                if self.known.as_ref().is_none_or(|known| known[i * plane + at % plane]) {
                    counts.count(prediction >= level, target >= level);
                }
            }
            counts
        });
        counts.collect()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use candle_core::Device;

    use super::*;

    /// Finley's tornado forecasts of 1884, the usual example for these scores.
    const TORNADOES: Contingency =
        Contingency { hits: 28, misses: 23, false_alarms: 72, correct_negatives: 2680 };

    #[test]
    fn scores_of_finleys_tornadoes() {
        let close = |score: Option<f64>, expected: f64| {
            assert!((score.unwrap() - expected).abs() < 5e-4, "{score:?}, expected {expected}");
        };
        close(TORNADOES.csi(), 0.228);
        close(TORNADOES.pod(), 0.549);
        close(TORNADOES.far(), 0.720);
        close(TORNADOES.hss(), 0.355);
    }

    #[test]
    fn where_nothing_was_asked_there_is_no_score() {
        let dry = Contingency { correct_negatives: 9, ..Contingency::default() };
        assert_eq!([dry.csi(), dry.pod(), dry.far(), dry.hss()], [None; 4]);
        let missed = Contingency { misses: 1, ..dry };
        assert_eq!(
            [missed.csi(), missed.pod(), missed.far(), missed.hss()],
            [Some(0.), Some(0.), None, Some(0.)]
        );
    }

    #[test]
    fn pixels_are_counted_frame_by_frame_where_they_are_known() {
        let tensor =
            |values: [f32; 8]| Tensor::new(&values, &Device::Cpu).unwrap().reshape((1, 2, 1, 1, 4)).unwrap();
        let prediction = tensor([0.5, 0.6, 0.1, 0.2, 1., 1., 0., 0.]);
        let target = tensor([0.5, 0.1, 0.9, 0.2, 1., 0., 1., 0.]);
        let one_each = Contingency { hits: 1, misses: 1, false_alarms: 1, correct_negatives: 1 };
        assert_eq!(contingency(&prediction, &target, None, 0.5).unwrap(), [one_each; 2]);
        let mask = tensor([1., 0., 1., 1., 0., 0., 0., 0.]);
        let known = Contingency { false_alarms: 0, ..one_each };
        let counts = contingency(&prediction, &target, Some(&mask), 0.5).unwrap();
        assert_eq!(counts, [known, Contingency::default()]);
        assert!(contingency(&prediction, &target, Some(&mask.narrow(4, 0, 2).unwrap()), 0.5).is_err());
    }
}
