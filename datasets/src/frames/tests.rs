#![allow(clippy::unwrap_used)]

use std::fs::File;
use std::io::Write;
use std::path::Path;

use image::{Rgb, RgbImage};
use ndarray::{Array, Array3, Array4, Array5, ShapeBuilder};
use ndarray_npy::{NpzWriter, WritableElement, write_npy};
use tempfile::TempDir;

use super::*;

/// Pictures of 6 x 8 pixels; picture i has the shade 10 * i, except its first pixel, which is white.
fn pictures(folder: &Path, count: usize) {
    std::fs::create_dir_all(folder).unwrap();
    for i in 0..count {
        shade(10 * i as u8).save(folder.join(format!("frame{i}.png"))).unwrap();
    }
}

fn shade(value: u8) -> RgbImage {
    let mut picture = RgbImage::from_pixel(8, 6, Rgb([value; 3]));
    picture.put_pixel(0, 0, Rgb([255; 3]));
    picture
}

fn animation(path: &Path, frames: usize) {
    let mut encoder = gif::Encoder::new(File::create(path).unwrap(), 8, 6, &[]).unwrap();
    for i in 0..frames {
        encoder.write_frame(&gif::Frame::from_rgb(8, 6, shade(10 * i as u8).as_raw())).unwrap();
    }
}

fn config(path: &Path) -> Config {
    Config { path: path.display().to_string(), frames_in: 2, frames_out: 1, ..Config::default() }
}

fn timed(path: &Path) -> Config {
    Config { split: Division::Time, ..config(path) }
}

fn sample(index: usize, split: Split) -> Sample {
    Sample { index, split, epoch: 0, seed: 1, repeat: 0, augment: split == Split::Train }
}

