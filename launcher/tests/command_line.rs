//! The command line as a person uses it: exit codes, folders, and the exact text of every configuration error.
#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// A small run: a ConvLSTM of 4 channels on one digit, 2 -> 2 frames.
const TINY: &str = r#"
[run]
name = "tiny"

[trainer]
batch_size = 4
max_steps = 4
log_every = 1

[module]
name = "conv_lstm"
hidden = 4
patch = 8

[data]
name = "moving_mnist"
digits_per_frame = 1
frames_in = 2
frames_out = 2
train_samples = 10
val_samples = 5

[checkpoint]
every_steps = 2
"#;

/// A folder with `tiny.toml`; commands run in it.
struct Place(tempfile::TempDir);

impl Place {
    fn new() -> Self {
        Self::with(TINY)
    }

    fn with(config: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("tiny.toml"), config.trim_start()).unwrap();
        Self(dir)
    }

    fn run(&self, arguments: &[&str]) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_candlepower"));
        command.current_dir(self.0.path()).args(arguments).output().unwrap()
    }

    /// Runs a command that must succeed; returns its standard output.
    #[track_caller]
    fn succeed(&self, arguments: &[&str]) -> String {
        let output = self.run(arguments);
        assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    /// Runs a command that must fail with this code; returns what it says.
    #[track_caller]
    fn fail(&self, code: i32, arguments: &[&str]) -> String {
        let output = self.run(arguments);
        assert_eq!(output.status.code(), Some(code), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stderr).unwrap()
    }

    fn path(&self, path: &str) -> PathBuf {
        self.0.path().join(path)
    }

    fn read(&self, path: &str) -> String {
        std::fs::read_to_string(self.path(path)).unwrap()
    }
}

/// The configuration error that `tiny.toml` with this replacement gives, and nothing is left on disk by it.
#[track_caller]
fn error_with(old: &str, new: &str) -> String {
    assert!(TINY.contains(old));
    let place = Place::with(&TINY.replace(old, new));
    let error = place.fail(2, &["train", "tiny.toml"]);
    assert!(!place.path("runs").exists(), "a refused configuration made a folder");
    error
}

#[track_caller]
fn assert_text(actual: &str, expected: &str) {
    assert_eq!(actual.trim_end(), expected.trim_matches('\n'));
}

#[test]
fn an_unknown_key() {
    assert_text(
        &error_with("hidden = 4", "hiden = 4"),
        r"
error: tiny.toml:11:1: unknown field `hiden`, expected one of `hidden`, `kernel`, `patch`, `frames_in`, `frames_out`, `mean_pixel`, `feed_frames_back`, `attention`
   |
11 | hiden = 4
   | ^^^^^
did you mean `hidden`?",
    );
}

#[test]
fn an_unknown_section() {
    assert_text(
        &error_with("[checkpoint]", "[checkpoints]"),
        r"
error: tiny.toml:22:2: unknown section `checkpoints`, expected one of `run`, `init`, `trainer`, `module`, `data`, `optimizer`, `optimizers`, `schedule`, `average`, `checkpoint`, `logging`, `distributed`, `callbacks`
   |
22 | [checkpoints]
   |  ^^^^^^^^^^^
did you mean `checkpoint`?",
    );
}

#[test]
fn a_wrong_type() {
    assert_text(
        &error_with("batch_size = 4", "batch_size = \"four\""),
        r#"
error: tiny.toml:5:14: expected a whole number from 0, found "four"
  |
5 | batch_size = "four"
  |              ^^^^^^"#,
    );
}

#[test]
fn a_value_out_of_range() {
    assert_text(
        &error_with("hidden = 4", "hidden = 0"),
        r"
error: tiny.toml:11:10: `module.hidden`: expected at least 1, found 0
   |
11 | hidden = 0
   |          ^",
    );
    assert_text(
        &error_with("max_steps = 4", "max_steps = 0"),
        r"
error: tiny.toml:6:13: `trainer.max_steps`: expected at least 1, found 0
  |
6 | max_steps = 0
  |             ^",
    );
}

