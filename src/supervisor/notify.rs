//! NOTIFY_SOCKET for a worker: each has its own, so that it is known who speaks even when the sender is gone already
//! (`systemd-notify` in a shell script).

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::UnixDatagram;
use std::time::Duration;

use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, bind, setsockopt, socket, sockopt};
use nix::unistd::geteuid;
use serde::{Deserialize, Serialize};

use crate::text::printable;
use crate::{saved, sys};

/// What a worker can say; other lines are for a service manager, and this is none.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Said {
    pub(super) ready: bool,
    pub(super) status: Option<String>,
    /// How much longer it may take to start, from now on.
    pub(super) more_time: Option<Duration>,
}

impl Said {
    fn hear(&mut self, datagram: &[u8]) {
        for line in String::from_utf8_lossy(datagram).lines() {
            self.ready |= line == "READY=1";
            if let Some(status) = line.strip_prefix("STATUS=") {
                self.status = Some(printable(status));
            }
            if let Some(Ok(microseconds)) = line.strip_prefix("EXTEND_TIMEOUT_USEC=").map(str::parse) {
                self.more_time = Some(Duration::from_micros(microseconds));
            }
        }
    }
}

#[derive(Serialize, Deserialize)]
pub(super) struct NotifySocket {
    #[serde(with = "saved::fd")]
    socket: UnixDatagram,
    /// Who else than root and this user may speak.
    uid: Option<u32>,
}

impl NotifySocket {
    /// In the abstract namespace, by a name of the kernel's choice: a program of another user reaches it, too.
    pub(super) fn new(uid: Option<u32>) -> io::Result<Self> {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let socket = socket(AddressFamily::Unix, SockType::Datagram, flags, None)?;
        setsockopt(&socket, sockopt::PassCred, &true)?;
        bind(socket.as_raw_fd(), &UnixAddr::new_unnamed())?;
        Ok(Self { socket: socket.into(), uid })
    }

    pub(super) fn variable(&self) -> io::Result<String> {
        let address = self.socket.local_addr()?;
        let name = address.as_abstract_name().unwrap_or_default();
        Ok(format!("@{}", String::from_utf8_lossy(name)))
    }

    /// All that has come.
    pub(super) fn read(&self) -> Said {
        let mut said = Said::default();
        let mut buffer = [0; 4096];
        while let Ok((count, uid)) = sys::receive_with_uid(self.socket.as_fd(), &mut buffer) {
            let trusted = uid.is_some_and(|uid| uid == 0 || uid == geteuid().as_raw() || Some(uid) == self.uid);
            if !trusted {
                log::warn!("a message of uid {uid:?} on a notify socket is ignored");
                continue;
            }
            said.hear(buffer.get(..count).unwrap_or_default());
        }
        said
    }
}

impl AsFd for NotifySocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// Ready is what a line says, and nothing else.
#[cfg(any(test, fuzzing))]
pub(crate) fn fuzz(bytes: &[u8]) {
    let mut said = Said::default();
    said.hear(bytes);
    let has = |line: &[u8]| bytes.windows(line.len()).any(|window| window == line);
    assert!(!said.ready || has(b"READY=1"));
    assert_eq!(said.status.is_some(), has(b"\nSTATUS=") || bytes.starts_with(b"STATUS="));
}

#[cfg(test)]
mod tests {
    use super::*;
    use sendfd::SendWithFd;
    use std::io::Read;
    use std::os::unix::net::SocketAddr;

    #[test]
    fn ready_is_heard_and_a_barrier_is_released() {
        let notify = NotifySocket::new(None).unwrap();
        let name = notify.variable().unwrap();
        let sender = UnixDatagram::unbound().unwrap();
        sender.connect_addr(&SocketAddr::from_abstract_name(name.strip_prefix('@').unwrap()).unwrap()).unwrap();
        assert_eq!(notify.read(), Said::default());
        sender.send(b"STATUS=warming up\nMAINPID=1").unwrap();
        assert_eq!(notify.read(), Said { status: Some("warming up".into()), ..Said::default() });
        sender.send(b"EXTEND_TIMEOUT_USEC=1500000\nEXTEND_TIMEOUT_USEC=-1").unwrap();
        assert_eq!(notify.read(), Said { more_time: Some(Duration::from_millis(1500)), ..Said::default() });
        let (mut reader, writer) = io::pipe().unwrap();
        sender.send(b"READY=1\n").unwrap();
        sender.send_with_fd(b"BARRIER=1", &[writer.as_raw_fd()]).unwrap();
        drop(writer);
        assert!(notify.read().ready);
        // Whoever waits for the barrier waits for this.
        assert_eq!(reader.read(&mut [0]).unwrap(), 0);
    }
}
