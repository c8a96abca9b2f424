//! The datasets of Candlepower, one file or folder each. Each is opened from its own `[data]` section.
//!
//! | `data.name` | type | batch | content |
//! |---|---|---|---|
//! | `moving_mnist` | [`MovingMnist`] | [`Video`](candlepower::batch::Video) | moving, bouncing digits: the tutorial's data |
//! | `frames` | [`Frames`] | [`Video`](candlepower::batch::Video) | your own frames: pictures, animations, arrays |
//! | `radar` | [`Radar`] | [`Video`](candlepower::batch::Video) | rain over Switzerland, to forecast the next hour |
//! | `digits` | [`Digits`] | [`Labelled`](candlepower::batch::Labelled) | single digits with labels |
//!
//! `moving_mnist` and `digits` need no download: by default, `digits = "builtin"`, the digits are drawn by this crate.
//! Both get their digits from [`mnist`].
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
