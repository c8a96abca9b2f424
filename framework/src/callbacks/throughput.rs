//! How fast a run trains.

use std::time::{Duration, Instant};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::callback::{Callback, Flow, Plan, Record, StepEnd, Watch};
use crate::error::{Error, Result};

/// Fields of `[callbacks.throughput]`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct ThroughputConfig {
    /// What the device can do at most, in 10^12 floating-point operations a second: adds `utilisation`, the share of it
    /// that the model's arithmetic reaches.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub peak_tflops: Option<f64>,
}

/// Adds to the training metrics the speed since the last ones: `samples_per_second`, `steps_per_second`, and, where the
/// module knows its arithmetic, `tflops`. Time spent in validation does not count.
pub struct Throughput {
    config: ThroughputConfig,
    flops_per_sample: Option<f64>,
    since: Option<Mark>,
    /// Time of validation since the mark.
    paused: Duration,
    pause: Option<Instant>,
    now: [u64; 2],
}

/// A moment, with steps and samples done.
struct Mark {
    time: Instant,
    done: [u64; 2],
}

impl Watch for Throughput {
    type Config = ThroughputConfig;

    fn watch(config: &ThroughputConfig) -> Result<Self> {
        if let Some(peak) = config.peak_tflops.filter(|peak| !(peak.is_finite() && *peak > 0.)) {
            return Err(Error::setting("peak_tflops", format!("expected a number above 0, found {peak}")));
        }
        let config = config.clone();
        Ok(Self {
            config,
            flops_per_sample: None,
            since: None,
            paused: Duration::ZERO,
            pause: None,
            now: [0; 2],
        })
    }
}

impl Callback for Throughput {
    fn on_fit_start(&mut self, plan: &Plan) -> Result<()> {
        self.flops_per_sample = plan.flops_per_sample;
        Ok(())
    }

    fn on_step_end(&mut self, step: &StepEnd) -> Result<Flow> {
        if let Some(pause) = self.pause.take() {
            self.paused += pause.elapsed();
        }
        self.now = [step.progress.step, step.progress.samples];
        // The first step also waits for data and fills caches: time is counted from its end.
        self.since.get_or_insert_with(|| Mark { time: Instant::now(), done: self.now });
        Ok(Flow::Continue)
    }

    fn on_train_metrics(&mut self, record: &mut Record) -> Result<Flow> {
        let Some(Mark { time, done: [steps, samples] }) = &self.since else { return Ok(Flow::Continue) };
        let seconds = time.elapsed().saturating_sub(self.paused).as_secs_f64();
        if self.now[0] > *steps && seconds > 0. {
            let samples_per_second = (self.now[1] - samples) as f64 / seconds;
            record.metrics.insert("samples_per_second".into(), samples_per_second);
            record.metrics.insert("steps_per_second".into(), (self.now[0] - steps) as f64 / seconds);
            if let Some(flops) = self.flops_per_sample {
                let tflops = flops * samples_per_second / 1e12;
                record.metrics.insert("tflops".into(), tflops);
                if let Some(peak) = self.config.peak_tflops {
                    record.metrics.insert("utilisation".into(), tflops / peak);
                }
            }
            self.since = Some(Mark { time: Instant::now(), done: self.now });
            self.paused = Duration::ZERO;
        }
        Ok(Flow::Continue)
    }

    fn on_validation_batch(&mut self, _: usize, _: Option<usize>) -> Result<()> {
        self.pause.get_or_insert_with(Instant::now);
        Ok(())
    }
}
