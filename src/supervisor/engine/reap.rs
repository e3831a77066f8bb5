//! The end of children: workers, and as process 1 of a container whatever else was left without a parent.

use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};

use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::Pid;
use signal_hook::consts::SIGCHLD;

use super::Supervisor;
use crate::reap;
use crate::supervisor::machine::{Event, WorkerId};
use crate::sys::{self, Child, End};
use crate::watch::lock;

/// SIGCHLD as something to poll.
pub(super) struct ChildSignals(UnixStream);

impl ChildSignals {
    pub(super) fn install() -> io::Result<Self> {
        let (reader, writer) = UnixStream::pair()?;
        reader.set_nonblocking(true)?;
        signal_hook::low_level::pipe::register(SIGCHLD, writer)?;
        Ok(Self(reader))
    }

    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }

    pub(super) fn clear(&mut self) {
        let mut bytes = [0; 64];
        while self.0.read(&mut bytes).is_ok_and(|count| count > 0) {}
    }
}

/// Children that are known to have ended, and are being reaped.
#[derive(Default)]
pub(super) struct Reaper(Arc<Mutex<Vec<Pid>>>);

impl Reaper {
    /// SIGCHLD comes once more when that is done: others may have been behind it in the kernel's list.
    fn reap(&self, pid: Pid) {
        let reaping = Arc::clone(&self.0);
        lock(&self.0).push(pid);
        reap::aside(move || {
            let _ = waitpid(pid, Some(WaitPidFlag::WNOHANG));
            lock(&reaping).retain(|other| *other != pid);
            let _ = kill(Pid::this(), Signal::SIGCHLD);
        });
    }
}

impl Supervisor {
    pub(super) fn reap(&mut self) {
        while let Some((pid, end)) = self.ended_child() {
            let worker = self.workers.iter().find(|(_, worker)| worker.pid == pid).map(|(id, _)| *id);
            // As long as it is not reaped, its number and that of its group are nobody else's.
            if let Some(id) = worker {
                self.kill_what_is_left(id);
            }
            self.kill_what_is_left_of_rehearsal(pid);
            self.reaper.reap(pid);
            match worker {
                Some(id) => self.worker_ended(id, end),
                None => self.other_ended(pid, end),
            }
        }
    }

    /// One that has ended and is not being reaped. The kernel names the first of all, behind which others of ours may be.
    fn ended_child(&self) -> Option<(Pid, End)> {
        let look = |child| sys::ended_child(child).ok().flatten();
        // As long as this is locked, none of them is reaped and forgotten.
        let reaping = lock(&self.reaper.0);
        let new = |(pid, _): &(Pid, End)| !reaping.contains(pid);
        let first = look(Child::Any)?;
        let of_workers = self.workers.values().flat_map(|worker| [Some(worker.pid), worker.check]).flatten();
        let mut ours = of_workers.chain(self.replacement.iter().map(|replacement| replacement.child));
        Some(first).filter(new).or_else(|| ours.find_map(|pid| look(Child::Pid(pid)).filter(new)))
    }

    /// What the worker has started must not serve on without it.
    fn kill_what_is_left(&mut self, id: WorkerId) {
        self.workers.get_mut(&id).into_iter().for_each(|worker| worker.kill());
    }

    fn worker_ended(&mut self, id: WorkerId, end: End) {
        // It may have said why.
        self.read_conversation(id);
        let Some(worker) = self.workers.get_mut(&id) else { return };
        log::info!("process {} {end}", worker.pid);
        let how = match worker.not_ready.take() {
            // By this process.
            Some(why) => format!("was not ready in time: {why}"),
            None => format!("{end} before it was ready"),
        };
        self.last_exit = Some((worker.slot, how));
        worker.exit = Some(end.to_string());
        // Its last words: a pipe holds no more than that.
        self.blocked.extend(worker.pass_on());
        // One that ends by the very signal that tells it to stop has finished nothing.
        let open = std::mem::take(&mut worker.open);
        if matches!(end, End::Killed { .. }) {
            self.count_cut(id, open);
        }
        let drained = self.draining_workers().iter().any(|(other, _)| *other == id);
        self.tell(Event::Exited(id));
        if let Some(mut worker) = self.workers.remove(&id) {
            self.leave_to_kernel(id, worker.interception.take());
            self.leftovers.extend(worker.into_outputs().filter(|output| output.fd().is_some()));
        }
        if drained {
            self.tell_manager_of_older();
        }
    }

    fn other_ended(&mut self, pid: Pid, end: End) {
        if self.check_ended(pid, end) || self.rehearsal_ended(pid, end) {
            return;
        }
        log::debug!("process {pid}, which no other process waited for, {end}");
    }
}
