//! The pointwise parts of recurrent cells on a device, in f32. Tensors must be
//! [aligned](super::memory::aligned).

use super::arguments::{Blend, Blended, MOST_GATES, MemoryUpdate, OpenOutput, SumGates, Term};
use super::launch::{check_count, launch};
use super::memory::{address, aligned, allocate, at, tensor};
use super::sources::CELLS;
use crate::gates::{self, OutputGate};
use candle_core::cuda_backend::cudarc::driver::DeviceRepr;
use candle_core::{CudaDevice, CudaStorage, D, DType, Layout, Result, Shape, Tensor, bail};

/// Enqueues a kernel over `parts` parts of `width` channels in each row.
///
/// # Safety
/// Same as for [`launch`]; addresses must be aligned.
unsafe fn run<A: DeviceRepr>(
    device: &CudaDevice,
    kernel: &str,
    [rows, parts, width]: [usize; 3],
    arguments: A,
) -> Result<()> {
    let at_once = if width.is_multiple_of(4) { 4 } else { 1 };
    check_count(kernel, rows * parts * width)?;
    // SAFETY: guaranteed by the caller.
    unsafe {
        launch(device, &CELLS, &format!("{kernel}_{at_once}"), rows * parts * width / at_once, arguments)
    }
}

fn room(device: &CudaDevice, values: usize) -> Result<CudaStorage> {
    allocate(device, values, DType::F32, false)
}

/// Channels of a state (.., N), and its number of rows.
fn width_and_rows(state: &Shape) -> Result<(usize, usize)> {
    let width = state.dim(D::Minus1)?;
    Ok((width, state.elem_count() / width))
}

/// The result of `op`, with terms at these addresses.
pub(crate) fn sum_gates(
    op: &gates::SumGates,
    device: &CudaDevice,
    terms: &[u64],
    first: &Layout,
) -> Result<CudaStorage> {
    if op.gates > MOST_GATES {
        bail!("sum_gates: expected at most {MOST_GATES} gates on a CUDA device, got {}", op.gates);
    }
    let mut all = [Term::default(); 3];
    for ((term, at), places) in all.iter_mut().zip(terms).zip(&op.places) {
        *term = Term { at: *at, stride: (places.len() * op.width) as u32, places: [-1; MOST_GATES] };
        for (gate, place) in places.iter().enumerate() {
            term.places[*place] = (gate * op.width) as i32;
        }
    }
    let rows = first.shape().elem_count() / (op.places[0].len() * op.width);
    add(device, all, [rows, op.gates, op.width])
}

/// The gradient of a term, gathered from the gradient of the sum.
pub(crate) fn gradient_of_term(
    op: &gates::SumGates,
    term: usize,
    shape: &Shape,
    d: &Tensor,
) -> Result<Tensor> {
    let (d, places) = (aligned(d)?, &op.places[term]);
    let mut all = [Term::default(); 3];
    all[0] = Term { at: at(&d)?, stride: (op.gates * op.width) as u32, places: [-1; MOST_GATES] };
    for (gate, place) in places.iter().enumerate() {
        all[0].places[gate] = (place * op.width) as i32;
    }
    let rows = shape.elem_count() / (places.len() * op.width);
    let gradient = add(d.device().as_cuda_device()?, all, [rows, places.len(), op.width])?;
    Ok(tensor(gradient, shape))
}

fn add(device: &CudaDevice, terms: [Term; 3], [rows, gates, width]: [usize; 3]) -> Result<CudaStorage> {
    let sum = room(device, rows * gates * width)?;
    let a =
        SumGates { terms, sum: address(&sum)?, rows: rows as u32, gates: gates as u32, width: width as u32 };
    // SAFETY: terms have as many rows as the sum, which has room for all gates, and places lie within a term's row.
    unsafe { run(device, "sum_gates", [rows, gates, width], a)? };
    Ok(sum)
}

/// The result of `op`, with gates and a memory at these addresses.
pub(crate) fn memory_update(
    op: &gates::Memory,
    device: &CudaDevice,
    from: &[u64],
    memory: &Layout,
) -> Result<CudaStorage> {
    let after = room(device, memory.shape().elem_count())?;
    update(op, device, memory.shape(), from, [0, address(&after)?, 0])?;
    Ok(after)
}

/// The gradients of gates and memory.
pub(crate) fn memory_gradients(
    op: &gates::Memory,
    tensors: &[&Tensor],
    d: &Tensor,
) -> Result<Vec<Option<Tensor>>> {
    let (gates, memory, d) = (tensors[0], tensors[1], aligned(d)?);
    let device = d.device().as_cuda_device()?;
    let d_gates = room(device, gates.elem_count())?;
    let d_memory = memory.track_op().then(|| room(device, memory.elem_count())).transpose()?;
    let to = d_memory.as_ref().map_or(Ok(0), address)?;
    update(op, device, memory.shape(), &[at(gates)?, at(memory)?], [at(&d)?, to, address(&d_gates)?])?;
    let d_gates = gates.track_op().then(|| tensor(d_gates, gates.shape()));
    Ok(vec![d_gates, d_memory.map(|x| tensor(x, memory.shape()))])
}

