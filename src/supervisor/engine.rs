//! The loop of a supervisor: it waits for whatever can happen, tells the machine, and does what the machine answers. It
//! decides nothing about generations, and it never blocks.

mod answers;
mod checks;
mod converse;
mod drain;
mod forward;
mod intercept;
mod manager;
mod perform;
mod reap;
mod replace;
mod report;
mod resume;
mod scale;
mod status;
mod take_over;

use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant, SystemTime};

use nix::poll::{PollFd, PollFlags};

use super::build::{Build, Recipe};
use super::connections::Counted;
use super::conversation::Conversation;
use super::interception::{self, Interception};
use super::machine::{Action, Event, Machine, Order, Phase, Policy, WorkerId};
use super::options::{Intercept, Options};
use super::output::{Output, Passed, Stream};
use super::sockets::Sockets;
use super::take_over::TakenOver;
use super::worker::Worker;
use crate::control::messages::LastUpgrade;
use crate::control::server::{ClientId, Server};
use crate::control::{BuildIdentity, UpgradeRequest};
use crate::engine::SignalPipe;
use crate::error::{Error, ErrorKind};
use crate::pid_file::PidFile;
use crate::poll;
use crate::systemd::Notifier;
use crate::upgrade::spawn::Started;

use answers::{Attempt, Requester, Verb};
use drain::Drain;
use forward::Forwarded;
use reap::{ChildSignals, Reaper};
use replace::Replacement;
use report::Report;
#[cfg(any(test, fuzzing))]
pub(crate) use resume::fuzz;
pub use resume::rehearse;
pub(super) use resume::{STATE_VARIABLE, resumed};
use scale::Scaling;

const MAX_DRAINING: usize = 4;
const ALIVE_INTERVAL: Duration = Duration::from_secs(1);

/// How the life of a supervisor ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ended {
    /// Connections that were still open when their worker was killed.
    pub cut: usize,
}

pub(super) struct Supervisor {
    options: Options,
    /// How this process itself was started.
    own: Started,
    machine: Machine,
    sockets: Sockets,
    workers: BTreeMap<WorkerId, Worker>,
    /// What workers that are gone have left in their pipes, or what they started still writes.
    leftovers: Vec<Output>,
    /// By which calls of what they have started still come, if that lives on.
    survivors: BTreeMap<WorkerId, Interception>,
    recipe: Recipe,
    /// Of the upgrade under way.
    new: Option<Build>,
    committed: Option<Build>,
    previous: Option<BuildIdentity>,
    attempt: Option<Attempt>,
    reports: Vec<Report>,
    /// Older generations that somebody waits for.
    drains: Vec<Drain>,
    stop_clients: Vec<(ClientId, Instant)>,
    scaling: Option<Scaling>,
    replacement: Option<Replacement>,
    /// The server that was to be replaced, until it has ended.
    taken_over: Option<TakenOver>,
    /// Which worker ended last, and how.
    last_exit: Option<(usize, String)>,
    last_upgrade: Option<LastUpgrade>,
    /// Why the last upgrade failed, if it did.
    last_failure: Option<String>,
    since: SystemTime,
    server: Server,
    signals: Option<SignalPipe>,
    forwarded: Forwarded,
    children: ChildSignals,
    notifier: Option<Notifier>,
    pid_file: Option<PidFile>,
    timers: Timers,
    /// Our own streams that take nothing: nothing is read for them.
    blocked: Vec<Stream>,
    cut: usize,
    last_count: Option<usize>,
    counted: Counted,
    reaper: Reaper,
    not_started: Option<Error>,
}

/// What a supervisor cannot be without.
struct Parts {
    options: Options,
    own: Started,
    machine: Machine,
    sockets: Sockets,
    recipe: Recipe,
    server: Server,
    signals: Option<SignalPipe>,
    forwarded: Forwarded,
    children: ChildSignals,
    pid_file: Option<PidFile>,
}

