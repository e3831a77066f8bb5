//! A load: which clients, how long, and what it is to be told while it runs.

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use super::client::{Client, Pace, Schedule};
use super::tally::{Kind, Tally};
use super::target::Target;

/// Enough for the buffers of one client, and little enough for thousands of them.
const STACK: usize = 512 * 1024;

/// What to ask of a server, and with how many clients. Kinds add up; each client has its own thread.
#[derive(Clone, Debug)]
pub struct Load {
    targets: Vec<Target>,
    groups: Vec<(Kind, usize)>,
    pub(super) slow_seconds: f64,
    pub(super) stream_lines: u32,
    pub(super) body: Option<Vec<u8>>,
    pub(super) patience: Duration,
    pub(super) think: Duration,
    pub(super) interval: Duration,
    rate: Option<f64>,
    requests: Option<u64>,
    duration: Option<Duration>,
    monotonic: bool,
}

impl Load {
    pub fn new(target: impl Into<Target>) -> Self {
        Self {
            targets: vec![target.into()],
            groups: vec![],
            slow_seconds: 1.0,
            stream_lines: 20,
            body: None,
            patience: Duration::from_secs(30),
            think: Duration::ZERO,
            interval: Duration::from_millis(100),
            rate: None,
            requests: None,
            duration: None,
            monotonic: false,
        }
    }

    /// Deals the clients of every kind out to one more target.
    pub fn also(mut self, target: impl Into<Target>) -> Self {
        self.targets.push(target.into());
        self
    }

    fn clients(mut self, kind: Kind, clients: usize) -> Self {
        self.groups.push((kind, clients));
        self
    }

    /// Clients that ask `/` on a new connection each time, and say `Connection: close`.
    pub fn new_connections(self, clients: usize) -> Self {
        self.clients(Kind::New, clients)
    }

    /// Clients that ask `/` on a connection that they keep.
    pub fn kept(self, clients: usize) -> Self {
        self.clients(Kind::Kept, clients)
    }

    /// Clients that ask `/slow/<seconds>`, on a new connection each time.
    pub fn slow(mut self, clients: usize, seconds: f64) -> Self {
        self.slow_seconds = seconds;
        self.clients(Kind::Slow, clients)
    }

    /// Clients that read `/stream`, on a new connection each time.
    pub fn stream(self, clients: usize) -> Self {
        self.clients(Kind::Stream, clients)
    }

    /// How many lines `/stream` sends; 20 unless told.
    pub fn stream_lines(mut self, lines: u32) -> Self {
        self.stream_lines = lines;
        self
    }

    /// Clients that send messages at [intervals](Self::interval) on `/ws` and expect their echo.
    pub fn websocket(self, clients: usize) -> Self {
        self.clients(Kind::WebSocket, clients)
    }

    /// Clients that send a line on a new connection each time and expect its echo.
    pub fn echo(self, clients: usize) -> Self {
        self.clients(Kind::Echo, clients)
    }

    /// Clients that send lines on a connection that they keep.
    pub fn echo_kept(self, clients: usize) -> Self {
        self.clients(Kind::EchoKept, clients)
    }

    /// Makes the new, the kept and the slow requests POSTs with this body.
    pub fn post(mut self, body: impl Into<Vec<u8>>) -> Self {
        self.body = Some(body.into());
        self
    }

    /// Asks so many times a second over new connections (`new_connections` and `echo`, a schedule each), whether
    /// or not the server keeps up; latency counts from the time a request was due. Without it every client asks
    /// again as soon as it was answered.
    ///
    /// # Panics
    ///
    /// Unless it is above zero and finite.
    pub fn rate(mut self, per_second: f64) -> Self {
        assert!(per_second.is_finite() && per_second > 0.0, "a rate of {per_second} a second");
        self.rate = Some(per_second);
        self
    }

    /// What clients that keep a connection do between an answer and the next request.
    pub fn think(mut self, think: Duration) -> Self {
        self.think = think;
        self
    }

    /// Between two messages on a WebSocket; 100 ms unless told.
    pub fn interval(mut self, interval: Duration) -> Self {
        self.interval = interval;
        self
    }

