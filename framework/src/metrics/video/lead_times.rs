//! Scores by lead time, of a module and of predictors that learn nothing.

use std::fmt;
use std::path::Path;
use std::sync::Arc;

use candle_core::{DType, Tensor};
use indexmap::{IndexMap, IndexSet};
use serde_json::json;

use super::ssim::SIDE;
use super::{Contingency, Pair, PerFrame, Pixels};
use crate::atomic_file::write_atomic;
use crate::batch::{Quantity, Threshold, Video};
use crate::data::{Dataset, Order, Pass, sequential_batches};
use crate::error::{Error, Result};
use crate::plot::{Axis, Plot};

/// Number of training samples for the per-pixel mean; more are not needed.
const MEAN_SAMPLES: usize = 256;
const MEAN_BATCH: usize = 32;

/// A predictor's scores on held-out videos.
#[derive(Debug, Clone, PartialEq)]
pub struct Predictor {
    /// Its name, for example `copy last frame`.
    pub name: &'static str,
    /// Its mean squared error, as in [`Video::mse`].
    pub mse: f64,
    /// Its scores for each predicted frame, in order, by the names listed in [`LeadTimes`].
    pub frames: Vec<IndexMap<String, f64>>,
}

/// Scores by lead time of a module and of predictors that learn nothing, on the same videos.
///
/// | score | meaning |
/// |---|---|
/// | `mse`, `mae` | mean over pixels |
/// | `mse_sum`, `mae_sum` | sum over the pixels of a frame, as the published Moving MNIST tables print |
/// | `psnr` | in dB, for a peak of 1 |
/// | `ssim_range_1`, `ssim_range_2` | structural similarity with that data range; papers after OpenSTL print range 2 |
/// | `csi_X`, `pod_X`, `far_X`, `hss_X` | for the event that the quantity reaches X, from [`Contingency`] counts of all frames |
///
/// All but the last are means over frames. Undefined scores (similarity of frames smaller than its window, an
/// event that never occurred) are omitted.
#[derive(Debug, Clone, PartialEq)]
pub struct LeadTimes {
    /// The quantity that the frames show, if known.
    pub quantity: Option<Arc<Quantity>>,
    /// The module; `None` if it does not predict.
    pub module: Option<Predictor>,
    /// `zeros`, `copy last frame` (persistence: the last input frame, repeated) and `per-pixel mean`, in this
    /// order.
    pub baselines: Vec<Predictor>,
}

/// The name of the module itself.
const MODULE: &str = "this model";
const PERSISTENCE: &str = "copy last frame";
const BASELINES: [&str; 3] = ["zeros", PERSISTENCE, "per-pixel mean"];

/// Scores the predictions of `predict` for every sample of `held_out`, `batch_size` samples at a time, and
/// those of predictors that learn nothing. `None` if either dataset is empty.
///
/// The per-pixel mean is one image (C, H, W) for all times: the mean of the target frames of the first 256
/// samples of epoch 0 in the training order of the pass's seed. If `predict` fails, a warning is logged and its scores
/// are omitted, because at the end of a training this must not hide the other results.
pub fn compare(
    predict: &mut dyn FnMut(&Video) -> Result<Tensor>,
    train: &dyn Dataset<Batch = Video>,
    held_out: &dyn Dataset<Batch = Video>,
    pass: Pass,
    batch_size: usize,
) -> Result<Option<LeadTimes>> {
    if train.is_empty() || held_out.is_empty() {
        return Ok(None);
    }
    let mean = mean_frame(train, pass.seed)?;
    let mut module = Some(Sums::default());
    let mut baselines: [Sums; 3] = Default::default();
    let mut quantity = None;
    for samples in sequential_batches(pass, held_out.len(), batch_size.max(1)) {
        let batch = held_out.batch(&samples)?;
        if let Some(sums) = &mut module {
            let added = predict(&batch).and_then(|prediction| sums.add(&batch, &prediction));
            if let Err(error) = added {
                tracing::warn!("this model has no scores by lead time: {error}");
                module = None;
            }
        }
        let Video { input, target, .. } = &batch;
        let last = input.narrow(1, input.dim(1)? - 1, 1)?;
        let predictions = [target.zeros_like()?, last, mean.to_dtype(target.dtype())?];
        for (sums, prediction) in baselines.iter_mut().zip(&predictions) {
            sums.add(&batch, &prediction.broadcast_as(target.shape())?)?;
        }
        quantity = batch.quantity;
    }
    let read = |name, sums: Sums| sums.read(name, quantity.as_deref());
    Ok(Some(LeadTimes {
        module: module.map(|sums| read(MODULE, sums)),
        baselines: BASELINES.into_iter().zip(baselines).map(|(name, sums)| read(name, sums)).collect(),
        quantity: quantity.clone(),
    }))
}

