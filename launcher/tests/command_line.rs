//! The command line as a user sees it: output, exit codes, and the folders that it creates.
#![allow(clippy::unwrap_used)]

mod common;

use common::{Place, TINY, assert_text, records};

#[test]
fn a_checkpoint_of_another_model() {
    let place = Place::new();
    place.succeed(&["train", "tiny.toml"]);
    let dir = "runs/tiny/version_0";
    let error = place.fail(1, &["validate", "tiny.toml", "--set", "module.hidden=5", "--checkpoint", dir]);
    assert!(
        error.contains("checkpoints/4: this checkpoint is of another model; its parameters differ:"),
        "{error}"
    );
    assert!(
        error.contains("`decoder_CNN.weight` has shape [64, 4, 1, 3, 3], the model needs [64, 5, 1, 3, 3]"),
        "{error}"
    );
    let error = place.fail(1, &["validate", "tiny.toml", "--checkpoint", "no/such"]);
    assert_text(&error, "error: no/such: No such file or directory (os error 2)");
}

#[test]
fn the_scores_by_lead_time_are_of_what_is_validated() {
    let place = Place::new();
    let overall = |limit: &str| {
        let run = format!("run.name=limit_{limit}");
        let set = format!("trainer.limit_val_batches={limit}");
        let said = place.succeed(&["train", "tiny.toml", "--set", &set, "--set", &run]);
        let run = format!("runs/limit_{limit}/version_0");
        let logged = records(&place, &run, "val").pop().map(|record| record["mse"].as_f64().unwrap());
        let scores = place.path(&run).join("lead_times/scores.json");
        assert_eq!(scores.exists(), said.contains("by lead time"));
        let scores = std::fs::read_to_string(scores).ok().map(|text| {
            let scores: serde_json::Value = serde_json::from_str(&text).unwrap();
            scores["predictors"]["this model"]["mse"].as_f64().unwrap()
        });
        (logged, scores)
    };
    // Five samples in batches of four.
    let (one, all) = (overall("1"), overall("2"));
    for (logged, scores) in [one, all] {
        assert!((scores.unwrap() / logged.unwrap() - 1.).abs() < 1e-5, "{scores:?}, {logged:?}");
    }
    assert_ne!(one, all);
    assert_eq!(overall("0"), (None, None));
}

#[test]
fn a_training_starts_from_the_weights_of_another() {
    let place = Place::new();
    place.succeed(&["train", "tiny.toml", "--set", "average.name=ema", "--set", "average.decay=0.5"]);
    let first = "runs/tiny/version_0";
    let validate = |checkpoint: &str| -> f64 {
        let said = place.succeed(&["validate", "tiny.toml", "--checkpoint", checkpoint, "--json"]);
        serde_json::from_str::<serde_json::Value>(&said).unwrap()["mse"].as_f64().unwrap()
    };
    // A run is evaluated with its averages, which are also saved in a file; in any precision.
    let averages = format!("{first}/checkpoints/4/average.safetensors");
    assert_eq!(validate(first), validate(&averages));
    let in_half = |checkpoint: &str| {
        place.succeed(&[
            "validate",
            "tiny.toml",
            "--precision",
            "bf16-mixed",
            "--checkpoint",
            checkpoint,
            "--json",
        ])
    };
    assert_eq!(in_half(first), in_half(&averages));
    assert_ne!(validate(first), validate(&format!("{first}/checkpoints/4/model.safetensors")));
    // A training with a learning rate of 0 keeps the weights that it starts from.
    let train = |more: &[&str]| {
        let still = ["train", "tiny.toml", "--set", "optimizer.lr=0", "--set", "run.name=next"];
        place.succeed(&[&still[..], more].concat());
        let version = std::fs::read_dir(place.path("runs/next")).unwrap().count() - 1;
        (
            validate(&format!("runs/next/version_{version}")),
            place.read(&format!("runs/next/version_{version}/config.toml")),
        )
    };
    let (mse, config) = train(&["--set", &format!("init.weights={first}")]);
    assert_eq!(mse, validate(first));
    assert!(
        config.contains(&format!("[init]\nweights = \"{first}\"\nparams = \"*\"\nstrict = true\n")),
        "{config}"
    );
    let (initial, _) = train(&[]);
    assert_ne!(initial, validate(first));
    let (part, _) = train(&["--set", &format!("init.weights={first}"), "--set", "init.params=encoder_*"]);
    assert!(part != initial && part != validate(first));
    // All ranks start from these weights: two ranks move them as one does, up to rounding.
    let moved = |devices: &str| {
        let run = format!("run.name=moved_by_{devices}");
        let init = format!("init.weights={first}");
        place.succeed(&["train", "tiny.toml", "--set", &run, "--set", &init, "--devices", devices]);
        validate(&format!("runs/moved_by_{devices}"))
    };
    let (by_one, by_two) = (moved("1"), moved("2"));
    assert!((by_one / by_two - 1.).abs() < 1e-4 && by_one != mse, "{by_one}, {by_two}");
    // A resumed run has its own weights, even if the weights that it started from are gone.
    std::fs::remove_dir_all(place.path("runs/tiny")).unwrap();
    let resume =
        ["train", "tiny.toml", "--set", "run.name=next", "--set", "trainer.max_steps=5", "--resume", "auto"];
    place.succeed(&[&resume[..], &["--set", &format!("init.weights={first}")]].concat());
}

