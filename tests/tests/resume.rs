//! A run that was interrupted anywhere ends bit-identically to one that was not: weights, optimizer,
//! averages, callbacks' state, metrics and the order of samples.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use candlepower::callbacks::{EarlyStopping, EarlyStoppingConfig};
use candlepower::checkpoint::{Checkpoint, CheckpointConfig};
use candlepower::optim::{AverageConfig, EmaConfig, NamedOptimizer, ParamGroup, RmspropConfig, SwaConfig};
use candlepower::precision::Precision;
use candlepower::prelude::*;
use candlepower::schedule::{OneCycle, Plateau, Schedule};
use candlepower::trainer::{Every, Limit, Outcome};
use candlepower_tests::points::{Dropped, PointStream, Points};
use candlepower_tests::recorder::Recorder;

/// 10 samples in batches of 4: steps of 4, 4 and 2 per epoch, and 8 steps in total, so a run ends in
/// mid-epoch.
const STEPS: u64 = 8;

fn config() -> TrainerConfig {
    TrainerConfig { batch_size: 4, max_steps: Some(STEPS), log_every: 1, ..Default::default() }
}

fn data(workers: usize) -> Data<Tensors> {
    Data::new(Points { samples: 10 }).val(Points { samples: 5 }).workers(workers)
}

fn stream(workers: usize) -> Data<Tensors> {
    Data { val: data(0).val, ..Data::stream(PointStream { samples: 10 }) }.workers(workers)
}

/// A trainer for a configuration, with its data and precision.
struct Case {
    name: &'static str,
    precision: Precision,
    data: fn(usize) -> Data<Tensors>,
    trainer: fn(TrainerConfig) -> Trainer,
}

fn early_stopping() -> EarlyStopping {
    // It never stops these runs, but its state changes with every validation.
    let config = EarlyStoppingConfig { patience: 100, min_delta: 1e-3, ..Default::default() };
    EarlyStopping::watch(&config).unwrap()
}

fn one_cycle() -> Schedule {
    Schedule::OneCycle(OneCycle::new(0.1, STEPS))
}

fn cases() -> Vec<Case> {
    fn case(name: &'static str, trainer: fn(TrainerConfig) -> Trainer) -> Case {
        Case { name, precision: Precision::Full, data, trainer }
    }
    vec![
        case("adam and dropout", Trainer::new),
        case("accumulation, with validation by the clock inside the window", |config| {
            let clock = Some(Every::Time(Duration::ZERO));
            Trainer::new(TrainerConfig { micro_batch_size: Some(1), val_every: clock, ..config })
        }),
        case("one cycle", |config| Trainer::new(config).schedule(one_cycle())),
        case("one cycle of nadam's product", |config| {
            Trainer::new(config).schedule(one_cycle()).optimizer(OptimizerConfig::Nadam(Default::default()))
        }),
        case("one cycle of a momentum that rmsprop has not of its own", |config| {
            let rmsprop = RmspropConfig { centered: true, ..Default::default() };
            Trainer::new(config).schedule(one_cycle()).optimizer(OptimizerConfig::Rmsprop(rmsprop))
        }),
        case("a schedule of epochs", |config| {
            Trainer::new(config).schedule(Schedule::Exponential { gamma: 0.5 }.per_epoch())
        }),
        case("plateau", |config| {
            let config = TrainerConfig { val_every: Some(Every::Steps(1)), ..config };
            let plateau = Plateau { factor: 0.5, patience: 0, threshold: 0.5, ..Default::default() };
            Trainer::new(config).plateau(Some(plateau))
        }),
        case("moving average, early stopping, clipping", |config| {
            let config = TrainerConfig { val_every: Some(Every::Steps(1)), clip_norm: Some(0.1), ..config };
            let ema = EmaConfig { decay: 0.7, every_steps: 2, start_step: 1 };
            Trainer::new(config).average(Some(AverageConfig::Ema(ema))).callback(early_stopping())
        }),
        case("stochastic weight averaging", |config| {
            let swa = SwaConfig { start_step: 2, every_steps: 2 };
            Trainer::new(config).average(Some(AverageConfig::Swa(swa)))
        }),
        case("groups and two optimizers", |config| {
            let turn = |name: &str, optimizer: OptimizerConfig, groups| NamedOptimizer {
                name: name.into(),
                params: format!("{name}.*"),
                ..NamedOptimizer::single(optimizer, groups)
            };
            let bias = ParamGroup { params: "*.bias".into(), lr: Some(0.1), ..Default::default() };
            let sgd = SgdConfig { lr: 0.05, momentum: 0.9, ..Default::default() };
            let turns = vec![
                turn("first", sgd.into(), vec![bias]),
                NamedOptimizer {
                    every: 3,
                    ..turn("second", AdamWConfig { lr: 0.01, ..Default::default() }.into(), Vec::new())
                },
            ];
            Trainer::new(TrainerConfig { micro_batch_size: Some(3), ..config }).optimizers(turns)
        }),
        case("groups that are frozen at first", |config| {
            let group = |params: &str, unfreeze| ParamGroup {
                params: params.into(),
                unfreeze: Some(unfreeze),
                ..Default::default()
            };
            let groups = vec![group("first.weight", Every::Steps(2)), group("first.bias", Every::Epochs(1.))];
            Trainer::new(config).optimizer_with_groups(AdamConfig { lr: 0.01, ..Default::default() }, groups)
        }),
        case("limited epochs", |config| {
            Trainer::new(TrainerConfig { limit_train_batches: Some(Limit::Batches(2)), ..config })
        }),
        case("the same few batches", |config| {
            Trainer::new(TrainerConfig { overfit_batches: Some(Limit::Batches(2)), ..config })
        }),
        Case { data: stream, ..case("a stream", Trainer::new) },
        Case { precision: Precision::Bf16Mixed, ..case("bf16", Trainer::new) },
        Case {
            precision: Precision::Fp16Mixed,
            ..case("fp16, micro-batches, an average", |config| {
                let ema = EmaConfig { decay: 0.7, every_steps: 2, start_step: 1 };
                Trainer::new(TrainerConfig { micro_batch_size: Some(3), ..config })
                    .optimizer(SgdConfig { lr: 0.05, momentum: 0.9, ..Default::default() })
                    .average(Some(AverageConfig::Ema(ema)))
            })
        },
    ]
}

