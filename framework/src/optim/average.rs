//! Averages of the weights over training, evaluated and saved alongside the trained weights.

use candle_core::{Tensor, Var};
use candlepower_kernels::updates::approach;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// The `[average]` section: the average of the weights to use for evaluation and prediction. Default: none.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum AverageConfig {
    /// The exponential moving average (Polyak and Juditsky 1992, with exponential weights).
    Ema(EmaConfig),
    /// Stochastic weight averaging: the plain mean (Izmailov et al. 2018). Use it with a learning rate that
    /// stays high, for example with `[schedule]` `sequence`.
    Swa(SwaConfig),
}

/// Fields of `[average]` for `ema`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct EmaConfig {
    /// Share of the old average that is kept at each update.
    pub decay: f64,
    /// Steps between two updates.
    pub every_steps: u64,
    /// Step after which averaging starts.
    pub start_step: u64,
}

/// Fields of `[average]` for `swa`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SwaConfig {
    /// Step after which averaging starts; about three quarters of the run.
    pub start_step: u64,
    /// Steps between two updates; about one epoch.
    pub every_steps: u64,
}

impl Default for EmaConfig {
    fn default() -> Self {
        Self { decay: 0.999, every_steps: 1, start_step: 0 }
    }
}

impl AverageConfig {
    /// Refuses invalid settings.
    pub fn check(&self) -> Result<()> {
        if self.rhythm().1 == 0 {
            return Err(Error::setting("every_steps", "expected at least 1, found 0"));
        }
        match self {
            Self::Ema(EmaConfig { decay, .. }) if !(0. ..1.).contains(decay) => {
                let message = format!("expected a number in [0, 1); found {decay}");
                Err(Error::setting("decay", message))
            }
            _ => Ok(()),
        }
    }

    /// The step after which averaging starts, and the number of steps between two updates.
    fn rhythm(&self) -> (u64, u64) {
        match self {
            Self::Ema(EmaConfig { start_step, every_steps, .. })
            | Self::Swa(SwaConfig { start_step, every_steps }) => (*start_step, *every_steps),
        }
    }
}

/// The running average of parameters.
pub(crate) struct Average {
    config: AverageConfig,
    params: Vec<(String, Var)>,
    averages: Vec<(String, Var)>,
    /// Number of updates so far. At 0 there is no average yet.
    pub(crate) updates: u64,
}

impl Average {
    pub(crate) fn new(config: &AverageConfig, params: &[(String, Var)]) -> Result<Self> {
        let copy = |(name, var): &(String, Var)| Ok((name.clone(), Var::from_tensor(&var.copy()?)?));
        let averages = params.iter().map(copy).collect::<Result<_>>()?;
        Ok(Self { config: config.clone(), params: params.to_vec(), averages, updates: 0 })
    }

    /// The averages by parameter name; writing to them restores them.
    pub(crate) fn averages(&self) -> &[(String, Var)] {
        &self.averages
    }

    /// Updates the averages with the weights after `step` steps, if an update is due.
    pub(crate) fn update(&mut self, step: u64) -> Result<()> {
        let (start, every) = self.config.rhythm();
        if step <= start || !(step - start).is_multiple_of(every) {
            return Ok(());
        }
        let share = match (&self.config, self.updates) {
            (_, 0) => 1.,
            (AverageConfig::Ema(EmaConfig { decay, .. }), _) => 1. - decay,
            (AverageConfig::Swa(_), updates) => 1. / (updates as f64 + 1.),
        } as f32;
        let pairs = self.averages.iter().zip(&self.params).map(|((_, average), (_, param))| (average, param));
        if share == 1. {
            pairs.clone().try_for_each(|(average, param)| average.set(param))?;
        } else {
            approach(
                &pairs.map(|(average, param)| (average.as_tensor(), param.as_tensor())).collect::<Vec<_>>(),
                share,
            )?;
        }
        self.updates += 1;
        Ok(())
    }

    /// Copies the averages into the parameters, if there are any.
    pub(crate) fn take_over(&self, publish: impl Fn() -> Result<()>) -> Result<()> {
        if self.updates == 0 {
            return Ok(());
        }
        for ((_, param), (_, mean)) in self.params.iter().zip(&self.averages) {
            param.set(mean)?;
        }
        publish()
    }

    /// Runs `work` with the averages in place of the parameters, if there are any, then restores the weights.
    /// `publish` passes new values on to the module.
    pub(crate) fn in_place<T>(
        average: Option<&Self>,
        publish: impl Fn() -> Result<()>,
        work: impl FnOnce() -> Result<T>,
    ) -> Result<T> {
        let Some(average) = average.filter(|average| average.updates > 0) else { return work() };
        let weights: Vec<Tensor> =
            average.params.iter().map(|(_, param)| param.copy()).collect::<candle_core::Result<_>>()?;
        average.take_over(&publish)?;
        let result = work();
        for ((_, param), weight) in average.params.iter().zip(&weights) {
            param.set(weight)?;
        }
        publish()?;
        result
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    /// The average after each of these weights, one weight per step.
    fn averages(config: AverageConfig, weights: &[f32]) -> Vec<f32> {
        let param = Var::new(&[0f32], &Device::Cpu).unwrap();
        let mut average = Average::new(&config, &[("w".into(), param.clone())]).unwrap();
        let value = |var: &Var| var.to_vec1::<f32>().unwrap()[0];
        let after = |(step, weight): (usize, &f32)| {
            param.set(&Tensor::new(&[*weight], &Device::Cpu).unwrap()).unwrap();
            average.update(step as u64 + 1).unwrap();
            let seen = Average::in_place(Some(&average), || Ok(()), || Ok(value(&param))).unwrap();
            assert_eq!(value(&param), *weight, "the weights are back");
            seen
        };
        weights.iter().enumerate().map(after).collect()
    }

    #[test]
    fn ema_by_hand() {
        let config = EmaConfig { decay: 0.75, start_step: 1, every_steps: 1 };
        // Before the start, the weights themselves; then 8, 8 + (4 - 8) / 4 = 7, 7 + (11 - 7) / 4 = 8.
        assert_eq!(averages(AverageConfig::Ema(config), &[3., 8., 4., 11.]), [3., 8., 7., 8.]);
    }

    #[test]
    fn swa_is_the_mean_of_every_second_step() {
        let config = SwaConfig { start_step: 0, every_steps: 2 };
        assert_eq!(averages(AverageConfig::Swa(config), &[1., 2., 3., 4., 5., 9.]), [1., 2., 2., 3., 3., 5.]);
    }
}
