//! What an error, or a stop inside a validation, leaves behind: everything needed to resume bit-identically.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use candlepower::callbacks::OnSignal;
use candlepower::checkpoint::{Checkpoint, CheckpointConfig, latest};
use candlepower::optim::NamedOptimizer;
use candlepower::prelude::*;
use candlepower::schedule::Plateau;
use candlepower::trainer::{Every, Outcome};
use candlepower_tests::points::{Dropped, Points};
use candlepower_tests::recorder::Recorder;

/// Points of which the ones that `is_bad` selects cannot be read while `broken`.
struct Breakable {
    points: Points,
    is_bad: fn(&Sample) -> bool,
    broken: Arc<AtomicBool>,
}

impl Dataset for Breakable {
    type Batch = Tensors;

    fn len(&self) -> usize {
        self.points.len()
    }

    fn spec(&self) {}

    fn batch(&self, samples: &[Sample]) -> Result<Tensors> {
        if self.broken.load(Ordering::Relaxed) && samples.iter().any(self.is_bad) {
            return Err(Error::msg("the disk is gone"));
        }
        self.points.batch(samples)
    }
}

/// 10 samples in batches of 4: steps of 4, 4 and 2 per epoch. A plateau halves the learning rate at every
/// validation except the first.
fn trainer(dir: &Path, resume: bool) -> Trainer {
    let config = TrainerConfig {
        batch_size: 4,
        max_steps: Some(8),
        log_every: 1,
        val_every: Some(Every::Steps(2)),
        ..Default::default()
    };
    let plateau = Plateau { factor: 0.5, patience: 0, threshold: 1e9, absolute: true, ..Default::default() };
    // Otherwise only the end is saved.
    let checkpoints =
        CheckpointConfig { every_steps: Some(1000), keep_last: 99, keep_best: 0, ..Default::default() };
    let trainer = Trainer::new(config).seed(5).plateau(Some(plateau)).checkpoints(dir, checkpoints);
    match resume {
        true => trainer.resume(Checkpoint::load(&latest(dir).unwrap().unwrap()).unwrap()),
        false => trainer,
    }
}

/// The files of the last checkpoint except its manifest, byte for byte.
fn end(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = std::fs::read_dir(dir.join("8")).unwrap().map(Result::unwrap);
    entries.map(|e| (e.file_name().into_string().unwrap(), std::fs::read(e.path()).unwrap())).collect()
}

/// A run that fails and is then resumed: its error, the last step that was saved, and the files at the end.
fn broken_and_mended(is_bad: fn(&Sample) -> bool) -> (String, u64, BTreeMap<String, Vec<u8>>) {
    let (dir, broken) = (tempfile::tempdir().unwrap(), Arc::new(AtomicBool::new(true)));
    let data = || {
        let breakable = |samples| Breakable { points: Points { samples }, is_bad, broken: broken.clone() };
        Data::new(breakable(10)).val(breakable(13)).workers(0)
    };
    let error = trainer(dir.path(), false).fit(&Dropped::model(1), &data()).unwrap_err().to_string();
    let left = Checkpoint::load(&latest(dir.path()).unwrap().unwrap()).unwrap().state().progress.step;
    broken.store(false, Ordering::Relaxed);
    trainer(dir.path(), true).fit(&Dropped::model(77), &data()).unwrap();
    (error, left, end(dir.path()))
}

fn whole() -> BTreeMap<String, Vec<u8>> {
    let dir = tempfile::tempdir().unwrap();
    let data = Data::new(Points { samples: 10 }).val(Points { samples: 13 }).workers(0);
    trainer(dir.path(), false).fit(&Dropped::model(1), &data).unwrap();
    end(dir.path())
}

#[test]
fn a_sample_that_cannot_be_read_costs_no_step() {
    // The second epoch begins with step 4; sample 3 is in one of its three steps.
    let (error, left, end) = broken_and_mended(|sample| sample.epoch == 1 && sample.index == 3);
    // Named, although four samples were read together.
    assert_eq!(error, "cannot read sample 3: the disk is gone");
    assert!((3..6).contains(&left), "{left}");
    assert!(end == whole());
}

