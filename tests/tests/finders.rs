//! The finders: their suggestions are good, and they leave the model and the trainer unchanged.
#![allow(clippy::unwrap_used)]

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use candlepower::checkpoint::CheckpointConfig;
use candlepower::data::{Items, Pass};
use candlepower::finder::{BatchFinderConfig, LrFinderConfig};
use candlepower::optim::{AverageConfig, EmaConfig, NamedOptimizer, ParamGroup};
use candlepower::prelude::*;
use candlepower::schedule::Schedule;
use candlepower_models::ConvLstm;
use candlepower_models::conv_lstm::ConvLstmConfig;
use candlepower_tests::blobs::Blobs;

const SAMPLES: usize = 20;

fn model() -> Model<Video> {
    let config = ConvLstmConfig { hidden: 4, ..Default::default() };
    Model::build::<ConvLstm>(&config, &Blobs { samples: 1 }.spec(), 1, &Device::Cpu).unwrap()
}

fn config(max_steps: u64) -> TrainerConfig {
    TrainerConfig { batch_size: 6, max_steps: Some(max_steps), ..Default::default() }
}

fn data() -> Data<Video> {
    Data::new(Blobs { samples: SAMPLES }).val(Blobs { samples: 7 })
}

fn bits<B: Batch>(model: &Model<B>) -> HashMap<String, Vec<u32>> {
    let values = |var: Tensor| var.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    let bits = |var: Tensor| values(var).into_iter().map(f32::to_bits).collect();
    model.params().vars().into_iter().map(|(name, var)| (name, bits(var.as_tensor().clone()))).collect()
}

/// Counts the calls of a callback.
#[derive(Default, Clone)]
struct Calls(Arc<AtomicUsize>);

impl Callback for Calls {
    fn on_step_end(&mut self, _: &StepEnd) -> Result<Flow> {
        self.0.fetch_add(1, Ordering::Relaxed);
        Ok(Flow::Continue)
    }

    fn on_validation_batch_end(&mut self, _: usize, _: Option<usize>) -> Result<Flow> {
        self.0.fetch_add(1, Ordering::Relaxed);
        Ok(Flow::Continue)
    }
}

/// The weights, the files and the number of calls of a training, with or without finders before it.
fn fit(find: bool) -> (HashMap<String, Vec<u32>>, Vec<Vec<u8>>, usize) {
    let (model, data, calls) = (model(), data(), Calls::default());
    let dir = tempfile::tempdir().unwrap();
    let mut trainer = Trainer::new(TrainerConfig { micro_batch_size: Some(4), ..config(9) })
        .schedule(Schedule::Cosine { steps: 9, min_lr: 0. })
        .average(Some(AverageConfig::Ema(EmaConfig::default())))
        .callback(calls.clone())
        .checkpoints(dir.path(), CheckpointConfig::default());
    if find {
        let before = bits(&model);
        let found =
            trainer.find_lr(&model, &data, &LrFinderConfig { steps: 30, ..Default::default() }).unwrap();
        assert!(found.points.len() > 10 && bits(&model) == before, "the weights have changed");
        let search = BatchFinderConfig { max: Some(4), steps: 2, ..Default::default() };
        let found = trainer.find_batch_size(&model, &data, &search).unwrap();
        assert!(found.largest == 4 && bits(&model) == before, "the weights have changed");
        assert_eq!(calls.0.load(Ordering::Relaxed), 0, "a callback was called");
        assert_eq!(std::fs::read_dir(&dir).unwrap().count(), 0, "files were written");
    }
    trainer.fit(&model, &data).unwrap();
    let read = |file| std::fs::read(dir.path().join("last").join(file)).unwrap();
    let files = ["model.safetensors", "optimizer.safetensors", "state.json"].map(read).to_vec();
    (bits(&model), files, calls.0.load(Ordering::Relaxed))
}

#[test]
fn a_training_after_the_finders_is_the_training_without_them() {
    assert!(fit(true) == fit(false), "the finders have left a trace");
}

/// Blobs, one of which cannot be read.
struct Broken;

impl Dataset for Broken {
    type Batch = Video;

    fn len(&self) -> usize {
        SAMPLES
    }

    fn spec(&self) -> VideoSpec {
        Blobs { samples: SAMPLES }.spec()
    }

