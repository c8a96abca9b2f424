//! The kernels' arguments: each kernel takes one of these structs, with the layout of the struct of the same
//! name in its source, where it may be a template.
//!
//! Addresses are device addresses, 0 for none; offsets and strides count values, not bytes.

use crate::updates::MOST_STATES;

/// Pixels of images within a larger tensor.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Plane {
    pub(crate) at: u64,
    /// Values from one image to the next.
    pub(crate) image: i64,
    /// Values from one pixel to the next.
    pub(crate) pixel: i64,
}

/// Arguments of `gates_forward`.
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
}

/// Arguments of `gates_backward`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct GatesBackward {
    pub(crate) gates: u64,
    pub(crate) bias: u64,
    pub(crate) c_before: u64,
    pub(crate) dc: u64,
    pub(crate) dc_before: u64,
    pub(crate) dh: [Plane; 3],
    pub(crate) sums: u64,
    pub(crate) rows: u32,
    pub(crate) hidden: u32,
    pub(crate) pixels: u32,
    pub(crate) parts: u32,
}

/// Arguments of `add_bias`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct AddBias {
    pub(crate) y: u64,
    pub(crate) bias: u64,
    pub(crate) count: u32,
    pub(crate) columns: u32,
}

/// Arguments of `column_sums`.
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

/// Arguments of `scale_columns`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct ScaleColumns {
    pub(crate) x: u64,
    pub(crate) factors: u64,
    pub(crate) y: u64,
    pub(crate) count: u32,
    pub(crate) sample: u32,
    pub(crate) columns: u32,
}

/// Arguments of `product_sums`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct ProductSums {
    pub(crate) x: u64,
    pub(crate) d: u64,
    pub(crate) sums: u64,
    pub(crate) rows: u32,
    pub(crate) columns: u32,
    pub(crate) stretch: u32,
    pub(crate) parts: u32,
}

/// Arguments of `copy_columns`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct CopyColumns {
    pub(crate) from: Plane,
    pub(crate) to: Plane,
    pub(crate) rows: u32,
    pub(crate) columns: u32,
    pub(crate) pixels: u32,
}

/// Arguments of `pack_weight` and `unpack_weight`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct PackWeight {
    pub(crate) weight: u64,
    pub(crate) packed: u64,
    pub(crate) outputs: u32,
    pub(crate) all: u32,
    pub(crate) hidden: u32,
    pub(crate) kernel: u32,
    pub(crate) channels: u32,
    pub(crate) first_channels: u32,
}

/// Arguments of `narrow`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct Narrow {
    pub(crate) from: u64,
    pub(crate) to: u64,
    pub(crate) count: u32,
}

/// The values that an output pixel of a depthwise convolution sums over.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct Window {
    pub(crate) height: u32,
    pub(crate) width: u32,
    pub(crate) to_height: u32,
    pub(crate) to_width: u32,
    pub(crate) channels: u32,
    pub(crate) kernel_height: u32,
    pub(crate) kernel_width: u32,
    pub(crate) dilation: u32,
    pub(crate) above: i32,
    pub(crate) left: i32,
}

/// Arguments of `pack_taps`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct PackTaps {
    pub(crate) weight: u64,
    pub(crate) taps: u64,
    pub(crate) channels: u32,
    pub(crate) count: u32,
    pub(crate) rotated: u32,
}

/// Arguments of `depthwise`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct Depthwise {
    pub(crate) from: u64,
    pub(crate) taps: u64,
    pub(crate) to: u64,
    pub(crate) window: Window,
    pub(crate) rows: u32,
}

/// Arguments of `tap_sums`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct TapSums {
    pub(crate) x: u64,
    pub(crate) dy: u64,
    pub(crate) sums: u64,
    pub(crate) window: Window,
    pub(crate) rows: u32,
    pub(crate) stretch: u32,
    pub(crate) parts: u32,
}

/// Arguments of `add_taps`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct AddTaps {
    pub(crate) sums: u64,
    pub(crate) gradient: u64,
    pub(crate) channels: u32,
    pub(crate) count: u32,
    pub(crate) parts: u32,
    pub(crate) add: u32,
}

/// Arguments of `silu`, `gelu` and `leaky_relu`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pointwise {
    pub(crate) x: u64,
    pub(crate) d: u64,
    pub(crate) to: u64,
    pub(crate) slope: f32,
    pub(crate) count: u32,
}

/// A term of a sum of gates; `places` is the offset of each gate in the term's rows, or -1.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Term {
    pub(crate) at: u64,
    pub(crate) stride: u32,
    pub(crate) places: [i32; MOST_GATES],
}

