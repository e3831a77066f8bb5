//! The end of children: workers, and as process 1 of a container whatever else was left without a parent.

use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;

use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid, waitpid};
use nix::unistd::Pid;
use signal_hook::consts::SIGCHLD;

use super::Supervisor;
use crate::engine::exit_words;
use crate::supervisor::machine::{Event, WorkerId};

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

impl Supervisor {
    pub(super) fn reap(&mut self) {
        // Only looked at: as long as it is not reaped, its number and that of its group are nobody else's.
        let ended = WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG | WaitPidFlag::WNOWAIT;
        while let Ok(Some(pid)) = waitid(Id::All, ended).map(|status| status.pid()) {
            let worker = self.workers.iter().find(|(_, worker)| worker.pid == pid).map(|(id, _)| *id);
            if let Some(id) = worker {
                self.kill_what_is_left(id);
            }
            self.kill_what_is_left_of_rehearsal(pid);
            match (waitpid(pid, Some(WaitPidFlag::WNOHANG)), worker) {
                (Ok(status), Some(id)) => self.worker_ended(id, status),
                (Ok(status), None) => self.other_ended(pid, status),
                // Nobody else reaps; but a loop that never ends would be worse.
                (Err(error), _) => return log::error!("cannot reap process {pid}: {error}"),
            }
        }
    }

    /// What the worker has started must not serve on without it.
    fn kill_what_is_left(&mut self, id: WorkerId) {
        self.workers.get_mut(&id).into_iter().for_each(|worker| worker.kill());
    }

    fn worker_ended(&mut self, id: WorkerId, status: WaitStatus) {
        let Some(worker) = self.workers.get_mut(&id) else { return };
        let words = exit_words(status).unwrap_or_else(|| "ended".to_owned());
        log::info!("process {} {words}", worker.pid);
        self.last_exit = Some((worker.slot, format!("{words} before it was ready")));
        worker.exit = Some(words);
        // Its last words: a pipe holds no more than that.
        self.blocked.extend(worker.pass_on());
        // One that ends by the very signal that tells it to stop has finished nothing.
        let open = std::mem::take(&mut worker.open);
        if matches!(status, WaitStatus::Signaled(..)) {
            self.count_cut(id, open);
        }
        let drained = self.draining_workers().iter().any(|(other, _)| *other == id);
        self.tell(Event::Exited(id));
        if let Some(worker) = self.workers.remove(&id) {
            self.leftovers.extend(worker.into_outputs().filter(|output| output.fd().is_some()));
        }
        if drained {
            self.tell_manager_of_older();
        }
    }

    fn other_ended(&mut self, pid: Pid, status: WaitStatus) {
        if self.check_ended(pid, status) || self.rehearsal_ended(pid, status) {
            return;
        }
        log::debug!("process {pid}, which no other process waited for, {}", exit_words(status).unwrap_or_default());
    }
}