    fn batch(&self, samples: &[Sample]) -> Result<Video> {
        match samples.iter().any(|sample| sample.epoch == 1) {
            true => Err(Error::msg("the disk is gone")),
            false => Blobs { samples: SAMPLES }.batch(samples),
        }
    }
}

#[test]
fn the_weights_are_back_after_an_error() {
    let model = model();
    let before = bits(&model);
    let trainer = Trainer::new(config(1));
    let data = Data::new(Broken);
    let errors = [
        trainer.find_lr(&model, &data, &LrFinderConfig::default()).unwrap_err(),
        trainer
            .find_batch_size(&model, &data, &BatchFinderConfig { start: 8, ..Default::default() })
            .unwrap_err(),
    ];
    for error in errors {
        assert!(error.to_string().contains("the disk is gone"), "{error}");
        assert!(bits(&model) == before, "the weights have changed");
    }
}

#[test]
fn the_suggested_rate_learns_better_than_a_hundredth_of_it() {
    let lr = Trainer::new(config(1)).find_lr(&model(), &data(), &LrFinderConfig::default());
    let lr = lr.unwrap().suggestion().unwrap();
    let loss = |lr: f64| {
        let mut trainer = Trainer::new(config(60)).optimizer(AdamConfig { lr, ..Default::default() });
        trainer.fit(&model(), &data()).unwrap().validation.unwrap()["loss"]
    };
    let (suggested, small) = (loss(lr), loss(lr / 100.));
    assert!(suggested < 0.9 * small, "{lr:e} leads to a loss of {suggested}, a hundredth of it to {small}");
}

/// Learns two numbers, each with its own optimizer and loss.
struct Two(Tensor, Tensor);

impl Module for Two {
    type Batch = Tensors;

    fn training_step(&self, batch: &Tensors, step: &mut Step) -> Result<Tensor> {
        let number = if step.optimizer() == "first" { &self.0 } else { &self.1 };
        Ok((batch.0[0].mean_all()? - number.squeeze(0)?)?.sqr()?)
    }
}

/// A stream of ones.
struct Ones;

impl Stream for Ones {
    type Batch = Tensors;
    type Item = f32;

    fn spec(&self) {}

    fn items(&self, _: Pass) -> Result<Items<f32>> {
        Ok(Box::new((0..30).map(|_| Ok(1.))))
    }

    fn batch(&self, items: Vec<f32>, _: &[Sample]) -> Result<Tensors> {
        Ok(Tensors(vec![Tensor::new(items, &Device::Cpu)?]))
    }
}

#[test]
fn several_optimizers_keep_their_proportions_also_on_a_stream() {
    let zero = candlepower::candle_nn::Init::Const(0.);
    let build = move |vb: VarBuilder| {
        Ok(Two(vb.get_with_hints(1, "one.w", zero)?, vb.get_with_hints(1, "two.w", zero)?))
    };
    let model = Model::new(build, 0, &Device::Cpu).unwrap();
    let turn = |name: &str, params: &str, lr: f64, groups| NamedOptimizer {
        name: name.into(),
        params: params.into(),
        schedule: Some(Schedule::Exponential { gamma: 0.1 }),
        ..NamedOptimizer::single(SgdConfig { lr, ..Default::default() }.into(), groups)
    };
    let group = ParamGroup { params: "two.*".into(), lr: Some(0.06), ..Default::default() };
    let turns = vec![turn("first", "one.*", 0.01, vec![]), turn("second", "two.*", 0.02, vec![group])];
    let trainer = Trainer::new(TrainerConfig { micro_batch_size: Some(2), ..config(1) }).optimizers(turns);
    let test = LrFinderConfig { steps: 2, min_lr: 0.1, max_lr: 0.2, ..Default::default() };
    let found = trainer.find_lr(&model, &Data::stream(Ones), &test).unwrap();
    let expected = [("first", 1.), ("second", 2.), ("second: two.*", 6.)];
    assert!(found.proportions.iter().map(|(name, proportion)| (name.as_str(), *proportion)).eq(expected));
    // From 0, the gradient of (1 - w)^2 is -2: with a rate of 0.1 the first number moves to 0.2, with 0.6 the
    // second to 1.2. So the sum of the losses goes from 1 + 1 to 0.8^2 + 0.2^2.
    let losses: Vec<f64> = found.points.iter().map(|point| point.loss).collect();
    assert!((losses[0] - 2.).abs() < 1e-6 && (losses[1] - 0.68).abs() < 1e-6, "{losses:?}");
    let search = BatchFinderConfig { max: Some(2), steps: 1, ..Default::default() };
    let sizes = trainer.find_batch_size(&model, &Data::stream(Ones), &search).unwrap().trials;
    assert_eq!(sizes.iter().map(|trial| trial.batch_size).collect::<Vec<_>>(), [1, 2]);
}

