//! The frames of a split, ready for reading: decoded pictures, and rows of arrays.

use std::path::PathBuf;
use std::sync::Arc;

use candlepower::error::{Error, Result};
use candlepower::video_file;
use image::imageops::{FilterType, resize};
use image::{ImageBuffer, Luma};
use rayon::prelude::*;
use serde_json::json;

use super::Config;
use super::sequences::{ArrayOfFrames, Part, Sequence, Source};
use crate::bytes::Bytes;
use crate::cache;

/// Files decoded at once, before any of them is stored.
const AT_ONCE: usize = 64;

pub(super) struct Clips {
    /// Decoded frames of all clips that are pictures, (C, H, W) bytes each.
    decoded: Bytes,
    places: Vec<Place>,
    /// (rows, columns) of a frame.
    size: [usize; 2],
    channels: usize,
    range: Option<[f32; 2]>,
}

/// The location of a clip's frames.
enum Place {
    /// The index of the sequence's frame 0 among the decoded frames. May point before the clip's frames, or
    /// be negative, if the split starts at a later frame.
    Decoded(isize),
    Array(Arc<ArrayOfFrames>, usize),
}

/// A file to decode, and which of its frames.
struct Job {
    path: PathBuf,
    frames: std::ops::Range<usize>,
}

impl Clips {
    /// Decodes the frames of these parts of the sequences, one clip per part.
    pub(super) fn open(config: &Config, sequences: &[Sequence], parts: &[Part]) -> Result<Self> {
        let size = common_size(config, sequences)?;
        // A cache serves all splits, so it holds all frames.
        let whole: Vec<Part> = match &config.cache {
            Some(_) => {
                (0..sequences.len()).map(|i| Part { sequence: i, frames: 0..sequences[i].len }).collect()
            }
            None => Vec::new(),
        };
        let kept = if config.cache.is_some() { &whole } else { parts };
        let (mut jobs, mut total, mut firsts) = (Vec::new(), 0, vec![0_isize; sequences.len()]);
        for Part { sequence: i, frames } in kept {
            let Sequence { path, source, .. } = &sequences[*i];
            let job = |path: &PathBuf, frames| Job { path: path.clone(), frames };
            match source {
                Source::Pictures(files) => {
                    jobs.extend(files[frames.clone()].iter().map(|file| job(file, 0..1)))
                }
                Source::Animation => jobs.push(job(path, frames.clone())),
                Source::Array(..) => continue,
            }
            firsts[*i] = total as isize - frames.start as isize;
            total += frames.len();
        }
        if !(jobs.is_empty() || matches!(config.channels, 1 | 3)) {
            let message = format!("pictures have 1 or 3, found {}; arrays have any", config.channels);
            return Err(Error::setting("channels", message));
        }
        let settings = json!({
            "channels": config.channels,
            "size": size,
            "frames": jobs.iter().map(|job| [job.frames.start, job.frames.end]).collect::<Vec<_>>(),
        });
        let files: Vec<PathBuf> = jobs.iter().map(|job| job.path.clone()).collect();
        let len = (total * config.channels * size[0] * size[1]) as u64;
        let decoded = cache::decoded(config.cache.as_deref(), &settings.to_string(), &files, len, |sink| {
            jobs.chunks(AT_ONCE).try_for_each(|jobs| {
                let frames: Vec<_> = jobs.par_iter().map(|job| decode(job, config.channels, size)).collect();
                frames.into_iter().try_for_each(|frames| sink.write(&frames?))
            })
        })?;
        let place = |part: &Part| match &sequences[part.sequence].source {
            Source::Array(array, i) => Place::Array(array.clone(), *i),
            _ => Place::Decoded(firsts[part.sequence]),
        };
        let places = parts.iter().map(place).collect();
        let clips = Self { decoded, places, size, channels: config.channels, range: config.range };
        // Values out of range usually occur from the first frame on, so check it now.
        (0..parts.len()).take(1).try_for_each(|clip| clips.read(clip, parts[clip].frames.start).map(drop))?;
        Ok(clips)
    }

    /// (rows, columns) of a frame.
    pub(super) fn size(&self) -> [usize; 2] {
        self.size
    }

