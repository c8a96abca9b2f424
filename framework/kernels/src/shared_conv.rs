//! A convolution whose weight is shared by the steps of a roll-out.

#[cfg(feature = "cuda")]
use crate::conv2d::geometry;
use crate::conv2d::{Conv2dOptions, check_bias, conv2d};
use crate::parallel::{Shared, on_pool};
use crate::simd::{LANES, Level};
use crate::tensors::{check_convolves, check_type, packed, tracked, with_values};
use crate::winograd::{self, ColumnOrder, Filters, Images, InputGradient, Panels, Source, Tiling};
use candle_core::{CpuStorage, CustomOp1, CustomOp2, DType, Device, Layout, Result, Shape, Tensor, bail};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

/// A 'same' convolution of stride 1, like [`conv2d`], for a weight that is used many times before it changes.
///
/// On the CPU, the weight is transformed once for all uses. Its gradient is summed in the Winograd domain
/// over the backward passes of all uses, transformed once, and passed to the weight after the last of them;
/// likewise for the bias. Kernels that Winograd does not support fall back to [`conv2d`]. On a CUDA device,
/// the weight is converted to channels last once, and so is the sum of its gradients back.
#[derive(Debug, Clone)]
pub struct SharedConv {
    weight: Tensor,
    bias: Option<Tensor>,
    prepared: Prepared,
}

/// The data that all uses share.
#[derive(Debug, Clone)]
enum Prepared {
    Nothing,
    /// The transformed weight, and the one-element tensor that represents weight and bias in the graph.
    Transformed(Arc<Transformed>, Tensor),
    /// The weight, channels last.
    #[cfg(feature = "cuda")]
    OnCuda(Tensor),
}

impl SharedConv {
    /// Captures a weight (Cout, Cin, k, k), k odd, and a bias (Cout) as they are now; later changes are not
    /// seen.
    ///
    /// # Errors
    /// If one of them has another shape, or is neither f32 on the CPU nor of a dtype that
    /// [`convolves`](crate::convolves) accepts on a CUDA device.
    pub fn new(weight: &Tensor, bias: Option<&Tensor>) -> Result<SharedConv> {
        match weight.device().is_cuda() {
            true => check_convolves("shared_conv", "weight", weight)?,
            false => check_type("shared_conv", "weight", weight, DType::F32)?,
        }
        let &[outputs, inputs, kernel, kernel_width] = weight.dims() else {
            bail!("shared_conv: weight must be (outputs, inputs, k, k), got {:?}", weight.dims());
        };
        if kernel != kernel_width || kernel % 2 == 0 {
            bail!("shared_conv: expected a square kernel of odd size, got {:?}", weight.dims());
        }
        check_bias("shared_conv", bias, outputs, weight)?;
        let shared = SharedConv { weight: weight.clone(), bias: bias.cloned(), prepared: Prepared::Nothing };
        #[cfg(feature = "cuda")]
        if weight.device().is_cuda() {
            return Ok(SharedConv {
                prepared: Prepared::OnCuda(crate::cuda::channels_last(weight)?),
                ..shared
            });
        }
        if !matches!(kernel, 3 | 5) || inputs < LANES || outputs < LANES {
            return Ok(shared);
        }
        let values = weight.detach().contiguous()?;
        let order: ColumnOrder =
            (0..outputs.next_multiple_of(LANES)).map(|o| (o < outputs).then_some(o)).collect();
        let mut row = vec![0f32; order.len()];
        if let Some(bias) = bias {
            with_values(bias, |bias| {
                row[..outputs].copy_from_slice(bias);
                Ok(())
            })?;
        }
        let transformed = Transformed {
            values,
            outputs,
            inputs,
            kernel,
            order,
            bias: row,
            filters: OnceLock::new(),
            transposed: OnceLock::new(),
            sums: Mutex::default(),
        };
        let transformed = Arc::new(transformed);
        let use_of = UseOf(transformed.clone());
        let token = match (bias, tracked(weight) || bias.is_some_and(tracked)) {
            (None, true) => weight.apply_op1(use_of)?,
            (None, false) => weight.apply_op1_no_bwd(&use_of)?,
            (Some(bias), true) => weight.apply_op2(bias, use_of)?,
            (Some(bias), false) => weight.apply_op2_no_bwd(bias, &use_of)?,
        };
        Ok(SharedConv { prepared: Prepared::Transformed(transformed, token), ..shared })
    }