/// The mean of the known pixels of the target frames, (C, H, W); 0 for pixels that are never known.
fn mean_frame(train: &dyn Dataset<Batch = Video>, seed: u64) -> Result<Tensor> {
    let order = Order::new(seed, train.len(), MEAN_BATCH);
    let mut sums: Option<(Tensor, Tensor)> = None;
    for (samples, _) in order.epoch(0).take(MEAN_SAMPLES / MEAN_BATCH) {
        let batch = train.batch(&samples)?;
        let target = batch.target.to_dtype(DType::F64)?;
        let known = match batch.last(target.dim(1)?)?.1 {
            Some(mask) => mask.to_dtype(DType::F64)?.broadcast_as(target.shape())?,
            None => target.ones_like()?,
        };
        let (sum, count) = ((target * &known)?.sum((0, 1))?, known.sum((0, 1))?);
        sums = Some(match sums {
            Some((sums, counts)) => ((sums + sum)?, (counts + count)?),
            None => (sum, count),
        });
    }
    let (sum, count) = sums.ok_or_else(|| Error::msg("there are no frames to average"))?;
    Ok((sum / count.maximum(1.)?)?)
}

/// Running sums of scores.
#[derive(Default)]
struct Sums {
    /// [`Video::mse`], over samples.
    mse: Mean,
    /// Scores by name, for each lead time.
    frames: Vec<IndexMap<String, Mean>>,
    /// Counts per threshold, for each lead time.
    events: Vec<Vec<Contingency>>,
}

#[derive(Default)]
struct Mean {
    sum: f64,
    count: f64,
}

impl Mean {
    fn read(&self) -> f64 {
        self.sum / self.count
    }
}

impl Sums {
    fn add(&mut self, batch: &Video, prediction: &Tensor) -> Result<()> {
        let (samples, times, channels, height, width) = batch.target.dims5()?;
        let mask = batch.last(times)?.1;
        let pair = Pair::new(prediction, &batch.target)?.masked(mask.as_ref())?;
        self.frames.resize_with(times, IndexMap::new);
        self.events.resize_with(times, Vec::new);

        let exact = Video { target: batch.target.to_dtype(DType::F64)?, ..batch.clone() };
        let whole = exact.mse(&prediction.to_dtype(DType::F64)?)?.to_scalar::<f64>()?;
        self.mse.sum += whole * samples as f64;
        self.mse.count += samples as f64;

        let pixels = (channels * height * width) as f64;
        let errors =
            [("mse", pair.error(Pixels::Mean, |e| e * e)), ("mae", pair.error(Pixels::Mean, f64::abs))];
        for (name, frames) in errors {
            self.note(name, &frames, 1.);
            // With unknown pixels, extrapolates the mean over the known ones to the whole frame.
            self.note(&format!("{name}_sum"), &frames, pixels);
        }
        let levels = batch.quantity.iter().flat_map(|quantity| &quantity.thresholds);
        for (i, threshold) in levels.enumerate() {
            for (frame, counts) in pair.contingency(threshold.level).into_iter().enumerate() {
                let events = &mut self.events[frame % times];
                events.resize(events.len().max(i + 1), Contingency::default());
                events[i] += counts;
            }
        }
        let pair = pair.clipped();
        self.note("psnr", &pair.psnr(), 1.);
        if height.min(width) >= SIDE {
            self.note("ssim_range_1", &pair.ssim(1.)?, 1.);
            self.note("ssim_range_2", &pair.ssim(2.)?, 1.);
        }
        Ok(())
    }

