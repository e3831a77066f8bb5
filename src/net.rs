//! Listeners for programs with threads: like those of `std`, behind the gate and counting connections.

use std::fmt;
use std::io;
use std::net::{SocketAddr, TcpStream};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;

use socket2::{SockAddr, SockRef};

use crate::connections::Connection;
use crate::gate::GatedSocket;
use crate::handover::{Claimed, Handover};
use crate::listeners::Address;
use crate::shared::Shared;
use crate::sys::{self, IpAddress};

/// What every kind of listener has.
#[derive(Clone)]
pub(crate) struct Behind {
    pub(crate) shared: Arc<Shared>,
    pub(crate) socket: Arc<GatedSocket>,
    pub(crate) address: Address,
}

impl Behind {
    fn new(handover: &Handover, claimed: Claimed) -> Self {
        Self { shared: handover.shared.clone(), socket: claimed.socket, address: claimed.address }
    }

    fn take<R>(&self, attempt: impl FnMut(BorrowedFd<'_>) -> io::Result<R>) -> io::Result<Option<R>> {
        self.shared.gate.take_blocking(&self.socket, attempt)
    }

    /// The address of a TCP or UDP socket. It was read when the socket was claimed, so this cannot fail.
    pub(crate) fn ip(&self) -> SocketAddr {
        match &self.address {
            Address::Ip(address) => *address,
            Address::Path(_) | Address::Abstract(_) => SocketAddr::from(([0, 0, 0, 0], 0)),
        }
    }

    fn fmt(&self, name: &str, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct(name).field("address", &self.address).finish_non_exhaustive()
    }
}

/// Takes one connection, and counts it before the gate can be shut behind it.
pub(crate) fn accept<S: AsFd>(
    shared: &Shared,
    listener: BorrowedFd<'_>,
    flags: i32,
    stream: impl Fn(OwnedFd) -> io::Result<S>,
) -> io::Result<Connection<S>> {
    Ok(shared.connections.track(stream(sys::accept(listener, flags)?)?))
}

/// The same of a TCP listener, with the peer's address.
pub(crate) fn accept_with_peer<S: AsFd>(
    shared: &Shared,
    listener: BorrowedFd<'_>,
    flags: i32,
    peer: &mut IpAddress,
    stream: impl Fn(OwnedFd) -> io::Result<S>,
) -> io::Result<Connection<S>> {
    Ok(shared.connections.track(stream(sys::accept_with_peer(listener, flags, peer)?)?))
}

pub(crate) fn ip_of(peer: &SockAddr) -> io::Result<SocketAddr> {
    peer.as_socket().ok_or_else(|| io::Error::other("the peer has no IP address"))
}

/// Errors that concern one connection and not the listener: the next accept may succeed at once.
pub(crate) fn is_of_the_connection(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionAborted | io::ErrorKind::ConnectionReset | io::ErrorKind::Interrupted
    ) || matches!(
        error.raw_os_error(),
        Some(libc::EPROTO | libc::ENETDOWN | libc::EHOSTDOWN | libc::EHOSTUNREACH | libc::ENETUNREACH | libc::EPERM)
    )
}

/// How long to wait when the process is out of fds or memory, so as not to spin.
pub(crate) const EXHAUSTED_PAUSE: std::time::Duration = std::time::Duration::from_millis(50);
/// The same when a receiver's queue is full.
const FULL_QUEUE_PAUSE: std::time::Duration = std::time::Duration::from_millis(5);

/// Accepts for an iterator: passes over what concerns one connection, waits when the process is out of fds.
fn next<C>(accept: impl Fn() -> io::Result<Option<C>>) -> Option<C> {
    loop {
        match accept() {
            Ok(accepted) => return accepted,
            Err(error) if is_of_the_connection(&error) => {}
            Err(error) => {
                log::warn!("accept: {error}");
                std::thread::sleep(EXHAUSTED_PAUSE);
            }
        }
    }
}

/// A TCP listener. Any number of threads may accept from it.
#[derive(Clone)]
pub struct TcpListener(pub(crate) Behind);

impl TcpListener {
    pub(crate) fn new(handover: &Handover, claimed: Claimed) -> Self {
        Self(Behind::new(handover, claimed))
    }

