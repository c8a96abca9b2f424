//! Divides the optimizer state among ranks (ZeRO-1, Rajbhandari et al. 2020, section 5.1): each parameter has
//! an owner, and only the owner keeps its moments and updates it.

use candle_core::{DType, Device, Tensor, Var};

use super::{Collective, pack, unpack};
use crate::error::{Error, Result};

/// The owner of each of these parameters: largest first, each goes to the rank that owns least so far.
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

/// Parameters divided among ranks, and exchanges of one tensor per parameter.
pub(crate) struct Shares<'a> {
    ranks: &'a dyn Collective,
    params: &'a [(String, Var)],
    owners: &'a [usize],
    /// Number of elements of the rank that owns most. All ranks' parts are padded with zeros to this length.
    longest: usize,
}

impl<'a> Shares<'a> {
    pub(crate) fn new(ranks: &'a dyn Collective, params: &'a [(String, Var)], owners: &'a [usize]) -> Self {
        let mut shares = Self { ranks, params, owners, longest: 0 };
        shares.longest = (0..ranks.world_size()).map(|rank| shares.len(rank)).max().unwrap_or(0);
        shares
    }

    /// The parameters that a rank owns, in order.
    fn of(&self, rank: usize) -> impl Iterator<Item = usize> {
        (0..self.params.len()).filter(move |i| self.owners[*i] == rank)
    }

    /// The number of elements that a rank owns.
    fn len(&self, rank: usize) -> usize {
        self.of(rank).map(|i| self.params[i].1.elem_count()).sum()
    }

    /// A rank's tensors, concatenated and padded.
    fn part(&self, rank: usize, tensors: &[Tensor], dtype: DType, device: &Device) -> Result<Tensor> {
        let padding = Tensor::zeros(self.longest - self.len(rank), dtype, device)?;
        pack(&[tensors, &[padding]].concat())
    }

    /// Sums one tensor per parameter over all ranks; returns the sums for the parameters that this rank owns.
    pub(crate) fn reduce(&self, tensors: &[Tensor]) -> Result<Vec<Tensor>> {
        let Some(first) = tensors.first() else { return Ok(Vec::new()) };
        let part = |rank| {
            let own: Vec<Tensor> = self.of(rank).map(|i| tensors[i].clone()).collect();
            self.part(rank, &own, first.dtype(), first.device())
        };
        let parts = (0..self.ranks.world_size()).map(part).collect::<Result<Vec<Tensor>>>()?;
        let sums = self.ranks.reduce_scatter(&pack(&parts)?)?;
        unpack(&sums, self.of(self.ranks.rank()).map(|i| self.params[i].1.shape()))
    }

    /// Gathers one tensor per parameter from their owners; `own` are this rank's. The results share memory.
    pub(crate) fn gather(&self, own: &[Tensor]) -> Result<Vec<Tensor>> {
        let Some((_, first)) = self.params.first() else { return Ok(Vec::new()) };
        let part = self.part(self.ranks.rank(), own, first.dtype(), first.device())?;
        let all = self.ranks.all_gather(&part)?;
        let mut from: Vec<usize> = (0..self.ranks.world_size()).map(|rank| rank * self.longest).collect();
        let each = self.params.iter().zip(self.owners).map(|((_, var), owner)| {
            from[*owner] += var.elem_count();
            let start = from[*owner] - var.elem_count();
            Ok(all.narrow(0, start, var.elem_count())?.reshape(var.shape())?)
        });
        each.collect()
    }

    /// Sets each parameter on every rank to its owner's values.
    pub(crate) fn publish(&self) -> Result<()> {
        let own: Vec<Tensor> =
            self.of(self.ranks.rank()).map(|i| self.params[i].1.as_detached_tensor()).collect();
        for (i, value) in self.gather(&own)?.iter().enumerate() {
            if self.owners[i] != self.ranks.rank() {
                self.params[i].1.set(value)?;
            }
        }
        Ok(())
    }
}

/// Sharded optimizer state, by name. To save or resume, all of it is gathered in the CPU memory of rank 0,
/// because a device may not have enough.
pub(crate) struct Whole {
    /// Name, shape and owner of every tensor, in the order of ranks.
    parts: Vec<(String, Vec<usize>, usize)>,
    own: Vec<Var>,
}

impl Whole {
    /// The state on all ranks; `own` is this rank's part.
    pub(crate) fn new(ranks: &dyn Collective, own: &[(String, Var)]) -> Result<Self> {
        let shapes: Vec<(&str, &[usize])> =
            own.iter().map(|(name, var)| (name.as_str(), var.dims())).collect();
        let shapes = serde_json::to_vec(&shapes).map_err(Error::content("optimizer state"))?;
        let mut parts = Vec::new();
        for (rank, shapes) in ranks.gather_bytes(&shapes)?.iter().enumerate() {
            let shapes: Vec<(String, Vec<usize>)> =
                serde_json::from_slice(shapes).map_err(Error::content("optimizer state"))?;
            parts.extend(shapes.into_iter().map(|(name, shape)| (name, shape, rank)));
        }
        Ok(Self { parts, own: own.iter().map(|(_, var)| var.clone()).collect() })
    }

    /// Allocates the whole state, zeroed, on rank 0; nothing on the other ranks.
    pub(crate) fn room(&self, ranks: &dyn Collective) -> Result<Vec<(String, Var)>> {
        let zeros = |(name, shape, _): &(String, Vec<usize>, usize)| {
            Ok((name.clone(), Var::zeros(shape.as_slice(), DType::F32, &Device::Cpu)?))
        };
        self.parts.iter().filter(|_| ranks.rank() == 0).map(zeros).collect()
    }

