//! A running server, started by whomever, that a program under this supervisor is to replace: its sockets, and its end.

use std::collections::HashSet;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::time::Instant;

use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use nix::sys::signal::Signal;
use nix::unistd::Pid;
use socket2::SockRef;

use super::caller::Caller;
use super::family;
use super::listen::Listen;
use crate::error::{Error, ErrorKind};
use crate::listeners::{Address, identity_of, kind_of};
use crate::protocol::{Kind, PathIdentity};
use crate::sys;

/// The server, until it has ended.
#[derive(Debug)]
pub(super) struct TakenOver {
    pub(super) pid: Pid,
    process: OwnedFd,
    /// To stop.
    pub(super) is_told: bool,
    guards: Vec<Guard>,
}

/// A socket of it.
pub(super) struct Taken {
    pub(super) fd: OwnedFd,
    pub(super) address: Address,
}

impl TakenOver {
    /// The server with all that it listens on, or with those of its sockets that are `wanted`.
    pub(super) fn find(pid: i32, wanted: &[Listen]) -> Result<(Self, Vec<Taken>), Error> {
        let tried = format!("take over process {pid}");
        let pid = Pid::from_raw(pid);
        let process = sys::pidfd_open(pid).map_err(|error| Error::io(&tried, error))?;
        let mut inodes = HashSet::new();
        let mut found = Vec::new();
        for member in family::of(pid) {
            let listening = listening(member, &mut inodes).map_err(|error| {
                let denied = error.kind() == io::ErrorKind::PermissionDenied;
                let error = Error::io(&tried, error);
                if denied {
                    error.mend(
                        "its sockets may be taken by root, or by its own user if it is dumpable and Yama allows it \
                         (sysctl kernel.yama.ptrace_scope=0); see ptrace(2)",
                    )
                } else {
                    error
                }
            })?;
            found.extend(listening);
        }
        if let Some(missing) = wanted.iter().find(|one| !found.iter().any(|taken| is_it(taken, one))) {
            let have: Vec<String> = found.iter().map(|(_, taken)| taken.address.to_string()).collect();
            let cause = format!("it does not listen on {}; it does on {}", missing.address, have.join(", "));
            return Err(Error::new(ErrorKind::Failed, tried, cause));
        }
        found.retain(|taken| match wanted {
            [] => !may_be_of_a_client(pid, taken),
            _ => wanted.iter().any(|one| is_it(taken, one)),
        });
        if found.is_empty() {
            let error = Error::new(ErrorKind::Failed, tried, "neither it nor what it has started listens on anything");
            return Err(error.mend("`ss -lnp` shows which process listens where"));
        }
        let guards = vec![];
        let server = Self { pid, process, is_told: false, guards };
        Ok((server, found.into_iter().map(|(_, taken)| taken).collect()))
    }

    /// That something has become of it: its end, or what it removes.
    pub(super) fn fds(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        std::iter::once(self.process.as_fd()).chain(self.guards.iter().map(|guard| guard.watch.as_fd()))
    }

    pub(super) fn is_gone(&self) -> bool {
        crate::poll::wait(self.process.as_fd(), nix::poll::PollFlags::POLLIN, Some(Instant::now())).unwrap_or(false)
    }

    /// Tells it to stop. Most servers remove their paths then, which belong to the new one by now.
    pub(super) fn tell_to_stop(&mut self, signal: Signal, paths: Vec<(PathBuf, PathIdentity)>) {
        for (path, identity) in paths {
            match Guard::new(path.clone(), identity) {
                Ok(guard) => self.guards.push(guard),
                Err(error) => log::warn!("{} is lost if process {} removes it: {error}", path.display(), self.pid),
            }
        }
        self.is_told = true;
        // ESRCH: it has just ended.
        let _ = sys::pidfd_send_signal(self.process.as_fd(), signal);
    }

    /// Puts back what it has removed.
    pub(super) fn keep_paths(&mut self) {
        self.guards.iter_mut().for_each(Guard::look);
    }

    /// With everything that it has started.
    pub(super) fn kill(&self) {
        let descendants = family::of(self.pid).into_iter().filter(|pid| *pid != self.pid);
        let descendants: Vec<(Pid, OwnedFd)> =
            descendants.filter_map(|pid| Some((pid, sys::pidfd_open(pid).ok()?))).collect();
        // A number that is still one of them is not another program's, and neither is what was opened by it.
        let family = family::of(self.pid);
        let _ = sys::pidfd_send_signal(self.process.as_fd(), Signal::SIGKILL);
        for (_, process) in descendants.iter().filter(|(pid, _)| family.contains(pid)) {
            let _ = sys::pidfd_send_signal(process.as_fd(), Signal::SIGKILL);
        }
    }
}