/// Every file of a checkpoint, byte for byte.
fn files(checkpoint: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = std::fs::read_dir(checkpoint).unwrap().map(Result::unwrap);
    entries.map(|e| (e.file_name().into_string().unwrap(), std::fs::read(e.path()).unwrap())).collect()
}

fn checkpoints() -> CheckpointConfig {
    CheckpointConfig { every_steps: Some(1), keep_last: 99, ..Default::default() }
}

/// The training metrics of steps after `step`, in order, as bits. `mean_index` shows the order of samples.
fn metrics(recorder: &Recorder, step: u64) -> Vec<(u64, String, u64)> {
    let records = recorder.records().into_iter();
    let later = records.filter(|record| record.split == Split::Train && record.step > step);
    later.flat_map(|r| r.metrics.into_iter().map(move |(name, x)| (r.step, name, x.to_bits()))).collect()
}

#[test]
fn a_run_goes_on_from_any_step_to_the_same_bits() {
    for Case { name, precision, data, trainer } in cases() {
        let config = || TrainerConfig { precision, ..config() };
        let (dir, whole) = (tempfile::tempdir().unwrap(), Recorder::default());
        trainer(config())
            .seed(5)
            .callback(whole.clone())
            .checkpoints(dir.path(), checkpoints())
            .fit(&Dropped::logging_epochs(1, precision), &data(2))
            .unwrap();
        let expected = files(&dir.path().join(STEPS.to_string()));
        for step in 1..STEPS {
            let checkpoint = Checkpoint::load(&dir.path().join(step.to_string())).unwrap();
            let (again, resumed) = (tempfile::tempdir().unwrap(), Recorder::default());
            // Another process starts from other initial values and may use other workers.
            let outcome = trainer(config())
                .seed(5)
                .callback(resumed.clone())
                .checkpoints(again.path(), CheckpointConfig { every_steps: Some(STEPS), ..checkpoints() })
                .resume(checkpoint)
                .fit(&Dropped::logging_epochs(77, precision), &data((step % 3) as usize));
            assert_eq!(outcome.unwrap().progress.step, STEPS, "{name}");
            assert_eq!(
                metrics(&resumed, 0),
                metrics(&whole, step),
                "{name}, resumed at {step}: metrics differ"
            );
            let actual = files(&again.path().join(STEPS.to_string()));
            assert!(actual.keys().eq(expected.keys()), "{name}");
            let differing = expected.iter().filter(|(file, bytes)| **bytes != actual[*file]);
            let differing: Vec<&str> = differing.map(|(file, _)| file.as_str()).collect();
            assert!(differing.is_empty(), "{name}, resumed at step {step}: {differing:?} differ");
        }
    }
}

