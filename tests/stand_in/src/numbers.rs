//! Numbers in device memory, as the libraries read and write them.

use crate::memory::Memory;
use crate::ptx::to_odd;
use half::{bf16, f16};
use std::ops::Not;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Kind {
    F32,
    F64,
    F16,
    BF16,
    U8,
}

impl Kind {
    pub(crate) fn bytes(self) -> usize {
        match self {
            Kind::F64 => 8,
            Kind::F32 => 4,
            Kind::F16 | Kind::BF16 => 2,
            Kind::U8 => 1,
        }
    }

    pub(crate) fn all(self, bytes: &[u8]) -> Vec<f64> {
        fn each<const N: usize>(bytes: &[u8], of: impl Fn([u8; N]) -> f64) -> Vec<f64> {
            bytes.as_chunks::<N>().0.iter().map(|it| of(*it)).collect()
        }
        match self {
            Kind::F64 => each(bytes, f64::from_le_bytes),
            Kind::F32 => each(bytes, |it| f64::from(f32::from_le_bytes(it))),
            Kind::F16 => each(bytes, |it| f64::from(f16::from_le_bytes(it).to_f32())),
            Kind::BF16 => each(bytes, |it| f64::from(bf16::from_le_bytes(it).to_f32())),
            Kind::U8 => bytes.iter().map(|it| f64::from(*it)).collect(),
        }
    }

    pub(crate) fn bytes_of(self, values: &[f64]) -> Vec<u8> {
        match self {
            Kind::F64 => values.iter().flat_map(|x| x.to_le_bytes()).collect(),
            Kind::F32 => values.iter().flat_map(|x| (*x as f32).to_le_bytes()).collect(),
            Kind::F16 => values.iter().flat_map(|x| f16::from_f32(to_odd(*x)).to_le_bytes()).collect(),
            Kind::BF16 => values.iter().flat_map(|x| bf16::from_f32(to_odd(*x)).to_le_bytes()).collect(),
            Kind::U8 => values.iter().map(|x| *x as u8).collect(),
        }
    }
}

/// A copy of a range of device memory.
pub(crate) fn bytes(memory: &Memory, at: u64, len: usize) -> Result<Vec<u8>, String> {
    let from = memory.host_of(at, len)?;
    // SAFETY: `host_of` checked this many bytes.
    Ok(unsafe { std::slice::from_raw_parts(from, len) }.to_vec())
}

pub(crate) fn put(memory: &mut Memory, at: u64, bytes: &[u8]) -> Result<(), String> {
    let to = memory.host_of(at, bytes.len())?;
    // SAFETY: `host_of` checked this many bytes.
    unsafe { to.copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) };
    Ok(())
}

pub(crate) fn read(memory: &Memory, at: u64, len: usize, kind: Kind) -> Result<Vec<f64>, String> {
    if !at.is_multiple_of(kind.bytes() as u64) {
        return Err(format!("{kind:?} at {at:#x}, which is no multiple of its size"));
    }
    Ok(kind.all(&bytes(memory, at, len * kind.bytes())?))
}

pub(crate) fn write(memory: &mut Memory, at: u64, values: &[f64], kind: Kind) -> Result<(), String> {
    put(memory, at, &kind.bytes_of(values))
}

/// Whether the environment lets libraries reduce 32-bit numbers to TF32.
pub(crate) fn tf32_allowed() -> bool {
    std::env::var("NVIDIA_TF32_OVERRIDE").is_ok_and(|it| it == "0").not()
}

/// Rounds to the 11 bits that tensor cores keep of a 32-bit number.
pub(crate) fn to_tf32(x: f64) -> f64 {
    let bits = (x as f32).to_bits();
    f64::from(f32::from_bits((bits + 0xfff + (bits >> 13 & 1)) & !0x1fff))
}

/// A matrix in host memory, with its row and column strides.
#[derive(Clone, Copy)]
pub(crate) struct Matrix<'a> {
    pub(crate) values: &'a [f64],
    pub(crate) row: usize,
    pub(crate) column: usize,
}

impl<'a> Matrix<'a> {
    /// A row-major matrix with this many columns.
    pub(crate) fn rows(values: &'a [f64], columns: usize) -> Self {
        Matrix { values, row: columns, column: 1 }
    }

    /// The transpose of a row-major matrix with this many columns.
    pub(crate) fn turned(values: &'a [f64], columns: usize) -> Self {
        Matrix { values, row: 1, column: columns }
    }
}

/// to (m, n), row-major, += a (m, k) b (k, n).
pub(crate) fn multiply(to: &mut [f64], a: Matrix, b: Matrix, [m, n, k]: [usize; 3]) {
    let last = |it: Matrix, rows: usize, columns: usize| (rows - 1) * it.row + (columns - 1) * it.column;
    if m == 0 || n == 0 || k == 0 {
        return;
    }
    assert!(to.len() >= m * n && last(a, m, k) < a.values.len() && last(b, k, n) < b.values.len());
    let stride = |x: usize| x as isize;
    // SAFETY: the last index of each matrix is checked above.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            to.as_mut_ptr(),
            1,
            stride(n),
            true,
            a.values.as_ptr(),
            stride(a.column),
            stride(a.row),
            b.values.as_ptr(),
            stride(b.column),
            stride(b.row),
            1.,
            1.,
            false,
            false,
            false,
            gemm::Parallelism::Rayon(0),
        );
    }
}
