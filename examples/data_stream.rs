//! A custom dataset read in sequence: lines of text, whose number is not known in advance.
//!
//!     cargo run --release --example data_stream

use std::io::{BufRead, BufReader};

use candlepower::candle_nn::{Linear, linear, loss::mse};
use candlepower::data::{Items, Pass};
use candlepower::prelude::*;

/// Lines with three numbers: two inputs and a target.
struct Lines;

/// Stands for a file, a pipe or a service, which each pass reads from the beginning.
fn reader() -> impl BufRead + Send {
    let line = |i: u32| (i % 7, i % 5);
    let text: String = (0..300).map(line).map(|(a, b)| format!("{a} {b} {}\n", 2 * a + b)).collect();
    BufReader::new(std::io::Cursor::new(text))
}

impl Stream for Lines {
    type Batch = Tensors;
    type Item = String;
    fn spec(&self) {}
    fn items(&self, _: Pass) -> Result<Items<String>> {
        Ok(Box::new(reader().lines().map(|line| line.map_err(Error::file("lines")))))
    }
    // Several workers parse at once, but only one reads at a time.
    fn batch(&self, lines: Vec<String>, _: &[Sample]) -> Result<Tensors> {
        let numbers =
            lines.iter().flat_map(|line| line.split(' ')).map(str::parse).collect::<Result<Vec<f32>, _>>();
        let numbers = numbers.map_err(|error| Error::msg(format!("not a number: {error}")))?;
        let numbers = Tensor::from_vec(numbers, (lines.len(), 3), &Device::Cpu)?;
        Ok(Tensors(vec![numbers.narrow(1, 0, 2)?, numbers.narrow(1, 2, 1)?]))
    }
}

struct Sum(Linear);

impl Module for Sum {
    type Batch = Tensors;
    fn training_step(&self, batch: &Tensors, _: &mut Step) -> Result<Tensor> {
        Ok(mse(&self.0.forward(&batch.0[0])?, &batch.0[1])?)
    }
}

fn main() -> Result<()> {
    let model = Model::new(|vb: VarBuilder| Ok(Sum(linear(2, 1, vb)?)), 0, &Device::Cpu)?;
    let config = TrainerConfig { batch_size: 30, max_epochs: Some(60), ..Default::default() };
    let data = Data::stream(Lines);
    Trainer::new(config).optimizer(AdamConfig { lr: 0.05, ..Default::default() }).fit(&model, &data)?;
    for (name, var) in model.params().vars() {
        println!("{name} {:.2?}", var.flatten_all()?.to_vec1::<f32>()?);
    }
    Ok(())
}
