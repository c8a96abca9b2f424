//! Arrays in NumPy's `.npy` files and `.npz` archives.

use std::fs::File;
use std::io::{BufReader, Cursor, Read};
use std::path::{Path, PathBuf};

use candlepower::error::{Error, Result};
use flate2::read::MultiGzDecoder;
use npyz::{DType, Endianness, NpyHeader, Order, TypeChar};
use zip::{CompressionMethod, ZipArchive};

use crate::bytes::Bytes;

/// An array of numbers in a file, in C order.
pub(crate) struct Array {
    pub(crate) path: PathBuf,
    pub(crate) shape: Vec<usize>,
    pub(crate) element: Element,
    pub(crate) bytes: Bytes,
    /// Offset of the first element in `bytes`.
    pub(crate) start: u64,
}

/// The type of a number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Element {
    U8,
    U16,
    F32,
    F64,
}

impl Element {
    fn size(self) -> usize {
        match self {
            Self::U8 => 1,
            Self::U16 => 2,
            Self::F32 => 4,
            Self::F64 => 8,
        }
    }

    /// The values that usually represent black and white.
    pub(crate) fn range(self) -> [f32; 2] {
        match self {
            Self::U8 => [0., 255.],
            Self::U16 => [0., 65535.],
            Self::F32 | Self::F64 => [0., 1.],
        }
    }
}

/// Whether the name is that of an array file or archive.
pub(crate) fn is_array_file(path: &Path) -> bool {
    let name = path.to_string_lossy().to_lowercase();
    [".npy", ".npy.gz", ".npz"].iter().any(|end| name.ends_with(end))
}

impl Array {
    /// Opens an array. Compressed arrays are unpacked into memory; others are read on demand. `name` selects
    /// an array of an `.npz` archive that holds several.
    ///
    /// # Errors
    /// If the file is missing, truncated, in Fortran order, or of another type. Errors name the file and what
    /// was expected.
    pub(crate) fn open(path: &Path, name: Option<&str>) -> Result<Self> {
        let extension = path.extension().unwrap_or_default().to_ascii_lowercase();
        if extension == "npz" {
            return archived(path, name);
        }
        let bytes = Bytes::open(path)?;
        let Bytes::File { file, .. } = &bytes else { return Self::new(path, bytes, 0, None) };
        if extension == "gz" {
            let mut unpacked = Vec::new();
            let read = MultiGzDecoder::new(BufReader::new(file)).read_to_end(&mut unpacked);
            read.map_err(|error| Error::msg(format!("{}: a broken gzip file: {error}", path.display())))?;
            return Self::new(path, Bytes::Memory(unpacked), 0, None);
        }
        Self::new(path, bytes, 0, None)
    }

    /// The array whose header starts at `start` and which takes `len` bytes, or everything to the end.
    fn new(path: &Path, bytes: Bytes, start: u64, len: Option<u64>) -> Result<Self> {
        let refused = |message: String| Err(Error::msg(format!("{}: {message}", path.display())));
        let len = len.unwrap_or(bytes.len().saturating_sub(start));
        // Headers are short: NumPy itself rejects longer ones.
        let mut head = vec![0; len.min(16 << 10) as usize];
        bytes.read(start, &mut head)?;
        let mut head = Cursor::new(head);
        let header = match NpyHeader::from_reader(&mut head) {
            Ok(header) => header,
            Err(error) => return refused(format!("not an .npy array: {error}")),
        };
        let element = match element(&header.dtype()) {
            Some(element) => element,
            None => {
                let found = header.dtype().descr();
                return refused(format!(
                    "its values are {found}; expected uint8, uint16, float32 or float64"
                ));
            }
        };
        if header.order() == Order::Fortran && header.shape().len() > 1 {
            return refused(
                "the array is in Fortran order; expected C order: numpy.ascontiguousarray".into(),
            );
        }
        let shape: Vec<usize> = header.shape().iter().map(|&side| side as usize).collect();
        let elements = shape.iter().try_fold(element.size(), |product, &side| product.checked_mul(side));
        let (header, content) = (head.position(), len - head.position());
        match elements {
            Some(expected) if expected as u64 == content => {}
            _ => {
                let expected = elements.map_or("more".into(), |expected| expected.to_string());
                return refused(format!(
                    "has {content} bytes after its header, which promises {expected}, an array {shape:?}"
                ));
            }
        }
        Ok(Self { path: path.to_path_buf(), shape, element, bytes, start: start + header })
    }

    /// Fills `out` with the elements starting at number `first`, without scaling.
    pub(crate) fn read(&self, first: usize, out: &mut [f32]) -> Result<()> {
        let size = self.element.size();
        let mut bytes = vec![0; out.len() * size];
        self.bytes.read(self.start + (first * size) as u64, &mut bytes)?;
        let elements = out.iter_mut().zip(bytes.chunks_exact(size));
        elements.for_each(|(out, bytes)| {
            *out = match *bytes {
                [a] => f32::from(a),
                [a, b] => f32::from(u16::from_le_bytes([a, b])),
                [a, b, c, d] => f32::from_le_bytes([a, b, c, d]),
                [a, b, c, d, e, f, g, h] => f64::from_le_bytes([a, b, c, d, e, f, g, h]) as f32,
                _ => f32::NAN,
            }
        });
        Ok(())
    }
}

fn element(dtype: &DType) -> Option<Element> {
    let DType::Plain(plain) = dtype else { return None };
    match (plain.type_char(), plain.size_field()) {
        (TypeChar::Uint, 1) => Some(Element::U8),
        _ if plain.endianness() != Endianness::Little => None,
        (TypeChar::Uint, 2) => Some(Element::U16),
        (TypeChar::Float, 4) => Some(Element::F32),
        (TypeChar::Float, 8) => Some(Element::F64),
        _ => None,
    }
}

/// Opens an array of an archive.
fn archived(path: &Path, name: Option<&str>) -> Result<Array> {
    let broken = |error: zip::result::ZipError| {
        Error::msg(format!("{}: not an .npz archive: {error}", path.display()))
    };
    let file = File::open(path).map_err(Error::file(path))?;
    let mut archive = ZipArchive::new(BufReader::new(file)).map_err(broken)?;
    let mut names = Vec::new();
    for i in 0..archive.len() {
        let entry = archive.by_index(i).map_err(broken)?;
        let entry = entry.name().map_err(broken)?;
        names.push(entry.strip_suffix(".npy").unwrap_or(&entry).to_string());
    }
    let index = match name {
        Some(name) => names.iter().position(|known| known == name),
        None if names.len() == 1 => Some(0),
        None => None,
    };
    let Some(index) = index else {
        let found = names.iter().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ");
        let message = format!("{}: it holds the arrays {found}; set this to one of them", path.display());
        return Err(Error::setting("array", message));
    };
    let mut entry = archive.by_index(index).map_err(broken)?;
    let (len, start) = (entry.size(), entry.data_start());
    if let (CompressionMethod::Stored, Some(start)) = (entry.compression(), start) {
        return Array::new(path, Bytes::open(path)?, start, Some(len));
    }
    let mut bytes = Vec::new();
    entry.read_to_end(&mut bytes).map_err(Error::file(path))?;
    Array::new(path, Bytes::Memory(bytes), 0, None)
}