#[test]
fn an_unknown_module_or_data() {
    assert_text(
        &error_with("conv_lstm", "conv_ltsm"),
        r#"
error: tiny.toml:10:8: unknown module `conv_ltsm`, expected one of `conv_lstm`, `conv_lstm_stack`, `predrnn`, `predrnn_v2`, `predrnn_pp`, `e3d_lstm`, `mim`, `mau`, `sim_vp`, `svg_lp`, `tau`
   |
10 | name = "conv_ltsm"
   |        ^^^^^^^^^^^
did you mean `conv_lstm`?"#,
    );
    assert_text(
        &error_with("moving_mnist", "moving_minst"),
        r#"
error: tiny.toml:15:8: unknown data `moving_minst`, expected one of `moving_mnist`, `frames`, `radar`, `digits`
   |
15 | name = "moving_minst"
   |        ^^^^^^^^^^^^^^
did you mean `moving_mnist`?"#,
    );
}

#[test]
fn an_unknown_optimizer_or_schedule() {
    let place = Place::new();
    let train = |set| place.fail(2, &["train", "tiny.toml", "--set", set]);
    let error = train("optimizer.name=adamm");
    assert!(
        error.starts_with("error: --set:1:16: unknown optimizer `adamm`, expected one of `adam`, `adamw`"),
        "{error}"
    );
    assert!(error.ends_with("did you mean `adam`?\n"), "{error}");
    let error = train("schedule.name=cosin");
    assert!(
        error.starts_with("error: --set:1:15: unknown schedule `cosin`, expected one of `constant`"),
        "{error}"
    );
    assert_text(
        &place.fail(2, &["train", "tiny.toml", "--set", "schedule.name=cosine", "--set", "schedule.steps=0"]),
        r"
error: --set:1:16: `schedule.steps`: expected at least 1, found 0
  |
1 | schedule.steps=0
  |                ^",
    );
}

#[test]
fn data_of_another_kind() {
    assert_text(
        &error_with("moving_mnist", "digits"),
        r#"
error: tiny.toml:15:8: data `digits` makes other batches than module `conv_lstm` learns from, expected one of `moving_mnist`, `frames`, `radar`
   |
15 | name = "digits"
   |        ^^^^^^^^"#,
    );
}

#[test]
fn sizes_that_do_not_fit() {
    assert_text(
        &error_with("patch = 8", "patch = 5"),
        r"
error: tiny.toml:12:9: `module.patch`: patches of 5x5 do not tile frames of 64x64
   |
12 | patch = 5
   |         ^",
    );
    assert_text(
        &error_with("patch = 8", "patch = 8\nframes_out = 3"),
        r"
error: tiny.toml:13:14: `module.frames_out`: the data gives 2 frames; set `data.frames_out` to the same, or leave this out
   |
13 | frames_out = 3
   |              ^",
    );
}

#[test]
fn a_missing_file() {
    let place = Place::new();
    assert_text(
        &place.fail(2, &["train", "tinny.toml"]),
        "
error: tinny.toml: cannot read this configuration file: No such file or directory (os error 2)
did you mean `tiny.toml`?",
    );
    assert_text(
        &place.fail(2, &["train", "tiny.toml", "--set", "data.digits=no/such/folder"]),
        "
error: --set:1:13: `data.digits`: no/such/folder: no such folder; use \"builtin\" for the digits that need no download, \
or a folder that holds `train-images-idx3-ubyte` or `t10k-images-idx3-ubyte`, plain or .gz
  |
1 | data.digits=no/such/folder
  |             ^^^^^^^^^^^^^^",
    );
}

