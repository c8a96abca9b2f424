//! The batch-size finder: times real training steps, doubling the batch size each time.

use candle_core::Device;
use serde::Serialize;

use crate::batch::Batch;
use crate::bench::{self, Pass};
use crate::data::Data;
use crate::error::{Error, Result};
use crate::memory;
use crate::module::Model;
use crate::trainer::Trainer;

/// Speed gains up to this share are ignored.
const SAME_SPEED: f64 = 0.05;
/// Number of doublings without a speed gain that ends the search.
const PATIENCE: usize = 2;
/// Share of the available memory that may be used if no limit is set.
const MEMORY_SHARE: f64 = 0.8;

/// Settings of the batch-size search.
#[derive(Debug, Clone, PartialEq)]
pub struct BatchFinderConfig {
    /// First batch size; each later one is twice as large.
    pub start: usize,
    /// Largest batch size to try. Default, and upper bound: the number of samples.
    pub max: Option<usize>,
    /// Steps to time at each size, after a warm-up.
    pub steps: u64,
    /// Memory that training may use on a CPU, in 10^6 bytes. Default: 80 % of the memory available, also to
    /// the process's control group.
    pub memory_mb: Option<f64>,
}

/// Results of one batch size.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct BatchTrial {
    /// Samples per step.
    pub batch_size: usize,
    /// Median time of a step, in milliseconds.
    pub ms_per_step: f64,
    /// Samples per second at that median.
    pub samples_per_second: f64,
    /// Peak memory of the steps beyond what the process held before the search, in 10^6 bytes. Only known on
    /// Linux, for training on the CPU.
    pub memory_mb: Option<f64>,
}

/// The result of the search.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct BatchFinding {
    /// All sizes that were tried and fit, in increasing order.
    pub trials: Vec<BatchTrial>,
    /// The smallest size within 5 % of the best speed in samples per second: larger ones only cost memory.
    pub suggestion: usize,
    /// The largest size that was tried and fits.
    pub largest: usize,
    /// Why no larger size was tried.
    pub ended: String,
}

impl Default for BatchFinderConfig {
    fn default() -> Self {
        Self { start: 1, max: None, steps: 5, memory_mb: None }
    }
}

impl BatchFinderConfig {
    /// Refuses invalid settings.
    pub fn check(&self) -> Result<()> {
        let Self { start, max, steps, memory_mb } = *self;
        if start == 0 || steps == 0 {
            let key = if start == 0 { "start" } else { "steps" };
            return Err(Error::setting(key, "expected at least 1, found 0"));
        }
        if let Some(max) = max.filter(|max| *max < start) {
            return Err(Error::setting(
                "max",
                format!("expected at least the first size, {start}; found {max}"),
            ));
        }
        if let Some(memory_mb) = memory_mb.filter(|memory_mb| !(memory_mb.is_finite() && *memory_mb > 0.)) {
            return Err(Error::setting("memory_mb", format!("expected a number above 0, found {memory_mb}")));
        }
        Ok(())
    }
}

impl Trainer {
    /// Times training steps at one batch size after another, each twice as large, until a larger one would
    /// not help or would not fit.
    ///
    /// The result is how many samples a device best processes at once. `micro_batch_size` is ignored; set it
    /// to the result if `batch_size` should stay the same. The model's weights are restored, and this trainer
    /// is unchanged.
    pub fn find_batch_size<B: Batch>(
        &self,
        model: &Model<B>,
        data: &Data<B>,
        config: &BatchFinderConfig,
    ) -> Result<BatchFinding> {
        config.check()?;
        let samples = data.train.len().unwrap_or(usize::MAX);
        if config.start > samples {
            let message =
                format!("expected at most {samples}, as many samples as there are; found {}", config.start);
            return Err(Error::setting("start", message));
        }
        let max = config.max.unwrap_or(samples).min(samples);
        let on_cpu = matches!(model.params().device(), Device::Cpu);
        // Memory cached by earlier work would hide what the first steps need.
        candlepower_kernels::release_scratch();
        let held = memory::resident().filter(|_| on_cpu);
        let limit = config.memory_mb.or_else(|| Some(MEMORY_SHARE * megabytes(memory::available()?)));
        model.params().put_back_after(|| {
            let mut trials = Vec::new();
            let mut batch_size = config.start;
            let ended = loop {
                match self.try_batch_size(model, data, batch_size, config.steps, held) {
                    Ok(trial) => trials.push(trial),
                    Err(error) if memory::is_full(&error) && !trials.is_empty() => {
                        break format!("a batch of {batch_size} does not fit into the device's memory");
                    }
                    Err(error) => return Err(error),
                }
                if let (Some(limit), [BatchTrial { memory_mb: Some(needed), .. }]) =
                    (config.memory_mb, &trials[..])
                    && *needed > limit
                {
                    let message =
                        format!("a batch of {batch_size} takes {needed:.0} MB, more than {limit:.0}");
                    return Err(Error::setting("memory_mb", message));
                }
                if let Some(why) = reason_to_end(&trials, max, limit) {
                    break why;
                }
                batch_size *= 2;
            };
            Ok(BatchFinding::new(trials, ended))
        })
    }

