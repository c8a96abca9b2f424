//! Lightning-style training for candle: you write a model and a dataset; this crate owns the loop, the precision, the
//! checkpoints and the logs.
//!
//! | you write | here |
//! |---|---|
//! | something that turns a batch into a loss | [`Module`](module::Module) |
//! | something that reads samples by index | [`Dataset`](data::Dataset) |
//! | something that watches a run | [`Callback`](callback::Callback) |
//!
//! [`Trainer`](trainer::Trainer) trains a module on a dataset; [`Experiment`](experiment::Experiment) does the same
//! from a TOML file, with a [`Registry`](config::Registry) that gives the names in it a meaning.
#![warn(clippy::print_stdout)]

pub mod accelerator;
pub mod batch;
pub mod bench;
pub mod callback;
pub mod callbacks;
pub mod checkpoint;
pub mod collective;
pub mod config;
pub mod data;
pub mod error;
pub mod experiment;
pub mod finder;
mod grads;
pub mod logger;
mod memory;
pub mod metrics;
pub mod module;
pub mod nn;
pub mod optim;
pub mod params;
pub mod picture;
pub mod plot;
pub mod precision;
pub mod profiler;
mod reduction;
pub mod run_dir;
pub mod schedule;
pub mod seed;
mod taps;
mod trained;
pub mod trainer;
pub mod video_file;
pub mod weights;
pub mod whole_file;

// The crates whose types stand in our interfaces, in the versions that fit.
pub use error::{Error, Result};
pub use {candle_core, candle_nn, rand, schemars, serde, serde_json};

/// What nearly every program that trains needs.
pub mod prelude {
    pub use candle_core::{DType, Device, Tensor};
    // Brings `.forward()` of candle's layers into scope and leaves the name `Module` to ours.
    pub use candle_nn::{Module as _, VarBuilder};

    pub use crate::batch::{Batch, Labelled, LabelledSpec, Tensors, Video, VideoSpec};
    pub use crate::callback::{Callback, Flow, Plan, Progress, Record, StepEnd, StopReason, Watch};
    pub use crate::callbacks::ProgressBar;
    pub use crate::config::Registry;
    pub use crate::data::{Data, Dataset, Open, OpenStream, Sample, Source, Split, Stream};
    pub use crate::experiment::{Experiment, Resume};
    pub use crate::module::{Build, Model, Module, Step};
    pub use crate::optim::{AdamConfig, AdamWConfig, OptimizerConfig, SgdConfig};
    pub use crate::trainer::{Trainer, TrainerConfig};
    pub use crate::{Error, Result, nn};
}
