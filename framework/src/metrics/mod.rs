//! Metrics of a module's quality.

pub mod classification;
mod collected;
mod criterion;
mod mean;
pub mod video;

pub use collected::Collected;
pub use criterion::Criterion;
pub use mean::{Means, Sums};
