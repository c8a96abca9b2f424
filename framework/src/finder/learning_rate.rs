//! The learning-rate range test (Smith 2017, "Cyclical Learning Rates for Training Neural Networks", section 3.3).

use std::sync::mpsc::{Sender, channel};

use indexmap::IndexMap;
use serde::Serialize;

use crate::batch::Batch;
use crate::callback::{Callback, Flow, Record, StopReason};
use crate::data::Data;
use crate::error::{Error, Result};
use crate::module::Model;
use crate::optim::NamedOptimizer;
use crate::plot::{Axis, Plot};
use crate::schedule::Schedule;
use crate::trainer::Trainer;

/// Minimum number of steps for a suggestion.
const FEWEST: usize = 16;
/// A fall stands out from noise if it is this many times its standard error. In simulated tests of pure
/// noise, such a fall occurs somewhere in 2 % of those with 100 steps and 1 % of those with 400; with 30
/// steps, in 9 %.
const CLEAR: f64 = 4.;
/// The test ends when the smoothed loss reaches this many times its lowest value.
const EXPLODED: f64 = 4.;

/// Settings of the learning-rate test.
#[derive(Debug, Clone, PartialEq)]
pub struct LrFinderConfig {
    /// Optimizer steps, each with its own learning rate.
    pub steps: u64,
    /// Learning rate of the first step.
    pub min_lr: f64,
    /// Learning rate of the last step. Each rate is larger than the previous one by the same factor.
    pub max_lr: f64,
    /// Share of the old exponential average of the loss that is kept in each step. The test ends when the
    /// average reaches four times its lowest value.
    pub beta: f64,
}

/// One step of the test.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct LrPoint {
    /// The learning rate; that of the first optimizer if there are several.
    pub lr: f64,
    /// The step's loss, summed over all optimizers.
    pub loss: f64,
    /// The loss without most of the noise: the value at this point of a straight line through the nearby
    /// losses, over the logarithm of the rate. Unlike an average over the past, it does not lag behind.
    /// Losses in an explosion are capped at the highest loss of the first half.
    pub smoothed: f64,
}

/// The result of the test.
#[derive(Debug, Clone, Serialize)]
pub struct LrFinding {
    /// The steps, until the loss reached four times its lowest value or was not finite.
    pub points: Vec<LrPoint>,
    /// Every configured learning rate divided by the first optimizer's, by the name of the optimizer, and of
    /// the parameter group if it has its own rate. The test changes all rates in these proportions.
    pub proportions: IndexMap<String, f64>,
}

impl Default for LrFinderConfig {
    fn default() -> Self {
        Self { steps: 400, min_lr: 1e-8, max_lr: 1., beta: 0.98 }
    }
}

impl LrFinderConfig {
    /// Refuses invalid settings.
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
            let message = format!("expected a number in [0, 1); found {beta}");
            return Err(Error::setting("beta", message));
        }
        Ok(())
    }

    /// Multiplies the rate by the same factor in each step.
    fn schedule(&self) -> Schedule {
        Schedule::Exponential { gamma: (self.max_lr / self.min_lr).powf(1. / (self.steps - 1) as f64) }
    }
}

impl Trainer {
    /// Trains some steps with a learning rate that grows from almost zero until the loss explodes, to see
    /// where it falls fastest (Smith 2017, section 3.3).
    ///
    /// Starts from the model's current weights, restores them afterwards, and leaves this trainer unchanged.
    /// With several optimizers or groups, all rates grow in proportion.
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
        model.params().put_back_after(|| trial.fit_as_far_as_it_goes(model, data))?;
        Ok(LrFinding::new(&receiver.try_iter().collect::<Vec<_>>(), proportions(&self.turns, first)))
    }
}

/// Sends the learning rate and loss of each step; ends the test when the loss explodes.
struct Recorder {
    config: LrFinderConfig,
    /// The names of the losses to sum.
    losses: Vec<String>,
    /// Before bias correction.
    average: f64,
    lowest: f64,
    points: Sender<(f64, f64)>,
}

impl Callback for Recorder {
    fn on_train_metrics(&mut self, record: &mut Record) -> Result<Flow> {
        let losses = self.losses.iter().map(|name| record.metrics.get(name));
        // An epoch's metrics may come without these.
        let Some(loss) = losses.sum::<Option<f64>>() else { return Ok(Flow::Continue) };
        if !loss.is_finite() {
            return Ok(Flow::Stop(StopReason::Callback("the loss is not finite".into())));
        }
        let LrFinderConfig { beta, min_lr, .. } = self.config;
        self.average = beta * self.average + (1. - beta) * loss;
        // Bias correction: the first averages would be too close to zero (Kingma and Ba 2015, section 3).
        let smoothed = self.average / (1. - beta.powi(record.step as i32));
        let lr = self.config.schedule().at(record.step - 1, min_lr).lr;
        // The receiver is gone only if the test has failed.
        let _ = self.points.send((lr, loss));
        self.lowest = self.lowest.min(smoothed);
        // This also detects growth of a negative loss.
        if smoothed > self.lowest + (EXPLODED - 1.) * self.lowest.abs() {
            return Ok(Flow::Stop(StopReason::Callback("the loss explodes".into())));
        }
        Ok(Flow::Continue)
    }
}

