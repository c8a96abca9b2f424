//! The model zoo of Candlepower, one file per model.
#![warn(clippy::print_stdout)]

pub mod conv_lstm;
pub mod conv_lstm_stack;
pub mod e3d_lstm;
pub mod mau;
pub mod mim;
mod pictures;
pub mod predrnn;
pub mod predrnn_pp;
pub mod predrnn_v2;
pub mod recurrent;
pub mod sim_vp;
pub mod svg_lp;
pub mod tau;

pub use conv_lstm::ConvLstm;
pub use conv_lstm_stack::ConvLstmStack;
pub use e3d_lstm::E3dLstm;
pub use mau::Mau;
pub use mim::Mim;
pub use predrnn::PredRnn;
pub use predrnn_pp::PredRnnPp;
pub use predrnn_v2::PredRnnV2;
pub use sim_vp::SimVp;
pub use svg_lp::SvgLp;
pub use tau::Tau;
