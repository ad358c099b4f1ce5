use cl_train::Progress;

/// What a watcher of a study is told.
pub enum Event<'a> {
    /// A stage begins.
    Stage(&'a str),
    /// A stage was found done.
    Skipped(&'a str),
    /// An optimizer step was taken.
    Step(&'a Progress<'a>),
    /// Something that does not stop a study, but should be known.
    Warning(&'a str),
    /// Documents of a task were scored.
    Scored {
        /// The task.
        task: &'a str,
        /// Documents done.
        done: usize,
        /// All documents.
        all: usize,
    },
}

/// Receives events; a progress bar, say.
pub type Observer<'a> = dyn FnMut(Event<'_>) + 'a;

/// Hands an event to the observer, and to whoever subscribes to `tracing`; training has events of its own in `cl-train`.
pub(crate) fn tell(observer: &mut Observer<'_>, event: Event<'_>) {
    match &event {
        Event::Stage(name) => tracing::info!("{name}"),
        Event::Skipped(name) => tracing::info!("  {name}: done before"),
        Event::Warning(message) => tracing::warn!("{message}"),
        Event::Scored { task, done, all } if done == all => tracing::info!("  scored {task}: {all} documents"),
        Event::Scored { task, done, all } => tracing::trace!(task, done, all, "scored"),
        Event::Step(_) => {}
    }
    observer(event);
}
