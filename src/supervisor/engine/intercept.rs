//! What a program's calls of `bind` and `listen` come to: its sockets are kept, and a later generation is given them in
//! place of its own.

use std::cell::LazyCell;
use std::collections::HashSet;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, RawFd};
use std::time::{Duration, Instant};

use nix::poll::PollFlags;
use nix::unistd::Pid;
use socket2::{SockRef, Socket};

use super::Supervisor;
use crate::listeners::{Address, kind_of};
use crate::protocol::{Claims, Kind};
use crate::supervisor::caller::Caller;
use crate::supervisor::family;
use crate::supervisor::interception::Interception;
use crate::supervisor::kept::{Found, carry_options_over, inode_of};
use crate::supervisor::machine::{Phase, Stage, WorkerId};
use crate::sys::Notification;

/// Between two looks at what cannot be answered, or is not bound yet.
const SETTLE_INTERVAL: Duration = Duration::from_millis(1);
/// Between two looks at whether the program still has what is kept for it; more where looking takes long.
const CLOSED_INTERVAL: Duration = Duration::from_secs(5);
/// How many times as long as a look the pause after it is at least.
const CLOSED_COST: u32 = 200;
/// Pids below that, which processes of a container have, are in many a name that means something else: `http2.sock`.
const SMALL_PIDS: i32 = 300;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Answer {
    /// The kernel does what was asked for.
    Pass,
    /// It is done.
    Done,
    /// Another worker is just doing it.
    Later,
}

impl Supervisor {
    pub(super) fn on_interception(&mut self, id: WorkerId, events: PollFlags) {
        let Some(worker) = self.workers.get_mut(&id) else { return };
        let Some(call) = worker.interception.as_mut().and_then(|interception| interception.next(events)) else {
            return;
        };
        if matches!(call.number, Some(libc::SYS_bind | libc::SYS_listen)) {
            worker.last_bound = Some(Instant::now());
        }
        self.answer_call(id, call);
    }

    /// Calls that waited for another worker.
    pub(super) fn answer_waiting_calls(&mut self) {
        let waiting = |worker: &mut crate::supervisor::worker::Worker| {
            worker
                .interception
                .as_mut()
                .map(|interception| std::mem::take(&mut interception.waiting))
                .unwrap_or_default()
        };
        let calls: Vec<(WorkerId, Notification)> = self
            .workers
            .iter_mut()
            .flat_map(|(id, worker)| waiting(worker).into_iter().map(|call| (*id, call)))
            .collect();
        for (id, call) in calls {
            self.answer_call(id, call);
        }
    }

    /// A worker is gone. What it has started may live on outside of its group: nothing is kept of that, and the kernel does
    /// what it asks for. Without anybody who answers all of its calls would fail (ENOSYS).
    pub(super) fn leave_to_kernel(&mut self, id: WorkerId, interception: Option<Interception>) {
        let Some(mut interception) = interception.filter(|interception| interception.fd().is_some()) else { return };
        let waiting = std::mem::take(&mut interception.waiting);
        interception.filter().into_iter().for_each(|filter| waiting.iter().for_each(|call| call.let_pass(filter)));
        self.survivors.insert(id, interception);
    }

    pub(super) fn on_call_of_survivor(&mut self, id: WorkerId, events: PollFlags) {
        let Some(interception) = self.survivors.get_mut(&id) else { return };
        let call = interception.next(events);
        call.iter().zip(interception.filter()).for_each(|(call, filter)| call.let_pass(filter));
        if interception.fd().is_none() {
            self.survivors.remove(&id);
        }
    }

    fn answer_call(&mut self, id: WorkerId, call: Notification) {
        self.comes_to("exec: call");
        let answer = self.decide(id, &call).unwrap_or_else(|error| {
            log::debug!("thread {} is left to the kernel: {error}", call.thread);
            Answer::Pass
        });
        let Some(interception) = self.workers.get_mut(&id).and_then(|worker| worker.interception.as_mut()) else {
            return;
        };
        let Some(filter) = interception.filter() else { return };
        match answer {
            Answer::Pass => call.let_pass(filter),
            Answer::Done => call.succeed(filter),
            Answer::Later if call.is_valid(filter) => interception.waiting.push(call),
            Answer::Later => {}
        }
    }

