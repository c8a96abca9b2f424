//! Number formats: what is computed in, and what keeps fp16 gradients within its range.

use candle_core::DType;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::error::Error;
use crate::memory;

/// Number format of the computation, by Lightning's names.
///
/// In mixed precision every parameter exists twice: working weights in the compute type, which the module sees, and
/// 32-bit masters, which the optimizer moves. Losses, metrics, gradients and optimizer state are 32 bits wide.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Precision {
    /// 32-bit floating point throughout.
    #[serde(rename = "32")]
    Full,
    /// bfloat16, 32-bit masters.
    #[serde(rename = "bf16-mixed")]
    Bf16Mixed,
    /// float16 with loss scaling, 32-bit masters.
    #[serde(rename = "16-mixed")]
    Fp16Mixed,
}

impl Precision {
    /// The type of working weights and inputs.
    pub fn dtype(self) -> DType {
        match self {
            Self::Full => DType::F32,
            Self::Bf16Mixed => DType::BF16,
            Self::Fp16Mixed => DType::F16,
        }
    }

    /// Adds to a module's error, in half precision, what is probably wrong.
    pub(crate) fn explain(self, error: Error) -> Error {
        match self.dtype() {
            _ if memory::is_full(&error) => error,
            DType::F32 => error,
            dtype => Error::msg(format!(
                "{error}\nthe module computes in {dtype:?}: an operation that has no kernel for it, or that mixes types, \
                 needs `.to_dtype(DType::F32)` before and `.to_dtype(x.dtype())` after it"
            )),
        }
    }
}

/// Dynamic loss scaling by the rules of PyTorch's `GradScaler`: the loss is multiplied with a scale so that small
/// gradients do not vanish in fp16. A step whose gradients overflow is not taken and halves the scale; 2000 good steps in
/// a row double it.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct LossScale {
    /// What the loss is multiplied with.
    pub scale: f64,
    /// Good steps since the scale last changed.
    pub good_steps: u32,
}

impl Default for LossScale {
    fn default() -> Self {
        Self { scale: Self::START, good_steps: 0 }
    }
}

impl LossScale {
    const START: f64 = 65536.;
    const GROWTH: f64 = 2.;
    const BACKOFF: f64 = 0.5;
    const GROWTH_INTERVAL: u32 = 2000;
    /// Overflows in a row after which no smaller scale will help.
    pub const HOPELESS: u32 = 50;

    /// A precision's scale at the start; fp16 alone has one.
    pub fn of(precision: Precision) -> Option<Self> {
        (precision == Precision::Fp16Mixed).then(Self::default)
    }

    /// Takes note of a step whose gradients were finite, or not.
    pub fn update(&mut self, finite: bool) {
        if !finite {
            self.scale *= Self::BACKOFF;
            self.good_steps = 0;
            return;
        }
        self.good_steps += 1;
        if self.good_steps == Self::GROWTH_INTERVAL {
            // A scale beyond f32 would turn every loss into infinity; torch keeps the old one then too.
            let grown = self.scale * Self::GROWTH;
            self.scale = if grown <= f64::from(f32::MAX) { grown } else { self.scale };
            self.good_steps = 0;
        }
    }
}
