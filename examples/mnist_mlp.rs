//! A non-video task with the same trainer: a small network that reads handwritten digits.
//!
//!     cargo run --release --example mnist_mlp [FOLDER WITH MNIST'S IDX FILES]

use candlepower::candle_nn::{Linear, linear, loss::cross_entropy};
use candlepower::prelude::*;
use candlepower::schemars::{self, JsonSchema};
use candlepower::serde::{Deserialize, Serialize};
use candlepower_datasets::digits::{Config, Digits};

/// The sizes of the network. In a TOML file they would be the fields of `[module]`.
#[derive(Clone, Serialize, Deserialize, JsonSchema)]
#[serde(crate = "candlepower::serde", deny_unknown_fields)]
struct MlpConfig {
    hidden: usize,
}

/// A network with one hidden layer.
struct Mlp {
    hidden: Linear,
    class: Linear,
}

impl Build for Mlp {
    type Config = MlpConfig;

    fn build(config: &MlpConfig, spec: &LabelledSpec, vb: VarBuilder) -> Result<Self> {
        let inputs = spec.shape.iter().product();
        Ok(Self {
            hidden: linear(inputs, config.hidden, vb.pp("hidden"))?,
            class: linear(config.hidden, spec.classes, vb.pp("class"))?,
        })
    }
}

impl Module for Mlp {
    type Batch = Labelled;

    fn training_step(&self, batch: &Labelled, step: &mut Step) -> Result<Tensor> {
        let pixels = batch.input.flatten_from(1)?;
        let logits = self.class.forward(&self.hidden.forward(&pixels)?.relu()?)?;
        let right = logits.argmax(1)?.eq(&batch.label)?.to_dtype(DType::F32)?;
        step.log("accuracy", &right.mean_all()?);
        Ok(cross_entropy(&logits, &batch.label)?)
    }
}

fn main() -> Result<()> {
    let digits = std::env::args().nth(1).unwrap_or_else(|| "builtin".into());
    let config = Config { digits };
    let (train, val) = (Digits::open(&config, Split::Train)?, Digits::open(&config, Split::Val)?);
    let model = Model::build::<Mlp>(&MlpConfig { hidden: 128 }, &train.spec(), 0, &Device::Cpu)?;
    let config = TrainerConfig { batch_size: 50, max_epochs: Some(10), ..Default::default() };
    let outcome = Trainer::new(config)
        .optimizer(AdamConfig { lr: 2e-3, ..Default::default() })
        .callback(ProgressBar::default())
        .fit(&model, &Data::new(train).val(val))?;
    let accuracy = outcome.validation.and_then(|metrics| metrics.get("accuracy").copied());
    println!("accuracy on held-out digits: {:.1} %", 100. * accuracy.unwrap_or_default());
    Ok(())
}
