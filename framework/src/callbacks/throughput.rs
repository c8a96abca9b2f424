//! How fast a run trains.

use std::time::Instant;

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
/// module knows its arithmetic, `tflops`. A step counts from the end of the one before, so waiting for data is part of it;
/// the first step, and one with a validation before it, do not count.
pub struct Throughput {
    config: ThroughputConfig,
    flops_per_sample: Option<f64>,
    /// The end of the step before, and the samples done by then.
    before: Option<(Instant, u64)>,
    /// Steps, samples and seconds since the last metrics.
    sums: (u64, u64, f64),
}

impl Watch for Throughput {
    type Config = ThroughputConfig;

    fn watch(config: &ThroughputConfig) -> Result<Self> {
        if let Some(peak) = config.peak_tflops.filter(|peak| !(peak.is_finite() && *peak > 0.)) {
            return Err(Error::setting("peak_tflops", format!("expected a number above 0, found {peak}")));
        }
        Ok(Self { config: config.clone(), flops_per_sample: None, before: None, sums: (0, 0, 0.) })
    }
}

impl Callback for Throughput {
    fn on_fit_start(&mut self, plan: &Plan) -> Result<()> {
        self.flops_per_sample = plan.flops_per_sample;
        Ok(())
    }

    fn on_step_end(&mut self, step: &StepEnd) -> Result<Flow> {
        let (now, done) = (Instant::now(), step.progress.samples);
        if let Some((before, samples)) = self.before.replace((now, done)) {
            self.sums.0 += 1;
            self.sums.1 += done - samples;
            self.sums.2 += (now - before).as_secs_f64();
        }
        Ok(Flow::Continue)
    }

    fn on_train_metrics(&mut self, record: &mut Record) -> Result<Flow> {
        if !record.metrics.keys().any(|name| name == "lr" || name.starts_with("lr/")) {
            // An epoch's metrics alone: the rates are those between steps that are logged.
            return Ok(Flow::Continue);
        }
        let (steps, samples, seconds) = std::mem::take(&mut self.sums);
        if steps == 0 || seconds == 0. {
            return Ok(Flow::Continue);
        }
        let samples_per_second = samples as f64 / seconds;
        record.metrics.insert("samples_per_second".into(), samples_per_second);
        record.metrics.insert("steps_per_second".into(), steps as f64 / seconds);
        if let Some(flops) = self.flops_per_sample {
            let tflops = flops * samples_per_second / 1e12;
            record.metrics.insert("tflops".into(), tflops);
            if let Some(peak) = self.config.peak_tflops {
                record.metrics.insert("utilisation".into(), tflops / peak);
            }
        }
        Ok(Flow::Continue)
    }

    fn on_validation_batch(&mut self, _: usize, _: Option<usize>) -> Result<Flow> {
        self.before = None;
        Ok(Flow::Continue)
    }

    fn wants_gradients(&self, _: u64) -> bool {
        false
    }
}
