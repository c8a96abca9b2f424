//! By what validations are compared.

use serde::{Deserialize, Serialize};

/// What makes one validation better than another.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Criterion {
    /// The metric.
    pub monitor: String,
    /// Whether its largest value is the best; else its smallest.
    pub maximize: bool,
}

impl Criterion {
    pub(crate) fn new(monitor: &str, maximize: bool) -> Self {
        Self { monitor: monitor.to_string(), maximize }
    }

    /// Whether what was compared by `before`, where that is known, can be compared by this.
    pub(crate) fn goes_on(&self, before: Option<&Self>) -> bool {
        before.is_none_or(|before| before == self)
    }
}