/// The maximum number of gates of a sum.
pub(crate) const MOST_GATES: usize = 16;

/// Arguments of `sum_gates`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct SumGates {
    pub(crate) terms: [Term; 3],
    pub(crate) sum: u64,
    pub(crate) rows: u32,
    pub(crate) gates: u32,
    pub(crate) width: u32,
}

/// Arguments of `memory_update`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct MemoryUpdate {
    pub(crate) gates: u64,
    pub(crate) memory: u64,
    pub(crate) d: u64,
    pub(crate) to: u64,
    pub(crate) d_gates: u64,
    pub(crate) input: i32,
    pub(crate) candidate: i32,
    pub(crate) forget: i32,
    pub(crate) bias: f32,
    pub(crate) squash: u32,
    pub(crate) rows: u32,
    pub(crate) width: u32,
    pub(crate) count: u32,
}

/// Arguments of `open_output`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct OpenOutput {
    pub(crate) gates: u64,
    pub(crate) y: u64,
    pub(crate) more: u64,
    pub(crate) d: u64,
    pub(crate) to: u64,
    pub(crate) d_gates: u64,
    pub(crate) d_more: u64,
    pub(crate) place: i32,
    pub(crate) kind: u32,
    pub(crate) rows: u32,
    pub(crate) width: u32,
    pub(crate) count: u32,
}

/// One of the three operands of `blend`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Blended {
    pub(crate) at: u64,
    pub(crate) gradient: u64,
    pub(crate) stride: u32,
    pub(crate) offset: u32,
}

/// Arguments of `blend`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct Blend {
    pub(crate) of: [Blended; 3],
    pub(crate) d: u64,
    pub(crate) to: u64,
    pub(crate) rows: u32,
    pub(crate) width: u32,
}

/// Sizes of a tensor to normalise.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sizes {
    pub(crate) samples: u32,
    pub(crate) pixels: u32,
    pub(crate) channels: u32,
    /// Groups per sample.
    pub(crate) groups: u32,
}

/// The numbers by which values are normalised.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct Tables {
    pub(crate) means: u64,
    pub(crate) scales: u64,
    pub(crate) weight: u64,
    pub(crate) bias: u64,
    pub(crate) stride: u32,
    pub(crate) then: u32,
    pub(crate) slope: f32,
}

/// Arguments of `channel_sums`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct ChannelSums {
    pub(crate) x: u64,
    pub(crate) dy: u64,
    pub(crate) tables: Tables,
    pub(crate) sizes: Sizes,
    pub(crate) sums: u64,
    pub(crate) stretch: u32,
    pub(crate) parts: u32,
}

/// Arguments of `add_parts`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct AddParts {
    pub(crate) from: u64,
    pub(crate) to: u64,
    pub(crate) samples: u32,
    pub(crate) parts: u32,
    pub(crate) columns: u32,
    pub(crate) fewer: u32,
}

/// Arguments of `statistics`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct Statistics {
    pub(crate) sums: u64,
    pub(crate) means: u64,
    pub(crate) variances: u64,
    pub(crate) narrow_means: u64,
    pub(crate) scales: u64,
    pub(crate) sizes: Sizes,
    pub(crate) eps: f64,
}

/// Arguments of `group_gradients`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct GroupGradients {
    pub(crate) sums: u64,
    pub(crate) weight: u64,
    pub(crate) scales: u64,
    pub(crate) shifts: u64,
    pub(crate) tilts: u64,
    pub(crate) sizes: Sizes,
}

/// Arguments of `channel_gradients`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct ChannelGradients {
    pub(crate) sums: u64,
    pub(crate) d_weight: u64,
    pub(crate) d_bias: u64,
    pub(crate) samples: u32,
    pub(crate) channels: u32,
}

/// Arguments of `value_gradients`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct ValueGradients {
    pub(crate) x: u64,
    pub(crate) dy: u64,
    pub(crate) tables: Tables,
    pub(crate) d_weight: u64,
    pub(crate) d_bias: u64,
    pub(crate) sizes: Sizes,
}

/// Arguments of `normalize`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct Normalize {
    pub(crate) x: u64,
    pub(crate) dy: u64,
    pub(crate) to: u64,
    pub(crate) tables: Tables,
    pub(crate) shifts: u64,
    pub(crate) tilts: u64,
    pub(crate) sizes: Sizes,
}

/// Arguments of `winograd_input`, `winograd_output` and `winograd_output_adjoint`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct Tiles {
    pub(crate) images: u64,
    pub(crate) transformed: u64,
    pub(crate) count: u32,
    pub(crate) height: u32,
    pub(crate) width: u32,
    pub(crate) channels: u32,
    pub(crate) down: u32,
    pub(crate) across: u32,
    pub(crate) padding: u32,
}

