//! The sockets that a program has bound by itself, kept for its next generation.
//!
//! Each is a copy of the program's own socket, so its queue lives on whoever ends. A later generation that binds the same
//! address is given it in place of its own.

use std::collections::HashSet;
use std::io;
use std::net::IpAddr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use socket2::SockRef;

use crate::control::ListenerStatus;
use crate::listeners::{Address, Inherited, identity_of, kind_of};
use crate::protocol::{Claims, Kind, PathIdentity};
use crate::saved::path;
use crate::sys;

use super::seen::Watched;

/// What the kernel has not done after that time it has refused.
const BIND_TIMEOUT: Duration = Duration::from_secs(1);
/// Whoever binds the address of one that does not listen yet waits for that, because it may be a client's and connect next. After
/// this time it is given it all the same.
const LISTEN_TIMEOUT: Duration = Duration::from_secs(1);
/// Between two looks at one of which it is not known yet what it is for; the longer that is so, the less it matters.
const LOOK_INTERVAL_MIN: Duration = Duration::from_millis(1);
const LOOK_INTERVAL_MAX: Duration = Duration::from_secs(1);
/// Of the names that they have in a service manager's store.
const NAME: &str = "kept-";
const NAME_OF_ANY_PORT: &str = "kept-any-port-";

#[derive(Default)]
pub(super) struct Kept {
    /// In the order in which they were bound.
    sockets: Vec<KeptSocket>,
    /// Names that were given.
    count: u64,
    /// Sockets, by their inodes, that were bound to any port. Whether they listen is not known yet.
    of_any_port: Vec<u64>,
}

pub(super) struct KeptSocket {
    name: String,
    kind: Kind,
    /// A path as this process sees it.
    address: Address,
    /// The kernel chose the port.
    any_port: bool,
    cookie: u64,
    inode: u64,
    identity: Option<PathIdentity>,
    stage: Stage,
    /// No generation that was committed has it yet.
    is_new: bool,
    /// No worker is ready before it waits there; or else only one that has it. A build that failed may have opened it, or a
    /// program that has closed it again.
    is_awaited: bool,
    since: Instant,
    next_look: Instant,
    fd: OwnedFd,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// The program is about to bind it.
    Asked {
        until: Instant,
    },
    /// Of a stream socket: it does not listen yet.
    Bound,
    Serving,
}

/// What there is for a program that binds an address.
pub(super) enum Found<'a> {
    Nothing,
    /// Another worker is just binding it, or about to listen on it.
    NotYet,
    Socket(&'a KeptSocket),
}

impl KeptSocket {
    fn new(name: String, fd: OwnedFd, address: Address, any_port: bool, stage: Stage) -> io::Result<Option<Self>> {
        let Some(kind) = kind_of(fd.as_fd())? else { return Ok(None) };
        let cookie = SockRef::from(&fd).cookie()?;
        let inode = inode_of(fd.as_fd())?;
        let since = Instant::now();
        Ok(Some(Self {
            name,
            kind,
            address,
            any_port,
            cookie,
            inode,
            identity: None,
            stage,
            is_new: true,
            is_awaited: false,
            since,
            next_look: since + LOOK_INTERVAL_MIN,
            fd,
        }))
    }

    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    pub(super) fn name(&self) -> &str {
        &self.name
    }

    pub(super) fn address(&self) -> &Address {
        &self.address
    }

    /// Where clients find it, if that is a path that it has made.
    pub(super) fn path(&self) -> Option<(PathBuf, PathIdentity)> {
        match (&self.address, self.identity) {
            (Address::Path(path), Some(identity)) => Some((path.clone(), identity)),
            _ => None,
        }
    }

    fn may_be_given(&self) -> bool {
        match self.stage {
            Stage::Asked { .. } => false,
            // One whose port the kernel chose is known by the call of `listen`.
            Stage::Bound => self.any_port || self.since.elapsed() > LISTEN_TIMEOUT,
            Stage::Serving => true,
        }
    }

    fn serves(&self) -> bool {
        self.stage == Stage::Serving
    }

