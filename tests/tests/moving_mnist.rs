//! Moving MNIST compared with the original generators, and on real handwriting.
//!
//! The fixture and the digits are images of MNIST, so they are not kept with the tests. They are looked for
//! in `$CANDLEPOWER_GOLDEN` and `$CANDLEPOWER_DATA`, or next to the repository.
#![allow(clippy::unwrap_used)]

use candle_core::{DType, Device, IndexOp, Tensor};
use candlepower::data::{Dataset, Open, Sample, Split};
use candlepower_datasets::mnist::{self, Images};
use candlepower_datasets::moving_mnist::{Config, Generator, Protocol, Track, openstl, svg};
use candlepower_datasets::{Digits, MovingMnist, digits};
use candlepower_tests::{Golden, outside};

const SIZE: usize = 64;
const FRAMES: usize = 20;

fn fixture() -> Option<Golden> {
    let path = outside("CANDLEPOWER_GOLDEN", "golden", "moving_mnist.safetensors")?;
    Some(Golden::open(path.parent().unwrap(), "moving_mnist"))
}

fn bytes(tensor: &Tensor) -> Vec<u8> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

fn integers(tensor: &Tensor) -> Vec<i64> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

fn digits28(golden: &Golden) -> Images {
    Images::new(mnist::SIDE, bytes(golden.get("digits28"))).unwrap()
}

/// Corners in the order of the fixture: [digit, frame, (row, column)].
fn corners(tracks: &[Track]) -> Vec<i64> {
    tracks.iter().flat_map(|track| track.corners.iter().flatten()).map(|&corner| corner as i64).collect()
}

fn draw(generator: &Generator, tracks: &[Track]) -> Vec<f32> {
    let mut video = vec![0.; FRAMES * SIZE * SIZE];
    generator.draw(tracks, video.chunks_exact_mut(SIZE * SIZE));
    video
}

fn sums(video: &[f32]) -> Vec<f64> {
    video.chunks(SIZE * SIZE).map(|frame| frame.iter().copied().map(f64::from).sum()).collect()
}

#[test]
fn digits_are_enlarged_as_pillow_does() {
    let Some(golden) = fixture() else { return };
    let digits32 = Images::new(svg::DIGIT, bytes(golden.get("digits32"))).unwrap();
    assert_eq!(digits28(&golden).enlarged(svg::DIGIT), digits32);
}

#[test]
fn svg_sequences_equal_the_original() {
    let Some(golden) = fixture() else { return };
    assert_eq!((golden.size("image_size"), golden.size("seq_len")), (SIZE, FRAMES));
    let generator = Generator::new(Protocol::Svg, &digits28(&golden), 2, SIZE);
    let draws = golden.get("svg.draws");
    for sequence in 0..draws.dims()[0] {
        let track = |digit| {
            let draws = integers(&draws.i((sequence, digit)).unwrap());
            let [digit, x, y, dx, dy] = [0, 1, 2, 3, 4].map(|i| draws[i] as i32);
            let draws = svg::Draws { digit: digit as usize, x, y, dx, dy };
            draws.track(FRAMES, SIZE - golden.size("svg_digit"), svg::Bounce::Mirror)
        };
        let tracks = [0, 1].map(track);
        let positions = golden.get("svg.positions_yx").i(sequence).unwrap();
        assert_eq!(corners(&tracks), integers(&positions), "sequence {sequence}");

        let video = draw(&generator, &tracks);
        let expected = golden.get("svg.video_sum_per_frame").i(sequence).unwrap().to_vec1::<f64>().unwrap();
        for (sum, expected) in sums(&video).into_iter().zip(expected) {
            assert!((sum - expected).abs() < 1e-4, "sequence {sequence}: {sum}, expected {expected}");
        }
        if sequence == 0 {
            let expected = golden.get("svg.video").flatten_all().unwrap().to_vec1::<f32>().unwrap();
            assert!(video[..expected.len()] == expected, "the frames differ");
        }
    }
}

