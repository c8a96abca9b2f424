//! Numbers that say how good a module is.

pub mod video;
