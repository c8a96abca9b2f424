//! The pointwise parts of recurrent cells as candle ops: sums of pre-activations, memory updates, output
//! gates.
//!
//! All tensors are (.., C), f32, with any strides. Gates are stored side by side: (.., gates N). The backward
//! passes recompute what they need, which is cheaper than saving it.

use crate::activations::{sigmoid, tanh};
use crate::buffer::filled;
use crate::parallel::{Shared, for_rows, on_pool};
use crate::several::{self, Several, with_all_values};
use crate::simd::{Kernel, LANES, Level, Simd};
use crate::tensors::{check_in_32_bits, with_values};
use candle_core::{CpuStorage, D, Device, Layout, Result, Shape, Tensor, bail};
#[cfg(feature = "cuda")]
use candle_core::{CudaDevice, CudaStorage};
use std::ops::Range;

/// Adds up the gate contributions of several convolutions, gate by gate.
///
/// Each term is (.., k N), k gates of N channels, together with the place of each of them among the `gates`
/// gates of the result, (.., gates N). A gate to which no term contributes is zero.
///
/// # Errors
/// If the shapes are incompatible, or a tensor is not f32 on the CPU or a CUDA device.
pub fn sum_gates(gates: usize, terms: &[(&Tensor, &[usize])]) -> Result<Tensor> {
    let op = "sum_gates";
    let Some((first, places)) = terms.first() else { bail!("{op}: needs at least one term") };
    let width = first.dim(D::Minus1)? / places.len().max(1);
    for (values, places) in terms {
        check_in_32_bits(op, "a term", values)?;
        let fits = match (values.dims(), first.dims()) {
            ([a @ .., own], [b @ .., _]) => a == b && *own == places.len() * width,
            _ => false,
        };
        if !fits {
            bail!(
                "{op}: expected terms (.., k {width}) like {:?}, got {:?} for {} gates",
                first.dims(),
                values.dims(),
                places.len()
            );
        }
        for (i, place) in places.iter().enumerate() {
            check_place(op, gates, *place)?;
            if places[..i].contains(place) {
                bail!("{op}: a term says twice what gate {place} is");
            }
        }
    }
    let all: Vec<usize> = (0..gates).collect();
    let mut sum = add(gates, width, &terms[..terms.len().min(3)])?;
    for more in terms.get(3..).unwrap_or_default().chunks(2) {
        let so_far = [(&sum, &all[..])];
        sum = add(gates, width, &[&so_far, more].concat())?;
    }
    Ok(sum)
}

/// The sum of one to three terms.
fn add(gates: usize, width: usize, terms: &[(&Tensor, &[usize])]) -> Result<Tensor> {
    let places = terms.iter().map(|(_, places)| places.to_vec()).collect();
    let op = SumGates { gates, width, places };
    let tensors: Vec<&Tensor> = terms.iter().map(|(values, _)| *values).collect();
    several::apply(&tensors, op)
}

pub(crate) struct SumGates {
    pub(crate) gates: usize,
    pub(crate) width: usize,
    /// The places of each term's gates in the sum.
    pub(crate) places: Vec<Vec<usize>>,
}

impl SumGates {
    /// The shape of the sum of terms like this one.
    fn shape(&self, term: &Layout) -> Shape {
        let dims = term.dims();
        [&dims[..dims.len() - 1], &[self.gates * self.width]].concat().into()
    }

    /// The gradient of a term, gathered from the gradient of the sum.
    fn gradient(&self, term: usize, values: &Tensor, d: &Tensor) -> Result<Option<Tensor>> {
        if !values.track_op() {
            return Ok(None);
        }
        let (gates, width, places) = (self.gates, self.width, &self.places[term]);
        if places.iter().copied().eq(0..gates) {
            return Ok(Some(d.clone()));
        }
        #[cfg(feature = "cuda")]
        if d.device().is_cuda() {
            return crate::cuda::cells::gradient_of_term(self, term, values.shape(), d).map(Some);
        }
        let rows = values.elem_count() / (places.len() * width);
        let gradient = with_values(d, |d| {
            let fill = |gradient: Shared| {
                for_rows(rows, places.len() * width, |rows| {
                    for row in rows {
                        for (gate, place) in places.iter().enumerate() {
                            let from = &d[(row * gates + place) * width..][..width];
                            // SAFETY: the row belongs to this task only.
                            unsafe {
                                let to = gradient.at((row * places.len() + gate) * width);
                                std::ptr::copy_nonoverlapping(from.as_ptr(), to, width);
                            }
                        }
                    }
                });
            };
            // SAFETY: every gate of every row is written.
            Ok(unsafe { filled(values.elem_count(), |to| on_pool(|| fill(to))) })
        })?;
        Ok(Some(Tensor::from_vec(gradient, values.shape(), &Device::Cpu)?))
    }
}