#[test]
fn openstl_sequences_equal_the_original() {
    let Some(golden) = fixture() else { return };
    let generator = Generator::new(Protocol::Openstl, &digits28(&golden), 2, SIZE);
    let draws = golden.get("openstl.draws_x_y_theta01");
    for sequence in 0..draws.dims()[0] {
        let track = |i| {
            let draws = draws.i((sequence, i)).unwrap().to_vec1::<f64>().unwrap();
            let digit = golden.get("openstl.digit_idx").i((sequence, i)).unwrap().to_scalar::<i64>().unwrap();
            let draws = openstl::Draws { x: draws[0], y: draws[1], turn: draws[2], digit: digit as usize };
            draws.track(FRAMES, SIZE - golden.size("openstl_digit"))
        };
        let tracks = [0, 1].map(track);
        let positions = golden.get("openstl.positions_yx").i(sequence).unwrap();
        assert_eq!(corners(&tracks), integers(&positions), "sequence {sequence}");

        let video: Vec<f32> = draw(&generator, &tracks);
        let grey: Vec<f32> = video.iter().map(|value| (value * 255.).round()).collect();
        let expected = integers(&golden.get("openstl.video_sum_per_frame").i(sequence).unwrap());
        assert_eq!(sums(&grey).into_iter().map(|sum| sum as i64).collect::<Vec<_>>(), expected);
        if sequence == 0 {
            let expected =
                bytes(golden.get("openstl.video_u8")).into_iter().map(|byte| f32::from(byte) / 255.);
            assert!(video == expected.collect::<Vec<_>>(), "the frames differ");
        }
    }
}

/// MNIST's 10,000 test digits, the only ones available: 9,000 are for training, and 1,000 are held out.
#[test]
fn real_handwriting_is_divided_between_the_splits() {
    let Some(folder) = outside("CANDLEPOWER_DATA", "data", "mnist") else { return };
    let folder = folder.to_str().unwrap();
    let images = |split| mnist::images(folder, split).unwrap();
    let (train, val) = (images(Split::Train), images(Split::Val));
    assert_eq!((train.len(), val.len(), train.side()), (9000, 1000, 28));
    assert_eq!(val, images(Split::Test));
    let known: std::collections::HashSet<_> = (0..train.len()).map(|i| train.get(i)).collect();
    assert!((0..val.len()).all(|i| !known.contains(val.get(i))), "a held-out digit is learned from");
    if let Some(golden) = fixture() {
        let first = digits28(&golden);
        assert!((0..first.len()).all(|i| first.get(i) == train.get(i)), "other digits than the fixture's");
    }
}

#[test]
fn real_handwriting_moves_and_has_labels() {
    let Some(folder) = outside("CANDLEPOWER_DATA", "data", "mnist") else { return };
    let folder = folder.to_str().unwrap().to_string();
    let sample = |index| Sample { index, split: Split::Val, epoch: 0, seed: 1, repeat: 0, augment: false };

    let labelled = Digits::open(&digits::Config { digits: folder.clone() }, Split::Train).unwrap();
    let batch = labelled.batch(&[0, 1, 2, 3, 4, 5].map(sample)).unwrap();
    assert_eq!(batch.label.to_vec1::<u32>().unwrap(), [7, 2, 1, 0, 4, 1]);

    // The all-zero predictor's mean squared error over 400 sequences of two of these digits, measured
    // independently of this code, is 0.0493 and 0.0414: the mean square of a pixel. Such a figure is accurate
    // to about 1.5 %, and so is ours.
    for (protocol, mean_square) in [(Protocol::Svg, 0.0493), (Protocol::Openstl, 0.0414)] {
        let config = Config { digits: folder.clone(), protocol, ..Config::default() };
        let moving = MovingMnist::open(&config, Split::Val).unwrap();
        let samples: Vec<Sample> = (0..400).map(sample).collect();
        let square = |batch: &[Sample]| {
            let target = moving.batch(batch).unwrap().target.to_dtype(DType::F64).unwrap();
            target
                .sqr()
                .unwrap()
                .mean_all()
                .unwrap()
                .to_device(&Device::Cpu)
                .unwrap()
                .to_scalar::<f64>()
                .unwrap()
        };
        let found = samples.chunks(50).map(square).sum::<f64>() / 8.;
        assert!(
            (found - mean_square).abs() < 0.06 * mean_square,
            "{protocol:?}: {found}, expected {mean_square}"
        );
    }
}