    fn decide(&mut self, id: WorkerId, call: &Notification) -> io::Result<Answer> {
        let Some(number) = call.number else {
            log::warn!(
                "thread {} runs a 32-bit program: what it listens on is not kept for its next build",
                call.thread
            );
            return Ok(Answer::Pass);
        };
        let Some(worker) = self.workers.get(&id) else { return Ok(Answer::Pass) };
        let Some(filter) = worker.interception.as_ref().and_then(|interception| interception.filter()) else {
            return Ok(Answer::Pass);
        };
        let [first, second, third, ..] = call.arguments;
        let fd = |argument: u64| argument as u32 as RawFd;
        // Some programs end every connection with one of these, or remove a great many files, so this is to be short.
        let concerns_nobody = match number {
            libc::SYS_bind | libc::SYS_listen => false,
            libc::SYS_shutdown => !self.is_listener_of(call.thread, fd(first)),
            _ => !self.sockets.has_path(),
        };
        if concerns_nobody {
            return Ok(Answer::Pass);
        }
        // From then on they are the program's own affair.
        if matches!(self.machine.phase(), Phase::Draining | Phase::Ended) {
            return Ok(Answer::Pass);
        }
        let caller = Caller::of_thread(call.thread)?;
        let is_ours = caller.is_of(worker.pid) && call.is_valid(filter);
        match number {
            _ if !is_ours => Ok(Answer::Pass),
            libc::SYS_bind => {
                let Some(address) = caller.address(second, third)? else { return Ok(Answer::Pass) };
                self.bind(id, call, &caller, fd(first), address)
            }
            libc::SYS_listen => self.listen(id, call, &caller, fd(first), second as i32),
            libc::SYS_shutdown => self.shut_down(id, call, &caller, fd(first)),
            #[cfg(target_arch = "x86_64")]
            libc::SYS_unlink => Ok(self.remove(&caller.path_at(None, first)?)),
            libc::SYS_unlinkat if third & libc::AT_REMOVEDIR as u64 == 0 => {
                let directory = Some(fd(first)).filter(|directory| *directory != libc::AT_FDCWD);
                Ok(self.remove(&caller.path_at(directory, second)?))
            }
            _ => Ok(Answer::Pass),
        }
    }

    fn bind(
        &mut self,
        id: WorkerId,
        call: &Notification,
        caller: &Caller,
        number: RawFd,
        address: Address,
    ) -> io::Result<Answer> {
        let own = caller.fd(number)?;
        let Some(kind) = kind_of(own.as_fd())? else { return Ok(Answer::Pass) };
        let inode = inode_of(own.as_fd())?;
        if self.sockets.kept.has(inode) {
            // A signal has interrupted the call, and it is made again; unless it is not bound yet.
            let is_bound = Address::of(own.as_fd()).is_ok_and(|bound| !is_any_port(&bound));
            return Ok(if is_bound { Answer::Done } else { Answer::Pass });
        }
        if is_any_port(&address) {
            if kind == Kind::Tcp {
                self.sockets.kept.expect_any_port(inode);
            }
            return Ok(Answer::Pass);
        }
        if is_of_one_process(&address, caller.pid) {
            return Ok(Answer::Pass);
        }
        if let Some(named) = self.sockets.named_at(kind, &address) {
            return self.give(id, call, caller, own.as_fd(), named.as_fd(), &address);
        }
        let worker = self.workers.get(&id).map(|worker| worker.pid);
        match self.sockets.kept.find(kind, &address, is_held_by(worker)) {
            Found::NotYet => Ok(Answer::Later),
            Found::Socket(socket) => {
                let kept = socket.fd().try_clone_to_owned()?;
                self.give(id, call, caller, own.as_fd(), kept.as_fd(), &address)
            }
            Found::Nothing => {
                if let Some(kept) = self.sockets.kept.overlap(kind, &address, own.as_fd()) {
                    log::warn!(
                        "process {} binds {address}, which overlaps {kept}: the kernel may refuse that",
                        caller.pid
                    );
                }
                // A program that serves binds datagram sockets for its own requests.
                if matches!(kind, Kind::Tcp | Kind::Unix) || self.is_starting(id) {
                    self.sockets.kept.expect(own, address)?;
                }
                Ok(Answer::Pass)
            }
        }
    }

