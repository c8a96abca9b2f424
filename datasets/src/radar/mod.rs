//! Radar composites of past rain events, to forecast the next hour from the last minutes (nowcasting; X. Shi et al.,
//! "Convolutional LSTM Network: A Machine Learning Approach for Precipitation Nowcasting", NeurIPS 2015).

pub mod composite;
mod event;

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::{Device, Tensor};
use candlepower::batch::{Quantity, Threshold, Video, VideoSpec};
use candlepower::data::{Dataset, Open, Sample, Split};
use candlepower::error::{Error, Result};
use candlepower::video_file;
use event::Event;
use rayon::prelude::*;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::augment::{Augment, Change};
use crate::bytes::Bytes;
use crate::cache;
use crate::windows::Windows;

/// The fields of `[data]` for `name = "radar"`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Folder that holds one folder of composites per event.
    pub path: String,
    /// Training events, by the names of their folders.
    pub train_events: Vec<String>,
    /// Validation events.
    pub val_events: Vec<String>,
    /// Test events. Empty: the validation events.
    pub test_events: Vec<String>,
    /// Minutes from one composite to the next.
    pub minutes: usize,
    /// Number of input frames.
    pub frames_in: usize,
    /// Number of frames to predict.
    pub frames_out: usize,
    /// Frames from the start of one sample to the start of the next.
    pub stride: usize,
    /// Number of a sample's composites that may be missing. The loss ignores them; the input repeats the
    /// previous composite.
    pub max_missing: usize,
    /// Pixels along each side that are averaged into one.
    pub pool: usize,
    /// Rows and columns of a sample, in averaged pixels.
    pub crop: usize,
    /// Averaged pixels from one crop to the next, along rows and columns.
    pub crop_stride: usize,
    /// Minimum share of a sample's pixels, over all its frames, with rain of 0.1 mm/h or more.
    pub min_rain: f64,
    /// Rain rates in mm/h at which forecasts are scored.
    pub thresholds: Vec<f64>,
    /// Folder for caching decoded composites. Default: decode into memory every time.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cache: Option<PathBuf>,
    /// Random changes of training samples; `crop` moves crops by up to half of `crop_stride`.
    pub augment: Augment,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            path: String::new(),
            train_events: Vec::new(),
            val_events: Vec::new(),
            test_events: Vec::new(),
            minutes: 5,
            frames_in: 6,
            frames_out: 12,
            stride: 1,
            max_missing: 2,
            pool: 2,
            crop: 64,
            crop_stride: 32,
            min_rain: 0.2,
            thresholds: vec![0.5, 2., 5.],
            cache: None,
            augment: Augment::default(),
        }
    }
}

/// Composites decoded at once, before any of them is stored.
const AT_ONCE: usize = 64;
/// Minimum rate that counts as rain, in mm/h.
const SOME_RAIN: f32 = 0.1;

impl Config {
    fn windows(&self) -> Windows {
        Windows {
            frames_in: self.frames_in,
            frames_out: self.frames_out,
            stride: self.stride,
            every: 1,
            gap: 0,
        }
    }

    /// Rejects values that are wrong for any data.
    fn check(&self) -> Result<()> {
        self.windows().check()?;
        let least = [
            ("minutes", self.minutes),
            ("pool", self.pool),
            ("crop", self.crop),
            ("crop_stride", self.crop_stride),
        ];
        if let Some((key, _)) = least.into_iter().find(|(_, value)| *value == 0) {
            return Err(Error::setting(key, "expected at least 1, found 0"));
        }
        if !(0. ..=1.).contains(&self.min_rain) {
            return Err(Error::setting(
                "min_rain",
                format!("expected a fraction between 0 and 1, found {}", self.min_rain),
            ));
        }
        if let Some(rate) = self.thresholds.iter().find(|rate| !(rate.is_finite() && **rate > 0.)) {
            return Err(Error::setting(
                "thresholds",
                format!("expected rain rates above 0 mm/h, found {rate}"),
            ));
        }
        for (key, events) in [("train_events", &self.train_events), ("val_events", &self.val_events)] {
            if events.is_empty() {
                return Err(Error::setting(key, "expected the name of at least one folder of composites"));
            }
        }
        self.augment.check([self.crop; 2])
    }

