//! Animated `.gif` files.

use std::fs::File;
use std::io::{BufReader, ErrorKind};
use std::path::Path;

use candle_core::Tensor;
use gif::{ColorOutput, DecodeOptions, Decoder, DecodingError, DisposalMethod, Encoder, Frame, Repeat};

use super::{Pictures, SHOWN_SAMPLES};
use crate::error::{Error, Result};
use crate::picture::{self, Canvas, Frames};

/// Time per frame in hundredths of a second: about 8 frames per second.
const DELAY: u16 = 12;
/// Frames are magnified so their longer side has at least this many pixels.
const LEAST_SIDE: usize = 192;
/// Pixels around each sample: dark while it plays its input, bright while it plays its prediction.
const BORDER: usize = 4;
const INPUT_BORDER: [f32; 3] = [0.25; 3];
const PREDICTION_BORDER: [f32; 3] = [1., 0.55, 0.];
/// Number of samples per row.
const COLUMNS: usize = 4;

/// Reads the frames of a file, at most `limit`.
pub(super) fn read(path: &Path, limit: usize) -> Result<Pictures> {
    let mut options = DecodeOptions::new();
    options.set_color_output(ColorOutput::RGBA);
    // Refuse a frame that extends beyond the screen, instead of painting outside.
    options.check_frame_consistency(true);
    let mut decoder = open(path, options)?;
    let mut screen = Screen::new(decoder.width().into(), decoder.height().into());
    let mut frames = Vec::new();
    while frames.len() < limit {
        let Some(frame) = decoder.read_next_frame().map_err(unreadable(path))? else { break };
        let before = (frame.dispose == DisposalMethod::Previous).then(|| screen.pixels.clone());
        screen.paint(frame, |under, over| {
            if over[3] > 0 {
                under.copy_from_slice(&over[..3])
            }
        });
        frames.push(screen.pixels.clone());
        match (frame.dispose, before) {
            (_, Some(before)) => screen.pixels = before,
            (DisposalMethod::Background, _) => screen.paint(frame, |under, _| under.fill(0)),
            _ => {}
        }
    }
    Ok(Pictures { height: screen.height, width: screen.width, frames })
}

/// (rows, columns) of a file's frames.
pub(super) fn size(path: &Path) -> Result<[usize; 2]> {
    let decoder = open(path, DecodeOptions::new())?;
    Ok([decoder.height().into(), decoder.width().into()])
}

/// The number of frames in a file.
pub(super) fn count(path: &Path) -> Result<usize> {
    let mut options = DecodeOptions::new();
    options.skip_frame_decoding(true);
    let mut decoder = open(path, options)?;
    let mut frames = 0;
    while decoder.next_frame_info().map_err(unreadable(path))?.is_some() {
        frames += 1;
    }
    Ok(frames)
}

fn open(path: &Path, options: DecodeOptions) -> Result<Decoder<BufReader<File>>> {
    let file = File::open(path).map_err(Error::file(path))?;
    options.read_info(BufReader::new(file)).map_err(unreadable(path))
}

fn unreadable(path: &Path) -> impl Fn(DecodingError) -> Error {
    move |error| match error {
        DecodingError::Io(source) if source.kind() != ErrorKind::UnexpectedEof => {
            Error::File { path: path.to_path_buf(), source }
        }
        error => Error::msg(format!("{}: cannot be read as .gif: {error}", path.display())),
    }
}

/// The image that a viewer shows: a frame may cover only a part of it, or let it show through. Starts black.
struct Screen {
    /// Red, green, blue, row by row.
    pixels: Vec<u8>,
    height: usize,
    width: usize,
}

impl Screen {
    fn new(width: usize, height: usize) -> Self {
        Self { pixels: vec![0; width * height * 3], height, width }
    }

    /// Calls `paint` with the three bytes on the screen and the four of the frame, for each pixel of the frame.
    fn paint(&mut self, frame: &Frame<'_>, paint: impl Fn(&mut [u8], &[u8])) {
        let (top, left, width) = (usize::from(frame.top), usize::from(frame.left), usize::from(frame.width));
        for (row, over) in frame.buffer.chunks_exact(4 * width.max(1)).enumerate() {
            let start = 3 * ((top + row) * self.width + left);
            let under = self.pixels[start..start + 3 * width].chunks_exact_mut(3);
            under.zip(over.chunks_exact(4)).for_each(|(under, over)| paint(under, over));
        }
    }
}

