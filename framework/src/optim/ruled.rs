//! Optimizers whose update rule is a kernel: their parameters, state, and each step's coefficients.

use candle_core::{DType, Device, Tensor, Var};
use candlepower_kernels::clipping::GradScale;
use candlepower_kernels::updates::{MOST_STATES, Placed, Rule, UpdateParam};

use super::{FusedOptimizer, Param};
use crate::error::Result;
use crate::schedule::{Rates, Schedule};

/// Turns a configuration into an update rule.
pub(super) trait Recipe: Send {
    /// The rule with the numbers of one step.
    type Step: Rule;

    /// Names of the state tensors kept for each parameter, in the rule's order; `None` if one is not kept.
    fn kept(&self, schedule: &Schedule) -> [Option<&'static str>; MOST_STATES];

    /// The rule for step number `t`, counted from 1.
    fn step(&self, t: u64, rates: Rates) -> Self::Step;
}

/// Parameters moved by one rule, all with the same numbers.
pub(super) struct Ruled<C: Recipe> {
    pub(super) recipe: C,
    params: Vec<Param>,
    kept: [Option<Kept>; MOST_STATES],
    numbers: Placed<C::Step>,
}

/// One kind of state: a tensor for each parameter, initially zeros.
struct Kept {
    name: &'static str,
    vars: Vec<Var>,
}

impl<C: Recipe> Ruled<C> {
    pub(super) fn new(params: &[Param], recipe: C, schedule: &Schedule) -> Result<Self> {
        let zeros = |it: &Param| Ok(Var::zeros(it.master.shape(), DType::F32, it.master.device())?);
        let mut kept = [const { None }; MOST_STATES];
        for (kept, name) in kept.iter_mut().zip(recipe.kept(schedule)) {
            let Some(name) = name else { continue };
            *kept = Some(Kept { name, vars: params.iter().map(zeros).collect::<Result<_>>()? });
        }
        let numbers = Placed::on(params.first().map_or(&Device::Cpu, |it| it.master.device()))?;
        Ok(Self { recipe, params: params.to_vec(), kept, numbers })
    }
}

impl<C: Recipe> FusedOptimizer for Ruled<C> {
    fn prepare(&mut self, t: u64, rates: Rates) -> Result<()> {
        Ok(self.numbers.set(self.recipe.step(t, rates))?)
    }

    fn step(&self, gradients: &[Tensor], scale: &GradScale) -> Result<()> {
        let params =
            self.params.iter().zip(gradients).enumerate().map(|(i, (param, gradient))| UpdateParam {
                param: &param.master,
                copy: param.copy.as_ref().map(Var::as_tensor),
                gradient,
                kept: self.kept.each_ref().map(|kept| kept.as_ref().map(|kept| kept.vars[i].as_tensor())),
            });
        Ok(self.numbers.apply(&params.collect::<Vec<_>>(), scale)?)
    }

    fn state(&self) -> Vec<(String, Var)> {
        let of_kind = |Kept { name, vars }: &Kept| -> Vec<(String, Var)> {
            let named = |(param, var): (&Param, &Var)| (format!("{name}.{}", param.name), var.clone());
            self.params.iter().zip(vars).map(named).collect()
        };
        self.kept.iter().flatten().flat_map(of_kind).collect()
    }
}
