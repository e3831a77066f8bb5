//! Programs that use the library: from the second generation on the supervisor speaks the protocol with them.

use std::fs;
use std::net::SocketAddr;

use nix::sys::signal::Signal;

use crate::command::{Run, Running};
use crate::exec::{HTTP, plain};
use crate::home::{HANDOVER, Home, fixture};
use crate::oracle::Load;
use crate::server::{SOON, Server};
use crate::wait::{LONG, eventually, eventually_equal};

/// Its workers have control sockets of their own, so it is asked by its pid.
struct Supervised {
    server: Server,
    pid: i32,
    address: SocketAddr,
}

fn supervised(options: &[&str]) -> Supervised {
    let home = Home::new();
    let mut command = home.logged(HANDOVER, &["exec", "--trial", "200ms"]);
    command.args(HTTP).args(options).arg("--").arg(fixture()).args(["--tcp", "http=127.0.0.1:0"]).args(SOON);
    let server = Server::run(home, command);
    let pid = server.first_pid();
    let address = server.status(pid).listeners[0].address.parse().unwrap();
    Supervised { server, pid, address }
}

impl Supervised {
    fn begin(&self, arguments: &[&str]) -> Running {
        let pid = self.pid.to_string();
        Running::start(self.server.handover_command(&[&["upgrade", "--pid", &pid], arguments].concat()))
    }

    #[track_caller]
    fn upgrade(&self, arguments: &[&str]) -> Run {
        self.begin(arguments).finish()
    }

    fn load(&self) -> Load {
        Load::new(self.address).new_connections(2).kept(4)
    }

    fn answering_generation(&self) -> u64 {
        crate::client::ask(self.address, "/").answerer().generation
    }
}

#[test]
fn upgrades_lose_nothing_and_go_by_the_protocol() {
    let supervised = supervised(&["--workers", "2"]);
    let load = supervised.load().slow(1, 1.0).start();
    for generation in 2..=4 {
        load.wait_for_more(50, LONG).unwrap();
        let run = supervised.upgrade(&["--wait", "drained", "--json"]).exits_with(0);
        let names: Vec<String> =
            run.json().iter().filter_map(|line| line["stage"].as_str().map(str::to_owned)).collect();
        let count = |name: &str| names.iter().filter(|one| *one == name).count();
        assert_eq!((count("spawned"), count("adopted"), count("ready"), count("committed")), (2, 2, 2, 1), "{names:?}");
        assert!(run.stdout.contains("says that it is ready"), "{run:?}");
        // It knows which one it is.
        load.wait_for_generation(generation, LONG).unwrap();
    }
    load.stop().assert_lossless();
    // Also the one that is started after a crash.
    let worker = supervised.server.status(supervised.pid).workers[0].pid.unwrap();
    supervised.server.signal(worker, Signal::SIGKILL);
    eventually("another in its place", || (!supervised.server.worker_pids().contains(&worker)).then_some(()));
    assert_eq!(supervised.answering_generation(), 4);
    supervised.server.assert_supervises(2);
}

/// One is ready, the other is not yet: a build that may still fail serves nobody.
#[test]
fn no_new_worker_accepts_before_all_are_ready() {
    let scratch = Home::new();
    let check = scratch.path("may-be-ready");
    let command = format!("test $HANDOVER_GENERATION = 1 || test $HANDOVER_WORKER = 0 || test -e {}", check.display());
    let supervised = supervised(&["--workers", "2", "--ready-cmd", &command]);
    let mut upgrade = supervised.begin(&["--json"]);
    upgrade.wait_for_line("\"ready\"");
    let load = supervised.load().start();
    load.wait_for_more(200, LONG).unwrap();
    assert_eq!(load.tally().generations().keys().collect::<Vec<_>>(), [&1]);
    fs::write(&check, "").unwrap();
    upgrade.finish().exits_with(0);
    load.wait_for_generation(2, LONG).unwrap();
    load.stop().assert_lossless();
}

#[test]
fn what_a_new_build_says_is_told_and_a_failure_leaves_nothing() {
    let supervised = supervised(&["--workers", "2"]);
    let fds = supervised.server.assert_supervises(2);
    let load = supervised.load().start();
    for (fault, message) in [
        ("give-up", "of the new build gave up: the database is of a later version; generation 1 serves on"),
        ("exit-after-adopted", "of the new build exited with status 7 before it was ready"),
        ("hang-after-adopted", "was not ready in time: it has not called `ready`"),
        ("dies-in-trial", "was killed by SIGKILL within the trial"),
    ] {
        load.wait_for_more(20, LONG).unwrap();
        let timeout = if fault.starts_with("hang") { "1s" } else { "30s" };
        let fault = format!("FIXTURE_FAULT={fault}");
        let run = supervised.upgrade(&["--env", &fault, "--ready-timeout", timeout, "--trial", "20s"]).exits_with(1);
        run.complains(message);
    }
    // As long as it says so it may take longer than it is given.
    let run = supervised.upgrade(&["--env", "FIXTURE_FAULT=still-starting=8", "--ready-timeout", "1s"]).exits_with(0);
    run.says("step 8");
    load.stop();
    eventually_equal("its fds", &fds, || supervised.server.assert_supervises(2));
}

#[test]
fn a_build_that_does_not_use_the_library_any_more_finds_its_sockets_all_the_same() {
    let supervised = supervised(&[]);
    let load = supervised.load().start();
    let plain = plain().display().to_string();
    supervised.upgrade(&["--exe", &plain, "--wait", "drained", "--", "poll"]).exits_with(0).says("waits on http");
    let fixture = fixture().display().to_string();
    let back = ["--exe", &fixture, "--wait", "drained", "--", "--tcp", "http=127.0.0.1:0"];
    supervised.upgrade(&back).exits_with(0);
    supervised.upgrade(&["--wait", "drained"]).exits_with(0).says("adopted");
    load.wait_for_generation(4, LONG).unwrap();
    load.stop().assert_lossless();
    supervised.server.assert_supervises(1);
}

/// It would start the new build as a child of its own, and the supervisor would start it again when it ends.
#[test]
fn a_worker_does_not_replace_itself() {
    let supervised = supervised(&[]);
    let worker = supervised.server.status(supervised.pid).workers[0].pid.unwrap();
    let asks = |verb: &str| supervised.server.handover(&[verb, "--pid", &worker.to_string()]);
    let message =
        format!("process {worker} is run by `handover exec`, which replaces it: ask process {}", supervised.pid);
    asks("upgrade").exits_with(2).complains(&message);
    asks("restart").exits_with(2).complains(&message);
    supervised.server.signal(worker, Signal::SIGUSR2);
    eventually("the log", || supervised.server.home.log().contains("upgrade refused: process").then_some(()));
    assert_eq!(supervised.server.status(supervised.pid).workers[0].pid, Some(worker));
    supervised.server.assert_supervises(1);
}
