//! Listeners for tokio, behind the gate and counting connections.
//!
//! Each has one task that accepts; the socket leaves tokio's epoll set while the gate is shut.
//!
//! ```no_run
//! # async fn example() -> Result<(), Box<dyn std::error::Error>> {
//! use handover::{Config, Handover};
//!
//! let handover = Handover::start(Config::default())?;
//! let mut listener = handover::tokio::TcpListener::new(handover.tcp("echo", "127.0.0.1:7000")?);
//! handover.ready_async().await?;
//! while let Some((connection, peer)) = listener.next_connection().await {
//!     tokio::spawn(async move { drop((connection, peer)) });
//! }
//! handover.drained().await;
//! # Ok(())
//! # }
//! ```

use std::fmt;
use std::future::poll_fn;
use std::io;
use std::net::SocketAddr;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};
use tokio::net::{TcpStream, UnixStream};
use tokio::task::coop::poll_proceed;

use crate::connections::Connection;
use crate::gate::{Deregister, GateState, Taken};
use crate::handover::Handover;
use crate::net::{self, Behind, Datagrams};
use crate::shared::Phase;
use crate::sys::{self, IpAddress};
use crate::watch::{Found, lock};

/// How long after its time a silent connection is looked at once more. Where the process has stood still, the time is over
/// as soon as it goes on, and tokio learns of the requests that have come meanwhile only then, some of them at a time.
pub(crate) const LAST_LOOK: Duration = Duration::from_millis(10);

impl Handover {
    /// Completes when a kept connection that has been silent since this call should be closed: this process drains,
    /// and `linger` has passed since the drain began or since the call, whichever was later (see [`Config::linger`]).
    /// [`wait_for_request`](Self::wait_for_request) for tasks: select it beside the wait for the next request.
    ///
    /// ```
    /// # use handover::{Connection, Handover};
    /// # use tokio::{io::{AsyncBufReadExt, BufReader}, net::TcpStream};
    /// # async fn one(handover: Handover, mut connection: BufReader<Connection<TcpStream>>) -> std::io::Result<bool> {
    /// tokio::select! {
    ///     bytes = connection.fill_buf() => Ok(!bytes?.is_empty()), // the next request, or the end
    ///     () = handover.lingered() => Ok(false),                   // close
    /// }
    /// # }
    /// ```
    ///
    /// [`Config::linger`]: crate::Config::linger
    pub async fn lingered(&self) {
        let called = Instant::now();
        let drain = self.shared.phase.clone().future(|phase: &Phase| phase.draining.map(|draining| draining.begun));
        let begun = drain.await;
        tokio::time::sleep_until((begun.max(called) + self.shared.linger()).into()).await;
        tokio::time::sleep(LAST_LOOK).await;
    }
}

type Registration = Arc<Mutex<Option<AsyncFd<Arc<OwnedFd>>>>>;
type GateMoved = Found<GateState, fn(&GateState) -> Option<()>>;

/// A socket in tokio's epoll set while the gate is open.
struct Registered {
    behind: Behind,
    registration: Registration,
    /// Kept, because the socket has it for as long as this has.
    _deregister: Arc<Deregister>,
    moved: Option<GateMoved>,
}

impl Registered {
    fn new(behind: Behind) -> Self {
        let registration = Registration::default();
        let for_gate = registration.clone();
        // Dropping it deregisters, before the other process is told that the gate is shut.
        let deregister: Arc<Deregister> = Arc::new(move || drop(lock(&for_gate).take()));
        behind.socket.on_shut(&deregister);
        Self { behind, registration, _deregister: deregister, moved: None }
    }

