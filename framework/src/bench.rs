//! Benchmarks: times the trainer's own steps.

use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};
use std::time::Instant;

use candle_core::Device;
use candlepower_kernels as kernels;
use serde::Serialize;

use crate::batch::Batch;
use crate::callback::{Callback, Flow, StepEnd};
use crate::data::{Cycle, Data, Source, Split};
use crate::error::{Error, Result};
use crate::memory;
use crate::module::Model;
use crate::trainer::{Limit, Precision, Trainer};

/// Untimed steps before the first timed one. They fill caches and allocate memory that later steps reuse.
pub const WARM_UP: u64 = 2;

/// What to time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pass {
    /// Training steps: forward, backward, optimizer.
    Training,
    /// Forward passes only, as in validation.
    Forward,
}

/// The result of a benchmark. One step is one batch.
#[derive(Debug, Clone, Serialize)]
pub struct Benchmark {
    /// Median time from the end of one step to the end of the next, in milliseconds.
    pub ms_per_step: f64,
    /// Samples per second at that median.
    pub samples_per_second: f64,
    /// Peak memory of this process so far, in 10^6 bytes; only known on Linux.
    pub peak_rss_mb: Option<f64>,
    /// Peak memory of tensors on a CUDA device during the timed steps, in 10^6 bytes.
    pub peak_device_mb: Option<f64>,
    /// Floating-point operations of one sample's step, by [`Module::flops`](crate::module::Module::flops):
    /// one forward pass, or three times that for training steps. Does not depend on the algorithms, some of
    /// which need fewer, so speeds are comparable.
    pub flops_per_sample: Option<f64>,
    /// 10^12 of these operations per second.
    pub tflops: Option<f64>,
    /// `cpu`, `cuda` or `metal`.
    pub device: &'static str,
    /// CPU threads used.
    pub threads: usize,
    /// Number format of the computation.
    pub precision: Precision,
}

/// Times `steps` steps of `trainer`.
pub(crate) fn measure<B: Batch>(
    trainer: &Trainer,
    model: &Model<B>,
    data: &Data<B>,
    steps: u64,
    pass: Pass,
) -> Result<Benchmark> {
    if steps == 0 {
        return Err(Error::msg("a benchmark needs at least one step"));
    }
    if data.train.is_empty() {
        return Err(Error::msg("the training data is empty"));
    }
    let device = model.params().device().clone();
    let (ends, receiver) = channel();
    let total = WARM_UP + steps;
    let mut trainer =
        trainer.trial(total).callback(Stopwatch { device: device.clone(), warm_up: WARM_UP, ends });
    let samples = match pass {
        Pass::Training => {
            let batch = trainer.config.batch_size;
            // The last batch of an epoch may be smaller: skip it unless it is the only one.
            trainer.config.limit_train_batches =
                data.train.len().map(|len| Limit::Batches((len / batch).max(1)));
            trainer.fit(model, data)?;
            batch.min(data.train.len().unwrap_or(usize::MAX))
        }
        Pass::Forward => {
            let batch = trainer.config.micro_batch_size.unwrap_or(trainer.config.batch_size);
            let len = total as usize * batch;
            let train = match data.train.clone() {
                Source::Indexed(dataset) => Source::Indexed(Arc::new(Cycle { dataset, len })),
                stream => stream,
            };
            let data = Data { workers: data.workers, prefetch: data.prefetch, ..Data::from_source(train) };
            trainer.validate(model, &data, Split::Train)?;
            batch
        }
    };
    let ends: Vec<Instant> = receiver.try_iter().collect();
    let timed = ends.get(WARM_UP as usize - 1..).unwrap_or_default();
    let seconds = median(timed.windows(2).map(|pair| (pair[1] - pair[0]).as_secs_f64()).collect());
    let samples_per_second = samples as f64 / seconds;
    let passes = if pass == Pass::Training { 3. } else { 1. };
    let flops_per_sample = model.evaluation().flops().map(|forward| passes * forward);
    Ok(Benchmark {
        ms_per_step: 1e3 * seconds,
        samples_per_second,
        peak_rss_mb: memory::peak().map(|bytes| bytes as f64 / 1e6),
        peak_device_mb: kernels::peak_memory(&device).map(|bytes| bytes as f64 / 1e6),
        flops_per_sample,
        tflops: flops_per_sample.map(|flops| flops * samples_per_second / 1e12),
        device: match device {
            Device::Cpu => "cpu",
            Device::Cuda(_) => "cuda",
            Device::Metal(_) => "metal",
        },
        threads: trainer.in_pool(|_| Ok(rayon::current_num_threads()))?,
        precision: trainer.config.precision,
    })
}

