//! The training loop: see `run` and `step`.

mod backprop;
mod clock;
mod log;
mod loss_counts;
mod prepare;
mod refuse;
mod replays;
mod save;
mod step_batches;
mod update;
mod validate;

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::Arc;

use candle_core::{Device, Tensor, Var};

use super::evaluate::Evaluated;
use super::limits::Limit;
use super::ranks::{agree_on_flow, average_buffers};
use super::{Outcome, Trainer, phase};
use crate::batch::Batch;
use crate::callback::{Flow, Plan, Progress, StepEnd, StopReason};
use crate::checkpoint::Saver;
use crate::collective::Collective;
use crate::error::{Error, Result};
use crate::memory;
use crate::metrics::Means;
use crate::module::{Model, Module};
use crate::optim::{Average, Turn};
use crate::precision::LossScale;
use crate::reduction::Reduction;
use crate::taps::Taps;
use clock::Clock;
use refuse::Refusal;
use replays::Replays;
use step_batches::StepBatches;
use update::Update;
use validate::{PlateauProgress, Validation};

/// The module with taps on its parameters, which report gradients to the ranks during the backward pass.
struct Tapped<B: Batch> {
    module: Box<dyn Module<Batch = B>>,
    taps: Taps<Reduction>,
}

/// One call of [`Trainer::fit`], on one rank.
pub(super) struct Fit<'a, B: Batch> {
    trainer: &'a mut Trainer,
    ranks: Arc<dyn Collective>,
    /// Whether each rank keeps only a part of the optimizer state.
    sharded: bool,
    model: &'a Model<B>,
    /// The tapped training module, if there are several ranks.
    tapped: Option<Tapped<B>>,
    replays: Replays<B>,
    /// The optimizers, in the order of their turns.
    turns: Vec<Turn>,
    /// What is remembered of each turn in earlier steps.
    histories: Vec<TurnHistory>,
    /// The parameters of all turns that move now, in the same order.
    trained: Vec<(String, Var)>,
    average: Option<Average>,
    batches: StepBatches<B>,
    steps_per_epoch: Option<u64>,
    progress: Progress,
    /// Metrics that the module has logged for the end of the epoch.
    epoch_means: Means,
    validation: Validation<B>,
    plateau: PlateauProgress,
    /// Only set for fp16.
    loss_scale: Option<LossScale>,
    /// What a validation before or inside the step asked for; handled once the step is taken.
    asked: Flow,
    saver: Option<Saver>,
    /// Whether the current step has moved parameters, or may have.
    is_moving: bool,
    clock: Clock,
}

/// What is remembered of an optimizer's turn in earlier steps.
#[derive(Clone, Default)]
struct TurnHistory {
    /// Whether the module counts the items of its loss (`Step::weigh_loss`), once known.
    counts_items: Option<bool>,
    /// How many times in a row the gradients have overflowed.
    overflows: u32,
}

/// What is gathered over the micro-batches and optimizers of a step.
#[derive(Default)]
struct Tally {
    /// The samples of the step.
    samples: usize,
    /// Whether they are the last samples of their epoch.
    ends_epoch: bool,
    /// Samples that this rank has processed in this turn.
    own_samples: usize,
    /// Logged metrics; only in steps after which they are read.
    means: Option<Means>,
    /// Metrics logged at the end of the epoch.
    epoch_means: Means,
    /// Numbers and losses of this rank's micro-batches in this turn.
    losses: Vec<(usize, Tensor)>,
    /// Gradients of the optimizers that have had their turn, in the order of the trained parameters.
    gradients: Vec<Tensor>,
}

/// The result of an optimizer's turn.
enum Turned {
    /// Its parameters have moved.
    Moved,
    /// They have not moved, but the step goes on.
    SatOut,
    /// They have not moved, nor have any others: the whole step is refused.
    Refused(Refusal),
}

/// The result of a step.
enum Stepped {
    /// The parameters have moved.
    Moved(Box<Tally>),
    /// The parameters have not moved.
    Refused(Refusal),
}

