//! File descriptors that come from outside: by number in the environment, or in a message.

use std::io;
use std::os::fd::{AsFd as _, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, FdFlag, fcntl};

/// Takes the fd that an ancestor, or this process before `execve`, announced by number, and sets CLOEXEC on it.
///
/// `None` when no such fd is open. The caller says, by looking at its own environment, that the number was meant for
/// this process; what the fd is must be checked by the caller too.
pub(crate) fn fd_from_environment(number: RawFd) -> Option<OwnedFd> {
    if number < 3 {
        return None;
    }
    // SAFETY: the number is borrowed for this one fcntl, which reports EBADF if it is not open.
    let open = unsafe { fcntl(BorrowedFd::borrow_raw(number), FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC)) };
    open.ok()?;
    // SAFETY: the fd is open, and by the convention of HANDOVER_FD and LISTEN_FDS it was passed for whoever reads the
    // variable to own; `Handover::start` reads each of them once in a process. So does a supervisor with what it was
    // before it replaced itself, each number of which was that of an `OwnedFd` of its own.
    Some(unsafe { OwnedFd::from_raw_fd(number) })
}

/// One message: a byte of payload and the fds that came with it, all with CLOEXEC.
pub(crate) struct ReceivedFds {
    pub(crate) payload: Option<u8>,
    pub(crate) fds: Vec<OwnedFd>,
    /// The kernel dropped some: the control buffer or the fd limit was too small.
    pub(crate) truncated: bool,
}

/// Room for one SCM_RIGHTS message of the kernel's maximum, aligned as control messages must be.
#[repr(C)]
union ControlBuffer {
    _align: libc::cmsghdr,
    bytes: [u8; CONTROL_BYTES],
}

// SAFETY: CMSG_SPACE computes with its argument alone.
const CONTROL_BYTES: usize =
    unsafe { libc::CMSG_SPACE((crate::protocol::FDS_PER_MESSAGE * size_of::<RawFd>()) as libc::c_uint) } as usize;

/// Receives one byte and up to `SCM_MAX_FD` fds. Blocks only if the socket does.
///
/// `nix::sys::socket::recvmsg` will not show the fds of a truncated message, so they could not be closed.
pub(crate) fn receive_fds(channel: BorrowedFd<'_>) -> io::Result<ReceivedFds> {
    let mut payload = 0_u8;
    let mut buffer = libc::iovec { iov_base: (&raw mut payload).cast(), iov_len: 1 };
    let mut control = ControlBuffer { bytes: [0; CONTROL_BYTES] };
    // SAFETY: msghdr is plain integers and pointers, for which all zeroes is a value.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = &raw mut buffer;
    message.msg_iovlen = 1;
    message.msg_control = (&raw mut control).cast();
    message.msg_controllen = CONTROL_BYTES as _;
    // SAFETY: the header points to one byte of payload and to a control buffer of the length given; all of them live
    // until after the call.
    let received = unsafe { libc::recvmsg(channel.as_raw_fd(), &raw mut message, libc::MSG_CMSG_CLOEXEC) };
    let received = Errno::result(received)?;
    let mut fds = Vec::new();
    // SAFETY: the kernel filled the control buffer and set its length; the CMSG macros stay within that length. Each fd
    // was installed for this message alone, so nobody else owns it. The data of a control message may be unaligned.
    unsafe {
        let mut header = libc::CMSG_FIRSTHDR(&raw const message);
        while !header.is_null() {
            if (*header).cmsg_level == libc::SOL_SOCKET && (*header).cmsg_type == libc::SCM_RIGHTS {
                let bytes = (*header).cmsg_len as usize - libc::CMSG_LEN(0) as usize;
                let data = libc::CMSG_DATA(header).cast::<RawFd>();
                for index in 0..bytes / size_of::<RawFd>() {
                    fds.push(OwnedFd::from_raw_fd(data.add(index).read_unaligned()));
                }
            }
            header = libc::CMSG_NXTHDR(&raw const message, header);
        }
    }
    let truncated = message.msg_flags & libc::MSG_CTRUNC != 0;
    Ok(ReceivedFds { payload: (received == 1).then_some(payload), fds, truncated })
}

