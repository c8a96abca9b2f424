//! The order of samples: a pure function, so resuming is skipping.

use std::sync::Arc;

use rand::distr::Distribution;
use rand::distr::weighted::WeightedIndex;
use rand::seq::SliceRandom;

use super::{Pass, Sample, Split};
use crate::error::{Error, Result};
use crate::seed;

/// The training order of a dataset: for each epoch a permutation, or weighted draws, that depend on (seed, epoch) alone.
#[derive(Debug, Clone)]
pub struct Order {
    /// The run's seed.
    pub seed: u64,
    /// Number of samples.
    pub len: usize,
    /// Samples per batch; the last batch of an epoch holds the rest.
    pub batch_size: usize,
    /// Maximum number of batches per epoch.
    pub limit: usize,
    /// Whether epochs are not shuffled.
    sequential: bool,
    /// Draws samples with replacement instead of shuffling them.
    weights: Option<Arc<WeightedIndex<f64>>>,
}

impl Order {
    /// A permutation of all samples in every epoch.
    pub fn new(seed: u64, len: usize, batch_size: usize) -> Self {
        Self { seed, len, batch_size, limit: usize::MAX, sequential: false, weights: None }
    }

    /// The same order with samples drawn with replacement, in proportion to these weights.
    ///
    /// # Errors
    /// Unless there is a weight of at least 0 for each sample, and one above 0.
    pub fn weighted(self, weights: &[f64]) -> Result<Self> {
        if weights.len() != self.len {
            let found = weights.len();
            return Err(Error::msg(format!(
                "`Dataset::weights` has {found} weights for {} samples",
                self.len
            )));
        }
        let usable =
            weights.iter().sum::<f64>().is_finite().then(|| WeightedIndex::new(weights).ok()).flatten();
        let usable = usable.ok_or_else(|| {
            Error::msg("`Dataset::weights`: expected finite numbers of at least 0, and one above 0")
        })?;
        Ok(Self { weights: Some(Arc::new(usable)), ..self })
    }

    /// The same order without shuffling: every epoch has the same samples.
    pub fn sequential(self) -> Self {
        Self { sequential: true, ..self }
    }

    /// The same order with at most `limit` batches per epoch.
    pub fn limited(self, limit: usize) -> Self {
        Self { limit, ..self }
    }

    /// Batches per epoch.
    pub fn batches(&self) -> usize {
        self.len.div_ceil(self.batch_size).min(self.limit)
    }

    /// Samples per epoch.
    pub fn samples(&self) -> usize {
        self.batches().saturating_mul(self.batch_size).min(self.len)
    }

    /// The batches of one epoch, in order, each with whether it is the last.
    pub fn epoch(&self, epoch: u64) -> impl Iterator<Item = (Vec<Sample>, bool)> + Send + use<> {
        let (seed, batch_size, batches) = (self.seed, self.batch_size, self.batches());
        // The random numbers of epoch 0, so that augmentations repeat too.
        let epoch = if self.sequential { 0 } else { epoch };
        let (indices, samples) = (self.indices(epoch), self.samples());
        let sample =
            move |(index, repeat)| Sample { index, split: Split::Train, epoch, seed, repeat, augment: true };
        (0..batches).map(move |batch| {
            let range = batch * batch_size..samples.min((batch + 1) * batch_size);
            (indices[range].iter().copied().map(sample).collect(), batch + 1 == batches)
        })
    }

    /// The positions of an epoch's samples in order, and how often each was drawn before.
    fn indices(&self, epoch: u64) -> Vec<(usize, u32)> {
        let mut generator = seed::generator(self.seed, [seed::name("order"), epoch, 0]);
        let mut indices: Vec<(usize, u32)> = (0..self.len).map(|index| (index, 0)).collect();
        match &self.weights {
            _ if self.sequential => {}
            None => indices.shuffle(&mut generator),
            Some(weights) => {
                let mut counts = vec![0; self.len];
                for draw in &mut indices {
                    let index = weights.sample(&mut generator);
                    *draw = (index, counts[index]);
                    counts[index] += 1;
                }
            }
        }
        indices
    }

    /// The batches from batch number `skip` of `epoch` on, through all later epochs, without end.
    pub fn from(&self, epoch: u64, skip: usize) -> impl Iterator<Item = (Vec<Sample>, bool)> + Send + use<> {
        let order = self.clone();
        self.epoch(epoch).skip(skip).chain((epoch + 1..).flat_map(move |epoch| order.epoch(epoch)))
    }
}