/// Fails among a step's micro-batches, like a process that is killed there.
struct Broken(Points);

impl Dataset for Broken {
    type Batch = Tensors;

    fn len(&self) -> usize {
        self.0.len()
    }

    fn spec(&self) {}

    fn batch(&self, samples: &[Sample]) -> Result<Tensors> {
        // Sample 3 of the second epoch is somewhere among a step's micro-batches.
        if samples.iter().any(|sample| sample.epoch == 1 && sample.index == 3) {
            return Err(Error::msg("the disk is gone"));
        }
        self.0.batch(samples)
    }
}

#[test]
fn a_run_that_died_in_mid_accumulation_goes_on_to_the_same_bits() {
    let micro = TrainerConfig { micro_batch_size: Some(1), ..config() };
    let run = |dir: &Path, data: Data<Tensors>, resume: Option<Checkpoint>| {
        let trainer = Trainer::new(micro.clone()).seed(5).checkpoints(dir, checkpoints());
        let mut trainer = resume.into_iter().fold(trainer, Trainer::resume);
        trainer.fit(&Dropped::model(1), &data).map(drop)
    };
    let (whole, died) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    run(whole.path(), data(1), None).unwrap();
    let broken = Data { val: data(0).val, ..Data::new(Broken(Points { samples: 10 })) };
    let error = run(died.path(), broken, None).unwrap_err().to_string();
    assert_eq!(error, "cannot read sample 3: the disk is gone");
    let last = candlepower::checkpoint::latest(died.path()).unwrap().unwrap();
    run(died.path(), data(1), Some(Checkpoint::load(&last).unwrap())).unwrap();
    let step = STEPS.to_string();
    let (whole, died) = (files(&whole.path().join(&step)), files(&died.path().join(&step)));
    for file in ["model.safetensors", "optimizer.safetensors"] {
        assert!(whole[file] == died[file], "{file} differs");
    }
}

#[test]
fn a_run_that_failed_goes_on_to_the_same_bits_in_every_combination() {
    for Case { name, precision, data: of, trainer } in cases() {
        if of(0).train.len().is_none() {
            continue; // A stream has no samples by number, so none can be bad.
        }
        let run = |dir: &Path, data: Data<Tensors>, resume: Option<Checkpoint>| {
            let config = TrainerConfig { precision, ..config() };
            // Checkpoints are saved only after validations and after an error.
            let trainer = trainer(config).seed(5).checkpoints(dir, CheckpointConfig::default());
            let seed = if resume.is_some() { 77 } else { 1 };
            let mut trainer = resume.into_iter().fold(trainer, Trainer::resume);
            trainer.fit(&Dropped::logging_epochs(seed, precision), &data).map(drop)
        };
        let (whole, failed) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        run(whole.path(), data(0), None).unwrap();
        let broken = Data { val: data(0).val, ..Data::new(Broken(Points { samples: 10 })) };
        if run(failed.path(), broken.workers(0), None).is_ok() {
            assert_eq!(name, "the same few batches", "the bad sample was not read");
            continue;
        }
        let last = candlepower::checkpoint::latest(failed.path()).unwrap().unwrap();
        let last = Checkpoint::load(&last).unwrap();
        // In the second epoch.
        assert!((2..6).contains(&last.state().progress.step), "{name}");
        run(failed.path(), data(0), Some(last)).unwrap();
        let step = STEPS.to_string();
        let (whole, failed) = (files(&whole.path().join(&step)), files(&failed.path().join(&step)));
        let differing: Vec<&String> = whole
            .iter()
            .filter(|(file, bytes)| failed.get(*file) != Some(bytes))
            .map(|(file, _)| file)
            .collect();
        assert!(differing.is_empty(), "{name}: {differing:?} differ");
    }
}

/// Remembers the number of steps that it has seen.
struct Counter(u64);

