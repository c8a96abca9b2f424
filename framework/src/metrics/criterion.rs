//! The criterion that validations are compared by.

use serde::{Deserialize, Serialize};

/// What makes one validation better than another.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Criterion {
    /// The metric.
    pub monitor: String,
    /// Whether the largest value is best; otherwise the smallest is.
    pub maximize: bool,
}

impl Criterion {
    pub(crate) fn new(monitor: &str, maximize: bool) -> Self {
        Self { monitor: monitor.to_string(), maximize }
    }

    /// Whether values compared by `before`, if known, can also be compared by this criterion.
    pub(crate) fn goes_on(&self, before: Option<&Self>) -> bool {
        before.is_none_or(|before| before == self)
    }
}
