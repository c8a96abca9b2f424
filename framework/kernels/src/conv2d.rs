//! Two-dimensional convolution as a candle op.

use crate::buffer::filled;
use crate::direct::{self, Geometry, OutputImages};
use crate::float::Float;
use crate::parallel::{Shared, on_pool};
use crate::simd::{LANES, Level};
use crate::tensors::{check_convolves, check_like, check_type, packed, tracked, with_values};
use crate::winograd::{self, ColumnOrder, Filters, Images, InputGradient, Panels, Source, Tiling};
use candle_core::{CpuStorage, CustomOp2, CustomOp3, DType, Device, Layout, Result, Shape, Tensor, bail};
use half::{bf16, f16};
use std::marker::PhantomData;

/// How a convolution moves over its input; same meaning as PyTorch's arguments of these names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Conv2dOptions {
    /// Pixels between neighbouring outputs.
    pub stride: usize,
    /// Zeros added at each side.
    pub padding: usize,
    /// Pixels between neighbouring taps.
    pub dilation: usize,
    /// Number of independent groups that the channels are divided into.
    pub groups: usize,
}

impl Default for Conv2dOptions {
    fn default() -> Self {
        Conv2dOptions { stride: 1, padding: 0, dilation: 1, groups: 1 }
    }
}

/// Two-dimensional convolution, channels last.
///
/// `x` is (.., H, W, Cin), with any number of leading axes; `weight` is (Cout, Cin / groups, kh, kw), as in
/// PyTorch; `bias` is (Cout). The result is (.., H', W', Cout) with
/// H' = (H + 2 padding - dilation (kh - 1) - 1) / stride + 1. All tensors share one dtype that [`convolves`](crate::convolves) accepts, with any
/// strides; sums are always f32. Differentiable in all three tensors; gradients of untracked tensors are not
/// computed.
///
/// 3x3 and 5x5 kernels of stride 1 run as Winograd F(4x4, 3x3) and F(2x2, 5x5) (Lavin and Gray, "Fast algorithms for
/// convolutional neural networks", 2015) if there are enough channels; all others are computed directly.
///
/// # Errors
/// If the shapes are incompatible, or the tensors do not share one supported dtype and one device.
pub fn conv2d(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>, options: Conv2dOptions) -> Result<Tensor> {
    let geometry = geometry(x, weight, bias, options)?;
    #[cfg(feature = "cuda")]
    if x.device().is_cuda() {
        return crate::cuda::conv2d(x, &crate::cuda::channels_last(weight)?, bias, geometry);
    }
    let leading = x.dims()[..x.rank() - 3].to_vec();
    match x.dtype() {
        DType::BF16 => Conv2d::<bf16>::new(geometry, leading).apply(x, weight, bias),
        DType::F16 => Conv2d::<f16>::new(geometry, leading).apply(x, weight, bias),
        _ => Conv2d::<f32>::new(geometry, leading).apply(x, weight, bias),
    }
}

/// The gradients of `x`, `weight` and the bias, given the gradient of the result: [`conv2d`]'s backward pass,
/// outside a graph.
///
/// # Errors
/// In the same cases as [`conv2d`], and if the tensors are not f32, or `dy` does not have the shape of the
/// result.
pub fn conv2d_backward(
    x: &Tensor,
    weight: &Tensor,
    dy: &Tensor,
    options: Conv2dOptions,
) -> Result<(Tensor, Tensor, Tensor)> {
    let geometry = geometry(x, weight, None, options)?;
    let leading = x.dims()[..x.rank() - 3].to_vec();
    let conv = Conv2d::<f32>::new(geometry, leading);
    check_type("conv2d_backward", "x", x, DType::F32)?;
    check_type("conv2d_backward", "dy", dy, DType::F32)?;
    if dy.shape() != &conv.shape() {
        bail!("conv2d_backward: dy must be {:?}, got {:?}", conv.shape(), dy.dims());
    }
    let wanted = Wanted { x: true, weight: true, bias: true };
    match conv.gradients(x, weight, dy, &wanted)? {
        [Some(dx), Some(dw), Some(db)] => Ok((dx, dw, db)),
        _ => bail!("conv2d_backward: a gradient is missing"),
    }
}

