//! cuDNN's backend API: descriptors, which are created, given attributes, and finalized.

use candle_core::cuda_backend::cudarc::cudnn::sys::{
    self, cudnnBackendAttributeName_t as Name, cudnnBackendAttributeType_t as Type,
    cudnnBackendDescriptorType_t as Kind,
};
use candle_core::{Error, Result};
use std::ffi::{CStr, c_char, c_void};

/// An owned descriptor. It may move to another thread, but cuDNN does not guarantee concurrent use.
#[derive(Debug)]
pub(crate) struct Descriptor(sys::cudnnBackendDescriptor_t);

/// A type of attribute values.
///
/// # Safety
/// A value has the layout that cuDNN expects for `TYPE`, and anything that cuDNN writes there is a valid
/// value.
pub(crate) unsafe trait Attribute: Copy {
    const TYPE: Type;
}

macro_rules! attributes {
    ($($of:ty: $type:ident,)*) => { $(
        // SAFETY: these are cuDNN's own types and plain numbers; none of its enumerations is read here.
        unsafe impl Attribute for $of {
            const TYPE: Type = Type::$type;
        }
    )* };
}
attributes! {
    i64: CUDNN_TYPE_INT64,
    f32: CUDNN_TYPE_FLOAT,
    Place: CUDNN_TYPE_VOID_PTR,
    Note: CUDNN_TYPE_NUMERICAL_NOTE,
    sys::cudnnHandle_t: CUDNN_TYPE_HANDLE,
    sys::cudnnBackendDescriptor_t: CUDNN_TYPE_BACKEND_DESCRIPTOR,
    sys::cudnnDataType_t: CUDNN_TYPE_DATA_TYPE,
    sys::cudnnConvolutionMode_t: CUDNN_TYPE_CONVOLUTION_MODE,
    sys::cudnnBackendHeurMode_t: CUDNN_TYPE_HEUR_MODE,
}

/// An address of the device's memory, or 0.
#[repr(transparent)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct Place(pub(crate) u64);

/// A numerical note of cuDNN on an engine; there may be more of them than are known here.
#[repr(transparent)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Note(u32);

impl Note {
    pub(crate) const TENSOR_CORE: Self =
        Self::of(sys::cudnnBackendNumericalNote_t::CUDNN_NUMERICAL_NOTE_TENSOR_CORE);
    pub(crate) const DOWN_CONVERT_INPUTS: Self =
        Self::of(sys::cudnnBackendNumericalNote_t::CUDNN_NUMERICAL_NOTE_DOWN_CONVERT_INPUTS);
    pub(crate) const NONDETERMINISTIC: Self =
        Self::of(sys::cudnnBackendNumericalNote_t::CUDNN_NUMERICAL_NOTE_NONDETERMINISTIC);

    const fn of(note: sys::cudnnBackendNumericalNote_t) -> Self {
        Self(note as u32)
    }
}

impl Descriptor {
    /// A descriptor of this kind, without attributes.
    pub(crate) fn new(kind: Kind) -> Result<Self> {
        let mut made = std::ptr::null_mut();
        // SAFETY: there is a place for the descriptor.
        done(format_args!("descriptor"), unsafe { sys::cudnnBackendCreateDescriptor(kind, &mut made) })?;
        Ok(Self(made))
    }

    /// Sets an attribute to one or several values.
    pub(crate) fn with<A: Attribute>(self, name: Name, values: &[A]) -> Result<Self> {
        let (count, from) = (values.len() as i64, values.as_ptr().cast::<c_void>());
        // SAFETY: the descriptor lives, and there are `count` values of this type.
        done(format_args!("{name:?}"), unsafe {
            sys::cudnnBackendSetAttribute(self.0, name, A::TYPE, count, from)
        })?;
        Ok(self)
    }

    /// Sets an attribute to a descriptor, which must live as long as this one.
    pub(crate) fn with_part(self, name: Name, part: &Descriptor) -> Result<Self> {
        self.with(name, &[part.0])
    }

    /// Finalizes the descriptor, which checks its attributes; it can then be used, but no longer changed.
    pub(crate) fn finish(self) -> Result<Self> {
        // SAFETY: the descriptor lives.
        done(format_args!("descriptor"), unsafe { sys::cudnnBackendFinalize(self.0) })?;
        Ok(self)
    }

