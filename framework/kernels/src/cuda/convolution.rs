//! Convolutions by cuDNN: descriptors and algorithms are found once a shape, and workspace is used again.

use super::failed;
use super::memory::{address, allocate};
use crate::direct::Geometry;
use candle_core::cuda_backend::cudarc::cudnn::result::{self, CudnnError};
use candle_core::cuda_backend::cudarc::cudnn::sys;
use candle_core::{CudaDevice, CudaStorage, DType, Error, Result, bail};
use std::collections::HashMap;
use std::ffi::{CStr, c_char, c_int, c_void};
use std::sync::{Arc, Mutex, PoisonError};

/// Algorithms that want more workspace are not taken, where there is another.
const MOST_WORKSPACE: usize = 2 << 30;

/// How tensors lie in memory.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) enum Order {
    /// x and y (B, H, W, C), w (outputs, kernel height, kernel width, inputs / groups).
    ChannelsLast,
    /// x and y (B, C, H, W), w (outputs, inputs / groups, kernel height, kernel width).
    ChannelsFirst,
}

/// What a plan is for.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
struct Key {
    dims: [usize; 13],
    order: Order,
    dtype: DType,
    tf32: bool,
}

impl Key {
    fn new(g: &Geometry, order: Order, dtype: DType) -> Key {
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
        Key { dims, order, dtype, tf32: super::device::tf32_allowed() }
    }
}

/// The descriptors of a convolution, and the algorithm of each of its three passes with the workspace that it needs.
#[derive(Clone, Copy)]
struct Plan {
    x: sys::cudnnTensorDescriptor_t,
    y: sys::cudnnTensorDescriptor_t,
    w: sys::cudnnFilterDescriptor_t,
    convolution: sys::cudnnConvolutionDescriptor_t,
    forward: Option<(sys::cudnnConvolutionFwdAlgo_t, usize)>,
    backward_data: Option<(sys::cudnnConvolutionBwdDataAlgo_t, usize)>,
    backward_filter: Option<(sys::cudnnConvolutionBwdFilterAlgo_t, usize)>,
}

impl Plan {
    fn is_complete(&self) -> bool {
        self.forward.is_some() && self.backward_data.is_some() && self.backward_filter.is_some()
    }
}

/// cuDNN on one device. Plans stay until the process ends; there are as many as shapes.
struct Engine {
    /// Which knows the device's stream.
    handle: sys::cudnnHandle_t,
    device: CudaDevice,
    plans: HashMap<Key, Plan>,
    workspace: Option<CudaStorage>,
}

// SAFETY: cuDNN's handles may be used by any thread, by one at a time, and the lock around this sees to that.
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

/// The order in which cuDNN can compute this convolution and its gradients: channels last, where it has a way.
pub(crate) fn order_for(device: &CudaDevice, g: &Geometry, dtype: DType) -> Result<Order> {
    device.cuda_stream().context().bind_to_thread().map_err(failed("CUDA context"))?;
    let engine = engine(device)?;
    let mut engine = engine.lock().unwrap_or_else(PoisonError::into_inner);
    for order in [Order::ChannelsLast, Order::ChannelsFirst] {
        if engine.plan(g, order, dtype)?.is_complete() {
            return Ok(order);
        }
    }
    bail!("cuDNN has no algorithm that gives the same bits every time, in {dtype:?}, for {g:?}")
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
    with_plan(device, g, order, dtype, |engine, plan| {
        let (algorithm, bytes) = found(plan.forward, g, dtype)?;
        let (workspace, [one, zero]) = (engine.workspace(bytes)?, [1f32, 0.]);
        // SAFETY: the descriptors are of this geometry; the addresses fit them, says the caller.
        unsafe {
            result::convolution_forward(
                engine.handle,
                scalar(&one),
                plan.x,
                memory(x),
                plan.w,
                memory(w),
                plan.convolution,
                algorithm,
                memory_mut(workspace),
                bytes,
                scalar(&zero),
                plan.y,
                memory_mut(y),
            )
        }
        .map_err(refused("cuDNN, convolution"))
    })
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
    with_plan(device, g, order, dtype, |engine, plan| {
        let (algorithm, bytes) = found(plan.backward_data, g, dtype)?;
        let (workspace, [one, zero]) = (engine.workspace(bytes)?, [1f32, 0.]);
        // SAFETY: as in `forward`.
        unsafe {
            result::convolution_backward_data(
                engine.handle,
                scalar(&one),
                plan.w,
                memory(w),
                plan.y,
                memory(dy),
                plan.convolution,
                algorithm,
                memory_mut(workspace),
                bytes,
                scalar(&zero),
                plan.x,
                memory_mut(dx),
            )
        }
        .map_err(refused("cuDNN, convolution's gradient of its input"))
    })
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
    with_plan(device, g, order, dtype, |engine, plan| {
        let (algorithm, bytes) = found(plan.backward_filter, g, dtype)?;
        let (workspace, [one, kept]) = (engine.workspace(bytes)?, [1f32, f32::from(u8::from(add))]);
        // SAFETY: as in `forward`.
        unsafe {
            result::convolution_backward_filter(
                engine.handle,
                scalar(&one),
                plan.x,
                memory(x),
                plan.y,
                memory(dy),
                plan.convolution,
                algorithm,
                memory_mut(workspace),
                bytes,
                scalar(&kept),
                plan.w,
                memory_mut(dw),
            )
        }
        .map_err(refused("cuDNN, convolution's gradient of its weight"))
    })
}

