//! What kernels are called with: each takes one of these, laid out as the struct of the same name in its source.
//!
//! Addresses are those of the device's memory, 0 for nothing; offsets and strides count values, not bytes.

/// Pixels of images within a larger tensor.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Plane {
    pub(crate) at: u64,
    /// From an image to the next.
    pub(crate) image: i64,
    /// From a pixel to the next.
    pub(crate) pixel: i64,
}

/// Of `gates_forward`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct GatesForward {
    pub(crate) gates: u64,
    pub(crate) bias: u64,
    pub(crate) c_before: u64,
    pub(crate) c: u64,
    pub(crate) h: [Plane; 3],
    pub(crate) rows: u32,
    pub(crate) hidden: u32,
    pub(crate) pixels: u32,
    pub(crate) keep: u32,
}

/// Of `gates_backward`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct GatesBackward {
    pub(crate) gates: u64,
    pub(crate) c_before: u64,
    pub(crate) c: u64,
    pub(crate) dc: u64,
    pub(crate) dh: [Plane; 3],
    pub(crate) rows: u32,
    pub(crate) hidden: u32,
    pub(crate) pixels: u32,
}

/// Of `add_bias`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct AddBias {
    pub(crate) y: u64,
    pub(crate) bias: u64,
    pub(crate) count: u32,
    pub(crate) columns: u32,
}

/// Of `column_sums`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct ColumnSums {
    pub(crate) x: u64,
    pub(crate) sums: u64,
    pub(crate) rows: u32,
    pub(crate) columns: u32,
    pub(crate) stretch: u32,
    pub(crate) parts: u32,
}

/// Of `copy_columns`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct CopyColumns {
    pub(crate) from: Plane,
    pub(crate) to: Plane,
    pub(crate) rows: u32,
    pub(crate) columns: u32,
    pub(crate) pixels: u32,
}

/// Of `narrow`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct Narrow {
    pub(crate) from: u64,
    pub(crate) to: u64,
    pub(crate) count: u32,
}

/// A tensor among many: the addresses that a kernel uses of it, its values, and the blocks of all up to it.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Span {
    pub(crate) at: [u64; 6],
    pub(crate) count: u32,
    pub(crate) end: u32,
}

/// As many tensors as the arguments of a kernel, 4 KB, have room for. Of `publish`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct Many {
    pub(crate) spans: [Span; Many::MOST],
    pub(crate) tensors: u32,
}

impl Many {
    pub(crate) const MOST: usize = 64;
    /// Values that a block takes.
    const CHUNK: usize = 4096;

    /// Tensors with their values' count; at most [`MOST`](Self::MOST) of them, none empty.
    pub(crate) fn new(tensors: &[([u64; 6], usize)]) -> Self {
        let (mut spans, mut end) = ([Span::default(); Self::MOST], 0);
        for (span, (at, count)) in spans.iter_mut().zip(tensors) {
            end += count.div_ceil(Self::CHUNK) as u32;
            *span = Span { at: *at, count: *count as u32, end };
        }
        Many { spans, tensors: tensors.len() as u32 }
    }

    /// Blocks of all tensors.
    pub(crate) fn blocks(&self) -> usize {
        self.spans[..self.tensors as usize].last().map_or(0, |last| last.end as usize)
    }
}

/// Of `adam`: parameter, gradient, first and second moment, the largest second moment or 0, a copy or 0. Of `sgd`: parameter,
/// gradient, the momentum buffer or 0, a copy or 0.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct Update {
    pub(crate) tensors: Many,
    /// The numbers of an [`AdamStep`](crate::updates::AdamStep) or [`SgdStep`](crate::updates::SgdStep).
    pub(crate) step: u64,
    /// Norm, factor and value of the gradients.
    pub(crate) decided: u64,
}

/// Of `approach`: what is moved, and where to.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct Approach {
    pub(crate) tensors: Many,
    pub(crate) share: f32,
}

/// Of `square_sums`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct SquareSums {
    pub(crate) tensors: Many,
    pub(crate) sums: u64,
}

/// Of `sums`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sums {
    pub(crate) x: u64,
    pub(crate) sums: u64,
    pub(crate) count: u32,
    pub(crate) parts: u32,
}

/// Of `decide`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct Decide {
    pub(crate) sums: u64,
    pub(crate) decided: u64,
    pub(crate) loss_scale: f64,
    pub(crate) norm: f64,
    pub(crate) value: f32,
    pub(crate) count: u32,
    pub(crate) only_finite: u32,
}

/// Structs of plain numbers, which a kernel takes by value.
#[cfg(feature = "cuda")]
mod device {
    use candle_core::cuda_backend::cudarc::driver::DeviceRepr;

    macro_rules! device_repr {
        ($($name:ident)*) => { $(
            // SAFETY: laid out as C does, of numbers alone.
            unsafe impl DeviceRepr for super::$name {}
        )* };
    }
    device_repr!(GatesForward GatesBackward AddBias ColumnSums CopyColumns Narrow Many Update Approach SquareSums Sums
        Decide);
}
