//! The serving side of the control socket: many clients, none of which can hold up anything.
//!
//! Non-blocking throughout; the engine polls. A client has five seconds for its one line of request, and a bounded
//! backlog of answers; whoever does not keep to that is dropped. Beyond a number of clients the one that has been
//! silent the longest makes way.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Read, Write};
#[cfg(feature = "cli")]
use std::os::fd::BorrowedFd;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags};
use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
use nix::unistd::{Pid, geteuid};
use socket2::{Domain, SockAddr, Socket, Type};

use super::messages::{Event, Outcome, Request, ResultEvent};
use super::{ANSWER_BYTES_MAX, REQUEST_BYTES_MAX, directory};
use crate::error::Error;
use crate::net::EXHAUSTED_PAUSE;

const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a client may leave its answers unread.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(10);
const CLIENTS_MAX: usize = 64;

pub(crate) type ClientId = u64;

#[cfg_attr(feature = "cli", derive(serde::Serialize, serde::Deserialize))]
pub(crate) struct Server {
    /// None: nobody is let in, and all that there is to talk to are clients of another process.
    #[cfg_attr(feature = "cli", serde(with = "crate::saved::fd::option"))]
    listener: Option<UnixListener>,
    #[cfg_attr(feature = "cli", serde(with = "crate::saved::path"))]
    path: PathBuf,
    inode: u64,
    clients: BTreeMap<ClientId, Client>,
    next_id: ClientId,
    /// Given up to let somebody in who asks a process that has no fd left.
    #[cfg_attr(feature = "cli", serde(skip))]
    reserve: Option<OwnedFd>,
    /// There is none: until then nobody is let in, so as not to spin.
    #[cfg_attr(feature = "cli", serde(with = "crate::saved::moment::option"))]
    paused_until: Option<Instant>,
}

#[cfg_attr(feature = "cli", derive(serde::Serialize, serde::Deserialize))]
struct Client {
    #[cfg_attr(feature = "cli", serde(with = "crate::saved::fd"))]
    stream: UnixStream,
    #[cfg_attr(feature = "cli", serde(with = "crate::saved::pid"))]
    pid: Pid,
    incoming: Vec<u8>,
    outgoing: Vec<u8>,
    /// When it is dropped unless something happens; none while it waits for an upgrade.
    #[cfg_attr(feature = "cli", serde(with = "crate::saved::moment::option"))]
    deadline: Option<Instant>,
    asked: bool,
    /// It has shut down its side, and may still listen.
    #[cfg_attr(feature = "cli", serde(default))]
    says_no_more: bool,
    /// Everything has been said: close when it is written.
    done: bool,
}

/// A request with the one who asks.
pub(crate) struct Asked {
    pub(crate) client: ClientId,
    pub(crate) request: Request,
}

