//! Runs each command.

use std::os::unix::process::CommandExt;
use std::process::ExitCode;

use candlepower::accelerator::describe_devices;
use candlepower::bench::{Benchmark, Pass};
use candlepower::callback::{Callback, StopReason};
use candlepower::callbacks::PredictionWriter;
use candlepower::checkpoint::Best;
use candlepower::collective::MEETING_PLACE;
use candlepower::config::Registry;
use candlepower::experiment::{self, Experiment, Report};
use candlepower::finder::{BatchFinderConfig, BatchFinding, LrFinderConfig, LrFinding};
use candlepower::metrics::video::LeadTimes;
use candlepower::{Error, Result};
use serde_json::json;

use crate::command_line::{Changes, Command, Config, Source, SplitName, resume};
use crate::profile::Profile;
use crate::pulse::Pulse;
use crate::say::say;
use crate::signals;
use crate::supervisor::{Launch, Node};

pub(crate) fn run(registry: &Registry, command: Command, profile: Option<Profile>) -> Result<ExitCode> {
    let read = |config: &Config| Experiment::read(registry, &config.path, &config.changes.sets());
    match command {
        Command::Train { config, resume: from, .. } => {
            let experiment = read(&config)?;
            let (experiment, is_first) = join(experiment)?;
            let mut callbacks: Vec<Box<dyn Callback>> = vec![Box::new(signals::on_signal()?)];
            if let Some(pulse) = Pulse::asked_for()? {
                callbacks.push(Box::new(pulse));
            }
            let report = experiment.train(&resume(from.as_deref()), callbacks)?;
            if is_first {
                print_report(&report);
            }
            if let Some(profile) = profile {
                profile.finish(report.dir.as_deref())?;
            }
            return Ok(match report.outcome.reason {
                StopReason::Signal(signal) => ExitCode::from(128 + signal as u8),
                _ => ExitCode::SUCCESS,
            });
        }
        Command::Launch { config, nodes, node_rank, master, resume } => {
            let mut sets = config.changes.sets();
            sets.extend(nodes.map(|nodes| format!("distributed.nodes={nodes}")));
            sets.extend(master.map(|master| format!("distributed.master={master:?}")));
            let experiment = Experiment::read(registry, &config.path, &sets)?;
            let sets = sets.into_iter().flat_map(|set| ["--set".into(), set.into()]);
            let train = [config.path.clone().into()].into_iter().chain(sets).collect();
            let (devices, distributed) = (experiment.devices(), experiment.distributed().clone());
            let node = Node::of(&distributed, node_rank)?;
            return Launch { train, resume, devices, distributed, node }.run();
        }
        Command::Validate { config, checkpoint, split, lead_times, json } => {
            let experiment = read(&config)?;
            let metrics = experiment.validate(&checkpoint, split.into())?;
            if json {
                say!("{}", json!(metrics));
            } else {
                metrics.iter().for_each(|(name, value)| say!("{name:12} {value:.6}"));
            }
            if let Some(dir) = lead_times {
                let scores = experiment.compare(&checkpoint, split.into())?;
                let scores = scores.ok_or_else(|| {
                    Error::msg("--lead-times: this data has no lead times, or none of it is evaluated")
                })?;
                scores.save(&dir)?;
                if !json {
                    print_lead_times(&scores);
                }
            }
        }
        Command::Predict { config, checkpoint, source: Source { input: Some(input), .. }, output } => {
            read(&config)?.predict(&checkpoint, &input, &output)?;
            say!("wrote {}", output.display());
        }
        Command::Predict { config, checkpoint, source: Source { split, .. }, output } => {
            let experiment = read(&config)?;
            let writer = Box::new(PredictionWriter::new(&output)?);
            let split = split.unwrap_or(SplitName::Val).into();
            let batches = experiment.predict_split(&checkpoint, split, vec![writer])?;
            let files = if batches == 1 { "file" } else { "files" };
            say!("wrote {batches} {files} to {}", output.display());
        }
        Command::Bench { config, steps, forward, json } => {
            let pass = if forward { Pass::Forward } else { Pass::Training };
            let (experiment, is_first) = join(read(&config)?)?;
            let benchmark = experiment.bench(steps, pass)?;
            if !is_first {
                return Ok(ExitCode::SUCCESS);
            }
            if json {
                say!("{}", json!(benchmark));
            } else {
                print_benchmark(&benchmark, steps);
            }
        }
        Command::FindLr { config, steps, min, max, output, json } => {
            let test = LrFinderConfig { steps, min_lr: min, max_lr: max, ..Default::default() };
            let finding = read(&config)?.find_lr(&test)?;
            if let Some(path) = output.filter(|_| !finding.points.is_empty()) {
                finding.plot().save(&path)?;
            }
            let suggestion = finding.suggestion();
            if json {
                let LrFinding { points, proportions } = &finding;
                let suggestion = suggestion.as_ref().ok();
                say!("{}", json!({"suggestion": suggestion, "points": points, "proportions": proportions}));
            }
            let suggestion = suggestion?;
            if !json {
                print_lr(&finding, suggestion);
            }
        }
        Command::FindBatchSize { config, start, max, memory, json } => {
            let search = BatchFinderConfig { start, max, memory_mb: memory, ..Default::default() };
            let finding = read(&config)?.find_batch_size(&search)?;
            if json {
                say!("{}", json!(finding));
            } else {
                print_batch_sizes(&finding);
            }
        }
        Command::Devices => describe_devices().iter().for_each(|line| say!("{line}")),
        Command::Config { schema: true, .. } => say!("{:#}", experiment::schema(registry)),
        Command::Config { config, .. } => {
            let path = config.path.unwrap_or_default();
            say!("{}", read_path(registry, path, config.changes)?.resolved()?);
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Joins the experiment to the processes started with it. Also returns whether this process is the first of them.
fn join(experiment: Experiment) -> Result<(Experiment, bool)> {
    if let Some(place) = experiment.distributed().meeting_place()? {
        return Err(start_again(&place));
    }
    let ranks = experiment.distributed().join()?;
    let is_first = ranks.rank() == 0;
    Ok((experiment.ranks(ranks)?, is_first))
}

/// Replaces this process with a new one of the same program that has NCCL's meeting place in its environment:
/// setting an environment variable in a running process is not safe. Returns only if that fails.
fn start_again(meeting_place: &str) -> Error {
    let program = match std::env::current_exe() {
        Ok(program) => program,
        Err(error) => return Error::file("this program")(error),
    };
    let mut again = std::process::Command::new(&program);
    again.args(std::env::args_os().skip(1)).env(MEETING_PLACE, meeting_place);
    Error::file(&program)(again.exec())
}

fn read_path(registry: &Registry, path: std::path::PathBuf, changes: Changes) -> Result<Experiment> {
    Experiment::read(registry, &path, &changes.sets())
}

/// Prints the result of a training, alongside baselines that learn nothing.
fn print_report(report: &Report) {
    let outcome = &report.outcome;
    match &outcome.reason {
        StopReason::Finished => say!("finished at step {}", outcome.progress.step),
        StopReason::Callback(why) => say!("stopped at step {}: {why}", outcome.progress.step),
        StopReason::Failed(why) => say!("failed at step {}: {why}", outcome.progress.step),
        StopReason::Signal(_) => {
            say!("interrupted at step {}; continue with --resume auto", outcome.progress.step);
        }
    }
    if let Some(metrics) = &outcome.validation {
        let all: Vec<String> =
            metrics.iter().map(|(name, value)| format!("{name} {}", short(*value))).collect();
        say!("validation: {}", all.join("  "));
        if let Some(lead_times) = &report.lead_times
            && let Some(module) = &lead_times.module
        {
            let mse = module.mse;
            let best = lead_times.baselines.iter().min_by(|a, b| a.mse.total_cmp(&b.mse));
            say!("mean squared error on the validation data, next to predictors that learn nothing:");
            say!("  {:18} {mse:.5}", "this model");
            for baseline in &lead_times.baselines {
                say!("  {:18} {:.5}", baseline.name, baseline.mse);
            }
            if let Some(best) = best {
                let change = 100. * (1. - mse / best.mse);
                let (amount, side) = (change.abs(), if change >= 0. { "below" } else { "above" });
                say!("{amount:.1} % {side} the best of them, \"{}\"", best.name);
            }
            print_lead_times(lead_times);
        }
    }
    if let Some(Best { step, value: Some(value) }) = outcome.best
        && step != outcome.progress.step
    {
        say!("the best was at step {step}, with {}: checkpoints/best", short(value));
    }
    match &report.dir {
        Some(dir) => say!("results are in {}", dir.display()),
        None => say!("this was a trial (trainer.fast_dev_run): nothing was written"),
    }
}

/// A number with few digits.
fn short(value: f64) -> String {
    match value.abs() {
        0.0 | 1e-3..1e6 => format!("{value:.5}"),
        _ => format!("{value:.4e}"),
    }
}

fn print_lead_times(lead_times: &LeadTimes) {
    if lead_times.module.is_some() {
        say!("by lead time, this model / the last frame copied (persistence):");
        say!("{lead_times}");
    }
}

/// Prints one quantity per line; unknown quantities are left out.
fn print_benchmark(benchmark: &Benchmark, steps: u64) {
    let Benchmark { ms_per_step, samples_per_second, peak_rss_mb, .. } = benchmark;
    say!("time        {ms_per_step:.1} ms per step (median of {steps})");
    say!("speed       {samples_per_second:.2} samples per second");
    if let (Some(flops), Some(tflops)) = (benchmark.flops_per_sample, benchmark.tflops) {
        say!("arithmetic  {tflops:.3} TFLOP/s at {:.1} GFLOP per sample", flops / 1e9);
    }
    if let Some(megabytes) = peak_rss_mb {
        say!("memory      {megabytes:.0} MB at most");
    }
    if let Some(megabytes) = benchmark.peak_device_mb {
        say!("            {megabytes:.0} MB at most on the device");
    }
    say!("on          {}, {} threads", benchmark.device, benchmark.threads);
}

/// Prints the curve in a few lines, and the lines to write into the configuration.
fn print_lr(finding: &LrFinding, suggestion: f64) {
    const ROWS: usize = 12;
    let rows = finding.points.iter().step_by(finding.points.len().div_ceil(ROWS));
    say!("learning rate    loss, smoothed");
    rows.for_each(|point| say!("{:13.1e}    {:.6}", point.lr, point.smoothed));
    say!();
    say!("the loss falls fastest at {suggestion:.1e}:");
    say!();
    if finding.proportions.len() == 1 {
        say!("    [optimizer]");
        say!("    lr = {suggestion:.1e}");
    } else {
        // Several optimizers, or groups of parameters.
        for (name, proportion) in &finding.proportions {
            say!("    {name}: lr = {:.1e}", proportion * suggestion);
        }
    }
}

/// Prints a row for each size, and the two answers.
fn print_batch_sizes(finding: &BatchFinding) {
    say!("batch size    ms per step    samples per second    memory");
    for trial in &finding.trials {
        let memory = trial.memory_mb.map_or("?".into(), |memory| format!("{memory:.0} MB"));
        let (size, ms, speed) = (trial.batch_size, trial.ms_per_step, trial.samples_per_second);
        say!("{size:10}    {ms:9.1}    {speed:16.1}    {memory:>9}");
    }
    say!("then {}", finding.ended);
    say!();
    say!("the smallest within 5 % of the best speed:");
    say!();
    say!("    [trainer]");
    say!("    batch_size = {}", finding.suggestion);
    say!();
    say!("the largest that was tried and fits: {}", finding.largest);
}
