//! Signals as something to poll. The handlers set a flag and write a byte; both are async-signal-safe.

use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use nix::sys::signal::{SigSet, Signal};
use signal_hook::SigId;
use signal_hook::consts::FORBIDDEN;
use signal_hook::{flag, low_level};

use crate::config::Signals;
use crate::error::{Error, ErrorKind};

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
        let mut pipe =
            Self { reader, upgrade: Arc::default(), stops: vec![], registered: vec![], caught: SigSet::empty() };
        let on_purpose = IGNORED_ON_PURPOSE.into_iter().filter(|signal| ignored.contains(*signal));
        let left_alone: Vec<i32> = on_purpose.map(|signal| signal as i32).collect();
        let ours = |signal: &&i32| !left_alone.contains(signal);
        for signal in signals.upgrade.iter().filter(ours) {
            pipe.register(*signal, pipe.upgrade.clone(), &writer).map_err(failed)?;
        }
        for signal in signals.stop.iter().filter(ours) {
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

impl AsFd for SignalPipe {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.reader.as_fd()
    }
}
