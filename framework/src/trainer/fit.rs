//! The one training loop of the project: `run`, `epoch` and `step`, top to bottom.

use candle_core::{Device, Tensor, Var};
use indexmap::IndexMap;

use super::evaluate::evaluate;
use super::{Outcome, Trainer};
use crate::batch::Batch;
use crate::callback::{Callback, Flow, Picture, Plan, Progress, Record, StopReason};
use crate::checkpoint::{self, Snapshot, State};
use crate::data::{Data, Loader, Order, Sample, Split};
use crate::error::{Error, Result};
use crate::grads::Grads;
use crate::metrics::Means;
use crate::module::{Model, Step};
use crate::optim::{self, Optimizer};
use crate::schedule::PlateauState;

/// The samples of one micro-batch after the other.
type MicroBatches<B> = Loader<B, Box<dyn Iterator<Item = Vec<Sample>> + Send>>;

/// One call of [`Trainer::fit`].
pub(super) struct Fit<'a, B: Batch> {
    trainer: &'a mut Trainer,
    model: &'a Model<B>,
    data: &'a Data<B>,
    params: Vec<(String, Var)>,
    optimizer: Box<dyn Optimizer>,
    order: Order,
    micro_batches: MicroBatches<B>,
    last_step: u64,
    progress: Progress,
    /// The last validation: the step it was at, and its metrics.
    validation: Option<(u64, IndexMap<String, f64>)>,
    best_loss: Option<f64>,
    /// The learning rate that the schedule shapes; a plateau lowers it.
    lr: f64,
    plateau: PlateauState,
    /// The step whose checkpoint is on disk.
    saved: Option<u64>,
}

impl<'a, B: Batch> Fit<'a, B> {
    pub(super) fn new(trainer: &'a mut Trainer, model: &'a Model<B>, data: &'a Data<B>) -> Result<Self> {
        let params = model.params().vars();
        let optimizer = trainer.optimizer.build(&params)?;
        let resumed = trainer.resume.take();
        let state = match &resumed {
            Some(checkpoint) => checkpoint.restore(&params, &optimizer.state())?,
            None => State { seed: trainer.seed, ..State::default() },
        };
        let batch_size = trainer.config.batch_size;
        let order = Order { seed: trainer.seed, len: data.train.len(), batch_size };
        if order.len == 0 {
            return Err(Error::msg("the training data is empty"));
        }
        let progress = state.progress;
        if let Some(checkpoint) = &resumed {
            check_same_order(checkpoint.state(), &order)?;
        }
        let micro = trainer.config.micro_batch_size.unwrap_or(batch_size);
        let batches = order.from(progress.epoch, progress.step_in_epoch as usize);
        let samples: Box<dyn Iterator<Item = Vec<Sample>> + Send> = Box::new(
            batches.flat_map(move |batch| batch.chunks(micro).map(<[_]>::to_vec).collect::<Vec<_>>()),
        );
        let micro_batches = Loader::new(data.train.clone(), samples, data.workers);
        let last_step = trainer.config.last_step(order.batches() as u64);
        let lr = state.lr.unwrap_or(trainer.optimizer.lr());
        Ok(Self {
            trainer,
            model,
            data,
            params,
            optimizer,
            order,
            micro_batches,
            last_step,
            progress,
            validation: None,
            best_loss: state.best_loss,
            lr,
            plateau: state.plateau,
            saved: resumed.map(|checkpoint| checkpoint.state().progress.step),
        })
    }

    /// Epochs until the last step or a stop; then a validation and a checkpoint of that very step.
    pub(super) fn run(mut self) -> Result<Outcome> {
        let (start, steps_per_epoch) = (self.progress, self.order.batches() as u64);
        let parameters = self.model.params().count();
        let plan = Plan { start, last_step: self.last_step, steps_per_epoch, parameters };
        self.trainer.callbacks.iter_mut().try_for_each(|callback| callback.on_fit_start(&plan))?;
        let mut reason = StopReason::Finished;
        while self.progress.step < self.last_step {
            if let Flow::Stop(why) = self.epoch()? {
                reason = why;
                break;
            }
        }
        // Who interrupts a run wants its state saved, not minutes of validation.
        if !matches!(reason, StopReason::Signal(_)) {
            self.validate()?;
        }
        self.save()?;
        let progress = self.progress;
        self.trainer.callbacks.iter_mut().try_for_each(|callback| callback.on_fit_end(&progress))?;
        Ok(Outcome { progress, validation: self.validation.map(|(_, metrics)| metrics), reason })
    }