impl Several for SumGates {
    fn name(&self) -> &'static str {
        "sum_gates"
    }

    fn run(&self, terms: &[&[f32]], layouts: &[&Layout]) -> (CpuStorage, Shape) {
        let (gates, width) = (self.gates, self.width);
        let rows = terms[0].len() / (self.places[0].len() * width);
        let mut sources: Vec<Vec<(&[f32], usize, usize)>> = vec![Vec::new(); gates];
        for (values, places) in terms.iter().zip(&self.places) {
            for (gate, &place) in places.iter().enumerate() {
                sources[place].push((values, places.len() * width, gate * width));
            }
        }
        let level = Level::current();
        let fill = |sum: Shared| {
            for_rows(rows, gates * width, |rows| {
                level.run(SumRows { sources: &sources, width, sum, rows });
            });
        };
        // SAFETY: every gate of every row is written.
        let sum = unsafe { filled(rows * gates * width, |sum| on_pool(|| fill(sum))) };
        (CpuStorage::F32(sum), self.shape(layouts[0]))
    }

    #[cfg(feature = "cuda")]
    fn run_on_cuda(
        &self,
        device: &CudaDevice,
        at: &[u64],
        layouts: &[&Layout],
    ) -> Result<(CudaStorage, Shape)> {
        Ok((crate::cuda::cells::sum_gates(self, device, at, layouts[0])?, self.shape(layouts[0])))
    }

    fn gradients(&self, terms: &[&Tensor], d: &Tensor) -> Result<Vec<Option<Tensor>>> {
        terms.iter().enumerate().map(|(term, values)| self.gradient(term, values, d)).collect()
    }
}

/// Some rows of a sum.
struct SumRows<'a> {
    /// The sources of each gate: values, floats from row to row, offset of the gate in a row.
    sources: &'a [Vec<(&'a [f32], usize, usize)>],
    width: usize,
    sum: Shared,
    rows: Range<usize>,
}

impl Kernel for SumRows<'_> {
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let width = self.width;
        for row in self.rows {
            for (gate, sources) in self.sources.iter().enumerate() {
                for channel in (0..width).step_by(LANES) {
                    let lanes = LANES.min(width - channel);
                    // SAFETY: the row exists and belongs to this task only.
                    unsafe {
                        let mut sum = S::zero();
                        for (values, stride, offset) in sources {
                            let at = values.as_ptr().add(row * stride + offset + channel);
                            sum = sum.add(S::load_lanes(at, lanes));
                        }
                        let to = self.sum.at((row * self.sources.len() + gate) * width + channel);
                        sum.store_lanes(to, lanes);
                    }
                }
            }
        }
    }
}

/// How a memory m forgets and takes in new values: m' = sigmoid(f + bias) m + sigmoid(i) tanh(g).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct MemoryUpdate {
    /// The index of i among the gates.
    pub input: usize,
    /// The index of g.
    pub candidate: usize,
    /// The index of f, and the bias added to it; with `None`, nothing is forgotten.
    pub forget: Option<(usize, f32)>,
    /// Whether to use tanh(m) instead of m.
    pub squash: bool,
}

/// The memory (.., N) after a step, from the gates' pre-activations (.., gates N) and the previous memory.
/// Differentiable in both.
///
/// # Errors
/// If the shapes are incompatible, or a tensor is not f32 on the CPU or a CUDA device.
pub fn memory_update(gates: &Tensor, memory: &Tensor, update: MemoryUpdate) -> Result<Tensor> {
    let op = "memory_update";
    let count = count(op, gates, memory)?;
    let forget = update.forget.map_or(0, |(place, _)| place);
    check_place(op, count, update.input.max(update.candidate).max(forget))?;
    several::apply(&[gates, memory], Memory { update, count })
}

/// The number of gates in `gates`, (.., gates N), given `like`, (.., N).
fn count(op: &str, gates: &Tensor, like: &Tensor) -> Result<usize> {
    check_in_32_bits(op, "gates", gates)?;
    check_in_32_bits(op, "the state", like)?;
    match (gates.dims(), like.dims()) {
        ([a @ .., gates], [b @ .., width]) if a == b && gates % width == 0 => Ok(gates / width),
        (gates, like) => {
            bail!("{op}: expected gates (.., k N) and a state (.., N), got {gates:?} and {like:?}")
        }
    }
}

