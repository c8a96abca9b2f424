//! Training steps that a CUDA device records and replays are bit-identical to those that run normally. Needs
//! a device, with `CANDLEPOWER_TEST_DEVICE=cuda`; without one, each test prints that it is skipped and
//! passes.
#![allow(clippy::unwrap_used)]

use std::fmt::Debug;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use candlepower::checkpoint::{Checkpoint, CheckpointConfig};
use candlepower::optim::{AdadeltaConfig, AdagradConfig, MomentsConfig, ParamGroup, RmspropConfig};
use candlepower::precision::Precision;
use candlepower::prelude::*;
use candlepower::rand::Rng;
use candlepower::schedule::Schedule;
use candlepower::trainer::Every;
use candlepower_models::ConvLstm;
use candlepower_models::conv_lstm::ConvLstmConfig;
use candlepower_tests::blobs::Blobs;
use candlepower_tests::device;
use candlepower_tests::recorder::Recorder;
use tracing::field::{Field, Visit};
use tracing_subscriber::layer::{Context, SubscriberExt};

/// One test at a time: while one records, no other may use the device.
fn turn() -> Option<MutexGuard<'static, ()>> {
    static TURN: Mutex<()> = Mutex::new(());
    if !device().is_cuda() {
        eprintln!("SKIPPED: only a CUDA device records steps, and CANDLEPOWER_TEST_DEVICE names none");
        return None;
    }
    Some(TURN.lock().unwrap_or_else(PoisonError::into_inner))
}

/// Collects log messages.
#[derive(Clone, Default)]
struct Words(Arc<Mutex<String>>);

impl<S: tracing::Subscriber> tracing_subscriber::Layer<S> for Words {
    fn on_event(&self, event: &tracing::Event, _: Context<S>) {
        event.record(&mut self.clone());
    }
}

impl Visit for Words {
    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        if field.name() == "message" {
            self.0.lock().unwrap().push_str(&format!("{value:?}\n"));
        }
    }
}

/// The result of a training: parameters and optimizer as bytes, metrics as bits.
struct Trained {
    files: [Vec<u8>; 2],
    metrics: Vec<(u64, String, u64)>,
    loss_scale: Option<f64>,
}

fn train<B: Batch>(
    config: &TrainerConfig,
    optimizer: &(OptimizerConfig, Vec<ParamGroup>),
    model: &Model<B>,
    data: &Data<B>,
) -> (Trained, String) {
    let (dir, recorder, words) = (tempfile::tempdir().unwrap(), Recorder::default(), Words::default());
    let mut trainer = Trainer::new(config.clone())
        .seed(5)
        .optimizer_with_groups(optimizer.0.clone(), optimizer.1.clone())
        .schedule(Schedule::Exponential { gamma: 0.9 })
        .callback(recorder.clone())
        .checkpoints(dir.path(), CheckpointConfig::default());
    let subscriber = tracing_subscriber::registry().with(words.clone());
    tracing::subscriber::with_default(subscriber, || trainer.fit(model, data)).unwrap();
    let last = dir.path().join("last");
    let read = |file: &str| std::fs::read(last.join(Path::new(file))).unwrap();
    let records = recorder.records().into_iter();
    let bits = records
        .flat_map(|r| r.metrics.into_iter().map(move |(name, x)| (r.step, name, x.to_bits())))
        .collect::<Vec<_>>();
    assert!(bits.len() > 10);
    let files = ["model.safetensors", "optimizer.safetensors"].map(read);
    let loss_scale = Checkpoint::load(&last).unwrap().state().loss_scale.map(|it| it.scale);
    let said = words.0.lock().unwrap().clone();
    (Trained { files, metrics: bits, loss_scale }, said)
}

/// Adam with a rate that changes in each step.
fn adam() -> (OptimizerConfig, Vec<ParamGroup>) {
    (AdamConfig { lr: 0.01, ..Default::default() }.into(), Vec::new())
}

/// Trains with and without recording; returns the log messages with it, and the loss scale at the end.
fn compare<B: Batch>(
    case: &str,
    config: TrainerConfig,
    optimizer: &(OptimizerConfig, Vec<ParamGroup>),
    model: impl Fn() -> Model<B>,
    data: &Data<B>,
) -> (String, Option<f64>) {
    let run = |cuda_graph| train(&TrainerConfig { cuda_graph, ..config.clone() }, optimizer, &model(), data);
    let ((plain, silence), (recorded, said)) = (run(false), run(true));
    assert!(!silence.contains("recorded"), "{case}: {silence}");
    assert!(plain.metrics == recorded.metrics, "{case}: metrics differ");
    assert!(plain.files == recorded.files, "{case}: parameters or moments differ");
    assert_eq!(plain.loss_scale, recorded.loss_scale);
    (said, recorded.loss_scale)
}

