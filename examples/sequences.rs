//! Sequences of different lengths: a custom batch type, a loss over tokens, a metric over all samples, a
//! callback.
//!
//!     cargo run --release --example sequences

use candlepower::candle_nn::{Linear, linear};
use candlepower::metrics::{Collected, classification::auroc};
use candlepower::prelude::*;
use candlepower::rand::Rng;

/// Sequences padded with zeros to the length of the longest.
struct Sequences {
    /// (B, T).
    tokens: Tensor,
    /// (B, T): 1 for tokens, 0 for padding.
    is_token: Tensor,
    /// (B, 1): 0 or 1.
    label: Tensor,
    /// Number of tokens.
    count: usize,
}

impl Batch for Sequences {
    type Spec = ();

    fn len(&self) -> usize {
        self.label.elem_count()
    }

    fn map(&self, f: &mut dyn FnMut(&Tensor) -> Result<Tensor>) -> Result<Self> {
        let (tokens, is_token, label) = (f(&self.tokens)?, f(&self.is_token)?, f(&self.label)?);
        Ok(Self { tokens, is_token, label, count: self.count })
    }
}

/// Noise around 1 or -1, according to the label.
struct Noise {
    samples: usize,
}

impl Dataset for Noise {
    type Batch = Sequences;

    fn len(&self) -> usize {
        self.samples
    }

    fn spec(&self) {}

    fn batch(&self, samples: &[Sample]) -> Result<Sequences> {
        let sequence = |sample: &Sample| -> (Vec<f32>, f32) {
            let (mut rng, label) = (sample.rng(), (sample.index % 2) as f32);
            let length = rng.random_range(1..20);
            ((0..length).map(|_| 2. * label - 1. + rng.random_range(-4f32..4.)).collect(), label)
        };
        let (mut sequences, labels): (Vec<_>, Vec<_>) = samples.iter().map(sequence).unzip();
        let longest = sequences.iter().map(Vec::len).max().unwrap_or(0);
        let one_if_token = |tokens: &Vec<f32>| -> Vec<f32> {
            (0..longest).map(|t| if t < tokens.len() { 1. } else { 0. }).collect()
        };
        let is_token: Vec<_> = sequences.iter().map(one_if_token).collect();
        let count = sequences.iter().map(Vec::len).sum();
        sequences.iter_mut().for_each(|tokens| tokens.resize(longest, 0.));
        Ok(Sequences {
            tokens: Tensor::new(sequences, &Device::Cpu)?,
            is_token: Tensor::new(is_token, &Device::Cpu)?,
            label: Tensor::new(labels, &Device::Cpu)?.unsqueeze(1)?,
            count,
        })
    }
}

/// Predicts the label from each token separately; a sequence's score is the mean over its tokens.
struct Guess(Linear);

impl Module for Guess {
    type Batch = Sequences;

    fn training_step(&self, batch: &Sequences, step: &mut Step) -> Result<Tensor> {
        let (sequences, length) = batch.tokens.dims2()?;
        let logits =
            self.0.forward(&batch.tokens.flatten_all()?.unsqueeze(1)?)?.reshape((sequences, length))?;
        let of_tokens = (&logits * &batch.is_token)?;
        step.collect("score", &(of_tokens.sum(1)? / batch.is_token.sum(1)?)?);
        step.collect("label", &batch.label);
        // The cross entropy of each token, averaged over tokens: batches with more tokens count more.
        let losses = ((logits.relu()? - logits.broadcast_mul(&batch.label)?)?
            + (logits.abs()?.neg()?.exp()? + 1.)?.log()?)?;
        step.weigh_loss(batch.count as f64);
        Ok(((losses * &batch.is_token)?.sum_all()? / batch.count as f64)?)
    }

    fn metrics(&self, all: &Collected) -> Result<Vec<(String, f64)>> {
        Ok(vec![("auroc".into(), auroc(&all.get("score")?, &all.get("label")?)?)])
    }
}

/// Ends the run once the metric is good enough.
struct GoodEnough(f64);

impl Callback for GoodEnough {
    fn on_validation_end(&mut self, record: &mut Record) -> Result<Flow> {
        Ok(match record.metrics["auroc"] {
            auroc if auroc >= self.0 => {
                Flow::Stop(StopReason::Callback(format!("{auroc:.3} is good enough")))
            }
            _ => Flow::Continue,
        })
    }

    // Checked before the first step: a run without this metric does not start.
    fn monitored_metric(&self) -> Option<&str> {
        Some("auroc")
    }
}

fn main() -> Result<()> {
    let model = Model::new(|vb: VarBuilder| Ok(Guess(linear(1, 1, vb)?)), 0, &Device::Cpu)?;
    let config = TrainerConfig {
        batch_size: 32,
        micro_batch_size: Some(8),
        max_epochs: Some(50),
        ..Default::default()
    };
    let data = Data::new(Noise { samples: 640 }).val(Noise { samples: 200 });
    let trainer = Trainer::new(config).callback(GoodEnough(0.9)).callback(ProgressBar::default());
    let outcome = trainer.optimizer(AdamConfig { lr: 0.02, ..Default::default() }).fit(&model, &data)?;
    println!("{:?}: {:?}", outcome.reason, outcome.validation);
    Ok(())
}
