//! The datasets of Candlepower, one file or folder a dataset. Each is opened from its own `[data]` section.
//!
//! | `data.name` | type | batch | what |
//! |---|---|---|---|
//! | `moving_mnist` | [`MovingMnist`] | [`Video`](candlepower::batch::Video) | digits that move and bounce: the tutorial's data |
//! | `frames` | [`Frames`] | [`Video`](candlepower::batch::Video) | frames that you have: pictures, animations, arrays |
//! | `radar` | [`Radar`] | [`Video`](candlepower::batch::Video) | rain over Switzerland, to forecast the next hour |
//! | `digits` | [`Digits`] | [`Labelled`](candlepower::batch::Labelled) | single digits and what they are |
//!
//! `moving_mnist` and `digits` start without a download: their default, `digits = "builtin"`, draws the digits itself.
//! [`mnist`] is where both get them.
#![warn(clippy::print_stdout)]

mod augment;
mod bytes;
mod cache;
pub mod digits;
pub mod frames;
pub mod mnist;
pub mod moving_mnist;
mod npy;
mod parts;
pub mod radar;
mod windows;

pub use augment::Augment;
pub use digits::Digits;
pub use frames::Frames;
pub use moving_mnist::MovingMnist;
pub use radar::Radar;