    /// The whole state on rank 0; nothing on the other ranks.
    pub(crate) fn gather(&self, ranks: &dyn Collective) -> Result<Vec<(String, Var)>> {
        let all = self.room(ranks)?;
        // One tensor of each rank at a time.
        for turn in 0.. {
            let now: Vec<Option<usize>> =
                (0..ranks.world_size()).map(|rank| self.of(rank).nth(turn)).collect();
            let Some(longest) = now.iter().flatten().map(|i| self.len(*i)).max() else { break };
            let own = match self.own.get(turn) {
                Some(var) => var.as_detached_tensor().to_device(&Device::Cpu)?.flatten_all()?,
                None => Tensor::zeros(0, DType::F32, &Device::Cpu)?,
            };
            let own = own.pad_with_zeros(0, 0, longest - own.elem_count())?;
            let values = ranks.all_gather(&own)?;
            for (rank, i) in now.iter().enumerate() {
                if let Some((_, var)) = i.and_then(|i| all.get(i)) {
                    let part = values.narrow(0, rank * longest, var.elem_count())?;
                    var.set(&part.reshape(var.shape())?)?;
                }
            }
        }
        Ok(all)
    }

    /// Sends each rank its part of rank 0's state.
    pub(crate) fn scatter(&self, ranks: &dyn Collective, all: &[(String, Var)]) -> Result<()> {
        let mut own = self.own.iter();
        for (i, (.., owner)) in self.parts.iter().enumerate() {
            let value = match all.get(i) {
                Some((_, var)) => var.as_detached_tensor().flatten_all()?,
                None => Tensor::zeros(self.len(i), DType::F32, &Device::Cpu)?,
            };
            let value = ranks.broadcast(&value)?;
            if *owner == ranks.rank()
                && let Some(own) = own.next()
            {
                own.set(&value.reshape(own.shape())?.to_device(own.device())?)?;
            }
        }
        Ok(())
    }

    /// The number of elements of a tensor.
    fn len(&self, i: usize) -> usize {
        self.parts[i].1.iter().product()
    }

    /// The tensors that a rank keeps.
    fn of(&self, rank: usize) -> impl Iterator<Item = usize> {
        (0..self.parts.len()).filter(move |i| self.parts[*i].2 == rank)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::Threads;
    use super::*;

    /// Runs `work` on three ranks with five parameters, of which the third rank owns none.
    fn on_ranks<T: Send>(work: impl Fn(&Shares, usize) -> T + Sync) -> Vec<T> {
        let owners = [1, 0, 0, 1, 0];
        let shapes: [&[usize]; 5] = [&[2, 2], &[3], &[], &[1], &[2]];
        let (work, ranks) = (&work, Threads::new(3, Duration::from_secs(60)));
        std::thread::scope(|scope| {
            let on = |ranks: Threads| {
                let var = |(i, shape): (usize, &&[usize])| {
                    let value = Tensor::full((10 * ranks.rank() + i) as f32, *shape, &Device::Cpu).unwrap();
                    (i.to_string(), Var::from_tensor(&value).unwrap())
                };
                let params: Vec<(String, Var)> = shapes.iter().enumerate().map(var).collect();
                work(&Shares::new(&ranks, &params, &owners), ranks.rank())
            };
            let threads: Vec<_> = ranks.into_iter().map(|rank| scope.spawn(move || on(rank))).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        })
    }

    /// The shape of a tensor, and its first element.
    fn first(tensor: &Tensor) -> (Vec<usize>, f32) {
        (tensor.dims().to_vec(), tensor.flatten_all().unwrap().to_vec1().unwrap()[0])
    }

    #[test]
    fn owners_get_sums_and_give_values() {
        let sums = on_ranks(|shares, _| {
            let all: Vec<Tensor> = shares.params.iter().map(|(_, var)| var.as_detached_tensor()).collect();
            shares.reduce(&all).unwrap().iter().map(first).collect::<Vec<_>>()
        });
        // Every sum contains 0 + 10 + 20, and three times the parameter's index.
        let expected = [
            vec![(vec![3], 33.), (vec![], 36.), (vec![2], 42.)],
            vec![(vec![2, 2], 30.), (vec![1], 39.)],
            vec![],
        ];
        assert_eq!(sums, expected);
        let values = on_ranks(|shares, _| {
            shares.publish().unwrap();
            shares.params.iter().map(|(_, var)| first(var)).collect::<Vec<_>>()
        });
        let expected = [(vec![2, 2], 10.), (vec![3], 1.), (vec![], 2.), (vec![1], 13.), (vec![2], 4.)];
        assert!(values.iter().all(|values| *values == expected), "{values:?}");
    }

    #[test]
    fn parameters_are_shared_out_evenly() {
        let sizes = [100, 10, 40, 60, 50, 1];
        let params: Vec<(String, Var)> = sizes
            .iter()
            .map(|size| (size.to_string(), Var::zeros(*size, DType::F32, &Device::Cpu).unwrap()))
            .collect();
        // 100 to rank 0, 60 and 50 to rank 1, then 40 to rank 0, and 10 and 1 to rank 1.
        assert_eq!(owners(&params, 2), [0, 1, 0, 1, 1, 1]);
        assert_eq!(owners(&params, 1), [0; 6]);
        assert_eq!(owners(&params[..1], 3), [0]);
    }
}
