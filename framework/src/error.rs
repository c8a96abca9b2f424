//! The library's error type.

use std::fmt;
use std::path::{Path, PathBuf};

use crate::config::ConfigError;

/// The result type of this library.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Everything that can go wrong, with messages written for the person who runs the training.
#[derive(thiserror::Error)]
pub enum Error {
    /// The configuration file or a `--set` override is invalid.
    #[error(transparent)]
    Config(Box<ConfigError>),
    /// A setting has an invalid value. The configuration layer finds its place in the file and turns this
    /// into [`Error::Config`]; without a file it is shown as is.
    #[error("`{key}`: {message}")]
    Setting {
        /// The key within the section that the failing code was built from, for example `patch`.
        key: String,
        /// What is wrong, and what was expected.
        message: String,
    },
    /// A file or folder could not be read or written.
    #[error("{path}: {source}", path = .path.display())]
    File {
        /// The file or folder.
        path: PathBuf,
        /// The operating system's error.
        source: std::io::Error,
    },
    /// A tensor operation failed.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
    /// Any other error, as a message.
    #[error("{0}")]
    Message(String),
}

/// The message itself, because a `main` that returns an error prints it with `Debug`.
impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl From<ConfigError> for Error {
    fn from(error: ConfigError) -> Self {
        // Boxed: it is rare and large, and would increase the size of every `Result`.
        Error::Config(Box::new(error))
    }
}

impl Error {
    /// Creates an error from a message.
    pub fn msg(message: impl Into<String>) -> Self {
        Error::Message(message.into())
    }

    /// Prefixes the error with the place where it happened.
    pub(crate) fn within(self, place: &str) -> Self {
        match self {
            // These already name their place.
            error @ (Error::Config(_) | Error::Setting { .. }) => error,
            error => Error::Message(format!("{place}: {error}")),
        }
    }

    /// An invalid value of the setting `key`; `message` states what was expected.
    pub fn setting(key: impl Into<String>, message: impl Into<String>) -> Self {
        Error::Setting { key: key.into(), message: message.into() }
    }

    /// For `map_err`: adds the path of the file that could not be read or written.
    pub fn file<E: Into<std::io::Error>>(path: impl AsRef<Path>) -> impl FnOnce(E) -> Self {
        move |source| Error::File { path: path.as_ref().to_path_buf(), source: source.into() }
    }

    /// For `map_err`: adds the path of the file with invalid content.
    pub fn content<E: std::fmt::Display>(path: impl AsRef<Path>) -> impl FnOnce(E) -> Self {
        move |source| Error::Message(format!("{}: {source}", path.as_ref().display()))
    }
}
