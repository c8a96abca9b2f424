//! Sharing out the optimizer's state among ranks (ZeRO-1, Rajbhandari et al. 2020, section 5.1): each parameter has an owner,
//! which alone keeps its moments and updates it.

use candle_core::{DType, Device, Tensor, Var};

use super::Collective;
use crate::error::{Error, Result};

/// Which rank owns each of these parameters: the largest first, each to the rank that owns least so far.
pub(crate) fn owners(params: &[(String, Var)], world_size: usize) -> Vec<usize> {
    let mut by_size: Vec<usize> = (0..params.len()).collect();
    by_size.sort_by_key(|i| std::cmp::Reverse(params[*i].1.elem_count()));
    let (mut owned, mut owners) = (vec![0; world_size], vec![0; params.len()]);
    for i in by_size {
        let rank = (0..world_size).min_by_key(|rank| owned[*rank]).unwrap_or(0);
        owners[i] = rank;
        owned[rank] += params[i].1.elem_count();
    }
    owners
}

/// Gives every rank the values that each variable has on its owner.
pub(crate) fn publish(ranks: &dyn Collective, vars: &[(String, Var)], owners: &[usize]) -> Result<()> {
    let of =
        |rank: usize| vars.iter().zip(owners).filter(move |(_, owner)| **owner == rank).map(|(var, _)| var);
    let len = |rank| of(rank).map(|(_, var)| var.elem_count()).sum::<usize>();
    let longest = (0..ranks.world_size()).map(len).max().unwrap_or(0);
    let Some((_, first)) = vars.first().filter(|_| longest > 0) else { return Ok(()) };
    let own = of(ranks.rank()).map(|(_, var)| var.as_detached_tensor().flatten_all());
    let mut own = own.collect::<candle_core::Result<Vec<Tensor>>>()?;
    let padding = longest - len(ranks.rank());
    if padding > 0 {
        own.push(Tensor::zeros(padding, first.dtype(), first.device())?);
    }
    let all = ranks.all_gather(&Tensor::cat(&own, 0)?)?;
    for rank in (0..ranks.world_size()).filter(|rank| *rank != ranks.rank()) {
        let mut from = rank * longest;
        for (_, var) in of(rank) {
            var.set(&all.narrow(0, from, var.elem_count())?.reshape(var.shape())?)?;
            from += var.elem_count();
        }
    }
    Ok(())
}

/// The state of all ranks' optimizers, by name, on each of them; `own` is this rank's part. For saving, and for resuming.
pub(crate) struct Whole {
    /// Every tensor's name, in the order of ranks.
    pub(crate) vars: Vec<(String, Var)>,
    owners: Vec<usize>,
}

impl Whole {
    /// What there is on all ranks, with zeros for what is not here; [`Whole::gather`] gets the values.
    pub(crate) fn new(ranks: &dyn Collective, own: &[(String, Var)]) -> Result<Self> {
        let shapes: Vec<(&str, &[usize])> =
            own.iter().map(|(name, var)| (name.as_str(), var.dims())).collect();
        let shapes = serde_json::to_vec(&shapes).map_err(Error::content("optimizer state"))?;
        let (mut vars, mut owners) = (Vec::new(), Vec::new());
        for (rank, shapes) in ranks.gather_bytes(&shapes)?.iter().enumerate() {
            let shapes: Vec<(String, Vec<usize>)> =
                serde_json::from_slice(shapes).map_err(Error::content("optimizer state"))?;
            for (i, (name, shape)) in shapes.into_iter().enumerate() {
                let var = if rank == ranks.rank() {
                    own[i].1.clone()
                } else {
                    Var::zeros(shape, DType::F32, own.first().map_or(&Device::Cpu, |(_, var)| var.device()))?
                };
                vars.push((name, var));
                owners.push(rank);
            }
        }
        Ok(Self { vars, owners })
    }

    /// Gets the other ranks' values.
    pub(crate) fn gather(&self, ranks: &dyn Collective) -> Result<()> {
        publish(ranks, &self.vars, &self.owners)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parameters_are_shared_out_evenly() {
        let sizes = [100, 10, 40, 60, 50, 1];
        let params: Vec<(String, Var)> = sizes
            .iter()
            .map(|size| (size.to_string(), Var::zeros(*size, DType::F32, &Device::Cpu).unwrap()))
            .collect();
        // 100 | 60, 50 | then 40 to 100's rank, 10 and 1 to the other's.
        assert_eq!(owners(&params, 2), [0, 1, 0, 1, 1, 1]);
        assert_eq!(owners(&params, 1), [0; 6]);
        assert_eq!(owners(&params[..1], 3), [0]);
    }
}
