//! Preparations before the first step.

use std::sync::Arc;

use candle_core::Var;

use super::clock::Clock;
use super::replays::Replays;
use super::step_batches::StepBatches;
use super::validate::{PlateauProgress, Validation};
use super::{Fit, Tapped, TurnHistory, trained};
use crate::batch::Batch;
use crate::callback::{Flow, Progress};
use crate::checkpoint::{Checkpoint, Saver, State};
use crate::collective::shard::Whole;
use crate::collective::{self, Collective, Identity, Shard};
use crate::data::{Data, Loader, Order, Share, Source, Start};
use crate::error::{Error, Result};
use crate::metrics::Means;
use crate::module::Model;
use crate::optim::{Average, Turn};
use crate::precision::LossScale;
use crate::taps::Taps;
use crate::trainer::limits::{Every, Limit};
use crate::trainer::ranks::{agree_on_state, same_as_rank_0};
use crate::trainer::{Trainer, TrainerConfig};

impl<'a, B: Batch> Fit<'a, B> {
    /// Agrees with all ranks on where training begins, and prepares its first step.
    pub(in crate::trainer) fn new(
        trainer: &'a mut Trainer,
        model: &'a Model<B>,
        data: &'a Data<B>,
    ) -> Result<Self> {
        trainer.config.resolve_fast_dev_run();
        let checkpoint = trainer.resume.take();
        let (config, ranks) = (&trainer.config, trainer.ranks.clone());

        check_precision(config, model)?;
        let identity = Identity::new(&trainer.configuration(), &model.params().state_dict());
        collective::check(&*ranks, &identity)?;
        let state = agree_on_state(&*ranks, checkpoint.as_ref().map(Checkpoint::state))?;
        let state = state.as_ref();
        let progress = state.map(|state| state.progress).unwrap_or_default();

        let sharded = trainer.distributed.shard == Shard::Optimizer && !ranks.is_alone();
        let turns = turns(trainer, model, sharded, state)?;
        let all: Vec<(String, Var)> = turns.iter().flat_map(Turn::all_params).collect();
        let mut average = trainer.average.as_ref().map(|config| Average::new(config, &all)).transpose()?;
        let order = order(config, trainer.seed, &data.train)?;
        if let Some(state) = state {
            check_order_goes_on(state, &order, &data.train)?;
        }
        let start_from = StartFrom { checkpoint: checkpoint.as_ref(), state, ranks: &*ranks };
        start_from.restore_all(model, &turns, sharded, average.as_mut())?;

        let tapped = if ranks.is_alone() { None } else { Some(Tapped::new(model)?) };
        let replays = Replays::new(config.cuda_graph && ranks.is_alone(), model.params().device());
        if config.cuda_graph && !ranks.is_alone() {
            tracing::warn!(
                "trainer.cuda_graph: steps of several ranks are not recorded, because gradients are exchanged during them"
            );
        }
        let loss_scale = LossScale::of(config.precision)
            .map(|fresh| state.and_then(|state| state.loss_scale).unwrap_or(fresh));

        let share = Share { rank: ranks.rank(), of: ranks.world_size() };
        let start = Start {
            epoch: progress.epoch,
            step_in_epoch: progress.step_in_epoch,
            samples_in_epoch: progress.samples_in_epoch,
            micro_batch_size: config.micro_batch_size.unwrap_or(config.batch_size.div_ceil(share.of)),
            share,
        };
        let workers = data.workers.div_ceil(ranks.ranks_here());
        let jobs = data.train.training(&order, start);
        let loader = Loader::new(jobs, workers, workers * data.prefetch, model.params().device());
        // A second optimizer needs a batch again, and so does another attempt after an overflow.
        let batches = StepBatches::new(loader, turns.len() > 1 || loss_scale.is_some());
        let steps_per_epoch = data.train.len().map(|_| order.batches() as u64);

        if let (Some(Every::Epochs(epochs)), None) = (config.val_every, steps_per_epoch)
            && epochs.fract() != 0.
        {
            return Err(Error::setting("val_every", "a stream's length is not known: expected whole epochs"));
        }
        let validation = Validation::new(config, data, workers, state)?;
        if !validation.has_data() {
            check_nothing_is_monitored(trainer)?;
        }
        let saver = trainer.checkpoint_dir.as_ref().filter(|_| config.fast_dev_run == 0);
        let saver = saver.map(|dir| Saver::new(dir, &trainer.checkpoint, state));

        let epoch_means = epoch_means(state, share)?;
        let plateau = PlateauProgress::new(trainer, state);
        restore_callbacks(trainer, state)?;
        Ok(Self {
            trainer,
            ranks,
            sharded,
            model,
            tapped,
            replays,
            trained: trained(&turns),
            histories: vec![TurnHistory::default(); turns.len()],
            turns,
            average,
            batches,
            steps_per_epoch,
            progress,
            epoch_means,
            validation,
            plateau,
            loss_scale,
            asked: Flow::Continue,
            saver,
            is_moving: false,
            clock: Clock::start(state.and_then(|state| state.seconds).unwrap_or(0.)),
        })
    }
}

