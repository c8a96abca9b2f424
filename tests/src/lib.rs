//! candlepower-tests
