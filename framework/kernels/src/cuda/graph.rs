//! CUDA graphs: a stream's work, captured once and launched repeatedly.

use super::{convolution, failed};
use candle_core::cuda_backend::cudarc::driver::sys::{
    CUgraphInstantiate_flags, CUgraphNodeType, CUmemorytype, CUstreamCaptureMode,
};
use candle_core::cuda_backend::cudarc::driver::{CudaGraph, CudaStream, DriverError, sys};
use candle_core::{CudaDevice, CudaStorage, Error, Result, bail};
use std::cell::Cell;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard};

/// Read-locked by threads that use a device, write-locked by a thread that records, because other work would
/// be recorded too.
static UNRECORDED: RwLock<()> = RwLock::new(());

thread_local! {
    /// Whether this thread records.
    static RECORDS: Cell<bool> = const { Cell::new(false) };
}

/// A stream that records instead of working, until this ends or is dropped.
struct Capture {
    stream: Arc<CudaStream>,
}

impl Capture {
    fn begin(stream: Arc<CudaStream>) -> Result<Self> {
        // Other threads may keep working on their own devices.
        let mode = CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        stream.begin_capture(mode).map_err(failed("recording a CUDA graph"))?;
        RECORDS.set(true);
        Ok(Self { stream })
    }

    /// The recorded work, if all of it can be recorded.
    fn end(self) -> Result<Option<CudaGraph>> {
        self.stop().map_err(failed("recording a CUDA graph"))
    }

    fn stop(&self) -> std::result::Result<Option<CudaGraph>, DriverError> {
        RECORDS.set(false);
        // Tensors dropped during a failed recording leave errors that cudarc returns from its next call, whatever it is:
        // they must not keep the capture from ending, nor concern later work.
        let _ = self.stream.context().check_err();
        // Memory held by the results is allocated by each replay, and stays until the next one.
        let flags = CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH;
        let ended = self.stream.end_capture(flags);
        let _ = self.stream.context().check_err();
        ended
    }
}

impl Drop for Capture {
    fn drop(&mut self) {
        if is_recording() {
            // The work has panicked. A graph of half of it is of no use.
            std::mem::forget(self.stop());
        }
    }
}

/// Whether this thread records.
pub(crate) fn is_recording() -> bool {
    RECORDS.get()
}

/// Waits until no other thread records, and prevents recording while the guard lives; `None` if this thread
/// records.
pub(crate) fn unrecorded() -> Option<RwLockReadGuard<'static, ()>> {
    (!is_recording()).then(|| UNRECORDED.read().unwrap_or_else(PoisonError::into_inner))
}

pub(crate) struct Graph {
    graph: CudaGraph,
    operations: usize,
    /// Keeps the workspace of the graph's convolutions alive.
    _workspace: Option<Arc<CudaStorage>>,
}

// SAFETY: a graph may be used by any thread, but only one at a time, and its only use is replaying.
unsafe impl Send for Graph {}
// SAFETY: a launch only reads the graph, and the driver orders launches in their stream.
unsafe impl Sync for Graph {}

impl Graph {
    /// Runs work that will be recorded, after returning the memory of dropped recordings to the driver.
    pub(crate) fn rehearse<T>(device: &CudaDevice, work: impl FnOnce() -> T) -> T {
        // This only saves memory: if it fails, the work will fail too and report why.
        let _ = give_back_recorded_memory(&device.cuda_stream());
        let _uploaded = device.enable_cuda_graph_htod_cache();
        work()
    }

    pub(crate) fn record<T, E: From<Error>>(
        device: &CudaDevice,
        work: impl FnOnce() -> std::result::Result<T, E>,
    ) -> std::result::Result<(T, Graph), E> {
        let stream = device.cuda_stream();
        let _alone = UNRECORDED.write().unwrap_or_else(PoisonError::into_inner);
        let _uploaded = device.enable_cuda_graph_htod_cache();
        give_back_memory(&stream)?;
        let capture = Capture::begin(stream)?;
        let results = work();
        let ended = capture.end();
        let results = results?;
        match finished(ended, convolution::workspace(device)) {
            Ok(graph) => Ok((results, graph)),
            Err(error) => {
                // The results' memory was never allocated, so nothing may free it.
                std::mem::forget(results);
                Err(error.into())
            }
        }
    }

