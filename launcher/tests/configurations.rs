//! The configurations that ship with the project.
#![allow(clippy::unwrap_used)]

mod common;

use std::path::{Path, PathBuf};

use common::{Place, records};

#[test]
fn real_handwriting_trains_where_it_is_at_hand() {
    let beside = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/data");
    let data = std::env::var_os("CANDLEPOWER_DATA").map_or(beside, PathBuf::from).join("mnist");
    let Ok(digits) = data.canonicalize() else {
        eprintln!(
            "skipped: no MNIST files in {}; set CANDLEPOWER_DATA to a folder that holds mnist/",
            data.display()
        );
        return;
    };
    let place = Place::new();
    let digits = format!("data.digits={}", digits.display());
    place.succeed(&["train", "tiny.toml", "--set", &digits, "--set", "trainer.max_steps=8"]);
    let records = records(&place, "runs/tiny/version_0", "train");
    let loss = |record: &serde_json::Value| record["loss"].as_f64().unwrap();
    assert!(loss(&records[7]) < loss(&records[0]), "nothing was learned: {records:?}");
}

/// Settings that make a module small, so a step of it is quick.
fn small(module: &str) -> &'static [&'static str] {
    match module {
        "conv_lstm" => &["module.hidden=4"],
        "conv_lstm_stack" | "predrnn" | "predrnn_v2" | "predrnn_pp" | "e3d_lstm" | "mim" | "mau" => {
            &["module.hidden=[2, 2]", "data.frames_in=2", "data.frames_out=2"]
        }
        "sim_vp" | "tau" => &[
            "module.spatial_channels=4",
            "module.temporal_channels=16",
            "module.temporal_layers=2",
            "module.mlp_ratio=2.0",
        ],
        "svg_lp" => &["module.channels=2", "module.features=8", "module.hidden=8", "module.futures=2"],
        other => panic!("say here what makes `{other}` small"),
    }
}

#[test]
fn editors_are_told_what_a_configuration_may_hold() {
    use candlepower::config::Document;
    use candlepower::experiment::{Experiment, schema};
    let registry = candlepower_launcher::registry();
    let validator = jsonschema::validator_for(&schema(&registry)).unwrap();
    let complaints = |text: &str| -> Vec<String> {
        let config = serde_json::to_value(text.parse::<toml::Table>().unwrap()).unwrap();
        validator.iter_errors(&config).map(|error| error.to_string()).collect()
    };
    let mut texts: Vec<String> = std::fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("../configs"))
        .unwrap()
        .map(|entry| std::fs::read_to_string(entry.unwrap().path()).unwrap())
        .collect();
    let tiny = "[module]\nname = \"conv_lstm\"\n[data]\nname = \"moving_mnist\"\n";
    texts.extend(
        [
            "workers = 0\nprefetch = 3",
            "[optimizer]\nlr = 0.1\ngroups = [{ params = \"encoder.*\", frozen = true }]",
            "[optimizers.a]\nname = \"sgd\"\nparams = \"*\"\nschedule = { name = \"cosine\", steps = 3 }",
            "[schedule.plateau]\npatience = 3",
            "[schedule]\nname = \"step\"\nevery = 30\ngamma = 0.1\ninterval = \"epoch\"",
            "[callbacks.early_stopping]\npatience = 3",
            "[optimizers.a]\nname = \"sgd\"\nparams = \"a.*\"\n[optimizers.b]\nname = \"adam\"\nparams = \"b.*\"\nevery = 5",
        ]
        .map(|more| format!("{tiny}{more}\n")),
    );
    for text in texts {
        assert_eq!(complaints(&text), [""; 0], "{text}");
        let document = Document::parse("a.toml", text, &["trainer.max_steps=1".into()]).unwrap();
        let resolve = |document| Experiment::new(&registry, document).unwrap().resolved().unwrap();
        let resolved = resolve(document);
        assert_eq!(complaints(&resolved), [""; 0], "{resolved}");
        assert_eq!(resolve(Document::parse("b.toml", resolved.clone(), &[]).unwrap()), resolved);
    }
    for wrong in [
        "worker = 1",
        "[optimizer]\nlrr = 0.1",
        "[optimizer]\nmomentum = 0.9",
        "[optimizers.a]\nname = \"sgd\"",
        "[schedule]\nsteps = 3\nmin_lr = 0.1",
        "[trainer]\nprecision = \"8\"",
    ] {
        assert!(!complaints(&format!("{tiny}{wrong}\n")).is_empty(), "{wrong}");
    }
}

