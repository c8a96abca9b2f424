//! Images of single handwritten digits: drawn by this crate (`"builtin"`), or read from MNIST's own files.
//!
//! MNIST: Y. LeCun, C. Cortes, C. Burges, "The MNIST database of handwritten digits", 1998.

mod idx;
mod resize;
mod strokes;

use std::path::{Path, PathBuf};

use candlepower::data::Split;
use candlepower::error::{Error, Result};

use crate::parts::part;

/// Rows and columns of an MNIST image.
pub const SIDE: usize = 28;
/// The setting that selects the digits drawn by this crate.
pub const BUILTIN: &str = "builtin";

/// Square gray images of one size, one byte per pixel: 0 is paper, 255 is ink.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Images {
    side: usize,
    pixels: Vec<u8>,
}

impl Images {
    /// Images of `side` rows and columns, stored consecutively in `pixels`.
    ///
    /// # Errors
    /// If `pixels` is not a whole number of such images.
    pub fn new(side: usize, pixels: Vec<u8>) -> Result<Self> {
        if side == 0 || !pixels.len().is_multiple_of(side * side) {
            let pixels = pixels.len();
            return Err(Error::msg(format!(
                "{pixels} pixels are not a whole number of {side}x{side} images"
            )));
        }
        Ok(Self { side, pixels })
    }

    /// Rows and columns of an image.
    pub fn side(&self) -> usize {
        self.side
    }

    /// The number of images.
    pub fn len(&self) -> usize {
        self.pixels.len() / (self.side * self.side)
    }

    /// Whether there are no images.
    pub fn is_empty(&self) -> bool {
        self.pixels.is_empty()
    }

    /// The pixels of an image, row by row.
    ///
    /// # Panics
    /// If `index` is not below [`Self::len`].
    pub fn get(&self, index: usize) -> &[u8] {
        let pixels = self.side * self.side;
        &self.pixels[index * pixels..][..pixels]
    }

    /// The images scaled to `side` rows and columns, which must not be fewer than now. Bit-identical to
    /// Pillow's bilinear filter.
    pub fn enlarged(&self, side: usize) -> Self {
        resize::enlarge(self, side)
    }
}

/// The images of one split, 28x28, from the `digits` setting of a dataset: `"builtin"` or a folder of IDX files.
///
/// # Errors
/// If the folder does not exist, holds no MNIST images, or holds a broken file.
pub fn images(digits: &str, split: Split) -> Result<Images> {
    if digits == BUILTIN {
        return Ok(strokes::draw(split).0);
    }
    let files = IdxFiles::find(Path::new(digits), split)?;
    let pixels = files.part(idx::read_images(&files.images)?, SIDE * SIDE)?;
    Ok(Images { side: SIDE, pixels })
}

/// The images of one split, and the digit that each shows, 0 to 9.
///
/// # Errors
/// Like [`images`]; also if the labels are missing or do not match the images.
pub fn labelled(digits: &str, split: Split) -> Result<(Images, Vec<u8>)> {
    if digits == BUILTIN {
        return Ok(strokes::draw(split));
    }
    let files = IdxFiles::find(Path::new(digits), split)?;
    let pixels = idx::read_images(&files.images)?;
    let labels = idx::read_labels(&files.labels()?, pixels.len() / (SIDE * SIDE))?;
    Ok((Images { side: SIDE, pixels: files.part(pixels, SIDE * SIDE)? }, files.part(labels, 1)?))
}

/// The files of a folder that one split is read from.
struct IdxFiles {
    folder: PathBuf,
    /// MNIST's two sets: `train` (60,000 digits) and `t10k` (10,000).
    set: &'static str,
    images: PathBuf,
    split: Split,
    /// Whether one set must serve all splits.
    shared: bool,
}

impl IdxFiles {
    /// The set that belongs to `split`, or a part of the only set if the folder holds just one.
    fn find(folder: &Path, split: Split) -> Result<Self> {
        let refuse = |what| {
            let message = format!(
                "{}: {what}; use \"builtin\" for the digits that need no download, or a folder that holds \
                 `train-images-idx3-ubyte` or `t10k-images-idx3-ubyte`, plain or .gz",
                folder.display()
            );
            Error::setting("digits", message)
        };
        if !folder.exists() {
            return Err(refuse("no such folder"));
        } else if !folder.is_dir() {
            return Err(refuse("not a folder"));
        }
        let images = |set| Some((set, find(folder, &format!("{set}-images-idx3-ubyte"))?));
        let (train, t10k) = (images("train"), images("t10k"));
        let shared = train.is_none() || t10k.is_none();
        let (first, second) = if split == Split::Train { (train, t10k) } else { (t10k, train) };
        let (set, images) = first.or(second).ok_or_else(|| refuse("no MNIST images in this folder"))?;
        Ok(Self { folder: folder.to_path_buf(), set, images, split, shared })
    }

