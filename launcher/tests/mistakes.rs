//! The exact text of configuration errors: position, what was expected, and that nothing is left on disk.
#![allow(clippy::unwrap_used)]

mod common;

use std::process::Command;

use common::{Place, TINY, assert_text, records};

/// The configuration error of `tiny.toml` with this replacement; asserts that nothing is left on disk.
#[track_caller]
fn error_with(old: &str, new: &str) -> String {
    assert!(TINY.contains(old));
    let place = Place::with(&TINY.replace(old, new));
    let error = place.fail(2, &["train", "tiny.toml"]);
    assert!(!place.path("runs").exists(), "a refused configuration made a folder");
    error
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
fn what_was_probably_meant() {
    for (section, meant) in
        [("optimiser", "optimizer"), ("optimizrs", "optimizers"), ("train", "trainer"), ("log", "logging")]
    {
        let error = error_with("[checkpoint]", &format!("[{section}]\n[checkpoint]"));
        assert!(error.ends_with(&format!("did you mean `{meant}`?\n")), "{error}");
    }
}

#[test]
fn a_folder_that_only_a_shell_understands() {
    let error = error_with("[run]\n", "[run]\ndir = \"~/runs\"\n");
    let [first, second] = [error.find("only shells expand `~`"), error.find("/runs\n")].map(Option::unwrap);
    assert!(first < second && error.contains("dir = \"~/runs\""), "{error}");
}

#[test]
fn a_wrong_type() {
    assert_text(
        &error_with("batch_size = 4", "batch_size = \"four\""),
        r#"
error: tiny.toml:5:14: expected a whole number of at least 0, found "four"
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
error: tiny.toml:15:8: data `digits` has another batch type than module `conv_lstm`, expected one of `moving_mnist`, `frames`, `radar`
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
error: --set:1:26: expected a duration above 0 such as "2h 30m" or "45 min", found "0s"
  |
1 | distributed.hang_timeout="0s"
  |                          ^^^^"#,
    );
    // Unable to reach the other ranks, each process would train separately and write into the same folder.
    let mut command = Command::new(env!("CARGO_BIN_EXE_candlepower"));
    command.current_dir(place.0.path()).args(["train", "tiny.toml"]).env("RANK", "1").env("WORLD_SIZE", "2");
    let output = command.output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(
        said.starts_with("error: this process is rank 1 of 2 (RANK and WORLD_SIZE), and cannot communicate"),
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
    // A launched process knows its rank, and this program has no way to reach another machine.
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
error: tiny.toml:6:13: expected a number of steps such as 500, or a string such as "500 steps", "2 epochs", "0.25 epochs" or "30 min", found "often"
  |
6 | val_every = "often"
  |             ^^^^^^^"#,
    );
    assert_text(
        &error_with("max_steps = 4", "limit_val_batches = 1.5"),
        r"
error: tiny.toml:6:21: expected a number of batches such as 100, or a fraction of them such as 0.25, found `1.5`
  |
6 | limit_val_batches = 1.5
  |                     ^^^",
    );
}

#[test]
fn a_metric_that_nobody_gives_is_refused_before_the_first_step() {
    for (section, line) in [("checkpoint", 23), ("callbacks.early_stopping", 26), ("schedule.plateau", 26)] {
        let config = match section {
            "checkpoint" => TINY.replace("[checkpoint]", "[checkpoint]\nmonitor = \"msee\""),
            section => format!("{TINY}\n[{section}]\nmonitor = \"msee\"\n"),
        };
        let place = Place::with(&config);
        let error = place.fail(2, &["train", "tiny.toml"]);
        let expected = format!(
            "error: tiny.toml:{line}:11: `{section}.monitor`: there is no validation metric `msee`, expected one of `loss`, \
             `mse`; did you mean `mse`? (a callback that adds one must come before those that monitor it, and declare it in `Callback::added_metrics`)"
        );
        assert!(error.contains(&expected), "{error}\n{expected}");
        let steps = records(&place, "runs/tiny/version_0", "train");
        assert!(steps.is_empty(), "{steps:?}");
    }
}

#[test]
fn schedules_that_would_ruin_a_training() {
    let error = |schedule: &str| {
        let place = Place::with(&format!("{TINY}\n[schedule]\n{schedule}\n"));
        place.fail(2, &["train", "tiny.toml"]).lines().next().unwrap().to_string()
    };
    for (schedule, expected) in [
        (
            "name = \"step\"\nevery = 1\ngamma = nan",
            "28:9: `schedule.gamma`: expected a number of at least 0, found NaN",
        ),
        (
            "name = \"linear\"\nsteps = 1\nstart = -1.0",
            "28:9: `schedule.start`: expected a number of at least 0, found -1",
        ),
        (
            "name = \"one_cycle\"\nsteps = 1\nmax_lr = -1.0",
            "28:10: `schedule.max_lr`: expected a number above 0, found -1",
        ),
        (
            "plateau = { factor = 2.0 }",
            "26:22: `schedule.plateau.factor`: expected a number between 0 and 1, found 2",
        ),
        (
            "name = \"sequence\"\nmilestones = [1]\nparts = [{ name = \"cosin\", steps = 3 }, { name = \"constant\" }]",
            "28:9: part `cosin`: unknown schedule `cosin`, expected one of `constant`, `linear`, `step`, `multi_step`, \
             `exponential`, `cosine`, `cosine_restarts`, `polynomial`, `one_cycle`, `noam`, `sequence`",
        ),
        (
            "name = \"sequence\"\nmilestones = [1]\nparts = [{ name = \"cosine\", steps = 0 }, { name = \"constant\" }]",
            "28:9: `schedule.parts`: part 1: `steps`: expected at least 1, found 0",
        ),
    ] {
        assert_eq!(error(schedule), format!("error: tiny.toml:{expected}"));
    }
}

#[test]
fn words_of_pytorch_lightning_are_understood_but_not_taken() {
    for (word, meant) in [
        (
            "accumulate_grad_batches = 4",
            "set `trainer.micro_batch_size`; a step adds up as many as make a `batch_size`",
        ),
        ("gradient_clip_val = 1.0", "it is `trainer.clip_norm`"),
        ("check_val_every_n_epoch = 1", "it is `trainer.val_every`, as \"2 epochs\""),
    ] {
        let error = error_with("max_steps = 4", &format!("max_steps = 4\n{word}"));
        assert!(error.ends_with(&format!("{meant}\n")), "{error}");
    }
    let place = Place::new();
    let error = place.fail(2, &["train", "tiny.toml", "--set", "checkpoint.monitor=val_mse"]);
    assert!(error.contains("`loss`, `mse`; in validation it is called `mse`"), "{error}");
}