pub(crate) fn check_place(op: &str, count: usize, place: usize) -> Result<()> {
    if place >= count {
        bail!("{op}: there is no gate {place} among {count}");
    }
    Ok(())
}

pub(crate) struct Memory {
    pub(crate) update: MemoryUpdate,
    pub(crate) count: usize,
}

/// The forward pass of some rows of a memory.
struct MemoryRows<'a> {
    op: &'a Memory,
    gates: &'a [f32],
    memory: &'a [f32],
    after: Shared,
    width: usize,
    rows: Range<usize>,
}

impl Kernel for MemoryRows<'_> {
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let MemoryRows { op: Memory { update, count }, gates, memory, after, width, rows } = self;
        for row in rows {
            for channel in (0..width).step_by(LANES) {
                let lanes = LANES.min(width - channel);
                // SAFETY: the row exists and belongs to this task only.
                unsafe {
                    let at = row * width + channel;
                    let gate = |place: usize| {
                        S::load_lanes(gates.as_ptr().add((row * count + place) * width + channel), lanes)
                    };
                    let mut kept = S::load_lanes(memory.as_ptr().add(at), lanes);
                    if update.squash {
                        kept = tanh(kept);
                    }
                    if let Some((place, bias)) = update.forget {
                        kept = kept.mul(sigmoid(gate(place).add(S::splat(bias))));
                    }
                    let taken = sigmoid(gate(update.input)).mul_add(tanh(gate(update.candidate)), kept);
                    taken.store_lanes(after.at(at), lanes);
                }
            }
        }
    }
}

/// The backward pass of some rows of a memory.
struct MemoryRowsBack<'a> {
    op: &'a Memory,
    gates: &'a [f32],
    memory: &'a [f32],
    d: &'a [f32],
    d_gates: Shared,
    d_memory: Option<Shared>,
    width: usize,
    rows: Range<usize>,
}

impl Kernel for MemoryRowsBack<'_> {
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let MemoryRowsBack { op: Memory { update, count }, gates, memory, d, d_gates, d_memory, width, rows } =
            self;
        for row in rows {
            for channel in (0..width).step_by(LANES) {
                let lanes = LANES.min(width - channel);
                // SAFETY: the row exists and belongs to this task only.
                unsafe {
                    let one = S::splat(1.);
                    let at = row * width + channel;
                    let place = |place: usize| (row * count + place) * width + channel;
                    let gate = |index: usize| S::load_lanes(gates.as_ptr().add(place(index)), lanes);
                    let d = S::load_lanes(d.as_ptr().add(at), lanes);
                    let (i, g) = (sigmoid(gate(update.input)), tanh(gate(update.candidate)));
                    // The derivative of the sigmoid s is s - s s, that of tanh t is 1 - t t.
                    d.mul(g).mul(i.neg_mul_add(i, i)).store_lanes(d_gates.at(place(update.input)), lanes);
                    d.mul(i)
                        .mul(g.neg_mul_add(g, one))
                        .store_lanes(d_gates.at(place(update.candidate)), lanes);
                    let mut kept = S::load_lanes(memory.as_ptr().add(at), lanes);
                    if update.squash {
                        kept = tanh(kept);
                    }
                    let mut d_kept = d;
                    if let Some((forget, bias)) = update.forget {
                        let f = sigmoid(gate(forget).add(S::splat(bias)));
                        d.mul(kept).mul(f.neg_mul_add(f, f)).store_lanes(d_gates.at(place(forget)), lanes);
                        d_kept = d.mul(f);
                    }
                    if let Some(d_memory) = d_memory {
                        if update.squash {
                            d_kept = d_kept.mul(kept.neg_mul_add(kept, one));
                        }
                        d_kept.store_lanes(d_memory.at(at), lanes);
                    }
                }
            }
        }
    }
}

