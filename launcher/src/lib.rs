//! The command line of Candlepower, for its own models and datasets and, through [`run`], for yours.
//!
//! ```no_run
//! # use candlepower::prelude::*;
//! # fn example<MyModule: Build, MyData: Open>() -> std::process::ExitCode {
//! let registry = candlepower_launcher::registry().module::<MyModule>("my_module").dataset::<MyData>("my_data");
//! candlepower_launcher::run(registry)
//! # }
//! ```

mod command_line;
mod commands;
mod profile;
mod pulse;
mod report;
mod say;
mod signals;
mod supervisor;

use std::process::ExitCode;

use candlepower::Error;
use candlepower::collective::Environment;
use candlepower::config::Registry;
use clap::Parser;
use profile::Profile;
use say::tell;
use tracing_subscriber::prelude::*;
use tracing_subscriber::{EnvFilter, fmt};

/// Every module, dataset and callback that comes with Candlepower, one line each. Register new ones here.
pub fn registry() -> Registry {
    Registry::default()
        .module::<candlepower_models::ConvLstm>("conv_lstm")
        .module::<candlepower_models::ConvLstmStack>("conv_lstm_stack")
        .module::<candlepower_models::PredRnn>("predrnn")
        .module::<candlepower_models::PredRnnV2>("predrnn_v2")
        .module::<candlepower_models::PredRnnPp>("predrnn_pp")
        .module::<candlepower_models::E3dLstm>("e3d_lstm")
        .module::<candlepower_models::Mim>("mim")
        .module::<candlepower_models::Mau>("mau")
        .module::<candlepower_models::SimVp>("sim_vp")
        .module::<candlepower_models::SvgLp>("svg_lp")
        .module::<candlepower_models::Tau>("tau")
        .dataset::<candlepower_datasets::MovingMnist>("moving_mnist")
        .dataset::<candlepower_datasets::Frames>("frames")
        .dataset::<candlepower_datasets::Radar>("radar")
        .dataset::<candlepower_datasets::Digits>("digits")
        .callback::<candlepower::callbacks::EarlyStopping>("early_stopping")
        .callback::<candlepower::callbacks::Throughput>("throughput")
}

/// Runs the command line of this process with the modules and datasets of `registry`.
pub fn run(registry: Registry) -> ExitCode {
    // Must come before a second thread starts.
    candlepower::accelerator::idle_soon();
    let arguments = command_line::Arguments::parse();
    let (layer, profile) = arguments.command.profiles().then(Profile::start).unzip();
    let listening = listen(layer);
    let done = match profile {
        Some(_) if !listening => Err(Error::msg(
            "--profile: this program has a `tracing` subscriber of its own; add the layers of `candlepower::profiler` to it",
        )),
        profile => commands::run(&registry, arguments.command, profile),
    };
    match done {
        Ok(code) => code,
        Err(error) => {
            tell!("error: {error}");
            ExitCode::from(if matches!(error, Error::Config(_) | Error::Setting { .. }) { 2 } else { 1 })
        }
    }
}

/// Prints the library's log messages as plain lines (`RUST_LOG` sets the level), and installs `layer`. If the
/// program has already set up its own subscriber, does neither and returns `false`.
fn listen(layer: Option<profile::Listener>) -> bool {
    // Of several processes, only the first logs more than errors.
    let is_first = !Environment::read().is_ok_and(|found| found.is_some_and(|found| found.rank > 0));
    let usual = if is_first { "info" } else { "error" };
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(usual));
    let plain = fmt::layer().without_time().with_target(false).with_level(false).with_writer(std::io::stderr);
    let plain = plain.log_internal_errors(false);
    tracing_subscriber::registry().with(layer).with(plain.with_filter(filter)).try_init().is_ok()
}
