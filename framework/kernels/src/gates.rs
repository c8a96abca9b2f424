//! The pointwise parts of recurrent cells as candle ops: sums of pre-activations, memories, output gates.
//!
//! All tensors are (.., C), f32 on the CPU, of any strides. Gates lie side by side: (.., gates N). What backward needs is
//! computed again, since that is cheaper than keeping it.

use crate::activations::{sigmoid, tanh};
use crate::buffer::filled;
use crate::parallel::{self, GRAIN, Shared, on_pool};
use crate::simd::{Kernel, LANES, Level, Simd};
use crate::tensors::{check_type, packed, tracked, with_values};
use candle_core::{
    CpuStorage, CustomOp1, CustomOp2, CustomOp3, D, DType, Device, Layout, Result, Shape, Tensor, bail,
};
use std::ops::Range;

/// What several convolutions say about gates, added up gate by gate.
///
/// Each term is (.., k N), k gates of N channels, and the place of each of them among the `gates` of the result, (.., gates
/// N); a gate about which no term says anything is zero.
///
/// # Errors
/// Where the shapes do not fit together, or a tensor is not f32 on the CPU.
pub fn sum_gates(gates: usize, terms: &[(&Tensor, &[usize])]) -> Result<Tensor> {
    let op = "sum_gates";
    let Some((first, places)) = terms.first() else { bail!("{op}: needs at least one term") };
    let width = first.dim(D::Minus1)? / places.len().max(1);
    for (values, places) in terms {
        check_type(op, "a term", values, DType::F32)?;
        let leading = &values.dims()[..values.rank() - 1];
        if leading != &first.dims()[..first.rank() - 1] || values.dim(D::Minus1)? != places.len() * width {
            bail!(
                "{op}: expected terms (.., k {width}) like {:?}, got {:?} for {} gates",
                first.dims(),
                values.dims(),
                places.len()
            );
        }
        if let Some(place) = places.iter().find(|&&place| place >= gates) {
            bail!("{op}: there is no gate {place} among {gates}");
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
    let gradients = terms.iter().any(|(values, _)| tracked(values));
    match (terms, gradients) {
        ([(a, _)], true) => a.apply_op1(op),
        ([(a, _)], false) => a.apply_op1_no_bwd(&op),
        ([(a, _), (b, _)], true) => a.apply_op2(b, op),
        ([(a, _), (b, _)], false) => a.apply_op2_no_bwd(b, &op),
        ([(a, _), (b, _), (c, _)], true) => a.apply_op3(b, c, op),
        ([(a, _), (b, _), (c, _)], false) => a.apply_op3_no_bwd(b, c, &op),
        _ => bail!("sum_gates: takes one to three terms at once, got {}", terms.len()),
    }
}

struct SumGates {
    gates: usize,
    width: usize,
    /// Of each term.
    places: Vec<Vec<usize>>,
}

impl SumGates {
    fn run(&self, terms: &[&[f32]], like: &Layout) -> (CpuStorage, Shape) {
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
        let dims = like.dims();
        let shape = [&dims[..dims.len() - 1], &[gates * width]].concat();
        (CpuStorage::F32(sum), shape.into())
    }

    /// The gradient of a term: that of its gates.
    fn gradient(&self, term: usize, values: &Tensor, d: &Tensor) -> Result<Option<Tensor>> {
        if !values.track_op() {
            return Ok(None);
        }
        let (gates, width, places) = (self.gates, self.width, &self.places[term]);
        if places.iter().copied().eq(0..gates) {
            return Ok(Some(d.clone()));
        }
        let rows = values.elem_count() / (places.len() * width);
        let gradient = with_values(d, |d| {
            let fill = |gradient: Shared| {
                for_rows(rows, places.len() * width, |rows| {
                    for row in rows {
                        for (gate, place) in places.iter().enumerate() {
                            let from = &d[(row * gates + place) * width..][..width];
                            // SAFETY: the row belongs to this task.
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

/// Rows of a sum.
struct SumRows<'a> {
    /// Of each gate: values, floats from row to row, where the gate begins in a row.
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
                    // SAFETY: the row exists, and belongs to this task.
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

impl CustomOp1 for SumGates {
    fn name(&self) -> &'static str {
        "sum_gates"
    }
    fn cpu_fwd(&self, a: &CpuStorage, la: &Layout) -> Result<(CpuStorage, Shape)> {
        Ok(self.run(&[&packed(a, la)?], la))
    }
    fn bwd(&self, a: &Tensor, _: &Tensor, d: &Tensor) -> Result<Option<Tensor>> {
        self.gradient(0, a, d)
    }
}

impl CustomOp2 for SumGates {
    fn name(&self) -> &'static str {
        "sum_gates"
    }
    fn cpu_fwd(
        &self,
        a: &CpuStorage,
        la: &Layout,
        b: &CpuStorage,
        lb: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        Ok(self.run(&[&packed(a, la)?, &packed(b, lb)?], la))
    }
    fn bwd(
        &self,
        a: &Tensor,
        b: &Tensor,
        _: &Tensor,
        d: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        Ok((self.gradient(0, a, d)?, self.gradient(1, b, d)?))
    }
}

impl CustomOp3 for SumGates {
    fn name(&self) -> &'static str {
        "sum_gates"
    }
    fn cpu_fwd(
        &self,
        a: &CpuStorage,
        la: &Layout,
        b: &CpuStorage,
        lb: &Layout,
        c: &CpuStorage,
        lc: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        Ok(self.run(&[&packed(a, la)?, &packed(b, lb)?, &packed(c, lc)?], la))
    }
    fn bwd(
        &self,
        a: &Tensor,
        b: &Tensor,
        c: &Tensor,
        _: &Tensor,
        d: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        Ok((self.gradient(0, a, d)?, self.gradient(1, b, d)?, self.gradient(2, c, d)?))
    }
}

/// How a memory m forgets and what it takes in: m' = sigmoid(f + bias) m + sigmoid(i) tanh(g).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct MemoryUpdate {
    /// The place of i among the gates.
    pub input: usize,
    /// The place of g.
    pub candidate: usize,
    /// The place of f, and what is added to it; without, nothing is forgotten.
    pub forget: Option<(usize, f32)>,
    /// Whether tanh(m) stands in the place of m.
    pub squash: bool,
}

/// The memory (.., N) after a step, from the gates' pre-activations (.., gates N) and the memory before it. Differentiable in
/// both.
///
/// # Errors
/// Where the shapes do not fit together, or a tensor is not f32 on the CPU.
pub fn memory_update(gates: &Tensor, memory: &Tensor, update: MemoryUpdate) -> Result<Tensor> {
    let op = "memory_update";
    let count = count(op, gates, memory)?;
    let forget = update.forget.map_or(0, |(place, _)| place);
    check_place(op, count, update.input.max(update.candidate).max(forget))?;
    let op = Memory { update, count };
    if tracked(gates) || tracked(memory) {
        gates.apply_op2(memory, op)
    } else {
        gates.apply_op2_no_bwd(memory, &op)
    }
}

/// How many gates (.., gates N) there are beside `like`, (.., N).
fn count(op: &str, gates: &Tensor, like: &Tensor) -> Result<usize> {
    check_type(op, "gates", gates, DType::F32)?;
    check_type(op, "the state", like, DType::F32)?;
    match (gates.dims(), like.dims()) {
        ([a @ .., gates], [b @ .., width]) if a == b && gates % width == 0 => Ok(gates / width),
        (gates, like) => {
            bail!("{op}: expected gates (.., k N) and a state (.., N), got {gates:?} and {like:?}")
        }
    }
}

fn check_place(op: &str, count: usize, place: usize) -> Result<()> {
    if place >= count {
        bail!("{op}: there is no gate {place} among {count}");
    }
    Ok(())
}

struct Memory {
    update: MemoryUpdate,
    count: usize,
}

/// Rows of a memory, forwards.
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
                // SAFETY: the row exists, and belongs to this task.
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

/// Rows of a memory, backwards.
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
                // SAFETY: the row exists, and belongs to this task.
                unsafe {
                    let one = S::splat(1.);
                    let at = row * width + channel;
                    let place = |place: usize| (row * count + place) * width + channel;
                    let gate = |index: usize| S::load_lanes(gates.as_ptr().add(place(index)), lanes);
                    let d = S::load_lanes(d.as_ptr().add(at), lanes);
                    let (i, g) = (sigmoid(gate(update.input)), tanh(gate(update.candidate)));
                    // The derivative of the sigmoid is s - s s, that of tanh 1 - t t.
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

impl CustomOp2 for Memory {
    fn name(&self) -> &'static str {
        "memory_update"
    }

    fn cpu_fwd(
        &self,
        gates: &CpuStorage,
        lg: &Layout,
        memory: &CpuStorage,
        lm: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (gates, memory) = (packed(gates, lg)?, packed(memory, lm)?);
        let (width, level) = (last(lm.dims()), Level::current());
        let fill = |after: Shared| {
            for_rows(memory.len() / width, self.count * width, |rows| {
                level.run(MemoryRows { op: self, gates: &gates, memory: &memory, after, width, rows });
            });
        };
        // SAFETY: every row is written.
        let after = unsafe { filled(memory.len(), |after| on_pool(|| fill(after))) };
        Ok((CpuStorage::F32(after), lm.shape().clone()))
    }

    fn bwd(
        &self,
        gates: &Tensor,
        memory: &Tensor,
        _: &Tensor,
        d: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (width, level) = (last(memory.dims()), Level::current());
        let mut d_gates = vec![0f32; gates.elem_count()];
        let mut d_memory = memory.track_op().then(|| vec![0f32; memory.elem_count()]);
        with_values(gates, |gates| {
            with_values(memory, |memory| {
                with_values(d, |d| {
                    let d_gates = Shared::new(&mut d_gates);
                    let d_memory = d_memory.as_deref_mut().map(Shared::new);
                    on_pool(|| {
                        for_rows(memory.len() / width, self.count * width, |rows| {
                            level.run(MemoryRowsBack {
                                op: self,
                                gates,
                                memory,
                                d,
                                d_gates,
                                d_memory,
                                width,
                                rows,
                            });
                        });
                    });
                    Ok(())
                })
            })
        })?;
        let d_gates = Tensor::from_vec(d_gates, gates.shape(), &Device::Cpu)?;
        let d_memory = d_memory.map(|d| Tensor::from_vec(d, memory.shape(), &Device::Cpu)).transpose()?;
        Ok((gates.track_op().then_some(d_gates), d_memory))
    }
}

/// What an output gate makes of its pre-activation o.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OutputGate {
    /// sigmoid(o)
    Sigmoid,
    /// tanh(o)
    Tanh,
    /// sigmoid(tanh(o))
    SigmoidOfTanh,
}

/// An output gate times tanh(y), (.., N). Its pre-activation is the gate at `place` of `gates`, (.., gates N), and of `more`,
/// (.., N). Differentiable in all three.
///
/// # Errors
/// Where the shapes do not fit together, or a tensor is not f32 on the CPU.
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
        check_type(op, "more", more, DType::F32)?;
        if more.dims() != y.dims() {
            bail!("{op}: expected {:?} as y, got {:?}", y.dims(), more.dims());
        }
    }
    let op = Output { gate, count, place };
    let gradients = tracked(gates) || tracked(y) || more.is_some_and(tracked);
    match (more, gradients) {
        (Some(more), true) => gates.apply_op3(y, more, op),
        (Some(more), false) => gates.apply_op3_no_bwd(y, more, &op),
        (None, true) => gates.apply_op2(y, op),
        (None, false) => gates.apply_op2_no_bwd(y, &op),
    }
}

struct Output {
    gate: OutputGate,
    count: usize,
    place: usize,
}

/// Rows of an output: forwards, or, where there is a gradient, backwards.
struct OutputRows<'a> {
    op: &'a Output,
    gates: &'a [f32],
    y: &'a [f32],
    more: Option<&'a [f32]>,
    /// Written: the output, or the gradients of y, of o alone, and of all gates.
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
                // SAFETY: the row exists, and belongs to this task.
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

impl Output {
    fn run(&self, gates: &[f32], y: &[f32], more: Option<&[f32]>, like: &Layout) -> (CpuStorage, Shape) {
        let (width, level) = (last(like.dims()), Level::current());
        let fill = |output: Shared| {
            for_rows(y.len() / width, width, |rows| {
                level.run(OutputRows { op: self, gates, y, more, to: OutputTo::Output(output), width, rows });
            });
        };
        // SAFETY: every row is written.
        let output = unsafe { filled(y.len(), |output| on_pool(|| fill(output))) };
        (CpuStorage::F32(output), like.shape().clone())
    }

    fn gradients(
        &self,
        gates: &Tensor,
        y: &Tensor,
        more: Option<&Tensor>,
        d: &Tensor,
    ) -> Result<[Option<Tensor>; 3]> {
        let (width, level) = (last(y.dims()), Level::current());
        let mut d_gates = vec![0f32; gates.elem_count()];
        let mut dy = vec![0f32; y.elem_count()];
        let mut d_more = more.filter(|more| more.track_op()).map(|more| vec![0f32; more.elem_count()]);
        let mut run = |gates: &[f32], y: &[f32], more: Option<&[f32]>, d: &[f32]| {
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
        with_values(gates, |gates| {
            with_values(y, |y| {
                with_values(d, |d| match more {
                    Some(more) => with_values(more, |more| run(gates, y, Some(more), d)),
                    None => run(gates, y, None, d),
                })
            })
        })?;
        let d_gates = Tensor::from_vec(d_gates, gates.shape(), &Device::Cpu)?;
        let dy = Tensor::from_vec(dy, y.shape(), &Device::Cpu)?;
        let d_more = d_more.map(|d| Tensor::from_vec(d, y.shape(), &Device::Cpu)).transpose()?;
        Ok([gates.track_op().then_some(d_gates), y.track_op().then_some(dy), d_more])
    }
}

impl CustomOp2 for Output {
    fn name(&self) -> &'static str {
        "open_output"
    }
    fn cpu_fwd(
        &self,
        gates: &CpuStorage,
        lg: &Layout,
        y: &CpuStorage,
        ly: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        Ok(self.run(&packed(gates, lg)?, &packed(y, ly)?, None, ly))
    }
    fn bwd(
        &self,
        gates: &Tensor,
        y: &Tensor,
        _: &Tensor,
        d: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let [d_gates, dy, _] = self.gradients(gates, y, None, d)?;
        Ok((d_gates, dy))
    }
}

impl CustomOp3 for Output {
    fn name(&self) -> &'static str {
        "open_output"
    }
    fn cpu_fwd(
        &self,
        gates: &CpuStorage,
        lg: &Layout,
        y: &CpuStorage,
        ly: &Layout,
        more: &CpuStorage,
        lm: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        Ok(self.run(&packed(gates, lg)?, &packed(y, ly)?, Some(&packed(more, lm)?), ly))
    }
    fn bwd(
        &self,
        gates: &Tensor,
        y: &Tensor,
        more: &Tensor,
        _: &Tensor,
        d: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let [d_gates, dy, d_more] = self.gradients(gates, y, Some(more), d)?;
        Ok((d_gates, dy, d_more))
    }
}

/// A gate's place in a tensor (.., k N) of k gates of N channels.
pub type Gate<'a> = (&'a Tensor, usize);

/// sigmoid(gate) a + (1 - sigmoid(gate)) b, (.., N), of `width` N. The three may be gates of one tensor, or of several.
/// Differentiable in all.
///
/// # Errors
/// Where the shapes do not fit together, two of the three are the same, or a tensor is not f32 on the CPU.
pub fn blend(width: usize, gate: Gate, a: Gate, b: Gate) -> Result<Tensor> {
    let op = "blend";
    let mut sources: Vec<&Tensor> = Vec::new();
    let mut places = [(0, 0); 3];
    for (to, (values, place)) in places.iter_mut().zip([gate, a, b]) {
        check_type(op, "a gate", values, DType::F32)?;
        let (leading, like) = (&values.dims()[..values.rank() - 1], &gate.0.dims()[..gate.0.rank() - 1]);
        let wide = values.dim(D::Minus1)?;
        if leading != like || width == 0 || wide % width != 0 {
            bail!("{op}: expected (.., k {width}) like {:?}, got {:?}", gate.0.dims(), values.dims());
        }
        check_place(op, wide / width, place)?;
        let known = sources.iter().position(|source| source.id() == values.id());
        let source = known.unwrap_or_else(|| {
            sources.push(values);
            sources.len() - 1
        });
        *to = (source, place);
    }
    if places[0] == places[1] || places[0] == places[2] || places[1] == places[2] {
        bail!("{op}: a gate is asked for twice");
    }
    let op = Blend { width, places };
    let gradients = sources.iter().any(|&values| tracked(values));
    match (&sources[..], gradients) {
        (&[a], true) => a.apply_op1(op),
        (&[a], false) => a.apply_op1_no_bwd(&op),
        (&[a, b], true) => a.apply_op2(b, op),
        (&[a, b], false) => a.apply_op2_no_bwd(b, &op),
        (&[a, b, c], true) => a.apply_op3(b, c, op),
        (&[a, b, c], false) => a.apply_op3_no_bwd(b, c, &op),
        _ => bail!("blend: takes one to three tensors, got {}", sources.len()),
    }
}

struct Blend {
    width: usize,
    /// Of the gate, a and b: which of the op's tensors, and where in it.
    places: [(usize, usize); 3],
}

/// Rows of a blend: forwards, or, where there is a gradient, backwards.
struct BlendRows<'a> {
    /// Of the gate, a and b: values, floats from row to row, where it begins in a row.
    from: [(&'a [f32], usize, usize); 3],
    to: BlendTo<'a>,
    width: usize,
    rows: Range<usize>,
}

#[derive(Clone, Copy)]
enum BlendTo<'a> {
    Output(Shared),
    /// Of the gate, a and b, at the places where their values are.
    Gradients {
        d: &'a [f32],
        to: [Option<Shared>; 3],
    },
}

impl Kernel for BlendRows<'_> {
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let BlendRows { from, to, width, rows } = self;
        for row in rows {
            for channel in (0..width).step_by(LANES) {
                let lanes = LANES.min(width - channel);
                let at = row * width + channel;
                // SAFETY: the row exists, and belongs to this task.
                unsafe {
                    let places = from.map(|(_, stride, offset)| row * stride + offset + channel);
                    let load = |role: usize| S::load_lanes(from[role].0.as_ptr().add(places[role]), lanes);
                    let (open, a, b) = (sigmoid(load(0)), load(1), load(2));
                    match to {
                        BlendTo::Output(output) => {
                            open.mul_add(a.sub(b), b).store_lanes(output.at(at), lanes);
                        }
                        BlendTo::Gradients { d, to } => {
                            let d = S::load_lanes(d.as_ptr().add(at), lanes);
                            let da = d.mul(open);
                            let slope = open.neg_mul_add(open, open);
                            let gradients = [d.mul(a.sub(b)).mul(slope), da, d.sub(da)];
                            for role in 0..3 {
                                if let Some(to) = to[role] {
                                    gradients[role].store_lanes(to.at(places[role]), lanes);
                                }
                            }
                        }
                    }
                }
            }
        }
    }
}

