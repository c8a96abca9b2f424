//! Your own frames: folders of pictures, animations, arrays.

mod clips;
mod sequences;

use std::path::{Path, PathBuf};

use candle_core::{Device, Tensor};
use candlepower::batch::{Video, VideoSpec};
use candlepower::data::{Dataset, Open, Sample, Split};
use candlepower::error::{Error, Result};
use candlepower::video_file;
use clips::Clips;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::augment::{Augment, Change};
use crate::windows::Windows;

/// The fields of `[data]` for `name = "frames"`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// A folder, searched recursively, or one file. The pictures in a folder (.png, .jpg, .gif) are one sequence, in
    /// natural order of their names; an animation (.gif) is a sequence; an array (.npy, .npy.gz, .npz) of shape (N, T,
    /// H, W), (N, T, H, W, C) or (N, T, C, H, W) is N sequences, one of shape (T, H, W) is one.
    pub path: String,
    /// Name of the array to use, if an .npz archive holds several.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub array: Option<String>,
    /// Channels of a frame: 1 (gray) or 3 (color) for pictures; arrays must have this many.
    pub channels: usize,
    /// Array values that map to 0 and 1. Default: 0 and 255 for bytes, 0 and 65535 for 16 bits, 0 and 1 for floats.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub range: Option<[f32; 2]>,
    /// Rows and columns that frames are scaled to, with a triangle filter. Default: no scaling; all frames
    /// must have one size.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub resize: Option<[usize; 2]>,
    /// Rows and columns of the center crop, after scaling. Default: no crop.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub crop: Option<[usize; 2]>,
    /// Number of input frames.
    pub frames_in: usize,
    /// Number of frames to predict.
    pub frames_out: usize,
    /// Frames from the start of one sample to the start of the next. 1: every possible sample.
    pub stride: usize,
    /// Step between the frames of a sample. 1: every frame.
    pub every: usize,
    /// Frames left out between input and target, counted in steps of `every`.
    pub gap: usize,
    /// How the frames are divided among the splits.
    pub split: Division,
    /// Share of the sequences, or of each sequence's frames, used for validation; at least one sequence or frame.
    pub val_share: f64,
    /// The same share for the test split. 0: test on the validation data.
    pub test_share: f64,
    /// Skip sequences that are too short for a sample, instead of rejecting them.
    pub skip_short: bool,
    /// Folder for caching decoded pictures, if they do not fit into memory or take long to decode. Cached
    /// data is never stale: its file name depends on these settings and on the files' sizes and times.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cache: Option<PathBuf>,
    /// Random changes of training samples.
    pub augment: Augment,
}

/// How frames are divided among the splits. No frame is in two splits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Division {
    /// By sequence, in the order of their names: the first are for training, then come validation and test.
    Sequence,
    /// By time: the first part of each sequence is for training, then come validation and test.
    Time,
    /// By folder: `path` holds the folders `train`, `val` and `test`. Without `test`, `val` is used for it.
    Folder,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            path: String::new(),
            array: None,
            channels: 1,
            range: None,
            resize: None,
            crop: None,
            frames_in: 10,
            frames_out: 10,
            stride: 1,
            every: 1,
            gap: 0,
            split: Division::Sequence,
            val_share: 0.1,
            test_share: 0.1,
            skip_short: false,
            cache: None,
            augment: Augment::default(),
        }
    }
}

impl Config {
    fn windows(&self) -> Windows {
        let Self { frames_in, frames_out, stride, every, gap, .. } = *self;
        Windows { frames_in, frames_out, stride, every, gap }
    }

    /// Rejects values that are wrong for any data.
    fn check(&self) -> Result<()> {
        self.windows().check()?;
        if self.path.is_empty() {
            return Err(Error::setting("path", "expected a folder of frames, or a file of them"));
        }
        if self.channels == 0 {
            return Err(Error::setting("channels", "expected at least 1, found 0"));
        }
        for (key, size) in [("resize", self.resize), ("crop", self.crop)] {
            if size.is_some_and(|size| size.contains(&0)) {
                return Err(Error::setting(key, "expected rows and columns of at least 1"));
            }
        }
        if let Some([low, high]) =
            self.range.filter(|[low, high]| !(low.is_finite() && high.is_finite() && low < high))
        {
            return Err(Error::setting(
                "range",
                format!("expected two rising values, found {low} and {high}"),
            ));
        }
        for (key, share) in [("val_share", self.val_share), ("test_share", self.test_share)] {
            if !(0. ..1.).contains(&share) {
                return Err(Error::setting(key, format!("expected a fraction in [0, 1), found {share}")));
            }
        }
        if self.val_share == 0. {
            return Err(Error::setting(
                "val_share",
                "expected a fraction above 0: validation needs some data",
            ));
        }
        if self.val_share + self.test_share >= 1. {
            let message = "with `test_share` nothing is left to train on; expected a sum below 1";
            return Err(Error::setting("val_share", message));
        }
        Ok(())
    }
}

/// Windows over sequences of frames read from files.
///
/// Batches: input (B, T_in, C, H, W) and target (B, T_out, C, H, W), f32 in `[0, 1]`. Opening finds all
/// errors in pictures; an array's values are checked when they are read.
pub struct Frames {
    spec: VideoSpec,
    config: Config,
    clips: Clips,
    /// The clip and the first frame of each sample.
    samples: Vec<(usize, usize)>,
}

impl Open for Frames {
    type Config = Config;

