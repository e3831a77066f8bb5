//! What the application's threads and the engine share.

use std::collections::VecDeque;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::time::{ClockId, clock_gettime};

use crate::config::Config;
use crate::connections::Connections;
use crate::control::BuildIdentity;
use crate::engine::Command;
use crate::error::Error;
use crate::gate::Gate;
use crate::inherit::receive::HandedParts;
use crate::inherit::socket_activation;
use crate::listeners::{Inherited, Listeners};
use crate::state::HandedState;
use crate::upgrade::spawn::Started;
use crate::watch::{Watch, lock};

/// So that no sum of times overflows.
const LINGER_MAX: Duration = Duration::from_secs(24 * 60 * 60);

type StateProvider = Box<dyn Fn() -> HandedState + Send>;
type DrainHook = Box<dyn FnOnce() + Send>;

pub(crate) struct Shared {
    pub(crate) config: Config,
    pub(crate) generation: u64,
    /// It is `handover exec` that replaces this process.
    pub(crate) is_supervised: bool,
    pub(crate) started: Started,
    pub(crate) since: SystemTime,
    executable: PathBuf,
    /// The build that served before.
    pub(crate) previous: Option<BuildIdentity>,
    pub(crate) gate: Gate,
    pub(crate) connections: &'static Connections,
    pub(crate) phase: Arc<Watch<Phase>>,
    /// Makes the engine look at its commands, and at what else may have changed.
    pub(crate) wake: Arc<EventFd>,
    /// Readable once this process drains: for threads that wait for a connection and for this.
    pub(crate) draining_event: EventFd,
    /// The same for those who look at every response.
    is_draining: AtomicBool,
    listeners: Mutex<Listeners>,
    commands: Mutex<VecDeque<Command>>,
    handed_state: Mutex<Option<HandedState>>,
    state_provider: Mutex<Option<StateProvider>>,
    drain_hooks: Mutex<Vec<DrainHook>>,
    spread: AtomicU32,
}

/// How far this process is, as the application sees it.
#[derive(Debug)]
pub(crate) struct Phase {
    pub(crate) ownership: Ownership,
    /// Told to stop: also before it drains, while it gives notice.
    pub(crate) leaving: bool,
    pub(crate) draining: Option<DrainPhase>,
    pub(crate) drained: Option<Drained>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Ownership {
    Pending,
    Owner,
    /// With the reason.
    Refused(String),
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct DrainPhase {
    pub(crate) upgraded: bool,
    pub(crate) begun: Instant,
    /// None: for ever.
    pub(crate) deadline: Option<Instant>,
}

/// How the life of a process ended that has drained.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Drained {
    /// A new process has taken over. Otherwise this one was told to stop, and the service ends with it.
    pub upgraded: bool,
    /// Connections that were still open at the drain deadline and were closed.
    pub cut: usize,
}

impl Phase {
    pub(crate) fn change_drain_deadline(&mut self, deadline: Option<Instant>) {
        if let Some(draining) = &mut self.draining {
            draining.deadline = deadline;
        }
    }

    /// What was open has been cut.
    pub(crate) fn deadline_passed(&mut self) {
        if let Some(draining) = &mut self.draining {
            draining.deadline = Some(Instant::now());
        }
    }
}

impl Shared {
    pub(crate) fn new(
        config: Config,
        mut started: Started,
        handed: Option<&mut HandedParts>,
        activated: Vec<Inherited>,
    ) -> Result<Self, Error> {
        let failed = |error: io::Error| Error::io("prepare for upgrades", error);
        let event = || EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK);
        let wake = Arc::new(event().map_err(|error| failed(error.into()))?);
        let wake_on = |wake: &Arc<EventFd>| {
            // Weak, because what counts connections is never freed.
            let wake = Arc::downgrade(wake);
            move || {
                if let Some(wake) = wake.upgrade() {
                    let _ = wake.write(1);
                }
            }
        };
        let supervised = socket_activation::supervised_generation();
        let mut generation = supervised.unwrap_or(1);
        let alone = handed.as_ref().is_none_or(|parts| parts.restart.is_some());
        let (mut inherited, mut state, mut previous) = (activated, None, None);
        if let Some(parts) = handed {
            generation = parts.generation;
            if supervised.is_some() {
                // What made the offer is the supervisor, which is no generation.
                parts.older.clear();
            }
            // First what is handed over: it is what clients know.
            inherited.splice(0..0, std::mem::take(&mut parts.inherited));
            state = parts.state.take();
            previous = parts.build.take();
            if let Some(program) = parts.program.take() {
                started.program = program;
            }
        }
        let ownership = Ownership::Pending;
        Ok(Self {
            config,
            generation,
            is_supervised: supervised.is_some(),
            started,
            since: SystemTime::now(),
            executable: std::env::current_exe().unwrap_or_default(),
            previous,
            gate: Gate::new(wake_on(&wake)).map_err(failed)?,
            connections: Connections::new(wake_on(&wake)),
            phase: Arc::new(Watch::new(Phase { ownership, leaving: false, draining: None, drained: None })),
            draining_event: event().map_err(|error| failed(error.into()))?,
            is_draining: AtomicBool::new(false),
            wake,
            listeners: Mutex::new(Listeners::new(inherited, alone)),
            commands: Mutex::default(),
            handed_state: Mutex::new(state),
            state_provider: Mutex::default(),
            drain_hooks: Mutex::default(),
            spread: AtomicU32::new(0),
        })
    }

