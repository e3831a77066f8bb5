//! The asking side of the control socket.

mod restart;

use std::fs;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::poll::PollFlags;
use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
use nix::unistd::Pid;
use socket2::{Domain, SockAddr, Socket, Type};

use super::ANSWER_BYTES_MAX;
use super::find::{Target, other_pid_namespace, pid_here, service_of, state_of};
use super::messages::{
    AcceptedEvent, Event, Outcome, Request, ResultEvent, StageEvent, StageName, State, Status, UpgradeRequest, Wait,
};
use crate::error::{Error, ErrorKind};
use crate::sys;

/// A process that says nothing for this long, not even that it is alive, is stopped or hangs.
const SILENCE_MAX: Duration = Duration::from_secs(10);
/// How long a process whose connections are closed may take until it is gone.
const DEATH_TIMEOUT: Duration = Duration::from_secs(2);
/// How long an old process that has drained may take to exit.
const EXIT_TIMEOUT: Duration = Duration::from_secs(10);

/// Asks one process, over its control socket.
///
/// ```no_run
/// use handover::control::{Client, Target, UpgradeRequest};
///
/// let client = Client::connect(&Target::Pid(4711))?;
/// let result = client.upgrade(&UpgradeRequest::default(), |answer| println!("{answer:?}"))?;
/// println!("{}", result.message);
/// # Ok::<(), handover::Error>(())
/// ```
#[derive(Debug)]
pub struct Client {
    stream: BufReader<UnixStream>,
    target: Target,
    pid: Pid,
    /// Of the process that answers: its end is seen even if its pid is reused.
    process: Option<OwnedFd>,
    /// Where what it says of pids has another meaning than here. It is asked for while it lives.
    pid_namespace: Option<u64>,
    /// It has taken the request, and will do it even if nobody waits.
    accepted: bool,
    /// It stays when what it runs is replaced.
    supervises: bool,
    patience: Duration,
    /// How long both processes of a restart may be silent, once the new one has the listeners.
    patience_once_adopted: Option<Duration>,
}

/// What a process says while an upgrade or a stop is under way.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum Answer {
    /// The request is taken.
    Accepted(AcceptedEvent),
    /// A stage has been reached.
    Stage(StageEvent),
}

