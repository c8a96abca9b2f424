//! Convolutions by 3x3 filters in 32 bits, by Winograd's F(4x4, 3x3), as on the CPU ([`crate::winograd`]): 2.25 multiplications an
//! output instead of 9. cuDNN has no such engine. Transforms are kernels of our own, products of matrices cuBLAS's.

use super::arguments::{Filters, Tiles};
use super::failed;
use super::launch::launch;
use super::memory::{address, allocate};
use super::plan::{Key, Pass};
use super::sources::WINOGRAD;
use candle_core::cuda_backend::cudarc::cublas::{result, sys};
use candle_core::{CudaDevice, CudaStorage, DType, Result};

/// Positions in the transformed domain.
const POSITIONS: usize = 36;
/// Outputs of a tile in each direction.
const OUT: usize = 4;
/// Transformed values of images at once, those of both sides of the products: 64 MB, about what a large device's cache holds.
const MOST_VALUES: usize = 1 << 24;

/// A convolution, or what is one: the gradient of a convolution's input, of turned filters and the output's gradient.
pub(crate) struct Winograd {
    /// What its tiles of 6x6 are read of, with so many zeros around it.
    input: Images,
    padding: usize,
    /// What its tiles of 4x4 are of.
    output: Images,
    batch: usize,
    /// (outputs, 3, 3, inputs).
    weight: u64,
    filters: [usize; 2],
    pass: Pass,
    /// Whether the weight's gradient is added to what is there.
    add: bool,
}

/// Images, or their gradient, channels last.
#[derive(Clone, Copy)]
struct Images {
    at: u64,
    height: usize,
    width: usize,
    channels: usize,
}

/// 36 matrices, row after row, one behind the other.
struct Matrices {
    storage: CudaStorage,
    rows: usize,
    columns: usize,
}

/// A side of a product: as it lies, or transposed.
enum Side<'a> {
    Plain(&'a Matrices),
    Transposed(&'a Matrices),
}

impl Winograd {
    /// A pass over x, w and y, where it can be computed so.
    pub(crate) fn new(key: &Key, [x, w, y]: [u64; 3]) -> Option<Winograd> {
        let g = &key.g;
        let is_3x3 = (g.kernel_height, g.kernel_width) == (3, 3) && g.padding <= 2;
        let is_plain = (g.stride, g.dilation, g.groups) == (1, 1, 1);
        if key.dtype != DType::F32 || key.tf32 || !is_3x3 || !is_plain {
            return None;
        }
        let x = Images { at: x, height: g.height, width: g.width, channels: g.inputs };
        let y = Images { at: y, height: g.out_height, width: g.out_width, channels: g.outputs };
        let (input, padding, output) = match key.pass {
            Pass::Forward | Pass::BackwardFilter => (x, g.padding, y),
            Pass::BackwardData => (y, 2 - g.padding, x),
        };
        let filters = [g.outputs, g.inputs];
        let it = Winograd {
            input,
            padding,
            output,
            batch: g.batch,
            weight: w,
            filters,
            pass: key.pass,
            add: key.add,
        };
        (g.batch > 0 && it.values_of_an_image() <= MOST_VALUES).then_some(it)
    }

    /// Whether it is likely to be quicker than a sum by definition: with few channels on one side, by a device's rates (some 50
    /// TFLOP/s in 32 bits, 4 TB/s), the transforms take as long as the products that they save.
    pub(crate) fn is_worth_it(&self) -> bool {
        let [outputs, inputs] = self.filters;
        outputs * inputs >= 24 * (outputs + inputs)
    }

    /// Computes it.
    ///
    /// # Safety
    /// The addresses are of memory of this device, as large as the key's geometry says.
    pub(crate) unsafe fn compute(&self, device: &CudaDevice) -> Result<()> {
        let matrices = |rows: usize, columns: usize| {
            let storage = allocate(device, POSITIONS * rows * columns, DType::F32, false)?;
            Ok::<_, candle_core::Error>(Matrices { storage, rows, columns })
        };
        let [outputs, inputs] = self.filters;
        let filters = matrices(outputs, inputs)?;
        // SAFETY: the caller's promise; and what is transformed was made for it.
        unsafe {
            if self.pass != Pass::BackwardFilter {
                let turned = self.pass == Pass::BackwardData;
                self.transform_filters(device, "winograd_filter", &filters, turned)?;
            }
            let images = self.images_at_once();
            for first in (0..self.batch).step_by(images) {
                let (input, output) = (self.input.skip(first), self.output.skip(first));
                let tiles = images.min(self.batch - first) * self.tiles_of_an_image();
                let (of_input, of_output) =
                    (matrices(tiles, input.channels)?, matrices(tiles, output.channels)?);
                self.transform(device, "winograd_input", &input, self.padding, &of_input)?;
                let of_input = Side::Plain(&of_input);
                if self.pass == Pass::BackwardFilter {
                    self.transform(device, "winograd_output_adjoint", &output, 0, &of_output)?;
                    multiply(device, &Side::Transposed(&of_output), &of_input, &filters, first > 0)?;
                    continue;
                }
                let by = match self.pass {
                    Pass::BackwardData => Side::Plain(&filters),
                    _ => Side::Transposed(&filters),
                };
                multiply(device, &of_input, &by, &of_output, false)?;
                self.transform(device, "winograd_output", &output, 0, &of_output)?;
            }
            if self.pass == Pass::BackwardFilter {
                self.transform_filters(device, "winograd_filter_adjoint", &filters, self.add)?;
            }
        }
        Ok(())
    }

    fn tiles_of_an_image(&self) -> usize {
        self.output.height.div_ceil(OUT) * self.output.width.div_ceil(OUT)
    }

    /// Transformed, of both sides.
    fn values_of_an_image(&self) -> usize {
        POSITIONS * self.tiles_of_an_image() * (self.input.channels + self.output.channels)
    }

    /// Equally many each time, as far as they can be.
    fn images_at_once(&self) -> usize {
        let most = (MOST_VALUES / self.values_of_an_image()).max(1);
        self.batch.div_ceil(self.batch.div_ceil(most))
    }

    /// From or to tiles of images, whose first begins so far before the image.
    ///
    /// # Safety
    /// There are as many images as the matrices have tiles for.
    unsafe fn transform(
        &self,
        device: &CudaDevice,
        kernel: &str,
        images: &Images,
        padding: usize,
        tiles: &Matrices,
    ) -> Result<()> {
        let count = tiles.rows * tiles.columns;
        let arguments = Tiles {
            images: images.at,
            transformed: address(&tiles.storage)?,
            count: count as u32,
            height: images.height as u32,
            width: images.width as u32,
            channels: images.channels as u32,
            down: self.output.height.div_ceil(OUT) as u32,
            across: self.output.width.div_ceil(OUT) as u32,
            padding: padding as i32,
        };
        // SAFETY: the caller's promise.
        unsafe { launch(device, &WINOGRAD, kernel, count, arguments) }
    }

    /// From or to the weight. `other`: whether filters are turned, or whether their gradient is added.
    ///
    /// # Safety
    /// As for [`compute`](Self::compute).
    unsafe fn transform_filters(
        &self,
        device: &CudaDevice,
        kernel: &str,
        filters: &Matrices,
        other: bool,
    ) -> Result<()> {
        let [outputs, inputs] = self.filters;
        let arguments = Filters {
            weight: self.weight,
            transformed: address(&filters.storage)?,
            outputs: outputs as u32,
            inputs: inputs as u32,
            other: other.into(),
        };
        // SAFETY: the caller's promise.
        unsafe { launch(device, &WINOGRAD, kernel, outputs * inputs, arguments) }
    }
}

impl Images {
    /// From an image on.
    fn skip(self, images: usize) -> Images {
        let values = images * self.height * self.width * self.channels;
        Images { at: self.at + (values * size_of::<f32>()) as u64, ..self }
    }
}

impl Side<'_> {
    /// Rows and columns as they count in a product.
    fn sizes(&self) -> [usize; 2] {
        match self {
            Side::Plain(it) => [it.rows, it.columns],
            Side::Transposed(it) => [it.columns, it.rows],
        }
    }

    fn matrices(&self) -> &Matrices {
        match self {
            Side::Plain(it) | Side::Transposed(it) => it,
        }
    }

    /// Whether cuBLAS, which counts columns first, is to transpose it: it sees all three of a product transposed.
    fn operation(&self) -> sys::cublasOperation_t {
        match self {
            Side::Plain(_) => sys::cublasOperation_t::CUBLAS_OP_N,
            Side::Transposed(_) => sys::cublasOperation_t::CUBLAS_OP_T,
        }
    }
}

