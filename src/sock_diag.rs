//! What `sock_diag(7)` knows: the accept queue of a Unix listener, and the open connections of other processes.

#[cfg(feature = "cli")]
use std::collections::HashSet;
#[cfg(feature = "cli")]
use std::fs::File;
use std::io;
#[cfg(feature = "cli")]
use std::io::{BufRead, BufReader};
#[cfg(feature = "cli")]
use std::net::SocketAddr;
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
    let netlink = netlink()?;
    netlink.send(&request(inode))?;
    let mut answer = [0; 512];
    let (count, _) = crate::sys::receive_from(netlink.as_fd(), &mut answer)?;
    let answer = answer.get(..count).unwrap_or_default();
    queue_length(answer).ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, "the kernel does not say"))
}

fn netlink() -> io::Result<Socket> {
    let socket = Socket::new(Domain::from(libc::AF_NETLINK), Type::DGRAM, Some(Protocol::from(NETLINK_SOCK_DIAG)))?;
    socket.set_read_timeout(Some(Duration::from_millis(100)))?;
    Ok(socket)
}

/// Those that a process can hold: established, and on the way to be closed (`TCP_ESTABLISHED`, `TCP_FIN_WAIT1`,
/// `TCP_FIN_WAIT2`, `TCP_CLOSE_WAIT`, `TCP_LAST_ACK`, `TCP_CLOSING`). Named one by one: for one state more, that of sockets
/// which are bound alone (13, Linux 6.8), the kernel takes the lock of every port there is, and waits for all who connect.
#[cfg(feature = "cli")]
const STATES: u32 = 1 << 1 | 1 << 4 | 1 << 5 | 1 << 8 | 1 << 9 | 1 << 11;

/// Inodes of the connections of whatever process to the ports of `listeners`. Asked once for each family: the kernel looks
/// through all of its sockets each time.
#[cfg(feature = "cli")]
pub(crate) fn tcp_connections(listeners: &[SocketAddr]) -> io::Result<HashSet<u64>> {
    let mut found = HashSet::new();
    for family in [libc::AF_INET, libc::AF_INET6] {
        let of_family = listeners.iter().filter(|listener| listener.is_ipv4() == (family == libc::AF_INET));
        let ports: HashSet<u16> = of_family.map(SocketAddr::port).collect();
        if !ports.is_empty() {
            // A service may have no such socket (`RestrictAddressFamilies=` of systemd), nor every kernel the module for it.
            dump_connections(family, &ports, &mut found).or_else(|_| read_connections(family, &ports, &mut found))?;
        }
    }
    Ok(found)
}

/// The same from `proc_pid_net(5)`, for which the kernel writes many times as much.
#[cfg(feature = "cli")]
fn read_connections(family: i32, ports: &HashSet<u16>, found: &mut HashSet<u64>) -> io::Result<()> {
    let table = if family == libc::AF_INET { "/proc/self/net/tcp" } else { "/proc/self/net/tcp6" };
    for line in BufReader::new(File::open(table)?).lines() {
        found.extend(inode_of_line(&line?, ports));
    }
    Ok(())
}

#[cfg(feature = "cli")]
fn inode_of_line(line: &str, ports: &HashSet<u16>) -> Option<u64> {
    // sl local_address rem_address st queues timer retrnsmt uid timeout inode
    let mut fields = line.split_ascii_whitespace().skip(1);
    let (_, port) = fields.next()?.rsplit_once(':')?;
    let port = u16::from_str_radix(port, 16).ok()?;
    let state = u32::from_str_radix(fields.nth(1)?, 16).ok()?;
    let is_held = 1_u32.checked_shl(state).is_some_and(|state| state & STATES != 0);
    let inode = fields.nth(5)?.parse().ok()?;
    (is_held && ports.contains(&port) && inode != 0).then_some(inode)
}

#[cfg(feature = "cli")]
fn dump_connections(family: i32, ports: &HashSet<u16>, found: &mut HashSet<u64>) -> io::Result<()> {
    const NLM_F_DUMP: u16 = 0x300;
    const DUMP_BYTES: u32 = 72;
    let mut request = Vec::with_capacity(DUMP_BYTES as usize);
    request.extend(DUMP_BYTES.to_ne_bytes());
    request.extend(SOCK_DIAG_BY_FAMILY.to_ne_bytes());
    request.extend((NLM_F_REQUEST | NLM_F_DUMP).to_ne_bytes());
    request.extend([0; 8]); // sequence, pid
    request.extend([family as u8, libc::IPPROTO_TCP as u8, 0, 0]);
    request.extend(STATES.to_ne_bytes());
    request.resize(DUMP_BYTES as usize - 8, 0); // any ports, addresses, interface
    request.extend([0xff; 8]); // any cookie
    let netlink = netlink()?;
    netlink.send(&request)?;
    let mut answer = vec![0; 32 << 10];
    loop {
        let (count, _) = crate::sys::receive_from(netlink.as_fd(), &mut answer)?;
        if !add_inodes(answer.get(..count).unwrap_or_default(), ports, found)? {
            return Ok(());
        }
    }
}