/// 10 samples in batches of 4. Micro-batches of at most 3 have 3, 1 and 2 samples. With micro-batches of 2,
/// the two of a full batch are alike, and the one of the last batch, which is a whole step, counts twice as
/// much.
fn config(micro_batch_size: usize) -> TrainerConfig {
    TrainerConfig {
        batch_size: 4,
        micro_batch_size: Some(micro_batch_size),
        max_steps: Some(11),
        log_every: 1,
        clip_norm: Some(0.05),
        ..Default::default()
    }
}

fn data() -> Data<Video> {
    Data::new(Blobs { samples: 10 }).val(Blobs { samples: 3 }).workers(2)
}

#[test]
fn recorded_steps_are_those_that_run_as_they_come() {
    let Some(_turn) = turn() else { return };
    for precision in [Precision::Full, Precision::Bf16Mixed, Precision::Fp16Mixed] {
        let model = || {
            let (config, spec) =
                (ConvLstmConfig { hidden: 4, ..Default::default() }, Blobs { samples: 1 }.spec());
            let build = move |vb: VarBuilder| ConvLstm::build(&config, &spec, vb);
            Model::with_precision(build, 1, &device(), precision).unwrap()
        };
        // How many kinds of passes are recorded, and how many of whole steps. The last batch of an epoch is
        // every third step.
        for (micro_batch_size, passes, steps) in [(3, 2, 1), (2, 1, 1), (4, 0, 2)] {
            let case = format!("{precision:?}, micro-batches of {micro_batch_size}");
            let config = TrainerConfig { precision, ..config(micro_batch_size) };
            let (said, _) = compare(&case, config, &adam(), model, &data());
            let recorded = |what: &str| said.matches(&format!("{what}: recorded as a CUDA graph")).count();
            assert!(recorded("passes over a micro-batch") >= passes, "{case}: {said}");
            assert!(recorded("a training step") >= steps, "{case}: {said}");
        }
    }
}

#[test]
fn so_are_those_whose_convolutions_are_winograds() {
    let Some(_turn) = turn() else { return };
    let model = || {
        let build = |vb: VarBuilder| {
            ConvLstm::build(
                &ConvLstmConfig { hidden: 32, ..Default::default() },
                &Blobs { samples: 1 }.spec(),
                vb,
            )
        };
        Model::new(build, 1, &device()).unwrap()
    };
    // Eight images give enough tiles for Winograd convolutions.
    let config = TrainerConfig { batch_size: 8, max_steps: Some(6), ..config(8) };
    let (said, _) = compare("32 channels", config, &adam(), model, &data());
    assert_eq!(said.matches("a training step: recorded as a CUDA graph").count(), 2, "{said}");
}

fn habit(precision: Precision, habit: fn(&Tensor, &Step) -> Result<Tensor>) -> impl Fn() -> Model<Video> {
    move || {
        let build = move |vb: VarBuilder| Ok(Habit(vb.get((1, 1, 1, 8, 8), "w")?, habit));
        Model::with_precision(build, 1, &device(), precision).unwrap()
    }
}

#[test]
fn the_update_of_every_optimizer_is_part_of_the_recording() {
    let Some(_turn) = turn() else { return };
    let optimizers: [OptimizerConfig; 8] = [
        AdamWConfig { amsgrad: true, ..Default::default() }.into(),
        OptimizerConfig::Adamax(MomentsConfig::default()),
        SgdConfig { lr: 0.1, momentum: 0.9, ..Default::default() }.into(),
        OptimizerConfig::Rmsprop(RmspropConfig { lr: 0.01, momentum: 0.5, ..Default::default() }),
        OptimizerConfig::Adagrad(AdagradConfig { lr_decay: 0.1, ..Default::default() }),
        OptimizerConfig::Adadelta(AdadeltaConfig::default()),
        OptimizerConfig::Nadam(MomentsConfig::default()),
        OptimizerConfig::Radam(Default::default()),
    ];
    for optimizer in optimizers {
        let model = habit(Precision::Full, |loss, _| Ok(loss.clone()));
        let case = format!("{optimizer:?}");
        let (said, _) = compare(&case, config(4), &(optimizer, Vec::new()), model, &data());
        assert_eq!(said.matches("a training step: recorded as a CUDA graph").count(), 2, "{said}");
        assert_eq!(said.matches("recorded as").count(), 2, "{said}");
    }
}

