//! Several optimizers that take turns, groups, averages and plateaus in a real training.
#![allow(clippy::unwrap_used)]

use std::time::Duration;

use candlepower::checkpoint::{Checkpoint, CheckpointConfig};
use candlepower::collective::{DistributedConfig, Shard};
use candlepower::optim::{AverageConfig, EmaConfig, NamedOptimizer, ParamGroup};
use candlepower::precision::Precision;
use candlepower::prelude::*;
use candlepower::schedule::Plateau;
use candlepower::trainer::Every;
use candlepower_tests::device;
use candlepower_tests::points::{Dropped, Points, weights};
use candlepower_tests::recorder::Recorder;

fn config(max_steps: u64) -> TrainerConfig {
    TrainerConfig {
        batch_size: 2,
        max_steps: Some(max_steps),
        log_every: 1,
        sanity_val_batches: 0,
        ..Default::default()
    }
}

fn data() -> Data<Tensors> {
    Data::new(Points { samples: 6 }).val(Points { samples: 5 })
}

fn sgd(lr: f64) -> OptimizerConfig {
    SgdConfig { lr, ..Default::default() }.into()
}

/// Two numbers that play against each other: `a` wants to be twice `b`, `b` wants to be `a` plus one.
struct Duel {
    a: Tensor,
    b: Tensor,
}

impl Module for Duel {
    type Batch = Tensors;

    fn training_step(&self, _: &Tensors, step: &mut Step) -> Result<Tensor> {
        let goal = match step.optimizer() {
            "a" => (&self.a - (&self.b * 2.)?)?,
            _ => ((&self.b - &self.a)? - 1.)?,
        };
        Ok((goal.sqr()? * 0.5)?.sum_all()?)
    }
}

#[test]
fn an_optimizer_may_take_its_turn_in_every_other_step() {
    for (micro_batch_size, devices) in [(None, 1), (Some(1), 1), (None, 2)] {
        let build = |vb: VarBuilder| {
            let start = |name, value| vb.get_with_hints(1, name, candlepower::candle_nn::Init::Const(value));
            Ok(Duel { a: start("a", 0.)?, b: start("b", 1.)? })
        };
        let turn = |name: &str, every| NamedOptimizer {
            name: name.into(),
            params: name.into(),
            every,
            ..NamedOptimizer::single(sgd(0.5), Vec::new())
        };
        let (model, heard, dir) =
            (Model::new(build, 0, &device()).unwrap(), Recorder::default(), tempfile::tempdir().unwrap());
        Trainer::new(TrainerConfig { micro_batch_size, devices, ..config(3) })
            .optimizers(vec![turn("a", 2), turn("b", 1)])
            .callback(heard.clone())
            .checkpoints(dir.path(), CheckpointConfig::default())
            .fit(&model, &Data::new(Points { samples: 6 }))
            .unwrap();
        // b: 1 -> 1 - 0.5 (1 - 0 - 1) = 1; a: 0 -> 0 - 0.5 (0 - 2) = 1, b: 1 -> 1 - 0.5 (1 - 1 - 1) = 1.5;
        // b: 1.5 -> 1.5 - 0.5 (1.5 - 1 - 1) = 1.75.
        let values: Vec<f32> = weights(&model).into_iter().flat_map(|(_, values)| values).collect();
        assert_eq!(values, [1., 1.75], "{micro_batch_size:?}, {devices}");
        let logs = |name: &str| -> Vec<u64> {
            let records = heard.records();
            records.iter().filter(|r| r.metrics.contains_key(name)).map(|r| r.step).collect()
        };
        assert_eq!((logs("loss/a"), logs("lr/b")), (vec![2], vec![1, 2, 3]));
        let state = Checkpoint::load(&dir.path().join("3")).unwrap().state().clone();
        assert_eq!((state.optimizer_steps["a"], state.optimizer_steps["b"]), (1, 3));
    }
    // If another optimizer sits out, nothing has moved before a gradient that is not finite.
    let build = |vb: VarBuilder| {
        let start = |name, value| vb.get_with_hints(1, name, candlepower::candle_nn::Init::Const(value));
        Ok(Duel { a: start("a", 0.)?, b: start("b", f64::INFINITY)? })
    };
    let turn = |name: &str, every| NamedOptimizer {
        name: name.into(),
        params: name.into(),
        every,
        ..NamedOptimizer::single(sgd(0.5), Vec::new())
    };
    let error = Trainer::new(config(3))
        .optimizers(vec![turn("a", 2), turn("b", 1)])
        .fit(&Model::new(build, 0, &device()).unwrap(), &Data::new(Points { samples: 6 }));
    let error = error.unwrap_err().to_string();
    assert!(error.contains("; the weights are still those of step 0"), "{error}");
    let rare = NamedOptimizer { every: 2, ..NamedOptimizer::single(sgd(0.5), Vec::new()) };
    let error = Trainer::new(config(3)).optimizers(vec![rare]).fit(&Dropped::model(1), &data());
    let error = error.unwrap_err().to_string();
    assert_eq!(error, "`every`: at least one optimizer must be active in every step: leave out its `every`");
}

