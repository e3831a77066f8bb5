//! Which signals are the library's, and what of them a new process inherits: in every generation the same.

use std::fs;

use handover::control::State;
use nix::sys::signal::Signal;

use crate::home::{Home, fixture};
use crate::server::{SOON, Server};
use crate::wait::{eventually, eventually_equal};

const SERVER: [&str; 2] = ["--tcp", "http=127.0.0.1:0"];

/// glibc keeps these two to itself: `posix_spawn`, of whatever program, leaves them ignored.
const OF_GLIBC: u64 = 0b11 << 31;

/// Blocked, ignored and caught signals, from `/proc/PID/status`.
fn masks_in(status: &str) -> [u64; 3] {
    ["SigBlk", "SigIgn", "SigCgt"].map(|name| {
        let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(":\t")).unwrap();
        u64::from_str_radix(line, 16).unwrap() & !OF_GLIBC
    })
}

fn masks(pid: i32) -> [u64; 3] {
    masks_in(&fs::read_to_string(format!("/proc/{pid}/status")).unwrap())
}

fn bit(signal: Signal) -> u64 {
    1 << (signal as i32 - 1)
}

fn blocks(pid: i32, signal: Signal) -> bool {
    masks(pid)[0] & bit(signal) != 0
}

fn ignores(pid: i32, signal: Signal) -> bool {
    masks(pid)[1] & bit(signal) != 0
}

fn catches(pid: i32, signal: Signal) -> bool {
    masks(pid)[2] & bit(signal) != 0
}

/// Blocked, ignored and caught signals are the same in four generations. Returns the serving process.
#[track_caller]
fn stays_the_same(server: &Server) -> i32 {
    let first = masks(server.first_pid());
    for generation in 2..=4 {
        server.upgrade(&["--wait", "drained"]).exits_with(0);
        let pid = server.pid();
        assert_eq!(server.generation(), generation);
        assert_eq!(masks(pid), first, "generation {generation}");
    }
    server.pid()
}

/// What a program finds when it begins, before any of it has changed anything: `cat` in place of the new build.
fn at_the_beginning(server: &Server) -> [u64; 3] {
    let file = server.home.path("status");
    let script = server.home.script("look", "#!/bin/sh\nexec cat /proc/self/status >\"$STATUS\"\n");
    let status = format!("STATUS={}", file.display());
    server.upgrade(&["--exe", script.to_str().unwrap(), "--env", &status]).exits_with(1);
    masks_in(&fs::read_to_string(file).unwrap())
}

#[test]
fn a_server_that_changes_nothing() {
    let server = Server::http();
    let pid = stays_the_same(&server);
    for signal in [Signal::SIGUSR2, Signal::SIGHUP, Signal::SIGTERM, Signal::SIGINT, Signal::SIGQUIT] {
        assert!(catches(pid, signal), "{signal}");
    }
    assert_eq!(at_the_beginning(&server), [0, 0, 0]);
}

/// What the application has come to ignore or block is its own affair, and its new build's.
#[test]
fn a_server_that_ignores_and_blocks() {
    let options = ["--ignore", "SIGCHLD", "--ignore", "SIGUSR1", "--block", "SIGTERM", "--block", "SIGUSR1"];
    let server = Server::start(&[&SERVER[..], &options].concat());
    let pid = stays_the_same(&server);
    assert!(ignores(pid, Signal::SIGCHLD) && blocks(pid, Signal::SIGTERM));
    // Blocked when the library is started is blocked in the new process from its beginning.
    assert_eq!(at_the_beginning(&server), [bit(Signal::SIGTERM) | bit(Signal::SIGUSR1), 0, 0]);
}

/// There is always a thread to which the library's signals can be delivered.
#[test]
fn signals_that_the_application_blocks_are_not_lost() {
    let options = ["--block", "SIGTERM", "--block", "SIGUSR2"];
    let server = Server::start(&[&SERVER[..], &options].concat());
    server.signal(server.first_pid(), Signal::SIGUSR2);
    eventually("generation 2", || (server.generation() == 2).then_some(()));
    let pid = server.pid();
    server.signal(pid, Signal::SIGTERM);
    server.wait_for_end(pid);
}

/// A terminal that is closed neither upgrades nor kills it, whatever the generation.
#[test]
fn under_nohup_a_hangup_does_nothing() {
    let home = Home::new();
    let program = fixture();
    let arguments = [&[program.to_str().unwrap()], &SOON[..], &SERVER].concat();
    let command = home.logged("nohup", &arguments);
    let server = Server::run(home, command);
    let pid = stays_the_same(&server);
    assert!(ignores(pid, Signal::SIGHUP));
    assert_eq!(at_the_beginning(&server)[1], bit(Signal::SIGHUP));
    server.signal(pid, Signal::SIGHUP);
    server.signal(pid, Signal::SIGTERM);
    server.wait_for_end(pid);
    assert!(!server.home.log().contains("upgrade asked for by signal"));
}