    /// Maps (.., H, W, Cin) to (.., H, W, Cout). Differentiable in x, the weight and the bias.
    ///
    /// # Errors
    /// If the shapes are incompatible, or x does not have the weight's dtype and device.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let same = Conv2dOptions { padding: self.weight.dims()[2] / 2, ..Default::default() };
        match &self.prepared {
            Prepared::Nothing => conv2d(x, &self.weight, self.bias.as_ref(), same),
            Prepared::Transformed(transformed, token) => self.use_of(transformed, token, x),
            #[cfg(feature = "cuda")]
            Prepared::OnCuda(weight) => {
                let geometry = geometry(x, &self.weight, self.bias.as_ref(), same)?;
                crate::cuda::conv2d(x, weight, self.bias.as_ref(), geometry)
            }
        }
    }

    fn use_of(&self, transformed: &Arc<Transformed>, token: &Tensor, x: &Tensor) -> Result<Tensor> {
        check_type("shared_conv", "x", x, DType::F32)?;
        let &[ref leading @ .., height, width, inputs] = x.dims() else {
            bail!("shared_conv: x must be (.., height, width, channels), got {:?}", x.dims());
        };
        if inputs != transformed.inputs {
            bail!("shared_conv: x is {:?}, weight is {:?}", x.dims(), self.weight.dims());
        }
        let kernel = transformed.kernel;
        let tiling = Tiling { batch: leading.iter().product(), height, width, padding: kernel / 2, kernel };
        let op = Use { transformed: transformed.clone(), tiling };
        if tracked(x) || tracked(token) { x.apply_op2(token, op) } else { x.apply_op2_no_bwd(token, &op) }
    }
}

/// The weight in the Winograd domain, the bias, and their gradients.
#[derive(Debug)]
struct Transformed {
    values: Tensor,
    outputs: usize,
    inputs: usize,
    kernel: usize,
    order: ColumnOrder,
    /// In the order of `order`; zeros if there is no bias.
    bias: Vec<f32>,
    filters: OnceLock<Panels>,
    transposed: OnceLock<Panels>,
    /// Gradient sums of the uses so far, one entry for each number of parts into which uses split their
    /// batch.
    sums: Mutex<Vec<Sums>>,
}

/// Gradients of the weight and the bias, with one summand per part.
#[derive(Debug)]
struct Sums {
    filters: Vec<Panels>,
    bias: Vec<f32>,
}

impl Transformed {
    fn with_filters<R>(&self, f: impl FnOnce(Filters) -> R) -> Result<R> {
        with_values(&self.values, |data| Ok(f(Filters { data, inputs: self.inputs, kernel: self.kernel })))
    }

    fn filters(&self, level: Level) -> Result<&Panels> {
        if self.filters.get().is_none() {
            let panels = self.with_filters(|filters| on_pool(|| filters.transform(level, &self.order)))?;
            let _ = self.filters.set(panels);
        }
        self.filters.get().ok_or_else(|| candle_core::Error::Msg("shared_conv: no filters".into()))
    }

    fn transposed(&self, level: Level) -> Result<&Panels> {
        if self.transposed.get().is_none() {
            let panels = self.with_filters(|filters| {
                on_pool(|| filters.transform_transposed(level, &self.order, 0, self.inputs))
            })?;
            let _ = self.transposed.set(panels);
        }
        self.transposed.get().ok_or_else(|| candle_core::Error::Msg("shared_conv: no filters".into()))
    }

    fn sums(&self) -> MutexGuard<'_, Vec<Sums>> {
        self.sums.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Represents the weight and the bias in the graph by a number on which every use depends. By the time its
/// gradient is requested, all uses have added theirs.
struct UseOf(Arc<Transformed>);

impl UseOf {
    fn number() -> (CpuStorage, Shape) {
        (CpuStorage::F32(vec![0.]), Shape::from(()))
    }

