//! The named set of listeners: what was handed over, what is claimed, what was bound afresh.

mod bind;
mod options;

use std::collections::HashMap;
use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::Serialize;
use socket2::SockRef;

#[cfg(feature = "cli")]
pub(crate) use bind::{identity_of, unlink_if_ours};
pub use options::{TcpOptions, UnixOptions};

use crate::error::{Error, ErrorKind};
use crate::gate::{Gate, GatedSocket};
use crate::protocol::{Claims, Kind, OfferedAddress, OfferedListener, PathIdentity, name_is_valid};
use crate::systemd;

/// systemd closes what it takes out of its store on a thread of its own, and says nothing when that is done.
const FORGET_TIMEOUT: Duration = Duration::from_secs(2);
const FORGET_INTERVAL: Duration = Duration::from_millis(5);

/// Where a socket is bound.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "cli", derive(Serialize, serde::Deserialize))]
pub(crate) enum Address {
    Ip(SocketAddr),
    Path(#[cfg_attr(feature = "cli", serde(with = "crate::saved::path"))] PathBuf),
    Abstract(Vec<u8>),
}

impl Address {
    /// A Unix address as people write it: a path, or `@name` for the abstract namespace.
    pub(crate) fn unix(text: &Path) -> Self {
        match text.as_os_str().as_bytes().strip_prefix(b"@") {
            Some(name) => Self::Abstract(name.to_vec()),
            None => Self::Path(text.to_path_buf()),
        }
    }

    pub(crate) fn of(socket: BorrowedFd<'_>) -> io::Result<Self> {
        let address = SockRef::from(&socket).local_addr()?;
        if let Some(ip) = address.as_socket() {
            return Ok(Self::Ip(ip));
        }
        if let Some(name) = address.as_abstract_namespace() {
            return Ok(Self::Abstract(name.to_vec()));
        }
        match address.as_pathname() {
            Some(path) => Ok(Self::Path(path.to_path_buf())),
            None => Err(io::Error::new(io::ErrorKind::InvalidInput, "the socket is not bound")),
        }
    }

    /// Whether a socket at `self` is what somebody who asks for `wanted` means; port 0 means any port.
    fn satisfies(&self, wanted: &Self) -> bool {
        match (self, wanted) {
            (Self::Ip(have), Self::Ip(want)) => {
                have.ip() == want.ip() && (want.port() == 0 || want.port() == have.port())
            }
            _ => self == wanted,
        }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ip(address) => address.fmt(f),
            Self::Path(path) => path.display().fmt(f),
            Self::Abstract(name) => write!(f, "@{}", String::from_utf8_lossy(name)),
        }
    }
}

/// What sort of socket `fd` is; `None` for what can be no listener.
pub(crate) fn kind_of(fd: BorrowedFd<'_>) -> io::Result<Option<Kind>> {
    let socket = SockRef::from(&fd);
    // Nothing but TCP has TCP's options: one call instead of two, where there are thousands.
    if socket.tcp_nodelay().is_ok() {
        return Ok(Some(Kind::Tcp));
    }
    let (domain, kind) = (socket.domain()?, socket.r#type()?);
    let ip = domain == socket2::Domain::IPV4 || domain == socket2::Domain::IPV6;
    Ok(match (ip, kind) {
        (true, socket2::Type::STREAM) => Some(Kind::Tcp),
        (true, socket2::Type::DGRAM) => Some(Kind::Udp),
        (false, socket2::Type::STREAM) if domain == socket2::Domain::UNIX => Some(Kind::Unix),
        (false, socket2::Type::DGRAM) if domain == socket2::Domain::UNIX => Some(Kind::UnixDatagram),
        _ => None,
    })
}

/// How a listener came to this process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[cfg_attr(feature = "cli", derive(serde::Deserialize))]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Source {
    /// From the old process.
    HandedOver,
    /// From a service manager, by LISTEN_FDS.
    Activated,
    /// Bound by this process.
    Bound,
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::HandedOver => "handed-over",
            Self::Activated => "activated",
            Self::Bound => "bound",
        })
    }
}