    pub(crate) fn replay(&self) -> Result<()> {
        self.graph.launch().map_err(failed("replaying a CUDA graph"))
    }

    pub(crate) fn operations(&self) -> usize {
        self.operations
    }
}

fn finished(ended: Result<Option<CudaGraph>>, workspace: Option<Arc<CudaStorage>>) -> Result<Graph> {
    let Some(graph) = ended? else { bail!("recording a CUDA graph: nothing was asked for") };
    let nodes = nodes(&graph)?;
    for node in &nodes {
        if reads_from_host(*node)? {
            bail!("recording a CUDA graph: the work uploads something that the host does not keep for it");
        }
    }
    Ok(Graph { graph, operations: nodes.len(), _workspace: workspace })
}

fn nodes(graph: &CudaGraph) -> Result<Vec<sys::CUgraphNode>> {
    let failed = failed("CUDA graph");
    let (graph, mut count) = (graph.cu_graph(), 0);
    // SAFETY: the graph lives, and a null pointer requests only the count.
    unsafe { sys::cuGraphGetNodes(graph, std::ptr::null_mut(), &mut count) }.result().map_err(&failed)?;
    let mut nodes = vec![std::ptr::null_mut(); count];
    // SAFETY: there is room for as many nodes as were counted.
    unsafe { sys::cuGraphGetNodes(graph, nodes.as_mut_ptr(), &mut count) }.result().map_err(&failed)?;
    nodes.truncate(count);
    Ok(nodes)
}

/// Whether a replay would copy from host memory, which would have been reused by then.
fn reads_from_host(node: sys::CUgraphNode) -> Result<bool> {
    let failed = failed("CUDA graph");
    let mut kind = CUgraphNodeType::CU_GRAPH_NODE_TYPE_EMPTY;
    // SAFETY: this is a node of a live graph, and a place for its type.
    unsafe { sys::cuGraphNodeGetType(node, &mut kind) }.result().map_err(&failed)?;
    if kind != CUgraphNodeType::CU_GRAPH_NODE_TYPE_MEMCPY {
        return Ok(false);
    }
    let mut copy = std::mem::MaybeUninit::<sys::CUDA_MEMCPY3D>::zeroed();
    // SAFETY: this is a copy node, and a place for its parameters.
    if unsafe { sys::cuGraphMemcpyNodeGetParams(node, copy.as_mut_ptr()) }.result().is_err() {
        // A kind of copy that this call cannot describe is a library's own, within the device.
        return Ok(false);
    }
    // SAFETY: the driver has initialised all of it.
    let copy = unsafe { copy.assume_init() };
    Ok(copy.srcMemoryType == CUmemorytype::CU_MEMORYTYPE_HOST)
}

/// Returns memory freed by tensors to the driver, because recordings use separate memory.
fn give_back_memory(stream: &Arc<CudaStream>) -> Result<()> {
    let failed = failed("CUDA memory pool");
    stream.synchronize().map_err(&failed)?;
    // SAFETY: the context's device exists; its pool may be trimmed at any time.
    unsafe {
        let pool = candle_core::cuda_backend::cudarc::driver::result::device::get_default_mem_pool(
            stream.context().cu_device(),
        )
        .map_err(&failed)?;
        sys::cuMemPoolTrimTo(pool, 0).result().map_err(&failed)
    }
}

/// Returns memory freed by recordings to the driver.
fn give_back_recorded_memory(stream: &Arc<CudaStream>) -> Result<()> {
    let failed = failed("memory of CUDA graphs");
    stream.synchronize().map_err(&failed)?;
    // SAFETY: the context's device exists; memory in use is not affected.
    unsafe { sys::cuDeviceGraphMemTrim(stream.context().cu_device()) }.result().map_err(&failed)
}

impl std::fmt::Debug for Graph {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Graph({} operations)", self.operations)
    }
}