    /// Looks at what has become of it. False: it is not kept.
    fn settle(&mut self, now: Instant) -> bool {
        if self.serves() {
            return true;
        }
        self.next_look = now + (now.duration_since(self.since) / 8).clamp(LOOK_INTERVAL_MIN, LOOK_INTERVAL_MAX);
        let socket = SockRef::from(&self.fd);
        if let Stage::Asked { until } = self.stage {
            match Address::of(self.fd.as_fd()) {
                Ok(Address::Ip(ip)) if ip.port() == 0 => return until > now,
                Err(_) => return until > now,
                // Of a path it says what the program has said.
                Ok(Address::Path(_)) => {}
                Ok(address) => self.address = address,
            }
            self.stage = Stage::Bound;
        }
        if self.stage == Stage::Bound {
            let serves = match self.kind {
                Kind::Tcp | Kind::Unix => socket.is_listener().unwrap_or(false),
                Kind::Udp | Kind::UnixDatagram => true,
            };
            if serves {
                self.stage = Stage::Serving;
            }
        }
        if let (Address::Path(path), None, Stage::Bound | Stage::Serving) = (&self.address, self.identity, self.stage) {
            self.identity = identity_of(path).ok();
        }
        !self.is_of_client()
    }

    /// One that has a peer is no listener, wherever it was bound.
    fn is_of_client(&self) -> bool {
        SockRef::from(&self.fd).peer_addr().is_ok()
    }
}

impl Kept {
    fn is_name_of_ours(name: &str) -> bool {
        name.starts_with(NAME)
    }

    fn name(&mut self, any_port: bool) -> String {
        self.count += 1;
        format!("{}{}", if any_port { NAME_OF_ANY_PORT } else { NAME }, self.count)
    }

    fn enter(&mut self, fd: OwnedFd, address: Address, any_port: bool, stage: Stage) -> io::Result<()> {
        let name = self.name(any_port);
        self.sockets.extend(KeptSocket::new(name, fd, address, any_port, stage)?);
        Ok(())
    }

    /// The program is about to bind its socket.
    pub(super) fn expect(&mut self, fd: OwnedFd, address: Address) -> io::Result<()> {
        let until = Instant::now() + BIND_TIMEOUT;
        self.enter(fd, address, false, Stage::Asked { until })
    }

    /// The program is about to bind it to whatever port is free.
    pub(super) fn expect_any_port(&mut self, inode: u64) {
        // What is never listened on would be remembered for ever.
        const REMEMBERED_MAX: usize = 256;
        if self.of_any_port.len() >= REMEMBERED_MAX {
            self.of_any_port.remove(0);
        }
        self.of_any_port.push(inode);
    }

    /// The same of all of them, for the next build of this process.
    pub(super) fn of_any_port(&self) -> &[u64] {
        &self.of_any_port
    }

    /// Whether the socket was bound to any port, and does not listen yet. It is asked once.
    pub(super) fn take_any_port(&mut self, inode: u64) -> bool {
        let place = self.of_any_port.iter().position(|one| *one == inode);
        place.map(|place| self.of_any_port.remove(place)).is_some()
    }

    /// The program is about to listen on its socket.
    pub(super) fn expect_to_listen(&mut self, fd: OwnedFd, address: Address, any_port: bool) -> io::Result<()> {
        self.enter(fd, address, any_port, Stage::Bound)
    }

    /// A server that is taken over listens on it.
    pub(super) fn take_over(&mut self, fd: OwnedFd, address: Address) -> io::Result<()> {
        let name = self.name(false);
        let socket = KeptSocket::new(name, fd, address, false, Stage::Bound)?;
        self.sockets.extend(socket.map(|socket| KeptSocket { is_awaited: true, ..socket }));
        self.settle();
        Ok(())
    }

    pub(super) fn has(&self, inode: u64) -> bool {
        self.sockets.iter().any(|socket| socket.inode == inode)
    }

