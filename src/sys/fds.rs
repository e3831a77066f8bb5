//! File descriptors that come from outside: by number in the environment, or in a message.

use std::collections::BTreeSet;
use std::io;
use std::os::fd::{AsFd as _, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};

/// Takes the fd that an ancestor, or this process before `execve`, announced by number, and sets CLOEXEC on it.
///
/// `None` when no such fd is open, or when the number has been taken before. The caller says, by looking at its own
/// environment, that the number was meant for this process; what the fd is must be checked by the caller too.
pub(crate) fn fd_from_environment(number: RawFd) -> Option<OwnedFd> {
    static TAKEN: Mutex<BTreeSet<RawFd>> = Mutex::new(BTreeSet::new());
    let mut taken = TAKEN.lock().unwrap_or_else(PoisonError::into_inner);
    if number < 3 || taken.contains(&number) {
        return None;
    }
    // SAFETY: three integers go in; of a number that is not open the kernel says EBADF.
    let result = unsafe { libc::fcntl(number, libc::F_SETFD, libc::FD_CLOEXEC) };
    Errno::result(result).ok()?;
    // SAFETY: the fd is open, and by the convention of HANDOVER_FD and LISTEN_FDS it was passed for whoever reads the
    // variable to own; or it is that of a supervisor before it replaced itself, where each number was that of an `OwnedFd`
    // of its own. The variables stay as they are, and whoever reads them again is given nothing: the number may be
    // somebody else's by now.
    let fd = unsafe { OwnedFd::from_raw_fd(number) };
    taken.insert(number);
    Some(fd)
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
/// A table of numbers instead of duplicated fds: a duplicate for each connection would halve the fd limit. It grows by
/// segments, each twice as large as the one before, so that a place never moves and nothing needs a lock.
#[derive(Default)]
pub(crate) struct FdTable {
    segments: [OnceLock<Box<[AtomicBool]>>; 22],
}

/// Places in the first segment; 22 of them, doubling, hold every fd number that there is.
const FIRST_SEGMENT: usize = 1024;

impl FdTable {
    /// Enters a connection. Its owner clears the place that is returned before it closes the fd.
    pub(crate) fn enter(&self, fd: BorrowedFd<'_>) -> &AtomicBool {
        let place = self.place(usize::try_from(fd.as_raw_fd()).unwrap_or_default());
        place.store(true, Ordering::Release);
        place
    }

    fn place(&self, number: usize) -> &AtomicBool {
        let index = (number / FIRST_SEGMENT + 1).ilog2() as usize;
        let size = FIRST_SEGMENT << index;
        let segment = self.segments[index].get_or_init(|| (0..size).map(|_| AtomicBool::new(false)).collect());
        &segment[number - (size - FIRST_SEGMENT)]
    }

    /// Calls `f` on every connection in the table.
    pub(crate) fn for_each(&self, mut f: impl FnMut(BorrowedFd<'_>)) {
        for segment in self.segments.iter().filter_map(OnceLock::get) {
            // As many places come before a segment as it has itself, less those of the first.
            let numbers = (segment.len() - FIRST_SEGMENT)..;
            for (number, _) in numbers.zip(segment).filter(|(_, place)| place.load(Ordering::Acquire)) {
                let Ok(number) = RawFd::try_from(number) else { continue };
                // SAFETY: a number is in the table from when a `Connection` takes its stream until that connection is
                // dropped; its guard is its first field, so it leaves the table before the stream closes the fd, and a
                // connection never gives its stream away mutably. One that leaves while this runs waits for its end
                // (`Connections::cut`) before it goes on to close the fd.
                let fd = unsafe { BorrowedFd::borrow_raw(number) };
                f(fd.as_fd());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::fcntl::FdFlag;
    use std::os::fd::IntoRawFd;
    use std::os::unix::net::UnixStream;

    #[test]
    fn standard_fds_and_closed_numbers_are_not_taken() {
        assert!(fd_from_environment(2).is_none());
        assert!(fd_from_environment(-1).is_none());
        assert!(fd_from_environment(900_000).is_none());
    }

    /// `Handover::start` may be called twice, and two owners of one number would close each other's fds.
    #[test]
    fn a_number_is_taken_once() {
        let (_, writer) = std::io::pipe().unwrap();
        // Such as no other test is given by the kernel.
        let number = dup_at_least(writer.as_fd(), 700).unwrap().into_raw_fd();
        let taken = fd_from_environment(number).unwrap();
        assert_eq!(taken.as_raw_fd(), number);
        assert!(fd_from_environment(number).is_none());
        drop(taken);
        let _another = dup_at_least(writer.as_fd(), number).unwrap();
        assert!(fd_from_environment(number).is_none());
    }

    #[test]
    fn the_table_knows_what_is_in_it() {
        let (a, b) = UnixStream::pair().unwrap();
        let far = dup_at_least(a.as_fd(), 5000).unwrap();
        let table = FdTable::default();
        let places = [a.as_fd(), b.as_fd(), far.as_fd()].map(|fd| table.enter(fd));
        places[0].store(false, Ordering::Relaxed);
        let mut seen = Vec::new();
        table.for_each(|fd| seen.push(fd.as_raw_fd()));
        assert_eq!(seen, [b.as_raw_fd(), far.as_raw_fd()]);
    }

    #[test]
    fn every_number_has_a_place_of_its_own() {
        let table = FdTable::default();
        for number in (0..10_000).rev() {
            assert!(!table.place(number).swap(true, Ordering::Relaxed), "{number}");
        }
        let mut seen = 0;
        table.for_each(|fd| {
            assert_eq!(fd.as_raw_fd(), seen);
            seen += 1;
        });
        assert_eq!(seen, 10_000);
        assert_eq!(
            (usize::try_from(RawFd::MAX).unwrap() / FIRST_SEGMENT + 1).ilog2() as usize,
            table.segments.len() - 1
        );
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