    fn labels(&self) -> Result<PathBuf> {
        let name = format!("{}-labels-idx1-ubyte", self.set);
        find(&self.folder, &name).ok_or_else(|| {
            let folder = self.folder.display();
            Error::setting("digits", format!("{folder}: expected `{name}` or `{name}.gz` in this folder"))
        })
    }

    /// The part of `data` that belongs to the split. `data` has `size` bytes for each digit.
    fn part(&self, mut data: Vec<u8>, size: usize) -> Result<Vec<u8>> {
        if self.shared {
            let part = part(self.split, data.len() / size);
            data.truncate(part.end * size);
            data.drain(..part.start * size);
        }
        if data.is_empty() {
            let (file, split) = (self.images.display(), self.split.name());
            return Err(Error::msg(format!("{file}: too few images for the {split} split")));
        }
        Ok(data)
    }
}

/// The file with this name, plain or compressed.
fn find(folder: &Path, name: &str) -> Option<PathBuf> {
    [folder.join(name), folder.join(format!("{name}.gz"))].into_iter().find(|path| path.is_file())
}

#[cfg(test)]
pub(crate) mod tests {
    #![allow(clippy::unwrap_used)]

    use std::io::Write;

    use flate2::Compression;
    use flate2::write::GzEncoder;

    use super::*;

