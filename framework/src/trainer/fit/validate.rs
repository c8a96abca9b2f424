//! Validations of the training loop: when they are due, and how the run reacts to them.

use std::time::Instant;

use indexmap::IndexMap;

use super::{Before, Fit, phase};
use crate::batch::Batch;
use crate::callback::{Flow, Record};
use crate::config::{did_you_mean, quoted_list};
use crate::data::{Pass, Split};
use crate::error::{Error, Result};
use crate::optim::Average;
use crate::trainer::evaluate::{Evaluated, evaluate};
use crate::trainer::limits::{Every, Limit};

impl<B: Batch> Fit<'_, B> {
    /// Whether a validation is due after the step or, by the clock, `inside` the next one.
    pub(super) fn is_validation_due(&self, inside: bool) -> Result<bool> {
        let is_due = match self.trainer.config.val_every {
            None => !inside && self.progress.step_in_epoch == 0,
            Some(every) if inside && !matches!(every, Every::Time(_)) => false,
            Some(every) => every.is_due(&self.progress, self.steps_per_epoch, || self.validated_at.elapsed()),
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
        self.validated_at = Instant::now();
        if self.validation.as_ref().is_some_and(|(at, _)| *at == step) {
            return Ok(Flow::Continue);
        }
        let limit = self.val.as_ref().and_then(|(.., limit)| *limit);
        let (plateau, lr_scale) = (self.plateau, self.lr_scale);
        self.before_validation =
            Some(Before { callbacks: self.trainer.callback_states(), plateau, lr_scale });
        let (metrics, asked) = match self.evaluate(limit, self.trainer.image_every > 0)? {
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
        let flow = asked.or(self.trainer.ask(|callback| callback.on_validation_end(&mut record))?);
        let metric = |name: &str| record.metrics.get(name).copied();
        if let Some(plateau) = self.trainer.plateau.as_ref().filter(|_| self.turns[0].lr > 0.) {
            // Only rank 0 has the metrics that callbacks added.
            let own = metric(&plateau.monitor).unwrap_or(f64::NAN);
            let (value, lr) = (self.ranks.gather_numbers(&[own])?[0][0], self.turns[0].lr);
            self.lr_scale = plateau.next(&mut self.plateau, value, lr * self.lr_scale) / lr;
        }
        let value = metric(&self.trainer.checkpoint.monitor);
        if self.saver.is_some() && value.is_none() {
            let monitor = &self.trainer.checkpoint.monitor;
            return Err(Error::msg(format!(
                "a callback declares that it adds `{monitor}`, and has not added it"
            )));
        }
        let is_best = self.saver.as_mut().zip(value).is_some_and(|(saver, value)| saver.rank(step, value));
        (self.validation, self.before_validation) = (Some((step, record.metrics)), None);
        if self.ranks.decide(is_best)? {
            self.save()?;
        }
        self.validated_at = Instant::now();
        Ok(flow)
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
        for callback in &trainer.callbacks {
            let section = format!("callbacks.{}", callback.section);
            callback.monitored_metric().map_or(Ok(()), |monitor| is_known(&section, monitor, &known))?;
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
        let is_done = self.validation.as_ref().is_some_and(|(at, _)| *at == self.progress.step);
        let has_one = self.val.is_some() && self.progress.step > 0;
        has_one && !by_clock && !is_done && self.is_validation_due(false).unwrap_or(false)
    }

    /// Runs the validation at the end of a run.
    pub(super) fn validate_at_the_end(&mut self) -> Result<Flow> {
        let step = self.progress.step;
        if self.ranks.decide(self.saver.as_ref().is_some_and(|saver| saver.has_ended_at(step)))? {
            // There was nothing left to do: repeat the validation that the run already ended with.
            let limit = self.val.as_ref().and_then(|(.., limit)| *limit);
            return Ok(match self.evaluate(limit, false)? {
                Some(Evaluated::Stopped(reason)) => Flow::Stop(reason),
                Some(Evaluated::Complete(metrics, _)) => {
                    self.validation = Some((step, metrics));
                    Flow::Continue
                }
                None => Flow::Continue,
            });
        }
        if self.validation.as_ref().is_none_or(|(at, _)| *at != step) {
            // A longer run would not validate here: save what it resumes from without this validation.
            self.save()?;
        }
        self.validate()
    }

    /// Metrics of the validation data, if there is any, with the averaged weights if there are any.
    pub(super) fn evaluate(&mut self, limit: Option<Limit>, images_due: bool) -> Result<Option<Evaluated>> {
        let Some((source, split, _)) = &self.val else { return Ok(None) };
        let _phase = phase!("validation");
        let (trainer, model, progress, workers) =
            (&mut *self.trainer, self.model, self.progress, self.workers);
        // With `overfit_batches`, the batches are the very ones that training sees.
        let augment = *split == Split::Train;
        let pass = Pass { augment, ..Pass::evaluation(*split, trainer.seed) };
        let evaluate = || evaluate(trainer, model, source, pass, limit, workers, &progress, images_due);
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
