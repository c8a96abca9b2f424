//! The program trains from TOML, with a model and a dataset from outside Candlepower.

use std::path::Path;
use std::process::{Command, Output};

fn bars(arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_bars"));
    command.current_dir(env!("CARGO_MANIFEST_DIR")).args(arguments).output().unwrap()
}

#[test]
fn it_learns_and_goes_on_from_a_checkpoint() {
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join("runs");
    if dir.exists() {
        std::fs::remove_dir_all(&dir).unwrap();
    }
    let run_dir = format!("run.dir={}", dir.display());
    let output = bars(&["train", "bars.toml", "--set", &run_dir]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let metrics = std::fs::read_to_string(dir.join("bars/version_0/metrics.jsonl")).unwrap();
    let last = metrics.lines().rfind(|line| line.contains(r#""split":"val""#)).unwrap();
    let accuracy = last.split(r#""accuracy":"#).nth(1).unwrap().split([',', '}']).next().unwrap();
    assert!(accuracy.parse::<f64>().unwrap() > 0.95, "{last}");

    let more =
        ["train", "bars.toml", "--set", &run_dir, "--set", "trainer.max_steps=210", "--resume", "auto"];
    let output = bars(&more);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(dir.join("bars/version_0/checkpoints/210/model.safetensors").exists());
}

#[test]
fn its_mistakes_are_shown_where_they_stand() {
    let output = bars(&["train", "bars.toml", "--set", "data.noise=-1.0"]);
    assert_eq!(output.status.code(), Some(2));
    let error = String::from_utf8(output.stderr).unwrap();
    assert!(error.contains("expected a number of at least 0, found -1"), "{error}");
}