    /// Adds a score of each frame that has one, multiplied by `factor`.
    fn note(&mut self, name: &str, scores: &PerFrame, factor: f64) {
        let times = self.frames.len();
        for (i, value) in scores.values.iter().enumerate().filter(|(_, value)| !value.is_nan()) {
            let mean = self.frames[i % times].entry(name.to_string()).or_default();
            mean.sum += value * factor;
            mean.count += 1.;
        }
    }

    fn read(self, name: &'static str, quantity: Option<&Quantity>) -> Predictor {
        let scores = |(means, events): (IndexMap<String, Mean>, Vec<Contingency>)| {
            let mut scores: IndexMap<String, f64> =
                means.into_iter().map(|(name, mean)| (name, mean.read())).collect();
            let thresholds = quantity.map_or(&[][..], |quantity| &quantity.thresholds);
            for (threshold, counts) in thresholds.iter().zip(&events) {
                let all = [
                    ("csi", counts.csi()),
                    ("pod", counts.pod()),
                    ("far", counts.far()),
                    ("hss", counts.hss()),
                ];
                let known = all.into_iter().filter_map(|(name, score)| Some((name, score?)));
                scores.extend(known.map(|(name, score)| (format!("{name}_{}", threshold.value), score)));
            }
            scores
        };
        let frames = self.frames.into_iter().zip(self.events).map(scores).collect();
        Predictor { name, mse: self.mse.read(), frames }
    }
}

impl LeadTimes {
    /// The module, if it predicts, followed by the baselines.
    pub fn predictors(&self) -> impl Iterator<Item = &Predictor> {
        self.module.iter().chain(&self.baselines)
    }

    /// The names of all scores.
    pub fn scores(&self) -> Vec<&str> {
        let names = self.predictors().flat_map(|predictor| &predictor.frames).flat_map(IndexMap::keys);
        names.map(String::as_str).collect::<IndexSet<_>>().into_iter().collect()
    }

    /// The lead time of predicted frame `i`, from 0: in minutes if the data specifies the frame interval,
    /// otherwise in frames.
    fn ahead(&self, i: usize) -> f64 {
        (i + 1) as f64 * self.quantity.as_ref().map_or(1., |quantity| quantity.minutes)
    }

    fn unit(&self) -> &'static str {
        if self.quantity.is_some() { "minutes" } else { "frames" }
    }

    /// Plots a score against the lead time, with one line per predictor.
    pub fn plot(&self, score: &str) -> Plot {
        let what = match (&self.quantity, score.split_once('_')) {
            (Some(quantity), Some((name @ ("csi" | "pod" | "far" | "hss"), threshold))) => {
                format!("{} at {threshold} {}", name.to_uppercase(), quantity.unit)
            }
            _ => score.replace('_', " "),
        };
        let axes = (Axis::linear(format!("lead time, {}", self.unit())), Axis::linear(what.clone()));
        let plot = Plot::new(format!("{what} by lead time"), axes.0, axes.1);
        self.predictors().fold(plot, |plot, predictor| {
            let points = predictor.frames.iter().enumerate();
            let points = points.filter_map(|(i, scores)| Some((self.ahead(i), *scores.get(score)?)));
            plot.line(predictor.name, points)
        })
    }

    /// Creates a folder and writes into it a plot of each score (`mse.svg` and so on) and all numbers
    /// (`scores.json`).
    pub fn save(&self, dir: &Path) -> Result<()> {
        std::fs::create_dir_all(dir).map_err(Error::file(dir))?;
        for score in self.scores() {
            // A score that is infinite for all predictors can be written but not drawn.
            let drawable = self
                .predictors()
                .flat_map(|p| &p.frames)
                .any(|s| s.get(score).is_some_and(|v| v.is_finite()));
            if drawable {
                self.plot(score).save(&dir.join(format!("{score}.svg")))?;
            }
        }
        let lead_times = |predictor: &Predictor| -> Vec<f64> {
            (0..predictor.frames.len()).map(|i| self.ahead(i)).collect()
        };
        let predictors = self.predictors().map(|predictor| {
            let content = json!({"mse": predictor.mse, "frames": predictor.frames});
            (predictor.name.to_string(), content)
        });
        let all = json!({
            "unit": self.unit(),
            "lead_times": self.baselines.first().map(lead_times),
            "predictors": predictors.collect::<serde_json::Map<_, _>>(),
        });
        write_atomic(&dir.join("scores.json"), format!("{all:#}\n").as_bytes())
    }
}

