//! Pictures and animations: `.png`, `.jpg`, `.gif`.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use candle_core::{Device, Tensor};
use image::ImageReader;

use super::{extension, gif};
use crate::batch::VideoSpec;
use crate::error::{Error, Result};

/// The frames of a picture (one) or an animation, as a viewer shows them: 8 bits, over black.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pictures {
    /// Rows.
    pub height: usize,
    /// Columns.
    pub width: usize,
    /// Red, green, blue, row by row, of each frame.
    pub frames: Vec<Vec<u8>>,
}

/// Whether the file name is that of a picture or an animation.
pub fn is_picture(path: &Path) -> bool {
    matches!(extension(path).as_str(), "png" | "jpg" | "jpeg" | "gif")
}

/// Reads a picture or an animation. Fails, naming the file, if it is damaged or truncated.
pub fn pictures(path: &Path) -> Result<Pictures> {
    at_most(path, usize::MAX)
}

fn at_most(path: &Path, limit: usize) -> Result<Pictures> {
    if extension(path) == "gif" {
        return gif::read(path, limit);
    }
    check_end(path)?;
    let image = reader(path)?.decode().map_err(unreadable(path))?.to_rgba8();
    let (width, height) = image.dimensions();
    // Transparent pixels let black show through.
    let over_black = |value: u8, alpha: u8| ((u32::from(value) * u32::from(alpha) + 127) / 255) as u8;
    let rgb = image.pixels().flat_map(|pixel| [0, 1, 2].map(|channel| over_black(pixel[channel], pixel[3])));
    Ok(Pictures { height: height as usize, width: width as usize, frames: vec![rgb.collect()] })
}

/// (rows, columns) of a picture or an animation, without reading the rest of the file.
pub fn size(path: &Path) -> Result<[usize; 2]> {
    if extension(path) == "gif" {
        return gif::size(path);
    }
    let (width, height) = reader(path)?.into_dimensions().map_err(unreadable(path))?;
    Ok([height as usize, width as usize])
}

/// The number of frames of a picture or an animation.
pub fn count(path: &Path) -> Result<usize> {
    if extension(path) == "gif" { gif::count(path) } else { Ok(1) }
}

fn reader(path: &Path) -> Result<ImageReader<std::io::BufReader<File>>> {
    ImageReader::open(path).map_err(Error::file(path))?.with_guessed_format().map_err(Error::file(path))
}

fn unreadable(path: &Path) -> impl FnOnce(image::ImageError) -> Error {
    move |error| Error::msg(format!("{}: cannot be read as a picture: {error}", path.display()))
}

/// Refuses a truncated JPEG: the decoder would make up the missing part.
fn check_end(path: &Path) -> Result<()> {
    /// Some programs append a little data after the end.
    const TAIL: i64 = 4096;
    if !matches!(extension(path).as_str(), "jpg" | "jpeg") {
        return Ok(());
    }
    let mut file = File::open(path).map_err(Error::file(path))?;
    let len = file.metadata().map_err(Error::file(path))?.len();
    file.seek(SeekFrom::End(-TAIL.min(len as i64))).map_err(Error::file(path))?;
    let mut tail = Vec::new();
    file.read_to_end(&mut tail).map_err(Error::file(path))?;
    if tail.windows(2).any(|marker| marker == [0xff, 0xd9]) {
        return Ok(());
    }
    Err(Error::msg(format!("{}: cut short: a JPEG ends with an end-of-image marker", path.display())))
}

impl Pictures {
    /// The planes of a frame, (C, H, W), in `[0, 1]`: gray for 1 channel, red, green and blue for 3.
    pub fn planes(&self, frame: usize, channels: usize) -> Vec<f32> {
        let pixels = self.frames[frame].chunks_exact(3);
        if channels == 1 {
            // The weights of ITU-R BT.601 as integers, so a gray pixel keeps its exact value.
            let luma =
                |rgb: &[u8]| 299 * u32::from(rgb[0]) + 587 * u32::from(rgb[1]) + 114 * u32::from(rgb[2]);
            return pixels.map(|rgb| luma(rgb) as f32 / 255e3).collect();
        }
        let plane = |channel: usize| pixels.clone().map(move |rgb| f32::from(rgb[channel]) / 255.);
        (0..channels).flat_map(plane).collect()
    }
}

/// One clip (1, T, C, H, W) from an animation or a folder of pictures, with at most as many frames as `spec`
/// uses.
pub(super) fn clip(path: &Path, spec: &VideoSpec) -> Result<Tensor> {
    if !matches!(spec.channels, 1 | 3) {
        return Err(Error::msg(format!(
            "{}: pictures have 1 or 3 channels; expected {}; .npy files have any",
            path.display(),
            spec.channels
        )));
    }
    let wanted = spec.frames_in + spec.frames_out;
    let files = if path.is_dir() { in_folder(path)? } else { vec![path.to_path_buf()] };
    let (mut values, mut times, mut first) = (Vec::new(), 0, None);
    for file in files {
        if times == wanted {
            break;
        }
        let pictures = at_most(&file, wanted - times)?;
        let size = [pictures.height, pictures.width];
        let [height, width] = *first.get_or_insert(size);
        if size != [height, width] {
            return Err(Error::msg(format!(
                "{}: it has {}x{} pixels; expected {height}x{width}, as the frames before it",
                file.display(),
                size[0],
                size[1]
            )));
        }
        (0..pictures.frames.len()).for_each(|i| values.extend(pictures.planes(i, spec.channels)));
        times += pictures.frames.len();
    }
    let [height, width] = first.unwrap_or([0, 0]);
    Ok(Tensor::from_vec(values, (1, times, spec.channels, height, width), &Device::Cpu)?)
}

