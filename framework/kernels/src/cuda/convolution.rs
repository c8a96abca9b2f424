//! Convolutions by cuDNN: a plan is made once a shape and pass, and workspace is used again.

use super::backend::{Descriptor, Note, Place};
use super::failed;
use super::memory::{address, allocate};
use crate::direct::Geometry;
use candle_core::cuda_backend::cudarc::cudnn::result;
use candle_core::cuda_backend::cudarc::cudnn::sys::{
    self, cudnnBackendAttributeName_t as Name, cudnnBackendDescriptorType_t as Kind,
    cudnnBackendHeurMode_t as Mode,
};
use candle_core::{CudaDevice, CudaStorage, DType, Error, Result, bail};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

/// Engines that want more workspace are not taken, where there is another.
const MOST_WORKSPACE: usize = 2 << 30;
/// What addresses are multiples of, where cuDNN's quick engines can be used: a power of two.
const ALIGNMENT: u64 = 16;

/// How tensors lie in memory.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) enum Order {
    /// x and y (B, H, W, C), w (outputs, kernel height, kernel width, inputs / groups).
    ChannelsLast,
    /// x and y (B, C, H, W), w (outputs, inputs / groups, kernel height, kernel width).
    ChannelsFirst,
}

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

/// What a plan is for.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
struct Key {
    dims: [usize; 13],
    pass: Pass,
    /// Whether the result is added to what is there.
    add: bool,
    order: Order,
    dtype: DType,
    /// What the addresses of x, w and y are multiples of.
    alignments: [u64; 3],
    tf32: bool,
}

/// How a pass is computed.
struct Plan {
    execution: Descriptor,
    /// Bytes.
    workspace: usize,
    /// Which of the engines that may be used it is, from 1.
    number: usize,
    /// What it was made of.
    _parts: Vec<Descriptor>,
}

/// cuDNN on one device. Plans stay until the process ends; there are as many as shapes and passes.
struct Engine {
    /// Which knows the device's stream.
    handle: sys::cudnnHandle_t,
    device: CudaDevice,
    /// Where there is none: what cuDNN said last.
    plans: HashMap<Key, std::result::Result<Arc<Plan>, String>>,
    workspace: Option<Arc<CudaStorage>>,
}

// SAFETY: cuDNN's handles and descriptors may be used by any thread, by one at a time, and the lock around this sees to that.
unsafe impl Send for Engine {}

type Engines = HashMap<candle_core::cuda_backend::DeviceId, Arc<Mutex<Engine>>>;

static ENGINES: Mutex<Option<Engines>> = Mutex::new(None);

fn engine(device: &CudaDevice) -> Result<Arc<Mutex<Engine>>> {
    let mut engines = ENGINES.lock().unwrap_or_else(PoisonError::into_inner);
    let engines = engines.get_or_insert_default();
    if let Some(engine) = engines.get(&device.id()) {
        return Ok(engine.clone());
    }
    let engine = Arc::new(Mutex::new(Engine::new(device)?));
    engines.insert(device.id(), engine.clone());
    Ok(engine)
}

/// Where convolutions of this device work now: whoever records them keeps it.
pub(crate) fn workspace(device: &CudaDevice) -> Option<Arc<CudaStorage>> {
    let engines = ENGINES.lock().unwrap_or_else(PoisonError::into_inner);
    let engine = engines.as_ref()?.get(&device.id())?.lock().unwrap_or_else(PoisonError::into_inner);
    engine.workspace.clone()
}

/// The order in which cuDNN can compute these passes of a convolution: channels last, where it has a way.
pub(crate) fn order_for(device: &CudaDevice, g: &Geometry, dtype: DType, passes: &[Pass]) -> Result<Order> {
    device.cuda_stream().context().bind_to_thread().map_err(failed("CUDA context"))?;
    let engine = engine(device)?;
    let mut engine = engine.lock().unwrap_or_else(PoisonError::into_inner);
    let mut has_all = |order| {
        let key = |pass: &Pass| Key::new(g, *pass, false, order, dtype, [ALIGNMENT; 3]);
        passes.iter().try_for_each(|pass| engine.plan(g, key(pass)).map(drop)).map(|()| order)
    };
    has_all(Order::ChannelsLast).or_else(|_| has_all(Order::ChannelsFirst))
}

