//! Open connections: counted, so that a drain knows when it is over, and cut when its deadline passes.
//!
//! A connection costs two atomic additions here and takes no lock. Both ends of the bargain between a connection that
//! ends and the cut stand in [`Guard::drop`] and [`Connections::cut`].

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::ops::Deref;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crate::sys::FdTable;
use crate::watch::lock;

/// What stands beside the count in `Connections::ended`: somebody wants to know when nothing is open any more.
const WATCHED: u64 = 1 << 63;

/// The same: whoever ends now must wait until the cut is over.
const CUTTING: u64 = 1 << 62;

const COUNT: u64 = CUTTING - 1;

pub(crate) struct Connections {
    accepted: AtomicU64,
    /// Guards of work that is no connection.
    others: AtomicU64,
    /// Of both.
    ended: AtomicU64,
    sockets: FdTable,
    cut: Mutex<()>,
    on_idle: Box<dyn Fn() + Send + Sync>,
}

impl Connections {
    /// Lives as long as the process, which has one: counting who still needs it would double what a connection costs.
    pub(crate) fn new(on_idle: impl Fn() + Send + Sync + 'static) -> &'static Self {
        // Where a leak checker of the application finds that it is still in use.
        static ALL: Mutex<Vec<&Connections>> = Mutex::new(Vec::new());
        let connections: &Self = Box::leak(Box::new(Self {
            accepted: AtomicU64::new(0),
            others: AtomicU64::new(0),
            ended: AtomicU64::new(0),
            sockets: FdTable::default(),
            cut: Mutex::default(),
            on_idle: Box::new(on_idle),
        }));
        lock(&ALL).push(connections);
        connections
    }

    /// Counts `stream` until what is returned is dropped.
    pub(crate) fn track<S: AsFd>(&'static self, stream: S) -> Connection<S> {
        self.accepted.fetch_add(1, Ordering::Relaxed);
        let socket = Some(self.sockets.enter(stream.as_fd()));
        Connection { _guard: Guard { connections: self, socket }, stream }
    }

    pub(crate) fn guard(&'static self) -> Guard {
        self.others.fetch_add(1, Ordering::Relaxed);
        Guard { connections: self, socket: None }
    }

    /// How many are open now; exact once nothing is accepted any more.
    pub(crate) fn open(&self) -> usize {
        // First what has ended. Each of those was counted as begun before, and acquiring makes that visible.
        let ended = self.ended.load(Ordering::Acquire) & COUNT;
        let begun = self.accepted.load(Ordering::Relaxed) + self.others.load(Ordering::Relaxed);
        usize::try_from(begun - ended).unwrap_or(usize::MAX)
    }

    /// How many were accepted since this process began.
    pub(crate) fn accepted(&self) -> u64 {
        self.accepted.load(Ordering::Relaxed)
    }

    /// From now on the last one to end calls `on_idle`, and so may one that looks like the last.
    pub(crate) fn watch_for_idle(&self) {
        self.ended.fetch_or(WATCHED, Ordering::AcqRel);
    }

    /// Shuts down every connection in both directions and says how much was still open. Whoever serves one sees the
    /// end of its stream and lets go of it.
    pub(crate) fn cut(&self) -> usize {
        self.cut_with(|fd| {
            // It may have ended by itself.
            let _ = socket2::SockRef::from(&fd).shutdown(Shutdown::Both);
        })
    }

    fn cut_with(&self, shut_down: impl FnMut(BorrowedFd<'_>)) -> usize {
        // A connection that ends has left the table before it is counted as ended. If it was counted before this, the
        // table shows that it has left; if after, it finds the mark, and waits for the lock before it closes the fd.
        let cut = lock(&self.cut);
        self.ended.fetch_or(CUTTING, Ordering::AcqRel);
        // Before, because those that are cut count as ended as soon as they see it.
        let open = self.open();
        self.sockets.for_each(shut_down);
        self.ended.fetch_and(!CUTTING, Ordering::AcqRel);
        drop(cut);
        open
    }
}

/// Counts as one open connection until it is dropped: for work that a drain must wait for.
///
/// From [`Handover::guard`](crate::Handover::guard). Connections that the library's listeners accept carry one already.
pub struct Guard {
    connections: &'static Connections,
    /// Its place in the table.
    socket: Option<&'static AtomicBool>,
}

impl Drop for Guard {
    fn drop(&mut self) {
        if let Some(socket) = self.socket {
            socket.store(false, Ordering::Relaxed);
        }
        // Releases that store to `cut`, and acquires the mark of one that has begun.
        let ended = self.connections.ended.fetch_add(1, Ordering::AcqRel);
        if ended & (WATCHED | CUTTING) != 0 {
            self.end_slowly(ended);
        }
    }
}

impl Guard {
    #[cold]
    fn end_slowly(&self, ended: u64) {
        if ended & CUTTING != 0 {
            drop(lock(&self.connections.cut));
        }
        if ended & WATCHED != 0 && self.connections.open() == 0 {
            (self.connections.on_idle)();
        }
    }
}

impl std::fmt::Debug for Guard {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Guard").finish_non_exhaustive()
    }
}

/// An accepted connection that a drain waits for.
///
/// Use it as the stream that it is: it implements `Read` and `Write` (with feature `tokio`, `AsyncRead` and
/// `AsyncWrite`) and dereferences to the stream. It does not give the stream away, because the count must end no later
/// than the stream.
#[derive(Debug)]
pub struct Connection<S> {
    /// First, so that it is dropped before the stream: see `Connections::cut`.
    _guard: Guard,
    stream: S,
}

impl<S> Deref for Connection<S> {
    type Target = S;

