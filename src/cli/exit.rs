//! Exit codes, as `docs/errors.md` explains them.

use std::process::ExitCode;

use handover::control::Outcome;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Exit {
    Done = 0,
    /// The old build serves on.
    Failed = 1,
    Usage = 2,
    Busy = 3,
    NotPermitted = 4,
    /// Connections were closed at the drain deadline.
    Cut = 5,
    /// Or no process of ours.
    NotRunning = 7,
    NothingServes = 8,
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        ExitCode::from(exit as u8)
    }
}

impl From<Outcome> for Exit {
    fn from(outcome: Outcome) -> Self {
        match outcome {
            Outcome::Upgraded | Outcome::Stopped | Outcome::Restarted | Outcome::Scaled => Self::Done,
            Outcome::Cut => Self::Cut,
            Outcome::Busy => Self::Busy,
            Outcome::Ended => Self::NothingServes,
            Outcome::NotPermitted => Self::NotPermitted,
            Outcome::BadRequest => Self::Usage,
            _ => Self::Failed,
        }
    }
}

/// Why a verb could not be done.
#[derive(Debug)]
pub(crate) struct Failure {
    pub(super) exit: Exit,
    pub(super) message: String,
}

impl Failure {
    pub(super) fn new(exit: Exit, message: impl Into<String>) -> Self {
        Self { exit, message: message.into() }
    }

    pub(super) fn usage(message: impl Into<String>) -> Self {
        Self::new(Exit::Usage, message)
    }
}