#[test]
fn a_validation_that_fails_is_made_up_for() {
    // After the batches that are validated before the first step.
    let (error, left, end) = broken_and_mended(|sample| sample.split == Split::Val && sample.index == 12);
    assert!(error.contains("the disk is gone"), "{error}");
    assert_eq!(left, 2);
    // With the learning rate that the plateau leaves after four validations.
    assert!(end == whole());
}

/// The points' module, which panics in the step with this number, while it is told to.
struct Panics {
    inner: Dropped,
    step: u64,
    now: Arc<AtomicBool>,
}

impl Module for Panics {
    type Batch = Tensors;

    fn training_step(&self, batch: &Tensors, step: &mut Step) -> Result<Tensor> {
        assert!(step.global_step() != self.step || !self.now.load(Ordering::Relaxed), "out of bounds");
        self.inner.training_step(batch, step)
    }
}

#[test]
fn a_panic_costs_no_step_that_was_taken() {
    let (dir, now) = (tempfile::tempdir().unwrap(), Arc::new(AtomicBool::new(true)));
    let model = || {
        let now = now.clone();
        let build =
            move |vb: VarBuilder| Ok(Panics { inner: Dropped::build(vb)?, step: 5, now: now.clone() });
        Model::new(build, 1, &candlepower_tests::device()).unwrap()
    };
    let data = Data::new(Points { samples: 10 }).val(Points { samples: 13 }).workers(0);
    let panicked = catch_unwind(AssertUnwindSafe(|| trainer(dir.path(), false).fit(&model(), &data).is_ok()));
    assert!(panicked.is_err());
    assert!(latest(dir.path()).unwrap().unwrap().ends_with("5"));
    now.store(false, Ordering::Relaxed);
    trainer(dir.path(), true).fit(&model(), &data).unwrap();
    assert!(end(dir.path()) == whole());
}

/// Stops the run in the first batch that it sees validated.
struct StopsAtOnce;

impl Callback for StopsAtOnce {
    fn on_validation_batch_end(&mut self, _: usize, _: Option<usize>) -> Result<Flow> {
        Ok(Flow::Stop(StopReason::Signal(15)))
    }
}

#[test]
fn a_signal_before_the_first_step_is_not_followed_by_one() {
    let dir = tempfile::tempdir().unwrap();
    let data = Data::new(Points { samples: 10 }).val(Points { samples: 13 }).workers(0);
    let outcome = trainer(dir.path(), false).callback(StopsAtOnce).fit(&Dropped::model(1), &data).unwrap();
    assert_eq!((outcome.progress.step, outcome.reason), (0, StopReason::Signal(15)));
}

/// Asks to stop, like a signal, in the first batch of the validation after this step.
struct StopsInside {
    step: u64,
    now: u64,
    signal: OnSignal,
}

impl Callback for StopsInside {
    fn on_step_end(&mut self, step: &StepEnd) -> Result<Flow> {
        self.now = step.progress.step;
        Ok(Flow::Continue)
    }

    fn on_validation_batch_end(&mut self, _: usize, _: Option<usize>) -> Result<Flow> {
        if self.now == self.step {
            self.signal.stop.store(15, Ordering::Relaxed);
        }
        Ok(Flow::Continue)
    }
}

#[test]
fn a_signal_ends_a_validation_which_is_made_up_for() {
    let data = Data::new(Points { samples: 10 }).val(Points { samples: 13 }).workers(0);
    // Also in the validation at the end of a run.
    for step in [4, 8] {
        let (dir, signal, heard) = (tempfile::tempdir().unwrap(), OnSignal::default(), Recorder::default());
        let stops = StopsInside { step, now: 0, signal: signal.clone() };
        let Outcome { progress, reason, .. } = trainer(dir.path(), false)
            .callback(stops)
            .callback(signal)
            .callback(heard.clone())
            .fit(&Dropped::model(1), &data)
            .unwrap();
        assert_eq!((progress.step, reason), (step, StopReason::Signal(15)));
        assert!(!heard.lines().contains(&format!("val metrics {step}")), "{:?}", heard.lines());
        let resumed = Recorder::default();
        trainer(dir.path(), true).callback(resumed.clone()).fit(&Dropped::model(77), &data).unwrap();
        let seen: Vec<String> =
            resumed.lines().into_iter().filter(|line| line.contains("metrics")).take(1).collect();
        assert_eq!(seen, [format!("val metrics {step}")]);
        let (state, files) = ("state.json", end(dir.path()));
        for (name, bytes) in whole() {
            // That checkpoint is from before the validation.
            assert!(
                files[&name] == bytes || (step == 8 && ["manifest.json", state].contains(&name.as_str())),
                "{name}"
            );
        }
    }
}

