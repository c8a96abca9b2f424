//! The learning-rate range test (Smith 2017, "Cyclical Learning Rates for Training Neural Networks", section 3.3).

use std::sync::mpsc::{Sender, channel};

use indexmap::IndexMap;
use serde::Serialize;

use crate::batch::Batch;
use crate::callback::{Callback, Flow, Record, StopReason};
use crate::data::Data;
use crate::error::{Error, Result};
use crate::module::Model;
use crate::optim::TurnConfig;
use crate::params::put_back_after;
use crate::plot::{Axis, Plot};
use crate::schedule::Schedule;
use crate::trainer::Trainer;

/// The first points average over little, the last may already be those of a loss that explodes.
const SKIPPED: [usize; 2] = [10, 5];
/// The test ends when the smoothed loss is this many times its lowest.
const EXPLODED: f64 = 4.;

/// How the learning-rate test goes.
#[derive(Debug, Clone, PartialEq)]
pub struct LrFinderConfig {
    /// Optimizer steps, a learning rate each.
    pub steps: u64,
    /// The learning rate of the first step.
    pub min_lr: f64,
    /// The learning rate of the last step; each is larger than the one before by the same factor.
    pub max_lr: f64,
    /// The share of the old average that stays when the loss is smoothed.
    pub beta: f64,
}

/// One step of the test.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct LrPoint {
    /// The learning rate, of the first optimizer where there are several.
    pub lr: f64,
    /// The step's loss, the sum over all optimizers.
    pub loss: f64,
    /// The exponential average of the losses so far, corrected for its start (Kingma and Ba 2015, section 3).
    pub smoothed: f64,
}

/// What the test found.
#[derive(Debug, Clone, Serialize)]
pub struct LrFinding {
    /// The steps until the last, or until the loss had grown to four times its lowest or was not finite.
    pub points: Vec<LrPoint>,
    /// Every learning rate that is configured, over the first optimizer's: by the name of the optimizer, and of the
    /// group of parameters where one has its own. The test moves all of them in these proportions.
    pub proportions: IndexMap<String, f64>,
}

impl Default for LrFinderConfig {
    fn default() -> Self {
        Self { steps: 100, min_lr: 1e-8, max_lr: 1., beta: 0.98 }
    }
}

impl LrFinderConfig {
    /// Refuses values that no test can be made with.
    pub fn check(&self) -> Result<()> {
        let Self { steps, min_lr, max_lr, beta } = *self;
        if steps < 2 {
            return Err(Error::setting("steps", format!("expected at least 2, found {steps}")));
        }
        if !(min_lr.is_finite() && min_lr > 0.) {
            return Err(Error::setting("min_lr", format!("expected a number above 0, found {min_lr}")));
        }
        if !(max_lr.is_finite() && max_lr > min_lr) {
            let message = format!("expected a number above `min_lr`, which is {min_lr}; found {max_lr}");
            return Err(Error::setting("max_lr", message));
        }
        if !(0. ..1.).contains(&beta) {
            let message = format!("expected a number from 0 up to, not including, 1; found {beta}");
            return Err(Error::setting("beta", message));
        }
        Ok(())
    }

    /// The factor of each step.
    fn schedule(&self) -> Schedule {
        Schedule::Exponential { gamma: (self.max_lr / self.min_lr).powf(1. / (self.steps - 1) as f64) }
    }
}

impl Trainer {
    /// Trains some steps with a learning rate that grows from next to nothing until the loss explodes, to see where it
    /// falls fastest (Smith 2017, section 3.3).
    ///
    /// It starts from the model's weights as they are, puts them back, and leaves this trainer alone. With several
    /// optimizers and groups, all rates grow in proportion.
    pub fn find_lr<B: Batch>(
        &self,
        model: &Model<B>,
        data: &Data<B>,
        config: &LrFinderConfig,
    ) -> Result<LrFinding> {
        config.check()?;
        let first = self.turns.first().map_or(0., |turn| turn.optimizer.lr());
        if first == 0. {
            let message =
                "the finder moves all learning rates in proportion to this one: expected a number above 0";
            return Err(Error::setting("lr", message));
        }
        let (points, receiver) = channel();
        let recorder = Recorder {
            config: config.clone(),
            losses: match &self.turns[..] {
                [_] => vec!["loss".into()],
                turns => turns.iter().map(|turn| format!("loss/{}", turn.name)).collect(),
            },
            average: 0.,
            lowest: f64::INFINITY,
            points,
        };
        let scaled = self.turns.iter().map(|turn| turn.scaled(config.min_lr / first)).collect();
        let mut trial =
            self.trial(config.steps).optimizers(scaled).schedule(config.schedule()).callback(recorder);
        trial.config.log_every = 1;
        put_back_after(&model.params().vars(), || trial.fit(model, data))?;
        Ok(LrFinding { points: receiver.try_iter().collect(), proportions: proportions(&self.turns, first) })
    }
}

