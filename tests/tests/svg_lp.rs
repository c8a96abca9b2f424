//! SVG-LP matches the authors' code: a training step with given noise, three steps of Adam, generated frames.
#![allow(clippy::unwrap_used)]

use candlepower::candle_core::Tensor;
use candlepower::optim::{AdamConfig, GradScale, OptimizerConfig};
use candlepower::params::Params;
use candlepower::prelude::*;
use candlepower::schedule::Schedule;
use candlepower::trainer::Kernels;
use candlepower_models::SvgLp;
use candlepower_models::svg_lp::{Gaussian, Reconstruction, Statistics, SvgLpConfig};
use candlepower_tests::{Golden, assert_close, device, golden};

fn config(golden: &Golden) -> SvgLpConfig {
    SvgLpConfig {
        channels: golden.size("nf"),
        features: golden.size("g_dim"),
        latent: golden.size("z_dim"),
        hidden: golden.size("rnn_size"),
        predictor_layers: golden.size("predictor_rnn_layers"),
        posterior_layers: golden.size("posterior_rnn_layers"),
        prior_layers: golden.size("prior_rnn_layers"),
        beta: golden.hparams["beta"].as_f64().unwrap(),
        last_frame_skip: golden.hparams["last_frame_skip"].as_bool().unwrap(),
        ..Default::default()
    }
}

fn spec(golden: &Golden) -> VideoSpec {
    let frame = golden.get("in.x").dims().to_vec();
    VideoSpec {
        frames_in: golden.size("n_past"),
        frames_out: golden.size("n_future"),
        channels: frame[2],
        height: frame[3],
        width: frame[4],
    }
}

fn model(golden: &Golden) -> (SvgLp, Params) {
    let params = Params::new(0, DType::F32, &device());
    let model = SvgLp::build(&config(golden), &spec(golden), params.var_builder()).unwrap();
    golden.load(&params);
    (model, params)
}

/// Converts from the fixture's axes (T, B, C, H, W).
fn batch_first(x: &Tensor) -> Tensor {
    x.transpose(0, 1).unwrap().contiguous().unwrap()
}

/// The noise of each step.
fn noise(golden: &Golden, name: &str) -> Vec<Tensor> {
    let noise = golden.get(name);
    (0..noise.dim(0).unwrap()).map(|t| noise.get(t).unwrap()).collect()
}

fn reconstruct(golden: &Golden, model: &SvgLp) -> (Reconstruction, Tensor) {
    let frames = batch_first(golden.get("in.x"));
    let pass = model.reconstruct(&frames, &noise(golden, "in.eps_posterior"), true).unwrap();
    let beta = golden.hparams["beta"].as_f64().unwrap();
    let loss = (&pass.mse + (&pass.divergence * beta).unwrap()).unwrap();
    (pass, loss)
}

#[test]
fn a_training_step_agrees_on_both_kernels() {
    let golden = golden("svg_lp");
    for kernels in [Kernels::Fast, Kernels::Reference] {
        candlepower::nn::with_kernels(kernels, || {
            let (model, params) = model(&golden);
            let (pass, loss) = reconstruct(&golden, &model);
            assert_close("frames", &pass.frames, &batch_first(golden.get("out.x_pred")), 2e-5);
            let stack = |of: &dyn Fn(&Gaussian) -> Tensor, steps: &[Gaussian]| {
                Tensor::stack(&steps.iter().map(of).collect::<Vec<_>>(), 0).unwrap()
            };
            let (mean, variance) = (|g: &Gaussian| g.mean.clone(), |g: &Gaussian| g.log_variance.clone());
            assert_close("mu", &stack(&mean, &pass.posterior), golden.get("out.mu"), 2e-5);
            assert_close("logvar", &stack(&variance, &pass.posterior), golden.get("out.logvar"), 2e-5);
            assert_close("mu_p", &stack(&mean, &pass.prior), golden.get("out.mu_p"), 2e-5);
            assert_close("logvar_p", &stack(&variance, &pass.prior), golden.get("out.logvar_p"), 2e-5);
            assert_close("z", &Tensor::stack(&pass.latent, 0).unwrap(), golden.get("out.z"), 2e-5);
            assert_close("mse", &pass.mse, golden.get("loss.mse"), 2e-6);
            assert_close("divergence", &pass.divergence, golden.get("loss.kld"), 2e-6);
            assert_close("loss", &loss, golden.get("loss"), 2e-6);
            golden.assert_gradients(&params, &loss.backward().unwrap(), 5e-3);
            golden.assert_buffers_after(&params, 2e-6);
        });
    }
}

