//! The new build speaks the wire wrong: it is killed, and the old one serves on.

use std::time::{Duration, Instant};

use crate::command::Run;
use crate::server::Server;
use crate::wait::LONG;

#[track_caller]
fn breaks(fault: &str) -> Run {
    let server = Server::start(&["--tcp", "http=127.0.0.1:0", "--tcp", "admin=127.0.0.1:0"]);
    let pid = server.pid();
    let before = server.settled_holdings(pid);
    let load = server.load().start();
    let run = server.upgrade_with_fault(fault, &[]).exits_with(1).complains("(generation 1) serves on");
    load.wait_for_more(20, LONG).unwrap();
    load.stop().assert_lossless();
    server.assert_holds(pid, &before);
    server.upgrade(&[]).exits_with(0);
    run
}

#[test]
fn a_newer_version() {
    breaks("newer-version").complains("refused the handover: this build speaks protocol versions 2 to 3");
}

#[test]
fn a_version_that_was_not_offered() {
    breaks("unknown-version").complains("chose version 9 of the protocol, which was not offered");
}

#[test]
fn garbage() {
    breaks("garbage").complains("sent bytes that are no frame");
}

#[test]
fn a_kind_that_there_is_not() {
    breaks("unknown-kind").complains("a frame of kind 77");
}

#[test]
fn a_body_of_another_shape() {
    breaks("body-no-object").complains("whose body is no JSON object");
}

#[test]
fn more_than_is_due() {
    breaks("too-much").complains("sent `adopted` out of turn");
}

#[test]
fn a_frame_too_long() {
    breaks("frame-too-long").complains("a frame of 4194305 bytes, more than 4194304");
}

#[test]
fn fewer_listeners() {
    breaks("fewer-listeners").complains("adopted 1 listeners, not the 2 that were offered");
}

#[test]
fn other_fds() {
    breaks("other-fds").complains("adopted other sockets than those that were offered");
}

#[test]
fn the_channel_closed_after_it_has_adopted() {
    breaks("closes-channel").complains("closed the channel");
}

#[test]
fn the_channel_closed_at_once() {
    breaks("closes-at-once").complains("closed the channel");
}

#[test]
fn ready_before_it_has_adopted() {
    breaks("ready-before-adopted").complains("sent `ready` out of turn");
}

/// A new build that never stops talking must not keep the old one from anything else.
#[test]
fn a_flood() {
    let server = Server::http();
    let pid = server.pid();
    let before = server.settled_holdings(pid);
    let mut upgrade = server.begin_upgrade(&["--env", "FIXTURE_FAULT=flood", "--json"]);
    let new = upgrade.new_pid();
    // Nor whoever waits from reading what else there is to say.
    upgrade.wait_for_line("still busy");
    let first = Instant::now();
    (0..4).for_each(|_| drop(upgrade.wait_for_line("still busy")));
    assert!(first.elapsed() > Duration::from_millis(300), "{:?}", first.elapsed());
    assert_eq!(server.status(pid).generation, 1);
    server.signal(new, nix::sys::signal::Signal::SIGKILL);
    let run = upgrade.finish().exits_with(1);
    assert!(run.last_json()["message"].as_str().unwrap().contains("was killed by SIGKILL"), "{run:?}");
    server.assert_holds(pid, &before);
    assert_eq!(server.answerer().generation, 1);
}
