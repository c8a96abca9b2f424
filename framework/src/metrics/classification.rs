//! Metrics of scores and predicted classes, computed over all samples at once.

use candle_core::{DType, Tensor};

use crate::error::{Error, Result};

/// The area under the receiver operating characteristic: the probability that a positive sample has a higher
/// score than a negative one, where equal scores count half. `scores` (N), any float type; `labels` (N), 1
/// for positive and 0 for negative. NaN if either class is missing.
///
/// ```
/// # use candlepower::prelude::*;
/// # use candlepower::metrics::classification::auroc;
/// let scores = Tensor::new(&[0.1f32, 0.4, 0.35, 0.8], &Device::Cpu)?;
/// let labels = Tensor::new(&[0u32, 0, 1, 1], &Device::Cpu)?;
/// assert_eq!(auroc(&scores, &labels)?, 0.75);
/// # Ok::<(), Error>(())
/// ```
pub fn auroc(scores: &Tensor, labels: &Tensor) -> Result<f64> {
    let ranked = ranked(scores, labels)?;
    let (mut above, mut positives, mut negatives) = (0., 0., 0.);
    // From the highest score down, grouping ties.
    for tied in ranked.chunk_by(|a, b| a.0 == b.0) {
        let here = tied.iter().filter(|(_, is_positive)| *is_positive).count() as f64;
        let others = tied.len() as f64 - here;
        above += others * (positives + here / 2.);
        (positives, negatives) = (positives + here, negatives + others);
    }
    Ok(above / (positives * negatives))
}

/// The mean precision over the positive samples, each at its own score (the area under the precision-recall
/// curve as a sum of steps). Arguments as for [`auroc`]. NaN if there is no positive sample.
pub fn average_precision(scores: &Tensor, labels: &Tensor) -> Result<f64> {
    let (mut sum, mut positives, mut seen) = (0., 0., 0.);
    for tied in ranked(scores, labels)?.chunk_by(|a, b| a.0 == b.0) {
        let here = tied.iter().filter(|(_, is_positive)| *is_positive).count() as f64;
        (positives, seen) = (positives + here, seen + tied.len() as f64);
        sum += here * positives / seen;
    }
    Ok(sum / positives)
}

/// The scores in descending order, each with whether its sample is positive.
fn ranked(scores: &Tensor, labels: &Tensor) -> Result<Vec<(f64, bool)>> {
    let (scores, labels) = (numbers(scores)?, numbers(labels)?);
    if scores.len() != labels.len() {
        return Err(Error::msg(format!("there are {} scores for {} labels", scores.len(), labels.len())));
    }
    if let Some(label) = labels.iter().find(|label| ![0., 1.].contains(*label)) {
        return Err(Error::msg(format!("expected labels of 0 and 1, found {label}")));
    }
    if scores.iter().any(|score| score.is_nan()) {
        return Err(Error::msg("a score is NaN"));
    }
    let mut ranked: Vec<_> = scores.into_iter().zip(labels.into_iter().map(|label| label == 1.)).collect();
    ranked.sort_by(|a, b| b.0.total_cmp(&a.0));
    Ok(ranked)
}

fn numbers(tensor: &Tensor) -> Result<Vec<f64>> {
    Ok(tensor.flatten_all()?.to_dtype(DType::F64)?.to_vec1()?)
}

/// A confusion matrix.
///
/// ```
/// # use candlepower::prelude::*;
/// # use candlepower::metrics::classification::ConfusionMatrix;
/// let classes = |classes: &[u32]| Tensor::new(classes, &Device::Cpu);
/// let confusion = ConfusionMatrix::new(&classes(&[0, 1, 1, 2])?, &classes(&[0, 1, 2, 2])?, 3)?;
/// assert_eq!((confusion.accuracy(), confusion.recall(2), confusion.precision(1)), (0.75, 0.5, 0.5));
/// # Ok::<(), Error>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfusionMatrix {
    /// `counts[label][predicted]`.
    pub counts: Vec<Vec<u64>>,
}

impl ConfusionMatrix {
    /// Counts `predicted` (N) against `labels` (N), both less than `classes`.
    pub fn new(predicted: &Tensor, labels: &Tensor, classes: usize) -> Result<Self> {
        let (predicted, labels) = (numbers(predicted)?, numbers(labels)?);
        if predicted.len() != labels.len() {
            return Err(Error::msg(format!(
                "there are {} predictions for {} labels",
                predicted.len(),
                labels.len()
            )));
        }
        let mut counts = vec![vec![0; classes]; classes];
        for (predicted, label) in predicted.into_iter().zip(labels) {
            let class = |x: f64| (x >= 0. && x.fract() == 0. && x < classes as f64).then_some(x as usize);
            let (Some(predicted), Some(label)) = (class(predicted), class(label)) else {
                let message = format!("expected classes below {classes}, found {predicted} for {label}");
                return Err(Error::msg(message));
            };
            counts[label][predicted] += 1;
        }
        Ok(Self { counts })
    }