/// y = x * w.
///
/// # Safety
/// The addresses are of memory of this device and type, as large as the geometry says.
pub(crate) unsafe fn forward(
    device: &CudaDevice,
    g: &Geometry,
    order: Order,
    dtype: DType,
    [x, w, y]: [u64; 3],
) -> Result<()> {
    // SAFETY: the caller's promise.
    unsafe { compute(device, g, order, dtype, Pass::Forward, [x, w, y], false) }
}

/// The gradient of x.
///
/// # Safety
/// As for [`forward`].
pub(crate) unsafe fn backward_data(
    device: &CudaDevice,
    g: &Geometry,
    order: Order,
    dtype: DType,
    [w, dy, dx]: [u64; 3],
) -> Result<()> {
    // SAFETY: the caller's promise.
    unsafe { compute(device, g, order, dtype, Pass::BackwardData, [dx, w, dy], false) }
}

/// The gradient of w, put in its place or added to it.
///
/// # Safety
/// As for [`forward`].
pub(crate) unsafe fn backward_filter(
    device: &CudaDevice,
    g: &Geometry,
    order: Order,
    dtype: DType,
    [x, dy, dw]: [u64; 3],
    add: bool,
) -> Result<()> {
    // SAFETY: the caller's promise.
    unsafe { compute(device, g, order, dtype, Pass::BackwardFilter, [x, dw, dy], add) }
}

/// Asks for a pass over x, w and y, or their gradients.
///
/// # Safety
/// As for [`forward`].
unsafe fn compute(
    device: &CudaDevice,
    g: &Geometry,
    order: Order,
    dtype: DType,
    pass: Pass,
    places: [u64; 3],
    add: bool,
) -> Result<()> {
    device.cuda_stream().context().bind_to_thread().map_err(failed("CUDA context"))?;
    let engine = engine(device)?;
    let mut engine = engine.lock().unwrap_or_else(PoisonError::into_inner);
    let alignments = places.map(|at| ALIGNMENT.min(1 << at.trailing_zeros().min(u64::BITS - 1)));
    let key = Key::new(g, pass, add, order, dtype, alignments);
    loop {
        let plan = engine.plan(g, key)?;
        let workspace = engine.place_to_work(plan.workspace)?;
        let pack = Descriptor::new(Kind::CUDNN_BACKEND_VARIANT_PACK_DESCRIPTOR)?
            .with(Name::CUDNN_ATTR_VARIANT_PACK_UNIQUE_IDS, &IDS)?
            .with(Name::CUDNN_ATTR_VARIANT_PACK_DATA_POINTERS, &places.map(Place))?
            .with(Name::CUDNN_ATTR_VARIANT_PACK_WORKSPACE, &[Place(workspace)])?
            .finish()?;
        // SAFETY: the plan is of this geometry; the addresses fit it, says the caller.
        match unsafe { plan.execution.execute(engine.handle, &pack) } {
            // What could be planned cannot always be done: then another engine may do it.
            Err(_) if !super::is_recording() && engine.plan_another(g, key, plan.number) => {}
            done => return done,
        }
    }
}

/// What plans call x, w and y.
const IDS: [i64; 3] = [1, 2, 3];

impl Key {
    fn new(g: &Geometry, pass: Pass, add: bool, order: Order, dtype: DType, alignments: [u64; 3]) -> Key {
        let dims = [
            g.batch,
            g.height,
            g.width,
            g.inputs,
            g.outputs,
            g.kernel_height,
            g.kernel_width,
            g.stride,
            g.padding,
            g.dilation,
            g.groups,
            g.out_height,
            g.out_width,
        ];
        Key { dims, pass, add, order, dtype, alignments, tf32: super::device::tf32_allowed() }
    }

    /// Whether an engine of which cuDNN notes this may be used. The same bits every time: a training that goes on from a
    /// checkpoint ends as one that was never interrupted. Inputs are taken as they are; and 32 bits are 32 bits, unless TF32 is
    /// allowed.
    fn allows(&self, notes: &[Note]) -> bool {
        let is_whole = self.dtype == DType::F32 && !self.tf32;
        !notes.contains(&Note::NONDETERMINISTIC)
            && !notes.contains(&Note::DOWN_CONVERT_INPUTS)
            && !(is_whole && notes.contains(&Note::TENSOR_CORE))
    }
}