fn with_plan(
    device: &CudaDevice,
    g: &Geometry,
    order: Order,
    dtype: DType,
    call: impl FnOnce(&mut Engine, &Plan) -> Result<()>,
) -> Result<()> {
    device.cuda_stream().context().bind_to_thread().map_err(failed("CUDA context"))?;
    let engine = engine(device)?;
    let mut engine = engine.lock().unwrap_or_else(PoisonError::into_inner);
    let plan = engine.plan(g, order, dtype)?;
    call(&mut engine, &plan)
}

fn found<A>(algorithm: Option<A>, g: &Geometry, dtype: DType) -> Result<A> {
    algorithm.ok_or_else(|| {
        Error::Msg(format!(
            "cuDNN has no algorithm that gives the same bits every time, in {dtype:?}, for {g:?}"
        ))
    })
}

/// What cuDNN says, as an error of candle: its code, and the last words that it had.
fn refused(what: &str) -> impl Fn(CudnnError) -> Error + '_ {
    move |CudnnError(code)| {
        let mut words: [c_char; 1024] = [0; 1024];
        // SAFETY: there is room for as much as is asked for, and a zero at the end in any case.
        let words = unsafe {
            sys::cudnnGetLastErrorString(words.as_mut_ptr(), words.len() - 1);
            CStr::from_ptr(words.as_ptr()).to_string_lossy()
        };
        Error::Msg(format!("{what}: {code:?} {words}").trim_end().to_string())
    }
}

fn memory(at: u64) -> *const c_void {
    at as *const c_void
}

fn memory_mut(at: u64) -> *mut c_void {
    at as *mut c_void
}

fn scalar(x: &f32) -> *const c_void {
    std::ptr::from_ref(x).cast()
}

impl Engine {
    fn new(device: &CudaDevice) -> Result<Engine> {
        let failed = refused("cuDNN");
        let stream = device.cuda_stream();
        let handle = result::create_handle().map_err(&failed)?;
        // SAFETY: the stream lives as long as the device, which is kept here.
        unsafe { result::set_stream(handle, stream.cu_stream().cast()) }.map_err(&failed)?;
        Ok(Engine { handle, device: device.clone(), plans: HashMap::new(), workspace: None })
    }

    /// At least so many bytes for the operation that is asked for next; the one after it may use them again.
    fn workspace(&mut self, bytes: usize) -> Result<u64> {
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
            // First freed: both together may be more than there is.
            self.workspace = None;
            self.workspace = Some(allocate(&self.device, bytes.div_ceil(ITEM), DType::F32, false)?);
        }
        self.workspace.as_ref().map_or(Ok(0), address)
    }

    /// The plan of a convolution: made for the first time, and kept.
    fn plan(&mut self, g: &Geometry, order: Order, dtype: DType) -> Result<Plan> {
        let key = Key::new(g, order, dtype);
        if let Some(plan) = self.plans.get(&key) {
            return Ok(*plan);
        }
        let plan = plan(self.handle, g, &key)?;
        self.plans.insert(key, plan);
        Ok(plan)
    }
}