impl Blend {
    fn from<'a>(&self, sources: &[&'a [f32]], rows: usize) -> [(&'a [f32], usize, usize); 3] {
        self.places.map(|(source, place)| (sources[source], sources[source].len() / rows, place * self.width))
    }

    fn run(&self, sources: &[&[f32]], like: &Layout) -> (CpuStorage, Shape) {
        let (width, level) = (self.width, Level::current());
        let dims = like.dims();
        let leading = &dims[..dims.len() - 1];
        let rows: usize = leading.iter().product();
        let from = self.from(sources, rows);
        let fill = |output: Shared| {
            for_rows(rows, width, |rows| {
                level.run(BlendRows { from, to: BlendTo::Output(output), width, rows });
            });
        };
        // SAFETY: every row is written.
        let output = unsafe { filled(rows * width, |output| on_pool(|| fill(output))) };
        (CpuStorage::F32(output), [leading, &[width]].concat().into())
    }

    fn gradients(&self, tensors: &[&Tensor], d: &Tensor) -> Result<Vec<Option<Tensor>>> {
        let mut gradients: Vec<Option<Vec<f32>>> =
            tensors.iter().map(|x| x.track_op().then(|| vec![0f32; x.elem_count()])).collect();
        let pointers: Vec<Option<Shared>> =
            gradients.iter_mut().map(|gradient| gradient.as_deref_mut().map(Shared::new)).collect();
        let (width, level) = (self.width, Level::current());
        let run = |sources: &[&[f32]], d: &[f32]| {
            let rows = d.len() / width;
            let from = self.from(sources, rows);
            let to = BlendTo::Gradients { d, to: self.places.map(|(source, _)| pointers[source]) };
            on_pool(|| for_rows(rows, 3 * width, |rows| level.run(BlendRows { from, to, width, rows })));
            Ok(())
        };
        with_values(d, |d| match tensors {
            [a] => with_values(a, |a| run(&[a], d)),
            [a, b] => with_values(a, |a| with_values(b, |b| run(&[a, b], d))),
            [a, b, c] => with_values(a, |a| with_values(b, |b| with_values(c, |c| run(&[a, b, c], d)))),
            _ => bail!("blend: takes one to three tensors, got {}", tensors.len()),
        })?;
        let tensor = |(gradient, x): (Option<Vec<f32>>, &&Tensor)| {
            gradient.map(|gradient| Tensor::from_vec(gradient, x.shape(), &Device::Cpu)).transpose()
        };
        gradients.into_iter().zip(tensors).map(tensor).collect()
    }
}

