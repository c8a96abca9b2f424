//! A parsed configuration file with its overrides.

/// placeholder
pub struct Document;
/// placeholder
pub struct Named;
