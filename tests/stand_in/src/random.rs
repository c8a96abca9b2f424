//! libcurand: random numbers, from an arbitrary generator.

use crate::device::{Progress, device, owner};
use crate::driver::{current, give};
use crate::numbers::{Kind, write};
use std::ffi::c_int;
use std::sync::Arc;

#[derive(Debug)]
pub(crate) struct Generator {
    stream: u64,
    ordinal: usize,
    state: u64,
}

fn answer(result: Result<(), c_int>) -> c_int {
    result.err().unwrap_or(0)
}

#[unsafe(no_mangle)]
unsafe extern "C" fn curandGetVersion(to: *mut c_int) -> c_int {
    // SAFETY: the caller passes a valid pointer.
    answer(unsafe { give(to, 10400) })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn curandCreateGenerator(to: *mut *mut Generator, _kind: c_int) -> c_int {
    let new = |ordinal| Box::into_raw(Box::new(Generator { stream: 0, ordinal, state: 1 }));
    // SAFETY: the caller passes a valid pointer.
    answer(current().and_then(|ordinal| unsafe { give(to, new(ordinal)) }))
}

#[unsafe(no_mangle)]
unsafe extern "C" fn curandDestroyGenerator(generator: *mut Generator) -> c_int {
    // SAFETY: made by `curandCreateGenerator`.
    drop(unsafe { Box::from_raw(generator) });
    0
}

#[unsafe(no_mangle)]
unsafe extern "C" fn curandSetPseudoRandomGeneratorSeed(generator: *mut Generator, seed: u64) -> c_int {
    // SAFETY: made by `curandCreateGenerator`.
    unsafe { (*generator).state = seed | 1 };
    0
}

#[unsafe(no_mangle)]
unsafe extern "C" fn curandSetStream(generator: *mut Generator, stream: u64) -> c_int {
    // SAFETY: made by `curandCreateGenerator`.
    unsafe { (*generator).stream = stream };
    0
}

impl Generator {
    /// A uniform number in (0, 1].
    fn next(&mut self) -> f64 {
        // Marsaglia 2003, "Xorshift RNGs".
        self.state ^= self.state << 13;
        self.state ^= self.state >> 7;
        self.state ^= self.state << 17;
        ((self.state >> 11) + 1) as f64 / (1u64 << 53) as f64
    }

    fn fill(&mut self, to: u64, values: Vec<f64>, kind: Kind) -> Result<(), c_int> {
        let ordinal = if self.stream == 0 { self.ordinal } else { owner(self.stream) };
        let work = Arc::new(move |memory: &mut _| write(memory, to, &values, kind).map(|()| Progress::Done));
        device(ordinal)?.ask(self.stream, "random numbers", work)
    }

    fn uniform(&mut self, to: u64, len: usize, kind: Kind) -> Result<(), c_int> {
        let values = (0..len).map(|_| self.next()).collect();
        self.fill(to, values, kind)
    }

    fn normal(&mut self, to: u64, len: usize, [mean, deviation]: [f64; 2], kind: Kind) -> Result<(), c_int> {
        // Box and Muller 1958.
        let mut one = || (-2. * self.next().ln()).sqrt() * (std::f64::consts::TAU * self.next()).cos();
        let values = (0..len).map(|_| mean + deviation * one()).collect();
        self.fill(to, values, kind)
    }
}

macro_rules! fills {
    ($uniform:ident, $normal:ident, $type:ty, $kind:expr) => {
        #[unsafe(no_mangle)]
        unsafe extern "C" fn $uniform(generator: *mut Generator, to: u64, len: usize) -> c_int {
            // SAFETY: made by `curandCreateGenerator`.
            answer(unsafe { (*generator).uniform(to, len, $kind) })
        }

        #[unsafe(no_mangle)]
        unsafe extern "C" fn $normal(
            generator: *mut Generator,
            to: u64,
            len: usize,
            mean: $type,
            deviation: $type,
        ) -> c_int {
            // SAFETY: made by `curandCreateGenerator`.
            answer(unsafe { (*generator).normal(to, len, [f64::from(mean), f64::from(deviation)], $kind) })
        }
    };
}
fills!(curandGenerateUniform, curandGenerateNormal, f32, Kind::F32);
fills!(curandGenerateUniformDouble, curandGenerateNormalDouble, f64, Kind::F64);
