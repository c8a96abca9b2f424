//! libcudnn's backend API: descriptors with attributes, from which convolution plans are made.
//!
//! Source: "cuDNN Graph API", version 9, its backend descriptor types.

use crate::convolution::{
    BAD_PARAM, Call, Handle, NOT_SUPPORTED, Options, Pass, Tensor, is_supported, library,
};
use crate::driver::give;
use std::collections::HashMap;
use std::ffi::{c_int, c_void};

const NOT_INITIALIZED: c_int = 1001;
const EXECUTION_FAILED: c_int = 5000;

/// Kinds of descriptors.
mod kind {
    use std::ffi::c_int;

    pub(super) const CONVOLUTION: c_int = 1;
    pub(super) const ENGINE: c_int = 2;
    pub(super) const CONFIG: c_int = 3;
    pub(super) const HEURISTICS: c_int = 4;
    pub(super) const PLAN: c_int = 5;
    pub(super) const FORWARD: c_int = 10;
    pub(super) const FILTER: c_int = 11;
    pub(super) const DATA: c_int = 12;
    pub(super) const GRAPH: c_int = 15;
    pub(super) const PACK: c_int = 16;
    pub(super) const TENSOR: c_int = 17;
}

/// Attribute types, and the size of a value in bytes.
mod of {
    use std::ffi::c_int;

    pub(super) type Of = (c_int, usize);

    pub(super) const HANDLE: Of = (0, 8);
    pub(super) const DATA_TYPE: Of = (1, 4);
    pub(super) const INT64: Of = (3, 8);
    pub(super) const FLOAT: Of = (4, 4);
    pub(super) const POINTER: Of = (6, 8);
    pub(super) const MODE: Of = (7, 4);
    pub(super) const HEURISTICS: Of = (8, 4);
    pub(super) const DESCRIPTOR: Of = (15, 8);
}

/// An engine. Callers must not choose the first three. All are listed, whatever the environment sets for
/// TF32.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Engine {
    /// Non-deterministic. Computes wrong results, so tests notice its use.
    Loose,
    /// Computes with fewer bits than its inputs have. Computes wrong results, too.
    Narrowing,
    /// Can be planned, but not executed.
    Failing,
    /// Uses tensor cores.
    TensorCore,
    Plain,
}

#[derive(Debug, Default)]
struct Descriptor {
    kind: c_int,
    attributes: HashMap<c_int, Vec<u8>>,
    is_finished: bool,
    /// The engine of a configuration, and of descriptors made from it.
    engine: Option<Engine>,
}

/// An operation's pass and attribute names: x, w, y, convolution, alpha, beta.
fn operation(kind: c_int) -> Option<(Pass, [c_int; 6])> {
    Some(match kind {
        kind::FORWARD => (Pass::Forward, [704, 703, 705, 702, 700, 701]),
        kind::DATA => (Pass::Data, [710, 709, 711, 708, 706, 707]),
        kind::FILTER => (Pass::Filter, [716, 715, 717, 714, 712, 713]),
        _ => return None,
    })
}

/// The attributes that a descriptor must have, with their types.
fn attributes(kind: c_int) -> Vec<(c_int, of::Of)> {
    if let Some((_, [x, w, y, convolution, alpha, beta])) = operation(kind) {
        let parts = [x, w, y, convolution].map(|name| (name, of::DESCRIPTOR));
        return [&parts[..], &[(alpha, of::FLOAT), (beta, of::FLOAT)]].concat();
    }
    match kind {
        kind::TENSOR => {
            vec![(900, of::INT64), (901, of::DATA_TYPE), (902, of::INT64), (903, of::INT64), (906, of::INT64)]
        }
        kind::CONVOLUTION => vec![
            (100, of::DATA_TYPE),
            (101, of::MODE),
            (102, of::INT64),
            (103, of::INT64),
            (104, of::INT64),
            (105, of::INT64),
            (106, of::INT64),
        ],
        kind::GRAPH => vec![(800, of::HANDLE), (801, of::DESCRIPTOR)],
        kind::HEURISTICS => vec![(200, of::HEURISTICS), (201, of::DESCRIPTOR)],
        kind::PLAN => vec![(400, of::HANDLE), (401, of::DESCRIPTOR)],
        kind::PACK => vec![(1000, of::INT64), (1001, of::POINTER), (1003, of::POINTER)],
        _ => Vec::new(),
    }
}