#[test]
fn a_signal_in_the_last_validation_leaves_it_to_the_next_run() {
    let data = Data::new(Points { samples: 10 }).val(Points { samples: 13 }).workers(0);
    let (dir, signal) = (tempfile::tempdir().unwrap(), OnSignal::default());
    // Step 3 is validated because it is the last.
    let run = |resume: Option<Checkpoint>| {
        let config = TrainerConfig {
            batch_size: 4,
            max_steps: Some(3),
            val_every: Some(Every::Steps(2)),
            ..Default::default()
        };
        let trainer = Trainer::new(config).checkpoints(dir.path(), CheckpointConfig::default());
        resume.into_iter().fold(trainer, Trainer::resume)
    };
    let stops = StopsInside { step: 3, now: 0, signal: signal.clone() };
    let outcome = run(None).callback(stops).callback(signal).fit(&Dropped::model(1), &data).unwrap();
    assert_eq!((outcome.progress.step, outcome.reason), (3, StopReason::Signal(15)));
    let last = Checkpoint::load(&dir.path().join("3")).unwrap();
    let outcome = run(Some(last)).fit(&Dropped::model(1), &data).unwrap();
    assert_eq!((outcome.progress.step, outcome.reason), (3, StopReason::Finished));
    let told = std::fs::read_to_string(dir.path().join("validations.json")).unwrap();
    assert!(told.contains("\"ended_at\":3"), "{told}");
}

/// Fails in the second optimizer's turn of step 3.
struct FailsInTurn(Box<dyn Module<Batch = Tensors>>);

impl Module for FailsInTurn {
    type Batch = Tensors;

    fn training_step(&self, batch: &Tensors, step: &mut Step) -> Result<Tensor> {
        if step.global_step() == 2 && step.optimizer() == "second" {
            return Err(Error::msg("not in this turn"));
        }
        self.0.training_step(batch, step)
    }
}

#[test]
fn a_step_that_has_moved_some_parameters_is_not_saved() {
    let dir = tempfile::tempdir().unwrap();
    let turn = |name: &str| NamedOptimizer {
        name: name.into(),
        params: format!("{name}.*"),
        ..NamedOptimizer::single(OptimizerConfig::default(), Vec::new())
    };
    let model = Model::new(
        |vb: VarBuilder| Ok(FailsInTurn(Box::new(Dropped::build(vb)?))),
        1,
        &candlepower_tests::device(),
    );
    let data = Data::new(Points { samples: 10 }).workers(0);
    let error = Trainer::new(TrainerConfig { batch_size: 4, max_steps: Some(8), ..Default::default() })
        .optimizers(vec![turn("first"), turn("second")])
        .checkpoints(dir.path(), CheckpointConfig::default())
        .fit(&model.unwrap(), &data)
        .unwrap_err()
        .to_string();
    assert!(error.contains("not in this turn"), "{error}");
    assert_eq!(latest(dir.path()).unwrap(), None);
}