fn proportions(turns: &[NamedOptimizer], first: f64) -> IndexMap<String, f64> {
    let rates = turns.iter().flat_map(|turn| {
        let own = (turn.name.clone(), turn.optimizer.lr());
        let of_group =
            |group: &crate::optim::ParamGroup| Some((format!("{}: {}", turn.name, group.params), group.lr?));
        [own].into_iter().chain(turn.groups.iter().filter_map(of_group))
    });
    rates.map(|(name, lr)| (name, lr / first)).collect()
}

impl LrFinding {
    fn new(losses: &[(f64, f64)], proportions: IndexMap<String, f64>) -> Self {
        let lines = lines(losses).into_iter().zip(losses);
        let points =
            lines.map(|(line, &(lr, loss))| LrPoint { lr, loss, smoothed: line.at(lr.ln()) }).collect();
        Self { points, proportions }
    }

    fn losses(&self) -> Vec<(f64, f64)> {
        self.points.iter().map(|point| (point.lr, point.loss)).collect()
    }

    /// The learning rate at which the loss falls fastest over the rate's logarithm, or why there is none.
    pub fn suggestion(&self) -> Result<f64> {
        Ok(self.steepest()?.lr)
    }

    fn steepest(&self) -> Result<LrPoint> {
        let (Some(first), Some(last)) = (self.points.first(), self.points.last()) else {
            return Err(Error::msg(
                "the loss was not finite in the first step: there is nothing to suggest from",
            ));
        };
        let steps = self.points.len();
        if steps < FEWEST {
            return Err(Error::msg(format!(
                "the test ended after {steps} steps, too few to suggest a learning rate ({FEWEST} are needed): take \
                 more steps, or start from a rate below {:.1e} if the loss exploded",
                first.lr
            )));
        }
        // At the edges there are too few points on one side.
        let inside = reach(steps)..steps - reach(steps);
        let lines = self.points.iter().zip(lines(&self.losses())).take(inside.end).skip(inside.start);
        let falling = lines.filter(|(_, line)| line.slope < 0. && -line.slope >= CLEAR * line.error);
        let steepest = falling.min_by(|a, b| a.1.slope.total_cmp(&b.1.slope));
        steepest.map(|(point, _)| *point).ok_or_else(|| {
            Error::msg(format!(
                "the loss never fell clearly between the learning rates {:.1e} and {:.1e}: if it falls at all, noise hides it. Take more steps, for example {}, or check that the model learns",
                first.lr,
                last.lr,
                4 * steps
            ))
        })
    }

    /// Plots the loss over the learning rate, with the suggestion marked.
    pub fn plot(&self) -> Plot {
        let losses = self.losses();
        let (low, high) = (lowest(&losses), highest_before_explosion(&losses));
        let mut y = Axis::linear("loss");
        if high > low {
            // The losses of the explosion would flatten the interesting part.
            let room = 0.05 * (high - low);
            y = y.range(low - room..high + 3. * room);
        }
        let plot = Plot::new("Learning-rate test", Axis::log("learning rate"), y)
            .faint_line("each step", self.points.iter().map(|point| (point.lr, point.loss)))
            .line("smoothed", self.points.iter().map(|point| (point.lr, point.smoothed)));
        match self.steepest() {
            Ok(point) => plot.mark((point.lr, point.smoothed), format!("falls fastest at {:.1e}", point.lr)),
            Err(_) => plot,
        }
    }
}

fn lowest(losses: &[(f64, f64)]) -> f64 {
    losses.iter().map(|(_, loss)| *loss).fold(f64::INFINITY, f64::min)
}

/// The highest loss of the first half: a loss that falls at all explodes later.
fn highest_before_explosion(losses: &[(f64, f64)]) -> f64 {
    losses[..losses.len().div_ceil(2)].iter().map(|(_, loss)| *loss).fold(f64::NEG_INFINITY, f64::max)
}

/// Number of points before a point, and after it, that are near: a tenth of all, at least three.
fn reach(points: usize) -> usize {
    (points / 10).max(3)
}

/// The least-squares line through points.
#[derive(Debug)]
struct Line {
    x: f64,
    y: f64,
    slope: f64,
    /// The slope's standard error.
    error: f64,
}

/// For each point (learning rate, loss), the line through the nearby points, over the logarithm of the rate.
fn lines(losses: &[(f64, f64)]) -> Vec<Line> {
    let (highest, reach) = (highest_before_explosion(losses), reach(losses.len()));
    let capped: Vec<(f64, f64)> = losses.iter().map(|(lr, loss)| (lr.ln(), loss.min(highest))).collect();
    let near = |i: usize| &capped[i.saturating_sub(reach)..(i + reach + 1).min(capped.len())];
    (0..capped.len()).map(|i| Line::through(near(i))).collect()
}

