//! Configuration files: TOML with the place of every value kept, so that an error can show it.

mod document;
mod error;

pub use document::{Document, Named};
pub use error::ConfigError;