/// A device that holds three samples, and fails as a GPU does.
struct Small(Tensor);

impl Module for Small {
    type Batch = Tensors;

    fn training_step(&self, batch: &Tensors, _: &mut Step) -> Result<Tensor> {
        match batch.len() {
            0..=3 => Ok(batch.0[0].broadcast_mul(&self.0)?.mean_all()?),
            _ => Err(Error::msg("DriverError(CUDA_ERROR_OUT_OF_MEMORY, \"out of memory\")")),
        }
    }
}

#[test]
fn a_full_device_ends_the_search_and_fails_at_the_first_size() {
    let model = Model::new(|vb| Ok(Small(vb.get(1, "w")?)), 0, &Device::Cpu).unwrap();
    let find = |start| {
        let search = BatchFinderConfig { start, steps: 1, ..Default::default() };
        Trainer::new(config(1)).find_batch_size(&model, &Data::stream(Ones), &search)
    };
    let found = find(2).unwrap();
    assert_eq!((found.largest, &found.ended[..]), (2, "a batch of 4 does not fit into the device's memory"));
    assert!(find(4).unwrap_err().to_string().contains("out of memory"));
}

#[test]
fn what_makes_no_sense_is_said() {
    let trainer = Trainer::new(config(1)).optimizer(SgdConfig { lr: 0., ..Default::default() });
    let error = trainer.find_lr(&model(), &data(), &LrFinderConfig::default()).unwrap_err().to_string();
    assert!(error.starts_with("`lr`: ") && error.ends_with("expected a number above 0"), "{error}");
    let find = |start, max| {
        let search = BatchFinderConfig { start, max, ..Default::default() };
        trainer.find_batch_size(&model(), &data(), &search).unwrap_err().to_string()
    };
    assert_eq!(find(21, None), "`start`: expected at most 20, as many samples as there are; found 21");
    assert_eq!(find(3, Some(2)), "`max`: expected at least the first size, 3; found 2");
    assert_eq!(find(0, None), "`start`: expected at least 1, found 0");
}

#[test]
fn in_fp16_a_rate_at_which_everything_overflows_ends_the_test_and_not_the_finding() {
    use candlepower::precision::Precision;
    use candlepower_tests::points::{Dropped, Points};
    // SGD's weights grow beyond the range of fp16: after that no loss scale helps.
    let config = TrainerConfig { precision: Precision::Fp16Mixed, ..config(9) };
    let trainer = Trainer::new(config).optimizer(SgdConfig::default());
    let model = Dropped::in_precision(1, Precision::Fp16Mixed);
    let test = LrFinderConfig { steps: 3, min_lr: 1e-3, max_lr: 1e30, ..Default::default() };
    let finding = trainer.find_lr(&model, &Data::new(Points { samples: 20 }), &test).unwrap();
    assert_eq!(finding.points.len(), 2);
}

#[test]
fn metrics_of_epochs_are_no_points_of_the_test() {
    use candlepower::precision::Precision;
    use candlepower_tests::points::{Dropped, Points};
    // Epochs have 3 steps: the test ends within one.
    let test = LrFinderConfig { steps: 10, max_lr: 1e-3, ..Default::default() };
    let model = Dropped::logging_epochs(1, Precision::Full);
    let found = Trainer::new(config(1)).find_lr(&model, &Data::new(Points { samples: 14 }), &test).unwrap();
    let losses: Vec<f64> = found.points.iter().map(|point| point.loss).collect();
    assert!(losses.len() == 10 && losses.iter().all(|loss| *loss > 0.), "{losses:?}");
}