#[derive(Default)]
struct Timers {
    alive: Option<Instant>,
    drain_count: Option<Instant>,
    watchdog: Option<Instant>,
    /// When it is looked whether the program has closed what is kept for it.
    closed: Option<Instant>,
    taken_over: Option<Instant>,
}

/// What is polled.
#[derive(Clone, Copy)]
enum Source {
    Signals,
    Forwarded,
    Children,
    Listener,
    Client(ClientId),
    Notify(WorkerId),
    Channel(WorkerId),
    Conversation(WorkerId),
    Interception(WorkerId),
    Survivors(WorkerId),
    Output(WorkerId),
    Leftover,
    Ours(Stream),
    TakenOver,
    Rehearsal,
    RehearsalOutput,
}

impl Supervisor {
    pub(super) fn new(mut options: Options) -> Result<Self, Error> {
        let possible = if options.intercepts() { interception::check() } else { Ok(()) };
        if let Err(error) = possible {
            let is_seen = options.may_be_seen() && options.ready_command.is_none();
            if options.intercept == Intercept::On || is_seen {
                return Err(error);
            }
            // It says itself when it is ready, and may have no sockets at all.
            log::warn!("sockets that the program binds by itself are not kept: {error}");
            options.intercept = Intercept::Off;
        }
        let recipe = Recipe::new(options.program.clone(), options.arguments.clone());
        let failed = |error: std::io::Error| Error::io("install signal handlers", error);
        let children = ChildSignals::install().map_err(failed)?;
        let forwarded = Forwarded::install(options.hangup, recipe.ignored()).map_err(failed)?;
        let signals = SignalPipe::install(&forward::own_signals(options.hangup), recipe.ignored())?;
        let server = Server::bind(None)?;
        let made = Self::prepare(&options);
        let (sockets, pid_file) = made.inspect_err(|_| server.unlink())?;
        let machine = Machine::new(Policy {
            workers: options.workers.max(1),
            ready_timeout: options.ready_timeout,
            drain_timeout: options.drain_timeout,
            max_draining: MAX_DRAINING,
            overlap: options.overlap,
        });
        let own = Started::of_this_process();
        Ok(Self::assemble(Parts {
            options,
            own,
            machine,
            sockets,
            recipe,
            server,
            signals,
            forwarded,
            children,
            pid_file,
        }))
    }

    fn assemble(parts: Parts) -> Self {
        let Parts { options, own, machine, sockets, recipe, server, signals, forwarded, children, pid_file } = parts;
        Self {
            recipe,
            options,
            own,
            machine,
            sockets,
            workers: BTreeMap::new(),
            leftovers: vec![],
            survivors: BTreeMap::new(),
            new: None,
            committed: None,
            previous: None,
            attempt: None,
            reports: vec![],
            drains: vec![],
            stop_clients: vec![],
            scaling: None,
            replacement: None,
            taken_over: None,
            last_exit: None,
            last_upgrade: None,
            last_failure: None,
            since: SystemTime::now(),
            server,
            signals,
            forwarded,
            children,
            notifier: Notifier::from_environment(),
            pid_file,
            timers: Timers::default(),
            blocked: vec![],
            cut: 0,
            last_count: None,
            counted: Counted::default(),
            reaper: Reaper::default(),
            not_started: None,
        }
    }

    fn prepare(options: &Options) -> Result<(Sockets, Option<PidFile>), Error> {
        let listen = if options.take_over.is_some() { &[][..] } else { &options.listen };
        let mut sockets = Sockets::open(listen, options.non_blocking, options.intercepts())?;
        let is_seen = options.may_be_seen() && options.ready_command.is_none();
        if sockets.is_empty() && is_seen && !options.intercepts() {
            return Err(Error::new(
                ErrorKind::Invalid,
                "see when the program is ready",
                "it is given no listener to wait on",
            )
            .mend("name its address with --listen, or say with --ready how it tells"));
        }
        let pid_file = options.pid_file.as_deref().map(PidFile::new);
        pid_file.as_ref().map_or(Ok(()), PidFile::prepare).inspect_err(|_| sockets.remove_paths())?;
        Ok((sockets, pid_file))
    }

