//! Pictures of videos: tensors (C, H, W) with values in `[0, 1]`, where C is 1 (gray) or 3 (red, green,
//! blue).

use std::ops::Range;
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use image::{ExtendedColorType, ImageEncoder, codecs::png::PngEncoder};

use crate::atomic_file::write_atomic;
use crate::error::{Error, Result};

/// Small frames are magnified until their longer side has at least this many pixels.
const LEAST_SIDE: usize = 64;
/// Pixels between two frames.
const GAP: usize = 2;
const GAP_SHADE: f32 = 0.25;
/// Pixels between input and prediction, and between samples; the middle third is a white line.
const RULE: usize = 6;

/// Draws predictions next to targets for the first `max_samples` samples (at least one) of the batch, in
/// three rows per sample: input and prediction; input and target; and, below the predicted frames, their
/// squared errors.
///
/// `input` is (B, T_in, C, H, W), `prediction` and `target` are (B, T_out, C, H, W), with C 1 or 3, of any
/// float dtype and on any device. Small frames are magnified by an integer factor; a white line separates
/// input from prediction.
pub fn video_grid(
    input: &Tensor,
    prediction: &Tensor,
    target: &Tensor,
    max_samples: usize,
) -> Result<Tensor> {
    let (input, prediction) = Frames::before_and_after(input, prediction)?;
    let target = Frames::new(target)?;
    if (target.samples, target.times, target.shape())
        != (prediction.samples, prediction.times, prediction.shape())
    {
        return Err(Error::msg("a picture needs a target of the same shape as the prediction"));
    }
    let samples = input.samples.min(max_samples.max(1));
    let mut grid = Grid::new(&input, &prediction, samples, 3);
    let blank = vec![0.; input.frame(0, 0).len()];
    for sample in 0..samples {
        let row = 3 * sample;
        for time in 0..input.times {
            grid.draw(row, time, input.frame(sample, time));
            grid.draw(row + 1, time, input.frame(sample, time));
            grid.draw(row + 2, time, &blank);
        }
        for time in 0..prediction.times {
            let (predicted, came) = (prediction.frame(sample, time), target.frame(sample, time));
            let error: Vec<f32> = predicted.iter().zip(came).map(|(a, b)| (a - b).powi(2)).collect();
            let column = input.times + time;
            grid.draw(row, column, predicted);
            grid.draw(row + 1, column, came);
            grid.draw(row + 2, column, &error);
        }
    }
    grid.canvas.into_tensor()
}

/// Draws input and predicted frames in one row per sample, for the first `max_samples` samples of the batch.
/// Shapes and appearance are as in [`video_grid`].
pub fn video_rows(input: &Tensor, prediction: &Tensor, max_samples: usize) -> Result<Tensor> {
    let (input, prediction) = Frames::before_and_after(input, prediction)?;
    let samples = input.samples.min(max_samples.max(1));
    let mut grid = Grid::new(&input, &prediction, 1, samples);
    for sample in 0..samples {
        for column in 0..input.times + prediction.times {
            grid.draw(sample, column, Frames::in_turn(&input, &prediction, sample, column));
        }
    }
    grid.canvas.into_tensor()
}

/// Returns the picture's width, height and RGB bytes, row by row. Values outside `[0, 1]` are clipped.
pub fn to_rgb8(picture: &Tensor) -> Result<(u32, u32, Vec<u8>)> {
    let &[1 | 3, height, width] = picture.dims() else {
        return Err(Error::msg(format!(
            "a picture is a tensor (C, H, W) of 1 or 3 channels; this one is {:?}",
            picture.dims()
        )));
    };
    let rgb = picture.broadcast_as((3, height, width))?.permute((1, 2, 0))?;
    let bytes = values(&rgb)?.into_iter().map(to_byte).collect();
    let size = |pixels: usize| {
        u32::try_from(pixels).map_err(|_| Error::msg("a picture this large cannot be encoded"))
    };
    Ok((size(width)?, size(height)?, bytes))
}

/// Encodes the picture as a PNG file (8 bits, RGB).
pub fn png_bytes(picture: &Tensor) -> Result<Vec<u8>> {
    let (width, height, rgb) = to_rgb8(picture)?;
    let mut bytes = Vec::new();
    PngEncoder::new(&mut bytes)
        .write_image(&rgb, width, height, ExtendedColorType::Rgb8)
        .map_err(|error| Error::msg(format!("cannot encode a picture as PNG: {error}")))?;
    Ok(bytes)
}

