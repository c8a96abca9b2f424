//! SimVP with both translators, and TAU, match OpenSTL: outputs, losses, gradients, running statistics.
#![allow(clippy::unwrap_used)]

use candlepower::params::Params;
use candlepower::prelude::*;
use candlepower::rand::SeedableRng;
use candlepower::seed::ChaCha8Rng;
use candlepower::trainer::Kernels;
use candlepower_models::sim_vp::{SimVpConfig, TranslatorKind};
use candlepower_models::tau::{TauConfig, divergence};
use candlepower_models::{SimVp, Tau};
use candlepower_tests::{Golden, assert_close, device, golden};

fn spec(golden: &Golden) -> VideoSpec {
    let shape: Vec<usize> = serde_json::from_value(golden.hparams["in_shape"].clone()).unwrap();
    VideoSpec {
        frames_in: shape[0],
        frames_out: golden.get("target").dim(1).unwrap(),
        channels: shape[1],
        height: shape[2],
        width: shape[3],
    }
}

/// The fixture's sizes; stochastic depth is off.
fn config(golden: &Golden, translator: TranslatorKind) -> SimVpConfig {
    SimVpConfig {
        spatial_channels: golden.size("hid_S"),
        temporal_channels: golden.size("hid_T"),
        spatial_layers: golden.size("N_S"),
        temporal_layers: golden.size("N_T"),
        translator,
        mlp_ratio: golden.hparams["mlp_ratio"].as_f64().unwrap(),
        drop_path: [0., 0.],
    }
}

fn tau_config(golden: &Golden) -> TauConfig {
    let SimVpConfig {
        spatial_channels, temporal_channels, spatial_layers, temporal_layers, mlp_ratio, ..
    } = config(golden, TranslatorKind::Gsta);
    TauConfig {
        spatial_channels,
        temporal_channels,
        spatial_layers,
        temporal_layers,
        mlp_ratio,
        drop_path: [0., 0.],
        alpha: golden.hparams["alpha"].as_f64().unwrap(),
    }
}

/// A module's frames, for training or not.
type Forward<M> = fn(&M, &Tensor, Option<&mut ChaCha8Rng>) -> Result<Tensor>;

fn agrees<M>(
    golden: &Golden,
    build: impl Fn(VarBuilder) -> Result<M>,
    forward: Forward<M>,
    loss: impl Fn(&Tensor) -> Tensor,
) {
    for kernels in [Kernels::Fast, Kernels::Reference] {
        candlepower::nn::with_kernels(kernels, || {
            let params = Params::new(0, DType::F32, &device());
            let (training, evaluation) =
                (build(params.var_builder()).unwrap(), build(params.detached_var_builder()).unwrap());
            golden.load(&params);
            let rng = &mut ChaCha8Rng::seed_from_u64(0);
            let prediction = forward(&training, golden.get("in.x"), Some(rng)).unwrap();
            assert_close("output", &prediction, golden.get("out.pred"), 2e-5);
            let loss = loss(&prediction);
            assert_close("loss", &loss, golden.get("loss"), 2e-6);
            golden.assert_gradients(&params, &loss.backward().unwrap(), 1e-4);
            golden.assert_buffers_after(&params, 2e-6);
            let evaluated = forward(&evaluation, golden.get("in.x"), None).unwrap();
            assert_close("output in evaluation", &evaluated, golden.get("out.pred_eval"), 2e-5);
        });
    }
}

fn sim_vp_agrees(name: &str, translator: TranslatorKind) {
    let golden = golden(name);
    let (config, spec) = (config(&golden, translator), spec(&golden));
    let target = golden.get("target");
    let loss = |prediction: &Tensor| candlepower::nn::mse(prediction, target).unwrap();
    agrees(&golden, |vb| SimVp::build(&config, &spec, vb), SimVp::forward, loss);
}

#[test]
fn gsta_agrees() {
    sim_vp_agrees("openstl_simvp_gsta", TranslatorKind::Gsta);
}

#[test]
fn incep_u_agrees() {
    sim_vp_agrees("openstl_simvp_incepu", TranslatorKind::Incepu);
}

#[test]
fn tau_agrees() {
    let golden = golden("openstl_tau");
    let (config, spec) = (tau_config(&golden), spec(&golden));
    let target = golden.get("target");
    let loss = |prediction: &Tensor| {
        let (mse, divergence) =
            (candlepower::nn::mse(prediction, target).unwrap(), divergence(prediction, target).unwrap());
        assert_close("mean squared error", &mse, golden.get("loss.mse"), 2e-6);
        assert_close("divergence", &divergence, golden.get("loss.ddr"), 5e-6);
        (mse + (divergence * config.alpha).unwrap()).unwrap()
    };
    agrees(&golden, |vb| Tau::build(&config, &spec, vb), Tau::forward, loss);
}