impl Line {
    fn through(points: &[(f64, f64)]) -> Self {
        let n = points.len() as f64;
        let sum = |term: &dyn Fn(f64, f64) -> f64| points.iter().map(|&(x, y)| term(x, y)).sum::<f64>();
        let (x, y) = (sum(&|x, _| x) / n, sum(&|_, y| y) / n);
        let width = sum(&|xi, _| (xi - x).powi(2));
        let slope = if width > 0. { sum(&|xi, yi| (xi - x) * (yi - y)) / width } else { 0. };
        let off = sum(&|xi, yi| (yi - y - slope * (xi - x)).powi(2));
        Self { x, y, slope, error: (off / (n - 2.) / width).sqrt() }
    }

    fn at(&self, x: f64) -> f64 {
        self.y + self.slope * (x - self.x)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::Split;

    /// A finding with these losses, at rates that rise from 1e-6 by a fifth of a decade each.
    fn finding(losses: &[f64]) -> LrFinding {
        let rates = (0..).map(|i| 10f64.powf(-6. + 0.2 * i as f64));
        LrFinding::new(&rates.zip(losses.iter().copied()).collect::<Vec<_>>(), IndexMap::new())
    }

    #[test]
    fn a_line_by_hand() {
        // The means are 4/3 and 2; the points are off the line by -1/7, 3/14 and -1/14.
        let line = Line::through(&[(0., 1.), (1., 2.), (3., 3.)]);
        let expected = [9. / 14., 3f64.sqrt() / 14., 2. - 4. / 3. * 9. / 14.];
        for (found, expected) in [line.slope, line.error, line.at(0.)].into_iter().zip(expected) {
            assert!((found - expected).abs() < 1e-12, "{line:?}");
        }
    }

    #[test]
    fn the_steepest_fall_by_hand() {
        // Falls from 5 to 1, symmetrically around point 15. Over seven points the slope is the sum of -3y,
        // -2y, ... 3y over 28; the sum is -19.8 around point 15, -18.2 around its neighbors.
        let mut losses = vec![5.; 12];
        losses.extend([4.9, 4.6, 4., 3., 2., 1.4, 1.1, 1., 1., 1., 1., 1., 1., 2., 4., 8.]);
        let found = finding(&losses);
        assert_eq!(found.suggestion().unwrap(), found.points[15].lr);
        assert!((found.points[15].lr / 1e-3 - 1.).abs() < 1e-9);
        // The line around point 15 passes through the mean, 3.
        assert!((found.points[15].smoothed - 3.).abs() < 1e-12);
        // A single step with a deeper fall is noise.
        losses[8] = -10.;
        let noisy = finding(&losses);
        assert_eq!(noisy.suggestion().unwrap(), noisy.points[15].lr);
        let plot = found.plot().svg().unwrap();
        assert!(plot.contains("falls fastest at 1.0e-3"), "{plot}");
    }

    #[test]
    fn why_there_is_no_suggestion() {
        let error = |losses: &[f64]| finding(losses).suggestion().unwrap_err().to_string();
        assert_eq!(error(&[]), "the loss was not finite in the first step: there is nothing to suggest from");
        assert_eq!(
            error(&[1.; 15]),
            "the test ended after 15 steps, too few to suggest a learning rate (16 are needed): take more steps, or \
             start from a rate below 1.0e-6 if the loss exploded"
        );
        let never = "the loss never fell clearly between the learning rates 1.0e-6 and 1.0e-2: if it falls at all, noise hides it. Take more steps, for example 84, or check that the model learns";
        assert_eq!(error(&[1.; 21]), never);
        // Falls by 0.02 in each step, and jumps up and down by 1.
        let noisy: Vec<f64> = (0..21).map(|i| 0.5 * (-1f64).powi(i) - 0.02 * i as f64).collect();
        assert_eq!(error(&noisy), never);
        assert!(finding(&noisy).plot().svg().is_ok());
    }

    /// The points that a recorder sends for these losses, with beta 0.5, and after how many losses it stops.
    fn record(losses: &[f64]) -> (Vec<(f64, f64)>, Option<usize>) {
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
    fn an_explosion_ends_the_test() {
        // The averages 0.5, 1.25, 2.625, 3.3125, 6.15625 over 1/2, 3/4, 7/8, 15/16, 31/32: 1, 1.7, 3, 3.5, 6.4.
        let (points, stop) = record(&[1., 2., 4., 4., 9., 9.]);
        assert_eq!((points.len(), stop), (5, Some(5)));
        for (i, (lr, loss)) in points.iter().enumerate() {
            assert!((lr / 10f64.powi(i as i32 - 4) - 1.).abs() < 1e-12, "{points:?}");
            assert_eq!(*loss, [1., 2., 4., 4., 9.][i]);
        }
        let (points, stop) = record(&[1., f64::NAN, 1.]);
        assert_eq!((points.len(), stop), (1, Some(2)));
        // Below zero, growth is an explosion too, and a fall is not.
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
