//! An interpreter for PTX, NVIDIA's device-independent assembly, that runs thread by thread.
//!
//! Source: "Parallel Thread Execution ISA", version 9.0. Instructions that candle's and this project's
//! kernels do not use are missing, and are an error when reached.

mod lower;
mod parse;
mod run;
mod value;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

pub(crate) use run::{Grid, run};
pub(crate) use value::to_odd;

/// Base addresses of a block's shared memory and of a thread's local memory; they identify the memory that an
/// address belongs to.
pub(crate) const SHARED: u64 = 2 << 56;
pub(crate) const LOCAL: u64 = 3 << 56;

/// A PTX module. Each kernel is parsed when it is first requested.
pub(crate) struct Module {
    /// The text of each kernel, starting with its parameters.
    texts: HashMap<String, String>,
    /// Shared variables of all kernels, and the addresses of global variables.
    shared: Vec<parse::Variable>,
    globals: HashMap<String, u64>,
    known: Mutex<HashMap<String, Arc<Kernel>>>,
}

/// A kernel, ready to run.
pub(crate) struct Kernel {
    pub(crate) name: String,
    /// The offset and the size in bytes of each parameter.
    pub(crate) parameters: Vec<(usize, usize)>,
    code: Vec<lower::Instruction>,
    registers: usize,
    /// Bytes of shared memory that it declares, and of local memory per thread.
    shared: usize,
    local: usize,
    /// Whether threads wait for each other.
    collective: bool,
    /// Whether blocks depend on each other through atomics.
    atomic: bool,
}

impl Module {
    /// `place` puts a variable's initial values on the device, and returns their address.
    pub(crate) fn new(
        text: &str,
        mut place: impl FnMut(&[u8]) -> Result<u64, String>,
    ) -> Result<Self, String> {
        let (texts, variables) = parse::module(text)?;
        let (mut shared, mut globals) = (Vec::new(), HashMap::new());
        for variable in variables {
            match variable.space {
                parse::Space::Shared => shared.push(variable),
                _ => _ = globals.insert(variable.name.clone(), place(&variable.initial)?),
            }
        }
        Ok(Module { texts, shared, globals, known: Mutex::default() })
    }

    /// A kernel by its name; `None` if there is no such kernel.
    pub(crate) fn kernel(&self, name: &str) -> Option<Result<Arc<Kernel>, String>> {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(kernel) = known.get(name) {
            return Some(Ok(kernel.clone()));
        }
        let text = self.texts.get(name)?;
        let kernel = parse::kernel(text).and_then(|it| lower::kernel(name, it, &self.shared, &self.globals));
        Some(kernel.map_err(|error| format!("{name}: {error}")).map(|kernel| {
            let kernel = Arc::new(kernel);
            known.insert(name.to_string(), kernel.clone());
            kernel
        }))
    }
}
