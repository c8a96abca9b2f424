//! Mixed precision: the loss scale follows PyTorch's, a skipped step changes nothing, masters follow an f32
//! run, and the tutorial's model stays close to f64.
#![allow(clippy::unwrap_used)]

use candlepower::checkpoint::{Checkpoint, CheckpointConfig};
use candlepower::optim::{AverageConfig, EmaConfig, NamedOptimizer};
use candlepower::precision::{LossScale, Precision};
use candlepower::prelude::*;
use candlepower::trainer::Every;
use candlepower_models::ConvLstm;
use candlepower_models::conv_lstm::ConvLstmConfig;
use candlepower_tests::blobs::Blobs;
use candlepower_tests::points::{Points, weights};
use candlepower_tests::recorder::Recorder;
use candlepower_tests::{assert_close, device, golden, own_fixture};

/// The fixture is what this prints, as JSON:
///
/// ```python
/// scaler = torch.amp.GradScaler("cpu")
/// w = torch.zeros(1, requires_grad=True)
/// optimizer = torch.optim.SGD([w], lr=1.0)
/// for finite in events:           # runs of [finite, how often]
///     optimizer.zero_grad()
///     scaler.scale((w * (1.0 if finite else float("inf"))).sum()).backward()
///     scaler.step(optimizer)
///     scaler.update()
///     print(scaler.get_scale())   # kept where it changes: [steps done, scale]
/// ```
#[test]
fn the_loss_scale_follows_torchs_grad_scaler() {
    let text = std::fs::read_to_string(own_fixture("grad_scaler.json")).unwrap();
    let fixture: serde_json::Value = serde_json::from_str(&text).unwrap();
    let runs: Vec<(bool, usize)> = serde_json::from_value(fixture["events"].clone()).unwrap();
    let expected: Vec<(usize, f64)> = serde_json::from_value(fixture["scale_after_step"].clone()).unwrap();
    let mut scale = LossScale::of(Precision::Fp16Mixed).unwrap();
    let mut changes = vec![(0, scale.scale)];
    let events = runs.into_iter().flat_map(|(finite, times)| std::iter::repeat_n(finite, times));
    for (step, finite) in events.enumerate() {
        scale.update(finite);
        if scale.scale != changes[changes.len() - 1].1 {
            changes.push((step + 1, scale.scale));
        }
    }
    assert_eq!(changes, expected);
    assert_eq!(LossScale::of(Precision::Bf16Mixed), None);
}

fn config(precision: Precision, max_steps: u64) -> TrainerConfig {
    TrainerConfig {
        batch_size: 2,
        max_steps: Some(max_steps),
        log_every: 1,
        sanity_val_batches: 0,
        precision,
        ..Default::default()
    }
}

/// A loss with a gradient of a given steepness.
struct Steep {
    w: Tensor,
    factor: f64,
}

impl Steep {
    fn model(factor: f64, precision: Precision) -> Model<Tensors> {
        let build = move |vb: VarBuilder| {
            let w = vb.get_with_hints(4, "w", candlepower::candle_nn::Init::Const(1.))?;
            Ok(Self { w, factor })
        };
        Model::with_precision(build, 0, &device(), precision).unwrap()
    }
}

impl Module for Steep {
    type Batch = Tensors;

    fn training_step(&self, batch: &Tensors, _: &mut Step) -> Result<Tensor> {
        let x = batch.0[0].mean(0)?.to_dtype(self.w.dtype())?;
        // In f32 from here on, like losses; fp16 receives a thousandth of the loss scale, times `factor`, in
        // the backward pass.
        Ok(((&self.w * x)?.to_dtype(DType::F32)?.sum_all()? * (1e-3 * self.factor))?)
    }
}

