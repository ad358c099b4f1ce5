//! The state of all stages of a study, shared by the threads of this process and updated from other processes.

use std::collections::BTreeSet;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use super::directory::StageLock;
use super::graph::Stage;
use super::work::Record;
use crate::LabError;

/// Interval at which the progress of other processes is checked.
const LOOK: Duration = Duration::from_secs(1);

/// The state of a stage.
pub(super) enum State {
    Unwanted,
    Waiting,
    Running,
    /// Another process is running it, or holds a lock that it needs.
    Elsewhere,
    Done(Record),
    Failed(Arc<LabError>),
    /// A stage that it depends on failed, or the stage itself panicked.
    Cut,
}

/// Operations on stages that the board needs; stages are given by their index.
pub(super) trait Stages: Sync {
    /// Returns all stages, in an order in which each comes after its dependencies.
    fn all(&self) -> &[Stage];
    /// Locks a stage for this process; returns `None` if another process holds a lock that it needs.
    fn lock(&self, place: usize) -> Result<Option<StageLock>, LabError>;
    /// Returns the record of a complete stage.
    fn record(&self, place: usize) -> Option<Record>;
    /// Whether the result of a complete stage, needed by other stages, has been removed.
    fn is_gone(&self, place: usize) -> bool;
    /// Removes the models of a stage that no stage needs anymore; returns `false` if a process still uses them.
    fn remove_models(&self, place: usize) -> Result<bool, LabError>;
    /// Whether a stop was requested.
    fn is_stopped(&self) -> bool;
}

/// A change observed in other processes.
pub(super) enum News {
    /// Another process runs the stage.
    Elsewhere(usize),
    /// Another process completed the stage.
    Done(usize),
}

/// The state of all stages.
pub(super) struct Board<'a> {
    stages: &'a dyn Stages,
    states: Mutex<Vec<State>>,
    changed: Condvar,
    /// Stages completed since this process started whose models may still have to be removed.
    completed: Mutex<BTreeSet<usize>>,
}