/// One row per lead time, comparing the module with persistence.
impl fmt::Display for LeadTimes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let persistence = self.baselines.iter().find(|predictor| predictor.name == PERSISTENCE);
        let (Some(module), Some(persistence)) = (&self.module, persistence) else { return Ok(()) };
        let csi = self.quantity.iter().flat_map(|quantity| {
            let column =
                |t: &Threshold| (format!("csi_{}", t.value), format!("CSI {} {}", t.value, quantity.unit), 3);
            quantity.thresholds.iter().map(column)
        });
        let columns = [("psnr", "PSNR", 2), ("ssim_range_1", "SSIM, range 1", 3)];
        let columns = columns.map(|(score, title, digits)| (score.to_string(), title.to_string(), digits));
        let known = |score: &str| module.frames.iter().any(|scores| scores.contains_key(score));
        let columns: Vec<_> = columns.into_iter().chain(csi).filter(|(score, ..)| known(score)).collect();

        write!(f, "{:>8}  {:>17}  {:>8}", self.unit(), "MSE", "change")?;
        columns.iter().try_for_each(|(_, title, _)| write!(f, "  {title:>15}"))?;
        for (i, (ours, theirs)) in module.frames.iter().zip(&persistence.frames).enumerate() {
            write!(f, "\n{:>8}", self.ahead(i))?;
            let get =
                |scores: &IndexMap<String, f64>, name: &str| scores.get(name).copied().unwrap_or(f64::NAN);
            let (mse, other) = (get(ours, "mse"), get(theirs, "mse"));
            let pair = format!("{mse:.5} / {other:.5}");
            write!(f, "  {pair:>17}  {:>+6.1} %", 100. * (mse / other - 1.))?;
            for (score, _, digits) in &columns {
                let pair = format!("{:.*} / {:.*}", digits, get(ours, score), digits, get(theirs, score));
                write!(f, "  {pair:>15}")?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use candle_core::Device;

    use super::super::ssim;
    use super::*;
    use crate::batch::VideoSpec;
    use crate::data::Sample;
    use crate::data::Split;

    const SPEC: VideoSpec = VideoSpec { frames_in: 2, frames_out: 3, channels: 1, height: 1, width: 2 };

    /// Sample i: input frames of 0 and then `last`; target frames whose two pixels are 0 and i / (len - 1).
    struct Ramp {
        len: usize,
        last: f32,
    }

    impl Dataset for Ramp {
        type Batch = Video;

        fn len(&self) -> usize {
            self.len
        }

        fn spec(&self) -> VideoSpec {
            SPEC
        }

        fn batch(&self, samples: &[Sample]) -> Result<Video> {
            let bright = |sample: &Sample| sample.index as f32 / (self.len - 1).max(1) as f32;
            let input: Vec<f32> = samples.iter().flat_map(|_| [0., 0., self.last, self.last]).collect();
            let target: Vec<f32> = samples.iter().flat_map(|s| [0., bright(s)].repeat(3)).collect();
            let tensor =
                |values, frames| Tensor::from_vec(values, (samples.len(), frames, 1, 1, 2), &Device::Cpu);
            Ok(Video::new(tensor(input, 2)?, tensor(target, 3)?))
        }
    }

    /// Predicts the target, slightly too bright.
    fn nearly(batch: &Video) -> Result<Tensor> {
        Ok((&batch.target + 0.25)?)
    }

    fn pass(seed: u64) -> Pass {
        Pass::evaluation(Split::Val, seed)
    }

    fn compared(train: &Ramp, val: &Ramp) -> LeadTimes {
        compare(&mut |batch| nearly(batch), train, val, pass(5), 32).unwrap().unwrap()
    }

    #[test]
    fn every_held_out_sample_counts_once() {
        // 41 samples: one full batch and a short one, in training and in validation.
        let found = compared(&Ramp { len: 41, last: 0.9 }, &Ramp { len: 41, last: 1. });
        let values: Vec<f64> = (0..41).map(|i| f64::from(i) / 40.).collect();
        let expect = |left: f64, right: f64| {
            values.iter().map(|v| (left * left + (right - v).powi(2)) / 2.).sum::<f64>() / 41.
        };
        let names: Vec<_> = found.predictors().map(|predictor| predictor.name).collect();
        assert_eq!(names, ["this model", "zeros", "copy last frame", "per-pixel mean"]);
        let expected = [0.25 * 0.25, expect(0., 0.), expect(1., 1.), expect(0., 0.5)];
        for (predictor, expected) in found.predictors().zip(expected) {
            assert!((predictor.mse - expected).abs() < 1e-7, "{predictor:?}, expected {expected}");
            // All times are equal here. The frames are too small for SSIM and have no quantity.
            assert_eq!(predictor.frames.len(), 3);
            for scores in &predictor.frames {
                assert!(
                    (scores["mse"] - expected).abs() < 1e-7
                        && (scores["mse_sum"] - 2. * expected).abs() < 1e-6
                );
                let names: Vec<_> = scores.keys().collect();
                assert_eq!(names, ["mse", "mse_sum", "mae", "mae_sum", "psnr"]);
            }
        }
        assert!((found.module.unwrap().frames[0]["mae"] - 0.25).abs() < 1e-7);
    }

    #[test]
    fn nothing_to_compare_with_gives_nothing() {
        let (some, none) = (Ramp { len: 1, last: 0. }, Ramp { len: 0, last: 0. });
        for (train, val) in [(&some, &none), (&none, &some)] {
            assert_eq!(compare(&mut |batch| nearly(batch), train, val, pass(0), 32).unwrap(), None);
        }
    }

    #[test]
    fn a_module_that_does_not_predict_is_left_out() {
        let ramp = Ramp { len: 3, last: 0. };
        let found = compare(&mut |_| Err(Error::msg("no")), &ramp, &ramp, pass(0), 2).unwrap().unwrap();
        assert_eq!((found.module.is_none(), found.baselines.len()), (true, 3));
        assert_eq!(found.to_string(), "");
    }

    /// One 8x8 input frame and two target frames, in mm/h. It rains in the first half of the second target
    /// frame, whose last row is unknown.
    struct Rain;

    impl Dataset for Rain {
        type Batch = Video;

        fn len(&self) -> usize {
            1
        }

        fn spec(&self) -> VideoSpec {
            VideoSpec { frames_in: 1, frames_out: 2, channels: 1, height: 8, width: 8 }
        }

        fn batch(&self, _: &[Sample]) -> Result<Video> {
            let tensor =
                |values: Vec<f32>, times| Tensor::from_vec(values, (1, times, 1, 8, 8), &Device::Cpu);
            let target = [[0.; 64], std::array::from_fn(|i| if i < 32 { 0.5 } else { 0. })].concat();
            let mask = (0..3 * 64).map(|i| if i >= 2 * 64 + 56 { 0. } else { 1. }).collect();
            let thresholds = vec![Threshold { value: 2., level: 0.5 }];
            Ok(Video {
                mask: Some(tensor(mask, 3)?),
                quantity: Some(Arc::new(Quantity { unit: "mm/h", thresholds, minutes: 5. })),
                ..Video::new(tensor(vec![0.75; 64], 1)?, tensor(target, 2)?)
            })
        }
    }

    #[test]
    fn events_are_scored_by_lead_time_where_something_is_known() {
        let found =
            compare(&mut |batch| Ok(batch.target.clone()), &Rain, &Rain, pass(0), 1).unwrap().unwrap();
        let persistence = &found.baselines[1].frames;
        // 32 of the 56 known pixels are hits; in the first frame there are no events.
        let scores =
            |i: usize| ["csi_2", "pod_2", "far_2", "hss_2"].map(|name| persistence[i].get(name).copied());
        assert_eq!(scores(0), [Some(0.), None, Some(1.), Some(0.)]);
        assert_eq!(scores(1), [Some(32. / 56.), Some(1.), Some(24. / 56.), Some(0.)]);
        assert_eq!(persistence[1]["mse"], (32. * 0.25 * 0.25 + 24. * 0.75 * 0.75) / 56.);
        let module = found.module.as_ref().unwrap();
        assert_eq!((module.frames[1]["csi_2"], module.frames[1]["psnr"]), (1., f64::INFINITY));
        assert!((module.frames[1]["ssim_range_1"] - 1.).abs() < 1e-12);

        let table = found.to_string();
        let rows: Vec<&str> = table.lines().collect();
        assert!(rows[0].contains("minutes") && rows[0].ends_with("CSI 2 mm/h"), "{table}");
        assert!(rows[2].trim_start().starts_with("10 ") && rows[2].ends_with("1.000 / 0.571"), "{table}");
        let folder = tempfile::tempdir().unwrap();
        found.save(&folder.path().join("scores")).unwrap();
        let read = |name: &str| std::fs::read_to_string(folder.path().join("scores").join(name)).unwrap();
        assert!(
            read("csi_2.svg").contains("CSI at 2 mm/h by lead time") && read("mse.svg").contains("minutes")
        );
        let json: serde_json::Value = serde_json::from_str(&read("scores.json")).unwrap();
        assert_eq!(json["lead_times"], json!([5., 10.]));
        assert_eq!(json["predictors"]["copy last frame"]["frames"][1]["pod_2"], 1.);
    }

    #[test]
    fn what_is_not_known_changes_no_score() {
        let tensor =
            |values: Vec<f32>, times| Tensor::from_vec(values, (1, times, 1, 10, 10), &Device::Cpu).unwrap();
        let value = |i: usize, scale: usize| (i * scale % 17) as f32 / 17.;
        let target = tensor((0..100).map(|i| value(i, 5)).collect(), 1);
        let mask = tensor((0..200).map(|i| if i % 10 < 2 && i >= 100 { 0. } else { 1. }).collect(), 2);
        let video = Video { mask: Some(mask), ..Video::new(target.clone(), target) };
        let scores = |unknown: f32| {
            let values = (0..100).map(|i| if i % 10 < 2 { unknown } else { value(i, 7) });
            let mut sums = Sums::default();
            sums.add(&video, &tensor(values.collect(), 1)).unwrap();
            sums.read("", None)
        };
        assert_eq!(scores(0.), scores(0.9));
        // The similarity is that of the known columns.
        let right = |scale| tensor((0..100).map(|i| value(i, scale)).collect(), 1).narrow(4, 2, 8).unwrap();
        let expected = ssim(&right(7), &right(5), 1.).unwrap().mean();
        assert!((scores(0.).frames[0]["ssim_range_1"] - expected).abs() < 1e-12);
    }
}