    fn events(&self, split: Split) -> &[String] {
        match split {
            Split::Train => &self.train_events,
            Split::Test if !self.test_events.is_empty() => &self.test_events,
            Split::Val | Split::Test => &self.val_events,
        }
    }

    /// Lists the composites of a split's events.
    fn list(&self, split: Split) -> Result<Vec<Event>> {
        let open = |name: &String| Event::list(&Path::new(&self.path).join(name), self.minutes as i64);
        self.events(split).iter().map(open).collect()
    }

    /// Rejects events of different splits whose times overlap, whatever their names.
    fn check_apart(&self) -> Result<()> {
        let all = [("train_events", Split::Train), ("val_events", Split::Val), ("test_events", Split::Test)];
        let splits = if self.test_events.is_empty() { &all[..2] } else { &all[..] };
        let events = splits.iter().map(|(_, split)| self.list(*split)).collect::<Result<Vec<_>>>()?;
        for (i, (key, _)) in splits.iter().enumerate() {
            for (j, (other, _)) in splits.iter().enumerate().take(i) {
                let pairs = events[i].iter().flat_map(|a| events[j].iter().map(move |b| (a, b)));
                if let Some((a, b)) = pairs.into_iter().find(|(a, b)| a.overlaps(b)) {
                    let message = format!(
                        "{} has the same time as {} of `{other}`: no event may be in two splits",
                        a.path.display(),
                        b.path.display()
                    );
                    return Err(Error::setting(*key, message));
                }
            }
        }
        Ok(())
    }
}

/// Radar composites of rain events, as crops with enough rain.
///
/// Batches: input (B, T_in, 1, H, W) and target (B, T_out, 1, H, W), f32, on a logarithmic scale from 0 for
/// no rain to 1 for 100 mm/h or more ([`composite::to_value`]). `mask` is 0 where no radar covers a pixel and
/// where a composite is missing. `quantity` has the thresholds in mm/h.
pub struct Radar {
    spec: VideoSpec,
    config: Config,
    quantity: Arc<Quantity>,
    events: Vec<Event>,
    /// The palette indices of all composites, event by event.
    indices: Bytes,
    /// (rows, columns) of a composite.
    size: [usize; 2],
    places: Vec<Place>,
    /// Rain rates in mm/h by palette index; NaN where no radar covers the pixel.
    rates: [f32; 256],
}

/// The position of a sample: its event, its first frame, and its corner in averaged pixels, (row, column).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Place {
    event: usize,
    start: usize,
    corner: [usize; 2],
}

impl Open for Radar {
    type Config = Config;

    fn open(config: &Config, split: Split) -> Result<Self> {
        config.check()?;
        if !Path::new(&config.path).is_dir() {
            let message =
                format!("{}: no such folder; expected one with a folder for each event", config.path);
            return Err(Error::setting("path", message));
        }
        config.check_apart()?;
        let windows = config.windows();
        let mut events = config.list(split)?;
        let mut composites = 0;
        for event in &mut events {
            event.first = composites;
            composites += event.files.len();
            if event.slots.len() < windows.span() {
                return Err(Error::msg(format!(
                    "{}: its composites span {} times of {} minutes; expected at least {}, which a sample takes",
                    event.path.display(),
                    event.slots.len(),
                    config.minutes,
                    windows.span()
                )));
            }
        }
        let mut radar = Self::of(config, events)?;
        radar.places = radar.rainy_places(&windows)?;
        if radar.places.is_empty() {
            let message = format!(
                "no crop of the {} events has rain on {} of its pixels; expected a lower fraction",
                split.name(),
                config.min_rain
            );
            return Err(Error::setting("min_rain", message));
        }
        Ok(radar)
    }

