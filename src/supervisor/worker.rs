//! One process of the program, with everything that leads to it.

use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::path::Path;
use std::time::{Duration, Instant, SystemTime};

use nix::sys::signal::{Signal, kill, killpg};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

use super::build::Build;
use super::conversation::{Conversation, Terms};
use super::interception::Interception;
use super::node_channel::NodeChannel;
use super::notify::NotifySocket;
use super::options::{Options, Ready};
use super::output::{Output, Passed, Stream};
use super::seen::{Look, Watched};
use super::sockets::{FIRST_FD, Sockets};
use super::trampoline;
use crate::error::Error;
use crate::protocol::CHANNEL_VARIABLE;
use crate::{saved, sys};

/// Looking costs; the longer it takes, the less it matters that it is seen at once.
const LOOK_INTERVAL_MIN: Duration = Duration::from_millis(1);
const LOOK_INTERVAL_MAX: Duration = Duration::from_millis(50);
/// One that is not seen to wait by then may have too much to do for that.
const BUSY_AFTER: Duration = Duration::from_millis(100);

#[derive(Serialize, Deserialize)]
pub(super) struct Worker {
    /// Not reaped yet, so nobody else has it.
    #[serde(with = "saved::pid")]
    pub(super) pid: Pid,
    pub(super) slot: usize,
    pub(super) since: SystemTime,
    #[serde(with = "saved::moment")]
    spawned: Instant,
    pub(super) notify: NotifySocket,
    pub(super) channel: Option<NodeChannel>,
    pub(super) stderr: Output,
    /// Only with a prefix; otherwise the program has ours.
    pub(super) stdout: Option<Output>,
    /// What decides on the sockets that it binds.
    pub(super) interception: Option<Interception>,
    /// When it has last bound one.
    #[serde(with = "saved::moment::option")]
    pub(super) last_bound: Option<Instant>,
    /// Until the upgrade that it was started for is over.
    #[serde(skip)]
    pub(super) conversation: Option<Conversation>,
    said_ready: bool,
    /// What it has asked for, and has not been given yet.
    #[serde(skip)]
    pub(super) more_time: Option<Duration>,
    sent_ready: bool,
    /// What it last said about itself.
    pub(super) status: Option<String>,
    /// When it is looked at again.
    #[serde(with = "saved::moment::option")]
    pub(super) next_look: Option<Instant>,
    /// What it was not seen to wait on.
    missing: Vec<String>,
    denied: bool,
    /// How it was proved that it can serve.
    pub(super) proof: Option<String>,
    /// The run of --ready-cmd under way.
    #[serde(with = "saved::pid::option")]
    pub(super) check: Option<Pid>,
    /// Until then it may end by itself, after it was given up.
    #[serde(with = "saved::moment::option")]
    pub(super) dismissed: Option<Instant>,
    /// Connections that it had when it was last counted, which is before it is told to stop and now and then after that.
    pub(super) open: usize,
    /// How it ended.
    pub(super) exit: Option<String>,
    /// Why it was killed, if it was started again after a crash, or beside others, and has not become ready.
    #[serde(default)]
    pub(super) not_ready: Option<String>,
}

/// What one worker is started as.
pub(super) struct Place<'a> {
    pub(super) build: &'a Build,
    pub(super) generation: u64,
    pub(super) slot: usize,
    /// What is offered to it, if the program may understand that.
    pub(super) terms: Option<Terms>,
}

