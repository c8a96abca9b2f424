//! Learns to tell the two arms of a spiral apart: a dataset, a model and a main, in full.
use candlepower::candle_nn::{Linear, linear, loss::cross_entropy};
use candlepower::{prelude::*, rand::Rng};
use std::f32::consts::{PI, TAU};

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
            let r: f32 = s.rng().random();
            let angle = TAU * r + PI * arm(s) as f32;
            [r * angle.cos(), r * angle.sin()]
        };
        let input = Tensor::from_iter(samples.iter().flat_map(point), &Device::Cpu)?.reshape(((), 2))?;
        Ok(Labelled { input, label: Tensor::from_iter(samples.iter().map(arm), &Device::Cpu)? })
    }
}

struct Mlp(Linear, Linear);

impl Module for Mlp {
    type Batch = Labelled;
    fn training_step(&self, batch: &Labelled, step: &mut Step) -> Result<Tensor> {
        let logits = self.1.forward(&self.0.forward(&batch.input)?.relu()?)?;
        step.log("accuracy", &logits.argmax(1)?.eq(&batch.label)?.to_dtype(DType::F32)?.mean_all()?);
        Ok(cross_entropy(&logits, &batch.label)?)
    }
}

fn main() -> Result<()> {
    let mlp = |vb: VarBuilder| Ok(Mlp(linear(2, 64, vb.pp("hidden"))?, linear(64, 2, vb.pp("class"))?));
    let model = Model::new(mlp, 0, &Device::Cpu)?;
    let config = TrainerConfig { batch_size: 50, max_epochs: Some(20), ..Default::default() };
    let mut trainer = Trainer::new(config).callback(ProgressBar::default());
    trainer.fit(&model, &Data::new(Spiral).val(Spiral)).map(drop)
}
