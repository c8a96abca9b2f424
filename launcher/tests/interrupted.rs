//! Interrupted and resumed runs: signals, kills, and that a refused run leaves files unchanged.
#![allow(clippy::unwrap_used)]

mod common;

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use common::{Place, records};

/// The weights and the optimizer state of a checkpoint, byte for byte.
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

/// Waits until a file exists.
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
    // The program listens for signals before it creates the run's folder.
    wait_for(&run.join("metrics.jsonl"));
    send("-USR1");
    // Validation after each epoch may save a checkpoint too, but only at an epoch's last step; an epoch has 3 steps.
    let saved = || -> Vec<u64> {
        let entries = std::fs::read_dir(run.join("checkpoints")).into_iter().flatten().flatten();
        entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect()
    };
    let started = std::time::Instant::now();
    while !saved().iter().any(|step| step % 3 != 0) {
        assert!(started.elapsed().as_secs() < 120, "SIGUSR1 saved nothing: {:?}", saved());
        // The first signal may have arrived at an epoch's end: send another.
        send("-USR1");
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    assert!(child.try_wait().unwrap().is_none(), "SIGUSR1 ended the run");
    send("-INT");
    send("-TERM");
    let code = child.wait().unwrap().code();
    // Either the second signal arrived in time to end it immediately, or the first had already ended it.
    assert!(code == Some(143) || code == Some(130), "{code:?}");
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
        error.contains("checkpoints/4: this checkpoint is of another optimizer; their states differ:"),
        "{error}"
    );
    let error = place.fail(1, &[&longer[..], &["--set", "module.hidden=5"]].concat());
    assert!(error.contains("this checkpoint is of another model"), "{error}");
    let error =
        place.fail(1, &["train", "tiny.toml", "--resume", &format!("{run}/checkpoints/4/model.safetensors")]);
    assert!(error.contains("to start training from a weights file, set `weights` in [init]"), "{error}");
    assert!(files() == before, "a refused run has changed files");
    // A refused new run leaves no folder behind.
    let groups = "optimizer.groups=[{ params = \"nothing.*\", frozen = true }]";
    place.fail(2, &["train", "tiny.toml", "--set", groups]);
    assert!(!place.path("runs/tiny/version_1").exists());
    // The folder of all versions stands for the newest one.
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
    let expected = "the configuration differs from the checkpoint's:\n  \
                    trainer.max_steps: 6, was 4\n  optimizer.lr: 0.01, was 0.001\n";
    assert!(output.status.success() && said.contains(expected), "{said}");
    let output = place.run(&[&["train", "tiny.toml"], &changes[..]].concat());
    assert!(!String::from_utf8(output.stderr).unwrap().contains("is not the checkpoint's"));
}

/// `candlepower train tiny.toml`, with so many steps that only a signal ends it.
#[cfg(unix)]
fn endless(place: &Place) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_candlepower"));
    let steps = ["train", "tiny.toml", "--set", "trainer.max_steps=1000000"];
    command.current_dir(place.0.path()).args(steps).stderr(Stdio::null()).stdout(Stdio::null());
    command
}

#[cfg(unix)]
#[test]
fn a_folder_has_one_training_at_a_time() {
    let place = Place::new();
    let mut first = endless(&place).spawn().unwrap();
    wait_for(&place.path("runs/tiny/version_0/checkpoints/last"));
    let again = ["train", "tiny.toml", "--resume", "auto", "--set", "trainer.max_steps=1000000"];
    let error = place.fail(1, &again);
    assert!(error.contains("runs/tiny/version_0: another process is training in this folder"), "{error}");
    assert!(first.try_wait().unwrap().is_none(), "the first has ended");
    first.kill().unwrap();
    first.wait().unwrap();
    // A process that is gone holds no lock.
    place.succeed(&["train", "tiny.toml", "--resume", "auto", "--set", "trainer.max_epochs=1"]);
}

