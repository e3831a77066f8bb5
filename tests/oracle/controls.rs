//! Servers that swap their listener the wrong way, so that an oracle which calls them lossless is itself proved
//! broken, and one that does it right.
//!
//! At each swap the server does what a replaced server does: it leaves connections in its accept queue. To be
//! sure of that, [`Control::swap`] accepts nothing from then on and waits until one is queued, so there must be
//! load that opens connections.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, Sender, TryRecvError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use socket2::{Domain, Socket, Type};

const BACKLOG: i32 = 1024;
/// How long a swap waits for a connection in the queue, and for the port.
const PATIENCE: Duration = Duration::from_secs(10);
/// How soon the server notices a command or the end.
const TICK_MILLISECONDS: u16 = 2;
const MAX_REQUEST: usize = 64 * 1024;

/// Opens a second listener on the port (SO_REUSEPORT) and closes the first, as nginx does with `reuseport`: the
/// kernel resets what the first had queued (unless `net.ipv4.tcp_migrate_req` is 1).
///
/// # Errors
///
/// If no listener can be opened.
pub fn reuseport_rebind() -> io::Result<Control> {
    Control::start(Swap::ReusePort)
}

/// Closes its listener and binds the port again (SO_REUSEADDR), as a restart does: the queue is reset, and in
/// between everyone is refused.
///
/// # Errors
///
/// If no listener can be opened.
pub fn close_and_rebind() -> io::Result<Control> {
    Control::start(Swap::CloseFirst)
}

/// The positive control: the next generation goes on with the same socket, so nothing may be lost.
///
/// # Errors
///
/// If no listener can be opened.
pub fn same_socket() -> io::Result<Control> {
    Control::start(Swap::SameSocket)
}

#[derive(Clone, Copy)]
enum Swap {
    ReusePort,
    CloseFirst,
    SameSocket,
}

/// A server in this process that answers every request with `gen=<generation> pid=<pid>`.
pub struct Control {
    address: SocketAddr,
    commands: Sender<Sender<io::Result<u64>>>,
    over: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Control {
    fn start(swap: Swap) -> io::Result<Self> {
        let listener = listen((Ipv4Addr::LOCALHOST, 0).into(), swap)?;
        let address = listener.local_addr()?;
        let (commands, receiver) = mpsc::channel();
        let over = Arc::new(AtomicBool::new(false));
        let server = Server { listener: Some(listener), address, swap, generation: 1, over: Arc::clone(&over) };
        let thread = thread::Builder::new().name("control".to_owned()).spawn(move || server.run(&receiver))?;
        Ok(Self { address, commands, over, thread: Some(thread) })
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Swaps the listener while a connection waits in its queue, and returns the new generation.
    ///
    /// # Errors
    ///
    /// If no connection came, or the new listener could not be opened.
    pub fn swap(&self) -> io::Result<u64> {
        let (reply, result) = mpsc::channel();
        let gone = |_| io::Error::other("the control server is gone");
        self.commands.send(reply).map_err(|_| io::Error::other("the control server is gone"))?;
        result.recv_timeout(3 * PATIENCE).map_err(gone)?
    }

    pub fn stop(mut self) {
        self.end();
    }

    fn end(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Drop for Control {
    fn drop(&mut self) {
        self.end();
    }
}

struct Server {
    /// None only if a swap failed.
    listener: Option<TcpListener>,
    address: SocketAddr,
    swap: Swap,
    generation: u64,
    over: Arc<AtomicBool>,
}

impl Server {
    fn run(mut self, commands: &Receiver<Sender<io::Result<u64>>>) {
        while !self.over.load(Ordering::Relaxed) {
            match commands.try_recv() {
                Ok(reply) => {
                    let _ = reply.send(self.swap());
                }
                Err(TryRecvError::Empty) => self.accept(),
                Err(TryRecvError::Disconnected) => return,
            }
        }
    }

    fn accept(&self) {
        let Some(listener) = &self.listener else {
            thread::park_timeout(Duration::from_millis(TICK_MILLISECONDS.into()));
            return;
        };
        if !queued(listener, TICK_MILLISECONDS) {
            return;
        }
        if let Ok((stream, _)) = listener.accept() {
            let (generation, over) = (self.generation, Arc::clone(&self.over));
            // What a client does not hear from a thread that could not be started, it counts.
            let _ = thread::Builder::new().spawn(move || serve(stream, generation, &over));
        }
    }

    fn swap(&mut self) -> io::Result<u64> {
        let old = self.listener.take().ok_or(ErrorKind::NotConnected)?;
        if !queued(&old, u16::try_from(PATIENCE.as_millis()).unwrap_or(u16::MAX)) {
            self.listener = Some(old);
            return Err(io::Error::new(ErrorKind::TimedOut, "no connection came, so a swap would lose none"));
        }
        let new = match self.swap {
            Swap::ReusePort => {
                let new = listen(self.address, self.swap)?;
                drop(old);
                new
            }
            Swap::CloseFirst => {
                drop(old);
                self.bind_again()?
            }
            Swap::SameSocket => old,
        };
        self.listener = Some(new);
        self.generation += 1;
        Ok(self.generation)
    }

    fn bind_again(&self) -> io::Result<TcpListener> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match listen(self.address, self.swap) {
                // Some client was given the port as its own while nobody listened.
                Err(error) if error.kind() == ErrorKind::AddrInUse && Instant::now() < deadline => {
                    thread::park_timeout(Duration::from_millis(TICK_MILLISECONDS.into()));
                }
                other => return other,
            }
        }
    }
}

fn listen(address: SocketAddr, swap: Swap) -> io::Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, None)?;
    socket.set_reuse_address(true)?;
    if let Swap::ReusePort = swap {
        socket.set_reuse_port(true)?;
    }
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    socket.set_nonblocking(true)?;
    Ok(socket.into())
}

