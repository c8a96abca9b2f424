//! candlepower-launcher
