//! The handle: what a server author uses.

use std::io;
use std::net::ToSocketAddrs;
use std::os::fd::AsFd;
use std::path::Path;
use std::pin::Pin;
use std::sync::{Arc, mpsc};
use std::task::{Context, Poll};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags};

use crate::config::{Config, ControlSocket};
use crate::connections::Guard;
use crate::control::server::Server;
use crate::control::{Outcome, ResultEvent, UpgradeRequest, directory};
use crate::engine::{Command, Engine, SignalPipe};
use crate::error::{Error, ErrorKind};
use crate::inherit::receive::{self, Spawned};
use crate::inherit::socket_activation;
use crate::listeners::{Address, TcpOptions, UnixOptions, Wanted, WantedOptions};
use crate::net::{TcpListener, UdpSocket, UnixDatagram, UnixListener};
use crate::protocol::{Claims, Kind};
use crate::shared::{Drained, Ownership, Phase, Shared};
use crate::state::HandedState;
use crate::upgrade::spawn::Started;
use crate::watch::{Found, Watch, lock};

/// This process's part in upgrades. Cheap to clone; all clones are the same.
///
/// See the [crate's documentation](crate) for the whole of a server.
#[derive(Clone)]
pub struct Handover {
    pub(crate) shared: Arc<Shared>,
    _engine: Arc<EngineThread>,
}

/// Ends the engine with the last handle, so that the control socket does not stay behind.
struct EngineThread {
    shared: Arc<Shared>,
    thread: std::sync::Mutex<Option<JoinHandle<()>>>,
}

impl Drop for EngineThread {
    fn drop(&mut self) {
        self.shared.command(Command::Quit);
        let Some(thread) = lock(&self.thread).take() else { return };
        // The application's own code may drop the last handle on the engine's thread.
        if thread.thread().id() != std::thread::current().id() {
            let _ = thread.join();
        }
    }
}

impl std::fmt::Debug for Handover {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Handover").field("generation", &self.shared.generation).finish_non_exhaustive()
    }
}

impl Handover {
    /// Takes what was handed over to this process, or begins as generation 1; installs the signal handlers and opens
    /// the control socket. Call it early, before other threads are started, and once in a process.
    ///
    /// Nothing is accepted before [`ready`](Self::ready). In a restart (`handover restart`) this returns when the old
    /// process has ended: what two processes must not do at once belongs behind it.
    ///
    /// # Errors
    ///
    /// The handover cannot be taken (another protocol version, sockets that are not what was announced), the control
    /// directory cannot be used, or [`Config::take_over_from`] names a process that refuses.
    pub fn start(config: Config) -> Result<Self, Error> {
        let started = Started::of_this_process();
        // Before anything else: from here on a signal is not lost, and does not kill.
        let mut signals = SignalPipe::install(&config.signals, &started.ignored)?;
        let directory = match &config.control {
            ControlSocket::Default => Some(directory::default_path()),
            ControlSocket::In(directory) => Some(directory.clone()),
            ControlSocket::Off => None,
        };
        // While the old process of a restart serves.
        directory.as_deref().map_or(Ok(()), directory::prepare)?;
        let mut handed = match receive::from_environment(signals.as_mut())? {
            Spawned::ForHandover(handed) => Some(*handed),
            Spawned::AndAlone => None,
            Spawned::ByAnybody => config.take_over_from.as_ref().map(receive::by_pull).transpose()?,
        };
        let activated = socket_activation::from_environment();
        let server = directory.as_deref().map(|directory| Server::bind(Some(directory))).transpose()?;
        let parts = handed.as_mut().map(|handed| &mut handed.parts);
        let shared = Arc::new(Shared::new(config, started, parts, activated)?);
        let engine = Engine::new(shared.clone(), handed, server, signals);
        let thread = std::thread::Builder::new().name("handover".into()).spawn(move || engine.run());
        let thread = thread.map_err(|error| Error::io("start the thread for upgrades", error))?;
        log::info!("generation {} starts as process {}", shared.generation, std::process::id());
        let thread = std::sync::Mutex::new(Some(thread));
        Ok(Self { _engine: Arc::new(EngineThread { shared: shared.clone(), thread }), shared })
    }

    /// Counts the upgrades of this service: 1 for a process that was not handed anything.
    #[must_use]
    pub fn generation(&self) -> u64 {
        self.shared.generation
    }

