//! What modules log, and how it is reported: names, weights, numbers, and where an error happened.
#![allow(clippy::unwrap_used)]

use candlepower::precision::Precision;
use candlepower::prelude::*;
use candlepower_tests::points::Points;
use candlepower_tests::recorder::Recorder;

/// A module whose step is a given function.
struct Told(Tensor, fn(&Tensor, &Tensors, &mut Step) -> Result<Tensor>);

impl Module for Told {
    type Batch = Tensors;

    fn training_step(&self, batch: &Tensors, step: &mut Step) -> Result<Tensor> {
        (self.1)(&self.0, batch, step)
    }
}

fn told(precision: Precision, what: fn(&Tensor, &Tensors, &mut Step) -> Result<Tensor>) -> Model<Tensors> {
    let build = move |vb: VarBuilder| Ok(Told(vb.get(4, "w")?, what));
    Model::with_precision(build, 1, &Device::Cpu, precision).unwrap()
}

fn loss(w: &Tensor, batch: &Tensors) -> Result<Tensor> {
    Ok(batch.0[0].to_dtype(w.dtype())?.broadcast_mul(w)?.sqr()?.mean_all()?)
}

/// 7 samples in batches of 4.
fn config() -> TrainerConfig {
    TrainerConfig { batch_size: 4, max_epochs: Some(1), log_every: 1, ..Default::default() }
}

fn data() -> Data<Tensors> {
    Data::new(Points { samples: 7 }).val(Points { samples: 7 })
}

#[test]
fn names_are_a_metrics_own() {
    type What = fn(&Tensor, &Tensors, &mut Step) -> Result<Tensor>;
    let cases: [(What, &str); 4] = [
        (
            |w, batch, step| {
                step.log("loss", 7.);
                loss(w, batch)
            },
            "validation_step, batch 1: a module cannot log `loss`: `loss`, `lr`, `grad_norm`, `step`, `epoch`, `split` are in every record; use another name",
        ),
        (
            |w, batch, step| {
                step.log("accuracy", 7.);
                step.log("accuracy", 8.);
                loss(w, batch)
            },
            "validation_step, batch 1: a module cannot log `accuracy` twice in one step: use two names",
        ),
        (
            |w, batch, step| {
                if step.is_training() {
                    step.log(&format!("loss/{}", step.optimizer()), 1.);
                }
                loss(w, batch)
            },
            "a module cannot log `loss/optimizer`: `loss`, `lr`, `grad_norm`, `step`, `epoch`, `split` are in every record; use another name",
        ),
        (
            |w, batch, step| {
                if step.is_training() {
                    step.log("lr", 1.);
                }
                loss(w, batch)
            },
            "a module cannot log `lr`: `loss`, `lr`, `grad_norm`, `step`, `epoch`, `split` are in every record; use another name",
        ),
    ];
    for (what, expected) in cases {
        let mut trainer = Trainer::new(config());
        let error = trainer.fit(&told(Precision::Full, what), &data()).unwrap_err().to_string();
        assert_eq!(error, expected);
    }
}

#[test]
fn numbers_and_means_over_other_things_than_samples() {
    let model = told(Precision::Full, |w, batch, step| {
        // Samples 0 to 3 come first, then 4 to 6.
        let first = batch.0[2].get(0)?.to_scalar::<f32>()? == 0.;
        step.log("by_samples", if first { 1. } else { 2. });
        step.log_weighted("by_tokens", if first { 1f32 } else { 2. }, if first { 30. } else { 10. });
        step.log_weighted("tensor", &Tensor::new(if first { 1f32 } else { 2. }, &Device::Cpu)?, 1.);
        loss(w, batch)
    });
    let metrics = Trainer::new(config()).validate(&model, &data(), Split::Val).unwrap();
    assert_eq!(metrics["by_samples"], (4. + 2. * 3.) / 7.);
    assert_eq!((metrics["by_tokens"], metrics["tensor"]), ((30. + 20.) / 40., 1.5));
}