    pub(super) fn run(mut self) -> Result<Ended, Error> {
        if let Err(error) = self.find_server() {
            self.not_started = Some(error);
            return self.end();
        }
        match &self.taken_over {
            Some(_) if !self.options.overlap => self.tell_server_to_stop(),
            _ => self.start(),
        }
        self.run_on()
    }

    /// Until the end.
    pub(super) fn run_on(mut self) -> Result<Ended, Error> {
        while self.machine.phase() != Phase::Ended || !self.reports.is_empty() {
            let ready = self.wait();
            for (source, events) in ready {
                self.dispatch(source, events);
            }
            self.reap();
            self.restore_modes();
            self.answer_waiting_calls();
            self.look_at_workers();
            self.on_time(Instant::now());
            self.send_reports();
            self.look_at_scaling();
            self.end_drains();
            self.look_at_replacement();
        }
        self.end()
    }

    fn start(&mut self) {
        match self.recipe.build(&UpgradeRequest::default(), None) {
            Ok(build) => self.new = Some(build),
            Err(error) => {
                // Nobody has asked for a new build.
                let is_missing = error.cause_is(std::io::ErrorKind::NotFound);
                let error = error.with_tried(format!("start `{}`", self.options.program.display()));
                let mend = "is it installed? A name without a slash is looked for in PATH, as a shell does";
                self.not_started = Some(if is_missing { error.mend(mend) } else { error });
                return self.tell(Event::StopNow);
            }
        }
        let mut order = self.order(Verb::Upgrade, &UpgradeRequest::default());
        // There is nothing to go back to, unless another server runs until then.
        if self.taken_over.is_none() {
            order.trial = Duration::ZERO;
        }
        self.tell(Event::Start(order));
    }

    /// How it is done; the request goes before the options.
    fn order(&self, verb: Verb, request: &UpgradeRequest) -> Order {
        let ready_timeout = request.ready_timeout().unwrap_or(self.options.ready_timeout);
        match verb {
            Verb::Upgrade => Order {
                ready_timeout,
                trial: request.trial().unwrap_or(self.options.trial),
                drain_timeout: request.drain_timeout().unwrap_or(self.options.drain_timeout),
                step: self.options.surge.unwrap_or(usize::MAX),
                overlap: self.options.overlap,
            },
            Verb::Restart => Order {
                ready_timeout,
                // There is nobody to go back to.
                trial: Duration::ZERO,
                // Zero would be for ever.
                drain_timeout: (request.drain_before_restart() + request.kill_after()).max(Duration::from_millis(1)),
                step: usize::MAX,
                overlap: false,
            },
        }
    }

    /// An error of `poll` itself (out of memory) is retried after a moment.
    fn wait(&self) -> Vec<(Source, PollFlags)> {
        let (sources, mut fds): (Vec<_>, Vec<_>) = self.sources().into_iter().unzip();
        if let Err(error) = poll::wait_any(&mut fds, self.deadline()) {
            log::error!("poll: {error}");
            std::thread::sleep(Duration::from_millis(100));
            return vec![];
        }
        let found = fds.iter().map(|fd| fd.revents().unwrap_or(PollFlags::empty()));
        sources.into_iter().zip(found).filter(|(_, events)| !events.is_empty()).collect()
    }

