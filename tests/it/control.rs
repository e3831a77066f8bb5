//! The control socket: many who ask at once, some who say nothing, some who may not.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::process::Command;

use handover::control::State;

use crate::client::ask;
use crate::command::{Running, run};
use crate::home::{HANDOVER, Home, fixture};
use crate::rights::is_root_or_skip;
use crate::server::Server;
use crate::wait::{LONG, eventually};

const NOBODY: u32 = 65534;

#[test]
fn of_twenty_requests_at_once_one_wins() {
    let server = Server::http();
    let pid = server.pid().to_string();
    let hold = server.home.fifo("hold");
    let fault = hold.fault("hold-before-ready");
    let start = || Running::start(server.handover_command(&["upgrade", "--pid", &pid, "--env", &fault]));
    let mut all: Vec<Running> = (0..20).map(|_| start()).collect();
    let held = hold.reached();
    eventually("nineteen that are refused", || {
        (all.iter_mut().filter_map(|one| one.has_ended().then_some(())).count() == 19).then_some(())
    });
    held.let_go();
    let (won, lost): (Vec<_>, Vec<_>) = all.into_iter().map(Running::finish).partition(|run| run.code == Some(0));
    assert_eq!((won.len(), lost.len()), (1, 19));
    for run in lost {
        run.exits_with(3).complains("another upgrade is under way: to process ").complains("tells how it ends");
    }
    assert_eq!(server.generation(), 2);
}

/// The truth about a process is not that it closed a connection.
#[test]
fn a_process_that_closes_the_connection_and_lives_is_not_called_dead() {
    let home = crate::home::Home::new();
    let path = home.path("1.sock");
    let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
    for verb in ["upgrade", "stop"] {
        let mut command = std::process::Command::new(crate::home::HANDOVER);
        command.arg(verb).arg("--socket").arg(&path);
        let command = Running::start(command);
        let (mut stream, _) = listener.accept().unwrap();
        std::io::BufRead::read_line(&mut std::io::BufReader::new(&stream), &mut String::new()).unwrap();
        stream.write_all(b"{\"event\":\"accepted\",\"pid\":1,\"generation\":1}\n").unwrap();
        drop(stream);
        let run = command.finish().exits_with(1);
        run.complains(
            "it has closed the connection, and lives (what came of it is not known: `handover status` tells)",
        );
    }
}

fn connect(server: &Server) -> UnixStream {
    let stream = UnixStream::connect(server.home.control().join(format!("{}.sock", server.first_pid()))).unwrap();
    stream.set_read_timeout(Some(LONG)).unwrap();
    stream
}

fn answer(mut stream: UnixStream) -> String {
    let mut text = String::new();
    let _ = stream.read_to_string(&mut text);
    text
}

#[test]
fn clients_that_say_nothing_hold_up_nobody() {
    let server = Server::http();
    let first = server.pid();
    let mut half = connect(&server);
    half.write_all(b"{\"request\":").unwrap();
    let silent: Vec<UnixStream> = (0..200).map(|_| connect(&server)).collect();
    assert_eq!(server.status(first).state, State::Serving);
    server.upgrade(&[]).exits_with(0);
    assert_eq!(server.answerer().generation, 2);
    drop((silent, half));
    server.wait_for_end(first);
    server.assert_only(server.pid());
}

#[test]
fn what_cannot_be_understood_is_refused_with_the_reason() {
    let server = Server::http();
    for (line, reason) in [
        ("upgrade\n", "the request cannot be understood"),
        ("{\"request\":\"reboot\"}\n", "unknown variant `reboot`"),
        ("{\"request\":\"upgrade\",\"args\":7}\n", "the request cannot be understood"),
    ] {
        let mut stream = connect(&server);
        stream.write_all(line.as_bytes()).unwrap();
        let answer = answer(stream);
        assert!(answer.contains("\"bad-request\"") && answer.contains(reason), "{answer}");
    }
    let mut stream = connect(&server);
    let _ = stream.write_all(&vec![b'x'; 300 << 10]);
    let answer = answer(stream);
    assert!(answer.contains("longer than 262144 bytes") || answer.is_empty(), "{answer}");
    assert_eq!(server.status(server.first_pid()).state, State::Serving);
}

#[test]
fn an_upgrade_goes_on_when_the_one_who_asked_is_gone() {
    let server = Server::http();
    let hold = server.home.fifo("hold");
    let upgrade = server.begin_upgrade(&["--env", &hold.fault("hold-before-ready")]);
    let held = hold.reached();
    drop(upgrade);
    held.let_go();
    eventually("generation 2", || (server.answerer().generation == 2).then_some(()));
    server.wait_for_end(server.first_pid());
    server.assert_only(server.pid());
}

