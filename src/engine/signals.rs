//! Signals as something to poll. The handlers set a flag and write a byte; both are async-signal-safe.

use std::collections::BTreeMap;
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use nix::sys::signal::{SigSet, Signal};
use signal_hook::SigId;
use signal_hook::consts::FORBIDDEN;
use signal_hook::{flag, low_level};

use crate::config::Signals;
use crate::error::{Error, ErrorKind};
use crate::sys;
use crate::watch::lock;

/// Where one of these is ignored at the start, it was told to be: by `nohup`, or by a shell that starts something in the
/// background.
const IGNORED_ON_PURPOSE: [Signal; 3] = [Signal::SIGHUP, Signal::SIGINT, Signal::SIGQUIT];

pub(crate) struct SignalPipe {
    reader: UnixStream,
    upgrade: Arc<AtomicBool>,
    /// One for each signal, so that SIGTERM and SIGINT at the same time are two.
    stops: Vec<Arc<AtomicBool>>,
    registered: Vec<SigId>,
    caught: SigSet,
    unheard: Vec<Unheard>,
}

/// What has come since the last look.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Caught {
    pub(crate) upgrade: bool,
    pub(crate) stops: usize,
}

impl SignalPipe {
    /// Installs the handlers. Earlier ones of the application are called as well.
    pub(crate) fn install(signals: &Signals, ignored: &SigSet) -> Result<Option<Self>, Error> {
        if signals.upgrade.is_empty() && signals.stop.is_empty() {
            return Ok(None);
        }
        let failed = |error: io::Error| Error::io("install signal handlers", error);
        if let Some(signal) = signals.upgrade.iter().chain(&signals.stop).find(|signal| FORBIDDEN.contains(signal)) {
            let cause = "no handler can or should be installed for it";
            return Err(Error::new(ErrorKind::Invalid, format!("use signal {signal}"), cause));
        }
        let (reader, writer) = UnixStream::pair().map_err(failed)?;
        reader.set_nonblocking(true).map_err(failed)?;
        let mut pipe = Self {
            reader,
            upgrade: Arc::default(),
            stops: vec![],
            registered: vec![],
            caught: SigSet::empty(),
            unheard: vec![],
        };
        let on_purpose = IGNORED_ON_PURPOSE.into_iter().filter(|signal| ignored.contains(*signal));
        let left_alone: Vec<i32> = on_purpose.map(|signal| signal as i32).collect();
        let ours = |signal: &&i32| !left_alone.contains(signal);
        for signal in signals.upgrade.iter().filter(ours) {
            pipe.register(*signal, pipe.upgrade.clone(), &writer).map_err(failed)?;
        }
        for signal in signals.stop.iter().filter(ours) {
            pipe.unheard.extend(Unheard::install(*signal).map_err(failed)?);
            let flag = Arc::new(AtomicBool::new(false));
            pipe.stops.push(flag.clone());
            pipe.register(*signal, flag, &writer).map_err(failed)?;
        }
        Ok(Some(pipe))
    }

    /// The flag is set before the byte is written, because handlers run in the order of their registration.
    fn register(&mut self, signal: i32, raised: Arc<AtomicBool>, writer: &UnixStream) -> io::Result<()> {
        self.registered.push(flag::register(signal, raised)?);
        self.registered.push(low_level::pipe::register(signal, writer.try_clone()?)?);
        self.caught.extend(Signal::try_from(signal));
        Ok(())
    }

    /// So that there is one thread to which they can be delivered, whatever the application blocks in its own.
    pub(crate) fn unblock_in_this_thread(&self) {
        if let Err(error) = self.caught.thread_unblock() {
            log::error!("cannot unblock signals: {error}");
        }
    }

    pub(crate) fn take(&mut self) -> Caught {
        let mut bytes = [0; 64];
        while self.reader.read(&mut bytes).is_ok_and(|count| count > 0) {}
        Caught {
            upgrade: self.upgrade.swap(false, Ordering::SeqCst),
            stops: self.stops.iter().filter(|flag| flag.swap(false, Ordering::SeqCst)).count(),
        }
    }
}

impl Drop for SignalPipe {
    fn drop(&mut self) {
        for id in self.registered.drain(..) {
            low_level::unregister(id);
        }
    }
}

/// A signal to stop that does what it does by default while there is no [`SignalPipe`]: after a start that has failed, or when
/// the last handle is gone. A handler that was installed once is never taken away (signal-hook), and would swallow it.
struct Unheard(i32);

/// Of each signal, whether nobody hears it, and how many do.
static UNHEARD: Mutex<BTreeMap<i32, (Arc<AtomicBool>, usize)>> = Mutex::new(BTreeMap::new());

impl Unheard {
    /// None: the application has a handler of its own, or ignores it.
    fn install(signal: i32) -> io::Result<Option<Self>> {
        let mut all = lock(&UNHEARD);
        if !all.contains_key(&signal) && sys::is_default(signal) {
            let unheard = Arc::new(AtomicBool::new(false));
            flag::register_conditional_default(signal, unheard.clone())?;
            all.insert(signal, (unheard, 0));
        }
        let Some((unheard, hear)) = all.get_mut(&signal) else { return Ok(None) };
        *hear += 1;
        unheard.store(false, Ordering::SeqCst);
        Ok(Some(Self(signal)))
    }
}

impl Drop for Unheard {
    fn drop(&mut self) {
        if let Some((unheard, hear)) = lock(&UNHEARD).get_mut(&self.0) {
            *hear -= 1;
            unheard.store(*hear == 0, Ordering::SeqCst);
        }
    }
}

impl AsFd for SignalPipe {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.reader.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::env;
    use std::os::unix::process::ExitStatusExt;
    use std::process::Command;

    const IN_CHILD: &str = "HANDOVER_TEST_UNHEARD";

    /// In a process of its own, which dies of it.
    #[test]
    fn a_signal_to_stop_is_not_swallowed_when_nobody_hears_it() {
        if env::var_os(IN_CHILD).is_some() {
            let install = || SignalPipe::install(&Signals::default(), &SigSet::empty()).unwrap().unwrap();
            let (first, second) = (install(), install());
            drop(first);
            nix::sys::signal::raise(Signal::SIGTERM).unwrap();
            drop(second);
            // As one that tries again.
            let mut third = install();
            nix::sys::signal::raise(Signal::SIGTERM).unwrap();
            assert_eq!(third.take().stops, 1);
            drop(third);
            nix::sys::signal::raise(Signal::SIGTERM).unwrap();
            std::process::exit(0);
        }
        let name = "engine::signals::tests::a_signal_to_stop_is_not_swallowed_when_nobody_hears_it";
        let mut child = Command::new(env::current_exe().unwrap());
        let output = child.args(["--exact", name, "--nocapture"]).env(IN_CHILD, "1").output().unwrap();
        assert_eq!(output.status.signal(), Some(Signal::SIGTERM as i32), "{output:?}");
    }
}