    /// What is bound to that address and not held yet by the worker that asks.
    pub(super) fn find(&mut self, kind: Kind, address: &Address, is_held: impl Fn(u64) -> bool) -> Found<'_> {
        self.settle();
        let matching = |socket: &&KeptSocket| socket.kind == kind && !socket.any_port && socket.address == *address;
        Self::free(self.sockets.iter().filter(matching), is_held)
    }

    /// The first that the kernel has chosen a port for, at that address.
    pub(super) fn find_any_port(&mut self, kind: Kind, address: &Address, is_held: impl Fn(u64) -> bool) -> Found<'_> {
        self.settle();
        let ip = |address: &Address| match address {
            Address::Ip(ip) => Some(ip.ip()),
            _ => None,
        };
        let matching =
            |socket: &&KeptSocket| socket.kind == kind && socket.any_port && ip(&socket.address) == ip(address);
        Self::free(self.sockets.iter().filter(matching), is_held)
    }

    fn free<'a>(mut sockets: impl Iterator<Item = &'a KeptSocket>, is_held: impl Fn(u64) -> bool) -> Found<'a> {
        match sockets.find(|socket| !is_held(socket.inode)) {
            None => Found::Nothing,
            Some(socket) if socket.may_be_given() => Found::Socket(socket),
            Some(_) => Found::NotYet,
        }
    }

    /// Another address that the kernel will not let anybody bind beside this one, which that socket is to have.
    pub(super) fn overlap(&self, kind: Kind, address: &Address, own: BorrowedFd<'_>) -> Option<&Address> {
        let Address::Ip(wanted) = address else { return None };
        let takes_other = |ip: IpAddr, fd: BorrowedFd<'_>, other: IpAddr| match (ip, other) {
            (IpAddr::V6(ip), IpAddr::V4(_)) => ip.is_unspecified() && !SockRef::from(&fd).only_v6().unwrap_or(false),
            (IpAddr::V4(_), IpAddr::V6(_)) => false,
            _ => ip.is_unspecified(),
        };
        let overlapping = |socket: &&KeptSocket| match &socket.address {
            Address::Ip(kept) => {
                let is_other = kept.port() == wanted.port() && kept.ip() != wanted.ip();
                is_other
                    && (takes_other(wanted.ip(), own, kept.ip()) || takes_other(kept.ip(), socket.fd(), wanted.ip()))
            }
            _ => false,
        };
        let mut of_kind = self.sockets.iter().filter(|socket| socket.kind == kind);
        of_kind.find(overlapping).map(|socket| &socket.address)
    }

    /// Looks at what has become of those that were to be bound.
    pub(super) fn settle(&mut self) {
        let now = Instant::now();
        self.sockets.retain_mut(|socket| socket.settle(now));
    }

    /// When it is to be looked again: the end of a client's connection is seen by its peer only when it is not kept here.
    pub(super) fn next_look(&self) -> Option<Instant> {
        self.sockets.iter().filter(|socket| !socket.serves()).map(|socket| socket.next_look).min()
    }

    fn serving(&self) -> impl Iterator<Item = &KeptSocket> {
        self.sockets.iter().filter(|socket| socket.serves())
    }

    pub(super) fn has_path(&self) -> bool {
        self.sockets.iter().any(|socket| matches!(socket.address, Address::Path(_)))
    }

    /// Whether clients find one of them by that path.
    pub(super) fn is_at(&self, path: &Path) -> bool {
        let here = identity_of(path).ok();
        here.is_some() && self.sockets.iter().any(|socket| socket.identity == here)
    }

    pub(super) fn watched(&self) -> impl Iterator<Item = Watched> {
        let watched = |socket: &KeptSocket| {
            let address = Address::of(socket.fd.as_fd()).ok()?;
            Some(Watched {
                name: socket.address.to_string(),
                inode: socket.inode,
                address,
                is_awaited: socket.is_awaited,
            })
        };
        self.serving().filter_map(watched)
    }

    pub(super) fn await_only(&mut self, is_held: impl Fn(u64) -> bool) {
        for socket in &mut self.sockets {
            socket.is_awaited = is_held(socket.inode);
        }
    }

    /// A build has failed. The one before is started again where it has ended, and has to open only what it was committed with.
    pub(super) fn await_nothing_new(&mut self) {
        self.sockets.iter_mut().filter(|socket| socket.is_new).for_each(|socket| socket.is_awaited = false);
    }

    pub(super) fn addresses(&self) -> impl Iterator<Item = Address> {
        // As the kernel names them: a path may be relative to the directory of the program.
        self.serving().filter_map(|socket| Address::of(socket.fd.as_fd()).ok())
    }

    /// Name and fd.
    pub(super) fn fds(&self) -> impl Iterator<Item = (&str, BorrowedFd<'_>)> {
        self.serving().map(|socket| (socket.name.as_str(), socket.fd.as_fd()))
    }

    pub(super) fn status(&self) -> impl Iterator<Item = ListenerStatus> {
        self.serving().map(|socket| ListenerStatus {
            name: socket.name.clone(),
            kind: socket.kind,
            address: socket.address.to_string(),
            cookie: socket.cookie,
            source: "intercepted".to_owned(),
            queue: crate::engine::queue_of(socket.kind, socket.fd.as_fd()),
            waited_on: true,
        })
    }

    /// What the generation that serves now has made of them, if it is known what it has. From now on none is new.
    pub(super) fn take_stock(&mut self, held: Option<&HashSet<u64>>) -> Claims {
        self.settle();
        let mut claims = Claims::default();
        for socket in self.sockets.iter_mut().filter(|socket| socket.serves()) {
            let is_new = std::mem::take(&mut socket.is_new);
            let is_held = held.is_none_or(|held| held.contains(&socket.inode));
            socket.is_awaited = held.map_or(socket.is_awaited, |_| is_held);
            let which = match is_held {
                true if is_new => &mut claims.added,
                true => &mut claims.kept,
                false => &mut claims.unclaimed,
            };
            which.push(socket.address.to_string());
        }
        claims
    }

    /// Takes out those that fail the test.
    pub(super) fn retain(&mut self, is_wanted: impl Fn(u64) -> bool) -> Vec<KeptSocket> {
        self.settle();
        let (kept, closed) = std::mem::take(&mut self.sockets)
            .into_iter()
            .partition(|socket| is_wanted(socket.inode) && !socket.is_of_client());
        self.sockets = kept;
        closed
    }

    /// Cookie and fd.
    pub(super) fn all(&self) -> impl Iterator<Item = (u64, BorrowedFd<'_>)> {
        self.sockets.iter().map(|socket| (socket.cookie, socket.fd()))
    }

    /// Where clients find those that have a path.
    pub(super) fn paths(&self) -> Vec<(PathBuf, PathIdentity)> {
        self.sockets.iter().filter_map(KeptSocket::path).collect()
    }

    pub(super) fn saved(&self) -> Vec<SavedKept> {
        let path = |socket: &KeptSocket| match &socket.address {
            Address::Path(path) => Some(path.clone()),
            _ => None,
        };
        let saved = |socket: &KeptSocket| SavedKept {
            name: socket.name.clone(),
            any_port: socket.any_port,
            path: path(socket),
            fd: socket.fd.as_raw_fd(),
            is_new: socket.is_new,
            is_awaited: socket.is_awaited,
        };
        self.bound().map(saved).collect()
    }

    /// Of all that are saved.
    pub(super) fn saved_fds(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.bound().map(KeptSocket::fd)
    }

    /// What the kernel has not bound yet, or has refused to, has no address by which it could be found again. A program that
    /// listens on it after all makes it known by that.
    fn bound(&self) -> impl Iterator<Item = &KeptSocket> {
        self.sockets.iter().filter(|socket| !matches!(socket.stage, Stage::Asked { .. }))
    }

    pub(super) fn resume(saved: Vec<SavedKept>) -> io::Result<Self> {
        let mut kept = Self::default();
        for saved in saved {
            let fd = sys::fd_from_environment(saved.fd);
            let fd = fd.ok_or_else(|| io::Error::other(format!("`{}` is not open", saved.name)))?;
            kept.go_on_with(fd, saved)?;
        }
        Ok(kept)
    }

    /// Those that a service manager has kept, and how those are called there that get another name. The program may have no
    /// use for them any more.
    pub(super) fn take_stored(&mut self, mut all: Vec<Inherited>) -> io::Result<Vec<String>> {
        let mut renamed = vec![];
        // First those whose names must not be given once more.
        all.sort_by_key(|stored| !Self::is_name_of_ours(&stored.name));
        for mut stored in all {
            if !Self::is_name_of_ours(&stored.name) {
                let name = self.name(false);
                renamed.push(std::mem::replace(&mut stored.name, name));
            }
            self.take_one_stored(stored)?;
        }
        Ok(renamed)
    }

    fn take_one_stored(&mut self, stored: Inherited) -> io::Result<()> {
        let any_port = stored.name.starts_with(NAME_OF_ANY_PORT);
        let path = match stored.address {
            Address::Path(path) => Some(path),
            _ => None,
        };
        let fd = stored.fd.as_raw_fd();
        let saved = SavedKept { name: stored.name, any_port, path, fd, is_new: false, is_awaited: false };
        self.go_on_with(stored.fd, saved)
    }

    fn go_on_with(&mut self, fd: OwnedFd, saved: SavedKept) -> io::Result<()> {
        let SavedKept { name, any_port, path, is_new, is_awaited, .. } = saved;
        let of_name = name.trim_start_matches(|letter: char| !letter.is_ascii_digit()).parse().unwrap_or(0);
        self.count = self.count.max(of_name);
        let address = path.map_or_else(|| Address::of(fd.as_fd()), |path| Ok(Address::Path(path)))?;
        let socket = KeptSocket::new(name, fd, address, any_port, Stage::Bound)?;
        self.sockets.extend(socket.map(|socket| KeptSocket { is_new, is_awaited, ..socket }));
        self.settle();
        Ok(())
    }
}

