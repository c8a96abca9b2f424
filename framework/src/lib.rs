//! Lightning-style training for candle: you write a model and a dataset; this crate owns the loop, the checkpoints
//! and the logs.

pub mod batch;
pub mod config;
pub mod data;
pub mod error;
pub mod metrics;
pub mod module;
pub mod params;
pub mod picture;
pub mod seed;
pub mod video_file;
