//! Normalisation on a device, with an optional activation, as one op. Statistics and their sums stay on the
//! device.

use super::arguments::{
    self as arguments, AddParts, ChannelGradients, ChannelSums, GroupGradients, Sizes, Statistics, Tables,
    ValueGradients,
};
use super::launch::{check_count, launch, type_name};
use super::memory::{address, address_of, aligned, allocate, at, tensor};
use super::sources::NORMALIZE;
use crate::normalize::{Normalized, Over};
use crate::pointwise::Activation;
use crate::tensors::tracked;
use candle_core::backend::BackendStorage;
use candle_core::{
    CpuStorage, CudaDevice, CudaStorage, CustomOp3, D, DType, Layout, Result, Shape, Tensor, bail,
};

/// [`normalize`](crate::normalize()) on a device, for checked shapes: x has a dtype that convolves, weight
/// and bias are f32.
pub(crate) fn normalize(
    x: &Tensor,
    over: Over,
    weight: &Tensor,
    bias: &Tensor,
    eps: f64,
    then: Option<Activation>,
) -> Result<Normalized> {
    let (batch, pixels, channels) = x.dims3()?;
    let (samples, pixels, groups) = match over {
        Over::Batch => (1, batch * pixels, channels),
        Over::Groups(groups) => (batch, pixels, groups),
    };
    let sizes = [samples, pixels, channels, groups].map(|n| n as u32);
    run(x, sizes, WeightOf::Channel, [weight, bias], eps, then)
}

/// [`SharedNorm`](crate::SharedNorm) on a device: x is (B, ..), weight and bias are (..), all f32.
pub(crate) fn normalize_states(x: &Tensor, weight: &Tensor, bias: &Tensor, eps: f64) -> Result<Tensor> {
    let channels = x.dim(D::Minus1)?;
    let pixels = weight.elem_count() / channels;
    let sizes = [x.dim(0)?, pixels, channels, 1].map(|n| n as u32);
    Ok(run(x, sizes, WeightOf::Value, [weight, bias], eps, None)?.y)
}

/// What each weight and bias applies to.
#[derive(Clone, Copy, PartialEq)]
enum WeightOf {
    Channel,
    /// Each value of a sample.
    Value,
}

fn run(
    x: &Tensor,
    [samples, pixels, channels, groups]: [u32; 4],
    weight_of: WeightOf,
    [weight, bias]: [&Tensor; 2],
    eps: f64,
    then: Option<Activation>,
) -> Result<Normalized> {
    let device = x.device().as_cuda_device()?;
    check_count("normalize", x.elem_count())?;
    let (x, weight, bias) = (aligned(x)?, aligned(weight)?, aligned(bias)?);
    let sizes = Sizes { samples, pixels, channels, groups };
    let rows = Rows { sizes, dtype: x.dtype() };
    let groups = (samples * groups) as usize;
    let wide = || Ok::<_, candle_core::Error>(tensor(allocate(device, groups, DType::F64, false)?, groups));
    let (means, variances) = (wide()?, wide()?);
    let [narrow_means, scales] = [rows.table(device)?, rows.table(device)?];
    let sums = rows.sums(device, at(&x)?, None)?;
    let arguments = Statistics {
        sums: address(&sums)?,
        means: at(&means)?,
        variances: at(&variances)?,
        narrow_means: at(&narrow_means)?,
        scales: at(&scales)?,
        sizes,
        eps,
    };
    // SAFETY: sums are (samples, 2, channels); everything else is as large as the sizes say.
    unsafe { launch(device, &NORMALIZE, "statistics", groups, arguments)? };
    let op = Normalize { rows, weight_of, then, means: narrow_means, scales };
    let y = match [&x, &weight, &bias].into_iter().any(tracked) {
        true => x.apply_op3(&weight, &bias, op)?,
        false => x.apply_op3_no_bwd(&weight, &bias, &op)?,
    };
    let count = x.elem_count() / groups;
    Ok(Normalized { y, means, variances, count })
}