    fn sources(&self) -> Vec<(Source, PollFd<'_>)> {
        let reads = |fd| PollFd::new(fd, PollFlags::POLLIN);
        let mut all =
            vec![(Source::Children, reads(self.children.fd())), (Source::Forwarded, reads(self.forwarded.fd()))];
        if let Some(signals) = &self.signals {
            all.push((Source::Signals, crate::channel::poll_fd(signals, PollFlags::POLLIN)));
        }
        all.extend(self.server.listener_poll().map(|fd| (Source::Listener, fd)));
        all.extend(self.server.client_polls().map(|(id, fd)| (Source::Client(id), fd)));
        for (id, worker) in &self.workers {
            all.push((Source::Notify(*id), crate::channel::poll_fd(&worker.notify, PollFlags::POLLIN)));
            let channel = worker.channel.as_ref().and_then(|channel| channel.fd());
            all.extend(channel.map(|fd| (Source::Channel(*id), reads(fd))));
            let conversation = worker.conversation.as_ref().map(Conversation::poll_fd);
            all.extend(conversation.map(|fd| (Source::Conversation(*id), fd)));
            let interception = worker.interception.as_ref().and_then(Interception::poll_fd);
            all.extend(interception.map(|fd| (Source::Interception(*id), fd)));
        }
        let survivors = self.survivors.iter().filter_map(|(id, one)| Some((Source::Survivors(*id), one.poll_fd()?)));
        all.extend(survivors);
        let blocked = Stream::ALL.into_iter().filter(|stream| self.blocked.contains(stream));
        all.extend(blocked.map(|stream| (Source::Ours(stream), PollFd::new(stream.fd(), PollFlags::POLLOUT))));
        let outputs =
            self.workers.iter().flat_map(|(id, worker)| worker.outputs().map(|one| (Source::Output(*id), one)));
        let outputs = outputs.chain(self.leftovers.iter().map(|output| (Source::Leftover, output)));
        let server = self.taken_over.iter().filter(|server| server.is_told);
        all.extend(server.flat_map(|server| server.fds()).map(|fd| (Source::TakenOver, reads(fd))));
        if let Some(replacement) = &self.replacement {
            all.extend(replacement.fds().map(|fd| (Source::Rehearsal, reads(fd))));
        }
        let of_rehearsal = self.replacement.iter().map(|replacement| (Source::RehearsalOutput, &replacement.stderr));
        let free = outputs.chain(of_rehearsal).filter(|(_, output)| !self.blocked.contains(&output.stream));
        all.extend(free.filter_map(|(source, output)| Some((source, reads(output.fd()?)))));
        all
    }

    fn deadline(&self) -> Option<Instant> {
        let timers = [self.timers.alive, self.timers.drain_count, self.timers.watchdog];
        let more = [self.timers.closed, self.timers.taken_over, self.sockets.kept.next_look()];
        let others = [self.machine.deadline(), self.server.next_deadline(), self.next_settling()];
        let looks = self.workers.values().filter_map(|worker| worker.next_look);
        let dismissed = self.workers.values().filter_map(|worker| worker.dismissed);
        let reports = self.reports.iter().map(|report| report.deadline);
        let others = others.into_iter().chain([self.replacement.as_ref().map(|replacement| replacement.deadline)]);
        timers.into_iter().chain(more).chain(others).flatten().chain(looks).chain(dismissed).chain(reports).min()
    }

    fn dispatch(&mut self, source: Source, events: PollFlags) {
        match source {
            Source::Signals | Source::Forwarded => self.on_signals(),
            // Whoever has ended is looked for in any case.
            Source::Children => self.children.clear(),
            Source::Listener => self.server.accept(),
            Source::Client(id) => self.on_client(id, events),
            Source::Notify(id) => self.workers.get_mut(&id).into_iter().for_each(Worker::read_notify),
            Source::Channel(id) => self.workers.get_mut(&id).into_iter().for_each(Worker::read_channel),
            Source::Conversation(id) => self.read_conversation(id),
            Source::Interception(id) => self.on_interception(id, events),
            Source::Survivors(id) => self.on_call_of_survivor(id, events),
            Source::Output(id) => {
                self.blocked.extend(self.workers.get_mut(&id).map(Worker::pass_on).unwrap_or_default());
            }
            Source::Leftover => {
                let full = self
                    .leftovers
                    .iter_mut()
                    .filter_map(|output| (output.pass_on() == Passed::Blocked).then_some(output.stream));
                self.blocked.extend(full);
                self.leftovers.retain(|output| output.fd().is_some());
            }
            Source::TakenOver => self.look_at_server(),
            Source::Rehearsal => self.read_rehearsal(),
            Source::RehearsalOutput => {
                let passed = self.replacement.as_mut().map(|replacement| replacement.stderr.pass_on());
                self.blocked.extend(passed.filter(|passed| *passed == Passed::Blocked).map(|_| Stream::Stderr));
            }
            Source::Ours(stream) => {
                self.blocked.retain(|blocked| *blocked != stream);
                self.pass_on_the_rest();
            }
        }
    }