/// Duplicates `fd` to the lowest free number that is at least `minimum`, with CLOEXEC.
pub(crate) fn dup_at_least(fd: BorrowedFd<'_>, minimum: RawFd) -> io::Result<OwnedFd> {
    let number = fcntl(fd, FcntlArg::F_DUPFD_CLOEXEC(minimum))?;
    // SAFETY: fcntl returned a new fd that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

/// Puts `fd` in the place of fd 2 (`dup2`), which is atomic for threads that are writing to it.
pub(crate) fn replace_stderr(fd: BorrowedFd<'_>) -> io::Result<()> {
    nix::unistd::dup2_stderr(fd)?;
    Ok(())
}

/// The open connections of this process, by fd number, so that what is left at the drain deadline can be cut.
///
/// A table of numbers instead of duplicated fds: a duplicate for each connection would halve the fd limit.
#[derive(Default)]
pub(crate) struct FdTable {
    open: Vec<bool>,
    count: usize,
}

impl FdTable {
    /// Enters a connection. Its owner must [`remove`](Self::remove) it before closing the fd.
    pub(crate) fn insert(&mut self, fd: BorrowedFd<'_>) -> usize {
        let number = usize::try_from(fd.as_raw_fd()).unwrap_or_default();
        if self.open.len() <= number {
            self.open.resize((number + 1).next_power_of_two(), false);
        }
        self.open[number] = true;
        self.count += 1;
        number
    }

    pub(crate) fn remove(&mut self, number: usize) {
        if let Some(open) = self.open.get_mut(number) {
            self.count -= usize::from(*open);
            *open = false;
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.count
    }

    /// Calls `f` on every connection in the table.
    pub(crate) fn for_each(&self, mut f: impl FnMut(BorrowedFd<'_>)) {
        for (number, _) in self.open.iter().enumerate().filter(|(_, open)| **open) {
            let Ok(number) = RawFd::try_from(number) else { continue };
            // SAFETY: a number is in the table from when a `Connection` takes its stream until that connection is
            // dropped; its guard is its first field, so it leaves the table before the stream closes the fd. Both, and
            // this call, hold the lock around the table, and a connection never gives its stream away mutably.
            let fd = unsafe { BorrowedFd::borrow_raw(number) };
            f(fd.as_fd());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixStream;

    #[test]
    fn standard_fds_and_closed_numbers_are_not_taken() {
        assert!(fd_from_environment(2).is_none());
        assert!(fd_from_environment(-1).is_none());
        assert!(fd_from_environment(900_000).is_none());
    }

    #[test]
    fn the_table_counts_what_is_in_it() {
        let (a, b) = UnixStream::pair().unwrap();
        let mut table = FdTable::default();
        let (a_key, b_key) = (table.insert(a.as_fd()), table.insert(b.as_fd()));
        assert_eq!(table.len(), 2);
        table.remove(a_key);
        table.remove(a_key);
        assert_eq!(table.len(), 1);
        let mut seen = Vec::new();
        table.for_each(|fd| seen.push(usize::try_from(fd.as_raw_fd()).unwrap()));
        assert_eq!(seen, [b_key]);
    }

    #[test]
    fn received_fds_have_cloexec() {
        use sendfd::SendWithFd;
        let (a, b) = UnixStream::pair().unwrap();
        a.send_with_fd(b"F", &[a.as_raw_fd(), b.as_raw_fd()]).unwrap();
        let received = receive_fds(b.as_fd()).unwrap();
        assert_eq!(received.payload, Some(b'F'));
        assert!(!received.truncated);
        assert_eq!(received.fds.len(), 2);
        for fd in &received.fds {
            let flags = FdFlag::from_bits_retain(fcntl(fd, FcntlArg::F_GETFD).unwrap());
            assert!(flags.contains(FdFlag::FD_CLOEXEC));
        }
    }
}
