//! The listeners that the supervisor holds for its program, and how the program is told of them.

use std::collections::HashSet;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use serde::{Deserialize, Serialize};
use socket2::SockRef;

use super::kept::{Kept, KeptSocket, SavedKept, inode_of};
use super::listen::Listen;
use super::seen::Watched;
use crate::control::ListenerStatus;
use crate::engine::listener_status;
use crate::error::Error;
use crate::gate::Gate;
use crate::inherit::socket_activation;
use crate::listeners::{
    Address, Entry, Inherited, Listeners, Source, TcpOptions, Unclaimed, UnixOptions, Wanted, WantedOptions,
    identity_of, kind_of, unlink_if_ours,
};
use crate::protocol::{Kind, OfferedListener, PathIdentity};
use crate::sys;
use crate::systemd::{self, Notifier, STORE_TIMEOUT};

/// Where a program finds the first of them: `SD_LISTEN_FDS_START`.
pub(super) const FIRST_FD: i32 = 3;

pub(super) struct Sockets {
    /// In the order in which they were named, which is that of their numbers in the program. Several may have one name.
    listeners: Listeners,
    /// Always open: it is the program that accepts.
    gate: Gate,
    /// What the program has bound by itself.
    pub(super) kept: Kept,
    /// Of those that were closed.
    paths: Vec<(PathBuf, PathIdentity)>,
    /// Where they were: the connections that they have led to are still to be counted.
    closed: Vec<Address>,
    /// Cookies of those that block, as the generation that serves has them, until an upgrade is over. A new build has the same
    /// sockets, and its mode is theirs.
    blocking: HashSet<u64>,
}

impl Sockets {
    /// Takes from a service manager what it has passed, and binds the rest.
    pub(super) fn open(wanted: &[Listen], non_blocking: bool, intercept: bool) -> Result<Self, Error> {
        let gate = Gate::new(|| {}).map_err(|error| Error::io("prepare to listen", error))?;
        gate.open();
        let mut listeners = Listeners::new(socket_activation::from_environment(), true);
        for (number, one) in (1..).zip(wanted) {
            let name = one.name.clone().unwrap_or_else(|| format!("socket-{number}"));
            let options = match one.kind {
                Kind::Tcp => WantedOptions::Tcp(TcpOptions::default()),
                Kind::Udp => WantedOptions::Udp,
                Kind::Unix | Kind::UnixDatagram => WantedOptions::Unix(UnixOptions::default()),
            };
            let wanted = Wanted { name: &name, kind: one.kind, address: one.address.clone(), options };
            listeners.claim(&wanted, &gate)?;
        }
        listeners.pass_on_activated(&gate);
        let mut kept = Kept::default();
        let mut forgotten = vec![];
        if intercept {
            // The program may bind it by itself.
            let taken = kept.take_stored(listeners.take_unclaimed());
            forgotten = taken.map_err(|error| Error::io("go on with the sockets of the fd store", error))?;
        }
        listeners.settle_unclaimed(Unclaimed::Close, &gate);
        forgotten.extend_from_slice(listeners.closed_names());
        systemd::forget_stored(&forgotten.iter().map(String::as_str).collect::<Vec<_>>());
        let sockets = Self { listeners, gate, kept, paths: vec![], closed: vec![], blocking: HashSet::new() };
        for entry in sockets.entries() {
            let set = entry.socket.fd().map_or(Ok(()), |fd| SockRef::from(&fd).set_nonblocking(non_blocking));
            set.map_err(|error| Error::io(format!("prepare listener `{}`", entry.name), error))?;
        }
        Ok(sockets)
    }

    /// In the order of their numbers.
    pub(super) fn saved(&self) -> Vec<SavedSocket> {
        let saved = |entry: &Entry| {
            let fd = entry.socket.fd()?.as_raw_fd();
            Some(SavedSocket { offered: entry.offered(), source: entry.source, fd })
        };
        self.entries().filter_map(saved).collect()
    }

    /// What was saved, as it is: nothing is bound, and the mode of a socket is the program's affair.
    pub(super) fn resume(saved: Vec<SavedSocket>, kept: Vec<SavedKept>, closed: Vec<Address>) -> io::Result<Self> {
        let gate = Gate::new(|| {})?;
        gate.open();
        let inherited = saved.into_iter().map(SavedSocket::take).collect::<io::Result<_>>()?;
        let listeners = Listeners::resumed(inherited, &gate);
        let kept = Kept::resume(kept)?;
        Ok(Self { listeners, gate, kept, paths: vec![], closed, blocking: HashSet::new() })
    }

    pub(super) fn closed(&self) -> &[Address] {
        &self.closed
    }

    pub(super) fn is_empty(&self) -> bool {
        self.entries().len() == 0
    }

