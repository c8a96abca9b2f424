//! The model zoo of Candlepower, one file a model.
#![warn(clippy::print_stdout)]

pub mod conv_lstm;

pub use conv_lstm::ConvLstm;
