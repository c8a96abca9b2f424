//! The gradients of one optimizer step, summed over its micro-batches.

use candle_core::backprop::GradStore;
use candle_core::{DType, Tensor, Var};
use candlepower_kernels::updates::sum_squares_of;

use crate::error::{Error, Result};
use crate::optim::Turn;

/// One slot per parameter, in parameter order.
pub(crate) struct Grads {
    sums: Vec<Option<Tensor>>,
}

impl Grads {
    /// Creates empty slots for these parameters.
    pub(crate) fn new(params: &[(String, Var)]) -> Self {
        Self { sums: vec![None; params.len()] }
    }

    /// Wraps these gradients, in parameter order.
    pub(crate) fn found(sums: Vec<Option<Tensor>>) -> Self {
        Self { sums }
    }

    /// Adds the gradients of one backward pass. A micro-batch's loss is scaled by its share of the step's
    /// samples, so the plain sum is the gradient of the mean over all samples.
    pub(crate) fn add(&mut self, found: &[Option<Tensor>]) -> Result<()> {
        for (sum, gradient) in self.sums.iter_mut().zip(found) {
            gradient.iter().try_for_each(|gradient| accumulate(sum, gradient))?;
        }
        Ok(())
    }

    /// Returns all gradients, or an error that names the parameters without one. Some candle operations
    /// silently cut the graph, and a loss curve does not reveal a parameter that is never trained.
    pub(crate) fn complete(self, params: &[(String, Var)]) -> Result<Vec<Tensor>> {
        let pairs = self.sums.iter().zip(params);
        let missing: Vec<&str> =
            pairs.filter(|(sum, _)| sum.is_none()).map(|(_, (name, _))| name.as_str()).collect();
        if !missing.is_empty() {
            let statistics = if missing.iter().any(|name| name.ends_with("running_mean")) {
                "\nthe statistics of `candle_nn::batch_norm` are not parameters, and no checkpoint holds them: use `candlepower::nn::channels_last::BatchNorm`, which keeps them in buffers"
            } else {
                ""
            };
            return Err(Error::msg(format!(
                "no gradient reaches {} of {} parameters: {}{statistics}\n\
                 the loss does not depend on them, or an operation on the way has no backward pass \
                 (in candle: `softmax_last_dim`, `rms_norm`, `detach`, and LayerNorm: use `candlepower::nn::LayerNorm`)\n\
                 if that is intended, say so: `groups = [{{ params = \"NAME\", frozen = true }}]` in [optimizer], or \
                 `Module::unused_parameters` in code",
                missing.len(),
                params.len(),
                missing.join(", "),
            )));
        }
        Ok(self.sums.into_iter().flatten().collect())
    }
}

/// The gradients found by a backward pass for the optimizer's parameters, in order.
pub(crate) fn of_turn(turn: &Turn, mut found: GradStore) -> Result<Vec<Option<Tensor>>> {
    if let Some((name, _)) = turn.unused.iter().find(|(_, var)| found.get(var).is_some()) {
        return Err(is_used(name));
    }
    Ok(turn.working.iter().map(|var| found.remove(var)).collect())
}

/// Adds a gradient to its sum, in 32 bits.
pub(crate) fn accumulate(sum: &mut Option<Tensor>, gradient: &Tensor) -> Result<()> {
    let gradient = gradient.to_dtype(DType::F32)?;
    *sum = Some(match sum.take() {
        Some(sum) => (sum + gradient)?,
        None => gradient.contiguous()?,
    });
    Ok(())
}

/// Fails if a parameter with a gradient is declared unused by the module.
pub(crate) fn is_not_unused(name: &str, unused: &[String]) -> Result<()> {
    if unused.iter().any(|unused| unused == name) { Err(is_used(name)) } else { Ok(()) }
}

fn is_used(name: &str) -> Error {
    Error::msg(format!(
        "the module declares `{name}` unused, but a gradient reaches it: correct `Module::unused_parameters`"
    ))
}

/// The first parameter with a non-finite gradient.
pub(crate) fn first_not_finite(params: &[(String, Var)], gradients: &[Tensor]) -> Result<Option<String>> {
    for ((name, _), gradient) in params.iter().zip(gradients) {
        if !sum_squares_of(std::slice::from_ref(gradient))?.is_finite() {
            return Ok(Some(name.clone()));
        }
    }
    Ok(None)
}