    fn try_batch_size<B: Batch>(
        &self,
        model: &Model<B>,
        data: &Data<B>,
        batch_size: usize,
        steps: u64,
        held: Option<u64>,
    ) -> Result<BatchTrial> {
        let mut trainer = self.trial(steps);
        (trainer.config.batch_size, trainer.config.micro_batch_size) = (batch_size, None);
        // The best size for a single device is wanted.
        trainer.config.devices = 1;
        memory::reset_peak();
        let timed = bench::measure(&trainer, model, data, steps, Pass::Training)?;
        let memory_mb = held.zip(memory::peak()).map(|(held, peak)| megabytes(peak.saturating_sub(held)));
        let (ms_per_step, samples_per_second) = (timed.ms_per_step, timed.samples_per_second);
        tracing::info!("batches of {batch_size}: {samples_per_second:.1} samples per second");
        Ok(BatchTrial { batch_size, ms_per_step, samples_per_second, memory_mb })
    }
}

impl BatchFinding {
    fn new(trials: Vec<BatchTrial>, ended: String) -> Self {
        let best = fastest(&trials);
        let good = |trial: &&BatchTrial| trial.samples_per_second >= (1. - SAME_SPEED) * best;
        let size = |trial: &BatchTrial| trial.batch_size;
        let suggestion = trials.iter().find(good).map_or(0, size);
        Self { suggestion, largest: trials.last().map_or(0, size), trials, ended }
    }
}

/// Why twice the last batch size is not tried; `None` if it is. `limit` is in 10^6 bytes.
fn reason_to_end(trials: &[BatchTrial], max: usize, limit: Option<f64>) -> Option<String> {
    let last = trials.last()?;
    let next = 2 * last.batch_size;
    if next > max {
        return Some(format!("twice as many would exceed {max}"));
    }
    if let (Some(memory), Some(limit)) = (last.memory_mb, limit) {
        // Extrapolates a line through the last two sizes or, after the first size, through the origin.
        let before = trials.iter().rev().nth(1);
        let (size, held) = before.map_or((0, 0.), |t| (t.batch_size, t.memory_mb.unwrap_or(0.)));
        let each = (memory - held).max(0.) / (last.batch_size - size) as f64;
        let needed = memory + each * last.batch_size as f64;
        if needed > limit {
            return Some(format!(
                "a batch of {next} would need about {needed:.0} MB of the {limit:.0} MB there are"
            ));
        }
    }
    let (earlier, later) = trials.split_at(trials.len().saturating_sub(PATIENCE));
    if !earlier.is_empty() && fastest(later) <= (1. + SAME_SPEED) * fastest(earlier) {
        return Some(format!("the last {PATIENCE} doublings made it no faster"));
    }
    None
}

/// The speed of the fastest trial, in samples per second.
fn fastest(trials: &[BatchTrial]) -> f64 {
    trials.iter().map(|trial| trial.samples_per_second).fold(0., f64::max)
}

fn megabytes(bytes: u64) -> f64 {
    bytes as f64 / 1e6
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Trials of sizes 1, 2, 4, ... with these speeds and memory sizes.
    fn trials(results: &[(f64, f64)]) -> Vec<BatchTrial> {
        let trial = |(i, &(samples_per_second, memory_mb)): (usize, &(f64, f64))| {
            let batch_size = 1 << i;
            let ms_per_step = 1e3 * batch_size as f64 / samples_per_second;
            BatchTrial { batch_size, ms_per_step, samples_per_second, memory_mb: Some(memory_mb) }
        };
        results.iter().enumerate().map(trial).collect()
    }

    #[test]
    fn memory_is_foreseen_along_a_line() {
        let tried = trials(&[(10., 100.), (20., 120.), (40., 160.)]);
        let why = |n: usize, limit: f64| reason_to_end(&tried[..n], 100, Some(limit));
        // 20 MB per sample: 8 samples need 160 + 4 * 20.
        assert_eq!(why(3, 241.), None);
        assert_eq!(why(3, 239.).unwrap(), "a batch of 8 would need about 240 MB of the 239 MB there are");
        // After the first size, the line starts at no memory for no samples.
        assert_eq!(why(1, 201.), None);
        assert_eq!(why(1, 199.).unwrap(), "a batch of 2 would need about 200 MB of the 199 MB there are");
        assert_eq!(reason_to_end(&tried, 100, None), None);
    }

    #[test]
    fn what_is_no_faster_or_too_large_ends_the_search() {
        let faster = trials(&[(10., 1.), (20., 1.), (20.9, 1.), (21.2, 1.)]);
        assert_eq!(reason_to_end(&faster, 100, None), None);
        let no_faster = trials(&[(10., 1.), (20., 1.), (20.9, 1.), (20.8, 1.)]);
        assert_eq!(reason_to_end(&no_faster[..3], 100, None), None);
        assert_eq!(reason_to_end(&no_faster, 100, None).unwrap(), "the last 2 doublings made it no faster");
        assert_eq!(reason_to_end(&faster, 15, None).unwrap(), "twice as many would exceed 15");
        assert_eq!(reason_to_end(&faster, 16, None), None);
    }

    #[test]
    fn the_smallest_of_the_fast_ones_is_suggested() {
        let found = BatchFinding::new(trials(&[(10., 1.), (18.9, 1.), (19.1, 1.), (20., 1.)]), String::new());
        assert_eq!((found.suggestion, found.largest), (4, 8));
    }
}
