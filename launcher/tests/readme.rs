//! The README's example is the file in `examples/`, it is short, and it learns.
#![allow(clippy::unwrap_used)]

use std::process::Command;

const README: &str = include_str!("../../README.md");
const EXAMPLE: &str = include_str!("../../examples/spiral.rs");

#[test]
fn the_readme_shows_the_example_and_it_is_at_most_45_lines() {
    assert!(README.contains(EXAMPLE.trim_end()), "README.md does not show examples/spiral.rs as it is");
    assert!(EXAMPLE.lines().count() <= 45);
}

/// What an example prints, on both streams. `cargo test` has built it beside this test.
fn run(example: &str) -> String {
    let test = std::env::current_exe().unwrap();
    let program = test.ancestors().nth(2).unwrap().join("examples").join(example);
    assert!(
        program.with_extension(std::env::consts::EXE_EXTENSION).exists(),
        "run `cargo build --examples` first"
    );
    let output = Command::new(program).output().unwrap();
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