/// A socket as the next build of this process finds it.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct SavedKept {
    name: String,
    any_port: bool,
    #[serde(with = "path::option")]
    path: Option<PathBuf>,
    fd: RawFd,
    #[serde(default)]
    is_new: bool,
    #[serde(default = "is_awaited_unless_said")]
    is_awaited: bool,
}

/// As all were for a build before this one.
fn is_awaited_unless_said() -> bool {
    true
}

/// By which a socket is known in `/proc`.
pub(super) fn inode_of(socket: BorrowedFd<'_>) -> io::Result<u64> {
    Ok(nix::sys::stat::fstat(socket)?.st_ino)
}

/// Gives a kept socket the options that a program has set on its own before it bound that, and says which cannot be given
/// any more.
pub(super) fn carry_options_over(from: BorrowedFd<'_>, to: BorrowedFd<'_>, address: &Address) -> Vec<&'static str> {
    let (own, kept) = (SockRef::from(&from), SockRef::from(&to));
    let mut different = Vec::new();
    // The mode is shared with the generation before: one that waits in `accept` goes on in either, and one that polls
    // must not block. So it is only ever made non-blocking.
    if own.nonblocking().unwrap_or(false) && !kept.nonblocking().unwrap_or(true) {
        let _ = kept.set_nonblocking(true);
    }
    macro_rules! carry {
        ($get:ident, $set:ident) => {
            if let (Ok(wanted), Ok(now)) = (own.$get(), kept.$get()) {
                if wanted != now {
                    let _ = kept.$set(wanted);
                }
            }
        };
    }
    carry!(keepalive, set_keepalive);
    carry!(tcp_nodelay, set_tcp_nodelay);
    // The kernel doubles what it is told, and says the double (socket(7)).
    if let (Ok(wanted), Ok(now)) = (own.recv_buffer_size(), kept.recv_buffer_size()) {
        if wanted != now {
            let _ = kept.set_recv_buffer_size(wanted / 2);
        }
    }
    if let (Ok(wanted), Ok(now)) = (own.send_buffer_size(), kept.send_buffer_size()) {
        if wanted != now {
            let _ = kept.set_send_buffer_size(wanted / 2);
        }
    }
    // These are what the address means, and were decided on when the socket was bound.
    let is_any = matches!(address, Address::Ip(ip) if ip.ip().is_unspecified());
    if is_any && matches!((own.only_v6(), kept.only_v6()), (Ok(wanted), Ok(now)) if wanted != now) {
        different.push("IPV6_V6ONLY");
    }
    if matches!((own.reuse_port(), kept.reuse_port()), (Ok(wanted), Ok(now)) if wanted != now) {
        different.push("SO_REUSEPORT");
    }
    different
}

