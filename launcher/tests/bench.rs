//! `candlepower bench`: tests its output, and that it leaves no files behind.
#![allow(clippy::unwrap_used)]

use std::path::Path;
use std::process::{Command, Output};

/// Benchmarks a small version of the tutorial's model, in an empty folder that must stay empty.
fn bench(arguments: &[&str]) -> Output {
    let folder = tempfile::tempdir().unwrap();
    let config = Path::new(env!("CARGO_MANIFEST_DIR")).join("../bench/tutorial.toml");
    let small = [
        "module.hidden=4",
        "data.frames_in=2",
        "data.frames_out=3",
        "data.image_size=36",
        "trainer.threads=1",
    ];
    let output = Command::new(env!("CARGO_BIN_EXE_candlepower"))
        .arg("bench")
        .arg(config)
        .args(small.iter().flat_map(|set| ["--set", set]))
        .args(arguments)
        .current_dir(folder.path())
        .output()
        .unwrap();
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0, "files were written");
    output
}

/// The single object that `--json` prints.
fn json(arguments: &[&str]) -> serde_json::Value {
    let output = bench(&[arguments, &["--json", "--steps", "2"]].concat());
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

#[test]
fn json_is_one_object_with_the_promised_keys() {
    let result = json(&[]);
    let mut keys: Vec<&str> = result.as_object().unwrap().keys().map(String::as_str).collect();
    keys.sort_unstable();
    let promised = [
        "device",
        "flops_per_sample",
        "ms_per_step",
        "peak_device_mb",
        "peak_rss_mb",
        "precision",
        "samples_per_second",
        "tflops",
        "threads",
    ];
    assert_eq!(keys, promised);
    for key in ["ms_per_step", "samples_per_second", "flops_per_sample", "tflops"] {
        assert!(result[key].as_f64().unwrap() > 0., "{key} is {}", result[key]);
    }
    assert_eq!(result["peak_rss_mb"].is_f64(), cfg!(target_os = "linux"));
    assert_eq!((&result["device"], &result["precision"]), (&"cpu".into(), &"32".into()));
    assert_eq!(result["threads"], 1);
}

#[test]
fn forward_counts_a_third_of_a_training_step() {
    let flops = |arguments| json(arguments)["flops_per_sample"].as_f64().unwrap();
    assert_eq!(3. * flops(&["--forward"]), flops(&[]));
}

#[test]
fn a_table_is_printed_by_default() {
    let output = bench(&["--steps", "1", "--batch-size", "1"]);
    let table = String::from_utf8(output.stdout).unwrap();
    assert!(table.contains("ms per step") && table.contains("samples per second"), "{table}");
}

#[test]
fn no_step_is_bad_usage() {
    assert_eq!(bench(&["--steps", "0"]).status.code(), Some(2));
}
