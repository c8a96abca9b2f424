//! Every training is reproducible, independent of workers and micro-batches, and resumable bit for bit.
#![allow(clippy::unwrap_used)]

use std::collections::HashMap;
use std::path::Path;

use candlepower::candle_nn::{Linear, linear};
use candlepower::checkpoint::{self, Checkpoint, CheckpointConfig};
use candlepower::prelude::*;
use candlepower_models::ConvLstm;
use candlepower_models::conv_lstm::ConvLstmConfig;
use candlepower_tests::blobs::Blobs;
use candlepower_tests::{device, relative_error};

const SAMPLES: usize = 20;

fn model(seed: u64) -> Model<Video> {
    let config = ConvLstmConfig { hidden: 4, ..Default::default() };
    Model::build::<ConvLstm>(&config, &Blobs { samples: 1 }.spec(), seed, &device()).unwrap()
}

fn config(batch_size: usize, max_steps: u64) -> TrainerConfig {
    TrainerConfig { batch_size, max_steps: Some(max_steps), ..Default::default() }
}

fn data(workers: usize) -> Data<Video> {
    Data::new(Blobs { samples: SAMPLES }).val(Blobs { samples: 7 }).workers(workers)
}

/// Every file of a checkpoint, byte for byte.
fn files(checkpoint: &Path) -> HashMap<String, Vec<u8>> {
    let entries = std::fs::read_dir(checkpoint).unwrap().map(Result::unwrap);
    entries.map(|e| (e.file_name().into_string().unwrap(), std::fs::read(e.path()).unwrap())).collect()
}

/// Trains into a new folder and returns the files of the last checkpoint.
fn train(trainer: Trainer, workers: usize) -> HashMap<String, Vec<u8>> {
    let dir = tempfile::tempdir().unwrap();
    let mut trainer = trainer.checkpoints(dir.path(), CheckpointConfig::default());
    trainer.fit(&model(1), &data(workers)).unwrap();
    files(&dir.path().join("last"))
}

#[test]
fn two_runs_with_one_seed_are_bit_identical_for_any_number_of_workers() {
    let run = |workers, seed| train(Trainer::new(config(6, 7)).seed(seed), workers);
    let first = run(2, 5);
    assert!(first.len() == 4 && first["model.safetensors"].len() > 1000);
    assert_eq!(first, run(2, 5));
    assert_eq!(first, run(0, 5));
    assert_eq!(first, run(4, 5));
    assert_ne!(first["model.safetensors"], run(2, 6)["model.safetensors"]);
}

/// The gradients of one step, read from SGD's momentum after it.
fn gradients(batch_size: usize, micro_batch_size: Option<usize>) -> HashMap<String, Tensor> {
    let dir = tempfile::tempdir().unwrap();
    let sgd = SgdConfig { lr: 0.1, momentum: 0.9, ..Default::default() };
    Trainer::new(TrainerConfig { micro_batch_size, ..config(batch_size, 1) })
        .optimizer(sgd)
        .checkpoints(dir.path(), CheckpointConfig::default())
        .fit(&model(1), &data(2))
        .unwrap();
    candle_core::safetensors::load(dir.path().join("last/optimizer.safetensors"), &Device::Cpu).unwrap()
}

#[test]
fn one_batch_equals_its_micro_batches() {
    let whole = gradients(8, None);
    assert_eq!(whole.len(), model(1).params().vars().len());
    // 8 is not a multiple of 3: the last micro-batch is smaller and must count less.
    for micro in [2, 3] {
        for (name, expected) in &whole {
            let error = relative_error(&gradients(8, Some(micro))[name], expected);
            assert!(error < 1e-6, "micro-batches of {micro}, {name}: relative error {error:e}");
        }
    }
}

#[test]
fn a_resumed_run_ends_with_the_same_bits() {
    // 20 samples in batches of 6: step 5 is the first of the second epoch, and each epoch ends with a batch
    // of 2.
    let trainer = |steps| Trainer::new(config(6, steps)).seed(5);
    let whole = train(trainer(9), 2);
    for stop in [1, 4, 5, 8] {
        let dir = tempfile::tempdir().unwrap();
        let keep = CheckpointConfig { keep_last: 9, ..Default::default() };
        trainer(stop).checkpoints(dir.path(), keep.clone()).fit(&model(1), &data(2)).unwrap();
        let checkpoint = Checkpoint::load(&checkpoint::latest(dir.path()).unwrap().unwrap()).unwrap();
        // Another process would start from other initial values and use other workers.
        let outcome = trainer(9).checkpoints(dir.path(), keep).resume(checkpoint).fit(&model(77), &data(1));
        assert_eq!(outcome.unwrap().progress.samples, 2 * 20 + 6);
        let resumed = files(&dir.path().join("9"));
        for file in ["model.safetensors", "optimizer.safetensors"] {
            assert!(whole[file] == resumed[file], "resumed at step {stop}: {file} differs");
        }
    }
}

