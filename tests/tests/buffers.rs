//! Buffers: part of a model's state, changed only by the steps that are taken.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use candlepower::checkpoint::{Checkpoint, CheckpointConfig};
use candlepower::optim::{AverageConfig, EmaConfig, NamedOptimizer};
use candlepower::precision::Precision;
use candlepower::prelude::*;
use candlepower::trainer::Every;
use candlepower_tests::normed::{CALM, Normed};
use candlepower_tests::points::Points;
use candlepower_tests::recorder::Recorder;

const STEPS: u64 = 6;

fn config(precision: Precision) -> TrainerConfig {
    TrainerConfig { batch_size: 4, max_steps: Some(STEPS), log_every: 1, precision, ..Default::default() }
}

fn data() -> Data<Tensors> {
    Data::new(Points { samples: 10 }).val(Points { samples: 5 })
}

/// The buffers by name, as numbers.
fn buffers<B: Batch>(model: &Model<B>) -> BTreeMap<String, Vec<f64>> {
    let values = |(name, var): (String, candlepower::candle_core::Var)| {
        (name, var.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1().unwrap())
    };
    model.params().buffers().into_iter().map(values).collect()
}

fn files(checkpoint: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = std::fs::read_dir(checkpoint).unwrap().map(Result::unwrap);
    entries.map(|e| (e.file_name().into_string().unwrap(), std::fs::read(e.path()).unwrap())).collect()
}

fn every_step() -> CheckpointConfig {
    CheckpointConfig { every_steps: Some(1), keep_last: 99, ..Default::default() }
}

#[test]
fn a_run_with_running_statistics_goes_on_to_the_same_bits() {
    let ema = || Some(AverageConfig::Ema(EmaConfig { decay: 0.5, ..Default::default() }));
    let cases: [(Precision, Option<usize>, Option<AverageConfig>); 4] = [
        (Precision::Full, None, None),
        (Precision::Full, Some(2), ema()),
        (Precision::Bf16Mixed, None, None),
        (Precision::Fp16Mixed, Some(2), ema()),
    ];
    for (precision, micro_batch_size, average) in cases {
        let trainer = |dir: &Path| {
            Trainer::new(TrainerConfig { micro_batch_size, ..config(precision) })
                .average(average.clone())
                .checkpoints(dir, every_step())
        };
        let whole = tempfile::tempdir().unwrap();
        trainer(whole.path()).fit(&Normed::model(1, precision, CALM), &data()).unwrap();
        for step in 1..STEPS {
            let again = tempfile::tempdir().unwrap();
            let checkpoint = Checkpoint::load(&whole.path().join(step.to_string())).unwrap();
            let model = Normed::model(77, precision, CALM);
            trainer(again.path()).resume(checkpoint).fit(&model, &data()).unwrap();
            let last = |dir: &Path| files(&dir.join(STEPS.to_string()));
            for (file, bytes) in last(whole.path()) {
                assert!(
                    bytes == last(again.path())[&file],
                    "{precision:?}, resumed at {step}: {file} differs"
                );
            }
        }
    }
}

#[test]
fn a_checkpoint_holds_them_under_pytorchs_names_and_types() {
    let dir = tempfile::tempdir().unwrap();
    let precision = Precision::Bf16Mixed;
    let mut trainer = Trainer::new(config(precision)).checkpoints(dir.path(), CheckpointConfig::default());
    let model = Normed::model(1, precision, CALM);
    trainer.fit(&model, &data()).unwrap();
    let saved =
        candle_core::safetensors::load(dir.path().join("last/model.safetensors"), &Device::Cpu).unwrap();
    let mut names: Vec<&str> = saved.keys().map(String::as_str).collect();
    names.sort();
    assert_eq!(
        names,
        [
            "first.bias",
            "first.weight",
            "norm.bias",
            "norm.num_batches_tracked",
            "norm.running_mean",
            "norm.running_var",
            "norm.weight",
            "second.bias",
            "second.weight"
        ]
    );
    assert_eq!(saved["norm.running_mean"].dtype(), DType::F32);
    assert_eq!(saved["norm.num_batches_tracked"].to_scalar::<i64>().unwrap(), STEPS as i64);
    // No optimizer keeps state for them, and they do not count as parameters.
    let optimizer =
        candle_core::safetensors::load(dir.path().join("last/optimizer.safetensors"), &Device::Cpu).unwrap();
    assert!(!optimizer.is_empty() && optimizer.keys().all(|name| !name.contains("running")));
    assert_eq!(model.params().count(), 4 * 8 + 8 + 8 + 8 + 8 + 1);
}