fn flat(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

/// The last pixel of each frame of each sample of a split, as a byte.
fn shades(config: &Config, split: Split) -> Vec<Vec<u8>> {
    let data = Frames::open(config, split).unwrap();
    let last = |video: &Tensor| -> Vec<u8> {
        let frames = flat(&video.flatten_from(2).unwrap());
        let pixels = frames.len() / video.dim(1).unwrap();
        frames.chunks(pixels).map(|frame| (frame[pixels - 1] * 255.).round() as u8).collect()
    };
    let shades = |index| {
        let batch = data.batch(&[sample(index, split)]).unwrap();
        [last(&batch.input), last(&batch.target)].concat()
    };
    (0..data.len()).map(shades).collect()
}

/// The error of opening a path for training, without the path itself.
fn refusal(config: &Config) -> String {
    let error = Frames::open(config, Split::Train).err().expect("it is not refused").to_string();
    error.replace(&format!("{}/", config.path), "").replace(&config.path, "ROOT")
}

#[test]
fn a_folder_of_pictures_is_a_sequence_divided_by_time() {
    let dir = tempfile::tempdir().unwrap();
    pictures(dir.path(), 20);
    let config = Config { val_share: 0.2, test_share: 0.15, ..timed(dir.path()) };
    let train = shades(&config, Split::Train);
    // Frame 10 comes after frame 9, and the first 13 frames are for training.
    assert_eq!((train.len(), &train[0], &train[10]), (11, &vec![0, 10, 20], &vec![100, 110, 120]));
    assert_eq!(shades(&config, Split::Val), [[130, 140, 150], [140, 150, 160]]);
    assert_eq!(shades(&config, Split::Test), [[170, 180, 190]]);
    let no_test = Config { test_share: 0., ..config };
    assert_eq!(shades(&no_test, Split::Test), shades(&no_test, Split::Val));

    let data = Frames::open(&no_test, Split::Train).unwrap();
    assert_eq!(data.spec(), VideoSpec { frames_in: 2, frames_out: 1, channels: 1, height: 6, width: 8 });
    let batch = data.batch(&[sample(3, Split::Train), sample(0, Split::Train)]).unwrap();
    assert_eq!((batch.input.dims(), batch.target.dims()), (&[2, 2, 1, 6, 8][..], &[2, 1, 1, 6, 8][..]));
    assert_eq!((flat(&batch.input)[0], flat(&batch.input)[1]), (1., 30. / 255.));
    let error = data.batch(&[sample(99, Split::Train)]).unwrap_err().to_string();
    assert!(error.starts_with("there is no sample 99: the split has "), "{error}");
}

#[test]
fn folders_and_animations_are_sequences_divided_whole() {
    let dir = tempfile::tempdir().unwrap();
    pictures(&dir.path().join("2"), 3);
    pictures(&dir.path().join("10"), 4);
    animation(&dir.path().join("3.gif"), 5);
    std::fs::write(dir.path().join("notes.txt"), "no frames").unwrap();
    std::fs::write(dir.path().join(".hidden.png"), "no frame").unwrap();
    let config = config(dir.path());
    assert_eq!(shades(&config, Split::Train), [[0, 10, 20]]);
    assert_eq!(shades(&config, Split::Val).len(), 3);
    assert_eq!(shades(&config, Split::Test), [[0, 10, 20], [10, 20, 30]]);
    // A single file is valid data too.
    assert_eq!(shades(&timed(&dir.path().join("3.gif")), Split::Train).len(), 1);
}

#[test]
fn folders_can_be_the_splits() {
    let dir = tempfile::tempdir().unwrap();
    for (name, count) in [("train/a", 4), ("train/b", 3), ("val/a", 3)] {
        pictures(&dir.path().join(name), count);
    }
    let config = Config { split: Division::Folder, ..config(dir.path()) };
    let len = |split| Frames::open(&config, split).unwrap().len();
    assert_eq!([Split::Train, Split::Val, Split::Test].map(len), [3, 1, 1]);
    pictures(&dir.path().join("test"), 5);
    assert_eq!(Frames::open(&config, Split::Test).unwrap().len(), 3);
    std::fs::remove_dir_all(dir.path().join("val")).unwrap();
    assert_eq!(refusal(&config), "`split`: with \"folder\", expected the folders `train` and `val` in ROOT");
}

/// Pixel values of a video of N = 5 sequences, T = 4, 6 x 8 pixels; at the last pixel 10 * t, plus n.
fn value(n: usize, t: usize, y: usize, x: usize) -> f64 {
    if (y, x) == (5, 7) { (10 * t + n) as f64 } else { ((n + t + y + x) % 7) as f64 }
}

#[test]
fn arrays_of_every_kind_are_alike() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("video.npy");
    let expected = |n: u8| vec![vec![n, 10 + n, 20 + n], vec![10 + n, 20 + n, 30 + n]];
    let check = |config: Config| {
        let train = shades(&config, Split::Train);
        assert_eq!(train, [expected(0), expected(1), expected(2)].concat());
        assert_eq!(shades(&config, Split::Val), expected(3));
        assert_eq!(shades(&config, Split::Test), expected(4));
    };
    write_npy(&path, &Array4::from_shape_fn((5, 4, 6, 8), |(n, t, y, x)| value(n, t, y, x) as u8)).unwrap();
    check(config(&path));
    write_npy(
        &path,
        &Array5::from_shape_fn((5, 4, 6, 8, 1), |(n, t, y, x, _)| value(n, t, y, x) as f32 / 255.),
    )
    .unwrap();
    check(config(&path));
    write_npy(&path, &Array5::from_shape_fn((5, 4, 1, 6, 8), |(n, t, _, y, x)| value(n, t, y, x) / 255.))
        .unwrap();
    check(config(&path));
    let words = Array4::from_shape_fn((5, 4, 6, 8), |(n, t, y, x)| value(n, t, y, x) as u16);
    write_npy(&path, &words).unwrap();
    check(Config { range: Some([0., 255.]), ..config(&path) });

    for compressed in [false, true] {
        let path = dir.path().join("several.npz");
        let file = File::create(&path).unwrap();
        let mut archive = if compressed { NpzWriter::new_compressed(file) } else { NpzWriter::new(file) };
        archive.add_array("other", &Array3::<f32>::zeros((9, 6, 8))).unwrap();
        archive.add_array("video", &words).unwrap();
        archive.finish().unwrap();
        check(Config { array: Some("video".into()), range: Some([0., 255.]), ..config(&path) });
        assert_eq!(
            refusal(&config(&path)),
            "`array`: ROOT: it holds the arrays `other`, `video`; set this to one of them"
        );
    }
    // An array of one sequence has no axis for sequences.
    let one = Array3::from_shape_fn((20, 6, 8), |(t, ..)| t as u8);
    write_npy(&path, &one).unwrap();
    assert_eq!(shades(&timed(&path), Split::Train)[13], [13, 14, 15]);
}