    /// The gradients of the weight and the bias.
    fn gradients(&self) -> Result<(Tensor, Tensor)> {
        let Transformed { values, outputs, order, inputs, kernel, .. } = &*self.0;
        let level = Level::current();
        let mut gradient = vec![0f32; values.elem_count()];
        let mut bias = vec![0f32; *outputs];
        let sums = std::mem::take(&mut *self.0.sums());
        on_pool(|| {
            for panels in sums.iter().flat_map(|sums| &sums.filters) {
                winograd::add_filter_gradient(level, panels, order, 0, &mut gradient, *inputs, *kernel);
            }
        });
        for part in sums.iter().flat_map(|sums| sums.bias.chunks_exact(order.len())) {
            bias.iter_mut().zip(part).for_each(|(sum, x)| *sum += x);
        }
        let gradient = Tensor::from_vec(gradient, values.shape(), &Device::Cpu)?;
        Ok((gradient, Tensor::from_vec(bias, *outputs, &Device::Cpu)?))
    }
}

impl CustomOp1 for UseOf {
    fn name(&self) -> &'static str {
        "shared_conv weight"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        Ok(Self::number())
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, _: &Tensor) -> Result<Option<Tensor>> {
        Ok(Some(self.gradients()?.0))
    }
}

impl CustomOp2 for UseOf {
    fn name(&self) -> &'static str {
        "shared_conv weight and bias"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        Ok(Self::number())
    }

    fn bwd(
        &self,
        weight: &Tensor,
        bias: &Tensor,
        _: &Tensor,
        _: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (dw, db) = self.gradients()?;
        Ok((weight.track_op().then_some(dw), bias.track_op().then_some(db)))
    }
}

/// One use of the shared weight.
struct Use {
    transformed: Arc<Transformed>,
    tiling: Tiling,
}

impl Use {
    fn images(&self, x: &[f32]) -> Images {
        let channels = self.transformed.inputs;
        Images { data: x.as_ptr(), image: self.tiling.height * self.tiling.width * channels, channels }
    }
}

impl CustomOp2 for Use {
    fn name(&self) -> &'static str {
        "shared_conv"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        lx: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let x = packed(x, lx)?;
        let Transformed { outputs, kernel, bias, .. } = &*self.transformed;
        let Tiling { batch, height, width, .. } = self.tiling;
        let level = Level::current();
        let filters = self.transformed.filters(level)?;
        let fill = |output: Shared| {
            let epilogue =
                winograd::Store { output, bias, height, width, channels: *outputs, kernel: *kernel };
            winograd::forward(level, &self.tiling, &[self.images(&x)], filters, epilogue);
        };
        // SAFETY: every pixel of the output is stored and none is read.
        let y = unsafe { crate::buffer::filled(batch * height * width * outputs, |y| on_pool(|| fill(y))) };
        let dims = lx.dims();
        Ok((CpuStorage::F32(y), [&dims[..dims.len() - 1], &[*outputs]].concat().into()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        token: &Tensor,
        _: &Tensor,
        d: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let Transformed { outputs, inputs, kernel, order, .. } = &*self.transformed;
        let Tiling { height, width, .. } = self.tiling;
        let level = Level::current();
        let parts = winograd::parts(&self.tiling, *inputs, *outputs);
        let mut sums = self.transformed.sums();
        if token.track_op() && !sums.iter().any(|sums| sums.filters.len() == parts) {
            let filters = Panels::zeroed_parts(parts, *inputs, order.len());
            sums.push(Sums { filters, bias: vec![0.; parts * order.len()] });
        }
        let sums = sums.iter_mut().find(|sums| token.track_op() && sums.filters.len() == parts);
        let (sums, bias) = sums.map(|sums| (&mut sums.filters[..], &mut sums.bias[..])).unzip();
        let mut dx = x.track_op().then(|| vec![0f32; x.elem_count()]);
        let transposed = x.track_op().then(|| self.transformed.transposed(level)).transpose()?;
        with_values(x, |x| {
            with_values(d, |gradient: &[f32]| {
                let images = self.images(x);
                let input = transposed.zip(dx.as_deref_mut()).map(|(filters, dx)| InputGradient {
                    filters,
                    data: Shared::new(dx),
                    image: images.image,
                });
                let mut sources = [Source { images, filters: sums, input }];
                let load = winograd::Load { gradient, height, width, channels: *outputs, kernel: *kernel };
                let vectors = order.len() / LANES;
                on_pool(|| {
                    winograd::backward(level, &self.tiling, vectors, load, &mut sources, parts, bias);
                });
                Ok(())
            })
        })?;
        let dx = dx.map(|dx| Tensor::from_vec(dx, x.shape(), &Device::Cpu)).transpose()?;
        let token = token.track_op().then(|| token.zeros_like()).transpose()?;
        Ok((dx, token))
    }
}