impl Worker {
    pub(super) fn start(place: &Place<'_>, options: &Options, sockets: &Sockets) -> Result<Self, Error> {
        let plan = &place.build.plan;
        let failed = |error: io::Error| Error::io(format!("start `{}`", plan.program.display()), error);
        let uid = options.user.as_deref().map(trampoline::find_user).transpose()?.map(|user| user.uid.as_raw());
        let notify = NotifySocket::new(uid).map_err(failed)?;
        let prefix = options.log_prefix.then(|| format!("{}.{} | ", place.generation, place.slot));
        let (stderr, stderr_of_worker) = Output::pipe(Stream::Stderr, prefix.clone()).map_err(failed)?;
        let stdout = prefix.map(|prefix| Output::pipe(Stream::Stdout, Some(prefix))).transpose().map_err(failed)?;
        let (stdout, stdout_of_worker) = stdout.unzip();
        let channel = options.wants_node_channel().then(NodeChannel::pair).transpose().map_err(failed)?;
        let (channel, channel_of_worker) = channel.unzip();
        let interception = options.intercepts().then(Interception::begin).transpose().map_err(failed)?;
        let (interception, of_trampoline) = interception.unzip();
        let (conversation, its_end) = place.terms.map(Conversation::begin).transpose().map_err(failed)?.unzip();

        let mut environment = sockets.environment(place.generation);
        let mut set = |name: &str, value: String| environment.push((name.to_owned(), value));
        set("NOTIFY_SOCKET", notify.variable().map_err(failed)?);
        set("HANDOVER_GENERATION", place.generation.to_string());
        set("HANDOVER_WORKER", place.slot.to_string());
        let mut fds = Fds::default();
        let listeners = sockets.fds();
        for listener in &listeners {
            fds.add(listener.as_fd());
        }
        if let Some(channel) = &channel_of_worker {
            set("NODE_CHANNEL_FD", fds.add(channel.as_fd()).to_string());
            set("NODE_CHANNEL_SERIALIZATION_MODE", "json".to_owned());
        }
        if let Some(its_end) = &its_end {
            let inode = nix::sys::stat::fstat(its_end).map_err(|error| failed(error.into()))?.st_ino;
            set(CHANNEL_VARIABLE, format!("{}:{inode}", fds.add(its_end.as_fd())));
        }
        let filter = of_trampoline.as_ref().map(|socket| fds.add(socket.as_fd()));
        fds.fds.push((stderr_of_worker.as_fd(), Stream::Stderr.number()));
        fds.fds.extend(stdout_of_worker.as_ref().map(|pipe| (pipe.as_fd(), Stream::Stdout.number())));
        let environment: Vec<(OsString, OsString)> =
            environment.into_iter().map(|(name, value)| (name.into(), value.into())).collect();
        let arguments = trampoline::arguments(options.user.as_deref(), filter, &plan.program, &plan.argv);
        let copies = fds.copies().map_err(failed)?;
        let places = fds.fds.iter().zip(&copies);
        let fds = places.map(|((fd, number), copy)| (copy.as_ref().map_or(*fd, AsFd::as_fd), *number)).collect();
        let pid = plan.run(Path::new(trampoline::PROGRAM), &arguments, &environment, fds)?;
        let now = Instant::now();
        Ok(Self {
            pid,
            slot: place.slot,
            since: SystemTime::now(),
            spawned: now,
            notify,
            channel,
            stderr,
            stdout,
            interception,
            last_bound: None,
            conversation,
            said_ready: false,
            more_time: None,
            sent_ready: false,
            status: None,
            next_look: options.may_be_seen().then(|| now + LOOK_INTERVAL_MIN),
            missing: vec![],
            denied: false,
            proof: None,
            check: None,
            dismissed: None,
            open: 0,
            exit: None,
            not_ready: None,
        })
    }

    pub(super) fn read_notify(&mut self) {
        let said = self.notify.read();
        self.said_ready |= said.ready;
        self.more_time = said.more_time.or(self.more_time);
        self.status = said.status.or(self.status.take());
    }

    pub(super) fn read_channel(&mut self) {
        let messages = self.channel.as_mut().map(NodeChannel::read).unwrap_or_default();
        self.sent_ready |= messages.iter().any(|message| message == "ready");
    }

    /// What it is talked to by.
    pub(super) fn fds(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        let channel = self.channel.as_ref().and_then(NodeChannel::fd);
        let filter = self.interception.as_ref().and_then(Interception::fd);
        let filter_and_channel = filter.into_iter().chain(channel);
        std::iter::once(self.notify.as_fd()).chain(filter_and_channel).chain(self.outputs().filter_map(Output::fd))
    }

    pub(super) fn outputs(&self) -> impl Iterator<Item = &Output> {
        std::iter::once(&self.stderr).chain(&self.stdout)
    }

    pub(super) fn into_outputs(self) -> impl Iterator<Item = Output> {
        std::iter::once(self.stderr).chain(self.stdout)
    }

    /// Passes on what it has written; those of our streams that take no more.
    pub(super) fn pass_on(&mut self) -> Vec<Stream> {
        let outputs = std::iter::once(&mut self.stderr).chain(&mut self.stdout);
        outputs.filter_map(|output| (output.pass_on() == Passed::Blocked).then_some(output.stream)).collect()
    }

    /// Whether it can serve, by what it has said or by what is seen now.
    pub(super) fn look(&mut self, ready: Ready, ready_delay: Option<Duration>, listeners: &[Watched], now: Instant) {
        if self.proof.is_some() {
            return;
        }
        if self.conversation.as_ref().is_some_and(Conversation::is_adopted) {
            // It says so itself, and accepts only then.
            self.next_look = None;
            return;
        }
        let listens_for = |delay: Duration| self.last_bound.is_some_and(|last| now >= last + delay);
        let accepts = |way: Ready| ready == Ready::Any || ready == way;
        if self.said_ready && accepts(Ready::Notify) {
            self.proof = Some("said READY=1".to_owned());
        } else if self.sent_ready && accepts(Ready::Message) {
            self.proof = Some("sent `ready`".to_owned());
        } else if self.next_look.take_if(|next| *next <= now).is_some() {
            if let Some(delay) = ready_delay.filter(|delay| listens_for(*delay)) {
                self.proof = Some(format!("has bound nothing more for {delay:?}"));
                return;
            }
            self.proof = self.is_seen(listeners);
            let interval = (now.duration_since(self.spawned) / 8).clamp(LOOK_INTERVAL_MIN, LOOK_INTERVAL_MAX);
            self.next_look = self.proof.is_none().then(|| Instant::now() + interval);
        }
    }