/// The training records of a run with 7 samples per epoch in batches of 4, whose module logs the mean index
/// per epoch.
fn epochs(config: TrainerConfig, resume: Option<&std::path::Path>, save: &std::path::Path) -> Vec<Record> {
    use candlepower::checkpoint::{Checkpoint, CheckpointConfig};
    use candlepower_tests::points::Dropped;
    let recorder = Recorder::default();
    let every = CheckpointConfig { every_steps: Some(1), keep_last: 99, ..Default::default() };
    let trainer = Trainer::new(config).callback(recorder.clone()).checkpoints(save, every);
    let checkpoint = resume.map(|path| Checkpoint::load(path).unwrap());
    let mut trainer = checkpoint.into_iter().fold(trainer, Trainer::resume);
    trainer.fit(&Dropped::logging_epochs(1, Precision::Full), &Data::new(Points { samples: 7 })).unwrap();
    recorder.records()
}

/// To six digits: the logged means are in 32 bits.
fn index_of(record: &Record) -> Option<f64> {
    record.metrics.get("epoch_index").map(|mean| (mean * 1e6).round() / 1e6)
}

#[test]
fn an_epochs_metric_is_the_mean_over_all_its_samples_when_it_is_over() {
    let dir = tempfile::tempdir().unwrap();
    // Two steps per epoch; metrics of steps are logged at steps 3 and 6.
    let config = TrainerConfig { log_every: 3, max_epochs: Some(3), ..config() };
    let records = epochs(config.clone(), None, dir.path());
    let told: Vec<_> = records.iter().map(|r| (r.step, r.epoch, index_of(r), r.metrics.len())).collect();
    // Samples 0 to 6, each once per epoch, in batches of 4 and 3.
    let [alone, with_the_step] = [(2, 0, Some(3.), 1), (6, 2, Some(3.), 5)];
    assert_eq!(told, [alone, (3, 1, None, 4), (4, 1, Some(3.), 1), with_the_step]);
    let micro = TrainerConfig { micro_batch_size: Some(3), ..config.clone() };
    let micro = epochs(micro, None, tempfile::tempdir().unwrap().path());
    assert_eq!(
        micro.iter().map(index_of).collect::<Vec<_>>(),
        records.iter().map(index_of).collect::<Vec<_>>()
    );
    // Two ranks have different halves of each batch. One rank resumes with the sums of two, and two with the
    // sums of one.
    let ranks = tempfile::tempdir().unwrap();
    let two = TrainerConfig { devices: 2, ..config.clone() };
    let among_two = epochs(two, None, ranks.path());
    assert_eq!(
        among_two.iter().map(index_of).collect::<Vec<_>>(),
        records.iter().map(index_of).collect::<Vec<_>>()
    );
    for (devices, from) in [(1, &ranks), (2, &ranks), (2, &dir)] {
        let later = TrainerConfig { devices, ..config.clone() };
        let later = epochs(later, Some(&from.path().join("3")), tempfile::tempdir().unwrap().path());
        assert_eq!(later.iter().map(index_of).collect::<Vec<_>>(), [Some(3.); 2]);
    }
}

