//! `candlepower`: trains, validates and predicts from a TOML file.

use std::process::ExitCode;

fn main() -> ExitCode {
    candlepower_launcher::run(candlepower_launcher::registry())
}
