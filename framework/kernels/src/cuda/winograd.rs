//! Convolutions with 3x3 filters in f32 by Winograd's F(4x4, 3x3), as on the CPU ([`crate::winograd`]): 2.25
//! multiplications per output instead of 9. cuDNN (9.26, planning for an H200) has no such engine. The
//! transforms are custom kernels; the matrix products use cuBLAS.

use super::arguments::{Filters, Tiles};
use super::failed;
use super::launch::launch;
use super::memory::{address, allocate};
use super::plan::{Key, Pass};
use super::sources::WINOGRAD;
use candle_core::cuda_backend::cudarc::cublas::{result, sys};
use candle_core::{CudaDevice, CudaStorage, DType, Result, bail};
use std::ops::Range;

/// Positions in the transformed domain.
const POSITIONS: usize = 36;
/// Outputs of a tile in each direction.
const OUT: usize = 4;
/// Maximum transformed values of images at a time, on both sides of the products: 64 MB, about a large
/// device's cache.
const MOST_VALUES: usize = 1 << 24;

/// A pass of a convolution. The gradient of the input is a convolution too, of the output's gradient with
/// rotated filters.
pub(crate) struct Winograd {
    pass: Pass,
    batch: usize,
    /// The images from which tiles of 6x6 are read.
    input: Images,
    /// The images that consist of tiles of 4x4.
    output: Images,
    weight: u64,
    /// Output channels of the weight, (outputs, 3, 3, inputs), in either direction.
    outputs: usize,
    inputs: usize,
}

/// Images or their gradient, channels last.
#[derive(Clone, Copy)]
struct Images {
    at: u64,
    height: usize,
    width: usize,
    channels: usize,
    /// Zeros before the first pixel that belong to the first tile.
    padding: usize,
}

/// One matrix per position, row by row.
struct Matrices {
    storage: CudaStorage,
    rows: usize,
    columns: usize,
}

