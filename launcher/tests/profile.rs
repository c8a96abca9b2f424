//! `candlepower train --profile`: the table and the trace, and that neither appears without the option.
#![allow(clippy::unwrap_used)]

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

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
"#;

const PHASES: [&str; 7] =
    ["data_wait", "forward", "backward", "optimizer", "logging", "validation", "checkpoint"];

/// `candlepower train tiny.toml` in `folder`.
fn train(folder: &Path, arguments: &[&str]) -> Command {
    std::fs::write(folder.join("tiny.toml"), TINY).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_candlepower"));
    command.current_dir(folder).args(["train", "tiny.toml"]).args(arguments);
    command
}

/// How often each phase begins in the run's trace. Asserts that phases end, and nest correctly.
fn begins(folder: &Path) -> impl Fn(&str) -> usize {
    let trace = std::fs::read(folder.join("runs/tiny/version_0/trace.json")).unwrap();
    let events: Vec<Value> = serde_json::from_slice(&trace).unwrap();
    let (mut begun, mut open) = (Vec::new(), Vec::new());
    for event in &events {
        let name = event["name"].as_str().unwrap().to_string();
        match event["ph"].as_str().unwrap() {
            "B" => {
                begun.push(name.clone());
                open.push(name);
            }
            "E" => assert_eq!(open.pop(), Some(name)),
            other => assert_eq!(other, "M"),
        }
    }
    assert!(open.is_empty(), "{open:?} did not end");
    move |phase| begun.iter().filter(|name| *name == phase).count()
}

#[test]
fn a_table_and_a_trace() {
    let folder = tempfile::tempdir().unwrap();
    let output = train(folder.path(), &["--profile"]).output().unwrap();
    let said = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    for phase in PHASES {
        assert!(said.lines().any(|line| line.starts_with(phase)), "`{phase}` is not in:\n{said}");
    }
    let steps = said.lines().find(|line| line.starts_with("forward")).unwrap();
    assert_eq!(steps.split_whitespace().nth(1), Some("4"), "{said}");
    assert!(said.contains("trace: runs/tiny/version_0/trace.json"), "{said}");
    let begins = begins(folder.path());
    assert_eq!(["forward", "backward", "optimizer", "logging"].map(begins), [4; 4]);
    // The library's messages are shown as they are without a profile.
    let messages = String::from_utf8(output.stderr).unwrap();
    assert!(messages.contains("run folder: runs/tiny/version_0\n"), "{messages}");
}

#[test]
fn the_first_of_several_ranks_is_profiled() {
    // Ranks reach a phase in random order. If a rank that is not profiled decided, some of these runs would
    // lack phases.
    for _ in 0..4 {
        let folder = tempfile::tempdir().unwrap();
        let output = train(folder.path(), &["--profile", "--devices", "2"]).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let begins = begins(folder.path());
        assert_eq!(["forward", "backward", "optimizer", "logging"].map(begins), [4; 4]);
    }
}

#[test]
fn nothing_unasked() {
    let folder = tempfile::tempdir().unwrap();
    let output = train(folder.path(), &[]).output().unwrap();
    let (said, messages) = (String::from_utf8(output.stdout), String::from_utf8(output.stderr).unwrap());
    assert!(!said.unwrap().contains("backward"));
    assert!(messages.contains("run folder: runs/tiny/version_0\n"), "{messages}");
    assert!(!folder.path().join("runs/tiny/version_0/trace.json").exists());
}

#[test]
#[cfg(unix)]
fn an_interrupted_run_leaves_a_whole_trace() {
    let folder = tempfile::tempdir().unwrap();
    let long = ["--profile", "--set", "trainer.max_steps=1000000"];
    let mut child = train(folder.path(), &long).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let metrics = folder.path().join("runs/tiny/version_0/metrics.jsonl");
    let start = Instant::now();
    while std::fs::metadata(&metrics).map_or(0, |file| file.len()) == 0 {
        assert!(start.elapsed() < Duration::from_secs(60), "no step was done");
        std::thread::sleep(Duration::from_millis(20));
    }
    Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(130));
    let begins = begins(folder.path());
    assert!(begins("forward") > 0 && begins("forward") == begins("optimizer"));
    assert!(begins("checkpoint") > 0);
}
