//! Depthwise convolutions with stride 1, by custom kernels. For many of them cuDNN only has its plainest engine,
//! or pads each channel to a group of eight.

use super::arguments::{AddTaps, Depthwise as Arguments, PackTaps, TapSums, Window};
use super::launch::{launch, type_name};
use super::memory::{address, allocate};
use super::plan::{Key, Pass};
use super::sources::DEPTHWISE;
use crate::direct::Geometry;
use candle_core::{CudaDevice, DType, Result};

/// Output pixels per thread, as in the source.
const PIXELS: usize = 4;
/// Threads among which the sums of a weight's gradient are divided: about as many as a large device holds.
const MANY: usize = 1 << 17;

/// A pass of a depthwise convolution. The gradient of the input is one too, of the output's gradient with rotated
/// filters.
pub(crate) struct Depthwise {
    pass: Pass,
    g: Geometry,
    dtype: DType,
    add: bool,
    /// Addresses of x, w (channels, taps) and y.
    places: [u64; 3],
}

impl Depthwise {
    /// A pass over x, w and y, or `None` if these kernels cannot compute it.
    pub(crate) fn new(key: &Key, places: [u64; 3]) -> Option<Depthwise> {
        let Key { g, pass, add, dtype, .. } = *key;
        let is_depthwise = g.groups > 1 && g.groups == g.inputs && g.groups == g.outputs;
        let is_plain = g.stride == 1 && (pass == Pass::BackwardFilter || !add);
        (is_depthwise && is_plain && g.batch > 0).then_some(Depthwise { pass, g, dtype, add, places })
    }

    /// Computes the pass.
    ///
    /// # Safety
    /// The addresses point to memory of this device, as large as the key's geometry says.
    pub(crate) unsafe fn compute(&self, device: &CudaDevice) -> Result<()> {
        let [x, _, y] = self.places;
        // SAFETY: guaranteed by the caller.
        unsafe {
            match self.pass {
                Pass::Forward => self.convolve(device, x, y, self.window(), false),
                Pass::BackwardData => self.convolve(device, y, x, self.reverse_window(), true),
                Pass::BackwardFilter => self.filter_gradient(device),
            }
        }
    }

    /// The window of an output pixel.
    fn window(&self) -> Window {
        let g = &self.g;
        Window {
            height: g.height as u32,
            width: g.width as u32,
            to_height: g.out_height as u32,
            to_width: g.out_width as u32,
            channels: g.groups as u32,
            kernel_height: g.kernel_height as u32,
            kernel_width: g.kernel_width as u32,
            dilation: g.dilation as u32,
            above: -(g.padding as i32),
            left: -(g.padding as i32),
        }
    }

    /// The window of output pixels that an input pixel belongs to.
    fn reverse_window(&self) -> Window {
        let g = &self.g;
        let before = |kernel: usize| g.padding as i32 - (g.dilation * (kernel - 1)) as i32;
        Window {
            height: g.out_height as u32,
            width: g.out_width as u32,
            to_height: g.height as u32,
            to_width: g.width as u32,
            above: before(g.kernel_height),
            left: before(g.kernel_width),
            ..self.window()
        }
    }

    fn taps(&self) -> usize {
        self.g.kernel_height * self.g.kernel_width
    }

    /// Channels per thread: four if all addresses allow it.
    fn at_once(&self) -> usize {
        let four = 4 * self.dtype.size_in_bytes() as u64;
        let [x, _, y] = self.places;
        if self.g.groups.is_multiple_of(4) && [x, y].iter().all(|at| at.is_multiple_of(four)) { 4 } else { 1 }
    }

    /// # Safety
    /// Same as for [`compute`](Self::compute); `window` fits the images.
    unsafe fn convolve(
        &self,
        device: &CudaDevice,
        from: u64,
        to: u64,
        window: Window,
        rotated: bool,
    ) -> Result<()> {
        let (name, channels, taps) = (type_name(self.dtype)?, self.g.groups, self.taps());
        let packed = allocate(device, taps * channels, DType::F32, false)?;
        let pack = PackTaps {
            weight: self.places[1],
            taps: address(&packed)?,
            channels: channels as u32,
            count: taps as u32,
            rotated: u32::from(rotated),
        };
        // SAFETY: the weight is (channels, taps), and there is room for as many packed values.
        unsafe { launch(device, &DEPTHWISE, &format!("pack_taps_{name}"), taps * channels, pack)? };
        let rows = self.g.batch * window.to_height as usize;
        let arguments = Arguments { from, taps: pack.taps, to, window, rows: rows as u32 };
        let at_once = self.at_once();
        let count = rows * (window.to_width as usize).div_ceil(PIXELS) * (channels / at_once);
        // SAFETY: guaranteed by the caller.
        unsafe { launch(device, &DEPTHWISE, &format!("depthwise_{name}_{at_once}"), count, arguments) }
    }

    /// # Safety
    /// Same as for [`compute`](Self::compute).
    unsafe fn filter_gradient(&self, device: &CudaDevice) -> Result<()> {
        let (name, channels, taps) = (type_name(self.dtype)?, self.g.groups, self.taps());
        let ([x, gradient, dy], at_once) = (self.places, self.at_once());
        let rows = self.g.batch * self.g.out_height;
        let stretch = rows.div_ceil((MANY / (taps * channels / at_once)).clamp(1, rows));
        let parts = rows.div_ceil(stretch);
        let sums = allocate(device, parts * taps * channels, DType::F32, false)?;
        let arguments = TapSums {
            x,
            dy,
            sums: address(&sums)?,
            window: self.window(),
            rows: rows as u32,
            stretch: stretch as u32,
            parts: parts as u32,
        };
        let count = parts * taps * (channels / at_once);
        // SAFETY: guaranteed by the caller; there is room for the sums.
        unsafe { launch(device, &DEPTHWISE, &format!("tap_sums_{name}_{at_once}"), count, arguments)? };
        let add = AddTaps {
            sums: arguments.sums,
            gradient,
            channels: channels as u32,
            count: taps as u32,
            parts: parts as u32,
            add: u32::from(self.add),
        };
        // SAFETY: as above; the gradient is (channels, taps).
        unsafe { launch(device, &DEPTHWISE, &format!("add_taps_{name}"), taps * channels, add) }
    }
}
