use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

/// A stop request. Long-running work checks it between steps, finishes the current step, saves its state and removes
/// temporary files.
///
/// Clones share the same request. [`Interrupt::default`] is not connected to signals.
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
    /// Whether another signal terminates the process.
    again: Arc<AtomicBool>,
}

/// Number of SIGINT; a stop requested in code is treated like this signal.
const SIGINT: usize = 2;

impl Interrupt {
    /// Requests a stop, like Ctrl-C.
    pub fn request(&self) {
        self.signal.store(SIGINT, Ordering::Relaxed);
    }

    /// Whether a stop was requested.
    pub fn requested(&self) -> bool {
        self.signal.load(Ordering::Relaxed) != 0
    }

    /// Withdraws the request, after whatever it was meant for has stopped. The next signal is the first one again.
    ///
    /// ```
    /// let interrupt = cl_checkpoint::Interrupt::default();
    /// interrupt.request();
    /// interrupt.clear();
    /// assert!(!interrupt.requested());
    /// ```
    pub fn clear(&self) {
        self.signal.store(0, Ordering::Relaxed);
        self.again.store(false, Ordering::Relaxed);
    }

    /// Returns the exit code after a stop: 128 plus the signal's number (130 for Ctrl-C, 143 for SIGTERM). Returns
    /// `None` if no stop was requested.
    pub fn exit_code(&self) -> Option<u8> {
        match self.signal.load(Ordering::Relaxed) {
            0 => None,
            signal => Some(128 + signal as u8),
        }
    }

    /// Creates an interrupt that is requested by SIGINT, SIGTERM or SIGHUP; on Windows by Ctrl-C. A second signal
    /// terminates the process immediately. If it was started by a launcher of several processes (torchrun), which is
    /// detected by `WORLD_SIZE`, the third one does: Ctrl-C reaches such a process twice, from the terminal and from the
    /// launcher.
    ///
    /// Call it once, at the start of a command.
    ///
    /// # Errors
    /// Returns an error if a signal handler cannot be set.
    #[cfg(feature = "signals")]
    pub fn on_signals() -> std::io::Result<Interrupt> {
        use signal_hook::consts::{SIGINT, SIGTERM};
        use signal_hook::flag;
        let interrupt = Interrupt::default();
        let launched = std::env::var("WORLD_SIZE").is_ok_and(|processes| processes.trim() != "1");
        let signals = [
            SIGINT,
            SIGTERM,
            #[cfg(unix)]
            signal_hook::consts::SIGHUP,
        ];
        for signal in signals {
            // The order matters: the first signal finds the condition unset, and sets it for the second signal.
            if !launched {
                flag::register_conditional_shutdown(signal, 128 + signal, interrupt.again.clone())?;
            }
            flag::register(signal, interrupt.again.clone())?;
            flag::register_usize(signal, interrupt.signal.clone(), signal as usize)?;
        }
        #[cfg(unix)]
        if launched {
            let mut received = signal_hook::iterator::Signals::new(signals)?;
            // The main thread may be waiting for another process in a call that no signal interrupts.
            std::thread::spawn(move || {
                if let Some(third) = received.forever().nth(2) {
                    std::process::exit(128 + third);
                }
            });
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
