//! Configuration files: TOML with the place of every value kept, so that an error can show it; and the registry that
//! gives the names in it a meaning.

mod document;
mod error;
mod registry;
pub(crate) mod schema;
mod wording;

pub use document::{Document, Named};
pub(crate) use document::{did_you_mean, quoted_list, untag};
pub use error::ConfigError;
pub use registry::Registry;
pub(crate) use registry::{CallbackRecipe, DataRecipe, ModuleRecipe};
