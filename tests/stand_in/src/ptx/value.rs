//! Numbers in registers: their types and arithmetic.

use half::{bf16, f16};

/// A type stored in a register's lowest bits.
pub(crate) trait Value: Copy + Send + Sync + 'static {
    fn of(bits: u64) -> Self;
    fn bits(self) -> u64;
}

macro_rules! integers {
    ($($signed:ty, $unsigned:ty);*) => { $(
        impl Value for $unsigned {
            fn of(bits: u64) -> Self { bits as $unsigned }
            fn bits(self) -> u64 { self as u64 }
        }
        // Sign-extended, as a load into a wider register requires.
        impl Value for $signed {
            fn of(bits: u64) -> Self { bits as $signed }
            fn bits(self) -> u64 { self as i64 as u64 }
        }
    )* };
}
integers!(i8, u8; i16, u16; i32, u32; i64, u64);

impl Value for bool {
    fn of(bits: u64) -> Self {
        bits & 1 == 1
    }
    fn bits(self) -> u64 {
        u64::from(self)
    }
}

macro_rules! floats {
    ($($float:ty, $bits:ty);*) => { $(
        impl Value for $float {
            fn of(bits: u64) -> Self { <$float>::from_bits(bits as $bits) }
            fn bits(self) -> u64 { u64::from(self.to_bits()) }
        }
    )* };
}
floats!(f32, u32; f64, u64; f16, u16; bf16, u16);

/// Floating types. Arithmetic in 64 bits, rounded once, is exact enough for all of them; for f64 it is f64 arithmetic.
pub(crate) trait Float: Value {
    fn wide(self) -> f64;
    fn narrow(x: f64) -> Self;
    fn fma(self, b: Self, c: Self) -> Self {
        Self::narrow(self.wide().mul_add(b.wide(), c.wide()))
    }
}
impl Float for f32 {
    fn wide(self) -> f64 {
        f64::from(self)
    }
    fn narrow(x: f64) -> Self {
        x as f32
    }
    fn fma(self, b: f32, c: f32) -> f32 {
        self.mul_add(b, c)
    }
}
impl Float for f64 {
    fn wide(self) -> f64 {
        self
    }
    fn narrow(x: f64) -> Self {
        x
    }
}
impl Float for f16 {
    fn wide(self) -> f64 {
        self.to_f64()
    }
    fn narrow(x: f64) -> Self {
        f16::from_f32(to_odd(x))
    }
}
impl Float for bf16 {
    fn wide(self) -> f64 {
        self.to_f64()
    }
    fn narrow(x: f64) -> Self {
        bf16::from_f32(to_odd(x))
    }
}

/// Rounding to 32 bits. All other types are rounded to nearest.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Rounding {
    Nearest,
    Down,
    Up,
    Zero,
}

pub(crate) fn to_f32(x: f64, rounding: Rounding) -> f32 {
    let nearest = x as f32;
    let (above, below) = (f64::from(nearest) > x, f64::from(nearest) < x);
    match rounding {
        Rounding::Down if above => nearest.next_down(),
        Rounding::Up if below => nearest.next_up(),
        Rounding::Zero if above && x > 0. => nearest.next_down(),
        Rounding::Zero if below && x < 0. => nearest.next_up(),
        _ => nearest,
    }
}

/// Rounds to 32 bits, setting the last bit to 1 if the result is inexact, so a further rounding gives the
/// same as from all bits (Boldo and Melquiond 2008, "Emulation of a FMA and correctly rounded sums").
/// `from_f64` of the half types drops bits.
pub(crate) fn to_odd(x: f64) -> f32 {
    let cut = to_f32(x, Rounding::Zero);
    if f64::from(cut) == x || x.is_nan() { cut } else { f32::from_bits(cut.to_bits() | 1) }
}
