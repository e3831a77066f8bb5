//! The end of the old process: what is in flight is finished, and the application may end in its own way.

use std::time::Duration;

use crate::client::{Kept, ask, get};
use crate::server::Server;
use crate::wait::{LONG, eventually};

#[test]
fn a_slow_request_in_flight_is_answered_by_the_old_one() {
    let server = Server::http();
    let old = server.pid();
    let slow: Vec<_> = (0..3).map(|_| ask(server.address(), "/slow/5")).collect();
    let stream = ask(server.address(), "/stream");
    eventually("requests in flight", || (server.status(old).connections.open == 4).then_some(()));
    server.upgrade(&[]).exits_with(0);
    assert_eq!(server.answerer().generation, 2);
    for one in slow {
        let answer = one.answerer();
        assert_eq!((answer.generation, answer.pid.cast_signed()), (1, old));
    }
    let text = stream.try_answer().unwrap();
    assert!(text.contains("line 20 of 20\n") && text.ends_with("0\r\n\r\n"), "{text}");
    server.wait_for_end(old);
    server.assert_only(server.pid());
}

#[test]
fn the_drain_hook_runs_once_the_new_one_serves() {
    let home = crate::home::Home::new();
    let file = home.path("hook");
    let server = Server::start_in(home, &["--tcp", "http=127.0.0.1:0", "--drain-hook", file.to_str().unwrap()]);
    server.upgrade_with_fault("exit-1", &[]).exits_with(1);
    assert!(!file.exists(), "an upgrade that fails drains nobody");
    server.upgrade(&["--wait", "drained"]).exits_with(0);
    assert_eq!(std::fs::read_to_string(&file).unwrap(), "hook\n");
    std::fs::remove_file(&file).unwrap();
    server.handover(&["stop", "--pid", &server.pid().to_string()]).exits_with(0);
    assert_eq!(std::fs::read_to_string(&file).unwrap(), "hook\n");
}

/// A balancer hears it before anybody is refused.
#[test]
fn a_process_that_is_told_to_stop_says_first_that_it_is_not_ready() {
    let server = Server::start(&["--tcp", "http=127.0.0.1:0", "--notice", "600s"]);
    let (old, address) = (server.pid(), server.address());
    assert_eq!(get(address, "/ready"), "true");
    server.signal(old, nix::sys::signal::Signal::SIGTERM);
    eventually("not ready", || (get(address, "/ready") == "false").then_some(()));
    assert_eq!(server.answerer().generation, 1, "the listeners are still open");
    server.upgrade(&[]).exits_with(3);
    // A second stop ends the notice.
    server.signal(old, nix::sys::signal::Signal::SIGTERM);
    server.wait_for_end(old);
}

#[test]
fn the_notice_ends_by_itself() {
    let server = Server::start(&["--tcp", "http=127.0.0.1:0", "--notice", "300ms"]);
    server.handover(&["stop", "--pid", &server.pid().to_string()]).exits_with(0);
}

/// It does not end the notice, but what comes after it.
#[test]
fn a_stop_in_the_notice_that_names_a_time_means_it() {
    let for_ever = ["--tcp", "http=127.0.0.1:0", "--notice", "2s", "--drain-timeout", "0s"];
    let server = Server::start(&for_ever);
    let pid = server.pid();
    let _slow = ask(server.address(), "/slow/600");
    eventually("a request in flight", || (server.status(pid).connections.open == 1).then_some(()));
    server.signal(pid, nix::sys::signal::Signal::SIGTERM);
    eventually("not ready", || (get(server.address(), "/ready") == "false").then_some(()));
    server.handover(&["stop", "--pid", &pid.to_string(), "--drain-timeout", "100ms"]).exits_with(5);
}

/// As whoever wants no limit may say it.
#[test]
fn a_time_of_half_an_eternity_is_no_mistake() {
    let longest = format!("{}s", u64::MAX);
    let http = ["--tcp", "http=127.0.0.1:0", "--ready-timeout", &longest, "--drain-timeout", &longest];
    let server = Server::start(&http);
    server.upgrade(&["--wait", "drained"]).exits_with(0);
    server.handover(&["stop", "--pid", &server.pid().to_string()]).exits_with(0);
    let server = Server::start(&["--tcp", "http=127.0.0.1:0", "--notice", &longest]);
    let pid = server.pid();
    server.signal(pid, nix::sys::signal::Signal::SIGTERM);
    eventually("not ready", || (get(server.address(), "/ready") == "false").then_some(()));
    server.signal(pid, nix::sys::signal::Signal::SIGTERM);
    server.wait_for_end(pid);
}

/// The service goes on, whichever process answers.
#[test]
fn a_process_that_was_upgraded_stays_ready() {
    let server = Server::start(&["--tcp", "http=127.0.0.1:0", "--notice", "600s"]);
    let old = server.pid();
    let mut kept = Kept::connect(server.address());
    kept.send("/ready");
    kept.read_to("\r\n\r\ntrue");
    server.upgrade(&[]).exits_with(0);
    kept.send("/ready");
    assert!(kept.read_to("\r\n\r\ntrue").contains("Connection: close"));
    assert_eq!(get(server.address(), "/ready"), "true");
    server.wait_for_end(old);
}

/// An idle kept connection is closed after `linger`, and the next request goes to the new process.
#[test]
fn idle_connections_do_not_hold_up_the_drain() {
    let server = Server::http();
    let old = server.pid();
    let idle: Vec<_> = (0..10).map(|_| std::net::TcpStream::connect(server.address()).unwrap()).collect();
    eventually("idle connections", || (server.status(old).connections.open == 10).then_some(()));
    server.upgrade(&["--wait", "drained", "--drain-timeout", "60s"]).exits_with(0);
    assert!(crate::server::has_ended(old));
    drop(idle);
}

/// The head of its response could not say that the connection will be closed, so the client may ask again.
#[test]
fn a_connection_that_was_busy_is_closed_only_when_it_has_been_silent() {
    let server = Server::start(&["--tcp", "http=127.0.0.1:0", "--linger", "1s"]);
    let old = server.pid();
    let mut kept = Kept::connect(server.address());
    kept.send("/stream/2.5");
    assert!(kept.read_to("line 1 of 2\n\r\n").contains("200 OK"));
    server.upgrade(&[]).exits_with(0);
    kept.read_to("\r\n0\r\n\r\n");
    assert!(!kept.ends_within(Duration::from_millis(250)), "closed while a request may be on its way");
    kept.send("/");
    assert!(kept.read_to(&format!("gen=1 pid={old}")).contains("Connection: close"));
    assert!(kept.ends_within(LONG));
    server.wait_for_end(old);
}

#[test]
fn upgraded_by_a_signal() {
    for signal in [nix::sys::signal::Signal::SIGUSR2, nix::sys::signal::Signal::SIGHUP] {
        let server = Server::http();
        let old = server.pid();
        let load = server.load().start();
        server.signal(old, signal);
        load.wait_for_generation(2, LONG).unwrap();
        server.wait_for_end(old);
        load.stop().assert_lossless();
        server.assert_only(server.pid());
    }
}
