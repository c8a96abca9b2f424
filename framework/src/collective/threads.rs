//! Ranks that are threads of one process.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use candle_core::Tensor;
use tracing::{Dispatch, dispatcher};

use super::{Collective, check_addable, even_part, report};
use crate::error::{Error, Result};

/// One of several ranks that are threads of one process, each with a replica of the model.
///
/// All operations are built on one: every rank deposits a tensor, and once all have, each takes all of them.
/// Sums are added in the order of ranks, each rank adding a part, so the results are bit-identical on all
/// ranks.
pub struct Threads {
    rank: usize,
    world_size: usize,
    /// How long to wait for a rank.
    patience: Duration,
    /// Logs that a rank hangs: the hanging thread cannot report it, and may never end.
    listener: Dispatch,
    table: Arc<Table>,
}

/// Where ranks deposit tensors.
struct Table {
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    /// The tensors that ranks have deposited in this round.
    laid: Vec<Option<Tensor>>,
    /// All tensors of the last complete round.
    taken: Arc<Vec<Tensor>>,
    /// The number of complete rounds.
    round: u64,
    /// The first rank that failed, and why.
    failed: Option<(usize, String)>,
}

impl Threads {
    /// Creates `world_size` ranks, in order, one for each thread. A rank that the others have waited for
    /// longer than `patience` counts as failed.
    pub fn new(world_size: usize, patience: Duration) -> Vec<Self> {
        let state = State { laid: vec![None; world_size], taken: Arc::default(), round: 0, failed: None };
        let table = Arc::new(Table { state: Mutex::new(state), changed: Condvar::new() });
        let listener = dispatcher::get_default(Dispatch::clone);
        let rank =
            |rank| Self { rank, world_size, patience, listener: listener.clone(), table: table.clone() };
        (0..world_size).map(rank).collect()
    }

    /// The first rank that failed, and why.
    pub(crate) fn failure(&self) -> Option<(usize, String)> {
        self.table.lock().failed.clone()
    }

    /// Deposits a tensor and returns those of all ranks, in order.
    fn exchange(&self, own: &Tensor) -> Result<Arc<Vec<Tensor>>> {
        // A copy: the caller may overwrite its tensor while others still read it.
        let own = own.copy()?;
        let mut state = self.table.lock();
        self.check(&state)?;
        state.laid[self.rank] = Some(own);
        if state.laid.iter().all(Option::is_some) {
            state.taken = Arc::new(state.laid.iter_mut().filter_map(Option::take).collect());
            state.round += 1;
            self.table.changed.notify_all();
            return Ok(state.taken.clone());
        }
        let (round, since) = (state.round, Instant::now());
        while state.round == round {
            self.check(&state)?;
            let Some(left) = self.patience.checked_sub(since.elapsed()) else {
                return Err(self.out_of_patience(state));
            };
            let woken = self.table.changed.wait_timeout(state, left);
            state = woken.unwrap_or_else(PoisonError::into_inner).0;
        }
        // The next round cannot be complete before this rank has deposited a tensor for it.
        Ok(state.taken.clone())
    }

    /// Returns an error if a rank has failed.
    fn check(&self, state: &State) -> Result<()> {
        match &state.failed {
            Some((rank, why)) => Err(Error::msg(format!("rank {rank} failed: {why}"))),
            None => Ok(()),
        }
    }

    /// Marks the first rank that has deposited nothing as failed.
    fn out_of_patience(&self, mut state: MutexGuard<'_, State>) -> Error {
        let late = state.laid.iter().position(Option::is_none).unwrap_or(self.rank);
        let why =
            format!("it hangs: the others have waited for {}", humantime::format_duration(self.patience));
        state.failed = Some((late, why.clone()));
        drop(state);
        self.table.changed.notify_all();
        report(late, &why);
        dispatcher::with_default(&self.listener, || tracing::error!("rank {late} failed: {why}"));
        Error::msg(format!("rank {late} failed: {why}"))
    }