impl Server {
    /// Listens at `<pid>.sock` in `directory`, or in the default one.
    pub(crate) fn bind(directory: Option<&Path>) -> Result<Self, Error> {
        let directory = directory.map_or_else(directory::default_path, Path::to_path_buf);
        directory::prepare(&directory)?;
        let path = directory.join(format!("{}.sock", std::process::id()));
        let failed = |error: io::Error| {
            let error = Error::io(format!("listen on the control socket {}", path.display()), error);
            match error.cause_is(io::ErrorKind::AddrInUse) {
                true => error.mend("a process of another container has this pid: give each its own HANDOVER_DIR"),
                false => error,
            }
        };
        remove_left_overs(&directory);
        // A left-over of a process that had our pid. Where containers share the directory it may be alive, in another
        // pid namespace; then the address is in use, and that is told.
        remove_unless_answered(&path);
        let listener = UnixListener::bind(&path).map_err(failed)?;
        // The directory keeps others out until this is done.
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).map_err(failed)?;
        listener.set_nonblocking(true).map_err(failed)?;
        let inode = fs::symlink_metadata(&path).map_err(failed)?.ino();
        let mut server = Self { listener: Some(listener), path, inode, ..Self::for_adopted() };
        server.keep_reserve();
        Ok(server)
    }

    /// For clients that another process has let in.
    pub(crate) fn for_adopted() -> Self {
        Self {
            listener: None,
            path: PathBuf::new(),
            inode: 0,
            clients: BTreeMap::new(),
            next_id: 0,
            reserve: None,
            paused_until: None,
        }
    }

    /// Removes what process `pid` of this service has left behind, if nobody answers there.
    pub(crate) fn remove_stale(&self, pid: Pid) {
        if self.listener.is_some() {
            remove_unless_answered(&self.path.with_file_name(format!("{pid}.sock")));
        }
    }

    /// Removes the socket's path if it is still ours, so that nobody asks a process that has nothing to say any more.
    pub(crate) fn unlink(&self) {
        if fs::symlink_metadata(&self.path).is_ok_and(|metadata| metadata.ino() == self.inode) {
            let _ = fs::remove_file(&self.path);
        }
    }

    pub(crate) fn listener_poll(&self) -> Option<PollFd<'_>> {
        let listener = self.listener.as_ref().filter(|_| self.paused_until.is_none())?;
        Some(PollFd::new(listener.as_fd(), PollFlags::POLLIN))
    }

    /// What it listens and talks on.
    #[cfg(feature = "cli")]
    pub(crate) fn fds(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.listener.iter().map(AsFd::as_fd).chain(self.clients.values().map(|client| client.stream.as_fd()))
    }

    fn keep_reserve(&mut self) {
        if self.reserve.is_none() {
            self.reserve = self.listener.as_ref().and_then(|listener| listener.as_fd().try_clone_to_owned().ok());
        }
    }

    pub(crate) fn client_polls(&self) -> impl Iterator<Item = (ClientId, PollFd<'_>)> {
        self.clients.iter().map(|(id, client)| {
            let mut flags = PollFlags::empty();
            flags.set(PollFlags::POLLIN, !client.says_no_more);
            flags.set(PollFlags::POLLOUT, !client.outgoing.is_empty());
            (*id, PollFd::new(client.stream.as_fd(), flags))
        })
    }

    pub(crate) fn next_deadline(&self) -> Option<Instant> {
        self.clients.values().filter_map(|client| client.deadline).chain(self.paused_until).min()
    }

    pub(crate) fn drop_late(&mut self, now: Instant) {
        self.clients.retain(|_, client| client.deadline.is_none_or(|deadline| deadline > now));
        self.paused_until = self.paused_until.filter(|until| *until > now);
        self.keep_reserve();
    }

    /// Takes in who has connected. A stranger is answered and dropped before a byte of his is read.
    pub(crate) fn accept(&mut self) {
        // Bounded, so that a flood of connects cannot keep the engine here.
        for _ in 0..CLIENTS_MAX {
            let Some(accepted) = self.listener.as_ref().map(UnixListener::accept) else { return };
            let stream = match accepted {
                Ok((stream, _)) => stream,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) if is_out_of_fds(&error) && self.reserve.take().is_some() => continue,
                Err(error) => {
                    log::warn!("control socket: {error}");
                    self.paused_until = Some(Instant::now() + EXHAUSTED_PAUSE);
                    return;
                }
            };
            let Ok(peer) = getsockopt(&stream, PeerCredentials) else { continue };
            if stream.set_nonblocking(true).is_err() {
                continue;
            }
            let id = self.admit(stream, Pid::from_raw(peer.pid()));
            if peer.uid() != 0 && peer.uid() != geteuid().as_raw() {
                log::warn!("control socket: uid {} (pid {}) may not ask", peer.uid(), peer.pid());
                let message =
                    format!("uid {} may not control this process: only root and uid {} may", peer.uid(), geteuid());
                self.finish(id, &Event::Result(ResultEvent::new(Outcome::NotPermitted, message)));
            }
        }
    }

    fn admit(&mut self, stream: UnixStream, pid: Pid) -> ClientId {
        self.make_room();
        let id = self.next_id;
        self.next_id += 1;
        let client = Client {
            stream,
            pid,
            incoming: Vec::new(),
            outgoing: Vec::new(),
            deadline: Some(Instant::now() + REQUEST_TIMEOUT),
            asked: false,
            says_no_more: false,
            done: false,
        };
        self.clients.insert(id, client);
        id
    }

    /// Who has asked nothing yet goes first, the oldest of them.
    fn make_room(&mut self) {
        if self.clients.len() >= CLIENTS_MAX {
            let silent = self.clients.iter().find(|(_, client)| !client.asked).map(|(id, _)| *id);
            if let Some(oldest) = silent.or_else(|| self.clients.keys().next().copied()) {
                self.clients.remove(&oldest);
            }
        }
    }

    /// Reads what a client has sent; its request when that is complete.
    pub(crate) fn read(&mut self, id: ClientId) -> Option<Asked> {
        let client = self.clients.get_mut(&id)?;
        let mut buffer = [0; 4096];
        let newline = loop {
            if client.asked {
                // After its request a client has nothing to say but good-bye. If it talks on, `poll` says so again.
                let read = client.stream.read(&mut buffer);
                let stays = match read {
                    Ok(0) => {
                        client.says_no_more = true;
                        !has_hung_up(&client.stream)
                    }
                    Ok(_) => true,
                    Err(error) => matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted),
                };
                if !stays {
                    self.clients.remove(&id);
                }
                return None;
            }
            match client.stream.read(&mut buffer) {
                Ok(0) => {
                    self.clients.remove(&id);
                    return None;
                }
                Ok(count) => {
                    let start = client.incoming.len();
                    client.incoming.extend_from_slice(buffer.get(..count).unwrap_or_default());
                    let fresh = client.incoming.get(start..).unwrap_or_default();
                    if let Some(position) = fresh.iter().position(|byte| *byte == b'\n') {
                        break start + position;
                    }
                    if client.incoming.len() > REQUEST_BYTES_MAX {
                        self.refuse(id, &format!("the request is longer than {REQUEST_BYTES_MAX} bytes"));
                        return None;
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return None,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => {
                    self.clients.remove(&id);
                    return None;
                }
            }
        };
        if has_hung_up(&client.stream) {
            // It has given up on a process that was stopped, and told its operator that nothing was done.
            log::warn!("control socket: process {} asked and is gone: nothing is done", client.pid);
            self.clients.remove(&id);
            return None;
        }
        client.asked = true;
        client.deadline = None;
        let line = std::mem::take(&mut client.incoming);
        match serde_json::from_slice(line.get(..newline).unwrap_or_default()) {
            Ok(request) => Some(Asked { client: id, request }),
            Err(error) => {
                self.refuse(id, &format!("the request cannot be understood: {error}"));
                None
            }
        }
    }

    fn refuse(&mut self, id: ClientId, message: &str) {
        self.finish(id, &Event::Result(ResultEvent::new(Outcome::BadRequest, message)));
    }

    /// Says something; the client stays.
    pub(crate) fn send(&mut self, id: ClientId, event: &Event) {
        let Some(client) = self.clients.get_mut(&id) else { return };
        let Ok(line) = serde_json::to_vec(event) else { return };
        if client.outgoing.len() + line.len() > ANSWER_BYTES_MAX {
            // It does not read; it will not be missed.
            self.clients.remove(&id);
            return;
        }
        client.outgoing.extend_from_slice(&line);
        client.outgoing.push(b'\n');
        self.flush(id);
    }

    /// Says the last thing.
    pub(crate) fn finish(&mut self, id: ClientId, event: &Event) {
        if let Some(client) = self.clients.get_mut(&id) {
            client.asked = true;
            client.done = true;
            client.deadline = Some(Instant::now() + FLUSH_TIMEOUT);
        }
        self.send(id, event);
    }

    pub(crate) fn flush(&mut self, id: ClientId) {
        let Some(client) = self.clients.get_mut(&id) else { return };
        while !client.outgoing.is_empty() {
            match client.stream.write(&client.outgoing) {
                Ok(count) => drop(client.outgoing.drain(..count)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => {
                    self.clients.remove(&id);
                    return;
                }
            }
        }
        if client.done {
            self.clients.remove(&id);
        }
    }

    pub(crate) fn is_connected(&self, id: ClientId) -> bool {
        self.clients.contains_key(&id)
    }

    /// The connection of a client, for a process that goes on talking to it.
    pub(crate) fn share(&self, id: ClientId) -> Option<OwnedFd> {
        self.clients.get(&id).and_then(|client| client.stream.as_fd().try_clone_to_owned().ok())
    }

    /// Goes on talking to a client that has asked another process.
    pub(crate) fn adopt(&mut self, connection: OwnedFd) -> Option<ClientId> {
        let stream = UnixStream::from(connection);
        let peer = getsockopt(&stream, PeerCredentials).ok()?;
        stream.set_nonblocking(true).ok()?;
        let id = self.admit(stream, Pid::from_raw(peer.pid()));
        let client = self.clients.get_mut(&id)?;
        (client.asked, client.deadline) = (true, None);
        Some(id)
    }

    /// Gives the connection up to become a channel, after `event` is said on it.
    pub(crate) fn take_channel(&mut self, id: ClientId, event: &Event) -> Option<(UnixStream, Pid)> {
        self.send(id, event);
        let client = self.clients.remove(&id)?;
        client.outgoing.is_empty().then_some((client.stream, client.pid))
    }
}

/// Sockets of processes that were killed. Only old ones: one that is bound this instant does not answer yet.
fn remove_left_overs(directory: &Path) {
    const AGE: Duration = Duration::from_secs(60);
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        let path = entry.path();
        let is_socket = path.extension().is_some_and(|extension| extension == "sock");
        let age = entry.metadata().ok().and_then(|metadata| metadata.modified().ok()?.elapsed().ok());
        if is_socket && age.is_some_and(|age| age > AGE) {
            remove_unless_answered(&path);
        }
    }
}

