//! Finds sequences of frames, and divides their frames among the splits.

use std::collections::HashSet;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use candlepower::data::Split;
use candlepower::error::{Error, Result};
use candlepower::video_file;

use super::{Config, Division};
use crate::npy::{Array, is_array_file};

/// Consecutive frames.
pub(super) struct Sequence {
    /// The file or the folder.
    pub(super) path: PathBuf,
    pub(super) source: Source,
    /// The number of frames.
    pub(super) len: usize,
}

/// The location of a sequence's frames.
#[derive(Clone)]
pub(super) enum Source {
    /// One file per frame.
    Pictures(Vec<PathBuf>),
    /// All frames of one file.
    Animation,
    /// A row of an array.
    Array(Arc<ArrayOfFrames>, usize),
}

/// An array that holds frames.
pub(super) struct ArrayOfFrames {
    pub(super) array: Array,
    pub(super) times: usize,
    /// (rows, columns).
    pub(super) size: [usize; 2],
    /// Whether the channels of a pixel are adjacent in memory.
    pub(super) channels_last: bool,
}

/// The part of a sequence that belongs to a split.
pub(super) struct Part {
    /// Index of the sequence.
    pub(super) sequence: usize,
    pub(super) frames: Range<usize>,
}

/// All sequences under the configured path, in the order of their names.
pub(super) fn find(config: &Config) -> Result<Vec<Sequence>> {
    let path = Path::new(&config.path);
    let mut found = Vec::new();
    match std::fs::metadata(path) {
        Err(error) => return Err(Error::setting("path", format!("{}: {error}", path.display()))),
        Ok(known) if known.is_dir() => in_folder(path, config, &mut HashSet::new(), &mut found)?,
        Ok(_) => in_file(path, config, &mut found)?,
    }
    if found.is_empty() {
        let message =
            format!("{}: holds no frames; expected .png, .jpg, .gif, .npy or .npz files", path.display());
        return Err(Error::setting("path", message));
    }
    Ok(found)
}

/// Collects the sequences in a folder and its subfolders. Each folder is visited once, even if several links
/// lead to it.
fn in_folder(
    folder: &Path,
    config: &Config,
    seen: &mut HashSet<PathBuf>,
    found: &mut Vec<Sequence>,
) -> Result<()> {
    if !seen.insert(folder.canonicalize().map_err(Error::file(folder))?) {
        return Ok(());
    }
    let mut entries = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(Error::file(folder))? {
        let entry = entry.map_err(Error::file(folder))?;
        if !entry.file_name().to_string_lossy().starts_with('.') {
            entries.push(entry.path());
        }
    }
    entries.sort_by(|a, b| natord::compare(&a.to_string_lossy(), &b.to_string_lossy()));
    let mut frames = Vec::new();
    for path in entries {
        if path.is_dir() {
            in_folder(&path, config, seen, found)?;
        } else if video_file::is_picture(&path) && video_file::count(&path)? == 1 {
            frames.push(path);
        } else {
            in_file(&path, config, found)?;
        }
    }
    if !frames.is_empty() {
        let len = frames.len();
        found.push(Sequence { path: folder.to_path_buf(), source: Source::Pictures(frames), len });
    }
    Ok(())
}

/// Collects the sequences in a file that is not a single frame of a sequence; none for files of other kinds.
fn in_file(path: &Path, config: &Config, found: &mut Vec<Sequence>) -> Result<()> {
    if video_file::is_picture(path) {
        let len = video_file::count(path)?;
        found.push(Sequence { path: path.to_path_buf(), source: Source::Animation, len });
    } else if is_array_file(path) {
        let (frames, sequences) = ArrayOfFrames::open(path, config)?;
        let frames = Arc::new(frames);
        let sequence = |i| {
            let source = Source::Array(frames.clone(), i);
            Sequence { path: path.to_path_buf(), source, len: frames.times }
        };
        found.extend((0..sequences).map(sequence));
    }
    Ok(())
}