    fn open(config: &Config, split: Split) -> Result<Self> {
        config.check()?;
        let windows = config.windows();
        let sequences = sequences::find(config)?;
        let parts = sequences::parts(config, &sequences, split)?;
        let clips = Clips::open(config, &sequences, &parts)?;
        let starts = |(clip, part): (usize, &sequences::Part)| {
            windows.starts(part.frames.clone()).map(move |start| (clip, start)).collect::<Vec<_>>()
        };
        let samples: Vec<_> = parts.iter().enumerate().flat_map(starts).collect();
        if samples.is_empty() {
            return Err(Error::msg(format!(
                "{}: the {} split has no samples; each takes {} frames of a sequence",
                config.path,
                split.name(),
                windows.span()
            )));
        }
        let size = clips.size();
        let [height, width] = config.crop.unwrap_or(size);
        if height > size[0] || width > size[1] {
            let message = format!(
                "expected at most {}x{}, the size of the frames, found {height}x{width}",
                size[0], size[1]
            );
            return Err(Error::setting("crop", message));
        }
        config.augment.check([height, width])?;
        let (frames_in, frames_out, channels) = (config.frames_in, config.frames_out, config.channels);
        let spec = VideoSpec { frames_in, frames_out, channels, height, width };
        Ok(Self { spec, config: config.clone(), clips, samples })
    }

    /// The first window of every sequence in a file or folder, of the same kinds as the dataset's own, scaled
    /// and cropped the same way. If any sequence is too short for a target, **all targets are zeros**.
    fn read(config: &Config, spec: &VideoSpec, input: &Path) -> Result<Video> {
        config.check()?;
        // A problem with the input path is not a configuration error.
        let plainly = |error| match error {
            Error::Setting { message, .. } => Error::msg(message),
            other => other,
        };
        let config = Config { path: input.display().to_string(), cache: None, ..config.clone() };
        let (windows, sequences) = (config.windows(), sequences::find(&config).map_err(plainly)?);
        let whole =
            |(sequence, it): (usize, &sequences::Sequence)| sequences::Part { sequence, frames: 0..it.len };
        let parts: Vec<_> = sequences.iter().enumerate().map(whole).collect();
        for sequence in &sequences {
            let path = sequence.path.display();
            let needed = (config.frames_in - 1) * config.every + 1;
            if sequence.len < needed {
                let found = sequence.len;
                let message =
                    format!("{path}: it has {found} frame(s); expected at least {needed} to predict from");
                return Err(Error::msg(message));
            }
            if sequence.len > windows.span() {
                video_file::tell_of_more(&sequence.path, config.frames_in);
            }
        }
        let clips = Clips::open(&config, &sequences, &parts).map_err(plainly)?;
        let ([rows, columns], [height, width]) = (clips.size(), [spec.height, spec.width]);
        let expected = match config.crop {
            None if [rows, columns] != [height, width] => Some(format!(
                "{height}x{width}, as in the training data, or `resize`, which scales all to one size"
            )),
            Some(_) if rows < height || columns < width => {
                Some(format!("at least {height}x{width}, the `crop`"))
            }
            _ => None,
        };
        if let Some(expected) = expected {
            let message =
                format!("{}: its frames have {rows}x{columns} pixels; expected {expected}", input.display());
            return Err(Error::msg(message));
        }
        let places: Vec<_> = (0..parts.len()).map(|clip| (clip, 0, Change::none())).collect();
        let has_target = sequences.iter().all(|it| it.len >= windows.span());
        Self { spec: *spec, config, clips, samples: Vec::new() }.cut(&places, has_target)
    }
}

impl Frames {
    /// Cuts windows of clips, each given by its clip, first frame and change. Without a target if
    /// `has_target` is false.
    fn cut(&self, places: &[(usize, usize, Change)], has_target: bool) -> Result<Video> {
        let VideoSpec { frames_in, frames_out, channels, height, width } = self.spec;
        let (size, crop, windows) = (self.clips.size(), [height, width], self.config.windows());
        let frames = if has_target { frames_in + frames_out } else { frames_in };
        let (mut input, mut target, mut scratch) = (Vec::new(), Vec::new(), Vec::new());
        for (clip, start, change) in places {
            let [top, left] = change.corner(size, crop);
            for (i, frame) in windows.frames(*start).take(frames).enumerate() {
                let planes = self.clips.read(*clip, frame)?;
                let out = if i < frames_in { &mut input } else { &mut target };
                for plane in planes.chunks_exact(size[0] * size[1]) {
                    let from = out.len();
                    let rows = plane.chunks_exact(size[1]).skip(top).take(height);
                    rows.for_each(|row| out.extend_from_slice(&row[left..left + width]));
                    change.turn(&mut out[from..], crop, &mut scratch);
                    change.brighten(&mut out[from..]);
                }
            }
        }
        target.resize(places.len() * frames_out * channels * height * width, 0.);
        let tensor = |values: Vec<f32>, times| {
            Tensor::from_vec(values, (places.len(), times, channels, height, width), &Device::Cpu)
        };
        Ok(Video::new(tensor(input, frames_in)?, tensor(target, frames_out)?))
    }
}

impl Dataset for Frames {
    type Batch = Video;

    fn len(&self) -> usize {
        self.samples.len()
    }

    fn spec(&self) -> VideoSpec {
        self.spec
    }

    fn batch(&self, samples: &[Sample]) -> Result<Video> {
        let place = |sample: &Sample| {
            let &(clip, start) = self.samples.get(sample.index).ok_or_else(|| {
                Error::msg(format!(
                    "there is no sample {}: the split has {}",
                    sample.index,
                    self.samples.len()
                ))
            })?;
            Ok((clip, start, self.config.augment.draw(sample)))
        };
        self.cut(&samples.iter().map(place).collect::<Result<Vec<_>>>()?, true)
    }
}

#[cfg(test)]
mod tests;
