//! Which optimizer moves which parameters: groups with their own rates, and optimizers that take turns.

use std::collections::HashSet;

use candle_core::{Tensor, Var};
use candlepower_kernels::clipping::GradScale;
use candlepower_kernels::updates::publish;
use indexmap::IndexMap;
use wildmatch::WildMatch;

use super::turn_config::{NamedOptimizer, ParamGroup};
use super::{FusedOptimizer, OptimizerConfig, Param};
use crate::callback::Progress;
use crate::collective::Collective;
use crate::collective::shard::{self, Shares};
use crate::error::{Error, Result};
use crate::params::Params;
use crate::schedule::{Interval, Rates, Schedule};
use crate::trainer::Every;

/// An optimizer with the parameters that it moves.
pub(crate) struct Turn {
    pub(crate) name: String,
    /// The parameters that move now, neither frozen nor unused, group by group.
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
    steps: u64,
    schedule: Schedule,
    every: u64,
    groups: Vec<Group>,
}

/// Parameters that share their settings; the last group of a turn is the rest.
struct Group {
    params: Vec<(String, Var)>,
    working: Vec<Var>,
    /// The rank that moves each parameter.
    owners: Vec<usize>,
    /// How many of the parameters this rank moves.
    own: usize,
    /// The optimizer of those parameters.
    optimizer: Box<dyn FusedOptimizer>,
    /// Its learning rate divided by the turn's.
    ratio: f64,
    /// If it starts frozen: the pattern of its parameters, and how long.
    frozen: Option<(String, Every)>,
    /// Whether it moves now.
    moves: bool,
    /// Steps taken; its rule counts from when it began to move.
    steps: u64,
}

