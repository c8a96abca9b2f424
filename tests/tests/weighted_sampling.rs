//! Weighted sampling: samples are drawn as often as their weights say, and a resumed run makes the same draws.
#![allow(clippy::unwrap_used)]

use std::path::Path;
use std::sync::{Arc, Mutex};

use candlepower::checkpoint::{Checkpoint, CheckpointConfig};
use candlepower::data::balanced_weights;
use candlepower::prelude::*;
use candlepower_tests::points::{Dropped, Points};

const SAMPLES: usize = 40;

/// One sample in ten is of class 1.
fn class(index: usize) -> u32 {
    u32::from(index.is_multiple_of(10))
}

/// Points with weights, which record what is read of them.
struct Weighted {
    weights: Vec<f64>,
    read: Arc<Mutex<Vec<Sample>>>,
}

impl Dataset for Weighted {
    type Batch = Tensors;

    fn len(&self) -> usize {
        SAMPLES
    }

    fn spec(&self) {}

    fn batch(&self, samples: &[Sample]) -> Result<Tensors> {
        self.read.lock().unwrap().extend(samples);
        Points { samples: SAMPLES }.batch(samples)
    }

    fn weights(&self) -> Option<Vec<f64>> {
        Some(self.weights.clone())
    }
}

/// Trains up to this step, saving each one, and returns the samples that were read.
fn train(
    weights: Vec<f64>,
    max_steps: u64,
    devices: usize,
    dir: &Path,
    from: Option<u64>,
) -> Result<Vec<Sample>> {
    let read = Arc::new(Mutex::new(Vec::new()));
    let data = Data::new(Weighted { weights, read: read.clone() }).workers(0);
    let config = TrainerConfig { batch_size: 7, max_steps: Some(max_steps), devices, ..Default::default() };
    let checkpoints = CheckpointConfig { every_steps: Some(1), keep_last: 99, ..Default::default() };
    let mut trainer = Trainer::new(config).seed(3).checkpoints(dir, checkpoints);
    if let Some(step) = from {
        trainer = trainer.resume(Checkpoint::load(&dir.join(step.to_string()))?);
    }
    trainer.fit(&Dropped::model(1), &data)?;
    let read = read.lock().unwrap().clone();
    Ok(read)
}

fn balance() -> Vec<f64> {
    balanced_weights(&(0..SAMPLES).map(class).collect::<Vec<_>>())
}

#[test]
fn classes_are_drawn_equally_often() {
    let dir = tempfile::tempdir().unwrap();
    // 50 epochs of 40 samples.
    let read = train(balance(), 50 * 6, 1, dir.path(), None).unwrap();
    let rare = read.iter().filter(|sample| class(sample.index) == 1).count();
    assert_eq!(read.len(), 50 * SAMPLES);
    assert!((900..1100).contains(&rare), "{rare} of 2000 are of the rare class");
}

#[test]
fn a_resumed_run_and_several_ranks_draw_the_same_samples() {
    let dir = tempfile::tempdir().unwrap();
    let whole = train(balance(), 10, 1, dir.path(), None).unwrap();
    // Six steps of 7, 7, 7, 7, 7 and 5 samples are an epoch.
    assert_eq!(whole.len(), 40 + 28);
    assert_eq!(train(balance(), 10, 1, dir.path(), Some(4)).unwrap(), whole[28..]);
    let key = |sample: &Sample| (sample.epoch, sample.index, sample.repeat);
    let mut two = train(balance(), 10, 2, tempfile::tempdir().unwrap().path(), None).unwrap();
    let mut one = whole.clone();
    two.sort_by_key(key);
    one.sort_by_key(key);
    assert_eq!(two, one);
}

#[test]
fn wrong_weights_are_refused_before_anything_is_read() {
    let dir = tempfile::tempdir().unwrap();
    let error = train(vec![1.; 39], 1, 1, dir.path(), None).unwrap_err().to_string();
    assert_eq!(error, "`Dataset::weights` has 39 weights for 40 samples");
}