/// The sizes of a tensor to normalise, and its dtype.
#[derive(Clone, Copy)]
struct Rows {
    sizes: Sizes,
    dtype: DType,
}

impl Rows {
    /// Memory for one number for each channel of each sample.
    fn table(&self, device: &CudaDevice) -> Result<Tensor> {
        let len = self.sizes.samples as usize * self.sizes.channels as usize;
        Ok(tensor(allocate(device, len, DType::F32, false)?, len))
    }

    /// The name of a kernel for this dtype and number of values per thread, and that number.
    fn kernel(&self, name: &str) -> Result<(String, usize)> {
        let at_once = if self.sizes.channels.is_multiple_of(4) { 4 } else { 1 };
        Ok((format!("{name}_{}_{at_once}", type_name(self.dtype)?), at_once))
    }

    /// Two sums for each channel of each sample, (samples, 2, channels) in 64 bits: of x and its square or,
    /// if there are gradients, the sums of them that the backward pass needs.
    fn sums(&self, device: &CudaDevice, x: u64, back: Option<(u64, Tables)>) -> Result<CudaStorage> {
        /// Pixels that a thread adds up in 32 bits.
        const STRETCH: usize = 32;
        /// Parts that a thread adds up.
        const EACH: usize = 32;
        const NOTHING: Tables =
            Tables { means: 0, scales: 0, weight: 0, bias: 0, stride: 0, then: 0, slope: 0. };
        let Sizes { samples, pixels, channels, .. } = self.sizes;
        let (samples, columns) = (samples as usize, 2 * channels as usize);
        let mut parts = (pixels as usize).div_ceil(STRETCH);
        let room = |parts: usize| allocate(device, samples * parts * columns, DType::F64, false);
        let mut sums = room(parts)?;
        let (dy, tables) = back.unwrap_or((0, NOTHING));
        let arguments = ChannelSums {
            x,
            dy,
            tables,
            sizes: self.sizes,
            sums: address(&sums)?,
            stretch: STRETCH as u32,
            parts: parts as u32,
        };
        let (kernel, at_once) = self.kernel("channel_sums")?;
        let threads = samples * parts * channels as usize / at_once;
        // SAFETY: x, and dy if present, have these sizes, and the sums have a place for each part.
        unsafe { launch(device, &NORMALIZE, &kernel, threads, arguments)? };
        while parts > 1 {
            let fewer = parts.div_ceil(EACH);
            let to = room(fewer)?;
            let arguments = AddParts {
                from: address(&sums)?,
                to: address(&to)?,
                samples: samples as u32,
                parts: parts as u32,
                columns: columns as u32,
                fewer: fewer as u32,
            };
            // SAFETY: these are (samples, parts, columns) and (samples, fewer, columns).
            unsafe { launch(device, &NORMALIZE, "add_parts", samples * fewer * columns, arguments)? };
            (sums, parts) = (to, fewer);
        }
        Ok(sums)
    }

    /// Computes every value or, given gradients and the terms to subtract from them, every gradient.
    fn run(
        &self,
        device: &CudaDevice,
        x: u64,
        tables: Tables,
        [dy, shifts, tilts]: [u64; 3],
    ) -> Result<CudaStorage> {
        let Sizes { samples, pixels, channels, .. } = self.sizes;
        let count = samples as usize * pixels as usize * channels as usize;
        let to = allocate(device, count, self.dtype, false)?;
        let arguments =
            arguments::Normalize { x, dy, to: address(&to)?, tables, shifts, tilts, sizes: self.sizes };
        let (kernel, at_once) = self.kernel("normalize")?;
        // SAFETY: x, the result, and dy if present, have these sizes; tables have one number for each channel
        // of each sample.
        unsafe { launch(device, &NORMALIZE, &kernel, count / at_once, arguments)? };
        Ok(to)
    }
}

