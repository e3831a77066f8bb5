//! The command: whom it asks, what it prints, and its exit codes.

use std::path::Path;
use std::process::Command;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use crate::client::ask;
use crate::command::{Run, run};
use crate::home::{HANDOVER, Home};
use crate::server::Server;
use crate::wait::eventually;

fn handover(arguments: &[&str]) -> Run {
    let mut command = Command::new(HANDOVER);
    command.args(arguments);
    run(command)
}

#[test]
fn a_pid_that_is_no_handover_process() {
    let pid = std::process::id().to_string();
    for verb in ["upgrade", "status", "stop"] {
        handover(&[verb, "--pid", &pid])
            .exits_with(7)
            .complains(&format!("cannot find the control socket of process {pid}: it runs (`it"))
            .complains("is no handover process")
            .complains("`handover ps` lists those that are");
    }
}

#[test]
fn a_pid_of_nobody() {
    let mut gone = Command::new("true").spawn().unwrap();
    let pid = gone.id().to_string();
    eventually("a zombie", || crate::server::has_ended(gone.id().cast_signed()).then_some(()));
    handover(&["upgrade", "--pid", &pid]).exits_with(7).complains("it has exited already (a zombie)");
    gone.wait().unwrap();
    handover(&["upgrade", "--pid", &pid]).exits_with(7).complains("there is no such process");
}

#[test]
fn a_pid_file() {
    let server = Server::start(&["--tcp", "http=127.0.0.1:0"]);
    let file = server.home.file("pid", format!("{}\n", server.pid()).as_bytes(), 0o644);
    let with_file = |verb: &str| handover(&[verb, "--pid-file", file.to_str().unwrap()]);
    with_file("status").exits_with(0);
    let old = server.pid();
    with_file("upgrade").exits_with(0);
    // It is out of date now: once while the old process is there, and once when it is gone.
    server.wait_for_end(old);
    with_file("upgrade").exits_with(7).complains("a");
    std::fs::write(&file, "no number").unwrap();
    with_file("upgrade").exits_with(2).complains("has no pid in it");
    std::fs::write(&file, "-1").unwrap();
    with_file("upgrade").exits_with(2).complains("has no pid in it");
    std::fs::remove_file(&file).unwrap();
    with_file("upgrade").exits_with(7).complains("is the service running?");
}

/// The pid of a stale pid file has been given to another program.
/// Nothing is read without end, and nobody waited for.
#[test]
fn a_pid_file_that_is_none() {
    let home = Home::new();
    let bytes = home.path("bytes");
    std::fs::write(&bytes, [b'1', 0xff]).unwrap();
    let fifo = home.fifo("fifo");
    for file in [bytes.as_path(), Path::new("/dev/zero"), &home.path("fifo")] {
        handover(&["status", "--pid-file", file.to_str().unwrap()]).exits_with(2).complains("has no pid in it");
    }
    drop(fifo);
}

#[test]
fn a_recycled_pid() {
    let home = Home::new();
    let mut other = home.command("sleep").arg("60").spawn().unwrap();
    let file = home.file("pid", other.id().to_string().as_bytes(), 0o644);
    handover(&["upgrade", "--pid-file", file.to_str().unwrap()])
        .exits_with(7)
        .complains("it runs (`sleep`), and is no handover process")
        .complains("a pid file may be out of date");
    other.kill().unwrap();
    other.wait().unwrap();
}

#[test]
fn wrong_usage() {
    handover(&[]).exits_with(2);
    handover(&["upgrade"]).exits_with(2).complains("Name it with --pid, --pid-file, --socket or --name");
    handover(&["stop"]).exits_with(2);
    handover(&["upgrade", "--pid", "0"]).exits_with(2);
    handover(&["upgrade", "--pid", "1", "--socket", "x"]).exits_with(2);
    handover(&["upgrade", "--pid", "1", "--ready-timeout", "5"]).exits_with(2).complains("a time needs a unit");
    handover(&["upgrade", "--pid", "1", "--ready-timeout", ""]).exits_with(2).complains("value was empty");
    for (time, exit) in [("100y", 7), ("101y", 2), ("18446744073709551615s", 2)] {
        handover(&["stop", "--pid", "2147483647", "--drain-timeout", time]).exits_with(exit);
    }
    let long = ["exec", "--ready-timeout", "18446744073709551615s", "--", "true"];
    handover(&long).exits_with(2).complains("a time is 100 years at the most");
    handover(&["upgrade", "--pid", "1", "--env", "NAME"]).exits_with(2).complains("write NAME=VALUE");
    handover(&["upgrade", "--pid", "1", "--wait", "long"]).exits_with(2);
    handover(&["no-such-verb"]).exits_with(2);
}