#[test]
fn several_devices_and_processes() {
    let place = Place::new();
    place.succeed(&["train", "tiny.toml", "--devices", "3"]);
    let steps = place.read("runs/tiny/version_0/metrics.jsonl");
    assert_eq!(
        steps.lines().filter(|line| line.contains("\"train\"")).count(),
        4,
        "each step is logged once"
    );
    let train = |arguments: &[&str]| place.fail(2, &[&["train", "tiny.toml"], arguments].concat());
    assert_text(
        &train(&["--set", "distributed.hang_timeout=\"0s\""]),
        r#"
error: --set:1:26: `distributed.hang_timeout`: expected a time above 0
  |
1 | distributed.hang_timeout="0s"
  |                          ^^^^"#,
    );
    // Without anything to reach the others with, each would train on its own and write into the same folder.
    let mut command = Command::new(env!("CARGO_BIN_EXE_candlepower"));
    command.current_dir(place.0.path()).args(["train", "tiny.toml"]).env("RANK", "1").env("WORLD_SIZE", "2");
    let output = command.output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(
        said.starts_with("error: this process is rank 1 of 2 (RANK and WORLD_SIZE), and has nothing"),
        "{said}"
    );
    assert!(!place.path("runs/tiny/version_1").exists());
}

#[test]
fn machines_that_do_not_know_each_other() {
    let place = Place::new();
    let fail = |code, arguments: &[&str]| place.fail(code, arguments);
    assert_eq!(
        fail(1, &["train", "tiny.toml", "--set", "distributed.nodes=2"]),
        "error: `distributed.nodes` is 2, and this process was started alone: start `candlepower launch` on each machine, or \
         `torchrun`, `srun` or `mpirun`\n"
    );
    assert_eq!(
        fail(1, &["launch", "tiny.toml", "--nodes", "3"]),
        "error: `distributed.nodes` is 3: start `candlepower launch` on each machine, with --node-rank 0 to 2 and --master \
         HOST:PORT\n"
    );
    assert_eq!(
        fail(1, &["launch", "tiny.toml", "--nodes", "2", "--node-rank", "2"]),
        "error: --node-rank 2: there are 2 machines, counted from 0; set their number with --nodes\n"
    );
    assert_eq!(
        fail(1, &["launch", "tiny.toml", "--nodes", "2", "--node-rank", "1"]),
        "error: --master HOST:PORT is missing: where the machine of rank 0 can be reached\n"
    );
    // What is launched knows who it is; and that this program has nothing that reaches another machine.
    let launch = ["launch", "tiny.toml", "--nodes", "2", "--node-rank", "1", "--master", "node1:29500"];
    let said = fail(1, &[&launch[..], &["--set", "distributed.max_restarts=0"]].concat());
    assert!(said.starts_with("error: this process is rank 1 of 2 (RANK and WORLD_SIZE)"), "{said}");
    let said = fail(2, &["launch", "tiny.toml", "--master", "node1"]);
    assert!(said.contains("expected a host and a port, as \"node1:29500\""), "{said}");
}

#[test]
fn a_wrong_override() {
    let place = Place::new();
    let train = |set| place.fail(2, &["train", "tiny.toml", "--set", set]);
    assert_text(
        &train("module.hiden=3"),
        r"
error: --set:1:8: unknown field `hiden`, expected one of `hidden`, `kernel`, `patch`, `frames_in`, `frames_out`, `mean_pixel`, `feed_frames_back`, `attention`
  |
1 | module.hiden=3
  |        ^^^^^
did you mean `hidden`?",
    );
    assert_text(
        &train("hidden"),
        r"
error: --set:1:1: an override needs a `=`
  |
1 | hidden
  | ^^^^^^
write it as --set section.key=value, for example --set trainer.max_steps=100",
    );
}

