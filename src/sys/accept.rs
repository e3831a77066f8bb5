//! A connection, as fast as it can be had.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::ptr;

use nix::errno::Errno;

/// `accept4(2)` with CLOEXEC. It does not ask for the peer's address, which the kernel takes 120 ns to tell.
pub(crate) fn accept(listener: BorrowedFd<'_>, flags: i32) -> io::Result<OwnedFd> {
    // SAFETY: null pointers say that no address is wanted.
    unsafe { accept4(listener, flags, ptr::null_mut(), ptr::null_mut()) }
}

/// The same with the peer's address, of a TCP listener.
///
/// `peer` is a place of the caller's, because an address that is part of the result is moved with it from one function
/// to the next, in pieces across which the processor cannot forward: that took longer than counting the connection.
pub(crate) fn accept_with_peer(listener: BorrowedFd<'_>, flags: i32, peer: &mut IpAddress) -> io::Result<OwnedFd> {
    let mut size = size_of::<IpAddress>() as libc::socklen_t;
    // SAFETY: the kernel writes at most `size` bytes, which is the size of `peer`.
    unsafe { accept4(listener, flags, ptr::from_mut(peer).cast(), &raw mut size) }
}

/// # Safety
///
/// `peer` and `size` are both null, or `peer` points to as many bytes as `size` says, for the kernel to write to.
unsafe fn accept4(
    listener: BorrowedFd<'_>,
    flags: i32,
    peer: *mut libc::sockaddr,
    size: *mut libc::socklen_t,
) -> io::Result<OwnedFd> {
    let flags = libc::SOCK_CLOEXEC | flags;
    // Not libc's function: a thread can be cancelled in that, and it takes 20 ns to say when.
    // SAFETY: the caller answers for the pointers.
    let number = unsafe { libc::syscall(libc::SYS_accept4, listener.as_raw_fd(), peer, size, flags) };
    let number = i32::try_from(Errno::result(number)?).map_err(io::Error::other)?;
    // SAFETY: accept4 returned a new fd that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

/// Where the kernel writes an IP address. Every bit pattern is a value of each field.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) union IpAddress {
    family: libc::sa_family_t,
    v4: libc::sockaddr_in,
    v6: libc::sockaddr_in6,
}

impl IpAddress {
    /// None yet.
    pub(crate) fn unknown() -> Self {
        // SAFETY: both kinds are plain integers, for which all zeroes is a value.
        unsafe { std::mem::zeroed() }
    }

    pub(crate) fn read(&self) -> io::Result<SocketAddr> {
        // SAFETY: all fields begin with the family, and all bytes were written when this was made.
        match i32::from(unsafe { self.family }) {
            libc::AF_INET => {
                // SAFETY: for this family the kernel has written a `sockaddr_in`.
                let v4 = unsafe { self.v4 };
                let ip = Ipv4Addr::from(v4.sin_addr.s_addr.to_ne_bytes());
                Ok(SocketAddrV4::new(ip, u16::from_be(v4.sin_port)).into())
            }
            libc::AF_INET6 => {
                // SAFETY: for this family the kernel has written a `sockaddr_in6`.
                let v6 = unsafe { self.v6 };
                let (ip, port) = (Ipv6Addr::from(v6.sin6_addr.s6_addr), u16::from_be(v6.sin6_port));
                Ok(SocketAddrV6::new(ip, port, v6.sin6_flowinfo, v6.sin6_scope_id).into())
            }
            family => Err(io::Error::other(format!("the peer has no IP address, but one of family {family}"))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{TcpListener, TcpStream};
    use std::os::fd::AsFd;

    #[test]
    fn the_peer_is_the_one_that_connected() {
        for address in ["127.0.0.1:0", "[::1]:0"] {
            let listener = TcpListener::bind(address).unwrap();
            let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            let mut peer = IpAddress::unknown();
            let connection = accept_with_peer(listener.as_fd(), libc::SOCK_NONBLOCK, &mut peer).unwrap();
            assert_eq!(peer.read().unwrap(), client.local_addr().unwrap());
            assert!(socket2::SockRef::from(&connection).nonblocking().unwrap());
            let flags = nix::fcntl::fcntl(&connection, nix::fcntl::FcntlArg::F_GETFD).unwrap();
            assert_eq!(flags, libc::FD_CLOEXEC);
        }
    }

    #[test]
    fn a_peer_without_ip_address_is_told_as_an_error() {
        // Bound by the kernel to a free abstract name.
        let listener = socket2::Socket::new(socket2::Domain::UNIX, socket2::Type::STREAM, None).unwrap();
        listener.bind(&socket2::SockAddr::unix("").unwrap()).unwrap();
        listener.listen(1).unwrap();
        let client = socket2::Socket::new(socket2::Domain::UNIX, socket2::Type::STREAM, None).unwrap();
        client.connect(&listener.local_addr().unwrap()).unwrap();
        let mut peer = IpAddress::unknown();
        accept_with_peer(listener.as_fd(), 0, &mut peer).unwrap();
        let error = peer.read().unwrap_err();
        assert!(error.to_string().contains("no IP address"), "{error}");
    }
}