    /// The steps left in this epoch, with what is due after each.
    fn epoch(&mut self) -> Result<Flow> {
        let epoch = self.progress.epoch;
        while self.progress.epoch == epoch && self.progress.step < self.last_step {
            let metrics = self.step()?;
            let done = self.progress.step;
            let mut flow = self.ask(|callback, progress| callback.on_step_end(progress))?;
            if done.is_multiple_of(self.trainer.config.log_every) {
                let _span = tracing::debug_span!(target: "candlepower::phase", "logging").entered();
                let metrics = metrics.read()?;
                let record = Record { step: done, epoch, split: Split::Train, metrics };
                flow = flow.or(self.ask(|callback, _| callback.on_train_metrics(&record))?);
            }
            let epoch_ended = self.progress.step_in_epoch == 0;
            if self.trainer.config.val_every.map_or(epoch_ended, |every| done.is_multiple_of(every)) {
                flow = flow.or(self.validate()?);
            }
            if self.trainer.checkpoint.every_steps.is_some_and(|every| done.is_multiple_of(every)) {
                self.save()?;
            }
            if flow != Flow::Continue {
                return Ok(flow);
            }
        }
        Ok(Flow::Continue)
    }

    /// One optimizer step: the gradient of the mean loss over a batch, and the move against it.
    fn step(&mut self) -> Result<Means> {
        let batch_size = self.order.batch_len(self.progress.step_in_epoch);
        let images_due =
            self.trainer.image_every > 0 && (self.progress.step + 1).is_multiple_of(self.trainer.image_every);
        let rates = self.trainer.schedule.at(self.progress.step, self.lr);
        let mut grads = Grads::new(&self.params);
        let mut means = Means::default();
        let (mut samples, mut micro_batch) = (0, 0);
        while samples < batch_size {
            let span = tracing::debug_span!(target: "candlepower::phase", "data_wait").entered();
            let batch = self.micro_batches.next().ok_or_else(|| Error::msg("the training data ended"))??;
            let batch = batch.to_device(self.model.params().device())?;
            drop(span);
            let pictures_due = images_due && micro_batch == 0;
            let mut step = Step::training(self.progress.step, micro_batch, self.trainer.seed, pictures_due);
            let span = tracing::debug_span!(target: "candlepower::phase", "forward").entered();
            let loss = self.model.training().training_step(&batch, &mut step)?;
            drop(span);
            let share = batch.len() as f64 / batch_size as f64;
            let span = tracing::debug_span!(target: "candlepower::phase", "backward").entered();
            grads.add(&self.params, (&loss * share)?.backward()?)?;
            drop(span);
            self.tell(step, &loss, batch.len(), &mut means)?;
            samples += batch.len();
            micro_batch += 1;
        }
        let _span = tracing::debug_span!(target: "candlepower::phase", "optimizer").entered();
        let mut gradients = grads.complete(&self.params)?;
        if let Some(max_norm) = self.trainer.config.clip_norm {
            let norm = optim::clip_norm(&mut gradients, max_norm)?;
            means.add("grad_norm", &Tensor::new(norm, &Device::Cpu)?, batch_size)?;
        }
        if let Some(max) = self.trainer.config.clip_value {
            optim::clip_value(&mut gradients, max)?;
        }
        means.add("lr", &Tensor::new(rates.lr, &Device::Cpu)?, batch_size)?;
        self.optimizer.step(&gradients, self.progress.step + 1, rates)?;
        self.progress.advance(batch_size, self.order.batches());
        Ok(means)
    }

    /// Hands on what a module logged in a step.
    fn tell(&mut self, step: Step, loss: &Tensor, samples: usize, means: &mut Means) -> Result<()> {
        let (metrics, pictures) = step.into_logged();
        means.add("loss", loss, samples)?;
        metrics.iter().try_for_each(|(name, value)| means.add(name, value, samples))?;
        let step = self.progress.step + 1;
        let picture = |(name, pixels)| Picture { step, split: Split::Train, name, pixels };
        pictures.into_iter().map(picture).try_for_each(|picture| self.trainer.show(&picture))
    }

