//! The gate: whether this process accepts.
//!
//! Each listener has its own lock around its socket, taken for reading by every accept and for writing when the gate
//! moves. So when [`Gate::shut`] returns, not one accept is under way, and none can begin. Whoever waits for a
//! connection waits for the gate's event too, never inside a blocking `accept`, which would take one connection more.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock, Weak};

use nix::poll::{PollFd, PollFlags};
use nix::sys::eventfd::{EfdFlags, EventFd};
use socket2::SockRef;

use crate::watch::{Watch, lock};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum GateState {
    Shut,
    Open,
    /// For good: this process drains.
    Closed,
}

/// The gate of a process, common to all its listeners.
pub(crate) struct Gate {
    pub(crate) state: Arc<Watch<GateState>>,
    /// Readable unless the gate is open: what blocked threads poll beside their listener.
    not_open: EventFd,
    sockets: Mutex<Vec<Arc<GatedSocket>>>,
    /// Called when the application waits on a socket for the first time.
    on_first_wait: Box<dyn Fn() + Send + Sync>,
}

impl Gate {
    pub(crate) fn new(on_first_wait: impl Fn() + Send + Sync + 'static) -> io::Result<Self> {
        let not_open = EventFd::from_value_and_flags(1, EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
        let state = Arc::new(Watch::new(GateState::Shut));
        Ok(Self { state, not_open, sockets: Mutex::default(), on_first_wait: Box::new(on_first_wait) })
    }

    /// Puts a socket behind the gate, in the state in which the gate is.
    pub(crate) fn guard(&self, fd: Arc<OwnedFd>) -> Arc<GatedSocket> {
        let mut sockets = lock(&self.sockets);
        let slot = match self.state.read(|state| *state) {
            GateState::Shut => Slot::Shut(fd),
            GateState::Open => Slot::Open(fd),
            GateState::Closed => Slot::Closed,
        };
        let socket = Arc::new(GatedSocket {
            slot: RwLock::new(slot),
            was_waited_on: AtomicBool::new(false),
            on_shut: Mutex::default(),
        });
        sockets.push(socket.clone());
        socket
    }

    /// When this returns no accept is under way, nothing is registered in an epoll set, and none can begin.
    pub(crate) fn shut(&self) {
        self.move_to(GateState::Shut);
    }

    pub(crate) fn open(&self) {
        self.move_to(GateState::Open);
    }

    /// Shuts for good and lets go of the sockets, so that a queue is not kept alive that nobody will serve.
    pub(crate) fn close(&self) {
        self.move_to(GateState::Closed);
    }

    fn move_to(&self, next: GateState) {
        let sockets = lock(&self.sockets);
        if self.state.read(|state| *state == next || *state == GateState::Closed) {
            return;
        }
        for socket in sockets.iter() {
            socket.move_to(next);
        }
        // The event is level-triggered: set for as long as the gate is not open, so no waiter can miss it. It wakes every thread
        // that waits on a listener, so they must find the state as it is to be, or all of them would fight for its lock until
        // this thread gets it, which with thousands of them takes longer than a client's patience.
        match next {
            GateState::Open => {
                let _ = self.not_open.read();
                self.state.update(|state| *state = next);
            }
            GateState::Shut | GateState::Closed => {
                self.state.update(|state| *state = next);
                let _ = self.not_open.write(1);
            }
        }
    }

    /// Calls `attempt` on the socket when the gate is open and there is something to take. `None` once the gate is
    /// closed for good.
    pub(crate) fn take_blocking<R>(
        &self,
        socket: &GatedSocket,
        mut attempt: impl FnMut(BorrowedFd<'_>) -> io::Result<R>,
    ) -> io::Result<Option<R>> {
        loop {
            match self.try_take(socket, &mut attempt)? {
                Taken::Done(taken) => return Ok(Some(taken)),
                Taken::Closed => return Ok(None),
                Taken::Shut => {
                    self.state.wait(None, |state| (*state != GateState::Shut).then_some(()));
                }
                Taken::NothingThere(fd) => {
                    let mut fds = [
                        PollFd::new(fd.as_fd(), PollFlags::POLLIN),
                        PollFd::new(self.not_open.as_fd(), PollFlags::POLLIN),
                    ];
                    crate::poll::wait_any(&mut fds, None)?;
                }
            }
        }
    }

    fn before_first_wait(&self, socket: &GatedSocket) -> io::Result<()> {
        // The flag belongs to the open file description, so this undoes what another process may have done to it. Here
        // and not when it was received: there may be thousands of which few are ever waited on.
        if let Some(fd) = socket.fd() {
            SockRef::from(&fd).set_nonblocking(true)?;
        }
        // Only then: another thread that sees it must find the flag set. The swap makes the call happen once.
        if !socket.was_waited_on.swap(true, Ordering::AcqRel) {
            (self.on_first_wait)();
        }
        Ok(())
    }

    /// One attempt that does not block.
    pub(crate) fn try_take<R>(
        &self,
        socket: &GatedSocket,
        mut attempt: impl FnMut(BorrowedFd<'_>) -> io::Result<R>,
    ) -> io::Result<Taken<R>> {
        if !socket.was_waited_on.load(Ordering::Acquire) {
            self.before_first_wait(socket)?;
        }
        let slot = socket.slot.read().unwrap_or_else(PoisonError::into_inner);
        match &*slot {
            Slot::Shut(_) => Ok(Taken::Shut),
            Slot::Closed => Ok(Taken::Closed),
            Slot::Open(fd) => match attempt(fd.as_fd()) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(Taken::NothingThere(fd.clone())),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(Taken::NothingThere(fd.clone())),
                result => result.map(Taken::Done),
            },
        }
    }
}

/// What an attempt to take from a socket came to.
pub(crate) enum Taken<R> {
    Done(R),
    NothingThere(Arc<OwnedFd>),
    Shut,
    Closed,
}

enum Slot {
    Shut(Arc<OwnedFd>),
    Open(Arc<OwnedFd>),
    Closed,
}

/// A socket behind the gate.
pub(crate) struct GatedSocket {
    slot: RwLock<Slot>,
    was_waited_on: AtomicBool,
    /// Takes the socket out of somebody's epoll set, before the other process is told that we are shut.
    on_shut: Mutex<Vec<Weak<Deregister>>>,
}

pub(crate) type Deregister = dyn Fn() + Send + Sync;

impl GatedSocket {
    /// Whether the application has waited for connections here since this process began.
    pub(crate) fn was_waited_on(&self) -> bool {
        self.was_waited_on.load(Ordering::Relaxed)
    }

    /// The socket itself, for looking at it and for handing it over; `None` once the gate is closed.
    pub(crate) fn fd(&self) -> Option<Arc<OwnedFd>> {
        match &*self.slot.read().unwrap_or_else(PoisonError::into_inner) {
            Slot::Shut(fd) | Slot::Open(fd) => Some(fd.clone()),
            Slot::Closed => None,
        }
    }

    #[cfg(feature = "tokio")]
    pub(crate) fn is_open(&self) -> bool {
        matches!(&*self.slot.read().unwrap_or_else(PoisonError::into_inner), Slot::Open(_))
    }

    /// For as long as the caller keeps it.
    #[cfg(feature = "tokio")]
    pub(crate) fn on_shut(&self, deregister: &Arc<Deregister>) {
        let mut all = lock(&self.on_shut);
        all.retain(|one| one.strong_count() > 0);
        all.push(Arc::downgrade(deregister));
    }

    fn move_to(&self, next: GateState) {
        {
            let mut slot = self.slot.write().unwrap_or_else(PoisonError::into_inner);
            *slot = match (std::mem::replace(&mut *slot, Slot::Closed), next) {
                (Slot::Closed, _) | (_, GateState::Closed) => Slot::Closed,
                (Slot::Shut(fd) | Slot::Open(fd), GateState::Open) => Slot::Open(fd),
                (Slot::Shut(fd) | Slot::Open(fd), GateState::Shut) => Slot::Shut(fd),
            };
        }
        if next != GateState::Open {
            lock(&self.on_shut).iter().filter_map(Weak::upgrade).for_each(|deregister| deregister());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{TcpListener, TcpStream};
    use std::sync::atomic::AtomicUsize;
    use std::sync::mpsc;

    fn gate() -> Arc<Gate> {
        Arc::new(Gate::new(|| {}).unwrap())
    }

    fn listener() -> (Arc<OwnedFd>, std::net::SocketAddr) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        listener.set_nonblocking(true).unwrap();
        let address = listener.local_addr().unwrap();
        (Arc::new(listener.into()), address)
    }

    fn accept(fd: BorrowedFd<'_>) -> io::Result<OwnedFd> {
        socket2::SockRef::from(&fd).accept().map(|(socket, _)| socket.into())
    }

    #[test]
    fn a_shut_gate_leaves_connections_in_the_queue() {
        let (gate, (fd, address)) = (gate(), listener());
        let socket = gate.guard(fd.clone());
        let _client = TcpStream::connect(address).unwrap();
        assert!(matches!(gate.try_take(&socket, accept).unwrap(), Taken::Shut));
        assert_eq!(crate::sys::accept_backlog(fd.as_fd()).unwrap(), 1);
        gate.open();
        assert!(matches!(gate.try_take(&socket, accept).unwrap(), Taken::Done(_)));
        gate.shut();
        assert!(matches!(gate.try_take(&socket, accept).unwrap(), Taken::Shut));
        gate.close();
        assert!(matches!(gate.try_take(&socket, accept).unwrap(), Taken::Closed));
        gate.open();
        assert!(matches!(gate.try_take(&socket, accept).unwrap(), Taken::Closed));
    }

    /// Whoever had it before may have left it so, and no accept may block.
    #[test]
    fn a_socket_that_blocks_is_made_not_to() {
        let (gate, listener) = (gate(), TcpListener::bind("127.0.0.1:0").unwrap());
        let fd = Arc::new(OwnedFd::from(listener));
        let socket = gate.guard(fd.clone());
        assert!(!SockRef::from(&fd).nonblocking().unwrap());
        assert!(matches!(gate.try_take(&socket, accept).unwrap(), Taken::Shut));
        assert!(SockRef::from(&fd).nonblocking().unwrap());
    }

    #[test]
    fn a_blocked_thread_takes_nothing_once_the_gate_is_shut_and_ends_when_it_closes() {
        let (gate, (fd, address)) = (gate(), listener());
        let socket = gate.guard(fd.clone());
        gate.open();
        let (taken, results) = mpsc::channel();
        let thread = {
            let (gate, socket) = (gate.clone(), socket.clone());
            std::thread::spawn(move || {
                while let Some(connection) = gate.take_blocking(&socket, accept).unwrap() {
                    taken.send(connection).unwrap();
                }
            })
        };
        let _first = TcpStream::connect(address).unwrap();
        results.recv().unwrap();
        for _ in 0..200 {
            gate.shut();
            let _second = TcpStream::connect(address).unwrap();
            assert_eq!(crate::sys::accept_backlog(fd.as_fd()).unwrap(), 1);
            gate.open();
            results.recv().unwrap();
        }
        gate.close();
        thread.join().unwrap();
        drop(socket);
    }

    #[test]
    fn a_closed_gate_lets_go_of_the_socket() {
        let (gate, (fd, address)) = (gate(), listener());
        let _socket = gate.guard(fd);
        gate.open();
        gate.close();
        assert!(TcpStream::connect(address).is_err());
    }

    #[test]
    fn the_first_wait_is_told_once() {
        let count = Arc::new(AtomicUsize::new(0));
        let counter = count.clone();
        let gate = Gate::new(move || {
            counter.fetch_add(1, Ordering::SeqCst);
        })
        .unwrap();
        let socket = gate.guard(listener().0);
        assert!(!socket.was_waited_on());
        for _ in 0..3 {
            assert!(matches!(gate.try_take(&socket, accept).unwrap(), Taken::Shut));
        }
        assert!(socket.was_waited_on());
        assert_eq!(count.load(Ordering::SeqCst), 1);
    }
}