    async fn take<R>(&mut self, mut attempt: impl FnMut(BorrowedFd<'_>) -> io::Result<R>) -> io::Result<Option<R>> {
        poll_fn(|context| {
            // Where there is always something the socket itself is never waited on, which is where tokio would count.
            let budget = ready!(poll_proceed(context));
            let taken = self.poll_take(context, &mut attempt);
            if taken.is_ready() {
                budget.made_progress();
            }
            taken
        })
        .await
    }

    fn poll_take<R>(
        &mut self,
        context: &mut Context<'_>,
        attempt: &mut impl FnMut(BorrowedFd<'_>) -> io::Result<R>,
    ) -> Poll<io::Result<Option<R>>> {
        loop {
            match self.behind.shared.gate.try_take(&self.behind.socket, &mut *attempt)? {
                Taken::Done(taken) => return Poll::Ready(Ok(Some(taken))),
                Taken::Closed => return Poll::Ready(Ok(None)),
                Taken::Shut => ready!(self.poll_gate(context, |state| (*state != GateState::Shut).then_some(()))),
                Taken::NothingThere(fd) => {
                    let readable = self.poll_readable(context, fd)?;
                    let moved = self.poll_gate(context, |state| (*state != GateState::Open).then_some(()));
                    if readable.is_pending() && moved.is_pending() {
                        return Poll::Pending;
                    }
                }
            }
        }
    }

    fn poll_gate(&mut self, context: &mut Context<'_>, moved: fn(&GateState) -> Option<()>) -> Poll<()> {
        let state = &self.behind.shared.gate.state;
        let mut future = state.clone().future(moved);
        let found = Pin::new(&mut future).poll(context);
        // Kept, because it is woken only while it lives.
        self.moved = found.is_pending().then_some(future);
        found
    }

    /// Ready means: try again. Readiness that an attempt has just used up is forgotten first.
    fn poll_readable(&mut self, context: &mut Context<'_>, fd: Arc<OwnedFd>) -> io::Result<Poll<()>> {
        let mut registration = lock(&self.registration);
        // Under the lock: once the gate is shut nobody puts the socket back.
        if !self.behind.socket.is_open() {
            return Ok(Poll::Ready(()));
        }
        let registered = match &mut *registration {
            Some(registered) => registered,
            empty => empty.insert(register(fd)?),
        };
        match registered.poll_read_ready(context)? {
            Poll::Ready(mut guard) => {
                guard.clear_ready();
                Ok(Poll::Ready(()))
            }
            Poll::Pending => Ok(Poll::Pending),
        }
    }
}

#[allow(deprecated, reason = "an `Arc<OwnedFd>` keeps its fd open, which is what the constructor cannot know")]
fn register(fd: Arc<OwnedFd>) -> io::Result<AsyncFd<Arc<OwnedFd>>> {
    match AsyncFd::with_interest(Arc::clone(&fd), Interest::READABLE) {
        // Another task of this runtime waits on it, and epoll knows a socket by its number.
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            AsyncFd::with_interest(Arc::new(fd.try_clone()?), Interest::READABLE)
        }
        registered => registered,
    }
}

/// Passes over what concerns one connection, and waits when the process is out of fds.
async fn pass_over(error: io::Error) {
    if !net::is_of_the_connection(&error) {
        log::warn!("accept: {error}");
        tokio::time::sleep(net::EXHAUSTED_PAUSE).await;
    }
}

/// A TCP listener for tokio; from [`Handover::tcp`](crate::Handover::tcp).
pub struct TcpListener(Registered);

impl TcpListener {
    /// Moves the listener to tokio.
    #[must_use]
    pub fn new(listener: crate::TcpListener) -> Self {
        Self(Registered::new(listener.0))
    }

    /// The next connection. Waits while the gate is shut; `None` once this process drains.
    ///
    /// # Errors
    ///
    /// Those of `accept4(2)`: for one connection (`ECONNABORTED`) or for the process (`EMFILE`).
    pub async fn accept(&mut self) -> io::Result<Option<(Connection<TcpStream>, SocketAddr)>> {
        let shared = self.0.behind.shared.clone();
        let stream = |fd: OwnedFd| TcpStream::from_std(fd.into());
        let mut peer = IpAddress::unknown();
        let attempt = |fd: BorrowedFd<'_>| net::accept_with_peer(&shared, fd, libc::SOCK_NONBLOCK, &mut peer, stream);
        let accepted = self.0.take(attempt).await?;
        accepted.map(|connection| Ok((connection, peer.read()?))).transpose()
    }