    fn deref(&self) -> &S {
        &self.stream
    }
}

impl<S> Connection<S> {
    #[cfg(feature = "tokio")]
    pub(crate) fn stream_mut(&mut self) -> &mut S {
        &mut self.stream
    }
}

impl<S: AsFd> AsFd for Connection<S> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

impl<S> Read for Connection<S>
where
    for<'a> &'a S: Read,
{
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        (&self.stream).read(buffer)
    }
}

impl<S> Write for Connection<S>
where
    for<'a> &'a S: Write,
{
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        (&self.stream).write(buffer)
    }

    fn flush(&mut self) -> io::Result<()> {
        (&self.stream).flush()
    }
}

impl<S> Read for &Connection<S>
where
    for<'a> &'a S: Read,
{
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        (&self.stream).read(buffer)
    }
}

impl<S> Write for &Connection<S>
where
    for<'a> &'a S: Write,
{
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        (&self.stream).write(buffer)
    }

    fn flush(&mut self) -> io::Result<()> {
        (&self.stream).flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixStream;
    use std::sync::atomic::AtomicUsize;
    use std::sync::{Arc, Barrier, mpsc};
    use std::thread;
    use std::time::Duration;

    #[test]
    fn connections_are_counted_and_the_last_one_tells() {
        let told = Arc::new(AtomicUsize::new(0));
        let counter = told.clone();
        let connections = Connections::new(move || {
            counter.fetch_add(1, Ordering::SeqCst);
        });
        let (a, b) = UnixStream::pair().unwrap();
        let (a, b) = (connections.track(a), connections.track(b));
        let guard = connections.guard();
        assert_eq!((connections.open(), connections.accepted()), (3, 2));
        drop(a);
        connections.watch_for_idle();
        drop(b);
        assert_eq!(told.load(Ordering::SeqCst), 0);
        drop(guard);
        assert_eq!((connections.open(), told.load(Ordering::SeqCst)), (0, 1));
    }

    #[test]
    fn cutting_ends_both_directions() {
        let connections = Connections::new(|| {});
        let (a, mut b) = UnixStream::pair().unwrap();
        let mut a = connections.track(a);
        assert_eq!(connections.cut(), 1);
        let mut byte = [0];
        assert_eq!(a.read(&mut byte).unwrap(), 0);
        assert_eq!(b.read(&mut byte).unwrap(), 0);
        assert_eq!(connections.open(), 1);
    }

    #[test]
    fn those_that_end_because_they_are_cut_are_counted() {
        const COUNT: usize = 64;
        let connections = Connections::new(|| {});
        thread::scope(|scope| {
            let pairs = [(); COUNT].map(|()| UnixStream::pair().unwrap());
            let serve = |(ours, theirs): (UnixStream, UnixStream)| {
                let mut connection = connections.track(ours);
                scope.spawn(move || {
                    assert_eq!(connection.read(&mut [0]).unwrap(), 0);
                    drop(connection);
                });
                theirs
            };
            let _clients: Vec<UnixStream> = pairs.into_iter().map(serve).collect();
            let cut = connections.cut_with(|fd| {
                let _ = socket2::SockRef::from(&fd).shutdown(Shutdown::Both);
                thread::yield_now();
            });
            assert_eq!(cut, COUNT);
        });
        assert_eq!(connections.open(), 0);
    }

    /// A number is free as soon as its connection is dropped, and the next socket of anybody takes it.
    #[test]
    fn the_cut_spares_whoever_has_taken_the_number_of_a_connection_that_ended() {
        const THREADS: usize = 4;
        const ROUNDS: usize = 2_000;
        let connections = Connections::new(|| {});
        let over = AtomicBool::new(false);
        thread::scope(|scope| {
            let end_connections = || {
                for round in 0..ROUNDS {
                    let (a, _b) = UnixStream::pair().unwrap();
                    drop(connections.track(a));
                    let (stranger, _peer) = UnixStream::pair().unwrap();
                    stranger.set_nonblocking(true).unwrap();
                    thread::yield_now();
                    let read = (&stranger).read(&mut [0]).map_err(|error| error.kind());
                    assert_eq!(read, Err(io::ErrorKind::WouldBlock), "a stranger was cut, in round {round}");
                }
            };
            let threads = [(); THREADS].map(|()| scope.spawn(end_connections));
            scope.spawn(|| {
                while !over.load(Ordering::Relaxed) {
                    connections.cut_with(|fd| {
                        // Time for the connection to end, and for its number to be taken.
                        thread::yield_now();
                        let _ = socket2::SockRef::from(&fd).shutdown(Shutdown::Both);
                    });
                }
            });
            let results = threads.map(thread::ScopedJoinHandle::join);
            over.store(true, Ordering::Relaxed);
            results.into_iter().for_each(|result| result.unwrap());
        });
        assert_eq!((connections.open(), connections.accepted()), (0, (THREADS * ROUNDS) as u64));
    }

    #[test]
    fn the_last_one_tells_whoever_it_is() {
        for round in 0..2_000 {
            let (tell, told) = mpsc::channel();
            let connections = Connections::new(move || tell.send(()).unwrap_or_default());
            let start = Barrier::new(3);
            thread::scope(|scope| {
                for guard in [connections.guard(), connections.guard()] {
                    let start = &start;
                    scope.spawn(move || {
                        start.wait();
                        drop(guard);
                    });
                }
                start.wait();
                connections.watch_for_idle();
                if connections.open() > 0 {
                    told.recv_timeout(Duration::from_secs(30)).unwrap_or_else(|_| panic!("nobody, in round {round}"));
                }
            });
            assert_eq!(connections.open(), 0);
        }
    }
}
