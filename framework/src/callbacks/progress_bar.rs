//! Shows the progress of a run on the terminal.

use std::path::Path;
use std::time::{Duration, Instant};

use indicatif::{HumanDuration, ProgressBar as Bar, ProgressDrawTarget, ProgressStyle};
use std::io::{IsTerminal, Write};

use crate::callback::{Callback, Flow, Plan, Progress, Record, StepEnd, StopReason};
use crate::error::Result;

/// Time between two lines if standard error is not a terminal.
const LINE_EVERY: Duration = Duration::from_secs(10);

/// Shows steps, loss, samples per second and the time left: as a bar on a terminal, otherwise as occasional
/// lines.
#[derive(Default)]
pub struct ProgressBar {
    run: Option<Run>,
}

struct Run {
    bar: Bar,
    plan: Plan,
    started: Instant,
    last_line: Instant,
    progress: Progress,
    loss: Option<f64>,
    /// Time spent in validation, which is excluded from the training speed.
    paused: Duration,
    pause: Option<Instant>,
}

impl Run {
    fn training_time(&self) -> Duration {
        let pause = self.pause.map_or(Duration::ZERO, |since| since.elapsed());
        self.started.elapsed().saturating_sub(self.paused + pause)
    }

    fn status(&self) -> String {
        let seconds = self.training_time().as_secs_f64().max(1e-9);
        let samples = (self.progress.samples - self.plan.start.samples) as f64;
        let steps = self.progress.step - self.plan.start.step;
        let left = self.plan.last_step.map(|last| last.saturating_sub(self.progress.step) as f64);
        let loss = self.loss.map(|loss| format!("loss {loss:.5}  ")).unwrap_or_default();
        let time = |seconds: f64| HumanDuration(Duration::from_secs_f64(seconds.min(1e9))).to_string();
        let left = left.filter(|_| steps > 0).map(|left| time(seconds * left / steps as f64));
        let left = left.unwrap_or_else(|| "?".into());
        format!("{loss}{:.1} samples/s  {left} left", samples / seconds)
    }

    fn say(&self, line: &str) {
        // `println` of a hidden bar prints nothing.
        if self.bar.is_hidden() { tell(line) } else { self.bar.println(line) }
    }
}

/// Prints a line to standard error. Ignores errors: a closed pipe must not end training.
fn tell(line: &str) {
    let _ = writeln!(std::io::stderr(), "{line}");
}

impl Callback for ProgressBar {
    fn on_fit_start(&mut self, plan: &Plan) -> Result<()> {
        let terminal = std::io::stderr().is_terminal();
        let target = if terminal { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() };
        let bar = Bar::with_draw_target(plan.last_step, target);
        let style = match plan.last_step {
            Some(_) => ProgressStyle::with_template("{bar:30} {pos}/{len}  {msg}"),
            None => ProgressStyle::with_template("{spinner} {pos}  {msg}"),
        };
        bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
        bar.set_position(plan.start.step);
        let now = Instant::now();
        self.run = Some(Run {
            bar,
            plan: *plan,
            started: now,
            last_line: now,
            progress: plan.start,
            loss: None,
            paused: Duration::ZERO,
            pause: None,
        });
        Ok(())
    }

    fn on_step_end(&mut self, step: &StepEnd) -> Result<Flow> {
        let progress = &step.progress;
        let Some(run) = &mut self.run else { return Ok(Flow::Continue) };
        if let Some(pause) = run.pause.take() {
            run.paused += pause.elapsed();
        }
        run.progress = *progress;
        run.bar.set_position(progress.step);
        run.bar.set_message(run.status());
        if run.bar.is_hidden() && run.last_line.elapsed() >= LINE_EVERY {
            run.last_line = Instant::now();
            let of = run.plan.last_step.map(|last| format!("/{last}")).unwrap_or_default();
            run.say(&format!("step {}{of}  {}", progress.step, run.status()));
        }
        Ok(Flow::Continue)
    }

    fn on_train_metrics(&mut self, record: &mut Record) -> Result<Flow> {
        if let Some(run) = &mut self.run {
            run.loss = record.metrics.get("loss").copied().or(run.loss);
        }
        Ok(Flow::Continue)
    }

    fn on_validation_batch_end(&mut self, done: usize, total: Option<usize>) -> Result<Flow> {
        if let Some(run) = &mut self.run {
            run.pause.get_or_insert_with(Instant::now);
            let of = total.map(|total| format!("/{total}")).unwrap_or_default();
            run.bar.set_message(format!("validating {done}{of}"));
        }
        Ok(Flow::Continue)
    }

    fn on_validation_end(&mut self, record: &mut Record) -> Result<Flow> {
        if let Some(run) = &self.run {
            let metrics: Vec<String> =
                record.metrics.iter().map(|(name, value)| format!("{name} {value:.5}")).collect();
            run.say(&format!("step {}: validation {}", record.step, metrics.join("  ")));
        }
        Ok(Flow::Continue)
    }

    fn on_checkpoint(&mut self, checkpoint: &Path) -> Result<()> {
        tracing::debug!(checkpoint = %checkpoint.display(), "saved");
        Ok(())
    }

    fn on_fit_end(&mut self, progress: &Progress, _: &StopReason) -> Result<()> {
        if let Some(run) = self.run.take() {
            run.bar.finish_and_clear();
            let steps = progress.step - run.plan.start.step;
            let time = HumanDuration(run.started.elapsed());
            let status = run.status();
            let speed = status.split("  ").find(|part| part.ends_with("samples/s")).unwrap_or_default();
            tell(&format!("{steps} steps in {time}: {speed}"));
        }
        Ok(())
    }

    fn wants_gradients(&self, _: u64) -> bool {
        false
    }
}
