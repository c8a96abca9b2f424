//! The exact order of events of fit, validate, test and predict, and where every kind of stop ends.
#![allow(clippy::unwrap_used)]

use std::time::Duration;

use candlepower::checkpoint::{Checkpoint, CheckpointConfig};
use candlepower::prelude::*;
use candlepower::trainer::{Every, Limit};
use candlepower_tests::points::{Dropped, PointStream, Points, weights};
use candlepower_tests::recorder::Recorder;

/// 7 samples in batches of 3: steps of 3, 3 and 1.
fn config() -> TrainerConfig {
    TrainerConfig {
        batch_size: 3,
        max_epochs: Some(2),
        log_every: 2,
        sanity_val_batches: 1,
        ..Default::default()
    }
}

fn data() -> Data<Tensors> {
    Data::new(Points { samples: 7 }).val(Points { samples: 4 }).test(Points { samples: 8 })
}

fn fit(config: TrainerConfig, data: &Data<Tensors>) -> (Recorder, candlepower::trainer::Outcome) {
    let recorder = Recorder::default();
    let outcome = Trainer::new(config).callback(recorder.clone()).fit(&Dropped::model(1), data).unwrap();
    (recorder, outcome)
}

/// Compares events with the expected ones, which are written in one line.
#[track_caller]
fn assert_events(actual: &[String], expected: &str) {
    let expected: Vec<&str> = expected.split(',').map(str::trim).filter(|event| !event.is_empty()).collect();
    assert_eq!(actual, expected);
}

#[test]
fn the_order_of_events() {
    let all = [
        (
            config(),
            "start 0..6, batch 1/1, step 1, step 2, train metrics 2, step 3, batch 1/2, batch 2/2, val metrics 3, \
             step 4, train metrics 4, step 5, step 6, train metrics 6, batch 1/2, batch 2/2, val metrics 6, end 6",
        ),
        // In the middle of an epoch; the end is validated although no validation is due.
        (
            TrainerConfig { val_every: Some(Every::Steps(2)), max_steps: Some(3), ..config() },
            "start 0..3, batch 1/1, step 1, step 2, train metrics 2, batch 1/2, batch 2/2, val metrics 2, step 3, \
             batch 1/2, batch 2/2, val metrics 3, end 3",
        ),
        (
            TrainerConfig {
                val_every: Some(Every::Epochs(2.)),
                log_every: 9,
                sanity_val_batches: 0,
                ..config()
            },
            "start 0..6, step 1, step 2, step 3, step 4, step 5, step 6, batch 1/2, batch 2/2, val metrics 6, end 6",
        ),
        // By the clock, within a step's micro-batches: after the first of step 1, before the other two.
        (
            TrainerConfig {
                val_every: Some(Every::Time(Duration::ZERO)),
                micro_batch_size: Some(1),
                max_steps: Some(1),
                limit_val_batches: Some(Limit::Batches(1)),
                sanity_val_batches: 0,
                ..config()
            },
            // A validation batch is also split into micro-batches.
            "start 0..1, batch 1/3, batch 2/3, batch 3/3, val metrics 0, step 1, batch 1/3, batch 2/3, batch 3/3, \
             val metrics 1, end 1",
        ),
        (
            TrainerConfig { limit_train_batches: Some(Limit::Share(0.7)), log_every: 9, ..config() },
            "start 0..4, batch 1/1, step 1, step 2, batch 1/2, batch 2/2, val metrics 2, \
             step 3, step 4, batch 1/2, batch 2/2, val metrics 4, end 4",
        ),
        (
            TrainerConfig { limit_val_batches: Some(Limit::Batches(0)), log_every: 9, ..config() },
            "start 0..6, step 1, step 2, step 3, step 4, step 5, step 6, end 6",
        ),
        (
            TrainerConfig { fast_dev_run: 1, ..config() },
            "start 0..1, step 1, train metrics 1, batch 1/1, val metrics 1, end 1",
        ),
        // Validates on the training data itself, only on its first batches.
        (
            TrainerConfig { overfit_batches: Some(Limit::Batches(1)), log_every: 9, ..config() },
            "start 0..2, batch 1/1, step 1, batch 1/1, val metrics 1, step 2, batch 1/1, val metrics 2, end 2",
        ),
    ];
    for (config, expected) in all {
        assert_events(&fit(config, &data()).0.lines(), expected);
    }
}