    pub(crate) fn gz(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    /// An IDX file of images; all pixels of image i are i.
    fn images_file(count: u8) -> Vec<u8> {
        let header = [0, 0, 8, 3, 0, 0, 0, count, 0, 0, 0, 28, 0, 0, 0, 28];
        header.into_iter().chain((0..count).flat_map(|i| [i; SIDE * SIDE])).collect()
    }

    /// An IDX file of labels; label i is i modulo 10.
    fn labels_file(count: u8) -> Vec<u8> {
        [0, 0, 8, 1, 0, 0, 0, count].into_iter().chain((0..count).map(|i| i % 10)).collect()
    }

    fn folder<const N: usize>(files: [(&str, Vec<u8>); N]) -> (tempfile::TempDir, String) {
        let folder = tempfile::tempdir().unwrap();
        for (name, content) in files {
            std::fs::write(folder.path().join(name), content).unwrap();
        }
        let path = folder.path().display().to_string();
        (folder, path)
    }

    /// The numbers of a split's images.
    fn numbers(digits: &str, split: Split) -> Vec<u8> {
        let images = images(digits, split).unwrap();
        (0..images.len()).map(|i| images.get(i)[5]).collect()
    }

    fn error<T>(result: Result<T>) -> String {
        result.err().unwrap().to_string()
    }

    #[test]
    fn one_file_serves_all_splits_without_overlap() {
        for (name, content) in [
            ("t10k-images-idx3-ubyte", images_file(20)),
            ("t10k-images-idx3-ubyte.gz", gz(&images_file(20))),
            ("train-images-idx3-ubyte", images_file(20)),
            ("train-images-idx3-ubyte.gz", gz(&images_file(20))),
        ] {
            let (_folder, digits) = folder([(name, content)]);
            assert_eq!(numbers(&digits, Split::Train), (0..18).collect::<Vec<_>>(), "{name}");
            assert_eq!(numbers(&digits, Split::Val), [18, 19], "{name}");
            assert_eq!(numbers(&digits, Split::Test), [18, 19], "{name}");
        }
    }

    #[test]
    fn two_files_serve_a_split_each() {
        let (_folder, digits) = folder([
            ("train-images-idx3-ubyte", images_file(12)),
            ("t10k-images-idx3-ubyte.gz", gz(&images_file(4))),
        ]);
        assert_eq!(numbers(&digits, Split::Train).len(), 12);
        assert_eq!(numbers(&digits, Split::Val).len(), 4);
        assert_eq!(numbers(&digits, Split::Test).len(), 4);
    }

    #[test]
    fn labels_go_with_their_images() {
        let (_folder, digits) = folder([
            ("t10k-images-idx3-ubyte", images_file(20)),
            ("t10k-labels-idx1-ubyte.gz", gz(&labels_file(20))),
        ]);
        let (images, labels) = labelled(&digits, Split::Val).unwrap();
        assert_eq!((images.len(), labels), (2, vec![8, 9]));
        assert_eq!(labelled(&digits, Split::Train).unwrap().1.len(), 18);
    }

    #[test]
    fn a_folder_that_does_not_fit_is_refused_with_what_would() {
        let instead = "use \"builtin\" for the digits that need no download, or a folder that holds \
                       `train-images-idx3-ubyte` or `t10k-images-idx3-ubyte`, plain or .gz";
        let refusal = |digits: &str| error(images(digits, Split::Train));
        assert_eq!(refusal("no/where"), format!("`digits`: no/where: no such folder; {instead}"));
        let (_folder, digits) = folder([("note.txt", vec![])]);
        assert_eq!(
            refusal(&digits),
            format!("`digits`: {digits}: no MNIST images in this folder; {instead}")
        );
        let file = format!("{digits}/note.txt");
        assert_eq!(refusal(&file), format!("`digits`: {file}: not a folder; {instead}"));
        let (_folder, digits) = folder([("t10k-images-idx3-ubyte", images_file(20))]);
        assert_eq!(
            error(labelled(&digits, Split::Val)),
            format!(
                "`digits`: {digits}: expected `t10k-labels-idx1-ubyte` or `t10k-labels-idx1-ubyte.gz` in this folder"
            )
        );
    }

    #[test]
    fn a_broken_file_is_refused_by_name() {
        let name = "t10k-images-idx3-ubyte";
        let refusal = |content: &[u8]| {
            let (_folder, digits) = folder([(name, content.to_vec())]);
            let message = error(images(&digits, Split::Val));
            message.strip_prefix(&format!("{digits}/{name}: ")).unwrap().to_string()
        };
        let whole = images_file(2);
        assert_eq!(
            refusal(&whole[..800]),
            "has 784 bytes after its header, which promises 2 images of 28x28 (1568)"
        );
        assert_eq!(
            refusal(&[&whole[..], &[0]].concat()),
            "has 1569 bytes after its header, which promises 2 images of 28x28 (1568)"
        );
        assert_eq!(refusal(&whole[..15]), "has 15 bytes, expected an IDX file of images with a header of 16");
        assert_eq!(
            refusal(&labels_file(20)),
            "starts with 0x00000801, expected 0x00000803, an IDX file of images"
        );
        let mut wide = whole.clone();
        wide[15] = 29;
        assert_eq!(refusal(&wide), "holds images of 28x29 pixels, expected 28x28");
        assert_eq!(refusal(&images_file(0)), "too few images for the val split");

        let (_folder, digits) = folder([(&*format!("{name}.gz"), gz(&whole)[..30].to_vec())]);
        let message = error(images(&digits, Split::Val));
        assert!(message.starts_with(&format!("{digits}/{name}.gz: a broken gzip file: ")), "{message}");
    }

    #[test]
    fn labels_that_do_not_fit_are_refused() {
        let refusal = |labels: Vec<u8>| {
            let (_folder, digits) =
                folder([("t10k-images-idx3-ubyte", images_file(20)), ("t10k-labels-idx1-ubyte", labels)]);
            let message = error(labelled(&digits, Split::Val));
            message.strip_prefix(&format!("{digits}/t10k-labels-idx1-ubyte: ")).unwrap().to_string()
        };
        assert_eq!(refusal(labels_file(19)), "holds 19 labels, expected 20, one for each image");
        let mut labels = labels_file(20);
        labels[10] = 77;
        assert_eq!(refusal(labels.clone()), "holds the label 77, expected 0 to 9");
        labels.pop();
        assert_eq!(refusal(labels), "has 19 bytes after its header, which promises 20 labels (20)");
    }

    #[test]
    fn images_are_whole() {
        assert_eq!(error(Images::new(3, vec![0; 10])), "10 pixels are not a whole number of 3x3 images");
        assert_eq!(error(Images::new(0, vec![])), "0 pixels are not a whole number of 0x0 images");
    }
}