#[test]
fn optimizers_take_turns_and_move_their_own_parameters_alone() {
    // All these numbers are exact in half precision, too.
    for (micro_batch_size, precision) in
        [(None, Precision::Full), (Some(1), Precision::Full), (None, Precision::Bf16Mixed)]
    {
        let build = |vb: VarBuilder| {
            let start = |name, value| vb.get_with_hints(1, name, candlepower::candle_nn::Init::Const(value));
            Ok(Duel { a: start("a", 0.)?, b: start("b", 1.)? })
        };
        let model = Model::with_precision(build, 0, &device(), precision).unwrap();
        let turn = |name: &str, lr| NamedOptimizer {
            name: name.into(),
            params: name.into(),
            ..NamedOptimizer::single(sgd(lr), Vec::new())
        };
        let recorder = Recorder::default();
        Trainer::new(TrainerConfig { micro_batch_size, precision, ..config(2) })
            .optimizers(vec![turn("a", 0.5), turn("b", 0.25)])
            .callback(recorder.clone())
            .fit(&model, &Data::new(Points { samples: 6 }))
            .unwrap();
        // a: 0 -> 0 - 0.5 (0 - 2) = 1; b sees it: 1 -> 1 - 0.25 (1 - 1 - 1) = 1.25;
        // a: 1 -> 1 - 0.5 (1 - 2.5) = 1.75; b: 1.25 -> 1.25 - 0.25 (1.25 - 1.75 - 1) = 1.625.
        let values: Vec<f32> = weights(&model).into_iter().flat_map(|(_, values)| values).collect();
        assert_eq!(values, [1.75, 1.625]);
        assert_eq!(recorder.train("loss/a"), [2., 1.125]);
        assert_eq!(recorder.train("loss/b"), [0.5, 1.125]);
        assert_eq!((recorder.train("lr/a"), recorder.train("lr/b")), (vec![0.5, 0.5], vec![0.25, 0.25]));
    }
}

#[test]
fn frozen_parameters_stay_and_the_others_learn() {
    let model = Dropped::model(1);
    let before = weights(&model);
    let frozen = ParamGroup { params: "first.*".into(), frozen: true, ..Default::default() };
    Trainer::new(config(4)).optimizer_with_groups(sgd(0.1), vec![frozen]).fit(&model, &data()).unwrap();
    for ((name, before), (_, after)) in before.iter().zip(weights(&model)) {
        assert_eq!(*before == after, name.starts_with("first."), "{name}");
    }
}

#[test]
fn a_group_is_frozen_until_its_time_and_then_begins() {
    let rate = 0.01;
    let adam = || OptimizerConfig::from(AdamConfig { lr: 0.02, eps: 1e-12, ..Default::default() });
    let first = || ParamGroup { params: "first.*".into(), lr: Some(rate), ..Default::default() };
    // An epoch is 3 steps.
    let run = |config: TrainerConfig, group: ParamGroup, shard| {
        let (model, recorder) = (Dropped::model(1), Recorder::default());
        Trainer::new(config)
            .distributed(DistributedConfig { shard, ..Default::default() })
            .optimizer_with_groups(adam(), vec![group])
            .callback(recorder.clone())
            .fit(&model, &data())
            .unwrap();
        (weights(&model), recorder.train("grad_norm"))
    };
    let clipped = |max_steps| TrainerConfig { clip_norm: Some(0.1), ..config(max_steps) };
    let until = |unfreeze| ParamGroup { unfreeze: Some(unfreeze), ..first() };
    let alone = |max_steps, unfreeze| run(clipped(max_steps), until(unfreeze), Shard::None);
    // Until then it is as if it were frozen for ever, for the norm that clips as well.
    let for_ever = run(clipped(3), ParamGroup { frozen: true, lr: None, ..first() }, Shard::None);
    assert_eq!(alone(3, Every::Steps(3)), for_ever);
    // Then it begins: in its first step Adam moves what has a gradient by the rate, no matter how large that is.
    let (after, _) = alone(4, Every::Steps(3));
    for ((name, before), (_, after)) in for_ever.0.iter().zip(&after) {
        let moved = before.iter().zip(after).map(|(a, b)| f64::from((a - b).abs())).fold(0., f64::max);
        assert_eq!((moved - rate).abs() < 1e-5, name.starts_with("first."), "{name} moved by {moved}");
    }
    let (whole, norms) = alone(9, Every::Steps(3));
    assert_eq!(alone(9, Every::Epochs(1.)), (whole.clone(), norms));
    for shard in [Shard::None, Shard::Optimizer] {
        let config = TrainerConfig { devices: 2, micro_batch_size: Some(1), ..clipped(9) };
        let alone = TrainerConfig { devices: 1, ..config.clone() };
        let [one, two] = [alone, config].map(|config| run(config, until(Every::Steps(3)), shard).0);
        for ((name, one), (_, two)) in one.iter().zip(&two) {
            assert!(one.iter().zip(two).all(|(a, b)| (a - b).abs() < 1e-4), "{name}, {shard:?}");
        }
    }
}