impl Several for Memory {
    fn name(&self) -> &'static str {
        "memory_update"
    }

    fn run(&self, values: &[&[f32]], layouts: &[&Layout]) -> (CpuStorage, Shape) {
        let (gates, memory) = (values[0], values[1]);
        let (width, level) = (last(layouts[1].dims()), Level::current());
        let fill = |after: Shared| {
            for_rows(memory.len() / width, self.count * width, |rows| {
                level.run(MemoryRows { op: self, gates, memory, after, width, rows });
            });
        };
        // SAFETY: every row is written.
        let after = unsafe { filled(memory.len(), |after| on_pool(|| fill(after))) };
        (CpuStorage::F32(after), layouts[1].shape().clone())
    }

    #[cfg(feature = "cuda")]
    fn run_on_cuda(
        &self,
        device: &CudaDevice,
        at: &[u64],
        layouts: &[&Layout],
    ) -> Result<(CudaStorage, Shape)> {
        Ok((crate::cuda::cells::memory_update(self, device, at, layouts[1])?, layouts[1].shape().clone()))
    }

    fn gradients(&self, tensors: &[&Tensor], d: &Tensor) -> Result<Vec<Option<Tensor>>> {
        #[cfg(feature = "cuda")]
        if d.device().is_cuda() {
            return crate::cuda::cells::memory_gradients(self, tensors, d);
        }
        let (gates, memory) = (tensors[0], tensors[1]);
        let (width, level) = (last(memory.dims()), Level::current());
        let mut d_gates = vec![0f32; gates.elem_count()];
        let mut d_memory = memory.track_op().then(|| vec![0f32; memory.elem_count()]);
        let mut run = |values: &[&[f32]], d: &[f32]| {
            let (gates, memory) = (values[0], values[1]);
            let d_gates = Shared::new(&mut d_gates);
            let d_memory = d_memory.as_deref_mut().map(Shared::new);
            on_pool(|| {
                for_rows(memory.len() / width, self.count * width, |rows| {
                    level.run(MemoryRowsBack { op: self, gates, memory, d, d_gates, d_memory, width, rows });
                });
            });
            Ok(())
        };
        with_values(d, |d| with_all_values(tensors, |values| run(values, d)))?;
        let d_gates = Tensor::from_vec(d_gates, gates.shape(), &Device::Cpu)?;
        let d_memory = d_memory.map(|d| Tensor::from_vec(d, memory.shape(), &Device::Cpu)).transpose()?;
        Ok(vec![gates.track_op().then_some(d_gates), d_memory])
    }
}

/// The function that an output gate applies to its pre-activation o.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OutputGate {
    /// sigmoid(o)
    Sigmoid,
    /// tanh(o)
    Tanh,
    /// sigmoid(tanh(o))
    SigmoidOfTanh,
}

/// An output gate times tanh(y), (.., N). The gate's pre-activation is the sum of gate number `place` of
/// `gates`, (.., gates N), and `more`, (.., N), if given. Differentiable in all three.
///
/// # Errors
/// If the shapes are incompatible, or a tensor is not f32 on the CPU or a CUDA device.
pub fn open_output(
    gate: OutputGate,
    gates: &Tensor,
    place: usize,
    more: Option<&Tensor>,
    y: &Tensor,
) -> Result<Tensor> {
    let op = "open_output";
    let count = count(op, gates, y)?;
    check_place(op, count, place)?;
    if let Some(more) = more {
        check_in_32_bits(op, "more", more)?;
        if more.dims() != y.dims() {
            bail!("{op}: expected {:?} as y, got {:?}", y.dims(), more.dims());
        }
    }
    let tensors: Vec<&Tensor> = [gates, y].into_iter().chain(more).collect();
    several::apply(&tensors, Output { gate, count, place })
}

/// The op on gates, y and, optionally, an additional term of the gate.
pub(crate) struct Output {
    pub(crate) gate: OutputGate,
    pub(crate) count: usize,
    pub(crate) place: usize,
}

/// Some rows of an output: the forward pass, or the backward pass if there is a gradient.
struct OutputRows<'a> {
    op: &'a Output,
    gates: &'a [f32],
    y: &'a [f32],
    more: Option<&'a [f32]>,
    /// Destination of the output, or of the gradients of y, of `more`, and of all gates.
    to: OutputTo<'a>,
    width: usize,
    rows: Range<usize>,
}

#[derive(Clone, Copy)]
enum OutputTo<'a> {
    Output(Shared),
    Gradients { d: &'a [f32], dy: Shared, d_more: Option<Shared>, d_gates: Shared },
}

