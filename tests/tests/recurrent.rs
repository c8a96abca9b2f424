//! The recurrent models match PyTorch's: predictions with and without a mask, loss, and all gradients.
#![allow(clippy::unwrap_used)]

use candle_core::{DType, Tensor};
use candlepower::params::Params;
use candlepower::prelude::*;
use candlepower::trainer::Kernels;
use candlepower_models::e3d_lstm::{E3dLstmConfig, EideticLayers};
use candlepower_models::mau::{MauConfig, MauLayers};
use candlepower_models::predrnn_v2::{DecoupledLayers, PredRnnV2Config};
use candlepower_models::recurrent::roll_out::{Feed, Mask};
use candlepower_models::recurrent::sampling::{Linear, Reverse, Sampling};
use candlepower_models::recurrent::{Recurrent, RecurrentConfig, Stack};
use candlepower_models::{conv_lstm_stack::ConvLstmLayers, mim::MimLayers};
use candlepower_models::{predrnn::PredRnnLayers, predrnn_pp::CausalLayers};
use candlepower_tests::{Golden, assert_close, device, golden, golden_dir};

/// The suggested tolerances for outputs and gradients, relative to a tensor's largest value.
const OUTPUT: f64 = 2e-5;
const LOSS: f64 = 2e-6;
const GRADIENT: f64 = 1e-4;

fn hidden(golden: &Golden) -> Vec<usize> {
    let layers = golden.hparams["num_hidden"].as_array().unwrap();
    layers.iter().map(|width| width.as_u64().unwrap() as usize).collect()
}

fn recurrent(golden: &Golden) -> RecurrentConfig {
    RecurrentConfig {
        hidden: hidden(golden),
        kernel: golden.size("filter_size"),
        patch: golden.size("patch_size"),
        layer_norm: golden.size("layer_norm") == 1,
        ..Default::default()
    }
}

fn spec(golden: &Golden) -> VideoSpec {
    let frame = golden.get("in.frames").dims();
    VideoSpec {
        frames_in: golden.size("pre_seq_length"),
        frames_out: golden.size("aft_seq_length"),
        channels: frame[2],
        height: frame[3],
        width: frame[4],
    }
}

/// The fixture's model with all of the fixture's parameters, and no others.
fn model<S: Stack>(golden: &Golden, config: &S::Config, dtype: DType) -> (Recurrent<S>, Params) {
    let params = Params::new(0, dtype, &device());
    let model = Recurrent::<S>::build(config, &spec(golden), params.var_builder()).unwrap();
    let values = golden.under("param.");
    let vars = params.vars();
    assert_eq!(vars.len(), values.len(), "the model has other parameters than the fixture");
    for (name, var) in vars {
        let value = values.get(&name).unwrap_or_else(|| panic!("the fixture has no parameter `{name}`"));
        var.set(&value.to_dtype(dtype).unwrap()).unwrap();
    }
    (model, params)
}

/// The fixture's mask: one draw per sample and frame.
fn mask(golden: &Golden) -> Mask {
    let draws = golden.get("in.mask").flatten_from(2).unwrap();
    if draws.elem_count() == 0 {
        return Mask::new(0, &vec![0.; draws.dim(0).unwrap()], |_| unreachable!());
    }
    // (B, T, pixels): a draw is the same at all pixels.
    let first = draws.narrow(2, 0, 1).unwrap();
    let differing = draws.broadcast_sub(&first).unwrap().abs().unwrap().max_all().unwrap();
    assert_eq!(differing.to_scalar::<f32>().unwrap(), 0.);
    let draws = first.squeeze(2).unwrap().t().unwrap().to_vec2::<f32>().unwrap();
    let mut all = draws.iter().flatten();
    Mask::new(draws[0].len(), &vec![0.; draws.len()], |_| *all.next().unwrap() == 1.)
}

/// Names listed in the fixture's metadata.
fn names(golden: &Golden, list: &str) -> Vec<String> {
    let names = golden.hparams[list].as_array().unwrap();
    names.iter().map(|name| name.as_str().unwrap().to_string()).collect()
}

fn agrees<S: Stack>(name: &str, config: impl Fn(&Golden) -> S::Config) {
    let golden = golden(name);
    let config = config(&golden);
    for (kernels, dtype) in
        [(Kernels::Fast, DType::F32), (Kernels::Reference, DType::F32), (Kernels::Reference, DType::F64)]
    {
        let (model, params) = model::<S>(&golden, &config, dtype);
        let what = |of: &str| format!("{name}, {kernels:?} {dtype:?}: {of}");
        let frames = golden.get("in.frames").to_dtype(dtype).unwrap();
        let mask = mask(&golden);
        let feed = match golden.size("reverse_scheduled_sampling") {
            0 => Feed::Teacher(&mask),
            _ => Feed::Reverse(&mask),
        };
        candlepower::nn::with_kernels(kernels, || {
            let (given, all) = (golden.size("pre_seq_length"), frames.dim(1).unwrap());
            let later = frames.narrow(1, given, all - given).unwrap();
            let given = frames.narrow(1, 0, given).unwrap();
            let (loss, predictions) = model.train(&Video::new(given.clone(), later), feed).unwrap();
            assert_close(&what("predictions"), &predictions, &next_frames(&golden), OUTPUT);
            assert_close(&what("loss"), &loss, golden.get("loss"), LOSS);
            assert_close(
                &what("prediction"),
                &model.forward(&given).unwrap(),
                golden.get("out.pred"),
                OUTPUT,
            );
            let gradients = loss.backward().unwrap();
            let unused = names(&golden, "unused_params");
            for (parameter, var) in params.vars() {
                let gradient = gradients.get(&var);
                if unused.contains(&parameter) {
                    assert!(gradient.is_none(), "{}", what(&format!("{parameter} has a gradient")));
                    continue;
                }
                let gradient =
                    gradient.unwrap_or_else(|| panic!("{}", what(&format!("none of {parameter}"))));
                let expected = golden.get(&format!("grad.{parameter}"));
                assert_close(&what(&format!("gradient of {parameter}")), gradient, expected, GRADIENT);
            }
        });
        says_what_is_unused(&model, &params, &names(&golden, "unused_params"));
    }
}