/// Writes the picture to a PNG file atomically.
pub fn save_png(picture: &Tensor, path: &Path) -> Result<()> {
    write_atomic(path, &png_bytes(picture)?)
}

/// Converts a value in `[0, 1]` to a byte. Values outside are clipped; NaN becomes 0.
pub(crate) fn to_byte(value: f32) -> u8 {
    (value.clamp(0., 1.) * 255.).round() as u8
}

fn values(tensor: &Tensor) -> Result<Vec<f32>> {
    Ok(tensor.to_device(&Device::Cpu)?.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?)
}

/// The frames of a video (B, T, C, H, W) as f32 values on the CPU.
pub(crate) struct Frames {
    values: Vec<f32>,
    pub(crate) samples: usize,
    pub(crate) times: usize,
    pub(crate) channels: usize,
    pub(crate) height: usize,
    pub(crate) width: usize,
}

impl Frames {
    fn new(video: &Tensor) -> Result<Self> {
        let refused = || {
            Error::msg(format!(
                "frames to draw are (B, T, C, H, W) with 1 or 3 channels and at least one pixel; these are {:?}",
                video.dims()
            ))
        };
        let &[samples, times, channels @ (1 | 3), height, width] = video.dims() else {
            return Err(refused());
        };
        if video.elem_count() == 0 {
            return Err(refused());
        }
        Ok(Self { values: values(video)?, samples, times, channels, height, width })
    }

    /// Input frames and the frames that follow them. Both must have the same samples and frame size.
    pub(crate) fn before_and_after(input: &Tensor, prediction: &Tensor) -> Result<(Self, Self)> {
        let (before, after) = (Self::new(input)?, Self::new(prediction)?);
        if (before.samples, before.shape()) != (after.samples, after.shape()) {
            return Err(Error::msg(format!(
                "input {:?} and prediction {:?} differ in samples or in the size of a frame",
                input.dims(),
                prediction.dims()
            )));
        }
        Ok((before, after))
    }

    /// The frame at `time`, counting through `before` and then `after`.
    pub(crate) fn in_turn<'a>(before: &'a Self, after: &'a Self, sample: usize, time: usize) -> &'a [f32] {
        match time.checked_sub(before.times) {
            None => before.frame(sample, time),
            Some(time) => after.frame(sample, time),
        }
    }

    fn shape(&self) -> [usize; 3] {
        [self.channels, self.height, self.width]
    }

    fn frame(&self, sample: usize, time: usize) -> &[f32] {
        let size = self.channels * self.height * self.width;
        let start = (sample * self.times + time) * size;
        &self.values[start..start + size]
    }
}

/// The smallest integer factor that makes `side` at least `least` pixels.
pub(crate) fn magnification(side: usize, least: usize) -> usize {
    least.div_ceil(side.max(1)).max(1)
}

/// Frames of equal size in rows and columns, with a thin gap between them and a white line between input and
/// prediction and between blocks of rows.
struct Grid {
    canvas: Canvas,
    layout: Layout,
    /// (height, width) of a frame in the video.
    frame: (usize, usize),
    factor: usize,
}

impl Grid {
    /// A grid of `blocks` blocks with `block` rows each, with a column per frame of `input` and then of
    /// `prediction`.
    fn new(input: &Frames, prediction: &Frames, blocks: usize, block: usize) -> Self {
        let frame = (input.height, input.width);
        let factor = magnification(frame.0.max(frame.1), LEAST_SIDE);
        let layout = Layout { cell: (factor * frame.0, factor * frame.1), inputs: input.times, block };
        let (rows, columns) = (blocks * block, input.times + prediction.times);
        let bottom = layout.y(rows - 1) + layout.cell.0;
        let right = layout.x(columns - 1) + layout.cell.1;
        let mut canvas = Canvas::new(input.channels, bottom, right, GAP_SHADE);
        let line_before = |cell: usize| cell - 2 * RULE / 3..cell - RULE / 3;
        canvas.fill(0..bottom, line_before(layout.x(input.times)), &[1.]);
        for row in (block..rows).step_by(block) {
            canvas.fill(line_before(layout.y(row)), 0..right, &[1.]);
        }
        Self { canvas, layout, frame, factor }
    }

    fn draw(&mut self, row: usize, column: usize, frame: &[f32]) {
        let (y, x) = (self.layout.y(row), self.layout.x(column));
        self.canvas.draw(y, x, frame, self.frame, self.factor);
    }
}