pub(crate) fn geometry(
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    options: Conv2dOptions,
) -> Result<Geometry> {
    let op = "conv2d";
    check_convolves(op, "x", x)?;
    check_like(op, "weight", weight, x)?;
    let &[ref leading @ .., height, width, inputs] = x.dims() else {
        bail!("{op}: x must be (.., height, width, channels), got {:?}", x.dims());
    };
    let &[outputs, group_inputs, kernel_height, kernel_width] = weight.dims() else {
        bail!("{op}: weight must be (outputs, inputs / groups, height, width), got {:?}", weight.dims());
    };
    let Conv2dOptions { stride, padding, dilation, groups } = options;
    if stride == 0 || dilation == 0 || groups == 0 {
        bail!("{op}: stride, dilation and groups must be at least 1, got {options:?}");
    }
    if inputs != group_inputs * groups || outputs % groups != 0 {
        bail!(
            "{op}: channels do not fit: x is {:?}, weight is {:?}, groups {groups}",
            x.dims(),
            weight.dims()
        );
    }
    check_bias(op, bias, outputs, x)?;
    let size = |size: usize, kernel: usize| (size + 2 * padding).checked_sub(dilation * (kernel - 1) + 1);
    let (Some(free_height), Some(free_width)) = (size(height, kernel_height), size(width, kernel_width))
    else {
        bail!(
            "{op}: the kernel is larger than the padded image: x is {:?}, weight is {:?}, {options:?}",
            x.dims(),
            weight.dims()
        );
    };
    Ok(Geometry {
        batch: leading.iter().product(),
        height,
        width,
        inputs,
        outputs,
        kernel_height,
        kernel_width,
        stride,
        padding,
        dilation,
        groups,
        out_height: free_height / stride + 1,
        out_width: free_width / stride + 1,
    })
}

/// Checks that the bias, if any, has shape (outputs) and the dtype and device of `x`.
pub(crate) fn check_bias(op: &str, bias: Option<&Tensor>, outputs: usize, x: &Tensor) -> Result<()> {
    let Some(bias) = bias else { return Ok(()) };
    check_like(op, "bias", bias, x)?;
    if bias.dims() != [outputs] {
        bail!("{op}: bias must be ({outputs}) for {outputs} output channels, got {:?}", bias.dims());
    }
    Ok(())
}

/// Whether Winograd pays: the products must save more time than the transforms on both sides cost.
fn winograd_pays(g: &Geometry) -> bool {
    matches!((g.kernel_height, g.kernel_width), (3, 3) | (5, 5))
        && (g.stride, g.dilation, g.groups) == (1, 1, 1)
        && g.padding < g.kernel_height
        && g.inputs >= 16
        && g.outputs >= 16
}

fn tiling(g: &Geometry) -> Tiling {
    Tiling { batch: g.batch, height: g.height, width: g.width, padding: g.padding, kernel: g.kernel_height }
}

fn images<T>(data: &[T], pixels: usize, channels: usize) -> Images<T> {
    Images { data: data.as_ptr(), image: pixels * channels, channels }
}

/// The unsafe code below relies on these lengths.
fn check_lengths<T>(g: &Geometry, x: Option<&[T]>, weight: &[f32], dy: Option<&[T]>) {
    assert!(x.is_none_or(|x| x.len() == g.batch * g.height * g.width * g.inputs));
    assert_eq!(weight.len(), g.outputs * g.inputs / g.groups * g.kernel_height * g.kernel_width);
    assert!(dy.is_none_or(|dy| dy.len() == g.batch * g.out_height * g.out_width * g.outputs));
}