    fn entries(&self) -> impl ExactSizeIterator<Item = &Entry> {
        self.listeners.entries()
    }

    /// In the order of their numbers; none once they are closed.
    pub(super) fn fds(&self) -> Vec<Arc<OwnedFd>> {
        self.entries().filter_map(|entry| entry.socket.fd()).collect()
    }

    pub(super) fn has(&self, inode: u64) -> bool {
        self.kept.has(inode) || self.fds().iter().any(|fd| inode_of(fd.as_fd()).is_ok_and(|one| one == inode))
    }

    /// The same, once it was looked what has become of those that were being bound.
    pub(super) fn settled(&mut self) -> Vec<Watched> {
        self.kept.settle();
        self.watched()
    }

    /// What a program is to be seen to wait on.
    pub(super) fn watched(&self) -> Vec<Watched> {
        let watched = |entry: &Entry| {
            let inode = inode_of(entry.socket.fd()?.as_fd()).ok()?;
            Some(Watched { name: entry.name.clone(), inode, address: entry.address.clone(), is_awaited: true })
        };
        self.entries().filter_map(watched).chain(self.kept.watched()).collect()
    }

    pub(super) fn addresses(&self) -> Vec<Address> {
        let named = self.entries().map(|entry| entry.address.clone());
        named.chain(self.kept.addresses()).chain(self.closed.iter().cloned()).collect()
    }

    pub(super) fn status(&self) -> Vec<ListenerStatus> {
        self.listeners.entries().map(listener_status).chain(self.kept.status()).collect()
    }

    /// One that was named, for a program that binds its address instead of taking what it is given.
    pub(super) fn named_at(&self, kind: Kind, address: &Address) -> Option<Arc<OwnedFd>> {
        self.entries().find(|entry| entry.kind == kind && entry.address == *address)?.socket.fd()
    }

    pub(super) fn has_path(&self) -> bool {
        self.kept.has_path() || self.entries().any(|entry| entry.path.is_some())
    }

    /// Whether clients find one of them by that path.
    pub(super) fn is_at(&self, path: &Path) -> bool {
        let here = identity_of(path).ok();
        self.kept.is_at(path) || (here.is_some() && self.entries().any(|entry| entry.path == here))
    }

    /// Closes those that the program has bound by itself and that fail the test, and says where they were.
    pub(super) fn close_kept(&mut self, is_wanted: impl Fn(u64) -> bool, notifier: Option<&Notifier>) -> Vec<String> {
        let closed = self.kept.retain(is_wanted);
        let deadline = Instant::now() + STORE_TIMEOUT;
        for socket in &closed {
            let address = Address::of(socket.fd()).ok().filter(|address| !self.closed.contains(address));
            self.closed.extend(address);
            if let Some((path, identity)) = socket.path() {
                unlink_if_ours(&path, identity);
            }
            if let Some(notifier) = notifier {
                notifier.remove_from_store(socket.name(), deadline);
            }
        }
        closed.iter().map(|socket| socket.address().to_string()).collect()
    }

