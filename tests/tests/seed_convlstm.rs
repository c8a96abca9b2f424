//! The tutorial's model matches PyTorch: output, loss, gradients, and three steps of three optimizers.
#![allow(clippy::unwrap_used)]

use candle_core::{DType, Tensor, Var};
use candlepower::optim::{Clipping, OptimizerConfig};
use candlepower::params::Params;
use candlepower::prelude::*;
use candlepower::schedule::Schedule;
use candlepower::trainer::Kernels;
use candlepower_models::ConvLstm;
use candlepower_models::conv_lstm::ConvLstmConfig;
use candlepower_tests::{Golden, assert_close, device, golden};
use serde_json::Value;

/// The fixture's model with the fixture's parameters.
fn model(golden: &Golden, dtype: DType) -> (ConvLstm, Params) {
    let frame = golden.get("in.x").dims().to_vec();
    let spec = VideoSpec {
        frames_in: golden.size("T_in"),
        frames_out: golden.size("T_out"),
        channels: frame[2],
        height: golden.size("H"),
        width: golden.size("W"),
    };
    let config =
        ConvLstmConfig { hidden: golden.size("nf"), kernel: golden.size("kernel"), ..Default::default() };
    let params = Params::new(0, dtype, &device());
    let model = ConvLstm::build(&config, &spec, params.var_builder()).unwrap();
    let values = golden.under("param.");
    let vars = params.vars();
    assert_eq!(vars.len(), values.len(), "the model has other parameters than the fixture");
    vars.iter().for_each(|(name, var)| var.set(&values[name]).unwrap());
    (model, params)
}

/// The fixture's target (B, T, H, W) as frames (B, T, C, H, W).
fn target(golden: &Golden) -> Tensor {
    golden.get("target").unsqueeze(2).unwrap()
}

fn agrees(name: &str, dtype: DType, kernels: Kernels, [output, loss_tolerance, gradient]: [f64; 3]) {
    let golden = golden(name);
    let (model, params) = model(&golden, dtype);
    let x = Var::from_tensor(golden.get("in.x")).unwrap();
    candlepower::nn::with_kernels(kernels, || {
        let frames = model.forward(&x).unwrap();
        assert_close("output", &frames.transpose(1, 2).unwrap(), golden.get("out"), output);
        let loss = candlepower::nn::mse(&frames, &target(&golden)).unwrap();
        assert_close("loss", &loss, golden.get("loss"), loss_tolerance);
        let grads = loss.backward().unwrap();
        assert_close("gradient of the input", grads.get(&x).unwrap(), golden.get("grad_in.x"), gradient);
        for (name, var) in params.vars() {
            let expected = golden.get(&format!("grad.{name}"));
            assert_close(&format!("gradient of {name}"), grads.get(&var).unwrap(), expected, gradient);
        }
    });
}

#[test]
fn f32_agrees_on_both_kernels() {
    for kernels in [Kernels::Fast, Kernels::Reference] {
        agrees("seed_convlstm", DType::F32, kernels, [2e-5, 2e-6, 1e-4]);
    }
}

#[test]
fn f64_agrees_to_its_own_rounding() {
    agrees("seed_convlstm_f64", DType::F64, Kernels::Fast, [1e-12, 1e-12, 1e-11]);
}

/// Runs the fixture's steps with one optimizer; the hyper-parameters are read from the fixture.
fn optimizer_agrees(run: &str, parse: fn(Value) -> OptimizerConfig) {
    let (start, golden) = (golden("seed_convlstm"), golden("seed_convlstm_optim"));
    let (model, params) = model(&start, DType::F32);
    let mut hparams = golden.hparams[run].as_object().unwrap().clone();
    let steps = hparams.remove("steps").unwrap().as_u64().unwrap();
    let clip = hparams.remove("clip_grad_norm").map(|norm| norm.as_f64().unwrap());
    let scales = hparams.remove("loss_scale_per_step");
    let config = parse(Value::Object(hparams));
    let vars = params.vars();
    let mut optimizer = config.build(&params.for_optimizer(), &Schedule::default()).unwrap();
    let loss = || {
        let frames = model.forward(start.get("in.x")).unwrap();
        candlepower::nn::mse(&frames, &target(&start)).unwrap()
    };
    // Tolerate the differences between the reference's own precisions, if they are larger.
    let noise = golden.hparams["max_abs_param_diff_f32_vs_f64_after_steps"][run].as_f64().unwrap_or(0.);
    let tolerance = (3. * noise as f32).max(1e-6);
    let expected_losses = golden.get(&format!("{run}.losses")).to_vec1::<f64>().unwrap();
    for t in 1..=steps {
        let scale = scales.as_ref().map_or(1., |scales| scales[t as usize - 1].as_f64().unwrap());
        let loss = loss();
        let value = f64::from(loss.to_scalar::<f32>().unwrap());
        let expected = expected_losses[t as usize - 1];
        assert!((value / expected - 1.).abs() < 2e-6, "{run}, loss before step {t}: {value}, not {expected}");
        let grads = (loss * scale).unwrap().backward().unwrap();
        let gradients: Vec<Tensor> = vars.iter().map(|(_, var)| grads.get(var).unwrap().clone()).collect();
        let clipped = Clipping { max_norm: clip, ..Default::default() }.decide(&gradients).unwrap();
        if clip.is_some() {
            let norm = clipped.norm.read().unwrap().finish().unwrap();
            let norms = golden.get(&format!("{run}.grad_norms")).to_vec1::<f64>().unwrap();
            let expected = norms[t as usize - 1];
            assert!((norm / expected - 1.).abs() < 1e-5, "{run}, norm of step {t}: {norm}, not {expected}");
        }
        optimizer.prepare(t, config.lr().into()).unwrap();
        optimizer.step(&gradients, &clipped.scale).unwrap();
        optimizer.commit().unwrap();
        let after = golden.under(&format!("{run}.step{t}."));
        for (name, var) in vars.iter().filter(|_| !after.is_empty()) {
            let error = (var.as_tensor() - &after[name]).unwrap().abs().unwrap().max_all().unwrap();
            let error = error.to_scalar::<f32>().unwrap();
            assert!(error <= tolerance, "{run}, {name} after step {t}: off by {error:e}");
        }
    }
    for (name, expected) in golden.under(&format!("{run}.state{steps}.")) {
        let state = optimizer.state();
        let (_, var) =
            state.iter().find(|(own, _)| *own == name).unwrap_or_else(|| panic!("no state `{name}`"));
        assert_close(&format!("{run}, state {name}"), var, &expected, 1e-4);
    }
    let value = f64::from(loss().to_scalar::<f32>().unwrap());
    assert!((value / expected_losses[steps as usize] - 1.).abs() < 2e-6, "{run}, last loss: {value}");
}

fn config<T: serde::de::DeserializeOwned>(hparams: Value) -> T {
    serde_json::from_value(hparams).unwrap()
}

#[test]
fn adam_agrees() {
    optimizer_agrees("adam", |hparams| OptimizerConfig::Adam(config(hparams)));
}

#[test]
fn adamw_with_clipping_agrees() {
    optimizer_agrees("adamw_clip", |hparams| OptimizerConfig::AdamW(config(hparams)));
}

#[test]
fn sgd_with_nesterov_and_clipping_agrees() {
    optimizer_agrees("sgd_clip", |hparams| OptimizerConfig::Sgd(config(hparams)));
}
