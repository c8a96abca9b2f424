//! The order of samples: a pure function, so that resuming is skipping.

use rand::seq::SliceRandom;

use super::{Sample, Split};
use crate::seed;

/// The training order of a dataset: for each epoch a permutation that depends on (seed, epoch) alone.
#[derive(Debug, Clone, Copy)]
pub struct Order {
    /// The run's seed.
    pub seed: u64,
    /// Samples in an epoch.
    pub len: usize,
    /// Samples in a batch; the last batch of an epoch holds what is left.
    pub batch_size: usize,
}

impl Order {
    /// Batches in an epoch.
    pub fn batches(&self) -> usize {
        self.len.div_ceil(self.batch_size)
    }

    /// Samples in batch number `index` of an epoch.
    pub fn batch_len(&self, index: u64) -> usize {
        self.batch_size.min(self.len - index as usize * self.batch_size)
    }

    /// The batches of one epoch, in order.
    pub fn epoch(&self, epoch: u64) -> impl Iterator<Item = Vec<Sample>> + Send + use<> {
        let Order { seed, len, batch_size } = *self;
        let mut indices: Vec<usize> = (0..len).collect();
        indices.shuffle(&mut seed::generator(seed, [seed::name("order"), epoch, 0]));
        let sample = move |index| Sample { index, split: Split::Train, epoch, seed };
        let batches = (0..len).step_by(batch_size);
        batches
            .map(move |from| indices[from..len.min(from + batch_size)].iter().copied().map(sample).collect())
    }

    /// The batches from batch number `skip` of `epoch` on, through all later epochs, without end.
    pub fn from(self, epoch: u64, skip: usize) -> impl Iterator<Item = Vec<Sample>> + Send {
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

    fn indices(batches: impl Iterator<Item = Vec<Sample>>) -> Vec<Vec<usize>> {
        batches.map(|batch| batch.iter().map(|s| s.index).collect()).collect()
    }

    #[test]
    fn an_epoch_holds_every_sample_once_and_each_epoch_its_own_order() {
        let order = Order { seed: 7, len: 10, batch_size: 4 };
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
        let order = Order { seed: 7, len: 10, batch_size: 4 };
        let whole = indices(order.from(0, 0).take(9));
        assert_eq!(whole[4..], indices(order.from(1, 1).take(5)));
    }

    #[test]
    fn evaluation_counts_every_sample_once() {
        let turns = indices(samples_in_turn(Split::Val, 0, 7, 3));
        assert_eq!(turns, [vec![0, 1, 2], vec![3, 4, 5], vec![6]]);
    }
}
