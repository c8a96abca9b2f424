//! Custom optimizers and schedules work in the trainer like Candlepower's own.
#![allow(clippy::unwrap_used)]

use candlepower::candle_core::Var;
use candlepower::checkpoint::{Checkpoint, CheckpointConfig};
use candlepower::config::Document;
use candlepower::experiment::Experiment;
use candlepower::optim::{Optimizer, ParamGroup};
use candlepower::precision::Precision;
use candlepower::prelude::*;
use candlepower::schedule::{Rates, Schedule};
use candlepower::schemars::{self, JsonSchema};
use candlepower::serde::{Deserialize, Serialize};
use candlepower_tests::points::{Dropped, Points, weights};

#[derive(Clone, Serialize, Deserialize, JsonSchema)]
#[serde(crate = "candlepower::serde", deny_unknown_fields)]
struct HeavyBallConfig {
    lr: f64,
    #[serde(default)]
    weight_decay: f64,
    momentum: f64,
}

/// Gradient descent with momentum, like PyTorch's SGD.
struct HeavyBall {
    config: HeavyBallConfig,
    params: Vec<(String, Var)>,
    velocities: Vec<(String, Var)>,
}

impl Optimizer for HeavyBall {
    type Config = HeavyBallConfig;

    fn rates(config: &mut HeavyBallConfig) -> (&mut f64, Option<&mut f64>) {
        (&mut config.lr, Some(&mut config.weight_decay))
    }

    fn of(config: &HeavyBallConfig, params: &[(String, Var)]) -> Result<Self> {
        if config.momentum >= 1. {
            return Err(Error::setting("momentum", "expected less than 1"));
        }
        let zeros = |(name, param): &(String, Var)| {
            Ok((format!("velocity.{name}"), Var::from_tensor(&param.zeros_like()?)?))
        };
        let velocities = params.iter().map(zeros).collect::<Result<_>>()?;
        Ok(Self { config: config.clone(), params: params.to_vec(), velocities })
    }

    fn step(&mut self, t: u64, rates: Rates, gradients: &[Tensor]) -> Result<()> {
        let HeavyBallConfig { momentum, weight_decay, .. } = self.config;
        for (((_, param), (_, velocity)), gradient) in self.params.iter().zip(&self.velocities).zip(gradients)
        {
            let gradient = (gradient + (param.as_tensor() * weight_decay)?)?;
            let moved = if t == 1 { gradient } else { ((velocity.as_tensor() * momentum)? + gradient)? };
            velocity.set(&moved)?;
            param.set(&(param.as_tensor() - (moved * rates.lr)?)?)?;
        }
        Ok(())
    }

    fn state(&self) -> Vec<(String, Var)> {
        self.velocities.clone()
    }
}

fn own() -> OptimizerConfig {
    let config = HeavyBallConfig { lr: 0.05, weight_decay: 0.01, momentum: 0.9 };
    OptimizerConfig::custom::<HeavyBall>("heavy_ball", config).unwrap()
}

fn ours() -> OptimizerConfig {
    SgdConfig { lr: 0.05, weight_decay: 0.01, momentum: 0.9, ..Default::default() }.into()
}

fn train(
    optimizer: OptimizerConfig,
    precision: Precision,
    steps: u64,
    dir: Option<(&std::path::Path, bool)>,
) -> Vec<f32> {
    let model = Dropped::in_precision(1, precision);
    let groups = vec![
        ParamGroup { params: "*.bias".into(), lr: Some(0.1), weight_decay: Some(0.), ..Default::default() },
        ParamGroup { params: "second.weight".into(), frozen: true, ..Default::default() },
    ];
    let config = TrainerConfig {
        batch_size: 4,
        max_steps: Some(steps),
        clip_norm: Some(0.5),
        precision,
        ..Default::default()
    };
    let mut trainer = Trainer::new(config)
        .optimizer_with_groups(optimizer, groups)
        .schedule(Schedule::Cosine { steps: 10, min_lr: 0. });
    if let Some((dir, resumes)) = dir {
        trainer = trainer.checkpoints(dir, CheckpointConfig::default());
        if resumes {
            trainer = trainer.resume(Checkpoint::load(&dir.join("last")).unwrap());
        }
    }
    trainer.fit(&model, &Data::new(Points { samples: 10 })).unwrap();
    weights(&model).into_iter().flat_map(|(_, values)| values).collect()
}

#[test]
fn an_optimizer_of_ones_own_moves_as_the_same_one_of_ours() {
    // The first steps in fp16 overflow and are refused.
    for precision in [Precision::Full, Precision::Bf16Mixed, Precision::Fp16Mixed] {
        let (own, ours) = (train(own(), precision, 8, None), train(ours(), precision, 8, None));
        let start = train(self::ours(), precision, 1, None);
        let off = own.iter().zip(&ours).map(|(a, b)| (a - b).abs()).fold(0f32, f32::max);
        let moved = ours.iter().zip(&start).map(|(a, b)| (a - b).abs()).fold(0f32, f32::max);
        // In half precision, a gradient that is rounded differently changes all later steps.
        let tolerance = if precision == Precision::Full { 1e-6 } else { 1e-2 * moved };
        assert!(moved > 0.01 && off < tolerance, "{precision:?}: off by {off:e} of {moved:e}");
    }
}

