//! Output for people. Write errors are ignored: a closed pipe (`head`) or a full disk is no reason to end a training.

/// Writes a line to standard output.
macro_rules! say {
    ($($line:tt)*) => {{
        use std::io::Write;
        let _ = writeln!(std::io::stdout(), $($line)*);
    }};
}

/// Writes a line to standard error.
macro_rules! tell {
    ($($line:tt)*) => {{
        use std::io::Write;
        let _ = writeln!(std::io::stderr(), $($line)*);
    }};
}

pub(crate) use {say, tell};
