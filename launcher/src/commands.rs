//! Runs each command.

use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::ExitCode;

use candlepower::accelerator::describe_devices;
use candlepower::bench::Pass;
use candlepower::callback::{Callback, StopReason};
use candlepower::callbacks::PredictionWriter;
use candlepower::collective::MEETING_PLACE;
use candlepower::config::Registry;
use candlepower::data::Split;
use candlepower::experiment::{self, Experiment, Resume};
use candlepower::finder::{BatchFinderConfig, LrFinderConfig, LrFinding};
use candlepower::{Error, Result};
use serde_json::json;

use crate::command_line::{Command, Config, OptionalConfig, Source, SplitName, resume};
use crate::profile::Profile;
use crate::pulse::Pulse;
use crate::report::{print_batch_sizes, print_benchmark, print_lead_times, print_lr, print_report};
use crate::say::say;
use crate::signals;
use crate::supervisor::{Launch, Node};

/// Runs a command. `profile` is the one that it records, if any.
pub(crate) fn run(registry: &Registry, command: Command, profile: Option<Profile>) -> Result<ExitCode> {
    let read = |config: &Config| Experiment::read(registry, &config.path, &config.changes.sets());
    match command {
        Command::Train { config, resume: from, .. } => {
            return train(read(&config)?, &resume(from.as_deref()), profile);
        }
        Command::Launch { config, nodes, node_rank, master, resume } => {
            let mut sets = config.changes.sets();
            sets.extend(nodes.map(|nodes| format!("distributed.nodes={nodes}")));
            sets.extend(master.map(|master| format!("distributed.master={master:?}")));
            let experiment = Experiment::read(registry, &config.path, &sets)?;
            return launch(&experiment, &config.path, sets, node_rank, resume);
        }
        Command::Validate { config, checkpoint, split, lead_times, json } => {
            validate(&read(&config)?, &checkpoint, split.into(), lead_times.as_deref(), json)?;
        }
        Command::Predict { config, checkpoint, source, output } => {
            predict(&read(&config)?, &checkpoint, source, &output)?;
        }
        Command::Bench { config, steps, forward, json } => {
            let pass = if forward { Pass::Forward } else { Pass::Training };
            bench(read(&config)?, steps, pass, json)?;
        }
        Command::FindLr { config, steps, min, max, output, json } => {
            let test = LrFinderConfig { steps, min_lr: min, max_lr: max, ..Default::default() };
            find_lr(&read(&config)?, &test, output.as_deref(), json)?;
        }
        Command::FindBatchSize { config, start, max, memory, json } => {
            let search = BatchFinderConfig { start, max, memory_mb: memory, ..Default::default() };
            find_batch_size(&read(&config)?, &search, json)?;
        }
        Command::Devices => describe_devices().iter().for_each(|line| say!("{line}")),
        Command::Config { schema: true, .. } => say!("{:#}", experiment::schema(registry)),
        Command::Config { config: OptionalConfig { path, changes }, .. } => {
            let config = Config { path: path.unwrap_or_default(), changes };
            say!("{}", read(&config)?.resolved()?);
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn train(experiment: Experiment, resume: &Resume, profile: Option<Profile>) -> Result<ExitCode> {
    let (experiment, is_first) = join(experiment)?;
    let mut callbacks: Vec<Box<dyn Callback>> = vec![Box::new(signals::on_signal()?)];
    if let Some(pulse) = Pulse::asked_for()? {
        callbacks.push(Box::new(pulse));
    }
    let report = experiment.train(resume, callbacks)?;
    if is_first {
        print_report(&report);
    }
    if let Some(profile) = profile {
        profile.finish(report.dir.as_deref())?;
    }
    Ok(match report.outcome.reason {
        StopReason::Signal(signal) => ExitCode::from(128 + signal as u8),
        _ => ExitCode::SUCCESS,
    })
}

/// Supervises `train` with the file `config` and the overrides `sets`, from which `experiment` was read.
fn launch(
    experiment: &Experiment,
    config: &Path,
    sets: Vec<String>,
    node_rank: Option<usize>,
    resume: Option<String>,
) -> Result<ExitCode> {
    let sets = sets.into_iter().flat_map(|set| ["--set".into(), set.into()]);
    let train = [config.into()].into_iter().chain(sets).collect();
    let (devices, distributed) = (experiment.devices(), experiment.distributed().clone());
    let node = Node::of(&distributed, node_rank)?;
    Launch { train, resume, devices, distributed, node }.run()
}

fn validate(
    experiment: &Experiment,
    checkpoint: &Path,
    split: Split,
    lead_times: Option<&Path>,
    json: bool,
) -> Result<()> {
    let metrics = experiment.validate(checkpoint, split)?;
    if json {
        say!("{}", json!(metrics));
    } else {
        metrics.iter().for_each(|(name, value)| say!("{name:12} {value:.6}"));
    }
    let Some(dir) = lead_times else { return Ok(()) };
    let Some(scores) = experiment.compare(checkpoint, split)? else {
        return Err(Error::msg("--lead-times: this data has no lead times, or none of it is evaluated"));
    };
    scores.save(dir)?;
    if !json {
        print_lead_times(&scores);
    }
    Ok(())
}

fn predict(experiment: &Experiment, checkpoint: &Path, source: Source, output: &Path) -> Result<()> {
    if let Some(input) = source.input {
        experiment.predict(checkpoint, &input, output)?;
        say!("wrote {}", output.display());
        return Ok(());
    }
    let writer = Box::new(PredictionWriter::new(output)?);
    let split = source.split.unwrap_or(SplitName::Val).into();
    let batches = experiment.predict_split(checkpoint, split, vec![writer])?;
    let files = if batches == 1 { "file" } else { "files" };
    say!("wrote {batches} {files} to {}", output.display());
    Ok(())
}

fn bench(experiment: Experiment, steps: u64, pass: Pass, json: bool) -> Result<()> {
    let (experiment, is_first) = join(experiment)?;
    let benchmark = experiment.bench(steps, pass)?;
    if !is_first {
        return Ok(());
    }
    if json {
        say!("{}", json!(benchmark));
    } else {
        print_benchmark(&benchmark, steps);
    }
    Ok(())
}

fn find_lr(experiment: &Experiment, test: &LrFinderConfig, plot: Option<&Path>, json: bool) -> Result<()> {
    let finding = experiment.find_lr(test)?;
    if let Some(path) = plot
        && !finding.points.is_empty()
    {
        finding.plot().save(path)?;
    }
    let suggestion = finding.suggestion();
    if json {
        // Printed even if there is no suggestion; the reason for that is the error.
        let LrFinding { points, proportions } = &finding;
        let suggestion = suggestion.as_ref().ok();
        say!("{}", json!({"suggestion": suggestion, "points": points, "proportions": proportions}));
    }
    let suggestion = suggestion?;
    if !json {
        print_lr(&finding, suggestion);
    }
    Ok(())
}

fn find_batch_size(experiment: &Experiment, search: &BatchFinderConfig, json: bool) -> Result<()> {
    let finding = experiment.find_batch_size(search)?;
    if json {
        say!("{}", json!(finding));
    } else {
        print_batch_sizes(&finding);
    }
    Ok(())
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
