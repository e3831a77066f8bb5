//! The thread that drives both state machines: it waits for whatever can happen, tells the machine, and does what the
//! machine answers. Nothing here decides about stages; nothing here blocks.

pub(crate) mod advice;
mod announce;
mod attempt;
mod manager;
mod new_process;
mod new_side;
mod old_side;
mod restart;
mod signals;

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::mpsc::Sender;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags};

use crate::channel::poll_fd;
use crate::control::UpgradeRequest;
use crate::control::messages::{AcceptedEvent, Event as Said, LastUpgrade, Outcome, Request, ResultEvent, Wait};
use crate::control::server::{Asked, ClientId, Server};
use crate::inherit::receive::Handed;
use crate::inherit::{self, Inherit};
use crate::pid_file::PidFile;
use crate::poll;
use crate::protocol::DrainingGeneration;
use crate::shared::Shared;
use crate::systemd::Notifier;
use crate::upgrade::{self, Origin, Refusal, Timer, Upgrade};

#[cfg(feature = "cli")]
pub(crate) use announce::{listener_status, queue_of};
use attempt::{Attempt, Process, Report, Requester};
#[cfg(feature = "cli")]
pub(crate) use attempt::{milliseconds_since, stands_still};
use new_side::Upstream;
use restart::Restarted;
pub(crate) use signals::SignalPipe;

const ALIVE_INTERVAL: Duration = Duration::from_secs(1);
const DRAIN_COUNT_INTERVAL: Duration = Duration::from_millis(100);
/// How long the application may take to let go of connections that were cut.
const CUT_GRACE: Duration = Duration::from_secs(1);
/// A century, which nobody waits for: so that no sum of times overflows.
const LONGEST: Duration = Duration::from_secs(100 * 365 * 24 * 60 * 60);

/// What the application asks of the engine.
pub(crate) enum Command {
    Ready,
    StillStarting(String),
    GiveUp(String),
    Upgrade(Box<UpgradeRequest>, Sender<ResultEvent>),
    Stop(Option<Duration>),
    DrainHooksDone,
    /// The handle is gone: the process is about to end, or has no use for us.
    Quit,
}

pub(crate) struct Engine {
    shared: Arc<Shared>,
    inherit: Inherit,
    upgrade: Upgrade,
    /// The old process, while it may still speak.
    upstream: Option<Upstream>,
    /// Somebody waits for this process to serve after a restart.
    restarted: Option<Restarted>,
    /// The upgrade under way, or the last one while its requester waits for the drain.
    attempt: Option<Attempt>,
    /// New processes that are settled: only their end is of interest, so that no zombie stays.
    successors: Vec<Process>,
    /// Failed upgrades whose last words are still being collected.
    reports: Vec<Report>,
    older: Vec<(DrainingGeneration, Process)>,
    server: Option<Server>,
    signals: Option<SignalPipe>,
    stop_clients: Vec<(ClientId, Instant)>,
    last_upgrade: Option<LastUpgrade>,
    timers: Timers,
    drain: Drain,
    notifier: Option<Notifier>,
    pid_file: Option<PidFile>,
    quit: bool,
}

#[derive(Default)]
struct Timers {
    ready: Option<Instant>,
    trial: Option<Instant>,
    drain: Option<Instant>,
    alive: Option<Instant>,
    drain_count: Option<Instant>,
    accepting: Option<Instant>,
    cut_grace: Option<Instant>,
    watchdog: Option<Instant>,
    notice: Option<Instant>,
    restarted: Option<Instant>,
}

impl Timers {
    fn place(&mut self, timer: Timer) -> &mut Option<Instant> {
        match timer {
            Timer::Ready => &mut self.ready,
            Timer::Trial => &mut self.trial,
            Timer::Drain => &mut self.drain,
        }
    }

    fn next(&self) -> Option<Instant> {
        let of_upgrade = [self.ready, self.trial, self.drain, self.accepting];
        let others = [self.alive, self.drain_count, self.cut_grace, self.watchdog, self.notice, self.restarted];
        of_upgrade.into_iter().chain(others).flatten().min()
    }
}

