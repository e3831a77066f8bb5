//! Receiving the offer, and checking that it is what it says.

use std::env;
use std::io::{self, Read, Seek};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags};
use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
use nix::unistd::Pid;
use socket2::SockRef;

use super::restart::{self, Restart};
use crate::both::both;
use crate::channel::{Broken, Channel};
use crate::control::{Client, Target};
use crate::engine::SignalPipe;
use crate::error::{Error, ErrorKind};
use crate::fault;
use crate::listeners::{Address, Inherited, Source, kind_of};
use crate::protocol::{
    AdoptedListener, BuildIdentity, CHANNEL_VARIABLE, DrainingGeneration, Kind, MANY, Message, Offer, OfferedAddress,
    OfferedListener, STATE_BYTES_MAX, VERSIONS, name_is_valid,
};
use crate::state::HandedState;
use crate::sys;

/// The old process has made the offer before it looks for an answer.
const OFFER_TIMEOUT: Duration = Duration::from_secs(30);

/// How long an old process whose channel has ended may take until it is gone.
const DEATH_TIMEOUT: Duration = Duration::from_secs(2);

/// What an old process has handed over, and the channel to it.
pub(crate) struct Handed {
    /// None after a restart: nobody is at its other end any more.
    pub(crate) channel: Option<Channel>,
    /// The answer that is due, if it is.
    pub(crate) adopted: Option<Message>,
    /// Of a pull: the old process, which does not kill this one before commit.
    pub(crate) pulled_from: Option<OwnedFd>,
    pub(crate) parts: HandedParts,
}

pub(crate) struct HandedParts {
    pub(crate) generation: u64,
    pub(crate) inherited: Vec<Inherited>,
    pub(crate) state: Option<HandedState>,
    pub(crate) stderr: Option<OwnedFd>,
    /// The old process, and those before it that still drain.
    pub(crate) older: Vec<DrainingGeneration>,
    /// What the old process runs.
    pub(crate) build: Option<BuildIdentity>,
    /// What upgrades start, if it is another program than this one.
    pub(crate) program: Option<PathBuf>,
    pub(crate) restart: Option<Restart>,
}

/// What this process was spawned for.
pub(crate) enum Spawned {
    ForHandover(Box<Handed>),
    /// The old process died before it had handed everything over: this one is a first generation.
    AndAlone,
    ByAnybody,
}

/// In a restart this returns when the old process has ended.
pub(crate) fn from_environment(signals: Option<&mut SignalPipe>) -> Result<Spawned, Error> {
    const TRIED: &str = "take the handover of the old process";
    let Some(stream) = channel_from_environment() else { return Ok(Spawned::ByAnybody) };
    let old = getsockopt(&stream, PeerCredentials).map_err(io::Error::from);
    let old = old.and_then(|old| sys::pidfd_of_peer(stream.as_fd(), Pid::from_raw(old.pid())));
    let mut handed = receive(stream, None, &old, TRIED)?;
    if let Some(Handed { channel, parts: HandedParts { restart: Some(restart), stderr, .. }, .. }) = &mut handed {
        restart::take_stderr(stderr.take());
        let ended = restart.wait_for_the_end(&old, channel.take(), signals);
        ended.map_err(|cause| Error::new(ErrorKind::NotUpgraded, TRIED, cause))?;
    } else if handed.is_none() {
        // Its end of the channel is closed before its listeners are; until then their addresses cannot be bound.
        if let Ok(old) = old {
            let _ = crate::poll::wait(old.as_fd(), PollFlags::POLLIN, Some(Instant::now() + DEATH_TIMEOUT));
        }
        give_up_dead_stderr();
        log::warn!("the old process died before it had handed over its listeners: starting afresh");
    }
    Ok(handed.map_or(Spawned::AndAlone, |handed| Spawned::ForHandover(Box::new(handed))))
}

/// The old process is dead, and has not given us the stderr that was to replace the pipe to it: nobody reads that any
/// more, and writing to it would fail, which makes `eprintln!` panic.
fn give_up_dead_stderr() {
    let stderr = io::stderr();
    let mut fds = [PollFd::new(stderr.as_fd(), PollFlags::empty())];
    let looked = crate::poll::wait_any(&mut fds, Some(Instant::now()));
    let dead = looked.is_ok() && fds[0].revents().is_some_and(|events| events.contains(PollFlags::POLLERR));
    if dead {
        let null = std::fs::OpenOptions::new().write(true).open("/dev/null");
        let _ = null.and_then(|null| sys::replace_stderr(null.as_fd()));
    }
}

/// Asks a running process for its listeners.
pub(crate) fn by_pull(target: &Target) -> Result<Handed, Error> {
    let client = Client::connect(target)?;
    let pid = client.pid();
    let (stream, _) = client.take_over()?;
    let tried = format!("take over from {target}");
    let old = sys::pidfd_of_peer(stream.as_fd(), Pid::from_raw(pid));
    let nothing_to_wait_for = Err(io::Error::other("this process was started by something else"));
    let handed = receive(stream, Some(pid), &nothing_to_wait_for, &tried)?;
    let handed = handed.map(|handed| Handed { pulled_from: old.ok(), ..handed });
    handed.ok_or_else(|| Error::new(ErrorKind::Failed, tried, "it died before it had handed over its listeners"))
}

