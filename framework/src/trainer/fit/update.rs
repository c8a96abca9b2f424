//! One optimizer's turn in a step: the gradient of the mean loss over a batch, and the move against it.

use candle_core::Tensor;
use candlepower_kernels::updates::sum_squares_of;

use super::backprop::{Backprop, forward, scaled};
use super::loss_counts::{LossCounts, share_of_step};
use super::replays::Kind;
use super::{Fit, Tally, Tapped, phase};
use crate::batch::Batch;
use crate::collective::shard::Shares;
use crate::data::Place;
use crate::error::Result;
use crate::grads::Grads;
use crate::metrics::Means;
use crate::module::Step;
use crate::optim::{Clipped, Clipping};
use crate::reduction::{Reduced, Reduction};

/// The result of an optimizer's turn.
pub(super) struct Update {
    /// Gradients of the parameters that this rank moves, over all micro-batches of the step and all ranks.
    pub(super) gradients: Vec<Tensor>,
    /// The norm of all of the optimizer's gradients together, before clipping.
    pub(super) norm: f64,
}

/// The gradients of an optimizer's parameters.
struct Gradients {
    /// Gradients of the parameters that this rank moves.
    own: Vec<Tensor>,
    /// Whether a callback wants the gradients of all parameters.
    wanted: bool,
    /// If the update has already been made: how the gradients were clipped.
    clipped: Option<Clipped>,
    /// By how much the gradients are too large: see [`LossCounts::items_per_sample`].
    items_per_sample: f64,
}