    /// How long a request may take, from connect to the end of the answer; 30 s unless told.
    pub fn patience(mut self, patience: Duration) -> Self {
        self.patience = patience;
        self
    }

    /// Stops after so many requests of all kinds together.
    pub fn requests(mut self, requests: u64) -> Self {
        self.requests = Some(requests);
        self
    }

    /// Stops after this time.
    pub fn duration(mut self, duration: Duration) -> Self {
        self.duration = Some(duration);
        self
    }

    /// Counts as [`backwards`](Tally::backwards) each connection that is answered by a generation lower than one
    /// that had, before this connection began, finished answering the first request of another on the same
    /// target. For servers that promise that the old generation takes no connection once the new one does.
    pub fn monotonic(mut self) -> Self {
        self.monotonic = true;
        self
    }

    /// # Panics
    ///
    /// If a thread cannot be started.
    pub fn start(self) -> Running {
        let started = Instant::now();
        let clients: usize = self.groups.iter().map(|&(_, clients)| clients).sum();
        let shared = Arc::new(Shared {
            state: Mutex::new(State {
                tally: Tally::new(started, self.targets.len(), self.monotonic),
                working: clients,
                watchers: 0,
            }),
            changed: Condvar::new(),
            stop: Stop::default(),
            tickets: AtomicU64::new(0),
            requests: self.requests.unwrap_or(u64::MAX),
            end: self.duration.and_then(|duration| started.checked_add(duration)),
        });
        let load = Arc::new(self);
        let mut threads = Vec::with_capacity(clients);
        for &(kind, clients) in &load.groups {
            let pace = load.pace(kind, started);
            for number in 0..clients {
                let index = number % load.targets.len();
                let client = Client {
                    kind,
                    number,
                    target: load.targets[index].clone(),
                    target_index: index,
                    pace: pace.clone(),
                    load: Arc::clone(&load),
                    shared: Arc::clone(&shared),
                };
                let name = format!("{kind} {number}");
                let thread = thread::Builder::new().name(name).stack_size(STACK);
                threads.push(thread.spawn(move || client.run()).expect("a thread can be started"));
            }
        }
        Running { shared, threads }
    }

    fn pace(&self, kind: Kind, started: Instant) -> Pace {
        match (kind, self.rate) {
            (Kind::New | Kind::Echo, Some(rate)) => Pace::Rate(Arc::new(Schedule::new(started, rate))),
            (Kind::Kept | Kind::EchoKept, _) if !self.think.is_zero() => Pace::Think(self.think),
            _ => Pace::Closed,
        }
    }
}

/// What the clients of a load share.
pub(super) struct Shared {
    state: Mutex<State>,
    changed: Condvar,
    pub(super) stop: Stop,
    tickets: AtomicU64,
    requests: u64,
    end: Option<Instant>,
}

struct State {
    tally: Tally,
    /// Clients that have not ended.
    working: usize,
    /// Threads that wait for the tally to change.
    watchers: usize,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        // A condition that panics while it looks must not take the clients with it.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes the tally and wakes those who wait for it.
    pub(super) fn count(&self, change: impl FnOnce(&mut Tally)) {
        let mut state = self.state();
        change(&mut state.tally);
        if state.watchers > 0 {
            self.changed.notify_all();
        }
    }

    /// Permission for one more request.
    pub(super) fn ticket(&self) -> bool {
        !self.over() && self.tickets.fetch_add(1, Ordering::Relaxed) < self.requests
    }

    pub(super) fn over(&self) -> bool {
        self.stop.is_set() || self.end.is_some_and(|end| end <= Instant::now())
    }

    /// Sleeps until then, or until the load is over.
    pub(super) fn sleep_until(&self, until: Instant) {
        self.stop.wait_until(self.end.map_or(until, |end| end.min(until)));
    }

    pub(super) fn client_ends(&self) {
        let mut state = self.state();
        state.working -= 1;
        if state.working == 0 {
            state.tally.end();
        }
        self.changed.notify_all();
    }

