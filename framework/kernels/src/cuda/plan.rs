//! Plans: which of cuDNN's engines computes each pass of a convolution.

#[cfg(test)]
mod tests;

use super::backend::{Descriptor, Note, Place};
use crate::direct::Geometry;
use candle_core::cuda_backend::cudarc::cudnn::sys::{
    self, cudnnBackendAttributeName_t as Name, cudnnBackendDescriptorType_t as Kind,
    cudnnBackendHeurMode_t as Mode,
};
use candle_core::{DType, Error, Result, bail};

/// Engines that need more workspace are only used if there is no other.
const MOST_WORKSPACE: usize = 1 << 30;

/// Which of a convolution's tensors is computed from the two others.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) enum Pass {
    /// y.
    Forward,
    /// The gradient of x.
    BackwardData,
    /// The gradient of w.
    BackwardFilter,
}

/// The subject of a plan: x and y (B, H, W, C), w (outputs, kernel height, kernel width, inputs / groups).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) struct Key {
    pub(crate) g: Geometry,
    pub(crate) pass: Pass,
    /// Whether the result is added to the existing values.
    pub(crate) add: bool,
    pub(crate) dtype: DType,
    /// Powers of two that divide the addresses of x, w and y.
    pub(crate) alignments: [u64; 3],
    pub(crate) tf32: bool,
}

/// The device for which plans are made.
pub(crate) enum Target {
    /// The device of a handle, which executes the plans.
    Here(sys::cudnnHandle_t),
    /// A device that need not be present, by cuDNN's description: its plans are created but not executed.
    #[cfg(test)]
    Described(Descriptor),
}

/// An executable plan for a pass.
pub(crate) struct Plan {
    pub(crate) execution: Descriptor,
    /// Bytes of workspace.
    pub(crate) workspace: usize,
    /// The number of its engine among the allowed engines, from 1.
    pub(crate) number: usize,
    /// Descriptors that must live as long as the plan.
    _parts: Vec<Descriptor>,
}

/// The ids of x, w and y in plans.
const IDS: [i64; 3] = [1, 2, 3];

impl Key {
    /// Whether an engine with these notes of cuDNN may be used. Results must be bit-identical every time, so
    /// that a run resumed from a checkpoint ends like one that was never interrupted. Inputs must not be
    /// converted to a narrower type, and f32 must be computed in full precision unless TF32 is allowed.
    fn allows(&self, notes: &[Note]) -> bool {
        let is_whole = self.dtype == DType::F32 && !self.tf32;
        let noted = |note| notes.contains(&note);
        !(noted(Note::NONDETERMINISTIC)
            || noted(Note::DOWN_CONVERT_INPUTS)
            || is_whole && noted(Note::TENSOR_CORE))
    }
}

impl Plan {
    /// A plan with the first [allowed](Target::allowed) engine that can be planned and needs at most
    /// [`MOST_WORKSPACE`]; if all need more, the one that needs least. The first `skipped` allowed engines are
    /// skipped.
    pub(crate) fn new(target: &Target, key: &Key, skipped: usize) -> Result<Plan> {
        let parts = operation(key)?;
        let graph = target.graph(&parts[0])?;
        let mut best: Option<Plan> = None;
        let mut why = Error::Msg("it proposes none".into());
        for (config, number) in target.allowed(&graph, key)?.into_iter().zip(1..).skip(skipped) {
            match target.execution(&config) {
                Ok((execution, workspace)) => {
                    if best.as_ref().is_none_or(|best| workspace < best.workspace) {
                        best = Some(Plan { execution, workspace, number, _parts: vec![config] });
                    }
                    if workspace <= MOST_WORKSPACE {
                        break;
                    }
                }
                // Listed engines are not always available.
                Err(error) => why = error,
            }
        }
        let mut best = best.ok_or(why)?;
        best._parts.extend(parts);
        best._parts.push(graph);
        Ok(best)
    }
}

impl Target {
    /// A graph of one operation.
    fn graph(&self, operation: &Descriptor) -> Result<Descriptor> {
        let graph = Descriptor::new(Kind::CUDNN_BACKEND_OPERATIONGRAPH_DESCRIPTOR)?
            .with_part(Name::CUDNN_ATTR_OPERATIONGRAPH_OPS, operation)?;
        match self {
            Self::Here(handle) => graph.with(Name::CUDNN_ATTR_OPERATIONGRAPH_HANDLE, &[*handle])?,
            #[cfg(test)]
            Self::Described(_) => graph,
        }
        .finish()
    }