/// Whether a connection waits, or comes within so many milliseconds.
fn queued(listener: &TcpListener, milliseconds: u16) -> bool {
    let mut fds = [PollFd::new(listener.as_fd(), PollFlags::POLLIN)];
    poll(&mut fds, PollTimeout::from(milliseconds)).is_ok_and(|ready| ready > 0)
}

/// Serves one connection, kept for as long as the client wants.
fn serve(mut stream: TcpStream, generation: u64, over: &AtomicBool) {
    // Accepted from a non-blocking listener; on Linux it does not inherit that, elsewhere it may.
    let tick = Duration::from_millis(50);
    if stream.set_nonblocking(false).is_err() || stream.set_read_timeout(Some(tick)).is_err() {
        return;
    }
    let body = format!("gen={generation} pid={}", std::process::id());
    let mut unread = vec![];
    while let Some(closes) = next_request(&mut stream, &mut unread, over) {
        let field = if closes { "Connection: close\r\n" } else { "" };
        let length = body.len();
        let response = format!("HTTP/1.1 200 OK\r\nContent-Length: {length}\r\n{field}\r\n{body}");
        if stream.write_all(response.as_bytes()).is_err() || closes {
            return;
        }
    }
}

/// Takes one request off the stream; says whether the client wants the connection closed.
fn next_request(stream: &mut TcpStream, unread: &mut Vec<u8>, over: &AtomicBool) -> Option<bool> {
    loop {
        if let Some(end) = unread.windows(4).position(|window| window == b"\r\n\r\n") {
            let head = String::from_utf8_lossy(&unread[..end]).to_ascii_lowercase();
            let length = head.lines().find_map(|line| line.strip_prefix("content-length: "));
            let length: usize = length.map_or(Ok(0), str::parse).ok()?;
            if unread.len() >= end + 4 + length {
                unread.drain(..end + 4 + length);
                return Some(head.contains("connection: close"));
            }
        }
        let mut chunk = [0; 4096];
        match stream.read(&mut chunk) {
            Ok(count) if count > 0 && unread.len() < MAX_REQUEST => unread.extend_from_slice(&chunk[..count]),
            Err(error) if error.kind() == ErrorKind::WouldBlock && !over.load(Ordering::Relaxed) => {}
            _ => return None,
        }
    }
}