    /// The next connection; `None` once this process drains. Errors are logged and passed over; out of fds it waits a moment.
    pub async fn next_connection(&mut self) -> Option<(Connection<TcpStream>, SocketAddr)> {
        loop {
            match self.accept().await {
                Ok(accepted) => return accepted,
                Err(error) => pass_over(error).await,
            }
        }
    }

    /// Where it is bound.
    #[must_use]
    pub fn local_addr(&self) -> SocketAddr {
        self.0.behind.ip()
    }

    #[cfg(feature = "hyper")]
    pub(crate) fn shared(&self) -> &Arc<crate::shared::Shared> {
        &self.0.behind.shared
    }
}

impl From<crate::TcpListener> for TcpListener {
    fn from(listener: crate::TcpListener) -> Self {
        Self::new(listener)
    }
}

impl fmt::Debug for TcpListener {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TcpListener").field("address", &self.local_addr()).finish_non_exhaustive()
    }
}

/// A Unix stream listener for tokio; from [`Handover::unix`](crate::Handover::unix).
pub struct UnixListener(Registered);

impl UnixListener {
    /// Moves the listener to tokio.
    #[must_use]
    pub fn new(listener: crate::UnixListener) -> Self {
        Self(Registered::new(listener.0))
    }

    /// The next connection. Waits while the gate is shut; `None` once this process drains.
    ///
    /// # Errors
    ///
    /// As for [`TcpListener::accept`].
    pub async fn accept(&mut self) -> io::Result<Option<Connection<UnixStream>>> {
        let shared = self.0.behind.shared.clone();
        let stream = |fd: OwnedFd| UnixStream::from_std(fd.into());
        self.0.take(|fd| net::accept(&shared, fd, libc::SOCK_NONBLOCK, stream)).await
    }

    /// The next connection; as [`TcpListener::next_connection`].
    pub async fn next_connection(&mut self) -> Option<Connection<UnixStream>> {
        loop {
            match self.accept().await {
                Ok(accepted) => return accepted,
                Err(error) => pass_over(error).await,
            }
        }
    }

    #[cfg(feature = "hyper")]
    pub(crate) fn shared(&self) -> &Arc<crate::shared::Shared> {
        &self.0.behind.shared
    }
}

impl From<crate::UnixListener> for UnixListener {
    fn from(listener: crate::UnixListener) -> Self {
        Self::new(listener)
    }
}

impl fmt::Debug for UnixListener {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("UnixListener").field("address", &self.0.behind.address).finish_non_exhaustive()
    }
}

/// A UDP socket for tokio; from [`Handover::udp`](crate::Handover::udp).
pub struct UdpSocket {
    receiving: Registered,
    sending: Datagrams,
}

impl UdpSocket {
    /// Moves the socket to tokio.
    #[must_use]
    pub fn new(socket: crate::UdpSocket) -> Self {
        Self { receiving: Registered::new(socket.0.behind.clone()), sending: socket.0 }
    }

    /// The next datagram. Waits while the gate is shut; `None` once this process drains.
    ///
    /// # Errors
    ///
    /// Those of `recvfrom(2)`.
    pub async fn recv_from(&mut self, buffer: &mut [u8]) -> io::Result<Option<(usize, SocketAddr)>> {
        let received = self.receiving.take(|fd| sys::receive_from(fd, buffer)).await?;
        received.map(|(count, peer)| Ok((count, net::ip_of(&peer)?))).transpose()
    }

