//! libcublas: products of column-major matrices.

use crate::device::{Progress, device, owner};
use crate::driver::{current, give};
use crate::numbers::{Kind, Matrix, multiply, read, tf32_allowed, to_tf32, write};
use std::ffi::{c_int, c_longlong, c_void};
use std::sync::Arc;

const INVALID_VALUE: c_int = 7;
const NOT_SUPPORTED: c_int = 15;
/// The compute type that reduces 32-bit inputs to TF32, which keeps 11 bits.
const FAST_TF32: c_int = 77;

#[derive(Debug)]
pub(crate) struct Handle {
    stream: u64,
    ordinal: usize,
}

fn answer(result: Result<(), c_int>) -> c_int {
    result.err().unwrap_or(0)
}

fn kind(kind: c_int) -> Result<Kind, c_int> {
    Ok(match kind {
        0 => Kind::F32,
        1 => Kind::F64,
        2 => Kind::F16,
        14 => Kind::BF16,
        _ => return Err(NOT_SUPPORTED),
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cublasGetProperty(which: c_int, to: *mut c_int) -> c_int {
    // SAFETY: the caller passes a valid pointer.
    answer(unsafe { give(to, [13, 1, 0][which as usize]) })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cublasCreate_v2(to: *mut *mut Handle) -> c_int {
    // SAFETY: the caller passes a valid pointer.
    answer(
        current()
            .and_then(|ordinal| unsafe { give(to, Box::into_raw(Box::new(Handle { stream: 0, ordinal }))) }),
    )
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cublasDestroy_v2(handle: *mut Handle) -> c_int {
    // SAFETY: made by `cublasCreate_v2`.
    drop(unsafe { Box::from_raw(handle) });
    0
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cublasSetStream_v2(handle: *mut Handle, stream: u64) -> c_int {
    // SAFETY: made by `cublasCreate_v2`.
    unsafe { (*handle).stream = stream };
    0
}

/// A batch of matrices: type, address, stride between columns, stride between matrices, and whether
/// transposed.
#[derive(Clone, Copy)]
struct Operand {
    kind: Kind,
    at: u64,
    column: usize,
    batch: usize,
    turned: bool,
}

/// c = alpha a b + beta c.
struct Product {
    a: Operand,
    b: Operand,
    c: Operand,
    sizes: [usize; 3],
    batches: usize,
    scalars: [f64; 2],
    tf32: bool,
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cublasGemmStridedBatchedEx(
    handle: *mut Handle,
    turn_a: c_int,
    turn_b: c_int,
    m: c_int,
    n: c_int,
    k: c_int,
    alpha: *const c_void,
    a: u64,
    a_kind: c_int,
    a_column: c_int,
    a_batch: c_longlong,
    b: u64,
    b_kind: c_int,
    b_column: c_int,
    b_batch: c_longlong,
    beta: *const c_void,
    c: u64,
    c_kind: c_int,
    c_column: c_int,
    c_batch: c_longlong,
    batches: c_int,
    compute: c_int,
    _algorithm: c_int,
) -> c_int {
    let body = || {
        // Scalars have the compute type: 64 is 16-bit, 70 is 64-bit, all others are 32-bit.
        // SAFETY: the caller passes scalars of the compute type.
        let scalar = |at: *const c_void| unsafe {
            match compute {
                64 => half::f16::from_bits(*at.cast::<u16>()).to_f64(),
                70 => *at.cast::<f64>(),
                _ => f64::from(*at.cast::<f32>()),
            }
        };
        let operand = |of: c_int, at: u64, column: c_int, batch: c_longlong, turned: c_int| {
            Ok::<_, c_int>(Operand {
                kind: kind(of)?,
                at,
                column: size(column)?,
                batch: batch as usize,
                turned: turned != 0,
            })
        };
        let product = Product {
            a: operand(a_kind, a, a_column, a_batch, turn_a)?,
            b: operand(b_kind, b, b_column, b_batch, turn_b)?,
            c: operand(c_kind, c, c_column, c_batch, 0)?,
            sizes: [size(m)?, size(n)?, size(k)?],
            batches: size(batches)?,
            scalars: [scalar(alpha), scalar(beta)],
            tf32: compute == FAST_TF32 && tf32_allowed(),
        };
        // SAFETY: made by `cublasCreate_v2`.
        product.ask(unsafe { &*handle })
    };
    answer(body())
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cublasDgemmStridedBatched(
    handle: *mut Handle,
    turn_a: c_int,
    turn_b: c_int,
    m: c_int,
    n: c_int,
    k: c_int,
    alpha: *const f64,
    a: u64,
    a_column: c_int,
    a_batch: c_longlong,
    b: u64,
    b_column: c_int,
    b_batch: c_longlong,
    beta: *const f64,
    c: u64,
    c_column: c_int,
    c_batch: c_longlong,
    batches: c_int,
) -> c_int {
    // SAFETY: the same call with 64-bit types.
    unsafe {
        cublasGemmStridedBatchedEx(
            handle,
            turn_a,
            turn_b,
            m,
            n,
            k,
            alpha.cast(),
            a,
            1,
            a_column,
            a_batch,
            b,
            1,
            b_column,
            b_batch,
            beta.cast(),
            c,
            1,
            c_column,
            c_batch,
            batches,
            70,
            0,
        )
    }
}

fn size(x: c_int) -> Result<usize, c_int> {
    usize::try_from(x).map_err(|_| INVALID_VALUE)
}

impl Product {
    fn ask(self, handle: &Handle) -> Result<(), c_int> {
        let ordinal = if handle.stream == 0 { handle.ordinal } else { owner(handle.stream) };
        device(ordinal)?.ask(
            handle.stream,
            "product",
            Arc::new(move |memory| {
                let [m, n, k] = self.sizes;
                for batch in 0..self.batches {
                    let load = |it: Operand, rows: usize, columns: usize| {
                        let (rows, columns) = if it.turned { (columns, rows) } else { (rows, columns) };
                        let len = (columns.max(1) - 1) * it.column + rows;
                        let mut values =
                            read(memory, it.at + (batch * it.batch * it.kind.bytes()) as u64, len, it.kind)?;
                        if self.tf32 && it.kind == Kind::F32 {
                            values.iter_mut().for_each(|x| *x = to_tf32(*x));
                        }
                        Ok::<_, String>(values)
                    };
                    let view = |it: Operand, values| match it.turned {
                        true => Matrix { values, row: it.column, column: 1 },
                        false => Matrix { values, row: 1, column: it.column },
                    };
                    let (a, b) = (load(self.a, m, k)?, load(self.b, k, n)?);
                    let mut product = vec![0.; m * n];
                    multiply(&mut product, view(self.a, &a), view(self.b, &b), [m, n, k]);
                    let at = self.c.at + (batch * self.c.batch * self.c.kind.bytes()) as u64;
                    let [alpha, beta] = self.scalars;
                    for j in 0..n {
                        let at = at + (j * self.c.column * self.c.kind.bytes()) as u64;
                        let before = if beta == 0. { vec![0.; m] } else { read(memory, at, m, self.c.kind)? };
                        let column: Vec<f64> =
                            (0..m).map(|i| alpha * product[i * n + j] + beta * before[i]).collect();
                        write(memory, at, &column, self.c.kind)?;
                    }
                }
                Ok(Progress::Done)
            }),
        )
    }
}