    /// Sums this rank's part of all tensors.
    fn sum_of_part(&self, all: &[Tensor]) -> Result<Tensor> {
        let (from, len) = even_part(all[0].elem_count(), self.rank, self.world_size)?;
        let mut sum = all[0].narrow(0, from, len)?;
        for other in &all[1..] {
            sum = (sum + other.narrow(0, from, len)?)?;
        }
        Ok(sum)
    }
}

impl Table {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Collective for Threads {
    fn rank(&self) -> usize {
        self.rank
    }

    fn world_size(&self) -> usize {
        self.world_size
    }

    fn all_reduce(&self, flat: &Tensor) -> Result<Tensor> {
        check_addable(flat)?;
        let len = flat.elem_count();
        let padded = flat.pad_with_zeros(0, 0, len.next_multiple_of(self.world_size) - len)?;
        let sum = self.all_gather(&self.reduce_scatter(&padded)?)?;
        Ok(sum.narrow(0, 0, len)?)
    }

    fn reduce_scatter(&self, flat: &Tensor) -> Result<Tensor> {
        check_addable(flat)?;
        self.sum_of_part(&self.exchange(flat)?)
    }

    fn all_gather(&self, part: &Tensor) -> Result<Tensor> {
        Ok(Tensor::cat(&self.exchange(part)?, 0)?)
    }

    fn broadcast(&self, flat: &Tensor) -> Result<Tensor> {
        let all = self.exchange(flat)?;
        // A separate copy, because every rank may write to its result.
        Ok(all[0].copy()?)
    }

    fn barrier(&self) -> Result<()> {
        self.exchange(&Tensor::zeros(1, candle_core::DType::U8, &candle_core::Device::Cpu)?).map(drop)
    }

    fn check_ranks(&self) -> Result<()> {
        self.check(&self.table.lock())
    }