#[test]
fn weights_that_do_not_fit_are_refused_before_a_folder_is_made() {
    let place = Place::new();
    place.succeed(&["train", "tiny.toml"]);
    std::fs::rename(place.path("runs/tiny/version_0"), place.path("old")).unwrap();
    std::fs::remove_dir_all(place.path("runs")).unwrap();
    let init = "[init]\nweights = \"old\"\n\n";
    std::fs::write(
        place.path("tiny.toml"),
        [init, TINY.trim_start()].concat().replace("hidden = 4", "hidden = 5"),
    )
    .unwrap();
    let error = place.fail(2, &["train", "tiny.toml"]);
    assert!(
        error.contains("error: tiny.toml:2:11: `init.weights`: old does not fit the model:\n  "),
        "{error}"
    );
    assert!(error.contains("has shape [64, 4, 1, 3, 3], the model needs [64, 5, 1, 3, 3]"), "{error}");
    assert!(error.contains("`params` selects a part"), "{error}");
    let error = place.fail(2, &["train", "tiny.toml", "--set", "init.weights=no/such.pth"]);
    assert!(error.contains("`init.weights`: no/such.pth: no such file or folder"), "{error}");
    assert!(!place.path("runs").exists(), "a refused configuration made a folder");
    // With `strict = false`, the weights that fit are still taken.
    place.succeed(&["train", "tiny.toml", "--set", "init.strict=false"]);
}