#[test]
fn broken_toml() {
    let error = error_with("[trainer]", "[trainer");
    assert!(error.starts_with("error: tiny.toml:4:9: "), "{error}");
    assert!(error.contains("4 | [trainer\n"), "{error}");
}

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
    // A run is evaluated with its averages, which are in a file too; in any precision.
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
    // A training that moves nothing stays where it starts, and starts where it is told to.
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
    // All ranks start from them: two move the weights as one does, to rounding.
    let moved = |devices: &str| {
        let run = format!("run.name=moved_by_{devices}");
        let init = format!("init.weights={first}");
        place.succeed(&["train", "tiny.toml", "--set", &run, "--set", &init, "--devices", devices]);
        validate(&format!("runs/moved_by_{devices}"))
    };
    let (by_one, by_two) = (moved("1"), moved("2"));
    assert!((by_one / by_two - 1.).abs() < 1e-4 && by_one != mse, "{by_one}, {by_two}");
    // A run that goes on has its own weights, whatever has become of those that it started from.
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
    assert!(error.contains("`params` can name a part"), "{error}");
    let error = place.fail(2, &["train", "tiny.toml", "--set", "init.weights=no/such.pth"]);
    assert!(error.contains("`init.weights`: no/such.pth: there is no such file or folder"), "{error}");
    assert!(!place.path("runs").exists(), "a refused configuration made a folder");
    // What fits is taken all the same where that is asked for.
    place.succeed(&["train", "tiny.toml", "--set", "init.strict=false"]);
}

/// The metrics of every line of `metrics.jsonl` of one split.
fn records(place: &Place, run: &str, split: &str) -> Vec<serde_json::Value> {
    let lines = place.read(&format!("{run}/metrics.jsonl"));
    let records = lines.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
    records.filter(|record| record["split"] == split).collect()
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

/// The weights and the optimizer of a checkpoint, byte for byte.
fn weights(checkpoint: &Path) -> [Vec<u8>; 2] {
    ["model.safetensors", "optimizer.safetensors"].map(|file| std::fs::read(checkpoint.join(file)).unwrap())
}

#[test]
fn a_killed_run_resumes_to_the_same_bits() {
    let long = ["--set", "trainer.max_steps=60", "--set", "logging.progress=false"];
    let straight = Place::new();
    straight.succeed(&[&["train", "tiny.toml"], &long[..]].concat());
    let killed = Place::new();
    let mut child = Command::new(env!("CARGO_BIN_EXE_candlepower"))
        .current_dir(killed.0.path())
        .args([&["train", "tiny.toml"], &long[..]].concat())
        .spawn()
        .unwrap();
    let started = std::time::Instant::now();
    while !killed.path("runs/tiny/version_0/checkpoints/last").exists() {
        assert!(started.elapsed().as_secs() < 120, "no checkpoint came");
        std::thread::yield_now();
    }
    child.kill().unwrap();
    child.wait().unwrap();
    killed.succeed(&[&["train", "tiny.toml", "--resume", "auto"], &long[..]].concat());
    assert!(!killed.path("runs/tiny/version_1").exists(), "the run did not go on in its own folder");
    let last = "runs/tiny/version_0/checkpoints/60";
    assert!(
        weights(&straight.path(last)) == weights(&killed.path(last)),
        "the resumed run ends with other bits"
    );
    let steps = |place: &Place| -> Vec<u64> {
        let records = records(place, "runs/tiny/version_0", "train");
        records.iter().map(|record| record["step"].as_u64().unwrap()).collect()
    };
    assert_eq!(steps(&killed), (1..=60).collect::<Vec<_>>(), "a step is logged twice, or not at all");
}

#[cfg(unix)]
#[test]
fn a_signal_saves_and_says_so_in_the_exit_code() {
    let place = Place::new();
    let child = Command::new(env!("CARGO_BIN_EXE_candlepower"))
        .current_dir(place.0.path())
        .args(["train", "tiny.toml", "--set", "trainer.max_steps=100000"])
        .stderr(std::process::Stdio::null())
        .spawn()
        .unwrap();
    let started = std::time::Instant::now();
    while !place.path("runs/tiny/version_0/checkpoints/last").exists() {
        assert!(started.elapsed().as_secs() < 120, "no checkpoint came");
        std::thread::yield_now();
    }
    Command::new("kill").args(["-TERM", &child.id().to_string()]).status().unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(143));
    let last = std::fs::read_link(place.path("runs/tiny/version_0/checkpoints/last")).unwrap();
    let state = place.read(&format!("runs/tiny/version_0/checkpoints/{}/state.json", last.display()));
    let state: serde_json::Value = serde_json::from_str(&state).unwrap();
    assert_eq!(state["progress"]["step"].to_string(), last.to_str().unwrap());
}

