//! Training on several ranks, as threads or with this process as one of them, and what the ranks agree on.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Duration;

use candle_core::{DType, Device, Tensor, Var};
use tracing::subscriber::NoSubscriber;
use tracing::{Dispatch, dispatcher};

use super::fit::Fit;
use super::gallery::Gallery;
use super::{Outcome, Trainer};
use crate::accelerator;
use crate::batch::Batch;
use crate::callback::{Flow, StopReason};
use crate::checkpoint::State;
use crate::collective::{self, Collective, Threads};
use crate::data::Data;
use crate::error::{Error, Result};
use crate::module::Model;
use crate::params::Params;

/// Trains this trainer's rank.
pub(super) fn fit_as_rank<B: Batch>(
    trainer: &mut Trainer,
    model: &Model<B>,
    data: &Data<B>,
) -> Result<Outcome> {
    if trainer.ranks.rank() > 0 {
        trainer.callbacks.keep_those_on_every_rank();
        (trainer.checkpoint_dir, trainer.resume) = (None, None);
    }
    let ranks = trainer.ranks.clone();
    let mut trained = || {
        trainer.in_pool(|trainer| {
            trainer.gallery = Gallery::default();
            trainer.ranks = on_devices(&ranks, model.params().device(), trainer.distributed.patience())?;
            // Notify the other ranks, which are waiting, before dropping the run's state, which may take a
            // while.
            let outcome = Fit::new(trainer, model, data)
                .and_then(|mut fit| fit.run().inspect_err(|error| ranks.abort(&error.to_string())));
            if outcome.is_err() {
                trainer.show_what_is_left();
            }
            trainer.ranks = ranks.clone();
            model.params().remove_taps();
            outcome
        })
    };
    if ranks.world_size() == 1 {
        return trained();
    }
    // The others would wait forever for a rank that ends in any way other than together with them.
    let result = catch_unwind(AssertUnwindSafe(trained))
        .unwrap_or_else(|panic| Err(Error::msg(format!("it panicked: {}", text_of(&*panic)))));
    result.inspect_err(|error| ranks.abort(&error.to_string()))
}

/// The same ranks, able to exchange tensors on their devices.
fn on_devices(
    ranks: &Arc<dyn Collective>,
    device: &Device,
    patience: Duration,
) -> Result<Arc<dyn Collective>> {
    #[cfg(feature = "cuda")]
    if ranks.world_size() > 1 && device.is_cuda() {
        return Ok(Arc::new(match ranks.processes() {
            Some(processes) => collective::Nccl::meet(processes, device, patience)?,
            None => collective::Nccl::join(ranks.clone(), device, patience)?,
        }));
    }
    let _ = (device, patience);
    Ok(ranks.clone())
}

/// Trains on `devices` ranks of this process, each a thread with a replica of the model. The first rank is
/// this trainer with this model.
pub(super) fn fit_on_threads<B: Batch>(
    trainer: &mut Trainer,
    model: &Model<B>,
    data: &Data<B>,
    devices: usize,
) -> Result<Outcome> {
    let processes = trainer.ranks.clone();
    let among_all = |rank: Arc<Threads>| -> Arc<dyn Collective> {
        match processes.processes() {
            Some(processes) => Arc::new(processes.with(rank)),
            None => rank,
        }
    };
    let mut ranks = Threads::new(devices, trainer.distributed.patience()).into_iter().map(Arc::new);
    let first = ranks.next().ok_or_else(|| Error::setting("devices", "expected at least 1, found 0"))?;
    let others = ranks.map(|rank| {
        let device = accelerator::of_rank(rank.rank(), model.params().device())?;
        Ok((trainer.replica(among_all(rank)), model.replica(&device)?))
    });
    let others: Vec<(Trainer, Model<B>)> = others.collect::<Result<_>>()?;
    trainer.ranks = among_all(first.clone());
    // Only rank 0 logs. This dispatcher is registered with tracing; with `Dispatch::none()` tracing would
    // assume that there are no subscribers anywhere.
    let silence = Dispatch::new(NoSubscriber::new());
    let mut results: Vec<Result<Outcome>> = std::thread::scope(|scope| {
        let rank = |(mut trainer, model): (Trainer, Model<B>)| {
            let silence = &silence;
            scope.spawn(move || dispatcher::with_default(silence, || fit_as_rank(&mut trainer, &model, data)))
        };
        let others: Vec<_> = others.into_iter().map(rank).collect();
        let first = fit_as_rank(trainer, model, data);
        let others = others.into_iter().map(|other| {
            other.join().unwrap_or_else(|panic| Err(Error::msg(format!("it panicked: {}", text_of(&*panic)))))
        });
        [first].into_iter().chain(others).collect()
    });
    trainer.ranks = processes;
    // Rank 0 ends with its own error, or with that of the rank that failed first.
    let outcome = results.swap_remove(0)?;
    match first.failure() {
        Some((rank, why)) => Err(Error::msg(format!("rank {rank} failed: {why}"))),
        None => Ok(outcome),
    }
}

