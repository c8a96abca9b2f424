//! Validations of the training loop: when they are due, and how the run reacts to them.

use std::time::Instant;

use indexmap::IndexMap;

use super::{Fit, phase};
use crate::batch::Batch;
use crate::callback::{Flow, Record};
use crate::checkpoint::State;
use crate::config::{did_you_mean, quoted_list};
use crate::data::{Data, Pass, Source, Split};
use crate::error::{Error, Result};
use crate::optim::Average;
use crate::schedule::PlateauState;
use crate::trainer::evaluate::{Evaluated, Evaluation};
use crate::trainer::limits::{Every, Limit};
use crate::trainer::{Trainer, TrainerConfig};

/// A run's validations.
pub(super) struct Validation<B: Batch> {
    /// What they are computed on, unless the run has none.
    data: Option<ValidationData<B>>,
    /// Workers that load the data.
    workers: usize,
    /// The last complete one: its step and its metrics.
    last: Option<(u64, IndexMap<String, f64>)>,
    /// When the last one began or, if it is complete, ended; at first, when training began.
    at: Instant,
    /// State from before one that is not complete.
    before: Option<Before>,
    /// Whether the resumed run still owes one that was due.
    is_owed: bool,
}

/// What validations are computed on.
struct ValidationData<B: Batch> {
    source: Source<B>,
    /// The split it counts as.
    split: Split,
    /// The limit on its batches.
    limit: Option<Limit>,
}

/// State that a validation changes. A checkpoint that owes a validation stores the state from before it.
#[derive(Clone)]
pub(super) struct Before {
    pub(super) callbacks: IndexMap<String, serde_json::Value>,
    pub(super) plateau: PlateauProgress,
}

/// The plateau's state, and what it has done so far.
#[derive(Clone, Copy)]
pub(super) struct PlateauProgress {
    pub(super) state: PlateauState,
    /// Its factor on the learning rate.
    pub(super) lr_scale: f64,
}

impl<B: Batch> Validation<B> {
    pub(super) fn new(
        config: &TrainerConfig,
        data: &Data<B>,
        workers: usize,
        resumed: Option<&State>,
    ) -> Result<Self> {
        let (source, split, limit) = match config.overfit_batches {
            Some(limit) => (Some(&data.train), Split::Train, Some(limit)),
            None => (data.val.as_ref(), Split::Val, config.limit_val_batches),
        };
        let is_wanted = limit.is_none_or(|limit| limit.of(usize::MAX) > 0);
        let source = source.filter(|_| is_wanted).cloned();
        if source.as_ref().is_some_and(Source::is_empty) {
            return Err(Error::msg(
                "the validation data is empty; to train without validation, set `trainer.limit_val_batches = 0`",
            ));
        }
        if source.is_some() {
            data.evaluated(split)?;
        }
        Ok(Self {
            data: source.map(|source| ValidationData { source, split, limit }),
            workers,
            last: None,
            at: Instant::now(),
            before: None,
            is_owed: resumed.is_some_and(|state| state.owes_validation),
        })
    }

    /// Whether the run validates at all.
    pub(super) fn has_data(&self) -> bool {
        self.data.is_some()
    }

    /// State from before a validation that is not complete.
    pub(super) fn before(&self) -> Option<&Before> {
        self.before.as_ref()
    }

    /// Whether the resumed run owed a validation; from now on it does not.
    pub(super) fn take_owed(&mut self) -> bool {
        std::mem::take(&mut self.is_owed)
    }

    /// The metrics of the last complete validation.
    pub(super) fn take_metrics(&mut self) -> Option<IndexMap<String, f64>> {
        self.last.take().map(|(_, metrics)| metrics)
    }

    /// Whether `step` has been validated.
    fn is_done_at(&self, step: u64) -> bool {
        self.last.as_ref().is_some_and(|(at, _)| *at == step)
    }

    /// The limit on its batches.
    fn limit(&self) -> Option<Limit> {
        self.data.as_ref().and_then(|data| data.limit)
    }
}