    /// The engines that `key` allows, in the order of cuDNN's heuristics, which is that of the expected speed.
    ///
    /// Except for the plainest: if the heuristics propose others first, which are not allowed, it comes last.
    /// What they rank below engines that they recommend is not ordered by speed.
    fn allowed(&self, graph: &Descriptor, key: &Key) -> Result<Vec<Descriptor>> {
        const PLAINEST: i64 = 0;
        // The engines of the second mode support cases that those of the first do not.
        let modes = [Mode::CUDNN_HEUR_MODE_A, Mode::CUDNN_HEUR_MODE_FALLBACK];
        let (mut listed, mut why) = (Vec::new(), None);
        for mode in modes {
            match self.engines(graph, mode) {
                Ok(configs) => listed.extend(configs),
                Err(error) => why = Some(error),
            }
        }
        if let (true, Some(error)) = (listed.is_empty(), why) {
            return Err(error);
        }
        let is_allowed = |config: &Descriptor| notes(config).is_ok_and(|notes| key.allows(&notes));
        let ranked = listed.into_iter().enumerate().filter(|(_, config)| is_allowed(config));
        let (mut first, last): (Vec<_>, Vec<_>) =
            ranked.partition(|(rank, config)| *rank == 0 || index(config).is_ok_and(|i| i != PLAINEST));
        first.extend(last);
        Ok(first.into_iter().map(|(_, config)| config).collect())
    }

    /// The engines that cuDNN proposes, the one that it expects to be fastest first.
    fn engines(&self, graph: &Descriptor, mode: Mode) -> Result<Vec<Descriptor>> {
        let heuristics = Descriptor::new(Kind::CUDNN_BACKEND_ENGINEHEUR_DESCRIPTOR)?
            .with_part(Name::CUDNN_ATTR_ENGINEHEUR_OPERATION_GRAPH, graph)?
            .with(Name::CUDNN_ATTR_ENGINEHEUR_MODE, &[mode])?;
        match self {
            // The graph determines the device.
            Self::Here(_) => heuristics,
            #[cfg(test)]
            Self::Described(device) => {
                heuristics.with_part(Name::CUDNN_ATTR_ENGINEHEUR_DEVICEPROP, device)?
            }
        }
        .finish()?
        .get_parts(Name::CUDNN_ATTR_ENGINEHEUR_RESULTS, Kind::CUDNN_BACKEND_ENGINECFG_DESCRIPTOR)
    }

    /// The execution plan of an engine, and the bytes of workspace that it needs.
    fn execution(&self, config: &Descriptor) -> Result<(Descriptor, usize)> {
        let execution = Descriptor::new(Kind::CUDNN_BACKEND_EXECUTION_PLAN_DESCRIPTOR)?
            .with_part(Name::CUDNN_ATTR_EXECUTION_PLAN_ENGINE_CONFIG, config)?;
        let execution = match self {
            Self::Here(handle) => execution.with(Name::CUDNN_ATTR_EXECUTION_PLAN_HANDLE, &[*handle])?,
            #[cfg(test)]
            Self::Described(device) => {
                execution.with_part(Name::CUDNN_ATTR_EXECUTION_PLAN_DEVICEPROP, device)?
            }
        }
        .finish()?;
        let bytes: Vec<i64> = execution.get(Name::CUDNN_ATTR_EXECUTION_PLAN_WORKSPACE_SIZE, 1)?;
        Ok((execution, bytes.first().map_or(0, |bytes| *bytes as usize)))
    }
}

/// A plan's execution arguments: the addresses of x, w and y, and of the workspace.
pub(crate) fn variant_pack(places: [u64; 3], workspace: u64) -> Result<Descriptor> {
    Descriptor::new(Kind::CUDNN_BACKEND_VARIANT_PACK_DESCRIPTOR)?
        .with(Name::CUDNN_ATTR_VARIANT_PACK_UNIQUE_IDS, &IDS)?
        .with(Name::CUDNN_ATTR_VARIANT_PACK_DATA_POINTERS, &places.map(Place))?
        .with(Name::CUDNN_ATTR_VARIANT_PACK_WORKSPACE, &[Place(workspace)])?
        .finish()
}

/// cuDNN's numerical notes on an engine.
fn notes(config: &Descriptor) -> Result<Vec<Note>> {
    /// More than exist.
    const MOST: usize = 32;
    engine(config)?.get(Name::CUDNN_ATTR_ENGINE_NUMERICAL_NOTE, MOST)
}

/// The number of an engine among all of an operation's.
fn index(config: &Descriptor) -> Result<i64> {
    let index: Vec<i64> = engine(config)?.get(Name::CUDNN_ATTR_ENGINE_GLOBAL_INDEX, 1)?;
    index.first().copied().ok_or_else(|| Error::Msg("cuDNN: an engine without a number".into()))
}

fn engine(config: &Descriptor) -> Result<Descriptor> {
    config.get_part(Name::CUDNN_ATTR_ENGINECFG_ENGINE, Kind::CUDNN_BACKEND_ENGINE_DESCRIPTOR)
}