impl<B: Batch> Fit<'_, B> {
    /// Trains. After an error or a panic, saves the progress made before it.
    pub(super) fn run(&mut self) -> Result<Outcome> {
        match catch_unwind(AssertUnwindSafe(|| self.train())) {
            Ok(trained) => trained.map_err(|error| {
                self.save_after_error();
                self.explain_memory(error)
            }),
            Err(panic) => {
                // Only the first panic says what is wrong.
                let _ = catch_unwind(AssertUnwindSafe(|| self.save_after_error()));
                resume_unwind(panic)
            }
        }
    }

    /// Takes steps until the last one or a stop, then validates and saves that step.
    fn train(&mut self) -> Result<Outcome> {
        let flow = self.start()?;
        let begun_at = self.progress.step;
        let mut flow = self.catch_up(flow)?;
        let reason = loop {
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
        self.finish(reason, begun_at)
    }

    /// Validates and saves the last step, and reports the end. `begun_at`: the step that training began at.
    fn finish(&mut self, mut reason: StopReason, begun_at: u64) -> Result<Outcome> {
        // An interrupted or failed run saves its state without spending minutes on validation.
        if !matches!(reason, StopReason::Signal(_) | StopReason::Failed(_)) {
            if self.progress.step > begun_at {
                self.log_part_of_epoch()?;
            }
            if let Flow::Stop(signal @ StopReason::Signal(_)) = self.validate_at_the_end()? {
                reason = signal;
            }
        }
        self.save()?;
        self.finish_saving()?;
        if let Some(saver) = &mut self.saver
            && matches!(reason, StopReason::Finished | StopReason::Callback(_))
        {
            saver.end(self.progress.step)?;
        }
        if let Some(average) = &self.average {
            average.take_over(|| self.model.params().publish())?;
        }
        let progress = self.progress;
        self.trainer.progress = progress;
        self.trainer.callbacks.tell(|callback| callback.on_fit_end(&progress, &reason))?;
        let validation = self.validation.take_metrics();
        let best = self.saver.as_ref().and_then(|saver| saver.best().first().copied());
        Ok(Outcome { progress, validation, best, reason })
    }

    /// Runs the deferred work, reports the plan to the callbacks, and validates a few batches.
    fn start(&mut self) -> Result<Flow> {
        if let Some(work) = self.trainer.when_ready.take() {
            work(self.trainer)?;
        }
        if let Some(saver) = &self.saver {
            saver.begin()?;
        }
        let plan = Plan {
            start: self.progress,
            last_step: self.trainer.config.last_step(self.steps_per_epoch),
            steps_per_epoch: self.steps_per_epoch,
            parameters: self.model.params().count(),
            optimizer_bytes: self.turns.iter().flat_map(Turn::state).map(|(_, var)| bytes(&var)).sum(),
            flops_per_sample: self.model.evaluation().flops().map(|forward| 3. * forward),
        };
        self.trainer.callbacks.tell(|callback| callback.on_fit_start(&plan))?;
        let few = self.trainer.config.sanity_val_batches;
        if few > 0
            && self.progress.step == 0
            && let Some(evaluated) = self.evaluate(Some(Limit::Batches(few)), false)?
        {
            let flow = match evaluated {
                Evaluated::Stopped(reason) => Flow::Stop(reason),
                Evaluated::Complete(metrics, flow) => {
                    self.check_monitors(&metrics)?;
                    flow
                }
            };
            if let Flow::Stop(_) = flow {
                return Ok(flow);
            }
            self.asked = flow;
        }
        Ok(Flow::Continue)
    }

    /// Runs the validation that the resumed run still owed, unless the run is to stop; all ranks then agree on
    /// whether to begin.
    fn catch_up(&mut self, asked: Flow) -> Result<Flow> {
        let flow = if self.validation.take_owed() { asked.or(self.validate()?) } else { asked };
        Ok(agree_on_flow(&*self.ranks, flow.or(self.time_is_over(self.clock.seconds_before())), false)?.0)
    }

    /// A stop, if `seconds` of training have reached `max_time`.
    fn time_is_over(&self, seconds: f64) -> Flow {
        match self.trainer.config.max_time {
            Some(limit) if seconds >= limit.as_secs_f64() => {
                let why = format!("`max_time` of {} is over", humantime::format_duration(limit));
                Flow::Stop(StopReason::Callback(why))
            }
            _ => Flow::Continue,
        }
    }

    /// One optimizer step: each optimizer moves its parameters against the gradient of a batch's mean loss.
    fn step(&mut self) -> Result<Stepped> {
        self.unfreeze();
        let mut tally = self.tally();
        for turn in 0..self.turns.len() {
            match self.take_turn(turn, &mut tally)? {
                Turned::Moved | Turned::SatOut => {}
                Turned::Refused(refusal) => {
                    self.is_moving = false;
                    return Ok(Stepped::Refused(refusal));
                }
            }
        }
        self.complete_step(&mut tally)?;
        Ok(Stepped::Moved(Box::new(tally)))
    }

    /// An empty tally for the next step.
    fn tally(&self) -> Tally {
        let done = self.progress.step;
        // Other steps' metrics are not read. The first step's show early whether they can be read.
        let is_read = done == 0 || (done + 1).is_multiple_of(self.trainer.config.log_every);
        Tally { means: is_read.then(Means::default), ..Tally::default() }
    }

    /// One optimizer's turn in a step.
    fn take_turn(&mut self, turn: usize, tally: &mut Tally) -> Result<Turned> {
        if !self.turns[turn].is_due(self.progress.step + 1) {
            self.sit_out(turn, tally)?;
            return Ok(Turned::SatOut);
        }
        let rates = self.turns[turn].rates(&self.progress, self.plateau.lr_scale);
        self.turns[turn].prepare(rates)?;
        let is_first = !self.is_moving;
        // Non-finite gradients move nothing; `refuse` then reports why, and whether training can go on.
        let Update { gradients, norm } = self.update(turn, tally)?;
        if let Some(refusal) = self.refuse(turn, is_first, norm, &gradients, tally)? {
            self.model.params().roll_back_buffers()?;
            return match refusal {
                refusal if is_first => Ok(Turned::Refused(refusal)),
                // Others have moved already, which cannot be undone: this one sits out, as in PyTorch, ...
                Refusal::Overflow => Ok(Turned::SatOut),
                // ... or ends the run, whose last checkpoint is still good.
                Refusal::Hopeless(why) => Err(Error::msg(why)),
            };
        }
        self.turns[turn].commit()?;
        for (name, value) in [("grad_norm", norm), ("lr", rates.lr)] {
            let (name, value) = (self.metric_name(turn, name), Tensor::new(value, &Device::Cpu)?);
            tally.note(&name, &value, tally.samples as f64)?;
        }
        self.model.params().refresh_taps()?;
        self.model.params().commit_buffers()?;
        average_buffers(&*self.ranks, self.model.params(), tally.own_samples)?;
        Ok(Turned::Moved)
    }

    /// Counts a step that all optimizers have had their turn in.
    fn complete_step(&mut self, tally: &mut Tally) -> Result<()> {
        self.batches.clear();
        self.progress.advance(tally.samples, tally.ends_epoch);
        self.epoch_means.merge(std::mem::take(&mut tally.epoch_means))?;
        if let Some(average) = &mut self.average {
            average.update(self.progress.step)?;
        }
        self.is_moving = false;
        Ok(())
    }

    /// Does what is due after a step: callbacks, logging, validation, saving.
    fn after_step(&mut self, tally: Tally) -> Result<Flow> {
        let progress = self.progress;
        let end = StepEnd { progress, params: &self.trained, gradients: &tally.gradients };
        let mut flow = std::mem::take(&mut self.asked)
            .or(self.trainer.callbacks.ask(|callback| callback.on_step_end(&end))?);
        flow = flow.or(self.log_step(tally)?);
        let is_validated = self.is_validation_due(false)?;
        if is_validated {
            flow = flow.or(self.validate()?);
        }
        let is_due = |saver: &Saver| saver.is_due(progress.step, is_validated) && !saver.has(progress.step);
        let saves = self.saver.as_ref().is_some_and(is_due) || flow == Flow::Save;
        let (flow, saves) =
            agree_on_flow(&*self.ranks, flow.or(self.time_is_over(self.clock.seconds())), saves)?;
        if saves {
            self.save()?;
        }
        self.trainer.show_ready_pictures()?;
        if let Some(saver) = &mut self.saver {
            let saved = saver.poll()?;
            self.tell_saved(saved)?;
        }
        Ok(flow)
    }

    /// Lets the groups move that are due to be unfrozen.
    fn unfreeze(&mut self) {
        let progress = self.progress;
        // Each turn is asked, also after one that has unfrozen a group.
        let unfrozen: Vec<bool> = self.turns.iter_mut().map(|turn| turn.unfreeze(&progress)).collect();
        if unfrozen.contains(&true) {
            self.trained = trained(&self.turns);
            self.replays.forget();
        }
    }

    /// Adds advice on what to change to an error about a device that is out of memory.
    fn explain_memory(&self, error: Error) -> Error {
        let config = &self.trainer.config;
        let share = config.batch_size.div_ceil(self.ranks.world_size());
        memory::explain(error, config.micro_batch_size.unwrap_or(share))
    }

    /// Whether training may already end for this reason.
    fn may_stop(&self, reason: &StopReason) -> bool {
        let config = &self.trainer.config;
        let early = self.progress.step < config.min_steps || self.progress.epoch < config.min_epochs;
        !(early && matches!(reason, StopReason::Callback(_)))
    }
}

/// The parameters that move now, in the order of the optimizers' turns.
fn trained(turns: &[Turn]) -> Vec<(String, Var)> {
    turns.iter().flat_map(|turn| turn.params.clone()).collect()
}

fn bytes(var: &Var) -> usize {
    var.elem_count() * var.dtype().size_in_bytes()
}
