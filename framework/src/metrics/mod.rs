//! Numbers that say how good a module is.

mod criterion;
mod mean;
pub mod video;

pub use criterion::Criterion;
pub use mean::{Means, Sums};