impl Client {
    /// Connects, and makes sure that the process that answers is the one that was meant.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::NotRunning`] if there is no such process, if it does not use handover or if nothing answers at the
    /// path; [`ErrorKind::NotPermitted`] if the system does not let this user look or connect.
    pub fn connect(target: &Target) -> Result<Self, Error> {
        let (path, wanted) = match target {
            Target::Pid(pid) => (service_of(*pid)?.socket, Some(Pid::from_raw(*pid))),
            Target::Socket(path) => (path.clone(), None),
        };
        let failed = |error: io::Error| {
            if error.kind() == io::ErrorKind::WouldBlock {
                let cause = format!("its queue is full, and it has let nobody in for {} s", SILENCE_MAX.as_secs());
                let failure = Error::new(ErrorKind::Failed, format!("ask {target}"), cause);
                return failure.mend("it is stopped or hangs; `kill -CONT` lets one that is stopped go on");
            }
            let gone = matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused);
            let failure = Error::io(format!("connect to the control socket {}", path.display()), error);
            match gone {
                true => failure
                    .with_kind(ErrorKind::NotRunning)
                    .mend("the process is gone; `handover ps` lists those that run"),
                false => failure.mend("ask as root, or as the user that the process runs as"),
            }
        };
        let stream = connect_to(&path, SILENCE_MAX).map_err(failed)?;
        stream.set_read_timeout(Some(SILENCE_MAX)).map_err(failed)?;
        stream.set_write_timeout(Some(SILENCE_MAX)).map_err(failed)?;
        let peer = getsockopt(&stream, PeerCredentials).map_err(|error| failed(error.into()))?;
        let pid = Pid::from_raw(peer.pid());
        if wanted.is_some_and(|wanted| wanted != pid) {
            let cause = format!("process {pid} answers there");
            let error = Error::new(ErrorKind::NotRunning, format!("ask {target}"), cause);
            return Err(error.mend("the pid was reused, or somebody took its place; nothing was asked"));
        }
        log::debug!("process {pid} answers at {}", path.display());
        let process = sys::pidfd_of_peer(stream.as_fd(), pid).ok();
        Ok(Self {
            stream: BufReader::new(stream),
            target: target.clone(),
            pid,
            process,
            pid_namespace: other_pid_namespace(pid.as_raw()),
            accepted: false,
            supervises: false,
            patience: SILENCE_MAX,
            patience_once_adopted: None,
        })
    }

    /// How long the process may be silent before it is taken to be stopped: 10 s by default.
    ///
    /// # Errors
    ///
    /// That of `setsockopt(2)`; a time of zero is not allowed.
    pub fn patience(mut self, longest: Duration) -> Result<Self, Error> {
        let set = self.set_patience(longest);
        set.map_err(|error| Error::io(format!("ask {}", self.target), error).with_kind(ErrorKind::Invalid))?;
        Ok(self)
    }

    fn set_patience(&mut self, longest: Duration) -> io::Result<()> {
        self.stream.get_ref().set_read_timeout(Some(longest))?;
        self.patience = longest;
        Ok(())
    }

    /// The process that answers, as this process sees it.
    #[must_use]
    pub fn pid(&self) -> i32 {
        self.pid.as_raw()
    }

    /// What the process is doing.
    ///
    /// # Errors
    ///
    /// If it does not answer, or will not answer this user.
    pub fn status(mut self) -> Result<Status, Error> {
        self.say(&Request::Status)?;
        match self.hear()? {
            Some(Event::Status(status)) => Ok(*status),
            Some(Event::Result(result)) => Err(self.refused("ask for the status of", &result)),
            Some(_) => Err(self.failed("ask for the status of", "it gave another answer than asked for")),
            None => Err(self.failed("ask for the status of", "it closed the connection without an answer")),
        }
    }

    /// Replaces the process by its new build; `on_answer` is told of each stage as it is reached.
    ///
    /// Every end that the process itself reports is an `Ok`, also a failed upgrade: look at [`ResultEvent::result`].
    /// With [`Wait::Drained`] this returns when the old process is gone.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::NothingServes`] if the old process died in the middle and no new one serves in its place;
    /// [`ErrorKind::Failed`] if it does not answer any more.
    pub fn upgrade(
        mut self,
        request: &UpgradeRequest,
        mut on_answer: impl FnMut(&Answer),
    ) -> Result<ResultEvent, Error> {
        self.say(&Request::Upgrade(request.clone()))?;
        let mut new_pid = None;
        let mut drains = false;
        let mut note = |answer: &Answer| {
            if let Answer::Stage(stage) = answer {
                new_pid = stage.pid.or(new_pid);
                drains |= stage.stage == StageName::Draining;
            }
            on_answer(answer);
        };
        let result = match self.follow(&mut note)? {
            Some(result) => result,
            None => {
                self.must_have_died()?;
                return self.after_its_death("upgrade", new_pid, drains);
            }
        };
        let waits = request.wait == Some(Wait::Drained) && !self.supervises;
        if waits && matches!(result.result, Outcome::Upgraded | Outcome::Cut) {
            self.wait_for_exit();
        }
        Ok(result)
    }

    /// Drains the process and returns when it is gone.
    ///
    /// # Errors
    ///
    /// If it does not answer any more, or will not answer this user.
    pub fn stop(
        mut self,
        drain_timeout: Option<Duration>,
        mut on_answer: impl FnMut(&Answer),
    ) -> Result<ResultEvent, Error> {
        let drain_timeout_ms = drain_timeout.map(|timeout| u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX));
        self.say(&Request::Stop { drain_timeout_ms })?;
        let result = match self.follow(&mut on_answer)? {
            Some(result) => result,
            // It was to end, and it has ended.
            None => {
                self.must_have_died()?;
                ResultEvent::new(Outcome::Stopped, format!("process {} ended before it said how", self.pid))
            }
        };
        if matches!(result.result, Outcome::Stopped | Outcome::Cut) {
            self.wait_for_exit();
        }
        Ok(result)
    }

    /// Replaces a supervisor by its own new build; its process stays, and so does what it runs. Of the request `exe` and
    /// `ready_timeout_ms` count.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::NothingServes`] if it died of that; [`ErrorKind::Failed`] if it does not answer any more.
    pub fn upgrade_self(
        mut self,
        request: &UpgradeRequest,
        mut on_answer: impl FnMut(&Answer),
    ) -> Result<ResultEvent, Error> {
        self.say(&Request::UpgradeSelf(request.clone()))?;
        match self.follow(&mut on_answer)? {
            Some(result) => Ok(result),
            None => {
                self.must_have_died()?;
                self.after_its_death("upgrade", None, false)
            }
        }
    }

    /// Tells a supervisor how many workers to run, and returns when it does.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::NothingServes`] if it died of that; [`ErrorKind::Failed`] if it does not answer any more.
    pub fn scale(mut self, workers: usize, mut on_answer: impl FnMut(&Answer)) -> Result<ResultEvent, Error> {
        self.say(&Request::Scale { workers })?;
        match self.follow(&mut on_answer)? {
            Some(result) => Ok(result),
            None => {
                self.must_have_died()?;
                self.after_its_death("scale", None, false)
            }
        }
    }

    /// Passes on what is said until the result. `None`: the process died first.
    fn follow(&mut self, on_answer: &mut dyn FnMut(&Answer)) -> Result<Option<ResultEvent>, Error> {
        loop {
            match self.hear()? {
                Some(Event::Accepted(accepted)) => {
                    self.accepted = true;
                    self.supervises = accepted.supervises;
                    on_answer(&Answer::Accepted(accepted));
                }
                Some(Event::Stage(mut stage)) => {
                    // All of their fields are optional, so serde finds claims in any stage.
                    stage.claims =
                        stage.claims.filter(|_| matches!(stage.stage, StageName::Ready | StageName::Committed));
                    if let Some(longest) = self.patience_once_adopted.filter(|_| stage.stage == StageName::Adopted) {
                        let set = self.set_patience(longest);
                        set.map_err(|error| Error::io(format!("hear {}", self.target), error))?;
                    }
                    on_answer(&Answer::Stage(stage));
                }
                Some(Event::Alive) => {}
                Some(Event::Result(result)) => return Ok(Some(result)),
                Some(Event::Status(_)) => return Err(self.failed("ask", "it gave another answer than asked for")),
                None => return Ok(None),
            }
        }
    }

    /// A process that lives closes the connection to a client that does not read.
    fn must_have_died(&self) -> Result<(), Error> {
        let deadline = Some(Instant::now() + DEATH_TIMEOUT);
        let ended = |process: &OwnedFd| crate::poll::wait(process.as_fd(), PollFlags::POLLIN, deadline).unwrap_or(true);
        match self.process.as_ref().is_none_or(ended) {
            true => Ok(()),
            false => Err(self
                .failed("hear", "it has closed the connection, and lives")
                .mend("what came of it is not known: `handover status` tells")),
        }
    }

    /// The old process ended without a last word. The truth is with the new one, if there is one: it takes over as soon
    /// as it is ready.
    fn after_its_death(&self, verb: &str, new_pid: Option<i32>, drains: bool) -> Result<ResultEvent, Error> {
        let old = self.pid;
        let nothing = |cause: String| {
            let error = Error::new(ErrorKind::NothingServes, format!("{verb} {}", self.target), cause);
            Err(error.mend("start the service again"))
        };
        if self.supervises {
            return nothing(format!("process {old} died, which supervised the program and held its sockets"));
        }
        let Some(new) = new_pid else {
            return nothing(format!("process {old} died, and no new process had been started"));
        };
        let Some(new) = self.pid_namespace.map_or(Some(new), |namespace| pid_here(namespace, new)) else {
            return nothing(format!("process {old} died, and so did the new process"));
        };
        let deadline = Instant::now() + Duration::from_secs(60);
        loop {
            let status = Client::connect(&Target::Pid(new)).and_then(Client::status);
            match status {
                Ok(status) if matches!(status.state, State::Serving | State::Upgrading) => {
                    let how =
                        if drains { "while it drained".to_owned() } else { format!("in the middle of the {verb}") };
                    let message = format!("process {old} died {how}; process {new} has taken over");
                    let (pid, generation) = (Some(new), Some(status.generation));
                    return Ok(ResultEvent { pid, generation, ..ResultEvent::new(Outcome::Upgraded, message) });
                }
                Ok(status) if matches!(status.state, State::Draining | State::Drained | State::Refused) => {
                    return nothing(format!("process {old} died, and process {new} is {}", status.state));
                }
                Err(_) if sys::pidfd_open(Pid::from_raw(new)).is_err() => {
                    return nothing(format!("process {old} died, and so did the new process {new}"));
                }
                _ if Instant::now() > deadline => {
                    return nothing(format!("process {old} died, and process {new} is not ready after a minute"));
                }
                // It has no control socket yet, or its application still starts up.
                _ => std::thread::sleep(Duration::from_millis(20)),
            }
        }
    }

    fn wait_for_exit(&self) {
        if let Some(process) = &self.process {
            let deadline = Some(Instant::now() + EXIT_TIMEOUT);
            let _ = crate::poll::wait(process.as_fd(), PollFlags::POLLIN, deadline);
        }
    }

    /// Asks for the handover itself; the connection becomes the channel.
    pub(crate) fn take_over(mut self) -> Result<(UnixStream, AcceptedEvent), Error> {
        self.say(&Request::TakeOver)?;
        // Byte by byte: what follows the line carries fds, which a buffered read would lose.
        let mut line = Vec::new();
        let stream = self.stream.get_mut();
        loop {
            let mut byte = [0];
            match stream.read(&mut byte) {
                Ok(1) if byte == *b"\n" => break,
                Ok(1) if line.len() < 64 << 10 => line.push(byte[0]),
                Ok(_) => return Err(self.failed("take over from", "it closed the connection without an answer")),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(Error::io(format!("take over from {}", self.target), error)),
            }
        }
        match serde_json::from_slice(&line) {
            Ok(Event::Accepted(accepted)) => Ok((self.stream.into_inner(), accepted)),
            Ok(Event::Result(result)) => Err(self.refused("take over from", &result)),
            _ => Err(self.failed("take over from", "it gave another answer than asked for")),
        }
    }

    fn say(&mut self, request: &Request) -> Result<(), Error> {
        let mut line = serde_json::to_vec(request).map_err(|error| self.failed("ask", &error.to_string()))?;
        line.push(b'\n');
        let sent = self.stream.get_mut().write_all(&line);
        match sent {
            Ok(()) => Ok(()),
            // It may have refused us before reading; its answer is still there to be heard.
            Err(error) if matches!(error.kind(), io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset) => Ok(()),
            Err(error) => Err(Error::io(format!("ask {}", self.target), error)),
        }
    }

    fn hear(&mut self) -> Result<Option<Event>, Error> {
        let mut line = Vec::new();
        match (&mut self.stream).take(ANSWER_BYTES_MAX as u64 + 1).read_until(b'\n', &mut line) {
            Ok(0) => return Ok(None),
            Ok(_) if line.last() != Some(&b'\n') => return Ok(None),
            Ok(_) => {}
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {
                return Err(self.silent());
            }
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return Ok(None),
            Err(error) => return Err(Error::io(format!("hear {}", self.target), error)),
        }
        let event = serde_json::from_slice(&line);
        event.map(Some).map_err(|error| self.failed("understand", &format!("it answered {error}")))
    }

    fn silent(&self) -> Error {
        let stopped = matches!(state_of(self.pid()), Some('T' | 't'));
        let cause = format!("it has said nothing for {} s", self.patience.as_secs());
        match (stopped, self.accepted) {
            (true, true) => self
                .failed("ask", &format!("{cause}: it is stopped"))
                .mend("`kill -CONT` lets it go on, with what it has begun: `handover status` tells"),
            (true, false) => self
                .failed("ask", &format!("{cause}: it is stopped"))
                .mend("`kill -CONT` lets it go on; then ask again"),
            (false, true) => self
                .failed("ask", &cause)
                .mend("what came of it is not known: `handover status` tells, once it answers"),
            (false, false) => self.failed("ask", &cause).mend("it hangs, and has done nothing of what was asked"),
        }
    }

    fn failed(&self, verb: &str, cause: &str) -> Error {
        Error::new(ErrorKind::Failed, format!("{verb} {}", self.target), cause)
    }

    fn refused(&self, verb: &str, result: &ResultEvent) -> Error {
        let kind = match result.result {
            Outcome::Busy => ErrorKind::Busy,
            Outcome::NotPermitted => ErrorKind::NotPermitted,
            Outcome::BadRequest => ErrorKind::Invalid,
            _ => ErrorKind::Failed,
        };
        Error::new(kind, format!("{verb} {}", self.target), result.message.clone())
    }
}