/// A socket that came with this process, before anybody has asked for it.
pub(crate) struct Inherited {
    pub(crate) name: String,
    pub(crate) kind: Kind,
    pub(crate) address: Address,
    pub(crate) cookie: u64,
    pub(crate) path: Option<PathIdentity>,
    pub(crate) backlog: Option<u32>,
    pub(crate) source: Source,
    /// A service manager chose its address, now or generations ago: it is taken by name alone.
    pub(crate) activated: bool,
    pub(crate) fd: OwnedFd,
}

impl Inherited {
    /// From an fd that a service manager passed.
    pub(crate) fn activated(name: String, fd: OwnedFd) -> io::Result<Option<Self>> {
        let Some(kind) = kind_of(fd.as_fd())? else { return Ok(None) };
        let (address, cookie) = (Address::of(fd.as_fd())?, SockRef::from(&fd).cookie()?);
        let source = Source::Activated;
        Ok(Some(Self { name, kind, address, cookie, path: None, backlog: None, source, activated: true, fd }))
    }

    fn fits(&self, wanted: &Wanted<'_>) -> bool {
        self.kind == wanted.kind && self.address.satisfies(&wanted.address)
    }

    /// From an fd that an earlier run of this service has put into the service manager's store: this service chose its
    /// address, and made its path.
    pub(crate) fn stored(name: String, fd: OwnedFd) -> io::Result<Option<Self>> {
        let Some(inherited) = Self::activated(name, fd)? else { return Ok(None) };
        let path = match &inherited.address {
            Address::Path(path) => bind::identity_of(path).ok(),
            _ => None,
        };
        Ok(Some(Self { path, activated: false, ..inherited }))
    }

    /// It came from the service manager's store.
    fn is_stored(&self) -> bool {
        self.source == Source::Activated && !self.activated
    }

    /// Whether this service has made a path for it that leads to no socket any more: a stop removes it, and what is stored
    /// stays.
    pub(crate) fn has_lost_its_path(&self) -> bool {
        match &self.address {
            Address::Path(path) if self.is_stored() => match std::fs::symlink_metadata(path) {
                Ok(there) => !there.file_type().is_socket(),
                Err(error) => matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory),
            },
            _ => false,
        }
    }
}

/// What to do with listeners that were handed over and that the new build does not ask for before it is ready.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Unclaimed {
    /// Close them when the trial is over. Connections that wait in their queues are reset when the old process is gone.
    #[default]
    Close,
    /// Hold them, so that clients wait, and hand them on to the next generation.
    Keep,
    /// Fail the upgrade: `ready` returns an error.
    Fail,
}

/// A listener of this process.
pub(crate) struct Entry {
    pub(crate) name: String,
    pub(crate) kind: Kind,
    pub(crate) address: Address,
    pub(crate) cookie: u64,
    pub(crate) path: Option<PathIdentity>,
    pub(crate) backlog: Option<u32>,
    pub(crate) source: Source,
    pub(crate) activated: bool,
    pub(crate) socket: Arc<GatedSocket>,
    /// What is to be applied to the kept socket when the trial is over.
    pending: Pending,
}

/// Options of a listener that was handed over, where the new build asks for others.
#[derive(Default)]
struct Pending {
    backlog: Option<u32>,
    nodelay: Option<bool>,
    unix: Option<UnixOptions>,
}

impl Entry {
    pub(crate) fn offered(&self) -> OfferedListener {
        OfferedListener {
            name: self.name.clone(),
            kind: self.kind,
            address: match &self.address {
                Address::Ip(address) => OfferedAddress::Ip(*address),
                other => OfferedAddress::Text(other.to_string()),
            },
            cookie: self.cookie,
            path: self.path,
            backlog: self.backlog,
            activated: self.activated,
        }
    }
}