/// Hands out a point for each step; ends the test when the loss explodes.
struct Recorder {
    config: LrFinderConfig,
    /// The names of the losses that are summed.
    losses: Vec<String>,
    /// Before the correction for its start.
    average: f64,
    lowest: f64,
    points: Sender<LrPoint>,
}

impl Callback for Recorder {
    fn on_train_metrics(&mut self, record: &mut Record) -> Result<Flow> {
        let loss: f64 = self.losses.iter().filter_map(|name| record.metrics.get(name)).sum();
        if !loss.is_finite() {
            return Ok(Flow::Stop(StopReason::Callback("the loss is not finite".into())));
        }
        let LrFinderConfig { beta, min_lr, .. } = self.config;
        self.average = beta * self.average + (1. - beta) * loss;
        let smoothed = self.average / (1. - beta.powi(record.step as i32));
        let lr = self.config.schedule().at(record.step - 1, min_lr).lr;
        // Nobody listens only after the test has failed.
        let _ = self.points.send(LrPoint { lr, loss, smoothed });
        self.lowest = self.lowest.min(smoothed);
        // For a loss below zero, too, this is growth.
        if smoothed > self.lowest + (EXPLODED - 1.) * self.lowest.abs() {
            return Ok(Flow::Stop(StopReason::Callback("the loss explodes".into())));
        }
        Ok(Flow::Continue)
    }
}

fn proportions(turns: &[TurnConfig], first: f64) -> IndexMap<String, f64> {
    let rates = turns.iter().flat_map(|turn| {
        let own = (turn.name.clone(), turn.optimizer.lr());
        let of_group =
            |group: &crate::optim::GroupConfig| Some((format!("{}: {}", turn.name, group.params), group.lr?));
        [own].into_iter().chain(turn.groups.iter().filter_map(of_group))
    });
    rates.map(|(name, lr)| (name, lr / first)).collect()
}

impl LrFinding {
    /// The learning rate at which the smoothed loss falls fastest, seen over the logarithm of the rate; an error says
    /// why there is none.
    pub fn suggestion(&self) -> Result<f64> {
        Ok(self.steepest()?.lr)
    }

    fn steepest(&self) -> Result<LrPoint> {
        let [first, last] = SKIPPED;
        let points = &self.points;
        let needed = first + last + 1;
        let (Some(lowest), Some(highest)) = (points.first(), points.last()) else {
            return Err(Error::msg(
                "the loss was not finite in the first step: there is nothing to suggest from",
            ));
        };
        if points.len() < needed {
            return Err(Error::msg(format!(
                "the test ended after {} steps, too few to suggest a learning rate ({needed} are needed): take more \
                 steps, or start from a rate below {:e} if the loss exploded",
                points.len(),
                lowest.lr
            )));
        }
        let slope = |i: usize| {
            let [before, after] = [points[i - 1], points[i + 1]];
            (after.smoothed - before.smoothed) / (after.lr / before.lr).ln()
        };
        let slopes = (first..points.len() - last).map(|i| (i, slope(i)));
        match slopes.min_by(|a, b| a.1.total_cmp(&b.1)) {
            Some((i, slope)) if slope < 0. => Ok(points[i]),
            _ => Err(Error::msg(format!(
                "the loss never fell between the learning rates {:.1e} and {:.1e}: try others, or see whether the \
                 model learns at all",
                lowest.lr, highest.lr
            ))),
        }
    }