/// It would do nothing: a server with the library says when it is ready.
#[test]
fn a_delay_is_refused_where_the_program_says_that_it_is_ready() {
    let server = Server::http();
    for verb in ["upgrade", "restart"] {
        server
            .handover(&[verb, "--ready-delay", "1s", "--pid", &server.pid().to_string()])
            .exits_with(2)
            .complains("--ready-delay is for a program under `handover exec`");
    }
    assert_eq!(server.generation(), 1);
}

#[test]
fn the_stages_of_an_upgrade_in_their_order() {
    let server = Server::http();
    let run = server.upgrade(&["--wait", "drained"]).exits_with(0);
    let words: Vec<&str> = run.stdout.lines().map(|line| line.split_whitespace().next().unwrap()).collect();
    let stages =
        ["upgrading", "spawned", "adopted", "ready", "committed", "healthy", "draining", "drained", "upgraded"];
    assert_eq!(words, stages, "{run:?}");
    assert!(!run.stdout.contains('\x1b') && run.stderr.is_empty(), "{run:?}");
    let pid = server.pid();
    assert_eq!(run.stdout.lines().last(), Some(format!("upgraded to generation 2 (pid {pid})").as_str()));
}

#[test]
fn one_json_object_a_line() {
    let server = Server::http();
    let old = server.pid();
    let run = server.upgrade(&["--json", "--wait", "drained"]).exits_with(0);
    let lines = run.json();
    assert_eq!(
        (&lines[0]["event"], &lines[0]["pid"], &lines[0]["generation"]),
        (&"accepted".into(), &old.into(), &1.into())
    );
    let stages: Vec<&Value> = lines.iter().filter(|line| line["event"] == "stage").map(|line| &line["stage"]).collect();
    assert_eq!(stages, ["spawned", "adopted", "ready", "committed", "healthy", "draining"]);
    let times: Vec<f64> = lines.iter().filter_map(|line| line["at_ms"].as_f64()).collect();
    assert!(times.is_sorted(), "{times:?}");
    let ready = lines.iter().find(|line| line["stage"] == "ready").unwrap();
    assert_eq!((&ready["kept"], &ready["added"]), (&serde_json::json!(["http"]), &serde_json::json!([])));
    assert!(lines[1].get("kept").is_none(), "{}", lines[1]);
    let result = run.last_json();
    assert_eq!((&result["result"], &result["exit_code"]), (&"upgraded".into(), &0.into()));
    assert_eq!((&result["pid"], &result["generation"]), (&server.pid().into(), &2.into()));

    let run = server.upgrade_with_fault("exit-1", &["--json"]).exits_with(1);
    let result = run.last_json();
    assert_eq!((&result["result"], &result["exit_code"]), (&"failed".into(), &1.into()));
    assert_eq!(result["exit"], "exited with status 1");
    assert_eq!(result["stderr"], serde_json::json!(["cannot open the database"]));
    assert!(run.stderr.is_empty(), "{run:?}");

    let run = handover(&["upgrade", "--json", "--pid", &std::process::id().to_string()]).exits_with(7);
    assert_eq!((&run.last_json()["event"], &run.last_json()["exit_code"]), (&"error".into(), &7.into()));
}

#[test]
fn waiting_until_ready_healthy_or_drained() {
    let server = Server::http();
    let first = server.pid();
    let slow = ask(server.address(), "/slow/4");
    eventually("a request in flight", || (server.status(first).connections.open == 1).then_some(()));
    let ready = server.upgrade(&["--wait", "ready", "--trial", "500ms"]).exits_with(0);
    assert!(!ready.stdout.contains("healthy"), "{ready:?}");
    let second = server.answerer().pid.cast_signed();
    eventually("the end of the trial", || {
        (server.status(first).state == handover::control::State::Draining).then_some(())
    });
    let drained = server.upgrade(&["--wait", "drained"]).exits_with(0);
    assert!(drained.stdout.contains("draining"), "{drained:?}");
    assert!(crate::server::has_ended(second));
    assert_eq!(slow.answerer().generation, 1);
}

#[test]
fn status() {
    let server = Server::start(&["--tcp", "http=127.0.0.1:0", "--udp", "dns=127.0.0.1:0"]);
    let _ = server.get("/");
    server.upgrade(&["--wait", "drained"]).exits_with(0);
    let _ = server.get("/");
    let (pid, address) = (server.pid().to_string(), server.address().to_string());
    let run = handover(&["status", "--pid", &pid]).exits_with(0);
    for part in [
        &format!("generation   2, pid {pid}, serving"),
        "examples/fixture fixture 1.0",
        "1 accepted",
        "last upgrade",
        "upgraded to generation 2",
        "LISTENER  KIND  ADDRESS",
        &address,
        "handed-over",
    ] {
        assert!(run.stdout.contains(part), "`{part}` is not in {run:?}");
    }
    let run = handover(&["status", "--json", "--pid", &pid]).exits_with(0);
    let status = run.last_json();
    assert_eq!((&status["generation"], &status["state"]), (&2.into(), &"serving".into()));
    let listeners = status["listeners"].as_array().unwrap();
    assert_eq!(listeners.iter().map(|one| &one["name"]).collect::<Vec<_>>(), ["dns", "http"]);
    assert_eq!(listeners[1]["waited_on"], true);
    assert_eq!(status["last_upgrade"]["result"], "upgraded");
}

