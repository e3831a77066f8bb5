//! What the command says beside its result: when it is interrupted, and where stderr is the journal.

use std::fs;
use std::os::fd::AsFd;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::home::HANDOVER;
use crate::server::Server;
use crate::wait::eventually;

/// ^C ends the command as ever, but not without saying that the upgrade goes on; and it does.
#[test]
fn an_upgrade_goes_on_when_the_command_is_interrupted() {
    for signal in [Signal::SIGINT, Signal::SIGTERM] {
        let server = Server::http();
        let pid = server.pid();
        let hold = server.home.fifo("hold");
        let mut command = server.handover_command(&["upgrade", "--pid", &pid.to_string()]);
        command.args(["--env", &hold.fault("hold-before-ready")]);
        let upgrade = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        let held = hold.reached();
        kill(Pid::from_raw(upgrade.id().cast_signed()), signal).unwrap();
        let output = upgrade.wait_with_output().unwrap();
        assert_eq!(output.status.signal(), Some(signal as i32));
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(
            said,
            format!(
                "handover: the upgrade goes on without this command; `handover status --pid {pid}` tells what came of \
                 it\n"
            )
        );
        held.let_go();
        eventually("generation 2", || (server.answerer().generation == 2).then_some(()));
    }
}

/// As in a unit: JOURNAL_STREAM names what stderr is.
#[test]
fn lines_carry_their_priority_where_stderr_is_the_journal() {
    let home = crate::home::Home::new();
    let journal = fs::File::create(home.path("journal")).unwrap();
    let stat = nix::sys::stat::fstat(journal.as_fd()).unwrap();
    let run = |stream: String| {
        fs::write(home.path("journal"), "").unwrap();
        let mut command = Command::new(HANDOVER);
        command.args(["upgrade", "--pid-file", "/no/such/file"]).env("JOURNAL_STREAM", stream);
        let status = command.stderr(journal.try_clone().unwrap()).status().unwrap();
        assert_eq!(status.code(), Some(7));
        fs::read_to_string(home.path("journal")).unwrap()
    };
    let text = run(format!("{}:{}", stat.st_dev, stat.st_ino));
    assert!(text.trim_start_matches('\0').starts_with("<3>handover: cannot read the pid file"), "{text:?}");
    // What is logged, too.
    let server = Server::http();
    fs::write(home.path("journal"), "").unwrap();
    let mut command = server.handover_command(&["status", "--pid", &server.pid().to_string()]);
    command.env("JOURNAL_STREAM", format!("{}:{}", stat.st_dev, stat.st_ino)).env("RUST_LOG", "debug");
    command.stdout(Stdio::null()).stderr(journal.try_clone().unwrap()).status().unwrap();
    let logged = fs::read_to_string(home.path("journal")).unwrap();
    assert!(logged.contains("<7>handover::control::client: process "), "{logged:?}");
    // Inherited by somebody whose stderr is another stream.
    let text = run(format!("{}:{}", stat.st_dev, stat.st_ino + 1));
    assert!(text.trim_start_matches('\0').starts_with("handover: cannot read the pid file"), "{text:?}");
}

/// Root asks processes of other users, too (`handover ps`), and any of them may say anything.
#[test]
fn what_a_process_says_moves_no_cursor_and_ends_no_command() {
    let home = crate::home::Home::new();
    let path = home.path("hostile.sock");
    let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
    let status = serde_json::json!({
        "event": "status", "pid": 1, "generation": u64::MAX, "state": "serving", "since_unix_ms": u64::MAX,
        "version": "\u{1b}[2J", "program": "/a\u{1b}]0;title\u{7}", "name": "\u{9b}2J",
        "build": {"path": "/a", "device": 1, "inode": 1, "size": 1, "modified_unix_ms": u64::MAX},
        "listeners": [{"name": "\u{8}x", "kind": "tcp", "address": "a\rb", "cookie": 1, "source": "bound",
            "waited_on": true}],
        "connections": {"open": u64::MAX, "accepted": 0}, "draining": [], "handover": "0",
        "last_upgrade": {"result": "failed", "message": "\u{1b}[1A\u{7f}", "at_unix_ms": u64::MAX},
    });
    let server = std::thread::spawn(move || {
        let (mut client, _) = listener.accept().unwrap();
        std::io::Write::write_all(&mut client, format!("{status}\n").as_bytes()).unwrap();
        // Until it has gone.
        let _ = std::io::Read::read_to_end(&mut client, &mut vec![]);
    });
    let mut command = Command::new(HANDOVER);
    command.args(["status", "--socket", path.to_str().unwrap()]);
    let run = crate::command::run(command).exits_with(0);
    server.join().unwrap();
    assert!(!run.stdout.chars().any(|one| one.is_control() && one != '\n'), "{run:?}");
    run.says("\u{fffd}[2J").says("a\u{fffd}b");
}