/// Refuses a model that computes in another precision than the configured one.
fn check_precision(config: &TrainerConfig, model: &Model<impl Batch>) -> Result<()> {
    let (found, expected) = (model.params().dtype(), config.precision.dtype());
    if found != expected {
        let message =
            format!("the model computes in {found:?}, expected {expected:?}: see `Model::with_precision`");
        return Err(Error::setting("precision", message));
    }
    Ok(())
}

/// The optimizers with their parameters, at the steps of the checkpoint if there is one.
fn turns(
    trainer: &Trainer,
    model: &Model<impl Batch>,
    sharded: bool,
    state: Option<&State>,
) -> Result<Vec<Turn>> {
    let mut turns = Turn::share(
        &trainer.turns,
        &trainer.schedule,
        model.params(),
        model.training().unused_parameters(),
        sharded.then_some(&*trainer.ranks),
    )?;
    let Some(state) = state else { return Ok(turns) };
    let known = &state.optimizer_steps;
    for turn in &mut turns {
        if !known.is_empty() && !known.contains_key(&turn.name) {
            tracing::warn!(
                "the checkpoint has no optimizer `{}`: all steps so far count as its own",
                turn.name
            );
        }
        turn.resume(known, state.progress.step);
    }
    Ok(turns)
}

/// What training starts from: a checkpoint, or the model as it is.
struct StartFrom<'a> {
    /// The checkpoint, which only rank 0 has.
    checkpoint: Option<&'a Checkpoint>,
    /// Its state, which all ranks have.
    state: Option<&'a State>,
    ranks: &'a dyn Collective,
}

impl StartFrom<'_> {
    /// Sets the parameters, the optimizers' state and the averages to those of the checkpoint, if there is
    /// one, and to the same values on all ranks.
    fn restore_all(
        &self,
        model: &Model<impl Batch>,
        turns: &[Turn],
        sharded: bool,
        mut average: Option<&mut Average>,
    ) -> Result<()> {
        let ranks = self.ranks;
        let params = model.params().state_dict();
        let own: Vec<(String, Var)> = turns.iter().flat_map(Turn::state).collect();
        let whole = (sharded && self.state.is_some()).then(|| Whole::new(ranks, &own)).transpose()?;
        let optimizer = whole.as_ref().map_or(Ok(own), |whole| whole.room(ranks))?;
        if let Some(checkpoint) = self.checkpoint {
            checkpoint.restore_params(&params)?;
            checkpoint.restore_optimizer(&optimizer)?;
            if let Some(average) = average.as_deref_mut() {
                checkpoint.restore_average(average)?;
            }
        }
        same_as_rank_0(ranks, &params)?;
        model.params().publish()?;
        model.params().roll_back_buffers()?;
        match &whole {
            Some(whole) => whole.scatter(ranks, &optimizer)?,
            None if self.state.is_some() => same_as_rank_0(ranks, &optimizer)?,
            None => {}
        }
        if let Some(average) = average {
            same_as_rank_0(ranks, average.averages())?;
            average.updates = self.state.map_or(0, |state| state.average_updates);
        }
        Ok(())
    }
}

/// Refuses settings that monitor the validation of a run that has none.
fn check_nothing_is_monitored(trainer: &Trainer) -> Result<()> {
    let watching = trainer.callbacks.iter().find(|callback| callback.monitored_metric().is_some());
    let plateau = trainer.plateau.as_ref().map(|_| "plateau");
    if let Some(name) = watching.map(|callback| callback.section.as_str()).or(plateau) {
        return Err(Error::msg(format!("{name} monitors the validation, and there is none")));
    }
    Ok(())
}

/// Restores the callbacks' state from the checkpoint, if there is one.
fn restore_callbacks(trainer: &mut Trainer, state: Option<&State>) -> Result<()> {
    let Some(state) = state else { return Ok(()) };
    let unknown = trainer.callbacks.restore(state)?;
    // Other ranks do not have all callbacks.
    if !unknown.is_empty() && trainer.ranks.rank() == 0 {
        tracing::warn!(
            "the checkpoint has the state of callbacks that are not attached: {}",
            unknown.join(", ")
        );
    }
    Ok(())
}

