//! Convolutions: with cuDNN, with one plan per shape and pass and a reused workspace, or with this crate's
//! [`Winograd`] and [`Depthwise`] kernels.

use super::backend::Descriptor;
use super::depthwise::Depthwise;
use super::device::tf32_allowed;
use super::failed;
use super::memory::{ALIGNMENT, address, allocate};
use super::plan::{self, Key, Pass, Plan, Target};
use super::winograd::Winograd;
use crate::direct::Geometry;
use candle_core::cuda_backend::cudarc::cudnn::{result, sys};
use candle_core::{CudaDevice, CudaStorage, DType, Error, Result, bail};
use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// cuDNN on one device.
struct Cudnn {
    /// Bound to the device's stream.
    handle: sys::cudnnHandle_t,
    device: CudaDevice,
    /// All plans created, about one per shape and pass. They are never dropped, because recordings may use
    /// them.
    plans: Vec<Plan>,
    /// The index of the plan in use, or cuDNN's last error if there is no plan.
    in_use: HashMap<Key, std::result::Result<usize, String>>,
    /// Keys whose engines have been timed, and whether our kernels were faster than all of them.
    timed: HashMap<Key, bool>,
    workspace: Option<Arc<CudaStorage>>,
}

// SAFETY: cuDNN's handles and descriptors may be used by any thread, but only one at a time, which the lock
// around this ensures.
unsafe impl Send for Cudnn {}

type Opened = HashMap<candle_core::cuda_backend::DeviceId, Arc<Mutex<Cudnn>>>;

static OPENED: Mutex<Option<Opened>> = Mutex::new(None);

/// Whether engines are timed.
static TIMES: AtomicBool = AtomicBool::new(false);

pub(crate) fn time_convolutions(wanted: bool) {
    TIMES.store(wanted, Ordering::Relaxed);
}

/// cuDNN on this device, whose context is made current on this thread.
fn cudnn(device: &CudaDevice) -> Result<Arc<Mutex<Cudnn>>> {
    device.cuda_stream().context().bind_to_thread().map_err(failed("CUDA context"))?;
    let mut opened = OPENED.lock().unwrap_or_else(PoisonError::into_inner);
    let opened = opened.get_or_insert_default();
    if let Some(cudnn) = opened.get(&device.id()) {
        return Ok(cudnn.clone());
    }
    let cudnn = Arc::new(Mutex::new(Cudnn::new(device)?));
    opened.insert(device.id(), cudnn.clone());
    Ok(cudnn)
}

/// The current workspace of this device's convolutions; recordings keep it alive.
pub(crate) fn workspace(device: &CudaDevice) -> Option<Arc<CudaStorage>> {
    let opened = OPENED.lock().unwrap_or_else(PoisonError::into_inner);
    let cudnn = opened.as_ref()?.get(&device.id())?.lock().unwrap_or_else(PoisonError::into_inner);
    cudnn.workspace.clone()
}

/// y = x * w.
///
/// # Safety
/// The addresses point to memory of this device and dtype, as large as the geometry says.
pub(crate) unsafe fn forward(
    device: &CudaDevice,
    g: &Geometry,
    dtype: DType,
    [x, w, y]: [u64; 3],
) -> Result<()> {
    // SAFETY: guaranteed by the caller.
    unsafe { compute(device, g, dtype, Pass::Forward, [x, w, y], false) }
}

/// The gradient of x.
///
/// # Safety
/// Same as for [`forward`].
pub(crate) unsafe fn backward_data(
    device: &CudaDevice,
    g: &Geometry,
    dtype: DType,
    [w, dy, dx]: [u64; 3],
) -> Result<()> {
    // SAFETY: guaranteed by the caller.
    unsafe { compute(device, g, dtype, Pass::BackwardData, [dx, w, dy], false) }
}