    /// The values of an attribute, at most `most`.
    pub(crate) fn get<A: Attribute + Default>(&self, name: Name, most: usize) -> Result<Vec<A>> {
        let (mut values, mut count) = (vec![A::default(); most], 0);
        let to = values.as_mut_ptr().cast::<c_void>();
        // SAFETY: the descriptor lives, and there is room for as many values as requested.
        let status =
            unsafe { sys::cudnnBackendGetAttribute(self.0, name, A::TYPE, most as i64, &mut count, to) };
        done(format_args!("{name:?}"), status)?;
        values.truncate(count.max(0) as usize);
        Ok(values)
    }

    /// The descriptors of an attribute, of this kind.
    pub(crate) fn get_parts(&self, name: Name, kind: Kind) -> Result<Vec<Descriptor>> {
        let of = Type::CUDNN_TYPE_BACKEND_DESCRIPTOR;
        let (mut count, nothing) = (0, std::ptr::null_mut());
        // SAFETY: the descriptor lives, and only the count is requested.
        done(format_args!("{name:?}"), unsafe {
            sys::cudnnBackendGetAttribute(self.0, name, of, 0, &mut count, nothing)
        })?;
        // cuDNN fills in descriptors created by the caller.
        let mut parts = (0..count).map(|_| Self::new(kind)).collect::<Result<Vec<_>>>()?;
        let mut filled: Vec<sys::cudnnBackendDescriptor_t> = parts.iter().map(|it| it.0).collect();
        let (most, to) = (count, filled.as_mut_ptr().cast::<c_void>());
        // SAFETY: the descriptor lives, and there are as many parts as requested.
        done(format_args!("{name:?}"), unsafe {
            sys::cudnnBackendGetAttribute(self.0, name, of, most, &mut count, to)
        })?;
        parts.truncate(count.max(0) as usize);
        Ok(parts)
    }

    /// The only descriptor of an attribute, of this kind.
    pub(crate) fn get_part(&self, name: Name, kind: Kind) -> Result<Descriptor> {
        let (of, mut part, mut count) = (Type::CUDNN_TYPE_BACKEND_DESCRIPTOR, Self::new(kind)?, 0);
        let to = (&raw mut part.0).cast::<c_void>();
        // SAFETY: the descriptor lives, and there is one part, which cuDNN fills in.
        done(format_args!("{name:?}"), unsafe {
            sys::cudnnBackendGetAttribute(self.0, name, of, 1, &mut count, to)
        })?;
        Ok(part)
    }

    /// Enqueues the work of an execution plan on the memory in a variant pack.
    ///
    /// # Safety
    /// The handle is the plan's, and the pack's addresses point to memory as large as the plan's tensors, on
    /// its device.
    pub(crate) unsafe fn execute(&self, handle: sys::cudnnHandle_t, pack: &Descriptor) -> Result<()> {
        // SAFETY: guaranteed by the caller; both descriptors live.
        done(format_args!("convolution"), unsafe { sys::cudnnBackendExecute(handle, self.0, pack.0) })
    }
}

impl Drop for Descriptor {
    fn drop(&mut self) {
        // SAFETY: this created the descriptor, and nothing else uses it.
        unsafe { sys::cudnnBackendDestroyDescriptor(self.0) };
    }
}

/// Converts a cuDNN status into a candle error with its code and cuDNN's last message.
fn done(what: std::fmt::Arguments, status: sys::cudnnStatus_t) -> Result<()> {
    if status == sys::cudnnStatus_t::CUDNN_STATUS_SUCCESS {
        return Ok(());
    }
    let mut words: [c_char; 1024] = [0; 1024];
    // SAFETY: there is room for the requested length, and a terminating zero in any case.
    let words = unsafe {
        sys::cudnnGetLastErrorString(words.as_mut_ptr(), words.len() - 1);
        CStr::from_ptr(words.as_ptr()).to_string_lossy()
    };
    Err(Error::Msg(format!("cuDNN, {what}: {status:?} {words}").trim_end().to_string()))
}