    /// The first window of a folder of composites, at the crop with the most rain in the input. If the folder
    /// ends before the target does, **the target is zeros**, which are masked.
    fn read(config: &Config, _spec: &VideoSpec, input: &Path) -> Result<Video> {
        config.check()?;
        let mut event = Event::list(input, config.minutes as i64)?;
        let (times, span) = (event.slots.len(), config.windows().span());
        if times < config.frames_in {
            return Err(Error::msg(format!(
                "{}: its composites span {times} times of {} minutes; expected at least {} to predict from",
                input.display(),
                config.minutes,
                config.frames_in
            )));
        }
        if times > span {
            video_file::tell_of_more(input, config.frames_in);
        }
        event.slots.truncate(span);
        let read = event.slots.iter().flatten().max().map_or(0, |last| last + 1);
        event.files.truncate(read);
        let given = Self::of(&Config { cache: None, ..config.clone() }, vec![event]);
        let given = given.map_err(|error| match error {
            Error::Setting { key, message } => Error::msg(format!("{}: `{key}`: {message}", input.display())),
            other => other,
        })?;
        let corners = given.corners();
        let mut rain = vec![0; corners.len()];
        for slot in 0..config.frames_in {
            let (composite, _) = given.events[0].at(slot);
            for (sum, pixels) in rain.iter_mut().zip(given.rainy_pixels(composite, &corners)?) {
                *sum += pixels;
            }
        }
        let rainiest = (0..corners.len()).rev().max_by_key(|i| rain[*i]).unwrap_or(0);
        let place = Place { event: 0, start: 0, corner: corners[rainiest] };
        given.cut(&[(place, Change::none())], times >= span)
    }
}

/// The size of the composites, and the palette indices of all of them.
fn decoded(config: &Config, events: &[Event]) -> Result<([usize; 2], Bytes)> {
    let files: Vec<PathBuf> = events.iter().flat_map(|event| event.files.clone()).collect();
    let Some(first) = files.first() else { return Err(Error::msg("there are no composites")) };
    let size = composite::read(first)?.0;
    let read = |path: &PathBuf| {
        let (found, indices) = composite::read(path)?;
        if found != size {
            return Err(Error::msg(format!(
                "{}: has {}x{} pixels; expected {}x{}, as {}",
                path.display(),
                found[0],
                found[1],
                size[0],
                size[1],
                first.display()
            )));
        }
        Ok(indices)
    };
    let len = (files.len() * size[0] * size[1]) as u64;
    let settings = json!({"radar": size}).to_string();
    let indices = cache::decoded(config.cache.as_deref(), &settings, &files, len, |sink| {
        files.chunks(AT_ONCE).try_for_each(|files| {
            let composites: Vec<_> = files.par_iter().map(read).collect();
            composites.into_iter().try_for_each(|indices| sink.write(&indices?))
        })
    })?;
    Ok((size, indices))
}

impl Radar {
    /// A dataset of these events' composites, still without samples.
    fn of(config: &Config, events: Vec<Event>) -> Result<Self> {
        let (size, indices) = decoded(config, &events)?;
        let pooled = size.map(|side| side / config.pool);
        if config.crop > pooled[0] || config.crop > pooled[1] {
            let message = format!(
                "expected at most {}, found {}: a composite has {}x{} pixels, averaged by {}",
                pooled[0].min(pooled[1]),
                config.crop,
                size[0],
                size[1],
                config.pool
            );
            return Err(Error::setting("crop", message));
        }
        let threshold = |&value: &f64| Threshold { value, level: composite::to_value(value) };
        let thresholds = config.thresholds.iter().map(threshold).collect();
        Ok(Self {
            spec: VideoSpec {
                frames_in: config.frames_in,
                frames_out: config.frames_out,
                channels: 1,
                height: config.crop,
                width: config.crop,
            },
            quantity: Arc::new(Quantity { unit: "mm/h", thresholds, minutes: config.minutes as f64 }),
            config: config.clone(),
            events,
            indices,
            size,
            places: Vec::new(),
            rates: std::array::from_fn(|index| composite::rain_rate(index as u8).unwrap_or(f32::NAN)),
        })
    }

