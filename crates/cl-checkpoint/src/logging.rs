//! Log messages of the commands on stderr, as text or JSON. The libraries emit `tracing` events and spans; a command
//! installs a subscriber once, with [`LogArgs::init`].

use std::fmt;

use tracing::field::{Field, Visit};
use tracing::level_filters::LevelFilter;
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields, FormattedFields, MakeWriter};
use tracing_subscriber::registry::LookupSpan;

/// Heading under which help texts list these options, separate from those of the command.
const HEADING: &str = "Logging options";

/// Logging options of all commands.
#[derive(clap::Args, Clone, Copy, Debug)]
pub struct LogArgs {
    /// Print more: -v for every step and file, -vv for everything. RUST_LOG selects by module, for example
    /// RUST_LOG=cl_train=debug.
    #[arg(short, long, action = clap::ArgAction::Count, global = true, help_heading = HEADING)]
    verbose: u8,
    /// Print only warnings and errors.
    #[arg(short, long, global = true, conflicts_with = "verbose", help_heading = HEADING)]
    quiet: bool,
    /// Format of messages on stderr. json: one object per line with time, level, target, spans and fields.
    #[arg(long, value_enum, default_value_t = LogFormat::Text, global = true, help_heading = HEADING)]
    log_format: LogFormat,
}

/// Format of log messages.
#[derive(clap::ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogFormat {
    /// Plain text.
    Text,
    /// JSON lines.
    Json,
}

impl LogArgs {
    /// Whether only warnings and errors are printed.
    pub fn is_quiet(self) -> bool {
        self.quiet
    }

    /// Whether messages are JSON.
    pub fn is_json(self) -> bool {
        self.log_format == LogFormat::Json
    }

    /// Installs a subscriber for the whole process; a second call has no effect. A valid `RUST_LOG` takes precedence
    /// over `-v` and `-q`.
    pub fn init(self, writer: impl for<'w> MakeWriter<'w> + Send + Sync + 'static) {
        let level = match (self.quiet, self.verbose) {
            (true, _) => LevelFilter::WARN,
            (false, 0) => LevelFilter::INFO,
            (false, 1) => LevelFilter::DEBUG,
            (false, _) => LevelFilter::TRACE,
        };
        // `-v` does not apply to dependencies.
        let ours =
            |level: LevelFilter| EnvFilter::new(format!("warn,{}", OURS.map(|c| format!("{c}={level}")).join(",")));
        let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| ours(level));
        let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(writer).with_ansi(false);
        // Fails only if a subscriber is already installed.
        let _ = match self.log_format {
            LogFormat::Text => builder.event_format(Plain).try_init(),
            LogFormat::Json => builder.json().flatten_event(true).try_init(),
        };
    }
}

/// Targets of events of this workspace.
const OURS: [&str; 13] = [
    "cl",
    "cl_adapters",
    "cl_checkpoint",
    "cl_cli",
    "cl_data",
    "cl_engine",
    "cl_eval",
    "cl_lab",
    "cl_merge",
    "cl_model",
    "cl_moe",
    "cl_torch",
    "cl_train",
];

/// Formats events as text: only the message at level INFO, with a prefix `warning: ` or `error: ` at higher levels, and
/// with level, spans and fields at lower levels.
struct Plain;

impl<S, N> FormatEvent<S, N> for Plain
where
    S: Subscriber + for<'s> LookupSpan<'s>,
    N: for<'w> FormatFields<'w> + 'static,
{
    fn format_event(&self, context: &FmtContext<'_, S, N>, mut out: Writer<'_>, event: &Event<'_>) -> fmt::Result {
        let mut parts = Parts::default();
        event.record(&mut parts);
        let level = *event.metadata().level();
        match level {
            Level::ERROR => write!(out, "error: {}", parts.message)?,
            Level::WARN => write!(out, "warning: {}", parts.message)?,
            Level::INFO => write!(out, "{}", parts.message)?,
            _ => {
                write!(out, "{} {}: ", level.as_str().to_lowercase(), event.metadata().target())?;
                for span in context.event_scope().into_iter().flat_map(|scope| scope.from_root()) {
                    let extensions = span.extensions();
                    match extensions.get::<FormattedFields<N>>().filter(|fields| !fields.is_empty()) {
                        Some(fields) => write!(out, "{}{{{fields}}}: ", span.name())?,
                        None => write!(out, "{}: ", span.name())?,
                    }
                }
                write!(out, "{}{}", parts.message, parts.fields)?;
            }
        }
        writeln!(out)
    }
}

#[derive(Default)]
struct Parts {
    message: String,
    fields: String,
}

impl Visit for Parts {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        if field.name() == "message" {
            self.message = format!("{value:?}");
        } else {
            self.fields += &format!(" {}={value:?}", field.name());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::sync::{Arc, Mutex};

    use super::*;

    #[derive(Clone, Default)]
    struct Buffer(Arc<Mutex<Vec<u8>>>);

    impl Write for Buffer {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn people_read_the_message_and_who_asks_gets_spans_and_fields() {
        let buffer = Buffer::default();
        let writer = buffer.clone();
        let subscriber = tracing_subscriber::fmt()
            .with_max_level(Level::DEBUG)
            .with_ansi(false)
            .with_writer(move || writer.clone())
            .event_format(Plain)
            .finish();
        tracing::subscriber::with_default(subscriber, || {
            let _round = tracing::info_span!("round", number = 2).entered();
            tracing::info!(rows = 3, "training");
            tracing::warn!("an odd row");
            tracing::debug!(step = 7, loss = 0.5, "step");
        });
        let text = String::from_utf8(buffer.0.lock().unwrap().clone()).unwrap();
        let debug = "debug cl_checkpoint::logging::tests: round{number=2}: step step=7 loss=0.5";
        assert_eq!(text, format!("training\nwarning: an odd row\n{debug}\n"));
    }
}
