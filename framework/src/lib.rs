//! candlepower