    /// All crops with enough rain and few enough missing composites.
    fn rainy_places(&self, windows: &Windows) -> Result<Vec<Place>> {
        let Config { pool, crop, frames_in, .. } = self.config;
        let corners = self.corners();
        let mut places = Vec::new();
        for (number, event) in self.events.iter().enumerate() {
            // Pixels with rain, by composite and corner.
            let count = |i: usize| self.rainy_pixels(event.first + i, &corners);
            let counts = (0..event.files.len()).into_par_iter().map(count).collect::<Result<Vec<_>>>()?;
            for start in windows.starts(0..event.slots.len()) {
                let slots: Vec<Option<usize>> = windows.frames(start).map(|slot| event.slots[slot]).collect();
                let (input, target) = slots.split_at(frames_in);
                let missing = slots.iter().filter(|slot| slot.is_none()).count();
                let some = |part: &[Option<usize>]| part.iter().any(Option::is_some);
                if missing > self.config.max_missing || !some(input) || !some(target) {
                    continue;
                }
                let pixels = (slots.len() - missing) * (crop * pool).pow(2);
                for (i, &corner) in corners.iter().enumerate() {
                    let rainy: u32 = slots.iter().flatten().map(|&composite| counts[composite][i]).sum();
                    if f64::from(rainy) >= self.config.min_rain * pixels as f64 {
                        places.push(Place { event: number, start, corner });
                    }
                }
            }
        }
        Ok(places)
    }

    /// The corners of all crops, (row, column) in averaged pixels.
    fn corners(&self) -> Vec<[usize; 2]> {
        let Config { pool, crop, crop_stride, .. } = self.config;
        let along = |axis: usize| (0..=self.size[axis] / pool - crop).step_by(crop_stride);
        along(0).flat_map(|y| along(1).map(move |x| [y, x])).collect()
    }

    /// The number of a composite's pixels with rain within the crop at each of these corners.
    fn rainy_pixels(&self, composite: usize, corners: &[[usize; 2]]) -> Result<Vec<u32>> {
        let (sums, side) = (self.rain_sums(composite)?, self.config.crop * self.config.pool);
        let corners = corners.iter().map(|corner| corner.map(|at| at * self.config.pool));
        Ok(corners.map(|[y, x]| sums.within(y..y + side, x..x + side)).collect())
    }

    /// The summed-area table of a composite's pixels with rain.
    fn rain_sums(&self, composite: usize) -> Result<Sums> {
        let [height, width] = self.size;
        let mut indices = vec![0; height * width];
        self.indices.read((composite * height * width) as u64, &mut indices)?;
        let mut sums = Sums { columns: width + 1, values: vec![0; (height + 1) * (width + 1)] };
        for (y, row) in indices.chunks_exact(width).enumerate() {
            let mut in_row = 0;
            for (x, &index) in row.iter().enumerate() {
                in_row += u32::from(self.rates[usize::from(index)] >= SOME_RAIN);
                sums.values[(y + 1) * sums.columns + x + 1] = sums.values[y * sums.columns + x + 1] + in_row;
            }
        }
        Ok(sums)
    }