    fn listen(
        &mut self,
        id: WorkerId,
        call: &Notification,
        caller: &Caller,
        number: RawFd,
        backlog: i32,
    ) -> io::Result<Answer> {
        let own = caller.fd(number)?;
        let Some(kind) = kind_of(own.as_fd())? else {
            log::warn!("process {} listens on a socket of a kind that is not kept for its next build", caller.pid);
            return Ok(Answer::Pass);
        };
        let inode = inode_of(own.as_fd())?;
        let any_port = self.sockets.kept.take_any_port(inode);
        if self.sockets.kept.has(inode) || SockRef::from(&own).is_listener()? {
            // The kernel sets the length of the queue that is asked for now.
            return Ok(Answer::Pass);
        }
        let Ok(address) = Address::of(own.as_fd()) else { return Ok(Answer::Pass) };
        if any_port {
            let worker = self.workers.get(&id).map(|worker| worker.pid);
            if let Found::Socket(socket) = self.sockets.kept.find_any_port(kind, &address, is_held_by(worker)) {
                let kept = socket.fd().try_clone_to_owned()?;
                let answer = self.give(id, call, caller, own.as_fd(), kept.as_fd(), &address)?;
                SockRef::from(&kept).listen(backlog)?;
                return Ok(answer);
            }
        }
        let address = match address {
            Address::Path(path) => Address::Path(caller.path(None, &path)),
            other => other,
        };
        if is_of_one_process(&address, caller.pid) {
            return Ok(Answer::Pass);
        }
        self.sockets.kept.expect_to_listen(own, address, any_port)?;
        Ok(Answer::Pass)
    }

    /// Puts the kept socket in the place of the one that the program has just made, wherever it has that.
    fn give(
        &self,
        id: WorkerId,
        call: &Notification,
        caller: &Caller,
        own: BorrowedFd<'_>,
        kept: BorrowedFd<'_>,
        address: &Address,
    ) -> io::Result<Answer> {
        let filter = self.workers.get(&id).and_then(|worker| worker.interception.as_ref()?.filter());
        let Some(filter) = filter else { return Ok(Answer::Pass) };
        for option in carry_options_over(own, kept, address) {
            log::warn!("process {} binds {address} with another {option} than before: it stays as it was", caller.pid);
        }
        replace(call, filter, caller, own, kept).inspect_err(|error| {
            log::error!("process {} cannot be given the socket at {address}: {error}", caller.pid);
        })?;
        log::debug!("process {} is given the socket at {address}", caller.pid);
        self.comes_to("exec: given");
        Ok(Answer::Done)
    }

    fn is_listener_of(&self, thread: Pid, number: RawFd) -> bool {
        let inode = std::fs::read_link(format!("/proc/{thread}/fd/{number}"));
        let inode = inode.ok().and_then(|link| family::socket_inode(&link));
        inode.is_some_and(|inode| self.sockets.has(inode))
    }