impl Callback for Counter {
    fn on_step_end(&mut self, _: &StepEnd) -> Result<Flow> {
        self.0 += 1;
        Ok(Flow::Continue)
    }

    fn name(&self) -> &'static str {
        "counter"
    }

    fn state(&self) -> Option<serde_json::Value> {
        Some(self.0.into())
    }

    fn restore(&mut self, state: serde_json::Value) -> Result<()> {
        self.0 = state.as_u64().unwrap();
        Ok(())
    }
}

#[test]
fn callbacks_of_one_name_remember_each_their_own() {
    let dir = tempfile::tempdir().unwrap();
    let run = |max_steps, counters: [u64; 2], resume: Option<Checkpoint>| {
        let trainer = Trainer::new(TrainerConfig { max_steps: Some(max_steps), ..config() })
            .callback(Counter(counters[0]))
            .callback(Counter(counters[1]))
            .checkpoints(dir.path(), checkpoints());
        resume.into_iter().fold(trainer, Trainer::resume).fit(&Dropped::model(1), &data(1)).unwrap();
        let checkpoint = Checkpoint::load(&dir.path().join(max_steps.to_string())).unwrap();
        serde_json::to_string(&checkpoint.state().callbacks).unwrap()
    };
    assert_eq!(run(2, [0, 100], None), r#"{"counter":2,"counter.2":102}"#);
    let two = Checkpoint::load(&dir.path().join("2")).unwrap();
    assert_eq!(run(5, [7, 7], Some(two)), r#"{"counter":5,"counter.2":105}"#);
}

#[test]
fn a_worse_validation_after_resuming_is_not_the_best() {
    let dir = tempfile::tempdir().unwrap();
    let run = |max_steps, resume: Option<Checkpoint>| {
        // Training diverges: the first validation stays the best.
        let config =
            TrainerConfig { max_steps: Some(max_steps), val_every: Some(Every::Steps(1)), ..config() };
        let sgd = SgdConfig { lr: 3., ..Default::default() };
        let trainer =
            Trainer::new(config).optimizer(sgd).checkpoints(dir.path(), CheckpointConfig::default());
        resume.into_iter().fold(trainer, Trainer::resume).fit(&Dropped::model(1), &data(1)).unwrap();
        std::fs::read_link(dir.path().join("best")).unwrap()
    };
    assert_eq!(run(3, None), Path::new("1"));
    assert_eq!(run(6, Some(Checkpoint::load(&dir.path().join("3")).unwrap())), Path::new("1"));
}

/// Remembers numbers.
#[derive(Clone)]
struct Numbers(std::sync::Arc<std::sync::Mutex<Vec<f64>>>);

impl Callback for Numbers {
    fn name(&self) -> &'static str {
        "numbers"
    }

    fn state(&self) -> Option<serde_json::Value> {
        Some(self.0.lock().unwrap().clone().into())
    }

    fn restore(&mut self, state: serde_json::Value) -> Result<()> {
        *self.0.lock().unwrap() = serde_json::from_value(state).unwrap();
        Ok(())
    }
}

#[test]
fn numbers_come_back_to_the_last_bit() {
    // Some fast JSON readers get the last bit of the first number wrong.
    let mut numbers = vec![1.8632589340209962, f64::MIN_POSITIVE, 1. / 3.];
    numbers.extend((1..2000).map(|i| (f64::from(i) * 0.7).sin() / f64::from(i)));
    let dir = tempfile::tempdir().unwrap();
    let run = |max_steps, held: &[f64], resume: Option<Checkpoint>| {
        let held = Numbers(std::sync::Arc::new(held.to_vec().into()));
        let trainer = Trainer::new(TrainerConfig { max_steps: Some(max_steps), ..config() })
            .callback(held.clone())
            .checkpoints(dir.path(), checkpoints());
        resume.into_iter().fold(trainer, Trainer::resume).fit(&Dropped::model(1), &data(1)).unwrap();
        let bits: Vec<u64> = held.0.lock().unwrap().iter().map(|x| x.to_bits()).collect();
        bits
    };
    let before = run(1, &numbers, None);
    let checkpoint = Checkpoint::load(&dir.path().join("1")).unwrap();
    assert!(before == run(2, &[], Some(checkpoint)));
}

/// Trains in a folder, resuming from the checkpoint of a step if one is given.
fn go_on(dir: &Path, from: Option<u64>, keep_last: usize, trainer: Trainer) -> Outcome {
    let every = CheckpointConfig { keep_last, every_steps: Some(1), ..Default::default() };
    let checkpoint = from.map(|step| Checkpoint::load(&dir.join(step.to_string())).unwrap());
    let mut trainer = checkpoint.into_iter().fold(trainer.checkpoints(dir, every), Trainer::resume);
    trainer.fit(&Dropped::model(1), &data(1)).unwrap()
}

fn up_to(max_steps: u64) -> TrainerConfig {
    TrainerConfig { max_steps: Some(max_steps), ..config() }
}

#[test]
fn a_longer_run_does_not_know_where_a_shorter_one_ended() {
    let (whole, halves) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    // Epochs have 3 steps: the shorter run validates after step 4, where the longer one does not.
    let train = |dir: &Path, steps, resumes| {
        let plateau = Plateau { factor: 0.5, patience: 0, threshold: 0.5, ..Default::default() };
        let mut trainer = Trainer::new(up_to(steps))
            .plateau(Some(plateau))
            .callback(early_stopping())
            .checkpoints(dir, CheckpointConfig::default());
        if resumes {
            trainer = trainer.resume(Checkpoint::load(&dir.join("4")).unwrap());
        }
        trainer.fit(&Dropped::model(1), &data(1)).unwrap()
    };
    train(whole.path(), STEPS, false);
    assert!(train(halves.path(), 4, false).validation.is_some());
    train(halves.path(), STEPS, true);
    let of = |dir: &Path| (files(&dir.join("8")), Checkpoint::load(&dir.join("8")).unwrap().state().clone());
    let ((whole, a), (halves, b)) = (of(whole.path()), of(halves.path()));
    for file in ["model.safetensors", "optimizer.safetensors"] {
        assert!(whole[file] == halves[file], "{file} differs");
    }
    assert_eq!((a.lr_scale, a.plateau, a.callbacks), (b.lr_scale, b.plateau, b.callbacks));
}

#[test]
fn the_best_validation_may_be_the_one_that_a_run_ended_with() {
    let dir = tempfile::tempdir().unwrap();
    let trainer = |steps, lr| {
        let config = TrainerConfig { val_every: Some(Every::Steps(3)), ..up_to(steps) };
        Trainer::new(config).optimizer(SgdConfig { lr, ..Default::default() })
    };
    go_on(dir.path(), None, 1, trainer(4, 0.05));
    let best = || std::fs::read_link(dir.path().join("best")).unwrap();
    assert_eq!(best(), Path::new("4"));
    // Training diverges.
    go_on(dir.path(), Some(4), 1, trainer(STEPS, 3.));
    assert_eq!(best(), Path::new("4"));
    assert!(dir.path().join("4/manifest.json").exists());
}

#[test]
fn a_run_that_goes_back_keeps_its_own_checkpoints_and_the_old_ones_under_other_names() {
    let dir = tempfile::tempdir().unwrap();
    go_on(dir.path(), None, 9, Trainer::new(up_to(6)));
    // Left behind by a process that was killed while writing.
    std::fs::create_dir(dir.path().join(".7.tmp")).unwrap();
    go_on(dir.path(), Some(2), 2, Trainer::new(up_to(4)));
    let mut names: Vec<String> = std::fs::read_dir(dir.path())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name != "best")
        .collect();
    names.sort();
    let best = std::fs::read_link(dir.path().join("best")).unwrap();
    names.retain(|name| Path::new(name) != best || ["3", "4"].contains(&name.as_str()));
    assert_eq!(names, ["3", "3.old", "4", "4.old", "5.old", "6.old", "last", "validations.json"]);
    assert_eq!(std::fs::read_link(dir.path().join("last")).unwrap(), Path::new("4"));
    assert_eq!(candlepower::checkpoint::latest(dir.path()).unwrap(), Some(dir.path().join("4")));
    // Going back once more keeps what was set aside before.
    go_on(dir.path(), Some(3), 9, Trainer::new(up_to(4)));
    assert!(dir.path().join("4.old").exists() && dir.path().join("4.old2").exists());
    // A training from the start, in a folder that is already in use.
    go_on(dir.path(), None, 9, Trainer::new(up_to(1)));
    assert_eq!(candlepower::checkpoint::latest(dir.path()).unwrap(), Some(dir.path().join("1")));
}

