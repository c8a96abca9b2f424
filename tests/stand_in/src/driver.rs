//! libcuda: the driver functions that candle and this project call.
//!
//! Source: "CUDA Driver API", version 13.0.

use crate::device::{self, Progress, code, device, owner, wait};
use crate::memory::Memory;
use crate::ptx::{Grid, Kernel, Module, run};
use std::cell::Cell;
use std::ffi::{CStr, CString, c_char, c_int, c_uint, c_void};
use std::sync::{Arc, Mutex, PoisonError};

thread_local! {
    /// The current context: a device's ordinal plus one, or 0 for none.
    static CURRENT: Cell<u64> = const { Cell::new(0) };
}

/// Pinned host memory, which devices may access at any time: start address and size in bytes.
static PINNED: Mutex<Vec<(u64, usize)>> = Mutex::new(Vec::new());

fn answer(result: Result<(), i32>) -> c_int {
    result.err().unwrap_or(0)
}

pub(crate) fn current() -> Result<usize, i32> {
    CURRENT.get().checked_sub(1).map(|it| it as usize).ok_or(code::INVALID_CONTEXT)
}

/// The device of a stream; that of the current context for the default stream.
fn of(stream: u64) -> Result<usize, i32> {
    if stream == 0 { current() } else { Ok(owner(stream)) }
}

/// Writes a result to the caller's pointer.
///
/// # Safety
/// The pointer is null, or valid for a value of this type.
pub(crate) unsafe fn give<T>(to: *mut T, value: T) -> Result<(), i32> {
    if to.is_null() {
        return Err(code::INVALID_VALUE);
    }
    // SAFETY: guaranteed by the caller.
    unsafe { to.write(value) };
    Ok(())
}