/// `to` = `a` times `b` at each position, put in its place or added to it.
fn multiply(device: &CudaDevice, a: &Side, b: &Side, to: &Matrices, add: bool) -> Result<()> {
    let ([rows, inner], [inner_of_b, columns]) = (a.sizes(), b.sizes());
    if inner != inner_of_b || [rows, columns] != [to.rows, to.columns] {
        candle_core::bail!(
            "winograd: {rows}x{inner} times {inner_of_b}x{columns} to {}x{}",
            to.rows,
            to.columns
        );
    }
    let at = |it: &Matrices| {
        Ok::<_, candle_core::Error>((address(&it.storage)?, it.columns as i32, (it.rows * it.columns) as i64))
    };
    let ((at_a, row_a, next_a), (at_b, row_b, next_b), (at_to, row_to, next_to)) =
        (at(a.matrices())?, at(b.matrices())?, at(to)?);
    let (one, others) = (1f32, if add { 1f32 } else { 0. });
    let blas = device.cublas_handle();
    device.cuda_stream().context().bind_to_thread().map_err(failed("CUDA context"))?;
    // SAFETY: three times 36 matrices of sizes that fit, in memory of this device that was made for them.
    let done = unsafe {
        // As what lies row after row, `b` times `a` of what lies column after column.
        result::gemm_strided_batched_ex(
            *blas.handle(),
            b.operation(),
            a.operation(),
            columns as i32,
            rows as i32,
            inner as i32,
            (&raw const one).cast(),
            at_b as *const _,
            sys::cudaDataType_t::CUDA_R_32F,
            row_b,
            next_b,
            at_a as *const _,
            sys::cudaDataType_t::CUDA_R_32F,
            row_a,
            next_a,
            (&raw const others).cast(),
            at_to as *mut _,
            sys::cudaDataType_t::CUDA_R_32F,
            row_to,
            next_to,
            POSITIONS as i32,
            // Not by TF32, whatever the setting is: who allows that does not come here.
            sys::cublasComputeType_t::CUBLAS_COMPUTE_32F,
            sys::cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT,
        )
    };
    done.map_err(failed("cuBLAS"))
}