fn update(
    op: &gates::Memory,
    device: &CudaDevice,
    state: &Shape,
    from: &[u64],
    [d, to, d_gates]: [u64; 3],
) -> Result<()> {
    let (width, rows) = width_and_rows(state)?;
    let crate::MemoryUpdate { input, candidate, forget, squash } = op.update;
    let a = MemoryUpdate {
        gates: from[0],
        memory: from[1],
        d,
        to,
        d_gates,
        input: input as i32,
        candidate: candidate as i32,
        forget: forget.map_or(-1, |(place, _)| place as i32),
        bias: forget.map_or(0., |(_, bias)| bias),
        squash: u32::from(squash),
        rows: rows as u32,
        width: width as u32,
        count: op.count as u32,
    };
    check_count("memory_update", rows * op.count * width)?;
    // SAFETY: gates are (rows, count width), all else is (rows, width); places are below the count.
    unsafe { run(device, "memory_update", [rows, 1, width], a) }
}

/// The result of `op`, with gates, y and optionally the gate's additional term at these addresses.
pub(crate) fn open_output(
    op: &gates::Output,
    device: &CudaDevice,
    from: &[u64],
    y: &Layout,
) -> Result<CudaStorage> {
    let output = room(device, y.shape().elem_count())?;
    open(op, device, y.shape(), from, [0, address(&output)?, 0, 0])?;
    Ok(output)
}

/// The gradients of gates, y and the additional term.
pub(crate) fn output_gradients(
    op: &gates::Output,
    tensors: &[&Tensor],
    d: &Tensor,
) -> Result<Vec<Option<Tensor>>> {
    let d = aligned(d)?;
    let device = d.device().as_cuda_device()?;
    let places = tensors.iter().map(|x| at(x)).collect::<Result<Vec<_>>>()?;
    let gradients = tensors.iter().map(|x| room(device, x.elem_count())).collect::<Result<Vec<_>>>()?;
    let to = gradients.iter().map(address).collect::<Result<Vec<_>>>()?;
    let d_more = to.get(2).copied().unwrap_or(0);
    open(op, device, tensors[1].shape(), &places, [at(&d)?, to[1], to[0], d_more])?;
    let gradients = gradients.into_iter().zip(tensors);
    Ok(gradients.map(|(gradient, x)| x.track_op().then(|| tensor(gradient, x.shape()))).collect())
}

fn open(
    op: &gates::Output,
    device: &CudaDevice,
    state: &Shape,
    from: &[u64],
    [d, to, d_gates, d_more]: [u64; 4],
) -> Result<()> {
    let (width, rows) = width_and_rows(state)?;
    let a = OpenOutput {
        gates: from[0],
        y: from[1],
        more: from.get(2).copied().unwrap_or(0),
        d,
        to,
        d_gates,
        d_more,
        place: op.place as i32,
        kind: match op.gate {
            OutputGate::Sigmoid => 0,
            OutputGate::Tanh => 1,
            OutputGate::SigmoidOfTanh => 2,
        },
        rows: rows as u32,
        width: width as u32,
        count: op.count as u32,
    };
    check_count("open_output", rows * op.count * width)?;
    // SAFETY: gates are (rows, count width), all else is (rows, width); the place is below the count.
    unsafe { run(device, "open_output", [rows, 1, width], a) }
}

/// The result of `op`, (.., N), with tensors (.., k N) at these addresses.
pub(crate) fn blend(
    op: &crate::blend::Blend,
    device: &CudaDevice,
    sources: &[u64],
    first: &Layout,
) -> Result<(CudaStorage, Shape)> {
    let [leading @ .., _] = first.dims() else { bail!("blend: expected (.., k N), got {first:?}") };
    let rows: usize = leading.iter().product();
    let output = room(device, rows * op.width)?;
    let to = address(&output)?;
    mix(op, device, rows, |source| (sources[source], 0), [0, to])?;
    Ok((output, [leading, &[op.width]].concat().into()))
}

/// The gradients of these tensors.
pub(crate) fn blend_gradients(
    op: &crate::blend::Blend,
    tensors: &[&Tensor],
    d: &Tensor,
) -> Result<Vec<Option<Tensor>>> {
    let d = aligned(d)?;
    let device = d.device().as_cuda_device()?;
    let places = tensors.iter().map(|x| at(x)).collect::<Result<Vec<_>>>()?;
    // Gates that are none of the three operands have zero gradients.
    let zeros =
        |x: &&Tensor| x.track_op().then(|| allocate(device, x.elem_count(), DType::F32, true)).transpose();
    let gradients = tensors.iter().map(zeros).collect::<Result<Vec<_>>>()?;
    let to: Vec<u64> = gradients.iter().map(|x| x.as_ref().map_or(Ok(0), address)).collect::<Result<_>>()?;
    mix(op, device, d.elem_count() / op.width, |source| (places[source], to[source]), [at(&d)?, 0])?;
    let gradients = gradients.into_iter().zip(tensors);
    Ok(gradients.map(|(gradient, x)| gradient.map(|gradient| tensor(gradient, x.shape()))).collect())
}

/// `of` gives the addresses of a tensor and of its gradient.
fn mix(
    op: &crate::blend::Blend,
    device: &CudaDevice,
    rows: usize,
    of: impl Fn(usize) -> (u64, u64),
    [d, to]: [u64; 2],
) -> Result<()> {
    let of = op.places.map(|place| {
        let (at, gradient) = of(place.source);
        Blended { at, gradient, stride: place.stride as u32, offset: place.offset as u32 }
    });
    let a = Blend { of, d, to, rows: rows as u32, width: op.width as u32 };
    // SAFETY: tensors have `rows` rows of their strides, in which the operands' gates of this width begin at
    // the given offsets.
    unsafe { run(device, "blend", [rows, 1, op.width], a) }
}