    pub(crate) fn listeners(&self) -> MutexGuard<'_, Listeners> {
        lock(&self.listeners)
    }

    pub(crate) fn command(&self, command: Command) {
        lock(&self.commands).push_back(command);
        self.wake_engine();
    }

    pub(crate) fn wake_engine(&self) {
        // It fails only when the counter is full, and then the engine is awake.
        let _ = self.wake.write(1);
    }

    pub(crate) fn next_command(&self) -> Option<Command> {
        lock(&self.commands).pop_front()
    }

    pub(crate) fn handed_state(&self) -> Option<HandedState> {
        lock(&self.handed_state).take()
    }

    pub(crate) fn set_state_provider(&self, provider: StateProvider) {
        *lock(&self.state_provider) = Some(provider);
    }

    /// The application's state for the new process. Its code runs here; a panic of it fails the upgrade only.
    pub(crate) fn take_state_of_application(&self) -> Result<Option<HandedState>, String> {
        let provider = lock(&self.state_provider);
        let Some(provider) = provider.as_ref() else { return Ok(None) };
        catch_unwind(AssertUnwindSafe(provider))
            .map(Some)
            .map_err(|_| "cannot get the state: the application's function for it panicked".to_owned())
    }

    /// Runs the hook at once if the drain has begun already.
    pub(crate) fn add_drain_hook(&self, hook: DrainHook) {
        let mut hooks = lock(&self.drain_hooks);
        if self.phase.read(|phase| phase.draining.is_none()) {
            hooks.push(hook);
        } else {
            drop(hooks);
            hook();
        }
    }

    /// Tells the application, in each of the ways in which it may wait for it.
    pub(crate) fn begin_drain(&self, upgraded: bool, deadline: Option<Instant>) {
        self.is_draining.store(true, Ordering::SeqCst);
        self.phase.update(|phase| {
            phase.draining = Some(DrainPhase { upgraded, begun: Instant::now(), deadline });
        });
        let _ = self.draining_event.write(1);
    }

    #[cfg(feature = "hyper")]
    pub(crate) fn is_draining(&self) -> bool {
        self.is_draining.load(Ordering::Relaxed)
    }

    pub(crate) fn take_drain_hooks(&self) -> Vec<DrainHook> {
        std::mem::take(&mut *lock(&self.drain_hooks))
    }

    /// How long a connection is to be silent before it is closed: `linger`, and up to as much again, so that the
    /// clients of a busy server do not all come back at once.
    pub(crate) fn linger(&self) -> Duration {
        let linger = self.config.linger.min(LINGER_MAX);
        // Multiples of the golden ratio fall evenly, however many there are.
        let number = self.spread.fetch_add(1, Ordering::Relaxed);
        linger + linger.mul_f64(f64::from(number.wrapping_mul(2_654_435_769)) / f64::from(u32::MAX))
    }

    /// The running build. `/proc/self/exe` is its inode whatever has happened to the path since.
    pub(crate) fn build_identity(&self) -> BuildIdentity {
        let mut identity = BuildIdentity { path: self.executable.clone(), ..BuildIdentity::default() };
        if let Ok(metadata) = fs::metadata("/proc/self/exe") {
            identity.device = metadata.dev();
            identity.inode = metadata.ino();
            identity.size = metadata.len();
            identity.modified_unix_ms = metadata.modified().map(unix_ms).unwrap_or_default();
        }
        identity
    }
}

/// What every process of this machine calls the same time.
pub(crate) fn monotonic_us() -> u64 {
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC).map(Duration::from).unwrap_or_default();
    u64::try_from(now.as_micros()).unwrap_or(u64::MAX)
}

pub(crate) fn unix_ms(time: SystemTime) -> u64 {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}
