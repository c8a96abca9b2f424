//! Training on several ranks equals training on one: the same samples, gradients, weights, metrics, events.
#![allow(clippy::unwrap_used)]

use std::collections::HashMap;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use candlepower::checkpoint::{self, Checkpoint, CheckpointConfig};
use candlepower::collective::{
    Collective, DistributedConfig, Environment, Processes, Shard, Started, Starter, Threads,
};
use candlepower::config::Registry;
use candlepower::experiment::{Experiment, Resume};
use candlepower::optim::{
    AdadeltaConfig, AdagradConfig, AverageConfig, EmaConfig, MomentsConfig, NamedOptimizer, RadamConfig,
    RmspropConfig,
};
use candlepower::params::Buffer;
use candlepower::precision::Precision;
use candlepower::prelude::*;
use candlepower::trainer::{Every, Limit, Outcome};
use candlepower_datasets::MovingMnist;
use candlepower_models::ConvLstm;
use candlepower_models::conv_lstm::ConvLstmConfig;
use candlepower_tests::blobs::Blobs;
use candlepower_tests::points::{Dropped, PointStream, Points, weights};
use candlepower_tests::recorder::Recorder;
use candlepower_tests::relative_error;

/// How much a sum over a few numbers in another order may differ.
const TOLERANCE: f64 = 1e-6;

fn conv_lstm() -> Model<Video> {
    let config = ConvLstmConfig { hidden: 4, ..Default::default() };
    Model::build::<ConvLstm>(&config, &Blobs { samples: 1 }.spec(), 1, &Device::Cpu).unwrap()
}

/// 20 samples in batches of 7, micro-batches of 2: steps of 4, 4 and 3 micro-batches, the last of them smaller.
fn config(devices: usize, steps: u64) -> TrainerConfig {
    TrainerConfig {
        batch_size: 7,
        micro_batch_size: Some(2),
        max_steps: Some(steps),
        devices,
        log_every: 1,
        ..Default::default()
    }
}

fn sgd() -> SgdConfig {
    SgdConfig { lr: 0.05, momentum: 0.9, ..Default::default() }
}

fn points() -> Data<Tensors> {
    Data::new(Points { samples: 20 }).val(Points { samples: 9 })
}

/// Keeps the gradients of every step.
#[derive(Clone, Default)]
struct Gradients(Arc<Mutex<Vec<Vec<Tensor>>>>);

impl Callback for Gradients {
    fn on_step_end(&mut self, step: &StepEnd) -> Result<Flow> {
        self.0.lock().unwrap().push(step.gradients.to_vec());
        Ok(Flow::Continue)
    }
}

#[track_caller]
fn assert_same_weights<B: Batch>(what: &str, actual: &Model<B>, expected: &Model<B>) {
    for ((name, actual), (_, expected)) in actual.params().vars().iter().zip(expected.params().vars()) {
        let error = relative_error(actual, &expected);
        assert!(error <= TOLERANCE, "{what}, {name}: relative error {error:.1e}");
    }
}

#[test]
fn several_ranks_train_as_one_does() {
    // Without a size, each rank chooses its own micro-batches: 4 and 3 samples on two ranks, 2, 2, 2 and 1 on
    // four.
    for micro_batch_size in [Some(2), Some(3), None] {
        let train = |devices| {
            let model = conv_lstm();
            Trainer::new(TrainerConfig { micro_batch_size, ..config(devices, 4) })
                .optimizer(sgd())
                .fit(&model, &Data::new(Blobs { samples: 20 }))
                .unwrap();
            model
        };
        let alone = train(1);
        for devices in [2, 4] {
            assert_same_weights(&format!("{devices} ranks of {micro_batch_size:?}"), &train(devices), &alone);
        }
    }
}

#[test]
fn dropout_is_the_same_and_so_is_a_stream() {
    // A dropout mask is a function of the micro-batch, whichever rank has it. Augmentation is a function of
    // the sample.
    let stream = || Data::stream(PointStream { samples: 20 });
    for data in [points as fn() -> Data<Tensors>, stream] {
        let train = |devices| {
            let model = Dropped::model(3);
            Trainer::new(config(devices, 7)).optimizer(sgd()).fit(&model, &data()).unwrap();
            model
        };
        let alone = train(1);
        // The epoch's last step has three micro-batches: with four or five ranks, some have none.
        for devices in [2, 3, 4, 5] {
            assert_same_weights(&format!("{devices} ranks"), &train(devices), &alone);
        }
    }
}

fn every_optimizer() -> [OptimizerConfig; 9] {
    let lr = 0.01;
    [
        AdamConfig { lr, ..Default::default() }.into(),
        AdamWConfig { lr, ..Default::default() }.into(),
        sgd().into(),
        OptimizerConfig::Rmsprop(RmspropConfig { lr, ..Default::default() }),
        OptimizerConfig::Adagrad(AdagradConfig { lr, ..Default::default() }),
        OptimizerConfig::Adadelta(AdadeltaConfig { lr, ..Default::default() }),
        OptimizerConfig::Adamax(MomentsConfig { lr, ..Default::default() }),
        OptimizerConfig::Nadam(MomentsConfig { lr, ..Default::default() }),
        OptimizerConfig::Radam(RadamConfig { lr, ..Default::default() }),
    ]
}

