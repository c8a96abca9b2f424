//! What each command does.

use std::process::ExitCode;

use candlepower::Result;
use candlepower::bench::{Benchmark, Pass};
use candlepower::callback::StopReason;
use candlepower::callbacks::PredictionWriter;
use candlepower::config::Registry;
use candlepower::experiment::{self, Experiment, Report};

use crate::command_line::{Changes, Command, Config, Source, SplitName, resume};
use crate::profile::Profile;
use crate::signals;

pub(crate) fn run(registry: &Registry, command: Command, profile: Option<Profile>) -> Result<ExitCode> {
    let read = |config: &Config| Experiment::read(registry, &config.path, &config.changes.sets());
    match command {
        Command::Train { config, resume: from, .. } => {
            let experiment = read(&config)?;
            let report = experiment.train(&resume(from.as_deref()), vec![Box::new(signals::on_signal()?)])?;
            print_report(&report);
            if let Some(profile) = profile {
                profile.finish(report.dir.as_deref())?;
            }
            return Ok(match report.outcome.reason {
                StopReason::Signal(signal) => ExitCode::from(128 + signal as u8),
                StopReason::Failed(_) => ExitCode::FAILURE,
                _ => ExitCode::SUCCESS,
            });
        }
        Command::Validate { config, checkpoint, split, json } => {
            let metrics = read(&config)?.validate(&checkpoint, split.into())?;
            if json {
                println!("{}", serde_json::json!(metrics));
            } else {
                metrics.iter().for_each(|(name, value)| println!("{name:12} {value:.6}"));
            }
        }
        Command::Predict { config, checkpoint, source: Source { input: Some(input), .. }, output } => {
            read(&config)?.predict(&checkpoint, &input, &output)?;
            println!("wrote {}", output.display());
        }
        Command::Predict { config, checkpoint, source: Source { split, .. }, output } => {
            let writer = Box::new(PredictionWriter::new(&output)?);
            let split = split.unwrap_or(SplitName::Val).into();
            let batches = read(&config)?.predict_split(&checkpoint, split, vec![writer])?;
            println!("wrote {batches} files to {}", output.display());
        }
        Command::Bench { config, steps, forward, json } => {
            let pass = if forward { Pass::Forward } else { Pass::Training };
            let benchmark = read(&config)?.bench(steps, pass)?;
            if json {
                println!("{}", serde_json::json!(benchmark));
            } else {
                print_benchmark(&benchmark, steps);
            }
        }
        Command::Config { schema: true, .. } => println!("{:#}", experiment::schema(registry)),
        Command::Config { config, .. } => {
            let path = config.path.unwrap_or_default();
            println!("{}", read_path(registry, path, config.changes)?.resolved()?);
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn read_path(registry: &Registry, path: std::path::PathBuf, changes: Changes) -> Result<Experiment> {
    Experiment::read(registry, &path, &changes.sets())
}

/// What a training came to, with the predictors that learn nothing beside it.
fn print_report(report: &Report) {
    let outcome = &report.outcome;
    match &outcome.reason {
        StopReason::Finished => println!("finished at step {}", outcome.progress.step),
        StopReason::Callback(why) => println!("stopped at step {}: {why}", outcome.progress.step),
        StopReason::Failed(why) => println!("failed: {why}"),
        StopReason::Signal(_) => {
            println!("interrupted at step {}; go on with --resume auto", outcome.progress.step);
        }
    }
    if let Some(metrics) = &outcome.validation {
        let all: Vec<String> = metrics.iter().map(|(name, value)| format!("{name} {value:.5}")).collect();
        println!("validation: {}", all.join("  "));
        let best = report.baselines.iter().min_by(|a, b| a.mse.total_cmp(&b.mse));
        if let (Some(mse), Some(best)) = (metrics.get("mse"), best) {
            println!("mean squared error on the validation data, beside predictors that learn nothing:");
            println!("  {:18} {mse:.5}", "this model");
            for baseline in &report.baselines {
                println!("  {:18} {:.5}", baseline.name, baseline.mse);
            }
            let change = 100. * (1. - mse / best.mse);
            let (amount, side) = (change.abs(), if change >= 0. { "below" } else { "above" });
            println!("{amount:.1} % {side} the best of them, \"{}\"", best.name);
        }
    }
    match &report.dir {
        Some(dir) => println!("everything is in {}", dir.display()),
        None => println!("this was a try-out (trainer.fast_dev_run): nothing was written"),
    }
}

/// A quantity a line; what is not known is left out.
fn print_benchmark(benchmark: &Benchmark, steps: u64) {
    let Benchmark { ms_per_step, samples_per_second, peak_rss_mb, .. } = benchmark;
    println!("time        {ms_per_step:.1} ms a step (median of {steps})");
    println!("speed       {samples_per_second:.2} samples a second");
    if let (Some(flops), Some(tflops)) = (benchmark.flops_per_sample, benchmark.tflops) {
        println!("arithmetic  {tflops:.3} TFLOP/s at {:.1} GFLOP a sample", flops / 1e9);
    }
    if let Some(megabytes) = peak_rss_mb {
        println!("memory      {megabytes:.0} MB at most");
    }
    println!("on          {}, {} threads", benchmark.device, benchmark.threads);
}
