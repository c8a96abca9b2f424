//! A configuration error that shows its location: file, line, column, the line itself, and what was expected.

use std::fmt;
use std::ops::Range;

/// What is wrong with a configuration, and where.
#[derive(Debug)]
pub struct ConfigError {
    /// The file, or the `--set` option, that contains the error.
    pub origin: String,
    /// Line and column, from 1. Absent if something is missing.
    pub place: Option<(usize, usize)>,
    /// The line itself, and which of its columns to underline.
    pub line: Option<(String, Range<usize>)>,
    /// What is wrong, and what was expected.
    pub message: String,
    /// What to do about it, if there is a good guess.
    pub hint: Option<String>,
}

impl ConfigError {
    /// An error at a byte range of `text`.
    pub fn at(origin: &str, text: &str, span: Range<usize>, message: String) -> Self {
        let start = span.start.min(text.len());
        let line_start = text[..start].rfind('\n').map_or(0, |newline| newline + 1);
        let line_end = text[start..].find('\n').map_or(text.len(), |newline| start + newline);
        let line = text[line_start..line_end].trim_end().to_string();
        let column = text[line_start..start].chars().count();
        let width = text[start..span.end.clamp(start, line_end)].trim_end().chars().count().max(1);
        Self {
            origin: origin.to_string(),
            place: Some((text[..start].matches('\n').count() + 1, column + 1)),
            line: Some((line, column..column + width)),
            message,
            hint: None,
        }
    }

    /// An error about something missing from the file.
    pub fn missing(origin: &str, message: String) -> Self {
        Self { origin: origin.to_string(), place: None, line: None, message, hint: None }
    }

    /// Sets the hint about what to do.
    pub fn hint(mut self, hint: Option<String>) -> Self {
        self.hint = hint;
        self
    }
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.origin)?;
        if let Some((line, column)) = self.place {
            write!(f, ":{line}:{column}")?;
        }
        write!(f, ": {}", self.message)?;
        if let (Some((line, columns)), Some((number, _))) = (&self.line, self.place) {
            let margin = " ".repeat(number.to_string().len());
            let underline = " ".repeat(columns.start) + &"^".repeat(columns.len());
            write!(f, "\n{margin} |\n{number} | {line}\n{margin} | {underline}")?;
        }
        if let Some(hint) = &self.hint {
            write!(f, "\n{hint}")?;
        }
        Ok(())
    }
}

impl std::error::Error for ConfigError {}
