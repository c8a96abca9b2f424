//! A gated blend of two values, as one candle op.

use crate::activations::sigmoid;
use crate::buffer::filled;
use crate::gates::check_place;
use crate::parallel::{Shared, for_rows, on_pool};
use crate::several::{self, Several, with_all_values};
use crate::simd::{Kernel, LANES, Level, Simd};
use crate::tensors::{check_in_32_bits, with_values};
use candle_core::{CpuStorage, Device, Layout, Result, Shape, Tensor, bail};
#[cfg(feature = "cuda")]
use candle_core::{CudaDevice, CudaStorage};
use std::ops::Range;

/// A tensor (.., k N) of k gates of N channels, and the index of one of its gates.
pub type Gate<'a> = (&'a Tensor, usize);

/// sigmoid(gate) a + (1 - sigmoid(gate)) b, (.., N), where N is `width`. The three operands may be gates of
/// one tensor or of several. Differentiable in all three.
///
/// # Errors
/// If the shapes are incompatible, two of the three are the same, or a tensor is not f32 on the CPU or a CUDA
/// device.
pub fn blend(width: usize, gate: Gate, a: Gate, b: Gate) -> Result<Tensor> {
    let op = "blend";
    let mut sources: Vec<&Tensor> = Vec::new();
    let mut places = [Place::default(); 3];
    for (to, (values, place)) in places.iter_mut().zip([gate, a, b]) {
        check_in_32_bits(op, "a gate", values)?;
        let stride = match (values.dims(), gate.0.dims()) {
            (&[ref own @ .., wide], [like @ .., _]) if own == like && width > 0 && wide % width == 0 => wide,
            (own, like) => bail!("{op}: expected (.., k {width}) like {like:?}, got {own:?}"),
        };
        check_place(op, stride / width, place)?;
        let known = sources.iter().position(|source| source.id() == values.id());
        let source = known.unwrap_or_else(|| {
            sources.push(values);
            sources.len() - 1
        });
        *to = Place { source, stride, offset: place * width };
    }
    if places[0] == places[1] || places[0] == places[2] || places[1] == places[2] {
        bail!("{op}: a gate is asked for twice");
    }
    several::apply(&sources, Blend { width, places })
}

/// The location of a gate: which of the op's tensors it is in, floats from row to row, and its offset in a
/// row.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Place {
    pub(crate) source: usize,
    pub(crate) stride: usize,
    pub(crate) offset: usize,
}

pub(crate) struct Blend {
    pub(crate) width: usize,
    /// The locations of the gate, a and b.
    pub(crate) places: [Place; 3],
}

/// Some rows of a blend: the forward pass, or the backward pass if there is a gradient.
struct BlendRows<'a> {
    /// The gate, a and b: values, floats from row to row, offset in a row.
    from: [(&'a [f32], usize, usize); 3],
    to: BlendTo<'a>,
    width: usize,
    rows: Range<usize>,
}

#[derive(Clone, Copy)]
enum BlendTo<'a> {
    Output(Shared),
    /// Gradients of the gate, a and b, with the same layout as their values.
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
                // SAFETY: the row exists and belongs to this task only.
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
    /// Values, floats from row to row, and offset in a row, of the gate, a and b.
    fn from<'a>(&self, sources: &[&'a [f32]]) -> [(&'a [f32], usize, usize); 3] {
        self.places.map(|Place { source, stride, offset }| (sources[source], stride, offset))
    }
}

impl Several for Blend {
    fn name(&self) -> &'static str {
        "blend"
    }

    fn run(&self, sources: &[&[f32]], layouts: &[&Layout]) -> (CpuStorage, Shape) {
        let (width, level) = (self.width, Level::current());
        let dims = layouts[0].dims();
        let leading = &dims[..dims.len() - 1];
        let rows: usize = leading.iter().product();
        let from = self.from(sources);
        let fill = |output: Shared| {
            for_rows(rows, width, |rows| {
                level.run(BlendRows { from, to: BlendTo::Output(output), width, rows });
            });
        };
        // SAFETY: every row is written.
        let output = unsafe { filled(rows * width, |output| on_pool(|| fill(output))) };
        (CpuStorage::F32(output), [leading, &[width]].concat().into())
    }

    #[cfg(feature = "cuda")]
    fn run_on_cuda(
        &self,
        device: &CudaDevice,
        at: &[u64],
        layouts: &[&Layout],
    ) -> Result<(CudaStorage, Shape)> {
        crate::cuda::cells::blend(self, device, at, layouts[0])
    }

    fn gradients(&self, tensors: &[&Tensor], d: &Tensor) -> Result<Vec<Option<Tensor>>> {
        #[cfg(feature = "cuda")]
        if d.device().is_cuda() {
            return crate::cuda::cells::blend_gradients(self, tensors, d);
        }
        let mut gradients: Vec<Option<Vec<f32>>> =
            tensors.iter().map(|x| x.track_op().then(|| vec![0f32; x.elem_count()])).collect();
        let pointers: Vec<Option<Shared>> =
            gradients.iter_mut().map(|gradient| gradient.as_deref_mut().map(Shared::new)).collect();
        let (width, level) = (self.width, Level::current());
        let run = |sources: &[&[f32]], d: &[f32]| {
            let from = self.from(sources);
            let to = BlendTo::Gradients { d, to: self.places.map(|place| pointers[place.source]) };
            let rows = d.len() / width;
            on_pool(|| for_rows(rows, 3 * width, |rows| level.run(BlendRows { from, to, width, rows })));
            Ok(())
        };
        with_values(d, |d| with_all_values(tensors, |sources| run(sources, d)))?;
        let tensor = |(gradient, x): (Option<Vec<f32>>, &&Tensor)| {
            gradient.map(|gradient| Tensor::from_vec(gradient, x.shape(), &Device::Cpu)).transpose()
        };
        gradients.into_iter().zip(tensors).map(tensor).collect()
    }
}