#[test]
fn evaluation_leaves_them_alone_and_reads_those_of_the_last_step() {
    let run = |val_every| {
        let recorder = Recorder::default();
        let dir = tempfile::tempdir().unwrap();
        let config = TrainerConfig { micro_batch_size: Some(2), val_every, ..config(Precision::Full) };
        let model = Normed::model(1, Precision::Full, CALM);
        Trainer::new(config)
            .callback(recorder.clone())
            .checkpoints(dir.path(), every_step())
            .fit(&model, &data())
            .unwrap();
        (buffers(&model), recorder, dir)
    };
    let (never, ..) = run(Some(Every::Steps(1000)));
    // With a time of zero a validation is always due, even between a step's micro-batches, whose first half
    // it must not see.
    let (always, recorder, dir) = run(Some(Every::Time(Duration::ZERO)));
    assert_eq!(never, always);
    assert_eq!(never["norm.num_batches_tracked"], [10.], "two epochs of steps of 4, 4 and 2 samples");
    let validations: Vec<_> =
        recorder.records().into_iter().filter(|r| r.split == Split::Val && r.step > 0).collect();
    assert!(validations.len() as u64 >= STEPS);
    for record in validations {
        let model = Normed::model(5, Precision::Full, CALM);
        let checkpoint = Checkpoint::load(&dir.path().join(record.step.to_string())).unwrap();
        checkpoint.restore_params(&model.params().state_dict()).unwrap();
        let mut trainer = Trainer::new(TrainerConfig { batch_size: 2, ..config(Precision::Full) });
        let metrics = trainer.validate(&model, &data(), Split::Val).unwrap();
        assert_eq!(metrics["loss"], record.metrics["loss"], "at step {}", record.step);
    }
}

#[test]
fn a_step_that_fp16_tries_again_changes_them_once() {
    let run = |steepness: f64| {
        let model = Normed::model(1, Precision::Fp16Mixed, steepness);
        let recorder = Recorder::default();
        Trainer::new(config(Precision::Fp16Mixed))
            .optimizer(SgdConfig { lr: 0.125 / steepness, ..Default::default() })
            .callback(recorder.clone())
            .fit(&model, &data())
            .unwrap();
        buffers(&model)
    };
    // The loss scale must fall many times before the first step is taken. Powers of two do not round.
    let (calm, steep) = (run(CALM), run(1048576.));
    assert_eq!(calm["norm.num_batches_tracked"], [STEPS as f64]);
    for (name, values) in calm {
        let off = values.iter().zip(&steep[&name]).map(|(a, b)| (a - b).abs()).fold(0., f64::max);
        assert!(off < 1e-3, "{name}: off by {off}");
    }
    assert_eq!(steep["norm.num_batches_tracked"], [STEPS as f64]);
}

#[test]
fn a_step_that_cannot_be_taken_leaves_them() {
    let model = Normed::model(1, Precision::Full, f64::NAN);
    let before = buffers(&model);
    let why = Trainer::new(config(Precision::Full)).fit(&model, &data()).unwrap_err().to_string();
    assert!(why.starts_with("in step 1 the loss is NaN"), "{why}");
    assert_eq!(buffers(&model), before);
}

#[test]
fn every_turn_of_an_optimizer_is_a_forward_pass_that_they_follow() {
    let turn = |name: &str, params: &str| NamedOptimizer {
        name: name.into(),
        params: params.into(),
        ..NamedOptimizer::single(SgdConfig { lr: 0.01, ..Default::default() }.into(), Vec::new())
    };
    let model = Normed::model(1, Precision::Full, CALM);
    let turns = vec![turn("below", "*r*t.*"), turn("above", "*e*o*nd.*"), turn("norm", "norm.*")];
    Trainer::new(config(Precision::Full)).optimizers(turns).fit(&model, &data()).unwrap();
    assert_eq!(buffers(&model)["norm.num_batches_tracked"], [3. * STEPS as f64]);
}

#[test]
fn averaged_weights_are_evaluated_with_the_buffers_of_training() {
    let dir = tempfile::tempdir().unwrap();
    let ema = AverageConfig::Ema(EmaConfig { decay: 0.9, ..Default::default() });
    let model = Normed::model(1, Precision::Full, CALM);
    let outcome = Trainer::new(config(Precision::Full))
        .average(Some(ema))
        .checkpoints(dir.path(), CheckpointConfig::default())
        .fit(&model, &data())
        .unwrap();
    let averages = candle_core::safetensors::load(dir.path().join("last/average.safetensors"), &Device::Cpu);
    assert!(averages.unwrap().keys().all(|name| !name.contains("running")));
    let fresh = Normed::model(2, Precision::Full, CALM);
    let checkpoint = Checkpoint::load(&dir.path().join("last")).unwrap();
    checkpoint.restore_for_evaluation(&fresh.params().state_dict()).unwrap();
    assert_eq!(buffers(&fresh), buffers(&model));
    let validated = Trainer::new(config(Precision::Full)).validate(&fresh, &data(), Split::Val).unwrap();
    assert_eq!(validated["loss"], outcome.validation.unwrap()["loss"]);
}

#[test]
fn the_finder_puts_them_back() {
    let model = Normed::model(1, Precision::Full, CALM);
    let before = buffers(&model);
    let find = candlepower::finder::LrFinderConfig { steps: 4, ..Default::default() };
    Trainer::new(config(Precision::Full)).find_lr(&model, &data(), &find).unwrap();
    assert_eq!(buffers(&model), before);
}
