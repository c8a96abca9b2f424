//! The README's example matches the file in `examples/`, is short, and learns.
#![allow(clippy::unwrap_used)]

use std::process::Command;

const README: &str = include_str!("../../README.md");
const EXAMPLE: &str = include_str!("../../examples/spiral.rs");

#[test]
fn the_readme_shows_the_example_and_it_is_at_most_45_lines() {
    assert!(README.contains(EXAMPLE.trim_end()), "README.md does not show examples/spiral.rs as it is");
    assert!(EXAMPLE.lines().count() <= 45);
}

/// Runs an example in an empty folder; returns the output of both streams. `cargo test` builds it next to
/// this test.
fn run(example: &str) -> String {
    let test = std::env::current_exe().unwrap();
    let program = test.ancestors().nth(2).unwrap().join("examples").join(example);
    assert!(
        program.with_extension(std::env::consts::EXE_EXTENSION).exists(),
        "run `cargo build --examples` first"
    );
    let folder = tempfile::tempdir().unwrap();
    let output = Command::new(program).current_dir(&folder).output().unwrap();
    let text = String::from_utf8_lossy(&output.stderr) + String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{text}");
    text.into_owned()
}

#[test]
fn the_readmes_example_learns() {
    let said = run("spiral");
    let (_, last) = said.rsplit_once("accuracy ").unwrap();
    let accuracy: f64 = last.split_whitespace().next().unwrap().parse().unwrap();
    assert!(accuracy > 0.95, "{said}");
}

#[test]
fn a_network_that_is_not_for_video_learns_with_the_same_trainer() {
    let said = run("mnist_mlp");
    let (_, percent) = said.rsplit_once("accuracy on held-out digits: ").unwrap();
    let percent: f64 = percent.split_whitespace().next().unwrap().parse().unwrap();
    assert!(percent > 85., "{said}");
}

#[test]
fn datasets_over_a_vector_a_folder_and_a_stream_are_learned_from() {
    let number = |said: &str, name: &str| -> f64 {
        let (_, rest) = said.rsplit_once(name).expect(said);
        let number: String = rest
            .chars()
            .skip_while(|c| " [".contains(*c))
            .take_while(|c| "-.0123456789".contains(*c))
            .collect();
        number.parse().expect(said)
    };
    // y = 3 x + 0.5
    let said = run("data_vector");
    assert!(
        (number(&said, "weight") - 3.).abs() < 0.05 && (number(&said, "bias") - 0.5).abs() < 0.05,
        "{said}"
    );
    let said = run("data_folder");
    // The pictures are random, and new in each run.
    assert!(number(&said, "\"accuracy\":") > 0.9, "{said}");
    let said = run("sequences");
    assert!(said.contains("is good enough") && number(&said, "\"auroc\":") >= 0.9, "{said}");
    // 2 a + b
    let said = run("data_stream");
    assert!((number(&said, "weight") - 2.).abs() < 0.1 && number(&said, "bias").abs() < 0.3, "{said}");
}

/// A dataset from outside the project, registered and named in TOML, trains a built-in module.
#[test]
fn a_dataset_of_ones_own_trains_from_toml() {
    let said = run("custom_dataset");
    let rows = said.lines().filter(|line| line.contains(" %")).count();
    assert_eq!(rows, 4, "a row for each of four frames ahead: {said}");
    assert!(
        said.lines().last().unwrap().contains(" -"),
        "the last frame copied is better than the model: {said}"
    );
}