    /// Validates, unless this very step has been validated already.
    fn validate(&mut self) -> Result<Flow> {
        let (Some(val), step) = (&self.data.val, self.progress.step) else { return Ok(Flow::Continue) };
        if self.validation.as_ref().is_some_and(|(at, _)| *at == step) {
            return Ok(Flow::Continue);
        }
        let _span = tracing::debug_span!(target: "candlepower::phase", "validation").entered();
        let images_due = self.trainer.image_every > 0;
        let (val, workers) = (val.clone(), self.data.workers);
        let metrics =
            evaluate(self.trainer, self.model, val, Split::Val, workers, &self.progress, images_due)?;
        let epoch = self.progress.epoch_of_last_step();
        let record = Record { step, epoch, split: Split::Val, metrics };
        let loss = record.metrics.get("loss").copied();
        let better = |best: f64| loss.is_some_and(|loss| loss < best);
        if self.best_loss.is_none_or(better) {
            self.best_loss = loss;
            self.save()?;
            if let Some(dir) = &self.trainer.checkpoint_dir {
                checkpoint::mark_best(dir, step)?;
            }
        }
        if let (Some(plateau), Some(loss)) = (&self.trainer.plateau, loss) {
            self.lr = plateau.next(&mut self.plateau, loss, self.lr);
        }
        let flow = self.ask(|callback, _| callback.on_validation_end(&record))?;
        self.validation = Some((step, record.metrics));
        Ok(flow)
    }

    /// Saves this very step, unless that has been done or nobody wants it.
    fn save(&mut self) -> Result<()> {
        let Some(dir) = self.trainer.checkpoint_dir.clone() else { return Ok(()) };
        if self.saved.replace(self.progress.step) == Some(self.progress.step) {
            return Ok(());
        }
        let _span = tracing::debug_span!(target: "candlepower::phase", "checkpoint").entered();
        let state = State {
            progress: self.progress,
            seed: self.trainer.seed,
            best_loss: self.best_loss,
            // Without a plateau the configuration's learning rate counts, so that it can be changed on resuming.
            lr: self.trainer.plateau.is_some().then_some(self.lr),
            plateau: self.plateau,
        };
        let snapshot = Snapshot { params: &self.params, optimizer: &self.optimizer.state(), state: &state };
        let path = snapshot.save(&dir, &self.trainer.checkpoint)?;
        self.trainer.callbacks.iter_mut().try_for_each(|callback| callback.on_checkpoint(&path))
    }

    /// Asks every callback; one that wants to stop is enough.
    fn ask(&mut self, question: impl Fn(&mut dyn Callback, &Progress) -> Result<Flow>) -> Result<Flow> {
        let progress = self.progress;
        let mut flow = Flow::Continue;
        for callback in &mut self.trainer.callbacks {
            flow = flow.or(question(&mut **callback, &progress)?);
        }
        Ok(flow)
    }
}

impl Trainer {
    pub(super) fn show(&mut self, picture: &Picture) -> Result<()> {
        self.callbacks.iter_mut().try_for_each(|callback| callback.on_picture(picture))
    }
}

/// Refuses to go on with a checkpoint whose steps went over other batches: the order would silently be another.
fn check_same_order(state: &State, order: &Order) -> Result<()> {
    let Progress { epoch, step_in_epoch, samples, .. } = state.progress;
    let in_epoch = (step_in_epoch as usize * order.batch_size).min(order.len) as u64;
    if samples != epoch * order.len as u64 + in_epoch {
        return Err(Error::msg(format!(
            "the checkpoint saw {samples} samples in {epoch} epochs and {step_in_epoch} steps; {} samples in batches of {} \
             do not add up to that: go on with the batch size and the training data that it was made with",
            order.len, order.batch_size
        )));
    }
    if state.seed != order.seed {
        tracing::warn!(
            "the checkpoint's seed is {}, today's is {}: the order changes",
            state.seed,
            order.seed
        );
    }
    Ok(())
}
