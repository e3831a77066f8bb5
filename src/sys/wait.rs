//! The end of children.

use std::fmt;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use nix::errno::Errno;
use nix::sys::signal::Signal;
use nix::unistd::Pid;

/// Whose end is looked for.
#[derive(Clone, Copy)]
pub(crate) enum Child<'a> {
    #[cfg(feature = "cli")]
    Any,
    #[cfg(feature = "cli")]
    Pid(Pid),
    Pidfd(BorrowedFd<'a>),
}

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    Exited { status: i32 },
    Killed { signal: i32, dumped_core: bool },
}

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Exited { status } => write!(f, "exited with status {status}"),
            Self::Killed { signal, dumped_core } => {
                match Signal::try_from(signal) {
                    Ok(signal) => write!(f, "was killed by {signal}")?,
                    Err(_) => write!(f, "was killed by signal {signal}")?,
                }
                f.write_str(if dumped_core { " and dumped core" } else { "" })
            }
        }
    }
}

/// A child that has ended, which is left to be reaped: `waitid(2)`. None: they live. ECHILD where there is no such child.
/// `nix` cannot tell of one that a realtime signal has killed.
pub(crate) fn ended_child(child: Child<'_>) -> io::Result<Option<(Pid, End)>> {
    let (kind, id) = match child {
        #[cfg(feature = "cli")]
        Child::Any => (libc::P_ALL, 0),
        #[cfg(feature = "cli")]
        Child::Pid(pid) => (libc::P_PID, pid.as_raw().unsigned_abs()),
        Child::Pidfd(pidfd) => (libc::P_PIDFD, pidfd.as_raw_fd().unsigned_abs()),
    };
    // SAFETY: all of it is integers and pointers, of which zero is a value.
    let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
    // SAFETY: the kernel writes one siginfo_t, for which there is room.
    let result = unsafe { libc::waitid(kind, id, &raw mut info, libc::WEXITED | libc::WNOHANG | libc::WNOWAIT) };
    Errno::result(result)?;
    // SAFETY: waitid has filled in the fields of SIGCHLD, or has left all of it zero.
    let (pid, status) = unsafe { (info.si_pid(), info.si_status()) };
    let end = match info.si_code {
        libc::CLD_EXITED => End::Exited { status },
        code => End::Killed { signal: status, dumped_core: code == libc::CLD_DUMPED },
    };
    Ok((pid != 0).then_some((Pid::from_raw(pid), end)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;
    use std::process::Command;

    fn end_of(script: &str) -> String {
        let mut child = Command::new("sh").args(["-c", script]).spawn().unwrap();
        let pid = Pid::from_raw(child.id().cast_signed());
        let pidfd = crate::sys::pidfd_open(pid).unwrap();
        crate::poll::wait(pidfd.as_fd(), nix::poll::PollFlags::POLLIN, None).unwrap();
        let (ended, end) = ended_child(Child::Pidfd(pidfd.as_fd())).unwrap().unwrap();
        assert_eq!(ended, pid);
        child.wait().unwrap();
        assert!(ended_child(Child::Pidfd(pidfd.as_fd())).is_err());
        end.to_string()
    }

    #[test]
    fn every_end_is_told() {
        assert_eq!(end_of("exit 3"), "exited with status 3");
        assert_eq!(end_of("kill -KILL $$"), "was killed by SIGKILL");
        assert_eq!(end_of("kill -40 $$"), "was killed by signal 40");
    }
}