/// Waits until a file is there.
fn wait_for(path: &Path) {
    let started = std::time::Instant::now();
    while !path.exists() {
        assert!(started.elapsed().as_secs() < 120, "{} did not come", path.display());
        std::thread::yield_now();
    }
}

#[cfg(unix)]
#[test]
fn sigusr1_saves_and_goes_on_and_a_second_signal_ends_at_once() {
    let place = Place::new();
    let forever = [
        "train",
        "tiny.toml",
        "--set",
        "trainer.max_steps=1000000",
        "--set",
        "checkpoint.every_steps=1000000",
    ];
    let mut child = Command::new(env!("CARGO_BIN_EXE_candlepower"))
        .current_dir(place.0.path())
        .args(forever)
        .stderr(std::process::Stdio::null())
        .spawn()
        .unwrap();
    let run = place.path("runs/tiny/version_0");
    let process = child.id().to_string();
    let send = |signal: &str| {
        Command::new("kill").args([signal, &process]).status().unwrap();
    };
    // Signals are listened for before the run's folder is made.
    wait_for(&run.join("metrics.jsonl"));
    send("-USR1");
    // Validation after each epoch may save too, but not `last` of a step that is no epoch's end; 3 steps are an epoch.
    let saved = || -> Vec<u64> {
        let entries = std::fs::read_dir(run.join("checkpoints")).into_iter().flatten().flatten();
        entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect()
    };
    let started = std::time::Instant::now();
    while !saved().iter().any(|step| step % 3 != 0) {
        assert!(started.elapsed().as_secs() < 120, "SIGUSR1 saved nothing: {:?}", saved());
        // By chance it may have come at an epoch's end: once more.
        send("-USR1");
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    assert!(child.try_wait().unwrap().is_none(), "SIGUSR1 ended the run");
    send("-INT");
    send("-TERM");
    let code = child.wait().unwrap().code();
    // Either the second came in time to end it at once, or the first had ended it already.
    assert!(code == Some(143) || code == Some(130), "{code:?}");
}

#[test]
fn callbacks_optimizers_and_averages_from_the_file() {
    let sections = r#"
[callbacks.early_stopping]
stop_at = 1.0

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
    assert!(
        said.contains("stopped at step 3: `loss` is ") && said.contains("as good as asked for"),
        "{said}"
    );
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
fn mistakes_in_callbacks_and_optimizers_are_shown_where_they_stand() {
    assert_text(
        &error_with("[checkpoint]", "[callbacks.early_stoping]\n[checkpoint]"),
        r"
error: tiny.toml:22:12: unknown callback `early_stoping`, expected one of `early_stopping`, `throughput`
   |
22 | [callbacks.early_stoping]
   |            ^^^^^^^^^^^^^
did you mean `early_stopping`?",
    );
    assert_text(
        &error_with("[checkpoint]", "[callbacks.early_stopping]\npatience = 0\n[checkpoint]"),
        r"
error: tiny.toml:23:12: `callbacks.early_stopping.patience`: expected at least 1, found 0
   |
23 | patience = 0
   |            ^",
    );
    assert_text(
        &error_with("[checkpoint]", "[optimizers.x]\nname = \"sgd\"\n[checkpoint]"),
        r#"
error: tiny.toml:23:8: [optimizers.x] needs `params`: a pattern of names, for example params = "x.*"
   |
23 | name = "sgd"
   |        ^^^^^"#,
    );
    assert_text(
        &error_with("max_steps = 4", "val_every = \"often\""),
        r#"
error: tiny.toml:6:13: expected a number of steps, as 500, or a text as "500 steps", "2 epochs", "0.25 epochs" or "30 min", found "often"
  |
6 | val_every = "often"
  |             ^^^^^^^"#,
    );
    assert_text(
        &error_with("max_steps = 4", "limit_val_batches = 1.5"),
        r"
error: tiny.toml:6:21: expected a number of batches, as 100, or a share of them, as 0.25, found `1.5`
  |
6 | limit_val_batches = 1.5
  |                     ^^^",
    );
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
fn a_run_that_cannot_go_on_keeps_its_files() {
    let place = Place::new();
    place.succeed(&["train", "tiny.toml"]);
    let run = "runs/tiny/version_0";
    let files = || -> Vec<(PathBuf, Vec<u8>)> {
        let mut files: Vec<PathBuf> =
            std::fs::read_dir(place.path(run)).unwrap().map(|entry| entry.unwrap().path()).collect();
        files.sort();
        files
            .into_iter()
            .filter(|path| path.is_file())
            .map(|path| (path.clone(), std::fs::read(path).unwrap()))
            .collect()
    };
    let before = files();
    assert!(before.len() > 3);
    let longer = ["train", "tiny.toml", "--set", "trainer.max_steps=6", "--resume", "auto"];
    let error = place.fail(1, &[&longer[..], &["--set", "optimizer.name=sgd"]].concat());
    assert!(
        error
            .contains("checkpoints/4: this checkpoint is of another optimizer; what is kept for it differs:"),
        "{error}"
    );
    let error = place.fail(1, &[&longer[..], &["--set", "module.hidden=5"]].concat());
    assert!(error.contains("this checkpoint is of another model"), "{error}");
    let error =
        place.fail(1, &["train", "tiny.toml", "--resume", &format!("{run}/checkpoints/4/model.safetensors")]);
    assert!(error.contains("a training starts from a file of weights by `weights` in [init]"), "{error}");
    assert!(files() == before, "a refused run has changed files");
    // Of a new run that is refused nothing is left.
    let groups = "optimizer.groups=[{ params = \"nothing.*\", frozen = true }]";
    place.fail(2, &["train", "tiny.toml", "--set", groups]);
    assert!(!place.path("runs/tiny/version_1").exists());
    // The folder of all versions stands for the newest.
    place.succeed(&["train", "tiny.toml", "--set", "trainer.max_steps=6", "--resume", "runs/tiny"]);
    assert!(place.path(run).join("checkpoints/6").exists());
    place.succeed(&["validate", "tiny.toml", "--checkpoint", "runs/tiny"]);
}

#[test]
fn a_resumed_run_says_what_has_changed_in_its_configuration() {
    let place = Place::new();
    place.succeed(&["train", "tiny.toml"]);
    let changes = ["--set", "trainer.max_steps=6", "--set", "optimizer.lr=0.01", "--resume", "auto"];
    let output = place.run(&[&["train", "tiny.toml"], &changes[..]].concat());
    let said = String::from_utf8(output.stderr).unwrap();
    let expected = "the configuration is not the checkpoint's:\n  \
                    trainer.max_steps: 6, was 4\n  optimizer.lr: 0.01, was 0.001\n";
    assert!(output.status.success() && said.contains(expected), "{said}");
    let output = place.run(&[&["train", "tiny.toml"], &changes[..]].concat());
    assert!(!String::from_utf8(output.stderr).unwrap().contains("is not the checkpoint's"));
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
    assert_eq!(error, "error: predictions: predictions go into an empty folder\n");
}

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

/// What makes a module small, so that a step of it is quick.
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
        // Data that is not in the project.
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
    // The tutorial's model, and those of OpenSTL as its own code counts them.
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