#[test]
fn channels_may_come_first_or_last() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("video.npy");
    let colour = |t: usize, c: usize, y: usize, x: usize| (50 * c + 7 * t + 8 * y + x) as u8;
    let config = Config { channels: 3, val_share: 0.4, test_share: 0., ..config(&path) };
    let read = || {
        let data = Frames::open(&config, Split::Train).unwrap();
        let batch = data.batch(&[sample(0, Split::Train)]).unwrap();
        flat(&batch.target).into_iter().map(|value| (value * 255.).round() as u8).collect::<Vec<_>>()
    };
    let pixels = |i: usize| colour(2, i / 48, i / 8 % 6, i % 8);
    let expected: Vec<u8> = (0..3 * 48).map(pixels).collect();
    write_npy(&path, &Array5::from_shape_fn((2, 3, 6, 8, 3), |(_, t, y, x, c)| colour(t, c, y, x))).unwrap();
    assert_eq!(read(), expected);
    write_npy(&path, &Array5::from_shape_fn((2, 3, 3, 6, 8), |(_, t, c, y, x)| colour(t, c, y, x))).unwrap();
    assert_eq!(read(), expected);
}

#[test]
fn frames_are_scaled_and_cropped() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("video.npy");
    // A gradient along the columns, the same in all frames.
    write_npy(&path, &Array3::from_shape_fn((12, 6, 8), |(_, _, x)| 20 * x as u8)).unwrap();
    let frame = |config: &Config, index, split| {
        let data = Frames::open(config, split).unwrap();
        let batch = data.batch(&[sample(index, split)]).unwrap();
        assert_eq!(flat(&batch.input)[..flat(&batch.target).len()], flat(&batch.target));
        (
            data.spec(),
            flat(&batch.target).into_iter().map(|value| (value * 255.).round() as i32).collect::<Vec<_>>(),
        )
    };
    let split = Config { val_share: 0.25, test_share: 0., ..timed(&path) };
    let crop = Config { crop: Some([2, 4]), ..split.clone() };
    let (spec, pixels) = frame(&crop, 0, Split::Train);
    assert_eq!((spec.height, spec.width, pixels), (2, 4, [40, 60, 80, 100].repeat(2)));
    // Half as wide: each pixel is the mean of its two, plus a little of their neighbors, which cancels on a gradient.
    let small = Config { resize: Some([3, 4]), crop: Some([1, 2]), ..split.clone() };
    let (_, pixels) = frame(&small, 0, Split::Train);
    assert!(pixels.iter().zip([50, 90]).all(|(a, b)| (a - b).abs() <= 1), "{pixels:?}");

    let moved = Config { augment: Augment { crop: true, flip: true, ..Augment::default() }, ..crop.clone() };
    assert_eq!(frame(&moved, 0, Split::Val).1, [40, 60, 80, 100].repeat(2));
    let firsts: std::collections::BTreeSet<i32> =
        (0..7).map(|i| frame(&moved, i, Split::Train).1[0]).collect();
    assert!(firsts.len() > 2, "training samples are cropped at {firsts:?}");
    let turned = Config { augment: Augment { rotate: true, ..Augment::default() }, ..crop };
    assert_eq!(refusal(&turned), "`augment`: rotate: expected frames as high as wide, they have 2x4");
    let large = Config { crop: Some([7, 8]), ..split };
    assert_eq!(refusal(&large), "`crop`: expected at most 6x8, the size of the frames, found 7x8");
}