#[test]
fn a_run_writes_its_folder_and_is_validated_and_predicts() {
    let place = Place::new();
    let said = place.succeed(&["train", "tiny.toml", "--batch-size", "3", "--set", "logging.image_every=2"]);
    assert!(said.contains("finished at step 4") && said.contains("per-pixel mean"), "{said}");
    let run = "runs/tiny/version_0";
    let steps: Vec<_> = records(&place, run, "train").iter().map(|r| r["step"].as_u64().unwrap()).collect();
    assert_eq!(steps, [1, 2, 3, 4]);
    let last = records(&place, run, "val").pop().unwrap();
    assert_eq!(last["step"], 4);
    for file in [
        "config.toml",
        "metrics.csv",
        "checkpoints/4/manifest.json",
        "checkpoints/last",
        "checkpoints/best",
        "lead_times/ssim_range_1.svg",
    ] {
        assert!(place.path(run).join(file).exists(), "{file} is missing");
    }
    for picture in ["train_prediction_000002.png", "val_prediction_000004.png"] {
        let bytes = std::fs::read(place.path(run).join("images").join(picture)).unwrap();
        assert!(bytes.starts_with(b"\x89PNG"));
    }
    let events =
        std::fs::read_dir(place.path(run)).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap());
    assert!(events.into_iter().any(|name| name.starts_with("events.out.tfevents")));
    assert!(place.read(&format!("{run}/config.toml")).contains("batch_size = 3"));

    let validate = ["validate", "tiny.toml", "--checkpoint", run, "--json"];
    let metrics: serde_json::Value = serde_json::from_str(&place.succeed(&validate)).unwrap();
    let (found, logged) = (metrics["mse"].as_f64().unwrap(), last["mse"].as_f64().unwrap());
    assert!((found / logged - 1.).abs() < 1e-6, "validate says {found}, the run said {logged}");

    let table = place.succeed(&[
        "validate",
        "tiny.toml",
        "--batch-size",
        "3",
        "--checkpoint",
        run,
        "--lead-times",
        "scores",
    ]);
    assert!(
        said.contains(table.split_once("by lead time").unwrap().1.trim_end()),
        "not what the run said: {table}"
    );
    assert_eq!(place.read("scores/scores.json"), place.read(&format!("{run}/lead_times/scores.json")));
    let scores: serde_json::Value = serde_json::from_str(&place.read("scores/scores.json")).unwrap();
    let overall = scores["predictors"]["this model"]["mse"].as_f64().unwrap();
    assert!((overall / logged - 1.).abs() < 1e-5, "by lead time {overall}, at validation {logged}");

    let clip = ndarray_npy_of_zeros();
    std::fs::write(place.path("clip.npy"), clip).unwrap();
    for output in ["out.gif", "out.png", "out.npy"] {
        place.succeed(&[
            "predict",
            "tiny.toml",
            "--checkpoint",
            run,
            "--input",
            "clip.npy",
            "--output",
            output,
        ]);
        assert!(std::fs::metadata(place.path(output)).unwrap().len() > 100, "{output} is empty");
    }
}

/// Two black frames of 64x64 bytes as a .npy file.
fn ndarray_npy_of_zeros() -> Vec<u8> {
    let header = "{'descr': '|u1', 'fortran_order': False, 'shape': (2, 64, 64), }";
    let padded = format!("{header:<117}\n");
    let mut file = b"\x93NUMPY\x01\x00\x76\x00".to_vec();
    file.extend(padded.as_bytes());
    file.extend(vec![0; 2 * 64 * 64]);
    file
}

#[test]
fn the_resolved_configuration_is_one() {
    let place = Place::new();
    let changes = [
        "module.hidden=6",
        "optimizer.name=radam",
        "schedule.name=one_cycle",
        "schedule.max_lr=1e-3",
        "schedule.steps=9",
        "callbacks.early_stopping.patience=2",
    ];
    let changes: Vec<&str> = changes.iter().flat_map(|change| ["--set", change]).collect();
    let resolved = place.succeed(&[&["config", "tiny.toml"], &changes[..]].concat());
    for line in ["hidden = 6", "name = \"radam\"", "name = \"one_cycle\"", "rising = 0.3", "patience = 2"] {
        assert!(resolved.contains(line), "`{line}` is not in:\n{resolved}");
    }
    std::fs::write(place.path("again.toml"), &resolved).unwrap();
    assert_eq!(place.succeed(&["config", "again.toml"]), resolved);
    let schema: serde_json::Value = serde_json::from_str(&place.succeed(&["config", "--schema"])).unwrap();
    assert_eq!(schema["properties"]["module"]["anyOf"][0]["properties"]["name"]["const"], "conv_lstm");
}