#[test]
fn what_is_unfrozen_is_recorded_anew() {
    let Some(_turn) = turn() else { return };
    let build = |vb: VarBuilder| {
        let config = ConvLstmConfig { hidden: 4, ..Default::default() };
        ConvLstm::build(&config, &Blobs { samples: 1 }.spec(), vb)
    };
    let (params, unfreeze) = ("encoder_*".into(), Some(Every::Steps(6)));
    let optimizer = (adam().0, vec![ParamGroup { params, unfreeze, ..Default::default() }]);
    let model = || Model::new(build, 1, &device()).unwrap();
    let config = TrainerConfig { max_steps: Some(14), ..config(4) };
    let (said, _) = compare("unfrozen", config, &optimizer, model, &data());
    // Two sizes of batches, before and after.
    assert_eq!(said.matches("a training step: recorded as a CUDA graph").count(), 4, "{said}");
}

#[test]
fn what_is_logged_is_as_it_was_before_the_update() {
    let Some(_turn) = turn() else { return };
    // The parameter itself, with one value, which the update moves in place.
    struct Told(Tensor);
    impl Module for Told {
        type Batch = Video;

        fn training_step(&self, batch: &Video, step: &mut Step) -> Result<Tensor> {
            step.log("w", &self.0.squeeze(0)?);
            Ok((batch.target.mean_all()? - self.0.squeeze(0)?)?.sqr()?)
        }
    }
    let build = |vb: VarBuilder| Ok(Told(vb.get(1, "w")?));
    let model = || Model::new(build, 1, &device()).unwrap();
    let (said, _) = compare("told", config(4), &adam(), model, &data());
    assert!(said.contains("a training step: recorded as"), "{said}");
}

#[test]
fn recorded_steps_that_overflow_are_tried_again() {
    let Some(_turn) = turn() else { return };
    let model = habit(Precision::Fp16Mixed, |loss, _| Ok((loss * 100.)?));
    let config = TrainerConfig { precision: Precision::Fp16Mixed, max_steps: Some(8), ..config(4) };
    let (said, loss_scale) = compare("overflow", config, &adam(), model, &data());
    assert!(loss_scale.is_some_and(|scale| scale < 65536.), "{loss_scale:?}");
    assert!(said.contains("a training step: recorded as"), "{said}");
}

/// A module with one parameter and a given habit.
struct Habit(Tensor, fn(&Tensor, &Step) -> Result<Tensor>);

impl Module for Habit {
    type Batch = Video;

    fn training_step(&self, batch: &Video, step: &mut Step) -> Result<Tensor> {
        let target = batch.target.to_dtype(self.0.dtype())?;
        let error = target.mean_keepdim(1)?.broadcast_sub(&self.0)?;
        (self.1)(&error.sqr()?.mean_all()?, step)
    }
}

#[test]
fn what_cannot_be_recorded_runs_as_it_comes_and_a_warning_says_why() {
    let Some(_turn) = turn() else { return };
    let random = |loss: &Tensor, step: &Step| Ok((loss * step.rng("noise").random_range(0.5f64..1.5))?);
    let numbered = |loss: &Tensor, step: &Step| Ok((loss * (1. + step.global_step() as f64))?);
    let reading = |loss: &Tensor, _: &Step| Ok((loss * f64::from(loss.to_scalar::<f32>()?))?);
    let asks = "the module uses the step's number or random numbers";
    let waiting = |loss: &Tensor, _: &Step| {
        loss.device().synchronize()?;
        Ok(loss.clone())
    };
    type Ways = [(fn(&Tensor, &Step) -> Result<Tensor>, &'static str); 4];
    let ways: Ways = [
        (random, asks),
        (numbered, asks),
        (reading, "not permitted while capturing"),
        (waiting, "STREAM_CAPTURE_UNSUPPORTED"),
    ];
    for (habit, why) in ways {
        let (said, _) = compare(why, config(3), &adam(), self::habit(Precision::Full, habit), &data());
        assert_eq!(said.matches("trainer.cuda_graph: steps are not recorded: ").count(), 1, "{said}");
        assert!(said.contains(why), "{said}");
    }
}
