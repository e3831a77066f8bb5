//! Many upgrades: nothing is lost, nothing grows.

use std::fs;

use crate::server::{Server, fds_of};
use crate::wait::eventually;

#[test]
fn ten_upgrades_lose_nothing() {
    let server = Server::http();
    let cookie = server.serving().listeners[0].cookie;
    let load = server.load().new_connections(6).kept(6).slow(2, 1.0).stream(1).monotonic().start();
    server.upgrade_again_and_again(10, "50ms", &load);
    let tally = load.stop();
    tally.assert_lossless();
    assert_eq!(tally.generations().len(), 11, "{tally}");
    assert_eq!(server.serving().listeners[0].cookie, cookie);
    let pid = server.pid();
    server.assert_only(pid);
}

/// A trial so short that the new build has hardly been heard of: that is no reason to doubt that it accepts.
#[test]
fn a_trial_of_no_time_is_no_trap() {
    let server = Server::http();
    let load = server.load().new_connections(6).start();
    server.upgrade_again_and_again(10, "0s", &load);
    load.stop().assert_lossless();
}

#[test]
fn kept_connections_in_a_closed_loop_lose_nothing() {
    let server = Server::http();
    let load = crate::oracle::Load::new(server.address()).kept(16).start();
    server.upgrade_again_and_again(20, "20ms", &load);
    load.stop().assert_lossless();
}

/// Resident kilobytes that are this process's own.
fn anonymous_kilobytes(pid: i32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

#[test]
fn after_fifty_upgrades_nothing_has_grown() {
    let server = Server::start(&["--tcp", "http=127.0.0.1:0", "--udp", "dns=127.0.0.1:0"]);
    let measure = || {
        let pid = server.pid();
        let _ = server.get("/");
        eventually("nobody drains", || server.serving().draining.is_empty().then_some(()));
        server.assert_only(pid);
        let _ = server.settled_holdings(pid);
        (fds_of(pid).len(), fs::read_dir(format!("/proc/{pid}/task")).unwrap().count(), anonymous_kilobytes(pid))
    };
    server.upgrade(&["--trial", "10ms"]).exits_with(0);
    let (fds, threads, memory) = measure();
    for _ in 0..50 {
        server.upgrade(&["--trial", "10ms", "--wait", "drained"]).exits_with(0);
    }
    let (fds_now, threads_now, memory_now) = measure();
    assert_eq!((fds_now, threads_now), (fds, threads));
    assert!(memory_now < memory + 1024, "{memory} kB became {memory_now} kB");
    assert_eq!(server.generation(), 52);
}

/// Failed upgrades leave nothing either, in the process that goes through all of them.
#[test]
fn after_thirty_failed_upgrades_nothing_has_grown() {
    let server = Server::http();
    let pid = server.pid();
    server.upgrade_with_fault("exit-1", &[]).exits_with(1);
    let before = server.settled_holdings(pid);
    let memory = anonymous_kilobytes(pid);
    for fault in ["exit-1", "give-up", "garbage"].repeat(10) {
        server.upgrade_with_fault(fault, &[]).exits_with(1);
    }
    server.assert_holds(pid, &before);
    let memory_now = anonymous_kilobytes(pid);
    assert!(memory_now < memory + 1024, "{memory} kB became {memory_now} kB");
}
