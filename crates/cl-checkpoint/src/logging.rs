//! What a command says on stderr while it works: which events of `tracing`, as text or as JSON. The libraries emit events and
//! spans; a command subscribes once, with [`LogArgs::init`].

use std::fmt;

use tracing::field::{Field, Visit};
use tracing::level_filters::LevelFilter;
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields, FormattedFields, MakeWriter};
use tracing_subscriber::registry::LookupSpan;

/// Options that all commands share.
#[derive(clap::Args, Clone, Copy, Debug)]
pub struct LogArgs {
    /// Say more: -v every step and file, -vv everything. RUST_LOG selects by module, as in RUST_LOG=cl_train=debug.
    #[arg(short, long, action = clap::ArgAction::Count, global = true)]
    verbose: u8,
    /// Say only what went wrong.
    #[arg(short, long, global = true, conflicts_with = "verbose")]
    quiet: bool,
    /// How messages on stderr are written; json has time, level, target, spans and fields, one object a line.
    #[arg(long, value_enum, default_value_t = LogFormat::Text, global = true)]
    log_format: LogFormat,
}

/// How messages are written.
#[derive(clap::ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogFormat {
    /// For people.
    Text,
    /// For programs.
    Json,
}

impl LogArgs {
    /// Whether nothing but warnings and errors is wanted.
    pub fn is_quiet(self) -> bool {
        self.quiet
    }

    /// Whether messages are for programs.
    pub fn is_json(self) -> bool {
        self.log_format == LogFormat::Json
    }

    /// Subscribes for the whole process; a second call changes nothing. `RUST_LOG`, where it is set and can be read, decides
    /// what is said instead of `-v` and `-q`.
    pub fn init(self, writer: impl for<'w> MakeWriter<'w> + Send + Sync + 'static) {
        let level = match (self.quiet, self.verbose) {
            (true, _) => LevelFilter::WARN,
            (false, 0) => LevelFilter::INFO,
            (false, 1) => LevelFilter::DEBUG,
            (false, _) => LevelFilter::TRACE,
        };
        // Other crates' own debugging is not what `-v` asks for.
        let ours =
            |level: LevelFilter| EnvFilter::new(format!("warn,{}", OURS.map(|c| format!("{c}={level}")).join(",")));
        let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| ours(level));
        let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(writer).with_ansi(false);
        // An error means that a subscriber is there already.
        let _ = match self.log_format {
            LogFormat::Text => builder.event_format(Plain).try_init(),
            LogFormat::Json => builder.json().flatten_event(true).try_init(),
        };
    }
}

/// The workspace's crates, by the targets of their events.
const OURS: [&str; 12] = [
    "cl",
    "cl_adapters",
    "cl_checkpoint",
    "cl_cli",
    "cl_data",
    "cl_eval",
    "cl_lab",
    "cl_merge",
    "cl_model",
    "cl_moe",
    "cl_torch",
    "cl_train",
];

/// The message alone at level INFO, behind `warning: ` or `error: ` above it, and with level, spans and fields below it.
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