    fn abort(&self, why: &str) {
        let mut state = self.table.lock();
        if state.failed.is_none() {
            state.failed = Some((self.rank, why.into()));
            report(self.rank, why);
        }
        drop(state);
        self.table.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;
    use rand::Rng;

    use super::*;
    use crate::seed;

    const PATIENCE: Duration = Duration::from_secs(60);

    /// Runs `work` on each of `n` ranks.
    fn on_ranks<T: Send>(n: usize, patience: Duration, work: impl Fn(&Threads) -> T + Sync) -> Vec<T> {
        let ranks = Threads::new(n, patience);
        std::thread::scope(|scope| {
            let threads: Vec<_> = ranks.iter().map(|rank| scope.spawn(|| work(rank))).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        })
    }

    fn flat(values: &[f32]) -> Tensor {
        Tensor::new(values, &Device::Cpu).unwrap()
    }

    fn values(tensor: &Tensor) -> Vec<f32> {
        tensor.to_vec1().unwrap()
    }

    #[test]
    fn every_operation_by_hand() {
        let results = on_ranks(3, PATIENCE, |c| {
            let r = c.rank() as f32;
            let six: Vec<f32> = (0..6).map(|i| 10. * r + i as f32).collect();
            [
                values(&c.all_reduce(&flat(&[r, 1., -r, 2.])).unwrap()),
                values(&c.reduce_scatter(&flat(&six)).unwrap()),
                values(&c.all_gather(&flat(&[r, 10. * r])).unwrap()),
                values(&c.broadcast(&flat(&[r + 5.])).unwrap()),
            ]
        });
        for (rank, [reduced, scattered, gathered, broadcast]) in results.into_iter().enumerate() {
            assert_eq!(reduced, [3., 3., -3., 6.]);
            let first = 2. * rank as f32;
            assert_eq!(scattered, [30. + 3. * first, 30. + 3. * (first + 1.)]);
            assert_eq!(gathered, [0., 0., 1., 10., 2., 20.]);
            assert_eq!(broadcast, [5.]);
        }
    }

    #[test]
    fn sums_have_the_same_bits_on_all_ranks_and_in_every_run() {
        // 1,001 numbers of very different magnitudes: a different order of additions would show.
        let run = || {
            on_ranks(4, PATIENCE, |c| {
                let mut rng = seed::generator(c.rank() as u64, [1, 2, 3]);
                let numbers: Vec<f32> = (0..1001)
                    .map(|_| rng.random_range(-1f32..1.) * 10f32.powi(rng.random_range(-6..6)))
                    .collect();
                values(&c.all_reduce(&flat(&numbers)).unwrap())
            })
        };
        let first = run();
        assert!(first.iter().all(|sums| *sums == first[0]));
        assert_eq!(first, run());
    }

    #[test]
    fn what_a_rank_gets_is_its_own() {
        // Rank 0 writes to what it broadcast and to what it received, while rank 1 may still be reading.
        let results = on_ranks(2, PATIENCE, |c| {
            let own = candle_core::Var::new(&[c.rank() as f32 + 1.], &Device::Cpu).unwrap();
            let got = candle_core::Var::from_tensor(&c.broadcast(own.as_tensor()).unwrap()).unwrap();
            own.set(&flat(&[7.])).unwrap();
            got.set(&flat(&[c.rank() as f32 + 8.])).unwrap();
            c.barrier().unwrap();
            (values(&own), values(&got))
        });
        assert_eq!(results, [(vec![7.], vec![8.]), (vec![7.], vec![9.])]);
    }

    #[test]
    fn bytes_of_any_length_and_decisions_of_rank_0() {
        let results = on_ranks(3, PATIENCE, |c| {
            let c: &dyn Collective = c;
            let own = "x".repeat(c.rank()).into_bytes();
            let word = if c.rank() == 0 { b"first".to_vec() } else { vec![1; 40] };
            let decisions = [c.decide(c.rank() == 0).unwrap(), c.decide(c.rank() != 0).unwrap()];
            (c.gather_bytes(&own).unwrap(), c.broadcast_bytes(&word).unwrap(), decisions)
        });
        for (gathered, broadcast, decisions) in results {
            assert_eq!(gathered, [b"".to_vec(), b"x".to_vec(), b"xx".to_vec()]);
            assert_eq!((broadcast, decisions), (b"first".to_vec(), [true, false]));
        }
    }

    #[test]
    fn a_failed_rank_ends_the_others_waiting() {
        let results = on_ranks(3, PATIENCE, |c| {
            if c.rank() == 1 {
                c.check_ranks().unwrap();
                c.abort("no disk");
                return "out".to_string();
            }
            let first = c.all_reduce(&flat(&[1.])).unwrap_err().to_string();
            assert_eq!(first, c.barrier().unwrap_err().to_string());
            assert_eq!(first, c.check_ranks().unwrap_err().to_string());
            first
        });
        assert_eq!(results, ["rank 1 failed: no disk", "out", "rank 1 failed: no disk"]);
    }

    #[test]
    fn a_rank_that_does_not_come_is_named() {
        let results = on_ranks(2, Duration::from_millis(50), |c| {
            if c.rank() == 1 { String::new() } else { c.barrier().unwrap_err().to_string() }
        });
        assert_eq!(results, ["rank 1 failed: it hangs: the others have waited for 50ms", ""]);
    }

    #[test]
    fn what_cannot_be_added_or_divided_is_refused() {
        let results = on_ranks(2, PATIENCE, |c| {
            let three = c.reduce_scatter(&flat(&[1., 2., 3.])).unwrap_err().to_string();
            (c.all_reduce(&flat(&[1.; 4]).reshape((2, 2)).unwrap()).unwrap_err().to_string(), three)
        });
        for (shape, three) in results {
            assert_eq!(shape, "ranks add flat tensors of f32 or f64; found F32 of shape [2, 2]");
            assert_eq!(three, "3 numbers cannot be divided evenly among 2 ranks");
        }
    }
}