#[test]
fn a_wrong_time_to_unfreeze_is_refused() {
    let error = |group: ParamGroup| {
        let group = ParamGroup { params: "*".into(), ..group };
        let mut trainer = Trainer::new(config(1)).optimizer_with_groups(sgd(0.1), vec![group]);
        trainer.fit(&Dropped::model(1), &data()).unwrap_err().to_string()
    };
    let until = |unfreeze| ParamGroup { unfreeze: Some(unfreeze), ..Default::default() };
    let expected = "`groups`: group `*`: expected `unfreeze` in steps or whole epochs, found";
    assert_eq!(error(until(Every::Epochs(0.5))), format!("{expected} \"0.5 epochs\""));
    assert_eq!(error(until(Every::Time(Duration::from_secs(60)))), format!("{expected} \"1m\""));
    let both = ParamGroup { frozen: true, ..until(Every::Steps(2)) };
    assert_eq!(error(both), "`groups`: group `*`: `frozen` is for ever, so `unfreeze` has no effect");
    assert_eq!(
        error(until(Every::Steps(2))),
        "`groups`: nothing is left to train at first: all parameters are frozen"
    );
}

#[test]
fn what_is_validated_and_predicted_with_is_the_average() {
    let dir = tempfile::tempdir().unwrap();
    let average = AverageConfig::Ema(EmaConfig { decay: 0.9, ..Default::default() });
    let (model, data) = (Dropped::model(1), data());
    let outcome = Trainer::new(config(6))
        .optimizer(sgd(0.2))
        .average(Some(average))
        .checkpoints(dir.path(), CheckpointConfig::default())
        .fit(&model, &data)
        .unwrap();
    let told = outcome.validation.unwrap()["loss"];
    let validate =
        |model: &Model<Tensors>| Trainer::new(config(1)).validate(model, &data, Split::Val).unwrap()["loss"];
    let fresh = Dropped::model(2);
    let checkpoint = Checkpoint::load(&dir.path().join("last")).unwrap();
    checkpoint.restore_for_evaluation(&fresh.params().vars()).unwrap();
    assert_eq!(validate(&fresh), told);
    // The model has the average, too, once it is trained; training itself continues with the weights.
    assert_eq!(validate(&model), told);
    assert_eq!(weights(&fresh), weights(&model));
    checkpoint.restore_params(&fresh.params().vars()).unwrap();
    assert_ne!(validate(&fresh), told);
}

#[test]
fn an_average_that_forgets_everything_is_the_weights_of_its_last_update() {
    let dir = tempfile::tempdir().unwrap();
    let average = AverageConfig::Ema(EmaConfig { decay: 0., every_steps: 3, start_step: 0 });
    let model = Dropped::model(1);
    let mut trainer =
        Trainer::new(config(6)).average(Some(average)).checkpoints(dir.path(), CheckpointConfig::default());
    trainer.fit(&model, &data()).unwrap();
    let averaged = Dropped::model(2);
    let checkpoint = Checkpoint::load(&dir.path().join("6")).unwrap();
    checkpoint.restore_for_evaluation(&averaged.params().vars()).unwrap();
    assert_eq!(weights(&averaged), weights(&model));
}

#[test]
fn a_plateau_lowers_the_learning_rate_of_every_optimizer_by_hand() {
    let turn = |name: &str, lr| NamedOptimizer {
        name: name.into(),
        params: format!("{name}.*"),
        ..NamedOptimizer::single(sgd(lr), Vec::new())
    };
    // No loss is ever this much better: every validation after the first counts as no progress.
    let plateau = Plateau { factor: 0.5, patience: 1, threshold: 1e9, absolute: true, ..Default::default() };
    let recorder = Recorder::default();
    Trainer::new(TrainerConfig { val_every: Some(Every::Steps(1)), ..config(6) })
        .optimizers(vec![turn("first", 0.5), turn("second", 0.25)])
        .plateau(Some(plateau))
        .callback(recorder.clone())
        .fit(&Dropped::model(1), &data())
        .unwrap();
    // Validation 1 is the best; 2 is tolerated; 3 halves; 4 is tolerated; 5 halves again. Each affects the
    // step after it.
    assert_eq!(recorder.train("lr/first"), [0.5, 0.5, 0.5, 0.25, 0.25, 0.125]);
    assert_eq!(recorder.train("lr/second"), [0.25, 0.25, 0.25, 0.125, 0.125, 0.0625]);
}