    /// Takes a listener from the program instead: to shut it down is to shut it down for all who have it. The program is left
    /// with a socket that does not listen, whose `accept` fails as it would now.
    fn shut_down(&self, id: WorkerId, call: &Notification, caller: &Caller, number: RawFd) -> io::Result<Answer> {
        let filter = self.workers.get(&id).and_then(|worker| worker.interception.as_ref()?.filter());
        let Some(filter) = filter else { return Ok(Answer::Pass) };
        let own = caller.fd(number)?;
        let socket = SockRef::from(&own);
        let shut = Socket::new(socket.domain()?, socket.r#type()?, None)?;
        replace(call, filter, caller, own.as_fd(), shut.as_fd())?;
        log::debug!("process {} has shut its listener {number} down, for itself alone", caller.pid);
        Ok(Answer::Done)
    }

    /// A path that clients know stays, whoever removes it, as long as it is served.
    fn remove(&mut self, path: &std::path::Path) -> Answer {
        // The new build may just have bound it.
        self.sockets.kept.settle();
        if self.sockets.is_at(path) { Answer::Done } else { Answer::Pass }
    }

    fn is_starting(&self, id: WorkerId) -> bool {
        self.machine.worker(id).is_some_and(|worker| worker.is_starting())
    }

    /// Inodes of all sockets of the generation that serves. None: not all of it does, or can be looked at.
    fn held_by_all(&self) -> Option<HashSet<u64>> {
        let generation = self.machine.generation();
        let serving = |worker: &crate::supervisor::machine::Worker| worker.generation == generation;
        let serve = self.machine.workers().filter(|(_, worker)| serving(worker));
        let (ids, stages): (Vec<WorkerId>, Vec<Stage>) = serve.map(|(id, worker)| (id, worker.stage)).unzip();
        // One that is started again will ask for them.
        if ids.len() < self.machine.wanted() || stages.iter().any(|stage| *stage != Stage::Ready) {
            return None;
        }
        let pids = ids.iter().filter_map(|id| self.workers.get(id)).map(|worker| worker.pid);
        let held: io::Result<Vec<Vec<u64>>> = pids.map(family::all_sockets).collect();
        let held = held.inspect_err(|error| log::debug!("cannot see which sockets the program has: {error}")).ok()?;
        Some(held.into_iter().flatten().collect())
    }

    /// What the generation that serves does not have the next one need not listen on. Where that cannot be seen, it is what it
    /// was committed with.
    pub(super) fn await_what_is_held(&mut self) {
        if let Some(held) = self.held_by_all() {
            self.sockets.kept.await_only(|inode| held.contains(&inode));
        }
    }

    /// Closes what no process of the generation that serves has, and says what that was.
    pub(super) fn close_unwanted(&mut self) -> Vec<String> {
        match self.held_by_all() {
            Some(held) => self.sockets.close_kept(|inode| held.contains(&inode), self.notifier.as_ref()),
            None => vec![],
        }
    }

    /// The new generation serves: says what it has kept, added and not asked for. One that says itself when it is ready may be
    /// about to ask for more, so the last is closed only after a while.
    pub(super) fn take_stock(&mut self) -> Option<Claims> {
        if !self.options.intercepts() {
            return None;
        }
        let held = self.held_by_all();
        let claims = self.sockets.kept.take_stock(held.as_ref());
        for address in &claims.unclaimed {
            log::info!(
                "the new build does not listen on {address}: if it has not in {CLOSED_INTERVAL:?}, that is closed"
            );
        }
        self.look_for_closed_later();
        Some(claims)
    }

    pub(super) fn look_for_closed_later(&mut self) {
        self.timers.closed = self.options.intercepts().then(|| Instant::now() + CLOSED_INTERVAL);
    }

    /// A program may close what it listens on while it serves. Then clients are to be refused, not left waiting.
    pub(super) fn look_for_closed(&mut self) {
        let begun = Instant::now();
        if self.machine.phase() == Phase::Serving {
            if self.draining_workers().is_empty() {
                self.sockets.forget_closed();
            }
            for address in self.close_unwanted() {
                log::info!("{address} is closed: the program does not listen there any more");
            }
        }
        self.timers.closed = Some(Instant::now() + CLOSED_INTERVAL.max(CLOSED_COST * begun.elapsed()));
    }

    /// When a call that waits is looked at again, or a socket that is being bound.
    pub(super) fn next_settling(&self) -> Option<Instant> {
        let waits = |worker: &crate::supervisor::worker::Worker| {
            worker.interception.as_ref().is_some_and(|interception| !interception.waiting.is_empty())
        };
        self.workers.values().any(waits).then(|| Instant::now() + SETTLE_INTERVAL)
    }
}

/// Whether a process has put its own pid into the name: no other will ever listen there.
fn is_of_one_process(address: &Address, pid: Pid) -> bool {
    let name = match address {
        Address::Path(path) => path.file_name().unwrap_or_default().as_encoded_bytes(),
        Address::Abstract(name) => name,
        Address::Ip(_) => return false,
    };
    let number = pid.to_string();
    let parts: Vec<&[u8]> = name.chunk_by(|byte, next| byte.is_ascii_digit() == next.is_ascii_digit()).collect();
    let part = |place: Option<usize>| place.and_then(|place| parts.get(place)).copied().unwrap_or_default();
    let mut places = parts.iter().enumerate().filter(|(_, part)| **part == number.as_bytes());
    places.any(|(place, _)| {
        pid.as_raw() >= SMALL_PIDS || is_surely_pid(part(place.checked_sub(1)), part(place.checked_add(1)))
    })
}

/// By what stands before and behind the number: it is the whole name but for an extension, or `pid` stands before it, or
/// dashes on both sides (.NET: `dotnet-diagnostic-PID-KEY-socket`).
fn is_surely_pid(before: &[u8], behind: &[u8]) -> bool {
    let is_stem = before.is_empty() && (behind.is_empty() || behind.starts_with(b"."));
    is_stem || before.ends_with(b"pid") || (before.ends_with(b"-") && behind.starts_with(b"-"))
}

/// Whether the worker, or what it has started, has a socket with that inode. It is looked only if somebody asks.
fn is_held_by(worker: Option<Pid>) -> impl Fn(u64) -> bool {
    let held = LazyCell::new(move || worker.map(family::sockets).unwrap_or_default());
    move |inode| held.contains(&inode)
}

/// Wherever the caller has its own socket.
fn replace(
    call: &Notification,
    filter: BorrowedFd<'_>,
    caller: &Caller,
    own: BorrowedFd<'_>,
    by: BorrowedFd<'_>,
) -> io::Result<()> {
    let numbers = caller.numbers_of(inode_of(own)?)?;
    // Whoever is told that it is done would go on with a socket that was never bound.
    if numbers.is_empty() {
        return Err(io::Error::other("it does not have its own socket any more"));
    }
    numbers.into_iter().try_for_each(|(number, cloexec)| call.replace_fd(filter, by, number, cloexec))
}

fn is_any_port(address: &Address) -> bool {
    matches!(address, Address::Ip(ip) if ip.port() == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_one_process() {
        let is = |path: &str| is_of_one_process(&Address::unix(path.as_ref()), Pid::from_raw(812));
        assert!(is("/run/handover/812.sock") && is("/tmp/.java_pid812") && is("@app-812-control"));
        assert!(!is("/run/8123.sock") && !is("/run/812/app.sock") && !is("/run/app.sock"));
        let in_container = |path: &str, pid: i32| is_of_one_process(&Address::unix(path.as_ref()), Pid::from_raw(pid));
        assert!(in_container("/tmp/.java_pid7", 7) && in_container("/run/7.sock", 7) && in_container("@7", 7));
        assert!(in_container("/tmp/dotnet-diagnostic-7-4711-socket", 7));
        assert!(!in_container("/run/app-v2.sock", 2) && !in_container("/run/http2.sock", 2));
        assert!(!in_container("/run/php/php8.2-fpm.sock", 8) && !in_container("/run/php/php8.2-fpm.sock", 2));
        assert!(!in_container("/run/2nd.sock", 2) && !in_container("/run/.java_pid77", 7));
        assert!(!is_of_one_process(&Address::Ip("127.0.0.1:812".parse().unwrap()), Pid::from_raw(812)));
    }
}