#[test]
fn three_steps_of_adam_agree() {
    let golden = golden("svg_lp");
    let (model, params) = model(&golden);
    let mut hparams = golden.hparams["adam"].as_object().unwrap().clone();
    let steps = hparams.remove("steps").unwrap().as_u64().unwrap();
    let adam: AdamConfig = serde_json::from_value(hparams.into()).unwrap();
    let (vars, lr) = (params.vars(), adam.lr);
    let mut optimizer =
        OptimizerConfig::Adam(adam).build(&params.for_optimizer(), &Schedule::default()).unwrap();
    let losses = golden.get("adam.losses").to_vec1::<f64>().unwrap();
    for t in 1..=steps {
        let (_, loss) = reconstruct(&golden, &model);
        let value = f64::from(loss.to_scalar::<f32>().unwrap());
        let expected = losses[t as usize - 1];
        assert!((value / expected - 1.).abs() < 2e-5, "loss before step {t}: {value}, not {expected}");
        let grads = loss.backward().unwrap();
        let gradients: Vec<Tensor> = vars.iter().map(|(_, var)| grads.get(var).unwrap().clone()).collect();
        optimizer.prepare(t, lr.into()).unwrap();
        optimizer.step(&gradients, &GradScale::default()).unwrap();
        optimizer.commit().unwrap();
    }
    let after = golden.under(&format!("adam.step{steps}."));
    assert!(!after.is_empty());
    // Adam's first steps are signs of gradients. If rounding decides a sign, the reference's own precisions
    // differ, too.
    let noise = golden.hparams["max_abs_param_diff_f32_vs_f64_after_adam3"].as_f64().unwrap_or(0.);
    let tolerance = (10. * noise as f32).max(5e-5);
    for (name, var) in vars.iter().filter(|(name, _)| !golden.has_no_true_gradient(name)) {
        let error = (var.as_tensor() - &after[name]).unwrap().abs().unwrap().max_all().unwrap();
        let error = error.to_scalar::<f32>().unwrap();
        assert!(error <= tolerance, "{name} after step {steps}: off by {error:e}");
    }
}

#[test]
fn a_drawn_future_agrees_and_leaves_the_running_statistics() {
    let golden = golden("svg_lp");
    let (model, params) = model(&golden);
    let spec = spec(&golden);
    let frames = batch_first(golden.get("in.x"));
    let input = frames.narrow(1, 0, spec.frames_in).unwrap();
    // The latent variables of the input are inferred, the others are drawn from the prior.
    let mut steps = noise(&golden, "gen.eps_posterior");
    let guessed = noise(&golden, "gen.eps_prior");
    let inferred = spec.frames_in - 1;
    steps.splice(inferred.., guessed[inferred..].iter().cloned());
    let future = model.generate(&input, spec.frames_out, &steps, Statistics::Batch).unwrap();
    let expected = batch_first(golden.get("gen.out")).narrow(1, spec.frames_in, spec.frames_out).unwrap();
    assert_close("future", &future, &expected, 2e-5);
    params.commit_buffers().unwrap();
    for (name, var) in params.buffers() {
        assert_close(&name, &var, golden.get(&format!("buffer.{name}")), 0.);
    }
    // With the running statistics the result differs, and for a single sample nothing else is possible.
    let by_running =
        |x: &Tensor, steps: &[Tensor], mode| model.generate(x, spec.frames_out, steps, mode).unwrap();
    let running = by_running(&input, &steps, Statistics::Running);
    assert!(candlepower_tests::relative_error(&running, &future) > 1e-3);
    let one = |x: &Tensor| x.narrow(0, 0, 1).unwrap();
    let steps: Vec<Tensor> = steps.iter().map(one).collect();
    let alone = by_running(&one(&input), &steps, Statistics::Batch);
    assert_close("one sample", &alone, &one(&running), 1e-5);
}

#[test]
fn what_nobody_knows_has_no_error() {
    let golden = golden("svg_lp");
    let (model, _) = model(&golden);
    let VideoSpec { frames_in, frames_out, channels, height, width } = spec(&golden);
    let shape = |times| (2, times, channels, height, width);
    let (input, target) = (
        Tensor::rand(0f32, 1., shape(frames_in), &device()).unwrap(),
        Tensor::rand(0f32, 1., shape(frames_out), &device()).unwrap(),
    );
    let loss = |known: Option<f64>| {
        let mask = known.map(|known| {
            let times = (2, frames_in + frames_out, 1, height, width);
            (Tensor::ones(times, DType::F32, &device()).unwrap() * known).unwrap()
        });
        let batch = Video { mask, ..Video::new(input.clone(), target.clone()) };
        let loss = model.training_step(&batch, &mut Step::evaluation(0, 0, 3, false)).unwrap();
        loss.to_scalar::<f32>().unwrap()
    };
    let (all, none) = (loss(None), loss(Some(0.)));
    assert!((loss(Some(1.)) - all).abs() < 1e-5 * all.abs(), "{} for {all}", loss(Some(1.)));
    // The rest is the divergence.
    assert!(none < 0.9 * all, "{none} of {all}");
}