#[test]
fn callbacks_optimizers_and_averages_from_the_file() {
    let sections = r#"
[callbacks.early_stopping]
stopping_threshold = 1.0

[callbacks.throughput]
peak_tflops = 0.1

[average]
name = "ema"
decay = 0.9

[optimizers.encoder]
name = "adam"
params = "encoder_*"
groups = [{ params = "*.bias", weight_decay = 0.5 }]

[optimizers.decoder]
name = "sgd"
params = "decoder_*"
lr = 0.01
schedule = { name = "cosine", steps = 10 }
"#;
    let place = Place::with(&format!("{TINY}{sections}").replace("max_steps = 4", "max_epochs = 9"));
    let resolved = place.succeed(&["config", "tiny.toml"]);
    std::fs::write(place.path("again.toml"), &resolved).unwrap();
    assert_eq!(place.succeed(&["config", "again.toml"]), resolved);
    let said = place.succeed(&["train", "tiny.toml"]);
    assert!(said.contains("stopped at step 3: `loss` is ") && said.contains("the goal is reached"), "{said}");
    let run = "runs/tiny/version_0";
    let second = &records(&place, run, "train")[1];
    for metric in ["loss/encoder", "lr/decoder", "samples_per_second", "utilisation"] {
        assert!(second[metric].as_f64().is_some_and(|x| x > 0.), "{metric}: {second}");
    }
    let averaged =
        std::fs::read(place.path("runs/tiny/version_0/checkpoints/last/average.safetensors")).unwrap();
    let trained =
        std::fs::read(place.path("runs/tiny/version_0/checkpoints/last/model.safetensors")).unwrap();
    assert!(averaged != trained);
    let validate = ["validate", "tiny.toml", "--checkpoint", run, "--json"];
    let metrics: serde_json::Value = serde_json::from_str(&place.succeed(&validate)).unwrap();
    let logged = records(&place, run, "val").pop().unwrap();
    assert_eq!(metrics["mse"], logged["mse"], "validate measures something else than the run did");
}

#[test]
fn devices_are_listed_and_one_that_is_not_there_is_refused_before_anything_is_done() {
    let place = Place::new();
    let listed = place.succeed(&["devices"]);
    assert!(listed.starts_with("cpu       "), "{listed}");
    place.succeed(&["train", "tiny.toml", "--accelerator", "cpu", "--set", "run.name=\"there\""]);
    assert!(
        place
            .fail(2, &["train", "tiny.toml", "--accelerator", "gpu"])
            .contains("trainer.accelerator=\"gpu\"")
    );
    if listed.contains("cuda:0") {
        return;
    }
    let error = place.fail(2, &["train", "tiny.toml", "--accelerator", "cuda"]);
    let expected = match cfg!(feature = "cuda") {
        true => "no CUDA device is found: ",
        false => "this program has no CUDA: expected \"auto\" or \"cpu\", or build it with `--features cuda`",
    };
    assert!(error.contains("trainer.accelerator=\"cuda\"") && error.contains(expected), "{error}");
    assert!(!place.path("runs/tiny").exists());
}

#[test]
fn every_precision_trains_and_an_unknown_one_is_refused() {
    let place = Place::new();
    for precision in ["32", "bf16-mixed", "16-mixed"] {
        place.succeed(&["train", "tiny.toml", "--precision", precision]);
    }
    let losses = ["version_0", "version_1", "version_2"].map(|version| {
        let last = records(&place, &format!("runs/tiny/{version}"), "val").pop().unwrap();
        last["loss"].as_f64().unwrap()
    });
    assert!(
        (losses[1] / losses[0] - 1.).abs() < 0.03 && (losses[2] / losses[0] - 1.).abs() < 0.03,
        "{losses:?}"
    );
    assert!(losses[1] != losses[0] && losses[2] != losses[0], "computed in full precision: {losses:?}");
    assert_text(
        &place.fail(2, &["train", "tiny.toml", "--precision", "16"]),
        r#"
error: --set:1:19: unknown value `16`, expected one of `32`, `bf16-mixed`, `16-mixed`
  |
1 | trainer.precision="16"
  |                   ^^^^"#,
    );
}

#[test]
fn a_try_out_writes_nothing() {
    let place = Place::new();
    let said = place.succeed(&["train", "tiny.toml", "--set", "trainer.fast_dev_run=1"]);
    assert!(said.contains("finished at step 1") && said.contains("nothing was written"), "{said}");
    assert!(!place.path("runs").exists());
}

