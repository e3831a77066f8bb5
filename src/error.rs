//! The one error type: what was tried, on what, why not, and what to do next.

use std::fmt;
use std::io;

/// Why something could not be done.
///
/// Its message reads ``cannot bind listener `http` to 0.0.0.0:80: Permission denied (os error 13) (…what to do…)``.
pub struct Error {
    kind: ErrorKind,
    /// Completes the sentence "cannot …".
    tried: String,
    cause: Cause,
    mend: Option<String>,
}

enum Cause {
    Io(io::Error),
    Text(String),
}

/// What class of failure an [`Error`] is, for programs that must decide.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The operating system, or a value that was given, does not allow it.
    Failed,
    /// The upgrade failed before commit; the old process serves on.
    NotUpgraded,
    /// The upgrade was committed, then rolled back; the old process accepts again.
    RolledBack,
    /// Another upgrade is under way, too many generations drain, or the process is draining itself.
    Busy,
    /// The other side refuses this uid, or the system this access.
    NotPermitted,
    /// There is no such process, or it does not use handover.
    NotRunning,
    /// The process that was to be upgraded is gone, and no other serves in its place.
    NothingServes,
    /// What was asked cannot be understood or makes no sense.
    Invalid,
}

impl Error {
    pub(crate) fn new(kind: ErrorKind, tried: impl Into<String>, cause: impl Into<String>) -> Self {
        Self { kind, tried: tried.into(), cause: Cause::Text(cause.into()), mend: None }
    }

    pub(crate) fn io(tried: impl Into<String>, cause: impl Into<io::Error>) -> Self {
        let cause = cause.into();
        let denied = cause.kind() == io::ErrorKind::PermissionDenied;
        let kind = if denied { ErrorKind::NotPermitted } else { ErrorKind::Failed };
        Self { kind, tried: tried.into(), cause: Cause::Io(cause), mend: None }
    }

    pub(crate) fn mend(mut self, mend: impl Into<String>) -> Self {
        self.mend = Some(mend.into());
        self
    }

    #[cfg(feature = "cli")]
    pub(crate) fn with_tried(mut self, tried: impl Into<String>) -> Self {
        self.tried = tried.into();
        self
    }

    pub(crate) fn with_kind(mut self, kind: ErrorKind) -> Self {
        self.kind = kind;
        self
    }

    /// The class of the failure.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }

    pub(crate) fn cause_is(&self, kind: io::ErrorKind) -> bool {
        matches!(&self.cause, Cause::Io(error) if error.kind() == kind)
    }

    /// Only the cause, without what was tried.
    pub(crate) fn cause(&self) -> String {
        match &self.cause {
            Cause::Io(error) => error.to_string(),
            Cause::Text(text) => text.clone(),
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "cannot {}: {}", self.tried, self.cause())?;
        match &self.mend {
            Some(mend) => write!(f, " ({mend})"),
            None => Ok(()),
        }
    }
}

/// The message, so that `fn main() -> Result<(), handover::Error>` prints a sentence and not a structure.
impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match &self.cause {
            Cause::Io(error) => Some(error),
            Cause::Text(_) => None,
        }
    }
}

impl From<Error> for io::Error {
    fn from(error: Error) -> Self {
        let kind = match &error.cause {
            Cause::Io(cause) => cause.kind(),
            Cause::Text(_) => io::ErrorKind::Other,
        };
        io::Error::new(kind, error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_says_what_why_and_what_to_do() {
        let error =
            Error::io("execute `/srv/app`", io::Error::from_raw_os_error(libc::EACCES)).mend("is it executable?");
        assert_eq!(error.to_string(), "cannot execute `/srv/app`: Permission denied (os error 13) (is it executable?)");
        assert_eq!(error.kind(), ErrorKind::NotPermitted);
        assert_eq!(format!("{error:?}"), error.to_string());
    }
}