#[test]
fn what_is_validated_is_saved_where_nothing_else_says_when() {
    let saved = |config: CheckpointConfig| {
        let (dir, heard) = (tempfile::tempdir().unwrap(), Recorder::default());
        let data = Data::new(Points { samples: 10 }).val(Points { samples: 5 }).workers(0);
        // Training diverges, so the first validation stays the best.
        Trainer::new(TrainerConfig { batch_size: 4, max_steps: Some(8), ..Default::default() })
            .optimizer(SgdConfig { lr: 3., ..Default::default() })
            .callback(heard.clone())
            .checkpoints(dir.path(), config)
            .fit(&Dropped::model(1), &data)
            .unwrap();
        heard.checkpoints()
    };
    assert_eq!(saved(CheckpointConfig::default()), [3, 6, 8]);
    assert_eq!(saved(CheckpointConfig { every_steps: Some(4), ..Default::default() }), [3, 4, 8]);
}

/// A module with this function as its step.
struct Steps<F>(Box<dyn Module<Batch = Tensors>>, F);

impl<F: Fn(Tensor, &mut Step) -> Result<Tensor> + Send + Sync> Module for Steps<F> {
    type Batch = Tensors;

    fn training_step(&self, batch: &Tensors, step: &mut Step) -> Result<Tensor> {
        self.1(self.0.training_step(batch, step)?, step)
    }
}

/// Trains 2 steps with this module.
fn train_with<F>(step: F) -> Result<Recorder>
where
    F: Fn(Tensor, &mut Step) -> Result<Tensor> + Clone + Send + Sync + 'static,
{
    let heard = Recorder::default();
    let build = move |vb: VarBuilder| Ok(Steps(Box::new(Dropped::build(vb)?), step.clone()));
    let model = Model::new(build, 1, &candlepower_tests::device())?;
    let config = TrainerConfig { batch_size: 4, max_steps: Some(2), log_every: 1, ..Default::default() };
    let data = Data::new(Points { samples: 10 }).val(Points { samples: 5 }).workers(0);
    Trainer::new(config).callback(heard.clone()).fit(&model, &data)?;
    Ok(heard)
}

fn refusal<F>(step: F) -> String
where
    F: Fn(Tensor, &mut Step) -> Result<Tensor> + Clone + Send + Sync + 'static,
{
    let error = train_with(step).err().unwrap().to_string();
    error.lines().next().unwrap().to_string()
}

#[test]
fn a_loss_is_one_number() {
    for (few, of) in [(true, "validation_step, batch 1"), (false, "training_step, step 1")] {
        let refused = refusal(move |loss, step| match step.is_training() || few {
            true => Ok(Tensor::stack(&[&loss, &loss], 0)?.reshape((2, 1))?),
            false => Ok(loss),
        });
        assert_eq!(
            refused,
            format!("{of}: the loss has shape [2, 1]; expected a scalar, for example its mean")
        );
    }
    // A tensor with axes of length 1 counts as one number, even if it is NaN.
    train_with(|loss, _| Ok(loss.reshape((1, 1))?)).unwrap();
    let nan = refusal(|loss, _| Ok((loss.reshape(1)? * f64::NAN)?));
    assert!(nan.starts_with("in step 1 the loss is NaN; the weights are still those of step 0"), "{nan}");
}

#[test]
fn what_counts_for_nothing_may_be_no_number() {
    let logged = train_with(|loss, step| {
        // In the first step there is nothing to average.
        let is_empty = step.is_training() && step.global_step() == 0;
        let (value, weight) = if is_empty { (f64::NAN, 0.) } else { (0.5, 3.) };
        step.log_epoch_weighted("tokens", value, weight);
        Ok(loss)
    });
    let records = logged.unwrap().records();
    let of_training = records.iter().filter(|record| record.split == Split::Train);
    let tokens: Vec<f64> = of_training.filter_map(|record| record.metrics.get("tokens").copied()).collect();
    assert_eq!(tokens, [0.5]);
    for (weight, found) in [(-1., "-1"), (f64::NAN, "NaN")] {
        let expected = format!("metric `x` is logged with weight {found}: expected a number of at least 0");
        let refused = refusal(move |loss, step| {
            step.log_weighted("x", 1., weight);
            Ok(loss)
        });
        assert!(refused.ends_with(&expected), "{refused}");
    }
}

