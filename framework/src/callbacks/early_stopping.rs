//! Ends a run that no longer improves.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::callback::{BuildCallback, Callback, Flow, Record, StopReason};
use crate::error::{Error, Result};
use crate::metrics::Criterion;

/// The `[callbacks.early_stopping]` section.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct EarlyStoppingConfig {
    /// The validation metric to watch.
    pub monitor: String,
    /// Whether larger is better.
    pub maximize: bool,
    /// Validations in a row without improvement after which the run ends.
    pub patience: u64,
    /// The minimum difference to the best value that counts as an improvement.
    pub min_delta: f64,
    /// Ends the run at once if the metric is at least this good.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stopping_threshold: Option<f64>,
    /// Ends the run at once if the metric is worse than this.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub divergence_threshold: Option<f64>,
}

impl Default for EarlyStoppingConfig {
    fn default() -> Self {
        Self {
            monitor: "loss".into(),
            maximize: false,
            patience: 3,
            min_delta: 0.,
            stopping_threshold: None,
            divergence_threshold: None,
        }
    }
}

/// Ends a run when a validation metric has stopped improving, is good enough, has diverged, or is not finite.
pub struct EarlyStopping {
    config: EarlyStoppingConfig,
    state: Waiting,
}

/// State kept between validations.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
struct Waiting {
    best: Option<f64>,
    /// Validations since the best.
    waited: u64,
    /// The criterion that `best` was compared by.
    by: Option<Criterion>,
}

impl BuildCallback for EarlyStopping {
    type Config = EarlyStoppingConfig;

    fn watch(config: &EarlyStoppingConfig) -> Result<Self> {
        if config.patience == 0 {
            return Err(Error::setting("patience", "expected at least 1, found 0"));
        }
        let numbers = [
            ("min_delta", Some(config.min_delta)),
            ("stopping_threshold", config.stopping_threshold),
            ("divergence_threshold", config.divergence_threshold),
        ];
        if let Some((key, _)) =
            numbers.iter().find(|(_, value)| value.is_some_and(|value| !value.is_finite()))
        {
            return Err(Error::setting(*key, "expected a finite number"));
        }
        Ok(Self { config: config.clone(), state: Waiting::default() })
    }
}

impl Callback for EarlyStopping {
    fn on_validation_end(&mut self, record: &mut Record) -> Result<Flow> {
        let EarlyStoppingConfig { monitor, maximize, patience, min_delta, .. } = &self.config;
        let Some(&value) = record.metrics.get(monitor) else {
            let known: Vec<&str> = record.metrics.keys().map(String::as_str).collect();
            let message = format!("early stopping monitors `{monitor}`, validation has {}", known.join(", "));
            return Err(Error::msg(message));
        };
        let better = |than: f64| if *maximize { value > than } else { value < than };
        let margin = if *maximize { *min_delta } else { -min_delta };
        let stop = |why: String| Ok(Flow::Stop(StopReason::Callback(why)));
        if !value.is_finite() {
            return stop(format!("`{monitor}` is {value}"));
        }
        if self.config.stopping_threshold.is_some_and(|goal| better(goal) || value == goal) {
            return stop(format!("`{monitor}` is {value:.6}: the goal is reached"));
        }
        if self.config.divergence_threshold.is_some_and(|limit| !better(limit) && value != limit) {
            return stop(format!("`{monitor}` is {value:.6}: it has diverged"));
        }
        if self.state.best.is_none_or(|best| better(best + margin)) {
            self.state =
                Waiting { best: Some(value), waited: 0, by: Some(Criterion::new(monitor, *maximize)) };
            return Ok(Flow::Continue);
        }
        self.state.waited += 1;
        if self.state.waited < *patience {
            return Ok(Flow::Continue);
        }
        let best = self.state.best.unwrap_or(value);
        stop(format!("`{monitor}` has not improved on {best:.6} for {patience} validations"))
    }

    fn monitored_metric(&self) -> Option<&str> {
        Some(&self.config.monitor)
    }

    fn name(&self) -> &'static str {
        "early_stopping"
    }

    fn state(&self) -> Option<serde_json::Value> {
        serde_json::to_value(&self.state).ok()
    }

    fn restore(&mut self, state: serde_json::Value) -> Result<()> {
        let state: Waiting = serde_json::from_value(state).map_err(Error::content("early_stopping"))?;
        if Criterion::new(&self.config.monitor, self.config.maximize).goes_on(state.by.as_ref()) {
            self.state = state;
        } else {
            tracing::warn!("early stopping monitors a different metric than before: it starts over");
        }
        Ok(())
    }

    fn wants_gradients(&self, _: u64) -> bool {
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::Split;

    /// The index of the loss after which it stops, and why. It is interrupted and restored after each loss.
    fn stops(config: EarlyStoppingConfig, losses: &[f64]) -> Option<(usize, String)> {
        let mut state = None;
        for (i, loss) in losses.iter().enumerate() {
            let mut callback = EarlyStopping::watch(&config).unwrap();
            state.map_or(Ok(()), |state| callback.restore(state)).unwrap();
            let metrics = [("loss".to_string(), *loss)].into_iter().collect();
            let mut record = Record { step: i as u64, epoch: 0, split: Split::Val, metrics };
            if let Flow::Stop(StopReason::Callback(why)) = callback.on_validation_end(&mut record).unwrap() {
                return Some((i, why));
            }
            state = callback.state();
        }
        None
    }

    #[test]
    fn by_hand() {
        let config = EarlyStoppingConfig { patience: 2, min_delta: 0.1, ..Default::default() };
        // 0.95 is not sufficiently better than 1, but 0.8 is; then no value is sufficiently better for two
        // validations.
        let (at, why) = stops(config.clone(), &[1., 0.95, 0.8, 0.9, 0.75, 0.1]).unwrap();
        assert_eq!((at, why.as_str()), (4, "`loss` has not improved on 0.800000 for 2 validations"));
        assert_eq!(stops(config.clone(), &[1., 0.8, 0.6, 0.4, 0.2]), None);
        assert_eq!(stops(config.clone(), &[1., f64::NAN]).unwrap().0, 1);
        let maximize = EarlyStoppingConfig { maximize: true, ..config.clone() };
        assert_eq!(stops(maximize, &[0.5, 0.7, 0.75, 0.6]).unwrap().0, 3);
        let goal = EarlyStoppingConfig { stopping_threshold: Some(0.5), ..config.clone() };
        assert_eq!(stops(goal, &[1., 0.5]).unwrap().1, "`loss` is 0.500000: the goal is reached");
        let diverged = EarlyStoppingConfig { divergence_threshold: Some(2.), ..config };
        assert_eq!(stops(diverged, &[2., 2.5]).unwrap().1, "`loss` is 2.500000: it has diverged");
    }
}
