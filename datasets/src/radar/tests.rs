#![allow(clippy::unwrap_used)]

use std::fs::File;

use tempfile::TempDir;

use super::*;

/// Writes a composite of 8 x 12 pixels.
fn write(folder: &Path, name: &str, index: impl Fn(usize, usize) -> u8) {
    let pixels: Vec<u8> = (0..8 * 12).map(|i| index(i / 12, i % 12)).collect();
    let palette: Vec<u8> = (0..=255u8).flat_map(|i| [i, 0, 255 - i]).collect();
    std::fs::create_dir_all(folder).unwrap();
    let mut encoder = gif::Encoder::new(File::create(folder.join(name)).unwrap(), 12, 8, &palette).unwrap();
    let mut frame = gif::Frame::from_indexed_pixels(12, 8, pixels, None);
    frame.palette = None;
    encoder.write_frame(&frame).unwrap();
}

/// An event on one day of 2015, with composites at these minutes past noon. It rains in the left half, a
/// little more in each further composite and row; the last column is not covered by radar.
fn event(root: &Path, name: &str, day: usize, minutes: &[usize]) {
    for minute in minutes {
        let file = format!("AQC15{day:03}12{minute:02}F_00005.801.gif");
        let index = |y: usize, x: usize| match x {
            11 => composite::NO_DATA,
            0..6 => (80 + 10 * minute / 5 + y) as u8,
            _ => 0,
        };
        write(&root.join(name), &file, index);
    }
}

/// Two training events, the first without a composite at 12:15, and one validation event.
fn place() -> (TempDir, Config) {
    let dir = tempfile::tempdir().unwrap();
    event(dir.path(), "a", 100, &[0, 5, 10, 20, 25]);
    event(dir.path(), "b", 101, &[0, 5, 10, 15]);
    event(dir.path(), "c", 102, &[30, 35, 40, 45]);
    let config = Config {
        path: dir.path().display().to_string(),
        train_events: vec!["a".into(), "b".into()],
        val_events: vec!["c".into()],
        frames_in: 2,
        frames_out: 2,
        max_missing: 1,
        pool: 2,
        crop: 4,
        crop_stride: 1,
        min_rain: 0.,
        ..Config::default()
    };
    (dir, config)
}

fn samples(data: &Radar, split: Split) -> Vec<Sample> {
    (0..data.len())
        .map(|index| Sample { index, split, epoch: 0, seed: 1, repeat: 0, augment: split == Split::Train })
        .collect()
}

