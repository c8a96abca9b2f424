//! Optimizers agree with PyTorch's on fixed gradients, step by step; with `CANDLEPOWER_TEST_DEVICE=cuda` on a CUDA device.
#![allow(clippy::unwrap_used)]

use candle_core::{Tensor, Var};
use candlepower::optim::{Clipping, OptimizerConfig, Param};
use candlepower::schedule::Schedule;
use candlepower_tests::{device, golden};
use serde_json::Value;

/// The optimizer that PyTorch calls by this name.
fn parse(name: &str, fields: Value) -> OptimizerConfig {
    match name {
        "Adam" => OptimizerConfig::Adam(serde_json::from_value(fields).unwrap()),
        "AdamW" => OptimizerConfig::AdamW(serde_json::from_value(fields).unwrap()),
        "SGD" => OptimizerConfig::Sgd(serde_json::from_value(fields).unwrap()),
        "RMSprop" => OptimizerConfig::Rmsprop(serde_json::from_value(fields).unwrap()),
        "Adagrad" => OptimizerConfig::Adagrad(serde_json::from_value(fields).unwrap()),
        "Adadelta" => OptimizerConfig::Adadelta(serde_json::from_value(fields).unwrap()),
        "Adamax" => OptimizerConfig::Adamax(serde_json::from_value(fields).unwrap()),
        "NAdam" => OptimizerConfig::Nadam(serde_json::from_value(fields).unwrap()),
        "RAdam" => OptimizerConfig::Radam(serde_json::from_value(fields).unwrap()),
        _ => panic!("the fixture has an optimizer `{name}` that is not known here"),
    }
}

#[test]
fn every_configuration_of_the_fixture() {
    let golden = golden("optimizers");
    let device = device();
    let there = |x: &Tensor| x.to_device(&device).unwrap();
    assert!(!golden.hparams["configs"].as_object().unwrap().is_empty());
    for (name, fields) in golden.hparams["configs"].as_object().unwrap() {
        let mut fields = fields.as_object().unwrap().clone();
        let optimizer = fields.remove("optimizer").unwrap();
        let config = parse(optimizer.as_str().unwrap(), Value::Object(fields));
        let names = ["w", "b"];
        let start = |name: &str| Var::from_tensor(&there(golden.get(&format!("param0.{name}")))).unwrap();
        let vars = names.map(|name| (name.to_string(), start(name)));
        let mut optimizer = config.build(&vars.clone().map(Param::from), &Schedule::default()).unwrap();
        let clips = |key: &str| name.ends_with(key).then(|| golden.hparams[key].as_f64().unwrap());
        let clipping =
            Clipping { max_norm: clips("clip_norm"), max_value: clips("clip_value"), ..Default::default() };
        for step in 0..golden.size("steps") {
            let row =
                |kind: &str, name: &str| there(&golden.get(&format!("{kind}.{name}")).get(step).unwrap());
            let gradients: Vec<Tensor> = names.iter().map(|name| row("grad", name)).collect();
            let clipped = clipping.decide(&gradients).unwrap();
            if clipping.max_norm.is_some() {
                let norm = clipped.norm.read().unwrap().finish().unwrap();
                let expected = golden.get(&format!("{name}.norms")).to_vec1::<f64>().unwrap()[step];
                assert!(
                    (norm / expected - 1.).abs() < 1e-6,
                    "{name}, step {step}: norm {norm}, not {expected}"
                );
            }
            optimizer.prepare(step as u64 + 1, config.lr().into()).unwrap();
            optimizer.step(&gradients, &clipped.scale).unwrap();
            optimizer.commit().unwrap();
            for (param, var) in &vars {
                let largest = |t: &Tensor| t.abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
                let expected = row(name, param);
                let error = largest(&(var.as_tensor() - &expected).unwrap());
                // PyTorch fuses some products and sums: one rounding less. Parameters grow to about 10 here.
                let tolerance = 1e-6 * largest(&expected).max(1.);
                assert!(error <= tolerance, "{name}, {param}, step {step}: off by {error:e}");
            }
        }
    }
}
