//! Configuration files: TOML that keeps the location of every value for error messages, and the registry that
//! resolves the names in it.

mod document;
mod error;
mod registry;
pub(crate) mod schema;
mod wording;

pub use document::{Document, Named};
pub(crate) use document::{did_you_mean, quoted_list, table, untag};
pub use error::ConfigError;
pub use registry::Registry;
pub(crate) use registry::{CallbackRecipe, DataRecipe, ModuleRecipe};