    /// Sends a datagram (`sendto(2)`), also while this process drains; waits the moment that a full buffer takes.
    ///
    /// # Errors
    ///
    /// Those of `sendto(2)`.
    pub fn send_to(&self, bytes: &[u8], to: SocketAddr) -> io::Result<usize> {
        self.sending.send(bytes, &to.into())
    }

    /// Where it is bound.
    #[must_use]
    pub fn local_addr(&self) -> SocketAddr {
        self.receiving.behind.ip()
    }
}

impl fmt::Debug for UdpSocket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("UdpSocket").field("address", &self.local_addr()).finish_non_exhaustive()
    }
}

/// A Unix datagram socket for tokio; from [`Handover::unix_datagram`](crate::Handover::unix_datagram).
pub struct UnixDatagram {
    receiving: Registered,
    sending: crate::UnixDatagram,
}

impl UnixDatagram {
    /// Moves the socket to tokio.
    #[must_use]
    pub fn new(socket: crate::UnixDatagram) -> Self {
        Self { receiving: Registered::new(socket.0.behind.clone()), sending: socket }
    }

    /// The next datagram and the path of its sender, if that has one. Waits while the gate is shut; `None` once this
    /// process drains.
    ///
    /// # Errors
    ///
    /// Those of `recvfrom(2)`.
    pub async fn recv_from(&mut self, buffer: &mut [u8]) -> io::Result<Option<(usize, Option<PathBuf>)>> {
        let received = self.receiving.take(|fd| sys::receive_from(fd, buffer)).await?;
        Ok(received.map(|(count, peer)| (count, peer.as_pathname().map(PathBuf::from))))
    }

    /// Sends a datagram to a path (`sendto(2)`), also while this process drains.
    ///
    /// # Errors
    ///
    /// Those of `sendto(2)`; `WouldBlock` while the receiver's queue is full, of whose end nobody is told.
    pub fn send_to(&self, bytes: &[u8], path: impl AsRef<std::path::Path>) -> io::Result<usize> {
        self.sending.0.try_send(bytes, &socket2::SockAddr::unix(path)?)
    }
}

impl fmt::Debug for UnixDatagram {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("UnixDatagram").field("address", &self.receiving.behind.address).finish_non_exhaustive()
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Connection<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(self.stream_mut()).poll_read(context, buffer)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Connection<S> {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(self.stream_mut()).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(self.stream_mut()).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(self.stream_mut()).poll_shutdown(context)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(self.stream_mut()).poll_write_vectored(context, bytes)
    }