/// Arguments of `winograd_filter` and `winograd_filter_adjoint`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct Filters {
    pub(crate) weight: u64,
    pub(crate) transformed: u64,
    pub(crate) outputs: u32,
    pub(crate) inputs: u32,
    pub(crate) turned: u32,
}

/// One of many tensors: its addresses, its number of values, and the number of blocks of all tensors up to
/// and including it.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Span<P> {
    pub(crate) at: P,
    pub(crate) count: u32,
    pub(crate) end: u32,
}

/// The maximum number of tensors for which a kernel's arguments, 4 KB, have room.
pub(crate) const MOST_TENSORS: usize = 64;
const _: () = assert!(size_of::<Update>() <= 4096, "the largest of all arguments");

/// Up to [`MOST_TENSORS`] tensors. Arguments of `publish`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct Many<P> {
    pub(crate) spans: [Span<P>; MOST_TENSORS],
    pub(crate) tensors: u32,
}

impl<P: Copy + Default> Many<P> {
    /// Values per block.
    const CHUNK: usize = 4096;

    /// Tensors with their number of values; at most [`MOST_TENSORS`] of them, none empty.
    pub(crate) fn new(tensors: &[(P, usize)]) -> Self {
        let (mut spans, mut end) = ([Span::default(); MOST_TENSORS], 0);
        for (span, (at, count)) in spans.iter_mut().zip(tensors) {
            end += count.div_ceil(Self::CHUNK) as u32;
            *span = Span { at: *at, count: *count as u32, end };
        }
        Many { spans, tensors: tensors.len() as u32 }
    }

    /// Number of blocks of all tensors.
    pub(crate) fn blocks(&self) -> usize {
        self.spans[..self.tensors as usize].last().map_or(0, |last| last.end as usize)
    }
}

/// Arguments of the kernels of [rules](crate::updates::Rule).
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct Update {
    pub(crate) tensors: Many<ParamAt>,
    /// Address of the rule's numbers.
    pub(crate) step: u64,
    /// Address of the decision on the gradients.
    pub(crate) decided: u64,
}

/// The addresses of a parameter that a rule uses.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct ParamAt {
    pub(crate) param: u64,
    pub(crate) gradient: u64,
    pub(crate) kept: [u64; MOST_STATES],
    pub(crate) copy: u64,
}

/// The addresses of a parameter that `publish` uses.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct PublishAt {
    pub(crate) master: u64,
    pub(crate) copy: u64,
}

/// Arguments of `counted`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct Counted {
    pub(crate) tensors: Many<CountedAt>,
    /// Address of the decision on the gradients.
    pub(crate) decided: u64,
}

/// The addresses that `counted` reads from and writes to.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct CountedAt {
    pub(crate) gradient: u64,
    pub(crate) to: u64,
}

/// Arguments of `approach`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct Approach {
    pub(crate) tensors: Many<ApproachAt>,
    pub(crate) share: f32,
}

/// A tensor that `approach` moves, and its target.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct ApproachAt {
    pub(crate) x: u64,
    pub(crate) target: u64,
}

/// Arguments of `square_sums`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct SquareSums {
    pub(crate) tensors: Many<u64>,
    pub(crate) sums: u64,
}

/// Arguments of `sums`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sums {
    pub(crate) x: u64,
    pub(crate) sums: u64,
    pub(crate) count: u32,
    pub(crate) parts: u32,
}

/// Arguments of `decide`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct Decide {
    pub(crate) sums: u64,
    pub(crate) decided: u64,
    pub(crate) loss_scale: f64,
    pub(crate) max_norm: f64,
    pub(crate) max_value: f32,
    pub(crate) count: u32,
    pub(crate) only_finite: u32,
}

/// Marks the structs of plain numbers that kernels take by value.
#[cfg(feature = "cuda")]
mod device {
    use super::*;
    use candle_core::cuda_backend::cudarc::driver::DeviceRepr;

    macro_rules! device_repr {
        ($($name:ty)*) => { $(
            // SAFETY: the struct has the layout of C and contains only numbers.
            unsafe impl DeviceRepr for $name {}
        )* };
    }
    device_repr!(GatesForward GatesBackward AddBias ColumnSums ScaleColumns ProductSums CopyColumns PackWeight Narrow PackTaps Depthwise TapSums AddTaps Pointwise SumGates MemoryUpdate OpenOutput Blend ChannelSums AddParts Statistics GroupGradients ChannelGradients ValueGradients Normalize Tiles Filters Update Counted Approach SquareSums Sums Decide);
    device_repr!(Many<PublishAt>);
}
