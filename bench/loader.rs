//! Samples per second that data workers produce: `cargo run --release --example loader [FOLDER]`.
//!
//! Measures the data of `configs/quickstart.toml` and, given the folder of composites, of
//! `configs/radar.toml`: batches of 8, made by one thread and by two, for three seconds each, with every
//! pixel read once. A training step needs its batch size divided by its time.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use candlepower::Result;
use candlepower::batch::Video;
use candlepower::data::{Dataset, Open, Order, Split};
use candlepower_datasets::moving_mnist::{self, MovingMnist, Protocol};
use candlepower_datasets::radar::{self, Radar};
use candlepower_datasets::{Augment, frames};

const BATCH: usize = 8;
const TIME: Duration = Duration::from_secs(3);

/// Reads every pixel, as a step does: fresh zeroed memory is only allocated when it is accessed.
fn read(batch: &Video) -> Result<()> {
    for frames in [&batch.input, &batch.target] {
        std::hint::black_box(frames.sum_all()?);
    }
    Ok(())
}

/// Samples per second.
fn speed(data: &dyn Dataset<Batch = Video>, threads: usize) -> f64 {
    let batches: Vec<_> =
        Order::new(1, data.len(), BATCH).from(0, 0).take(4096).map(|(samples, _)| samples).collect();
    let (next, made, start) = (AtomicUsize::new(0), AtomicUsize::new(0), Instant::now());
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                while start.elapsed() < TIME {
                    let samples = &batches[next.fetch_add(1, Ordering::Relaxed) % batches.len()];
                    if let Err(error) = data.batch(samples).and_then(|batch| read(&batch)) {
                        eprintln!("{error}");
                        return;
                    }
                    made.fetch_add(samples.len(), Ordering::Relaxed);
                }
            });
        }
    });
    made.load(Ordering::Relaxed) as f64 / start.elapsed().as_secs_f64()
}

fn show(name: &str, data: &dyn Dataset<Batch = Video>) {
    let [one, two] = [1, 2].map(|threads| speed(data, threads));
    println!("{name:34} {one:8.0} samples/s by one worker, {two:8.0} by two");
}

fn main() -> Result<()> {
    let quickstart = moving_mnist::Config {
        protocol: Protocol::Openstl,
        digits_per_frame: 1,
        frames_in: 5,
        frames_out: 5,
        train_samples: Some(16_000),
        ..Default::default()
    };
    show("quickstart, 5 + 5 x 64x64", &MovingMnist::open(&quickstart, Split::Train)?);
    let Some(folder) = std::env::args().nth(1) else { return Ok(()) };
    let radar = radar::Config {
        path: folder.clone(),
        train_events: vec!["20150515".into(), "20160711".into()],
        val_events: vec!["20170131".into()],
        augment: Augment { flip: true, flip_vertical: true, rotate: true, crop: true, ..Default::default() },
        ..Default::default()
    };
    let start = Instant::now();
    let data = Radar::open(&radar, Split::Train)?;
    println!("radar: {} samples, opened in {:.1} s", data.len(), start.elapsed().as_secs_f64());
    show("radar, 6 + 12 x 64x64", &data);
    let pictures = frames::Config {
        path: folder,
        resize: Some([64, 64]),
        frames_in: 5,
        frames_out: 5,
        augment: Augment { flip: true, brightness: 0.1, ..Default::default() },
        ..Default::default()
    };
    show("the same as frames, 5 + 5 x 64x64", &frames::Frames::open(&pictures, Split::Train)?);
    Ok(())
}
