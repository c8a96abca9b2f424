//! What commands print for people.

use candlepower::bench::Benchmark;
use candlepower::callback::StopReason;
use candlepower::checkpoint::Best;
use candlepower::experiment::Report;
use candlepower::finder::{BatchFinding, LrFinding};
use candlepower::metrics::video::{LeadTimes, Predictor};

use crate::say::say;

/// Prints the result of a training, alongside baselines that learn nothing.
pub(crate) fn print_report(report: &Report) {
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
            print_baselines(&lead_times.baselines, module.mse);
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

/// Compares the model's mean squared error with those of the baselines.
fn print_baselines(baselines: &[Predictor], mse: f64) {
    say!("mean squared error on the validation data, next to predictors that learn nothing:");
    say!("  {:18} {mse:.5}", "this model");
    for baseline in baselines {
        say!("  {:18} {:.5}", baseline.name, baseline.mse);
    }
    if let Some(best) = baselines.iter().min_by(|a, b| a.mse.total_cmp(&b.mse)) {
        let change = 100. * (1. - mse / best.mse);
        let (amount, side) = (change.abs(), if change >= 0. { "below" } else { "above" });
        say!("{amount:.1} % {side} the best of them, \"{}\"", best.name);
    }
}

/// A number with few digits.
fn short(value: f64) -> String {
    match value.abs() {
        0.0 | 1e-3..1e6 => format!("{value:.5}"),
        _ => format!("{value:.4e}"),
    }
}

pub(crate) fn print_lead_times(lead_times: &LeadTimes) {
    if lead_times.module.is_some() {
        say!("by lead time, this model / the last frame copied (persistence):");
        say!("{lead_times}");
    }
}

/// Prints one quantity per line; unknown quantities are left out.
pub(crate) fn print_benchmark(benchmark: &Benchmark, steps: u64) {
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
pub(crate) fn print_lr(finding: &LrFinding, suggestion: f64) {
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
pub(crate) fn print_batch_sizes(finding: &BatchFinding) {
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
