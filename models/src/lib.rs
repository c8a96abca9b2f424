//! The model zoo of Candlepower, one file a model.

pub mod conv_lstm;

pub use conv_lstm::ConvLstm;
