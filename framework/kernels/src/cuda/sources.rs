//! The source code of the CUDA kernels.

/// A source of kernels that are compiled together.
#[derive(Debug)]
pub(crate) struct Source {
    pub(crate) name: &'static str,
    pub(crate) text: &'static str,
}

pub(crate) const GATES: Source =
    Source { name: "gates", text: concat!(include_str!("prelude.cuh"), include_str!("gates.cu")) };
pub(crate) const COLUMNS: Source =
    Source { name: "columns", text: concat!(include_str!("prelude.cuh"), include_str!("columns.cu")) };
pub(crate) const OPTIMIZER: Source =
    Source { name: "optimizer", text: concat!(include_str!("prelude.cuh"), include_str!("optimizer.cu")) };
pub(crate) const POINTWISE: Source = Source {
    name: "pointwise",
    text: concat!(include_str!("prelude.cuh"), include_str!("activations.cuh"), include_str!("pointwise.cu")),
};
pub(crate) const NORMALIZE: Source = Source {
    name: "normalize",
    text: concat!(include_str!("prelude.cuh"), include_str!("activations.cuh"), include_str!("normalize.cu")),
};
pub(crate) const CELLS: Source =
    Source { name: "cells", text: concat!(include_str!("prelude.cuh"), include_str!("cells.cu")) };
pub(crate) const DEPTHWISE: Source =
    Source { name: "depthwise", text: concat!(include_str!("prelude.cuh"), include_str!("depthwise.cu")) };
pub(crate) const WINOGRAD: Source =
    Source { name: "winograd", text: concat!(include_str!("prelude.cuh"), include_str!("winograd.cu")) };
