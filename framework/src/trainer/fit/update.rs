//! One optimizer's turn in a step: the gradient of the mean loss over a batch, and the move against it.

use candle_core::Tensor;
use candlepower_kernels::updates::sum_squares_of;

use super::backprop::{Backprop, forward, scaled};
use super::replays::Kind;
use super::{Fit, Tally, Tapped, phase};
use crate::batch::Batch;
use crate::collective::Collective;
use crate::collective::shard::Shares;
use crate::data::Place;
use crate::error::{Error, Result};
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
}

impl<B: Batch> Fit<'_, B> {
    /// Moves an optimizer's parameters, unless their gradients cause the step to be refused.
    pub(super) fn update(&mut self, turn: usize, tally: &mut Tally) -> Result<Update> {
        let Gradients { own, wanted, clipped } = self.gradients(turn, tally)?;
        let _phase = phase!("optimizer");
        let is_over = clipped.is_some();
        let Clipped { scale, norm } = clipped.map_or_else(|| self.clip(&own), Ok)?;
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
        if self.trainer.callbacks.iter().any(|callback| callback.wants_gradients(step)) {
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
        self.things_per_sample = 1.;
        let mut weights = Vec::new();
        for index in 0.. {
            let loaded = self.micro_batch(index)?;
            let place = loaded.place;
            (tally.samples, tally.ends_epoch) = (place.step_samples, place.ends_epoch);
            let Some(batch) = &loaded.batch else { break };
            let batch = batch.to_device(self.model.params().device())?;
            let batch = batch.cast(self.model.params().dtype())?;
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
            weights.push(backprop.weight);
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
        let wanted = self.trainer.callbacks.iter().any(|callback| callback.wants_gradients(done + 1));
        let gradients = match reduction {
            None => Gradients { own: grads.complete(&self.turns[turn].params)?, wanted, clipped },
            Some(reduction) => {
                let _phase = phase!("all_reduce");
                let Reduced { own, whole } = reduction.finish(wanted)?;
                Gradients { own: own.complete(&self.turns[turn].own(&*self.ranks))?, wanted: whole, clipped }
            }
        };
        // After the reduction, where ranks without samples start theirs: all must exchange in one order.
        let said = Said::of(&weights, tally.own_samples == tally.samples);
        self.things_per_sample = self.things_per_sample(turn, said, tally.samples)?;
        Ok(gradients)
    }

    /// Runs both passes over a micro-batch and, if it is the whole step and is recorded, the update.
    fn passes(&mut self, turn: usize, batch: &B, place: &Place) -> Result<Backprop> {
        let images_due = self.images_due(place);
        let (done, seed) = (self.progress.step, self.trainer.seed);
        let is_whole = place.number == 0 && place.ends_step;
        let updates = is_whole && self.replays.is_on();
        self.is_moving |= updates;
        let (module, optimizer, clipping) = (self.model.training(), &self.turns[turn], self.clipping());
        let step = || Step::training(done, place.number as u64, seed, &optimizer.name, images_due);
        let (samples, scale) = (batch.len(), self.loss_scale());
        let factor = |things| scale * share(things, samples, place);
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
            let factor = self.loss_scale() * share(step.loss_weight(), batch.len(), place);
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

    /// How many things the losses of a turn average over, over all ranks, per sample of the step. Gradients
    /// are too large by this factor. `own` is what the module reported on this rank.
    fn things_per_sample(&mut self, turn: usize, own: Said, samples: usize) -> Result<f64> {
        let all = match self.weighs[turn] {
            // A rank without samples cannot know, and at first no rank does.
            Some(true) | None => own.over(&*self.ranks)?,
            Some(false) => own,
        };
        let is_new = self.weighs[turn].is_some_and(|before| before != all.weighs);
        if is_new || (all.weighs && own.is_silent) {
            return Err(Error::msg(
                "training_step: a module that calls `Step::weigh_loss` must do so in every step",
            ));
        }
        self.weighs[turn] = Some(all.weighs);
        // A micro-batch that is a whole step counts fully.
        let adds_up = all.weighs && all.things > 0. && !all.is_whole;
        Ok(if adds_up { all.things / samples as f64 } else { 1. })
    }

    /// Whether the module should log pictures: in the first micro-batch of every `image_every` steps.
    fn images_due(&self, place: &Place) -> bool {
        let (number, every) = (self.progress.step + 1, self.trainer.image_every);
        place.number == 0 && every > 0 && number.is_multiple_of(every)
    }

    /// How a step's gradients are scaled and clipped, based on their norm.
    fn clip(&self, gradients: &[Tensor]) -> Result<Clipped> {
        let clipping = self.clipping();
        if !self.sharded {
            return Ok(clipping.decide(gradients)?);
        }
        // Each rank has part of the gradients.
        let parts = self.ranks.gather_numbers(&[sum_squares_of(gradients)?])?;
        let norm = parts.iter().map(|part| part[0]).sum::<f64>().sqrt();
        Ok(clipping.decide_by(norm / clipping.loss_scale))
    }

    fn clipping(&self) -> Clipping {
        let config = &self.trainer.config;
        Clipping {
            loss_scale: self.loss_scale() * self.things_per_sample,
            max_norm: config.clip_norm,
            max_value: config.clip_value,
            // The same condition as in `refuse`.
            only_finite: config.nan_guard || self.loss_scale.is_some(),
        }
    }
}

/// Which loss weights a module reported for a step's micro-batches.
#[derive(Clone, Copy)]
struct Said {
    /// Whether it reported any weight.
    weighs: bool,
    /// Whether it reported no weight for some micro-batch.
    is_silent: bool,
    /// Whether one micro-batch is the whole step.
    is_whole: bool,
    /// How many things all losses together average over.
    things: f64,
}

impl Said {
    fn of(weights: &[Option<f64>], has_all: bool) -> Self {
        Self {
            weighs: weights.iter().any(Option::is_some),
            is_silent: weights.iter().any(Option::is_none),
            is_whole: has_all && weights.len() == 1,
            things: weights.iter().flatten().sum(),
        }
    }

    /// The same over the micro-batches of all ranks.
    fn over(self, ranks: &dyn Collective) -> Result<Self> {
        let flags = [self.weighs, self.is_silent, self.is_whole].map(|flag| f64::from(u8::from(flag)));
        let all = ranks.gather_numbers(&[&flags[..], &[self.things]].concat())?;
        let any = |i: usize| all.iter().any(|rank| rank[i] > 0.);
        let things = all.iter().map(|rank| rank[3]).sum();
        Ok(Self { weighs: any(0), is_silent: any(1), is_whole: any(2), things })
    }
}

/// The factor on the loss of so many samples, or things: their share of the step's samples. A micro-batch
/// that is the whole step counts fully.
fn share(things: Option<f64>, samples: usize, place: &Place) -> f64 {
    let things = things.filter(|_| samples < place.step_samples).unwrap_or(samples as f64);
    things / place.step_samples as f64
}