impl<B: Batch> Fit<'_, B> {
    /// Moves an optimizer's parameters, unless their gradients cause the step to be refused.
    pub(super) fn update(&mut self, turn: usize, tally: &mut Tally) -> Result<Update> {
        let Gradients { own, wanted, clipped, items_per_sample } = self.gradients(turn, tally)?;
        let _phase = phase!("optimizer");
        let is_over = clipped.is_some();
        let Clipped { scale, norm } = clipped.map_or_else(|| self.clip(&own, items_per_sample), Ok)?;
        // The norm and logged values are on the device: start reading now, wait once the rest is queued.
        let norm = norm.read()?;
        tally.means.as_mut().map_or(Ok(()), Means::begin)?;
        if !is_over {
            self.is_moving = true;
            self.turns[turn].step(&own, &scale, &*self.ranks)?;
        }
        if wanted {
            let counted = scale.apply(&own)?;
            tally.gradients.extend(match self.turns[turn].owners() {
                None => counted,
                Some(owners) => {
                    Shares::new(&*self.ranks, &self.turns[turn].params, owners).gather(&counted)?
                }
            });
        }
        Ok(Update { gradients: own, norm: norm.finish()? })
    }

    /// If a callback wants gradients, adds zeros for an optimizer that sits out this step.
    pub(super) fn sit_out(&self, turn: usize, tally: &mut Tally) -> Result<()> {
        let step = self.progress.step + 1;
        if self.trainer.callbacks.want_gradients(step) {
            for (_, var) in &self.turns[turn].params {
                tally.gradients.push(var.zeros_like()?);
            }
        }
        Ok(())
    }

    /// Runs both passes over the step's micro-batches and, if the whole step is recorded as one piece of
    /// work, the update.
    fn gradients(&mut self, turn: usize, tally: &mut Tally) -> Result<Gradients> {
        let done = self.progress.step;
        let mut grads = Grads::new(&self.turns[turn].params);
        let mut reduction = self.tapped.as_ref().map(|_| Reduction::new(&self.turns[turn], &self.ranks));
        let mut clipped = None;
        tally.losses.clear();
        tally.own_samples = 0;
        let mut counts = Vec::new();
        for index in 0.. {
            let loaded = self.batches.get(index)?;
            let place = loaded.place;
            (tally.samples, tally.ends_epoch) = (place.step_samples, place.ends_epoch);
            let Some(batch) = &loaded.batch else { break };
            let batch = self.model.prepared(batch)?;
            let backprop = match (&self.tapped, reduction.take()) {
                (Some(tapped), Some(before)) => {
                    let (backprop, after) = self.passes_among_ranks(tapped, turn, &batch, &place, before)?;
                    reduction = Some(after);
                    backprop
                }
                _ => self.passes(turn, &batch, &place)?,
            };
            grads.add(&backprop.gradients)?;
            clipped = backprop.clipped.clone();
            tally.losses.push((place.number, backprop.loss.clone()));
            tally.own_samples += batch.len();
            counts.push(backprop.weight);
            self.log(backprop, turn, batch.len(), tally)?;
            if place.ends_step {
                break;
            }
            // By the clock, a validation may be due inside a step that takes minutes. Several ranks wait for
            // the end of the step, because each may be at a different micro-batch.
            if !self.is_moving && self.ranks.is_alone() && self.is_validation_due(true)? {
                self.asked = std::mem::take(&mut self.asked).or(self.validate()?);
            }
        }
        let wanted = self.trainer.callbacks.want_gradients(done + 1);
        let (own, wanted) = match reduction {
            None => (grads.complete(&self.turns[turn].params)?, wanted),
            Some(reduction) => {
                let _phase = phase!("all_reduce");
                let Reduced { own, whole } = reduction.finish(wanted)?;
                (own.complete(&self.turns[turn].own(&*self.ranks))?, whole)
            }
        };
        // After the reduction, where ranks without samples start theirs: all must exchange in one order.
        let counts = LossCounts::new(&counts, tally.own_samples == tally.samples);
        let items_per_sample =
            counts.items_per_sample(&mut self.histories[turn].counts_items, &*self.ranks, tally.samples)?;
        Ok(Gradients { own, wanted, clipped, items_per_sample })
    }

    /// Runs both passes over a micro-batch and, if it is the whole step and is recorded, the update.
    fn passes(&mut self, turn: usize, batch: &B, place: &Place) -> Result<Backprop> {
        let images_due = self.images_due(place);
        let (done, seed) = (self.progress.step, self.trainer.seed);
        let is_whole = place.number == 0 && place.ends_step;
        let updates = is_whole && self.replays.is_on();
        self.is_moving |= updates;
        // Only a step that is one micro-batch is updated here, and that counts fully.
        let clipping = self.clipping(1.);
        let (module, optimizer) = (self.model.training(), &self.turns[turn]);
        let step = || Step::training(done, place.number as u64, seed, &optimizer.name, images_due);
        let (samples, scale) = (batch.len(), self.loss_scale());
        let factor = |items| scale * share_of_step(items, samples, place);
        let precision = self.trainer.config.precision;
        let work = |batch: &B, step| {
            let passes = Backprop::over(module, optimizer, batch, step, factor);
            let passes = passes.map_err(|error| precision.explain(error))?;
            if updates { passes.then_update(optimizer, &clipping) } else { Ok(passes) }
        };
        // Steps with pictures compute more than others, so they are never replayed.
        if images_due {
            work(batch, step())
        } else {
            self.replays.run(Kind { turn, factor: factor(None), updates }, batch, step, work)
        }
    }

    /// Runs both passes on one of several ranks, passing gradients to the reduction as they become available.
    fn passes_among_ranks(
        &self,
        tapped: &Tapped<B>,
        turn: usize,
        batch: &B,
        place: &Place,
        reduction: Reduction,
    ) -> Result<(Backprop, Reduction)> {
        let (done, seed, name) = (self.progress.step, self.trainer.seed, &self.turns[turn].name);
        let mut step = Step::training(done, place.number as u64, seed, name, self.images_due(place));
        let passes = forward(&*tapped.module, batch, &mut step).and_then(|loss| {
            let _phase = phase!("backward");
            let factor = self.loss_scale() * share_of_step(step.loss_weight(), batch.len(), place);
            let before = reduction.before_backward(place.ends_step);
            let after = tapped.taps.during(before, || scaled(&loss, factor)?.backward())?;
            Ok((Backprop::new(&loss, step, Vec::new())?, after))
        });
        passes.map_err(|error| self.trainer.config.precision.explain(error))
    }

    /// The factor on the loss; 1 except in fp16.
    fn loss_scale(&self) -> f64 {
        self.loss_scale.map_or(1., |loss_scale| loss_scale.scale)
    }

    /// Whether the module should log pictures: in the first micro-batch of every `image_every` steps.
    fn images_due(&self, place: &Place) -> bool {
        let (number, every) = (self.progress.step + 1, self.trainer.image_every);
        place.number == 0 && every > 0 && number.is_multiple_of(every)
    }

    /// How a step's gradients are scaled and clipped, based on their norm.
    fn clip(&self, gradients: &[Tensor], items_per_sample: f64) -> Result<Clipped> {
        let clipping = self.clipping(items_per_sample);
        if !self.sharded {
            return Ok(clipping.decide(gradients)?);
        }
        // Each rank has part of the gradients.
        let parts = self.ranks.gather_numbers(&[sum_squares_of(gradients)?])?;
        let norm = parts.iter().map(|part| part[0]).sum::<f64>().sqrt();
        Ok(clipping.decide_by(norm / clipping.loss_scale))
    }

    fn clipping(&self, items_per_sample: f64) -> Clipping {
        let config = &self.trainer.config;
        Clipping {
            loss_scale: self.loss_scale() * items_per_sample,
            max_norm: config.clip_norm,
            max_value: config.clip_value,
            // The same condition as in `refuse`.
            only_finite: config.nan_guard || self.loss_scale.is_some(),
        }
    }
}