#[test]
fn the_first_gradients_are_one_ranks_for_every_optimizer_and_clipped_alike() {
    for (clip_norm, clip_value) in [(None, None), (Some(0.1), None), (None, Some(0.05))] {
        for optimizer in every_optimizer() {
            let gradients = |devices| {
                let gradients = Gradients::default();
                Trainer::new(TrainerConfig { clip_norm, clip_value, ..config(devices, 1) })
                    .optimizer(optimizer.clone())
                    .callback(gradients.clone())
                    .fit(&Dropped::model(3), &points())
                    .unwrap();
                gradients.0.lock().unwrap().remove(0)
            };
            let alone = gradients(1);
            for devices in [2, 4] {
                for (gradient, expected) in gradients(devices).iter().zip(&alone) {
                    let error = relative_error(gradient, expected);
                    assert!(error <= TOLERANCE, "{optimizer:?}, {devices} ranks: relative error {error:.1e}");
                }
            }
        }
    }
}

/// Trains each rank with its own trainer and model; returns the results of `look`.
fn each_rank<B: Batch, T: Send>(
    world_size: usize,
    trainer: impl Fn(usize) -> Trainer + Sync,
    model: impl Fn(usize) -> Model<B> + Sync,
    data: impl Fn() -> Data<B> + Sync,
    look: impl Fn(Result<Outcome>, &Model<B>) -> T + Sync,
) -> Vec<T> {
    let train = |ranks: Threads| {
        let (rank, model) = (ranks.rank(), model(ranks.rank()));
        look(trainer(rank).ranks(Arc::new(ranks)).fit(&model, &data()), &model)
    };
    let (ranks, train) = (Threads::new(world_size, Duration::from_secs(60)), &train);
    std::thread::scope(|scope| {
        let threads: Vec<_> = ranks.into_iter().map(|rank| scope.spawn(move || train(rank))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

#[test]
fn all_ranks_end_with_the_same_bits() {
    for optimizer in every_optimizer() {
        for world_size in [2, 4] {
            let trainer = |_| Trainer::new(config(1, 7)).optimizer(optimizer.clone());
            // Whatever values they start from, rank 0's are used.
            let model = |rank| Dropped::model(3 + rank as u64);
            let all = each_rank(world_size, trainer, model, points, |outcome, model| {
                assert_eq!(outcome.unwrap().progress.samples, 20 + 20 + 7);
                weights(model)
            });
            assert!(all.iter().all(|weights| *weights == all[0]), "{optimizer:?} on {world_size} ranks");
        }
    }
}

#[test]
fn the_events_and_the_metrics_are_one_ranks() {
    let run = |devices: usize| {
        let recorder = Recorder::default();
        let dir = tempfile::tempdir().unwrap();
        let outcome = Trainer::new(TrainerConfig { val_every: Some(Every::Steps(2)), ..config(devices, 7) })
            .optimizer(sgd())
            .average(Some(AverageConfig::Ema(EmaConfig { decay: 0.5, ..Default::default() })))
            .callback(recorder.clone())
            .checkpoints(dir.path(), CheckpointConfig { every_steps: Some(3), ..Default::default() })
            .fit(&Dropped::model(3), &points())
            .unwrap();
        // The progress of a validation is reported for all ranks together, so less often.
        let mut lines = recorder.lines();
        lines.retain(|line| !line.starts_with("batch"));
        let folders = |dir: &Path| {
            let names = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name());
            let mut names: Vec<_> = names.collect();
            names.sort();
            names
        };
        (lines, recorder.checkpoints(), outcome, recorder.records(), folders(dir.path()))
    };
    let alone = run(1);
    for devices in [2, 4] {
        let several = run(devices);
        assert_eq!(several.0, alone.0);
        assert_eq!((several.1, several.4), (alone.1.clone(), alone.4.clone()));
        assert_eq!(several.2.progress, alone.2.progress);
        for (record, expected) in several.3.iter().zip(&alone.3) {
            let names = |record: &Record| record.metrics.keys().cloned().collect::<Vec<_>>();
            assert_eq!(names(record), names(expected));
            for (name, value) in &record.metrics {
                let expected = expected.metrics[name];
                assert!((value - expected).abs() <= 2e-6 * expected.abs(), "{name}: {value}, {expected}");
            }
        }
    }
}

/// Points that record which samples are requested.
struct Asked(Points, Arc<Mutex<Vec<usize>>>);

impl Dataset for Asked {
    type Batch = Tensors;

    fn len(&self) -> usize {
        self.0.len()
    }

    fn spec(&self) {}

    fn batch(&self, samples: &[Sample]) -> Result<Tensors> {
        self.1.lock().unwrap().extend(samples.iter().map(|sample| sample.index));
        self.0.batch(samples)
    }
}

#[test]
fn evaluation_counts_every_sample_once_for_any_number_of_ranks() {
    // 9 samples, 1, 2, 3 or 4 at once, also with fewer micro-batches than ranks; and only the first two
    // batches of 4.
    for micro in [1, 2, 3, 4] {
        for limit in [None, Some(Limit::Batches(2))] {
            let mean = |devices: usize| {
                let config = TrainerConfig {
                    batch_size: 4,
                    micro_batch_size: Some(micro),
                    limit_val_batches: limit,
                    sanity_val_batches: 0,
                    ..config(devices, 1)
                };
                let asked = Arc::<Mutex<Vec<usize>>>::default();
                let data = Data::new(Points { samples: 20 }).val(Asked(Points { samples: 9 }, asked.clone()));
                let outcome = Trainer::new(config).fit(&Dropped::model(3), &data).unwrap();
                let mut asked = asked.lock().unwrap().clone();
                asked.sort_unstable();
                (outcome.validation.unwrap()["mean_index"], asked)
            };
            let samples = limit.map_or(9, |_| 8);
            let expected = (samples - 1) as f64 / 2.;
            for devices in [1, 2, 3, 5] {
                let (mean, asked) = mean(devices);
                let all: Vec<usize> = (0..samples).collect();
                assert_eq!(asked, all, "batches of {micro} on {devices} ranks, {limit:?}");
                let error = (mean / expected - 1.).abs();
                assert!(
                    error < TOLERANCE,
                    "batches of {micro} on {devices} ranks, {limit:?}: off by {error:.1e}"
                );
            }
        }
    }
}

#[test]
fn a_run_goes_on_with_another_number_of_devices() {
    let train = |dir: &Path, devices, steps, resume: bool| {
        let model = Dropped::model(if resume { 77 } else { 3 });
        let ema = AverageConfig::Ema(EmaConfig { decay: 0.5, ..Default::default() });
        let mut trainer = Trainer::new(config(devices, steps))
            .optimizer(AdamConfig { lr: 0.01, ..Default::default() })
            .average(Some(ema))
            .checkpoints(dir, CheckpointConfig::default());
        if resume {
            trainer = trainer.resume(Checkpoint::load(&checkpoint::latest(dir).unwrap().unwrap()).unwrap());
        }
        let outcome = trainer.fit(&model, &points()).unwrap();
        assert_eq!(outcome.progress.step, steps);
        let load =
            |file: &str| candle_core::safetensors::load(dir.join("last").join(file), &Device::Cpu).unwrap();
        ["model.safetensors", "optimizer.safetensors", "average.safetensors"].map(load)
    };
    let whole = tempfile::tempdir().unwrap();
    let whole: [HashMap<String, Tensor>; 3] = train(whole.path(), 1, 8, false);
    for (first, second) in [(2, 4), (4, 1), (1, 3)] {
        let dir = tempfile::tempdir().unwrap();
        train(dir.path(), first, 5, false);
        let resumed = train(dir.path(), second, 8, true);
        for (resumed, whole) in resumed.iter().zip(&whole) {
            assert_eq!(resumed.len(), whole.len());
            for (name, expected) in whole {
                // Adam's first steps magnify rounding: a value divided by its own root can have any size.
                let error = relative_error(&resumed[name], expected);
                assert!(error < 1e-4, "{first} then {second}, {name}: relative error {error:.1e}");
            }
        }
    }
    // With the same number of devices, results are bit-identical.
    let [undisturbed, stopped] = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    let expected = train(undisturbed.path(), 3, 8, false);
    train(stopped.path(), 3, 5, false);
    for (resumed, expected) in train(stopped.path(), 3, 8, true).iter().zip(&expected) {
        for (name, expected) in expected {
            assert_eq!(relative_error(&resumed[name], expected), 0., "{name}");
        }
    }
}

#[test]
fn a_stop_that_one_rank_wants_stops_all_after_the_same_step() {
    /// Asks to stop on one rank.
    struct Stop(StopReason);
    impl Callback for Stop {
        fn on_step_end(&mut self, step: &StepEnd) -> Result<Flow> {
            Ok(if step.progress.step == 3 { Flow::Stop(self.0.clone()) } else { Flow::Continue })
        }
        fn on_every_rank(&self) -> bool {
            true
        }
    }
    for rank_that_stops in [0, 2] {
        for reason in [StopReason::Signal(15), StopReason::Callback("enough".into())] {
            let trainer = |rank| {
                let trainer = Trainer::new(config(1, 7));
                if rank == rank_that_stops { trainer.callback(Stop(reason.clone())) } else { trainer }
            };
            let stops = each_rank(
                3,
                trainer,
                |_| Dropped::model(3),
                points,
                |outcome, _| {
                    let Outcome { progress, reason, .. } = outcome.unwrap();
                    (progress.step, reason)
                },
            );
            for (rank, (step, heard)) in stops.into_iter().enumerate() {
                let asked = StopReason::Callback(format!("rank {rank_that_stops} asked for it"));
                let expected = match &reason {
                    StopReason::Callback(_) if rank != rank_that_stops => &asked,
                    own => own,
                };
                assert_eq!((step, &heard), (3, expected), "rank {rank}");
            }
        }
    }
}

#[test]
fn only_rank_0_has_callbacks_and_files() {
    let dir = tempfile::tempdir().unwrap();
    let recorders = [Recorder::default(), Recorder::default()];
    let trainer = |rank: usize| {
        let folder = dir.path().join(rank.to_string());
        let keep = CheckpointConfig::default();
        Trainer::new(config(1, 2)).callback(recorders[rank].clone()).checkpoints(folder, keep)
    };
    each_rank(2, trainer, |_| Dropped::model(3), points, |outcome, _| outcome.map(drop).unwrap());
    assert!(dir.path().join("0/last/manifest.json").exists() && !dir.path().join("1").exists());
    assert!(!recorders[0].lines().is_empty() && recorders[1].lines().is_empty());
}

/// Points whose sample 13 fails.
struct Bad {
    how: fn() -> Result<()>,
}

impl Dataset for Bad {
    type Batch = Tensors;
    fn len(&self) -> usize {
        20
    }
    fn spec(&self) {}
    fn batch(&self, samples: &[Sample]) -> Result<Tensors> {
        if samples.iter().any(|sample| sample.index == 13) {
            (self.how)()?;
        }
        Points { samples: 20 }.batch(samples)
    }
}

/// A module whose step calls a given function, to cause anything that a rank can encounter.
struct Steps(Tensor, fn(&Tensors, &Step) -> Result<()>);

impl Steps {
    fn model(meet: fn(&Tensors, &Step) -> Result<()>) -> Model<Tensors> {
        Model::new(move |vb: VarBuilder| Ok(Self(vb.get(4, "w")?, meet)), 0, &Device::Cpu).unwrap()
    }
}

impl Module for Steps {
    type Batch = Tensors;

    fn training_step(&self, batch: &Tensors, step: &mut Step) -> Result<Tensor> {
        (self.1)(batch, step)?;
        Ok(batch.0[0].broadcast_mul(&self.0)?.sum(1)?.mean_all()?)
    }
}

/// Whether a micro-batch holds sample 13, which only one rank has.
fn holds_13(batch: &Tensors) -> bool {
    batch.0[2].to_dtype(DType::F32).unwrap().to_vec1::<f32>().unwrap().contains(&13.)
}

#[test]
fn a_rank_that_fails_ends_all_and_is_named() {
    let error = |model: &Model<Tensors>, data: Data<Tensors>, devices| {
        let config = TrainerConfig { micro_batch_size: Some(1), ..config(devices, 3) };
        Trainer::new(config).fit(model, &data).unwrap_err().to_string()
    };
    let unreadable = || Err(candlepower::Error::msg("the disk is gone"));
    for devices in [1, 2, 4] {
        let data = Data::new(Bad { how: unreadable });
        let text = error(&Dropped::model(3), data, devices);
        assert!(text.ends_with("cannot read sample 13: the disk is gone"), "{devices} devices: {text}");
    }
    let panics = |batch: &Tensors, step: &Step| {
        assert!(!(step.is_training() && holds_13(batch)), "sample 13 is unlucky");
        Ok(())
    };
    let text = error(&Steps::model(panics), points(), 4);
    assert!(text.contains("it panicked: sample 13 is unlucky"), "{text}");
    // An error on all ranks is reported like that of a single one.
    let config = |devices| TrainerConfig { precision: Precision::Bf16Mixed, ..config(devices, 1) };
    let wrong = |devices| {
        let mut trainer = Trainer::new(config(devices));
        trainer.fit(&Dropped::model(3), &points()).unwrap_err().to_string()
    };
    assert_eq!(wrong(2), wrong(1));
}

#[test]
fn a_rank_that_hangs_is_named() {
    let hangs = |batch: &Tensors, step: &Step| {
        if step.is_training() && holds_13(batch) {
            std::thread::sleep(Duration::from_secs(4));
        }
        Ok(())
    };
    let config = TrainerConfig { micro_batch_size: Some(1), batch_size: 20, ..config(4, 1) };
    let distributed = DistributedConfig { hang_timeout: Some(Duration::from_secs(2)), ..Default::default() };
    let mut trainer = Trainer::new(config).distributed(distributed);
    let error = trainer.fit(&Steps::model(hangs), &points()).unwrap_err().to_string();
    assert!(error.ends_with("failed: it hangs: the others have waited for 2s"), "{error}");
}

#[test]
fn ranks_that_would_train_something_else_are_refused_before_the_first_step() {
    let errors = |trainer: &(dyn Fn(usize) -> Trainer + Sync),
                  model: &(dyn Fn(usize) -> Model<Tensors> + Sync)| {
        each_rank(2, trainer, model, points, |outcome, _| outcome.unwrap_err().to_string())
    };
    let batch = |rank| Trainer::new(TrainerConfig { batch_size: 7 + rank, ..config(1, 1) });
    for error in errors(&batch, &|_| Dropped::model(3)) {
        let expected = "rank 1 is configured differently from rank 0: it has `batch_size: 8,`, rank 0 has `batch_size: 7,`.";
        assert!(error.starts_with(expected), "{error}");
    }
    let model = |rank| if rank == 1 { Steps::model(|_, _| Ok(())) } else { Dropped::model(3) };
    for error in errors(&|_| Trainer::new(config(1, 1)), &model) {
        let expected =
            "it has `parameter `w` of shape [4]`, rank 0 has `parameter `first.weight` of shape [8, 4]`";
        assert!(error.contains(expected), "{error}");
    }
}

#[test]
fn a_loss_that_is_not_a_number_on_one_rank_stops_all_before_the_weights_move() {
    struct Poisoned(Tensor);
    impl Module for Poisoned {
        type Batch = Tensors;
        fn training_step(&self, batch: &Tensors, step: &mut Step) -> Result<Tensor> {
            let loss = batch.0[0].broadcast_mul(&self.0)?.sum(1)?.mean_all()?;
            Ok(if step.is_training() && holds_13(batch) { (loss * f64::NAN)? } else { loss })
        }
    }
    let run = |devices| {
        let model = Model::new(|vb: VarBuilder| Ok(Poisoned(vb.get(4, "w")?)), 0, &Device::Cpu).unwrap();
        let config = TrainerConfig { micro_batch_size: Some(1), ..config(devices, 9) };
        let error = Trainer::new(config).optimizer(sgd()).fit(&model, &points()).unwrap_err();
        assert!(weights(&model).iter().all(|(_, values)| values.iter().all(|x| x.is_finite())));
        error.to_string()
    };
    let alone = run(1);
    assert!(alone.contains("the loss of micro-batch"), "{alone}");
    for devices in [2, 4] {
        assert_eq!(run(devices), alone);
    }
}

#[test]
fn an_overflow_on_one_rank_is_one_for_all() {
    /// Its gradient is far above fp16's largest number if the loss scale is large, in only one micro-batch.
    struct Steep(Tensor);
    impl Module for Steep {
        type Batch = Tensors;
        fn training_step(&self, batch: &Tensors, _: &mut Step) -> Result<Tensor> {
            let factor = if holds_13(batch) { 1024. } else { 1. };
            Ok(((&self.0 * 1.)?.to_dtype(DType::F32)?.sum_all()? * factor)?)
        }
    }
    let run = |devices| {
        let build = |vb: VarBuilder| Ok(Steep(vb.get(4, "w")?));
        let model = Model::with_precision(build, 0, &Device::Cpu, Precision::Fp16Mixed).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let config = TrainerConfig {
            micro_batch_size: Some(1),
            precision: Precision::Fp16Mixed,
            sanity_val_batches: 0,
            ..config(devices, 4)
        };
        let outcome = Trainer::new(config)
            .optimizer(SgdConfig { lr: 1e-3, ..Default::default() })
            .checkpoints(dir.path(), CheckpointConfig::default())
            .fit(&model, &Data::new(Points { samples: 20 }))
            .unwrap();
        let scale = Checkpoint::load(&dir.path().join("last")).unwrap().state().loss_scale.unwrap();
        (outcome.progress, scale, weights(&model))
    };
    let (progress, scale, weights) = run(1);
    assert!(scale.scale < 65536., "the test overflows nowhere");
    for devices in [2, 4] {
        let several = run(devices);
        assert_eq!((several.0, several.1), (progress, scale));
        for ((_, actual), (_, expected)) in several.2.iter().zip(&weights) {
            assert!(actual.iter().zip(expected).all(|(a, b)| (a - b).abs() <= 1e-6 * b.abs()));
        }
    }
}

#[test]
fn optimizers_take_turns_on_several_ranks_too() {
    let train = |devices| {
        let model = Dropped::model(3);
        let turn = |name: &str| NamedOptimizer {
            name: name.into(),
            params: format!("{name}.*"),
            ..NamedOptimizer::single(sgd().into(), Vec::new())
        };
        Trainer::new(config(devices, 5))
            .optimizers(vec![turn("first"), turn("second")])
            .fit(&model, &points())
            .unwrap();
        model
    };
    let alone = train(1);
    for devices in [2, 4] {
        assert_same_weights(&format!("{devices} ranks"), &train(devices), &alone);
    }
}

#[test]
fn a_parameter_without_gradient_is_refused_by_name_also_where_a_rank_has_no_samples() {
    struct Unused([Tensor; 3]);
    impl Module for Unused {
        type Batch = Tensors;
        fn training_step(&self, batch: &Tensors, _: &mut Step) -> Result<Tensor> {
            let [lonely, large, small] = &self.0;
            let used = (batch.0[0].mean_all()? * (large.sum_all()? + small.sum_all()?)?)?;
            Ok((used + lonely.detach().mean_all()?)?)
        }
    }
    let build = |vb: VarBuilder| Ok(Unused([vb.get(4, "lonely")?, vb.get(5, "large")?, vb.get(1, "small")?]));
    let model = Model::new(build, 0, &Device::Cpu).unwrap();
    // One micro-batch for two or three ranks; with two, the second owns `lonely` and `small`.
    for (devices, distributed, all) in
        [(3, DistributedConfig::default(), 3), (2, sharded(), 2), (3, sharded(), 1)]
    {
        let config = TrainerConfig { batch_size: 2, ..config(devices, 1) };
        let error = Trainer::new(config).distributed(distributed).fit(&model, &points()).unwrap_err();
        let (error, expected) =
            (error.to_string(), format!("no gradient reaches 1 of {all} parameters: lonely\n"));
        assert!(error.contains(&expected), "{devices} ranks: {error}");
    }
}

fn sharded() -> DistributedConfig {
    DistributedConfig { shard: Shard::Optimizer, ..Default::default() }
}

#[test]
fn a_sharded_optimizer_gives_the_same_bits_and_needs_its_share_of_memory() {
    /// Records how many bytes of optimizer state its rank has.
    #[derive(Clone, Default)]
    struct Bytes(Arc<Mutex<Vec<usize>>>);
    impl Callback for Bytes {
        fn on_fit_start(&mut self, plan: &Plan) -> Result<()> {
            self.0.lock().unwrap().push(plan.optimizer_bytes);
            Ok(())
        }
        fn on_every_rank(&self) -> bool {
            true
        }
    }
    let groups = || {
        let group = |params: &str, lr| candlepower::optim::ParamGroup {
            params: params.into(),
            lr,
            ..Default::default()
        };
        vec![group("first.*", Some(0.02))]
    };
    for optimizer in every_optimizer() {
        let run = |distributed: &DistributedConfig| {
            let bytes = Bytes::default();
            let trainer = |_| {
                Trainer::new(config(1, 5))
                    .optimizer_with_groups(optimizer.clone(), groups())
                    .distributed(distributed.clone())
                    .callback(bytes.clone())
            };
            let all = each_rank(
                2,
                trainer,
                |_| Dropped::model(3),
                points,
                |outcome, model| {
                    outcome.map(drop).unwrap();
                    weights(model)
                },
            );
            let bytes = bytes.0.lock().unwrap().clone();
            (all, bytes)
        };
        let (whole, shared) = (run(&DistributedConfig::default()), run(&sharded()));
        assert_eq!(whole.0, shared.0, "{optimizer:?}");
        // Together as much as one rank had; 32 + 8 and 8 + 1 numbers are as even as whole tensors can be
        // divided. (NAdam has one more number for each.)
        let one = whole.1[0];
        assert_eq!((whole.1[1], shared.1.iter().sum::<usize>()), (one, one), "{optimizer:?}");
        assert!(shared.1.iter().max().unwrap() * 49 <= one * 40, "{optimizer:?}");
    }
    // The tutorial's module is divided more evenly.
    let bytes = Bytes::default();
    let trainer = |_| Trainer::new(config(1, 1)).distributed(sharded()).callback(bytes.clone());
    let blobs = || Data::new(Blobs { samples: 8 });
    each_rank(2, trainer, |_| conv_lstm(), blobs, |outcome, _| outcome.map(drop).unwrap());
    let all = 2 * 4 * conv_lstm().params().count();
    let largest = *bytes.0.lock().unwrap().iter().max().unwrap();
    assert!(largest as f64 <= 0.55 * all as f64, "{largest} of {all} bytes on one rank");
}

#[test]
fn ranks_that_share_the_optimizer_compute_with_all_new_weights_in_half_precision() {
    for optimizer in every_optimizer() {
        let run = |distributed: DistributedConfig| {
            let precision = Precision::Bf16Mixed;
            let config = TrainerConfig { precision, ..config(1, 3) };
            let trainer = |_| {
                let trainer = Trainer::new(config.clone()).optimizer(optimizer.clone());
                trainer.distributed(distributed.clone())
            };
            let model = |_| {
                let (config, spec) =
                    (ConvLstmConfig { hidden: 2, ..Default::default() }, Blobs { samples: 1 }.spec());
                let build = move |vb: VarBuilder| ConvLstm::build(&config, &spec, vb);
                Model::with_precision(build, 1, &Device::Cpu, precision).unwrap()
            };
            let data = || Data::new(Blobs { samples: 8 });
            each_rank(2, trainer, model, data, |outcome, model| {
                outcome.map(drop).unwrap();
                weights(model)
            })
        };
        assert_eq!(run(DistributedConfig::default()), run(sharded()), "{optimizer:?}");
    }
}

#[test]
fn ranks_that_share_the_optimizer_clip_alike_and_show_gradients_to_who_wants_them() {
    /// Looks at the gradients of every second step.
    #[derive(Clone, Default)]
    struct Sometimes(Arc<Mutex<Vec<usize>>>);
    impl Callback for Sometimes {
        fn wants_gradients(&self, step: u64) -> bool {
            step.is_multiple_of(2)
        }
        fn on_step_end(&mut self, step: &StepEnd) -> Result<Flow> {
            self.0.lock().unwrap().push(step.gradients.len());
            Ok(Flow::Continue)
        }
    }
    for (clip_norm, clip_value) in [(Some(0.1), None), (None, Some(0.05))] {
        let train = |devices, distributed: DistributedConfig| {
            let (gradients, model) = (Gradients::default(), Dropped::model(3));
            Trainer::new(TrainerConfig { clip_norm, clip_value, ..config(devices, 3) })
                .optimizer(sgd())
                .distributed(distributed)
                .callback(gradients.clone())
                .fit(&model, &points())
                .unwrap();
            (model, gradients.0.lock().unwrap().clone())
        };
        let (alone, expected) = train(1, DistributedConfig::default());
        // Callbacks see clipped gradients.
        for gradients in &expected {
            let all = gradients.iter().map(|x| x.flatten_all().unwrap()).collect::<Vec<_>>();
            let all = Tensor::cat(&all, 0).unwrap().to_vec1::<f32>().unwrap();
            match clip_norm {
                Some(max) => {
                    let norm = all.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt();
                    assert!((norm / max - 1.).abs() < 1e-4, "{norm}");
                }
                None => assert_eq!(all.iter().fold(0f32, |max, x| max.max(x.abs())), 0.05),
            }
        }
        for devices in [2, 5] {
            let (model, gradients) = train(devices, sharded());
            assert_same_weights(&format!("{devices} ranks"), &model, &alone);
            for (gradient, expected) in gradients.iter().flatten().zip(expected.iter().flatten()) {
                let error = relative_error(gradient, expected);
                assert!(error <= TOLERANCE, "{devices} ranks: relative error {error:.1e}");
            }
            assert_eq!(gradients.concat().len(), expected.concat().len());
        }
    }
    let sometimes = Sometimes::default();
    let trainer = Trainer::new(config(2, 4)).distributed(sharded()).callback(sometimes.clone());
    { trainer }.fit(&Dropped::model(3), &points()).unwrap();
    assert_eq!(*sometimes.0.lock().unwrap(), [0, 4, 0, 4]);
}

#[test]
fn a_gradient_that_is_no_number_is_named_whoever_owns_its_parameter() {
    struct Broken([Tensor; 2]);
    impl Module for Broken {
        type Batch = Tensors;
        fn training_step(&self, batch: &Tensors, _: &mut Step) -> Result<Tensor> {
            // The root of zero has no slope.
            let [good, bad] = &self.0;
            let zero = (bad - bad.detach())?.sqr()?.sqrt()?.sum_all()?;
            Ok(((batch.0[0].mean_all()? * good.sum_all()?)? + zero)?)
        }
    }
    let build = |vb: VarBuilder| Ok(Broken([vb.get(4, "good")?, vb.get(3, "bad")?]));
    for devices in [1, 2] {
        let model = Model::new(build, 0, &Device::Cpu).unwrap();
        let mut trainer = Trainer::new(config(devices, 3)).distributed(sharded());
        let why = trainer.fit(&model, &points()).unwrap_err().to_string();
        assert!(why.contains("the gradient of `bad` is not finite"), "{devices} ranks: {why}");
    }
}

#[test]
fn processes_that_only_devices_connect_are_refused_on_the_cpu_before_anything_is_written() {
    let environment = Environment {
        starter: Starter::Torch,
        rank: 0,
        world_size: 2,
        local_rank: Some(0),
        local_size: Some(1),
        master: None,
    };
    let config = concat!(env!("CARGO_MANIFEST_DIR"), "/../configs/quickstart.toml");
    let dir = tempfile::tempdir().unwrap();
    let sets = [format!("run.dir={:?}", dir.path()), "trainer.accelerator=\"cpu\"".into()];
    let registry = Registry::default().module::<ConvLstm>("conv_lstm").dataset::<MovingMnist>("moving_mnist");
    let experiment = Experiment::read(&registry, config.as_ref(), &sets).unwrap();
    let experiment = experiment.ranks(Arc::new(Processes::new(&environment))).unwrap();
    let error = experiment.train(&Resume::No, Vec::new()).err().unwrap().to_string();
    let expected = "error: --set:1:21: `trainer.accelerator`: these processes communicate through NCCL";
    assert!(format!("error: {error}").starts_with(expected), "{error}");
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
}

/// Ranks that report when gradients are sent.
struct Watched {
    ranks: Arc<Threads>,
    on_their_way: crossbeam_channel::Sender<usize>,
}

impl Collective for Watched {
    fn rank(&self) -> usize {
        self.ranks.rank()
    }
    fn world_size(&self) -> usize {
        self.ranks.world_size()
    }
    fn all_reduce(&self, flat: &Tensor) -> Result<Tensor> {
        self.ranks.all_reduce(flat)
    }
    fn start_all_reduce(self: Arc<Self>, flat: Tensor) -> Result<Started> {
        self.on_their_way.send(flat.elem_count()).unwrap();
        self.ranks.clone().start_all_reduce(flat)
    }
    fn reduce_scatter(&self, flat: &Tensor) -> Result<Tensor> {
        self.ranks.reduce_scatter(flat)
    }
    fn all_gather(&self, part: &Tensor) -> Result<Tensor> {
        self.ranks.all_gather(part)
    }
    fn broadcast(&self, flat: &Tensor) -> Result<Tensor> {
        self.ranks.broadcast(flat)
    }
    fn barrier(&self) -> Result<()> {
        self.ranks.barrier()
    }
    fn abort(&self, why: &str) {
        self.ranks.abort(why);
    }
}

#[test]
fn gradients_are_on_their_way_while_the_backward_pass_goes_on() {
    /// More than a bucket of 25 MB.
    const LARGE: usize = 7 << 20;
    /// Blocks the backward pass until the gradients of the last layer have been sent.
    struct Gate(crossbeam_channel::Receiver<usize>);
    impl candle_core::CustomOp1 for Gate {
        fn name(&self) -> &'static str {
            "gate"
        }
        fn cpu_fwd(
            &self,
            storage: &candle_core::CpuStorage,
            layout: &candle_core::Layout,
        ) -> candle_core::Result<(candle_core::CpuStorage, candle_core::Shape)> {
            Ok((storage.clone(), layout.shape().clone()))
        }
        fn bwd(&self, _: &Tensor, _: &Tensor, d: &Tensor) -> candle_core::Result<Option<Tensor>> {
            match self.0.recv_timeout(Duration::from_secs(60)) {
                Ok(LARGE) => Ok(Some(d.clone())),
                other => candle_core::bail!("expected the last layer's gradients, got {other:?}"),
            }
        }
    }
    struct Layers {
        first: Tensor,
        last: Tensor,
        /// Only the last micro-batch may send anything.
        gate: crossbeam_channel::Receiver<usize>,
        batches: std::sync::atomic::AtomicUsize,
    }
    impl Module for Layers {
        type Batch = Tensors;
        fn training_step(&self, batch: &Tensors, step: &mut Step) -> Result<Tensor> {
            let inner = (batch.0[0].mean_all()? * self.first.sum_all()?)?;
            if !step.is_training() {
                return Ok(inner);
            }
            let is_last = self.batches.fetch_add(1, std::sync::atomic::Ordering::Relaxed) % 2 == 1;
            assert!(self.gate.is_empty(), "gradients left before they were complete");
            let inner = if is_last { inner.apply_op1(Gate(self.gate.clone()))? } else { inner };
            Ok((inner + self.last.mean_all()?)?)
        }
    }
    let ranks = Threads::new(2, Duration::from_secs(60));
    std::thread::scope(|scope| {
        for ranks in ranks {
            scope.spawn(|| {
                let (on_their_way, gate) = crossbeam_channel::unbounded();
                let seen = gate.clone();
                let build = move |vb: VarBuilder| {
                    let (first, last) = (vb.get(3, "first")?, vb.get(LARGE, "last")?);
                    let batches = std::sync::atomic::AtomicUsize::new(0);
                    Ok(Layers { first, last, gate: gate.clone(), batches })
                };
                let model = Model::new(build, 0, &Device::Cpu).unwrap();
                // Two micro-batches per rank.
                let config = TrainerConfig { batch_size: 8, ..config(1, 1) };
                let ranks = Arc::new(Watched { ranks: Arc::new(ranks), on_their_way });
                Trainer::new(config).optimizer(sgd()).ranks(ranks).fit(&model, &points()).unwrap();
                assert_eq!(seen.try_iter().collect::<Vec<_>>(), [3]);
            });
        }
    });
}

#[test]
fn a_sharded_run_saves_everything_and_goes_on_with_any_number_of_devices() {
    goes_on_with_any_number_of_devices(AdamConfig { lr: 0.01, ..Default::default() }.into());
    // Keeps one number in addition to state that is as large as a parameter.
    goes_on_with_any_number_of_devices(OptimizerConfig::Nadam(Default::default()));
}

fn goes_on_with_any_number_of_devices(optimizer: OptimizerConfig) {
    let train = |dir: &Path, devices, distributed: DistributedConfig, steps, resume: bool| {
        let mut trainer = Trainer::new(config(devices, steps))
            .optimizer(optimizer.clone())
            .distributed(distributed)
            .checkpoints(dir, CheckpointConfig { every_steps: Some(2), ..Default::default() });
        if resume {
            trainer = trainer.resume(Checkpoint::load(&checkpoint::latest(dir).unwrap().unwrap()).unwrap());
        }
        trainer.fit(&Dropped::model(3), &points()).unwrap();
        ["model.safetensors", "optimizer.safetensors"]
            .map(|file| std::fs::read(dir.join("last").join(file)).unwrap())
    };
    let plain = DistributedConfig::default;
    let whole = tempfile::tempdir().unwrap();
    let expected = train(whole.path(), 2, plain(), 8, false);
    for (first, second) in [(sharded(), sharded()), (sharded(), plain()), (plain(), sharded())] {
        let dir = tempfile::tempdir().unwrap();
        train(dir.path(), 2, first, 5, false);
        assert_eq!(train(dir.path(), 2, second, 8, true), expected);
    }
    // On three devices, and then on one: equal up to rounding.
    let dir = tempfile::tempdir().unwrap();
    train(dir.path(), 3, sharded(), 5, false);
    train(dir.path(), 1, sharded(), 8, true);
    let load = |dir: &Path| {
        candle_core::safetensors::load(dir.join("last/model.safetensors"), &Device::Cpu).unwrap()
    };
    let (resumed, whole) = (load(dir.path()), load(whole.path()));
    for (name, expected) in &whole {
        assert!(relative_error(&resumed[name], expected) < 1e-4, "{name}");
    }
}

/// Learns a slope, and keeps the mean of its inputs and the number of micro-batches.
struct Running {
    slope: Tensor,
    mean: Buffer,
    count: Buffer,
}

impl Running {
    fn model() -> Model<Tensors> {
        let build = |vb: VarBuilder| {
            let (mean, count) = ("mean", "count");
            Ok(Self {
                slope: vb.get(4, "slope")?,
                mean: Buffer::new(1, mean, 0., DType::F32, &vb)?,
                count: Buffer::new(1, count, 0., DType::I64, &vb)?,
            })
        };
        Model::new(build, 0, &Device::Cpu).unwrap()
    }
}

impl Module for Running {
    type Batch = Tensors;

    fn training_step(&self, batch: &Tensors, step: &mut Step) -> Result<Tensor> {
        if step.is_training() {
            self.mean.set(&((self.mean.value() * 0.5)? + (batch.0[2].mean_keepdim(0)? * 0.5)?)?)?;
            self.count.set(&(self.count.value() + 1.)?)?;
        }
        Ok(batch.0[0].broadcast_mul(&self.slope)?.sum(1)?.mean_all()?)
    }
}

#[test]
fn buffers_are_the_ranks_mean_by_samples_and_the_same_everywhere() {
    // 5 samples in order, batches of 3 and 2, micro-batches of 2: in the first step, 0 and 1 on the first
    // rank, 2 on the second, none on the third; in the second step, 3 and 4 on the first rank only.
    let config = TrainerConfig {
        batch_size: 3,
        overfit_batches: Some(Limit::Batches(2)),
        sanity_val_batches: 0,
        ..config(1, 2)
    };
    let data = || Data::new(Points { samples: 5 });
    let all = each_rank(
        3,
        |_| Trainer::new(config.clone()),
        |_| Running::model(),
        data,
        |outcome, model| {
            outcome.map(drop).unwrap();
            let buffers = model.params().buffers();
            (buffers[0].1.to_vec1::<f32>().unwrap()[0], buffers[1].1.to_vec1::<i64>().unwrap()[0])
        },
    );
    // After the first step 0.25 and 1, combined to (2 * 0.25 + 1) / 3 = 0.5, from which the second continues:
    // (0.5 + 3.5) / 2.
    assert_eq!(all, [(2., 2); 3]);
}
