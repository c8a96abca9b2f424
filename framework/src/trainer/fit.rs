//! The one training loop of the project: `run` and `step`, top to bottom.

mod backprop;
mod log;
mod prepare;
mod refuse;
mod replays;
mod save;
mod update;
mod validate;

use std::sync::Arc;
use std::time::Instant;

use candle_core::{Device, Tensor, Var};
use indexmap::IndexMap;

use super::evaluate::Evaluated;
use super::limits::Limit;
use super::ranks::{agree_on_flow, average_buffers};
use super::{Outcome, Trainer, phase};
use crate::batch::Batch;
use crate::callback::{Flow, Plan, Progress, StepEnd, StopReason};
use crate::checkpoint::Saver;
use crate::collective::Collective;
use crate::data::{Loaded, Loader, Source, Split};
use crate::error::{Error, Result};
use crate::memory;
use crate::metrics::Means;
use crate::module::{Model, Module};
use crate::optim::{Average, Turn};
use crate::precision::LossScale;
use crate::reduction::Reduction;
use crate::schedule::PlateauState;
use crate::taps::Taps;
use refuse::Refusal;
use replays::Replays;
use update::Update;

/// The module with taps on its parameters, by which ranks hear of gradients while the backward pass goes on.
struct Tapped<B: Batch> {
    module: Box<dyn Module<Batch = B>>,
    taps: Taps<Reduction>,
}

/// One call of [`Trainer::fit`], on one rank.
pub(super) struct Fit<'a, B: Batch> {
    trainer: &'a mut Trainer,
    ranks: Arc<dyn Collective>,
    /// Whether each rank keeps a part of the optimizer's state.
    sharded: bool,
    model: &'a Model<B>,
    /// What trains on one of several ranks.
    tapped: Option<Tapped<B>>,
    replays: Replays<B>,
    workers: usize,
    /// What is validated on: the source, the split it counts as, its batches.
    val: Option<(Source<B>, Split, Option<Limit>)>,
    /// The optimizers, in the order of their turns.
    turns: Vec<Turn>,
    /// The parameters of all turns, in their order.
    trained: Vec<(String, Var)>,
    average: Option<Average>,
    micro_batches: Loader<B>,
    /// The micro-batches of this step, where a second optimizer, or another try, needs them again.
    kept: Vec<Arc<Loaded<B>>>,
    steps_per_epoch: Option<u64>,
    progress: Progress,
    /// What the module has logged for the end of the epoch.
    epoch_means: Means,
    /// The last validation: the step it was at, and its metrics.
    validation: Option<(u64, IndexMap<String, f64>)>,
    validated_at: Instant,
    /// What is remembered from before a validation that is not complete.
    before_validation: Option<Before>,
    /// What the plateau has left of the learning rate.
    lr_scale: f64,
    plateau: PlateauState,
    /// Of each optimizer, once that is known: whether the module says what its loss is the mean of.
    weighs: Vec<Option<bool>>,
    /// How many things the losses of this turn are the mean of, for each of its samples; 1 where these are samples.
    things_per_sample: f64,
    /// Of fp16 alone.
    loss_scale: Option<LossScale>,
    /// Of each optimizer: how often in a row its gradients have overflowed.
    overflows: Vec<u32>,
    /// What a validation before or inside the step has asked for: that is for when the step is taken.
    asked: Flow,
    saver: Option<Saver>,
    /// Whether a step is under way that has moved parameters, or may have.
    is_moving: bool,
    /// Whether the run that is resumed did not come to the validation that was due.
    owed: bool,
    /// Since when this attempt runs, and how long those before it ran.
    started: Instant,
    seconds_before: f64,
}

/// What a validation changes; a checkpoint that owes one is of before it.
#[derive(Clone)]
struct Before {
    callbacks: IndexMap<String, serde_json::Value>,
    plateau: PlateauState,
    lr_scale: f64,
}

/// What is gathered over the micro-batches and the optimizers of a step.
#[derive(Default)]
struct Tally {
    /// The samples of the step.
    samples: usize,
    /// Whether they were the last of their epoch.
    ends_epoch: bool,
    /// Those that this rank has had in this turn.
    own_samples: usize,
    /// What is logged, in steps after which it is read.
    means: Option<Means>,
    /// What is logged when the epoch is over.
    epoch_means: Means,
    /// Of this rank's micro-batches, for this optimizer, with their numbers.
    losses: Vec<(usize, Tensor)>,
    /// Of the optimizers that have had their turn, in the order of the trained parameters.
    gradients: Vec<Tensor>,
}

/// What a step came to.
enum Stepped {
    /// The parameters have moved.
    Moved(Box<Tally>),
    /// They have not.
    Refused(Refusal),
}

