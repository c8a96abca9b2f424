//! PTX, NVIDIA's assembly of no particular device, run thread by thread.
//!
//! Source: "Parallel Thread Execution ISA", version 9.0. What candle's and our kernels do not use is not here, and is an error
//! when it is come to.

mod lower;
mod parse;
mod run;
mod value;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

pub(crate) use run::{Grid, run};
pub(crate) use value::to_odd;

/// Where kernels see a block's shared memory, and a thread's own: addresses of any memory tell which they are of.
pub(crate) const SHARED: u64 = 2 << 56;
pub(crate) const LOCAL: u64 = 3 << 56;

/// A text of kernels. Each is understood when it is first asked for.
pub(crate) struct Module {
    /// The text of each kernel, from its parameters on.
    texts: HashMap<String, String>,
    /// Variables of all kernels' shared memory, and of the device's.
    shared: Vec<parse::Variable>,
    globals: HashMap<String, u64>,
    known: Mutex<HashMap<String, Arc<Kernel>>>,
}

/// A kernel, ready to run.
pub(crate) struct Kernel {
    pub(crate) name: String,
    /// Where each parameter lies among all, and its bytes.
    pub(crate) parameters: Vec<(usize, usize)>,
    code: Vec<lower::Instruction>,
    registers: usize,
    /// Bytes of shared memory that it declares, and of a thread's own.
    shared: usize,
    local: usize,
    /// Whether threads wait for each other.
    collective: bool,
    /// Whether blocks change what others do.
    atomic: bool,
}

impl Module {
    /// `place` puts the initial values of a variable on the device, and says where.
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

    /// A kernel by its name; `None` where there is none.
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