#[test]
fn a_batch_has_the_samples_that_were_asked_for() {
    /// Leaves out the last sample.
    struct Short(Points);
    impl Dataset for Short {
        type Batch = Tensors;

        fn len(&self) -> usize {
            self.0.len()
        }

        fn spec(&self) {}

        fn batch(&self, samples: &[Sample]) -> Result<Tensors> {
            self.0.batch(&samples[1..])
        }
    }
    let config = TrainerConfig { batch_size: 4, max_steps: Some(2), ..Default::default() };
    let error = Trainer::new(config).fit(&Dropped::model(1), &Data::new(Short(Points { samples: 4 })));
    let error = error.unwrap_err().to_string();
    assert!(error.starts_with("cannot read samples "), "{error}");
    assert!(error.ends_with(": the batch has 3 samples, expected 4"), "{error}");
}

#[test]
fn settings_are_checked_where_there_is_no_file_too() {
    let data = Data::new(Points { samples: 10 }).val(Points { samples: 5 }).workers(0);
    let dir = tempfile::tempdir().unwrap();
    let none = CheckpointConfig { keep_last: 0, ..Default::default() };
    let config = TrainerConfig { batch_size: 4, max_steps: Some(2), ..Default::default() };
    let error = Trainer::new(config.clone()).checkpoints(dir.path(), none).fit(&Dropped::model(1), &data);
    assert_eq!(error.unwrap_err().to_string(), "`keep_last`: expected at least 1, found 0");
    let mut nothing_at_once = Trainer::new(TrainerConfig { batch_size: 0, ..Default::default() });
    let error = nothing_at_once.validate(&Dropped::model(1), &data, Split::Val).unwrap_err().to_string();
    assert_eq!(error, "`batch_size`: expected at least 1, found 0");
    // A plateau has no effect if every optimizer has its own one-cycle schedule.
    let cycle = candlepower::schedule::Schedule::OneCycle(candlepower::schedule::OneCycle::new(0.1, 9));
    let turn = NamedOptimizer {
        schedule: Some(cycle),
        ..NamedOptimizer::single(OptimizerConfig::default(), Vec::new())
    };
    let plateau = Some(Plateau::default());
    let error = Trainer::new(config).optimizers(vec![turn]).plateau(plateau).fit(&Dropped::model(1), &data);
    let error = error.unwrap_err().to_string();
    assert!(error.contains("which `one_cycle` does not use"), "{error}");
}

#[test]
fn a_target_keeps_its_type_in_half_precision() {
    use candlepower::candle_core::{DType, Device};
    let floats = |x: f32| Tensor::new(&[x], &Device::Cpu).unwrap();
    let classes = Tensor::new(&[1u32], &Device::Cpu).unwrap();
    let types = |tensors: Vec<Tensor>| -> Vec<DType> {
        Tensors(tensors).cast(DType::BF16).unwrap().0.iter().map(Tensor::dtype).collect()
    };
    assert_eq!(types(vec![floats(1.), classes, floats(1000.5)]), [DType::BF16, DType::U32, DType::F32]);
    assert_eq!(types(vec![floats(1.)]), [DType::BF16]);
}

