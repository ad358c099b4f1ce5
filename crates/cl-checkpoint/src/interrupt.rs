use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// A request to stop that long work looks at between its steps: a step ends, what is worth keeping is saved, temporaries go.
///
/// Clones share the request. [`Interrupt::default`] is one that nobody makes.
///
/// ```
/// let interrupt = cl_checkpoint::Interrupt::default();
/// let same = interrupt.clone();
/// assert!(!interrupt.requested());
/// same.request();
/// assert!(interrupt.requested());
/// ```
#[derive(Clone, Debug, Default)]
pub struct Interrupt {
    signal: Arc<AtomicUsize>, // 0 for none
}

/// SIGINT's number, as a request in code counts.
const SIGINT: usize = 2;

impl Interrupt {
    /// Asks for the stop, as Ctrl-C does.
    pub fn request(&self) {
        self.signal.store(SIGINT, Ordering::Relaxed);
    }

    /// Whether to stop.
    pub fn requested(&self) -> bool {
        self.signal.load(Ordering::Relaxed) != 0
    }

    /// What a shell expects of a program that a signal has stopped: 128 plus its number (130 for Ctrl-C, 143 for SIGTERM).
    /// `None` when nobody asked.
    pub fn exit_code(&self) -> Option<u8> {
        match self.signal.load(Ordering::Relaxed) {
            0 => None,
            signal => Some(128 + signal as u8),
        }
    }

    /// An interrupt that SIGINT, SIGTERM and SIGHUP request. A second signal ends the process at once, as without it.
    ///
    /// To be called once, at the start of a command.
    ///
    /// # Errors
    /// The operating system's, when a handler cannot be set.
    #[cfg(feature = "signals")]
    pub fn on_signals() -> std::io::Result<Interrupt> {
        use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
        use signal_hook::flag;
        let interrupt = Interrupt::default();
        let second = Arc::new(std::sync::atomic::AtomicBool::new(false));
        for signal in [SIGINT, SIGTERM, SIGHUP] {
            // In this order: the first signal finds the condition unset, and sets it for the next one.
            flag::register_conditional_shutdown(signal, 128 + signal, second.clone())?;
            flag::register(signal, second.clone())?;
            flag::register_usize(signal, interrupt.signal.clone(), signal as usize)?;
        }
        Ok(interrupt)
    }
}

#[cfg(all(test, feature = "signals"))]
mod tests {
    use super::*;

    #[test]
    fn a_signal_requests_the_stop_and_names_the_exit_code() {
        let interrupt = Interrupt::on_signals().unwrap();
        assert_eq!(interrupt.exit_code(), None);
        signal_hook::low_level::raise(signal_hook::consts::SIGTERM).unwrap();
        assert!(interrupt.requested());
        assert_eq!(interrupt.exit_code(), Some(143));
    }
}