    /// The fraction of samples whose class was predicted correctly.
    pub fn accuracy(&self) -> f64 {
        let hits: u64 = (0..self.counts.len()).map(|class| self.counts[class][class]).sum();
        let all: u64 = self.counts.iter().flatten().sum();
        hits as f64 / all as f64
    }

    /// The fraction of samples predicted as a class that belong to it; 0 if there are none.
    pub fn precision(&self, class: usize) -> f64 {
        let predicted: u64 = self.counts.iter().map(|row| row[class]).sum();
        self.counts[class][class] as f64 / predicted.max(1) as f64
    }

    /// The fraction of samples of a class that were predicted as it; 0 if there are none.
    pub fn recall(&self, class: usize) -> f64 {
        let all: u64 = self.counts[class].iter().sum();
        self.counts[class][class] as f64 / all.max(1) as f64
    }

    /// The harmonic mean of a class's precision and recall; 0 if both are 0.
    pub fn f1(&self, class: usize) -> f64 {
        let (precision, recall) = (self.precision(class), self.recall(class));
        let sum = precision + recall;
        if sum == 0. { 0. } else { 2. * precision * recall / sum }
    }

    /// The mean of [`f1`](Self::f1) over all classes.
    pub fn macro_f1(&self) -> f64 {
        let classes = self.counts.len();
        (0..classes).map(|class| self.f1(class)).sum::<f64>() / classes as f64
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;
    use proptest::prelude::*;

    use super::*;

    fn tensors(samples: &[(u8, bool)]) -> [Tensor; 2] {
        let scores: Vec<f32> = samples.iter().map(|(score, _)| f32::from(*score) / 4.).collect();
        let labels: Vec<u32> = samples.iter().map(|(_, label)| u32::from(*label)).collect();
        [Tensor::new(scores, &Device::Cpu).unwrap(), Tensor::new(labels, &Device::Cpu).unwrap()]
    }

    proptest! {
        #[test]
        fn the_area_is_the_chance_that_a_pair_is_in_order(
            samples in proptest::collection::vec((0u8..8, any::<bool>()), 1..40),
        ) {
            let of = |positive: bool| samples.iter().filter(move |(_, label)| *label == positive);
            let half = |a: u8, b: u8| if a == b { 0.5 } else { f64::from(u8::from(a > b)) };
            let sum: f64 = of(true).flat_map(|a| of(false).map(move |b| half(a.0, b.0))).sum();
            let expected = sum / (of(true).count() * of(false).count()) as f64;
            let [scores, labels] = tensors(&samples);
            let area = auroc(&scores, &labels).unwrap();
            prop_assert!(area == expected || (area - expected).abs() < 1e-12 || (area.is_nan() && expected.is_nan()));
        }

        #[test]
        fn precision_is_averaged_over_positive_samples(
            samples in proptest::collection::vec((0u8..8, any::<bool>()), 1..40),
        ) {
            let positives: Vec<u8> = samples.iter().filter(|(_, label)| *label).map(|(score, _)| *score).collect();
            let precision = |at: u8| {
                let above = samples.iter().filter(|(score, _)| *score >= at);
                above.clone().filter(|(_, label)| *label).count() as f64 / above.count() as f64
            };
            let expected = positives.iter().map(|score| precision(*score)).sum::<f64>() / positives.len() as f64;
            let [scores, labels] = tensors(&samples);
            let found = average_precision(&scores, &labels).unwrap();
            prop_assert!((found - expected).abs() < 1e-12 || (found.is_nan() && expected.is_nan()));
        }
    }

    #[test]
    fn what_is_no_score_or_no_class_is_refused() {
        let tensor = |values: &[f32]| Tensor::new(values, &Device::Cpu).unwrap();
        let error =
            |scores: &[f32], labels: &[f32]| auroc(&tensor(scores), &tensor(labels)).unwrap_err().to_string();
        assert_eq!(error(&[1., 2.], &[1.]), "there are 2 scores for 1 labels");
        assert_eq!(error(&[1.], &[2.]), "expected labels of 0 and 1, found 2");
        assert_eq!(error(&[f32::NAN], &[1.]), "a score is NaN");
        let error = ConfusionMatrix::new(&tensor(&[3.]), &tensor(&[1.]), 3).unwrap_err().to_string();
        assert_eq!(error, "expected classes below 3, found 3 for 1");
    }

    #[test]
    fn classes_are_told_apart() {
        let tensor = |values: &[u32]| Tensor::new(values, &Device::Cpu).unwrap();
        let confusion =
            ConfusionMatrix::new(&tensor(&[0, 0, 1, 1, 1]), &tensor(&[0, 1, 1, 1, 0]), 3).unwrap();
        assert_eq!(confusion.counts, [[1, 1, 0], [1, 2, 0], [0, 0, 0]]);
        assert_eq!(confusion.accuracy(), 0.6);
        // The third class has no samples.
        assert_eq!([0, 1, 2].map(|class| confusion.f1(class)), [0.5, 2. / 3., 0.]);
        assert!((confusion.macro_f1() - (0.5 + 2. / 3.) / 3.).abs() < 1e-12);
    }
}