#[test]
fn a_skipped_step_advances_nothing() {
    // 2^20 / 1000 times a loss scale of 2^16 is far above 65504, fp16's largest number; at 2^5 it fits.
    let run = |factor: f64| {
        let (dir, recorder) = (tempfile::tempdir().unwrap(), Recorder::default());
        let model = Steep::model(factor, Precision::Fp16Mixed);
        let ema = AverageConfig::Ema(EmaConfig { decay: 0.5, ..Default::default() });
        let outcome = Trainer::new(TrainerConfig {
            val_every: Some(Every::Steps(2)),
            ..config(Precision::Fp16Mixed, 4)
        })
        .optimizer(SgdConfig { lr: 0.5 / factor, momentum: 0.9, ..Default::default() })
        .schedule(candlepower::schedule::Schedule::Exponential { gamma: 0.5 })
        .average(Some(ema))
        .callback(recorder.clone())
        .checkpoints(dir.path(), CheckpointConfig::default())
        .fit(&model, &Data::new(Points { samples: 6 }).val(Points { samples: 2 }))
        .unwrap();
        let checkpoint = Checkpoint::load(&dir.path().join("last")).unwrap();
        (outcome.progress, recorder, weights(&model), checkpoint.state().clone())
    };
    let (calm, steep) = (run(1.), run(1048576.));
    assert_eq!((calm.3.loss_scale.unwrap().scale, calm.3.loss_scale.unwrap().good_steps), (65536., 4));
    let scale = steep.3.loss_scale.unwrap();
    assert!(scale.scale < 65536. && scale.good_steps == 4, "{scale:?}");
    // The same steps over the same samples, the same schedule, the same number of averages, the same events.
    assert_eq!(calm.0, steep.0);
    assert_eq!(calm.1.lines(), steep.1.lines());
    assert_eq!(calm.3.average_updates, steep.3.average_updates);
    let lrs = steep.1.train("lr").into_iter().map(|lr| lr * 1048576.);
    assert_eq!(lrs.collect::<Vec<_>>(), [0.5, 0.25, 0.125, 0.0625]);
    // Powers of two scale without rounding: the weights are bit-identical.
    assert_eq!(calm.2, steep.2);
}

/// Stops only at the validation before the first step.
struct Enough;

impl Callback for Enough {
    fn on_validation_end(&mut self, record: &mut Record) -> Result<Flow> {
        let why = StopReason::Callback("seen enough".into());
        Ok(if record.step == 0 { Flow::Stop(why) } else { Flow::Continue })
    }
}

#[test]
fn what_a_validation_inside_a_step_asks_for_outlives_tries_that_overflow() {
    // The clock causes a validation after the first micro-batch, and then the step overflows.
    let config = TrainerConfig {
        micro_batch_size: Some(1),
        val_every: Some(Every::Time(std::time::Duration::ZERO)),
        ..config(Precision::Fp16Mixed, 4)
    };
    let data = Data::new(Points { samples: 6 }).val(Points { samples: 2 });
    let mut trainer = Trainer::new(config).callback(Enough);
    let outcome = trainer.fit(&Steep::model(1048576., Precision::Fp16Mixed), &data).unwrap();
    assert_eq!((outcome.progress.step, outcome.reason), (1, StopReason::Callback("seen enough".into())));
}

/// Two numbers, each with its own optimizer, and how steep their losses are.
struct Two([Tensor; 2], [f64; 2]);

impl Module for Two {
    type Batch = Tensors;

    fn training_step(&self, _: &Tensors, step: &mut Step) -> Result<Tensor> {
        let which = usize::from(step.optimizer() == "b");
        Ok((self.0[which].to_dtype(DType::F32)?.sum_all()? * self.1[which])?)
    }
}

