use cl_train::Progress;

/// A progress event of a run.
pub enum Event<'a> {
    /// A stage begins.
    Stage(&'a str),
    /// A stage was skipped because it had already been completed.
    Skipped(&'a str),
    /// An optimizer step was taken.
    Step(&'a Progress<'a>),
    /// A warning.
    Warning(&'a str),
    /// Documents of a task were scored.
    Scored {
        /// The task.
        task: &'a str,
        /// Number of documents scored so far.
        done: usize,
        /// Total number of documents.
        all: usize,
    },
}

/// Callback for progress events, for example to show a progress bar.
pub type Observer<'a> = dyn FnMut(Event<'_>) + 'a;

/// Passes an event to the observer and to `tracing`. Training steps are logged by `cl-train`.
pub(crate) fn tell(observer: &mut Observer<'_>, event: Event<'_>) {
    match &event {
        Event::Stage(name) => tracing::info!("{name}"),
        Event::Skipped(name) => tracing::info!("  {name}: already done"),
        Event::Warning(message) => tracing::warn!("{message}"),
        Event::Scored { task, done, all } if done == all => tracing::info!("  scored {task}: {all} documents"),
        Event::Scored { task, done, all } => tracing::trace!(task, done, all, "scored"),
        Event::Step(_) => {}
    }
    observer(event);
}
