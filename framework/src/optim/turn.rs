//! Which optimizer moves which parameters: groups with their own rates, and optimizers that take turns.

use std::collections::HashSet;

use candle_core::{Tensor, Var};
use candlepower_kernels::clipping::GradScale;
use candlepower_kernels::updates::publish;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use wildmatch::WildMatch;

use super::{Optimizer, OptimizerConfig, Param};
use crate::callback::Progress;
use crate::collective::Collective;
use crate::collective::shard::{self, Shares};
use crate::error::{Error, Result};
use crate::params::Params;
use crate::schedule::{Interval, Rates, Schedule};

/// Parameters with their own settings: an entry of `groups` in an optimizer's section.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct GroupConfig {
    /// Parameters by name: `*` matches any text, `?` any character, as in `encoder.*`. A parameter belongs to
    /// the first group whose pattern matches.
    pub params: String,
    /// Learning rate; its ratio to the optimizer's stays the same on any schedule. Default: the optimizer's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lr: Option<f64>,
    /// Weight decay. Default: the optimizer's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub weight_decay: Option<f64>,
    /// Never move these parameters. They need no gradient.
    #[serde(default)]
    pub frozen: bool,
}

/// One of several optimizers, each with its own parameters: a section `[optimizers.NAME]`.
///
/// In each step they take turns in the order in which they are written. For each, `training_step` is called
/// with [`Step::optimizer`](crate::module::Step::optimizer) returning whose turn it is, and the gradient of
/// the returned loss moves only that optimizer's parameters.
#[derive(Debug, Clone, PartialEq)]
pub struct TurnConfig {
    /// Its name, for the module and the logs.
    pub name: String,
    /// The parameters it moves, by name, as in [`GroupConfig::params`].
    pub params: String,
    /// Its rule.
    pub optimizer: OptimizerConfig,
    /// Parameters with their own settings.
    pub groups: Vec<GroupConfig>,
    /// Its schedule. Default: the run's.
    pub schedule: Option<Schedule>,
    /// Number of steps per turn; 1 means every step. In other steps its parameters stay, and its rule counts
    /// no step.
    pub every: u64,
}

impl TurnConfig {
    /// A single optimizer for all parameters.
    pub fn only(optimizer: OptimizerConfig, groups: Vec<GroupConfig>) -> Self {
        Self { name: "optimizer".into(), params: "*".into(), optimizer, groups, schedule: None, every: 1 }
    }