/// Defines C functions; each body is a `Result<(), i32>`.
macro_rules! driver {
    ($($(#[$meta:meta])* fn $name:ident($($argument:ident: $type:ty),* $(,)?) $body:block)*) => { $(
        $(#[$meta])*
        #[unsafe(no_mangle)]
        unsafe extern "C" fn $name($($argument: $type),*) -> c_int {
            #[allow(unused_mut)]
            let mut body = move || -> Result<(), i32> { $body };
            answer(body())
        }
    )* };
}

driver! {
    fn cuInit(_flags: c_uint) { Ok(()) }
    fn cuDriverGetVersion(to: *mut c_int) {
        // SAFETY: the caller passes a valid pointer.
        unsafe { give(to, 13000) }
    }
    fn cuDeviceGetCount(to: *mut c_int) {
        // SAFETY: the caller passes a valid pointer.
        unsafe { give(to, device::count() as c_int) }
    }
    fn cuDeviceGet(to: *mut c_int, ordinal: c_int) {
        if ordinal < 0 || ordinal as usize >= device::count() {
            return Err(code::INVALID_DEVICE);
        }
        // SAFETY: the caller passes a valid pointer.
        unsafe { give(to, ordinal) }
    }
    fn cuDeviceGetName(to: *mut c_char, len: c_int, _device: c_int) {
        let name = b"stand-in\0";
        if (len as usize) < name.len() {
            return Err(code::INVALID_VALUE);
        }
        // SAFETY: the caller's buffer has `len` bytes.
        unsafe { to.copy_from_nonoverlapping(name.as_ptr().cast(), name.len()) };
        Ok(())
    }
    fn cuDeviceTotalMem_v2(to: *mut usize, ordinal: c_int) {
        // SAFETY: the caller passes a valid pointer.
        unsafe { give(to, device(ordinal as usize)?.memory.capacity()) }
    }
    fn cuDeviceGetAttribute(to: *mut c_int, attribute: c_uint, _device: c_int) {
        let value = match attribute {
            1 => 1024, // Threads per block.
            10 => 32, // Threads per warp.
            16 => 2, // Multiprocessors.
            75 => 9, // Compute capability 9.0: Hopper.
            97 => 48 << 10, // Bytes of shared memory per block.
            115 => 1, // Memory pools.
            _ => 0,
        };
        // SAFETY: the caller passes a valid pointer.
        unsafe { give(to, value) }
    }
    fn cuDevicePrimaryCtxRetain(to: *mut u64, ordinal: c_int) {
        // SAFETY: the caller passes a valid pointer.
        unsafe { give(to, ordinal as u64 + 1) }
    }
    fn cuDevicePrimaryCtxRelease_v2(_device: c_int) { Ok(()) }
    fn cuCtxSetCurrent(context: u64) {
        CURRENT.set(context);
        Ok(())
    }
    fn cuCtxGetCurrent(to: *mut u64) {
        // SAFETY: the caller passes a valid pointer.
        unsafe { give(to, CURRENT.get()) }
    }
    fn cuCtxGetDevice(to: *mut c_int) {
        // SAFETY: the caller passes a valid pointer.
        unsafe { give(to, current()? as c_int) }
    }
    fn cuCtxSynchronize() { wait(current()?, |it| it.finish_all()) }

    fn cuStreamCreate(to: *mut u64, _flags: c_uint) {
        // SAFETY: the caller passes a valid pointer.
        unsafe { give(to, device(current()?)?.new_stream()) }
    }
    fn cuStreamCreateWithPriority(to: *mut u64, _flags: c_uint, _priority: c_int) {
        // SAFETY: the caller passes a valid pointer.
        unsafe { give(to, device(current()?)?.new_stream()) }
    }
    fn cuCtxGetStreamPriorityRange(least: *mut c_int, greatest: *mut c_int) {
        // SAFETY: the caller passes valid pointers.
        unsafe {
            give(least, 0)?;
            give(greatest, -5)
        }
    }
    fn cuStreamDestroy_v2(stream: u64) {
        wait(of(stream)?, |it| it.finish(stream))?;
        device(of(stream)?)?.drop_stream(stream)
    }
    fn cuStreamSynchronize(stream: u64) { wait(of(stream)?, |it| it.finish(stream)) }
    fn cuStreamWaitEvent(stream: u64, event: u64, _flags: c_uint) { device(of(stream)?)?.wait_for(stream, event) }
    fn cuStreamBeginCapture_v2(stream: u64, mode: c_uint) { device(of(stream)?)?.begin_capture(stream, mode) }
    fn cuStreamIsCapturing(stream: u64, to: *mut c_uint) {
        // SAFETY: the caller passes a valid pointer.
        unsafe { give(to, device(of(stream)?)?.capture_status(stream)?) }
    }
    fn cuStreamEndCapture(stream: u64, to: *mut u64) {
        let graph = device(of(stream)?)?.end_capture(stream);
        // SAFETY: the caller passes a valid pointer.
        unsafe { give(to, graph.unwrap_or(0)) }?;
        graph.map(drop)
    }

    fn cuEventCreate(to: *mut u64, _flags: c_uint) {
        // SAFETY: the caller passes a valid pointer.
        unsafe { give(to, device(current()?)?.new_event()) }
    }
    fn cuEventDestroy_v2(event: u64) { device(owner(event))?.drop_event(event) }
    fn cuEventRecord(event: u64, stream: u64) { device(owner(event))?.record(event, stream) }
    fn cuEventSynchronize(event: u64) { wait(owner(event), |it| it.reach(event)) }
    fn cuEventQuery(event: u64) {
        match device(owner(event))?.query(event)? {
            Progress::Done => Ok(()),
            Progress::Pending => Err(code::NOT_READY),
        }
    }
    fn cuEventElapsedTime_v2(to: *mut f32, start: u64, end: u64) {
        // SAFETY: the caller passes a valid pointer.
        unsafe { give(to, device(owner(start))?.elapsed(start, end)?) }
    }

    fn cuMemAllocAsync(to: *mut u64, bytes: usize, stream: u64) {
        let at = device(of(stream)?)?.allocate(stream, bytes)?;
        // SAFETY: the caller passes a valid pointer.
        unsafe { give(to, at) }
    }
    fn cuMemFreeAsync(at: u64, stream: u64) { device(of(stream)?)?.free(stream, at) }
    fn cuMemAlloc_v2(to: *mut u64, bytes: usize) {
        let mut device = device(current()?)?;
        device.forbid_in_captures()?;
        let at = device.memory.reserve(bytes, false).ok_or(code::OUT_OF_MEMORY)?;
        device.memory.begin(at).map_err(|_| code::INVALID_VALUE)?;
        // SAFETY: the caller passes a valid pointer.
        unsafe { give(to, at) }
    }
    fn cuMemFree_v2(at: u64) {
        wait(current()?, |it| it.finish_all())?;
        device(current()?)?.memory.end(at).map_err(|_| code::INVALID_VALUE)
    }
    fn cuMemGetInfo_v2(free: *mut usize, total: *mut usize) {
        let device = device(current()?)?;
        let memory = &device.memory;
        // SAFETY: the caller passes valid pointers.
        unsafe {
            give(free, memory.capacity() - memory.used())?;
            give(total, memory.capacity())
        }
    }
    fn cuDeviceGetDefaultMemPool(to: *mut u64, ordinal: c_int) {
        // SAFETY: the caller passes a valid pointer.
        unsafe { give(to, ordinal as u64 + 1) }
    }
    fn cuMemPoolSetAttribute(pool: u64, attribute: c_uint, _value: *mut c_void) {
        if attribute == 8 {
            device(pool as usize - 1)?.memory.reset_high();
        }
        Ok(())
    }
    fn cuMemPoolGetAttribute(pool: u64, attribute: c_uint, to: *mut u64) {
        let device = device(pool as usize - 1)?;
        let bytes = match attribute {
            5 | 7 => device.memory.used(),
            6 | 8 => device.memory.high(),
            _ => return Err(code::INVALID_VALUE),
        };
        // SAFETY: the caller passes a valid pointer.
        unsafe { give(to, bytes as u64) }
    }
    fn cuMemPoolTrimTo(_pool: u64, _bytes: usize) { Ok(()) }
    fn cuMemHostAlloc(to: *mut u64, bytes: usize, _flags: c_uint) {
        device(current()?)?.forbid_in_captures()?;
        let memory = Box::leak(vec![0u64; bytes.div_ceil(8)].into_boxed_slice());
        let at = memory.as_mut_ptr() as u64;
        PINNED.lock().unwrap_or_else(PoisonError::into_inner).push((at, memory.len() * 8));
        // SAFETY: the caller passes a valid pointer.
        unsafe { give(to, at) }
    }
    fn cuMemFreeHost(at: u64) {
        wait(current()?, |it| it.finish_all())?;
        let mut pinned = PINNED.lock().unwrap_or_else(PoisonError::into_inner);
        let found = pinned.iter().position(|it| it.0 == at).ok_or(code::INVALID_VALUE)?;
        let (at, bytes) = pinned.swap_remove(found);
        // SAFETY: made by `cuMemHostAlloc` with this many `u64`s.
        drop(unsafe { Box::from_raw(std::ptr::slice_from_raw_parts_mut(at as *mut u64, bytes / 8)) });
        Ok(())
    }

    fn cuMemcpyHtoDAsync_v2(to: u64, from: *const u8, bytes: usize, stream: u64) {
        let mut device = device(of(stream)?)?;
        if is_pinned(from as u64, bytes) {
            // Read when the stream gets to it.
            let from = from as u64;
            return device.ask(stream, "copy to the device", Arc::new(move |memory| {
                let to = memory.host_of(to, bytes)?;
                // SAFETY: `host_of` checked this many bytes, and freeing pinned memory waits for this copy.
                unsafe { to.copy_from(from as *const u8, bytes) };
                Ok(Progress::Done)
            }));
        }
        if device.capture_status(stream)? != 0 {
            return device.ask(stream, "copy to the device", Arc::new(|_| {
                Err("a graph that reads memory which the host does not keep for it".into())
            }));
        }
        // SAFETY: the caller passes `bytes` bytes, which are copied immediately.
        let values = unsafe { std::slice::from_raw_parts(from, bytes) }.to_vec();
        device.ask(stream, "copy to the device", Arc::new(move |memory| {
            let to = memory.host_of(to, values.len())?;
            // SAFETY: `host_of` checked this many bytes.
            unsafe { to.copy_from_nonoverlapping(values.as_ptr(), values.len()) };
            Ok(Progress::Done)
        }))
    }
    fn cuMemcpyDtoHAsync_v2(to: *mut u8, from: u64, bytes: usize, stream: u64) {
        let place = to as u64;
        let copy: device::Work = Arc::new(move |memory: &mut Memory| {
            let from = memory.host_of(from, bytes)?;
            // SAFETY: `host_of` checked this many bytes; the caller's stay valid until the copy is over.
            unsafe { (place as *mut u8).copy_from(from, bytes) };
            Ok(Progress::Done)
        });
        let pinned = is_pinned(place, bytes);
        {
            let mut device = device(of(stream)?)?;
            if !pinned && device.capture_status(stream)? != 0 {
                device.finish(stream)?; // Fails.
            }
            device.ask(stream, "copy from the device", copy)?;
        }
        // A copy to pageable memory is done when the call returns.
        if pinned { Ok(()) } else { wait(of(stream)?, |it| it.finish(stream)) }
    }
    fn cuMemcpyDtoDAsync_v2(to: u64, from: u64, bytes: usize, stream: u64) {
        device(of(stream)?)?.ask(stream, "copy", Arc::new(move |memory| {
            let (to, from) = (memory.host_of(to, bytes)?, memory.host_of(from, bytes)?);
            // SAFETY: `host_of` checked this many bytes at both addresses.
            unsafe { to.copy_from(from, bytes) };
            Ok(Progress::Done)
        }))
    }
    fn cuMemsetD8Async(to: u64, value: u8, bytes: usize, stream: u64) {
        device(of(stream)?)?.ask(stream, "memset", Arc::new(move |memory| {
            // SAFETY: `host_of` checked this many bytes.
            unsafe { memory.host_of(to, bytes)?.write_bytes(value, bytes) };
            Ok(Progress::Done)
        }))
    }

    fn cuModuleLoadData(to: *mut *const Module, image: *const c_char) {
        let mut device = device(current()?)?;
        // SAFETY: the caller's text is zero-terminated.
        let text = unsafe { CStr::from_ptr(image) }.to_str().map_err(|_| code::INVALID_IMAGE)?;
        let module = Module::new(text, |values| {
            let at = device.memory.reserve(values.len(), false).ok_or("out of memory")?;
            device.memory.begin(at)?;
            let place = device.memory.host_of(at, values.len())?;
            // SAFETY: this many bytes were reserved.
            unsafe { place.copy_from_nonoverlapping(values.as_ptr(), values.len()) };
            Ok(at)
        });
        let module = module.map_err(|error| {
            eprintln!("stand-in: a module: {error}");
            code::INVALID_IMAGE
        })?;
        // SAFETY: the caller passes a valid pointer.
        unsafe { give(to, Box::into_raw(Box::new(module)).cast_const()) }
    }
    // Kernels may still be queued, so modules are kept.
    fn cuModuleUnload(_module: *const Module) { Ok(()) }
    fn cuModuleGetFunction(to: *mut *const Function, module: *const Module, name: *const c_char) {
        // SAFETY: a module made by `cuModuleLoadData`, and a zero-terminated text.
        let (module, name) = unsafe { (&*module, CStr::from_ptr(name)) };
        let name = name.to_str().map_err(|_| code::INVALID_VALUE)?;
        let kernel = module.kernel(name).ok_or(code::NOT_FOUND)?.map_err(|error| {
            eprintln!("stand-in: {error}");
            code::INVALID_IMAGE
        })?;
        // Functions are never freed; there are as many as kernels.
        let function = Function::of(kernel);
        // SAFETY: the caller passes a valid pointer.
        unsafe { give(to, function) }
    }
    fn cuFuncSetAttribute(_function: *const Function, _attribute: c_uint, _value: c_int) { Ok(()) }
    fn cuFuncGetAttribute(to: *mut c_int, _attribute: c_uint, _function: *const Function) {
        // SAFETY: the caller passes a valid pointer.
        unsafe { give(to, 0) }
    }
    fn cuLaunchKernel(
        function: *const Function,
        bx: c_uint,
        by: c_uint,
        bz: c_uint,
        tx: c_uint,
        ty: c_uint,
        tz: c_uint,
        shared: c_uint,
        stream: u64,
        arguments: *const *const u8,
        _extra: *mut c_void,
    ) {
        // SAFETY: a function made by `cuModuleGetFunction`.
        let kernel = unsafe { &*function }.0.clone();
        let bytes = kernel.parameters.last().map_or(0, |(at, bytes)| at + bytes);
        let mut parameters = vec![0u8; bytes];
        for (i, (at, bytes)) in kernel.parameters.iter().enumerate() {
            // SAFETY: the caller passes, for each parameter, a pointer to its bytes.
            let value = unsafe { std::slice::from_raw_parts(*arguments.add(i), *bytes) };
            parameters[*at..at + bytes].copy_from_slice(value);
        }
        let grid = Grid { blocks: [bx, by, bz], threads: [tx, ty, tz], shared: shared as usize };
        device(of(stream)?)?.ask(stream, "kernel", Arc::new(move |memory| {
            run(&kernel, grid, &parameters, memory).map(|()| Progress::Done)
        }))
    }

    fn cuGraphInstantiateWithFlags(to: *mut u64, graph: u64, flags: u64) {
        if !device(owner(graph))?.has_graph(graph) {
            return Err(code::INVALID_HANDLE);
        }
        // The handle is the graph's; its lowest bit is set if a launch frees what the previous one left
        // allocated.
        // SAFETY: the caller passes a valid pointer.
        unsafe { give(to, graph | flags & 1) }
    }
    fn cuGraphLaunch(graph: u64, stream: u64) { device(of(stream)?)?.launch(graph & !1, stream, graph & 1 == 1) }
    fn cuGraphUpload(_graph: u64, _stream: u64) { Ok(()) }
    fn cuGraphExecDestroy(_graph: u64) { Ok(()) }
    fn cuGraphDestroy(graph: u64) { device(owner(graph))?.drop_graph(graph) }
    fn cuGraphGetNodes(graph: u64, nodes: *mut u64, count: *mut usize) {
        let all = device(owner(graph))?.nodes(graph)?;
        // A node's handle consists of its graph's handle and its index.
        if !nodes.is_null() {
            // SAFETY: the caller's `count` is the number of nodes that it has room for.
            let room = unsafe { *count }.min(all.len());
            for i in 0..room {
                // SAFETY: as above.
                unsafe { nodes.add(i).write(graph << 20 | i as u64) };
            }
            // SAFETY: the caller passes a valid pointer.
            return unsafe { give(count, room) };
        }
        // SAFETY: the caller passes a valid pointer.
        unsafe { give(count, all.len()) }
    }
    fn cuGraphNodeGetType(node: u64, to: *mut c_uint) {
        let graph = node >> 20;
        let names = device(owner(graph))?.nodes(graph)?;
        let kind = match *names.get((node & 0xfffff) as usize).ok_or(code::INVALID_HANDLE)? {
            "copy" | "copy to the device" | "copy from the device" => 1,
            "memset" => 2,
            "allocation" => 10,
            "free" => 11,
            _ => 0,
        };
        // SAFETY: the caller passes a valid pointer.
        unsafe { give(to, kind) }
    }
    fn cuGraphMemcpyNodeGetParams(node: u64, to: *mut u8) {
        let names = device(owner(node >> 20))?.nodes(node >> 20)?;
        // The source's memory type, after four 64-bit numbers. 1: host, 2: device.
        let from: c_uint = match *names.get((node & 0xfffff) as usize).ok_or(code::INVALID_HANDLE)? {
            "copy to the device" => 1,
            "copy" | "copy from the device" => 2,
            _ => return Err(code::INVALID_VALUE),
        };
        // SAFETY: the caller passes a struct that is larger than this offset.
        unsafe { to.add(4 * size_of::<usize>()).cast::<c_uint>().write(from) };
        Ok(())
    }
    // Memory allocated by graphs is counted with all other memory.
    fn cuDeviceGetGraphMemAttribute(_device: c_int, _attribute: c_uint, to: *mut u64) {
        // SAFETY: the caller passes a valid pointer.
        unsafe { give(to, 0) }
    }
    fn cuDeviceGraphMemTrim(_device: c_int) { Ok(()) }
    fn cuDeviceSetGraphMemAttribute(_device: c_int, _attribute: c_uint, _value: *mut c_void) { Ok(()) }
    fn cuGetExportTable(to: *mut *const usize, _name: *const c_void) {
        // The compiler asks for an undocumented table, and first reads its size. This one contains nothing else.
        static TABLE: usize = size_of::<usize>();
        // SAFETY: the caller passes a valid pointer.
        unsafe { give(to, &raw const TABLE) }
    }
    fn cuGetErrorName(error: c_int, to: *mut *const c_char) {
        // SAFETY: the caller passes a valid pointer.
        unsafe { give(to, text(error)) }
    }
    fn cuGetErrorString(error: c_int, to: *mut *const c_char) {
        // SAFETY: the caller passes a valid pointer.
        unsafe { give(to, text(error)) }
    }
}

fn text(error: c_int) -> *const c_char {
    match error {
        code::OUT_OF_MEMORY => c"out of memory".as_ptr(),
        code::ILLEGAL_ADDRESS => c"an illegal memory access was encountered".as_ptr(),
        code::CAPTURE_UNSUPPORTED => c"operation not permitted when stream is capturing".as_ptr(),
        _ => c"the stand-in refused".as_ptr(),
    }
}

fn is_pinned(at: u64, bytes: usize) -> bool {
    let pinned = PINNED.lock().unwrap_or_else(PoisonError::into_inner);
    pinned.iter().any(|(start, len)| at >= *start && at + bytes as u64 <= start + *len as u64)
}

/// The function that `cuModuleGetFunction` returns.
#[derive(Debug)]
pub(crate) struct Function(Arc<Kernel>);

impl std::fmt::Debug for Kernel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Kernel({})", self.name)
    }
}

impl Function {
    /// The function of a kernel, always the same one.
    fn of(kernel: Arc<Kernel>) -> *const Function {
        static ALL: Mutex<Vec<&'static Function>> = Mutex::new(Vec::new());
        let mut all = ALL.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(found) = all.iter().find(|it| Arc::ptr_eq(&it.0, &kernel)) {
            return *found;
        }
        let function: &'static Function = Box::leak(Box::new(Function(kernel)));
        all.push(function);
        function
    }
}

/// A C string that is never freed.
pub(crate) fn leaked(text: String) -> *const c_char {
    CString::new(text).unwrap_or_default().into_raw()
}
