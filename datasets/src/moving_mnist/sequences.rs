//! Finished sequences: `mnist_test_seq.npy`, unsigned bytes (time, sequence, row, column).

use std::path::Path;

use candlepower::batch::VideoSpec;
use candlepower::data::Split;
use candlepower::error::{Error, Result};

use crate::bytes::Bytes;
use crate::npy::{Array, Element};
use crate::parts::part;

/// The sequences of one split.
pub(super) struct Sequences {
    bytes: Bytes,
    /// Offset in `bytes` of the first frame of the split's first sequence.
    start: u64,
    /// Bytes between consecutive frames of a sequence: time is the file's outermost axis.
    stride: usize,
    /// Bytes of a frame.
    frame: usize,
    len: usize,
}

/// Whether the name is that of a sequence file.
pub(super) fn is_sequence_file(path: &Path) -> bool {
    let name = path.to_string_lossy();
    name.ends_with(".npy") || name.ends_with(".npy.gz")
}

impl Sequences {
    /// Opens a split of an .npy file, which is read on demand, or of an .npy.gz file, which is unpacked into memory.
    ///
    /// # Errors
    /// If the file is missing or broken, or if its sequences are too short or of another size than `spec`.
    pub(super) fn open(path: &Path, split: Split, spec: &VideoSpec) -> Result<Self> {
        let shown = path.display();
        if !path.is_file() {
            return Err(Error::setting(
                "digits",
                format!(
                    "{shown}: no such file; use \"builtin\" for the digits that need no download, or a folder of \
                     MNIST's IDX files"
                ),
            ));
        }
        let expected = "expected an .npy array of unsigned bytes, (time, sequence, row, column)";
        let array = Array::open(path, None).map_err(|error| match error {
            Error::Message(message) => Error::msg(format!("{message}; {expected}")),
            error => error,
        })?;
        let &[time, sequences, height, width] = array.shape.as_slice() else {
            return Err(Error::msg(format!("{shown}: its axes are {:?}; {expected}", array.shape)));
        };
        if array.element != Element::U8 {
            return Err(Error::msg(format!("{shown}: its values are {:?}; {expected}", array.element)));
        }
        if [height, width] != [spec.height, spec.width] {
            return Err(Error::setting(
                "image_size",
                format!(
                    "expected the size of the frames in {shown}, {height}x{width}, found {}",
                    spec.height
                ),
            ));
        }
        let (frames_in, frames_out) = (spec.frames_in, spec.frames_out);
        if frames_in + frames_out > time {
            return Err(Error::setting(
                "frames_out",
                format!(
                    "expected at most {time} frames, which is what the sequences of {shown} have, found {frames_in} in \
                     + {frames_out} out = {}",
                    frames_in + frames_out
                ),
            ));
        }
        let part = part(split, sequences);
        if part.is_empty() {
            return Err(Error::msg(format!("{shown}: too few sequences for the {} split", split.name())));
        }
        let frame = height * width;
        let whole = Self {
            bytes: array.bytes,
            start: array.start + (part.start * frame) as u64,
            stride: sequences * frame,
            frame,
            len: part.len(),
        };
        Ok(whole.trimmed(time))
    }