/// Clients that wait, in the queue of a server that stands still.
#[test]
fn status_shows_the_queue() {
    let server = Server::start(&["--tcp", "http=127.0.0.1:0", "--tcp", "idle=127.0.0.1:0"]);
    let idle = server.address_of("idle").parse().unwrap();
    server.upgrade_with_fault("ready-never-accepts", &[]).exits_with(0);
    let waiting: Vec<_> = (0..3).map(|_| ask(idle, "/")).collect();
    eventually("three in the queue", || {
        let status = server.serving();
        let listener = status.listeners.iter().find(|one| one.name == "idle")?;
        (listener.queue == Some(3) && !listener.waited_on).then_some(())
    });
    drop(waiting);
}

#[test]
fn ps() {
    let (one, two) = (Server::http(), Server::http());
    let run = handover(&["ps"]).exits_with(0);
    for server in [&one, &two] {
        let pid = server.pid().to_string();
        let line = run.stdout.lines().find(|line| line.split_whitespace().next() == Some(&pid));
        let line = line.unwrap_or_else(|| panic!("{pid} is not in {run:?}"));
        assert!(line.contains("serving") && line.contains("fixture"), "{line}");
    }
    let run = handover(&["ps", "--json"]).exits_with(0);
    let pids: Vec<Value> = run.json().into_iter().map(|line| line["pid"].clone()).collect();
    assert!(pids.contains(&one.pid().into()) && pids.contains(&two.pid().into()), "{pids:?}");
}

/// Its row stays as narrow as the others', and why is said below.
#[test]
fn ps_with_a_process_that_does_not_answer() {
    let server = Server::http();
    let pid = server.pid();
    kill(Pid::from_raw(pid), Signal::SIGSTOP).unwrap();
    let run = handover(&["ps"]).exits_with(0);
    kill(Pid::from_raw(pid), Signal::SIGCONT).unwrap();
    let row = |line: &str| line.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
    let pid = pid.to_string();
    assert!(run.stdout.lines().any(|line| row(line) == [pid.as_str(), "?", "?"]), "{run:?}");
    assert!(run.stdout.lines().any(|line| line.starts_with(&format!("cannot ask process {pid}: "))), "{run:?}");
}

#[test]
fn stop_drains() {
    let server = Server::http();
    let pid = server.pid();
    let slow = ask(server.address(), "/slow/4");
    eventually("a request in flight", || (server.status(pid).connections.open == 1).then_some(()));
    let run = handover(&["stop", "--pid", &pid.to_string()]).exits_with(0);
    assert!(run.stdout.contains("draining") && run.stdout.contains("1 connection open"), "{run:?}");
    assert!(run.stdout.contains(&format!("process {pid} stopped")), "{run:?}");
    assert!(crate::server::has_ended(pid), "the command returns when the process is gone");
    assert_eq!(slow.answerer().generation, 1);
    assert_eq!(server.home.sockets(), Vec::<String>::new());
}

#[test]
fn stop_cuts_at_the_drain_timeout_and_says_so() {
    let server = Server::http();
    let pid = server.pid();
    let slow = ask(server.address(), "/slow/60");
    eventually("a request in flight", || (server.status(pid).connections.open == 1).then_some(()));
    let arguments = ["stop", "--pid", &pid.to_string(), "--drain-timeout", "100ms", "--json"];
    let run = handover(&arguments).exits_with(5);
    let result = run.last_json();
    assert_eq!((&result["result"], &result["cut"], &result["exit_code"]), (&"cut".into(), &1.into(), &5.into()));
    assert!(slow.try_answer().is_ok_and(|text| text.is_empty()));
}

#[test]
fn an_upgrade_cuts_at_the_drain_timeout_and_says_so() {
    let server = Server::http();
    let old = server.pid();
    let slow = ask(server.address(), "/slow/60");
    eventually("a request in flight", || (server.status(old).connections.open == 1).then_some(()));
    server
        .upgrade(&["--wait", "drained", "--drain-timeout", "100ms"])
        .exits_with(5)
        .complains("upgraded to generation 2")
        .complains("1 connection was closed at the drain deadline");
    drop(slow);
    assert_eq!(server.answerer().generation, 2);
    server.assert_only(server.pid());
}