#[test]
fn it_goes_on_from_a_checkpoint_to_the_same_bits() {
    let dir = tempfile::tempdir().unwrap();
    let whole = train(own(), Precision::Full, 8, None);
    train(own(), Precision::Full, 3, Some((dir.path(), false)));
    assert_eq!(train(own(), Precision::Full, 8, Some((dir.path(), true))), whole);
}

/// Keeps a number whose name contains no parameter's name.
struct Counts(Var);

impl Optimizer for Counts {
    type Config = HeavyBallConfig;

    fn rates(config: &mut HeavyBallConfig) -> (&mut f64, Option<&mut f64>) {
        (&mut config.lr, None)
    }

    fn of(_: &HeavyBallConfig, _: &[(String, Var)]) -> Result<Self> {
        Ok(Self(Var::zeros((), DType::F32, &Device::Cpu)?))
    }

    fn step(&mut self, _: u64, _: Rates, _: &[Tensor]) -> Result<()> {
        Ok(())
    }

    fn state(&self) -> Vec<(String, Var)> {
        vec![("count".into(), self.0.clone())]
    }
}

#[test]
fn what_it_could_not_find_again_or_does_not_know_is_refused() {
    let config = HeavyBallConfig { lr: 0.05, weight_decay: 0., momentum: 0.9 };
    let counts = OptimizerConfig::custom::<Counts>("counts", config).unwrap();
    let error = |weight_decay| {
        let bias = ParamGroup { params: "*.bias".into(), lr: Some(0.1), weight_decay, ..Default::default() };
        let config = TrainerConfig { max_steps: Some(1), ..Default::default() };
        let mut trainer = Trainer::new(config).optimizer_with_groups(counts.clone(), vec![bias]);
        trainer.fit(&Dropped::model(1), &Data::new(Points { samples: 10 })).unwrap_err().to_string()
    };
    assert!(error(None).starts_with("optimizer `optimizer` has two states named `count`"), "{}", error(None));
    assert_eq!(error(Some(0.1)), "`groups`: group `*.bias`: the optimizer has no `weight_decay`");
}

#[test]
fn a_schedule_of_ones_own_is_any_function_of_the_step() {
    let lrs = |schedule: Schedule| (0..12).map(|t| schedule.at(t, 0.4).lr.to_bits()).collect::<Vec<_>>();
    let halves = Schedule::custom(|t, lr| lr * 0.5f64.powf((t / 5) as f64));
    assert_eq!(lrs(halves), lrs(Schedule::Step { every: 5, gamma: 0.5 }));
}

const CONFIG: &str = r#"
[trainer]
max_steps = 1

[module]
name = "conv_lstm"

[data]
name = "moving_mnist"
frames_in = 2
frames_out = 2

[optimizer]
name = "heavy_ball"
lr = 0.25
momentum = 0.5
"#;

#[test]
fn it_has_a_name_in_a_configuration_which_is_written_out_again() {
    let registry = Registry::default()
        .module::<candlepower_models::ConvLstm>("conv_lstm")
        .dataset::<candlepower_datasets::MovingMnist>("moving_mnist")
        .optimizer::<HeavyBall>("heavy_ball");
    let read = |text: &str| {
        let document = Document::parse("own.toml", text.into(), &[]).unwrap();
        Experiment::new(&registry, document)
    };
    let resolved = read(CONFIG).unwrap().resolved().unwrap();
    let expected = "[optimizer]\nlr = 0.25\nweight_decay = 0.0\nmomentum = 0.5\nname = \"heavy_ball\"\n";
    assert!(resolved.contains(expected), "{resolved}");
    assert_eq!(read(&resolved).unwrap().resolved().unwrap(), resolved);
    let schema = candlepower::experiment::schema(&registry);
    let known = schema["properties"]["optimizer"]["anyOf"].as_array().unwrap();
    assert!(known.iter().any(|one| one["properties"]["name"]["const"] == "heavy_ball"), "{schema:#}");
    let error = |from: &str, to: &str| read(&CONFIG.replace(from, to)).err().unwrap().to_string();
    let momentum = error("momentum = 0.5", "momentum = 1.5");
    assert!(
        momentum.starts_with("own.toml:16:12: `optimizer.momentum`: expected less than 1\n"),
        "{momentum}"
    );
    let unknown = error("momentum = 0.5", "momentun = 0.5");
    assert!(
        unknown.contains("unknown field `momentun`, expected one of `lr`, `weight_decay`, `momentum`"),
        "{unknown}"
    );
}