#[test]
fn a_cache_changes_nothing_and_is_never_stale() {
    let dir = tempfile::tempdir().unwrap();
    let frames = dir.path().join("frames");
    pictures(&frames, 20);
    animation(&frames.join("last.gif"), 20);
    let settle = || std::thread::sleep(std::time::Duration::from_millis(200));
    settle();
    let plain = Config { val_share: 0.2, test_share: 0.2, ..timed(&frames) };
    let cached = Config { cache: Some(dir.path().join("cache")), ..plain.clone() };
    for split in [Split::Train, Split::Val, Split::Test, Split::Train] {
        assert_eq!(shades(&cached, split), shades(&plain, split));
    }
    let files = || std::fs::read_dir(dir.path().join("cache")).unwrap().count();
    assert_eq!(files(), 1, "one file serves all splits");
    shade(99).save(frames.join("frame0.png")).unwrap();
    settle();
    assert!(shades(&cached, Split::Train).iter().any(|sample| sample[0] == 99));
    assert_eq!(
        shades(&Config { resize: Some([3, 4]), ..cached }, Split::Train).len(),
        shades(&plain, Split::Train).len()
    );
    assert_eq!(files(), 3);
}

fn save<A: WritableElement, D: ndarray::Dimension>(array: &Array<A, D>) -> (TempDir, Config) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("video.npy");
    write_npy(&path, array).unwrap();
    let config = config(&path);
    (dir, config)
}

#[test]
fn broken_arrays_are_named() {
    let (_dir, config) = save(&Array4::<i64>::zeros((5, 4, 6, 8)));
    assert_eq!(refusal(&config), "ROOT: its values are '<i8'; expected uint8, uint16, float32 or float64");
    let (_dir, config) = save(&Array4::<f32>::zeros((5, 4, 6, 8).f()));
    assert_eq!(
        refusal(&config),
        "ROOT: the array is in Fortran order; expected C order: numpy.ascontiguousarray"
    );
    let (_dir, config) = save(&Array4::<u8>::zeros((5, 4, 6, 8)));
    let whole = std::fs::read(&config.path).unwrap();
    std::fs::write(&config.path, &whole[..whole.len() - 100]).unwrap();
    assert_eq!(
        refusal(&config),
        "ROOT: has 860 bytes after its header, which promises 960, an array [5, 4, 6, 8]"
    );
    std::fs::write(&config.path, "no array").unwrap();
    assert!(refusal(&config).starts_with("ROOT: not an .npy array: "));
    let (_dir, config) = save(&Array4::<u8>::zeros((5, 2, 6, 8)));
    assert_eq!(
        refusal(&config),
        "ROOT: sequence 0 has 2 frame(s); expected at least 3, which a sample takes (`skip_short = true` leaves such \
         sequences out)"
    );
    assert_eq!(
        refusal(&Config { skip_short: true, ..config }),
        "ROOT: the train split has no samples; each takes 3 frames of a sequence"
    );
    let (_dir, config) = save(&Array5::<u8>::zeros((5, 4, 6, 8, 3)));
    assert_eq!(
        refusal(&config),
        "ROOT: its axes are [5, 4, 6, 8, 3]; with `channels = 1` expected (N, T, H, W, 1), (N, T, 1, H, W), (N, T, H, W) \
         or (T, H, W)"
    );
    let (_dir, config) = save(&Array4::<u8>::zeros((5, 0, 6, 8)));
    assert_eq!(refusal(&config), "ROOT: its axes are [5, 0, 6, 8]: it is empty");
    let (_dir, bright) = save(&Array4::<f32>::from_elem((5, 4, 6, 8), 255.));
    assert_eq!(
        refusal(&bright),
        "ROOT: sequence 0, frame 0: it has the value 255; expected 0 to 1, or another `range`"
    );
    // This error is only found when the value is read.
    let mut values = Array4::<f32>::zeros((5, 4, 6, 8));
    values[[2, 1, 3, 3]] = f32::NAN;
    let (_dir, config) = save(&values);
    let data = Frames::open(&config, Split::Train).unwrap();
    let error = data.batch(&[sample(4, Split::Train)]).unwrap_err().to_string();
    assert!(
        error.contains("video.npy: sequence 2, frame 1: it has the value NaN; expected 0 to 1"),
        "{error}"
    );
    let path = data_path(&config).with_file_name("a.npz");
    std::fs::write(&path, "no archive").unwrap();
    assert!(refusal(&self::config(&path)).starts_with("ROOT: not an .npz archive: "));
}