impl Engine {
    fn new(device: &CudaDevice) -> Result<Engine> {
        let stream = device.cuda_stream();
        let handle = result::create_handle().map_err(failed("cuDNN"))?;
        // SAFETY: the stream lives as long as the device, which is kept here.
        unsafe { result::set_stream(handle, stream.cu_stream().cast()) }.map_err(failed("cuDNN"))?;
        Ok(Engine { handle, device: device.clone(), plans: HashMap::new(), workspace: None })
    }

    /// At least so many bytes for the operation that is asked for next; the one after it may use them again.
    fn place_to_work(&mut self, bytes: usize) -> Result<u64> {
        const ITEM: usize = size_of::<f32>();
        if bytes == 0 {
            return Ok(0);
        }
        let held = self.workspace.as_ref().map_or(0, |held| match &held.slice {
            candle_core::cuda_backend::CudaStorageSlice::F32(slice) => slice.len() * ITEM,
            _ => 0,
        });
        if held < bytes {
            if super::is_recording() {
                bail!("cuDNN wants more memory to work in than when this was rehearsed");
            }
            // First freed, unless something recorded works there: both together may be more than there is.
            self.workspace = None;
            self.workspace = Some(Arc::new(allocate(&self.device, bytes.div_ceil(ITEM), DType::F32, false)?));
        }
        self.workspace.as_ref().map_or(Ok(0), |held| address(held))
    }

    /// The plan of a pass: made for the first time, and kept.
    fn plan(&mut self, g: &Geometry, key: Key) -> Result<Arc<Plan>> {
        let known = self.plans.entry(key);
        let plan = known.or_insert_with(|| match plan(self.handle, g, &key, 0) {
            Ok(plan) => Ok(Arc::new(plan)),
            Err(why) => Err(why.to_string()),
        });
        plan.clone().map_err(|why| {
            let dtype = key.dtype;
            let way = "cuDNN has no engine that gives the same bits every time";
            Error::Msg(format!("{way}, in {dtype:?}, for {g:?}: {why}"))
        })
    }

    /// Makes another plan, by an engine after the one of this number; tells whether there is one.
    fn plan_another(&mut self, g: &Geometry, key: Key, number: usize) -> bool {
        let another = plan(self.handle, g, &key, number).map(Arc::new);
        let is_there = another.is_ok();
        if let Ok(plan) = another {
            self.plans.insert(key, Ok(plan));
        }
        is_there
    }
}

/// Picks, of the engines that cuDNN's heuristics list with the one that they think quickest first, the first that is allowed, is
/// there, and does with little memory; where none does, the one that needs least. Of those that are allowed, it leaves out the
/// first `skipped`.
fn plan(handle: sys::cudnnHandle_t, g: &Geometry, key: &Key, skipped: usize) -> Result<Plan> {
    let parts = operation(g, key)?;
    let graph = Descriptor::new(Kind::CUDNN_BACKEND_OPERATIONGRAPH_DESCRIPTOR)?
        .with(Name::CUDNN_ATTR_OPERATIONGRAPH_HANDLE, &[handle])?
        .with_part(Name::CUDNN_ATTR_OPERATIONGRAPH_OPS, &parts[0])?
        .finish()?;
    let of_engine = |config: &Descriptor| -> Result<(Descriptor, usize)> {
        let execution = Descriptor::new(Kind::CUDNN_BACKEND_EXECUTION_PLAN_DESCRIPTOR)?
            .with(Name::CUDNN_ATTR_EXECUTION_PLAN_HANDLE, &[handle])?
            .with_part(Name::CUDNN_ATTR_EXECUTION_PLAN_ENGINE_CONFIG, config)?
            .finish()?;
        let bytes: Vec<i64> = execution.get(Name::CUDNN_ATTR_EXECUTION_PLAN_WORKSPACE_SIZE, 1)?;
        Ok((execution, bytes.first().map_or(0, |bytes| *bytes as usize)))
    };
    let (mut best, mut number): (Option<Plan>, usize) = (None, 0);
    let mut why = Error::Msg("it proposes none".into());
    // The second mode's engines can do what the first one's cannot.
    'found: for mode in [Mode::CUDNN_HEUR_MODE_A, Mode::CUDNN_HEUR_MODE_FALLBACK] {
        let listed = engines(&graph, mode).unwrap_or_else(|error| {
            why = error;
            Vec::new()
        });
        for config in listed {
            if !notes(&config).is_ok_and(|notes| key.allows(&notes)) {
                continue;
            }
            number += 1;
            if number <= skipped {
                continue;
            }
            match of_engine(&config) {
                Ok((execution, workspace)) => {
                    if best.as_ref().is_none_or(|best| workspace < best.workspace) {
                        best = Some(Plan { execution, workspace, number, _parts: vec![config] });
                    }
                    if workspace <= MOST_WORKSPACE {
                        break 'found;
                    }
                }
                // What is listed is not always there.
                Err(error) => why = error,
            }
        }
    }
    let mut best = best.ok_or(why)?;
    best._parts.extend(parts);
    best._parts.push(graph);
    Ok(best)
}

