//! A socket on which every wait ends at a deadline.

use std::io::{self, ErrorKind, Read, Write};
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::time::{Duration, Instant};

use socket2::{Domain, SockAddr, Socket, Type};

use super::outcome::{Outcome, Trouble};
use super::standstill;
use super::target::Target;

/// A connected stream socket with a deadline for all that is done on it.
#[derive(Debug)]
pub struct Wire {
    socket: Socket,
    deadline: Instant,
    /// How long the machine had stood still when the deadline was set.
    stood_still_before: Duration,
    /// Bytes the kernel took, ever.
    sent: u64,
}

/// What a look at a silent connection shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Look {
    Silent,
    /// Closed or reset.
    Closed,
    /// There is something to read.
    Unread,
}

impl Wire {
    pub fn connect(target: &Target, deadline: Instant) -> Result<Self, Trouble> {
        let (domain, address) = match target {
            Target::Tcp(address) => (Domain::for_address(*address), SockAddr::from(*address)),
            Target::Unix(path) => {
                let address = SockAddr::unix(path).map_err(|error| Trouble {
                    outcome: Outcome::Client,
                    reason: format!("socket address: {error}"),
                })?;
                (Domain::UNIX, address)
            }
        };
        let socket = Socket::new(domain, Type::STREAM, None).map_err(|error| Trouble::connecting(&error))?;
        let wire = Self { socket, deadline, stood_still_before: standstill::so_far(), sent: 0 };
        wire.establish(&address).map_err(|error| Trouble::connecting(&error))?;
        if domain != Domain::UNIX {
            wire.refuse_itself(&address)?;
            wire.socket.set_tcp_nodelay(true).map_err(|error| Trouble::talking(&error))?;
        }
        Ok(wire)
    }

    fn establish(&self, address: &SockAddr) -> io::Result<()> {
        loop {
            // Blocking, bounded by SO_SNDTIMEO: on a Unix socket a non-blocking connect does not wait for room
            // in a full accept queue but fails.
            self.socket.set_write_timeout(Some(self.remaining()?))?;
            match self.socket.connect(address) {
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                // The interrupted connect went on and succeeded.
                Err(error) if error.raw_os_error() == Some(libc::EISCONN) => return Ok(()),
                other => return other,
            }
        }
    }

    /// While nobody listens, a loopback client may be given its own target as source port and so talk to itself.
    fn refuse_itself(&self, address: &SockAddr) -> Result<(), Trouble> {
        match self.socket.local_addr() {
            Ok(local) if local == *address => Err(Trouble {
                outcome: Outcome::Refused,
                reason: "connect: connected to itself, so nobody listens".to_owned(),
            }),
            _ => Ok(()),
        }
    }

    pub fn set_deadline(&mut self, deadline: Instant) {
        (self.deadline, self.stood_still_before) = (deadline, standstill::so_far());
    }

    pub fn sent(&self) -> u64 {
        self.sent
    }

    /// Sees without waiting whether the other side has closed or spoken.
    pub fn look(&self) -> Look {
        let mut byte = [MaybeUninit::uninit()];
        match self.socket.recv_with_flags(&mut byte, libc::MSG_PEEK | libc::MSG_DONTWAIT) {
            Ok(0) => Look::Closed,
            Ok(_) => Look::Unread,
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => Look::Silent,
            Err(_) => Look::Closed,
        }
    }

    /// Ends the sending side; what fails here shows in the next read.
    pub fn end_sending(&self) {
        let _ = self.socket.shutdown(Shutdown::Write);
    }

    fn remaining(&self) -> io::Result<Duration> {
        let excused = standstill::so_far().saturating_sub(self.stood_still_before);
        let remaining = (self.deadline + excused).saturating_duration_since(Instant::now());
        if remaining.is_zero() {
            return Err(ErrorKind::TimedOut.into());
        }
        // A timeout that rounds to zero would mean none at all.
        Ok(remaining.max(Duration::from_millis(1)))
    }
}

#[cfg(test)]
impl From<Socket> for Wire {
    fn from(socket: Socket) -> Self {
        let deadline = Instant::now() + Duration::from_secs(30);
        Self { socket, deadline, stood_still_before: standstill::so_far(), sent: 0 }
    }
}

impl Read for Wire {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            self.socket.set_read_timeout(Some(self.remaining()?))?;
            match (&self.socket).read(buffer) {
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
                other => return other,
            }
        }
    }
}

impl Write for Wire {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        loop {
            self.socket.set_write_timeout(Some(self.remaining()?))?;
            match (&self.socket).write(buffer) {
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
                Ok(count) => {
                    self.sent += count as u64;
                    return Ok(count);
                }
                Err(error) => return Err(error),
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::Ipv4Addr;

    #[test]
    fn a_connection_to_itself_is_refused() {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        socket.bind(&SockAddr::from(std::net::SocketAddr::from((Ipv4Addr::LOCALHOST, 0)))).unwrap();
        let address = socket.local_addr().unwrap();
        socket.connect(&address).unwrap();
        let trouble = Wire::from(socket).refuse_itself(&address).unwrap_err();
        assert_eq!(trouble.outcome, Outcome::Refused);
    }
}