/// `HANDOVER_FD=number:inode`. The inode tells a channel from whatever else has that number in a process that has
/// inherited the variable and not the fd.
fn channel_from_environment() -> Option<UnixStream> {
    let value = env::var(CHANNEL_VARIABLE).ok()?;
    let channel = (|| {
        let (number, inode) = number_and_inode(&value)?;
        let link = std::fs::read_link(format!("/proc/self/fd/{number}")).ok()?;
        // Before the fd is touched: it may be somebody else's.
        (link.to_str()? == format!("socket:[{inode}]")).then_some(())?;
        let fd = sys::fd_from_environment(number)?;
        let file = std::fs::File::from(fd);
        let right_inode = file.metadata().ok()?.ino() == inode;
        right_inode.then(|| UnixStream::from(OwnedFd::from(file)))
    })();
    if channel.is_none() {
        log::debug!("{CHANNEL_VARIABLE}={value} is a left-over of an ancestor: ignored");
    }
    channel
}

fn number_and_inode(value: &str) -> Option<(i32, u64)> {
    let (number, inode) = value.split_once(':')?;
    Some((number.parse().ok()?, inode.parse().ok()?))
}

/// What can be parsed is what is written so, but for zeroes and a sign.
#[cfg(any(test, fuzzing))]
pub(super) fn fuzz(text: &str) {
    if let Some(read) = number_and_inode(text) {
        assert_eq!(number_and_inode(&format!("{}:{}", read.0, read.1)), Some(read));
    }
}

/// `old` is the process at the other end, and `old_pid` its pid where that is another here than there.
fn receive(
    stream: UnixStream,
    old_pid: Option<i32>,
    old: &io::Result<OwnedFd>,
    tried: &str,
) -> Result<Option<Handed>, Error> {
    let failed = |cause: String| Error::new(ErrorKind::Failed, tried, cause);
    let mut channel = Channel::new(stream).map_err(|error| Error::io(tried, error))?;
    fault::reached("new: started", Some(&channel));
    let (offer, fds) = match channel.receive_offer(Instant::now() + OFFER_TIMEOUT) {
        Ok(Some(offered)) => offered,
        Ok(None) => return Ok(None),
        Err(broken) => {
            let (reason, versions) = match &broken {
                Broken::Io(error) => (format!("the offer could not be received: {error}"), false),
                Broken::Versions(_) => {
                    (format!("the old process {broken}: upgrade by way of a build that speaks both"), true)
                }
                Broken::Malformed(_) => (format!("the old process {broken}"), false),
            };
            refuse(&mut channel, &reason, versions);
            return Err(failed(reason));
        }
    };
    // `receive_offer` has seen that there is one.
    let version = VERSIONS.common(offer.protocol).unwrap_or(VERSIONS.max);
    match check(offer, fds, old_pid, old) {
        Ok(parts) => {
            let listeners = parts.inherited.iter();
            let listeners =
                listeners.map(|one| AdoptedListener { name: one.name.clone(), cookie: one.cookie }).collect();
            let is_restart = parts.restart.is_some();
            let adopted = Message::Adopted { protocol: version, listeners, restart: is_restart };
            if !is_restart {
                // By the engine, while the application starts up.
                return Ok(Some(Handed { channel: Some(channel), adopted: Some(adopted), pulled_from: None, parts }));
            }
            // At once: this process waits for the end of the old one, and that waits for this.
            if let Err(broken) = channel.send(&adopted, vec![]) {
                log::debug!("the old process {broken}");
            }
            Ok(Some(Handed { channel: Some(channel), adopted: None, pulled_from: None, parts }))
        }
        Err(reason) => {
            refuse(&mut channel, &reason, false);
            Err(failed(reason))
        }
    }
}

fn refuse(channel: &mut Channel, reason: &str, versions: bool) {
    let protocol = versions.then_some(VERSIONS);
    let _ = channel.send(&Message::Refused { reason: reason.to_owned(), protocol }, vec![]);
}

fn check(
    offer: Offer,
    fds: Vec<OwnedFd>,
    old_pid: Option<i32>,
    old: &io::Result<OwnedFd>,
) -> Result<HandedParts, String> {
    let listeners: Vec<(&OfferedListener, &OwnedFd)> = offer.listeners.iter().zip(&fds).collect();
    check_listeners(&listeners)?;
    let mut fds = fds.into_iter();
    let mut inherited = Vec::with_capacity(offer.listeners.len());
    for (listener, fd) in offer.listeners.into_iter().zip(&mut fds) {
        inherited.push(adopt(listener, fd)?);
    }
    let state = match offer.state {
        None => None,
        Some(state) => fds.next().map(|fd| read_state(state.version, state.length, fd)).transpose()?,
    };
    let stderr = if offer.stderr { fds.next() } else { None };
    let older =
        DrainingGeneration { pid: old_pid.unwrap_or(offer.pid), generation: offer.generation.saturating_sub(1) };
    let restart = match offer.restart {
        Some(restart) => {
            let asker = if restart.asker { fds.next() } else { None };
            Some(Restart::new(&restart, offer.ready_timeout_ms, asker, offer.pid, old)?)
        }
        None => None,
    };
    let older = std::iter::once(older).filter(|_| restart.is_none()).chain(offer.draining).collect();
    let (generation, build, program) = (offer.generation, offer.build, offer.program);
    Ok(HandedParts { generation, inherited, state, stderr, older, build, program, restart })
}

