//! NumPy's `.npy` files.

use std::fs::File;
use std::io::{BufReader, Cursor};
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use ndarray::{ArrayD, Axis};
use ndarray_npy::{ReadNpyError, ReadNpyExt, ReadableElement, WriteNpyExt};

use crate::batch::VideoSpec;
use crate::error::{Error, Result};

/// How far outside `[0, 1]` float frames may be. Predictions of a model without a final sigmoid are slightly
/// outside. Frames whose white is 255 are far outside, and would silently give nonsense predictions.
const OVERSHOOT: f32 = 0.5;

/// The clips (N, T, C, H, W) of a file, f32, with at most as many frames as `spec` uses.
pub(super) fn read(path: &Path, spec: &VideoSpec) -> Result<Tensor> {
    let bytes = || array::<u8>(path).map(|array| clips(path, array, spec, |byte| f32::from(byte) / 255.));
    let floats = || array::<f32>(path).map(|array| clips(path, array, spec, |value| value));
    let doubles = || array::<f64>(path).map(|array| clips(path, array, spec, |value| value as f32));
    bytes()
        .or_else(|error| if_of_another_type(error, floats))
        .or_else(|error| if_of_another_type(error, doubles))
        .map_err(|error| unreadable(path, error))?
}

fn array<A: ReadableElement>(path: &Path) -> Result<ArrayD<A>, ReadNpyError> {
    ArrayD::read_npy(BufReader::new(File::open(path)?))
}

fn if_of_another_type<T>(
    error: ReadNpyError,
    read: impl FnOnce() -> Result<T, ReadNpyError>,
) -> Result<T, ReadNpyError> {
    match error {
        ReadNpyError::WrongDescriptor(_) => read(),
        error => Err(error),
    }
}

fn clips<A: Copy>(path: &Path, array: ArrayD<A>, spec: &VideoSpec, scale: fn(A) -> f32) -> Result<Tensor> {
    let refused = |message: String| Err(Error::msg(format!("{}: {message}", path.display())));
    let frames = spec.frames_in + spec.frames_out;
    let shape = array.shape().to_vec();
    let clips = match *shape.as_slice() {
        [_, _, _] => array.insert_axis(Axis(0)).insert_axis(Axis(2)),
        // The test file of Moving MNIST is (20, 10000, 64, 64), time first. Read as 20 clips, it would give a
        // prediction from 10 unrelated frames, so shapes that are hardly intended are refused.
        [times, clips, _, _] if times == frames && clips > 100 * frames => {
            return refused(format!(
                "its axes are {shape:?}, which looks like {clips} clips with time first; expected (N, T, H, W), \
                 or (N, T, C, H, W) if these really are {times} clips"
            ));
        }
        [_, _, _, _] => array.insert_axis(Axis(2)),
        [_, _, _, _, _] => array,
        _ => {
            return refused(format!(
                "its axes are {shape:?}; expected (T, H, W), (N, T, H, W) or (N, T, C, H, W)"
            ));
        }
    };
    let used = clips.len_of(Axis(1)).min(frames);
    let clips = clips.slice_axis(Axis(1), ndarray::Slice::from(..used));
    let values: Vec<f32> = clips.iter().map(|&value| scale(value)).collect();
    if let Some(value) = values.iter().find(|value| !(-OVERSHOOT..=1. + OVERSHOOT).contains(*value)) {
        return refused(format!(
            "it has the value {value}; expected float frames to be within 0 and 1 (uint8 frames: 0 to 255)"
        ));
    }
    Ok(Tensor::from_vec(values, clips.shape(), &Device::Cpu)?)
}

fn unreadable(path: &Path, error: ReadNpyError) -> Error {
    match error {
        ReadNpyError::Io(source) => Error::File { path: path.to_path_buf(), source },
        ReadNpyError::WrongDescriptor(found) => Error::msg(format!(
            "{}: its values are {found}; expected uint8, float32 or float64",
            path.display()
        )),
        error => Error::msg(format!("{}: cannot be read as .npy: {error}", path.display())),
    }
}

/// Encodes the tensor as the bytes of a float32 file.
pub(super) fn bytes(tensor: &Tensor) -> Result<Vec<u8>> {
    let values = tensor.to_device(&Device::Cpu)?.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
    let failed =
        |error: &dyn std::fmt::Display| Error::msg(format!("cannot encode a tensor as .npy: {error}"));
    let array = ArrayD::from_shape_vec(tensor.dims(), values).map_err(|error| failed(&error))?;
    let mut bytes = Cursor::new(Vec::new());
    array.write_npy(&mut bytes).map_err(|error| failed(&error))?;
    Ok(bytes.into_inner())
}
