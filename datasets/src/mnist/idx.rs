//! MNIST's file format: a big-endian header, then one byte per value.

use std::io::Read;
use std::path::Path;

use candlepower::error::{Error, Result};
use flate2::read::MultiGzDecoder;

use super::SIDE;

/// Unsigned bytes in three dimensions: images, rows, columns.
const IMAGES: u32 = 0x0803;
/// Unsigned bytes in one dimension.
const LABELS: u32 = 0x0801;

/// The pixels of every image of an IDX file, plain or gzipped (`.gz`).
///
/// # Errors
/// If the file does not hold 28x28 images, or is longer or shorter than its header says.
pub(super) fn read_images(path: &Path) -> Result<Vec<u8>> {
    let (dims, pixels) = read::<3>(path, IMAGES, "images")?;
    let [count, rows, columns] = dims;
    if [rows, columns] != [SIDE; 2] {
        return refuse(path, format!("holds images of {rows}x{columns} pixels, expected {SIDE}x{SIDE}"));
    }
    expect_len(
        path,
        pixels.len(),
        count.saturating_mul(SIDE * SIDE),
        format!("{count} images of {SIDE}x{SIDE}"),
    )?;
    Ok(pixels)
}

/// The labels of an IDX file that belong to `images` images, plain or gzipped (`.gz`).
///
/// # Errors
/// If the file does not hold labels from 0 to 9, or not exactly one for each image.
pub(super) fn read_labels(path: &Path, images: usize) -> Result<Vec<u8>> {
    let ([count], labels) = read::<1>(path, LABELS, "labels")?;
    expect_len(path, labels.len(), count, format!("{count} labels"))?;
    if count != images {
        return refuse(path, format!("holds {count} labels, expected {images}, one for each image"));
    }
    if let Some(label) = labels.iter().find(|&&label| label > 9) {
        return refuse(path, format!("holds the label {label}, expected 0 to 9"));
    }
    Ok(labels)
}

/// The dimensions and the bytes after the header.
fn read<const DIMS: usize>(path: &Path, magic: u32, what: &str) -> Result<([usize; DIMS], Vec<u8>)> {
    let mut bytes = std::fs::read(path).map_err(Error::file(path))?;
    if path.extension().is_some_and(|extension| extension == "gz") {
        let mut plain = Vec::new();
        let unpacked = MultiGzDecoder::new(&bytes[..]).read_to_end(&mut plain);
        unpacked.map_err(|error| Error::msg(format!("{}: a broken gzip file: {error}", path.display())))?;
        bytes = plain;
    }
    let header = 4 * (1 + DIMS);
    if bytes.len() < header {
        let len = bytes.len();
        return refuse(
            path,
            format!("has {len} bytes, expected an IDX file of {what} with a header of {header}"),
        );
    }
    let content = bytes.split_off(header);
    let mut words =
        bytes.chunks_exact(4).map(|word| word.iter().fold(0, |n, &byte| n << 8 | u32::from(byte)));
    let found = words.next().unwrap_or_default();
    if found != magic {
        return refuse(
            path,
            format!("starts with {found:#010x}, expected {magic:#010x}, an IDX file of {what}"),
        );
    }
    let mut dims = [0; DIMS];
    dims.iter_mut().zip(words).for_each(|(dim, word)| *dim = word as usize);
    Ok((dims, content))
}

fn expect_len(path: &Path, len: usize, expected: usize, what: String) -> Result<()> {
    match len == expected {
        true => Ok(()),
        false => {
            refuse(path, format!("has {len} bytes after its header, which promises {what} ({expected})"))
        }
    }
}

fn refuse<T>(path: &Path, message: String) -> Result<T> {
    Err(Error::msg(format!("{}: {message}", path.display())))
}
