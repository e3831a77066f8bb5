//! Processes by pidfd: no signal ever reaches a recycled pid.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::signal::Signal;
use nix::unistd::Pid;

/// `pidfd_open(2)`. ESRCH when there is no such process.
pub(crate) fn pidfd_open(pid: Pid) -> io::Result<OwnedFd> {
    open_with(pid, 0)
}

/// `pidfd_open(2)` of a single thread: Linux 6.9, and EINVAL before.
#[cfg(feature = "cli")]
pub(crate) fn pidfd_open_thread(thread: Pid) -> io::Result<OwnedFd> {
    open_with(thread, libc::PIDFD_THREAD)
}

fn open_with(pid: Pid, flags: libc::c_uint) -> io::Result<OwnedFd> {
    // SAFETY: two integers go in; the kernel sets CLOEXEC by itself.
    let fd = Errno::result(unsafe { libc::syscall(libc::SYS_pidfd_open, pid.as_raw(), flags) })?;
    let fd = i32::try_from(fd).map_err(io::Error::other)?;
    // SAFETY: the kernel returned a new fd that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// `pidfd_send_signal(2)`. ESRCH when the process is gone.
pub(crate) fn pidfd_send_signal(process: BorrowedFd<'_>, signal: Signal) -> io::Result<()> {
    let no_siginfo = std::ptr::null::<libc::siginfo_t>();
    // SAFETY: a null siginfo is allowed and means what kill(2) would have sent.
    let sent = unsafe {
        libc::syscall(libc::SYS_pidfd_send_signal, process.as_raw_fd(), signal as libc::c_int, no_siginfo, 0)
    };
    Errno::result(sent)?;
    Ok(())
}

/// The process at the other end of a Unix socket: `SO_PEERPIDFD` (Linux 6.5), which also names a process whose pid we
/// cannot see, else `pidfd_open` of the pid in `SO_PEERCRED`.
pub(crate) fn pidfd_of_peer(socket: BorrowedFd<'_>, pid: Pid) -> io::Result<OwnedFd> {
    const SO_PEERPIDFD: libc::c_int = 77;
    let mut number: libc::c_int = -1;
    let mut size = size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: the option writes one int, and `size` says that there is room for one.
    let result = unsafe {
        libc::getsockopt(
            socket.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            SO_PEERPIDFD,
            (&raw mut number).cast(),
            &raw mut size,
        )
    };
    if result == 0 && number >= 0 {
        // SAFETY: the kernel returned a new fd (with CLOEXEC) that nobody else owns.
        return Ok(unsafe { OwnedFd::from_raw_fd(number) });
    }
    pidfd_open(pid)
}

/// `pidfd_getfd(2)`: a copy of an fd of that process, with CLOEXEC. EPERM without the rights of a debugger
/// (`ptrace(2)`).
#[cfg(feature = "cli")]
pub(crate) fn pidfd_getfd(process: BorrowedFd<'_>, number: i32) -> io::Result<OwnedFd> {
    // SAFETY: three integers go in.
    let fd = Errno::result(unsafe { libc::syscall(libc::SYS_pidfd_getfd, process.as_raw_fd(), number, 0) })?;
    let fd = i32::try_from(fd).map_err(io::Error::other)?;
    // SAFETY: the kernel returned a new fd that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