fn data_path(config: &Config) -> std::path::PathBuf {
    config.path.clone().into()
}

#[test]
fn broken_pictures_are_named() {
    let dir = tempfile::tempdir().unwrap();
    pictures(dir.path(), 20);
    let config = timed(dir.path());
    RgbImage::new(9, 6).save(dir.path().join("frame5.png")).unwrap();
    assert_eq!(
        refusal(&config),
        "frame5.png: its frames have 6x9 pixels; expected 6x8, as in frame0.png, or `resize`, which scales all to one size"
    );
    assert_eq!(shades(&Config { resize: Some([6, 8]), ..config.clone() }, Split::Train).len(), 14);
    let noise = RgbImage::from_fn(8, 6, |x, y| Rgb([(37 * x * y) as u8, (91 * x) as u8, (53 * y) as u8]));
    noise.save(dir.path().join("frame5.png")).unwrap();
    let whole = std::fs::read(dir.path().join("frame5.png")).unwrap();
    std::fs::write(dir.path().join("frame5.png"), &whole[..whole.len() / 2]).unwrap();
    let error = refusal(&config);
    assert!(error.starts_with("frame5.png: cannot be read as a picture: "), "{error}");
    File::create(dir.path().join("frame5.png")).unwrap().write_all(b"no picture").unwrap();
    let error = refusal(&config);
    assert!(error.starts_with("frame5.png: cannot be read as a picture: "), "{error}");
}

#[test]
fn too_little_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    assert!(refusal(&timed(dir.path())).starts_with("`path`: ROOT: holds no frames; expected .png, "));
    pictures(dir.path(), 12);
    assert_eq!(
        refusal(&config(dir.path())),
        "`split`: ROOT holds 1 sequence(s), too few to be divided; use `split = \"time\"`, which divides each"
    );
    let error = Frames::open(&timed(dir.path()), Split::Val).err().unwrap().to_string();
    assert!(
        error.ends_with(
            ": has 1 frame(s) in the val split; expected at least 3, which a sample takes (`skip_short = true` leaves \
             such sequences out)"
        ),
        "{error}"
    );
    let long = Config { frames_out: 9, ..timed(dir.path()) };
    assert!(refusal(&long).starts_with("ROOT: has 10 frame(s) in the train split; expected at least 11, "));
}

#[test]
fn settings_out_of_range_are_refused_before_a_file_is_looked_for() {
    let refusal = |change: &dyn Fn(&mut Config)| {
        let mut config = Config { path: "no/where".into(), ..Config::default() };
        change(&mut config);
        Frames::open(&config, Split::Train).err().unwrap().to_string()
    };
    assert!(refusal(&|_| ()).starts_with("`path`: no/where: "));
    assert_eq!(refusal(&|c| c.path.clear()), "`path`: expected a folder of frames, or a file of them");
    assert_eq!(refusal(&|c| c.frames_in = 0), "`frames_in`: expected at least 1, found 0");
    assert_eq!(refusal(&|c| c.stride = 0), "`stride`: expected at least 1, found 0");
    assert_eq!(refusal(&|c| c.channels = 0), "`channels`: expected at least 1, found 0");
    assert_eq!(refusal(&|c| c.resize = Some([0, 4])), "`resize`: expected rows and columns of at least 1");
    assert_eq!(refusal(&|c| c.range = Some([1., 1.])), "`range`: expected two rising values, found 1 and 1");
    assert_eq!(refusal(&|c| c.val_share = 1.5), "`val_share`: expected a fraction in [0, 1), found 1.5");
    assert!(refusal(&|c| c.val_share = 0.).starts_with("`val_share`: expected a fraction above 0"));
    assert!(refusal(&|c| c.test_share = 0.95).starts_with("`val_share`: with `test_share` nothing is left"));
    let dir = tempfile::tempdir().unwrap();
    pictures(dir.path(), 20);
    let error =
        Frames::open(&Config { channels: 2, ..timed(dir.path()) }, Split::Train).err().unwrap().to_string();
    assert_eq!(error, "`channels`: pictures have 1 or 3, found 2; arrays have any");
}