    /// Refuses settings that are invalid for any parameters.
    pub fn check(&self) -> Result<()> {
        self.optimizer.check()?;
        if self.every == 0 {
            return Err(Error::setting("every", "expected at least 1, found 0"));
        }
        for GroupConfig { params, lr, weight_decay, frozen } in &self.groups {
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
            if weight_decay.is_some() && matches!(&self.optimizer, OptimizerConfig::Own(own) if !own.decays) {
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
        let scale = |group: &GroupConfig| GroupConfig { lr: group.lr.map(|lr| lr * factor), ..group.clone() };
        Self {
            optimizer: self.optimizer.with(Some(self.optimizer.lr() * factor), None),
            groups: self.groups.iter().map(scale).collect(),
            schedule: None,
            ..self.clone()
        }
    }
}

/// An optimizer with the parameters that it moves.
pub(crate) struct Turn {
    pub(crate) name: String,
    /// The parameters that are neither frozen nor unused, group by group.
    pub(crate) params: Vec<(String, Var)>,
    /// The variables that gradients are computed for, in the same order.
    pub(crate) working: Vec<Var>,
    /// The rank that moves each parameter; `None` if every rank moves all of them.
    owners: Option<Vec<usize>>,
    /// Parameters that the module declares unused, with the variables of their gradients.
    pub(crate) unused: Vec<(String, Var)>,
    /// The optimizer's own learning rate, before any schedule.
    pub(crate) lr: f64,
    /// Steps taken, without those that it sat out because its gradients overflowed.
    pub(crate) steps: u64,
    schedule: Schedule,
    every: u64,
    groups: Vec<Group>,
}

struct Group {
    /// How many of the parameters that this rank moves, in order, belong to this group.
    len: usize,
    /// The optimizer of those parameters.
    optimizer: Box<dyn Optimizer>,
    /// Its learning rate divided by the optimizer's.
    ratio: f64,
}

impl Turn {
    /// Distributes parameters among optimizers and their groups. Every parameter needs exactly one optimizer,
    /// and every pattern must match a parameter. `unused` parameters are not moved: see
    /// [`Module::unused`](crate::module::Module::unused). If the ranks `shard` the optimizer state, each
    /// moves a part of the parameters.
    pub(crate) fn share(
        configs: &[TurnConfig],
        schedule: &Schedule,
        params: &Params,
        unused: &[&str],
        shard: Option<&dyn Collective>,
    ) -> Result<Vec<Self>> {
        TurnConfig::check_together(configs)?;
        let names: Vec<String> = params.vars().into_iter().map(|(name, _)| name).collect();
        if let Some(pattern) = unused.iter().find(|pattern| !names.iter().any(|name| fits(pattern, name))) {
            return Err(Error::msg(format!(
                "the module declares `{pattern}` unused, which matches no parameter"
            )));
        }
        for (name, _) in params.vars() {
            let takes = |config: &&TurnConfig| fits(&config.params, &name);
            let takers: Vec<&str> = configs.iter().filter(takes).map(|config| config.name.as_str()).collect();
            match takers[..] {
                [_] => {}
                [] => {
                    return Err(Error::msg(format!(
                        "no optimizer updates parameter `{name}`: {}",
                        patterns(configs)
                    )));
                }
                _ => {
                    let takers = takers.join("` and `");
                    return Err(Error::msg(format!(
                        "parameter `{name}` is assigned to `{takers}`: assign it to one"
                    )));
                }
            }
        }
        configs.iter().map(|config| Self::new(config, schedule, params, unused, shard)).collect()
    }

    fn new(
        config: &TurnConfig,
        schedule: &Schedule,
        store: &Params,
        unused: &[&str],
        shard: Option<&dyn Collective>,
    ) -> Result<Self> {
        let params = &store.vars()[..];
        let mut rest: Vec<(String, Var)> = take(&config.params, &mut params.to_vec());
        if rest.is_empty() && !params.is_empty() {
            return Err(no_parameter("params", &config.params, params));
        }
        let lr = config.optimizer.lr();
        let (mut moved, mut groups, mut idle) = (Vec::new(), Vec::new(), Vec::new());
        let mut all_owners = Vec::new();
        let schedule = config.schedule.as_ref().unwrap_or(schedule).clone();
        let mut add = |mut params: Vec<(String, Var)>, optimizer: OptimizerConfig| -> Result<()> {
            unused.iter().for_each(|pattern| idle.extend(take(pattern, &mut params)));
            let ratio = if optimizer.lr() == lr { 1. } else { optimizer.lr() / lr };
            let (rank, world_size) = shard.map_or((0, 1), |ranks| (ranks.rank(), ranks.world_size()));
            let owners = shard::owners(&params, world_size);
            let own = params.iter().zip(&owners).filter(|(_, owner)| **owner == rank);
            let own: Vec<Param> = own.map(|((name, master), _)| store.param(name, master)).collect();
            groups.push(Group { len: own.len(), optimizer: optimizer.build(&own, &schedule)?, ratio });
            moved.extend(params);
            all_owners.extend(owners);
            Ok(())
        };
        for group in &config.groups {
            let members = take(&group.params, &mut rest);
            if members.is_empty() && params.iter().any(|(name, _)| fits(&group.params, name)) {
                let message = format!(
                    "group `{}`: all parameters that it matches belong to earlier groups",
                    group.params
                );
                return Err(Error::setting("groups", message));
            }
            if members.is_empty() {
                return Err(no_parameter("groups", &group.params, params));
            }
            if !group.frozen {
                add(members, config.optimizer.with(group.lr, group.weight_decay))?;
            }
        }
        add(rest, config.optimizer.clone())?;
        if moved.is_empty() && idle.is_empty() && !params.is_empty() {
            return Err(Error::setting("groups", "nothing is left to train: all parameters are frozen"));
        }
        let working = moved.iter().filter_map(|(name, _)| store.working(name)).collect();
        let owners = shard.map(|_| all_owners);
        let idle = idle.into_iter().filter_map(|(name, _)| Some((store.working(&name)?, name)));
        let unused = idle.map(|(var, name)| (name, var)).collect();
        let name = config.name.clone();
        let every = config.every;
        let turn =
            Self { name, params: moved, working, owners, unused, lr, steps: 0, schedule, every, groups };
        let mut names = HashSet::new();
        match turn.state().into_iter().find(|(name, _)| !names.insert(name.clone())) {
            // A checkpoint would keep only one of them.
            Some((name, _)) => Err(Error::msg(format!(
                "optimizer `{}` has two states named `{name}`: give each a name of its own",
                config.name
            ))),
            None => Ok(turn),
        }
    }

    /// Whether it takes its turn in step number `step`, counted from 1.
    pub(crate) fn is_due(&self, step: u64) -> bool {
        step.is_multiple_of(self.every)
    }

    /// The rates of the step after this progress; `scale` is the plateau's factor on the learning rate.
    pub(crate) fn rates(&self, progress: &Progress, scale: f64) -> Rates {
        let t = match self.schedule.interval() {
            Interval::Step => progress.step,
            Interval::Epoch => progress.epoch,
        };
        self.schedule.at(t, if scale == 1. { self.lr } else { self.lr * scale })
    }

    /// The rank that moves each parameter, if ranks share the optimizer state.
    pub(crate) fn owners(&self) -> Option<&[usize]> {
        self.owners.as_deref()
    }

    /// The parameters that this rank moves.
    pub(crate) fn own(&self, ranks: &dyn Collective) -> Vec<(String, Var)> {
        self.params
            .iter()
            .enumerate()
            .filter(|(i, _)| self.is_own(*i, ranks))
            .map(|(_, param)| param.clone())
            .collect()
    }

    fn is_own(&self, param: usize, ranks: &dyn Collective) -> bool {
        self.owners.as_ref().is_none_or(|owners| owners[param] == ranks.rank())
    }

    /// Sets the numbers of its next step.
    pub(crate) fn prepare(&mut self, rates: Rates) -> Result<()> {
        let t = self.steps + 1;
        let mut groups = self.groups.iter_mut();
        groups.try_for_each(|it| it.optimizer.prepare(t, Rates { lr: rates.lr * it.ratio, ..rates }))
    }

    /// Moves the parameters of this rank by `gradients`, unless `scale` refuses the step, and updates the
    /// values that modules compute with. If ranks share the optimizer state, every rank then receives all
    /// values.
    pub(crate) fn step(&self, gradients: &[Tensor], scale: &GradScale, ranks: &dyn Collective) -> Result<()> {
        let mut rest = gradients;
        for group in &self.groups {
            let (own, others) = rest.split_at(group.len);
            group.optimizer.step(own, scale)?;
            rest = others;
        }
        let Some(owners) = &self.owners else { return Ok(()) };
        Shares::new(ranks, &self.params, owners).publish()?;
        let pairs = self.params.iter().map(|(_, master)| master.as_tensor()).zip(&self.working);
        let others = pairs.enumerate().filter(|(i, _)| !self.is_own(*i, ranks));
        let copies = others.filter(|(_, (master, working))| working.dtype() != master.dtype());
        Ok(publish(&copies.map(|(_, (master, working))| (master, working.as_tensor())).collect::<Vec<_>>())?)
    }

    /// Counts the prepared step as taken.
    pub(crate) fn commit(&mut self) -> Result<()> {
        self.steps += 1;
        self.groups.iter_mut().try_for_each(|group| group.optimizer.commit())
    }

    /// The optimizer's state on this rank, by name.
    pub(crate) fn state(&self) -> Vec<(String, Var)> {
        self.groups.iter().flat_map(|group| group.optimizer.state()).collect()
    }
}

fn fits(pattern: &str, name: &str) -> bool {
    WildMatch::new(pattern).matches(name)
}

/// Removes the parameters whose names match from `from` and returns them.
fn take(pattern: &str, from: &mut Vec<(String, Var)>) -> Vec<(String, Var)> {
    let (taken, left) = from.drain(..).partition(|(name, _)| fits(pattern, name));
    *from = left;
    taken
}

fn patterns(configs: &[TurnConfig]) -> String {
    let all: Vec<String> = configs.iter().map(|c| format!("`{}` updates `{}`", c.name, c.params)).collect();
    all.join(", ")
}

fn no_parameter(key: &str, pattern: &str, params: &[(String, Var)]) -> Error {
    const SHOWN: usize = 8;
    let names: Vec<&str> = params.iter().take(SHOWN).map(|(name, _)| name.as_str()).collect();
    let more = if params.len() > SHOWN { ", ..." } else { "" };
    Error::setting(
        key,
        format!("`{pattern}` matches no parameter; the parameters are {}{more}", names.join(", ")),
    )
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device, Tensor};
    use candle_nn::Init;

    use super::*;
    use crate::collective::Solo;
    use crate::optim::{RmspropConfig, SgdConfig};
    use crate::schedule::OneCycle;

    fn params(names: &[&str]) -> Params {
        let params = Params::new(0, DType::F32, &Device::Cpu);
        let make = |name| params.var_builder().get_with_hints(1, name, Init::Const(1.)).unwrap();
        names.iter().for_each(|name| drop(make(name)));
        params
    }

    fn group(params: &str) -> GroupConfig {
        GroupConfig { params: params.into(), lr: None, weight_decay: None, frozen: false }
    }

    fn sgd(lr: f64) -> OptimizerConfig {
        SgdConfig { lr, ..Default::default() }.into()
    }

    #[test]
    fn groups_have_their_own_rates_and_frozen_parameters_stay() {
        let all = params(&["encoder.w", "encoder.b", "decoder.w", "dead.w"]);
        let groups = vec![
            GroupConfig { frozen: true, ..group("dead.*") },
            GroupConfig { weight_decay: Some(0.5), ..group("encoder.w") },
            GroupConfig { lr: Some(0.01), ..group("encoder.*") },
        ];
        let schedule = Schedule::Exponential { gamma: 0.5 };
        let mut turns =
            Turn::share(&[TurnConfig::only(sgd(0.1), groups)], &schedule, &all, &[], None).unwrap();
        let turn = &mut turns[0];
        let names: Vec<&str> = turn.params.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, ["encoder.w", "encoder.b", "decoder.w"]);
        let gradients = vec![Tensor::new(&[1f32], &Device::Cpu).unwrap(); 3];
        turn.prepare(turn.rates(&Progress { step: 1, ..Progress::default() }, 1.)).unwrap();
        turn.step(&gradients, &GradScale::default(), &Solo).unwrap();
        // The schedule has halved 0.1 to 0.05; weight decay adds half the parameter to the gradient.
        let value = |i: usize| all.vars()[i].1.to_vec1::<f32>().unwrap()[0];
        assert_eq!([value(0), value(1), value(2), value(3)], [1. - 0.05 * 1.5, 1. - 0.005, 1. - 0.05, 1.]);
    }