#[test]
fn an_optimizer_whose_gradients_overflow_sits_the_step_out_alone() {
    let build = |vb: VarBuilder| {
        let one = |name| vb.get_with_hints(1, name, candlepower::candle_nn::Init::Const(1.));
        // The second one's gradient overflows at first.
        Ok(Two([one("a")?, one("b")?], [0.5, 4096.]))
    };
    // With this momentum, only an optimizer's first gradient makes a difference: it enters whole.
    let sgd = |lr| SgdConfig { lr, momentum: 0.5, dampening: 0.5, ..Default::default() };
    let turn = |name: &str, lr| NamedOptimizer {
        name: name.into(),
        params: name.into(),
        ..NamedOptimizer::single(sgd(lr).into(), Vec::new())
    };
    let dir = tempfile::tempdir().unwrap();
    let run = |steps| {
        let model = Model::with_precision(build, 0, &device(), Precision::Fp16Mixed).unwrap();
        let mut trainer = Trainer::new(config(Precision::Fp16Mixed, steps))
            .optimizers(vec![turn("a", 0.25), turn("b", 1. / 32768.)])
            .checkpoints(dir.path(), CheckpointConfig::default());
        let last = dir.path().join("last");
        if last.exists() {
            trainer = trainer.resume(Checkpoint::load(&last).unwrap());
        }
        let outcome = trainer.fit(&model, &Data::new(Points { samples: 6 })).unwrap();
        assert_eq!(outcome.progress.step, steps);
        weights(&model).into_iter().flat_map(|(_, values)| values).collect::<Vec<f32>>()
    };
    // The first moves by 1/8 in each step. The second moves by as much, but only after 13 steps: by then the
    // scale has fallen from 2^16 to 2^3, so its 2^12 times the scale is below 2^16.
    assert_eq!(run(13), [1. - 13. / 8., 1.]);
    // Steps that it sat out do not count as its own, even if the run is interrupted in between.
    assert_eq!(run(16), [1. - 16. / 8., 1. - 3. / 8.]);
}

#[test]
fn a_run_that_only_skips_ends_with_a_clear_error_and_its_state() {
    let dir = tempfile::tempdir().unwrap();
    let model = Steep::model(f64::INFINITY, Precision::Fp16Mixed);
    let before = weights(&model);
    let why = Trainer::new(config(Precision::Fp16Mixed, 4))
        .checkpoints(dir.path(), CheckpointConfig::default())
        .fit(&model, &Data::new(Points { samples: 6 }))
        .unwrap_err()
        .to_string();
    assert!(why.starts_with("50 tries in a row of step 1 overflowed in fp16"), "{why}");
    assert_eq!(weights(&model), before);
    let saved = Checkpoint::load(&dir.path().join("0")).unwrap();
    assert_eq!(saved.state().loss_scale, Some(LossScale::default()));
    let go_on = |precision| {
        let model = Steep::model(f64::INFINITY, precision);
        let last = Checkpoint::load(&dir.path().join("last")).unwrap();
        let mut trainer = Trainer::new(config(precision, 4)).resume(last);
        trainer.fit(&model, &Data::new(Points { samples: 6 })).unwrap_err().to_string()
    };
    // A resumed run starts to try again and gets the same error; other precisions have no loss scale, and no
    // retries.
    assert_eq!(go_on(Precision::Fp16Mixed), why);
    let why = go_on(Precision::Full);
    assert!(
        why.starts_with("in step 1 the loss of micro-batch") || why.starts_with("in step 1 the loss is"),
        "{why}"
    );
}

#[test]
fn a_second_optimizer_that_always_overflows_ends_the_run() {
    let build = |vb: VarBuilder| {
        let one = |name| vb.get_with_hints(1, name, candlepower::candle_nn::Init::Const(1.));
        Ok(Two([one("a")?, one("b")?], [0.5, f64::INFINITY]))
    };
    let turn = |name: &str| NamedOptimizer {
        name: name.into(),
        params: name.into(),
        ..NamedOptimizer::single(SgdConfig::default().into(), Vec::new())
    };
    let model = Model::with_precision(build, 0, &device(), Precision::Fp16Mixed).unwrap();
    let mut trainer = Trainer::new(config(Precision::Fp16Mixed, 60)).optimizers(vec![turn("a"), turn("b")]);
    let error = trainer.fit(&model, &Data::new(Points { samples: 6 })).unwrap_err().to_string();
    assert!(error.starts_with("50 tries in a row of step 50 overflowed in fp16"), "{error}");
}

