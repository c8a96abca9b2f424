//! The model zoo of Candlepower, one file a model.
#![warn(clippy::print_stdout)]

pub mod conv_lstm;
pub mod sim_vp;
pub mod svg_lp;
pub mod tau;

pub use conv_lstm::ConvLstm;
pub use sim_vp::SimVp;
pub use svg_lp::SvgLp;
pub use tau::Tau;
