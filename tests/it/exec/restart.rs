//! `handover restart` of a supervisor: the old workers end, then new ones start. pm2's `restart`, without its refusals.

use std::net::TcpStream;

use handover::control::State;

use crate::client::{Asked, Kept, ask};
use crate::exec::exec;
use crate::oracle::Outcome;
use crate::server::{Server, has_ended};
use crate::wait::{LONG, eventually};

/// A request that is not answered before the restart, on a connection that a worker has accepted, however many others
/// there are.
fn one_in_flight(server: &Server) -> Kept {
    let mut kept = Kept::connect(server.address());
    kept.send("/env/NOTHING");
    kept.read_to("\r\n\r\n");
    kept.send("/slow/600");
    kept
}

/// Requests that are answered after ten minutes, and that a worker has accepted.
fn in_flight(server: &Server, count: usize) -> Vec<Asked<TcpStream>> {
    let before = server.serving().connections.open;
    let asked = (0..count).map(|_| ask(server.address(), "/slow/600")).collect();
    eventually("requests in flight", || (server.serving().connections.open == before + count).then_some(()));
    asked
}

/// A request that fails is one of those that were cut and told.
#[test]
fn under_load_nobody_is_refused_and_what_is_cut_is_told() {
    let server = exec(&["--workers", "2"]);
    let cookie = server.serving().listeners[0].cookie;
    let load = server.load().new_connections(4).kept(4).monotonic().start();
    let mut cut = 0;
    for generation in 2..=6 {
        load.wait_for_more(50, LONG).unwrap();
        let mut slow = one_in_flight(&server);
        let result = server.restart(&["--json", "--kill-after", "600ms"]).exits_with(0).last_json();
        assert_eq!((&result["result"], &result["generation"]), (&"restarted".into(), &generation.into()));
        cut += result["cut"].as_u64().unwrap_or(0);
        assert!(slow.is_cut_within(LONG));
        load.wait_for_generation(generation, LONG).unwrap();
    }
    let tally = load.stop();
    assert_eq!(tally.count(Outcome::Refused), 0, "{tally}");
    assert!(tally.failed() <= cut && tally.backwards() == 0, "{cut} cut\n{tally}");
    assert!(cut >= 5, "a slow request was always open\n{tally}");
    assert_eq!((server.serving().listeners[0].cookie, server.pid()), (cookie, server.first_pid()));
    server.assert_supervises(2);
}

#[test]
fn with_time_to_drain_nothing_is_lost() {
    let server = exec(&["--workers", "2"]);
    let load = server.load().new_connections(4).kept(4).slow(2, 0.5).monotonic().start();
    for generation in 2..=4 {
        load.wait_for_more(50, LONG).unwrap();
        let done = format!("restarted as generation {generation} (2 workers)");
        server.restart(&["--drain", "30s"]).exits_with(0).says(&done);
        load.wait_for_generation(generation, LONG).unwrap();
    }
    load.stop().assert_lossless();
    let slow = in_flight(&server, 1);
    let run = server.restart(&["--drain", "100ms", "--kill-after", "100ms"]).exits_with(5);
    run.complains("; 1 connection was closed at the drain deadline");
    drop(slow);
}

#[test]
fn the_stages_in_their_order() {
    let server = exec(&[]);
    let slow = in_flight(&server, 3);
    let old = server.worker_pids()[0];
    let run = server.restart(&["--kill-after", "200ms"]).exits_with(0);
    let mut words: Vec<&str> = run.stdout.lines().map(|line| line.split_whitespace().next().unwrap()).collect();
    // The count may be told again while the killed one ends.
    words.dedup();
    assert_eq!(words, ["restarting", "draining", "drained", "gone", "spawned", "ready", "restarted"]);
    let new = server.wait_for_workers(1)[0];
    let last = format!("restarted as generation 2 (pid {new}); 3 connections were closed");
    assert_eq!((run.stdout.lines().last(), has_ended(old)), (Some(last.as_str()), true));
    drop(slow);
}

/// Most programs do nothing about their stop signal, and end by it.
#[test]
fn what_a_program_that_ends_by_its_signal_had_open_is_counted() {
    let server = exec(&[]);
    server.upgrade(&["--env", "PLAIN=deaf", "--wait", "drained"]).exits_with(0);
    let slow = in_flight(&server, 2);
    server.restart(&[]).exits_with(0).says("; 2 connections were closed");
    drop(slow);
    let slow = in_flight(&server, 1);
    let run = server.upgrade(&["--wait", "drained"]).exits_with(5);
    run.complains("; 1 connection was closed before it had ended");
    drop(slow);
}

#[test]
fn a_build_that_fails_when_the_old_one_is_gone_is_followed_by_the_previous_one() {
    let server = exec(&["--workers", "2"]);
    let old = server.wait_for_workers(2);
    let load = server.load().new_connections(4).start();
    let fails: [(&[&str], _); 3] = [
        (&["--env", "PLAIN=exit=3,worker=1"], "worker 1 of the new build exited with status 3 before it was ready"),
        (&["--env", "PLAIN=exit=3"], "of the new build exited with status 3 before it was ready"),
        (&["--env", "PLAIN=hang", "--ready-timeout", "500ms"], "was not ready in time"),
    ];
    for (arguments, message) in fails {
        load.wait_for_more(20, LONG).unwrap();
        let run = server.restart(&[arguments, &["--drain", "30s"]].concat()).exits_with(1);
        run.complains("not restarted: ").complains(message).complains("; generation 1 is started again");
        assert_eq!(server.wait_for_workers(2).len(), 2);
    }
    assert!(old.iter().all(|pid| has_ended(*pid)));
    assert_eq!(server.answerer().generation, 1);
    load.stop().assert_lossless();
    server.assert_supervises(2);
}

/// What can be known before is known before anything is ended.
#[test]
fn a_build_that_cannot_be_started_changes_nothing() {
    let server = exec(&[]);
    let old = server.wait_for_workers(1);
    let run = server.restart(&["--exe", "/no/such/program"]).exits_with(1);
    run.complains("not restarted: ").complains("; generation 1 serves on");
    assert_eq!(server.wait_for_workers(1), old);
}

#[test]
fn one_that_still_drains_is_ended_too_and_another_request_meanwhile_is_refused() {
    let server = exec(&[]);
    let slow = in_flight(&server, 1);
    server.upgrade(&["--drain-timeout", "0s"]).exits_with(0);
    let mut restart = server.begin_restart(&["--kill-after", "1s"]);
    restart.wait_for_line("draining");
    let pid = server.first_pid().to_string();
    server.handover(&["restart", "--pid", &pid]).exits_with(3).complains("another upgrade is under way");
    restart.finish().exits_with(0).says("; 1 connection was closed");
    assert!(server.workers().iter().all(|worker| worker.generation == 3 && worker.state == State::Serving));
    drop(slow);
}