#[test]
fn each_epoch_begins_anew_and_steps_that_are_refused_do_not_count() {
    use std::sync::atomic::{AtomicUsize, Ordering};
    static CALLS: AtomicUsize = AtomicUsize::new(0);
    for precision in [Precision::Full, Precision::Fp16Mixed] {
        let model = told(precision, |w, batch, step| {
            CALLS.fetch_add(usize::from(step.is_training()), Ordering::Relaxed);
            step.log_epoch("at", step.global_step() as f64);
            step.log_epoch_weighted("of_steps", step.global_step() as f64, 1.);
            // Gradients that overflow in fp16 until the loss scale is smaller.
            Ok((loss(w, batch)? * 10.)?)
        });
        let recorder = Recorder::default();
        let config = TrainerConfig { precision, max_epochs: Some(2), ..config() };
        let before = CALLS.load(Ordering::Relaxed);
        let mut trainer = Trainer::new(config).callback(recorder.clone());
        trainer.fit(&model, &Data::new(Points { samples: 7 })).unwrap();
        let tries = CALLS.load(Ordering::Relaxed) - before;
        assert!(if precision == Precision::Full { tries == 4 } else { tries > 4 }, "{precision:?}: {tries}");
        let means = |name: &str| -> Vec<f64> {
            recorder.records().iter().filter_map(|r| r.metrics.get(name).copied()).collect()
        };
        // Means over 4 samples and over 3.
        assert_eq!(means("at"), [3. / 7., (2. * 4. + 3. * 3.) / 7.], "{precision:?}");
        assert_eq!(means("of_steps"), [0.5, 2.5], "{precision:?}");
    }
}

#[test]
fn training_that_ends_within_an_epoch_tells_of_its_part_and_a_longer_one_of_all() {
    let (dir, again) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let up_to = |steps| TrainerConfig { log_every: 1, max_epochs: None, max_steps: Some(steps), ..config() };
    let part = epochs(up_to(1), None, dir.path());
    let [step, end] = &part[..] else { panic!("{part:?}") };
    assert_eq!((step.step, index_of(step)), (1, None));
    assert_eq!((end.step, index_of(end)), (1, Some((step.metrics["mean_index"] * 1e6).round() / 1e6)));
    let whole = epochs(up_to(2), Some(&dir.path().join("1")), again.path());
    assert_eq!(whole.iter().map(index_of).collect::<Vec<_>>(), [Some(3.)]);
    // If nothing is left to do, there is nothing to report.
    let nothing = tempfile::tempdir().unwrap();
    assert!(epochs(up_to(1), Some(&dir.path().join("1")), nothing.path()).is_empty());
}

#[test]
fn an_error_says_where_it_happened_and_in_half_precision_what_is_probable() {
    let fails = |precision, what| {
        let mut trainer = Trainer::new(TrainerConfig { precision, ..config() });
        trainer.fit(&told(precision, what), &data()).unwrap_err().to_string()
    };
    let in_training =
        fails(Precision::Full, |w, batch, step| match step.is_training() && step.global_step() == 1 {
            true => Err(Error::msg("no more paper")),
            false => loss(w, batch),
        });
    assert_eq!(in_training, "training_step, step 2: no more paper");
    let in_validation = fails(Precision::Bf16Mixed, |w, batch, step| {
        if !step.is_training() && batch.0[2].get(0)?.to_dtype(DType::F32)?.to_scalar::<f32>()? > 0. {
            // Dtypes that cannot be mixed.
            return Ok((w + Tensor::zeros(4, DType::F32, &Device::Cpu)?)?.sum_all()?);
        }
        loss(w, batch)
    });
    assert!(in_validation.starts_with("validation_step, batch 2: dtype mismatch in add"), "{in_validation}");
    assert!(in_validation.contains("the module computes in BF16"), "{in_validation}");
}

#[test]
fn evaluation_knows_how_far_the_weights_are_trained() {
    let what = |w: &Tensor, batch: &Tensors, step: &mut Step| {
        if !step.is_training() {
            step.log("believed", step.global_step() as f64);
        }
        loss(w, batch)
    };
    let (model, recorder) = (told(Precision::Full, what), Recorder::default());
    let mut trainer = Trainer::new(config()).callback(recorder.clone());
    let data = data().test(Points { samples: 3 });
    assert_eq!(trainer.fit(&model, &data).unwrap().validation.unwrap()["believed"], 2.);
    assert_eq!(trainer.validate(&model, &data, Split::Test).unwrap()["believed"], 2.);
    assert_eq!(recorder.records().last().unwrap().step, 2);
    let progress = candlepower::callback::Progress { step: 50, ..Default::default() };
    let mut another = Trainer::new(config()).trained(progress);
    assert_eq!(another.validate(&model, &data, Split::Val).unwrap()["believed"], 50.);
}