    /// What was read of the workers and not taken by our own streams, in whose pipes there may be no more.
    fn pass_on_the_rest(&mut self) {
        self.blocked.extend(self.workers.values_mut().flat_map(Worker::pass_on));
        let of_replacement = self.replacement.iter_mut().map(|replacement| &mut replacement.stderr);
        let others = self.leftovers.iter_mut().chain(of_replacement);
        self.blocked.extend(others.filter_map(|output| (output.pass_on() == Passed::Blocked).then_some(output.stream)));
        self.leftovers.retain(|output| output.fd().is_some());
    }

    fn on_signals(&mut self) {
        self.has_caught_signal();
    }

    /// Handles what has come.
    fn has_caught_signal(&mut self) -> bool {
        let forwarded = self.forward_signals();
        let Some(signals) = &mut self.signals else { return forwarded };
        let caught = signals.take();
        if caught.upgrade {
            log::info!("upgrade asked for by signal");
            self.begin(Verb::Upgrade, &UpgradeRequest::default(), Requester::Nobody);
        }
        for _ in 0..caught.stops {
            let again = self.machine.phase() == Phase::Draining;
            log::info!("told to stop by signal{}", if again { " again" } else { "" });
            self.tell(if again { Event::StopNow } else { Event::Stop(None) });
        }
        forwarded || caught.upgrade || caught.stops > 0
    }

    fn on_time(&mut self, now: Instant) {
        if self.machine.deadline().is_some_and(|deadline| deadline <= now) {
            // Where it was this process that stood still, what workers have said lies there unread.
            self.hear_workers();
            self.look_at_workers();
            self.look_at_those_that_stand_still();
            self.tell(Event::Tick);
        }
        if passed(&mut self.timers.drain_count, now) {
            self.announce_drain_count();
        }
        if passed(&mut self.timers.alive, now) {
            self.say_alive();
        }
        if passed(&mut self.timers.taken_over, now) {
            self.cut_server();
        }
        if self.sockets.kept.next_look().is_some_and(|next| next <= now) {
            self.sockets.kept.settle();
        }
        if passed(&mut self.timers.closed, now) {
            self.look_for_closed();
        }
        if passed(&mut self.timers.watchdog, now) {
            self.ping_watchdog();
        }
        if self.workers.values().any(|worker| worker.dismissed.is_some()) {
            self.look_at_dismissed(now);
        }
        self.server.drop_late(now);
    }

    /// Runs the machine, and whatever follows from what it wants done.
    fn tell(&mut self, event: Event) {
        let mut events = VecDeque::from([event]);
        while let Some(event) = events.pop_front() {
            let actions = self.machine.on_event(event, Instant::now());
            if actions.iter().any(|action| matches!(action, Action::Stop(_))) {
                self.announce_stops();
            }
            for action in actions {
                events.extend(self.perform(action));
            }
        }
    }

    fn end(mut self) -> Result<Ended, Error> {
        Self::leave_server_alone(&mut self.sockets, self.taken_over.take());
        self.sockets.remove_paths();
        if let Some(pid_file) = &self.pid_file {
            pid_file.discard();
            pid_file.remove();
        }
        self.server.unlink();
        match self.not_started {
            Some(error) => Err(error),
            None => Ok(Ended { cut: self.cut }),
        }
    }
}

/// Takes a deadline that has passed.
fn passed(place: &mut Option<Instant>, now: Instant) -> bool {
    place.take_if(|deadline| *deadline <= now).is_some()
}
