//! What a supervisor knows, written down for its own next build, and read by that.
//!
//! The next build runs in the same process, by `execve`: its children stay its children, an fd keeps its number, a pid
//! cannot be anybody else's. Before that it reads the very same in a child, with the same fds, and says whether it can.

use std::collections::BTreeMap;
use std::env;
use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::fs::FileExt;
use std::process::ExitCode;
use std::time::{Instant, SystemTime};

use serde::{Deserialize, Serialize};

use super::drain::Drain;
use super::forward::{Forwarded, own_signals};
use super::reap::ChildSignals;
use super::replace::Replaced;
use super::{Parts, Supervisor};
use crate::control::BuildIdentity;
use crate::control::messages::LastUpgrade;
use crate::control::server::Server;
use crate::engine::SignalPipe;
use crate::error::{Error, ErrorKind};
use crate::fault;
use crate::listeners::Address;
use crate::pid_file::PidFile;
use crate::state::HandedState;
use crate::supervisor::build::{Build, Recipe};
use crate::supervisor::interception::Interception;
use crate::supervisor::kept::SavedKept;
use crate::supervisor::machine::{Machine, WorkerId};
use crate::supervisor::options::Options;
use crate::supervisor::output::Output;
use crate::supervisor::sockets::{SavedSocket, Sockets};
use crate::supervisor::worker::Worker;
use crate::sys;
use crate::upgrade::spawn::Started;

/// Where the next build finds it: `PID:FD`.
pub(crate) const STATE_VARIABLE: &str = "HANDOVER_SUPERVISOR";
/// Of what is written. A field that an older build does not know needs no other number, if it can do without.
const VERSION: u32 = 2;
/// The verb; no help and no completion names it.
const REHEARSE: &str = "rehearse-supervisor";

/// All that the next build must know, as [`Resumed`] reads it.
#[derive(Serialize)]
struct Saved<'a> {
    version: u32,
    options: &'a Options,
    own: &'a Started,
    machine: &'a Machine,
    sockets: Vec<SavedSocket>,
    kept: Vec<SavedKept>,
    of_any_port: &'a [u64],
    closed: &'a [Address],
    workers: &'a BTreeMap<WorkerId, Worker>,
    leftovers: &'a [Output],
    survivors: &'a BTreeMap<WorkerId, Interception>,
    recipe: &'a Recipe,
    committed: &'a Option<Build>,
    previous: &'a Option<BuildIdentity>,
    drains: &'a [Drain],
    last_exit: &'a Option<(usize, String)>,
    last_upgrade: &'a Option<LastUpgrade>,
    last_failure: &'a Option<String>,
    since: SystemTime,
    server: &'a Server,
    cut: usize,
    replaced: Replaced,
}

#[derive(Deserialize)]
struct Resumed {
    options: Options,
    own: Started,
    machine: Machine,
    sockets: Vec<SavedSocket>,
    kept: Vec<SavedKept>,
    #[serde(default)]
    of_any_port: Vec<u64>,
    #[serde(default)]
    closed: Vec<Address>,
    workers: BTreeMap<WorkerId, Worker>,
    leftovers: Vec<Output>,
    #[serde(default)]
    survivors: BTreeMap<WorkerId, Interception>,
    recipe: Recipe,
    committed: Option<Build>,
    previous: Option<BuildIdentity>,
    drains: Vec<Drain>,
    last_exit: Option<(usize, String)>,
    last_upgrade: Option<LastUpgrade>,
    last_failure: Option<String>,
    since: SystemTime,
    server: Server,
    cut: usize,
    replaced: Replaced,
}

