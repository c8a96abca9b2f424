//! Losses that average over other things than samples add up over micro-batches, ranks and validation
//! batches.
#![allow(clippy::unwrap_used)]

use candle_core::{D, Tensor};
use candle_nn::{Linear, linear};
use candlepower::collective::{DistributedConfig, Shard};
use candlepower::prelude::*;
use candlepower_tests::points::{Points, weights};
use candlepower_tests::recorder::Recorder;
use candlepower_tests::{device, relative_error};

/// The mean error over things. Sample `i` has `i % 4` of them, so some have none.
struct Things {
    linear: Linear,
    /// Whether it reports their number in the step with this number.
    says_so: fn(u64) -> bool,
}

impl Module for Things {
    type Batch = Tensors;

    fn training_step(&self, batch: &Tensors, step: &mut Step) -> Result<Tensor> {
        let [x, y, index] = &batch.0[..] else { return Err(Error::msg("three tensors")) };
        let things: Vec<f32> = index.to_vec1::<f32>()?.iter().map(|i| i % 4.).collect();
        let total: f32 = things.iter().sum();
        let errors = (self.linear.forward(x)? - y)?.sqr()?.squeeze(D::Minus1)?;
        if !step.is_training() || (self.says_so)(step.global_step()) {
            step.weigh_loss(f64::from(total));
        }
        let of = Tensor::new(things, index.device())?;
        Ok(((errors * of)?.sum_all()? / f64::from(total.max(1.)))?)
    }
}

fn model(says_so: fn(u64) -> bool) -> Model<Tensors> {
    let build = move |vb: VarBuilder| Ok(Things { linear: linear(4, 1, vb)?, says_so });
    Model::new(build, 1, &device()).unwrap()
}

/// 11 samples in batches of 5: the last batch has one sample, so some ranks have none.
fn data() -> Data<Tensors> {
    Data::new(Points { samples: 11 }).val(Points { samples: 7 }).workers(0)
}

/// The parameters after three epochs, and all losses of training and validation.
fn trained(config: TrainerConfig, shard: Shard, says_so: fn(u64) -> bool) -> Result<(Tensor, Vec<f64>)> {
    let (model, heard) = (model(says_so), Recorder::default());
    let config = TrainerConfig { batch_size: 5, max_epochs: Some(3), log_every: 1, ..config };
    Trainer::new(config)
        .distributed(DistributedConfig { shard, ..Default::default() })
        .optimizer(SgdConfig { lr: 0.1, momentum: 0.9, ..Default::default() })
        .callback(heard.clone())
        .fit(&model, &data())?;
    let flat: Vec<f32> = weights(&model).into_iter().flat_map(|(_, values)| values).collect();
    let losses = heard.records().iter().map(|record| record.metrics["loss"]).collect();
    Ok((Tensor::new(flat, &candle_core::Device::Cpu)?, losses))
}

#[test]
fn a_loss_over_things_is_that_of_one_batch_of_all() {
    let always = |_| true;
    // With clipping, too large a gradient would go unnoticed.
    for clip_norm in [None, Some(0.5)] {
        let whole = TrainerConfig { clip_norm, ..Default::default() };
        let (expected, losses) = trained(whole.clone(), Shard::None, always).unwrap();
        for (devices, micro_batch_size, shard) in [
            (1, Some(1), Shard::None),
            (1, Some(2), Shard::None),
            (1, Some(3), Shard::None),
            (2, None, Shard::None),
            (3, Some(1), Shard::None),
            (5, None, Shard::None),
            (2, Some(2), Shard::Optimizer),
        ] {
            let config = TrainerConfig { devices, micro_batch_size, ..whole.clone() };
            let (actual, found) = trained(config, shard, always).unwrap();
            let (error, of) =
                (relative_error(&actual, &expected), format!("{devices}, {micro_batch_size:?}"));
            assert!(error < 1e-6, "{of}: relative error {error:e}");
            // Nine of training, three of validation.
            assert_eq!((found.len(), losses.len()), (12, 12));
            for (found, expected) in found.iter().zip(&losses) {
                assert!((found - expected).abs() < 5e-6 * expected, "{of}: {found} for {expected}");
            }
        }
    }
}

#[test]
fn who_weighs_losses_does_so_always() {
    for devices in [1, 2] {
        let config = || TrainerConfig { devices, ..Default::default() };
        for says_so in [|step| step == 0, |step| step == 4] as [fn(u64) -> bool; 2] {
            let error = trained(config(), Shard::None, says_so).unwrap_err().to_string();
            assert!(error.contains("`Step::weigh_loss` must do so in every step"), "{error}");
        }
    }
}

#[test]
fn a_loss_that_is_the_mean_of_less_than_nothing_is_refused() {
    /// Weighs its loss by this number.
    struct Weighs(Linear, f64);
    impl Module for Weighs {
        type Batch = Tensors;

        fn training_step(&self, batch: &Tensors, step: &mut Step) -> Result<Tensor> {
            step.weigh_loss(self.1);
            Ok(self.0.forward(&batch.0[0])?.mean_all()?)
        }
    }
    for weight in [-1., f64::NAN, f64::INFINITY] {
        let build = move |vb: VarBuilder| Ok(Weighs(linear(4, 1, vb)?, weight));
        let config = TrainerConfig { max_steps: Some(1), ..Default::default() };
        let error = Trainer::new(config).fit(&Model::new(build, 1, &device()).unwrap(), &data());
        let expected = format!("`Step::weigh_loss` was given {weight}: expected a number of at least 0");
        assert!(error.unwrap_err().to_string().contains(&expected));
    }
}