/// The order of evaluation: every sample exactly once, first to last.
pub fn sequential_batches(
    pass: Pass,
    len: usize,
    batch_size: usize,
) -> impl Iterator<Item = Vec<Sample>> + Send {
    let sample = move |index| Sample::new(index, pass);
    (0..len).step_by(batch_size).map(move |from| (from..len.min(from + batch_size)).map(sample).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn indices(batches: impl Iterator<Item = (Vec<Sample>, bool)>) -> Vec<Vec<usize>> {
        batches.map(|(batch, _)| batch.iter().map(|s| s.index).collect()).collect()
    }

    #[test]
    fn an_epoch_holds_every_sample_once_and_each_epoch_its_own_order() {
        let order = Order::new(7, 10, 4);
        let first = indices(order.epoch(0));
        assert_eq!(first.iter().map(Vec::len).collect::<Vec<_>>(), [4, 4, 2]);
        let mut all = first.concat();
        all.sort_unstable();
        assert_eq!(all, (0..10).collect::<Vec<_>>());
        assert_eq!(first, indices(order.epoch(0)));
        assert_ne!(first, indices(order.epoch(1)));
    }

    #[test]
    fn resuming_is_skipping() {
        let order = Order::new(7, 10, 4);
        let whole = indices(order.from(0, 0).take(9));
        assert_eq!(whole[4..], indices(order.from(1, 1).take(5)));
    }

    #[test]
    fn a_limit_shortens_every_epoch() {
        let (whole, limited) = (Order::new(7, 10, 4), Order::new(7, 10, 4).limited(2));
        assert_eq!((limited.batches(), limited.samples()), (2, 8));
        assert_eq!((limited.clone().limited(9).batches(), limited.clone().limited(9).samples()), (3, 10));
        let ends: Vec<bool> = limited.from(0, 0).take(4).map(|(_, end)| end).collect();
        assert_eq!(ends, [false, true, false, true]);
        assert_eq!(indices(limited.epoch(1)), indices(whole.epoch(1))[..2]);
    }

    #[test]
    fn in_turn_every_epoch_is_the_same() {
        let order = Order::new(7, 10, 4).sequential();
        assert_eq!(indices(order.epoch(3)), [vec![0, 1, 2, 3], vec![4, 5, 6, 7], vec![8, 9]]);
        assert!(order.epoch(3).eq(order.epoch(5)));
    }

    #[test]
    fn weights_say_how_often_samples_are_drawn_and_repeats_differ() {
        let order = |weights: &[f64]| Order::new(7, 4, 4).weighted(weights);
        let drawn: Vec<Sample> =
            order(&[1., 0., 3., 4.]).unwrap().from(0, 0).take(1000).flat_map(|(batch, _)| batch).collect();
        let count = |index| drawn.iter().filter(|sample| sample.index == index).count() as f64 / 4000.;
        assert_eq!(count(1), 0.);
        for (index, share) in [(0, 0.125), (2, 0.375), (3, 0.5)] {
            assert!((count(index) - share).abs() < 0.03, "{index}: {}", count(index));
        }
        let mut distinct = drawn.clone();
        distinct.sort_by_key(|sample| (sample.epoch, sample.index, sample.repeat));
        distinct.dedup();
        assert_eq!(distinct.len(), drawn.len(), "a sample that is drawn again is another one");
        let twice = [0, 1].map(|repeat| Sample { repeat, ..drawn[0] }.rng());
        assert_ne!(twice[0], twice[1]);
        for (weights, message) in [
            (&[1.; 3][..], "`Dataset::weights` has 3 weights for 4 samples"),
            (&[0.; 4], "expected finite numbers of at least 0, and one above 0"),
            (&[1., -1., 1., 1.], "expected finite"),
            (&[1., f64::NAN, 1., 1.], "expected finite"),
            (&[1., f64::INFINITY, 1., 1.], "expected finite"),
        ] {
            let error = order(weights).unwrap_err().to_string();
            assert!(error.contains(message), "{error}");
        }
    }

    #[test]
    fn evaluation_counts_every_sample_once() {
        let batches = sequential_batches(Pass::evaluation(Split::Val, 0), 7, 3);
        let turns: Vec<Vec<usize>> = batches.map(|batch| batch.iter().map(|s| s.index).collect()).collect();
        assert_eq!(turns, [vec![0, 1, 2], vec![3, 4, 5], vec![6]]);
    }
}