/// The engines that cuDNN proposes, the one that it thinks quickest first.
fn engines(graph: &Descriptor, mode: Mode) -> Result<Vec<Descriptor>> {
    Descriptor::new(Kind::CUDNN_BACKEND_ENGINEHEUR_DESCRIPTOR)?
        .with_part(Name::CUDNN_ATTR_ENGINEHEUR_OPERATION_GRAPH, graph)?
        .with(Name::CUDNN_ATTR_ENGINEHEUR_MODE, &[mode])?
        .finish()?
        .get_parts(Name::CUDNN_ATTR_ENGINEHEUR_RESULTS, Kind::CUDNN_BACKEND_ENGINECFG_DESCRIPTOR)
}

/// What cuDNN notes of an engine's numbers.
fn notes(config: &Descriptor) -> Result<Vec<Note>> {
    /// More than there are.
    const MOST: usize = 32;
    config
        .get_part(Name::CUDNN_ATTR_ENGINECFG_ENGINE, Kind::CUDNN_BACKEND_ENGINE_DESCRIPTOR)?
        .get(Name::CUDNN_ATTR_ENGINE_NUMERICAL_NOTE, MOST)
}

/// A pass as cuDNN knows it, and then what it is made of.
fn operation(g: &Geometry, key: &Key) -> Result<Vec<Descriptor>> {
    use sys::cudnnDataType_t::{CUDNN_DATA_BFLOAT16, CUDNN_DATA_FLOAT, CUDNN_DATA_HALF};
    let data = match key.dtype {
        DType::F32 => CUDNN_DATA_FLOAT,
        DType::F16 => CUDNN_DATA_HALF,
        DType::BF16 => CUDNN_DATA_BFLOAT16,
        other => bail!("cuDNN: expected f32, f16 or bf16, got {other:?}"),
    };
    // Sizes are told in the order N, C, H, W, whatever the order in memory.
    let tensor = |i: usize, dims: [usize; 4]| {
        let dims = dims.map(|size| size as i64);
        let [_, c, h, w] = dims;
        let strides = match key.order {
            Order::ChannelsLast => [h * w * c, 1, w * c, c],
            Order::ChannelsFirst => [c * h * w, h * w, w, 1],
        };
        Descriptor::new(Kind::CUDNN_BACKEND_TENSOR_DESCRIPTOR)?
            .with(Name::CUDNN_ATTR_TENSOR_UNIQUE_ID, &IDS[i..=i])?
            .with(Name::CUDNN_ATTR_TENSOR_DATA_TYPE, &[data])?
            .with(Name::CUDNN_ATTR_TENSOR_BYTE_ALIGNMENT, &[key.alignments[i] as i64])?
            .with(Name::CUDNN_ATTR_TENSOR_DIMENSIONS, &dims)?
            .with(Name::CUDNN_ATTR_TENSOR_STRIDES, &strides)?
            .finish()
    };
    let x = tensor(0, [g.batch, g.inputs, g.height, g.width])?;
    // Groups follow from the inputs that are left.
    let w = tensor(1, [g.outputs, g.inputs / g.groups, g.kernel_height, g.kernel_width])?;
    let y = tensor(2, [g.batch, g.outputs, g.out_height, g.out_width])?;
    let both = |size: usize| [size as i64; 2];
    let convolution = Descriptor::new(Kind::CUDNN_BACKEND_CONVOLUTION_DESCRIPTOR)?
        // Products are added in 32 bits.
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