/// y = x * w + bias
pub(crate) fn forward<T: Float>(g: &Geometry, x: &[T], weight: &[f32], bias: Option<&[f32]>) -> Vec<T> {
    check_lengths(g, Some(x), weight, None);
    let level = Level::current();
    let len = g.batch * g.out_height * g.out_width * g.outputs;
    let x = images(x, g.height * g.width, g.inputs);
    if winograd_pays(g) {
        let fill = |y: Shared<T>| {
            let order = order(g.outputs);
            let filters =
                Filters { data: weight, inputs: g.inputs, kernel: g.kernel_height }.transform(level, &order);
            let mut row = vec![0f32; order.len()];
            if let Some(bias) = bias {
                row[..g.outputs].copy_from_slice(bias);
            }
            let epilogue = winograd::Store {
                output: y,
                bias: &row,
                height: g.out_height,
                width: g.out_width,
                channels: g.outputs,
                kernel: g.kernel_height,
            };
            winograd::forward(level, &tiling(g), &[x], &filters, epilogue);
        };
        // SAFETY: the algorithm stores every pixel of the output and reads none.
        return unsafe { filled(len, |y| on_pool(|| fill(y))) };
    }
    let fill = |y: Shared| {
        let y = OutputImages::contiguous(y, g.out_height * g.out_width * g.outputs);
        direct::forward(level, g, x, weight, bias, y);
    };
    // SAFETY: as above.
    T::narrowed(level, unsafe { T::wide_filled(len, |y| on_pool(|| fill(y))) })
}

/// The output channels in their own order, padded to whole vectors.
fn order(outputs: usize) -> ColumnOrder {
    (0..outputs.next_multiple_of(LANES)).map(|o| (o < outputs).then_some(o)).collect()
}

/// Which gradients are wanted.
pub(crate) struct Wanted {
    pub(crate) x: bool,
    pub(crate) weight: bool,
    pub(crate) bias: bool,
}

pub(crate) struct Gradients<T> {
    pub(crate) x: Option<Vec<T>>,
    pub(crate) weight: Option<Vec<T>>,
    pub(crate) bias: Option<Vec<T>>,
}

/// The gradients of x, weight and bias that are wanted.
pub(crate) fn backward<T: Float>(
    g: &Geometry,
    x: &[T],
    weight: &[f32],
    dy: &[T],
    wanted: &Wanted,
) -> Gradients<T> {
    check_lengths(g, Some(x), weight, Some(dy));
    let level = Level::current();
    let winograd = winograd_pays(g) && (wanted.x || wanted.weight);
    let narrow = |wide| T::narrowed(level, wide);
    let mut dw = wanted.weight.then(|| T::wide_zeros(weight.len()));
    let mut db = wanted.bias.then(|| T::wide_zeros(g.outputs));
    let dx = on_pool(|| {
        let x = images(x, g.height * g.width, g.inputs);
        if winograd {
            // The Winograd backward pass adds to `dx`, so it starts at zero.
            let mut dx = wanted.x.then(|| T::wide_zeros(g.batch * g.height * g.width * g.inputs));
            let (mut dx_sums, mut dw, mut db) = (dx.as_deref_mut(), dw.as_deref_mut(), db.as_deref_mut());
            winograd_backward(level, g, x, weight, dy, &mut dx_sums, &mut dw, &mut db);
            return dx.map(narrow);
        }
        let dy = &*T::widened(level, dy);
        let dy_images = images(dy, g.out_height * g.out_width, g.outputs);
        if let (true, true, Some(dw)) = (g.depthwise(), wanted.x, &mut dw) {
            let image = g.height * g.width * g.inputs;
            let mut db = db.as_deref_mut();
            let fill = |dx| {
                let dx = OutputImages::contiguous(dx, image);
                direct::backward_depthwise(level, g, x, weight, dy_images, dx, dw, db.take());
            };
            // SAFETY: every pixel is stored and none is read.
            return Some(narrow(unsafe { T::wide_filled(g.batch * image, fill) }));
        }
        // Narrowed right away, so the weight gradient can reuse the scratch memory.
        let dx = wanted.x.then(|| narrow(direct_backward_input::<T>(level, g, dy_images, weight, None)));
        if let Some(dw) = &mut dw {
            direct::backward_weight(level, g, x, dy_images, dw);
        }
        if let Some(db) = &mut db {
            direct::backward_bias(level, dy, db);
        }
        dx
    });
    Gradients { x: dx, weight: dw.map(narrow), bias: db.map(narrow) }
}