    /// The values of a crop of a composite, (H, W), and which of them are known (1 or 0).
    fn crop(&self, composite: usize, [top, left]: [usize; 2]) -> Result<(Vec<f32>, Vec<f32>)> {
        let Config { pool, crop, .. } = self.config;
        let [height, width] = self.size;
        let (mut values, mut known) = (Vec::with_capacity(crop * crop), Vec::with_capacity(crop * crop));
        let mut rows = vec![0; pool * crop * pool];
        for y in top * pool..(top + crop) * pool {
            let row = &mut rows[y % pool * crop * pool..][..crop * pool];
            self.indices.read(((composite * height + y) * width + left * pool) as u64, row)?;
            if y % pool < pool - 1 {
                continue;
            }
            for x in 0..crop {
                let (mut sum, mut count) = (0., 0);
                for row in rows.chunks_exact(crop * pool) {
                    for &index in &row[x * pool..(x + 1) * pool] {
                        let rate = self.rates[usize::from(index)];
                        if !rate.is_nan() {
                            sum += f64::from(rate);
                            count += 1;
                        }
                    }
                }
                values.push(composite::to_value(sum / f64::from(count.max(1))));
                known.push(if count > 0 { 1. } else { 0. });
            }
        }
        Ok((values, known))
    }

    /// The corner of a crop, moved by up to half a stride if the change requires it.
    fn corner(&self, place: &Place, change: &Change) -> [usize; 2] {
        let Config { pool, crop, crop_stride, .. } = self.config;
        let moved = change.corner([crop + crop_stride; 2], [crop; 2]);
        [0, 1].map(|axis| {
            let most = self.size[axis] / pool - crop;
            (place.corner[axis] + moved[axis]).saturating_sub(crop_stride.div_ceil(2)).min(most)
        })
    }
}

/// A summed-area table: gives the sum over any rectangle.
struct Sums {
    columns: usize,
    values: Vec<u32>,
}

impl Sums {
    fn within(&self, rows: Range<usize>, columns: Range<usize>) -> u32 {
        let at = |y: usize, x: usize| self.values[y * self.columns + x];
        at(rows.end, columns.end) + at(rows.start, columns.start)
            - at(rows.start, columns.end)
            - at(rows.end, columns.start)
    }
}

impl Radar {
    /// Cuts the samples at these places, with their changes applied. Without a target if `has_target` is false.
    fn cut(&self, places: &[(Place, Change)], has_target: bool) -> Result<Video> {
        let VideoSpec { frames_in, frames_out, height: side, .. } = self.spec;
        let windows = self.config.windows();
        let frames = if has_target { frames_in + frames_out } else { frames_in };
        let (mut input, mut target, mut mask, mut scratch) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for (place, change) in places {
            let event = &self.events[place.event];
            let corner = self.corner(place, change);
            for (i, slot) in windows.frames(place.start).take(frames).enumerate() {
                let (composite, came) = event.at(slot);
                let (mut values, mut known) = self.crop(event.first + composite, corner)?;
                if !came {
                    known.fill(0.);
                }
                change.turn(&mut values, [side; 2], &mut scratch);
                change.brighten(&mut values);
                change.turn(&mut known, [side; 2], &mut scratch);
                if i < frames_in { &mut input } else { &mut target }.append(&mut values);
                mask.append(&mut known);
            }
            if !has_target {
                let nothing = vec![0.; frames_out * side * side];
                target.extend(&nothing);
                mask.extend(nothing);
            }
        }
        let tensor =
            |values, times| Tensor::from_vec(values, (places.len(), times, 1, side, side), &Device::Cpu);
        Ok(Video {
            mask: Some(tensor(mask, frames_in + frames_out)?),
            quantity: Some(self.quantity.clone()),
            ..Video::new(tensor(input, frames_in)?, tensor(target, frames_out)?)
        })
    }
}

impl Dataset for Radar {
    type Batch = Video;

    fn len(&self) -> usize {
        self.places.len()
    }

    fn spec(&self) -> VideoSpec {
        self.spec
    }

    fn batch(&self, samples: &[Sample]) -> Result<Video> {
        let place = |sample: &Sample| {
            let place = self.places.get(sample.index).ok_or_else(|| {
                Error::msg(format!(
                    "there is no sample {}: the split has {}",
                    sample.index,
                    self.places.len()
                ))
            })?;
            Ok((*place, self.config.augment.draw(sample)))
        };
        self.cut(&samples.iter().map(place).collect::<Result<Vec<_>>>()?, true)
    }
}

#[cfg(test)]
mod tests;