#[test]
fn a_run_that_has_ended_ends_again_without_another_validation_in_its_logs() {
    let dir = tempfile::tempdir().unwrap();
    let first = go_on(dir.path(), None, 9, Trainer::new(up_to(4)));
    let recorder = Recorder::default();
    let again = go_on(dir.path(), Some(4), 9, Trainer::new(up_to(4)).callback(recorder.clone()));
    assert_eq!((again.progress, again.validation), (first.progress, first.validation));
    assert!(recorder.records().is_empty(), "{:?}", recorder.records());
}

#[test]
fn a_stream_goes_on_behind_the_samples_that_it_has_given_whatever_the_batch_size() {
    let dir = tempfile::tempdir().unwrap();
    let run = |batch_size, max_steps, from: Option<u64>| {
        let recorder = Recorder::default();
        let config = TrainerConfig { batch_size, max_steps: Some(max_steps), ..config() };
        let trainer = Trainer::new(config).checkpoints(dir.path(), checkpoints()).callback(recorder.clone());
        let checkpoint = from.map(|step| Checkpoint::load(&dir.path().join(step.to_string())).unwrap());
        checkpoint.into_iter().fold(trainer, Trainer::resume).fit(&Dropped::model(1), &stream(1)).unwrap();
        recorder.train("mean_index")
    };
    // Samples 0 to 3.
    assert_eq!(run(4, 1, None), [1.5]);
    // 4 and 5, then 6 and 7.
    assert_eq!(run(2, 3, Some(1)), [4.5, 6.5]);
}

