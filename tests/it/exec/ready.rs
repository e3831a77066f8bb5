//! Ready is proved, and never a matter of time.

use crate::client::get;
use crate::command::{Running, run};
use crate::exec::{exec, exec_in, plain};
use crate::home::{HANDOVER, Home};
use crate::server::Server;
use crate::wait::eventually;
use handover::control::State;
use nix::sys::signal::Signal;

#[test]
fn each_way_of_waiting_is_seen() {
    for way in ["accept", "poll", "select", "epoll"] {
        let home = Home::new();
        let program = plain();
        let program = program.to_str().unwrap();
        let arguments = ["exec", "--trial", "100ms", "--listen", "http=127.0.0.1:0", "--", program, way];
        let command = home.logged(HANDOVER, &arguments);
        let server = Server::run(home, command);
        server.upgrade(&[]).exits_with(0).says("waits on http");
        // A thread that is blocked in `accept` takes one more.
        eventually("an answer of the new build", || (server.answerer().generation == 2).then_some(()));
    }
}

/// What waits may be a descendant.
#[test]
fn a_program_behind_a_shell_is_seen() {
    let home = Home::new();
    let script = home.script("serve", &format!("#!/bin/sh\nsh -c 'LISTEN_PID=$$ exec {}' & wait\n", plain().display()));
    let server = exec_in(home, &["--stop-signal", "KILL"], script.to_str().unwrap());
    server.upgrade(&["--wait", "drained"]).exits_with(0);
    assert_eq!(server.answerer().generation, 2);
    // The shell was killed, and what it had started went with it.
    assert_eq!(server.home.processes().len(), 3, "the supervisor, the shell and the program");
}

#[test]
fn one_that_waits_on_some_listeners_only_is_not_ready() {
    let server = exec(&["--listen", "admin=127.0.0.1:0"]);
    let script = server.home.script("half", &format!("#!/bin/sh\nLISTEN_FDS=1 exec {}\n", plain().display()));
    server
        .upgrade(&["--exe", script.to_str().unwrap(), "--ready-timeout", "3s"])
        .exits_with(1)
        .complains("it does not wait for connections on admin");
}

#[test]
fn by_ready_1_alone() {
    let home = Home::new();
    let hold = home.fifo("fifo");
    let mut command = home.logged(HANDOVER, &["exec", "--trial", "100ms", "--listen", "http=127.0.0.1:0"]);
    command.args(["--ready", "notify", "--"]).arg(plain()).env("PLAIN", "notify");
    let server = Server::run(home, command);
    let address = server.address();
    assert_eq!(server.workers()[0].said.as_deref(), Some("warmed up"));
    // It waits for connections, and that is not enough.
    server.upgrade(&["--env", "PLAIN=", "--ready-timeout", "500ms"]).exits_with(1).complains("it has not said READY=1");
    let plain = format!("PLAIN=notify,hold={}", hold.path().display());
    let mut upgrade: Running = server.begin_upgrade(&["--env", &plain, "--wait", "drained"]);
    let held = hold.reached();
    assert!(!upgrade.has_ended() && get(address, "/").starts_with("gen=1 "));
    held.let_go();
    upgrade.wait_for_line("said READY=1");
    upgrade.finish().exits_with(0);
    assert_eq!(server.answerer().generation, 2);
}

/// As long as it says so, also when it is started again.
#[test]
fn a_program_may_take_longer_than_the_timeout() {
    let home = Home::new();
    let options = ["exec", "--trial", "100ms", "--ready-timeout", "700ms", "--listen", "http=127.0.0.1:0"];
    let mut command = home.logged(HANDOVER, &options);
    command.args(["--ready", "notify", "--"]).arg(plain()).env("PLAIN", "notify,extend=1500");
    let server = Server::run(home, command);
    server.upgrade(&["--wait", "drained"]).exits_with(0);
    let killed = server.worker_pids()[0];
    server.signal(killed, Signal::SIGKILL);
    eventually("another worker that serves", || {
        let worker = server.workers().pop()?;
        (worker.pid != Some(killed) && worker.state == State::Serving).then(|| assert_eq!(worker.crashes, 1))
    });
}

#[test]
fn by_a_command_as_well() {
    let home = Home::new();
    let (file, seen) = (home.path("healthy"), home.path("seen"));
    let command = format!("echo $HANDOVER_GENERATION $HANDOVER_PID >{}; test -e {}", seen.display(), file.display());
    std::fs::write(&file, "").unwrap();
    let server = exec_in(home, &["--ready-cmd", &command], plain().to_str().unwrap());
    let looked_at = || std::fs::read_to_string(&seen).unwrap();
    assert_eq!(looked_at(), format!("1 {}\n", server.worker_pids()[0]));
    std::fs::remove_file(&file).unwrap();
    server.upgrade(&["--ready-timeout", "2s"]).exits_with(1).complains("--ready-cmd has not succeeded");
    let mut upgrade = server.begin_upgrade(&["--wait", "drained"]);
    upgrade.wait_for_line("spawned");
    eventually("a run that fails", || looked_at().starts_with("2 ").then_some(()));
    std::fs::write(&file, "").unwrap();
    upgrade.finish().exits_with(0);
    assert_eq!(server.answerer().generation, 2);
    server.assert_supervises(1);
}

/// It counts from what the program is seen to bind.
#[test]
fn a_delay_that_would_prove_nothing_is_refused() {
    let home = Home::new();
    let ways: [&[&str]; 3] = [&["--listen", "127.0.0.1:0"], &["--intercept", "off"], &["--ready", "notify"]];
    for options in ways {
        let mut command = home.command(HANDOVER);
        command.args(["exec", "--ready-delay", "1s"]).args(options).args(["--", "true"]);
        run(command).exits_with(2).complains("--ready-delay");
    }
    let server = exec(&[]);
    let pid = server.first_pid().to_string();
    for verb in ["upgrade", "restart"] {
        server.handover(&[verb, "--ready-delay", "1s", "--pid", &pid]).exits_with(2).complains("--ready-delay");
    }
    let itself = ["upgrade", "--self", "--ready-delay", "1s", "--pid", &pid];
    server.handover(&itself).exits_with(2).complains("cannot be used with");
    assert_eq!(server.generation(), 1);
}

#[test]
fn nothing_is_taken_over_without_interception() {
    let home = Home::new();
    let mut command = home.command(HANDOVER);
    command.args(["exec", "--take-over", "2147483647", "--intercept", "off", "--", "true"]);
    run(command).exits_with(2).complains("leave --intercept off out");
}