/// The pictures in a folder, ordered by name.
fn in_folder(path: &Path) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(path).map_err(Error::file(path))? {
        let file = entry.map_err(Error::file(path))?.path();
        if is_picture(&file) {
            files.push(file);
        }
    }
    if files.is_empty() {
        let message = format!("{}: holds no pictures; expected .png, .jpg or .gif", path.display());
        return Err(Error::msg(message));
    }
    files.sort_by(|a, b| natord::compare(&a.to_string_lossy(), &b.to_string_lossy()));
    Ok(files)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use image::{ImageFormat, Rgb, RgbImage, Rgba, RgbaImage};

    use super::*;

    fn gray(value: u8) -> RgbImage {
        RgbImage::from_pixel(4, 3, Rgb([value; 3]))
    }

    #[test]
    fn a_folder_of_pictures_is_a_clip_in_the_order_of_its_numbers() {
        let folder = tempfile::tempdir().unwrap();
        for (name, value) in [("frame10.png", 255), ("frame9.png", 51), ("frame1.png", 0)] {
            gray(value).save(folder.path().join(name)).unwrap();
        }
        std::fs::write(folder.path().join("notes.txt"), "not a frame").unwrap();
        let spec = VideoSpec { frames_in: 2, frames_out: 1, channels: 1, height: 3, width: 4 };
        let video = super::super::read(folder.path(), &spec).unwrap();
        let firsts =
            |tensor: &Tensor| tensor.flatten_from(2).unwrap().get(0).unwrap().to_vec2::<f32>().unwrap();
        assert_eq!(firsts(&video.input).iter().map(|frame| frame[5]).collect::<Vec<_>>(), [0., 0.2]);
        assert_eq!(firsts(&video.target)[0], [1.; 12]);

        RgbImage::new(4, 4).save(folder.path().join("frame5.png")).unwrap();
        let error = super::super::read(folder.path(), &spec).unwrap_err().to_string();
        assert!(
            error.ends_with("frame5.png: it has 4x4 pixels; expected 3x4, as the frames before it"),
            "{error}"
        );
    }

    #[test]
    fn every_kind_of_picture_is_read_and_what_is_transparent_is_black() {
        let folder = tempfile::tempdir().unwrap();
        for (name, near) in [("a.png", 0.), ("a.jpg", 1.5), ("a.JPEG", 1.5), ("a.gif", 0.)] {
            let path = folder.path().join(name);
            if name == "a.gif" {
                let mut encoder = ::gif::Encoder::new(File::create(&path).unwrap(), 4, 3, &[]).unwrap();
                encoder.write_frame(&::gif::Frame::from_rgb(4, 3, gray(200).as_raw())).unwrap();
            } else {
                gray(200).save(&path).unwrap();
            }
            assert!(is_picture(&path));
            assert_eq!((size(&path).unwrap(), count(&path).unwrap()), ([3, 4], 1));
            let planes = pictures(&path).unwrap().planes(0, 1);
            assert!(planes.iter().all(|value| (value * 255. - 200.).abs() <= near), "{name}: {planes:?}");
        }
        let path = folder.path().join("glass.png");
        RgbaImage::from_pixel(1, 1, Rgba([255, 100, 0, 51])).save(&path).unwrap();
        assert_eq!(pictures(&path).unwrap().frames, [[51, 20, 0]]);
    }

    #[test]
    fn broken_files_are_named() {
        let folder = tempfile::tempdir().unwrap();
        let noise =
            RgbImage::from_fn(64, 64, |x, y| Rgb([(x * y * 37) as u8, (x + 7 * y) as u8, (x * 91) as u8]));
        for (name, format) in [("a.png", ImageFormat::Png), ("a.jpg", ImageFormat::Jpeg)] {
            let path = folder.path().join(name);
            noise.save_with_format(&path, format).unwrap();
            let whole = std::fs::read(&path).unwrap();
            std::fs::write(&path, &whole[..whole.len() / 2]).unwrap();
            let error = pictures(&path).unwrap_err().to_string();
            assert!(error.starts_with(&format!("{}: c", path.display())), "{error}");
        }
        let path = folder.path().join("a.gif");
        let mut bytes = Vec::new();
        let mut encoder = ::gif::Encoder::new(&mut bytes, 64, 64, &[]).unwrap();
        encoder.write_frame(&::gif::Frame::from_rgb(64, 64, noise.as_raw())).unwrap();
        drop(encoder);
        std::fs::write(&path, &bytes[..bytes.len() / 2]).unwrap();
        let error = pictures(&path).unwrap_err().to_string();
        assert!(error.starts_with(&format!("{}: cannot be read as .gif: ", path.display())), "{error}");
        assert!(count(&path).is_err());
        let none = folder.path().join("none.png");
        assert!(
            matches!(pictures(&none), Err(Error::File { .. }))
                && matches!(size(&none), Err(Error::File { .. }))
        );
        std::fs::create_dir(folder.path().join("empty")).unwrap();
        assert!(
            in_folder(&folder.path().join("empty")).unwrap_err().to_string().contains("holds no pictures")
        );
    }
}
