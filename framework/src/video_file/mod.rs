//! Frames in files: clips to predict from, and predictions to look at.

mod gif;
mod npy;
mod pictures;

use std::path::Path;

use candle_core::Tensor;
pub use pictures::{Pictures, count, is_picture, pictures, size};

use crate::atomic_file::write_atomic;
use crate::batch::{Video, VideoSpec};
use crate::error::{Error, Result};
use crate::picture;

/// Maximum number of samples that a picture or an animation shows.
const SHOWN_SAMPLES: usize = 8;

/// Reads clips to predict from: the first `frames_in` frames of each are the input, (N, T_in, C, H, W), f32,
/// in `[0, 1]`.
///
/// The next `frames_out` frames are the target, if the file has that many; otherwise **the target is zeros**.
///
/// - `.npy`: uint8 (0 to 255), float32 or float64 (0 to 1), with the axes (T, H, W), (N, T, H, W) or (N, T,
///   C, H, W).
/// - `.gif`: one clip, in gray for a model with one channel, and in colour for one with three.
/// - a folder of pictures (PNG, JPEG, GIF): one clip, ordered by name, with numbers in names compared as
///   numbers.
///
/// Fails, naming the file, if there are too few frames, if their size is not that of `spec`, or if they
/// cannot be read.
pub fn read(path: &Path, spec: &VideoSpec) -> Result<Video> {
    let frames = read_frames(path, spec)?;
    let (_, times, channels, height, width) = frames.dims5()?;
    let expected = (spec.channels, spec.height, spec.width);
    if (channels, height, width) != expected {
        return Err(Error::msg(format!(
            "{}: its frames have {channels} channel(s) of {height}x{width} pixels; expected {} channel(s) of {}x{}",
            path.display(),
            spec.channels,
            spec.height,
            spec.width
        )));
    }
    if times < spec.frames_in {
        return Err(Error::msg(format!(
            "{}: it has {times} frame(s); expected at least {} to predict from",
            path.display(),
            spec.frames_in
        )));
    }
    let input = frames.narrow(1, 0, spec.frames_in)?.contiguous()?;
    let target = if times >= spec.frames_in + spec.frames_out {
        frames.narrow(1, spec.frames_in, spec.frames_out)?.contiguous()?
    } else {
        let shape = (frames.dim(0)?, spec.frames_out, channels, height, width);
        Tensor::zeros(shape, frames.dtype(), frames.device())?
    };
    Ok(Video::new(input, target))
}

/// Logs that only the first `frames_in` frames of a longer clip are used.
pub fn tell_of_more(path: &Path, frames_in: usize) {
    tracing::info!("{}: predicting from its first {frames_in} frames; it has more", path.display());
}

/// The clips (N, T, C, H, W) of a file or folder, f32, with at most as many frames as `spec` uses.
fn read_frames(path: &Path, spec: &VideoSpec) -> Result<Tensor> {
    match extension(path).as_str() {
        _ if path.is_dir() => pictures::clip(path, spec),
        "npy" => npy::read(path, spec),
        "gif" => pictures::clip(path, spec),
        _ => Err(unknown(path, "frames are read from .npy and .gif files, and folders of pictures")),
    }
}

/// Writes predicted frames (B, T_out, C, H, W) that follow `input` (B, T_in, C, H, W), completely or not at
/// all.
///
/// - `.npy`: the prediction, float32, unchanged.
/// - `.png`: a row for each of the first 8 samples: input frames, a white line, predicted frames.
/// - `.gif`: the first 8 samples side by side, each playing its input and then, in an orange frame, its
///   prediction.
///
/// Pictures and animations need 1 or 3 channels.
pub fn write(input: &Tensor, prediction: &Tensor, path: &Path) -> Result<()> {
    let bytes = match extension(path).as_str() {
        "npy" => npy::bytes(prediction)?,
        "png" => picture::png_bytes(&picture::video_rows(input, prediction, SHOWN_SAMPLES)?)?,
        "gif" => gif::bytes(input, prediction)?,
        _ => return Err(unknown(path, "predictions are written to .npy, .png and .gif files")),
    };
    write_atomic(path, &bytes)
}

