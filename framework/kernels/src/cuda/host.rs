//! The kernel sources compiled as C++ and run on the processor, for tests on machines without a device.

use super::arguments::{ColumnSums, CopyColumns, GatesBackward, GatesForward};
use super::roll_out::Operations;
use super::sources::{CELLS, COLUMNS, DEPTHWISE, GATES, NORMALIZE, OPTIMIZER, POINTWISE, Source, WINOGRAD};
use crate::direct::Geometry;
use candle_core::Result;
use std::ffi::{CString, c_void};
use std::path::Path;
use std::process::Command;
use std::sync::{Mutex, OnceLock, PoisonError};

/// The kernels as functions of this process. Each kernel thread is a function call, and its index is state of
/// the library, so only one call runs at a time.
pub(crate) struct Host {
    libraries: Vec<(&'static str, Library)>,
}

struct Library(*mut c_void);
// SAFETY: this is a loader handle, which any thread may use.
unsafe impl Send for Library {}

static LIBRARIES: OnceLock<Option<Mutex<Host>>> = OnceLock::new();

impl Host {
    /// Threads per block.
    pub(crate) const THREADS: usize = 32;

    /// The compiled kernels; `None`, with a message, if there is no C++ compiler.
    pub(crate) fn new() -> Option<&'static Mutex<Host>> {
        let compile = || {
            if Command::new("g++").arg("--version").output().is_err() {
                eprintln!("SKIPPED: the CUDA kernels' sources are not tested, there is no g++");
                return None;
            }
            let dir = std::env::temp_dir().join(format!("candlepower-kernels-{}", std::process::id()));
            std::fs::create_dir_all(&dir).unwrap();
            let libraries = [GATES, COLUMNS, OPTIMIZER, POINTWISE, CELLS, NORMALIZE, DEPTHWISE, WINOGRAD]
                .iter()
                .map(|source| (source.name, compile(source, &dir)));
            let host = Host { libraries: libraries.collect() };
            std::fs::remove_dir_all(&dir).unwrap();
            Some(Mutex::new(host))
        };
        LIBRARIES.get_or_init(compile).as_ref()
    }

    fn symbol(&self, source: &Source, name: &str) -> *mut c_void {
        let (_, library) = self.libraries.iter().find(|(known, _)| *known == source.name).unwrap();
        let symbol = CString::new(name).unwrap();
        // SAFETY: the library is open and is never closed.
        let symbol = unsafe { libc::dlsym(library.0, symbol.as_ptr()) };
        assert!(!symbol.is_null(), "no kernel {name} in {}", source.name);
        symbol
    }

    /// Runs a kernel with at least `count` threads.
    ///
    /// # Safety
    /// The arguments are the kernel's, and their addresses point to memory of this process.
    pub(crate) unsafe fn run<A: Copy>(&self, source: &Source, name: &str, count: usize, arguments: A) {
        // SAFETY: the caller guarantees that the kernel takes these arguments; `stand_at` is defined by the
        // shim.
        let (kernel, stand_at) = unsafe {
            (
                std::mem::transmute::<*mut c_void, extern "C" fn(A)>(self.symbol(source, name)),
                std::mem::transmute::<*mut c_void, extern "C" fn(u32, u32, u32, u32)>(
                    self.symbol(source, "stand_at"),
                ),
            )
        };
        let (blocks, threads) = (count.div_ceil(Self::THREADS) as u32, Self::THREADS as u32);
        for block in 0..blocks {
            for thread in 0..threads {
                stand_at(block, blocks, thread, threads);
                kernel(arguments);
            }
        }
    }
}