/// What a program asks for.
pub(crate) struct Wanted<'a> {
    pub(crate) name: &'a str,
    pub(crate) kind: Kind,
    pub(crate) address: Address,
    pub(crate) options: WantedOptions,
}

pub(crate) enum WantedOptions {
    Tcp(TcpOptions),
    Unix(UnixOptions),
    Udp,
}

impl Wanted<'_> {
    fn backlog(&self) -> Option<u32> {
        match (self.kind, &self.options) {
            (_, WantedOptions::Tcp(options)) => Some(options.backlog),
            (Kind::Unix, WantedOptions::Unix(options)) => Some(options.backlog),
            _ => None,
        }
    }

    fn describe(&self) -> String {
        format!("bind listener `{}` to {}", self.name, self.address)
    }
}

/// All listeners of a process. [`claim`](Self::claim) is the only way in.
pub(crate) struct Listeners {
    /// In the order in which they came; none where one is claimed.
    inherited: Vec<Option<Inherited>>,
    /// In the order in which they were asked for.
    entries: Vec<Entry>,
    names: HashMap<String, Name>,
    /// No other process serves what was inherited: the run that it comes from has ended.
    alone: bool,
    /// Unclaimed and closed, or claimed under another name.
    closed_names: Vec<String>,
}

#[derive(Default)]
struct Name {
    is_taken: bool,
    /// The place of the first socket that came with this name.
    inherited: Option<usize>,
    /// There are more: a service manager may give one name to several sockets.
    is_shared: bool,
}

impl Listeners {
    pub(crate) fn new(inherited: Vec<Inherited>, alone: bool) -> Self {
        let mut names: HashMap<String, Name> = HashMap::with_capacity(inherited.len());
        for (place, one) in inherited.iter().enumerate() {
            match names.get_mut(&one.name) {
                Some(name) => name.is_shared = true,
                None => drop(names.insert(one.name.clone(), Name { inherited: Some(place), ..Name::default() })),
            }
        }
        let entries = Vec::with_capacity(inherited.len());
        Self { inherited: inherited.into_iter().map(Some).collect(), entries, names, alone, closed_names: vec![] }
    }

    /// All of them, as they were in this process before it was replaced.
    #[cfg(feature = "cli")]
    pub(crate) fn resumed(inherited: Vec<Inherited>, gate: &Gate) -> Self {
        let mut listeners = Self::new(vec![], true);
        for one in inherited {
            listeners.enter(entry_of(one, gate));
        }
        listeners
    }

    /// In the order in which the application asked for them.
    pub(crate) fn entries(&self) -> impl ExactSizeIterator<Item = &Entry> {
        self.entries.iter()
    }

    fn unclaimed(&self) -> impl Iterator<Item = &Inherited> {
        self.inherited.iter().flatten()
    }

    /// What came with this name and is not claimed, and in which places.
    fn of_name(&self, name: &str) -> impl Iterator<Item = (usize, &Inherited)> {
        let places = match self.names.get(name) {
            Some(Name { inherited: Some(first), is_shared: false, .. }) => *first..*first + 1,
            Some(Name { inherited: Some(first), .. }) => *first..self.inherited.len(),
            _ => 0..0,
        };
        // Out of bounds once they are settled.
        let ones = self.inherited.get(places.clone()).unwrap_or_default();
        places
            .zip(ones)
            .filter_map(|(place, one)| Some((place, one.as_ref()?)))
            .filter(move |(_, one)| one.name == name)
    }