impl<B: Batch> Fit<'_, B> {
    /// Trains; what came before an error is saved.
    pub(super) fn run(&mut self) -> Result<Outcome> {
        self.train().map_err(|error| {
            self.save_after_error();
            self.explain_memory(error)
        })
    }

    /// Steps until the last one or a stop; then a validation and a checkpoint of that very step.
    fn train(&mut self) -> Result<Outcome> {
        self.start()?;
        let begun_at = self.progress.step;
        let mut flow = self.catch_up()?;
        let mut reason = loop {
            if let Flow::Stop(why) = flow
                && self.may_stop(&why)
            {
                break why;
            }
            if self.trainer.config.is_finished(&self.progress) {
                break StopReason::Finished;
            }
            flow = match self.step()? {
                Stepped::Moved(tally) => self.after_step(*tally)?,
                Stepped::Refused(Refusal::Overflow) => Flow::Continue,
                Stepped::Refused(Refusal::Hopeless(why)) => Flow::Stop(StopReason::Failed(why)),
            };
        };
        // Who interrupts a run wants its state saved, not minutes of validation.
        if !matches!(reason, StopReason::Signal(_) | StopReason::Failed(_)) {
            if self.progress.step > begun_at {
                self.log_part_of_epoch()?;
            }
            if let Flow::Stop(signal @ StopReason::Signal(_)) = self.validate_at_the_end()? {
                reason = signal;
            }
        }
        self.save()?;
        let saved = self.saver.as_mut().map_or(Ok(None), Saver::finish)?;
        self.tell_saved(saved)?;
        if let Some(saver) = &mut self.saver
            && matches!(reason, StopReason::Finished | StopReason::Callback(_))
        {
            saver.end(self.progress.step)?;
        }
        self.average
            .as_ref()
            .map_or(Ok(()), |average| average.take_over(|| self.model.params().publish()))?;
        let progress = self.progress;
        self.trainer.progress = progress;
        self.trainer.callbacks.iter_mut().try_for_each(|callback| callback.on_fit_end(&progress, &reason))?;
        let validation = self.validation.take().map(|(_, metrics)| metrics);
        let best = self.saver.as_ref().and_then(|saver| saver.best().first().copied());
        Ok(Outcome { progress, validation, best, reason })
    }

    /// Does what is due now, tells the callbacks what is planned, and tries a few batches of the validation.
    fn start(&mut self) -> Result<()> {
        if let Some(work) = self.trainer.when_ready.take() {
            work(self.trainer)?;
        }
        self.saver.as_ref().map_or(Ok(()), Saver::begin)?;
        let plan = Plan {
            start: self.progress,
            last_step: self.trainer.config.last_step(self.steps_per_epoch),
            steps_per_epoch: self.steps_per_epoch,
            parameters: self.model.params().count(),
            optimizer_bytes: self.turns.iter().flat_map(Turn::state).map(|(_, var)| bytes(&var)).sum(),
            flops_per_sample: self.model.evaluation().flops().map(|forward| 3. * forward),
        };
        self.trainer.callbacks.iter_mut().try_for_each(|callback| callback.on_fit_start(&plan))?;
        let few = self.trainer.config.sanity_val_batches;
        if few > 0
            && self.progress.step == 0
            && let Some(evaluated) = self.evaluate(Some(Limit::Batches(few)), false)?
        {
            self.asked = match evaluated {
                Evaluated::Stopped(reason) => Flow::Stop(reason),
                Evaluated::Complete(metrics, flow) => {
                    self.check_monitors(&metrics)?;
                    flow
                }
            };
        }
        Ok(())
    }

    /// Makes up for the validation that the run which is resumed did not come to.
    fn catch_up(&mut self) -> Result<Flow> {
        let flow = if std::mem::take(&mut self.owed) { self.validate()? } else { Flow::Continue };
        Ok(agree_on_flow(&*self.ranks, flow.or(self.time_is_over(self.seconds_before)), false)?.0)
    }

    /// A stop, where so many seconds of training are as many as there may be.
    fn time_is_over(&self, seconds: f64) -> Flow {
        match self.trainer.config.max_time {
            Some(limit) if seconds >= limit.as_secs_f64() => {
                let why = format!("max_time, {}, is over", humantime::format_duration(limit));
                Flow::Stop(StopReason::Callback(why))
            }
            _ => Flow::Continue,
        }
    }

    /// One optimizer step: for each optimizer the gradient of the mean loss over a batch, and the move against it.
    fn step(&mut self) -> Result<Stepped> {
        let done = self.progress.step;
        let mut tally = Tally::default();
        // Nobody reads the others; the first shows whether what the module logs can be read at all.
        if done == 0 || (done + 1).is_multiple_of(self.trainer.config.log_every) {
            tally.means = Some(Means::default());
        }
        for turn in 0..self.turns.len() {
            if !self.turns[turn].is_due(done + 1) {
                self.sit_out(turn, &mut tally)?;
                continue;
            }
            let rates = self.turns[turn].rates(&self.progress, self.lr_scale);
            self.turns[turn].prepare(rates)?;
            let is_first = !self.is_moving;
            // Gradients that are not finite move nothing; `refuse` then says why, and what follows.
            let Update { gradients, norm } = self.update(turn, &mut tally)?;
            let refusal = self.refuse(turn, is_first, norm, &gradients, &tally)?;
            if refusal.is_some() {
                self.model.params().roll_back_buffers()?;
            }
            match refusal {
                None => {}
                Some(refusal) if is_first => {
                    self.is_moving = false;
                    return Ok(Stepped::Refused(refusal));
                }
                // Others have moved already, so nothing can be taken back: this one sits the step out, as in PyTorch, ...
                Some(Refusal::Overflow) => continue,
                // ... or ends the run, whose last checkpoint is still good.
                Some(Refusal::Hopeless(why)) => return Err(Error::msg(why)),
            }
            self.turns[turn].commit()?;
            for (name, value) in [("grad_norm", norm), ("lr", rates.lr)] {
                tally.note(
                    &self.metric_name(turn, name),
                    &Tensor::new(value, &Device::Cpu)?,
                    tally.samples as f64,
                )?;
            }
            self.model.params().refresh_taps()?;
            self.model.params().commit_buffers()?;
            average_buffers(&*self.ranks, self.model.params(), tally.own_samples)?;
        }
        self.kept.clear();
        self.progress.advance(tally.samples, tally.ends_epoch);
        self.epoch_means.merge(std::mem::take(&mut tally.epoch_means))?;
        self.average.as_mut().map_or(Ok(()), |average| average.update(done + 1))?;
        self.is_moving = false;
        Ok(Stepped::Moved(Box::new(tally)))
    }

    /// What is due after a step: telling, logging, validating, saving.
    fn after_step(&mut self, tally: Tally) -> Result<Flow> {
        let progress = self.progress;
        let end = StepEnd { progress, params: &self.trained, gradients: &tally.gradients };
        let mut flow =
            std::mem::take(&mut self.asked).or(self.trainer.ask(|callback| callback.on_step_end(&end))?);
        flow = flow.or(self.log_step(tally)?);
        let is_validated = self.is_validation_due(false)?;
        if is_validated {
            flow = flow.or(self.validate()?);
        }
        let is_due = |saver: &Saver| saver.is_due(progress.step, is_validated) && !saver.has(progress.step);
        let saves = self.saver.as_ref().is_some_and(is_due) || flow == Flow::Save;
        let (flow, saves) = agree_on_flow(&*self.ranks, flow.or(self.time_is_over(self.seconds())), saves)?;
        if saves {
            self.save()?;
        }
        self.trainer.show_ready_pictures()?;
        let saved = self.saver.as_mut().map_or(Ok(None), Saver::poll)?;
        self.tell_saved(saved)?;
        Ok(flow)
    }

    /// The micro-batch number `index` of this step: from the loader, or, where a second optimizer or another try needs it
    /// again, the one that was kept.
    fn micro_batch(&mut self, index: usize) -> Result<Arc<Loaded<B>>> {
        if let Some(kept) = self.kept.get(index) {
            return Ok(kept.clone());
        }
        let _phase = phase!("data_wait");
        let loaded = self.micro_batches.next().ok_or_else(|| Error::msg("the training data ended"))?;
        let loaded = Arc::new(loaded?);
        if self.turns.len() > 1 || self.loss_scale.is_some() {
            self.kept.push(loaded.clone());
        }
        Ok(loaded)
    }

    /// Adds to a device's error, where its memory is full, what to change.
    fn explain_memory(&self, error: Error) -> Error {
        let config = &self.trainer.config;
        let share = config.batch_size.div_ceil(self.ranks.world_size());
        memory::explain(error, config.micro_batch_size.unwrap_or(share))
    }

    /// Whether training may end for this reason already.
    fn may_stop(&self, reason: &StopReason) -> bool {
        let config = &self.trainer.config;
        let early = self.progress.step < config.min_steps || self.progress.epoch < config.min_epochs;
        !(early && matches!(reason, StopReason::Callback(_)))
    }

    /// Seconds of training, those before an interruption included.
    fn seconds(&self) -> f64 {
        self.seconds_before + self.started.elapsed().as_secs_f64()
    }
}

fn bytes(var: &Var) -> usize {
    var.elem_count() * var.dtype().size_in_bytes()
}