fn conv_lstm(precision: Precision) -> Model<Video> {
    let config = ConvLstmConfig { hidden: 8, ..Default::default() };
    let spec = Blobs { samples: 1 }.spec();
    Model::with_precision(move |vb| ConvLstm::build(&config, &spec, vb), 3, &device(), precision).unwrap()
}

#[test]
fn masters_follow_an_f32_run_to_the_rounding_of_the_gradients() {
    let train = |precision| {
        let model = conv_lstm(precision);
        let before = weights(&model);
        Trainer::new(config(precision, 3))
            .optimizer(SgdConfig { lr: 0.1, momentum: 0.9, ..Default::default() })
            .fit(&model, &Data::new(Blobs { samples: 20 }))
            .unwrap();
        let moves = before.into_iter().zip(weights(&model)).map(|((name, before), (_, after))| {
            (name, before.iter().zip(&after).map(|(b, a)| f64::from(a - b)).collect::<Vec<_>>())
        });
        moves.collect::<Vec<_>>()
    };
    let exact = train(Precision::Full);
    // A few units in the last place: 2^-8 and 2^-11.
    for (precision, tolerance) in [(Precision::Bf16Mixed, 3e-2), (Precision::Fp16Mixed, 4e-3)] {
        for ((name, expected), (_, actual)) in exact.iter().zip(train(precision)) {
            let norm = |values: &[f64]| values.iter().map(|x| x * x).sum::<f64>().sqrt();
            let difference: Vec<f64> = expected.iter().zip(&actual).map(|(e, a)| e - a).collect();
            let error = norm(&difference) / norm(expected);
            assert!(error < tolerance, "{precision:?}, {name}: relative error {error:.1e}");
            assert!(error > 0., "{precision:?}, {name}: computed in full precision");
        }
    }
}

#[test]
fn the_tutorials_model_is_close_to_f64_in_half_types() {
    let golden = golden("seed_convlstm_f64");
    let dims = golden.get("in.x").dims().to_vec();
    let spec = VideoSpec {
        frames_in: golden.size("T_in"),
        frames_out: golden.size("T_out"),
        channels: dims[2],
        height: golden.size("H"),
        width: golden.size("W"),
    };
    let config =
        ConvLstmConfig { hidden: golden.size("nf"), kernel: golden.size("kernel"), ..Default::default() };
    let values = golden.under("param.");
    for (precision, tolerance) in [(Precision::Bf16Mixed, 2e-2), (Precision::Fp16Mixed, 3e-3)] {
        let config = config.clone();
        let build = move |vb: VarBuilder| ConvLstm::build(&config, &spec, vb);
        let model = Model::with_precision(build, 0, &device(), precision).unwrap();
        for (name, var) in model.params().vars() {
            var.set(&values[&name].to_dtype(DType::F32).unwrap()).unwrap();
        }
        model.params().publish().unwrap();
        let input = golden.get("in.x").to_dtype(DType::F32).unwrap();
        let target = input.clone();
        let output = Trainer::new(TrainerConfig { precision, ..Default::default() })
            .predict(&model, &Video::new(input, target))
            .unwrap();
        assert_eq!(output.dtype(), DType::F32);
        assert_close(
            &format!("{precision:?}"),
            &output.transpose(1, 2).unwrap(),
            golden.get("out"),
            tolerance,
        );
    }
}

#[test]
fn a_model_of_another_precision_is_refused() {
    let mut trainer = Trainer::new(config(Precision::Bf16Mixed, 1));
    let error =
        trainer.fit(&conv_lstm(Precision::Full), &Data::new(Blobs { samples: 4 })).unwrap_err().to_string();
    assert_eq!(error, "`precision`: the model computes in F32, expected BF16: see `Model::with_precision`");
}