/// A factor of a product: plain or transposed.
enum Factor<'a> {
    Plain(&'a Matrices),
    Transposed(&'a Matrices),
}

impl Winograd {
    /// A pass over x, w and y, or `None` if this algorithm cannot compute it.
    pub(crate) fn new(key: &Key, [x, w, y]: [u64; 3]) -> Option<Winograd> {
        let g = &key.g;
        let is_3x3 = (g.kernel_height, g.kernel_width) == (3, 3) && g.padding <= 2;
        let is_plain = (g.stride, g.dilation, g.groups) == (1, 1, 1);
        let is_whole = key.dtype == DType::F32 && !key.tf32;
        // Weight gradients that accumulate over several calls are left to cuDNN.
        if !is_3x3 || !is_plain || !is_whole || key.add || g.batch == 0 {
            return None;
        }
        let x = Images { at: x, height: g.height, width: g.width, channels: g.inputs, padding: 0 };
        let y = Images { at: y, height: g.out_height, width: g.out_width, channels: g.outputs, padding: 0 };
        let (input, output) = match key.pass {
            Pass::Forward | Pass::BackwardFilter => (Images { padding: g.padding, ..x }, y),
            Pass::BackwardData => (Images { padding: 2 - g.padding, ..y }, x),
        };
        let (batch, outputs, inputs) = (g.batch, g.outputs, g.inputs);
        let it = Winograd { pass: key.pass, batch, input, output, weight: w, outputs, inputs };
        (it.values_of_an_image() <= MOST_VALUES).then_some(it)
    }

    /// Whether this is likely to be faster than the direct sum. With few channels on one side, or few tiles,
    /// the transforms take as long as the products that they save, at a device's typical rates (some 50
    /// TFLOP/s in f32, 4 TB/s).
    pub(crate) fn is_worth_it(&self) -> bool {
        let [down, across] = self.tiling();
        self.outputs * self.inputs >= 24 * (self.outputs + self.inputs) && self.batch * down * across >= 32
    }

    /// Computes the pass.
    ///
    /// # Safety
    /// The addresses point to memory of this device, as large as the key's geometry says.
    pub(crate) unsafe fn compute(&self, device: &CudaDevice) -> Result<()> {
        let filters = Matrices::new(device, self.outputs, self.inputs)?;
        // SAFETY: guaranteed by the caller; memory for the transforms has been allocated for them.
        unsafe {
            match self.pass {
                Pass::Forward => self.convolve(device, &filters, false)?,
                Pass::BackwardData => self.convolve(device, &filters, true)?,
                Pass::BackwardFilter => self.filter_gradient(device, &filters)?,
            }
        }
        Ok(())
    }

    /// Computes the output, in the forward or backward direction.
    ///
    /// # Safety
    /// Same as for [`compute`](Self::compute).
    unsafe fn convolve(&self, device: &CudaDevice, filters: &Matrices, back: bool) -> Result<()> {
        // SAFETY: guaranteed by the caller.
        unsafe { self.transform_filters(device, "winograd_filter", filters, back)? };
        // In the backward direction, outputs act as inputs.
        let by = if back { Factor::Plain(filters) } else { Factor::Transposed(filters) };
        for part in self.parts() {
            let (input, output) = self.tiles(device, &part)?;
            // SAFETY: as above.
            unsafe { self.transform(device, "winograd_input", &self.input, &part, &input)? };
            multiply(device, &Factor::Plain(&input), &by, &output, false)?;
            // SAFETY: as above.
            unsafe { self.transform(device, "winograd_output", &self.output, &part, &output)? };
        }
        Ok(())
    }

    /// Computes the weight gradient; `output` is the output's gradient.
    ///
    /// # Safety
    /// Same as for [`compute`](Self::compute).
    unsafe fn filter_gradient(&self, device: &CudaDevice, filters: &Matrices) -> Result<()> {
        for part in self.parts() {
            let (input, output) = self.tiles(device, &part)?;
            // SAFETY: guaranteed by the caller.
            unsafe {
                self.transform(device, "winograd_input", &self.input, &part, &input)?;
                self.transform(device, "winograd_output_adjoint", &self.output, &part, &output)?;
            }
            multiply(device, &Factor::Transposed(&output), &Factor::Plain(&input), filters, part.start > 0)?;
        }
        // SAFETY: as above.
        unsafe { self.transform_filters(device, "winograd_filter_adjoint", filters, false) }
    }

    /// Tiles per image: down and across.
    fn tiling(&self) -> [usize; 2] {
        [self.output.height.div_ceil(OUT), self.output.width.div_ceil(OUT)]
    }

    /// Transformed values per image, on both sides.
    fn values_of_an_image(&self) -> usize {
        let [down, across] = self.tiling();
        POSITIONS * down * across * (self.input.channels + self.output.channels)
    }

    /// The ranges of images to transform at a time, as equal in length as possible.
    fn parts(&self) -> impl Iterator<Item = Range<usize>> + use<> {
        let most = MOST_VALUES / self.values_of_an_image();
        let (batch, images) = (self.batch, self.batch.div_ceil(self.batch.div_ceil(most)));
        (0..batch).step_by(images).map(move |first| first..batch.min(first + images))
    }

    /// Memory for the tiles of some images, on both sides.
    fn tiles(&self, device: &CudaDevice, images: &Range<usize>) -> Result<(Matrices, Matrices)> {
        let [down, across] = self.tiling();
        let of = |side: &Images| Matrices::new(device, images.len() * down * across, side.channels);
        Ok((of(&self.input)?, of(&self.output)?))
    }

    /// Transforms some images to their tiles, or back.
    ///
    /// # Safety
    /// Same as for [`compute`](Self::compute); the tiles belong to these images.
    unsafe fn transform(
        &self,
        device: &CudaDevice,
        kernel: &str,
        all: &Images,
        images: &Range<usize>,
        tiles: &Matrices,
    ) -> Result<()> {
        let ([down, across], count) = (self.tiling(), tiles.rows * tiles.columns);
        let before = images.start * all.height * all.width * all.channels * size_of::<f32>();
        let arguments = Tiles {
            images: all.at + before as u64,
            transformed: address(&tiles.storage)?,
            count: count as u32,
            height: all.height as u32,
            width: all.width as u32,
            channels: all.channels as u32,
            down: down as u32,
            across: across as u32,
            padding: all.padding as u32,
        };
        // SAFETY: guaranteed by the caller.
        unsafe { launch(device, &WINOGRAD, kernel, count, arguments) }
    }

    /// Transforms the weight, rotated if `turned`, or transforms back to the weight.
    ///
    /// # Safety
    /// Same as for [`compute`](Self::compute).
    unsafe fn transform_filters(
        &self,
        device: &CudaDevice,
        kernel: &str,
        filters: &Matrices,
        turned: bool,
    ) -> Result<()> {
        let arguments = Filters {
            weight: self.weight,
            transformed: address(&filters.storage)?,
            outputs: self.outputs as u32,
            inputs: self.inputs as u32,
            turned: turned.into(),
        };
        // SAFETY: guaranteed by the caller.
        unsafe { launch(device, &WINOGRAD, kernel, self.outputs * self.inputs, arguments) }
    }
}

impl Matrices {
    fn new(device: &CudaDevice, rows: usize, columns: usize) -> Result<Matrices> {
        let storage = allocate(device, POSITIONS * rows * columns, DType::F32, false)?;
        Ok(Matrices { storage, rows, columns })
    }
}

impl Factor<'_> {
    fn matrices(&self) -> &Matrices {
        match self {
            Factor::Plain(it) | Factor::Transposed(it) => it,
        }
    }

    /// Rows and columns as used in the product.
    fn sizes(&self) -> [usize; 2] {
        match self {
            Factor::Plain(it) => [it.rows, it.columns],
            Factor::Transposed(it) => [it.columns, it.rows],
        }
    }

    fn operation(&self) -> sys::cublasOperation_t {
        match self {
            Factor::Plain(_) => sys::cublasOperation_t::CUBLAS_OP_N,
            Factor::Transposed(_) => sys::cublasOperation_t::CUBLAS_OP_T,
        }
    }
}