/// Only the gradient of x; `bias`, with one value per input channel, is added to all pixels.
pub(crate) fn backward_input(g: &Geometry, weight: &[f32], dy: &[f32], bias: Option<&[f32]>) -> Vec<f32> {
    check_lengths::<f32>(g, None, weight, Some(dy));
    let level = Level::current();
    on_pool(|| {
        if !winograd_pays(g) {
            let dy = images(dy, g.out_height * g.out_width, g.outputs);
            return direct_backward_input::<f32>(level, g, dy, weight, bias);
        }
        // The Winograd backward pass adds to `dx`, so it starts as the bias, or zero.
        let mut dx = vec![0f32; g.batch * g.height * g.width * g.inputs];
        if let Some(bias) = bias {
            dx.chunks_exact_mut(g.inputs).for_each(|pixel| pixel.copy_from_slice(bias));
        }
        let x = images::<f32>(&[], g.height * g.width, g.inputs);
        let mut gradient = Some(dx.as_mut_slice());
        winograd_backward(level, g, x, weight, dy, &mut gradient, &mut None, &mut None);
        dx
    })
}

/// Like [`backward_input`], always by direct sums.
fn direct_backward_input<T: Float>(
    level: Level,
    g: &Geometry,
    dy: Images,
    weight: &[f32],
    bias: Option<&[f32]>,
) -> T::Wide {
    let image = g.height * g.width * g.inputs;
    let fill = |dx| direct::backward_input(level, g, dy, weight, bias, OutputImages::contiguous(dx, image));
    // SAFETY: every pixel belongs to the pass of its phase, which stores it, and none is read.
    unsafe { T::wide_filled(g.batch * image, fill) }
}

/// The sum over all pixels of `dy`.
pub(crate) fn backward_bias(channels: usize, dy: &[f32]) -> Vec<f32> {
    let level = Level::current();
    let mut db = vec![0f32; channels];
    on_pool(|| direct::backward_bias(level, dy, &mut db));
    db
}

#[expect(clippy::too_many_arguments, reason = "the Winograd half of `backward`")]
fn winograd_backward<T: Float>(
    level: Level,
    g: &Geometry,
    x: Images<T>,
    weight: &[f32],
    dy: &[T],
    dx: &mut Option<&mut [f32]>,
    dw: &mut Option<&mut [f32]>,
    db: &mut Option<&mut [f32]>,
) {
    let order = order(g.outputs);
    let filters = Filters { data: weight, inputs: g.inputs, kernel: g.kernel_height };
    let transposed = dx.as_ref().map(|_| filters.transform_transposed(level, &order, 0, g.inputs));
    let parts = winograd::parts(&tiling(g), g.inputs, g.outputs);
    let mut filter_sums = dw.as_ref().map(|_| Panels::zeroed_parts(parts, g.inputs, order.len()));
    let mut bias_sums = db.as_ref().map(|_| vec![0f32; parts * order.len()]);
    let input = match (&transposed, dx) {
        (Some(filters), Some(dx)) => Some(InputGradient { filters, data: Shared::new(dx), image: x.image }),
        _ => None,
    };
    let gradient = winograd::Load {
        gradient: dy,
        height: g.out_height,
        width: g.out_width,
        channels: g.outputs,
        kernel: g.kernel_height,
    };
    let mut sources = [Source { images: x, filters: filter_sums.as_deref_mut(), input }];
    winograd::backward(
        level,
        &tiling(g),
        order.len() / LANES,
        gradient,
        &mut sources,
        parts,
        bias_sums.as_deref_mut(),
    );
    if let Some(dw) = dw {
        for sums in filter_sums.iter().flatten() {
            winograd::add_filter_gradient(level, sums, &order, 0, dw, g.inputs, g.kernel_height);
        }
    }
    if let (Some(db), Some(sums)) = (db, bias_sums) {
        for part in sums.chunks_exact(order.len()) {
            db.iter_mut().zip(part).for_each(|(sum, x)| *sum += x);
        }
    }
}