    /// The next connection (`accept4(2)`). Blocks while the gate is shut; `None` once this process drains.
    ///
    /// # Errors
    ///
    /// Those of `accept4(2)`: for one connection (`ECONNABORTED`) or for the process (`EMFILE`).
    pub fn accept(&self) -> io::Result<Option<(Connection<TcpStream>, SocketAddr)>> {
        let mut peer = IpAddress::unknown();
        let accepted = self.0.take(|fd| accept_with_peer(&self.0.shared, fd, 0, &mut peer, |fd| Ok(fd.into())))?;
        accepted.map(|connection| Ok((connection, peer.read()?))).transpose()
    }

    /// Every connection until this process drains. Errors are logged and passed over; out of fds it waits a moment.
    pub fn incoming(&self) -> impl Iterator<Item = Connection<TcpStream>> + '_ {
        std::iter::from_fn(|| next(|| self.0.take(|fd| accept(&self.0.shared, fd, 0, |fd| Ok(fd.into())))))
    }

    /// Where it is bound.
    #[must_use]
    pub fn local_addr(&self) -> SocketAddr {
        self.0.ip()
    }
}

impl fmt::Debug for TcpListener {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt("TcpListener", f)
    }
}

/// A Unix stream listener. Any number of threads may accept from it.
#[derive(Clone)]
pub struct UnixListener(pub(crate) Behind);

impl UnixListener {
    pub(crate) fn new(handover: &Handover, claimed: Claimed) -> Self {
        Self(Behind::new(handover, claimed))
    }

    /// The next connection (`accept4(2)`). Blocks while the gate is shut; `None` once this process drains.
    ///
    /// # Errors
    ///
    /// As for [`TcpListener::accept`].
    pub fn accept(&self) -> io::Result<Option<Connection<UnixStream>>> {
        self.0.take(|fd| accept(&self.0.shared, fd, 0, |fd| Ok(fd.into())))
    }

    /// Every connection until this process drains; as [`TcpListener::incoming`].
    pub fn incoming(&self) -> impl Iterator<Item = Connection<UnixStream>> + '_ {
        std::iter::from_fn(|| next(|| self.accept()))
    }

    /// Its path; `None` in the abstract namespace.
    #[must_use]
    pub fn path(&self) -> Option<PathBuf> {
        path_of(&self.0.address)
    }
}

impl fmt::Debug for UnixListener {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt("UnixListener", f)
    }
}

fn path_of(address: &Address) -> Option<PathBuf> {
    match address {
        Address::Path(path) => Some(path.clone()),
        Address::Ip(_) | Address::Abstract(_) => None,
    }
}

/// The gated receiving of a datagram socket, and its sending, which no gate holds up: a process that drains may still
/// answer.
#[derive(Clone)]
pub(crate) struct Datagrams {
    pub(crate) behind: Behind,
    sending: Option<Arc<OwnedFd>>,
}

impl Datagrams {
    fn new(handover: &Handover, claimed: Claimed) -> Self {
        let sending = claimed.socket.fd();
        Self { behind: Behind::new(handover, claimed), sending }
    }

    fn receive(&self, buffer: &mut [u8]) -> io::Result<Option<(usize, SockAddr)>> {
        self.behind.take(|fd| sys::receive_from(fd, buffer))
    }

    fn socket(&self) -> io::Result<&OwnedFd> {
        self.sending.as_deref().ok_or_else(|| io::ErrorKind::NotConnected.into())
    }

    pub(crate) fn send(&self, bytes: &[u8], to: &SockAddr) -> io::Result<usize> {
        let socket = self.socket()?;
        let mut has_waited = false;
        loop {
            match self.try_send(bytes, to) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    // For a Unix socket that is not connected this looks at its own buffer alone, and not at the queue of
                    // whoever is to receive it.
                    crate::poll::wait(socket.as_fd(), nix::poll::PollFlags::POLLOUT, None)?;
                    if std::mem::replace(&mut has_waited, true) {
                        std::thread::sleep(FULL_QUEUE_PAUSE);
                    }
                }
                result => return result,
            }
        }
    }

    pub(crate) fn try_send(&self, bytes: &[u8], to: &SockAddr) -> io::Result<usize> {
        SockRef::from(self.socket()?).send_to(bytes, to)
    }
}

/// A UDP socket.
#[derive(Clone)]
pub struct UdpSocket(pub(crate) Datagrams);

impl UdpSocket {
    pub(crate) fn new(handover: &Handover, claimed: Claimed) -> Self {
        Self(Datagrams::new(handover, claimed))
    }