#[cfg(unix)]
#[test]
fn a_closed_terminal_is_a_signal_like_others() {
    let place = Place::new();
    let mut child = endless(&place).spawn().unwrap();
    wait_for(&place.path("runs/tiny/version_0/checkpoints/last"));
    Command::new("kill").args(["-HUP", &child.id().to_string()]).status().unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(129));
    assert!(place.path("runs/tiny/version_0/checkpoints/last/manifest.json").exists());
}

#[cfg(target_os = "linux")]
#[test]
fn who_is_told_to_ignore_a_closed_terminal_does() {
    let place = Place::new();
    let mut child = Command::new("sh");
    let program = env!("CARGO_BIN_EXE_candlepower");
    let train = format!("trap '' HUP; exec {program} train tiny.toml --set trainer.max_steps=200");
    child.current_dir(place.0.path()).args(["-c", &train]).stderr(Stdio::null()).stdout(Stdio::null());
    let mut child = child.spawn().unwrap();
    wait_for(&place.path("runs/tiny/version_0/checkpoints/last"));
    Command::new("kill").args(["-HUP", &child.id().to_string()]).status().unwrap();
    assert!(child.try_wait().unwrap().is_none(), "it had ended before the signal came");
    assert_eq!(child.wait().unwrap().code(), Some(0));
    assert!(place.path("runs/tiny/version_0/checkpoints/200/manifest.json").exists());
}

#[cfg(unix)]
#[test]
fn a_training_does_not_end_with_those_who_read_what_it_says() {
    let place = Place::new();
    let mut command = Command::new(env!("CARGO_BIN_EXE_candlepower"));
    let every_step = ["train", "tiny.toml", "--set", "trainer.val_every=1"];
    command.current_dir(place.0.path()).args(every_step).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    drop((child.stdout.take(), child.stderr.take()));
    assert_eq!(child.wait().unwrap().code(), Some(0));
    assert!(place.path("runs/tiny/version_0/checkpoints/4/manifest.json").exists());
}

#[cfg(target_os = "linux")]
#[test]
fn a_run_ends_with_its_supervisor() {
    let place = Place::new();
    let mut supervisor = Command::new(env!("CARGO_BIN_EXE_candlepower"));
    let launch = ["launch", "tiny.toml", "--set", "trainer.max_steps=1000000"];
    supervisor.current_dir(place.0.path()).args(launch).stdout(Stdio::null()).stderr(Stdio::null());
    let mut supervisor = supervisor.spawn().unwrap();
    wait_for(&place.path("runs/tiny/version_0/checkpoints/last"));
    supervisor.kill().unwrap();
    supervisor.wait().unwrap();
    // It saves its last step and releases the folder.
    let started = std::time::Instant::now();
    let again = ["train", "tiny.toml", "--resume", "auto", "--set", "trainer.max_epochs=1"];
    while !place.run(&again).status.success() {
        assert!(started.elapsed().as_secs() < 60, "the run goes on without its supervisor");
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
}

#[test]
fn damaged_checkpoints_are_told_of_and_a_run_without_a_good_one_does_not_begin_anew() {
    let place = Place::new();
    place.succeed(&["train", "tiny.toml"]);
    let damage = |step: u64| {
        let file = place.path(&format!("runs/tiny/version_0/checkpoints/{step}/model.safetensors"));
        std::fs::write(file, "no weights").unwrap();
    };
    damage(4);
    let resume = ["train", "tiny.toml", "--set", "trainer.max_steps=6", "--resume", "auto"];
    let output = place.run(&resume);
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "{said}");
    for expected in [
        "skipping a checkpoint: runs/tiny/version_0/checkpoints/4/model.safetensors: the file is damaged",
        "resuming from runs/tiny/version_0/checkpoints/3",
        "kept as runs/tiny/version_0/checkpoints/4.old",
    ] {
        assert!(said.contains(expected), "`{expected}` is not in:\n{said}");
    }
    for entry in std::fs::read_dir(place.path("runs/tiny/version_0/checkpoints")).unwrap() {
        if let Ok(step) = entry.unwrap().file_name().to_str().unwrap().parse() {
            damage(step);
        }
    }
    let error = place.fail(1, &resume);
    assert!(error.contains("all checkpoints in runs/tiny/version_0/checkpoints are damaged"), "{error}");
    assert!(error.ends_with("omit `--resume` to start a new run\n"), "{error}");
    assert!(!place.path("runs/tiny/version_1").exists());
}