impl Supervisor {
    /// A sealed memfd of it, and every fd that it names; the memfd is the last.
    pub(super) fn save(&self, replaced: Replaced) -> io::Result<OwnedFd> {
        let saved = Saved {
            version: VERSION,
            options: &self.options,
            own: &self.own,
            machine: &self.machine,
            sockets: self.sockets.saved(),
            kept: self.sockets.kept.saved(),
            of_any_port: self.sockets.kept.of_any_port(),
            closed: self.sockets.closed(),
            workers: &self.workers,
            leftovers: &self.leftovers,
            survivors: &self.survivors,
            recipe: &self.recipe,
            committed: &self.committed,
            previous: &self.previous,
            drains: &self.drains,
            last_exit: &self.last_exit,
            last_upgrade: &self.last_upgrade,
            last_failure: &self.last_failure,
            since: self.since,
            server: &self.server,
            cut: self.cut,
            replaced,
        };
        HandedState::new(VERSION, serde_json::to_vec(&saved)?).to_memfd()
    }

    /// Those that are named in what is saved.
    pub(super) fn with_passed_fds<T>(&self, memfd: &OwnedFd, use_them: impl FnOnce(&[BorrowedFd<'_>]) -> T) -> T {
        let listeners = self.sockets.fds();
        let of_workers = self.workers.values().flat_map(Worker::fds);
        let of_leftovers = self.leftovers.iter().filter_map(Output::fd);
        let of_survivors = self.survivors.values().filter_map(Interception::fd);
        let listeners = listeners.iter().map(AsFd::as_fd).chain(self.sockets.kept.saved_fds());
        let fds = listeners.chain(self.server.fds()).chain(of_workers).chain(of_leftovers).chain(of_survivors);
        use_them(&fds.chain([memfd.as_fd()]).collect::<Vec<_>>())
    }

    fn resume(state: OwnedFd) -> Result<Self, Error> {
        let failed = |error: io::Error| Error::io("go on in place of the supervisor before", error);
        let resumed = read(state).map_err(|cause| Error::new(ErrorKind::Failed, TRIED, cause))?;
        let children = ChildSignals::install().map_err(failed)?;
        let hangup = resumed.options.hangup;
        let forwarded = Forwarded::install(hangup, resumed.recipe.ignored()).map_err(failed)?;
        let signals = SignalPipe::install(&own_signals(hangup), resumed.recipe.ignored())?;
        // They were blocked while nobody could handle them.
        resumed.own.signal_mask.thread_set_mask().map_err(|error| failed(error.into()))?;
        let mut supervisor = Self::assemble(Parts {
            pid_file: resumed.options.pid_file.as_deref().map(PidFile::new),
            sockets: Sockets::resume(resumed.sockets, resumed.kept, resumed.closed).map_err(failed)?,
            options: resumed.options,
            own: resumed.own,
            machine: resumed.machine,
            recipe: resumed.recipe,
            server: resumed.server,
            signals,
            forwarded,
            children,
        });
        resumed.of_any_port.into_iter().for_each(|inode| supervisor.sockets.kept.expect_any_port(inode));
        supervisor.workers = resumed.workers;
        supervisor.leftovers = resumed.leftovers;
        supervisor.survivors = resumed.survivors;
        supervisor.committed = resumed.committed;
        supervisor.previous = resumed.previous;
        supervisor.drains = resumed.drains;
        supervisor.last_exit = resumed.last_exit;
        supervisor.last_upgrade = resumed.last_upgrade;
        supervisor.last_failure = resumed.last_failure;
        supervisor.since = resumed.since;
        supervisor.cut = resumed.cut;
        supervisor.go_on(&resumed.replaced);
        Ok(supervisor)
    }

    /// Takes up all that hangs on timers.
    fn go_on(&mut self, replaced: &Replaced) {
        if !self.drains.is_empty() {
            self.count_from_now();
            self.schedule_alive();
        }
        self.look_for_closed_later();
        self.tell_manager_of_service();
        self.tell_of_replacement(replaced);
        // Whoever has ended meanwhile has sent its signal to nobody.
        self.reap();
    }
}

const TRIED: &str = "go on in place of the supervisor before";

fn read(state: OwnedFd) -> Result<Resumed, String> {
    #[derive(Deserialize)]
    struct Version {
        version: u32,
    }
    let file = File::from(state);
    let read = || -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; usize::try_from(file.metadata()?.len()).map_err(io::Error::other)?];
        // Whoever has read it before has the same position in it.
        file.read_exact_at(&mut bytes, 0)?;
        Ok(bytes)
    };
    let bytes = read().map_err(|error| format!("what it has left cannot be read: {error}"))?;
    let text = |error: serde_json::Error| format!("what it has left cannot be understood: {error}");
    let Version { version } = serde_json::from_slice(&bytes).map_err(text)?;
    if version != VERSION {
        return Err(format!("what it has left is of version {version}, and this build reads {VERSION}"));
    }
    serde_json::from_slice(&bytes).map_err(text)
}