library! {
    fn cudnnBackendCreateDescriptor(kind: c_int, to: *mut *mut Descriptor) {
        // SAFETY: the caller passes a valid pointer.
        unsafe { give(to, Box::into_raw(Box::new(Descriptor { kind, ..Descriptor::default() }))) }
    }
    fn cudnnBackendDestroyDescriptor(descriptor: *mut Descriptor) {
        // SAFETY: made by `cudnnBackendCreateDescriptor`.
        drop(unsafe { Box::from_raw(descriptor) });
        Ok(())
    }
    fn cudnnBackendSetAttribute(descriptor: *mut Descriptor, name: c_int, of: c_int, count: i64, from: *const c_void) {
        // SAFETY: made by `cudnnBackendCreateDescriptor`.
        let descriptor = unsafe { &mut *descriptor };
        if descriptor.is_finished {
            return Err(NOT_INITIALIZED);
        }
        let known = attributes(descriptor.kind).into_iter().find(|it| *it == (name, (of, it.1.1)));
        let (_, (_, bytes)) = known.ok_or_else(|| {
            eprintln!("stand-in: cuDNN: descriptors of kind {} have no attribute {name} of type {of}", descriptor.kind);
            BAD_PARAM
        })?;
        // SAFETY: the caller passes `count` values of the given type.
        let values = unsafe { std::slice::from_raw_parts(from.cast::<u8>(), count as usize * bytes) };
        descriptor.attributes.insert(name, values.to_vec());
        Ok(())
    }
    fn cudnnBackendFinalize(descriptor: *mut Descriptor) {
        // SAFETY: made by `cudnnBackendCreateDescriptor`, as are all its parts.
        unsafe { (*descriptor).finish() }
    }
    fn cudnnBackendGetAttribute(
        descriptor: *mut Descriptor, name: c_int, of: c_int, room: i64, count: *mut i64, to: *mut c_void,
    ) {
        // SAFETY: made by `cudnnBackendCreateDescriptor`.
        let descriptor = unsafe { &*descriptor };
        if !descriptor.is_finished {
            return Err(NOT_INITIALIZED);
        }
        match (descriptor.kind, name, of) {
            (kind::HEURISTICS, 202, 15) => {
                let listed = descriptor.listed()?;
                // With no room for results, only their number is returned.
                for (i, engine) in listed.iter().enumerate().take(room as usize) {
                    // SAFETY: the caller passes an array of `room` descriptors.
                    let config = unsafe { &mut **to.cast::<*mut Descriptor>().add(i) };
                    config.fill(kind::CONFIG, *engine, descriptor.attributes[&201].clone())?;
                }
                // SAFETY: the caller passes a valid pointer.
                unsafe { give(count, listed.len() as i64) }
            }
            (kind::CONFIG, 300, 15) => {
                let engine = descriptor.engine.ok_or(NOT_INITIALIZED)?;
                // SAFETY: the caller has created the descriptor.
                unsafe { (**to.cast::<*mut Descriptor>()).fill(kind::ENGINE, engine, Vec::new())? };
                // SAFETY: the caller passes a valid pointer.
                unsafe { give(count, 1) }
            }
            (kind::ENGINE, 1301, 3) => {
                let index: i64 = match descriptor.engine.ok_or(NOT_INITIALIZED)? {
                    Engine::Plain => 0,
                    Engine::Loose => 1,
                    Engine::Narrowing => 2,
                    Engine::Failing => 3,
                    Engine::TensorCore => 4,
                };
                // SAFETY: the caller's buffer has room for a value.
                unsafe { to.cast::<i64>().write(index) };
                // SAFETY: the caller passes a valid pointer.
                unsafe { give(count, 1) }
            }
            (kind::ENGINE, 1303, 11) => {
                let notes: &[u32] = match descriptor.engine.ok_or(NOT_INITIALIZED)? {
                    Engine::Loose => &[0, 4],
                    Engine::Narrowing => &[0, 1],
                    Engine::TensorCore => &[0],
                    Engine::Failing | Engine::Plain => &[],
                };
                for (i, note) in notes.iter().enumerate().take(room as usize) {
                    // SAFETY: the caller's buffer has room for `room` values.
                    unsafe { to.cast::<u32>().add(i).write(*note) };
                }
                // SAFETY: the caller passes a valid pointer.
                unsafe { give(count, notes.len() as i64) }
            }
            (kind::PLAN, 402, 3) => {
                // SAFETY: the caller passes valid pointers.
                unsafe { give(to.cast::<i64>(), descriptor.workspace()? as i64).and(give(count, 1)) }
            }
            _ => {
                eprintln!("stand-in: cuDNN: descriptors of kind {} tell no attribute {name} of type {of}", descriptor.kind);
                Err(BAD_PARAM)
            }
        }
    }
    fn cudnnBackendExecute(handle: *mut Handle, plan: *mut Descriptor, pack: *mut Descriptor) {
        // SAFETY: made by `cudnnCreate` and `cudnnBackendCreateDescriptor`.
        let (handle, plan, pack) = unsafe { (&*handle, &*plan, &*pack) };
        if (plan.kind, pack.kind) != (kind::PLAN, kind::PACK) || !plan.is_finished || !pack.is_finished {
            return Err(BAD_PARAM);
        }
        plan.execute(handle, pack)
    }
}