    /// Of several addresses of one name, in the order in which they are tried. An older generation may have found the first one
    /// in use, and a resolver may have changed its mind since: where the service listens it stays.
    pub(crate) fn put_inherited_first(&self, wanted: &mut [Wanted<'_>]) {
        wanted.sort_by_key(|wanted| {
            let mut activated = self.inherited.iter().flatten().filter(|one| one.activated);
            !self.of_name(wanted.name).any(|(_, one)| one.fits(wanted)) && !activated.any(|one| one.fits(wanted))
        });
    }

    /// Takes a listener over by name, or binds it afresh.
    pub(crate) fn claim(&mut self, wanted: &Wanted<'_>, gate: &Gate) -> Result<&Entry, Error> {
        if !name_is_valid(wanted.name) {
            let cause = "names have 1 to 255 bytes, no colon and no control characters";
            return Err(Error::new(ErrorKind::Invalid, format!("name a listener {:?}", wanted.name), cause));
        }
        if self.is_taken(wanted.name) {
            let cause = "this process has a listener of that name already";
            let error = Error::new(ErrorKind::Invalid, wanted.describe(), cause);
            return Err(error.mend("give each listener its own name"));
        }
        let entry = match self.take_inherited(wanted) {
            Some(inherited) => {
                if inherited.is_stored() && inherited.name != wanted.name {
                    self.closed_names.push(inherited.name.clone());
                }
                keep(inherited, wanted, gate)
            }
            None => self.bind(wanted, gate)?,
        };
        Ok(self.enter(entry))
    }

    fn is_taken(&self, name: &str) -> bool {
        self.names.get(name).is_some_and(|name| name.is_taken)
    }

    fn enter(&mut self, entry: Entry) -> &Entry {
        match self.names.get_mut(&entry.name) {
            Some(name) => name.is_taken = true,
            None => drop(self.names.insert(entry.name.clone(), Name { is_taken: true, ..Name::default() })),
        }
        self.entries.push(entry);
        &self.entries[self.entries.len() - 1]
    }

    /// By name and address first. What a service manager passed may have no names, or one name for several sockets:
    /// there the name is enough, or the address is. What an earlier run has stored may have had another name.
    fn take_inherited(&mut self, wanted: &Wanted<'_>) -> Option<Inherited> {
        let fits = |one: &Inherited| one.fits(wanted);
        let named_by_manager = |one: &Inherited| one.kind == wanted.kind && one.activated;
        let found_by_manager = |one: &Inherited| one.activated && fits(one);
        // Nothing else can be bound there.
        let stored_there =
            |one: &Inherited| one.is_stored() && one.kind == wanted.kind && one.address == wanted.address;
        let by_name = |suits: &dyn Fn(&Inherited) -> bool| {
            let (place, _) = self.of_name(wanted.name).find(|(_, one)| suits(one))?;
            Some(place)
        };
        let place = by_name(&fits)
            .or_else(|| by_name(&named_by_manager))
            .or_else(|| self.position(found_by_manager))
            .or_else(|| self.position(stored_there))?;
        self.inherited.get_mut(place)?.take()
    }

    fn position(&self, suits: impl Fn(&Inherited) -> bool) -> Option<usize> {
        self.inherited.iter().position(|one| one.as_ref().is_some_and(&suits))
    }

    fn bind(&mut self, wanted: &Wanted<'_>, gate: &Gate) -> Result<Entry, Error> {
        let in_use = |error: &Error| error.cause_is(io::ErrorKind::AddrInUse);
        let bound = match bind::bind(wanted) {
            Err(error) if in_use(&error) => match self.moved(wanted.name) {
                None => Err(error),
                Some(_) if self.alone => self.bind_in_place_of_moved(wanted),
                Some((_, moved)) => Err(error.mend(format!(
                    "it was handed over with the address {}, and nothing that overlaps it can be bound while the old \
                     process holds it: choose another name and port, or `handover restart`",
                    moved.address
                ))),
            },
            bound => bound,
        }?;
        let socket = gate.guard(Arc::new(bound.fd));
        Ok(Entry {
            name: wanted.name.to_owned(),
            kind: wanted.kind,
            address: bound.address,
            cookie: bound.cookie,
            path: bound.path,
            backlog: wanted.backlog(),
            source: Source::Bound,
            activated: false,
            socket,
            pending: Pending::default(),
        })
    }

    /// What was inherited under a name that has another address now.
    fn moved(&self, name: &str) -> Option<(usize, &Inherited)> {
        self.of_name(name).find(|(_, one)| !one.activated)
    }

    /// Closes the old socket first: nobody serves on it any more. The service manager may hold it too.
    fn bind_in_place_of_moved(&mut self, wanted: &Wanted<'_>) -> Result<bind::Bound, Error> {
        while let Some((place, _)) = self.moved(wanted.name) {
            self.inherited[place] = None;
        }
        log::info!("listener `{}` moves to {}: the old one is closed", wanted.name, wanted.address);
        let wait = if systemd::forget_stored(&[wanted.name]) { FORGET_TIMEOUT } else { Duration::ZERO };
        let deadline = Instant::now() + wait;
        loop {
            match bind::bind(wanted) {
                Err(error) if error.cause_is(io::ErrorKind::AddrInUse) && Instant::now() < deadline => {
                    std::thread::sleep(FORGET_INTERVAL);
                }
                bound => return bound,
            }
        }
    }

    /// What became of the listeners so far.
    pub(crate) fn claims(&self) -> Claims {
        let (added, kept): (Vec<&Entry>, Vec<&Entry>) = self.entries().partition(|entry| entry.source == Source::Bound);
        let names = |entries: Vec<&Entry>| entries.into_iter().map(|entry| entry.name.clone()).collect();
        Claims {
            kept: names(kept),
            added: names(added),
            unclaimed: self.unclaimed().map(|one| one.name.clone()).collect(),
        }
    }

    /// Applies what the new build wants different on the sockets it has kept. For the end of the trial: before it they may
    /// be the old process's again.
    pub(crate) fn apply_pending(&mut self) {
        for entry in &mut self.entries {
            let pending = std::mem::take(&mut entry.pending);
            let Some(fd) = entry.socket.fd() else { continue };
            if let Some(backlog) = pending.backlog {
                match bind::listen(fd.as_fd(), backlog) {
                    Ok(()) => entry.backlog = Some(backlog),
                    Err(error) => log::warn!("listener `{}` keeps its old backlog: {error}", entry.name),
                }
            }
            if let Some(Err(error)) = pending.nodelay.map(|on| SockRef::from(&fd).set_tcp_nodelay(on)) {
                log::warn!("listener `{}` keeps its old TCP_NODELAY: {error}", entry.name);
            }
            if let (Some(options), Address::Path(path), Some(identity)) = (pending.unix, &entry.address, entry.path) {
                if !bind::identity_of(path).is_ok_and(|now| now == identity) {
                    log::warn!("listener `{}` keeps its old mode and owner: its path is another's by now", entry.name);
                } else if let Err(error) = bind::set_mode_and_owner(path, &options) {
                    log::warn!("listener `{}` keeps its old mode and owner: {error}", entry.name);
                }
            }
        }
    }

    /// For a supervisor, whose program is given all that a service manager passes of its own: systemd has one name for all
    /// sockets of a unit.
    #[cfg(feature = "cli")]
    pub(crate) fn pass_on_activated(&mut self, gate: &Gate) {
        let is_passed = |place: &mut Option<Inherited>| place.take_if(|one| one.activated);
        let passed: Vec<Inherited> = self.inherited.iter_mut().filter_map(is_passed).collect();
        for one in passed {
            self.enter(entry_of(one, gate));
        }
    }

    /// What nobody has claimed, for another to deal with.
    #[cfg(feature = "cli")]
    pub(crate) fn take_unclaimed(&mut self) -> Vec<Inherited> {
        std::mem::take(&mut self.inherited).into_iter().flatten().collect()
    }

    /// Deals with what nobody has claimed; for the end of the trial, as above.
    pub(crate) fn settle_unclaimed(&mut self, policy: Unclaimed, gate: &Gate) {
        for inherited in std::mem::take(&mut self.inherited).into_iter().flatten() {
            if policy == Unclaimed::Keep && !self.is_taken(&inherited.name) {
                log::info!("listener `{}` at {} is kept unserved", inherited.name, inherited.address);
                self.enter(entry_of(inherited, gate));
            } else {
                log::warn!("listener `{}` at {} is not wanted any more: closed", inherited.name, inherited.address);
                if let (Address::Path(path), Some(identity)) = (&inherited.address, inherited.path) {
                    bind::unlink_if_ours(path, identity);
                }
                self.closed_names.push(inherited.name);
            }
        }
    }

    /// Names of sockets that an earlier generation had and that are closed, or have another name now. A listener that was
    /// bound anew at another address has such a name, too.
    pub(crate) fn closed_names(&self) -> &[String] {
        &self.closed_names
    }

    /// Lets go of what is left when an upgrade is refused to this process.
    pub(crate) fn forget_inherited(&mut self) {
        self.inherited.clear();
    }

    /// Removes the paths of Unix listeners, where they are still the ones that a generation of this service made. A
    /// process that never owned what was handed over to it removes only what it bound itself.
    ///
    /// To be called while the sockets are open: once they are closed another service's path may have their inode number.
    pub(crate) fn unlink_paths(&mut self, owner: bool) {
        for entry in self.entries.iter_mut().filter(|entry| owner || entry.source == Source::Bound) {
            if let (Address::Path(path), Some(identity)) = (&entry.address, entry.path.take()) {
                bind::unlink_if_ours(path, identity);
            }
        }
    }

    /// Listeners on which the application waits for connections.
    pub(crate) fn waited_on(&self) -> Vec<String> {
        let waited = self.entries().filter(|entry| entry.socket.was_waited_on());
        waited.map(|entry| entry.name.clone()).collect()
    }
}

fn entry_of(inherited: Inherited, gate: &Gate) -> Entry {
    Entry {
        name: inherited.name,
        kind: inherited.kind,
        address: inherited.address,
        cookie: inherited.cookie,
        path: inherited.path,
        backlog: inherited.backlog,
        source: inherited.source,
        activated: inherited.activated,
        socket: gate.guard(Arc::new(inherited.fd)),
        pending: Pending::default(),
    }
}

fn keep(inherited: Inherited, wanted: &Wanted<'_>, gate: &Gate) -> Entry {
    let mut entry = entry_of(inherited, gate);
    wanted.name.clone_into(&mut entry.name);
    if !entry.address.satisfies(&wanted.address) {
        log::info!("listener `{}` is at {}, as the service manager says", entry.name, entry.address);
    }
    // A service manager sets backlog, TCP_NODELAY, mode and owner itself.
    if !entry.activated {
        entry.pending.backlog = wanted.backlog().filter(|backlog| entry.backlog.is_some_and(|old| old != *backlog));
        if let (WantedOptions::Unix(options), Some(_)) = (&wanted.options, entry.path) {
            entry.pending.unix = Some(options.clone()).filter(UnixOptions::says_mode_or_owner);
        }
        if let (WantedOptions::Tcp(options), Some(fd)) = (&wanted.options, entry.socket.fd()) {
            let have = SockRef::from(&fd).tcp_nodelay();
            entry.pending.nodelay = Some(options.nodelay).filter(|want| have.is_ok_and(|have| have != *want));
        }
    }
    if let (WantedOptions::Tcp(options), Some(fd), Address::Ip(SocketAddr::V6(_))) =
        (&wanted.options, entry.socket.fd(), &entry.address)
    {
        let have = SockRef::from(&fd).only_v6();
        if options.only_v6.is_some_and(|want| have.is_ok_and(|have| have != want)) {
            log::warn!("listener `{}` keeps its old IPV6_V6ONLY: a bound socket cannot change it", entry.name);
        }
    }
    entry
}

#[cfg(test)]
mod tests;
