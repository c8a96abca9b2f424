//! Moving MNIST: handwritten digits that move over a black square and bounce off its edges.
//!
//! Sequences are generated while training runs, by the rules of one of two [`Protocol`]s, or read from the fixed file
//! `mnist_test_seq.npy`. N. Srivastava, E. Mansimov, R. Salakhutdinov, "Unsupervised Learning of Video
//! Representations using LSTMs", ICML 2015.

mod generator;
pub mod openstl;
mod sequences;
pub mod svg;

use std::ops::RangeInclusive;
use std::path::Path;

use candle_core::{Device, Tensor};
use candlepower::batch::{Video, VideoSpec};
use candlepower::data::{Dataset, Open, Sample, Split};
use candlepower::error::{Error, Result};
pub use generator::{Generator, Track};
use schemars::JsonSchema;
use sequences::Sequences;
use serde::{Deserialize, Serialize};

use crate::mnist;

/// The fields of `[data]` for `name = "moving_mnist"`.
///
/// `protocol`, `stochastic` and `digits_per_frame` control how sequences are generated. They have no effect
/// if `digits` is a file of finished sequences.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Source of the digits: "builtin" (drawn by this program, no download), a folder of MNIST's IDX files,
    /// plain or .gz, or a file of finished sequences: mnist_test_seq.npy or .npy.gz. If one file must serve
    /// all splits, its first 90 % are used for training and its last 10 % for validation and test.
    pub digits: String,
    /// How generated digits move: "svg" (the tutorial's) or "openstl".
    pub protocol: Protocol,
    /// Whether a digit leaves a wall with a new random velocity instead of a mirrored one. Only with "svg".
    pub stochastic: bool,
    /// Digits in a generated sequence, 1 to 16.
    pub digits_per_frame: usize,
    /// Number of input frames, 1 to 1000.
    pub frames_in: usize,
    /// Number of frames to predict, 1 to 1000.
    pub frames_out: usize,
    /// Rows and columns of a frame in pixels, 33 to 1024. A file of finished sequences has its own size: 64.
    pub image_size: usize,
    /// Sequences per training epoch. Default: 60000 with "svg", 10000 with "openstl", or all sequences of a
    /// file. Generated sequences are new in every epoch.
    pub train_samples: Option<usize>,
    /// Validation sequences, the same every time; at most as many as a file holds.
    pub val_samples: usize,
    /// Test sequences, the same every time; at most as many as a file holds.
    pub test_samples: usize,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            digits: mnist::BUILTIN.to_string(),
            protocol: Protocol::Svg,
            stochastic: false,
            digits_per_frame: 2,
            frames_in: 10,
            frames_out: 10,
            image_size: 64,
            train_samples: None,
            val_samples: 1000,
            test_samples: 1000,
        }
    }
}

/// How digits move, and how overlapping digits are combined.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    /// E. Denton's generator, which the tutorial uses: [`svg`].
    Svg,
    /// The generator of OpenSTL and of most papers that report results on it: [`openstl`].
    Openstl,
}

impl Config {
    /// Rejects values that are wrong for any data.
    fn check(&self) -> Result<()> {
        let samples = 1..=usize::MAX;
        within("digits_per_frame", self.digits_per_frame, 1..=16)?;
        within("frames_in", self.frames_in, 1..=1000)?;
        within("frames_out", self.frames_out, 1..=1000)?;
        within("image_size", self.image_size, 33..=1024)?;
        within("train_samples", self.train_samples.unwrap_or(1), samples.clone())?;
        within("val_samples", self.val_samples, samples.clone())?;
        within("test_samples", self.test_samples, samples)?;
        match (self.stochastic, self.protocol) {
            (true, Protocol::Openstl) => Err(Error::setting(
                "stochastic",
                "expected false: only the protocol \"svg\" can be stochastic",
            )),
            _ => Ok(()),
        }
    }

    fn spec(&self) -> VideoSpec {
        VideoSpec {
            frames_in: self.frames_in,
            frames_out: self.frames_out,
            channels: 1,
            height: self.image_size,
            width: self.image_size,
        }
    }

    /// The configured number of sequences of this split, if set.
    fn samples(&self, split: Split) -> Option<usize> {
        match split {
            Split::Train => self.train_samples,
            Split::Val => Some(self.val_samples),
            Split::Test => Some(self.test_samples),
        }
    }
}