    /// A TCP listener: the one that was handed over under `name`, or a fresh one at `address`.
    ///
    /// A listener that was handed over is kept if its address is the one asked for; port 0 asks for any port. With
    /// another address it is bound afresh and the old one is unclaimed. The first address that `address` resolves to
    /// and that can be bound is taken.
    ///
    /// # Errors
    ///
    /// The name is taken or not valid, or the address cannot be bound: `bind(2)`, `listen(2)`.
    pub fn tcp(&self, name: &str, address: impl ToSocketAddrs) -> Result<TcpListener, Error> {
        self.tcp_with(name, address, &TcpOptions::default())
    }

    /// Like [`tcp`](Self::tcp), with options.
    ///
    /// # Errors
    ///
    /// As for [`tcp`](Self::tcp).
    pub fn tcp_with(
        &self,
        name: &str,
        address: impl ToSocketAddrs,
        options: &TcpOptions,
    ) -> Result<TcpListener, Error> {
        let options = || WantedOptions::Tcp(options.clone());
        self.claim_ip(name, Kind::Tcp, address, options).map(|socket| TcpListener::new(self, socket))
    }

    /// A UDP socket: the one that was handed over under `name`, or a fresh one at `address`.
    ///
    /// # Errors
    ///
    /// As for [`tcp`](Self::tcp).
    pub fn udp(&self, name: &str, address: impl ToSocketAddrs) -> Result<UdpSocket, Error> {
        self.claim_ip(name, Kind::Udp, address, || WantedOptions::Udp).map(|socket| UdpSocket::new(self, socket))
    }

    /// A Unix stream listener: the one that was handed over under `name`, or a fresh one at `path`; a path that begins
    /// with `@` is in the abstract namespace.
    ///
    /// A socket that a crashed run has left at the path is replaced; one that still answers is not. The path is removed
    /// when the last generation ends, if it is still the one that was made.
    ///
    /// # Errors
    ///
    /// The name is taken or not valid, something else is at the path, or it cannot be bound.
    pub fn unix(&self, name: &str, path: impl AsRef<Path>) -> Result<UnixListener, Error> {
        self.unix_with(name, path, &UnixOptions::default())
    }

    /// Like [`unix`](Self::unix), with options.
    ///
    /// # Errors
    ///
    /// As for [`unix`](Self::unix).
    pub fn unix_with(&self, name: &str, path: impl AsRef<Path>, options: &UnixOptions) -> Result<UnixListener, Error> {
        let options = WantedOptions::Unix(options.clone());
        let address = Address::unix(path.as_ref());
        let socket = self.claim(&Wanted { name, kind: Kind::Unix, address, options })?;
        Ok(UnixListener::new(self, socket))
    }

    /// A Unix datagram socket: the one that was handed over under `name`, or a fresh one at `path`; as
    /// [`unix_with`](Self::unix_with).
    ///
    /// # Errors
    ///
    /// As for [`unix`](Self::unix).
    pub fn unix_datagram(
        &self,
        name: &str,
        path: impl AsRef<Path>,
        options: &UnixOptions,
    ) -> Result<UnixDatagram, Error> {
        let options = WantedOptions::Unix(options.clone());
        let address = Address::unix(path.as_ref());
        let socket = self.claim(&Wanted { name, kind: Kind::UnixDatagram, address, options })?;
        Ok(UnixDatagram::new(self, socket))
    }

    fn claim_ip(
        &self,
        name: &str,
        kind: Kind,
        address: impl ToSocketAddrs,
        options: impl Fn() -> WantedOptions,
    ) -> Result<Claimed, Error> {
        let tried = || format!("find the address of listener `{name}`");
        let addresses = address.to_socket_addrs();
        let addresses = addresses.map_err(|error| Error::io(tried(), error).with_kind(ErrorKind::Invalid))?;
        let wanted = addresses.map(|address| Wanted { name, kind, address: Address::Ip(address), options: options() });
        let mut wanted: Vec<Wanted<'_>> = wanted.collect();
        self.shared.listeners().put_inherited_first(&mut wanted);
        let mut failure = None;
        for wanted in wanted {
            match self.claim(&wanted) {
                Ok(claimed) => return Ok(claimed),
                Err(error) => failure = Some(error),
            }
        }
        Err(failure.unwrap_or_else(|| Error::new(ErrorKind::Invalid, tried(), "the name resolves to nothing")))
    }

    fn claim(&self, wanted: &Wanted<'_>) -> Result<Claimed, Error> {
        let mut listeners = self.shared.listeners();
        let entry = listeners.claim(wanted, &self.shared.gate)?;
        Ok(Claimed { socket: entry.socket.clone(), address: entry.address.clone() })
    }

    /// What has become of the listeners so far: handed over and claimed, bound afresh, not claimed.
    #[must_use]
    pub fn claims(&self) -> Claims {
        self.shared.listeners().claims()
    }

