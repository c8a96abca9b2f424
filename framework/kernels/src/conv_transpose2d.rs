//! Transposed convolution as a candle op: the gradient of a convolution's input, as an op in its own right.

use crate::conv2d::{self, Wanted, check_bias};
use crate::direct::Geometry;
use crate::tensors::{check_convolves, check_like, check_type, packed, tracked, with_values};
use candle_core::{CpuStorage, CustomOp2, CustomOp3, DType, Device, Layout, Result, Shape, Tensor, bail};

/// How a transposed convolution moves over its output; same meaning as PyTorch's arguments of these names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ConvTranspose2dOptions {
    /// Output pixels between the contributions of neighbouring inputs.
    pub stride: usize,
    /// Pixels cropped at each side of the output.
    pub padding: usize,
    /// Rows and columns added at the end of the output; less than the stride or the dilation.
    pub output_padding: usize,
    /// Pixels between neighbouring taps.
    pub dilation: usize,
    /// Number of independent groups that the channels are divided into.
    pub groups: usize,
}

impl Default for ConvTranspose2dOptions {
    fn default() -> Self {
        ConvTranspose2dOptions { stride: 1, padding: 0, output_padding: 0, dilation: 1, groups: 1 }
    }
}

/// Transposed two-dimensional convolution, channels last.
///
/// `x` is (.., H, W, Cin), with any number of leading axes; `weight` is (Cin, Cout / groups, kh, kw), as in
/// PyTorch; `bias` is (Cout). The result is (.., H', W', Cout) with H' = (H - 1) stride - 2 padding +
/// dilation (kh - 1) + output_padding + 1. All tensors are f32 on the CPU, or of one dtype that
/// [`convolves`](crate::convolves) accepts on a CUDA device, with any strides. Differentiable in all three;
/// gradients of untracked tensors are not computed.
///
/// # Errors
/// If the shapes are incompatible, or the tensors do not share one supported dtype and one device.
pub fn conv_transpose2d(
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    options: ConvTranspose2dOptions,
) -> Result<Tensor> {
    let adjoint = adjoint(x, weight, bias, options)?;
    #[cfg(feature = "cuda")]
    if x.device().is_cuda() {
        return crate::cuda::conv_transpose2d(x, weight, bias, adjoint);
    }
    let op = ConvTranspose2d { adjoint, leading: x.dims()[..x.rank() - 3].to_vec() };
    let gradients = tracked(x) || tracked(weight) || bias.is_some_and(tracked);
    match (bias, gradients) {
        (None, true) => x.apply_op2(weight, op),
        (None, false) => x.apply_op2_no_bwd(weight, &op),
        (Some(bias), true) => x.apply_op3(weight, bias, op),
        (Some(bias), false) => x.apply_op3_no_bwd(weight, bias, &op),
    }
}

/// The convolution whose input is this op's output, and whose output is this op's input.
fn adjoint(
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    options: ConvTranspose2dOptions,
) -> Result<Geometry> {
    let op = "conv_transpose2d";
    if x.device().is_cpu() {
        check_type(op, "x", x, DType::F32)?;
    } else {
        check_convolves(op, "x", x)?;
    }
    check_like(op, "weight", weight, x)?;
    let &[ref leading @ .., height, width, channels] = x.dims() else {
        bail!("{op}: x must be (.., height, width, channels), got {:?}", x.dims());
    };
    let &[inputs, group_outputs, kernel_height, kernel_width] = weight.dims() else {
        bail!("{op}: weight must be (inputs, outputs / groups, height, width), got {:?}", weight.dims());
    };
    let ConvTranspose2dOptions { stride, padding, output_padding, dilation, groups } = options;
    if stride == 0 || dilation == 0 || groups == 0 {
        bail!("{op}: stride, dilation and groups must be at least 1, got {options:?}");
    }
    if output_padding >= stride.max(dilation) {
        bail!("{op}: output_padding must be less than the stride or the dilation, got {options:?}");
    }
    if channels != inputs || inputs % groups != 0 {
        bail!(
            "{op}: channels do not fit: x is {:?}, weight is {:?}, groups {groups}",
            x.dims(),
            weight.dims()
        );
    }
    let outputs = group_outputs * groups;
    check_bias(op, bias, outputs, x)?;
    let size = |size: usize, kernel: usize| {
        ((size - 1) * stride + dilation * (kernel - 1) + output_padding + 1)
            .checked_sub(2 * padding)
            .filter(|&n| n > 0)
    };
    let (Some(out_height), Some(out_width)) = (size(height, kernel_height), size(width, kernel_width)) else {
        bail!(
            "{op}: the padding leaves no output: x is {:?}, weight is {:?}, {options:?}",
            x.dims(),
            weight.dims()
        );
    };
    Ok(Geometry {
        batch: leading.iter().product(),
        height: out_height,
        width: out_width,
        inputs: outputs,
        outputs: inputs,
        kernel_height,
        kernel_width,
        stride,
        padding,
        dilation,
        groups,
        out_height: height,
        out_width: width,
    })
}

struct ConvTranspose2d {
    adjoint: Geometry,
    leading: Vec<usize>,
}

impl ConvTranspose2d {
    fn run(&self, x: &[f32], weight: &[f32], bias: Option<&[f32]>) -> (CpuStorage, Shape) {
        let g = &self.adjoint;
        let shape = [&self.leading[..], &[g.height, g.width, g.inputs]].concat();
        (CpuStorage::F32(conv2d::backward_input(g, weight, x, bias)), shape.into())
    }

    fn gradients(
        &self,
        x: &Tensor,
        weight: &Tensor,
        bias: Option<&Tensor>,
        dy: &Tensor,
    ) -> Result<[Option<Tensor>; 3]> {
        let g = &self.adjoint;
        let (dx, dw, db) = with_values(x, |xs| {
            with_values(weight, |ws| {
                with_values(dy, |dys| {
                    let dx = x.track_op().then(|| conv2d::forward(g, dys, ws, None));
                    let wanted = Wanted { x: false, weight: weight.track_op(), bias: false };
                    let dw = conv2d::backward(g, dys, ws, xs, &wanted).weight;
                    let wants_bias = bias.is_some_and(|bias| bias.track_op());
                    let db = wants_bias.then(|| conv2d::backward_bias(g.inputs, dys));
                    Ok((dx, dw, db))
                })
            })
        })?;
        let tensor = |values: Option<Vec<f32>>, shape: &Shape| {
            values.map(|values| Tensor::from_vec(values, shape, &Device::Cpu)).transpose()
        };
        Ok([tensor(dx, x.shape())?, tensor(dw, weight.shape())?, tensor(db, &Shape::from(g.inputs))?])
    }
}

impl CustomOp2 for ConvTranspose2d {
    fn name(&self) -> &'static str {
        "conv_transpose2d"
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
        let [dx, dw, _] = self.gradients(x, w, None, dy)?;
        Ok((dx, dw))
    }
}

impl CustomOp3 for ConvTranspose2d {
    fn name(&self) -> &'static str {
        "conv_transpose2d"
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
        let [dx, dw, db] = self.gradients(x, w, Some(b), dy)?;
        Ok((dx, dw, db))
    }
}