/// A pass as a cuDNN operation, followed by the descriptors that it is made of.
fn operation(key: &Key) -> Result<Vec<Descriptor>> {
    use sys::cudnnDataType_t::{CUDNN_DATA_BFLOAT16, CUDNN_DATA_FLOAT, CUDNN_DATA_HALF};
    let g = &key.g;
    let data = match key.dtype {
        DType::F32 => CUDNN_DATA_FLOAT,
        DType::F16 => CUDNN_DATA_HALF,
        DType::BF16 => CUDNN_DATA_BFLOAT16,
        other => bail!("cuDNN: expected f32, f16 or bf16, got {other:?}"),
    };
    // Sizes and strides are given in the order N, C, H, W; the strides express that channels are last.
    let tensor = |i: usize, dims: [usize; 4]| {
        let dims = dims.map(|size| size as i64);
        let [_, c, h, w] = dims;
        Descriptor::new(Kind::CUDNN_BACKEND_TENSOR_DESCRIPTOR)?
            .with(Name::CUDNN_ATTR_TENSOR_UNIQUE_ID, &IDS[i..=i])?
            .with(Name::CUDNN_ATTR_TENSOR_DATA_TYPE, &[data])?
            .with(Name::CUDNN_ATTR_TENSOR_BYTE_ALIGNMENT, &[key.alignments[i] as i64])?
            .with(Name::CUDNN_ATTR_TENSOR_DIMENSIONS, &dims)?
            .with(Name::CUDNN_ATTR_TENSOR_STRIDES, &[h * w * c, 1, w * c, c])?
            .finish()
    };
    let x = tensor(0, [g.batch, g.inputs, g.height, g.width])?;
    // cuDNN derives the number of groups from the weight's inputs.
    let w = tensor(1, [g.outputs, g.inputs / g.groups, g.kernel_height, g.kernel_width])?;
    let y = tensor(2, [g.batch, g.outputs, g.out_height, g.out_width])?;
    let both = |size: usize| [size as i64; 2];
    let convolution = Descriptor::new(Kind::CUDNN_BACKEND_CONVOLUTION_DESCRIPTOR)?
        // Products are summed in 32 bits.
        .with(Name::CUDNN_ATTR_CONVOLUTION_COMP_TYPE, &[CUDNN_DATA_FLOAT])?
        .with(
            Name::CUDNN_ATTR_CONVOLUTION_CONV_MODE,
            &[sys::cudnnConvolutionMode_t::CUDNN_CROSS_CORRELATION],
        )?
        .with(Name::CUDNN_ATTR_CONVOLUTION_SPATIAL_DIMS, &[2i64])?
        .with(Name::CUDNN_ATTR_CONVOLUTION_PRE_PADDINGS, &both(g.padding))?
        .with(Name::CUDNN_ATTR_CONVOLUTION_POST_PADDINGS, &both(g.padding))?
        .with(Name::CUDNN_ATTR_CONVOLUTION_FILTER_STRIDES, &both(g.stride))?
        .with(Name::CUDNN_ATTR_CONVOLUTION_DILATIONS, &both(g.dilation))?
        .finish()?;
    let (kind, [of_x, of_w, of_y, of_convolution, alpha, beta]) = match key.pass {
        Pass::Forward => (
            Kind::CUDNN_BACKEND_OPERATION_CONVOLUTION_FORWARD_DESCRIPTOR,
            [
                Name::CUDNN_ATTR_OPERATION_CONVOLUTION_FORWARD_X,
                Name::CUDNN_ATTR_OPERATION_CONVOLUTION_FORWARD_W,
                Name::CUDNN_ATTR_OPERATION_CONVOLUTION_FORWARD_Y,
                Name::CUDNN_ATTR_OPERATION_CONVOLUTION_FORWARD_CONV_DESC,
                Name::CUDNN_ATTR_OPERATION_CONVOLUTION_FORWARD_ALPHA,
                Name::CUDNN_ATTR_OPERATION_CONVOLUTION_FORWARD_BETA,
            ],
        ),
        Pass::BackwardData => (
            Kind::CUDNN_BACKEND_OPERATION_CONVOLUTION_BACKWARD_DATA_DESCRIPTOR,
            [
                Name::CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_DATA_DX,
                Name::CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_DATA_W,
                Name::CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_DATA_DY,
                Name::CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_DATA_CONV_DESC,
                Name::CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_DATA_ALPHA,
                Name::CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_DATA_BETA,
            ],
        ),
        Pass::BackwardFilter => (
            Kind::CUDNN_BACKEND_OPERATION_CONVOLUTION_BACKWARD_FILTER_DESCRIPTOR,
            [
                Name::CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_FILTER_X,
                Name::CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_FILTER_DW,
                Name::CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_FILTER_DY,
                Name::CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_FILTER_CONV_DESC,
                Name::CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_FILTER_ALPHA,
                Name::CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_FILTER_BETA,
            ],
        ),
    };
    let operation = Descriptor::new(kind)?
        .with_part(of_x, &x)?
        .with_part(of_w, &w)?
        .with_part(of_y, &y)?
        .with_part(of_convolution, &convolution)?
        .with(alpha, &[1f32])?
        .with(beta, &[f32::from(u8::from(key.add))])?
        .finish()?;
    Ok(vec![operation, x, w, y, convolution])
}
