//! Signals that are for the program: log files that are to be opened anew, a configuration that is to be read again.

use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use nix::sys::signal::{SigSet, Signal, kill};
use signal_hook::{flag, low_level};

use super::Supervisor;
use crate::config::Signals;
use crate::supervisor::options::Hangup;

/// Those that are passed on to every worker.
pub(super) struct Forwarded {
    reader: UnixStream,
    raised: Vec<(Signal, Arc<AtomicBool>)>,
    /// Caught, so that it does not end this process, and that is all.
    passed_on: SigSet,
}

impl Forwarded {
    pub(super) fn install(hangup: Hangup, ignored: &SigSet) -> io::Result<Self> {
        let (reader, writer) = UnixStream::pair()?;
        reader.set_nonblocking(true)?;
        let mut passed_on = SigSet::from(Signal::SIGUSR1);
        let mut caught = passed_on;
        if hangup != Hangup::Upgrade && !ignored.contains(Signal::SIGHUP) {
            caught.add(Signal::SIGHUP);
        }
        if hangup == Hangup::Pass {
            passed_on.add(Signal::SIGHUP);
        }
        let mut raised = Vec::new();
        for signal in caught.iter() {
            let flag = Arc::new(AtomicBool::new(false));
            flag::register(signal as i32, flag.clone())?;
            low_level::pipe::register(signal as i32, writer.try_clone()?)?;
            raised.push((signal, flag));
        }
        Ok(Self { reader, raised, passed_on })
    }

    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.reader.as_fd()
    }

    fn take(&mut self) -> Vec<Signal> {
        let mut bytes = [0; 64];
        while self.reader.read(&mut bytes).is_ok_and(|count| count > 0) {}
        let raised = self.raised.iter().filter(|(_, flag)| flag.swap(false, Ordering::SeqCst));
        raised.map(|(signal, _)| *signal).filter(|signal| self.passed_on.contains(*signal)).collect()
    }
}

/// Those that mean something to the supervisor itself.
pub(super) fn own_signals(hangup: Hangup) -> Signals {
    match hangup {
        Hangup::Upgrade => Signals::default(),
        Hangup::Pass | Hangup::Ignore => Signals::default().without(Signals::HANGUP),
    }
}

impl Supervisor {
    /// Not to those that start up: they may have no handler yet, and would end.
    pub(super) fn forward_signals(&mut self) -> bool {
        let caught = self.forwarded.take();
        for signal in &caught {
            log::info!("{signal} is passed on");
            for (id, worker) in &self.workers {
                if self.machine.worker(*id).is_some_and(|seen| !seen.is_starting()) {
                    // ESRCH: it has just ended.
                    let _ = kill(worker.pid, *signal);
                }
            }
        }
        !caught.is_empty()
    }
}