/// Adds a metric to validations, and declares it or not.
struct Adds(bool);

impl Callback for Adds {
    fn on_validation_end(&mut self, record: &mut Record) -> Result<Flow> {
        // It rises, so nothing gets better.
        let value = record.step as f64;
        record.metrics.insert("f1".into(), value);
        Ok(Flow::Continue)
    }

    fn added_metrics(&self) -> Vec<String> {
        if self.0 { vec!["f1".into()] } else { Vec::new() }
    }
}

#[test]
fn what_a_callback_adds_can_be_monitored_where_it_says_so() {
    use candlepower::schedule::Plateau;
    let train = |says: bool| {
        let recorder = Recorder::default();
        let plateau = Plateau { monitor: "f1".into(), patience: 0, factor: 0.5, ..Default::default() };
        let mut trainer = Trainer::new(TrainerConfig {
            val_every: Some(candlepower::trainer::Every::Steps(1)),
            max_epochs: Some(2),
            ..config()
        })
        .optimizer(SgdConfig { lr: 0.1, ..Default::default() })
        .plateau(Some(plateau))
        .callback(Adds(says))
        .callback(recorder.clone());
        let done = trainer.fit(&told(Precision::Full, |w, batch, _| loss(w, batch)), &data());
        done.map(|_| recorder.train("lr"))
    };
    let lrs = train(true).unwrap();
    // Means over samples, with rounding.
    let error = lrs
        .iter()
        .zip([0.1, 0.1, 0.05, 0.025])
        .map(|(lr, expected)| (lr - expected).abs())
        .fold(0., f64::max);
    assert!(lrs.len() == 4 && error < 1e-9, "{lrs:?}");
    let error = train(false).unwrap_err().to_string();
    assert!(
        error.starts_with(
            "`schedule.plateau.monitor`: there is no validation metric `f1`, expected one of `loss`"
        ),
        "{error}"
    );
}

#[test]
fn without_a_look_before_the_first_step_a_metric_that_is_not_there_costs_no_checkpoint() {
    let dir = tempfile::tempdir().unwrap();
    let checkpoints =
        candlepower::checkpoint::CheckpointConfig { monitor: "accuracy".into(), ..Default::default() };
    let mut trainer = Trainer::new(TrainerConfig { sanity_val_batches: 0, ..config() })
        .checkpoints(dir.path(), checkpoints);
    let error = trainer.fit(&told(Precision::Full, |w, batch, _| loss(w, batch)), &data()).unwrap_err();
    assert!(
        error.to_string().starts_with("`checkpoint.monitor`: there is no validation metric `accuracy`"),
        "{error}"
    );
    assert!(dir.path().join("2/manifest.json").exists());
}

#[test]
fn what_watches_the_validation_needs_one() {
    use candlepower::callbacks::{EarlyStopping, EarlyStoppingConfig};
    let without = || Data::new(Points { samples: 7 });
    let model = || told(Precision::Full, |w, batch, _| loss(w, batch));
    let error = |mut trainer: Trainer| trainer.fit(&model(), &without()).unwrap_err().to_string();
    let stopping = EarlyStopping::watch(&EarlyStoppingConfig::default()).unwrap();
    let watched = Trainer::new(config()).callback(stopping);
    assert_eq!(error(watched), "early_stopping monitors the validation, and there is none");
    let lowered = Trainer::new(config()).plateau(Some(Default::default()));
    assert_eq!(error(lowered), "plateau monitors the validation, and there is none");
}

#[test]
fn validation_data_that_is_empty_is_refused() {
    let mut trainer = Trainer::new(config());
    let model = told(Precision::Full, |w, batch, _| loss(w, batch));
    let error = trainer.fit(&model, &data().val(Points { samples: 0 })).unwrap_err().to_string();
    assert!(error.starts_with("the validation data is empty"), "{error}");
}