    /// Whether it may accept at this moment.
    pub(super) fn waits_on_any(&self, listeners: &[Watched]) -> bool {
        let inodes: Vec<u64> = listeners.iter().map(|one| one.inode).collect();
        !Look::at(self.pid, &inodes).waited_on.is_empty()
    }

    fn is_seen(&mut self, listeners: &[Watched]) -> Option<String> {
        let inodes: Vec<u64> = listeners.iter().map(|one| one.inode).collect();
        let mut look = Look::at(self.pid, &inodes);
        let counts = |one: &&Watched| one.is_awaited || look.held.contains(&one.inode);
        let listeners: Vec<&Watched> = listeners.iter().filter(counts).collect();
        if self.spawned.elapsed() > BUSY_AFTER {
            look.at_connections(self.pid, &listeners);
        }
        let missing = listeners.iter().filter(|one| !look.waited_on.contains(&one.inode));
        self.missing = missing.map(|one| one.name.clone()).collect();
        self.denied = look.denied.is_some();
        let names: Vec<&str> = listeners.iter().map(|one| one.name.as_str()).collect();
        (self.missing.is_empty() && !names.is_empty()).then(|| format!("waits on {}", names.join(", ")))
    }

    /// Why it is not ready yet, as far as it can be told.
    pub(super) fn why_not_ready(&self, ready: Ready) -> String {
        let status = self.status.as_ref().map(|status| format!(" (it last said: {status})")).unwrap_or_default();
        let cause = match ready {
            _ if self.proof.is_some() => "--ready-cmd has not succeeded".to_owned(),
            _ if self.conversation.as_ref().is_some_and(Conversation::is_adopted) => {
                "it has not called `ready`".to_owned()
            }
            Ready::Notify => "it has not said READY=1".to_owned(),
            Ready::Message => "it has not sent `ready`".to_owned(),
            Ready::Any | Ready::Waits if self.denied => {
                "it may not be looked at (it runs as another user): let it say READY=1".to_owned()
            }
            Ready::Any | Ready::Waits if self.missing.is_empty() => "it has listened on nothing".to_owned(),
            Ready::Any | Ready::Waits => format!("it does not wait for connections on {}", self.missing.join(", ")),
        };
        format!("{cause}{status}")
    }

    /// By message where that is how it is told, else by signal.
    pub(super) fn tell_to_stop(&mut self, options: &Options) {
        if let (Some(message), Some(channel)) = (&options.stop_message, &mut self.channel) {
            match channel.send(message) {
                Ok(()) => return,
                Err(error) => log::warn!("process {} is told to stop by signal: {error}", self.pid),
            }
        }
        // ESRCH: it has just ended, and is reaped in a moment.
        let _ = kill(self.pid, options.stop_signal.0);
    }

    /// With everything that it has started and that has stayed in its group. Only for one that is not reaped: nobody else
    /// can have its number, as a process or as a group.
    pub(super) fn kill(&mut self) {
        self.next_look = None;
        // One that has just been spawned has no group of its own yet.
        let _ = killpg(self.pid, Signal::SIGKILL);
        let _ = kill(self.pid, Signal::SIGKILL);
        if let Some(check) = self.check {
            let _ = kill(check, Signal::SIGKILL);
        }
    }
}

/// Fds for a new process, with the numbers that they will have there.
#[derive(Default)]
struct Fds<'a> {
    fds: Vec<(BorrowedFd<'a>, RawFd)>,
}

impl<'a> Fds<'a> {
    /// The next number.
    fn add(&mut self, fd: BorrowedFd<'a>) -> RawFd {
        let number = FIRST_FD + RawFd::try_from(self.fds.len()).unwrap_or(RawFd::MAX - FIRST_FD);
        self.fds.push((fd, number));
        number
    }

    /// Copies of those whose number another is to have: they are put in their places one after the other.
    fn copies(&self) -> io::Result<Vec<Option<OwnedFd>>> {
        let last = self.fds.iter().map(|(_, number)| *number).max().unwrap_or_default();
        let is_in_the_way = |fd: &BorrowedFd<'_>| fd.as_raw_fd() <= last;
        let copy = |fd: &BorrowedFd<'_>| is_in_the_way(fd).then(|| sys::dup_at_least(*fd, last + 1)).transpose();
        self.fds.iter().map(|(fd, _)| copy(fd)).collect()
    }
}