#[test]
fn what_is_predicted_from_is_made_as_the_samples_are() {
    let dir = tempfile::tempdir().unwrap();
    pictures(&dir.path().join("train"), 20);
    pictures(&dir.path().join("clip"), 7);
    // Scaled to a quarter of the pixels, cropped to half of the columns; a sample takes every second frame.
    let config =
        Config { resize: Some([3, 4]), crop: Some([3, 2]), every: 2, ..timed(&dir.path().join("train")) };
    let data = Frames::open(&config, Split::Train).unwrap();
    let read = |name: &str| Frames::read(&config, &data.spec(), &dir.path().join(name));
    let expected = data.batch(&[sample(0, Split::Val)]).unwrap();
    let given = read("clip").unwrap();
    assert_eq!((flat(&given.input), flat(&given.target)), (flat(&expected.input), flat(&expected.target)));
    // A byte array of two sequences that are too short for a target, so the target is zeros.
    let array = Array4::from_shape_fn((2, 3, 6, 8), |(n, t, ..)| (100 * n + 10 * t) as u8);
    write_npy(dir.path().join("clips.npy"), &array).unwrap();
    let given = read("clips.npy").unwrap();
    assert_eq!(given.input.dims(), [2, 2, 1, 3, 2]);
    let shades: Vec<u8> = flat(&given.input).chunks(6).map(|frame| (frame[0] * 255.).round() as u8).collect();
    assert_eq!(shades, [0, 20, 100, 120]);
    assert!(flat(&given.target).iter().all(|value| *value == 0.));
    pictures(&dir.path().join("short"), 2);
    let error = read("short").unwrap_err().to_string();
    assert!(error.ends_with("short: it has 2 frame(s); expected at least 3 to predict from"), "{error}");
    let error = read("nothing").unwrap_err().to_string();
    assert!(error.contains("nothing: No such file"), "{error}");
    let whole = VideoSpec { height: 6, width: 8, ..data.spec() };
    let other = Array3::<u8>::zeros((5, 9, 8));
    write_npy(dir.path().join("other.npy"), &other).unwrap();
    // The training data need not exist.
    let plain = timed(&dir.path().join("gone"));
    assert_eq!(Frames::read(&plain, &whole, &dir.path().join("clip")).unwrap().input.dims(), [1, 2, 1, 6, 8]);
    let error = Frames::read(&plain, &whole, &dir.path().join("other.npy")).unwrap_err().to_string();
    assert!(error.contains("its frames have 9x8 pixels; expected 6x8, as in the training data"), "{error}");
}

#[cfg(unix)]
#[test]
fn a_folder_counts_once_however_many_links_lead_to_it() {
    let dir = tempfile::tempdir().unwrap();
    pictures(&dir.path().join("a"), 20);
    let config = timed(dir.path());
    let expected = shades(&config, Split::Train);
    std::os::unix::fs::symlink(dir.path(), dir.path().join("a/loop")).unwrap();
    std::os::unix::fs::symlink(dir.path().join("a"), dir.path().join("b")).unwrap();
    assert_eq!(shades(&config, Split::Train), expected);
}