/// Sends the state of the checkpoint that rank 0 resumes from to all ranks.
pub(super) fn agree_on_state(ranks: &dyn Collective, own: Option<&State>) -> Result<Option<State>> {
    if ranks.is_alone() {
        return Ok(own.cloned());
    }
    let text = serde_json::to_vec(&own).map_err(Error::content("state"))?;
    serde_json::from_slice(&ranks.broadcast_bytes(&text)?).map_err(Error::content("state"))
}

/// Sets these variables to rank 0's values.
pub(super) fn same_as_rank_0(ranks: &dyn Collective, vars: &[(String, Var)]) -> Result<()> {
    if ranks.is_alone() {
        return Ok(());
    }
    // Ranks cannot exchange other dtypes, for example that of a batch count; f64 holds their values.
    let (plain, others): (Vec<Var>, Vec<Var>) =
        vars.iter().map(|(_, var)| var.clone()).partition(|var| var.dtype() == DType::F32);
    for (vars, dtype) in [(plain, DType::F32), (others, DType::F64)] {
        let own = vars.iter().map(|var| var.as_detached_tensor().to_dtype(dtype));
        let own = own.collect::<candle_core::Result<Vec<Tensor>>>()?;
        for (var, value) in vars.iter().zip(collective::broadcast(ranks, &own)?) {
            var.set(&value.to_dtype(var.dtype())?)?;
        }
    }
    Ok(())
}

/// Averages the model's buffers over the ranks, weighted by the samples that each rank had in this step: a
/// rank without samples has learned nothing about them.
pub(super) fn average_buffers(ranks: &dyn Collective, params: &Params, own_samples: usize) -> Result<()> {
    let buffers = params.buffers();
    if ranks.is_alone() || buffers.is_empty() {
        return Ok(());
    }
    let weight = own_samples as f64;
    let weighted = buffers.iter().map(|(_, var)| var.as_detached_tensor().to_dtype(DType::F64)? * weight);
    let mut weighted = weighted.collect::<candle_core::Result<Vec<Tensor>>>()?;
    weighted.push(Tensor::new(&[weight], params.device())?);
    let mut sums = collective::all_reduce(ranks, &weighted)?;
    let samples = sums.pop().map_or(Ok(vec![weight]), |samples| samples.to_vec1::<f64>())?[0];
    for ((_, var), sum) in buffers.iter().zip(sums) {
        let mean = (sum / samples)?;
        let mean = if var.dtype().is_float() { mean } else { mean.round()? };
        var.set(&mean.to_dtype(var.dtype())?)?;
    }
    params.roll_back_buffers()
}

/// Combines the flows of all ranks after a step: the first rank that wants to stop is enough. Also returns
/// whether any rank wants to save.
pub(super) fn agree_on_flow(ranks: &dyn Collective, own: Flow, saves: bool) -> Result<(Flow, bool)> {
    if ranks.is_alone() {
        return Ok((own, saves));
    }
    let [kind, signal] = match &own {
        Flow::Continue | Flow::Save => [0., 0.],
        Flow::Stop(StopReason::Finished) => [1., 0.],
        Flow::Stop(StopReason::Callback(_)) => [2., 0.],
        Flow::Stop(StopReason::Failed(_)) => [3., 0.],
        Flow::Stop(StopReason::Signal(signal)) => [4., f64::from(*signal)],
    };
    let all = ranks.gather_numbers(&[kind, signal, f64::from(u8::from(saves))])?;
    let saves = all.iter().any(|numbers| numbers[2] == 1.);
    let flow = |(rank, numbers): (usize, &Vec<f64>)| {
        let why = format!("rank {rank} asked for it");
        match numbers[0] as u8 {
            // This rank's own reason, unchanged.
            _ if rank == ranks.rank() => own.clone(),
            0 => Flow::Continue,
            1 => Flow::Stop(StopReason::Finished),
            2 => Flow::Stop(StopReason::Callback(why)),
            3 => Flow::Stop(StopReason::Failed(why)),
            _ => Flow::Stop(StopReason::Signal(numbers[1] as i32)),
        }
    };
    Ok((all.iter().enumerate().map(flow).fold(Flow::Continue, Flow::or), saves))
}

/// The message of a panic.
fn text_of(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|text| text.to_string());
    text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_else(|| "without a word".into())
}
