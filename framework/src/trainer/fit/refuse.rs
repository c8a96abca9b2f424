//! Steps that must not be taken.

use candle_core::Tensor;

use super::{Fit, Tally};
use crate::batch::Batch;
use crate::error::Result;
use crate::grads::first_not_finite;
use crate::precision::LossScale;

/// Why an optimizer does not move its parameters.
pub(super) enum Refusal {
    /// The gradients overflowed in fp16: the same batch is tried again with a smaller loss scale.
    Overflow,
    /// Training cannot go on; the text says why, for example which loss or gradient is not finite.
    Hopeless(String),
}

impl<B: Batch> Fit<'_, B> {
    /// Why this optimizer must not move its parameters, if so: in fp16 its gradients overflow, otherwise a
    /// loss, a gradient or their norm is not finite. `is_first`: no optimizer has moved in this step yet.
    pub(super) fn refuse(
        &mut self,
        turn: usize,
        is_first: bool,
        norm: f64,
        gradients: &[Tensor],
        tally: &Tally,
    ) -> Result<Option<Refusal>> {
        if let Some(loss_scale) = &mut self.loss_scale {
            loss_scale.update(norm.is_finite());
            let overflows = &mut self.histories[turn].overflows;
            *overflows = if norm.is_finite() { 0 } else { *overflows + 1 };
            return Ok(match *overflows {
                0 => None,
                LossScale::HOPELESS.. => {
                    // The scale was not the cause: once that is fixed, start with a fresh scale.
                    *loss_scale = LossScale::default();
                    Some(Refusal::Hopeless(hopeless(self.progress.step + 1)))
                }
                _ => Some(Refusal::Overflow),
            });
        }
        if !self.trainer.config.nan_guard || norm.is_finite() {
            return Ok(None);
        }
        let mut what = match self.first_loss_not_finite(tally)? {
            Some((_, value)) if self.ranks.is_alone() && tally.losses.len() == 1 => {
                Some(format!("the loss is {value}"))
            }
            Some((number, value)) => Some(format!("the loss of micro-batch {number} is {value}")),
            None => None,
        };
        let name = first_not_finite(&self.turns[turn].own(&*self.ranks), gradients)?.unwrap_or_default();
        // Each rank may only know about its own parameters.
        let names = self.ranks.gather_bytes(name.as_bytes())?;
        if let Some(name) = names.iter().find(|name| !name.is_empty()) {
            let name = String::from_utf8_lossy(name);
            what.get_or_insert(format!("the gradient of `{name}` is not finite"));
        }
        let what = what.unwrap_or_else(|| "the norm of all gradients overflows".into());
        let done = self.progress.step;
        let weights = match is_first {
            true => format!("the weights are still those of step {done}"),
            false => "earlier optimizers of this step have moved: resume from the last checkpoint".into(),
        };
        Ok(Some(Refusal::Hopeless(format!(
            "in step {} {what}; {weights}. Try a lower `optimizer.lr` or `trainer.clip_norm`, or look at that step's data",
            done + 1
        ))))
    }

    /// Number and loss of the first micro-batch, over all ranks, whose loss is not finite.
    fn first_loss_not_finite(&self, tally: &Tally) -> Result<Option<(usize, f64)>> {
        let mut own = [f64::INFINITY, 0.];
        for (number, loss) in tally.losses.iter().rev() {
            let value = f64::from(loss.to_scalar::<f32>()?);
            if !value.is_finite() {
                own = [*number as f64, value];
            }
        }
        let all = self.ranks.gather_numbers(&own)?.into_iter().map(|pair| (pair[0], pair[1]));
        let first = all.min_by(|a, b| a.0.total_cmp(&b.0)).filter(|(number, _)| number.is_finite());
        Ok(first.map(|(number, value)| (number as usize, value)))
    }
}

/// The message for an fp16 step that no loss scale helps.
fn hopeless(step: u64) -> String {
    format!(
        "{} tries in a row of step {step} overflowed in fp16 even with the smallest loss scale; look at that step's data and at \
         the weights, lower `optimizer.lr`, or use `trainer.precision = \"bf16-mixed\"`, whose range is that of 32 bits",
        LossScale::HOPELESS
    )
}
