//! Numbers that say how good a module is.

mod mean;
pub mod video;

pub use mean::{Means, Sums};
