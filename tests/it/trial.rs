//! After commit: the new build fails while the old one can still take over again.

use std::fs;
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;

use handover::control::State;

use crate::client::{ask, ask_unix};
use crate::home::Home;
use crate::server::Server;
use crate::wait::LONG;

#[track_caller]
fn rolls_back(fault: &str) -> crate::command::Run {
    let server = Server::http();
    let pid = server.pid();
    let before = server.settled_holdings(pid);
    let load = server.load().start();
    load.wait_for_more(20, LONG).unwrap();
    let run = server
        .upgrade_with_fault(fault, &["--trial", "30s"])
        .exits_with(1)
        .complains("rolled back: ")
        .complains(&format!("process {pid} (generation 1) accepts again"));
    load.wait_for_more(50, LONG).unwrap();
    load.stop().assert_lossless();
    server.assert_holds(pid, &before);
    assert_eq!(server.status(pid).state, State::Serving);
    server.upgrade(&[]).exits_with(0);
    assert_eq!(server.answerer().generation, 2);
    run
}

#[test]
fn is_killed() {
    rolls_back("dies-in-trial").complains("was killed by SIGKILL within the trial");
}

#[test]
fn exits() {
    rolls_back("exits-in-trial").complains("exited with status 9 within the trial");
}

/// The old process accepts again, so what it accepts on must be as it was.
#[test]
fn what_it_wanted_otherwise_is_not_done_yet() {
    let home = Home::new();
    let (http, admin) = (home.path("http.sock"), home.path("admin.sock"));
    let listeners = [format!("http={},mode=0660", http.display()), format!("admin={}", admin.display())];
    let server = Server::start_in(home, &["--unix", &listeners[0], "--unix", &listeners[1]]);
    let mode = || fs::symlink_metadata(&http).unwrap().permissions().mode() & 0o7777;
    let other = format!("http={},mode=0600", http.display());
    let arguments = ["--trial", "30s", "--", "--unix", &other];
    server.upgrade_with_fault("dies-in-trial", &arguments).exits_with(1).complains("rolled back: ");
    assert_eq!(mode(), 0o660);
    assert_eq!(ask_unix(&admin, "/").answerer().generation, 1);
    // Once there is no way back it is.
    server.upgrade(&["--trial", "50ms", "--wait", "drained", "--", "--linger", "50ms", "--unix", &other]).exits_with(0);
    crate::wait::eventually("the new mode", || (mode() == 0o600).then_some(()));
    crate::wait::eventually("no path that nobody wants", || (!admin.exists()).then_some(()));
    assert_eq!(ask_unix(&http, "/").answerer().generation, 2);
}

/// Clients wait in the queue, and the new application has never waited for one.
#[test]
fn never_accepts_while_clients_wait() {
    let server = Server::http();
    let address: SocketAddr = server.address();
    let pid = server.pid();
    let _ = server.get("/");
    let before = server.settled_holdings(pid);
    let fault = "FIXTURE_FAULT=ready-never-accepts";
    let mut upgrade = server.begin_upgrade(&["--env", fault, "--trial", "500ms"]);
    upgrade.wait_for_line("committed");
    let waiting: Vec<_> = (0..5).map(|_| ask(address, "/")).collect();
    upgrade.finish().exits_with(1).complains("became ready and never accepted on listener `http`, where clients wait");
    for client in waiting {
        assert_eq!(client.answerer().generation, 1);
    }
    server.assert_holds(pid, &before);
}

/// What cannot be told: nobody has come, so nothing shows that nobody would be served. It is the new build's word.
#[test]
fn never_accepts_while_no_client_comes() {
    let server = Server::http();
    let _ = server.get("/");
    server.upgrade_with_fault("ready-never-accepts", &[]).exits_with(0);
}

/// It was told to stop, and so must the service: the old process does not come back.
#[test]
fn told_to_stop_it_is_no_failure() {
    let server = Server::http();
    let old = server.pid();
    let run = server.upgrade_with_fault("stops-in-trial", &["--trial", "30s"]).exits_with(0);
    assert!(run.stdout.contains("upgraded to generation 2"), "{run:?}");
    server.wait_for_end(old);
    crate::wait::eventually_equal("the processes", &vec![], || server.home.processes());
    assert_eq!(server.home.sockets(), Vec::<String>::new());
}

/// The queue is the socket's and not a process's: who has not been accepted loses nothing by the death.
#[test]
fn clients_in_the_queue_do_not_notice() {
    let server = Server::http();
    let address = server.address();
    let _ = server.get("/");
    let hold = server.home.fifo("hold");
    let fault = hold.fault("hold-before-ready") + ",ready-never-accepts";
    let mut upgrade = server.begin_upgrade(&["--env", &fault, "--trial", "30s", "--json"]);
    let new = upgrade.new_pid();
    hold.reached().let_go();
    upgrade.wait_for_line("committed");
    let waiting: Vec<_> = (0..20).map(|_| ask(address, "/")).collect();
    server.signal(new, nix::sys::signal::Signal::SIGKILL);
    for client in waiting {
        assert_eq!(client.answerer().generation, 1);
    }
    upgrade.finish().exits_with(1);
}
