//! The gradients of one optimizer step on one of several ranks, summed over its micro-batches and, while the
//! last backward pass is still running, over all ranks.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

use candle_core::{DType, Device, Tensor, Var};

use crate::collective::shard::Shares;
use crate::collective::{Collective, Started, buckets, pack, unpack};
use crate::error::Result;
use crate::grads::{Grads, accumulate, is_not_unused};
use crate::optim::Turn;
use crate::taps::Listener;

/// Which gradients are sent together.
///
/// A backward pass runs from the loss to the input, so buckets are filled from the last parameter to the
/// first, and a complete bucket is sent while earlier gradients are still being computed (Li et al. 2020,
/// section 3.2.3).
struct Plan {
    ranks: Arc<dyn Collective>,
    /// From last to first.
    params: Vec<(String, Var)>,
    slots: HashMap<String, usize>,
    /// Parameters that the module declares unused.
    unused: Vec<String>,
    buckets: Vec<Range<usize>>,
    /// The rank that updates each parameter; `None` if every rank updates all.
    owners: Option<Vec<usize>>,
}

/// Listens to the taps of a module and reduces its gradients.
pub(crate) struct Reduction {
    plan: Plan,
    sums: Vec<Option<Tensor>>,
    /// Whether this backward pass completes the sums.
    is_last: bool,
    /// The number of gradients that each bucket still waits for.
    missing: Vec<usize>,
    /// The buckets already being reduced, in order.
    started: Vec<Started>,
}

/// The gradients of a step on one rank.
pub(crate) struct Reduced {
    /// The gradients of the parameters that this rank updates.
    pub(crate) own: Grads,
    /// Whether any rank asked for the gradients of all parameters.
    pub(crate) whole: bool,
}

impl Reduction {
    /// Starts without gradients for any of the turn's parameters.
    pub(crate) fn new(turn: &Turn, ranks: &Arc<dyn Collective>) -> Self {
        let params: Vec<(String, Var)> = turn.params.iter().rev().cloned().collect();
        let slots = params.iter().enumerate().map(|(slot, (name, _))| (name.clone(), slot)).collect();
        let sizes: Vec<usize> = params.iter().map(|(_, var)| var.elem_count()).collect();
        let owners = turn.owners().map(|owners| owners.iter().rev().copied().collect());
        // If only owners need the sums, all parts are exchanged at once, because parameters of different
        // owners are interleaved.
        let buckets = if owners.is_none() { buckets(&sizes) } else { Vec::new() };
        let unused = turn.unused.iter().map(|(name, _)| name.clone()).collect();
        let (missing, sums) = (buckets.iter().map(Range::len).collect(), vec![None; params.len()]);
        let plan = Plan { ranks: ranks.clone(), params, slots, unused, buckets, owners };
        Self { plan, sums, is_last: false, missing, started: Vec::new() }
    }

    /// Sets whether the coming backward pass is the step's last on this rank.
    pub(crate) fn before_backward(mut self, is_last: bool) -> Self {
        self.is_last = is_last;
        self
    }

    /// Returns the sums over all ranks. A rank without samples in the step adds zeros, so the ranks also sum
    /// which parameters have a gradient, and whether a rank wants all of them.
    pub(crate) fn finish(mut self, wants_whole: bool) -> Result<Reduced> {
        for bucket in self.started.len()..self.plan.buckets.len() {
            self.start(bucket)?;
        }
        let known = self.sums.iter().map(Option::is_some).chain([wants_whole]);
        let known: Vec<f32> = known.map(|known| f32::from(u8::from(known))).collect();
        let mut sums = Vec::with_capacity(self.sums.len());
        for (started, bucket) in std::mem::take(&mut self.started).into_iter().zip(&self.plan.buckets) {
            let shapes = self.plan.params[bucket.clone()].iter().map(|(_, var)| var.shape());
            sums.extend(unpack(&started()?, shapes)?);
        }
        let Plan { ranks, params, owners, .. } = &self.plan;
        let known = Tensor::new(known, &Device::Cpu)?;
        let mut known = ranks.all_reduce(&known)?.to_vec1::<f32>()?;
        let whole = known.pop().is_some_and(|ranks| ranks > 0.);
        if let Some(owners) = owners {
            sums = Shares::new(&**ranks, params, owners).reduce(&self.filled(0..params.len())?)?;
            let mut owners = owners.iter();
            known.retain(|_| owners.next() == Some(&ranks.rank()));
        }
        let found = sums.into_iter().zip(known).map(|(sum, ranks)| (ranks > 0.).then_some(sum));
        let mut found: Vec<Option<Tensor>> = found.collect();
        found.reverse();
        Ok(Reduced { own: Grads::found(found), whole })
    }

    /// Starts reducing a bucket.
    fn start(&mut self, bucket: usize) -> Result<()> {
        let flat = pack(&self.filled(self.plan.buckets[bucket].clone())?)?;
        self.started.push(self.plan.ranks.clone().start_all_reduce(flat)?);
        Ok(())
    }

    /// This rank's sums, with zeros for missing gradients.
    fn filled(&self, slots: Range<usize>) -> Result<Vec<Tensor>> {
        let filled = slots.map(|slot| match &self.sums[slot] {
            Some(sum) => Ok(sum.clone()),
            None => {
                let (_, var) = &self.plan.params[slot];
                Ok(Tensor::zeros(var.shape(), DType::F32, var.device())?)
            }
        });
        filled.collect()
    }
}

impl Listener for Reduction {
    fn hear(&mut self, name: &str, gradient: &Tensor) -> Result<()> {
        is_not_unused(name, &self.plan.unused)?;
        // The parameter belongs to another optimizer.
        let Some(&slot) = self.plan.slots.get(name) else { return Ok(()) };
        accumulate(&mut self.sums[slot], gradient)?;
        if !self.is_last {
            return Ok(());
        }
        let bucket = self.plan.buckets.iter().position(|bucket| bucket.contains(&slot));
        bucket.into_iter().for_each(|bucket| self.missing[bucket] -= 1);
        // All ranks send buckets in the same order.
        while self.missing.get(self.started.len()) == Some(&0) {
            self.start(self.started.len())?;
        }
        Ok(())
    }
}