/// As programs do that have sent all that they have to say.
#[test]
fn a_client_that_says_no_more_hears_how_it_ends() {
    let server = Server::http();
    let mut client = connect(&server);
    client.write_all(b"{\"request\":\"upgrade\"}\n").unwrap();
    client.shutdown(std::net::Shutdown::Write).unwrap();
    let answer = answer(client);
    assert!(answer.contains("\"result\":\"upgraded\""), "{answer}");
}

/// A command that has given up has said that nothing was done; so nothing is, when the process goes on.
#[test]
fn a_request_is_dropped_when_the_one_who_asked_gave_up_before_it_was_read() {
    let server = Server::http();
    let pid = server.pid();
    server.freeze(pid);
    let mut gave_up = connect(&server);
    gave_up.write_all(b"{\"request\":\"upgrade\"}\n").unwrap();
    drop(gave_up);
    // One that only says that it will say no more is still there to be answered.
    let mut waits = connect(&server);
    waits.write_all(b"{\"request\":\"status\"}\n").unwrap();
    waits.shutdown(std::net::Shutdown::Write).unwrap();
    server.thaw(pid);
    let answer = answer(waits);
    assert!(answer.contains("\"state\":\"serving\"") && !answer.contains("last_upgrade"), "{answer}");
    eventually("the log", || server.home.log().contains("asked and is gone: nothing is done").then_some(()));
    assert_eq!(server.generation(), 1);
    server.assert_only(pid);
}

/// Everything that a stranger can do is to hear that he may not.
#[test]
fn a_stranger_is_refused() {
    if !is_root_or_skip("the control socket refuses another uid") {
        return;
    }
    let server = Server::http();
    let socket = server.home.control().join(format!("{}.sock", server.pid()));
    let command = server.home.copy(HANDOVER.as_ref(), "handover");
    let as_nobody = |arguments: &[&str]| {
        let mut command = Command::new(&command);
        command.args(arguments).uid(NOBODY).gid(NOBODY).current_dir("/");
        run(command)
    };
    fs::set_permissions(server.home.path(""), fs::Permissions::from_mode(0o711)).unwrap();
    let pid = server.pid().to_string();
    // The file system does not let him near, as it should be.
    as_nobody(&["upgrade", "--pid", &pid]).exits_with(4).complains("ask as root, or as the user");
    let by_path = ["--socket", socket.to_str().unwrap()];
    as_nobody(&[&["status"], &by_path[..]].concat()).exits_with(4).complains("Permission denied");
    // And if it did.
    fs::set_permissions(server.home.control(), fs::Permissions::from_mode(0o711)).unwrap();
    fs::set_permissions(&socket, fs::Permissions::from_mode(0o666)).unwrap();
    for verb in ["upgrade", "status", "stop"] {
        as_nobody(&[&[verb], &by_path[..]].concat())
            .exits_with(4)
            .complains("uid 65534 may not control this process: only root and uid 0 may");
    }
    assert_eq!(server.generation(), 1);
}

/// Root may ask whoever it is.
#[test]
fn root_may_ask_the_process_of_another_user() {
    if !is_root_or_skip("root upgrades a process of another uid") {
        return;
    }
    let home = Home::new();
    fs::set_permissions(home.path(""), fs::Permissions::from_mode(0o777)).unwrap();
    home.copy_of_fixture("fixture");
    home.file("log", b"", 0o666);
    let mut command = home.logged(home.path("fixture"), &["--tcp", "http=127.0.0.1:0", "--trial", "100ms"]);
    command.uid(NOBODY).gid(NOBODY).current_dir("/").env("PWD", "/");
    let server = Server::run(home, command);
    fs::set_permissions(server.home.path(""), fs::Permissions::from_mode(0o755)).unwrap();
    server.upgrade(&[]).exits_with(0);
    assert_eq!(server.answerer().generation, 2);
}

#[track_caller]
fn does_not_start(home: &Home, says: &str) {
    let run = run(home.command(fixture())).exits_with(1);
    run.complains("cannot use the control directory").complains(says).complains("set HANDOVER_DIR to a directory");
}

