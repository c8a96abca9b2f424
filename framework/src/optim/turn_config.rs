//! The configuration of optimizers: which parameters each moves, and groups with their own settings.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::OptimizerConfig;
use crate::error::{Error, Result};
use crate::schedule::Schedule;
use crate::trainer::Every;

/// Parameters with their own settings: an entry of `groups` in an optimizer's section.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ParamGroup {
    /// Parameters by name: `*` matches any text, `?` any character, as in `encoder.*`. A parameter belongs to
    /// the first group whose pattern matches.
    pub params: String,
    /// Learning rate; its ratio to the optimizer's stays the same on any schedule. Default: the optimizer's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lr: Option<f64>,
    /// Weight decay. Default: the optimizer's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub weight_decay: Option<f64>,
    /// Never move these parameters. They need no gradient. As in PyTorch, running statistics of a batch
    /// normalisation are no parameters: they follow the training batches all the same.
    #[serde(default)]
    pub frozen: bool,
    /// Freeze these parameters until then: `500` steps or `"2 epochs"` of the run. Default: move them from the start.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unfreeze: Option<Every>,
}

/// One of several optimizers, each with its own parameters: a section `[optimizers.NAME]`.
///
/// In each step they take turns in the order in which they are written. For each, `training_step` is called
/// with [`Step::optimizer`](crate::module::Step::optimizer) returning whose turn it is, and the gradient of
/// the returned loss moves only that optimizer's parameters.
#[derive(Debug, Clone, PartialEq)]
pub struct NamedOptimizer {
    /// Its name, for the module and the logs.
    pub name: String,
    /// The parameters it moves, by name, as in [`ParamGroup::params`].
    pub params: String,
    /// Its rule.
    pub optimizer: OptimizerConfig,
    /// Parameters with their own settings.
    pub groups: Vec<ParamGroup>,
    /// Its schedule. Default: the run's.
    pub schedule: Option<Schedule>,
    /// Number of steps per turn; 1 means every step. In other steps its parameters stay, and its rule counts
    /// no step.
    pub every: u64,
}

impl NamedOptimizer {
    /// A single optimizer for all parameters.
    pub fn single(optimizer: OptimizerConfig, groups: Vec<ParamGroup>) -> Self {
        Self { name: "optimizer".into(), params: "*".into(), optimizer, groups, schedule: None, every: 1 }
    }

    /// Refuses settings that are invalid for any parameters.
    pub fn check(&self) -> Result<()> {
        self.optimizer.check()?;
        if self.every == 0 {
            return Err(Error::setting("every", "expected at least 1, found 0"));
        }
        for ParamGroup { params, lr, weight_decay, frozen, unfreeze } in &self.groups {
            if *frozen && unfreeze.is_some() {
                let message = format!("group `{params}`: `frozen` is for ever, so `unfreeze` has no effect");
                return Err(Error::setting("groups", message));
            }
            let is_whole = |every: &Every| match every {
                Every::Steps(_) => true,
                Every::Epochs(n) => n.fract() == 0.,
                Every::Time(_) => false,
            };
            if let Some(unfreeze) = unfreeze.filter(|every| !is_whole(every)) {
                let message = format!(
                    "group `{params}`: expected `unfreeze` in steps or whole epochs, found \"{unfreeze}\""
                );
                return Err(Error::setting("groups", message));
            }
            if *frozen && (lr.is_some() || weight_decay.is_some()) {
                let message =
                    format!("group `{params}`: it is frozen, so `lr` and `weight_decay` have no effect");
                return Err(Error::setting("groups", message));
            }
            let negative = |value: &Option<f64>| value.is_some_and(|x| !(x.is_finite() && x >= 0.));
            if negative(lr) || negative(weight_decay) {
                let message = format!("group `{params}`: expected `lr` and `weight_decay` of at least 0");
                return Err(Error::setting("groups", message));
            }
            if weight_decay.is_some()
                && matches!(&self.optimizer, OptimizerConfig::Custom(own) if !own.decays)
            {
                let message = format!("group `{params}`: the optimizer has no `weight_decay`");
                return Err(Error::setting("groups", message));
            }
            if lr.is_some() && self.optimizer.lr() == 0. {
                let message =
                    format!("group `{params}`: its `lr` is relative to the optimizer's, which is 0");
                return Err(Error::setting("groups", message));
            }
        }
        self.schedule.as_ref().map_or(Ok(()), Schedule::check)
    }

    /// Refuses optimizers if none of them takes its turn in every step.
    pub fn check_together(all: &[Self]) -> Result<()> {
        match all.iter().any(|config| config.every == 1) {
            true => Ok(()),
            false => Err(Error::setting(
                "every",
                "at least one optimizer must be active in every step: leave out its `every`",
            )),
        }
    }

    /// A copy with every learning rate multiplied by `factor`, using the run's schedule.
    pub(crate) fn scaled(&self, factor: f64) -> Self {
        let scale = |group: &ParamGroup| ParamGroup { lr: group.lr.map(|lr| lr * factor), ..group.clone() };
        Self {
            optimizer: self.optimizer.with(Some(self.optimizer.lr() * factor), None),
            groups: self.groups.iter().map(scale).collect(),
            schedule: None,
            ..self.clone()
        }
    }
}