/// The module's own training step gives the fixture's loss.
#[test]
fn the_loss_that_is_trained_is_the_fixtures() {
    let golden = golden("openstl_tau");
    let (config, spec) = (tau_config(&golden), spec(&golden));
    let model = Model::build::<Tau>(&config, &spec, 0, &device()).unwrap();
    golden.load(model.params());
    let batch = Video::new(golden.get("in.x").clone(), golden.get("target").clone());
    // Only a training step normalizes by the batch; an evaluation step cannot request that, so use a trainer.
    let dir = tempfile::tempdir().unwrap();
    let recorder = candlepower_tests::recorder::Recorder::default();
    let trainer =
        TrainerConfig { batch_size: batch.len(), max_steps: Some(1), log_every: 1, ..Default::default() };
    Trainer::new(trainer)
        .callback(recorder.clone())
        .checkpoints(dir.path(), Default::default())
        .fit(&model, &Data::new(One(batch, spec)))
        .unwrap();
    let expected = f64::from(golden.get("loss").to_scalar::<f32>().unwrap());
    let loss = recorder.train("loss")[0];
    assert!((loss / expected - 1.).abs() < 2e-6, "{loss}, not {expected}");
    for (name, var) in model.params().buffers() {
        assert_close(&name, &var, golden.get(&format!("buffer_after.{name}")), 2e-6);
    }
}

/// A dataset of one batch, in order.
struct One(Video, VideoSpec);

impl Dataset for One {
    type Batch = Video;

    fn len(&self) -> usize {
        self.0.len()
    }

    fn spec(&self) -> VideoSpec {
        self.1
    }

    fn batch(&self, samples: &[Sample]) -> Result<Video> {
        let index = samples.iter().map(|sample| sample.index as u32);
        let index = Tensor::from_iter(index, &device())?;
        self.0.map(&mut |x| Ok(x.index_select(&index, 0)?))
    }
}

#[test]
fn more_frames_than_came_in_are_made_of_the_models_own() {
    let golden = golden("openstl_simvp_gsta");
    let (config, spec) = (config(&golden, TranslatorKind::Gsta), spec(&golden));
    let params = Params::new(0, DType::F32, &device());
    let frames = |frames_out: usize| {
        let spec = VideoSpec { frames_out, ..spec };
        let model = SimVp::build(&config, &spec, params.detached_var_builder()).unwrap();
        golden.load(&params);
        let frames = |x: &Tensor| model.forward(x, None).unwrap();
        (frames(golden.get("in.x")), model)
    };
    let n = spec.frames_in;
    let (once, model) = frames(n);
    let (more, _) = frames(2 * n - 1);
    assert_eq!(more.dim(1).unwrap(), 2 * n - 1);
    assert_close("the first frames", &more.narrow(1, 0, n).unwrap(), &once, 0.);
    let again = model.forward(&once, None).unwrap();
    assert_close("the others", &more.narrow(1, n, n - 1).unwrap(), &again.narrow(1, 0, n - 1).unwrap(), 0.);
    assert_close("fewer", &frames(1).0, &once.narrow(1, 0, 1).unwrap(), 0.);
}

#[test]
fn unknown_pixels_change_neither_loss_nor_scores() {
    let golden = golden("openstl_tau");
    let spec = spec(&golden);
    let model = Model::build::<Tau>(&tau_config(&golden), &spec, 1, &device()).unwrap();
    let VideoSpec { frames_in, frames_out, channels, height, width } = spec;
    let frames = |times| Tensor::rand(0f32, 1., (2, times, channels, height, width), &device()).unwrap();
    let (input, target, other) = (frames(frames_in), frames(frames_out), frames(frames_out));
    // The left half of each frame is unknown.
    let column = Tensor::arange(0u32, width as u32, &device()).unwrap();
    let mask = column.ge(width as f64 / 2.).unwrap().to_dtype(DType::F32).unwrap();
    let mask =
        mask.broadcast_as((2, frames_in + frames_out, 1, height, width)).unwrap().contiguous().unwrap();
    let known = mask.narrow(1, 0, frames_out).unwrap();
    let mixed = (target.broadcast_mul(&known).unwrap()
        + other.broadcast_mul(&(1. - &known).unwrap()).unwrap())
    .unwrap();
    let scores = |target: &Tensor| {
        let batch = Video { mask: Some(mask.clone()), ..Video::new(input.clone(), target.clone()) };
        let data = Data::new(One(batch.clone(), spec)).val(One(batch, spec));
        Trainer::new(TrainerConfig::default()).validate(&model, &data, Split::Val)
    };
    let (ours, theirs) = (scores(&target).unwrap(), scores(&mixed).unwrap());
    for name in ["loss", "mse", "ssim", "divergence"] {
        assert_eq!(ours[name], theirs[name], "{name}");
    }
}