#[test]
fn what_is_compared_by_another_metric_begins_anew() {
    let data = Data::new(Points { samples: 10 }).val(Points { samples: 5 }).workers(0);
    let run = |dir: &Path, steps, monitor: &str, plateau: Option<Plateau>| {
        let config = TrainerConfig {
            batch_size: 4,
            max_steps: Some(steps),
            val_every: Some(Every::Steps(1)),
            ..Default::default()
        };
        let checkpoints = CheckpointConfig { monitor: monitor.into(), ..Default::default() };
        let trainer = Trainer::new(config).plateau(plateau).checkpoints(dir, checkpoints);
        let last = latest(dir).unwrap().map(|last| Checkpoint::load(&last).unwrap());
        let outcome = last.into_iter().fold(trainer, Trainer::resume).fit(&Dropped::model(1), &data).unwrap();
        let state = Checkpoint::load(&dir.join(steps.to_string())).unwrap().state().clone();
        (outcome.best.unwrap(), state)
    };
    let dir = tempfile::tempdir().unwrap();
    let halves = |monitor: &str| Plateau {
        monitor: monitor.into(),
        factor: 0.5,
        patience: 0,
        threshold: 1e9,
        absolute: true,
        ..Default::default()
    };
    run(dir.path(), 3, "loss", Some(halves("loss")));
    // The mean index of the validation data is always 2; all losses are below that.
    let (best, state) = run(dir.path(), 5, "mean_index", Some(halves("mean_index")));
    assert_eq!((best.step, best.value), (4, Some(2.)));
    // Two halvings in three validations by the loss, the first being the best; one in two by the other
    // metric.
    assert_eq!((state.lr_scale, state.plateau.best), (Some(0.125), Some(2.)));
    // Without a plateau, the configured learning rate applies, immediately and after the next interruption.
    let (_, state) = run(dir.path(), 6, "mean_index", None);
    assert_eq!(state.lr_scale, None);
    let heard = Recorder::default();
    let config = TrainerConfig { batch_size: 4, max_steps: Some(6), log_every: 1, ..Default::default() };
    Trainer::new(config)
        .callback(heard.clone())
        .resume(Checkpoint::load(&dir.path().join("5")).unwrap())
        .fit(&Dropped::model(1), &data)
        .unwrap();
    assert_eq!(heard.train("lr"), [1e-3]);
}

/// Fails once, at this event.
#[derive(Clone, Default)]
struct FailsAt {
    event: &'static str,
    step: u64,
    has_failed: Arc<AtomicBool>,
}

impl FailsAt {
    fn at(&self, event: &str, step: u64) -> Result<Flow> {
        let is_it = event == self.event && step == self.step && !self.has_failed.load(Ordering::Relaxed);
        self.has_failed.fetch_or(is_it, Ordering::Relaxed);
        if is_it { Err(Error::msg("the disk is full")) } else { Ok(Flow::Continue) }
    }
}

impl Callback for FailsAt {
    fn on_step_end(&mut self, step: &StepEnd) -> Result<Flow> {
        self.at("step", step.progress.step)
    }

    fn on_train_metrics(&mut self, record: &mut Record) -> Result<Flow> {
        self.at("metrics", record.step)
    }

    fn on_validation_end(&mut self, record: &mut Record) -> Result<Flow> {
        self.at("validation", record.step)
    }
}

#[test]
fn a_callback_that_fails_costs_nothing_of_the_others_memory() {
    use candlepower::callbacks::{EarlyStopping, EarlyStoppingConfig};
    use candlepower::precision::Precision;
    let data = Data::new(Points { samples: 10 }).val(Points { samples: 13 }).workers(0);
    // It counts every validation that is not better by this much, and stops none of these runs.
    let early = EarlyStoppingConfig { patience: 99, min_delta: 1e9, ..Default::default() };
    let run = |dir: &Path, resume: bool, fails: FailsAt| {
        let heard = Recorder::default();
        let outcome = trainer(dir, resume)
            .callback(EarlyStopping::watch(&early).unwrap())
            .callback(heard.clone())
            .callback(fails)
            .fit(&Dropped::logging_epochs(if resume { 77 } else { 1 }, Precision::Full), &data);
        (outcome.map(drop), heard)
    };
    let whole = tempfile::tempdir().unwrap();
    let (_, expected) = run(whole.path(), false, FailsAt::default());
    let epochs = |heard: &Recorder| -> Vec<(u64, f64)> {
        let records = heard.records();
        let of_training = records.iter().filter(|record| record.split == Split::Train);
        of_training.filter_map(|r| Some((r.step, *r.metrics.get("epoch_index")?))).collect()
    };
    for (event, step) in [("step", 2), ("metrics", 4), ("validation", 4), ("validation", 6)] {
        let dir = tempfile::tempdir().unwrap();
        let fails = FailsAt { event, step, ..Default::default() };
        let error = run(dir.path(), false, fails.clone()).0.unwrap_err().to_string();
        assert_eq!(error, "the disk is full");
        let (_, resumed) = run(dir.path(), true, fails);
        let later: Vec<(u64, f64)> = epochs(&expected).into_iter().filter(|(at, _)| *at > step).collect();
        assert!(!later.is_empty());
        assert_eq!(epochs(&resumed), later, "{event} {step}");
        assert!(end(dir.path()) == end(whole.path()), "{event} {step}");
    }
}