#[test]
fn test_data_is_measured_and_predicted_from() {
    let place = Place::new();
    place.succeed(&["train", "tiny.toml"]);
    let of = |command: &str, more: &[&str]| {
        let all = [&[command, "tiny.toml", "--checkpoint", "runs/tiny/version_0"], more].concat();
        place.succeed(&all)
    };
    let (val, test) = (of("validate", &["--json"]), of("validate", &["--split", "test", "--json"]));
    assert!(test.contains("\"mse\"") && test != val, "{val} {test}");
    let said = of("predict", &["--split", "val", "--output", "predictions"]);
    // 5 samples in batches of 4.
    assert_eq!(said, "wrote 2 files to predictions\n");
    assert!(place.path("predictions/000001.npy").exists());
    let again = ["predict", "tiny.toml", "--checkpoint", "runs/tiny/version_0", "--split", "val"];
    let error = place.fail(1, &[&again[..], &["--output", "predictions"]].concat());
    assert_eq!(error, "error: predictions: expected an empty folder for the predictions\n");
}

#[test]
fn the_best_validation_is_told_of_where_it_was_not_the_last() {
    let place = Place::new();
    // Training diverges, so the first validation stays the best.
    let worse = ["train", "tiny.toml", "--set", "trainer.val_every=1", "--set", "optimizer.lr=3.0"];
    let said = place.succeed(&worse);
    let best = std::fs::read_link(place.path("runs/tiny/version_0/checkpoints/best")).unwrap();
    assert!(best != std::path::Path::new("4"), "{best:?}");
    assert!(said.contains(&format!("the best was at step {}, with ", best.display())), "{said}");
}

#[test]
fn callbacks_of_the_configuration_see_what_is_validated_outside_training() {
    // Early stopping fails if its metric is missing, so its error shows that the callback was attached.
    let place = Place::new();
    place.succeed(&["train", "tiny.toml"]);
    let validate = ["validate", "tiny.toml", "--checkpoint", "runs/tiny"];
    place.succeed(&validate);
    let watched = ["--set", "callbacks.early_stopping.monitor=ssim"];
    let error = place.fail(1, &[&validate[..], &watched].concat());
    assert_eq!(error, "error: early stopping monitors `ssim`, validation has loss, mse\n");
}

#[test]
fn a_run_predicts_where_what_it_learned_from_is_gone() {
    let place = Place::with(
        &TINY
            .replace("\"moving_mnist\"\ndigits_per_frame = 1", "\"frames\"\npath = \"clips.npy\"")
            .replace("train_samples = 10\nval_samples = 5\n", "split = \"time\"\n"),
    );
    let clip =
        |frames: usize| ndarray::Array3::from_shape_fn((frames, 16, 16), |(t, y, x)| (t * y + x) as u8);
    ndarray_npy::write_npy(place.path("clips.npy"), &clip(60)).unwrap();
    ndarray_npy::write_npy(place.path("new.npy"), &clip(4)).unwrap();
    place.succeed(&["train", "tiny.toml"]);
    let predict = |output: &'static str| {
        [
            "predict",
            "runs/tiny/version_0/config.toml",
            "--checkpoint",
            "runs/tiny",
            "--input",
            "new.npy",
            "--output",
            output,
        ]
    };
    place.succeed(&predict("before.npy"));
    std::fs::remove_file(place.path("clips.npy")).unwrap();
    place.succeed(&predict("after.npy"));
    let bytes = |name: &str| std::fs::read(place.path(name)).unwrap();
    assert_eq!(bytes("before.npy"), bytes("after.npy"));
    // With another [data], the sizes are unknown.
    let error = place.fail(1, &[&predict("other.npy")[..], &["--set", "data.every=2"]].concat());
    assert!(error.contains("data.every: 2, was 1\nwith the `config.toml` in the run's folder"), "{error}");
}