#[test]
fn a_checkpoint_of_other_batches_is_refused_and_an_old_one_is_replaced() {
    let dir = tempfile::tempdir().unwrap();
    let trainer = |batch| Trainer::new(config(batch, 3)).checkpoints(dir.path(), CheckpointConfig::default());
    trainer(6).fit(&model(1), &data(1)).unwrap();
    let load = || Checkpoint::load(&dir.path().join("3")).unwrap();
    let error = trainer(5).resume(load()).fit(&model(1), &data(1)).unwrap_err().to_string();
    let expected =
        "the checkpoint saw 18 samples in 0 epochs and 3 steps; 20 samples in batches of 5 do not add up";
    assert!(error.starts_with(expected), "{error}");
    // A new training into the same folder must not keep old weights under its own step.
    let before = files(&dir.path().join("3"));
    trainer(6).fit(&model(2), &data(1)).unwrap();
    assert_ne!(before, files(&dir.path().join("3")));
}

/// Two layers; the loss depends only on the first.
struct CutOff(Linear, Linear);

impl Module for CutOff {
    type Batch = Tensors;

    fn training_step(&self, batch: &Tensors, _: &mut Step) -> Result<Tensor> {
        let features = self.0.forward(&batch.0[0])?;
        let lost = self.1.forward(&features)?.detach();
        Ok((features.mean_all()? + lost.mean_all()?)?)
    }
}

struct Ones;

impl Dataset for Ones {
    type Batch = Tensors;

    fn len(&self) -> usize {
        4
    }

    fn spec(&self) {}

    fn batch(&self, samples: &[Sample]) -> Result<Tensors> {
        Ok(Tensors(vec![Tensor::ones((samples.len(), 3), DType::F32, &Device::Cpu)?]))
    }
}

#[test]
fn a_parameter_that_the_loss_does_not_reach_is_refused_by_name() {
    let build = |vb: VarBuilder| Ok(CutOff(linear(3, 3, vb.pp("used"))?, linear(3, 3, vb.pp("cut"))?));
    let model = Model::new(build, 0, &device()).unwrap();
    let error = Trainer::new(config(2, 1)).fit(&model, &Data::new(Ones)).unwrap_err().to_string();
    assert!(error.starts_with("no gradient reaches 2 of 4 parameters: cut.weight, cut.bias\n"), "{error}");
}

/// The same layers; declares which parameters it does not use, possibly wrongly.
struct Says(CutOff, &'static [&'static str]);

impl Module for Says {
    type Batch = Tensors;

    fn training_step(&self, batch: &Tensors, step: &mut Step) -> Result<Tensor> {
        self.0.training_step(batch, step)
    }

    fn unused_parameters(&self) -> &[&str] {
        self.1
    }
}

fn train_saying(unused: &'static [&'static str], devices: usize) -> Result<Model<Tensors>> {
    let build = move |vb: VarBuilder| {
        Ok(Says(CutOff(linear(3, 3, vb.pp("used"))?, linear(3, 3, vb.pp("cut"))?), unused))
    };
    let model = Model::new(build, 0, &device())?;
    Trainer::new(TrainerConfig { devices, ..config(2, 1) }).fit(&model, &Data::new(Ones))?;
    Ok(model)
}

#[test]
fn what_a_module_says_is_unused_needs_no_gradient_and_is_not_moved() {
    let before = Model::new(
        |vb| Ok(CutOff(linear(3, 3, vb.pp("used"))?, linear(3, 3, vb.pp("cut"))?)),
        0,
        &Device::Cpu,
    );
    let after = train_saying(&["cut.*"], 1).unwrap();
    for ((name, before), (_, after)) in before.unwrap().params().vars().iter().zip(after.params().vars()) {
        let moved = relative_error(&after, before) > 0.;
        assert_eq!(moved, name.starts_with("used"), "{name}");
    }
    let said = |unused| train_saying(unused, 1).err().unwrap().to_string();
    assert!(said(&["cut.weight"]).starts_with("no gradient reaches 1 of 3 parameters: cut.bias\n"));
    for devices in [1, 2] {
        let error = train_saying(&["*"], devices).err().unwrap().to_string();
        let place = error.find("the module declares `used.").unwrap_or_else(|| panic!("{error}"));
        assert!(error[place..].contains("unused, but a gradient reaches it"), "{error}");
    }
    let error = said(&["cut.*", "gone"]);
    assert_eq!(error, "the module declares `gone` unused, which matches no parameter");
}

/// Logs the brightness of its input in validation.
struct Brightness(Tensor);

impl Module for Brightness {
    type Batch = Video;

    fn training_step(&self, _: &Video, _: &mut Step) -> Result<Tensor> {
        Ok(self.0.sqr()?.sum_all()?)
    }

    fn validation_step(&self, batch: &Video, step: &mut Step) -> Result<Tensor> {
        // The mean of a value that differs between samples shows whether each counts once.
        let brightness = batch.input.mean_all()?;
        step.log("brightness", &brightness);
        Ok(brightness)
    }
}

#[test]
fn evaluation_counts_every_sample_once_whatever_the_batch_size() {
    let brightness = |batch_size| {
        let build = |vb: VarBuilder| Ok(Brightness(vb.get(1, "w")?));
        let model = Model::new(build, 0, &device()).unwrap();
        Trainer::new(config(batch_size, 1)).validate(&model, &data(2), Split::Val).unwrap()["brightness"]
    };
    let one_by_one = brightness(1);
    for batch_size in [2, 3, 7, 16] {
        let difference = (brightness(batch_size) / one_by_one - 1.).abs();
        assert!(difference < 1e-6, "batches of {batch_size}: off by {difference:e}");
    }
}