/// The op on tensors of type `T`.
struct Conv2d<T> {
    geometry: Geometry,
    leading: Vec<usize>,
    values: PhantomData<T>,
}

impl<T: Float> Conv2d<T> {
    fn new(geometry: Geometry, leading: Vec<usize>) -> Self {
        Conv2d { geometry, leading, values: PhantomData }
    }

    fn apply(self, x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
        let gradients = tracked(x) || tracked(weight) || bias.is_some_and(tracked);
        match (bias, gradients) {
            (None, true) => x.apply_op2(weight, self),
            (None, false) => x.apply_op2_no_bwd(weight, &self),
            (Some(bias), true) => x.apply_op3(weight, bias, self),
            (Some(bias), false) => x.apply_op3_no_bwd(weight, bias, &self),
        }
    }

    /// The shape of the result.
    fn shape(&self) -> Shape {
        let g = &self.geometry;
        [&self.leading[..], &[g.out_height, g.out_width, g.outputs]].concat().into()
    }

    fn run(&self, x: &[T], weight: &[T], bias: Option<&[T]>) -> (CpuStorage, Shape) {
        let wide = |x| T::widened(Level::current(), x);
        let y = forward(&self.geometry, x, &wide(weight), bias.map(wide).as_deref());
        (T::to_cpu_storage_owned(y), self.shape())
    }

    /// The gradients of x, weight and bias, if wanted.
    fn gradients(
        &self,
        x: &Tensor,
        weight: &Tensor,
        dy: &Tensor,
        wanted: &Wanted,
    ) -> Result<[Option<Tensor>; 3]> {
        let gradients = with_values(x, |xs: &[T]| {
            with_values(weight, |ws| {
                let ws = T::widened(Level::current(), ws);
                with_values(dy, |dys| Ok(backward(&self.geometry, xs, &ws, dys, wanted)))
            })
        })?;
        let tensor = |values: Option<Vec<T>>, shape: &Shape| {
            values.map(|values| Tensor::from_vec(values, shape, &Device::Cpu)).transpose()
        };
        Ok([
            tensor(gradients.x, x.shape())?,
            tensor(gradients.weight, weight.shape())?,
            tensor(gradients.bias, &Shape::from(self.geometry.outputs))?,
        ])
    }
}

impl<T: Float> CustomOp2 for Conv2d<T> {
    fn name(&self) -> &'static str {
        "conv2d"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        lx: &Layout,
        w: &CpuStorage,
        lw: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        Ok(self.run(&packed(x, lx)?, &packed(w, lw)?, None))
    }

    fn bwd(
        &self,
        x: &Tensor,
        w: &Tensor,
        _y: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let wanted = Wanted { x: x.track_op(), weight: w.track_op(), bias: false };
        let [dx, dw, _] = self.gradients(x, w, dy, &wanted)?;
        Ok((dx, dw))
    }
}

impl<T: Float> CustomOp3 for Conv2d<T> {
    fn name(&self) -> &'static str {
        "conv2d"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        lx: &Layout,
        w: &CpuStorage,
        lw: &Layout,
        b: &CpuStorage,
        lb: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        Ok(self.run(&packed(x, lx)?, &packed(w, lw)?, Some(&packed(b, lb)?)))
    }

    fn bwd(
        &self,
        x: &Tensor,
        w: &Tensor,
        b: &Tensor,
        _y: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let wanted = Wanted { x: x.track_op(), weight: w.track_op(), bias: b.track_op() };
        let [dx, dw, db] = self.gradients(x, w, dy, &wanted)?;
        Ok((dx, dw, db))
    }
}
