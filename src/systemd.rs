//! What a service manager is told: sd_notify(3), without its library.
//!
//! systemd believes the main process only (`NotifyAccess=main`). So the old process tells it who the main process is
//! from now on, while it is still the main one itself, and waits until that was read (the barrier) before the new one
//! says anything. STOPPING=1 is never sent while handing over: systemd would take the unit down.

use std::env;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::{Duration, Instant};

use nix::poll::PollFlags;
use sendfd::SendWithFd;

use crate::shared::monotonic_us;

/// How long systemd may take to read what it was sent. It is usually microseconds.
const BARRIER_TIMEOUT: Duration = Duration::from_secs(2);
const QUEUE_TIMEOUT: Duration = Duration::from_millis(200);
/// The same for all that is said of the store at a time: there may be thousands of listeners and nobody who reads, and
/// whoever asks this process meanwhile waits no longer than 10 s.
pub(crate) const STORE_TIMEOUT: Duration = Duration::from_secs(5);

/// The notify socket of a service manager.
pub(crate) struct Notifier {
    socket: UnixDatagram,
    watchdog: Option<Duration>,
}

impl Notifier {
    /// `None` without NOTIFY_SOCKET, or if nobody listens there.
    pub(crate) fn from_environment() -> Option<Self> {
        let address = env::var_os("NOTIFY_SOCKET").filter(|address| !address.is_empty())?;
        let connect = || -> io::Result<UnixDatagram> {
            let address = match address.as_bytes().strip_prefix(b"@") {
                Some(name) => SocketAddr::from_abstract_name(name)?,
                None => SocketAddr::from_pathname(&address)?,
            };
            let socket = UnixDatagram::unbound()?;
            socket.connect_addr(&address)?;
            // A service manager that does not read must not hold up the server.
            socket.set_nonblocking(true)?;
            Ok(socket)
        };
        match connect() {
            Ok(socket) => Some(Self { socket, watchdog: watchdog_interval() }),
            Err(error) => {
                log::warn!("NOTIFY_SOCKET={}: {error}", address.display());
                None
            }
        }
    }

    /// How often the watchdog wants to hear: half of WATCHDOG_USEC, as sd_watchdog_enabled(3) advises.
    pub(crate) fn watchdog(&self) -> Option<Duration> {
        self.watchdog
    }

    /// Sends `lines` as one message; that is what makes them take effect together.
    pub(crate) fn send(&self, lines: &[&str]) {
        self.send_with(lines, &[], Instant::now() + QUEUE_TIMEOUT);
    }