impl CustomOp1 for Blend {
    fn name(&self) -> &'static str {
        "blend"
    }
    fn cpu_fwd(&self, a: &CpuStorage, la: &Layout) -> Result<(CpuStorage, Shape)> {
        Ok(self.run(&[&packed(a, la)?], la))
    }
    fn bwd(&self, a: &Tensor, _: &Tensor, d: &Tensor) -> Result<Option<Tensor>> {
        Ok(self.gradients(&[a], d)?.swap_remove(0))
    }
}

impl CustomOp2 for Blend {
    fn name(&self) -> &'static str {
        "blend"
    }
    fn cpu_fwd(
        &self,
        a: &CpuStorage,
        la: &Layout,
        b: &CpuStorage,
        lb: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        Ok(self.run(&[&packed(a, la)?, &packed(b, lb)?], la))
    }
    fn bwd(
        &self,
        a: &Tensor,
        b: &Tensor,
        _: &Tensor,
        d: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let mut gradients = self.gradients(&[a, b], d)?.into_iter();
        Ok((gradients.next().flatten(), gradients.next().flatten()))
    }
}

impl CustomOp3 for Blend {
    fn name(&self) -> &'static str {
        "blend"
    }
    fn cpu_fwd(
        &self,
        a: &CpuStorage,
        la: &Layout,
        b: &CpuStorage,
        lb: &Layout,
        c: &CpuStorage,
        lc: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        Ok(self.run(&[&packed(a, la)?, &packed(b, lb)?, &packed(c, lc)?], la))
    }
    fn bwd(
        &self,
        a: &Tensor,
        b: &Tensor,
        c: &Tensor,
        _: &Tensor,
        d: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let mut gradients = self.gradients(&[a, b, c], d)?.into_iter();
        Ok((gradients.next().flatten(), gradients.next().flatten(), gradients.next().flatten()))
    }
}

fn last(dims: &[usize]) -> usize {
    dims.last().copied().unwrap_or(1)
}

/// Rows of `floats` floats, in tasks that pay for a thread.
fn for_rows(rows: usize, floats: usize, f: impl Fn(Range<usize>) + Sync + Send) {
    let in_task = (GRAIN / floats.max(1)).clamp(1, rows.max(1));
    parallel::for_each(rows.div_ceil(in_task), |task| f(task * in_task..rows.min((task + 1) * in_task)));
}