impl ArrayOfFrames {
    /// Opens an array; also returns its number of sequences.
    fn open(path: &Path, config: &Config) -> Result<(Self, usize)> {
        let array = Array::open(path, config.array.as_deref())?;
        let channels = config.channels;
        let (sequences, times, size, channels_last) = match *array.shape.as_slice() {
            [t, h, w] if channels == 1 => (1, t, [h, w], true),
            [n, t, h, w] if channels == 1 => (n, t, [h, w], true),
            [n, t, h, w, c] if c == channels => (n, t, [h, w], true),
            [n, t, c, h, w] if c == channels => (n, t, [h, w], false),
            _ => {
                return Err(Error::msg(format!(
                    "{}: its axes are {:?}; with `channels = {channels}` expected (N, T, H, W, {channels}), \
                     (N, T, {channels}, H, W){}",
                    path.display(),
                    array.shape,
                    if channels == 1 { ", (N, T, H, W) or (T, H, W)" } else { "" }
                )));
            }
        };
        if array.shape.contains(&0) {
            return Err(Error::msg(format!(
                "{}: its axes are {:?}: it is empty",
                path.display(),
                array.shape
            )));
        }
        Ok((Self { array, times, size, channels_last }, sequences))
    }
}

/// The parts of the sequences that belong to a split.
pub(super) fn parts(config: &Config, sequences: &[Sequence], split: Split) -> Result<Vec<Part>> {
    let whole = |i: usize| Part { sequence: i, frames: 0..sequences[i].len };
    let parts: Vec<Part> = match config.split {
        Division::Folder => {
            let root = Path::new(&config.path);
            let has = |split: Split| root.join(split.name()).is_dir();
            if !has(Split::Train) || !has(Split::Val) {
                let message =
                    format!("with \"folder\", expected the folders `train` and `val` in {}", root.display());
                return Err(Error::setting("split", message));
            }
            let split = if split == Split::Test && !has(Split::Test) { Split::Val } else { split };
            let folder = root.join(split.name());
            (0..sequences.len()).filter(|&i| sequences[i].path.starts_with(&folder)).map(whole).collect()
        }
        Division::Sequence => {
            let [val, test] = cuts(config, sequences.len());
            if val == 0 {
                let message = format!(
                    "{} holds {} sequence(s), too few to be divided; use `split = \"time\"`, which divides each",
                    config.path,
                    sequences.len()
                );
                return Err(Error::setting("split", message));
            }
            range(split, val, test, sequences.len()).map(whole).collect()
        }
        Division::Time => {
            let part = |(i, sequence): (usize, &Sequence)| {
                let [val, test] = cuts(config, sequence.len);
                Part { sequence: i, frames: range(split, val, test, sequence.len) }
            };
            sequences.iter().enumerate().map(part).collect()
        }
    };
    let span = config.windows().span();
    let (whole, short): (Vec<Part>, Vec<Part>) =
        parts.into_iter().partition(|part| part.frames.len() >= span);
    if let Some(part) = short.first().filter(|_| !config.skip_short) {
        let sequence = &sequences[part.sequence];
        let which = match (&sequence.source, config.split) {
            (Source::Array(_, i), _) => format!("sequence {i} has"),
            _ => "has".into(),
        };
        let in_split = if config.split == Division::Time {
            format!(" in the {} split", split.name())
        } else {
            "".into()
        };
        return Err(Error::msg(format!(
            "{}: {which} {} frame(s){in_split}; expected at least {span}, which a sample takes \
             (`skip_short = true` leaves such sequences out)",
            sequence.path.display(),
            part.frames.len()
        )));
    }
    Ok(whole)
}

/// The indices, among `len` sequences or frames, at which validation and test begin. A share above 0 is at
/// least one item.
fn cuts(config: &Config, len: usize) -> [usize; 2] {
    let count = |share: f64| if share > 0. { ((share * len as f64).round() as usize).max(1) } else { 0 };
    let test = len.saturating_sub(count(config.test_share));
    [test.saturating_sub(count(config.val_share)), test]
}

fn range(split: Split, val: usize, test: usize, len: usize) -> Range<usize> {
    match split {
        Split::Train => 0..val,
        Split::Val => val..test,
        Split::Test if test == len => val..test,
        Split::Test => test..len,
    }
}