    /// Keeps only the split's part in memory. Data in a file takes no memory, so it is left alone.
    fn trimmed(self, time: usize) -> Self {
        let Bytes::Memory(bytes) = &self.bytes else { return self };
        let stride = self.len * self.frame;
        let frames = (0..time).flat_map(|time| &bytes[self.start as usize + time * self.stride..][..stride]);
        Self { bytes: Bytes::Memory(frames.copied().collect()), start: 0, stride, ..self }
    }

    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// Writes a sequence into `frames`, each (H, W), f32 in `[0, 1]`, in order of time.
    pub(super) fn read<'a>(&self, index: usize, frames: impl Iterator<Item = &'a mut [f32]>) -> Result<()> {
        if index >= self.len {
            return Err(Error::msg(format!("there is no sequence {index}: the split has {}", self.len)));
        }
        let mut bytes = vec![0; self.frame];
        for (time, frame) in frames.enumerate() {
            self.bytes.read(self.start + (time * self.stride + index * self.frame) as u64, &mut bytes)?;
            for (pixel, &byte) in frame.iter_mut().zip(&bytes) {
                *pixel = f32::from(byte) / 255.;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use candlepower::data::{Dataset, Open, Sample};
    use ndarray::{Array, Array4, ShapeBuilder};
    use ndarray_npy::{WritableElement, WriteNpyExt};

    use super::super::{Config, MovingMnist};
    use super::*;
    use crate::mnist::tests::gz;

    const SIZE: usize = 33;

    /// Frame `time` of sequence `i` is filled with 10 * i + time.
    fn array() -> Array4<u8> {
        Array::from_shape_fn((6, 20, SIZE, SIZE), |(time, i, _, _)| (10 * i + time) as u8)
    }

    fn npy<T: WritableElement, D: ndarray::Dimension>(array: &Array<T, D>) -> Vec<u8> {
        let mut bytes = Vec::new();
        array.write_npy(&mut bytes).unwrap();
        bytes
    }

    fn config(folder: &tempfile::TempDir, name: &str, content: &[u8]) -> Config {
        let path = folder.path().join(name);
        std::fs::write(&path, content).unwrap();
        let digits = path.display().to_string();
        Config { digits, image_size: SIZE, frames_in: 2, frames_out: 3, ..Config::default() }
    }

    /// The error of opening a file, without its path.
    fn refusal(content: &[u8], change: impl Fn(&mut Config)) -> String {
        let folder = tempfile::tempdir().unwrap();
        let mut config = config(&folder, "seq.npy", content);
        change(&mut config);
        let error = MovingMnist::open(&config, Split::Val).err().unwrap().to_string();
        error.replace(&config.digits, "FILE")
    }

    #[test]
    fn plain_and_compressed_files_are_read_alike() {
        let folder = tempfile::tempdir().unwrap();
        let bytes = npy(&array());
        for config in [config(&folder, "seq.npy", &bytes), config(&folder, "seq.npy.gz", &gz(&bytes))] {
            for (split, first, len) in [(Split::Train, 0, 18), (Split::Val, 18, 2), (Split::Test, 18, 2)] {
                let data = MovingMnist::open(&config, split).unwrap();
                assert_eq!(data.len(), len);
                let sample = |index| Sample {
                    index,
                    split,
                    epoch: 0,
                    seed: 0,
                    repeat: 0,
                    augment: split == Split::Train,
                };
                let batch = data.batch(&[sample(1), sample(0)]).unwrap();
                assert_eq!(batch.input.dims(), [2, 2, 1, SIZE, SIZE]);
                let pixel = |tensor: &candle_core::Tensor, i: usize, time: usize| {
                    tensor.get(i).unwrap().get(time).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap()
                        [77]
                };
                let expected = |i: usize, time: usize| f32::from((10 * i + time) as u8) / 255.;
                assert_eq!(pixel(&batch.input, 0, 1), expected(first + 1, 1));
                assert_eq!(pixel(&batch.target, 1, 2), expected(first, 4));
                assert_eq!(
                    data.batch(&[sample(len)]).unwrap_err().to_string(),
                    format!("there is no sequence {len}: the split has {len}")
                );
            }
            let some = Config { train_samples: Some(5), ..config };
            assert_eq!(MovingMnist::open(&some, Split::Train).unwrap().len(), 5);
        }
    }

    #[test]
    fn a_compressed_file_keeps_only_its_split_in_memory() {
        let folder = tempfile::tempdir().unwrap();
        let config = config(&folder, "seq.npy.gz", &gz(&npy(&array())));
        let spec = MovingMnist::open(&config, Split::Val).unwrap().spec();
        let sequences = Sequences::open(config.digits.as_ref(), Split::Val, &spec).unwrap();
        assert_eq!(sequences.bytes.len(), (6 * 2 * SIZE * SIZE) as u64);
    }

    #[test]
    fn sizes_that_do_not_fit_the_file_are_refused() {
        let bytes = npy(&array());
        assert_eq!(
            refusal(&bytes, |config| config.frames_out = 5),
            "`frames_out`: expected at most 6 frames, which is what the sequences of FILE have, found 2 in + 5 out = 7"
        );
        assert_eq!(
            refusal(&bytes, |config| config.image_size = 64),
            "`image_size`: expected the size of the frames in FILE, 33x33, found 64"
        );
        assert_eq!(
            refusal(&bytes, |config| config.digits = "no/where.npy.gz".to_string()),
            "`digits`: FILE: no such file; use \"builtin\" for the digits that need no download, or a folder of \
             MNIST's IDX files"
        );
    }

    #[test]
    fn files_that_are_something_else_are_refused() {
        let expected = "expected an .npy array of unsigned bytes, (time, sequence, row, column)";
        let whole = npy(&array());
        for (content, reason) in [
            (whole[..5000].to_vec(), "has 4872 bytes after its header, which promises 130680"),
            (b"PK\x03\x04 not an array".to_vec(), "not an .npy array"),
            (npy(&Array4::<f32>::zeros((6, 20, 3, 3))), "its values are F32"),
            (npy(&Array4::<i32>::zeros((6, 20, 3, 3))), "its values are '<i4'"),
            (npy(&Array::<u8, _>::zeros((6, 20, 3))), "its axes are [6, 20, 3]"),
            (npy(&Array4::<u8>::zeros((6, 20, 3, 3).f())), "Fortran order"),
            (Vec::new(), ""),
        ] {
            let message = refusal(&content, |_| ());
            assert!(message.starts_with("FILE: ") && message.contains(reason), "{message}");
            assert!(message.contains(expected), "{message}");
        }
        let empty = npy(&Array4::<u8>::zeros((6, 0, SIZE, SIZE)));
        assert_eq!(refusal(&empty, |_| ()), "FILE: too few sequences for the val split");
        let folder = tempfile::tempdir().unwrap();
        let config = config(&folder, "seq.npy.gz", &gz(&whole)[..60]);
        let message = MovingMnist::open(&config, Split::Val).err().unwrap().to_string();
        assert!(message.starts_with(&format!("{}: a broken gzip file: ", config.digits)), "{message}");
    }
}
