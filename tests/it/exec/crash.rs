//! Programs that end by themselves, and a supervisor that must not.

use std::fs;
use std::process::{Command, Stdio};

use handover::control::State;
use nix::sys::signal::Signal;

use crate::client::{ask, get};
use crate::command::Running;
use crate::exec::{HTTP, exec, exec_in, plain};
use crate::home::{HANDOVER, Home};
use crate::server::{Server, children_of, has_ended, state_of};
use crate::wait::eventually;

#[test]
fn a_worker_that_was_killed_is_started_again_and_nobody_is_refused() {
    let server = exec(&[]);
    let (old, address) = (server.worker_pids()[0], server.address());
    server.freeze(server.first_pid());
    server.signal(old, Signal::SIGKILL);
    server.wait_for_end(old);
    // Nobody serves, and the client waits in the queue.
    let waiting = ask(address, "/");
    server.thaw(server.first_pid());
    let answer = waiting.answerer();
    assert_eq!((answer.generation, has_ended(old)), (1, true));
    let worker = &server.workers()[0];
    assert_eq!((worker.crashes, worker.pid), (1, Some(answer.pid.cast_signed())));
}

#[test]
fn what_it_had_started_goes_with_it() {
    let server = exec(&[]);
    let child: i32 = server.get("/child").parse().unwrap();
    server.signal(server.worker_pids()[0], Signal::SIGKILL);
    server.wait_for_end(child);
}

/// After a failed upgrade the link leads to the bad build; what is started again is the good one.
#[test]
fn the_build_that_was_committed_is_started_again() {
    let home = Home::new();
    let (one, link) = (home.copy(&plain(), "one"), home.path("current"));
    let bad = home.script("bad", "#!/bin/sh\nexit 1\n");
    std::os::unix::fs::symlink(&one, &link).unwrap();
    let server = exec_in(home, &[], link.to_str().unwrap());
    std::fs::remove_file(&link).unwrap();
    std::os::unix::fs::symlink(&bad, &link).unwrap();
    server.upgrade(&[]).exits_with(1);
    let old = server.worker_pids()[0];
    server.signal(old, Signal::SIGKILL);
    server.wait_for_end(old);
    assert_eq!(server.get("/exe"), one.display().to_string());
}

#[test]
fn a_crash_loop_is_told() {
    let server = exec(&[]);
    server.upgrade(&["--env", "PLAIN=die-after=1000", "--trial", "0s", "--wait", "ready"]).exits_with(0);
    eventually("three in a row", || server.workers().iter().any(|worker| worker.crashes >= 3).then_some(()));
    eventually("the time between two", || server.workers().iter().any(|worker| worker.pid.is_none()).then_some(()));
    server.handover(&["status", "--pid", &server.first_pid().to_string()]).exits_with(0).says("times in a row");
    eventually("the log", || server.home.log().contains("has ended 5 times in a row").then_some(()));
    // A good build ends it.
    server.upgrade(&["--env", "PLAIN=", "--wait", "drained"]).exits_with(0);
    assert_eq!(server.wait_for_workers(1).len(), 1);
    assert!(server.workers().iter().all(|worker| worker.crashes == 0));
    assert_eq!(server.get("/env/PLAIN"), "");
}

#[test]
fn a_supervisor_without_fds_says_so_and_serves_on() {
    let home = Home::new();
    let script =
        format!("ulimit -n 48; exec {HANDOVER} exec --trial 100ms {} -- {}", HTTP.join(" "), plain().display());
    let command = home.logged("/bin/sh", &["-c", &script]);
    let server = Server::run(home, command);
    let pid = server.first_pid().to_string();
    let scale = |workers: &str| server.handover(&["scale", workers, "--pid", &pid]);
    scale("30").exits_with(1).complains("cannot be started: Too many open files").complains("; 1 serve on");
    server.assert_supervises(1);
    server.upgrade(&["--wait", "drained"]).exits_with(0);
    assert_eq!(server.answerer().generation, 2);
}

#[test]
fn a_supervisor_that_dies_while_it_scales_is_told_as_one_in_an_upgrade() {
    let home = Home::new();
    let mut command = home.logged(HANDOVER, &["exec"]);
    command.args(HTTP).arg("--").arg(plain()).env("PLAIN", "hang,worker=1");
    let server = Server::run(home, command);
    let supervisor = server.first_pid();
    let scale = Running::start(server.handover_command(&["scale", "2", "--pid", &supervisor.to_string()]));
    eventually("the second worker", || (server.workers().len() == 2).then_some(()));
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(supervisor), nix::sys::signal::Signal::SIGKILL).unwrap();
    scale.finish().exits_with(8).complains("died, which supervised the program and held its sockets");
}

/// And not that it was killed, which would look like somebody else's doing.
#[test]
fn a_worker_that_does_not_become_ready_is_told_to_be_late() {
    let home = Home::new();
    let mut command = home.logged(HANDOVER, &["exec", "--ready-timeout", "5s"]);
    command.args(HTTP).arg("--").arg(plain()).env("PLAIN", "hang,worker=1");
    let server = Server::run(home, command);
    let run = server.handover(&["scale", "2", "--pid", &server.first_pid().to_string()]).exits_with(1);
    run.complains("worker 1 was not ready in time: it does not wait for connections on http; 1 serve on");
    assert!(
        server.home.log().contains("was not ready in time: it does not wait for connections on http: it is killed")
    );
}

