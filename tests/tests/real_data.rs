//! Real radar composites and folders of frames; skipped if `$CANDLEPOWER_DATA` has none.
#![allow(clippy::unwrap_used)]

use std::path::PathBuf;

use candle_core::{D, Tensor};
use candlepower::data::{Dataset, Open, Sample, Split};
use candlepower_datasets::frames::{self, Division, Frames};
use candlepower_datasets::radar::{self, Radar, composite};
use candlepower_tests::outside;

const EVENTS: [&str; 3] = ["20150515", "20160711", "20170131"];

fn composites() -> Option<PathBuf> {
    outside("CANDLEPOWER_DATA", "data", "radar-mch")
}

fn config(path: &std::path::Path) -> radar::Config {
    radar::Config {
        path: path.display().to_string(),
        train_events: EVENTS[..2].iter().map(|event| event.to_string()).collect(),
        val_events: vec![EVENTS[2].into()],
        ..radar::Config::default()
    }
}

fn samples(len: usize, split: Split) -> Vec<Sample> {
    (0..len)
        .map(|index| Sample { index, split, epoch: 0, seed: 1, repeat: 0, augment: split == Split::Train })
        .collect()
}

/// Indices as another program (Pillow) reads them, and the rain that the law gives for them, computed
/// independently.
#[test]
fn composites_have_the_values_of_the_law() {
    let Some(path) = composites() else { return };
    let file = path.join("20150515/AQC151351545F_00005.801.gif");
    let ([height, width], indices) = composite::read(&file).unwrap();
    assert_eq!((height, width, indices.len()), (640, 710, 640 * 710));
    let pixels = [
        (0, 0, 255, None),
        (320, 355, 66, Some(0.16958594571)),
        (492, 579, 150, Some(107.00149797)),
        (100, 510, 106, Some(3.65361844)),
        (100, 551, 97, Some(1.83114692)),
        (137, 387, 87, Some(0.84994311)),
        (137, 428, 113, Some(6.25254066)),
    ];
    for (row, column, index, rain) in pixels {
        let found = indices[row * width + column];
        assert_eq!(found, index, "row {row}, column {column}");
        match (composite::rain_rate(found), rain) {
            (found, None) => assert_eq!(found, None),
            (found, Some(rain)) => {
                assert!((f64::from(found.unwrap()) / rain - 1.).abs() < 1e-6, "{found:?}, not {rain}")
            }
        }
    }
    // Most pixels have no rain, and about three in ten are out of the radars' range.
    let count = |index: u8| indices.iter().filter(|&&i| i == index).count();
    assert_eq!((count(0), count(255)), (226_185, 139_980));
}

#[test]
fn events_become_crops_with_rain_and_a_mask() {
    let Some(path) = composites() else { return };
    let (train, val) = (
        Radar::open(&config(&path), Split::Train).unwrap(),
        Radar::open(&config(&path), Split::Val).unwrap(),
    );
    assert!(train.len() > 500 && val.len() > 200, "{} and {}", train.len(), val.len());
    let batch = val.batch(&samples(val.len(), Split::Val)[..16]).unwrap();
    assert_eq!(
        (batch.input.dims(), batch.target.dims()),
        (&[16, 6, 1, 64, 64][..], &[16, 12, 1, 64, 64][..])
    );
    // Rain of 0.1 mm/h, averaged over four pixels, on at least about a fifth of the pixels.
    let all = Tensor::cat(&[&batch.input, &batch.target], 1).unwrap();
    let rainy =
        all.ge(f64::from(composite::to_value(0.05))).unwrap().to_dtype(candle_core::DType::F32).unwrap();
    let shares = rainy.flatten_from(1).unwrap().mean(D::Minus1).unwrap().to_vec1::<f32>().unwrap();
    assert!(shares.iter().all(|share| *share > 0.2), "{shares:?}");
    let mask = batch.mask.unwrap();
    assert_eq!(mask.dims(), [16, 18, 1, 64, 64]);
    let known = mask.mean_all().unwrap().to_scalar::<f32>().unwrap();
    assert!(known > 0.5 && known <= 1., "{known}");
    // A sample's last input frame is the first of the sample that starts five frames later: one continuous
    // sequence.
    let minutes = composite::minutes(&path.join("20170131/AQC170310945F_00005.801.gif")).unwrap();
    assert_eq!(
        composite::minutes(&path.join("20170131/AQC170311300V_00005.801.gif")).unwrap() - minutes,
        195
    );
}

#[test]
fn composites_are_also_a_folder_of_frames() {
    let Some(path) = composites() else { return };
    let config = frames::Config {
        path: path.display().to_string(),
        resize: Some([32, 32]),
        frames_in: 5,
        frames_out: 3,
        ..frames::Config::default()
    };
    // Three folders are three sequences of 40 frames, one per split.
    for split in [Split::Train, Split::Val, Split::Test] {
        let data = Frames::open(&config, split).unwrap();
        assert_eq!(data.len(), 40 - 8 + 1);
        let batch = data.batch(&samples(2, split)).unwrap();
        assert_eq!(batch.input.dims(), [2, 5, 1, 32, 32]);
        let second = batch.input.narrow(0, 1, 1).unwrap().narrow(1, 0, 4).unwrap();
        let first = batch.input.narrow(0, 0, 1).unwrap().narrow(1, 1, 4).unwrap();
        let difference =
            (first - second).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
        assert_eq!(difference, 0., "the second sample is the first, a frame later");
    }
    let by_time = Frames::open(
        &frames::Config { split: Division::Time, val_share: 0.2, test_share: 0.2, ..config },
        Split::Val,
    );
    assert_eq!(by_time.unwrap().len(), 3);
}