/// The op, once the statistics are known; they are stored for each channel of each sample, as those of its
/// group.
struct Normalize {
    rows: Rows,
    weight_of: WeightOf,
    then: Option<Activation>,
    means: Tensor,
    scales: Tensor,
}

impl Normalize {
    fn tables(&self, weight: u64, bias: u64) -> Result<Tables> {
        let (then, slope) = match self.then {
            None => (0, 0.),
            Some(Activation::Silu) => (1, 0.),
            Some(Activation::Gelu) => (2, 0.),
            Some(Activation::LeakyRelu(slope)) => (3, slope),
        };
        let stride = match self.weight_of {
            WeightOf::Channel => 0,
            WeightOf::Value => self.rows.sizes.channels,
        };
        Ok(Tables { means: at(&self.means)?, scales: at(&self.scales)?, weight, bias, stride, then, slope })
    }
}

impl CustomOp3 for Normalize {
    fn name(&self) -> &'static str {
        "normalize"
    }

    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        bail!("normalize: expected tensors on one CUDA device")
    }

    fn cuda_fwd(
        &self,
        x: &CudaStorage,
        lx: &Layout,
        weight: &CudaStorage,
        lw: &Layout,
        bias: &CudaStorage,
        lb: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let tables = self.tables(address_of(weight, lw)?, address_of(bias, lb)?)?;
        Ok((self.rows.run(x.device(), address_of(x, lx)?, tables, [0; 3])?, lx.shape().clone()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        weight: &Tensor,
        bias: &Tensor,
        _: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let (device, rows) = (x.device().as_cuda_device()?, self.rows);
        let dy = aligned(&dy.to_dtype(rows.dtype)?)?;
        let tables = self.tables(at(weight)?, at(bias)?)?;
        let sums = rows.sums(device, at(x)?, Some((at(&dy)?, tables)))?;
        let [shifts, tilts] = [rows.table(device)?, rows.table(device)?];
        let Sizes { samples, channels, groups, .. } = rows.sizes;
        let of_groups = GroupGradients {
            sums: address(&sums)?,
            weight: if self.weight_of == WeightOf::Channel { tables.weight } else { 0 },
            scales: tables.scales,
            shifts: at(&shifts)?,
            tilts: at(&tilts)?,
            sizes: rows.sizes,
        };
        let like = |parameter: &Tensor| {
            let room = allocate(device, parameter.elem_count(), DType::F32, false)?;
            Ok::<_, candle_core::Error>(tensor(room, parameter.shape()))
        };
        let (d_weight, d_bias) = (like(weight)?, like(bias)?);
        let to = (at(&d_weight)?, at(&d_bias)?);
        // SAFETY: sums are (samples, 2, channels), tables are (samples, channels), and the gradients are as
        // large as weight and bias.
        unsafe {
            launch(device, &NORMALIZE, "group_gradients", samples as usize * groups as usize, of_groups)?;
            match self.weight_of {
                WeightOf::Channel => {
                    let (d_weight, d_bias) = to;
                    let a = ChannelGradients { sums: address(&sums)?, d_weight, d_bias, samples, channels };
                    launch(device, &NORMALIZE, "channel_gradients", channels as usize, a)?;
                }
                WeightOf::Value => {
                    let (x, dy, (d_weight, d_bias)) = (at(x)?, at(&dy)?, to);
                    let a = ValueGradients { x, dy, tables, d_weight, d_bias, sizes: rows.sizes };
                    let (kernel, at_once) = rows.kernel("value_gradients")?;
                    launch(device, &NORMALIZE, &kernel, weight.elem_count() / at_once, a)?;
                }
            }
        }
        let of_x = || rows.run(device, at(x)?, tables, [at(&dy)?, at(&shifts)?, at(&tilts)?]);
        let dx = x.track_op().then(of_x).transpose()?.map(|dx| tensor(dx, x.shape()));
        let tracked = |parameter: &Tensor, gradient| parameter.track_op().then_some(gradient);
        Ok((dx, tracked(weight, d_weight), tracked(bias, d_bias)))
    }
}