    fn send_with(&self, lines: &[&str], fds: &[BorrowedFd<'_>], deadline: Instant) {
        let numbers: Vec<_> = fds.iter().map(AsRawFd::as_raw_fd).collect();
        let message = lines.join("\n");
        let send = || match numbers.as_slice() {
            [] => self.socket.send(message.as_bytes()),
            numbers => self.socket.send_with_fd(message.as_bytes(), numbers),
        };
        let mut sent = send();
        // Many listeners for the store are more messages than its queue holds at once.
        if sent.as_ref().is_err_and(|error| error.kind() == io::ErrorKind::WouldBlock) {
            let deadline = deadline.min(Instant::now() + QUEUE_TIMEOUT);
            let _ = crate::poll::wait(self.socket.as_fd(), PollFlags::POLLOUT, Some(deadline));
            sent = send();
        }
        if let Err(error) = sent {
            log::warn!("cannot tell the service manager {:?}: {error}", lines.first().unwrap_or(&""));
        }
    }

    /// An upgrade has begun. MONOTONIC_USEC in the same message is what `Type=notify-reload` asks for.
    pub(crate) fn reloading(&self, status: &str) {
        self.send(&["RELOADING=1", &format!("MONOTONIC_USEC={}", monotonic_us()), &status_line(status)]);
    }

    /// This process serves: for the first time, or on, after an upgrade that failed.
    pub(crate) fn ready(&self, status: &str) {
        self.send(&["READY=1", &status_line(status)]);
    }

    pub(crate) fn status(&self, status: &str) {
        self.send(&[&status_line(status)]);
    }

    /// Not ready yet: it may take so much longer, from now on.
    pub(crate) fn still_starting(&self, time: Duration, status: &str) {
        self.send(&[&format!("EXTEND_TIMEOUT_USEC={}", time.as_micros()), &status_line(status)]);
    }

    pub(crate) fn stopping(&self, status: &str) {
        self.send(&["STOPPING=1", &status_line(status)]);
    }

    /// `pid` is the main process from now on, and `state` is what it is in; returns when systemd knows.
    pub(crate) fn hand_over_to(&self, pid: i32, state: &[&str], status: &str) {
        self.send(&[state, &[&format!("MAINPID={pid}"), &status_line(status)]].concat());
        if let Err(error) = self.barrier() {
            log::warn!("the service manager has not confirmed that process {pid} is the main one: {error}");
        }
    }

    /// systemd closes the fd when it has worked on everything that was sent before it.
    fn barrier(&self) -> io::Result<()> {
        let (mut reader, writer) = io::pipe()?;
        self.send_with(&["BARRIER=1"], &[writer.as_fd()], Instant::now() + QUEUE_TIMEOUT);
        drop(writer);
        let deadline = Some(Instant::now() + BARRIER_TIMEOUT);
        match crate::poll::wait(reader.as_fd(), PollFlags::POLLIN, deadline)? {
            true => reader.read(&mut [0]).map(drop),
            false => Err(io::ErrorKind::TimedOut.into()),
        }
    }

    pub(crate) fn watchdog_ping(&self) {
        self.send(&["WATCHDOG=1"]);
    }

    /// Puts a listener into the fd store (`FileDescriptorStoreMax=`), which outlives a crash. systemd keeps one of each
    /// socket, however often it is sent.
    pub(crate) fn store(&self, name: &str, listener: BorrowedFd<'_>, deadline: Instant) {
        match store_name(name) {
            Some(name) => self.send_with(&["FDSTORE=1", &format!("FDNAME={name}")], &[listener], deadline),
            None => log::warn!("listener `{name}` is not put into the fd store, whose names are short and ASCII"),
        }
    }

    pub(crate) fn remove_from_store(&self, name: &str, deadline: Instant) {
        if let Some(name) = store_name(name) {
            self.send_with(&["FDSTOREREMOVE=1", &format!("FDNAME={name}")], &[], deadline);
        }
    }
}

/// Tells what we have stored ourselves from the sockets of a `.socket` unit: LISTEN_FDS brings both, and only the latter
/// have an address that the unit has chosen.
const STORE_PREFIX: &str = "handover.";
const STORE_NAME_BYTES_MAX: usize = 255;

fn store_name(name: &str) -> Option<String> {
    let whole = format!("{STORE_PREFIX}{name}");
    (whole.is_ascii() && whole.len() <= STORE_NAME_BYTES_MAX).then_some(whole)
}

/// Takes listeners of an earlier run out of the store before this process is ready, and says whether anybody was told.
pub(crate) fn forget_stored(names: &[&str]) -> bool {
    if names.is_empty() {
        return false;
    }
    let Some(notifier) = Notifier::from_environment() else { return false };
    let deadline = Instant::now() + STORE_TIMEOUT;
    names.iter().for_each(|name| notifier.remove_from_store(name, deadline));
    if let Err(error) = notifier.barrier() {
        let names = names.join("`, `");
        log::warn!("the service manager has not confirmed that it forgets listener `{names}`: {error}");
    }
    true
}

/// The listener's name, if `name` is one that it has in the store.
pub(crate) fn name_in_store(name: &str) -> Option<&str> {
    name.strip_prefix(STORE_PREFIX)
}

/// A message is lines; a status is one of them.
fn status_line(status: &str) -> String {
    format!("STATUS={}", status.replace('\n', " "))
}

fn watchdog_interval() -> Option<Duration> {
    let number = |name: &str| env::var(name).ok()?.parse::<u64>().ok();
    if number("WATCHDOG_PID").is_some_and(|pid| pid != u64::from(std::process::id())) {
        return None;
    }
    number("WATCHDOG_USEC").filter(|microseconds| *microseconds > 1).map(|period| Duration::from_micros(period / 2))
}
