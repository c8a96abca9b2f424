//! Lines for people. Whoever reads them may have gone, as `head` has, or a full disk: that is no reason to end a training.

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
