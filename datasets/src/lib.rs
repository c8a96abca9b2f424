//! The datasets of Candlepower, one file or folder a dataset. Each is opened from its own `[data]` section.
//!
//! | `data.name` | type | batch | what |
//! |---|---|---|---|
//! | `moving_mnist` | [`MovingMnist`] | [`Video`](candlepower::batch::Video) | digits that move and bounce: the tutorial's data |
//! | `digits` | [`Digits`] | [`Labelled`](candlepower::batch::Labelled) | single digits and what they are |
//!
//! Both start without a download: their default, `digits = "builtin"`, draws the digits itself. [`mnist`] is where
//! both get them.
#![warn(clippy::print_stdout)]

mod bytes;
pub mod digits;
pub mod mnist;
pub mod moving_mnist;
mod npy;
mod parts;

pub use digits::Digits;
pub use moving_mnist::MovingMnist;