impl Descriptor {
    fn finish(&mut self) -> Result<(), c_int> {
        for (name, _) in attributes(self.kind) {
            if !self.attributes.contains_key(&name) {
                eprintln!("stand-in: cuDNN: a descriptor of kind {} lacks attribute {name}", self.kind);
                return Err(BAD_PARAM);
            }
        }
        let is_fit = match self.kind {
            // Aligned for at least one value; four sizes, four strides.
            kind::TENSOR => {
                let [id, alignment] = [906, 900].map(|name| self.numbers(name).len());
                [id, alignment] == [1, 1] && self.numbers(902).len() == 4 && self.numbers(903).len() == 4
            }
            // Two-dimensional, without flipped filters, and with sums in 32 bits.
            kind::CONVOLUTION => {
                let sizes = [102, 103, 104, 105].iter().all(|name| self.numbers(*name).len() == 2);
                sizes
                    && self.numbers(106) == [2]
                    && self.attributes[&101] == 1u32.to_le_bytes()
                    && self.attributes[&100] == 0u32.to_le_bytes()
            }
            kind::PACK => self.numbers(1000).len() == self.numbers(1001).len(),
            // The descriptors that it is made from must be finished.
            kind::PLAN => {
                let config = self.part(401)?;
                let (engine, (_, [x, w, ..])) = (config.engine, config.part(201)?.operation()?);
                self.engine = engine;
                engine.is_some() && is_supported(&x, &w)
            }
            kind if operation(kind).is_some() => {
                let (_, [_, w, y]) = self.tensors()?;
                w.dims[0] == y.dims[1]
            }
            _ => true,
        };
        if !is_fit {
            return Err(NOT_SUPPORTED);
        }
        self.is_finished = true;
        Ok(())
    }

    /// Fills a descriptor, created by the caller for this purpose, with a result.
    fn fill(&mut self, kind: c_int, engine: Engine, graph: Vec<u8>) -> Result<(), c_int> {
        if self.kind != kind {
            return Err(BAD_PARAM);
        }
        (self.engine, self.is_finished) = (Some(engine), true);
        self.attributes.insert(201, graph);
        Ok(())
    }

    /// The values of a 64-bit attribute.
    fn numbers(&self, name: c_int) -> Vec<u64> {
        let bytes = self.attributes.get(&name).map_or(&[][..], |bytes| bytes);
        bytes.as_chunks::<8>().0.iter().map(|value| u64::from_le_bytes(*value)).collect()
    }

    fn scalar(&self, name: c_int) -> Result<f64, c_int> {
        let bytes = self.attributes.get(&name).and_then(|bytes| bytes.first_chunk::<4>());
        bytes.map(|bytes| f64::from(f32::from_le_bytes(*bytes))).ok_or(BAD_PARAM)
    }

    /// The only descriptor in an attribute. It must be finished, and alive as the library requires.
    fn part(&self, name: c_int) -> Result<&Descriptor, c_int> {
        let [at] = self.numbers(name)[..] else { return Err(BAD_PARAM) };
        // SAFETY: callers set only descriptors, and keep them alive as long as descriptors made from them.
        let part = unsafe { &*(at as *const Descriptor) };
        if part.is_finished { Ok(part) } else { Err(NOT_INITIALIZED) }
    }