fn compile(source: &Source, dir: &Path) -> Library {
    let (text, library) = (dir.join(source.name).with_extension("cpp"), dir.join(source.name));
    std::fs::write(&text, [include_str!("host.h"), source.text].concat()).unwrap();
    let mut compiler = Command::new("g++");
    compiler.args(["-std=c++17", "-O2", "-fPIC", "-shared", "-o"]).arg(&library).arg(&text);
    let done = compiler.output().unwrap();
    assert!(done.status.success(), "{}: {}", source.name, String::from_utf8_lossy(&done.stderr));
    let path = CString::new(library.to_str().unwrap()).unwrap();
    // SAFETY: the library was compiled just now and does nothing when it is opened.
    let library = unsafe { libc::dlopen(path.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
    assert!(!library.is_null(), "{path:?} cannot be opened");
    Library(library)
}

/// Channels per kernel thread: four if all addresses allow it.
fn width(hidden: u32, addresses: &[u64]) -> usize {
    if hidden.is_multiple_of(4) && addresses.iter().all(|at| at.is_multiple_of(16)) { 4 } else { 1 }
}

impl Operations for Mutex<Host> {
    type Memory = Vec<f32>;

    fn storage(&self, len: usize, zeroed: bool) -> Result<Vec<f32>> {
        Ok(vec![if zeroed { 0. } else { f32::NAN }; len])
    }
    fn floats(&self, len: usize, zeroed: bool) -> Result<Vec<f32>> {
        self.storage(len, zeroed)
    }
    fn address(&self, memory: &Vec<f32>) -> u64 {
        memory.as_ptr() as u64
    }
    fn item(&self) -> u64 {
        size_of::<f32>() as u64
    }
    fn most_values(&self) -> usize {
        // Small, so some of the tests' roll-outs are processed in parts of one step or several.
        1000
    }
    fn threads(&self) -> usize {
        // Small, so each thread handles several pixels.
        8
    }

    unsafe fn convolve(&self, g: &Geometry, x: u64, w: u64, y: u64) -> Result<()> {
        let (x, w, y) = (x as *const f32, w as *const f32, y as *mut f32);
        // SAFETY: guaranteed by the caller.
        unsafe {
            (0..g.batch * g.out_height * g.out_width * g.outputs).for_each(|i| *y.add(i) = 0.);
            products(g, |xi, wi, yi| *y.add(yi) += *x.add(xi) * *w.add(wi));
        }
        Ok(())
    }
    unsafe fn backward_data(&self, g: &Geometry, w: u64, dy: u64, dx: u64) -> Result<()> {
        let (w, dy, dx) = (w as *const f32, dy as *const f32, dx as *mut f32);
        // SAFETY: guaranteed by the caller.
        unsafe {
            (0..g.batch * g.height * g.width * g.inputs).for_each(|i| *dx.add(i) = 0.);
            products(g, |xi, wi, yi| *dx.add(xi) += *dy.add(yi) * *w.add(wi));
        }
        Ok(())
    }
    unsafe fn backward_filter(&self, g: &Geometry, x: u64, dy: u64, dw: u64, add: bool) -> Result<()> {
        let (x, dy, dw) = (x as *const f32, dy as *const f32, dw as *mut f32);
        // SAFETY: guaranteed by the caller.
        unsafe {
            if !add {
                (0..g.outputs * g.kernel_height * g.kernel_width * g.inputs).for_each(|i| *dw.add(i) = 0.);
            }
            products(g, |xi, wi, yi| *dw.add(wi) += *dy.add(yi) * *x.add(xi));
        }
        Ok(())
    }
    unsafe fn gates_forward(&self, a: GatesForward) -> Result<()> {
        let v = width(a.hidden, &[a.gates, a.bias, a.c, a.h[0].at, a.h[1].at, a.h[2].at]);
        let host = self.lock().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: guaranteed by the caller.
        unsafe { host.run(&GATES, &format!("gates_forward_float_{v}"), (a.rows * a.hidden) as usize / v, a) };
        Ok(())
    }
    unsafe fn gates_backward(&self, a: GatesBackward) -> Result<()> {
        let places =
            [a.gates, a.bias, a.c_before, a.dc, a.dc_before, a.sums, a.dh[0].at, a.dh[1].at, a.dh[2].at];
        let v = width(a.hidden, &places);
        let host = self.lock().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: guaranteed by the caller.
        unsafe {
            host.run(&GATES, &format!("gates_backward_float_{v}"), (a.parts * a.hidden) as usize / v, a)
        };
        Ok(())
    }
    unsafe fn copy_columns(&self, a: CopyColumns) -> Result<()> {
        let host = self.lock().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: guaranteed by the caller.
        unsafe { host.run(&COLUMNS, "copy_columns_float", (a.rows * a.columns) as usize, a) };
        Ok(())
    }
    unsafe fn column_sums(&self, x: u64, rows: usize, columns: usize, to: u64) -> Result<()> {
        let (rows, columns, stretch) = (rows as u32, columns as u32, rows as u32);
        let a = ColumnSums { x, sums: to, rows, columns, stretch, parts: 1 };
        let host = self.lock().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: guaranteed by the caller.
        unsafe { host.run(&COLUMNS, "column_sums_float_1", columns as usize, a) };
        Ok(())
    }
}

/// Calls `product` for every product of a convolution, with the indices into x, w and y.
fn products(g: &Geometry, mut product: impl FnMut(usize, usize, usize)) {
    let inside = |at: usize, tap: usize, size: usize| {
        (at * g.stride + tap * g.dilation).checked_sub(g.padding).filter(|at| *at < size)
    };
    for b in 0..g.batch {
        for (oy, ox) in (0..g.out_height).flat_map(|y| (0..g.out_width).map(move |x| (y, x))) {
            for (ky, kx) in (0..g.kernel_height).flat_map(|y| (0..g.kernel_width).map(move |x| (y, x))) {
                let (Some(iy), Some(ix)) = (inside(oy, ky, g.height), inside(ox, kx, g.width)) else {
                    continue;
                };
                for (o, c) in (0..g.outputs).flat_map(|o| (0..g.inputs).map(move |c| (o, c))) {
                    let x = ((b * g.height + iy) * g.width + ix) * g.inputs + c;
                    let w = ((o * g.kernel_height + ky) * g.kernel_width + kx) * g.inputs + c;
                    let y = ((b * g.out_height + oy) * g.out_width + ox) * g.outputs + o;
                    product(x, w, y);
                }
            }
        }
    }
}
