//! The order of samples: a pure function, so that resuming is skipping.

use rand::seq::SliceRandom;

use super::{Sample, Split};
use crate::seed;

/// The training order of a dataset: for each epoch a permutation that depends on (seed, epoch) alone.
#[derive(Debug, Clone, Copy)]
pub struct Order {
    /// The run's seed.
    pub seed: u64,
    /// Samples that there are.
    pub len: usize,
    /// Samples in a batch; the last batch of an epoch holds what is left.
    pub batch_size: usize,
    /// Batches in an epoch, at most.
    pub limit: usize,
    /// Whether every epoch is the first samples in turn, each time the same, instead of a permutation.
    pub in_turn: bool,
}

impl Order {
    /// Every epoch a permutation of all samples.
    pub fn new(seed: u64, len: usize, batch_size: usize) -> Self {
        Self { seed, len, batch_size, limit: usize::MAX, in_turn: false }
    }

    /// The same with at most `limit` batches an epoch.
    pub fn limited(self, limit: usize) -> Self {
        Self { limit, ..self }
    }

    /// Batches in an epoch.
    pub fn batches(&self) -> usize {
        self.len.div_ceil(self.batch_size).min(self.limit)
    }

    /// Samples in an epoch.
    pub fn samples(&self) -> usize {
        self.batches().saturating_mul(self.batch_size).min(self.len)
    }

    /// The batches of one epoch, in order; with each, whether it is the last.
    pub fn epoch(&self, epoch: u64) -> impl Iterator<Item = (Vec<Sample>, bool)> + Send + use<> {
        let Order { seed, len, batch_size, in_turn, .. } = *self;
        let (samples, batches) = (self.samples(), self.batches());
        let mut indices: Vec<usize> = (0..len).collect();
        // The same samples every time are also made the same way every time.
        let epoch = if in_turn { 0 } else { epoch };
        if !in_turn {
            indices.shuffle(&mut seed::generator(seed, [seed::name("order"), epoch, 0]));
        }
        let sample = move |index| Sample { index, split: Split::Train, epoch, seed };
        (0..batches).map(move |batch| {
            let range = batch * batch_size..samples.min((batch + 1) * batch_size);
            (indices[range].iter().copied().map(sample).collect(), batch + 1 == batches)
        })
    }

    /// The batches from batch number `skip` of `epoch` on, through all later epochs, without end.
    pub fn from(self, epoch: u64, skip: usize) -> impl Iterator<Item = (Vec<Sample>, bool)> + Send {
        self.epoch(epoch).skip(skip).chain((epoch + 1..).flat_map(move |epoch| self.epoch(epoch)))
    }
}

/// Evaluation's order: every sample exactly once, first to last.
pub fn samples_in_turn(
    split: Split,
    seed: u64,
    len: usize,
    batch_size: usize,
) -> impl Iterator<Item = Vec<Sample>> + Send {
    let sample = move |index| Sample { index, split, epoch: 0, seed };
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
        assert_eq!((limited.limited(9).batches(), limited.limited(9).samples()), (3, 10));
        let ends: Vec<bool> = limited.from(0, 0).take(4).map(|(_, end)| end).collect();
        assert_eq!(ends, [false, true, false, true]);
        assert_eq!(indices(limited.epoch(1)), indices(whole.epoch(1))[..2]);
    }

    #[test]
    fn in_turn_every_epoch_is_the_same() {
        let order = Order { in_turn: true, ..Order::new(7, 10, 4) };
        assert_eq!(indices(order.epoch(3)), [vec![0, 1, 2, 3], vec![4, 5, 6, 7], vec![8, 9]]);
        assert!(order.epoch(3).eq(order.epoch(5)));
    }

    #[test]
    fn evaluation_counts_every_sample_once() {
        let batches = samples_in_turn(Split::Val, 0, 7, 3);
        let turns: Vec<Vec<usize>> = batches.map(|batch| batch.iter().map(|s| s.index).collect()).collect();
        assert_eq!(turns, [vec![0, 1, 2], vec![3, 4, 5], vec![6]]);
    }
}