    /// A frame of a clip's sequence by its index in the sequence, (C, H, W), in `[0, 1]`.
    pub(super) fn read(&self, clip: usize, frame: usize) -> Result<Vec<f32>> {
        match &self.places[clip] {
            Place::Decoded(first) => {
                let mut bytes = vec![0; self.channels * self.size[0] * self.size[1]];
                let at = (first + frame as isize) as u64 * bytes.len() as u64;
                self.decoded.read(at, &mut bytes)?;
                Ok(bytes.into_iter().map(|byte| f32::from(byte) / 255.).collect())
            }
            Place::Array(frames, i) => frames.read(*i, frame, self.channels, self.range, self.size),
        }
    }
}

impl ArrayOfFrames {
    fn read(
        &self,
        sequence: usize,
        frame: usize,
        channels: usize,
        range: Option<[f32; 2]>,
        size: [usize; 2],
    ) -> Result<Vec<f32>> {
        let pixels = self.size[0] * self.size[1];
        let mut values = vec![0.; channels * pixels];
        self.array.read((sequence * self.times + frame) * values.len(), &mut values)?;
        let [low, high] = range.unwrap_or(self.array.element.range());
        for value in &mut values {
            if !(low..=high).contains(value) {
                return Err(Error::msg(format!(
                    "{}: sequence {sequence}, frame {frame}: it has the value {value}; expected {low} to {high}, or another \
                     `range`",
                    self.array.path.display()
                )));
            }
            *value = (*value - low) / (high - low);
        }
        if self.channels_last && channels > 1 {
            let plane = |channel| values.iter().skip(channel).step_by(channels).copied();
            values = (0..channels).flat_map(plane).collect();
        }
        if size == self.size {
            return Ok(values);
        }
        let planes = values.chunks_exact(pixels).map(|plane| scaled(plane, self.size, size));
        Ok(planes.collect::<Result<Vec<_>>>()?.concat())
    }
}

/// Decodes the frames of a file to bytes, (C, H, W) of this size.
fn decode(job: &Job, channels: usize, size: [usize; 2]) -> Result<Vec<u8>> {
    let Job { path, frames } = job;
    let pictures = video_file::pictures(path)?;
    if frames.end > pictures.frames.len() {
        let found = pictures.frames.len();
        return Err(Error::msg(format!("{}: has {found} frame(s); expected {}", path.display(), frames.end)));
    }
    let from = [pictures.height, pictures.width];
    let mut bytes = Vec::with_capacity(frames.len() * channels * size[0] * size[1]);
    for frame in frames.clone() {
        for plane in pictures.planes(frame, channels).chunks_exact(from[0] * from[1]) {
            let plane = if from == size { plane.to_vec() } else { scaled(plane, from, size)? };
            bytes.extend(plane.into_iter().map(|value| (value * 255.).round() as u8));
        }
    }
    Ok(bytes)
}

/// Scales a plane to another size, (rows, columns).
fn scaled(plane: &[f32], from: [usize; 2], to: [usize; 2]) -> Result<Vec<f32>> {
    let [[height, width], [new_height, new_width]] = [from, to].map(|size| size.map(|side| side as u32));
    let plane = ImageBuffer::<Luma<f32>, _>::from_raw(width, height, plane.to_vec());
    let plane = plane.ok_or_else(|| Error::msg(format!("a plane is not of {height}x{width} pixels")))?;
    Ok(resize(&plane, new_width, new_height, FilterType::Triangle).into_raw())
}

/// The size of the frames after `resize`; without it, an error if the files' sizes differ.
fn common_size(config: &Config, sequences: &[Sequence]) -> Result<[usize; 2]> {
    if let Some(size) = config.resize {
        return Ok(size);
    }
    let mut first: Option<([usize; 2], PathBuf)> = None;
    let mut agree = |size: [usize; 2], path: &PathBuf| match &first {
        None => {
            first = Some((size, path.clone()));
            Ok(())
        }
        Some((known, _)) if *known == size => Ok(()),
        Some((known, other)) => Err(Error::msg(format!(
            "{}: its frames have {}x{} pixels; expected {}x{}, as in {}, or `resize`, which scales all to one size",
            path.display(),
            size[0],
            size[1],
            known[0],
            known[1],
            other.display()
        ))),
    };
    for sequence in sequences {
        match &sequence.source {
            Source::Pictures(files) => {
                files.iter().try_for_each(|file| agree(video_file::size(file)?, file))?
            }
            Source::Animation => agree(video_file::size(&sequence.path)?, &sequence.path)?,
            Source::Array(frames, _) => agree(frames.size, &sequence.path)?,
        }
    }
    Ok(first.map_or([0, 0], |(size, _)| size))
}