    fn is_write_vectored(&self) -> bool {
        (**self).is_write_vectored()
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::time::timeout;

    use super::*;
    use crate::config::{Config, Signals};
    use std::os::fd::AsRawFd;
    use std::sync::atomic::{AtomicUsize, Ordering};

    #[tokio::test]
    async fn lingering_begins_with_the_drain_or_the_call() {
        let linger = Duration::from_millis(400);
        let config = Config::default().without_control_socket().signals(Signals::none()).linger(linger);
        let handover = Handover::start(config).unwrap();
        handover.ready().unwrap();
        assert!(timeout(3 * linger, handover.lingered()).await.is_err(), "not a word of a drain");
        let _connection = handover.guard();
        handover.stop();
        handover.draining().await;
        for _ in 0..2 {
            // The second call comes after twice the time since the drain began.
            let called = std::time::Instant::now();
            handover.lingered().await;
            assert!(called.elapsed() >= linger);
            tokio::time::sleep(linger).await;
        }
    }

    /// A loop for each processor, or an accept beside another.
    #[tokio::test]
    async fn two_tasks_accept_on_one_listener() {
        let config = Config::default().without_control_socket().signals(Signals::none());
        let handover = Handover::start(config).unwrap();
        let listener = handover.tcp("http", "127.0.0.1:0").unwrap();
        let address = listener.local_addr();
        let (mut one, mut other) = (super::TcpListener::new(listener.clone()), super::TcpListener::new(listener));
        handover.ready_async().await.unwrap();
        let connect = async || {
            // When both wait for it.
            tokio::task::yield_now().await;
            (TcpStream::connect(address).await.unwrap(), TcpStream::connect(address).await.unwrap())
        };
        let (first, second, clients) = tokio::join!(one.accept(), other.accept(), connect());
        let (first, second) = (first.unwrap().unwrap().1, second.unwrap().unwrap().1);
        let mut peers = [first, second];
        let mut wanted = [clients.0.local_addr().unwrap(), clients.1.local_addr().unwrap()];
        peers.sort();
        wanted.sort();
        assert_eq!(peers, wanted);
    }

    /// Of a runtime with one thread: what others do there must not wait for the end of a flood.
    #[tokio::test]
    async fn a_socket_that_always_has_something_lets_others_run() {
        const COUNT: usize = 300;
        let config = Config::default().without_control_socket().signals(Signals::none());
        let handover = Handover::start(config).unwrap();
        let mut listener = super::TcpListener::new(handover.tcp("http", "127.0.0.1:0").unwrap());
        handover.ready_async().await.unwrap();
        let clients: Vec<_> =
            (0..COUNT).map(|_| std::net::TcpStream::connect(listener.local_addr()).unwrap()).collect();
        let ran_after = Arc::new(AtomicUsize::new(COUNT));
        let accepted = Arc::new(AtomicUsize::new(0));
        let (to, from) = (ran_after.clone(), accepted.clone());
        let other = tokio::spawn(async move { to.store(from.load(Ordering::Relaxed), Ordering::Relaxed) });
        for _ in &clients {
            listener.accept().await.unwrap().unwrap();
            accepted.fetch_add(1, Ordering::Relaxed);
        }
        other.await.unwrap();
        assert!(ran_after.load(Ordering::Relaxed) < COUNT);
    }

    /// As where a task is aborted and another accepts, for a new configuration.
    #[tokio::test]
    async fn a_listener_that_is_dropped_leaves_nothing_behind() {
        let config = Config::default().without_control_socket().signals(Signals::none());
        let handover = Handover::start(config).unwrap();
        let listener = handover.tcp("http", "127.0.0.1:0").unwrap();
        handover.ready_async().await.unwrap();
        for _ in 0..100 {
            let mut again = super::TcpListener::new(listener.clone());
            assert!(timeout(Duration::from_millis(1), again.accept()).await.is_err());
            let registration = again.0.registration.clone();
            assert!(lock(&registration).is_some());
            drop(again);
            assert_eq!(Arc::strong_count(&registration), 1);
            // Its own fd is the listener's, and not a second one because an earlier registration is still there.
            let fd = lock(&registration).take().unwrap().get_ref().as_raw_fd();
            assert_eq!(fd, listener.0.socket.fd().unwrap().as_raw_fd());
        }
    }

    /// As in the example of `lingered`.
    #[tokio::test]
    async fn a_request_that_came_while_the_process_stood_still_is_read() {
        let linger = Duration::from_millis(100);
        let config = Config::default().without_control_socket().signals(Signals::none()).linger(linger);
        let handover = Handover::start(config).unwrap();
        handover.ready().unwrap();
        let _connection = handover.guard();
        let mut clients = Vec::new();
        let mut servers = Vec::new();
        // It is a matter of chance which of the two is looked at first.
        for _ in 0..16 {
            let (client, mut server) = UnixStream::pair().unwrap();
            let handover = handover.clone();
            servers.push(tokio::spawn(async move {
                tokio::select! {
                    byte = server.read_u8() => byte.is_ok(),
                    () = handover.lingered() => false,
                }
            }));
            clients.push(client);
        }
        handover.stop();
        handover.draining().await;
        tokio::task::yield_now().await;
        for client in &mut clients {
            client.write_u8(1).await.unwrap();
        }
        std::thread::sleep(3 * linger);
        for server in servers {
            assert!(server.await.unwrap());
        }
    }
}