#[test]
fn another_order_of_optimizers_is_a_change() {
    let turns = |names: [&str; 2]| {
        names
            .map(|name| format!("[optimizers.{name}]\nname = \"sgd\"\nlr = 0.1\nparams = \"{name}_*\"\n"))
            .concat()
    };
    let place = Place::new();
    let write = |names| {
        std::fs::write(place.path("turns.toml"), format!("{}\n{}", common::TINY, turns(names))).unwrap();
    };
    write(["encoder", "decoder"]);
    place.succeed(&["train", "turns.toml"]);
    // The resolved configuration keeps the order of the optimizers.
    let resolved = place.read("runs/tiny/version_0/config.toml");
    let at = |name: &str| resolved.find(&format!("[optimizers.{name}]")).unwrap();
    assert!(at("encoder") < at("decoder"), "{resolved}");
    write(["decoder", "encoder"]);
    let output = place.run(&["train", "turns.toml", "--resume", "auto", "--set", "trainer.max_steps=5"]);
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(said.contains("optimizers: in the order decoder, encoder, was encoder, decoder\n"), "{said}");
}

#[test]
fn an_older_version_does_not_stand_in_for_a_damaged_one() {
    let place = Place::new();
    place.succeed(&["train", "tiny.toml"]);
    place.succeed(&["train", "tiny.toml"]);
    let checkpoints = std::fs::read_dir(place.path("runs/tiny/version_1/checkpoints")).unwrap();
    for folder in checkpoints.map(|entry| entry.unwrap().path()).filter(|path| !path.is_symlink()) {
        std::fs::write(folder.join("model.safetensors"), "").ok();
    }
    for command in [
        &["validate", "tiny.toml", "--checkpoint", "runs/tiny"][..],
        &["train", "tiny.toml", "--resume", "runs/tiny"],
    ] {
        let error = place.fail(1, command);
        assert!(error.contains("runs/tiny/version_1/checkpoints are damaged"), "{error}");
    }
}

#[test]
fn a_checkpoint_that_was_moved_away_is_loaded_but_not_trained_from() {
    let place = Place::new();
    place.succeed(&["train", "tiny.toml"]);
    std::fs::create_dir(place.path("elsewhere")).unwrap();
    std::fs::rename(place.path("runs/tiny/version_0/checkpoints/4"), place.path("elsewhere/4")).unwrap();
    place.succeed(&["validate", "tiny.toml", "--checkpoint", "elsewhere/4"]);
    let error = place.fail(1, &["train", "tiny.toml", "--resume", "elsewhere/4"]);
    assert!(error.contains("expected a checkpoint in the `checkpoints` folder of its run"), "{error}");
    assert!(!place.path("config.toml").exists() && !place.path("checkpoints").exists());
}

#[test]
fn a_run_goes_on_past_versions_that_have_no_checkpoint() {
    let place = Place::new();
    place.succeed(&["train", "tiny.toml"]);
    // This run fails before its first step, and leaves a folder.
    place.fail(2, &["train", "tiny.toml", "--set", "checkpoint.monitor=ssim"]);
    assert!(place.path("runs/tiny/version_1").exists());
    let longer = ["train", "tiny.toml", "--set", "trainer.max_steps=6", "--resume", "auto"];
    let output = place.run(&longer);
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "{said}");
    assert!(said.contains("runs/tiny/version_1: it has no checkpoint"), "{said}");
    assert!(place.path("runs/tiny/version_0/checkpoints/6").exists());
    assert!(!place.path("runs/tiny/version_2").exists());
}