/// A deadline. The application chooses its times, and some say by the longest that there is that they want none.
fn after(time: Duration) -> Instant {
    Instant::now() + time.min(LONGEST)
}

/// Takes a deadline that has passed.
fn passed(place: &mut Option<Instant>, now: Instant) -> bool {
    place.take_if(|deadline| *deadline <= now).is_some()
}

#[derive(Default)]
struct Drain {
    /// Of the stop or the upgrade that began it, where that names one.
    timeout: Option<Duration>,
    upgraded: bool,
    hooks_done: bool,
    cut: Option<usize>,
    cut_at: Option<Instant>,
    last_count: Option<usize>,
}

/// What the engine polls.
#[derive(Clone, Copy)]
enum Source {
    Commands,
    Signals,
    Upstream,
    Channel,
    NewProcess,
    Listener,
    Client(ClientId),
    /// Its end is looked for in any case.
    Other,
}

impl Engine {
    pub(crate) fn new(
        shared: Arc<Shared>,
        handed: Option<Handed>,
        server: Option<Server>,
        signals: Option<SignalPipe>,
    ) -> Self {
        let (mut upstream, mut older, mut restart) = (None, vec![], None);
        if let Some(Handed { channel, adopted, pulled_from, parts }) = handed {
            older = new_side::watch_older(parts.older);
            upstream = channel.map(|channel| Upstream::new(channel, adopted, parts.stderr, pulled_from));
            restart = parts.restart;
        }
        let mut engine = Self {
            inherit: Inherit::new(upstream.is_some()),
            upgrade: Upgrade::new(),
            upstream,
            restarted: None,
            attempt: None,
            successors: vec![],
            reports: vec![],
            older,
            server,
            signals,
            stop_clients: vec![],
            last_upgrade: None,
            timers: Timers::default(),
            drain: Drain::default(),
            notifier: Notifier::from_environment(),
            pid_file: shared.config.pid_file.as_deref().map(PidFile::new),
            quit: false,
            shared,
        };
        if let Some(restart) = restart {
            engine.continue_restart(restart);
        }
        engine
    }

    pub(crate) fn run(mut self) {
        if let Some(signals) = &self.signals {
            signals.unblock_in_this_thread();
        }
        self.answer_offer();
        while !self.quit {
            let ready = self.wait();
            for (source, events) in ready {
                self.dispatch(source, events);
            }
            self.reap();
            self.on_time(Instant::now());
            self.send_reports();
            self.check_idle();
        }
        self.end();
    }

    /// Waits for something to happen. An error of `poll` itself (out of memory) is retried after a moment.
    fn wait(&self) -> Vec<(Source, PollFlags)> {
        let (sources, mut fds) = self.sources();
        if let Err(error) = poll::wait_any(&mut fds, self.deadline()) {
            log::error!("poll: {error}");
            std::thread::sleep(Duration::from_millis(100));
            return vec![];
        }
        let found = fds.iter().map(|fd| fd.revents().unwrap_or(PollFlags::empty()));
        sources.into_iter().zip(found).filter(|(_, events)| !events.is_empty()).collect()
    }