/// The supervisor that this process was before it executed this build, if it was.
pub(in crate::supervisor) fn resumed() -> Option<Result<Supervisor, Error>> {
    let state = sys::fd_from_environment(number_in(&env::var(STATE_VARIABLE).ok()?)?)?;
    fault::reached("exec: replaced", None);
    Some(Supervisor::resume(state))
}

/// What a program has from its supervisor's environment says nothing to it.
fn number_in(variable: &str) -> Option<RawFd> {
    let (pid, number) = variable.split_once(':')?;
    number.parse().ok().filter(|_| pid.parse() == Ok(std::process::id()))
}

/// What the variable says to the next build.
pub(super) fn variable(memfd: &OwnedFd) -> OsString {
    format!("{STATE_VARIABLE}={}:{}", std::process::id(), memfd.as_raw_fd()).into()
}

/// How the next build is asked whether it can.
pub(super) fn rehearsal(memfd: &OwnedFd) -> [OsString; 3] {
    ["handover".into(), REHEARSE.into(), memfd.as_raw_fd().to_string().into()]
}

/// What it answers on stdout.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Answer {
    pub(super) takes_over: bool,
    pub(super) handover: String,
    #[serde(default)]
    pub(super) reason: String,
}

/// Says whether this build could go on from what it is given, if that is what this process was started for.
#[must_use]
pub fn rehearse(arguments: impl IntoIterator<Item = OsString>) -> Option<ExitCode> {
    let mut arguments = arguments.into_iter().skip(1);
    arguments.next().filter(|verb| verb == REHEARSE)?;
    let number = arguments.next()?.to_str()?.parse::<RawFd>().ok()?;
    let state = sys::fd_from_environment(number)?;
    let begun = Instant::now();
    fault::reached("rehearsal", None);
    let reason = read(state).and_then(|resumed| {
        Sockets::resume(resumed.sockets, resumed.kept, resumed.closed)
            .map(drop)
            .map_err(|error| format!("a listener cannot be used: {error}"))
    });
    log::debug!("rehearsed in {:?}", begun.elapsed());
    let answer = Answer {
        takes_over: reason.is_ok(),
        handover: env!("CARGO_PKG_VERSION").to_owned(),
        reason: reason.err().unwrap_or_default(),
    };
    println!("{}", serde_json::to_string(&answer).ok()?);
    Some(if answer.takes_over { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// What the build before has left: it is read or refused. No fd is touched.
#[cfg(any(test, fuzzing))]
pub(crate) fn fuzz(bytes: &[u8]) {
    let Ok(state) = HandedState::new(VERSION, bytes).to_memfd() else { return };
    crate::saved::with_stand_ins(|| drop(read(state)));
    let _ = number_in(&String::from_utf8_lossy(bytes));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_another_version_has_left_is_refused_before_it_is_looked_at() {
        let left = |text: &str| read(HandedState::new(0, text).to_memfd().unwrap()).map(|_| ()).unwrap_err();
        assert_eq!(left(r#"{"version":3}"#), "what it has left is of version 3, and this build reads 2");
        assert!(left(r#"{"version":2}"#).contains("missing field"));
        assert!(left("garbage").contains("cannot be understood"));
    }
}
