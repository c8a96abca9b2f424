//! Metrics of a whole evaluation: over all samples in order, regardless of their batch and rank.
#![allow(clippy::unwrap_used)]

use candle_core::Tensor;
use candle_nn::{Linear, linear};
use candlepower::metrics::Collected;
use candlepower::prelude::*;
use candlepower_tests::device;
use candlepower_tests::points::Points;
use candlepower_tests::recorder::Recorder;

type Metrics = fn(&Collected) -> Result<Vec<(String, f64)>>;

/// Collects values for each sample, and computes metrics from them.
struct Collects {
    linear: Linear,
    collect: fn(&Tensors, &Tensor, &mut Step),
    metrics: Metrics,
}

impl Module for Collects {
    type Batch = Tensors;

    fn training_step(&self, batch: &Tensors, step: &mut Step) -> Result<Tensor> {
        let prediction = self.linear.forward(&batch.0[0])?;
        (self.collect)(batch, &prediction, step);
        Ok((prediction - &batch.0[1])?.sqr()?.mean_all()?)
    }

    fn metrics(&self, all: &Collected) -> Result<Vec<(String, f64)>> {
        (self.metrics)(all)
    }
}

fn run(
    config: TrainerConfig,
    collect: fn(&Tensors, &Tensor, &mut Step),
    metrics: Metrics,
) -> Result<Vec<Record>> {
    let build = move |vb: VarBuilder| Ok(Collects { linear: linear(4, 1, vb)?, collect, metrics });
    let (model, heard) = (Model::new(build, 1, &device())?, Recorder::default());
    let data = Data::new(Points { samples: 8 }).val(Points { samples: 7 });
    let config = TrainerConfig { batch_size: 6, max_epochs: Some(1), ..config };
    Trainer::new(config).callback(heard.clone()).fit(&model, &data)?;
    Ok(heard.records().into_iter().filter(|record| record.split == Split::Val).collect())
}

fn index_and_prediction(batch: &Tensors, prediction: &Tensor, step: &mut Step) {
    step.collect("index", &batch.0[2]);
    step.collect("prediction", prediction);
}

#[test]
fn all_samples_come_in_their_order() {
    let metrics: Metrics = |all| {
        let index = all.get("index")?.to_vec1::<f32>()?;
        assert_eq!(index, [0., 1., 2., 3., 4., 5., 6.]);
        let prediction = all.get("prediction")?;
        assert_eq!(prediction.dims(), [7, 1]);
        let mut values = prediction.flatten_all()?.to_vec1::<f32>()?;
        values.sort_by(f32::total_cmp);
        Ok(vec![("median".into(), f64::from(values[3]))])
    };
    let median = |devices, micro_batch_size| {
        let config = TrainerConfig { devices, micro_batch_size, sanity_val_batches: 0, ..Default::default() };
        let records = run(config, index_and_prediction, metrics).unwrap();
        assert_eq!(records.len(), 1);
        records[0].metrics["median"]
    };
    let expected = median(1, None);
    // With five ranks, some have no batch.
    for (devices, micro) in [(1, Some(1)), (2, Some(2)), (3, Some(1)), (5, None)] {
        let found = median(devices, micro);
        assert!((found - expected).abs() < 1e-5, "{devices} devices, {micro:?}: {found} for {expected}");
    }
}

#[test]
fn what_does_not_fit_is_told() {
    let error =
        |collect, metrics: Metrics| run(TrainerConfig::default(), collect, metrics).unwrap_err().to_string();
    let two: Metrics = |all| Ok(vec![("x".into(), f64::from(all.get("predictions")?.elem_count() as u32))]);
    assert_eq!(
        error(index_and_prediction, two),
        "nothing was collected as `predictions`, only index, prediction"
    );
    let taken: Metrics = |_| Ok(vec![("loss".into(), 1.)]);
    assert_eq!(
        error(index_and_prediction, taken),
        "`Module::metrics` returns `loss`, which is logged already; use another name"
    );
    let mean = |_: &Tensors, prediction: &Tensor, step: &mut Step| {
        step.collect("mean", &prediction.mean_all().unwrap());
    };
    assert_eq!(
        error(mean, |_| Ok(Vec::new())),
        "validation_step, batch 1: `mean` is collected with shape []: expected a row for each of 6 samples"
    );
    let twice = |batch: &Tensors, _: &Tensor, step: &mut Step| {
        step.collect("index", &batch.0[2]);
        step.collect("index", &batch.0[2]);
    };
    let told = error(twice, |_| Ok(Vec::new()));
    assert!(told.contains("a module cannot collect `index` twice in one step"), "{told}");
}
