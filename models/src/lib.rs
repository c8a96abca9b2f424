//! candlepower-models