/// The fixture's predictions as frames (B, T, C, H, W).
fn next_frames(golden: &Golden) -> Tensor {
    let frames = golden.get("out.next_frames");
    // MAU's predictions are frames already.
    if golden.hparams["model"] == "mau" {
        return frames.clone();
    }
    let folded = frames.permute((0, 1, 4, 2, 3)).unwrap();
    candlepower::nn::depth_to_space(&folded, golden.size("patch_size")).unwrap()
}

/// Asserts that the patterns of [`Module::unused_parameters`] match exactly these parameters.
fn says_what_is_unused<S: Stack>(model: &Recurrent<S>, params: &Params, expected: &[String]) {
    let fits = |name: &String| {
        model.unused_parameters().iter().any(|pattern| wildmatch::WildMatch::new(pattern).matches(name))
    };
    let mut said: Vec<String> = params.vars().into_iter().map(|(name, _)| name).filter(fits).collect();
    let mut expected = expected.to_vec();
    said.sort();
    expected.sort();
    assert_eq!(said, expected);
}

#[test]
fn conv_lstm_stack_agrees() {
    agrees::<ConvLstmLayers>("openstl_convlstm", recurrent);
    agrees::<ConvLstmLayers>("openstl_convlstm_ln", recurrent);
}

#[test]
fn predrnn_agrees() {
    agrees::<PredRnnLayers>("openstl_predrnn", recurrent);
    agrees::<PredRnnLayers>("openstl_predrnn_ln", recurrent);
    agrees::<PredRnnLayers>("openstl_predrnn_3layer_rss", recurrent);
}

#[test]
fn predrnn_v2_agrees() {
    agrees::<DecoupledLayers>("openstl_predrnnv2", |golden| {
        let RecurrentConfig { hidden, kernel, patch, layer_norm, .. } = recurrent(golden);
        let decoupling = golden.hparams["decouple_beta"].as_f64().unwrap();
        PredRnnV2Config { hidden, kernel, patch, layer_norm, decoupling, ..Default::default() }
    });
}

#[test]
fn predrnn_pp_agrees() {
    agrees::<CausalLayers>("openstl_predrnnpp", recurrent);
}

#[test]
fn e3d_lstm_agrees() {
    for name in ["openstl_e3dlstm", "openstl_e3dlstm_ln"] {
        agrees::<EideticLayers>(name, |golden| {
            let RecurrentConfig { hidden, patch, layer_norm, .. } = recurrent(golden);
            // The reference ignores its own `filter_size`.
            let weight = golden.get("param.cell_list.0.conv_x.0.conv3d.weight");
            let kernel = *weight.dims().last().unwrap();
            E3dLstmConfig { hidden, kernel, patch, layer_norm, ..Default::default() }
        });
    }
}

#[test]
fn mim_agrees() {
    agrees::<MimLayers>("openstl_mim", recurrent);
}

#[test]
fn mau_agrees() {
    agrees::<MauLayers>("openstl_mau", |golden| MauConfig {
        hidden: hidden(golden),
        kernel: golden.size("filter_size"),
        patch: golden.size("patch_size"),
        reduction: golden.size("sr_size"),
        window: golden.size("tau"),
        sampling: Sampling::default(),
    });
}

#[test]
fn sampling_agrees_at_every_step() {
    let text = std::fs::read_to_string(golden_dir().join("scheduled_sampling.json")).unwrap();
    let golden: serde_json::Value = serde_json::from_str(&text).unwrap();
    let args = &golden["args"];
    let number = |key: &str| args[key].as_f64().unwrap();
    let step = |key: &str| args[key].as_u64().unwrap();
    let linear = Linear {
        start: number("sampling_start_value"),
        rate: number("sampling_changing_rate"),
        stop: step("sampling_stop_iter"),
    };
    let reverse = Reverse {
        start: step("r_sampling_step_1"),
        stop: step("r_sampling_step_2"),
        decay: number("r_exp_alpha"),
    };
    for (index, step) in golden["iters"].as_array().unwrap().iter().enumerate() {
        let step = step.as_u64().unwrap();
        let expected = |list: &str| golden[list][index].as_f64().unwrap();
        let (given, beyond) = reverse.at(step);
        for (list, actual) in
            [("scheduled_sampling_eta", linear.at(step)), ("reverse_r_eta", given), ("reverse_eta", beyond)]
        {
            // The reference adds up its rate step by step.
            assert!((actual - expected(list)).abs() < 1e-11, "{list} at {step}: {actual}");
        }
        let all = Sampling::Reverse(reverse.clone()).probabilities(step, 3, 4);
        assert_eq!(all, [given, given, beyond, beyond, beyond]);
        assert_eq!(Sampling::Linear(linear.clone()).probabilities(step, 3, 4), [linear.at(step); 3]);
    }
}
