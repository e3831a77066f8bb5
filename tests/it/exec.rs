//! `handover exec`: a program that knows nothing of handover, run by a supervisor and replaced.

mod config;
mod crash;
mod intercept;
mod itself;
mod library;
mod passed;
mod pid_one;
mod ready;
mod restart;
mod start;
mod steps;
mod stop;
mod upgrade;

use std::path::PathBuf;

use handover::control::{State, WorkerStatus};

use crate::home::{HANDOVER, Home};
use crate::server::{Server, children_of, fds_of};
use crate::wait::eventually;

/// The program, which Cargo builds beside the tests.
pub(crate) fn plain() -> PathBuf {
    let test = std::env::current_exe().unwrap();
    test.ancestors().nth(2).unwrap().join("examples/plain")
}

const HTTP: [&str; 2] = ["--listen", "http=127.0.0.1:0"];

/// `handover exec` with these options, once the program serves. The pid of the server is that of the supervisor.
fn exec(options: &[&str]) -> Server {
    exec_in(Home::new(), options, plain().to_str().unwrap())
}

fn exec_in(home: Home, options: &[&str], program: &str) -> Server {
    let arguments = [&["exec", "--trial", "100ms"], &HTTP[..], options, &["--", program]].concat();
    let command = home.logged(HANDOVER, &arguments);
    Server::run(home, command)
}

impl Server {
    fn workers(&self) -> Vec<WorkerStatus> {
        self.status(self.first_pid()).workers
    }

    pub(crate) fn worker_pids(&self) -> Vec<i32> {
        self.workers().iter().filter_map(|worker| worker.pid).collect()
    }

    /// Until so many workers serve, all of the newest generation.
    #[track_caller]
    fn wait_for_workers(&self, count: usize) -> Vec<i32> {
        eventually(&format!("{count} workers that serve"), || {
            let workers = self.workers();
            let serve = workers.iter().all(|worker| worker.state == State::Serving);
            (serve && workers.len() == count).then(|| workers.iter().filter_map(|worker| worker.pid).collect())
        })
    }

    /// Nothing of an earlier generation is left: the supervisor has its workers, no zombie and no fd more than these need.
    #[track_caller]
    pub(crate) fn assert_supervises(&self, workers: usize) -> usize {
        let pid = self.first_pid();
        let mut wanted = self.wait_for_workers(workers);
        wanted.push(pid);
        wanted.sort_unstable();
        eventually("no process but the supervisor and its workers", || (self.home.processes() == wanted).then_some(()));
        eventually("no zombie", || (children_of(pid).len() == workers).then_some(()));
        // The connection on which it was asked is closed a moment later.
        let mut before = usize::MAX;
        eventually("the same fds twice", || {
            std::thread::sleep(std::time::Duration::from_millis(20));
            let now = fds_of(pid).len();
            let is_same = std::mem::replace(&mut before, now) == now;
            is_same.then_some(now)
        })
    }
}