/// A shell without job control ignores SIGINT and SIGQUIT in what it starts in the background.
#[test]
fn in_the_background_of_a_script_an_interrupt_is_not_for_it() {
    let home = Home::new();
    let script = format!("{} \"$@\" & wait", fixture().display());
    let arguments = [&["-c", &script, "sh"], &SOON[..], &SERVER].concat();
    let shell = home.logged("/bin/sh", &arguments).spawn().unwrap();
    let socket = eventually("a server", || home.sockets().into_iter().find(|name| name.ends_with(".sock")));
    let pid: i32 = socket.trim_end_matches(".sock").parse().unwrap();
    let server = Server::adopt(home, shell);
    server.wait_until(pid, State::Serving);
    server.signal(pid, Signal::SIGINT);
    server.signal(pid, Signal::SIGQUIT);
    server.upgrade(&["--wait", "drained"]).exits_with(0);
    let pid = server.pid();
    assert!(ignores(pid, Signal::SIGINT) && ignores(pid, Signal::SIGQUIT));
    assert!(!server.home.log().contains("told to stop"));
    server.signal(pid, Signal::SIGTERM);
    server.wait_for_end(pid);
}

#[track_caller]
fn upgrades_and_fails_well(options: &[&str], exit: &str) {
    let server = Server::start(&[&SERVER[..], options].concat());
    let pid = server.pid();
    let before = server.settled_holdings(pid);
    let run = server.upgrade_with_fault("exit-1", &[]).exits_with(1).complains("cannot open the database");
    run.complains(exit);
    server.upgrade_with_fault("dies-in-trial", &["--trial", "30s"]).exits_with(1).complains("rolled back");
    server.upgrade_with_fault("hang", &["--ready-timeout", "100ms"]).exits_with(1).complains("was not ready within");
    server.assert_holds(pid, &before);
    server.upgrade(&["--wait", "drained"]).exits_with(0);
    server.assert_only(server.pid());
}

/// The new process is reaped by the kernel.
#[test]
fn a_server_that_ignores_sigchld() {
    upgrades_and_fails_well(&["--ignore", "SIGCHLD"], "the new build ended (how is unknown:");
}

/// The new process is reaped by the application, or by us: whoever is first.
#[test]
fn a_server_that_reaps_every_child() {
    upgrades_and_fails_well(&["--reap", "true"], "the new build e");
}

#[test]
fn no_signal_is_the_librarys_if_it_is_told_so() {
    let server = Server::start(&[&SERVER[..], &["--signals", "none"]].concat());
    let pid = stays_the_same(&server);
    for signal in [Signal::SIGUSR2, Signal::SIGHUP, Signal::SIGTERM, Signal::SIGINT, Signal::SIGQUIT] {
        assert!(!catches(pid, signal) && !ignores(pid, signal), "{signal}");
    }
    server.signal(pid, Signal::SIGTERM);
    server.wait_for_end(pid);
    assert!(!server.home.log().contains("told to stop"));
}

#[test]
fn others_may_mean_the_same_and_one_may_mean_nothing() {
    let file = "hup";
    let home = Home::new();
    let handle = format!("SIGHUP={}", home.path(file).display());
    let options =
        [["--without-signal", "SIGHUP"], ["--handle", &handle], ["--upgrade-on", "SIGUSR1"], ["--stop-on", "SIGUSR2"]];
    let server = Server::start_in(home, &[&SERVER[..], &options.concat()].concat());
    let first = server.first_pid();
    server.signal(first, Signal::SIGHUP);
    eventually_equal("the application's handler", &"SIGHUP\n".to_owned(), || {
        fs::read_to_string(server.home.path(file)).unwrap_or_default()
    });
    server.signal(first, Signal::SIGUSR1);
    eventually("generation 2", || (server.generation() == 2).then_some(()));
    let pid = server.pid();
    server.signal(pid, Signal::SIGUSR2);
    server.wait_for_end(pid);
    let log = server.home.log();
    assert_eq!(
        (log.matches("upgrade asked for by signal").count(), log.matches("told to stop by signal").count()),
        (1, 1)
    );
}

/// Both handlers are called, in either generation.
#[test]
fn a_handler_of_the_application_beside_ours() {
    let home = Home::new();
    let file = home.path("term");
    let handle = format!("SIGTERM={}", file.display());
    let server = Server::start_in(home, &[&SERVER[..], &["--handle", &handle]].concat());
    let pid = stays_the_same(&server);
    let slow = crate::client::ask(server.address(), "/slow/1");
    eventually("a request in flight", || (server.status(pid).connections.open == 1).then_some(()));
    server.signal(pid, Signal::SIGTERM);
    eventually_equal("the application's handler", &"SIGTERM\n".to_owned(), || {
        fs::read_to_string(&file).unwrap_or_default()
    });
    assert_eq!(slow.answerer().generation, 4);
    server.wait_for_end(pid);
}