/// Records when each step ends. The time between two ends is the full cost of a step, including waiting for
/// data.
struct Stopwatch {
    device: Device,
    /// Untimed steps left.
    warm_up: u64,
    ends: Sender<Instant>,
}

impl Stopwatch {
    fn note(&mut self) -> Result<Flow> {
        // A step ends when its device is idle, not when its last operation has been queued.
        self.device.synchronize()?;
        if self.warm_up == 1 {
            kernels::reset_peak_memory(&self.device);
        }
        self.warm_up = self.warm_up.saturating_sub(1);
        // The receiver is gone only after the benchmark has failed.
        let _ = self.ends.send(Instant::now());
        Ok(Flow::Continue)
    }
}

impl Callback for Stopwatch {
    fn on_step_end(&mut self, _: &StepEnd) -> Result<Flow> {
        self.note()
    }

    fn on_validation_batch_end(&mut self, _: usize, _: Option<usize>) -> Result<Flow> {
        self.note()
    }

    fn wants_gradients(&self, _: u64) -> bool {
        false
    }
}

/// The median; NaN if there are no values.
fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let (low, high) = (values.len().saturating_sub(1) / 2, values.len() / 2);
    match (values.get(low), values.get(high)) {
        (Some(low), Some(high)) => (low + high) / 2.,
        _ => f64::NAN,
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Tensor;

    use super::*;
    use crate::batch::Tensors;
    use crate::data::{Dataset, Sample};
    use crate::module::{Module, Step};
    use crate::trainer::TrainerConfig;

    struct Ones {
        samples: usize,
    }

    impl Dataset for Ones {
        type Batch = Tensors;

        fn len(&self) -> usize {
            self.samples
        }

        fn spec(&self) {}

        fn batch(&self, samples: &[Sample]) -> Result<Tensors> {
            assert!(samples.iter().all(|sample| sample.index < self.samples));
            Ok(Tensors(vec![Tensor::ones(samples.len(), candle_core::DType::F32, &Device::Cpu)?]))
        }
    }

    struct Scale(Tensor);

    impl Module for Scale {
        type Batch = Tensors;

        fn training_step(&self, batch: &Tensors, _: &mut Step) -> Result<Tensor> {
            Ok(batch.0[0].broadcast_mul(&self.0)?.mean_all()?)
        }

        fn flops(&self) -> Option<f64> {
            Some(10.)
        }
    }

    fn bench(samples: usize, steps: u64, pass: Pass) -> Result<Benchmark> {
        let model = Model::new(|vb| Ok(Scale(vb.get(1, "scale")?)), 0, &Device::Cpu).unwrap();
        let config =
            TrainerConfig { batch_size: 4, max_epochs: Some(1), threads: Some(1), ..Default::default() };
        measure(&Trainer::new(config), &model, &Data::new(Ones { samples }), steps, pass)
    }

    #[test]
    fn a_training_step_counts_three_forward_passes() {
        for (pass, flops) in [(Pass::Training, 30.), (Pass::Forward, 10.)] {
            // The steps span several epochs of a small dataset.
            let result = bench(6, 9, pass).unwrap();
            assert_eq!(result.flops_per_sample, Some(flops));
            assert_eq!((result.device, result.threads), ("cpu", 1));
            assert!(result.ms_per_step > 0. && result.tflops.is_some_and(|tflops| tflops > 0.));
            let rate = 1e3 * 4. / result.ms_per_step;
            assert!((result.samples_per_second / rate - 1.).abs() < 1e-9);
        }
    }

    #[test]
    fn nothing_to_time_is_an_error() {
        assert!(bench(6, 0, Pass::Training).is_err());
        assert!(bench(0, 2, Pass::Training).is_err());
        assert!(bench(0, 2, Pass::Forward).is_err());
    }

    #[test]
    fn the_median_is_the_middle() {
        assert_eq!(median(vec![5., 1., 2.]), 2.);
        assert_eq!(median(vec![4., 1., 2., 90.]), 3.);
        assert!(median(Vec::new()).is_nan());
    }
}