/// The gradient of w, overwritten or added to.
///
/// # Safety
/// Same as for [`forward`].
pub(crate) unsafe fn backward_filter(
    device: &CudaDevice,
    g: &Geometry,
    dtype: DType,
    [x, dy, dw]: [u64; 3],
    add: bool,
) -> Result<()> {
    // SAFETY: guaranteed by the caller.
    unsafe { compute(device, g, dtype, Pass::BackwardFilter, [x, dw, dy], add) }
}

/// Enqueues a pass over x, w and y, or their gradients.
///
/// # Safety
/// Same as for [`forward`].
unsafe fn compute(
    device: &CudaDevice,
    g: &Geometry,
    dtype: DType,
    pass: Pass,
    places: [u64; 3],
    add: bool,
) -> Result<()> {
    let cudnn = cudnn(device)?;
    let mut cudnn = cudnn.lock().unwrap_or_else(PoisonError::into_inner);
    let alignments = places.map(|at| ALIGNMENT.min(1 << at.trailing_zeros().min(u64::BITS - 1)));
    let key = Key { g: *g, pass, add, dtype, alignments, tf32: tf32_allowed() };
    // Timing computes the result repeatedly, so it must not accumulate.
    if TIMES.load(Ordering::Relaxed) && !add && !super::is_recording() {
        // SAFETY: the key has this geometry; the caller guarantees that the addresses fit it.
        unsafe { cudnn.time(key, places) };
    }
    if let Some(ours) = Ours::new(&key, places)
        && cudnn.timed.get(&key).copied().unwrap_or(ours.is_worth_it())
    {
        // SAFETY: as above.
        return unsafe { ours.compute(device) };
    }
    loop {
        let plan = cudnn.plan(key)?;
        let workspace = cudnn.plans[plan].workspace;
        let pack = cudnn.variant_pack(workspace, places)?;
        // SAFETY: as above.
        let done = unsafe { cudnn.plans[plan].execution.execute(cudnn.handle, &pack) };
        let Err(error) = done else { return Ok(()) };
        // An engine that could be planned may still refuse to run where another one does not.
        if super::is_recording() || !cudnn.plan_another(key, plan) {
            return Err(error);
        }
    }
}

/// This crate's kernels for a pass that they can compute.
enum Ours {
    Winograd(Winograd),
    Depthwise(Depthwise),
}

impl Ours {
    fn new(key: &Key, places: [u64; 3]) -> Option<Ours> {
        let depthwise = || Depthwise::new(key, places).map(Ours::Depthwise);
        Winograd::new(key, places).map(Ours::Winograd).or_else(depthwise)
    }

    /// Whether they are likely to be faster than cuDNN.
    fn is_worth_it(&self) -> bool {
        match self {
            Ours::Winograd(winograd) => winograd.is_worth_it(),
            Ours::Depthwise(_) => true,
        }
    }

    /// Computes the pass.
    ///
    /// # Safety
    /// The addresses point to memory of this device, as large as the key's geometry says.
    unsafe fn compute(&self, device: &CudaDevice) -> Result<()> {
        // SAFETY: guaranteed by the caller.
        unsafe {
            match self {
                Ours::Winograd(winograd) => winograd.compute(device),
                Ours::Depthwise(depthwise) => depthwise.compute(device),
            }
        }
    }
}

impl Cudnn {
    fn new(device: &CudaDevice) -> Result<Cudnn> {
        let stream = device.cuda_stream();
        let handle = result::create_handle().map_err(failed("cuDNN"))?;
        // SAFETY: the stream lives as long as the device, which is stored here.
        unsafe { result::set_stream(handle, stream.cu_stream().cast()) }.map_err(failed("cuDNN"))?;
        Ok(Cudnn {
            handle,
            device: device.clone(),
            plans: Vec::new(),
            in_use: HashMap::new(),
            timed: HashMap::new(),
            workspace: None,
        })
    }