#[test]
fn a_stream_has_epochs_but_no_known_end() {
    let stream = || Data { val: data().val, ..Data::stream(PointStream { samples: 7 }) };
    let (recorder, outcome) =
        fit(TrainerConfig { log_every: 9, sanity_val_batches: 0, ..config() }, &stream());
    assert_events(
        &recorder.lines(),
        "start 0..?, step 1, step 2, step 3, batch 1/2, batch 2/2, val metrics 3, \
         step 4, step 5, step 6, batch 1/2, batch 2/2, val metrics 6, end 6",
    );
    assert_eq!((outcome.progress.epoch, outcome.progress.samples), (2, 14));
    let config = TrainerConfig { limit_train_batches: Some(Limit::Share(0.5)), ..config() };
    let error = Trainer::new(config).fit(&Dropped::model(1), &stream()).unwrap_err().to_string();
    assert_eq!(error, "`limit_train_batches`: a stream's length is not known: expected a number of batches");
}

#[test]
fn validate_test_and_predict_tell_their_events() {
    let recorder = Recorder::default();
    let config = TrainerConfig {
        limit_test_batches: Some(Limit::Batches(2)),
        limit_predict_batches: Some(Limit::Share(0.7)),
        ..config()
    };
    let mut trainer = Trainer::new(config).callback(recorder.clone());
    let (model, data) = (Dropped::model(1), data());
    trainer.validate(&model, &data, Split::Val).unwrap();
    let test = trainer.validate(&model, &data, Split::Test).unwrap();
    assert_eq!(trainer.predict_split(&model, &data, Split::Test).unwrap(), 2);
    assert_events(
        &recorder.lines(),
        "batch 1/2, batch 2/2, val metrics 0, batch 1/2, batch 2/2, test metrics 0, \
         prediction 0 [3 1], prediction 1 [3 1]",
    );
    // Samples 0 to 5, each once.
    assert_eq!(test["mean_index"], 2.5);
    let nothing = Data::new(Points { samples: 3 });
    let error = trainer.validate(&model, &nothing, Split::Test).unwrap_err().to_string();
    assert_eq!(error, "there is no test data");
}

#[test]
fn every_kind_of_stop_counts_right() {
    let stopped = |at, config: TrainerConfig| {
        let recorder = Recorder::stopping_at(at);
        let outcome = Trainer::new(config).callback(recorder).fit(&Dropped::model(1), &data()).unwrap();
        let progress = outcome.progress;
        ([progress.step, progress.epoch, progress.step_in_epoch, progress.samples], outcome.reason)
    };
    let callback = || StopReason::Callback("seen enough".into());
    let ends = |steps, epochs| TrainerConfig { max_steps: steps, max_epochs: epochs, ..config() };
    assert_eq!(stopped(99, ends(Some(4), None)), ([4, 1, 1, 10], StopReason::Finished));
    assert_eq!(stopped(99, ends(None, Some(2))), ([6, 2, 0, 14], StopReason::Finished));
    // Whichever comes first.
    assert_eq!(stopped(99, ends(Some(5), Some(1))), ([3, 1, 0, 7], StopReason::Finished));
    assert_eq!(stopped(2, ends(None, Some(2))), ([2, 0, 2, 6], callback()));
    // Not before this many steps, or epochs.
    assert_eq!(stopped(2, TrainerConfig { min_steps: 4, ..config() }), ([4, 1, 1, 10], callback()));
    assert_eq!(stopped(2, TrainerConfig { min_epochs: 1, ..config() }), ([3, 1, 0, 7], callback()));
    let no_time = TrainerConfig { max_time: Some(Duration::ZERO), min_steps: 2, ..config() };
    let (progress, reason) = stopped(99, no_time);
    assert_eq!((progress, reason), ([2, 0, 2, 6], StopReason::Callback("`max_time` of 0s is over".into())));
}