fn flat(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

/// A sample's value at a time, row and column.
fn at(tensor: &Tensor, sample: usize, time: usize, y: usize, x: usize) -> f32 {
    let frame = tensor.get(sample).unwrap().get(time).unwrap().get(0).unwrap();
    frame.get(y).unwrap().get(x).unwrap().to_scalar().unwrap()
}

/// The mean value of four pixels with these indices.
fn mean_of(indices: [u8; 4]) -> f32 {
    let rates = indices.map(|index| f64::from(composite::rain_rate(index).unwrap()));
    composite::to_value(rates.iter().sum::<f64>() / 4.)
}

#[test]
fn pixels_are_rain_averaged_and_on_a_logarithm() {
    let (_dir, config) = place();
    let data = Radar::open(&config, Split::Val).unwrap();
    // 4 x 6 averaged pixels hold three crops of 4 x 4, at one time.
    assert_eq!((data.len(), data.spec().height), (3, 4));
    let batch = data.batch(&samples(&data, Split::Val)).unwrap();
    assert_eq!((batch.input.dims(), batch.target.dims()), (&[3, 2, 1, 4, 4][..], &[3, 2, 1, 4, 4][..]));
    for time in 0..4 {
        let (tensor, i) = if time < 2 { (&batch.input, time) } else { (&batch.target, time - 2) };
        let first = 80 + 10 * (30 / 5 + time as u8);
        for row in 0..4 {
            let above = first + 2 * row as u8;
            assert_eq!(
                at(tensor, 0, i, row, 0),
                mean_of([above, above, above + 1, above + 1]),
                "{time}, {row}"
            );
            assert_eq!(at(tensor, 0, i, row, 2), at(tensor, 0, i, row, 0), "{time}, {row}");
            assert_eq!(at(tensor, 0, i, row, 3), 0., "it does not rain in the right half");
        }
    }
    // The last column of averaged pixels contains one column of known pixels.
    assert_eq!(flat(batch.mask.as_ref().unwrap()), [1.; 3 * 4 * 16]);
    let quantity = batch.quantity.unwrap();
    assert_eq!((quantity.unit, quantity.minutes), ("mm/h", 5.));
    assert_eq!(quantity.thresholds[0], Threshold { value: 0.5, level: composite::to_value(0.5) });
}

#[test]
fn what_no_radar_sees_and_what_is_missing_is_masked() {
    let (_dir, config) = place();
    let config = Config { pool: 1, crop: 8, crop_stride: 4, ..config };
    let data = Radar::open(&config, Split::Train).unwrap();
    // Three start times in event a, one in event b; two crops each.
    let places: Vec<(usize, usize, usize)> =
        data.places.iter().map(|p| (p.event, p.start, p.corner[1])).collect();
    assert_eq!(
        places,
        [(0, 0, 0), (0, 0, 4), (0, 1, 0), (0, 1, 4), (0, 2, 0), (0, 2, 4), (1, 0, 0), (1, 0, 4)]
    );
    let batch = data.batch(&samples(&data, Split::Train)).unwrap();
    let mask = batch.mask.as_ref().unwrap();
    assert_eq!(mask.dims(), [8, 4, 1, 8, 8]);
    // In event a the composite of 12:15 is missing: time 3 of the first place, 2 of the next, 1 of the last.
    for (sample, missing) in [(0, 3), (1, 3), (2, 2), (3, 2), (4, 1), (5, 1), (6, 9), (7, 9)] {
        for time in 0..4 {
            let known = if time == missing { 0. } else { 1. };
            assert_eq!(at(mask, sample, time, 3, 0), known, "sample {sample}, time {time}");
            // The crop to the right extends beyond the radars' range.
            let at_the_edge = if sample % 2 == 1 { 0. } else { known };
            assert_eq!(at(mask, sample, time, 3, 7), at_the_edge, "sample {sample}, time {time}");
        }
    }
    // A missing input repeats the previous composite.
    assert_eq!(at(&batch.input, 4, 1, 3, 0), at(&batch.input, 4, 0, 3, 0));
    // Errors in masked pixels do not count.
    let loss = |shift: f64| {
        let wrong = (mask.narrow(1, 2, 2).unwrap() * -1.).unwrap().affine(1., 1.).unwrap();
        let prediction = (&batch.target + (wrong * shift).unwrap()).unwrap();
        batch.mse(&prediction).unwrap().to_scalar::<f32>().unwrap()
    };
    assert_eq!((loss(0.), loss(5.)), (0., 0.));
    // With `max_missing = 0`, samples with a missing composite are left out.
    let whole = Radar::open(&Config { max_missing: 0, ..config }, Split::Train).unwrap();
    assert_eq!(whole.places.iter().map(|place| place.event).collect::<Vec<_>>(), [1, 1]);
}

#[test]
fn crops_have_enough_rain() {
    let (_dir, config) = place();
    let count = |min_rain: f64| {
        Radar::open(&Config { min_rain, ..config.clone() }, Split::Val).map(|data| data.len())
    };
    // Rain covers 6, 4 and 2 of the 8 pixel columns of the three crops.
    assert_eq!([0.25, 0.26, 0.5, 0.51, 0.75].map(|share| count(share).unwrap()), [3, 2, 2, 1, 1]);
    assert_eq!(
        count(0.76).unwrap_err().to_string(),
        "`min_rain`: no crop of the val events has rain on 0.76 of its pixels; expected a lower fraction"
    );
}

#[test]
fn training_samples_are_changed_and_others_are_not() {
    let (_dir, config) = place();
    let changed = Config {
        augment: Augment { flip: true, rotate: true, crop: true, ..Augment::default() },
        ..config.clone()
    };
    for (split, same) in [(Split::Val, true), (Split::Train, false)] {
        let batch = |config: &Config, epoch| {
            let data = Radar::open(config, split).unwrap();
            let samples = samples(&data, split).into_iter().map(|sample| Sample { epoch, ..sample });
            flat(&data.batch(&samples.collect::<Vec<_>>()).unwrap().input)
        };
        assert_eq!(batch(&config, 0) == batch(&changed, 0), same);
        assert_eq!(batch(&changed, 0), batch(&changed, 0));
        assert!(same || batch(&changed, 0) != batch(&changed, 1));
    }
}

#[test]
fn a_cache_changes_nothing() {
    let (dir, config) = place();
    let cached = Config { cache: Some(dir.path().join("cache")), ..config.clone() };
    let batch = |config: &Config| {
        let data = Radar::open(config, Split::Train).unwrap();
        let batch = data.batch(&samples(&data, Split::Train)).unwrap();
        [flat(&batch.input), flat(&batch.target), flat(&batch.mask.unwrap())]
    };
    let expected = batch(&config);
    assert_eq!(batch(&cached), expected);
    assert_eq!(batch(&cached), expected);
    write(&dir.path().join("b"), "AQC151011200F_00005.801.gif", |_, _| 200);
    assert_ne!(batch(&cached), expected);
    assert_eq!(batch(&cached), batch(&config));
}

#[test]
fn broken_events_are_named() {
    let refusal = |damage: &dyn Fn(&Path), change: &dyn Fn(&mut Config)| {
        let (dir, mut config) = place();
        damage(dir.path());
        change(&mut config);
        let error = Radar::open(&config, Split::Train).err().unwrap().to_string();
        error.replace(&format!("{}/", config.path), "").replace(&config.path, "ROOT")
    };
    let damaged = |damage: &dyn Fn(&Path)| refusal(damage, &|_| ());
    let set = |change: &dyn Fn(&mut Config)| refusal(&|_| (), change);

    let cut = damaged(&|root| {
        let path = root.join("b/AQC151011205F_00005.801.gif");
        let bytes = std::fs::read(&path).unwrap();
        std::fs::write(&path, &bytes[..bytes.len() / 2]).unwrap();
    });
    assert!(cut.starts_with("b/AQC151011205F_00005.801.gif: cannot be read as .gif: "), "{cut}");
    let small = damaged(&|root| {
        let file = File::create(root.join("b/AQC151011205F.gif")).unwrap();
        std::fs::remove_file(root.join("b/AQC151011205F_00005.801.gif")).unwrap();
        let mut encoder = gif::Encoder::new(file, 3, 2, &[0, 0, 0, 1, 1, 1]).unwrap();
        encoder.write_frame(&gif::Frame::from_indexed_pixels(3, 2, vec![0; 6], None)).unwrap();
    });
    assert_eq!(small, "b/AQC151011205F.gif: has 2x3 pixels; expected 8x12, as a/AQC151001200F_00005.801.gif");
    assert_eq!(
        damaged(&|root| write(&root.join("b"), "AQC151011202F.gif", |_, _| 0)),
        "b/AQC151011202F.gif: is 2 minutes after the first composite; expected one every 5 minutes"
    );
    assert_eq!(
        damaged(&|root| write(&root.join("b"), "AQC151011205V.gif", |_, _| 0)),
        "b/AQC151011205V.gif: has the same time as b/AQC151011205F_00005.801.gif"
    );
    assert!(
        damaged(&|root| write(&root.join("b"), "rain.gif", |_, _| 0))
            .starts_with("b/rain.gif: expected a name")
    );
    assert_eq!(
        damaged(&|root| event(root, "c", 100, &[20, 25])),
        "`val_events`: c has the same time as a of `train_events`: no event may be in two splits"
    );
    assert_eq!(
        set(&|config| config.val_events = vec!["a".into()]),
        "`val_events`: a has the same time as a of `train_events`: no event may be in two splits"
    );
    assert_eq!(
        set(&|config| config.frames_out = 3),
        "b: its composites span 4 times of 5 minutes; expected at least 5, which a sample takes"
    );
    assert_eq!(
        set(&|config| config.crop = 5),
        "`crop`: expected at most 4, found 5: a composite has 8x12 pixels, averaged by 2"
    );
    assert!(set(&|config| config.train_events = vec!["z".into()]).starts_with("z: "));
    assert_eq!(
        set(&|config| config.path = "no/where".into()),
        "`path`: ROOT: no such folder; expected one with a folder for each event"
    );
    assert_eq!(
        set(&|config| config.val_events = Vec::new()),
        "`val_events`: expected the name of at least one folder of composites"
    );
    assert_eq!(set(&|config| config.pool = 0), "`pool`: expected at least 1, found 0");
    assert_eq!(
        set(&|config| config.min_rain = 2.),
        "`min_rain`: expected a fraction between 0 and 1, found 2"
    );
    assert_eq!(
        set(&|config| config.thresholds = vec![0.]),
        "`thresholds`: expected rain rates above 0 mm/h, found 0"
    );
    let (dir, config) = place();
    std::fs::create_dir(dir.path().join("d")).unwrap();
    let config = Config { train_events: vec!["d".into()], ..config };
    let error = Radar::open(&config, Split::Train).err().unwrap().to_string();
    assert!(error.ends_with("d: holds no composites; expected .gif files"), "{error}");
}

#[test]
fn an_event_is_predicted_from_where_it_rains_most() {
    let (dir, config) = place();
    let data = Radar::open(&config, Split::Train).unwrap();
    // The whole of event `b`: its first window, at the left, where it rains.
    let given = Radar::read(&config, &data.spec(), &dir.path().join("b")).unwrap();
    assert_eq!((given.input.dims(), given.target.dims()), (&[1, 2, 1, 4, 4][..], &[1, 2, 1, 4, 4][..]));
    let place = Place { event: 1, start: 0, corner: [0, 0] };
    let index = data.places.iter().position(|other| *other == place).unwrap();
    let expected = data
        .batch(&[Sample { index, split: Split::Val, epoch: 0, seed: 1, repeat: 0, augment: false }])
        .unwrap();
    assert_eq!((flat(&given.input), flat(&given.target)), (flat(&expected.input), flat(&expected.target)));
    assert_eq!(flat(given.mask.as_ref().unwrap()), flat(expected.mask.as_ref().unwrap()));
    // Future frames are zero and masked.
    event(dir.path(), "now", 103, &[0, 5, 10]);
    let given = Radar::read(&config, &data.spec(), &dir.path().join("now")).unwrap();
    assert!(flat(&given.target).iter().all(|value| *value == 0.));
    let mask = flat(given.mask.as_ref().unwrap());
    assert!(mask[..32].iter().all(|known| *known == 1.) && mask[32..].iter().all(|known| *known == 0.));
    // Rain on the right.
    for minute in [0, 5] {
        let rain = |_, x: usize| if (7..11).contains(&x) { 90 } else { 0 };
        write(&dir.path().join("right"), &format!("AQC1510512{minute:02}F_00005.801.gif"), rain);
    }
    let given = Radar::read(&config, &data.spec(), &dir.path().join("right")).unwrap();
    assert!(at(&given.input, 0, 0, 0, 2) > 0., "{:?}", flat(&given.input));
    event(dir.path(), "short", 104, &[0]);
    let error = Radar::read(&config, &data.spec(), &dir.path().join("short")).unwrap_err().to_string();
    assert!(
        error.ends_with("its composites span 1 times of 5 minutes; expected at least 2 to predict from"),
        "{error}"
    );
}
