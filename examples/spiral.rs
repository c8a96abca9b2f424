//! Learns to tell the two arms of a spiral apart: a dataset, a model and a main, in full.
use std::f32::consts::{PI, TAU};

use candlepower::candle_nn::{Linear, linear, loss::cross_entropy};
use candlepower::prelude::*;
use candlepower::rand::Rng;

struct Spiral;

impl Dataset for Spiral {
    type Batch = Labelled;

    fn len(&self) -> usize {
        2000
    }

    fn spec(&self) -> LabelledSpec {
        LabelledSpec { shape: vec![2], classes: 2 }
    }

    fn batch(&self, samples: &[Sample]) -> Result<Labelled> {
        let arm = |s: &Sample| (s.index % 2) as u32;
        let point = |s: &Sample| {
            let r: f32 = s.rng().random_range(0.1..1.0);
            [r * (TAU * r + PI * arm(s) as f32).sin(), r * (TAU * r + PI * arm(s) as f32).cos()]
        };
        let points: Vec<f32> = samples.iter().flat_map(point).collect();
        let arms: Vec<u32> = samples.iter().map(arm).collect();
        let input = Tensor::from_vec(points, (samples.len(), 2), &Device::Cpu)?;
        Ok(Labelled { input, label: Tensor::new(arms, &Device::Cpu)? })
    }
}

struct Mlp(Linear, Linear);

impl Module for Mlp {
    type Batch = Labelled;

    fn training_step(&self, batch: &Labelled, step: &mut Step) -> Result<Tensor> {
        let logits = self.1.forward(&self.0.forward(&batch.input)?.tanh()?)?;
        let right = logits.argmax(1)?.eq(&batch.label)?.to_dtype(DType::F32)?;
        step.log("accuracy", &right.mean_all()?);
        Ok(cross_entropy(&logits, &batch.label)?)
    }
}

fn main() -> Result<()> {
    let build = |vb: VarBuilder| Mlp(linear(2, 64, vb.pp("a"))?, linear(64, 2, vb.pp("b"))?);
    Ok(())
}
