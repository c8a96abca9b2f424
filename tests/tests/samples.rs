//! What a dataset is told about the samples that it reads: their split, and whether augmentations apply.
#![allow(clippy::unwrap_used)]

use std::sync::{Arc, Mutex};

use candlepower::prelude::*;
use candlepower::trainer::Limit;
use candlepower_models::ConvLstm;
use candlepower_models::conv_lstm::ConvLstmConfig;
use candlepower_tests::blobs::Blobs;

/// Blobs that record the samples read from them.
struct Recorded {
    blobs: Blobs,
    read: Arc<Mutex<Vec<Sample>>>,
}

impl Dataset for Recorded {
    type Batch = Video;

    fn len(&self) -> usize {
        self.blobs.len()
    }

    fn spec(&self) -> VideoSpec {
        self.blobs.spec()
    }

    fn batch(&self, samples: &[Sample]) -> Result<Video> {
        self.read.lock().unwrap().extend(samples);
        self.blobs.batch(samples)
    }
}

/// The samples of the training, validation and test data that `work` reads.
fn read(work: impl FnOnce(&mut Trainer, &Model<Video>, &Data<Video>)) -> [Vec<Sample>; 3] {
    let read: [Arc<Mutex<Vec<Sample>>>; 3] = Default::default();
    let [train, val, test] =
        [0, 1, 2].map(|i| Recorded { blobs: Blobs { samples: 4 }, read: read[i].clone() });
    let data = Data::new(train).val(val).test(test).workers(0);
    let config = ConvLstmConfig { hidden: 2, ..Default::default() };
    let spec = data.train.spec();
    let build = move |vb: VarBuilder| ConvLstm::build(&config, &spec, vb);
    let model = Model::new(build, 1, &Device::Cpu).unwrap();
    let config = TrainerConfig { batch_size: 2, max_steps: Some(2), ..Default::default() };
    work(&mut Trainer::new(config), &model, &data);
    read.map(|samples| samples.lock().unwrap().clone())
}

fn is(split: Split, augment: bool) -> impl Fn(&Sample) -> bool {
    move |sample| sample.split == split && sample.augment == augment
}

#[test]
fn augmentations_apply_in_training_only() {
    let [train, val, _] = read(|trainer, model, data| drop(trainer.fit(model, data).unwrap()));
    assert!(!train.is_empty() && train.iter().all(is(Split::Train, true)), "{train:?}");
    assert!(!val.is_empty() && val.iter().all(is(Split::Val, false)), "{val:?}");
    for predicts in [false, true] {
        let [train, ..] = read(|trainer, model, data| match predicts {
            true => drop(trainer.predict_split(model, data, Split::Train).unwrap()),
            false => drop(trainer.validate(model, data, Split::Train).unwrap()),
        });
        assert!(train.len() == 4 && train.iter().all(is(Split::Train, false)), "{train:?}");
    }
}

#[test]
fn data_to_evaluate_that_is_empty_or_of_other_sizes_is_refused() {
    /// Data with no samples, or with frames of another size.
    struct Other {
        samples: usize,
        size: usize,
    }
    impl Dataset for Other {
        type Batch = Video;
        fn len(&self) -> usize {
            self.samples
        }
        fn spec(&self) -> VideoSpec {
            VideoSpec { height: self.size, ..Blobs { samples: 1 }.spec() }
        }
        fn batch(&self, samples: &[Sample]) -> Result<Video> {
            Blobs { samples: 1 }.batch(samples)
        }
    }
    let config = ConvLstmConfig { hidden: 2, ..Default::default() };
    let build = move |vb: VarBuilder| ConvLstm::build(&config, &Blobs { samples: 1 }.spec(), vb);
    let model = Model::new(build, 1, &Device::Cpu).unwrap();
    let trainer = || Trainer::new(TrainerConfig { max_steps: Some(1), ..Default::default() });
    for (samples, size, expected) in [
        (0, 8, "the val data is empty"),
        (2, 9, "the val data differs from the training data: expected VideoSpec"),
    ] {
        let data = Data::new(Blobs { samples: 2 }).val(Other { samples, size });
        let evaluated = trainer().validate(&model, &data, Split::Val).unwrap_err().to_string();
        let predicted = trainer().predict_split(&model, &data, Split::Val).unwrap_err().to_string();
        assert!(evaluated.contains(expected) && predicted.contains(expected), "{evaluated}, {predicted}");
        assert!(trainer().fit(&model, &data).is_err());
    }
}

#[test]
fn predictions_of_any_batch_are_written_as_numbers() {
    let place = tempfile::tempdir().unwrap();
    let (batch, prediction) = (Tensors(Vec::new()), Tensor::new(&[[1f32, 2.]], &Device::Cpu).unwrap());
    batch.write(&prediction, &place.path().join("a.npy")).unwrap();
    let bytes = std::fs::read(place.path().join("a.npy")).unwrap();
    assert!(
        bytes.starts_with(b"\x93NUMPY")
            && bytes.ends_with(&[1f32.to_le_bytes(), 2f32.to_le_bytes()].concat())
    );
    let error = batch.write(&prediction, &place.path().join("a.csv")).unwrap_err().to_string();
    assert!(error.contains("are written as .npy; for other files, implement `Batch::write`"), "{error}");
}

#[test]
fn batches_to_overfit_are_the_same_in_training_and_validation() {
    let overfit = |model: &Model<Video>, data: &Data<Video>| {
        let overfit_batches = Some(Limit::Batches(1));
        let config = TrainerConfig {
            batch_size: 2,
            max_steps: Some(2),
            overfit_batches,
            sanity_val_batches: 0,
            ..Default::default()
        };
        Trainer::new(config).fit(model, data).unwrap();
    };
    let [train, val, _] = read(|_, model, data| overfit(model, data));
    assert!(val.is_empty() && train.len() > 4);
    assert!(train.chunks(2).all(|batch| batch == &train[..2]), "{train:?}");
}

#[test]
fn scores_by_lead_time_are_of_the_split_that_is_asked_for() {
    for split in [Split::Val, Split::Test] {
        let [_, val, test] = read(|trainer, model, data| drop(trainer.compare(model, data, split).unwrap()));
        let (asked, other) = if split == Split::Val { (val, test) } else { (test, val) };
        assert!(asked.len() == 4 && asked.iter().all(is(split, false)), "{asked:?}");
        assert!(other.is_empty());
    }
}
