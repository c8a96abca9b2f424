//! The one error type of the library.

use std::path::{Path, PathBuf};

use crate::config::ConfigError;

/// What a fallible call of this library returns.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Everything that can go wrong, in words for the person who runs the training.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The configuration file, or a `--set`, asks for something that cannot be.
    #[error(transparent)]
    Config(Box<ConfigError>),
    /// A setting has a value that does not fit. The configuration layer finds the place in the file and turns this
    /// into [`Error::Config`]; code without a file shows it as it is.
    #[error("`{key}`: {message}")]
    Setting {
        /// The key inside the section that the failing code was built from, for example `patch`.
        key: String,
        /// What is wrong, and what was expected.
        message: String,
    },
    /// A file or folder could not be read or written.
    #[error("{path}: {source}", path = .path.display())]
    File {
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A tensor operation failed.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
    /// Anything else, said in plain words.
    #[error("{0}")]
    Message(String),
}

impl From<ConfigError> for Error {
    fn from(error: ConfigError) -> Self {
        // Boxed: it is rare and large, and every `Result` of the library has its size.
        Error::Config(Box::new(error))
    }
}

impl Error {
    /// A plain message.
    pub fn msg(message: impl Into<String>) -> Self {
        Error::Message(message.into())
    }

    /// The same error, with where it happened in front.
    pub(crate) fn within(self, place: &str) -> Self {
        match self {
            // These have places of their own.
            error @ (Error::Config(_) | Error::Setting { .. }) => error,
            error => Error::Message(format!("{place}: {error}")),
        }
    }

    /// A value of the setting `key` that does not fit; `message` says what was expected.
    pub fn setting(key: impl Into<String>, message: impl Into<String>) -> Self {
        Error::Setting { key: key.into(), message: message.into() }
    }

    /// For `map_err`: names the file that could not be read or written.
    pub fn file<E: Into<std::io::Error>>(path: impl AsRef<Path>) -> impl FnOnce(E) -> Self {
        move |source| Error::File { path: path.as_ref().to_path_buf(), source: source.into() }
    }

    /// For `map_err`: names the file whose content is not what it should be.
    pub fn content<E: std::fmt::Display>(path: impl AsRef<Path>) -> impl FnOnce(E) -> Self {
        move |source| Error::Message(format!("{}: {source}", path.as_ref().display()))
    }
}