    /// What the old build handed over with [`on_handover`](Self::on_handover). Once; later calls get `None`.
    #[must_use]
    pub fn handed_state(&self) -> Option<HandedState> {
        self.shared.handed_state()
    }

    /// `state` is called at each upgrade for what the new build is to be given. It should return soon: the upgrade waits
    /// for it, though the server does not. Connections accepted after it are this process's; what they change is not
    /// in the state.
    pub fn on_handover(&self, state: impl Fn() -> HandedState + Send + 'static) {
        self.shared.set_state_provider(Box::new(state));
    }

    /// Says that this process can serve, and returns when it owns the listeners: at once in a first generation, and at
    /// commit, milliseconds later, in an upgrade. Only then does any listener accept.
    ///
    /// # Errors
    ///
    /// The upgrade is off; the old process serves on. Let `main` return the error.
    pub fn ready(&self) -> Result<(), Error> {
        self.shared.command(Command::Ready);
        match self.shared.phase.wait(None, ownership) {
            Some(result) => result,
            None => Err(Error::new(ErrorKind::Failed, "become ready", "the engine has ended")),
        }
    }

    /// [`ready`](Self::ready) as a future of any runtime.
    ///
    /// # Errors
    ///
    /// As for [`ready`](Self::ready).
    pub async fn ready_async(&self) -> Result<(), Error> {
        self.shared.command(Command::Ready);
        self.shared.phase.clone().future(ownership).await
    }

    /// Says that this process needs longer to start up, and why: `ready_timeout` begins anew. Where there is no old process a
    /// service manager is told (`EXTEND_TIMEOUT_USEC=`), which would end this one after its `TimeoutStartSec=`.
    pub fn still_starting(&self, reason: impl Into<String>) {
        self.shared.command(Command::StillStarting(reason.into()));
    }

    /// Says that this process will never be ready. The old process serves on, and its operator is told the reason.
    /// Returns the error to end `main` with.
    #[must_use = "return the error from main"]
    pub fn give_up(&self, reason: impl Into<String>) -> Error {
        self.shared.command(Command::GiveUp(reason.into()));
        // Until it is said: the process is about to exit.
        match self.shared.phase.wait(Some(Instant::now() + Duration::from_secs(1)), ownership) {
            Some(Err(error)) => error,
            _ => Error::new(ErrorKind::Invalid, "give up", "this process serves already"),
        }
    }