    /// For a graph, which has a single operation: the operation and its tensors.
    fn operation(&self) -> Result<(&Descriptor, [Tensor; 3]), c_int> {
        let operation = self.part(801)?;
        Ok((operation, operation.tensors()?.1))
    }

    /// For an operation: its pass, and x, w and y.
    fn tensors(&self) -> Result<(Pass, [Tensor; 3]), c_int> {
        let (pass, [x, w, y, ..]) = operation(self.kind).ok_or(BAD_PARAM)?;
        let tensor = |name| -> Result<Tensor, c_int> {
            let part = self.part(name)?;
            let four = |name| <[u64; 4]>::try_from(part.numbers(name)).map_err(|_| BAD_PARAM);
            let kind =
                part.attributes.get(&901).and_then(|bytes| bytes.first_chunk::<4>()).ok_or(BAD_PARAM)?;
            Ok(Tensor {
                dims: four(902)?.map(|size| size as usize),
                strides: four(903)?.map(|size| size as usize),
                kind: c_int::from_le_bytes(*kind),
            })
        };
        Ok((pass, [tensor(x)?, tensor(w)?, tensor(y)?]))
    }

    /// For heuristics: the engines that they propose. The fallback mode, 2, proposes the plain one.
    fn listed(&self) -> Result<Vec<Engine>, c_int> {
        self.part(201)?;
        Ok(match self.attributes[&200][0] {
            2 => vec![Engine::Plain],
            _ => vec![Engine::Loose, Engine::Narrowing, Engine::Failing, Engine::TensorCore],
        })
    }

    /// For a plan: its workspace size in bytes, proportional to the number of images.
    fn workspace(&self) -> Result<usize, c_int> {
        let (_, [x, ..]) = self.part(401)?.part(201)?.operation()?;
        Ok(4096 * x.dims[0])
    }

    fn execute(&self, handle: &Handle, pack: &Descriptor) -> Result<(), c_int> {
        let (operation, tensors) = self.part(401)?.part(201)?.operation()?;
        let (pass, [x, w, y, convolution, alpha, beta]) = self::operation(operation.kind).ok_or(BAD_PARAM)?;
        let (ids, places) = (pack.numbers(1000), pack.numbers(1001));
        let mut of_tensors = [0; 3];
        for (to, name) in of_tensors.iter_mut().zip([x, w, y]) {
            let tensor = operation.part(name)?;
            let id = tensor.numbers(906);
            let place = ids.iter().position(|it| [*it] == id[..]).map(|i| places[i]);
            *to = place.ok_or(BAD_PARAM)?;
            if !to.is_multiple_of(tensor.numbers(900)[0]) {
                eprintln!("stand-in: cuDNN: {to:#x} is not aligned as its descriptor says");
                return Err(BAD_PARAM);
            }
        }
        let convolution = operation.part(convolution)?;
        let two = |name| convolution.numbers(name)[..].first_chunk::<2>().map(|it| it.map(|x| x as usize));
        let padding = two(105).filter(|before| two(104) == Some(*before)).ok_or(NOT_SUPPORTED)?;
        let options = Options {
            padding,
            stride: two(103).ok_or(BAD_PARAM)?,
            dilation: two(102).ok_or(BAD_PARAM)?,
            groups: groups(&tensors[0], &tensors[1]),
            tf32: self.engine != Some(Engine::Plain),
        };
        let wrong = match self.engine {
            Some(Engine::Failing) => return Err(EXECUTION_FAILED),
            Some(Engine::Loose | Engine::Narrowing) => 1.1,
            _ => 1.,
        };
        let scalars = [wrong * operation.scalar(alpha)?, operation.scalar(beta)?];
        let call = Call::new(pass, handle, tensors.each_ref(), of_tensors, &options, scalars)?;
        let [workspace] = pack.numbers(1003)[..] else { return Err(BAD_PARAM) };
        call.ask_within(workspace, self.workspace()?)
    }
}

fn groups(x: &Tensor, w: &Tensor) -> usize {
    x.dims[1] / w.dims[1].max(1)
}
