//! Optimizers match PyTorch's on fixed gradients, step by step (on CUDA with `CANDLEPOWER_TEST_DEVICE=cuda`).
#![allow(clippy::unwrap_used)]

use candle_core::{Tensor, Var};
use candlepower::optim::{Clipping, GradScale, OptimizerConfig, Param};
use candlepower::schedule::Schedule;
use candlepower_tests::{device, golden};
use serde_json::Value;

/// The optimizer that has this name in PyTorch.
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
                // PyTorch fuses some products and sums, which saves one rounding. Parameters grow to about 10
                // here.
                let tolerance = 1e-6 * largest(&expected).max(1.);
                assert!(error <= tolerance, "{name}, {param}, step {step}: off by {error:e}");
            }
        }
    }
}

#[test]
fn every_number_of_a_configuration_counts() {
    const GRADIENTS: [f32; 9] = [0.5, -2., 0.25, 1., -0.125, 3., 0.5, 0.75, -1.5];
    // A parameter that starts at 1.5, after each step, computed with PyTorch 2.15 in 64 bits.
    let cases = [
        (
            r#"{"adagrad": {"lr": 0.1, "lr_decay": 0.3, "weight_decay": 0.2, "eps": 0.05}}"#,
            [
                1.4058824, 1.4738297, 1.4569959, 1.4287665, 1.4257386, 1.3936636, 1.3869958, 1.3792834,
                1.3873378,
            ],
        ),
        (
            r#"{"adadelta": {"lr": 0.5, "rho": 0.6, "weight_decay": 0.2, "eps": 0.05}}"#,
            [
                1.3383096, 1.559829, 1.4490762, 1.2420325, 1.2136659, 0.9526238, 0.8634715, 0.7408395,
                0.9148602,
            ],
        ),
        (
            r#"{"adamax": {"lr": 0.1, "betas": [0.6, 0.7], "weight_decay": 0.2, "eps": 0.05}}"#,
            [
                1.4058824, 1.4496552, 1.458035, 1.4179715, 1.3782371, 1.3303977, 1.2766375, 1.2059834,
                1.1924231,
            ],
        ),
        (
            r#"{"nadam": {"lr": 0.1, "betas": [0.6, 0.7], "weight_decay": 0.2, "eps": 0.05}}"#,
            [
                1.3934666, 1.494193, 1.4621518, 1.3768154, 1.3560134, 1.2257831, 1.1764431, 1.1120217,
                1.1678829,
            ],
        ),
        (
            r#"{"radam": {"lr": 0.1, "betas": [0.6, 0.9], "weight_decay": 0.2, "eps": 0.05}}"#,
            [1.42, 1.49725, 1.5070536, 1.4525443, 1.4144987, 1.3923879, 1.3678743, 1.3394362, 1.3338278],
        ),
        (
            r#"{"rmsprop": {"lr": 0.1, "alpha": 0.6, "weight_decay": 0.2, "eps": 0.05, "momentum": 0.5, "centered": true}}"#,
            [
                1.3189711, 1.3859954, 1.3672282, 1.2364314, 1.1564871, 0.914725, 0.7418837, 0.5689152,
                0.5766587,
            ],
        ),
        (
            r#"{"adamw": {"lr": 0.1, "betas": [0.6, 0.7], "weight_decay": 0.2, "eps": 0.05, "amsgrad": true}}"#,
            [
                1.3790909, 1.4172121, 1.4163265, 1.3694638, 1.3353564, 1.2412579, 1.165208, 1.0948975,
                1.0772566,
            ],
        ),
        (
            r#"{"sgd": {"lr": 0.1, "momentum": 0.5, "dampening": 0.25, "weight_decay": 0.2}}"#,
            [1.42, 1.5087, 1.5116695, 1.4154792, 1.3555269, 1.0802178, 0.88886, 0.7235982, 0.7426133],
        ),
    ];
    for (text, expected) in cases {
        let config: OptimizerConfig = serde_json::from_str(text).unwrap();
        let w = Var::new(&[1.5f32], &device()).unwrap();
        let param = Param::from(("w".to_string(), w.clone()));
        let mut optimizer = config.build(&[param], &Schedule::default()).unwrap();
        for (t, (gradient, expected)) in GRADIENTS.into_iter().zip(expected).enumerate() {
            let gradients = [Tensor::new(&[gradient], &device()).unwrap()];
            optimizer.prepare(t as u64 + 1, config.lr().into()).unwrap();
            optimizer.step(&gradients, &GradScale::default()).unwrap();
            optimizer.commit().unwrap();
            let ours = f64::from(w.to_vec1::<f32>().unwrap()[0]);
            assert!((ours - expected).abs() < 2e-6, "{text}, step {t}: {ours}, not {expected}");
        }
    }
}