#[test]
fn a_control_directory_that_is_not_there_is_made_for_this_user_alone() {
    let server = Server::http();
    let mode = fs::metadata(server.home.control()).unwrap().permissions().mode();
    let socket = server.home.control().join(format!("{}.sock", server.pid()));
    let socket_mode = fs::metadata(socket).unwrap().permissions().mode();
    assert_eq!((mode & 0o7777, socket_mode & 0o7777), (0o700, 0o600));
}

#[test]
fn a_control_directory_that_others_write_to_is_refused() {
    let home = Home::new();
    fs::create_dir(home.control()).unwrap();
    fs::set_permissions(home.control(), fs::Permissions::from_mode(0o777)).unwrap();
    does_not_start(&home, "others may write to it (mode 0777)");
}

#[test]
fn a_control_directory_that_is_a_file_is_refused() {
    let home = Home::new();
    home.file("control", b"", 0o600);
    does_not_start(&home, "it is no directory");
}

#[test]
fn a_control_directory_that_is_a_link_is_refused() {
    let home = Home::new();
    fs::create_dir(home.path("elsewhere")).unwrap();
    std::os::unix::fs::symlink(home.path("elsewhere"), home.control()).unwrap();
    does_not_start(&home, "it is no directory");
}

#[test]
fn a_control_directory_of_somebody_else_is_refused() {
    if !is_root_or_skip("a control directory of another uid is refused") {
        return;
    }
    let home = Home::new();
    fs::create_dir(home.control()).unwrap();
    chown(home.control(), Some(NOBODY), Some(NOBODY)).unwrap();
    does_not_start(&home, "it belongs to uid 65534 and not to uid 0");
}

/// Of a process that had the same pid and was killed.
#[test]
fn a_stale_control_socket_of_the_same_pid_is_replaced() {
    let home = Home::new();
    let stale = home.path("stale");
    drop(UnixListener::bind(&stale).unwrap());
    let script = format!(
        "#!/bin/sh\nmkdir -m 700 \"$HANDOVER_DIR\"\nmv {} \"$HANDOVER_DIR/$$.sock\"\nexec {} \"$@\"\n",
        stale.display(),
        fixture().display()
    );
    let script = home.script("start", &script);
    let command = home.logged(script, &["--tcp", "http=127.0.0.1:0", "--trial", "100ms"]);
    let server = Server::run(home, command);
    assert!(!stale.exists());
    server.upgrade(&[]).exits_with(0);
}

#[test]
fn a_stale_control_socket_answers_nobody() {
    let home = Home::new();
    let stale = home.path("4711.sock");
    drop(UnixListener::bind(&stale).unwrap());
    let mut command = Command::new(HANDOVER);
    command.args(["upgrade", "--socket"]).arg(&stale);
    run(command).exits_with(7).complains("Connection refused").complains("the process is gone");
}

#[test]
fn while_the_first_drains_the_second_upgrade_works() {
    let server = Server::http();
    let first = server.pid();
    let slow = ask(server.address(), "/slow/5");
    eventually("a request in flight", || (server.status(first).connections.open == 1).then_some(()));
    server.upgrade(&["--trial", "50ms"]).exits_with(0);
    server.upgrade(&["--trial", "50ms"]).exits_with(0);
    let status = server.serving();
    assert_eq!(status.generation, 3);
    assert!(status.draining.iter().any(|older| older.pid == first && older.generation == 1), "{status:?}");
    let pid = first.to_string();
    server.handover(&["upgrade", "--pid", &pid]).exits_with(3).complains("and is draining: ask that one");
    assert_eq!(slow.answerer().generation, 1);
    server.wait_for_end(first);
    eventually("nobody drains", || server.serving().draining.is_empty().then_some(()));
    server.assert_only(server.pid());
}

#[test]
fn more_than_so_many_may_not_drain() {
    let server = Server::start(&["--tcp", "http=127.0.0.1:0", "--max-draining", "1"]);
    let first = server.pid();
    let slow = ask(server.address(), "/slow/60");
    eventually("a request in flight", || (server.status(first).connections.open == 1).then_some(()));
    server.upgrade(&[]).exits_with(0);
    let refused = server.upgrade(&[]).exits_with(3);
    refused.complains(&format!("1 older generations still drain (pid {first}), and at most 1 may"));
    // What the message says: end one of them.
    let pid = first.to_string();
    server.handover(&["stop", "--pid", &pid, "--drain-timeout", "10ms"]).exits_with(5);
    drop(slow);
    server.wait_for_end(first);
    eventually("nobody drains", || server.serving().draining.is_empty().then_some(()));
    server.upgrade(&[]).exits_with(0);
    assert_eq!(server.generation(), 3);
}