/// This rank's sums of the epoch's metrics so far. If the number of ranks has changed, rank 0 gets all sums.
fn epoch_means(state: Option<&State>, share: Share) -> Result<Means> {
    let mut means = Means::default();
    let sums = state.map_or(&[][..], |state| &state.epoch_metrics);
    let own = match sums.get(share.rank) {
        Some(own) if sums.len() == share.of => std::slice::from_ref(own),
        _ if share.rank == 0 => sums,
        _ => &[],
    };
    own.iter().try_for_each(|sums| means.merge_sums(sums))?;
    Ok(means)
}

impl<B: Batch> Tapped<B> {
    fn new(model: &Model<B>) -> Result<Self> {
        let taps = Taps::new();
        let put = {
            let taps = taps.clone();
            Arc::new(move |name: &str, parameter: &Var| taps.tap(name, parameter))
        };
        Ok(Self { module: model.tapped(put)?, taps })
    }
}

/// The order in which training visits its samples.
fn order(config: &TrainerConfig, seed: u64, train: &Source<impl Batch>) -> Result<Order> {
    let order = Order::new(seed, train.len().unwrap_or(usize::MAX), config.batch_size);
    if train.is_empty() {
        return Err(Error::msg("the training data is empty"));
    }
    let order = match train.weights() {
        Some(weights) => order.weighted(&weights)?,
        None => order,
    };
    let order = match train.len() {
        _ if !config.drop_last => order,
        None => return Err(Error::setting("drop_last", "a stream's length is not known: expected false")),
        Some(samples) if samples < config.batch_size => {
            let message = format!("it would leave nothing: there are {samples} samples, fewer than a batch");
            return Err(Error::setting("drop_last", message));
        }
        Some(samples) => order.limited(samples / config.batch_size),
    };
    let (key, limit) = match config.overfit_batches {
        Some(limit) => ("overfit_batches", Some(limit)),
        None => ("limit_train_batches", config.limit_train_batches),
    };
    match (limit, train.len()) {
        (Some(Limit::Share(_)), None) => {
            Err(Error::setting(key, "a stream's length is not known: expected a number of batches"))
        }
        (Some(limit), _) => {
            let batches = limit.of(order.batches());
            let limited = order.limited(batches);
            Ok(if config.overfit_batches.is_some() { limited.sequential() } else { limited })
        }
        (None, _) => Ok(order),
    }
}

/// Refuses a checkpoint whose order of samples this run cannot continue.
fn check_order_goes_on(state: &State, order: &Order, train: &Source<impl Batch>) -> Result<()> {
    if train.len().is_some() { check_same_order(state, order) } else { check_stream_goes_on(state, order) }
}

/// Refuses a checkpoint that is past the current limit on an epoch of a stream.
fn check_stream_goes_on(state: &State, order: &Order) -> Result<()> {
    let Progress { step_in_epoch, samples_in_epoch: done, .. } = state.progress;
    let limit = order.limit.saturating_mul(order.batch_size) as u64;
    match step_in_epoch {
        0 => Ok(()),
        _ if done == 0 => Err(Error::msg(
            "the checkpoint does not say how many samples of the stream it has seen: start a new run",
        )),
        _ if done < limit => Ok(()),
        _ => Err(Error::msg(format!(
            "the checkpoint saw {done} samples of its epoch, which `limit_train_batches` now ends after {limit}"
        ))),
    }
}

/// Refuses a checkpoint whose steps used other batches: the order of samples would silently change.
fn check_same_order(state: &State, order: &Order) -> Result<()> {
    let Progress { epoch, step_in_epoch, samples, .. } = state.progress;
    let in_epoch = (step_in_epoch as usize * order.batch_size).min(order.len) as u64;
    let is_beyond = step_in_epoch > 0 && step_in_epoch as usize >= order.batches();
    if is_beyond || samples != epoch * order.samples() as u64 + in_epoch {
        return Err(Error::msg(format!(
            "the checkpoint saw {samples} samples in {epoch} epochs and {step_in_epoch} steps; {} samples in batches of {} \
             do not add up to that: resume with the batch size, the training data and the `limit_train_batches` that it was \
             made with",
            order.samples(),
            order.batch_size
        )));
    }
    if state.seed != order.seed {
        tracing::warn!(
            "the checkpoint's seed is {}, this run's is {}: the order of samples changes",
            state.seed,
            order.seed
        );
    }
    Ok(())
}