impl Turn {
    /// Distributes parameters among optimizers and their groups. Every parameter needs exactly one optimizer,
    /// and every pattern must match a parameter. `unused` parameters are not moved: see
    /// [`Module::unused_parameters`](crate::module::Module::unused_parameters). If the ranks `shard` the optimizer state, each
    /// moves a part of the parameters.
    pub(crate) fn share(
        configs: &[NamedOptimizer],
        schedule: &Schedule,
        params: &Params,
        unused: &[&str],
        shard: Option<&dyn Collective>,
    ) -> Result<Vec<Self>> {
        NamedOptimizer::check_together(configs)?;
        let names: Vec<String> = params.vars().into_iter().map(|(name, _)| name).collect();
        if let Some(pattern) = unused.iter().find(|pattern| !names.iter().any(|name| fits(pattern, name))) {
            return Err(Error::msg(format!(
                "the module declares `{pattern}` unused, which matches no parameter"
            )));
        }
        for (name, _) in params.vars() {
            let takes = |config: &&NamedOptimizer| fits(&config.params, &name);
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
        config: &NamedOptimizer,
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
        let (mut groups, mut idle) = (Vec::new(), Vec::new());
        let schedule = config.schedule.as_ref().unwrap_or(schedule).clone();
        let mut add = |mut params: Vec<(String, Var)>,
                       optimizer: OptimizerConfig,
                       unfreeze: Option<&ParamGroup>| {
            unused.iter().for_each(|pattern| idle.extend(take(pattern, &mut params)));
            let ratio = if optimizer.lr() == lr { 1. } else { optimizer.lr() / lr };
            let (rank, world_size) = shard.map_or((0, 1), |ranks| (ranks.rank(), ranks.world_size()));
            let owners = shard::owners(&params, world_size);
            let own = params.iter().zip(&owners).filter(|(_, owner)| **owner == rank);
            let own: Vec<Param> = own.map(|((name, master), _)| store.param(name, master)).collect();
            let working = params.iter().filter_map(|(name, _)| store.working(name)).collect();
            let frozen = unfreeze.and_then(|group| Some((group.params.clone(), group.unfreeze?)));
            let optimizer = optimizer.build(&own, &schedule)?;
            let (own, moves) = (own.len(), frozen.is_none());
            groups.push(Group { params, working, owners, own, optimizer, ratio, frozen, moves, steps: 0 });
            Ok::<_, Error>(())
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
                add(members, config.optimizer.with(group.lr, group.weight_decay), Some(group))?;
            }
        }
        add(rest, config.optimizer.clone(), None)?;
        let idle = idle.into_iter().filter_map(|(name, _)| Some((store.working(&name)?, name)));
        let unused: Vec<_> = idle.map(|(var, name)| (name, var)).collect();
        let mut turn = Self {
            name: config.name.clone(),
            params: Vec::new(),
            working: Vec::new(),
            owners: shard.map(|_| Vec::new()),
            unused,
            lr,
            steps: 0,
            schedule,
            every: config.every,
            groups,
        };
        turn.refresh();
        if turn.params.is_empty() && turn.unused.is_empty() && !params.is_empty() {
            let message = match turn.all_params().is_empty() {
                true => "nothing is left to train: all parameters are frozen",
                false => "nothing is left to train at first: all parameters are frozen",
            };
            return Err(Error::setting("groups", message));
        }
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

    /// Rebuilds the lists of the parameters that move now.
    fn refresh(&mut self) {
        let moving = || self.groups.iter().filter(|group| group.moves);
        self.params = moving().flat_map(|group| group.params.clone()).collect();
        self.working = moving().flat_map(|group| group.working.clone()).collect();
        self.owners = self.owners.as_ref().map(|_| moving().flat_map(|group| group.owners.clone()).collect());
    }

    /// Unfreezes the groups that are due after this progress. Returns whether there are any.
    pub(crate) fn unfreeze(&mut self, progress: &Progress) -> bool {
        let is_due = |frozen: &(String, Every)| match frozen.1 {
            Every::Steps(n) => progress.step >= n,
            Every::Epochs(n) => progress.epoch as f64 >= n,
            Every::Time(_) => false,
        };
        let mut any = false;
        for group in self.groups.iter_mut().filter(|group| !group.moves) {
            group.moves = group.frozen.as_ref().is_none_or(is_due);
            any |= group.moves;
        }
        if any {
            self.refresh();
        }
        any
    }

    /// The parameters that it moves, or will once they are unfrozen.
    pub(crate) fn all_params(&self) -> Vec<(String, Var)> {
        self.groups.iter().flat_map(|group| group.params.clone()).collect()
    }

    /// How many steps it has taken, and each of the groups that were frozen at first, by name.
    pub(crate) fn steps(&self) -> Vec<(String, u64)> {
        let own = (self.name.clone(), self.steps);
        let of_group = |group: &Group| Some((self.key(group)?, group.steps));
        std::iter::once(own).chain(self.groups.iter().filter_map(of_group)).collect()
    }

    /// Restores step counts by name; an optimizer without one has taken `otherwise` steps.
    pub(crate) fn resume(&mut self, steps: &IndexMap<String, u64>, otherwise: u64) {
        self.steps = steps.get(&self.name).copied().unwrap_or(otherwise);
        let of_groups =
            self.groups.iter().map(|group| self.key(group).and_then(|key| steps.get(&key).copied()));
        let of_groups: Vec<Option<u64>> = of_groups.collect();
        for (group, steps) in self.groups.iter_mut().zip(of_groups) {
            group.steps = steps.unwrap_or(self.steps);
        }
    }

    fn key(&self, group: &Group) -> Option<String> {
        group.frozen.as_ref().map(|(pattern, _)| format!("{}: {pattern}", self.name))
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
        let mut moving = self.groups.iter_mut().filter(|group| group.moves);
        moving
            .try_for_each(|it| it.optimizer.prepare(it.steps + 1, Rates { lr: rates.lr * it.ratio, ..rates }))
    }

    /// Moves the parameters of this rank by `gradients`, unless `scale` refuses the step, and updates the
    /// values that modules compute with. If ranks share the optimizer state, every rank then receives all
    /// values.
    pub(crate) fn step(&self, gradients: &[Tensor], scale: &GradScale, ranks: &dyn Collective) -> Result<()> {
        let mut rest = gradients;
        for group in self.groups.iter().filter(|group| group.moves) {
            let (own, others) = rest.split_at(group.own);
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
        for group in self.groups.iter_mut().filter(|group| group.moves) {
            group.steps += 1;
            group.optimizer.commit()?;
        }
        Ok(())
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

fn patterns(configs: &[NamedOptimizer]) -> String {
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

    fn group(params: &str) -> ParamGroup {
        ParamGroup { params: params.into(), ..Default::default() }
    }

    fn sgd(lr: f64) -> OptimizerConfig {
        SgdConfig { lr, ..Default::default() }.into()
    }

    #[test]
    fn groups_have_their_own_rates_and_frozen_parameters_stay() {
        let all = params(&["encoder.w", "encoder.b", "decoder.w", "dead.w"]);
        let groups = vec![
            ParamGroup { frozen: true, ..group("dead.*") },
            ParamGroup { weight_decay: Some(0.5), ..group("encoder.w") },
            ParamGroup { lr: Some(0.01), ..group("encoder.*") },
        ];
        let schedule = Schedule::Exponential { gamma: 0.5 };
        let mut turns =
            Turn::share(&[NamedOptimizer::single(sgd(0.1), groups)], &schedule, &all, &[], None).unwrap();
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
                    &[NamedOptimizer::single(optimizer.clone(), Vec::new())],
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
        let turn = |name: &str, params: &str| NamedOptimizer {
            name: name.into(),
            params: params.into(),
            ..NamedOptimizer::single(sgd(0.1), Vec::new())
        };
        let error = |configs: &[NamedOptimizer]| {
            Turn::share(configs, &Schedule::default(), &all, &[], None).err().unwrap().to_string()
        };
        assert_eq!(error(&[turn("x", "a.*")]), "no optimizer updates parameter `b.w`: `x` updates `a.*`");
        assert_eq!(
            error(&[turn("x", "*"), turn("y", "b.*")]),
            "parameter `b.w` is assigned to `x` and `y`: assign it to one"
        );
        let lost = NamedOptimizer { groups: vec![group("c.*")], ..turn("x", "*") };
        assert_eq!(error(&[lost]), "`groups`: `c.*` matches no parameter; the parameters are a.w, b.w");
    }
}
