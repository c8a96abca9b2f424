//! libcudnn: convolutions, as matrix products with all windows of an image.
//!
//! Source: "cuDNN API", version 9, its legacy calls.

use crate::device::{Progress, device, owner};
use crate::driver::{current, give, leaked};
use crate::memory::Memory;
use crate::numbers::{Kind, Matrix, multiply, read, tf32_allowed, to_tf32, write};
use std::ffi::{c_char, c_int, c_void};
use std::sync::Arc;

pub(crate) const BAD_PARAM: c_int = 2000;
pub(crate) const NOT_SUPPORTED: c_int = 3000;

/// Workspace in bytes that the only algorithm of the legacy calls needs.
const WORKSPACE: usize = 4096;
/// The math type that keeps 32-bit numbers at full precision.
const FMA: c_int = 3;

#[derive(Debug)]
pub(crate) struct Handle {
    stream: u64,
    ordinal: usize,
}

/// A descriptor of a tensor (n, c, h, w), or of a filter (outputs, inputs, h, w).
#[derive(Clone, Debug, Default)]
pub(crate) struct Tensor {
    pub(crate) dims: [usize; 4],
    pub(crate) strides: [usize; 4],
    pub(crate) kind: c_int,
}

#[derive(Clone, Debug, Default)]
pub(crate) struct Options {
    pub(crate) padding: [usize; 2],
    pub(crate) stride: [usize; 2],
    pub(crate) dilation: [usize; 2],
    pub(crate) groups: usize,
    /// Whether 32-bit numbers are reduced to TF32.
    pub(crate) tf32: bool,
}

/// The library's description of an algorithm.
#[repr(C)]
#[derive(Debug)]
pub(crate) struct Candidate {
    algorithm: c_int,
    status: c_int,
    time: f32,
    memory: usize,
    deterministic: c_int,
    math: c_int,
    reserved: [c_int; 3],
}

fn packed(dims: [usize; 4], channels_last: bool) -> [usize; 4] {
    let [_, c, h, w] = dims;
    if channels_last { [c * h * w, 1, w * c, c] } else { [c * h * w, h * w, w, 1] }
}

fn kind(kind: c_int) -> Result<Kind, c_int> {
    Ok(match kind {
        0 => Kind::F32,
        1 => Kind::F64,
        2 => Kind::F16,
        9 => Kind::BF16,
        _ => return Err(NOT_SUPPORTED),
    })
}

/// Defines functions of cuDNN; each body is a `Result<(), i32>`.
macro_rules! library {
    ($(fn $name:ident($($argument:ident: $type:ty),* $(,)?) $body:block)*) => { $(
        #[unsafe(no_mangle)]
        unsafe extern "C" fn $name($($argument: $type),*) -> c_int {
            let body = move || -> Result<(), i32> { $body };
            body().err().unwrap_or(0)
        }
    )* };
}
pub(crate) use library;

/// Reads a scalar of a legacy call.
///
/// # Safety
/// It must be 64-bit if the tensor is, otherwise 32-bit.
unsafe fn scalar(of: &Tensor, at: *const c_void) -> f64 {
    // SAFETY: guaranteed by the caller.
    unsafe { if kind(of.kind) == Ok(Kind::F64) { *at.cast::<f64>() } else { f64::from(*at.cast::<f32>()) } }
}

fn size(x: c_int) -> Result<usize, c_int> {
    usize::try_from(x).map_err(|_| BAD_PARAM)
}