impl<'a> Board<'a> {
    pub(super) fn new(stages: &'a dyn Stages, states: Vec<State>) -> Board<'a> {
        Board { stages, states: Mutex::new(states), changed: Condvar::new(), completed: Mutex::default() }
    }

    pub(super) fn into_states(self) -> Vec<State> {
        self.states.into_inner().unwrap_or_else(PoisonError::into_inner)
    }

    fn lock(&self) -> MutexGuard<'_, Vec<State>> {
        self.states.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for the next stage that this process can start; returns `None` when none will follow.
    pub(super) fn take(&self, tell: &dyn Fn(News)) -> Option<(usize, StageLock)> {
        let mut states = self.lock();
        loop {
            if self.stages.is_stopped() {
                return None;
            }
            cut(&mut states, self.stages.all());
            if let Some(place) = self.ready(&states) {
                match self.start(place, &mut states) {
                    Ok(Some(lock)) => return Some((place, lock)),
                    Ok(None) if matches!(states[place], State::Elsewhere) => tell(News::Elsewhere(place)),
                    Ok(None) if matches!(states[place], State::Done(_)) => tell(News::Done(place)),
                    Ok(None) => {}
                    Err(error) => states[place] = State::Failed(Arc::new(error)),
                }
                continue;
            }
            let any = |of: fn(&State) -> bool| states.iter().any(of);
            if any(|state| matches!(state, State::Elsewhere)) {
                let (guard, wait) = self.changed.wait_timeout(states, LOOK).unwrap_or_else(PoisonError::into_inner);
                states = guard;
                if wait.timed_out() {
                    self.look(&mut states, tell);
                }
            } else if any(|state| matches!(state, State::Running)) {
                states = self.changed.wait(states).unwrap_or_else(PoisonError::into_inner);
            } else {
                return None;
            }
        }
    }

    fn ready(&self, states: &[State]) -> Option<usize> {
        let stages = self.stages.all();
        let done = |place: &usize| matches!(states[*place], State::Done(_));
        (0..stages.len()).find(|&p| matches!(states[p], State::Waiting) && stages[p].needs.iter().all(done))
    }

    /// Starts a stage whose dependencies are complete, unless another process is running it, has completed it, or has
    /// removed one of its inputs.
    fn start(&self, place: usize, states: &mut [State]) -> Result<Option<StageLock>, LabError> {
        let Some(lock) = self.stages.lock(place)? else {
            states[place] = State::Elsewhere;
            return Ok(None);
        };
        // The lock is held, so no other process changes these anymore.
        let needs = &self.stages.all()[place].needs;
        let gone: Vec<usize> = needs.iter().copied().filter(|&need| self.stages.is_gone(need)).collect();
        if !gone.is_empty() {
            gone.into_iter().for_each(|need| states[need] = State::Waiting);
            return Ok(None);
        }
        if let (Some(record), false) = (self.stages.record(place), self.is_made_again(place, states)) {
            self.complete(place, record, states);
            return Ok(None);
        }
        states[place] = State::Running;
        Ok(Some(lock))
    }

    /// Whether a complete stage has to run again because its result was removed and a waiting stage needs it.
    fn is_made_again(&self, place: usize, states: &[State]) -> bool {
        let stages = self.stages.all();
        let waits = |p: usize| matches!(states[p], State::Waiting) && stages[p].needs.contains(&place);
        self.stages.is_gone(place) && (0..stages.len()).any(waits)
    }

    /// Checks the stages of other processes: they may be complete, or available again if a process has exited.
    fn look(&self, states: &mut [State], tell: &dyn Fn(News)) {
        for place in 0..states.len() {
            if matches!(states[place], State::Elsewhere) {
                match self.stages.record(place) {
                    Some(record) if !self.is_made_again(place, states) => {
                        tell(News::Done(place));
                        self.complete(place, record, states);
                    }
                    _ => states[place] = State::Waiting,
                }
            }
        }
    }

    fn complete(&self, place: usize, record: Record, states: &mut [State]) {
        states[place] = State::Done(record);
        self.completed.lock().unwrap_or_else(PoisonError::into_inner).insert(place);
    }

    /// Records the outcome of a stage.
    pub(super) fn put(&self, place: usize, result: Result<Record, Arc<LabError>>) {
        let mut states = self.lock();
        match result {
            Ok(record) => self.complete(place, record, &mut states),
            Err(error) => states[place] = State::Failed(error),
        }
        self.changed.notify_all();
    }

    /// Removes the models of completed stages that no stage needs anymore. If another process still uses a model, it is
    /// left to that process.
    pub(super) fn remove_models(&self) -> Result<(), LabError> {
        let states = self.lock();
        let stages = self.stages.all();
        let waits = |p: usize| match &states[p] {
            State::Waiting | State::Running | State::Elsewhere => true,
            // A stage that is not selected now may be run later.
            State::Unwanted => self.stages.record(p).is_none(),
            State::Done(_) | State::Failed(_) | State::Cut => false,
        };
        let needed = |need: usize| (0..stages.len()).any(|p| stages[p].needs.contains(&need) && waits(p));
        let mut completed = self.completed.lock().unwrap_or_else(PoisonError::into_inner);
        let with_needs = |&place: &usize| stages[place].needs.iter().copied().chain([place]);
        let candidates: BTreeSet<usize> = completed.iter().flat_map(with_needs).collect();
        let mut kept = BTreeSet::new();
        for over in candidates {
            let idle = matches!(states[over], State::Done(_)) && !needed(over);
            if !idle || !self.stages.remove_models(over)? {
                kept.insert(over);
            }
        }
        *completed = kept;
        Ok(())
    }
}

/// Guard that keeps a panicking stage from blocking others. The panic is propagated after they have finished.
pub(super) struct Unwinding<'b, 'a> {
    pub(super) board: &'b Board<'a>,
    pub(super) stage: usize,
}

impl Drop for Unwinding<'_, '_> {
    fn drop(&mut self) {
        if thread::panicking() {
            self.board.lock()[self.stage] = State::Cut;
            self.board.changed.notify_all();
        }
    }
}

/// Marks all stages that depend on a failed stage.
fn cut(states: &mut [State], stages: &[Stage]) {
    for place in 0..states.len() {
        let lost = |&need: &usize| matches!(states[need], State::Failed(_) | State::Cut);
        if matches!(states[place], State::Waiting) && stages[place].needs.iter().any(lost) {
            states[place] = State::Cut;
        }
    }
}
