//! How many items the losses of a step average over, where these are not samples: see [`Step::weigh_loss`].
//!
//! [`Step::weigh_loss`]: crate::module::Step::weigh_loss

use crate::collective::Collective;
use crate::data::Place;
use crate::error::{Error, Result};

/// The counts of loss items that a module reported for the micro-batches of a turn.
#[derive(Clone, Copy)]
pub(super) struct LossCounts {
    /// Whether it reported a count for any micro-batch.
    has_counts: bool,
    /// Whether it reported none for some micro-batch.
    has_gaps: bool,
    /// Whether one micro-batch is the whole step.
    is_whole_step: bool,
    /// How many items all losses together average over.
    items: f64,
}

impl LossCounts {
    /// The counts of this rank's micro-batches. `has_all_samples`: no other rank has any.
    pub(super) fn new(counts: &[Option<f64>], has_all_samples: bool) -> Self {
        Self {
            has_counts: counts.iter().any(Option::is_some),
            has_gaps: counts.iter().any(Option::is_none),
            is_whole_step: has_all_samples && counts.len() == 1,
            items: counts.iter().flatten().sum(),
        }
    }

    /// How many items the losses of a turn average over, over all ranks, per sample of the step; 1 if they
    /// average over samples. Gradients are too large by this factor.
    ///
    /// `counts_items`: whether the module reports counts in this turn, once that is known.
    pub(super) fn items_per_sample(
        self,
        counts_items: &mut Option<bool>,
        ranks: &dyn Collective,
        samples: usize,
    ) -> Result<f64> {
        let all = match counts_items {
            // A rank without samples cannot know, and at first no rank does.
            Some(true) | None => self.over_ranks(ranks)?,
            Some(false) => self,
        };
        let has_changed = counts_items.is_some_and(|before| before != all.has_counts);
        if has_changed || (all.has_counts && self.has_gaps) {
            return Err(Error::msg(
                "training_step: a module that calls `Step::weigh_loss` must do so in every step",
            ));
        }
        *counts_items = Some(all.has_counts);
        // A micro-batch that is a whole step counts fully.
        let adds_up = all.has_counts && all.items > 0. && !all.is_whole_step;
        Ok(if adds_up { all.items / samples as f64 } else { 1. })
    }

    /// The counts of the micro-batches of all ranks.
    fn over_ranks(self, ranks: &dyn Collective) -> Result<Self> {
        let flags = [self.has_counts, self.has_gaps, self.is_whole_step];
        let flags = flags.map(|flag| f64::from(u8::from(flag)));
        let all = ranks.gather_numbers(&[&flags[..], &[self.items]].concat())?;
        let any = |i: usize| all.iter().any(|rank| rank[i] > 0.);
        let items = all.iter().map(|rank| rank[3]).sum();
        Ok(Self { has_counts: any(0), has_gaps: any(1), is_whole_step: any(2), items })
    }
}

/// The factor on a micro-batch's loss: its items, or samples if the module counts no items, per sample of the
/// step. A micro-batch that is the whole step counts fully.
pub(super) fn share_of_step(items: Option<f64>, samples: usize, place: &Place) -> f64 {
    let is_whole_step = samples >= place.step_samples;
    let counted = items.filter(|_| !is_whole_step).unwrap_or(samples as f64);
    counted / place.step_samples as f64
}