fn plan(handle: sys::cudnnHandle_t, g: &Geometry, key: &Key) -> Result<Plan> {
    use sys::cudnnDataType_t::{CUDNN_DATA_BFLOAT16, CUDNN_DATA_FLOAT, CUDNN_DATA_HALF};
    use sys::cudnnMathType_t::{CUDNN_DEFAULT_MATH, CUDNN_FMA_MATH, CUDNN_TENSOR_OP_MATH};
    let (data, math) = match key.dtype {
        DType::F32 if key.tf32 => (CUDNN_DATA_FLOAT, CUDNN_DEFAULT_MATH),
        DType::F32 => (CUDNN_DATA_FLOAT, CUDNN_FMA_MATH),
        DType::F16 => (CUDNN_DATA_HALF, CUDNN_TENSOR_OP_MATH),
        DType::BF16 => (CUDNN_DATA_BFLOAT16, CUDNN_TENSOR_OP_MATH),
        other => bail!("cuDNN: expected f32, f16 or bf16, got {other:?}"),
    };
    let size = |size: usize| {
        c_int::try_from(size)
            .map_err(|_| Error::Msg(format!("cuDNN: {size} is too large for a size, in {g:?}")))
    };
    let dims = |dims: [usize; 4]| -> Result<[c_int; 4]> {
        let [a, b, c, d] = dims;
        Ok([size(a)?, size(b)?, size(c)?, size(d)?])
    };
    let failed = refused("cuDNN, descriptor");
    let format = match key.order {
        Order::ChannelsLast => sys::cudnnTensorFormat_t::CUDNN_TENSOR_NHWC,
        Order::ChannelsFirst => sys::cudnnTensorFormat_t::CUDNN_TENSOR_NCHW,
    };
    let [x, y] = [result::create_tensor_descriptor(), result::create_tensor_descriptor()];
    let (x, y) = (x.map_err(&failed)?, y.map_err(&failed)?);
    let w = result::create_filter_descriptor().map_err(&failed)?;
    let convolution = result::create_convolution_descriptor().map_err(&failed)?;
    // Sizes are told in the order N, C, H, W, whatever the order in memory.
    let x_dims = dims([g.batch, g.inputs, g.height, g.width])?;
    let y_dims = dims([g.batch, g.outputs, g.out_height, g.out_width])?;
    let w_dims = dims([g.outputs, g.inputs / g.groups, g.kernel_height, g.kernel_width])?;
    let (padding, stride, dilation) = (size(g.padding)?, size(g.stride)?, size(g.dilation)?);
    // SAFETY: all descriptors were made above; they are not freed, since plans are not.
    unsafe {
        result::set_tensor4d_descriptor(x, format, data, x_dims).map_err(&failed)?;
        result::set_tensor4d_descriptor(y, format, data, y_dims).map_err(&failed)?;
        result::set_filter4d_descriptor(w, data, format, w_dims).map_err(&failed)?;
        result::set_convolution2d_descriptor(
            convolution,
            padding,
            padding,
            stride,
            stride,
            dilation,
            dilation,
            sys::cudnnConvolutionMode_t::CUDNN_CROSS_CORRELATION,
            // Products are added in 32 bits.
            CUDNN_DATA_FLOAT,
        )
        .map_err(&failed)?;
        result::set_convolution_group_count(convolution, size(g.groups)?).map_err(&failed)?;
        result::set_convolution_math_type(convolution, math).map_err(&failed)?;
    }
    let mut plan = Plan { x, y, w, convolution, forward: None, backward_data: None, backward_filter: None };
    // SAFETY: the descriptors are set, and there is room for as many results as are asked for.
    unsafe {
        plan.forward = best_forward(handle, &plan);
        plan.backward_data = best_backward_data(handle, &plan);
        plan.backward_filter = best_backward_filter(handle, &plan);
    }
    Ok(plan)
}

/// Picks, of the algorithms that cuDNN lists with the one that it thinks quickest first, the first that is there, gives the
/// same bits every time, so that a training that goes on from a checkpoint ends as one that was never interrupted, and does
/// with little memory; where none does, the one that needs least.
macro_rules! best {
    ($name:ident, $algorithm:ty, $performance:ty, $list:path, $workspace:path, [$a:ident, $b:ident, $c:ident, $d:ident]) => {
        /// # Safety
        /// Handle and descriptors are set.
        unsafe fn $name(handle: sys::cudnnHandle_t, plan: &Plan) -> Option<($algorithm, usize)> {
            const MOST: usize = 16;
            let mut count = 0;
            // SAFETY: plain numbers, for which zero is a value.
            let mut list: [$performance; MOST] = unsafe { std::mem::zeroed() };
            // SAFETY: the caller's promise; the list has room for as many as are asked for.
            let listed = unsafe {
                let (list, most) = (list.as_mut_ptr(), MOST as c_int);
                $list(handle, plan.$a, plan.$b, plan.$c, plan.$d, most, &mut count, list)
            };
            listed.ok()?;
            let listed = list.iter().take(count.max(0) as usize);
            let usable = listed.filter(|it| {
                it.status == sys::cudnnStatus_t::CUDNN_STATUS_SUCCESS
                    && it.determinism == sys::cudnnDeterminism_t::CUDNN_DETERMINISTIC
            });
            let candidates = usable
                .filter_map(|it| {
                    let algorithm = it.algo;
                    // SAFETY: the caller's promise.
                    let bytes = unsafe { $workspace(handle, plan.$a, plan.$b, plan.$c, plan.$d, algorithm) };
                    Some((algorithm, bytes.ok()?))
                })
                .collect::<Vec<_>>();
            let modest = candidates.iter().find(|(_, bytes)| *bytes <= MOST_WORKSPACE);
            modest.or_else(|| candidates.iter().min_by_key(|(_, bytes)| *bytes)).copied()
        }
    };
}

best!(
    best_forward,
    sys::cudnnConvolutionFwdAlgo_t,
    sys::cudnnConvolutionFwdAlgoPerf_t,
    result::get_convolution_forward_algorithm,
    result::get_convolution_forward_workspace_size,
    [x, w, convolution, y]
);
best!(
    best_backward_data,
    sys::cudnnConvolutionBwdDataAlgo_t,
    sys::cudnnConvolutionBwdDataAlgoPerf_t,
    result::get_convolution_backward_data_algorithm,
    result::get_convolution_backward_data_workspace_size,
    [w, y, convolution, x]
);
best!(
    best_backward_filter,
    sys::cudnnConvolutionBwdFilterAlgo_t,
    sys::cudnnConvolutionBwdFilterAlgoPerf_t,
    result::get_convolution_backward_filter_algorithm,
    result::get_convolution_backward_filter_workspace_size,
    [x, y, convolution, w]
);