    /// The loss over the learning rate, the suggestion marked.
    pub fn plot(&self) -> Plot {
        // What the loss explodes to would flatten all that is worth seeing.
        let smoothed = || self.points.iter().map(|point| point.smoothed);
        let (low, high) =
            (smoothed().fold(f64::INFINITY, f64::min), smoothed().take(SKIPPED[0]).fold(0., f64::max));
        let _ = (low, high);
        let plot = Plot::new("Learning-rate test", Axis::log("learning rate"), Axis::linear("loss"))
            .faint_line("loss of a step", self.points.iter().map(|point| (point.lr, point.loss)))
            .line("smoothed", self.points.iter().map(|point| (point.lr, point.smoothed)));
        match self.steepest() {
            Ok(point) => plot.mark((point.lr, point.smoothed), format!("{:.1e}", point.lr)),
            Err(_) => plot,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::Split;

    /// A finding whose smoothed losses these are; the rate grows by `decades` at each.
    fn finding(smoothed: &[f64], decades: impl Fn(usize) -> f64) -> LrFinding {
        let mut exponent = -6.;
        let point = |(i, &smoothed): (usize, &f64)| {
            exponent += decades(i);
            LrPoint { lr: 10f64.powf(exponent), loss: smoothed, smoothed }
        };
        LrFinding { points: smoothed.iter().enumerate().map(point).collect(), proportions: IndexMap::new() }
    }

    #[test]
    fn the_steepest_fall_by_hand() {
        // Level at 5, a fall of 0.3 at each of points 12 to 14, of 0.5 at 15 and 16, of 0.1 up to 20; then it grows.
        let mut smoothed = vec![5.; 12];
        smoothed.extend([4.7, 4.4, 4.1, 3.6, 3.1, 3., 2.9, 2.8, 2.7]);
        smoothed.extend([3., 4., 5., 6., 7., 8.]);
        let even = finding(&smoothed, |_| 0.2);
        // Around point 15 the loss goes from 4.1 to 3.1.
        assert_eq!(even.suggestion().unwrap(), even.points[15].lr);
        // What happens at the edges does not count.
        let mut edges = smoothed.clone();
        (edges[0], edges[26]) = (90., -90.);
        assert_eq!(finding(&edges, |_| 0.2).suggestion().unwrap(), even.points[15].lr);
        // Over a tenth of the way a fall of 0.6 is steeper than one of 1: the slope is over the rate's logarithm.
        let uneven = finding(&smoothed, |i| if i == 13 || i == 14 { 0.02 } else { 0.2 });
        assert_eq!(uneven.suggestion().unwrap(), uneven.points[13].lr);
    }

    #[test]
    fn why_there_is_no_suggestion() {
        let error = |smoothed: &[f64]| finding(smoothed, |_| 0.5).suggestion().unwrap_err().to_string();
        assert_eq!(error(&[]), "the loss was not finite in the first step: there is nothing to suggest from");
        assert_eq!(
            error(&[1.; 15]),
            "the test ended after 15 steps, too few to suggest a learning rate (16 are needed): take more steps, or \
             start from a rate below 3.2e-6 if the loss exploded"
        );
        assert_eq!(
            error(&[1.; 17]),
            "the loss never fell between the learning rates 3.2e-6 and 3.2e2: try others, or see whether the model \
             learns at all"
        );
    }

    /// What a recorder hands out of these losses, with beta 0.5, and after how many it stops.
    fn record(losses: &[f64]) -> (Vec<LrPoint>, Option<usize>) {
        let (points, receiver) = channel();
        let config = LrFinderConfig { steps: 5, min_lr: 1e-4, max_lr: 1., beta: 0.5 };
        let losses_of = vec!["loss/a".into(), "loss/b".into()];
        let mut recorder = Recorder { config, losses: losses_of, average: 0., lowest: f64::INFINITY, points };
        let mut stops = |(i, loss): (usize, &f64)| {
            let metrics =
                [("loss/a".into(), loss - 0.25), ("loss/b".into(), 0.25), ("other".into(), 9.)].into();
            let mut record = Record { step: i as u64 + 1, epoch: 0, split: Split::Train, metrics };
            recorder.on_train_metrics(&mut record).unwrap() != Flow::Continue
        };
        let stop = losses.iter().enumerate().position(&mut stops).map(|i| i + 1);
        (receiver.try_iter().collect(), stop)
    }

    #[test]
    fn losses_are_smoothed_and_an_explosion_ends_the_test() {
        let (points, stop) = record(&[1., 2., 4., 4., 9., 9.]);
        // The averages 0.5, 1.25, 2.625, 3.3125, 6.15625 over 1/2, 3/4, 7/8, 15/16, 31/32.
        let smoothed = [1., 5. / 3., 3., 53. / 15., 197. / 31.];
        assert_eq!((points.len(), stop), (5, Some(5)));
        for ((i, point), smoothed) in points.iter().enumerate().zip(smoothed) {
            assert!((point.smoothed - smoothed).abs() < 1e-12, "{point:?} is not {smoothed}");
            assert!((point.lr / 10f64.powi(i as i32 - 4) - 1.).abs() < 1e-12, "{point:?}");
        }
        assert_eq!(points[2].loss, 4.);
        let (points, stop) = record(&[1., f64::NAN, 1.]);
        assert_eq!((points.len(), stop), (1, Some(2)));
        // Below zero, too, growth is an explosion, and a fall is none.
        assert_eq!(record(&[-1., -2., -30., -40.]).1, None);
        assert_eq!(record(&[-1., -1., 6., 6.]).1, Some(3));
    }

    #[test]
    fn what_cannot_be_tested_is_refused() {
        let error = |config: LrFinderConfig| config.check().unwrap_err().to_string();
        let default = LrFinderConfig::default;
        assert_eq!(error(LrFinderConfig { steps: 1, ..default() }), "`steps`: expected at least 2, found 1");
        assert_eq!(
            error(LrFinderConfig { min_lr: 0., ..default() }),
            "`min_lr`: expected a number above 0, found 0"
        );
        assert_eq!(
            error(LrFinderConfig { max_lr: 1e-9, ..default() }),
            "`max_lr`: expected a number above `min_lr`, which is 0.00000001; found 0.000000001"
        );
        assert!(error(LrFinderConfig { beta: 1., ..default() }).starts_with("`beta`: "));
    }
}
