//! The end of a service.

use std::process::Command;

use nix::sys::signal::Signal;

use crate::client::ask;
use crate::exec::{HTTP, exec, plain};
use crate::home::{HANDOVER, Home};
use crate::server::Server;
use crate::wait::eventually;

/// The exit status of the supervisor.
fn exit_code(server: &mut Server) -> Option<i32> {
    eventually("the end of the supervisor", || server.try_wait()).code()
}

#[test]
fn a_stop_drains_and_no_new_client_is_left_waiting() {
    let mut server = exec(&["--workers", "2"]);
    let (address, pid) = (server.address(), server.first_pid().to_string());
    let slow = ask(address, "/slow/2");
    eventually("the request in flight", || (server.serving().connections.open == 1).then_some(()));
    let stop = crate::command::Running::start(server.handover_command(&["stop", "--pid", &pid]));
    eventually("a refusal", || std::net::TcpStream::connect(address).is_err().then_some(()));
    assert_eq!(slow.answerer().generation, 1);
    stop.finish().exits_with(0).says("1 connection open").says("stopped");
    assert_eq!(exit_code(&mut server), Some(0));
    assert_eq!((server.home.processes(), server.home.sockets()), (vec![], Vec::<String>::new()));
}

#[test]
fn one_signal_drains_and_a_second_ends() {
    for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGQUIT] {
        let mut server = exec(&[]);
        let slow = ask(server.address(), "/slow/600");
        eventually("the request in flight", || (server.serving().connections.open == 1).then_some(()));
        let pid = server.first_pid();
        server.signal(pid, signal);
        server.wait_until(pid, handover::control::State::Draining);
        server.signal(pid, signal);
        assert_eq!(exit_code(&mut server), Some(5), "one connection was cut");
        drop(slow);
        assert_eq!(server.home.processes(), Vec::<i32>::new());
    }
}

/// What was cut before was told then, however long ago that was.
#[test]
fn a_stop_tells_of_what_it_has_cut_itself() {
    let mut server = exec(&[]);
    let slow = ask(server.address(), "/slow/600");
    eventually("the request in flight", || (server.serving().connections.open == 1).then_some(()));
    server.restart(&["--kill-after", "100ms"]).exits_with(0).says("; 1 connection was closed");
    drop(slow);
    let run = server.handover(&["stop", "--pid", &server.first_pid().to_string()]).exits_with(0);
    assert!(run.stderr.is_empty(), "{run:?}");
    assert_eq!(exit_code(&mut server), Some(0));
}

#[test]
fn a_program_that_does_not_listen_is_killed_at_the_deadline() {
    let home = Home::new();
    let mut command = home.logged(HANDOVER, &["exec", "--drain-timeout", "300ms"]);
    command.args(HTTP).arg("--").arg("sh").args(["-c", "trap '' TERM; LISTEN_PID=$$ exec $0"]).arg(plain());
    command.env("PLAIN", "deaf");
    let mut server = Server::run(home, command);
    server.handover(&["stop", "--pid", &server.first_pid().to_string()]).exits_with(0);
    assert_eq!(exit_code(&mut server), Some(0));
}

#[test]
fn a_stop_ends_an_upgrade_that_is_not_ready() {
    let mut server = exec(&[]);
    let mut upgrade = server.begin_upgrade(&["--env", "PLAIN=hang"]);
    upgrade.wait_for_line("spawned");
    server.signal(server.first_pid(), Signal::SIGTERM);
    upgrade.finish().exits_with(8).complains("was not ready when this process was told to stop");
    assert_eq!(exit_code(&mut server), Some(0));
    assert_eq!(server.home.processes(), Vec::<i32>::new());
}

#[test]
fn signals_for_the_program_reach_it() {
    for (hup, signals, generation) in [("upgrade", "0 1", 2), ("pass", "1 1", 1), ("ignore", "0 1", 1)] {
        let server = exec(&["--hup", hup]);
        let pid = server.first_pid();
        // What is said of signals stays with the next build of the supervisor.
        server.handover(&["upgrade", "--self", "--pid", &pid.to_string()]).exits_with(0);
        server.signal(pid, Signal::SIGHUP);
        eventually("the generation", || (server.status_of_serving()?.generation == generation).then_some(()));
        server.wait_for_workers(1);
        server.signal(pid, Signal::SIGUSR1);
        eventually(&format!("`{signals}` with --hup {hup}"), || (server.get("/signals") == signals).then_some(()));
        assert_eq!(server.serving().generation, generation);
    }
}

/// The log files are rotated in the middle of an upgrade.
#[test]
fn a_signal_for_the_program_does_not_end_one_that_has_no_handler_yet() {
    let server = exec(&[]);
    let mut upgrade = server.begin_upgrade(&["--env", "PLAIN=hang", "--ready-timeout", "2s"]);
    upgrade.wait_for_line("spawned");
    server.signal(server.first_pid(), Signal::SIGUSR1);
    eventually("the signal", || (server.get("/signals") == "0 1").then_some(()));
    upgrade.finish().exits_with(1).complains("was not ready in time");
}

/// A terminal sends ^C to every process of its foreground group; the workers are not in it.
#[test]
fn workers_have_groups_of_their_own() {
    let server = exec(&["--workers", "2"]);
    for pid in server.worker_pids() {
        let group = Command::new("ps").args(["-o", "pgid=", "-p", &pid.to_string()]).output().unwrap();
        assert_eq!(String::from_utf8_lossy(&group.stdout).trim(), pid.to_string());
    }
}
