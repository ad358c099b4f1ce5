//! Standard output, which is for results only. Everything else goes to stderr.

use std::fmt::Display;
use std::io::{Error, ErrorKind, Result, StdoutLock, Write};

/// Standard output that returns errors instead of panicking.
pub struct Stdout(StdoutLock<'static>);

impl Stdout {
    /// Locks the process's standard output.
    pub fn lock() -> Stdout {
        Stdout(std::io::stdout().lock())
    }
}

impl Write for Stdout {
    fn write(&mut self, bytes: &[u8]) -> Result<usize> {
        self.0.write(bytes).and_then(|n| self.0.flush().map(|()| n)).map_err(named)
    }

    fn flush(&mut self) -> Result<()> {
        self.0.flush().map_err(named)
    }
}

fn named(error: Error) -> Error {
    Error::new(error.kind(), format!("cannot write to standard output: {error}"))
}

/// Whether the error means that the reader has closed the output.
pub fn is_closed_pipe(error: &anyhow::Error) -> bool {
    let kind = |cause: &(dyn std::error::Error + 'static)| {
        // serde_json's errors contain an I/O error without naming it as their source.
        let of_json = || cause.downcast_ref::<serde_json::Error>().and_then(serde_json::Error::io_error_kind);
        cause.downcast_ref::<Error>().map(Error::kind).or_else(of_json)
    };
    error.chain().any(|cause| kind(cause) == Some(ErrorKind::BrokenPipe))
}

/// Prints a line to stderr during a chat. Other commands use `tracing`.
pub fn say(line: impl Display) {
    let _ = writeln!(std::io::stderr(), "{line}");
}