#[test]
fn a_stream_cannot_go_on_behind_its_end() {
    let dir = tempfile::tempdir().unwrap();
    let run = |batch_size, limit, from: Option<u64>| {
        let config = TrainerConfig {
            batch_size,
            max_steps: Some(if from.is_some() { 4 } else { 2 }),
            limit_train_batches: Some(Limit::Batches(limit)),
            ..config()
        };
        let trainer = Trainer::new(config).checkpoints(dir.path(), checkpoints());
        let checkpoint = from.map(|step| Checkpoint::load(&dir.path().join(step.to_string())).unwrap());
        let mut trainer = checkpoint.into_iter().fold(trainer, Trainer::resume);
        trainer.fit(&Dropped::model(1), &stream(1)).map(drop).map_err(|error| error.to_string())
    };
    // 8 of 10 samples.
    run(4, 3, None).unwrap();
    assert_eq!(
        run(2, 3, Some(2)).unwrap_err(),
        "the checkpoint saw 8 samples of its epoch, which `limit_train_batches` now ends after 6"
    );
    run(2, 9, Some(2)).unwrap();
}

#[test]
fn a_run_whose_last_validation_never_came_has_it_when_it_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    go_on(dir.path(), None, 9, Trainer::new(up_to(4)));
    // A run that goes back and reaches the same end validates there.
    let recorder = Recorder::default();
    go_on(dir.path(), Some(2), 9, Trainer::new(up_to(4)).callback(recorder.clone()));
    assert!(recorder.records().iter().any(|record| record.split == Split::Val && record.step == 4));
    // As if it had been killed while validating, after its checkpoint.
    std::fs::remove_file(dir.path().join("validations.json")).unwrap();
    let recorder = Recorder::default();
    go_on(dir.path(), Some(4), 9, Trainer::new(up_to(4)).callback(recorder.clone()));
    let validated: Vec<u64> = recorder.records().iter().map(|record| record.step).collect();
    assert_eq!(validated, [4]);
}

#[test]
fn an_epoch_cannot_be_made_shorter_than_what_was_done_of_it() {
    let dir = tempfile::tempdir().unwrap();
    go_on(dir.path(), None, 9, Trainer::new(up_to(2)));
    let limited = TrainerConfig { limit_train_batches: Some(Limit::Batches(1)), ..up_to(4) };
    let checkpoint = Checkpoint::load(&dir.path().join("2")).unwrap();
    let error = Trainer::new(limited).resume(checkpoint).fit(&Dropped::model(1), &data(1)).unwrap_err();
    assert!(error.to_string().contains("`limit_train_batches` that it was made with"), "{error}");
}
