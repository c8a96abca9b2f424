//! The `[distributed]` section.

use std::time::Duration;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::trainer::duration;

/// Fields of `[distributed]`. How many devices there are is `trainer.devices`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct DistributedConfig {
    /// A rank that the others have waited for so long counts as failed, as does a run that has made no step for so long,
    /// as `"10 min"`.
    #[serde(with = "duration", skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<String>")]
    pub hang_timeout: Option<Duration>,
}

impl Default for DistributedConfig {
    fn default() -> Self {
        Self { hang_timeout: Some(Duration::from_secs(600)) }
    }
}

impl DistributedConfig {
    /// Refuses values that no ranks could work with.
    pub fn check(&self) -> Result<()> {
        if self.hang_timeout.is_some_and(|timeout| timeout.is_zero()) {
            return Err(Error::setting("hang_timeout", "expected a time above 0"));
        }
        Ok(())
    }

    /// How long ranks wait for each other.
    pub(crate) fn patience(&self) -> Duration {
        self.hang_timeout.unwrap_or(Duration::from_secs(600))
    }
}