/// The positions of the cells of a [`Grid`].
struct Layout {
    /// (height, width) of a cell.
    cell: (usize, usize),
    /// Columns before the white line.
    inputs: usize,
    /// Rows between two white lines.
    block: usize,
}

impl Layout {
    fn y(&self, row: usize) -> usize {
        row * (self.cell.0 + GAP) + row / self.block * (RULE - GAP)
    }

    fn x(&self, column: usize) -> usize {
        let past_the_line = if column < self.inputs { 0 } else { RULE - GAP };
        column * (self.cell.1 + GAP) + past_the_line
    }
}

/// A picture being drawn, (C, H, W).
pub(crate) struct Canvas {
    values: Vec<f32>,
    channels: usize,
    height: usize,
    width: usize,
}

impl Canvas {
    pub(crate) fn new(channels: usize, height: usize, width: usize, shade: f32) -> Self {
        Self { values: vec![shade; channels * height * width], channels, height, width }
    }

    /// Fills a rectangle. `colour` has one value per channel, or one for all.
    pub(crate) fn fill(&mut self, rows: Range<usize>, columns: Range<usize>, colour: &[f32]) {
        for channel in 0..self.channels {
            for y in rows.clone() {
                let start = (channel * self.height + y) * self.width;
                self.values[start + columns.start..start + columns.end].fill(colour[channel % colour.len()]);
            }
        }
    }

    /// Draws a frame (C, height, width) magnified by `factor`, with its top left corner at (y, x). A gray
    /// frame fills all channels.
    pub(crate) fn draw(
        &mut self,
        y: usize,
        x: usize,
        frame: &[f32],
        (height, width): (usize, usize),
        factor: usize,
    ) {
        let planes: Vec<&[f32]> = frame.chunks_exact(height * width).collect();
        for channel in 0..self.channels {
            let plane = planes[channel % planes.len()];
            for row in 0..factor * height {
                let start = (channel * self.height + y + row) * self.width + x;
                let source = &plane[row / factor * width..][..width];
                let target = self.values[start..start + factor * width].chunks_exact_mut(factor);
                target.zip(source).for_each(|(target, &value)| target.fill(value));
            }
        }
    }

