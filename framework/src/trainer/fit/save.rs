//! Saving checkpoints of the training loop.

use std::path::PathBuf;

use candle_core::Var;

use super::Fit;
use super::validate::Before;
use crate::batch::Batch;
use crate::checkpoint::{Saver, Snapshot, State};
use crate::collective::shard::Whole;
use crate::error::Result;
use crate::metrics::Sums;
use crate::optim::{Average, Turn};
use crate::schedule::Plateau;
use crate::trainer::phase;

impl<B: Batch> Fit<'_, B> {
    /// Saves the current step, if checkpoints are kept. If it is saved already, only updates the best ones.
    pub(super) fn save(&mut self) -> Result<()> {
        // A run that resumes from here draws only later pictures.
        self.trainer.show_all_pictures()?;
        let is_wanted = self.saver.as_ref().is_some_and(|saver| !saver.has(self.progress.step));
        // Rank 0 saves. All ranks hold parts of a sharded optimizer's state and of the epoch's metrics.
        let shared = match self.ranks.decide(is_wanted)? {
            true => Some((self.optimizer_state()?, self.epoch_metrics()?)),
            false => None,
        };
        let Some(saver) = &self.saver else { return Ok(()) };
        let snapshot = shared.map(|(optimizer, metrics)| self.snapshot(saver, &optimizer, metrics));
        let snapshot = snapshot.transpose()?;
        let before = self.saver.as_mut().map_or(Ok(None), |saver| saver.save(snapshot))?;
        self.tell_saved(before)
    }

    /// The state of all ranks' optimizers, by name.
    fn optimizer_state(&self) -> Result<Vec<(String, Var)>> {
        let own: Vec<(String, Var)> = self.turns.iter().flat_map(Turn::state).collect();
        if !self.sharded {
            return Ok(own);
        }
        Whole::new(&*self.ranks, &own)?.gather(&*self.ranks)
    }

    /// Each rank's sums of the epoch's metrics; empty if no rank has any.
    fn epoch_metrics(&self) -> Result<Vec<Sums>> {
        let sums = self.epoch_means.copied().gather(&*self.ranks)?;
        Ok(if sums.iter().all(Vec::is_empty) { Vec::new() } else { sums })
    }

    fn snapshot(
        &self,
        saver: &Saver,
        optimizer: &[(String, Var)],
        epoch_metrics: Vec<Sums>,
    ) -> Result<Snapshot> {
        let _phase = phase!("checkpoint");
        let trainer = &*self.trainer;
        let average = self.average.as_ref();
        let owes_validation = self.owes_validation();
        let before = self.validation.before().filter(|_| owes_validation).cloned();
        let Before { callbacks, plateau } = before.unwrap_or_else(|| self.before_validation());
        let state = State {
            progress: self.progress,
            owes_validation,
            seed: trainer.seed,
            best: saver.best().to_vec(),
            best_by: Some(saver.criterion()),
            // Without a plateau, the configured learning rate applies, so it can be changed on resuming.
            lr_scale: trainer.plateau.is_some().then_some(plateau.lr_scale),
            plateau: plateau.state,
            plateau_of: trainer.plateau.as_ref().map(Plateau::criterion),
            loss_scale: self.loss_scale,
            optimizer_steps: self.turns.iter().flat_map(Turn::steps).collect(),
            average_updates: average.map_or(0, |average| average.updates),
            seconds: trainer.config.max_time.map(|_| self.clock.seconds()),
            epoch_metrics,
            callbacks,
            origin: trainer.origin.clone(),
        };
        Snapshot::take(&self.model.params().state_dict(), optimizer, average.map(Average::averages), state)
    }

    /// After an error, saves the last step that was taken, if no other rank would have to take part. Further
    /// errors are only logged: the first one is the one to report.
    pub(super) fn save_after_error(&mut self) {
        let step = self.progress.step;
        let is_worth_it = self.saver.as_ref().is_some_and(|saver| step > 0 && !saver.has(step));
        if self.is_moving || !is_worth_it || !self.ranks.is_alone() {
            return;
        }
        self.trainer.show_what_is_left();
        let rolled_back = self.model.params().roll_back_buffers();
        match rolled_back.and_then(|()| self.save()).and_then(|()| self.finish_saving()) {
            Ok(()) => tracing::info!("saved step {step}, the last completed one"),
            Err(error) => tracing::warn!("cannot save step {step}, the last completed one: {error}"),
        }
    }

    /// Waits for the checkpoint that is being written.
    pub(super) fn finish_saving(&mut self) -> Result<()> {
        if let Some(saver) = &mut self.saver {
            let saved = saver.finish()?;
            self.tell_saved(saved)?;
        }
        Ok(())
    }

    /// Notifies the callbacks of a completed checkpoint, if there is one.
    pub(super) fn tell_saved(&mut self, checkpoint: Option<PathBuf>) -> Result<()> {
        let Some(path) = checkpoint else { return Ok(()) };
        self.trainer.callbacks.tell(|callback| callback.on_checkpoint(&path))
    }
}