/// Connects through the directory's fd: what `/proc/PID/root` puts before a path may make it too long for a socket
/// address. EAGAIN when its queue is full for as long as `longest`, as that of a stopped process is once enough have asked.
fn connect_to(path: &Path, longest: Duration) -> io::Result<UnixStream> {
    let (Some(directory), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(io::Error::from(io::ErrorKind::NotFound));
    };
    let directory = if directory.as_os_str().is_empty() { Path::new(".") } else { directory };
    let directory = fs::OpenOptions::new().read(true).custom_flags(libc::O_PATH | libc::O_DIRECTORY).open(directory)?;
    let address = SockAddr::unix(Path::new(&format!("/proc/self/fd/{}", directory.as_raw_fd())).join(name))?;
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    // What `connect` waits for is a place in the queue, by the time that sending may take (`unix_stream_connect`).
    socket.set_write_timeout(Some(longest))?;
    loop {
        match socket.connect(&address) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            connected => return connected.map(|()| OwnedFd::from(socket).into()),
        }
    }
}

/// What a process answers: each of the ways to read it ends, and what it says is written again as it was read.
#[cfg(any(test, fuzzing))]
pub(crate) fn fuzz(bytes: &[u8]) {
    let client = || -> io::Result<Client> {
        let (mut theirs, ours) = UnixStream::pair()?;
        // Less than the buffer of a socket holds, so that nobody waits.
        theirs.write_all(bytes.get(..100_000).unwrap_or(bytes))?;
        Ok(Client {
            stream: BufReader::new(ours),
            target: Target::Pid(1),
            pid: Pid::from_raw(1),
            process: None,
            pid_namespace: None,
            accepted: false,
            supervises: false,
            patience: SILENCE_MAX,
            patience_once_adopted: None,
        })
    };
    let (Ok(mut follows), Ok(asks), Ok(takes)) = (client(), client(), client()) else { return };
    let again = |event: &Event| {
        let write = |event: &Event| serde_json::to_string(event).unwrap_or_default();
        let read = |line: &str| serde_json::from_str(line).map(|event| write(&event)).unwrap_or_default();
        // The first reading may find claims in a stage that has none.
        let line = read(&write(event));
        assert!(!line.is_empty());
        assert_eq!(read(&line), line);
    };
    let result = follows.follow(&mut |answer| match answer {
        Answer::Accepted(accepted) => again(&Event::Accepted(accepted.clone())),
        Answer::Stage(stage) => again(&Event::Stage(stage.clone())),
    });
    if let Ok(Some(result)) = result {
        again(&Event::Result(result));
    }
    if let Ok(status) = asks.status() {
        again(&Event::Status(status.into()));
    }
    if let Ok((_, accepted)) = takes.take_over() {
        again(&Event::Accepted(accepted));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    /// Whoever watches a service asks it again and again, and nobody is let in while it is stopped.
    #[test]
    fn a_queue_that_is_full_is_not_waited_for_without_end() {
        let path = std::env::temp_dir().join(format!("handover-client-{}.sock", std::process::id()));
        let listener = Socket::new(Domain::UNIX, Type::STREAM, None).unwrap();
        listener.bind(&SockAddr::unix(&path).unwrap()).unwrap();
        listener.listen(0).unwrap();
        let soon = Duration::from_millis(50);
        let _first = connect_to(&path, soon).unwrap();
        let (tell, told) = mpsc::channel();
        let asked = path.clone();
        std::thread::spawn(move || tell.send(connect_to(&asked, soon).map_err(|error| error.kind()).map(drop)));
        assert_eq!(told.recv_timeout(Duration::from_secs(30)), Ok(Err(io::ErrorKind::WouldBlock)));
        fs::remove_file(&path).unwrap();
    }
}