#[test]
fn every_configuration_of_the_project_is_read_and_its_module_stepped_in_every_precision() {
    use candlepower::experiment::{Experiment, Resume};
    let configs = Path::new(env!("CARGO_MANIFEST_DIR")).join("../configs");
    let registry = candlepower_launcher::registry();
    let frames = tempfile::tempdir().unwrap();
    for i in 0..120 {
        let picture = candlepower::picture::png_bytes(&gray_picture()).unwrap();
        std::fs::write(frames.path().join(format!("{i}.png")), picture).unwrap();
    }
    let radar = std::env::var_os("CANDLEPOWER_DATA")
        .map_or(Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/data"), PathBuf::from)
        .join("radar-mch");
    let mut stepped = Vec::new();
    for entry in std::fs::read_dir(configs).unwrap() {
        let path = entry.unwrap().path();
        // This data is not part of the project.
        let folder = match path.file_stem().unwrap().to_str().unwrap() {
            "frames" => Some(frames.path()),
            "radar" => Some(radar.as_path()),
            _ => None,
        };
        let data: Vec<String> =
            folder.iter().map(|folder| format!("data.path={:?}", folder.display())).collect();
        let module = Experiment::read(&registry, &path, &data).unwrap().resolved().unwrap();
        let module: toml::Table = module.parse().unwrap();
        let module = module["module"]["name"].as_str().unwrap().to_string();
        if folder.is_some_and(|folder| !folder.exists()) {
            eprintln!("skipped: there is no {}: no step of {}", radar.display(), path.display());
            continue;
        }
        let step = |precision: &str| {
            let what = format!("{}, {precision}", path.display());
            let quick = ["trainer.fast_dev_run=1", "trainer.batch_size=2", "logging.progress=false"];
            let quick = small(&module).iter().chain(&quick).map(ToString::to_string);
            let sets: Vec<String> =
                quick.chain(data.clone()).chain([format!("trainer.precision={precision:?}")]).collect();
            let report = Experiment::read(&registry, &path, &sets).unwrap().train(&Resume::No, Vec::new());
            let outcome = report.unwrap_or_else(|error| panic!("{what}: {error}")).outcome;
            assert_eq!(outcome.progress.step, 1, "{what}");
            let validation = outcome.validation.unwrap();
            assert!(validation["mse"].is_finite() && validation["loss"].is_finite(), "{what}");
            (what, validation["loss"])
        };
        let (_, wide) = step("32");
        for precision in ["bf16-mixed", "16-mixed"] {
            let (what, narrow) = step(precision);
            assert!((narrow - wide).abs() < 0.05 * wide, "{what}: {narrow} beside {wide}");
        }
        stepped.push(module);
    }
    for module in
        ["conv_lstm", "conv_lstm_stack", "e3d_lstm", "mau", "mim", "predrnn", "predrnn_pp", "predrnn_v2"]
            .into_iter()
            .chain(["sim_vp", "svg_lp", "tau"])
    {
        let configs = stepped.iter().filter(|name| *name == module).count();
        assert!(configs >= 2, "`{module}` has no published and no small configuration: {stepped:?}");
    }
}

#[test]
fn models_have_the_sizes_that_their_authors_count() {
    use candlepower::experiment::Experiment;
    // The tutorial's model, and OpenSTL's models with the counts that OpenSTL's own code gives.
    for (name, parameters) in [
        ("moving_mnist", 1_036_097),
        ("conv_lstm_stack", 15_083_520),
        ("predrnn", 23_838_720),
        ("predrnn_v2", 23_855_104),
        ("predrnn_pp", 38_584_320),
        ("e3d_lstm", 51_347_456),
        ("mim", 38_043_648),
        ("mau", 4_483_588),
        ("sim_vp", 46_769_665),
        ("tau", 44_656_001),
        ("svg_lp", 12_614_057),
    ] {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("../configs/{name}.toml"));
        let experiment = Experiment::read(&candlepower_launcher::registry(), &path, &[]).unwrap();
        assert_eq!(experiment.build().unwrap(), parameters, "{name}");
    }
}

fn gray_picture() -> candle_core::Tensor {
    candle_core::Tensor::full(0.5f32, (1, 9, 12), &candle_core::Device::Cpu).unwrap()
}