/// Encodes the animation as the bytes of a file.
pub(super) fn bytes(input: &Tensor, prediction: &Tensor) -> Result<Vec<u8>> {
    let (input, prediction) = Frames::before_and_after(input, prediction)?;
    let factor = picture::magnification(input.height.max(input.width), LEAST_SIDE);
    let samples = input.samples.min(SHOWN_SAMPLES);
    let columns = samples.min(COLUMNS);
    let (tile_height, tile_width) = (factor * input.height + 2 * BORDER, factor * input.width + 2 * BORDER);
    let (height, width) = (samples.div_ceil(columns) * tile_height, columns * tile_width);
    let (Ok(gif_width), Ok(gif_height)) = (u16::try_from(width), u16::try_from(height)) else {
        return Err(Error::msg(format!(
            "{width}x{height} pixels are too many for a .gif; .png and .npy have no limit"
        )));
    };

    let failed = |error: gif::EncodingError| Error::msg(format!("cannot encode frames as .gif: {error}"));
    let mut bytes = Vec::new();
    let mut encoder = Encoder::new(&mut bytes, gif_width, gif_height, &[]).map_err(failed)?;
    encoder.set_repeat(Repeat::Infinite).map_err(failed)?;
    for time in 0..input.times + prediction.times {
        let border = if time < input.times { INPUT_BORDER } else { PREDICTION_BORDER };
        let mut canvas = Canvas::new(3, height, width, 0.);
        for sample in 0..samples {
            let (y, x) = (sample / columns * tile_height, sample % columns * tile_width);
            let frame = Frames::in_turn(&input, &prediction, sample, time);
            canvas.fill(y..y + tile_height, x..x + tile_width, &border);
            canvas.draw(y + BORDER, x + BORDER, frame, (input.height, input.width), factor);
        }
        let (_, _, mut rgb) = picture::to_rgb8(&canvas.into_tensor()?)?;
        if input.channels == 1 {
            // 128 grays and a border fit into a palette of 256 colours unchanged. With more, the encoder
            // would choose a new palette for each frame, and the animation would flicker.
            rgb.iter_mut().for_each(|byte| *byte = *byte & !1 | *byte >> 7);
        }
        let mut frame = Frame::from_rgb(gif_width, gif_height, &rgb);
        frame.delay = DELAY;
        encoder.write_frame(&frame).map_err(failed)?;
    }
    drop(encoder);
    Ok(bytes)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use candle_core::Device;

    use super::super::read_frames;
    use super::*;
    use crate::batch::VideoSpec;

    fn read_back(bytes: &[u8], spec: &VideoSpec) -> Tensor {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("clip.gif");
        std::fs::write(&path, bytes).unwrap();
        assert_eq!(count(&path).unwrap(), read(&path, usize::MAX).unwrap().frames.len());
        read_frames(&path, spec).unwrap()
    }

    fn at(clip: &Tensor, time: usize, channel: usize, y: usize, x: usize) -> f32 {
        let frame = clip.get(0).unwrap().get(time).unwrap().get(channel).unwrap();
        frame.get(y).unwrap().get(x).unwrap().to_scalar().unwrap()
    }

    #[test]
    fn an_animation_plays_input_then_prediction() {
        // Five samples: a row of four and a row of one. Sample n has brightness n/10, and its prediction 0.5
        // more.
        let shade = |shift: f64| {
            let samples = Tensor::arange(0f32, 5., &Device::Cpu).unwrap().affine(0.1, shift).unwrap();
            samples.reshape((5, 1, 1, 1, 1)).unwrap().broadcast_as((5, 2, 1, 64, 64)).unwrap()
        };
        let bytes = bytes(&shade(0.), &shade(0.5)).unwrap();
        let spec = VideoSpec { frames_in: 2, frames_out: 2, channels: 3, height: 400, width: 800 };
        let clip = read_back(&bytes, &spec);
        assert_eq!(clip.dims(), [1, 4, 3, 2 * 200, 4 * 200]);
        for (time, shift) in [(0, 0.), (1, 0.), (2, 0.5), (3, 0.5)] {
            for (sample, (y, x)) in [(0, 4), (0, 204), (0, 404), (0, 604), (200, 4)].into_iter().enumerate() {
                let (value, expected) = (at(&clip, time, 0, y + 4, x), sample as f32 / 10. + shift);
                assert!(
                    (value - expected).abs() < 1.6 / 255.,
                    "sample {sample} at {time}: {value}, not {expected}"
                );
            }
            let border: Vec<f32> = (0..3).map(|channel| at(&clip, time, channel, 3, 100)).collect();
            let expected = if time < 2 { INPUT_BORDER } else { PREDICTION_BORDER };
            assert!(border.iter().zip(expected).all(|(a, b)| (a - b).abs() < 0.01), "{border:?} at {time}");
            assert_eq!(at(&clip, time, 0, 300, 300), 0., "there is no sixth sample");
        }
        let mut decoder = DecodeOptions::new().read_info(bytes.as_slice()).unwrap();
        assert_eq!(decoder.next_frame_info().unwrap().unwrap().delay, DELAY);
        assert_eq!(decoder.repeat(), Repeat::Infinite);
    }

    #[test]
    fn frames_are_laid_over_each_other_as_a_viewer_does() {
        // A palette of black, white and gray, on a screen of three pixels; black is transparent in the last
        // frame.
        let mut bytes = Vec::new();
        let mut encoder = Encoder::new(&mut bytes, 3, 1, &[0, 0, 0, 255, 255, 255, 51, 51, 51]).unwrap();
        let steps = [
            (vec![2, 2, 2], 0, DisposalMethod::Keep, None),
            (vec![1], 0, DisposalMethod::Previous, None),
            (vec![1], 1, DisposalMethod::Background, None),
            (vec![0, 0, 1], 0, DisposalMethod::Any, Some(0)),
        ];
        for (pixels, left, dispose, hole) in steps {
            let mut frame = Frame::from_indexed_pixels(pixels.len() as u16, 1, pixels, hole);
            (frame.palette, frame.left, frame.dispose) = (None, left, dispose);
            encoder.write_frame(&frame).unwrap();
        }
        drop(encoder);
        let spec = VideoSpec { frames_in: 4, frames_out: 1, channels: 1, height: 1, width: 3 };
        let clip = read_back(&bytes, &spec).reshape((4, 3)).unwrap().to_vec2::<f32>().unwrap();
        assert_eq!(clip, [[0.2, 0.2, 0.2], [1., 0.2, 0.2], [0.2, 1., 0.2], [0.2, 0., 1.]]);
    }

    #[test]
    fn colour_becomes_gray_by_luma() {
        let mut bytes = Vec::new();
        let mut encoder = Encoder::new(&mut bytes, 3, 1, &[]).unwrap();
        encoder.write_frame(&Frame::from_rgb(3, 1, &[255, 0, 0, 0, 255, 0, 90, 90, 90])).unwrap();
        drop(encoder);
        let spec = VideoSpec { frames_in: 1, frames_out: 1, channels: 1, height: 1, width: 3 };
        let gray = read_back(&bytes, &spec).flatten_all().unwrap().to_vec1::<f32>().unwrap();
        assert_eq!(gray, [0.299, 0.587, 90. / 255.]);
        let colour = read_back(&bytes, &VideoSpec { channels: 3, ..spec }).reshape((3, 3)).unwrap();
        assert_eq!(colour.to_vec2::<f32>().unwrap()[0], [1., 0., 90. / 255.]);
    }

    #[test]
    fn animations_of_too_many_pixels_are_refused() {
        let wide = Tensor::zeros((4, 1, 1, 1, 20_000), candle_core::DType::F32, &Device::Cpu).unwrap();
        assert_eq!(
            bytes(&wide, &wide).unwrap_err().to_string(),
            "80032x9 pixels are too many for a .gif; .png and .npy have no limit"
        );
    }
}
