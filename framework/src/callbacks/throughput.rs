//! Training speed as a metric.

use std::time::Instant;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::callback::{BuildCallback, Callback, Flow, Plan, Record, StepEnd};
use crate::error::{Error, Result};

/// The `[callbacks.throughput]` section.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct ThroughputConfig {
    /// Peak performance of the device in 10^12 floating-point operations per second. If set, `utilisation` is
    /// logged: the fraction of it that the model's arithmetic reaches.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub peak_tflops: Option<f64>,
}

/// Adds the speed since the last training metrics to them: `samples_per_second`, `steps_per_second` and, if
/// the module reports its arithmetic, `tflops`. A step is measured from the end of the previous one, so it
/// includes waiting for data. The first step and steps that follow a validation are excluded.
pub struct Throughput {
    config: ThroughputConfig,
    flops_per_sample: Option<f64>,
    /// The end of the previous step, and the samples processed by then.
    before: Option<(Instant, u64)>,
    /// Steps, samples and seconds since the last metrics.
    sums: (u64, u64, f64),
}

impl BuildCallback for Throughput {
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
            // Only an epoch's metrics: the speed is measured between logged steps.
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

    fn on_validation_batch_end(&mut self, _: usize, _: Option<usize>) -> Result<Flow> {
        self.before = None;
        Ok(Flow::Continue)
    }

    fn wants_gradients(&self, _: u64) -> bool {
        false
    }
}