fn within(key: &str, value: usize, range: RangeInclusive<usize>) -> Result<()> {
    if range.contains(&value) {
        return Ok(());
    }
    let expected = match (range.start(), range.end()) {
        (start, &usize::MAX) => format!("at least {start}"),
        (start, end) => format!("{start} to {end}"),
    };
    Err(Error::setting(key, format!("expected {expected}, found {value}")))
}

/// Moving MNIST.
///
/// Batches: input (B, T_in, 1, H, W) and target (B, T_out, 1, H, W), f32 in `[0, 1]`. A generated sequence is
/// a function of its [`Sample`]'s generator: training sees new ones in every epoch, validation and test the
/// same ones every time, made of digits that training does not see.
pub struct MovingMnist {
    spec: VideoSpec,
    len: usize,
    source: Source,
}

enum Source {
    Generated(Generator),
    File(Sequences),
}

impl Open for MovingMnist {
    type Config = Config;

    fn open(config: &Config, split: Split) -> Result<Self> {
        config.check()?;
        let (spec, samples) = (config.spec(), config.samples(split));
        let path = Path::new(&config.digits);
        if sequences::is_sequence_file(path) {
            let sequences = Sequences::open(path, split, &spec)?;
            let len = sequences.len().min(samples.unwrap_or(usize::MAX));
            return Ok(Self { spec, len, source: Source::File(sequences) });
        }
        let digits = mnist::images(&config.digits, split)?;
        let generator = Generator::new(config.protocol, &digits, config.digits_per_frame, config.image_size);
        let len = samples.unwrap_or(match config.protocol {
            Protocol::Svg => svg::EPOCH,
            Protocol::Openstl => openstl::EPOCH,
        });
        Ok(Self { spec, len, source: Source::Generated(generator.stochastic(config.stochastic)) })
    }
}

impl Dataset for MovingMnist {
    type Batch = Video;

    fn len(&self) -> usize {
        self.len
    }

    fn spec(&self) -> VideoSpec {
        self.spec
    }