#[test]
fn a_picture_that_cannot_be_shown_costs_no_step() {
    /// Cannot show pictures.
    struct Blind;
    impl Callback for Blind {
        fn on_picture(&mut self, _: &candlepower::callback::Picture) -> Result<()> {
            Err(Error::msg("the disk is full"))
        }
    }
    let dir = tempfile::tempdir().unwrap();
    let build = |vb: VarBuilder| {
        Ok(Steps(Box::new(Dropped::build(vb)?), |loss: Tensor, step: &mut Step| {
            if step.images_due() {
                for name in ["a", "b", "c"] {
                    let pixels = Tensor::zeros((1, 2, 2), DType::F32, &Device::Cpu)?;
                    step.draw_image(name, &[&pixels], |of| Ok(of[0].clone()));
                }
            }
            Ok(loss)
        }))
    };
    let config = TrainerConfig { batch_size: 4, max_steps: Some(9), ..Default::default() };
    let error = Trainer::new(config)
        .image_every(2)
        .callback(Blind)
        .checkpoints(dir.path(), CheckpointConfig::default())
        .fit(&Model::new(build, 1, &candlepower_tests::device()).unwrap(), &Data::new(Points { samples: 40 }))
        .unwrap_err();
    assert_eq!(error.to_string(), "the disk is full");
    let left = Checkpoint::load(&latest(dir.path()).unwrap().unwrap()).unwrap().state().progress.step;
    assert!(left >= 2, "{left}");
}

#[test]
fn a_run_that_fails_in_its_first_step_owes_no_validation() {
    let dir = tempfile::tempdir().unwrap();
    let build = |vb: VarBuilder| {
        Ok(Steps(Box::new(Dropped::build(vb)?), |loss: Tensor, _: &mut Step| Ok((loss * f64::NAN)?)))
    };
    let data = Data::new(Points { samples: 10 }).val(Points { samples: 5 }).workers(0);
    let model = Model::new(build, 1, &candlepower_tests::device()).unwrap();
    let error = trainer(dir.path(), false).fit(&model, &data).unwrap_err().to_string();
    assert!(error.starts_with("in step 1 the loss is NaN"), "{error}");
    let state = Checkpoint::load(&dir.path().join("0")).unwrap().state().clone();
    assert!(!state.owes_validation);
}

#[test]
fn what_is_asked_for_in_a_validation_happens_after_it() {
    /// Asks to stop in the second validation.
    struct Asks(u64);
    impl Callback for Asks {
        fn on_step_end(&mut self, step: &StepEnd) -> Result<Flow> {
            self.0 = step.progress.step;
            Ok(Flow::Continue)
        }

        fn on_validation_batch_end(&mut self, _: usize, _: Option<usize>) -> Result<Flow> {
            Ok(match self.0 {
                4 => Flow::Stop(StopReason::Callback("seen enough".into())),
                _ => Flow::Continue,
            })
        }
    }
    let data = Data::new(Points { samples: 10 }).val(Points { samples: 13 }).workers(0);
    for devices in [1, 2] {
        let (dir, heard) = (tempfile::tempdir().unwrap(), Recorder::default());
        let config = TrainerConfig {
            batch_size: 4,
            max_steps: Some(8),
            val_every: Some(Every::Steps(2)),
            devices,
            ..Default::default()
        };
        let outcome = Trainer::new(config)
            .callback(Asks(0))
            .callback(heard.clone())
            .checkpoints(dir.path(), CheckpointConfig::default())
            .fit(&Dropped::model(1), &data)
            .unwrap();
        assert_eq!((outcome.progress.step, outcome.reason), (4, StopReason::Callback("seen enough".into())));
        assert!(heard.lines().contains(&"val metrics 4".to_string()), "{:?}", heard.lines());
    }
}