impl Kernel for OutputRows<'_> {
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let OutputRows { op: Output { gate, count, place }, gates, y, more, to, width, rows } = self;
        for row in rows {
            for channel in (0..width).step_by(LANES) {
                let lanes = LANES.min(width - channel);
                // SAFETY: the row exists and belongs to this task only.
                unsafe {
                    let one = S::splat(1.);
                    let at = row * width + channel;
                    let at_gate = (row * count + place) * width + channel;
                    let mut o = S::load_lanes(gates.as_ptr().add(at_gate), lanes);
                    if let Some(more) = more {
                        o = o.add(S::load_lanes(more.as_ptr().add(at), lanes));
                    }
                    let y = tanh(S::load_lanes(y.as_ptr().add(at), lanes));
                    // The gate, and its derivative.
                    let (open, slope) = match gate {
                        OutputGate::Sigmoid => {
                            let s = sigmoid(o);
                            (s, s.neg_mul_add(s, s))
                        }
                        OutputGate::Tanh => {
                            let t = tanh(o);
                            (t, t.neg_mul_add(t, one))
                        }
                        OutputGate::SigmoidOfTanh => {
                            let t = tanh(o);
                            let s = sigmoid(t);
                            (s, s.neg_mul_add(s, s).mul(t.neg_mul_add(t, one)))
                        }
                    };
                    match to {
                        OutputTo::Output(output) => open.mul(y).store_lanes(output.at(at), lanes),
                        OutputTo::Gradients { d, dy, d_more, d_gates } => {
                            let d = S::load_lanes(d.as_ptr().add(at), lanes);
                            d.mul(open).mul(y.neg_mul_add(y, one)).store_lanes(dy.at(at), lanes);
                            let d_o = d.mul(y).mul(slope);
                            d_o.store_lanes(d_gates.at(at_gate), lanes);
                            if let Some(d_more) = d_more {
                                d_o.store_lanes(d_more.at(at), lanes);
                            }
                        }
                    }
                }
            }
        }
    }
}

impl Several for Output {
    fn name(&self) -> &'static str {
        "open_output"
    }

    fn run(&self, values: &[&[f32]], layouts: &[&Layout]) -> (CpuStorage, Shape) {
        let (gates, y, more) = (values[0], values[1], values.get(2).copied());
        let (width, level) = (last(layouts[1].dims()), Level::current());
        let fill = |output: Shared| {
            for_rows(y.len() / width, width, |rows| {
                level.run(OutputRows { op: self, gates, y, more, to: OutputTo::Output(output), width, rows });
            });
        };
        // SAFETY: every row is written.
        let output = unsafe { filled(y.len(), |output| on_pool(|| fill(output))) };
        (CpuStorage::F32(output), layouts[1].shape().clone())
    }

    #[cfg(feature = "cuda")]
    fn run_on_cuda(
        &self,
        device: &CudaDevice,
        at: &[u64],
        layouts: &[&Layout],
    ) -> Result<(CudaStorage, Shape)> {
        Ok((crate::cuda::cells::open_output(self, device, at, layouts[1])?, layouts[1].shape().clone()))
    }

    fn gradients(&self, tensors: &[&Tensor], d: &Tensor) -> Result<Vec<Option<Tensor>>> {
        #[cfg(feature = "cuda")]
        if d.device().is_cuda() {
            return crate::cuda::cells::output_gradients(self, tensors, d);
        }
        let (gates, y, more) = (tensors[0], tensors[1], tensors.get(2));
        let (width, level) = (last(y.dims()), Level::current());
        let mut d_gates = vec![0f32; gates.elem_count()];
        let mut dy = vec![0f32; y.elem_count()];
        let mut d_more = more.filter(|more| more.track_op()).map(|more| vec![0f32; more.elem_count()]);
        let mut run = |values: &[&[f32]], d: &[f32]| {
            let (gates, y, more) = (values[0], values[1], values.get(2).copied());
            let to = OutputTo::Gradients {
                d,
                dy: Shared::new(&mut dy),
                d_more: d_more.as_deref_mut().map(Shared::new),
                d_gates: Shared::new(&mut d_gates),
            };
            on_pool(|| {
                for_rows(y.len() / width, width, |rows| {
                    level.run(OutputRows { op: self, gates, y, more, to, width, rows });
                });
            });
            Ok(())
        };
        with_values(d, |d| with_all_values(tensors, |values| run(values, d)))?;
        let d_gates = Tensor::from_vec(d_gates, gates.shape(), &Device::Cpu)?;
        let dy = Tensor::from_vec(dy, y.shape(), &Device::Cpu)?;
        let d_more = d_more.map(|d| Tensor::from_vec(d, y.shape(), &Device::Cpu)).transpose()?;
        let mut gradients = vec![gates.track_op().then_some(d_gates), y.track_op().then_some(dy)];
        gradients.extend(more.map(|_| d_more));
        Ok(gradients)
    }
}

fn last(dims: &[usize]) -> usize {
    dims.last().copied().unwrap_or(1)
}
