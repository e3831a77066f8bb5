//! Open connections: counted, so that a drain knows when it is over, and cut when its deadline passes.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::ops::Deref;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use crate::sys::FdTable;
use crate::watch::lock;

pub(crate) struct Connections {
    table: Mutex<Table>,
    accepted: AtomicU64,
    /// Somebody wants to know when nothing is open any more.
    draining: AtomicBool,
    on_idle: Box<dyn Fn() + Send + Sync>,
}

#[derive(Default)]
struct Table {
    sockets: FdTable,
    /// Guards of work that is no connection.
    others: usize,
}

impl Table {
    fn open(&self) -> usize {
        self.sockets.len() + self.others
    }
}

impl Connections {
    pub(crate) fn new(on_idle: impl Fn() + Send + Sync + 'static) -> Self {
        Self {
            table: Mutex::default(),
            accepted: AtomicU64::new(0),
            draining: AtomicBool::new(false),
            on_idle: Box::new(on_idle),
        }
    }

    /// Counts `stream` until what is returned is dropped.
    pub(crate) fn track<S: AsFd>(self: &Arc<Self>, stream: S) -> Connection<S> {
        self.accepted.fetch_add(1, Ordering::Relaxed);
        let key = lock(&self.table).sockets.insert(stream.as_fd());
        Connection { _guard: Guard { connections: self.clone(), socket: Some(key) }, stream }
    }

    pub(crate) fn guard(self: &Arc<Self>) -> Guard {
        lock(&self.table).others += 1;
        Guard { connections: self.clone(), socket: None }
    }

    /// How many are open now.
    pub(crate) fn open(&self) -> usize {
        lock(&self.table).open()
    }

    /// How many were accepted since this process began.
    pub(crate) fn accepted(&self) -> u64 {
        self.accepted.load(Ordering::Relaxed)
    }

    /// From now on the last one to end calls `on_idle`.
    pub(crate) fn watch_for_idle(&self) {
        // Under the lock, so that no guard can be dropped between a count of one and the flag.
        let table = lock(&self.table);
        self.draining.store(true, Ordering::SeqCst);
        drop(table);
    }

    /// Shuts down every connection in both directions and says how much was still open. Whoever serves one sees the
    /// end of its stream and lets go of it.
    pub(crate) fn cut(&self) -> usize {
        let table = lock(&self.table);
        table.sockets.for_each(|fd| {
            // It may have ended by itself.
            let _ = socket2::SockRef::from(&fd).shutdown(Shutdown::Both);
        });
        table.open()
    }
}

/// Counts as one open connection until it is dropped: for work that a drain must wait for.
///
/// From [`Handover::guard`](crate::Handover::guard). Connections that the library's listeners accept carry one already.
pub struct Guard {
    connections: Arc<Connections>,
    socket: Option<usize>,
}

impl Drop for Guard {
    fn drop(&mut self) {
        let mut table = lock(&self.connections.table);
        match self.socket {
            Some(key) => table.sockets.remove(key),
            None => table.others -= 1,
        }
        if table.open() == 0 && self.connections.draining.load(Ordering::SeqCst) {
            drop(table);
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
    /// First, so that it is dropped before the stream: see `FdTable::for_each`.
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

    #[test]
    fn connections_are_counted_and_the_last_one_tells() {
        let told = Arc::new(AtomicUsize::new(0));
        let counter = told.clone();
        let connections = Arc::new(Connections::new(move || {
            counter.fetch_add(1, Ordering::SeqCst);
        }));
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
        let connections = Arc::new(Connections::new(|| {}));
        let (a, mut b) = UnixStream::pair().unwrap();
        let mut a = connections.track(a);
        assert_eq!(connections.cut(), 1);
        let mut byte = [0];
        assert_eq!(a.read(&mut byte).unwrap(), 0);
        assert_eq!(b.read(&mut byte).unwrap(), 0);
        assert_eq!(connections.open(), 1);
    }
}