/// In two halves at the same time where there are many: each takes two system calls, and clients wait.
fn check_listeners(listeners: &[(&OfferedListener, &OwnedFd)]) -> Result<(), String> {
    let check_all = |listeners: &[(&OfferedListener, &OwnedFd)]| {
        listeners.iter().try_for_each(|(listener, fd)| {
            let checked = check_listener(listener, fd.as_fd());
            checked.map_err(|reason| format!("listener `{}`: {reason}", listener.name))
        })
    };
    if listeners.len() < MANY {
        return check_all(listeners);
    }
    let (first, second) = listeners.split_at(listeners.len() / 2);
    let (first, second) = both(|| check_all(first), || check_all(second));
    first.and(second)
}

fn check_listener(listener: &OfferedListener, fd: BorrowedFd<'_>) -> Result<(), String> {
    if !name_is_valid(&listener.name) {
        return Err("that is no valid name".to_owned());
    }
    let cookie = SockRef::from(&fd).cookie().map_err(|error| error.to_string())?;
    if cookie != listener.cookie {
        return Err(format!("the socket received has cookie {cookie} instead of {}", listener.cookie));
    }
    match kind_of(fd).map_err(|error| error.to_string())? {
        Some(kind) if kind == listener.kind => Ok(()),
        _ => Err(format!("the socket received is not of kind {}", listener.kind)),
    }
}

fn adopt(listener: OfferedListener, fd: OwnedFd) -> Result<Inherited, String> {
    let address = match (listener.kind, listener.address) {
        (Kind::Tcp | Kind::Udp, OfferedAddress::Ip(address)) => Address::Ip(address),
        // JSON carries no path that is not UTF-8.
        _ => Address::of(fd.as_fd()).map_err(|error| format!("listener `{}`: {error}", listener.name))?,
    };
    Ok(Inherited {
        name: listener.name,
        kind: listener.kind,
        address,
        cookie: listener.cookie,
        path: listener.path,
        backlog: listener.backlog,
        source: Source::HandedOver,
        activated: listener.activated,
        fd,
    })
}

fn read_state(version: u32, length: u64, fd: OwnedFd) -> Result<HandedState, String> {
    if length > STATE_BYTES_MAX {
        return Err(format!("a state of {length} bytes, more than {STATE_BYTES_MAX}"));
    }
    let read = || -> io::Result<Vec<u8>> {
        let mut file = std::fs::File::from(fd);
        file.rewind()?;
        let mut bytes = Vec::with_capacity(usize::try_from(length).unwrap_or_default());
        file.take(length).read_to_end(&mut bytes)?;
        Ok(bytes)
    };
    let bytes = read().map_err(|error| format!("the state cannot be read: {error}"))?;
    if bytes.len() as u64 != length {
        return Err(format!("a state of {} bytes instead of {length}", bytes.len()));
    }
    Ok(HandedState { version, bytes })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Also in that half of thousands that is checked on another thread.
    #[test]
    fn one_wrong_listener_is_found_wherever_it_is() {
        let fd = OwnedFd::from(std::net::TcpListener::bind("127.0.0.1:0").unwrap());
        let cookie = SockRef::from(&fd).cookie().unwrap();
        let listener = |number: usize| OfferedListener {
            name: format!("l{number}"),
            kind: Kind::Tcp,
            address: OfferedAddress::Text(String::new()),
            cookie,
            path: None,
            backlog: None,
            activated: false,
        };
        for count in [3, MANY] {
            let mut offered: Vec<OfferedListener> = (0..count).map(listener).collect();
            let check = |offered: &[OfferedListener]| {
                let pairs: Vec<_> = offered.iter().map(|listener| (listener, &fd)).collect();
                check_listeners(&pairs)
            };
            assert_eq!(check(&offered), Ok(()));
            for wrong in [0, count / 2, count - 1] {
                offered[wrong].kind = Kind::Udp;
                let reason = format!("listener `l{wrong}`: the socket received is not of kind udp");
                assert_eq!(check(&offered), Err(reason));
                offered[wrong] = OfferedListener { cookie: cookie + 1, ..listener(wrong) };
                let reason = check(&offered).unwrap_err();
                assert!(
                    reason.starts_with(&format!("listener `l{wrong}`: the socket received has cookie")),
                    "{reason}"
                );
                offered[wrong] = listener(wrong);
            }
        }
    }
}