#[test]
fn sections_of_one_kind_of_callback_are_told_apart() {
    use candlepower::callbacks::EarlyStopping;
    use candlepower::checkpoint::Checkpoint;
    use candlepower::experiment::Resume;
    let registry = Registry::default()
        .module::<candlepower_models::ConvLstm>("conv_lstm")
        .dataset::<candlepower_datasets::MovingMnist>("moving_mnist")
        .callback::<EarlyStopping>("by_loss")
        .callback::<EarlyStopping>("by_mse");
    let dir = tempfile::tempdir().unwrap();
    let (loss, mse) = (
        "[callbacks.by_loss]\nmonitor = \"loss\"\npatience = 9\nmin_delta = 1e9\n",
        "[callbacks.by_mse]\nmonitor = \"mse\"\npatience = 9\nmin_delta = 1e9\n",
    );
    let read_for = |steps: u64, sections: &str| {
        let base = CONFIG.split("[optimizer]").next().unwrap();
        let small = "[run]\ndir = \"DIR\"\n".replace("DIR", dir.path().to_str().unwrap());
        let text = format!(
            "{base}train_samples = 4\nval_samples = 2\n{small}[logging]\nprogress = false\n{sections}"
        );
        Experiment::new(
            &registry,
            Document::parse("own.toml", text, &[format!("trainer.max_steps={steps}")]).unwrap(),
        )
        .unwrap()
    };
    let read = |sections: &str| read_for(1, sections);
    let run = dir.path().join("run/version_0");
    let waiting = |experiment: Experiment, resume: Resume| {
        let report = experiment.train(&resume, Vec::new()).unwrap();
        assert_eq!(report.dir.unwrap(), run);
        let checkpoints = run.join("checkpoints");
        let last = candlepower::checkpoint::latest(&checkpoints).unwrap().unwrap();
        Checkpoint::load(&last).unwrap().state().callbacks.clone()
    };
    let before = waiting(read(&format!("{loss}{mse}")), Resume::No);
    assert_eq!(before["by_loss"]["by"]["monitor"], "loss");
    // In the opposite order: each callback resumes its own state, and no value is better by this much.
    let after = waiting(read_for(2, &format!("{mse}{loss}")), Resume::Auto);
    for name in ["by_loss", "by_mse"] {
        assert_eq!(after[name]["best"], before[name]["best"], "{name}");
        assert_eq!((&before[name]["waited"], &after[name]["waited"]), (&0.into(), &1.into()), "{name}");
    }
    let error = read(&format!("{loss}{}", mse.replace("\"mse\"", "\"mss\"")));
    let error = error.train(&Resume::No, Vec::new()).unwrap_err().to_string();
    assert!(error.contains("`callbacks.by_mse.monitor`: there is no validation metric `mss`"), "{error}");
    let group = read("[optimizer]\ngroups = [{ params = \"nothing.*\" }]\n");
    let error = group.train(&Resume::No, Vec::new()).unwrap_err().to_string();
    assert!(error.contains("`optimizer.groups`: `nothing.*` matches no parameter"), "{error}");
}

#[test]
fn a_model_comes_from_its_checkpoint_alone() {
    use candlepower::checkpoint::Checkpoint;
    use candlepower::experiment::Resume;
    use candlepower_models::ConvLstm;
    let registry = Registry::default()
        .module::<ConvLstm>("conv_lstm")
        .dataset::<candlepower_datasets::MovingMnist>("moving_mnist");
    let dir = tempfile::tempdir().unwrap();
    let base =
        CONFIG.split("[optimizer]").next().unwrap().replace("\"conv_lstm\"", "\"conv_lstm\"\nhidden = 5");
    let run = format!("[run]\ndir = {:?}\n", dir.path().to_str().unwrap());
    let text = format!(
        "{base}train_samples = 4\nval_samples = 2\n{run}[average]\nname = \"ema\"\ndecay = 0.5\n[logging]\nprogress = false\n"
    );
    let experiment = Experiment::new(&registry, Document::parse("own.toml", text, &[]).unwrap()).unwrap();
    let report = experiment.train(&Resume::No, Vec::new()).unwrap();
    let run = report.dir.unwrap();
    // The checkpoint can be loaded after it is moved.
    let moved = dir.path().join("moved");
    std::fs::rename(run.join("checkpoints/1"), &moved).unwrap();
    std::fs::remove_dir_all(&run).unwrap();
    let loaded = Model::load::<ConvLstm>(&moved, &candlepower_tests::device()).unwrap();
    let spec = VideoSpec { frames_in: 2, frames_out: 2, channels: 1, height: 64, width: 64 };
    let config = candlepower_models::conv_lstm::ConvLstmConfig { hidden: 5, ..Default::default() };
    let built = Model::build::<ConvLstm>(&config, &spec, 9, &candlepower_tests::device()).unwrap();
    Checkpoint::load(&moved).unwrap().restore_for_evaluation(&built.params().state_dict()).unwrap();
    let input = Tensor::rand(0f32, 1., (1, 2, 1, 64, 64), &Device::Cpu).unwrap();
    let clip = Video::new(input.clone(), input.zeros_like().unwrap());
    let frames =
        |model: &Model<Video>| model.predict(&clip).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
    assert_eq!(frames(&loaded), frames(&built));
    let error = Model::load::<candlepower_models::SimVp>(&moved, &Device::Cpu).err().unwrap().to_string();
    assert!(error.contains("unknown field"), "{error}");
}