fn is_it((kind, taken): &(Kind, Taken), wanted: &Listen) -> bool {
    *kind == wanted.kind && taken.address == wanted.address
}

/// What a process serves on, but for sockets that are known already.
fn listening(pid: Pid, known: &mut HashSet<u64>) -> io::Result<Vec<(Kind, Taken)>> {
    // One that has just ended.
    let Ok(caller) = Caller::of_thread(family::living_thread(pid)) else { return Ok(vec![]) };
    let mut found = Vec::new();
    for (number, link) in family::fds(pid)? {
        let Some(inode) = family::socket_inode(&link).filter(|inode| !known.contains(inode)) else { continue };
        let fd = match caller.fd(number) {
            // It has just closed it.
            Err(error) if error.raw_os_error() == Some(libc::EBADF) => continue,
            fd => fd?,
        };
        let Some(kind) = kind_of(fd.as_fd())? else { continue };
        let socket = SockRef::from(&fd);
        let Ok(address) = Address::of(fd.as_fd()) else { continue };
        let serves = match kind {
            Kind::Tcp | Kind::Unix => socket.is_listener()?,
            Kind::Udp | Kind::UnixDatagram => socket.peer_addr().is_err(),
        };
        if serves {
            known.insert(inode);
            let address = match address {
                Address::Path(path) => Address::Path(caller.path(None, &path)),
                other => other,
            };
            found.push((kind, Taken { fd, address }));
        }
    }
    Ok(found)
}

/// Nobody listens there again if it is, so it is taken only if it is named.
fn may_be_of_a_client(server: Pid, (kind, taken): &(Kind, Taken)) -> bool {
    let is_datagram = matches!(kind, Kind::Udp | Kind::UnixDatagram);
    let address = &taken.address;
    let may_be = is_datagram && was_bound_by_kernel(address);
    if may_be {
        log::info!(
            "what process {server} has at {address} may be a client's, and is left to it: name all of its addresses with --listen if it is not"
        );
    }
    may_be
}

/// As the socket of a client is when it sends for the first time: ip(7), unix(7).
fn was_bound_by_kernel(address: &Address) -> bool {
    match address {
        Address::Ip(ip) if !ip.ip().is_unspecified() => false,
        Address::Ip(ip) => {
            let range = std::fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range").unwrap_or_default();
            let mut range = range.split_ascii_whitespace().filter_map(|port| port.parse::<u16>().ok());
            range.next().zip(range.next()).is_some_and(|(first, last)| (first..=last).contains(&ip.port()))
        }
        Address::Abstract(name) => name.len() == 5 && name.iter().all(u8::is_ascii_hexdigit),
        Address::Path(_) => false,
    }
}

/// Keeps a path that a process removes which cannot be stopped from it: a second link to the socket stands beside it.
#[derive(Debug)]
struct Guard {
    path: PathBuf,
    identity: PathIdentity,
    link: PathBuf,
    watch: Inotify,
}

impl Guard {
    fn new(path: PathBuf, identity: PathIdentity) -> io::Result<Self> {
        let (Some(directory), Some(name)) = (path.parent(), path.file_name()) else {
            return Err(io::Error::from(io::ErrorKind::InvalidInput));
        };
        let watch = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK)?;
        watch.add_watch(directory, AddWatchFlags::IN_DELETE | AddWatchFlags::IN_MOVED_FROM)?;
        let link = directory.join(format!(".{}.handover-{}", name.display(), std::process::id()));
        std::fs::hard_link(&path, &link)?;
        Ok(Self { path, identity, link, watch })
    }

    fn look(&mut self) {
        while self.watch.read_events().is_ok_and(|events| !events.is_empty()) {}
        let is_missing = identity_of(&self.path).is_err_and(|error| error.kind() == io::ErrorKind::NotFound);
        if is_missing && identity_of(&self.link).is_ok_and(|now| now == self.identity) {
            if let Err(error) = std::fs::hard_link(&self.link, &self.path) {
                log::error!("cannot put {} back: {error}", self.path.display());
            }
        }
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        self.look();
        let _ = std::fs::remove_file(&self.link);
    }
}