    fn batch(&self, samples: &[Sample]) -> Result<Video> {
        let VideoSpec { frames_in, frames_out, channels, height, width } = self.spec;
        let pixels = channels * height * width;
        let mut input = vec![0.; samples.len() * frames_in * pixels];
        let mut target = vec![0.; samples.len() * frames_out * pixels];
        let videos =
            input.chunks_exact_mut(frames_in * pixels).zip(target.chunks_exact_mut(frames_out * pixels));
        for (sample, (input, target)) in samples.iter().zip(videos) {
            let frames = input.chunks_exact_mut(pixels).chain(target.chunks_exact_mut(pixels));
            match &self.source {
                Source::Generated(generator) => {
                    let tracks = generator.tracks(frames_in + frames_out, &mut sample.rng());
                    generator.draw(&tracks, frames);
                }
                Source::File(sequences) => sequences.read(sample.index, frames)?,
            }
        }
        let tensor = |frames: Vec<f32>, time| {
            Tensor::from_vec(frames, (samples.len(), time, channels, height, width), &Device::Cpu)
        };
        Ok(Video::new(tensor(input, frames_in)?, tensor(target, frames_out)?))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn small() -> Config {
        Config { frames_in: 3, frames_out: 2, train_samples: Some(7), ..Config::default() }
    }

    fn sample(split: Split, epoch: u64, index: usize) -> Sample {
        Sample { index, split, epoch, seed: 11, repeat: 0, augment: split == Split::Train }
    }

    fn values(tensor: &Tensor) -> Vec<f32> {
        tensor.flatten_all().unwrap().to_vec1().unwrap()
    }

    /// All frames of the batch of these samples.
    fn frames(config: &Config, split: Split, samples: &[Sample]) -> Vec<f32> {
        let batch = MovingMnist::open(config, split).unwrap().batch(samples).unwrap();
        [values(&batch.input), values(&batch.target)].concat()
    }

    #[test]
    fn batches_have_the_shape_of_the_spec() {
        let config = Config { image_size: 40, digits_per_frame: 3, ..small() };
        let data = MovingMnist::open(&config, Split::Train).unwrap();
        let spec = VideoSpec { frames_in: 3, frames_out: 2, channels: 1, height: 40, width: 40 };
        assert_eq!((data.spec(), data.len()), (spec, 7));
        let batch = data.batch(&[sample(Split::Train, 0, 0), sample(Split::Train, 0, 6)]).unwrap();
        assert_eq!(batch.input.dims(), [2, 3, 1, 40, 40]);
        assert_eq!(batch.target.dims(), [2, 2, 1, 40, 40]);
        let most = values(&batch.input).into_iter().fold(0., f32::max);
        assert_eq!(most, 1.);
    }

    #[test]
    fn a_sequence_is_a_function_of_its_sample() {
        for protocol in [Protocol::Svg, Protocol::Openstl] {
            for stochastic in [false, protocol == Protocol::Svg] {
                let config = Config { protocol, stochastic, ..small() };
                let train = |samples: &[Sample]| frames(&config, Split::Train, samples);
                let [a, b] = [sample(Split::Train, 2, 5), sample(Split::Train, 2, 4)];
                assert_eq!(train(&[a]), train(&[a]));
                let (together, apart) = (train(&[a, b]), [train(&[a]), train(&[b])]);
                // A batch has the input frames of all samples first.
                let input = small().frames_in * 64 * 64;
                assert_eq!(together[..input], apart[0][..input]);
                assert_eq!(together[input..2 * input], apart[1][..input]);
                assert_ne!(train(&[a]), train(&[b]));
                assert_ne!(train(&[a]), train(&[Sample { epoch: 3, ..a }]));
                assert_ne!(train(&[a]), train(&[Sample { seed: 12, ..a }]));
            }
        }
    }

    #[test]
    fn a_longer_sequence_starts_as_the_shorter_one() {
        let longer = Config { frames_out: 9, ..small() };
        let one = [sample(Split::Val, 0, 0)];
        let short = frames(&small(), Split::Val, &one);
        assert_eq!(frames(&longer, Split::Val, &one)[..short.len()], short);
    }

    #[test]
    fn epochs_are_as_long_as_the_protocols() {
        let len = |protocol, split| {
            MovingMnist::open(&Config { protocol, ..Config::default() }, split).unwrap().len()
        };
        assert_eq!(len(Protocol::Svg, Split::Train), 60_000);
        assert_eq!(len(Protocol::Openstl, Split::Train), 10_000);
        assert_eq!(len(Protocol::Svg, Split::Val), 1000);
    }

    #[test]
    fn values_out_of_range_are_refused_before_a_file_is_looked_for() {
        let refusal = |config: Config| {
            let config = Config { digits: "no/where".to_string(), ..config };
            MovingMnist::open(&config, Split::Train).err().unwrap().to_string()
        };
        let default = Config::default;
        assert_eq!(refusal(Config { frames_in: 0, ..default() }), "`frames_in`: expected 1 to 1000, found 0");
        assert_eq!(
            refusal(Config { frames_out: 1001, ..default() }),
            "`frames_out`: expected 1 to 1000, found 1001"
        );
        assert_eq!(
            refusal(Config { image_size: 32, ..default() }),
            "`image_size`: expected 33 to 1024, found 32"
        );
        assert_eq!(
            refusal(Config { digits_per_frame: 17, ..default() }),
            "`digits_per_frame`: expected 1 to 16, found 17"
        );
        assert_eq!(
            refusal(Config { train_samples: Some(0), ..default() }),
            "`train_samples`: expected at least 1, found 0"
        );
        assert_eq!(
            refusal(Config { val_samples: 0, ..default() }),
            "`val_samples`: expected at least 1, found 0"
        );
        assert_eq!(
            refusal(Config { test_samples: 0, ..default() }),
            "`test_samples`: expected at least 1, found 0"
        );
        assert_eq!(
            refusal(Config { stochastic: true, protocol: Protocol::Openstl, ..default() }),
            "`stochastic`: expected false: only the protocol \"svg\" can be stochastic"
        );
        assert_eq!(
            refusal(default()),
            "`digits`: no/where: no such folder; use \"builtin\" for the digits that need no download, or a folder \
             that holds `train-images-idx3-ubyte` or `t10k-images-idx3-ubyte`, plain or .gz"
        );
    }

    #[test]
    fn settings_have_the_names_that_files_use() {
        let config: Config =
            serde_json::from_str(r#"{"digits": "a/folder", "protocol": "openstl", "frames_in": 5}"#).unwrap();
        let expected = Config {
            digits: "a/folder".to_string(),
            protocol: Protocol::Openstl,
            frames_in: 5,
            ..Config::default()
        };
        assert_eq!(config, expected);
        assert!(serde_json::from_str::<Config>(r#"{"frames": 5}"#).is_err());
    }
}