    /// The next datagram (`recvfrom(2)`). Blocks while the gate is shut; `None` once this process drains. Datagrams that
    /// nobody has received wait in the socket for the next generation.
    ///
    /// # Errors
    ///
    /// Those of `recvfrom(2)`.
    pub fn recv_from(&self, buffer: &mut [u8]) -> io::Result<Option<(usize, SocketAddr)>> {
        self.0.receive(buffer)?.map(|(count, peer)| Ok((count, ip_of(&peer)?))).transpose()
    }

    /// Sends a datagram (`sendto(2)`), also while this process drains.
    ///
    /// # Errors
    ///
    /// Those of `sendto(2)`.
    pub fn send_to(&self, bytes: &[u8], to: SocketAddr) -> io::Result<usize> {
        self.0.send(bytes, &to.into())
    }

    /// Where it is bound.
    #[must_use]
    pub fn local_addr(&self) -> SocketAddr {
        self.0.behind.ip()
    }
}

impl fmt::Debug for UdpSocket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.behind.fmt("UdpSocket", f)
    }
}

/// A Unix datagram socket.
#[derive(Clone)]
pub struct UnixDatagram(pub(crate) Datagrams);

impl UnixDatagram {
    pub(crate) fn new(handover: &Handover, claimed: Claimed) -> Self {
        Self(Datagrams::new(handover, claimed))
    }

    /// The next datagram and the path of its sender, if that has one. Blocks while the gate is shut; `None` once this
    /// process drains.
    ///
    /// # Errors
    ///
    /// Those of `recvfrom(2)`.
    pub fn recv_from(&self, buffer: &mut [u8]) -> io::Result<Option<(usize, Option<PathBuf>)>> {
        let received = self.0.receive(buffer)?;
        Ok(received.map(|(count, peer)| (count, peer.as_pathname().map(PathBuf::from))))
    }

    /// Sends a datagram to a path (`sendto(2)`), also while this process drains; waits while the receiver's queue is full.
    ///
    /// # Errors
    ///
    /// Those of `sendto(2)`.
    pub fn send_to(&self, bytes: &[u8], path: impl AsRef<std::path::Path>) -> io::Result<usize> {
        self.0.send(bytes, &SockAddr::unix(path)?)
    }

    /// Its path; `None` in the abstract namespace.
    #[must_use]
    pub fn path(&self) -> Option<PathBuf> {
        path_of(&self.0.behind.address)
    }
}

impl fmt::Debug for UnixDatagram {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.behind.fmt("UnixDatagram", f)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixDatagram;
    use std::time::{Duration, Instant};

    use crate::config::{Config, Signals};
    use crate::handover::Handover;
    use crate::listeners::UnixOptions;

    #[test]
    fn a_receiver_that_does_not_read_costs_the_sender_time_and_no_processor() {
        let path = |name: &str| std::env::temp_dir().join(format!("handover-{name}-{}.sock", std::process::id()));
        let (own, other) = (path("sends"), path("reads-nothing"));
        let config = Config::default().without_control_socket().signals(Signals::none());
        let handover = Handover::start(config).unwrap();
        let socket = handover.unix_datagram("log", &own, &UnixOptions::default()).unwrap();
        let receiver = UnixDatagram::bind(&other).unwrap();
        // Of as many senders as it takes: each of them has a buffer of its own, which is not to be what is full.
        let fill = |_| {
            let filler = UnixDatagram::unbound().unwrap();
            filler.set_nonblocking(true).unwrap();
            (0..).take_while(|_| filler.send_to(b"x", &other).is_ok()).count()
        };
        let filled: usize = (0..).map(fill).take_while(|count| *count > 0).sum();
        std::thread::scope(|scope| {
            let (tell, told) = std::sync::mpsc::channel();
            let other = &other;
            let sender = scope.spawn(move || {
                tell.send(nix::unistd::gettid()).unwrap();
                socket.send_to(b"x", other).unwrap();
            });
            let statistics = format!("/proc/self/task/{}/schedstat", told.recv().unwrap());
            let on_processor = || {
                let text = std::fs::read_to_string(&statistics).unwrap();
                Duration::from_nanos(text.split(' ').next().unwrap().parse().unwrap())
            };
            let (begun, used) = (Instant::now(), on_processor());
            std::thread::sleep(Duration::from_millis(500));
            let share = (on_processor() - used).as_secs_f64() / begun.elapsed().as_secs_f64();
            assert!(!sender.is_finished());
            for _ in 0..=filled {
                receiver.recv(&mut [0; 8]).unwrap();
            }
            sender.join().unwrap();
            assert!(share < 0.2, "{share}");
        });
        std::fs::remove_file(&other).unwrap();
    }
}
