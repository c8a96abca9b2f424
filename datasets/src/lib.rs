//! candlepower-datasets