    /// Waits until `look` returns something, the clients have ended, or the deadline.
    fn watch<T>(&self, deadline: Instant, mut look: impl FnMut(&State) -> Option<T>) -> Option<T> {
        let mut state = self.state();
        loop {
            let found = look(&state);
            let remaining = deadline.saturating_duration_since(Instant::now());
            if found.is_some() || remaining.is_zero() || state.working == 0 {
                return found;
            }
            state.watchers += 1;
            state = self.changed.wait_timeout(state, remaining).unwrap_or_else(PoisonError::into_inner).0;
            state.watchers -= 1;
        }
    }
}

#[derive(Default)]
pub(super) struct Stop {
    set: AtomicBool,
    sleepers: Mutex<()>,
    changed: Condvar,
}

impl Stop {
    fn set(&self) {
        // Under the lock, lest a client that has just looked fall asleep over it.
        let _sleepers = self.sleepers.lock().unwrap_or_else(PoisonError::into_inner);
        self.set.store(true, Ordering::Relaxed);
        self.changed.notify_all();
    }

    fn is_set(&self) -> bool {
        self.set.load(Ordering::Relaxed)
    }

    fn wait_until(&self, until: Instant) {
        let mut sleepers = self.sleepers.lock().unwrap_or_else(PoisonError::into_inner);
        while !self.is_set() {
            let remaining = until.saturating_duration_since(Instant::now());
            if remaining.is_zero() {
                return;
            }
            sleepers = self.changed.wait_timeout(sleepers, remaining).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

/// A load that runs. Dropped, it stops without waiting for its clients.
pub struct Running {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

impl Running {
    /// A copy of what has been counted so far.
    pub fn tally(&self) -> Tally {
        self.shared.state().tally.clone()
    }

    /// Waits until `condition` holds of the tally. It is asked at once and after each request, with the tally
    /// locked, so it had better be quick.
    ///
    /// # Errors
    ///
    /// When `within` has passed, or the load has ended, and it still does not hold.
    pub fn wait_for(&self, mut condition: impl FnMut(&Tally) -> bool, within: Duration) -> Result<(), InVain> {
        let deadline = Instant::now() + within;
        self.shared
            .watch(deadline, |state| condition(&state.tally).then_some(()))
            .ok_or_else(|| InVain { within, tally: Box::new(self.tally()) })
    }

    /// Waits for so many more requests that end well.
    ///
    /// # Errors
    ///
    /// As [`wait_for`](Self::wait_for).
    pub fn wait_for_more(&self, ok: u64, within: Duration) -> Result<(), InVain> {
        let goal = self.shared.state().tally.ok() + ok;
        self.wait_for(|tally| tally.ok() >= goal, within)
    }

    /// Waits for an answer from `generation`.
    ///
    /// # Errors
    ///
    /// As [`wait_for`](Self::wait_for).
    pub fn wait_for_generation(&self, generation: u64, within: Duration) -> Result<(), InVain> {
        self.wait_for(|tally| tally.generations().contains_key(&generation), within)
    }

    /// Waits for the clients to end by themselves, because of [`Load::requests`], [`Load::duration`] or a
    /// [`Stopper`]; true if they have.
    pub fn wait_for_end(&self, within: Duration) -> bool {
        self.shared.watch(Instant::now() + within, |state| (state.working == 0).then_some(())).is_some()
    }

    /// A handle that other threads can stop the load with.
    pub fn stopper(&self) -> Stopper {
        Stopper(Arc::clone(&self.shared))
    }

    /// Asks no more, waits for what is in flight (each request at most its [patience](Load::patience)), and
    /// returns what was counted.
    ///
    /// # Panics
    ///
    /// If a client panicked, which is an error of the oracle.
    pub fn stop(mut self) -> Tally {
        self.shared.stop.set();
        for thread in self.threads.drain(..) {
            if let Err(panic) = thread.join() {
                std::panic::resume_unwind(panic);
            }
        }
        self.tally()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.shared.stop.set();
    }
}

/// Stops a load from another thread.
#[derive(Clone)]
pub struct Stopper(Arc<Shared>);

impl Stopper {
    pub fn stop(&self) {
        self.0.stop.set();
    }
}

/// What was waited for did not come. It prints as the report so far.
pub struct InVain {
    within: Duration,
    pub tally: Box<Tally>,
}

impl fmt::Display for InVain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "waited in vain, at most {:?}; so far {}", self.within, self.tally)
    }
}

impl fmt::Debug for InVain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl std::error::Error for InVain {}