    fn with_modes(&self, mut look: impl FnMut(u64, &SockRef<'_>)) {
        for (entry, fd) in self.entries().filter_map(|entry| Some((entry, entry.socket.fd()?))) {
            look(entry.cookie, &SockRef::from(&fd));
        }
        self.kept.all().for_each(|(cookie, fd)| look(cookie, &SockRef::from(&fd)));
    }

    /// An upgrade begins. What one before has left behind may still be set otherwise.
    pub(super) fn remember_modes(&mut self) {
        let mut blocking = std::mem::take(&mut self.blocking);
        self.with_modes(|cookie, socket| {
            if !socket.nonblocking().unwrap_or(true) {
                blocking.insert(cookie);
            }
        });
        self.blocking = blocking;
    }

    /// The new build serves: they are as that wants them.
    pub(super) fn forget_modes(&mut self) {
        self.blocking.clear();
    }

    pub(super) fn has_modes(&self) -> bool {
        !self.blocking.is_empty()
    }

    /// The build that they were changed by is gone.
    pub(super) fn restore_modes(&mut self) {
        let blocking = std::mem::take(&mut self.blocking);
        self.with_modes(|cookie, socket| {
            if blocking.contains(&cookie) && socket.nonblocking().unwrap_or(false) {
                let _ = socket.set_nonblocking(false);
            }
        });
    }

    /// What tells a program of them: systemd's variables, and those of other supervisors.
    pub(super) fn environment(&self, generation: u64) -> Vec<(String, String)> {
        let names: Vec<&str> = self.entries().map(|entry| entry.name.as_str()).collect();
        let count = names.len();
        if count == 0 {
            return vec![];
        }
        let mut variables = vec![
            ("LISTEN_FDS".to_owned(), count.to_string()),
            ("LISTEN_FDNAMES".to_owned(), names.join(":")),
            ("EINHORN_FD_COUNT".to_owned(), count.to_string()),
            ("SERVER_STARTER_GENERATION".to_owned(), generation.to_string()),
        ];
        let mut ports = Vec::new();
        for (index, entry) in self.entries().enumerate() {
            let fd = FIRST_FD as usize + index;
            variables.push((format!("EINHORN_FD_{index}"), fd.to_string()));
            variables.push((format!("EINHORN_FD_FAMILY_{index}"), family(&entry.address).to_owned()));
            if matches!(entry.kind, Kind::Tcp | Kind::Unix) {
                ports.push(format!("{}={fd}", entry.address));
            }
        }
        variables.push(("SERVER_STARTER_PORT".to_owned(), ports.join(";")));
        variables
    }

    pub(super) fn keep_in_store(&self, notifier: &Notifier) {
        let deadline = Instant::now() + STORE_TIMEOUT;
        for entry in self.entries().filter(|entry| !entry.activated) {
            if let Some(fd) = entry.socket.fd() {
                notifier.store(&entry.name, fd.as_fd(), deadline);
            }
        }
        for (name, fd) in self.kept.fds() {
            notifier.store(name, fd, deadline);
        }
    }

    /// From now on they are the program's alone: when it has closed them, clients are refused instead of left waiting.
    pub(super) fn close(&mut self) {
        self.listeners.unlink_paths(true);
        self.gate.close();
        self.closed.extend(self.kept.addresses());
        self.paths = self.kept.retain(|_| false).iter().filter_map(KeptSocket::path).collect();
    }

    /// Nobody is left who has connections that began there.
    pub(super) fn forget_closed(&mut self) {
        self.closed.clear();
    }

    /// They are another's: their paths stay.
    pub(super) fn forget_kept(&mut self) {
        drop(self.kept.retain(|_| false));
        self.paths.clear();
    }

    pub(super) fn remove_paths(&mut self) {
        self.listeners.unlink_paths(true);
        for (path, identity) in &self.paths {
            unlink_if_ours(path, *identity);
        }
    }
}

/// A listener as the next build of this process finds it.
#[derive(Serialize, Deserialize)]
pub(super) struct SavedSocket {
    offered: OfferedListener,
    source: Source,
    fd: RawFd,
}

impl SavedSocket {
    fn take(self) -> io::Result<Inherited> {
        let Self { offered, source, fd: number } = self;
        let other = |what: &str| io::Error::other(format!("`{}` {what}", offered.name));
        let fd = sys::fd_from_environment(number).ok_or_else(|| other("is not open"))?;
        if kind_of(fd.as_fd())? != Some(offered.kind) || SockRef::from(&fd).cookie()? != offered.cookie {
            return Err(other("is another socket"));
        }
        Ok(Inherited {
            address: Address::of(fd.as_fd())?,
            name: offered.name,
            kind: offered.kind,
            cookie: offered.cookie,
            path: offered.path,
            backlog: offered.backlog,
            source,
            activated: offered.activated,
            fd,
        })
    }
}

fn family(address: &Address) -> &'static str {
    match address {
        Address::Ip(ip) if ip.is_ipv4() => "AF_INET",
        Address::Ip(_) => "AF_INET6",
        Address::Path(_) | Address::Abstract(_) => "AF_UNIX",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_is_told_in_each_of_the_ways() {
        let wanted: Vec<Listen> =
            ["web=127.0.0.1:0", "udp:127.0.0.1:0", "@handover-test-sockets"].map(|text| text.parse().unwrap()).into();
        let mut sockets = Sockets::open(&wanted, false, false).unwrap();
        let addresses: Vec<String> = sockets.addresses().iter().map(ToString::to_string).collect();
        let variables = sockets.environment(7);
        let value = |name: &str| variables.iter().find(|(other, _)| other == name).unwrap().1.clone();
        assert_eq!(value("LISTEN_FDS"), "3");
        assert_eq!(value("LISTEN_FDNAMES"), "web:socket-2:socket-3");
        assert_eq!(value("SERVER_STARTER_PORT"), format!("{}=3;@handover-test-sockets=5", addresses[0]));
        assert_eq!(value("SERVER_STARTER_GENERATION"), "7");
        assert_eq!((value("EINHORN_FD_COUNT"), value("EINHORN_FD_1")), ("3".to_owned(), "4".to_owned()));
        assert_eq!(value("EINHORN_FD_FAMILY_2"), "AF_UNIX");
        assert_eq!((sockets.fds().len(), sockets.watched().len()), (3, 3));
        sockets.close();
        assert!(sockets.fds().is_empty());
    }
}
