//! The shortest custom dataset, over a vector: length, spec, batch.
//!
//!     cargo run --release --example data_vector

use candlepower::candle_nn::{Linear, linear, loss::mse};
use candlepower::prelude::*;

/// Points (x, y).
struct Points(Vec<[f32; 2]>);

impl Dataset for Points {
    type Batch = Tensors;
    fn len(&self) -> usize {
        self.0.len()
    }
    fn spec(&self) {}
    fn batch(&self, samples: &[Sample]) -> Result<Tensors> {
        let points = samples.iter().flat_map(|sample| self.0[sample.index]);
        let points = Tensor::from_iter(points, &Device::Cpu)?.reshape(((), 2))?;
        Ok(Tensors(vec![points.narrow(1, 0, 1)?, points.narrow(1, 1, 1)?]))
    }
}

struct Line(Linear);

impl Module for Line {
    type Batch = Tensors;
    fn training_step(&self, batch: &Tensors, _: &mut Step) -> Result<Tensor> {
        Ok(mse(&self.0.forward(&batch.0[0])?, &batch.0[1])?)
    }
}

fn main() -> Result<()> {
    let points: Vec<[f32; 2]> = (0..200).map(|i| i as f32 / 100. - 1.).map(|x| [x, 3. * x + 0.5]).collect();
    let model = Model::new(|vb: VarBuilder| Ok(Line(linear(1, 1, vb)?)), 0, &Device::Cpu)?;
    let config = TrainerConfig { batch_size: 20, max_epochs: Some(40), ..Default::default() };
    let data = Data::new(Points(points.clone())).val(Points(points));
    Trainer::new(config).optimizer(SgdConfig { lr: 0.1, ..Default::default() }).fit(&model, &data)?;
    for (name, var) in model.params().vars() {
        println!("{name} {:.2}", var.flatten_all()?.to_vec1::<f32>()?[0]);
    }
    Ok(())
}