impl PlateauProgress {
    /// The saved progress; starts over if the plateau now watches another metric.
    pub(super) fn new(trainer: &Trainer, resumed: Option<&State>) -> Self {
        let fresh = Self { state: PlateauState::default(), lr_scale: 1. };
        let Some(saved) = resumed else { return fresh };
        let Some(plateau) = &trainer.plateau else {
            // A learning rate lowered by a plateau stays lowered only while a plateau is configured.
            return Self { state: saved.plateau, ..fresh };
        };
        let lr_scale = saved.lr_scale.unwrap_or(1.);
        if plateau.criterion().goes_on(saved.plateau_of.as_ref()) {
            return Self { state: saved.plateau, lr_scale };
        }
        tracing::warn!("`schedule.plateau.monitor` has changed: the plateau starts over");
        Self { lr_scale, ..fresh }
    }
}

impl<B: Batch> Fit<'_, B> {
    /// Whether a validation is due after the step or, by the clock, `inside` the next one.
    pub(super) fn is_validation_due(&self, inside: bool) -> Result<bool> {
        let is_due = match self.trainer.config.val_every {
            None => !inside && self.progress.step_in_epoch == 0,
            Some(every) if inside && !matches!(every, Every::Time(_)) => false,
            Some(every) => {
                every.is_due(&self.progress, self.steps_per_epoch, || self.validation.at.elapsed())
            }
        };
        match self.trainer.config.val_every {
            // Clocks differ between ranks.
            Some(Every::Time(_)) => self.ranks.decide(is_due),
            _ => Ok(is_due),
        }
    }

    /// Validates, unless this step has already been validated.
    pub(super) fn validate(&mut self) -> Result<Flow> {
        let step = self.progress.step;
        self.validation.at = Instant::now();
        if self.validation.is_done_at(step) {
            return Ok(Flow::Continue);
        }
        self.validation.before = Some(self.before_validation());
        let (metrics, asked) = match self.evaluate(self.validation.limit(), self.trainer.image_every > 0)? {
            None => return Ok(Flow::Continue),
            Some(Evaluated::Stopped(reason)) => return Ok(Flow::Stop(reason)),
            Some(Evaluated::Complete(metrics, flow)) => (metrics, flow),
        };
        let checked = self.check_monitors(&metrics);
        if self.ranks.decide(checked.is_err())? {
            // Keep the training done so far.
            self.save()?;
            checked?;
        }
        let epoch = self.progress.epoch_of_last_step();
        let mut record = Record { step, epoch, split: Split::Val, metrics };
        let flow =
            asked.or(self.trainer.callbacks.ask(|callback| callback.on_validation_end(&mut record))?);
        let metric = |name: &str| record.metrics.get(name).copied();
        if let Some(plateau) = self.trainer.plateau.as_ref().filter(|_| self.turns[0].lr > 0.) {
            // Only rank 0 has the metrics that callbacks added.
            let own = metric(&plateau.monitor).unwrap_or(f64::NAN);
            let (value, lr) = (self.ranks.gather_numbers(&[own])?[0][0], self.turns[0].lr);
            self.plateau.lr_scale =
                plateau.next(&mut self.plateau.state, value, lr * self.plateau.lr_scale) / lr;
        }
        let value = metric(&self.trainer.checkpoint.monitor);
        if self.saver.is_some() && value.is_none() {
            let monitor = &self.trainer.checkpoint.monitor;
            return Err(Error::msg(format!(
                "a callback declares that it adds `{monitor}`, and has not added it"
            )));
        }
        let is_best = self.saver.as_mut().zip(value).is_some_and(|(saver, value)| saver.rank(step, value));
        self.validation.last = Some((step, record.metrics));
        self.validation.before = None;
        if self.ranks.decide(is_best)? {
            self.save()?;
        }
        self.validation.at = Instant::now();
        Ok(flow)
    }

    /// The current state of what a validation changes.
    pub(super) fn before_validation(&self) -> Before {
        Before { callbacks: self.trainer.callbacks.states(), plateau: self.plateau }
    }

    /// Refuses settings that name a metric which validations do not have.
    pub(super) fn check_monitors(&self, metrics: &IndexMap<String, f64>) -> Result<()> {
        if self.ranks.rank() > 0 {
            // Other ranks do not have all callbacks.
            return Ok(());
        }
        let trainer = &self.trainer;
        let mut known: Vec<String> = metrics.keys().cloned().collect();
        // A callback sees the metrics that earlier callbacks have added.
        for callback in trainer.callbacks.iter() {
            let section = format!("callbacks.{}", callback.section);
            if let Some(monitor) = callback.monitored_metric() {
                is_known(&section, monitor, &known)?;
            }
            known.extend(callback.added_metrics());
        }
        let checkpoint = self.saver.as_ref().map(|_| ("checkpoint", trainer.checkpoint.monitor.as_str()));
        let plateau = trainer.plateau.as_ref().map(|plateau| ("schedule.plateau", plateau.monitor.as_str()));
        let mut ours = checkpoint.into_iter().chain(plateau);
        ours.try_for_each(|(section, monitor)| is_known(section, monitor, &known))
    }

    /// Whether a checkpoint taken now lacks the validation due at its step. Times are due at no step.
    pub(super) fn owes_validation(&self) -> bool {
        let by_clock = matches!(self.trainer.config.val_every, Some(Every::Time(_)));
        let is_done = self.validation.is_done_at(self.progress.step);
        let has_one = self.validation.has_data() && self.progress.step > 0;
        has_one && !by_clock && !is_done && self.is_validation_due(false).unwrap_or(false)
    }

    /// Runs the validation at the end of a run.
    pub(super) fn validate_at_the_end(&mut self) -> Result<Flow> {
        let step = self.progress.step;
        if self.ranks.decide(self.saver.as_ref().is_some_and(|saver| saver.has_ended_at(step)))? {
            // There was nothing left to do: repeat the validation that the run already ended with.
            return Ok(match self.evaluate(self.validation.limit(), false)? {
                Some(Evaluated::Stopped(reason)) => Flow::Stop(reason),
                Some(Evaluated::Complete(metrics, _)) => {
                    self.validation.last = Some((step, metrics));
                    Flow::Continue
                }
                None => Flow::Continue,
            });
        }
        if !self.validation.is_done_at(step) {
            // A longer run would not validate here: save what it resumes from without this validation.
            self.save()?;
        }
        self.validate()
    }

    /// Metrics of the validation data, if there is any, with the averaged weights if there are any.
    pub(super) fn evaluate(&mut self, limit: Option<Limit>, images_due: bool) -> Result<Option<Evaluated>> {
        let Some(ValidationData { source, split, .. }) = &self.validation.data else { return Ok(None) };
        let _phase = phase!("validation");
        let (trainer, model, workers) = (&mut *self.trainer, self.model, self.validation.workers);
        // With `overfit_batches`, the batches are the very ones that training sees.
        let augment = *split == Split::Train;
        let pass = Pass { augment, ..Pass::evaluation(*split, trainer.seed) };
        let evaluation = Evaluation { model, source, pass, limit, workers, progress: self.progress };
        let evaluate = || evaluation.run(trainer, images_due);
        Average::in_place(self.average.as_ref(), || model.params().publish(), evaluate).map(Some)
    }
}

/// Refuses a metric that is not in `known`.
fn is_known(section: &str, monitor: &str, known: &[String]) -> Result<()> {
    if known.iter().any(|name| name == monitor) {
        return Ok(());
    }
    // PyTorch Lightning modules name their validation metrics this way themselves.
    let plain = monitor.strip_prefix("val_").filter(|plain| known.iter().any(|name| name == plain));
    let guess = match plain {
        Some(plain) => format!("; in validation it is called `{plain}`"),
        None => did_you_mean(monitor, known).map_or(String::new(), |guess| format!("; {guess}")),
    };
    let message = format!(
        "there is no validation metric `{monitor}`, expected one of {}{guess} (a callback that adds one must come before those that monitor it, and declare it in `Callback::added_metrics`)",
        quoted_list(known)
    );
    Err(Error::setting(format!("{section}.monitor"), message))
}