    fn sources(&self) -> (Vec<Source>, Vec<PollFd<'_>>) {
        let mut all: Vec<(Source, PollFd<'_>)> =
            vec![(Source::Commands, poll_fd(&self.shared.wake, PollFlags::POLLIN))];
        if let Some(signals) = &self.signals {
            all.push((Source::Signals, poll_fd(signals, PollFlags::POLLIN)));
        }
        if let Some(upstream) = &self.upstream {
            all.push((Source::Upstream, poll_fd(&upstream.channel, upstream.channel.interest())));
        }
        if let Some(attempt) = &self.attempt {
            if let Some(channel) = &attempt.channel {
                all.push((Source::Channel, poll_fd(channel, channel.interest())));
            }
            if let Some(process) = &attempt.process {
                all.push((Source::NewProcess, poll_fd(process, PollFlags::POLLIN)));
            }
        }
        let others = self.successors.iter().chain(self.older.iter().map(|(_, process)| process));
        let reported = self.reports.iter().filter_map(|report| report.process.as_ref());
        all.extend(others.chain(reported).map(|process| (Source::Other, poll_fd(process, PollFlags::POLLIN))));
        if let Some(server) = &self.server {
            all.extend(server.listener_poll().map(|fd| (Source::Listener, fd)));
            all.extend(server.client_polls().map(|(id, fd)| (Source::Client(id), fd)));
        }
        all.into_iter().unzip()
    }

    fn deadline(&self) -> Option<Instant> {
        let reports = self.reports.iter().map(|report| report.deadline).min();
        let clients = self.server.as_ref().and_then(Server::next_deadline);
        [self.timers.next(), reports, clients].into_iter().flatten().min()
    }

    fn dispatch(&mut self, source: Source, events: PollFlags) {
        match source {
            Source::Commands => self.on_commands(),
            Source::Signals => self.on_signals(),
            Source::Upstream => self.read_upstream(),
            Source::Channel => self.read_channel(),
            Source::NewProcess => self.on_new_process_end(),
            Source::Listener => {
                if let Some(server) = &mut self.server {
                    server.accept();
                }
            }
            Source::Client(id) => self.on_client(id, events),
            Source::Other => {}
        }
    }

    fn on_commands(&mut self) {
        let _ = self.shared.wake.read();
        if self.inherit.stage() == inherit::Stage::Trial && self.timers.accepting.is_none() {
            // Listeners may be waited on one by one, and there may be thousands: told together.
            self.timers.accepting = Some(Instant::now() + Duration::from_millis(10));
        }
        while let Some(command) = self.shared.next_command() {
            match command {
                Command::Ready => self.on_app_ready(),
                Command::StillStarting(reason) => {
                    self.tell_manager_of_start(&reason);
                    self.restart_is_still_starting(&reason);
                    self.tell_new_side_with(inherit::Event::AppStillStarting, reason);
                }
                Command::GiveUp(reason) => self.tell_new_side_with(inherit::Event::AppGaveUp, reason),
                Command::Upgrade(request, reply) => {
                    self.begin(*request, Origin::Push, Requester::Application(reply), None);
                }
                Command::Stop(timeout) => self.stop(timeout),
                Command::DrainHooksDone => self.drain.hooks_done = true,
                Command::Quit => self.quit = true,
            }
        }
    }

    fn on_signals(&mut self) {
        let Some(signals) = &mut self.signals else { return };
        let caught = signals.take();
        if caught.upgrade {
            log::info!("upgrade asked for by signal");
            self.begin(UpgradeRequest::default(), Origin::Push, Requester::Nobody, None);
        }
        for _ in 0..caught.stops {
            log::info!("told to stop by signal");
            self.stop(None);
        }
    }

    fn stop(&mut self, timeout: Option<Duration>) {
        self.drain.timeout = self.drain.timeout.or(timeout);
        if self.gives_notice() {
            return;
        }
        self.tell_new_side_with(inherit::Event::Stop, "it was told to stop".to_owned());
        self.tell_old_side(upgrade::Event::Stop);
    }

    /// Whether the stop is put off: the first one is, of a process that serves.
    fn gives_notice(&mut self) -> bool {
        let notice = self.shared.config.notice;
        let serves = self.inherit.owns() && self.upgrade.stage() == upgrade::Stage::Serving;
        let is_first = !self.shared.phase.read(|phase| phase.leaving);
        self.timers.notice = (serves && is_first && !notice.is_zero()).then(|| after(notice));
        if self.timers.notice.is_some() {
            log::info!("not ready any more; the listeners are closed in {} s", notice.as_secs_f64());
            self.shared.phase.update(|phase| phase.leaving = true);
        }
        self.timers.notice.is_some()
    }

    fn on_client(&mut self, id: ClientId, events: PollFlags) {
        let Some(server) = &mut self.server else { return };
        if events.contains(PollFlags::POLLOUT) {
            server.flush(id);
        }
        if !events.intersects(PollFlags::POLLIN | PollFlags::POLLHUP | PollFlags::POLLERR) {
            return;
        }
        let Some(Asked { client, request }) = server.read(id) else { return };
        match request {
            Request::Status => {
                let status = self.status();
                if let Some(server) = &mut self.server {
                    server.finish(client, &Said::Status(Box::new(status)));
                }
            }
            Request::Upgrade(request) => {
                let wait = request.wait.unwrap_or_default();
                self.begin(request, Origin::Push, Requester::Client(client, wait), None);
            }
            Request::Restart(request) => {
                self.begin(request, Origin::Restart, Requester::Client(client, Wait::Drained), None);
            }
            Request::Stop { drain_timeout_ms } => {
                self.accept(client);
                self.stop_clients.push((client, Instant::now()));
                if self.upgrade.stage() == upgrade::Stage::Draining {
                    // Asking again is not what a second signal is: nothing is cut before its time.
                    if let Some(timeout) = drain_timeout_ms {
                        self.change_drain_timeout(Duration::from_millis(timeout));
                    }
                    self.announce_drain_to_stop_clients();
                } else {
                    self.schedule_alive();
                    let timeout = drain_timeout_ms.map(Duration::from_millis);
                    match self.timers.notice {
                        None => self.stop(timeout),
                        // Nor does it end the notice.
                        Some(_) => self.drain.timeout = timeout.or(self.drain.timeout),
                    }
                }
            }
            Request::TakeOver => self.on_take_over(client),
            Request::Scale { .. } | Request::UpgradeSelf(_) => {
                let message = "this process is no supervisor: it is not `handover exec`";
                server.finish(client, &Said::Result(ResultEvent::new(Outcome::BadRequest, message)));
            }
        }
    }

    fn accept(&mut self, client: ClientId) {
        let accepted = self.accepted();
        if let Some(server) = &mut self.server {
            server.send(client, &accepted);
        }
    }

    fn accepted(&self) -> Said {
        let pid = std::process::id().cast_signed();
        Said::Accepted(AcceptedEvent { pid, generation: self.shared.generation, supervises: false })
    }

    /// Refused on the line; once it is accepted the connection carries frames only.
    fn on_take_over(&mut self, client: ClientId) {
        if let Some(refusal) = self.refusal() {
            return server_finish(&mut self.server, client, &refusal);
        }
        let accepted = self.accepted();
        let channel = self.server.as_mut().and_then(|server| server.take_channel(client, &accepted));
        if let Some((stream, pid)) = channel {
            self.begin(UpgradeRequest::default(), Origin::Pull, Requester::Nobody, Some((stream, pid)));
        }
    }

    /// Why no upgrade can begin now, for those reasons that are not a matter of the old side's stage.
    fn refusal(&self) -> Option<ResultEvent> {
        let busy = |message: String| Some(ResultEvent::new(Outcome::Busy, message));
        let pid = std::process::id();
        if self.shared.is_supervised {
            let supervisor = nix::unistd::getppid();
            let message =
                format!("process {pid} is run by `handover exec`, which replaces it: ask process {supervisor}");
            return Some(ResultEvent::new(Outcome::BadRequest, message));
        }
        match self.inherit.stage() {
            inherit::Stage::Owner => {}
            inherit::Stage::Starting { .. } | inherit::Stage::Ready => {
                return busy(format!("process {pid} is still starting up"));
            }
            inherit::Stage::Trial => return busy(format!("the upgrade to process {pid} is not finished yet")),
            inherit::Stage::Refused => return busy(format!("process {pid} never became the serving one")),
        }
        match self.upgrade.stage() {
            upgrade::Stage::Serving if self.timers.notice.is_none() => {}
            upgrade::Stage::Serving | upgrade::Stage::Draining | upgrade::Stage::Drained => {
                return Some(self.busy(Refusal::Draining));
            }
            _ => return Some(self.busy(Refusal::UpgradeUnderWay)),
        }
        let (draining, most) = (self.older.len(), self.shared.config.max_draining);
        if draining >= most {
            let pids: Vec<String> = self.older.iter().map(|(older, _)| older.pid.to_string()).collect();
            return busy(format!(
                "{draining} older generations still drain (pid {}), and at most {most} may: wait, or end one of them",
                pids.join(", ")
            ));
        }
        None
    }

    fn busy(&self, refusal: Refusal) -> ResultEvent {
        let pid = std::process::id();
        let message = match refusal {
            Refusal::UpgradeUnderWay => {
                let attempt = self.attempt.as_ref().and_then(|attempt| Some((attempt.pid?, attempt.begun.elapsed())));
                let which = attempt.map(|(new, time)| format!(": to process {new}, for {} s", time.as_secs()));
                let mend = format!("`handover status --pid {pid}` tells how it ends");
                let message = format!("another upgrade is under way{}", which.unwrap_or_default());
                return ResultEvent { mend: Some(mend), ..ResultEvent::new(Outcome::Busy, message) };
            }
            Refusal::Draining => match &self.attempt {
                Some(attempt) if self.drain.upgraded => {
                    let new = attempt.pid.map(|pid| pid.to_string()).unwrap_or_default();
                    match attempt.origin {
                        Origin::Restart => {
                            format!("a restart is under way: process {new} takes over when process {pid} has ended")
                        }
                        Origin::Push | Origin::Pull => {
                            format!("process {pid} has been replaced by process {new} and is draining: ask that one")
                        }
                    }
                }
                _ => format!("process {pid} was told to stop and is draining"),
            },
        };
        ResultEvent::new(Outcome::Busy, message)
    }

    fn on_time(&mut self, now: Instant) {
        if passed(&mut self.timers.ready, now) {
            // Where it was this process that stood still, what the new one has said lies there unread.
            self.hear_out();
            if self.timers.ready.is_none() {
                self.tell_old_side(upgrade::Event::TimedOut(Timer::Ready));
            }
        }
        if passed(&mut self.timers.trial, now) {
            self.end_trial();
        }
        if passed(&mut self.timers.drain, now) {
            self.tell_old_side(upgrade::Event::TimedOut(Timer::Drain));
        }
        if passed(&mut self.timers.accepting, now) {
            self.send_accepting();
        }
        if passed(&mut self.timers.cut_grace, now) {
            match self.more_time_for_hooks() {
                Some(left) => self.timers.cut_grace = Some(now + left),
                None => self.tell_old_side(upgrade::Event::Idle),
            }
        }
        if passed(&mut self.timers.drain_count, now) {
            self.announce_drain_count();
        }
        if passed(&mut self.timers.watchdog, now) {
            self.ping_watchdog();
        }
        if passed(&mut self.timers.notice, now) {
            self.stop(None);
        }
        if passed(&mut self.timers.restarted, now) {
            self.restart_takes_too_long();
        }
        if passed(&mut self.timers.alive, now) {
            self.say_alive();
        }
        if let Some(server) = &mut self.server {
            server.drop_late(now);
        }
    }

    /// Runs the old side's machine, and whatever follows from what it wants done.
    fn tell_old_side(&mut self, event: upgrade::Event) {
        let mut events = VecDeque::from([event]);
        while let Some(event) = events.pop_front() {
            for action in self.upgrade.on_event(event) {
                events.extend(self.perform(action));
            }
        }
    }

    /// The process ends, or the application has let go of its handle: nothing of ours may stay behind.
    fn end(&mut self) {
        if self.upgrade.in_flight() {
            self.tell_old_side(upgrade::Event::Stop);
        }
        self.fail_restart("ended before it was ready");
        if self.upgrade.stage() != upgrade::Stage::Drained {
            self.unlink_paths();
            self.remove_pid_file();
            self.remove_control_socket();
        }
        self.shared.gate.close();
    }

    fn remove_control_socket(&mut self) {
        if let Some(server) = &self.server {
            server.unlink();
        }
    }

    /// The paths of Unix listeners go with the last generation.
    fn unlink_paths(&self) {
        if !self.drain.upgraded {
            self.shared.listeners().unlink_paths(self.inherit.owns());
        }
    }

    /// And so does the pid file.
    fn remove_pid_file(&self) {
        if let Some(pid_file) = self.pid_file.as_ref().filter(|_| !self.drain.upgraded) {
            pid_file.remove();
        }
    }
}

fn server_finish(server: &mut Option<Server>, client: ClientId, result: &ResultEvent) {
    if let Some(server) = server {
        server.finish(client, &Said::Result(result.clone()));
    }
}