fn remove_unless_answered(path: &Path) {
    let probe = || -> io::Result<()> {
        let probe = Socket::new(Domain::UNIX, Type::STREAM, None)?;
        probe.set_nonblocking(true)?;
        probe.connect(&SockAddr::unix(path)?)
    };
    if probe().is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused) {
        let _ = fs::remove_file(path);
    }
}

/// Closed, and not only shut down for writing.
fn has_hung_up(stream: &UnixStream) -> bool {
    let mut fds = [PollFd::new(stream.as_fd(), PollFlags::empty())];
    let looked = crate::poll::wait_any(&mut fds, Some(Instant::now()));
    looked.is_ok() && fds[0].revents().is_some_and(|events| events.contains(PollFlags::POLLHUP))
}

fn is_out_of_fds(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EMFILE | libc::ENFILE))
}

/// Whatever a client writes, in whatever pieces: it has asked once or not at all, or is told that nobody understands it.
#[cfg(any(test, fuzzing))]
pub(crate) fn fuzz(bytes: &[u8]) {
    let (pieces, whole) = crate::fuzz::in_pieces(bytes);
    let Ok((mut client, ours)) = UnixStream::pair() else { return };
    if ours.set_nonblocking(true).is_err() || client.set_nonblocking(true).is_err() {
        return;
    }
    let mut server = Server::for_adopted();
    let id = server.admit(ours, Pid::this());
    let mut asked = vec![];
    for piece in pieces {
        // One that has been refused is gone.
        let _ = client.write_all(piece);
        asked.extend(server.read(id));
    }
    let mut answer = String::new();
    let _ = client.read_to_string(&mut answer);
    let line = whole.split(|byte| *byte == b'\n').next().filter(|line| line.len() < whole.len());
    let understood = line.and_then(|line| serde_json::from_slice::<Request>(line).ok());
    let again = |request: &Request| serde_json::to_string(request).unwrap_or_default();
    let (asked, wanted): (Vec<_>, Vec<_>) =
        (asked.iter().map(|asked| again(&asked.request)).collect(), understood.iter().map(again).collect());
    assert_eq!(asked, wanted);
    for text in wanted {
        assert_eq!(serde_json::from_str(&text).map(|read| again(&read)).ok(), Some(text));
    }
    let refused =
        matches!(serde_json::from_str(&answer), Ok(Event::Result(result)) if result.result == Outcome::BadRequest);
    assert_eq!(refused, line.is_some() && asked.is_empty(), "{answer}");
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The engine has others to listen to.
    #[test]
    fn a_client_that_never_stops_talking_is_heard_in_parts() {
        let directory = std::env::temp_dir().join(format!("handover-server-talk-{}", std::process::id()));
        let mut server = Server::bind(Some(&directory)).unwrap();
        let mut client = UnixStream::connect(&server.path).unwrap();
        server.accept();
        client.write_all(b"{\"request\":\"status\"}\n").unwrap();
        assert!(server.read(0).is_some());
        client.set_nonblocking(true).unwrap();
        while client.write(&[b'x'; 4096]).is_ok() {}
        assert!(server.read(0).is_none());
        let left = crate::sys::unread_bytes(server.clients[&0].stream.as_fd()).unwrap();
        assert!(left > 0, "all of it was read at once");
        while crate::sys::unread_bytes(server.clients[&0].stream.as_fd()).unwrap() > 0 {
            assert!(server.read(0).is_none());
        }
        // And when it has closed the connection it is gone.
        drop(client);
        assert!(server.read(0).is_none() && !server.is_connected(0));
        server.unlink();
        fs::remove_dir(&directory).unwrap();
    }

    /// Two containers that share the directory may both have pid 1.
    #[test]
    fn a_socket_that_answers_is_not_taken_from_its_process() {
        let directory = std::env::temp_dir().join(format!("handover-server-{}", std::process::id()));
        let first = Server::bind(Some(&directory)).unwrap();
        let error = Server::bind(Some(&directory)).map(|_| ()).unwrap_err().to_string();
        assert!(error.contains("Address already in use") && error.contains("HANDOVER_DIR"), "{error}");
        UnixStream::connect(&first.path).unwrap();
        drop(first);
        // Nobody answers any more: a left-over.
        Server::bind(Some(&directory)).unwrap().unlink();
        fs::remove_dir(&directory).unwrap();
    }
}