library! {
    fn cudnnCreate(to: *mut *mut Handle) {
        // SAFETY: the caller passes a valid pointer.
        unsafe { give(to, Box::into_raw(Box::new(Handle { stream: 0, ordinal: current()? }))) }
    }
    fn cudnnDestroy(handle: *mut Handle) {
        // SAFETY: made by `cudnnCreate`.
        drop(unsafe { Box::from_raw(handle) });
        Ok(())
    }
    fn cudnnSetStream(handle: *mut Handle, stream: u64) {
        // SAFETY: made by `cudnnCreate`.
        unsafe { (*handle).stream = stream };
        Ok(())
    }
    fn cudnnCreateTensorDescriptor(to: *mut *mut Tensor) {
        // SAFETY: the caller passes a valid pointer.
        unsafe { give(to, Box::into_raw(Box::default())) }
    }
    fn cudnnDestroyTensorDescriptor(tensor: *mut Tensor) {
        // SAFETY: made by `cudnnCreateTensorDescriptor`.
        drop(unsafe { Box::from_raw(tensor) });
        Ok(())
    }
    fn cudnnCreateFilterDescriptor(to: *mut *mut Tensor) {
        // SAFETY: the caller passes a valid pointer.
        unsafe { give(to, Box::into_raw(Box::default())) }
    }
    fn cudnnDestroyFilterDescriptor(tensor: *mut Tensor) {
        // SAFETY: made by `cudnnCreateFilterDescriptor`.
        drop(unsafe { Box::from_raw(tensor) });
        Ok(())
    }
    fn cudnnCreateConvolutionDescriptor(to: *mut *mut Options) {
        // SAFETY: the caller passes a valid pointer.
        unsafe { give(to, Box::into_raw(Box::new(Options { groups: 1, tf32: tf32_allowed(), ..Options::default() }))) }
    }
    fn cudnnDestroyConvolutionDescriptor(options: *mut Options) {
        // SAFETY: made by `cudnnCreateConvolutionDescriptor`.
        drop(unsafe { Box::from_raw(options) });
        Ok(())
    }
    fn cudnnSetTensor4dDescriptor(to: *mut Tensor, format: c_int, kind: c_int, n: c_int, c: c_int, h: c_int, w: c_int) {
        let dims = [size(n)?, size(c)?, size(h)?, size(w)?];
        // SAFETY: made by `cudnnCreateTensorDescriptor`.
        unsafe { give(to, Tensor { dims, strides: packed(dims, format == 1), kind }) }
    }
    fn cudnnSetTensor4dDescriptorEx(
        to: *mut Tensor, kind: c_int, n: c_int, c: c_int, h: c_int, w: c_int,
        n_stride: c_int, c_stride: c_int, h_stride: c_int, w_stride: c_int,
    ) {
        let dims = [size(n)?, size(c)?, size(h)?, size(w)?];
        let strides = [size(n_stride)?, size(c_stride)?, size(h_stride)?, size(w_stride)?];
        // SAFETY: made by `cudnnCreateTensorDescriptor`.
        unsafe { give(to, Tensor { dims, strides, kind }) }
    }
    fn cudnnSetFilter4dDescriptor(to: *mut Tensor, kind: c_int, format: c_int, k: c_int, c: c_int, h: c_int, w: c_int) {
        let dims = [size(k)?, size(c)?, size(h)?, size(w)?];
        // SAFETY: made by `cudnnCreateFilterDescriptor`.
        unsafe { give(to, Tensor { dims, strides: packed(dims, format == 1), kind }) }
    }
    fn cudnnSetConvolution2dDescriptor(
        to: *mut Options, padding_h: c_int, padding_w: c_int, stride_h: c_int, stride_w: c_int,
        dilation_h: c_int, dilation_w: c_int, mode: c_int, _compute: c_int,
    ) {
        if mode != 1 {
            return Err(NOT_SUPPORTED); // Flipped filters are not supported.
        }
        // SAFETY: made by `cudnnCreateConvolutionDescriptor`.
        let options = unsafe { &mut *to };
        options.padding = [size(padding_h)?, size(padding_w)?];
        options.stride = [size(stride_h)?, size(stride_w)?];
        options.dilation = [size(dilation_h)?, size(dilation_w)?];
        Ok(())
    }
    fn cudnnSetConvolutionGroupCount(to: *mut Options, groups: c_int) {
        // SAFETY: made by `cudnnCreateConvolutionDescriptor`.
        unsafe { (*to).groups = size(groups)? };
        Ok(())
    }
    fn cudnnSetConvolutionMathType(to: *mut Options, math: c_int) {
        // SAFETY: made by `cudnnCreateConvolutionDescriptor`.
        unsafe { (*to).tf32 = math != FMA && tf32_allowed() };
        Ok(())
    }
    fn cudnnGetConvolutionForwardAlgorithm_v7(
        _handle: *mut Handle, x: *const Tensor, w: *const Tensor, _options: *const Options, _y: *const Tensor,
        _room: c_int, count: *mut c_int, list: *mut Candidate,
    ) {
        // SAFETY: the caller passes valid descriptors, and a list with room for one entry.
        unsafe {
            let status = if is_supported(&*x, &*w) { 0 } else { NOT_SUPPORTED };
            let candidate = Candidate {
                algorithm: 0, status, time: 0.1, memory: WORKSPACE, deterministic: 1, math: 0, reserved: [0; 3],
            };
            give(list, candidate)?;
            give(count, 1)
        }
    }
    fn cudnnGetConvolutionForwardWorkspaceSize(
        _handle: *mut Handle, _x: *const Tensor, _w: *const Tensor, _options: *const Options, _y: *const Tensor,
        _algorithm: c_int, to: *mut usize,
    ) {
        // SAFETY: the caller passes a valid pointer.
        unsafe { give(to, WORKSPACE) }
    }
    fn cudnnConvolutionForward(
        handle: *mut Handle, alpha: *const c_void, x_is: *const Tensor, x: u64, w_is: *const Tensor, w: u64,
        options: *const Options, _algorithm: c_int, workspace: u64, bytes: usize, beta: *const c_void, y_is: *const Tensor, y: u64,
    ) {
        // SAFETY: the caller passes a valid handle, descriptors and scalars.
        let call = unsafe {
            let scalars = [alpha, beta].map(|at| scalar(&*x_is, at));
            Call::new(Pass::Forward, &*handle, [&*x_is, &*w_is, &*y_is], [x, w, y], &*options, scalars)?
        };
        if bytes < WORKSPACE {
            return Err(BAD_PARAM);
        }
        call.ask_within(workspace, bytes)
    }
}