#[cfg(test)]
mod tests {
    use super::*;
    use socket2::{Domain, SockAddr, Socket, Type};

    fn bound() -> (OwnedFd, Address) {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        socket.bind(&SockAddr::from(std::net::SocketAddr::from(([127, 0, 0, 1], 0)))).unwrap();
        let address = Address::of(socket.as_fd()).unwrap();
        (socket.into(), address)
    }

    /// Workers that are started together, and whose calls come one right after the other.
    #[test]
    fn what_a_program_is_about_to_listen_on_is_shared_and_what_it_has_only_bound_is_waited_for() {
        let nobody_has_it = |_| false;
        let (fd, address) = bound();
        let mut kept = Kept::default();
        kept.expect_to_listen(fd, address.clone(), true).unwrap();
        assert!(matches!(kept.find_any_port(Kind::Tcp, &address, nobody_has_it), Found::Socket(_)));
        let (fd, address) = bound();
        let client = Socket::from(fd.try_clone().unwrap());
        kept.expect(fd, address.clone()).unwrap();
        assert!(matches!(kept.find(Kind::Tcp, &address, nobody_has_it), Found::NotYet));
        client.listen(1).unwrap();
        assert!(matches!(kept.find(Kind::Tcp, &address, nobody_has_it), Found::Socket(_)));
    }
}