#[test]
fn a_supervisor_whose_stderr_is_full_goes_on() {
    let home = Home::new();
    let (reader, writer) = std::io::pipe().unwrap();
    let mut command = home.command(HANDOVER);
    command.args(["exec", "--trial", "100ms"]).args(HTTP).arg("--").arg(plain()).env("PLAIN", "flood");
    command.stdout(Stdio::null()).stderr(writer);
    let server = Server::run(home, command);
    let address = server.address();
    // The worker's own pipe is full as well by now or soon, and nobody reads; nor what the supervisor has to say of this.
    for generation in 2..=4 {
        server.upgrade(&["--exe", "/no/such/program"]).exits_with(1);
        server.upgrade(&["--trial", "100ms"]).exits_with(0);
        eventually("an answer", || get(address, "/").starts_with(&format!("gen={generation}")).then_some(()));
    }
    assert_eq!(server.status(server.first_pid()).state, State::Serving);
    drop(reader);
}

/// No memory for another process: what runs goes on, and all is well when there is some again.
#[test]
fn a_supervisor_without_memory_says_so_and_serves_on() {
    let server = exec(&[]);
    let pid = server.first_pid();
    let limit = |bytes: &str| {
        let bytes = format!("--as={bytes}:unlimited");
        let limited = std::process::Command::new("prlimit").args(["--pid", &pid.to_string(), &bytes]).status();
        assert!(limited.unwrap().success());
    };
    // What it has it keeps; it gets no more.
    limit("1048576");
    for _ in 0..3 {
        server.upgrade(&[]).exits_with(1).complains("Cannot allocate memory").complains("; generation 1 serves on");
    }
    assert_eq!(server.answerer().generation, 1);
    limit("unlimited");
    server.upgrade(&["--wait", "drained"]).exits_with(0);
    server.assert_supervises(1);
}

#[test]
fn a_worker_that_a_realtime_signal_kills_is_started_again() {
    let server = exec(&["--workers", "2"]);
    let pid = server.worker_pids()[0].to_string();
    assert!(Command::new("kill").args(["-40", &pid]).status().unwrap().success());
    eventually("another worker", || server.workers().iter().any(|worker| worker.crashes == 1).then_some(()));
    assert!(server.home.log().contains(&format!("process {pid} was killed by signal 40")));
}

/// As the kernel makes it wait where others read /proc at that moment.
#[test]
fn a_supervisor_whose_child_takes_long_to_be_reaped_goes_on() {
    let home = Home::new();
    let held = home.path("held");
    let options = ["--workers", "2", "--ready-cmd", "true", "--"];
    let mut command = home.logged(HANDOVER, &[&["exec"], &HTTP[..], &options].concat());
    command.arg(plain());
    command.env("HANDOVER_FAULT", format!("reaps,hold,{}", held.display()));
    let server = Server::run(home, command);
    let upgrade = || server.upgrade(&["--trial", "0s", "--wait", "drained"]).exits_with(0);
    upgrade();
    let is_zombie = |pid: &i32| state_of(format!("/proc/{pid}/stat").as_ref()) == Some('Z');
    assert!(held.exists());
    let held = eventually("the one that is held", || {
        let children = children_of(server.first_pid()).into_iter().map(|pid| pid.parse().unwrap());
        let zombies: Vec<i32> = children.filter(is_zombie).collect();
        <[i32; 1]>::try_from(zombies).ok().map(|[held]| held)
    });
    // What came to that thread would be lost when the supervisor replaces itself.
    let tasks = fs::read_dir(format!("/proc/{}/task", server.first_pid())).unwrap();
    let statuses = tasks.map(|task| fs::read_to_string(task.unwrap().path().join("status")).unwrap());
    let blocked: Vec<u64> = statuses
        .filter(|text| text.contains("Name:\thandover-reaps\n"))
        .map(|text| {
            let mask = text.lines().find_map(|line| line.strip_prefix("SigBlk:\t"));
            u64::from_str_radix(mask.unwrap(), 16).unwrap()
        })
        .collect();
    let signals = [Signal::SIGTERM, Signal::SIGHUP, Signal::SIGUSR2];
    let all = signals.iter().fold(0, |mask, signal| mask | 1 << (*signal as u32 - 1));
    assert_eq!(blocked.iter().map(|mask| mask & all).collect::<Vec<u64>>(), [all]);
    // Those that end after it may be behind it in the kernel's list.
    server.signal(server.worker_pids()[0], Signal::SIGKILL);
    eventually("another worker", || server.workers().iter().any(|worker| worker.crashes == 1).then_some(()));
    upgrade();
    assert!(is_zombie(&held));
    server.upgrade(&["--self"]).exits_with(0);
    assert_eq!(server.serving().generation, 3);
    eventually("its end", || (!is_zombie(&held)).then_some(()));
}