/// From one datagram of a dump; whether more follow.
#[cfg(feature = "cli")]
fn add_inodes(mut messages: &[u8], ports: &HashSet<u16>, found: &mut HashSet<u64>) -> io::Result<bool> {
    /// `nlmsghdr`, then `inode` of `inet_diag_msg`; its own port, in network order.
    const INODE_AT: usize = 16 + 68;
    const PORT_AT: usize = 16 + 4;
    let port = |bytes: &[u8]| Some(u16::from_be_bytes(bytes.get(PORT_AT..PORT_AT + 2)?.try_into().ok()?));
    let word = |bytes: &[u8], at: usize| Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?));
    while let (Some(length), Some(kind)) = (word(messages, 0), messages.get(4..6)) {
        let kind = u16::from_ne_bytes(kind.try_into().map_err(io::Error::other)?);
        match i32::from(kind) {
            libc::NLMSG_DONE => return Ok(false),
            libc::NLMSG_ERROR => return Err(io::Error::other("the kernel does not say")),
            _ if port(messages).is_some_and(|port| ports.contains(&port)) => {
                found.extend(word(messages, INODE_AT).filter(|inode| *inode != 0).map(u64::from));
            }
            _ => {}
        }
        let length = usize::try_from(length).map_err(io::Error::other)?;
        messages = messages.get(length.max(16).next_multiple_of(4)..).unwrap_or_default();
    }
    Ok(true)
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

/// Inodes fit into 32 bits in this answer, and only connections to the ports asked for are found.
#[cfg(any(test, fuzzing))]
pub(crate) fn fuzz(bytes: &[u8]) {
    let _ = queue_length(bytes);
    #[cfg(feature = "cli")]
    {
        let mut found = HashSet::new();
        let _ = add_inodes(bytes, &HashSet::from([80, 443, 8080, 8081]), &mut found);
        assert!(found.len() <= bytes.len() / 16 + 1 && !found.contains(&0));
        let mut none = HashSet::new();
        let _ = add_inodes(bytes, &HashSet::new(), &mut none);
        assert!(none.is_empty());
        let line = String::from_utf8_lossy(bytes);
        let inode = inode_of_line(&line, &HashSet::from([80, 443, 8080, 8081]));
        assert!(inode != Some(0) && inode_of_line(&line, &HashSet::new()).is_none());
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
    #[cfg(feature = "cli")]
    fn accepted_connections_are_found_by_the_port_of_their_listener() {
        use std::net::{TcpListener, TcpStream};
        for address in ["127.0.0.1:0", "[::1]:0"] {
            let Ok(listener) = TcpListener::bind(address) else { continue };
            let at = listener.local_addr().unwrap();
            let inode = |socket: &TcpStream| nix::sys::stat::fstat(socket).unwrap().st_ino;
            let family = if at.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 };
            let read = || {
                let mut found = HashSet::new();
                read_connections(family, &HashSet::from([at.port()]), &mut found).unwrap();
                found
            };
            assert_eq!((tcp_connections(&[at]).unwrap(), read()), (HashSet::new(), HashSet::new()));
            let client = TcpStream::connect(at).unwrap();
            let (accepted, _) = listener.accept().unwrap();
            let open = HashSet::from([inode(&accepted)]);
            assert_eq!((tcp_connections(&[at]).unwrap(), read()), (open.clone(), open.clone()));
            // Its other side is closed, and it is not.
            drop(client);
            assert_eq!((tcp_connections(&[at]).unwrap(), read()), (open.clone(), open));
        }
    }

    #[test]
    #[cfg(feature = "cli")]
    fn lines_that_are_no_connection_are_passed_over() {
        let ports = HashSet::from([8080]);
        let of = |line: &str| inode_of_line(line, &ports);
        let line = |local, state, inode| {
            format!(
                "   1: {local} 0100007F:D431 {state} 00000000:00000000 00:00000000 00000000     0        0 {inode} 1 ffff"
            )
        };
        assert_eq!(of(&line("0100007F:1F90", "01", "77")), Some(77));
        assert_eq!(of(&line("00000000000000000000000001000000:1F90", "08", "77")), Some(77));
        for (local, state, inode) in [
            ("0100007F:1F91", "01", "77"), // another port
            ("0100007F:1F90", "0A", "77"), // it listens
            ("0100007F:1F90", "03", "77"), // nobody's yet
            ("0100007F:1F90", "01", "0"),  // nobody's any more
            ("0100007F:1F90", "FFFFFFFF", "77"),
            ("1F90", "01", "77"),
        ] {
            assert_eq!(of(&line(local, state, inode)), None, "{local} {state} {inode}");
        }
        let whole = line("0100007F:1F90", "01", "77");
        for end in 0..whole.find(" 77").unwrap() {
            assert_eq!(of(&whole[..end]), None, "{end}");
        }
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

    #[cfg(feature = "cli")]
    static ALL_PORTS: std::sync::LazyLock<HashSet<u16>> = std::sync::LazyLock::new(|| (0..=u16::MAX).collect());

    proptest::proptest! {
        #[test]
        fn any_answer_is_read(answer in proptest::collection::vec(proptest::num::u8::ANY, 0..300)) {
            let _ = queue_length(&answer);
            #[cfg(feature = "cli")]
            let _ = add_inodes(&answer, &ALL_PORTS, &mut HashSet::new());
        }
    }
}