    /// The address of at least `bytes` bytes for the next operation; the one after it may reuse them.
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
            // Freed first, unless a recording uses it: both together may not fit into memory.
            self.workspace = None;
            self.workspace = Some(Arc::new(allocate(&self.device, bytes.div_ceil(ITEM), DType::F32, false)?));
        }
        self.workspace.as_ref().map_or(Ok(0), |held| address(held))
    }

    /// The index of the plan for a pass, which is created on first use.
    fn plan(&mut self, key: Key) -> Result<usize> {
        if !self.in_use.contains_key(&key) {
            match Plan::new(&Target::Here(self.handle), &key, 0) {
                Ok(plan) => self.take(key, plan),
                Err(why) => drop(self.in_use.insert(key, Err(why.to_string()))),
            }
        }
        self.in_use[&key].clone().map_err(|why| {
            let Key { g, dtype, .. } = key;
            let way = "cuDNN has no engine that gives the same bits every time";
            Error::Msg(format!("{way}, in {dtype:?}, for {g:?}: {why}"))
        })
    }

    /// Creates a plan with an engine after this plan's and uses it instead. Returns whether there is one.
    fn plan_another(&mut self, key: Key, plan: usize) -> bool {
        let another = Plan::new(&Target::Here(self.handle), &key, self.plans[plan].number);
        another.map(|plan| self.take(key, plan)).is_ok()
    }

    fn take(&mut self, key: Key, plan: Plan) {
        self.in_use.insert(key, Ok(self.plans.len()));
        self.plans.push(plan);
    }

    /// Takes the fastest of our kernels and the first engines that cuDNN proposes; runs once for each key.
    ///
    /// # Safety
    /// The addresses of x, w and y point to memory as large as the key says.
    unsafe fn time(&mut self, key: Key, places: [u64; 3]) {
        /// Number of engines to try; later ones are hardly ever faster.
        const MOST: usize = 10;
        if self.timed.contains_key(&key) {
            return;
        }
        let (mut number, mut quickest): (usize, Option<(Duration, Plan)>) = (0, None);
        for _ in 0..MOST {
            let Ok(plan) = Plan::new(&Target::Here(self.handle), &key, number) else { break };
            number = plan.number;
            let Ok(pack) = self.variant_pack(plan.workspace, places) else { continue };
            // SAFETY: guaranteed by the caller.
            let Ok(time) = self.time_of(|| unsafe { plan.execution.execute(self.handle, &pack) }) else {
                continue;
            };
            if quickest.as_ref().is_none_or(|(least, _)| time < *least) {
                quickest = Some((time, plan));
            }
        }
        // SAFETY: as above.
        let ours = Ours::new(&key, places)
            .and_then(|ours| self.time_of(|| unsafe { ours.compute(&self.device) }).ok());
        let least = quickest.as_ref().map(|(least, _)| *least);
        self.timed.insert(key, ours.is_some_and(|time| least.is_none_or(|least| time < least)));
        if let Some((_, plan)) = quickest {
            self.take(key, plan);
        }
    }

    /// The time of a run, after one warm-up run: the mean of so many that they last [`LONG`].
    fn time_of(&self, run: impl Fn() -> Result<()>) -> Result<Duration> {
        /// A device needs some time to reach its clock rate, and a launch takes some microseconds.
        const LONG: Duration = Duration::from_millis(5);
        let stream = self.device.cuda_stream();
        let wait = || stream.synchronize().map_err(failed("cuDNN, timing"));
        run()?;
        wait()?;
        let mut runs = 3;
        loop {
            let start = Instant::now();
            (0..runs).try_for_each(|_| run())?;
            wait()?;
            let elapsed = start.elapsed();
            if elapsed >= LONG {
                return Ok(elapsed / runs);
            }
            runs *= 4;
        }
    }

    /// A plan's execution arguments: the addresses of x, w and y, and a workspace of `workspace` bytes.
    fn variant_pack(&mut self, workspace: usize, places: [u64; 3]) -> Result<Descriptor> {
        plan::variant_pack(places, self.place_to_work(workspace)?)
    }
}