#[unsafe(no_mangle)]
extern "C" fn cudnnGetVersion() -> usize {
    91900
}

#[unsafe(no_mangle)]
extern "C" fn cudnnGetCudartVersion() -> usize {
    13000
}

#[unsafe(no_mangle)]
extern "C" fn cudnnGetErrorString(status: c_int) -> *const c_char {
    leaked(format!("the stand-in's cuDNN says {status}"))
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cudnnGetLastErrorString(to: *mut c_char, len: usize) {
    if len > 0 {
        // SAFETY: guaranteed by the caller.
        unsafe { to.write(0) };
    }
}

/// Whether this convolution is supported.
pub(crate) fn is_supported(x: &Tensor, w: &Tensor) -> bool {
    kind(x.kind).is_ok() && x.kind == w.kind
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Pass {
    Forward,
    Data,
    Filter,
}

/// A convolution to compute: one of x, filter and y, or a gradient, from the other two.
#[derive(Clone)]
pub(crate) struct Call {
    pass: Pass,
    stream: u64,
    ordinal: usize,
    tensors: [Tensor; 3],
    places: [u64; 3],
    options: Options,
    scalars: [f64; 2],
    kind: Kind,
}

impl Call {
    pub(crate) fn new(
        pass: Pass,
        handle: &Handle,
        tensors: [&Tensor; 3],
        places: [u64; 3],
        options: &Options,
        scalars: [f64; 2],
    ) -> Result<Call, c_int> {
        let ordinal = if handle.stream == 0 { handle.ordinal } else { owner(handle.stream) };
        let [x, w, y] = tensors;
        let kind = kind(x.kind)?;
        let out = |i: usize| {
            let (padding, stride, dilation) = (options.padding[i], options.stride[i], options.dilation[i]);
            (x.dims[2 + i] + 2 * padding)
                .checked_sub(dilation * (w.dims[2 + i] - 1) + 1)
                .map(|it| it / stride + 1)
        };
        let expected = [x.dims[0], w.dims[0], out(0).ok_or(BAD_PARAM)?, out(1).ok_or(BAD_PARAM)?];
        let fits = y.dims == expected
            && w.dims[1] * options.groups == x.dims[1]
            && w.dims[0].is_multiple_of(options.groups);
        if !fits || w.kind != x.kind || y.kind != x.kind {
            eprintln!("stand-in: cuDNN: {tensors:?} do not fit, {options:?}");
            return Err(BAD_PARAM);
        }
        Ok(Call {
            pass,
            stream: handle.stream,
            ordinal,
            tensors: tensors.map(Clone::clone),
            places,
            options: options.clone(),
            scalars,
            kind,
        })
    }

    /// Queues the convolution with this workspace, of which it overwrites `bytes` bytes.
    pub(crate) fn ask_within(self, workspace: u64, bytes: usize) -> Result<(), c_int> {
        let (ordinal, stream) = (self.ordinal, self.stream);
        device(ordinal)?.ask(
            stream,
            "convolution",
            Arc::new(move |memory| {
                // The previous content of the workspace is lost.
                let place = memory.host_of(workspace, bytes)?;
                // SAFETY: `host_of` checked this many bytes.
                unsafe { place.write_bytes(0xff, bytes) };
                self.run(memory).map(|()| Progress::Done)
            }),
        )
    }

    fn load(&self, memory: &Memory, i: usize) -> Result<Vec<f64>, String> {
        let mut values = read(memory, self.places[i], self.tensors[i].len(), self.kind)?;
        if self.kind == Kind::F32 && self.options.tf32 {
            values.iter_mut().for_each(|x| *x = to_tf32(*x));
        }
        Ok(values)
    }

    /// The offset within a group's image of each value of all windows, (depth, pixels); `None` in the padding.
    fn windows(&self) -> Vec<Option<usize>> {
        let ([x, w, y], Options { padding, stride, dilation, groups, .. }) = (&self.tensors, &self.options);
        let ([kh, kw], [oh, ow]) = ([w.dims[2], w.dims[3]], [y.dims[2], y.dims[3]]);
        let mut windows = Vec::new();
        for (c, i, j) in
            (0..x.dims[1] / groups).flat_map(|c| (0..kh * kw).map(move |at| (c, at / kw, at % kw)))
        {
            for (p, q) in (0..oh * ow).map(|at| (at / ow, at % ow)) {
                let row =
                    (p * stride[0] + i * dilation[0]).checked_sub(padding[0]).filter(|at| *at < x.dims[2]);
                let column =
                    (q * stride[1] + j * dilation[1]).checked_sub(padding[1]).filter(|at| *at < x.dims[3]);
                windows.push(row.zip(column).map(|(row, column)| x.place([0, c, row, column])));
            }
        }
        windows
    }

    fn run(&self, memory: &mut Memory) -> Result<(), String> {
        let [x, w, y] = &self.tensors;
        let result = match self.pass {
            Pass::Forward => 2,
            Pass::Data => 0,
            Pass::Filter => 1,
        };
        let mut values = [Vec::new(), Vec::new(), Vec::new()];
        for (i, values) in values.iter_mut().enumerate() {
            *values = if i == result { vec![0.; self.tensors[i].len()] } else { self.load(memory, i)? };
        }
        let [xs, ws, ys] = &mut values;
        let groups = self.options.groups;
        let (inputs, outputs) = (x.dims[1] / groups, w.dims[0] / groups);
        let [kh, kw] = [w.dims[2], w.dims[3]];
        let [oh, ow] = [y.dims[2], y.dims[3]];
        let (depth, pixels) = (inputs * kh * kw, oh * ow);
        let windows = self.windows();
        for group in 0..groups {
            // (outputs, depth).
            let filter_place = |at: usize| {
                w.place([group * outputs + at / depth, at % depth / (kh * kw), at / kw % kh, at % kw])
            };
            let mut filter: Vec<f64> = (0..outputs * depth).map(|at| ws[filter_place(at)]).collect();
            for n in 0..x.dims[0] {
                let image = x.place([n, group * inputs, 0, 0]);
                // (outputs, pixels).
                let place =
                    |at: usize| y.place([n, group * outputs + at / pixels, at % pixels / ow, at % ow]);
                let mut columns = vec![0.; depth * pixels];
                let inside =
                    columns.iter_mut().zip(&windows).filter_map(|(to, from)| Some((to, image + (*from)?)));
                match self.pass {
                    Pass::Forward => {
                        inside.for_each(|(to, from)| *to = xs[from]);
                        let mut result = vec![0.; outputs * pixels];
                        multiply(
                            &mut result,
                            Matrix::rows(&filter, depth),
                            Matrix::rows(&columns, pixels),
                            [outputs, pixels, depth],
                        );
                        result.iter().enumerate().for_each(|(at, value)| ys[place(at)] = *value);
                    }
                    Pass::Data => {
                        let dy: Vec<f64> = (0..outputs * pixels).map(|at| ys[place(at)]).collect();
                        let mut columns = vec![0.; depth * pixels];
                        multiply(
                            &mut columns,
                            Matrix::turned(&filter, depth),
                            Matrix::rows(&dy, pixels),
                            [depth, pixels, outputs],
                        );
                        let inside = columns
                            .iter()
                            .zip(&windows)
                            .filter_map(|(value, to)| Some((value, image + (*to)?)));
                        inside.for_each(|(value, to)| xs[to] += value);
                    }
                    Pass::Filter => {
                        inside.for_each(|(to, from)| *to = xs[from]);
                        let dy: Vec<f64> = (0..outputs * pixels).map(|at| ys[place(at)]).collect();
                        multiply(
                            &mut filter,
                            Matrix::rows(&dy, pixels),
                            Matrix::turned(&columns, pixels),
                            [outputs, depth, pixels],
                        );
                    }
                }
            }
            if self.pass == Pass::Filter {
                filter.iter().enumerate().for_each(|(at, value)| ws[filter_place(at)] = *value);
            }
        }
        let [alpha, beta] = self.scalars;
        let found = &mut values[result];
        let before = match beta {
            0. => vec![0.; found.len()],
            _ => read(memory, self.places[result], found.len(), self.kind)?,
        };
        found.iter_mut().zip(&before).for_each(|(x, before)| *x = alpha * *x + beta * before);
        write(memory, self.places[result], found, self.kind)
    }
}

impl Tensor {
    /// The number of elements from the first to the last value.
    fn len(&self) -> usize {
        self.dims.iter().zip(&self.strides).map(|(dim, stride)| (dim - 1) * stride).sum::<usize>() + 1
    }

    fn place(&self, at: [usize; 4]) -> usize {
        at.iter().zip(&self.strides).map(|(at, stride)| at * stride).sum()
    }
}
