//! The accept queue of a Unix listener, which only `sock_diag(7)` knows.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use socket2::{Domain, Protocol, Socket, Type};

const NETLINK_SOCK_DIAG: i32 = 4;
const SOCK_DIAG_BY_FAMILY: u16 = 20;
const NLM_F_REQUEST: u16 = 1;
const UDIAG_SHOW_RQLEN: u32 = 0x10;
const UNIX_DIAG_RQLEN: u16 = 4;
const REQUEST_BYTES: u32 = 40;
/// `nlmsghdr` and `unix_diag_msg`.
const ATTRIBUTES_AT: usize = 32;

/// Connections that wait to be accepted.
pub(crate) fn unix_accept_backlog(listener: BorrowedFd<'_>) -> io::Result<u32> {
    let inode = nix::sys::stat::fstat(listener)?.st_ino;
    let inode = u32::try_from(inode).map_err(io::Error::other)?;
    let netlink = Socket::new(Domain::from(libc::AF_NETLINK), Type::DGRAM, Some(Protocol::from(NETLINK_SOCK_DIAG)))?;
    netlink.set_read_timeout(Some(Duration::from_millis(100)))?;
    netlink.send(&request(inode))?;
    let mut answer = [0; 512];
    let (count, _) = crate::sys::receive_from(netlink.as_fd(), &mut answer)?;
    let answer = answer.get(..count).unwrap_or_default();
    queue_length(answer).ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, "the kernel does not say"))
}

/// `nlmsghdr`, then `unix_diag_req` for one socket of any cookie.
fn request(inode: u32) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(REQUEST_BYTES as usize);
    bytes.extend(REQUEST_BYTES.to_ne_bytes());
    bytes.extend(SOCK_DIAG_BY_FAMILY.to_ne_bytes());
    bytes.extend(NLM_F_REQUEST.to_ne_bytes());
    bytes.extend([0; 8]); // sequence, pid
    bytes.extend([libc::AF_UNIX as u8, 0, 0, 0]); // family, protocol, padding
    for word in [u32::MAX, inode, UDIAG_SHOW_RQLEN, u32::MAX, u32::MAX] {
        bytes.extend(word.to_ne_bytes()); // states, inode, what to show, cookie
    }
    bytes
}

fn queue_length(answer: &[u8]) -> Option<u32> {
    let half = |bytes: &[u8], at: usize| Some(u16::from_ne_bytes(bytes.get(at..at + 2)?.try_into().ok()?));
    let word = |bytes: &[u8], at: usize| Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?));
    if half(answer, 4)? != SOCK_DIAG_BY_FAMILY {
        return None;
    }
    let mut attributes = answer.get(ATTRIBUTES_AT..)?;
    loop {
        let (length, kind) = (usize::from(half(attributes, 0)?), half(attributes, 2)?);
        if kind == UNIX_DIAG_RQLEN {
            return word(attributes, 4);
        }
        attributes = attributes.get(length.max(4).next_multiple_of(4)..)?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::{UnixListener, UnixStream};

    #[test]
    fn the_backlog_counts_connections_that_wait() {
        let path = std::env::temp_dir().join(format!("handover-diag-{}.sock", std::process::id()));
        let listener = UnixListener::bind(&path).unwrap();
        let _clients = [UnixStream::connect(&path).unwrap(), UnixStream::connect(&path).unwrap()];
        std::fs::remove_file(&path).unwrap();
        assert_eq!(unix_accept_backlog(listener.as_fd()).unwrap(), 2);
    }

    #[test]
    fn an_answer_cut_short_says_nothing() {
        let mut answer = vec![0; 48];
        answer[4..6].copy_from_slice(&SOCK_DIAG_BY_FAMILY.to_ne_bytes());
        answer[32..34].copy_from_slice(&12_u16.to_ne_bytes());
        answer[34..36].copy_from_slice(&UNIX_DIAG_RQLEN.to_ne_bytes());
        answer[36] = 7;
        assert_eq!(queue_length(&answer), Some(u32::from_ne_bytes([7, 0, 0, 0])));
        for length in 0..40 {
            assert_eq!(queue_length(&answer[..length]), None, "{length}");
        }
    }
}
