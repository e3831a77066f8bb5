//! Readings of a socket that no crate in the tree offers.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd};

use nix::errno::Errno;
use socket2::{SockAddr, SockRef};

/// Connections that wait in the accept queue of a TCP listener: `tcpi_unacked` of `TCP_INFO`, which for a listener is
/// `sk_ack_backlog` (net/ipv4/tcp.c, `tcp_get_info`).
pub(crate) fn accept_backlog(listener: BorrowedFd<'_>) -> io::Result<u32> {
    // SAFETY: tcp_info is plain integers, for which all zeroes is a value.
    let mut info: libc::tcp_info = unsafe { std::mem::zeroed() };
    let mut size = size_of::<libc::tcp_info>() as libc::socklen_t;
    // SAFETY: the kernel writes at most `size` bytes, which is the size of `info`.
    let result = unsafe {
        libc::getsockopt(listener.as_raw_fd(), libc::IPPROTO_TCP, libc::TCP_INFO, (&raw mut info).cast(), &raw mut size)
    };
    Errno::result(result)?;
    Ok(info.tcpi_unacked)
}

/// Bytes that wait to be read: `SIOCINQ`; of a datagram socket the size of the next datagram.
pub(crate) fn unread_bytes(socket: BorrowedFd<'_>) -> io::Result<u32> {
    nix::ioctl_read_bad!(siocinq, libc::FIONREAD, libc::c_int);
    let mut count: libc::c_int = 0;
    // SAFETY: FIONREAD writes one int to the pointer.
    unsafe { siocinq(socket.as_raw_fd(), &raw mut count) }?;
    Ok(u32::try_from(count).unwrap_or_default())
}

/// `recvfrom(2)` into a buffer that is initialised already, which `socket2` takes only as uninitialised.
pub(crate) fn receive_from(socket: BorrowedFd<'_>, buffer: &mut [u8]) -> io::Result<(usize, SockAddr)> {
    // SAFETY: `u8` and `MaybeUninit<u8>` have the same layout, and `recv_from` writes only initialised bytes.
    let buffer = unsafe { &mut *(std::ptr::from_mut(buffer) as *mut [MaybeUninit<u8>]) };
    SockRef::from(&socket).recv_from(buffer)
}

/// A datagram with the uid of its sender, of a socket with SO_PASSCRED. Fds that come with it are closed: there is room
/// for the credentials alone, which the kernel puts first (net/core/scm.c, `scm_recv_unix`). Never blocks.
#[cfg(feature = "cli")]
pub(crate) fn receive_with_uid(socket: BorrowedFd<'_>, buffer: &mut [u8]) -> io::Result<(usize, Option<u32>)> {
    const CONTROL_BYTES: usize =
        // SAFETY: CMSG_SPACE computes with its argument alone.
        unsafe { libc::CMSG_SPACE(size_of::<libc::ucred>() as libc::c_uint) } as usize;
    #[repr(C)]
    union Control {
        _align: libc::cmsghdr,
        bytes: [u8; CONTROL_BYTES],
    }
    let mut payload = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
    let mut control = Control { bytes: [0; CONTROL_BYTES] };
    // SAFETY: msghdr is plain integers and pointers, for which all zeroes is a value.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = &raw mut payload;
    message.msg_iovlen = 1;
    message.msg_control = (&raw mut control).cast();
    message.msg_controllen = CONTROL_BYTES as _;
    let flags = libc::MSG_DONTWAIT | libc::MSG_CMSG_CLOEXEC;
    // SAFETY: the header points to the buffer and to a control buffer, each of the length given; both outlive the call.
    let received = Errno::result(unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut message, flags) })?;
    // SAFETY: the kernel filled the control buffer and set its length; the macros stay within that, and the data of a
    // message of this kind is a ucred, which may be unaligned.
    let uid = unsafe {
        let header = libc::CMSG_FIRSTHDR(&raw const message);
        let is_credentials = !header.is_null()
            && (*header).cmsg_level == libc::SOL_SOCKET
            && (*header).cmsg_type == libc::SCM_CREDENTIALS;
        is_credentials.then(|| libc::CMSG_DATA(header).cast::<libc::ucred>().read_unaligned().uid)
    };
    Ok((usize::try_from(received).unwrap_or_default(), uid))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{TcpListener, TcpStream};
    use std::os::fd::AsFd;

    #[test]
    fn the_backlog_counts_connections_that_wait() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        assert_eq!(accept_backlog(listener.as_fd()).unwrap(), 0);
        let address = listener.local_addr().unwrap();
        let _clients = [TcpStream::connect(address).unwrap(), TcpStream::connect(address).unwrap()];
        assert_eq!(accept_backlog(listener.as_fd()).unwrap(), 2);
    }
}
