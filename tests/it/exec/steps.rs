//! Upgrades of fewer than all workers at a time, and of programs that cannot run twice.

use crate::client::ask;
use crate::exec::{exec, exec_in, plain};
use crate::home::Home;
use crate::wait::{LONG, eventually};
use handover::control::State;

#[test]
fn in_steps_no_more_run_at_once_than_one_step_more() {
    let server = exec(&["--workers", "4", "--surge", "1"]);
    let load = server.load().start();
    let mut upgrade = server.begin_upgrade(&["--trial", "50ms", "--wait", "drained", "--json"]);
    let mut most = 0;
    eventually("the end of the upgrade", || {
        let workers = server.workers();
        most = most.max(workers.len());
        // Somebody always serves.
        assert!(workers.iter().any(|worker| worker.state == State::Serving));
        upgrade.has_ended().then_some(())
    });
    upgrade.finish().exits_with(0);
    assert_eq!((most, server.serving().generation), (5, 2));
    load.wait_for_generation(2, LONG).unwrap();
    load.stop().assert_lossless();
    server.assert_supervises(4);
}

#[test]
fn a_later_step_that_fails_brings_all_old_ones_back() {
    let server = exec(&["--workers", "3", "--surge", "1"]);
    let load = server.load().start();
    server
        .upgrade(&["--env", "PLAIN=exit=3,worker=2", "--trial", "50ms"])
        .exits_with(1)
        .complains("worker 2 of the new build exited with status 3 before it was ready; generation 1 serves on");
    eventually("three of the first generation", || {
        let workers = server.workers();
        let is_old = workers.iter().all(|worker| worker.generation == 1 && worker.state == State::Serving);
        (is_old && workers.len() == 3).then_some(())
    });
    load.stop().assert_lossless();
    server.assert_supervises(3);
}

/// What the failed build has left serving stays until another build is there.
#[test]
fn one_whose_old_build_does_not_come_up_any_more_can_be_upgraded() {
    let home = Home::new();
    let gone = home.path("gone");
    let text = format!(
        "#!/bin/sh\ntest -n \"$PLAIN\" || ! test -e '{}' || exit 4\nexec {}\n",
        gone.display(),
        plain().display()
    );
    let program = home.script("program", &text);
    let server = exec_in(home, &["--workers", "2", "--surge", "1"], program.to_str().unwrap());
    let load = server.load().start();
    std::fs::write(&gone, "").unwrap();
    server
        .upgrade(&["--env", "PLAIN=exit=3,worker=1", "--trial", "50ms"])
        .exits_with(1)
        .complains("worker 1 of the new build exited with status 3 before it was ready; generation 1 serves on");
    eventually("a crash of the old build", || {
        let workers = server.workers();
        let serves = |generation| workers.iter().any(|one| (one.generation, one.state) == (generation, State::Serving));
        (serves(1) && serves(2) && workers.iter().any(|worker| worker.crashes > 0)).then_some(())
    });
    server.upgrade(&["--env", "PLAIN=linger=100", "--trial", "50ms", "--wait", "drained"]).exits_with(0);
    assert_eq!(server.serving().generation, 3);
    load.wait_for_generation(3, LONG).unwrap();
    load.stop().assert_lossless();
    server.assert_supervises(2);
}

#[test]
fn without_overlap_two_never_run_and_clients_wait() {
    let server = exec(&["--no-overlap"]);
    let load = server.load().new_connections(4).start();
    for generation in 2..=4 {
        load.wait_for_more(20, LONG).unwrap();
        let mut upgrade = server.begin_upgrade(&[]);
        eventually("the end of the upgrade", || {
            assert!(server.workers().iter().filter(|worker| worker.pid.is_some()).count() <= 1);
            upgrade.has_ended().then_some(())
        });
        upgrade.finish().exits_with(0);
        load.wait_for_generation(generation, LONG).unwrap();
    }
    // One that fails: the build before is started again.
    server
        .upgrade(&["--env", "PLAIN=exit=3"])
        .exits_with(1)
        .complains("exited with status 3 before it was ready; generation 4 is started again");
    load.wait_for_more(20, LONG).unwrap();
    assert_eq!(server.wait_for_workers(1).len(), 1);
    // One that is not even there does not end it.
    let pids = server.worker_pids();
    server.upgrade(&["--exe", "/no/such/program"]).exits_with(1);
    assert_eq!(server.worker_pids(), pids);
    load.stop().assert_lossless();
}

#[test]
fn without_overlap_a_slow_request_is_waited_for() {
    let server = exec(&["--no-overlap"]);
    let address = server.address();
    let slow = ask(address, "/slow/2");
    eventually("the request in flight", || (server.workers()[0].connections == 1).then_some(()));
    let upgrade = server.begin_upgrade(&[]);
    eventually("a drain", || (server.workers()[0].state == State::Draining).then_some(()));
    let load = crate::oracle::Load::new(address).new_connections(4).start();
    assert_eq!(slow.answerer().generation, 1);
    upgrade.finish().exits_with(0);
    load.wait_for_generation(2, LONG).unwrap();
    load.stop().assert_lossless();
}
