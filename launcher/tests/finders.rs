//! `candlepower find-lr` and `find-batch-size`: tests their output, and that they leave no files behind.
#![allow(clippy::unwrap_used)]

use std::path::Path;
use std::process::{Command, Output};

use serde_json::Value;

/// Runs a finder in `folder`, on a small version of the quickstart configuration.
fn find(folder: &Path, command: &str, arguments: &[&str]) -> Output {
    let config = Path::new(env!("CARGO_MANIFEST_DIR")).join("../configs/quickstart.toml");
    let small = [
        "module.hidden=4",
        "module.patch=8",
        // Predictions start gray: the first thing to learn is that most pixels are black.
        "module.mean_pixel=0.5",
        "data.frames_in=2",
        "data.frames_out=2",
        "trainer.threads=1",
    ];
    Command::new(env!("CARGO_BIN_EXE_candlepower"))
        .arg(command)
        .arg(config)
        .args(small.iter().flat_map(|set| ["--set", set]))
        .args(arguments)
        .current_dir(folder)
        .output()
        .unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn files(folder: &Path) -> Vec<String> {
    std::fs::read_dir(folder).unwrap().map(|file| file.unwrap().file_name().into_string().unwrap()).collect()
}

#[test]
fn a_learning_rate_as_json_and_as_a_plot() {
    let folder = tempfile::tempdir().unwrap();
    let output = find(folder.path(), "find-lr", &["--json", "--steps", "40", "--output", "lr.svg"]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    let found: Value = serde_json::from_slice(&output.stdout).unwrap();
    let suggestion = found["suggestion"].as_f64().unwrap();
    let rates: Vec<f64> =
        found["points"].as_array().unwrap().iter().map(|point| point["lr"].as_f64().unwrap()).collect();
    assert!(rates.contains(&suggestion) && (rates[0] / 1e-8 - 1.).abs() < 1e-9, "{found}");
    assert_eq!(found["proportions"], serde_json::json!({"optimizer": 1.}));
    assert_eq!(files(folder.path()), ["lr.svg"], "other files were written");
    let plot = std::fs::read_to_string(folder.path().join("lr.svg")).unwrap();
    assert!(plot.starts_with("<svg") && plot.contains(&format!("{suggestion:.1e}")), "{plot}");
}

#[test]
fn a_learning_rate_to_copy_into_the_configuration() {
    let folder = tempfile::tempdir().unwrap();
    let output = find(folder.path(), "find-lr", &["--steps", "30", "--min", "1e-5"]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    let said = text(&output.stdout);
    let start =
        said.find("    [optimizer]\n    lr = ").unwrap_or_else(|| panic!("no line to copy in:\n{said}"));
    let lines: toml::Table = said[start..].parse().unwrap();
    let lr = lines["optimizer"]["lr"].as_float().unwrap();
    assert!(1e-5 < lr && lr < 1., "{said}");
    assert!(files(folder.path()).is_empty(), "files were written");
}

#[test]
fn no_suggestion_is_a_failure_with_a_reason() {
    let folder = tempfile::tempdir().unwrap();
    let output = find(folder.path(), "find-lr", &["--steps", "5", "--json"]);
    assert_eq!(output.status.code(), Some(1));
    let found: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert!(found["suggestion"].is_null() && found["points"].as_array().unwrap().len() == 5, "{found}");
    assert!(text(&output.stderr).starts_with("error: the test ended after 5 steps, too few"));
}

#[test]
fn bad_usage() {
    let folder = tempfile::tempdir().unwrap();
    for (command, arguments, says) in [
        ("find-lr", ["--min", "1", "--max", "0.1"], "error: `max_lr`: expected a number above `min_lr`"),
        (
            "find-lr",
            ["--set", "optimizer.lr=0", "--steps", "9"],
            "error: --set:1:14: `optimizer.lr`: the finder moves",
        ),
        (
            "find-batch-size",
            ["--start", "8", "--max", "4"],
            "error: `max`: expected at least the first size, 8",
        ),
    ] {
        let output = find(folder.path(), command, &arguments);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}");
        let error = text(&output.stderr);
        assert!(error.contains(says), "{error}");
    }
}

#[test]
fn a_batch_size_as_json_and_as_a_table() {
    let folder = tempfile::tempdir().unwrap();
    let output = find(folder.path(), "find-batch-size", &["--json", "--max", "2"]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    let found: Value = serde_json::from_slice(&output.stdout).unwrap();
    let sizes: Vec<&Value> =
        found["trials"].as_array().unwrap().iter().map(|trial| &trial["batch_size"]).collect();
    assert_eq!(sizes, [1, 2]);
    for trial in found["trials"].as_array().unwrap() {
        let (size, ms) = (trial["batch_size"].as_f64().unwrap(), trial["ms_per_step"].as_f64().unwrap());
        assert!(
            (trial["samples_per_second"].as_f64().unwrap() * ms / 1e3 / size - 1.).abs() < 1e-9,
            "{trial}"
        );
        assert_eq!(trial["memory_mb"].is_f64(), cfg!(target_os = "linux"));
    }
    assert_eq!((&found["largest"], &found["ended"]), (&2.into(), &"twice as many would exceed 2".into()));
    assert!(sizes.contains(&&found["suggestion"]), "{found}");

    let output = find(folder.path(), "find-batch-size", &["--max", "2"]);
    let said = text(&output.stdout);
    assert!(
        said.contains("samples per second") && said.contains("    [trainer]\n    batch_size = "),
        "{said}"
    );
    assert!(said.contains("then twice as many would exceed 2"), "{said}");
    #[cfg(target_os = "linux")]
    {
        let output = find(folder.path(), "find-batch-size", &["--memory", "0.001"]);
        let said = text(&output.stderr);
        assert!(
            said.contains("`memory_mb`: a batch of 1 takes ") && said.contains(" MB, more than 0"),
            "{said}"
        );
    }
    assert!(files(folder.path()).is_empty(), "files were written");
}