#[test]
fn checkpoints_are_told_of_and_named_by_their_step() {
    let dir = tempfile::tempdir().unwrap();
    let recorder = Recorder::default();
    let checkpoints = CheckpointConfig { every_steps: Some(2), keep_last: 9, ..Default::default() };
    Trainer::new(config())
        .checkpoints(dir.path(), checkpoints)
        .callback(recorder.clone())
        .fit(&Dropped::model(1), &data())
        .unwrap();
    // 2, 4 and 6 are due; 3 was the best validation at that time.
    assert_eq!(recorder.checkpoints(), [2, 3, 4, 6]);
    let dev_run = TrainerConfig { fast_dev_run: 2, ..config() };
    let none = tempfile::tempdir().unwrap();
    let mut trainer = Trainer::new(dev_run).checkpoints(none.path(), CheckpointConfig::default());
    trainer.fit(&Dropped::model(1), &data()).unwrap();
    assert_eq!(std::fs::read_dir(none.path()).unwrap().count(), 0, "a try-out writes nothing");
}

#[test]
fn looking_does_not_change_training() {
    let train = |config: TrainerConfig| {
        let model = Dropped::model(1);
        Trainer::new(config).fit(&model, &data()).unwrap();
        weights(&model)
    };
    let plain = train(TrainerConfig { sanity_val_batches: 0, val_every: Some(Every::Steps(99)), ..config() });
    assert_eq!(plain, train(config()));
    assert_eq!(plain, train(TrainerConfig { val_every: Some(Every::Steps(1)), log_every: 1, ..config() }));
    assert_eq!(plain, train(TrainerConfig { nan_guard: false, ..config() }));
    // Also between the micro-batches of a step.
    let micro = TrainerConfig { micro_batch_size: Some(1), val_every: Some(Every::Steps(99)), ..config() };
    let clock = TrainerConfig { val_every: Some(Every::Time(Duration::ZERO)), ..micro.clone() };
    assert_eq!(train(micro), train(clock));
}

#[test]
fn overfitting_sees_the_same_samples_in_every_epoch() {
    let config = TrainerConfig {
        overfit_batches: Some(Limit::Batches(2)),
        log_every: 1,
        sanity_val_batches: 0,
        ..config()
    };
    let (recorder, _) = fit(config, &data());
    assert_eq!(recorder.train("mean_index"), [1., 4., 1., 4.]);
    let validations = recorder.records().into_iter().filter(|record| record.split == Split::Val);
    assert!(validations.map(|record| record.metrics["mean_index"]).all(|mean| mean == 2.5));
}

/// A loss that is NaN from some step on.
struct Poisoned(candlepower::candle_nn::Linear);

impl Module for Poisoned {
    type Batch = Tensors;

    fn training_step(&self, batch: &Tensors, step: &mut Step) -> Result<Tensor> {
        let loss = self.0.forward(&batch.0[0])?.sqr()?.mean_all()?;
        Ok(if step.is_training() && step.global_step() >= 4 { (loss * f64::NAN)? } else { loss })
    }
}

#[test]
fn a_loss_that_is_not_a_number_ends_the_run_before_it_harms_the_weights() {
    let dir = tempfile::tempdir().unwrap();
    let build = |vb: VarBuilder| Ok(Poisoned(candlepower::candle_nn::linear(4, 1, vb)?));
    let model = Model::new(build, 0, &Device::Cpu).unwrap();
    let recorder = Recorder::default();
    let mut trainer = Trainer::new(config())
        .checkpoints(dir.path(), CheckpointConfig::default())
        .callback(recorder.clone());
    let why = trainer.fit(&model, &data()).unwrap_err().to_string();
    assert!(why.starts_with("in step 5 the loss is NaN; the weights are still those of step 4."), "{why}");
    assert_eq!(recorder.checkpoints(), [3, 4]);
    assert_eq!(recorder.lines().last().unwrap(), "end 4");
    assert!(weights(&model).iter().all(|(_, values)| values.iter().all(|x| x.is_finite())));
}

