//! Number formats of computations, and loss scaling for fp16.

use candle_core::DType;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::error::Error;
use crate::memory;

/// Number format of the computation, named as in Lightning.
///
/// In mixed precision, every parameter exists twice: as working weights in the compute type, seen by the
/// module, and as a 32-bit master, updated by the optimizer. Losses, metrics, gradients and optimizer state
/// are in 32 bits.
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

    /// In half precision, adds the probable cause to a module's error.
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

/// Dynamic loss scaling by the rules of PyTorch's `GradScaler`. The loss is multiplied by a scale so small
/// gradients do not vanish in fp16. A step whose gradients overflow is skipped and halves the scale; 2000
/// good steps in a row double it.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct LossScale {
    /// Multiplier of the loss.
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
    /// Successive overflows after which no smaller scale will help.
    pub const HOPELESS: u32 = 50;

    /// The initial scale of a precision; only fp16 has one.
    pub fn of(precision: Precision) -> Option<Self> {
        (precision == Precision::Fp16Mixed).then(Self::default)
    }

    /// Updates the scale after a step whose gradients were `finite` or not.
    pub fn update(&mut self, finite: bool) {
        if !finite {
            self.scale *= Self::BACKOFF;
            self.good_steps = 0;
            return;
        }
        self.good_steps += 1;
        if self.good_steps == Self::GROWTH_INTERVAL {
            // A scale beyond f32 would make every loss infinite; torch keeps the old scale then too.
            let grown = self.scale * Self::GROWTH;
            self.scale = if grown <= f64::from(f32::MAX) { grown } else { self.scale };
            self.good_steps = 0;
        }
    }
}