    /// What to answer a load balancer that asks whether to send requests here: yes from commit until the service is told
    /// to stop, and so also in a process that drains because a new one has taken over. With [`Config::notice`] it is
    /// no while the listeners are still open.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        self.shared.phase.read(|phase| {
            let stops = phase.leaving || phase.draining.is_some_and(|draining| !draining.upgraded);
            phase.ownership == Ownership::Owner && !stops
        })
    }

    /// Whether and when this process drains: as a blocking wait or as a future.
    #[must_use]
    pub fn draining(&self) -> Draining {
        Draining { phase: self.shared.phase.clone(), future: None }
    }

    /// `hook` is called when this process drains, on a thread of its own: the place for an application's own way of
    /// ending. The process is not drained before every hook has returned, or the drain deadline has passed.
    pub fn on_drain(&self, hook: impl FnOnce() + Send + 'static) {
        self.shared.add_drain_hook(Box::new(hook));
    }

    /// When what is still open is closed: `None` while this process does not drain, or if it may drain for ever.
    #[must_use]
    pub fn drain_deadline(&self) -> Option<Instant> {
        self.shared.phase.read(|phase| phase.draining.and_then(|draining| draining.deadline))
    }

    /// Blocks until this process has been upgraded or told to stop, and its connections have ended. Then `main` should
    /// return.
    #[must_use = "it says whether connections were cut"]
    pub fn wait(&self) -> Drained {
        // Without a deadline the answer comes, however late.
        self.shared.phase.wait(None, drained).unwrap_or(Drained { upgraded: false, cut: 0 })
    }

    /// [`wait`](Self::wait) as a future of any runtime.
    pub async fn drained(&self) -> Drained {
        self.shared.phase.clone().future(drained).await
    }

    /// Counts as an open connection until it is dropped: for work that a drain must wait for.
    #[must_use]
    pub fn guard(&self) -> Guard {
        self.shared.connections.guard()
    }

    /// Open connections and guards.
    #[must_use]
    pub fn connections(&self) -> usize {
        self.shared.connections.open()
    }

    /// Waits until a kept connection has something to read, or is at its end. `false` when it should be closed
    /// instead: this process drains, and the connection has been silent for `linger` (see [`Config::linger`]).
    ///
    /// For servers with a thread for each connection: call it before reading the next request. A client that goes on
    /// asking keeps its connection until `drain_timeout`, unless the protocol has a word for the end of one, as HTTP/1
    /// has `Connection: close`: say it when [`Draining::is_draining`].
    ///
    /// # Errors
    ///
    /// That of `poll(2)`.
    pub fn wait_for_request(&self, connection: &impl AsFd) -> io::Result<bool> {
        let connection = connection.as_fd();
        let called = Instant::now();
        let mut fds = [
            PollFd::new(connection, PollFlags::POLLIN),
            PollFd::new(self.shared.draining_event.as_fd(), PollFlags::POLLIN),
        ];
        crate::poll::wait_any(&mut fds, None)?;
        if fds[0].any().unwrap_or(true) {
            return Ok(true);
        }
        let begun = self.shared.phase.wait(None, |phase| phase.draining.map(|draining| draining.begun));
        // A connection that was busy when the drain began, or after it, has been silent since its last response.
        let silent_since = begun.map_or(called, |begun| begun.max(called));
        crate::poll::wait(connection, PollFlags::POLLIN, Some(silent_since + self.shared.linger()))
    }

    /// Replaces this process by its new build, and returns when the trial is over: then this process drains.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::NotUpgraded`], [`ErrorKind::RolledBack`] or [`ErrorKind::Busy`]; this process serves on.
    pub fn upgrade(&self, request: UpgradeRequest) -> Result<ResultEvent, Error> {
        let (reply, answer) = mpsc::channel();
        self.shared.command(Command::Upgrade(Box::new(request), reply));
        let tried = "upgrade this process";
        let result = answer.recv().map_err(|_| Error::new(ErrorKind::NotUpgraded, tried, "it is about to end"))?;
        let kind = match result.result {
            Outcome::Upgraded | Outcome::Cut => return Ok(result),
            Outcome::RolledBack => ErrorKind::RolledBack,
            Outcome::Busy => ErrorKind::Busy,
            _ => ErrorKind::NotUpgraded,
        };
        Err(Error::new(kind, tried, result.message))
    }

    /// Drains this process: what SIGTERM does.
    pub fn stop(&self) {
        self.shared.command(Command::Stop(None));
    }
}

/// A socket that was claimed, on its way into a listener type.
pub(crate) struct Claimed {
    pub(crate) socket: Arc<crate::gate::GatedSocket>,
    pub(crate) address: Address,
}

fn ownership(phase: &Phase) -> Option<Result<(), Error>> {
    match &phase.ownership {
        Ownership::Pending => None,
        Ownership::Owner => Some(Ok(())),
        Ownership::Refused(reason) => {
            Some(Err(Error::new(ErrorKind::NotUpgraded, "become the serving process", reason.clone())))
        }
    }
}

fn drained(phase: &Phase) -> Option<Drained> {
    phase.drained
}

fn is_draining(phase: &Phase) -> Option<()> {
    phase.draining.map(drop)
}

type IsDraining = fn(&Phase) -> Option<()>;

/// Whether and when a process drains. It is a future too.
pub struct Draining {
    phase: Arc<Watch<Phase>>,
    future: Option<Found<Phase, IsDraining>>,
}

impl Draining {
    /// Blocks until this process drains.
    pub fn wait(&self) {
        self.phase.wait(None, is_draining);
    }

    /// Blocks until this process drains or `deadline` has passed, and says whether it drains.
    #[must_use]
    pub fn wait_until(&self, deadline: Instant) -> bool {
        self.phase.wait(Some(deadline), is_draining).is_some()
    }

    /// Whether it drains now.
    #[must_use]
    pub fn is_draining(&self) -> bool {
        self.phase.read(|phase| phase.draining.is_some())
    }

    /// Whether it drains because a new process has taken over, and not because it was told to stop.
    #[must_use]
    pub fn is_upgraded(&self) -> bool {
        self.phase.read(|phase| phase.draining.is_some_and(|draining| draining.upgraded))
    }
}

impl Clone for Draining {
    fn clone(&self) -> Self {
        Self { phase: self.phase.clone(), future: None }
    }
}

impl Future for Draining {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        let phase = self.phase.clone();
        let future = self.future.get_or_insert_with(|| phase.future(is_draining as IsDraining));
        Pin::new(future).poll(context)
    }
}

impl std::fmt::Debug for Draining {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Draining").field("is_draining", &self.is_draining()).finish()
    }
}