#[test]
fn a_last_batch_that_is_smaller_is_left_out_where_asked_for() {
    let config = TrainerConfig { drop_last: true, log_every: 1, sanity_val_batches: 0, ..config() };
    let (recorder, outcome) = fit(config.clone(), &data());
    // 7 samples in batches of 3: two per epoch; validation uses all samples.
    let progress = outcome.progress;
    assert_eq!((progress.step, progress.epoch, progress.samples), (4, 2, 12));
    let validations = recorder.records().into_iter().filter(|record| record.split == Split::Val);
    assert!(validations.map(|record| record.metrics["mean_index"]).all(|mean| mean == 1.5));
    let error = |data: &Data<Tensors>| {
        Trainer::new(config.clone()).fit(&Dropped::model(1), data).unwrap_err().to_string()
    };
    assert_eq!(
        error(&Data::new(Points { samples: 2 })),
        "`drop_last`: it would leave nothing: there are 2 samples, fewer than a batch"
    );
    assert_eq!(
        error(&Data::stream(PointStream { samples: 7 })),
        "`drop_last`: a stream's length is not known: expected false"
    );
}

/// A stream of points that panics at the fifth of an epoch.
struct Panicking;

impl Stream for Panicking {
    type Batch = Tensors;
    type Item = usize;

    fn spec(&self) {}

    fn items(&self, pass: candlepower::data::Pass) -> Result<candlepower::data::Items<usize>> {
        let PointStream { samples } = PointStream { samples: 7 };
        let broken = |i: usize| if i == 4 { panic!("a line that cannot be read") } else { Ok(i) };
        Ok(match pass.epoch {
            1 => Box::new((0..samples).map(broken)),
            _ => Box::new((0..samples).map(Ok)),
        })
    }

    fn batch(&self, items: Vec<usize>, samples: &[Sample]) -> Result<Tensors> {
        PointStream { samples: 7 }.batch(items, samples)
    }
}

#[test]
fn a_stream_that_panics_ends_training_and_loses_nothing_in_silence() {
    for workers in [1, 3] {
        let recorder = Recorder::default();
        let data = Data { val: data().val, ..Data::stream(Panicking) }.workers(workers);
        let mut trainer =
            Trainer::new(TrainerConfig { batch_size: 2, ..config() }).callback(recorder.clone());
        let error = trainer.fit(&Dropped::model(1), &data).unwrap_err().to_string();
        assert_eq!(error, "the data stream panicked; its message is above");
        // 4 steps of the first epoch, and those of the second before the fifth sample, or one fewer because
        // samples are prefetched.
        let steps = recorder.lines().iter().filter(|line| line.starts_with("step")).count();
        assert!((4..=6).contains(&steps), "{steps}");
    }
}

#[test]
fn a_run_whose_time_is_over_takes_no_step_when_it_is_resumed() {
    let dir = tempfile::tempdir().unwrap();
    let run = |resume: Option<Checkpoint>| {
        let config = TrainerConfig { max_time: Some(Duration::from_nanos(1)), max_epochs: None, ..config() };
        let trainer = Trainer::new(config).checkpoints(dir.path(), CheckpointConfig::default());
        let outcome = resume.into_iter().fold(trainer, Trainer::resume).fit(&Dropped::model(1), &data());
        outcome.unwrap().progress.step
    };
    // The first run checks the clock after a step.
    assert_eq!(run(None), 1);
    assert_eq!(run(Some(Checkpoint::load(&dir.path().join("1")).unwrap())), 1);
}