/// Writes a tensor's values as `.npy`, completely or not at all.
pub(crate) fn write_numbers(tensor: &Tensor, path: &Path) -> Result<()> {
    write_atomic(path, &npy::bytes(tensor)?)
}

fn extension(path: &Path) -> String {
    path.extension().unwrap_or_default().to_string_lossy().to_lowercase()
}

fn unknown(path: &Path, known: &str) -> Error {
    let what = match extension(path) {
        none if none.is_empty() => "it has no extension".to_string(),
        extension => format!("`.{extension}` is not an extension known here"),
    };
    Error::msg(format!("{}: {what}; {known}", path.display()))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::path::PathBuf;

    use candle_core::{DType, Device};
    use ndarray::{Array, Array3, Array4, Array5};
    use ndarray_npy::{WritableElement, write_npy};
    use tempfile::TempDir;

    use super::*;

    const SPEC: VideoSpec = VideoSpec { frames_in: 2, frames_out: 2, channels: 1, height: 3, width: 4 };

    fn folder() -> (TempDir, PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("clip.npy");
        (folder, path)
    }

    fn save<A: WritableElement, D: ndarray::Dimension>(path: &Path, array: &Array<A, D>) {
        write_npy(path, array).unwrap();
    }

    /// The error of `read` for a file, without the file's name.
    fn complaint(path: &Path, spec: &VideoSpec) -> String {
        let message = read(path, spec).unwrap_err().to_string();
        message.strip_prefix(&format!("{}: ", path.display())).expect(&message).to_string()
    }

    fn flat(tensor: &Tensor) -> Vec<f32> {
        tensor.flatten_all().unwrap().to_vec1().unwrap()
    }

    #[test]
    fn one_clip_of_bytes_becomes_input_and_target() {
        let (_folder, path) = folder();
        save(&path, &Array3::from_shape_fn((5, 3, 4), |(t, y, x)| (20 * t + 4 * y + x) as u8));
        let Video { input, target, .. } = read(&path, &SPEC).unwrap();
        assert_eq!((input.dims(), target.dims()), ([1, 2, 1, 3, 4].as_slice(), [1, 2, 1, 3, 4].as_slice()));
        let pixels = |from: u8| (0..12).map(move |i| f32::from(from + i) / 255.);
        assert_eq!(flat(&input), pixels(0).chain(pixels(20)).collect::<Vec<_>>());
        assert_eq!(flat(&target), pixels(40).chain(pixels(60)).collect::<Vec<_>>());
    }

    #[test]
    fn several_clips_keep_their_samples_apart() {
        let (_folder, path) = folder();
        let value = |n, t, y, x| (n * 100 + t * 12 + y * 4 + x) as f32 / 200.;
        // Column-major: a file may have either memory layout.
        let mut clips = Array4::<f32>::zeros(ndarray::ShapeBuilder::f((2, 3, 3, 4)));
        clips.indexed_iter_mut().for_each(|((n, t, y, x), pixel)| *pixel = value(n, t, y, x));
        save(&path, &clips);
        let Video { input, target, .. } = read(&path, &SPEC).unwrap();
        let expected: Vec<f32> =
            [0., 100.].into_iter().flat_map(|n| (0..24).map(move |i| (n + i as f32) / 200.)).collect();
        assert_eq!(flat(&input), expected);
        // Three frames hold both input frames, but only one of the two target frames.
        assert_eq!(target.dims(), [2, 2, 1, 3, 4]);
        assert_eq!(flat(&target), [0.; 48]);
    }

    #[test]
    fn colour_clips_have_a_channel_axis() {
        let (_folder, path) = folder();
        save(&path, &Array5::from_shape_fn((1, 2, 3, 3, 4), |(_, _, c, _, _)| c as f64 / 2.));
        let input = read(&path, &VideoSpec { channels: 3, ..SPEC }).unwrap().input;
        assert_eq!((input.dims(), input.dtype()), ([1, 2, 3, 3, 4].as_slice(), DType::F32));
        assert_eq!(flat(&input)[..36], [[0.; 12], [0.5; 12], [1.; 12]].concat());
    }

    #[test]
    fn files_that_do_not_fit_are_explained() {
        let (folder, path) = folder();
        save(&path, &Array3::<u8>::zeros((1, 3, 4)));
        assert_eq!(complaint(&path, &SPEC), "it has 1 frame(s); expected at least 2 to predict from");
        save(&path, &Array5::<u8>::zeros((1, 2, 3, 4, 5)));
        assert_eq!(
            complaint(&path, &SPEC),
            "its frames have 3 channel(s) of 4x5 pixels; expected 1 channel(s) of 3x4"
        );
        save(&path, &Array3::<i64>::zeros((2, 3, 4)));
        assert_eq!(complaint(&path, &SPEC), "its values are '<i8'; expected uint8, float32 or float64");
        save(&path, &ndarray::Array2::<u8>::zeros((3, 4)));
        assert_eq!(
            complaint(&path, &SPEC),
            "its axes are [3, 4]; expected (T, H, W), (N, T, H, W) or (N, T, C, H, W)"
        );
        save(&path, &Array3::<f32>::from_elem((2, 3, 4), 255.));
        assert_eq!(
            complaint(&path, &SPEC),
            "it has the value 255; expected float frames to be within 0 and 1 (uint8 frames: 0 to 255)"
        );
        save(&path, &Array3::<f32>::from_elem((2, 3, 4), f32::NAN));
        assert!(complaint(&path, &SPEC).starts_with("it has the value NaN;"));
        save(&path, &Array4::<u8>::zeros((4, 500, 3, 4)));
        assert_eq!(
            complaint(&path, &SPEC),
            "its axes are [4, 500, 3, 4], which looks like 500 clips with time first; expected (N, T, H, W), \
             or (N, T, C, H, W) if these really are 4 clips"
        );
        std::fs::write(&path, b"no array").unwrap();
        assert!(complaint(&path, &SPEC).starts_with("cannot be read as .npy: "));
        let gif = folder.path().join("clip.gif");
        std::fs::write(&gif, b"no gif").unwrap();
        assert!(complaint(&gif, &SPEC).starts_with("cannot be read as .gif: "));
        assert_eq!(
            complaint(&gif, &VideoSpec { channels: 2, ..SPEC }),
            "pictures have 1 or 3 channels; expected 2; .npy files have any"
        );
        assert!(matches!(read(&folder.path().join("none.npy"), &SPEC), Err(Error::File { .. })));
        assert!(matches!(read(&folder.path().join("none.gif"), &SPEC), Err(Error::File { .. })));
    }

    #[test]
    fn unknown_extensions_name_the_known_ones() {
        let clip = Tensor::zeros((1, 1, 1, 3, 4), DType::F32, &Device::Cpu).unwrap();
        assert_eq!(
            read(Path::new("clip.mp4"), &SPEC).unwrap_err().to_string(),
            "clip.mp4: `.mp4` is not an extension known here; frames are read from .npy and .gif files, and folders of pictures"
        );
        assert_eq!(
            write(&clip, &clip, Path::new("clip")).unwrap_err().to_string(),
            "clip: it has no extension; predictions are written to .npy, .png and .gif files"
        );
    }

    #[test]
    fn a_prediction_is_read_back_as_it_was() {
        let (folder, path) = folder();
        let prediction = Tensor::rand(0f32, 1., (3, 2, 1, 3, 4), &Device::Cpu).unwrap();
        let input = prediction.zeros_like().unwrap();
        write(&input, &prediction, &path).unwrap();
        let read = read(&path, &SPEC).unwrap().input;
        assert_eq!(flat(&read), flat(&prediction));
        assert_eq!(std::fs::read_dir(&folder).unwrap().count(), 1, "nothing half-written stays");
    }

    #[test]
    fn a_picture_shows_at_most_eight_samples() {
        let (folder, _) = folder();
        let path = folder.path().join("prediction.PNG");
        let input = Tensor::zeros((9, 2, 1, 64, 64), DType::F32, &Device::Cpu).unwrap();
        write(&input, &input.ones_like().unwrap(), &path).unwrap();
        let picture = image::load_from_memory(&std::fs::read(&path).unwrap()).unwrap();
        assert_eq!((picture.width(), picture.height()), (4 * 64 + 2 * 2 + 6, 8 * 64 + 7 * 2));
    }
}