    pub(crate) fn into_tensor(self) -> Result<Tensor> {
        Ok(Tensor::from_vec(self.values, (self.channels, self.height, self.width), &Device::Cpu)?)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    /// Frames (samples, times, channels, 32, 32), each filled with one value, counting up from `first` in
    /// hundredths.
    fn flat(samples: usize, times: usize, channels: usize, first: usize) -> Tensor {
        let shades: Vec<f32> = (first..).take(samples * times).map(|i| i as f32 / 100.).collect();
        let shades = Tensor::from_vec(shades, (samples, times, 1, 1, 1), &Device::Cpu).unwrap();
        shades.broadcast_as((samples, times, channels, 32, 32)).unwrap().contiguous().unwrap()
    }

    fn pixel(picture: &Tensor, y: usize, x: usize) -> f32 {
        picture.get(0).unwrap().get(y).unwrap().get(x).unwrap().to_scalar().unwrap()
    }

    #[test]
    fn the_grid_shows_prediction_truth_and_error() {
        let (input, prediction, target) = (flat(3, 2, 1, 10), flat(3, 3, 1, 30), flat(3, 3, 1, 50));
        let grid = video_grid(&input, &prediction, &target, 2).unwrap();
        // Frames are magnified to 64. 2 + 3 columns and 3 + 3 rows, with gaps of 2, or 6 at a white line.
        assert_eq!(grid.dims(), [1, 6 * 64 + 4 * 2 + 6, 5 * 64 + 3 * 2 + 6]);
        let (rows, columns) = ([0, 66, 132, 202, 268, 334], [0, 66, 136, 202, 268]);
        let error = 0.2 * 0.2;
        let blank = 0.;
        let expected: [[f32; 5]; 6] = [
            [0.10, 0.11, 0.30, 0.31, 0.32],
            [0.10, 0.11, 0.50, 0.51, 0.52],
            [blank, blank, error, error, error],
            [0.12, 0.13, 0.33, 0.34, 0.35],
            [0.12, 0.13, 0.53, 0.54, 0.55],
            [blank, blank, error, error, error],
        ];
        for (y, shades) in rows.into_iter().zip(expected) {
            for (x, shade) in columns.into_iter().zip(shades) {
                for (y, x) in [(y, x), (y + 63, x + 63)] {
                    assert!(
                        (pixel(&grid, y, x) - shade).abs() < 1e-6,
                        "({y}, {x}) is {}",
                        pixel(&grid, y, x)
                    );
                }
            }
        }
        // The gaps next to a frame, and the white lines.
        assert_eq!([pixel(&grid, 0, 64), pixel(&grid, 64, 0)], [GAP_SHADE; 2]);
        assert_eq!(
            [130, 131, 132, 133, 134, 135].map(|x| pixel(&grid, 0, x)),
            [0.25, 0.25, 1., 1., 0.25, 0.25]
        );
        assert_eq!([197, 198, 199, 200].map(|y| pixel(&grid, y, 0)), [0.25, 1., 1., 0.25]);
    }

    #[test]
    fn a_row_a_sample() {
        let rows = video_rows(&flat(3, 1, 3, 10), &flat(3, 1, 3, 30), 8).unwrap();
        assert_eq!(rows.dims(), [3, 3 * 64 + 2 * 2, 64 + 6 + 64]);
        assert_eq!([0, 66, 132].map(|y| pixel(&rows, y, 0)), [0.10, 0.11, 0.12]);
        assert_eq!([0, 66, 132].map(|y| pixel(&rows, y, 70)), [0.30, 0.31, 0.32]);
        assert_eq!(pixel(&rows, 64, 0), GAP_SHADE);
    }

    #[test]
    fn magnifying_repeats_pixels() {
        let mut canvas = Canvas::new(3, 5, 5, 0.);
        canvas.draw(1, 0, &[0.1, 0.2, 0.3, 0.4], (2, 2), 2);
        let picture = canvas.into_tensor().unwrap();
        let expected = [
            [0., 0., 0., 0., 0.],
            [0.1, 0.1, 0.2, 0.2, 0.],
            [0.1, 0.1, 0.2, 0.2, 0.],
            [0.3, 0.3, 0.4, 0.4, 0.],
            [0.3, 0.3, 0.4, 0.4, 0.],
        ];
        assert_eq!(picture.to_vec3::<f32>().unwrap(), [expected; 3]);
        assert_eq!([(64, 64), (63, 64), (16, 64), (100, 64)].map(|(a, b)| magnification(a, b)), [1, 2, 4, 1]);
    }

    #[test]
    fn a_png_holds_the_picture() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("picture.png");
        let picture =
            Tensor::new(&[[[-1f32, 0.], [1., 3.]], [[0.2, 0.4], [0.6, 0.8]], [[0.5; 2]; 2]], &Device::Cpu);
        let picture = picture.unwrap();
        save_png(&picture, &path).unwrap();
        let read = image::open(&path).unwrap();
        let expected = vec![0, 51, 128, 0, 102, 128, 255, 153, 128, 255, 204, 128];
        assert_eq!((read.color(), read.to_rgb8().into_raw()), (image::ColorType::Rgb8, expected.clone()));
        assert_eq!(to_rgb8(&picture).unwrap(), (2, 2, expected));
        let names: Vec<_> =
            std::fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(names, ["picture.png"]);

        let gray = Tensor::new(&[[[0f64, 0.5, f64::NAN]]], &Device::Cpu).unwrap();
        assert_eq!(to_rgb8(&gray).unwrap(), (3, 1, vec![0, 0, 0, 128, 128, 128, 0, 0, 0]));
    }

    #[test]
    fn what_cannot_be_drawn_is_named() {
        let message = |result: Result<Tensor>| result.unwrap_err().to_string();
        assert_eq!(
            message(video_rows(&flat(1, 1, 2, 0), &flat(1, 1, 2, 0), 1)),
            "frames to draw are (B, T, C, H, W) with 1 or 3 channels and at least one pixel; \
             these are [1, 1, 2, 32, 32]"
        );
        assert_eq!(
            message(video_rows(&flat(1, 2, 1, 0), &flat(2, 1, 1, 0), 1)),
            "input [1, 2, 1, 32, 32] and prediction [2, 1, 1, 32, 32] differ in samples or in the size of a frame"
        );
        assert_eq!(
            message(video_grid(&flat(1, 2, 1, 0), &flat(1, 2, 1, 0), &flat(1, 3, 1, 0), 1)),
            "a picture needs a target of the same shape as the prediction"
        );
        assert_eq!(
            to_rgb8(&flat(1, 1, 1, 0)).unwrap_err().to_string(),
            "a picture is a tensor (C, H, W) of 1 or 3 channels; this one is [1, 1, 1, 32, 32]"
        );
    }
}