    #[test]
    fn a_schedule_drives_the_momentum_of_those_that_have_none_of_their_own() {
        let rmsprop = OptimizerConfig::Rmsprop(RmspropConfig { lr: 0.1, alpha: 0., ..Default::default() });
        for optimizer in [sgd(0.1), rmsprop] {
            let moved = |schedule: Schedule| {
                let all = params(&["w"]);
                let turns = Turn::share(
                    &[TurnConfig::only(optimizer.clone(), Vec::new())],
                    &schedule,
                    &all,
                    &[],
                    None,
                );
                let mut turn = turns.unwrap().remove(0);
                for step in 0..2 {
                    turn.prepare(turn.rates(&Progress { step, ..Progress::default() }, 1.)).unwrap();
                    turn.step(&[Tensor::new(&[1f32], &Device::Cpu).unwrap()], &GradScale::default(), &Solo)
                        .unwrap();
                    turn.commit().unwrap();
                }
                1. - all.vars()[0].1.to_vec1::<f32>().unwrap()[0]
            };
            // Both move by the gradient's sign; the second update includes half of the first.
            let cycle = |cycle_momentum| {
                let (start_divisor, momentum) = (1., [0.5, 0.5]);
                Schedule::OneCycle(OneCycle {
                    start_divisor,
                    momentum,
                    cycle_momentum,
                    ..OneCycle::new(0.1, 100)
                })
            };
            assert!((moved(cycle(true)) - 0.25).abs() < 1e-6);
            assert!((moved(cycle(false)) - 0.2).abs() < 1e-6);
            let sequence =
                Schedule::Sequence { parts: vec![Schedule::default(), cycle(true)], milestones: vec![1] };
            assert!((moved(sequence) - 0.25).abs() < 1e-6);
        }
    }

    #[test]
    fn patterns_that_fit_nothing_and_parameters_of_nobody_are_refused() {
        let all = params(&["a.w", "b.w"]);
        let turn = |name: &str, params: &str| TurnConfig {
            name: name.into(),
            params: params.into(),
            ..TurnConfig::only(sgd(0.1), Vec::new())
        };
        let error = |configs: &[TurnConfig]| {
            Turn::share(configs, &Schedule::default(), &all, &[], None).err().unwrap().to_string()
        };
        assert_eq!(error(&[turn("x", "a.*")]), "no optimizer updates parameter `b.w`: `x` updates `a.*`");
        assert_eq!(
            error(&[turn("x", "*"), turn("y", "b.*")]),
            "parameter `b.w` is assigned to `x` and `y`: assign it to one"
        );
        let lost = TurnConfig { groups: vec![group("c.*")], ..turn("x", "*") };
        assert_eq!(error(&[lost]), "`groups`: `c.*` matches no parameter; the parameters are a.w, b.w");
    }
}