/// `to` = `a` times `b` at each position, overwritten or added to.
fn multiply(device: &CudaDevice, a: &Factor, b: &Factor, to: &Matrices, add: bool) -> Result<()> {
    let ([rows, inner], [inner_of_b, columns]) = (a.sizes(), b.sizes());
    if inner != inner_of_b || [rows, columns] != [to.rows, to.columns] {
        bail!("winograd: {rows}x{inner} by {inner_of_b}x{columns} to {}x{}", to.rows, to.columns);
    }
    // The start address, and the strides from row to row and from matrix to matrix.
    let place = |it: &Matrices| {
        Ok::<_, candle_core::Error>((address(&it.storage)?, it.columns as i32, (it.rows * it.columns) as i64))
    };
    let (a_place, b_place, to_place) = (place(a.matrices())?, place(b.matrices())?, place(to)?);
    let (alpha, beta) = (1f32, if add { 1f32 } else { 0. });
    let (blas, float) = (device.cublas_handle(), sys::cudaDataType_t::CUDA_R_32F);
    device.cuda_stream().context().bind_to_thread().map_err(failed("CUDA context"))?;
    // SAFETY: the sizes have been checked to fit, and the memory on this device was allocated for them.
    // cuBLAS is column-major: it sees all three matrices transposed, so it multiplies `b` by `a`.
    let asked = unsafe {
        result::gemm_strided_batched_ex(
            *blas.handle(),
            b.operation(),
            a.operation(),
            columns as i32,
            rows as i32,
            inner as i32,
            (&raw const alpha).cast(),
            b_place.0 as *const _,
            float,
            b_place.1,
            b_place.2,
            a_place.0 as *const _,
            float,
            a_place.1,
            a_place.2,
            (&raw const beta).cast(),
            to_place.0 as *mut _,
            float,
            to_place.1,
            to_place.2,
            POSITIONS as i32,
            sys::cublasComputeType_t::CUBLAS_COMPUTE_32F,
            sys::cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT,
        )
    };
    asked.map_err(failed("cuBLAS"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::direct::Geometry;

    fn key([batch, size, inputs, outputs]: [usize; 4]) -> Key {
        let g = Geometry::of_3x3(batch, size, inputs, outputs);
        Key { g, pass: Pass::Forward, add: false, dtype: DType::F32, alignments: [16; 3], tf32: false }
    }

    #[test]
    fn is_for_the_tutorial_s_cells_and_not_for_what_is_small() {
        for pass in [Pass::Forward, Pass::BackwardData, Pass::BackwardFilter] {
            let worth =
                |sizes| Winograd::new(&Key { pass, ..key(sizes) }, [0; 3]).is_some_and(|it| it.is_worth_it());
            for inputs in [64, 72, 128] {
                assert!(worth([16, 64, inputs, 256]), "{pass:?}, {inputs}");
            }
            // The layer that produces frames, the first step's x, and few tiles.
            assert!(
                !worth([160, 64, 64, 1]) && !worth([16, 64, 8, 256]) && !worth([1, 16, 128, 256]),
                "{pass:?}"
            );
        }
        // Four images of 3.5 million values each at a time; ranges as equal in length as possible.
        let parts: Vec<_> = Winograd::new(&key([18, 64, 128, 256]), [0; 3]).unwrap().parts().collect();
        assert_eq!(parts, [0..4, 4..8, 8..12, 12..16, 16..18]);
    }

    #[test]
    fn is_not_for_other_convolutions_types_and_sums() {
        let plain = key([16, 64, 64, 256]);
        let g = plain.g;
        for g in [
            Geometry { kernel_width: 5, ..g },
            Geometry { stride: 2, ..g },
            Geometry { dilation: 2, ..g },
            Geometry { groups: 2, ..g },
            Geometry { padding: 3, ..g },
        ] {
            assert!(Winograd::new(&Key { g, ..plain }, [0; 3]).is_none(), "{g:?}");
        }
        for key in [
            Key { dtype: DType::BF16, ..plain },
            Key { tf32: true, ..plain },
            Key { add: true, ..plain },
            key([1, 512, 64, 64]),
        ] {
            assert!(Winograd::new(&key, [0; 3]).is_none(), "{key:?}");
        }
    }
}
