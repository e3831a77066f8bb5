//! A new process that something else started asks the old one for the handover.

use std::process::Child;

use handover::control::State;
use nix::sys::signal::Signal;

use crate::server::{SOON, Server};
use crate::wait::{LONG, eventually};

/// Reaped in any case.
struct Puller(Child);

impl Puller {
    fn start(server: &Server, fault: &str, arguments: &[&str]) -> Self {
        let old = server.pid().to_string();
        let first = ["--tcp", "http=127.0.0.1:0", "--take-over", &old];
        let mut command = server.home.fixture(&[&SOON, &first[..], arguments].concat());
        if let Some((name, value)) = fault.split_once('=') {
            command.env(name, value);
        }
        Self(command.spawn().unwrap())
    }

    fn pid(&self) -> i32 {
        self.0.id().cast_signed()
    }

    /// Ends with this exit code.
    #[track_caller]
    fn exits_with(mut self, code: i32) {
        let status = eventually("the end of the new process", || self.0.try_wait().unwrap());
        assert_eq!(status.code(), Some(code));
    }
}

impl Drop for Puller {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn takes_over_under_load() {
    let server = Server::http();
    let (old, before) = (server.pid(), server.serving().listeners[0].cookie);
    let load = server.load().monotonic().start();
    load.wait_for_more(20, LONG).unwrap();
    let new = Puller::start(&server, "", &[]);
    load.wait_for_generation(2, LONG).unwrap();
    server.wait_for_end(old);
    load.stop().assert_lossless();
    let status = server.serving();
    assert_eq!((status.pid, status.generation, status.listeners[0].cookie), (new.pid(), 2, before));
    server.assert_only(new.pid());
    // From here on it is a process like any other.
    server.upgrade(&["--wait", "drained", "--", "--trial", "50ms", "--tcp", "http=127.0.0.1:0"]).exits_with(0);
    assert_eq!(server.answerer().generation, 3);
}

#[test]
fn is_refused_while_another_upgrade_is_under_way() {
    let server = Server::http();
    let hold = server.home.fifo("hold");
    let upgrade = server.begin_upgrade(&["--env", &hold.fault("hold-before-ready")]);
    let held = hold.reached();
    // Both start up, and only one of the two serves.
    let old = server.first_pid().to_string();
    let mut command = server.home.fixture(&["--tcp", "http=127.0.0.1:0", "--take-over", &old]);
    Puller(command.spawn().unwrap()).exits_with(1);
    assert!(server.home.log().contains(&format!("cannot take over from process {old}: another upgrade is under way")));
    held.let_go();
    upgrade.finish().exits_with(0);
    server.wait_for_end(server.first_pid());
    server.assert_only(server.pid());
}

#[test]
fn dies_before_it_is_ready() {
    let server = Server::http();
    let old = server.pid();
    let before = server.settled_holdings(old);
    let load = server.load().start();
    let hold = server.home.fifo("hold");
    let new = Puller::start(&server, &hold.fault("hold-before-ready"), &[]);
    let _held = hold.reached();
    assert_eq!(server.status(old).state, State::Upgrading);
    server.signal(new.pid(), Signal::SIGKILL);
    server.wait_until(old, State::Serving);
    load.wait_for_more(20, LONG).unwrap();
    load.stop().assert_lossless();
    drop(new);
    server.assert_holds(old, &before);
    server.upgrade(&[]).exits_with(0);
}

/// It is not ours to kill before commit; it is told, and must not serve.
#[test]
fn is_told_when_it_takes_too_long() {
    let server = Server::start(&["--tcp", "http=127.0.0.1:0", "--ready-timeout", "200ms"]);
    let old = server.pid();
    let before = server.settled_holdings(old);
    let hold = server.home.fifo("hold");
    let new = Puller::start(&server, &hold.fault("hold-before-ready"), &[]);
    let held = hold.reached();
    server.wait_until(old, State::Serving);
    assert!(!crate::server::has_ended(new.pid()));
    held.let_go();
    new.exits_with(1);
    assert!(server.home.log().contains("was not ready within 200ms"), "{}", server.home.log());
    assert_eq!(server.answerer().generation, 1);
    server.assert_holds(old, &before);
}

#[test]
fn dies_in_the_trial() {
    let server = Server::start(&["--tcp", "http=127.0.0.1:0", "--trial", "60s"]);
    let old = server.pid();
    let before = server.settled_holdings(old);
    let load = server.load().start();
    let new = Puller::start(&server, "FIXTURE_FAULT=dies-in-trial", &[]);
    eventually("the roll-back", || server.status(old).last_upgrade);
    load.wait_for_more(20, LONG).unwrap();
    load.stop().assert_lossless();
    drop(new);
    server.assert_holds(old, &before);
    assert_eq!(server.answerer().generation, 1);
}

#[test]
fn of_nobody_fails() {
    let server = Server::http();
    let nobody = std::process::id().to_string();
    let mut command = server.home.fixture(&["--tcp", "http=127.0.0.1:0", "--take-over", &nobody]);
    Puller(command.spawn().unwrap()).exits_with(1);
    assert!(server.home.log().contains("is no handover process"), "{}", server.home.log());
}
