//! Lightning-style training for candle. You write a model and a dataset; this crate provides the training
//! loop, precision, checkpoints and logging.
//!
//! | you write | trait |
//! |---|---|
//! | something that turns a batch into a loss | [`Module`](module::Module) |
//! | something that reads samples by index | [`Dataset`](data::Dataset) |
//! | something that watches a run | [`Callback`](callback::Callback) |
//!
//! [`Trainer`](trainer::Trainer) trains a module on a dataset. [`Experiment`](experiment::Experiment) does
//! the same from a TOML file, with a [`Registry`](config::Registry) that resolves the names in it.
//!
//! Warnings, such as a checkpoint that is skipped, are [`tracing`](https://docs.rs/tracing) events: a program of its own
//! shows them with a subscriber, for example `tracing_subscriber::fmt::init()`. To save when the process is told to end,
//! attach [`OnSignal`](callbacks::OnSignal), and set its flags in a signal handler.
#![warn(clippy::print_stdout)]

pub mod accelerator;
pub mod atomic_file;
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

// Crates whose types appear in the public API, re-exported in the matching versions.
pub use error::{Error, Result};
pub use {candle_core, candle_nn, rand, schemars, serde, serde_json};

/// Common imports for training programs.
pub mod prelude {
    pub use candle_core::{DType, Device, Tensor};
    // Brings `.forward()` of candle's layers into scope without shadowing our `Module`.
    pub use candle_nn::{Module as _, VarBuilder};

    pub use crate::batch::{Batch, Labelled, LabelledSpec, Tensors, Video, VideoSpec};
    pub use crate::callback::{BuildCallback, Callback, Flow, Plan, Progress, Record, StepEnd, StopReason};
    pub use crate::callbacks::ProgressBar;
    pub use crate::config::Registry;
    pub use crate::data::{Data, Dataset, Open, OpenStream, Sample, Source, Split, Stream};
    pub use crate::experiment::{Experiment, Resume};
    pub use crate::module::{Build, Model, Module, Step};
    pub use crate::optim::{AdamConfig, AdamWConfig, OptimizerConfig, SgdConfig};
    pub use crate::trainer::{Trainer, TrainerConfig};
    pub use crate::{Error, Result, nn};
}
