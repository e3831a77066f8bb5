//! Neighbours who mean harm, or do it: at the control socket, on the way to the new build, in what a build says.
//!
//! What else there is of this: strangers and their directories in `control.rs`, stale variables in `activation.rs`, recycled
//! pids in `the_command.rs`, broken frames in `wire.rs`.

use std::fs;
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use sendfd::SendWithFd;

use crate::command::{Running, run};
use crate::home::{HANDOVER, Home, fixture};
use crate::rights::is_root_or_skip;
use crate::server::{Server, fds_of};
use crate::wait::{LONG, eventually};

fn connect(server: &Server) -> UnixStream {
    UnixStream::connect(server.home.control().join(format!("{}.sock", server.first_pid()))).unwrap()
}

/// As many as are allowed; the soft limit is often 1024.
fn raise_own_fd_limit(wanted: u64) -> bool {
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    let raised = soft.max(wanted.min(hard));
    setrlimit(Resource::RLIMIT_NOFILE, raised, hard).unwrap();
    raised >= wanted
}

#[test]
fn ten_thousand_connects_that_say_nothing() {
    const CONNECTS: usize = 10_000;
    if !raise_own_fd_limit(CONNECTS as u64 + 4096) {
        eprintln!("left out, because so many fds are not allowed here: ten thousand connects");
        return;
    }
    let server = Server::http();
    let pid = server.first_pid();
    let _ = server.settled_holdings(pid);
    let most = fds_of(pid).len() + 64 + 10;
    let load = server.load().start();
    load.wait_for_more(20, LONG).unwrap();
    let silent: Vec<UnixStream> = (0..CONNECTS)
        .map(|number| {
            if number % 1000 == 0 {
                // Four clients of the load, and their sockets.
                assert!(fds_of(pid).len() <= most + 8, "{:?}", fds_of(pid));
            }
            connect(&server)
        })
        .collect();
    let begun = Instant::now();
    server.status(pid);
    server.upgrade(&[]).exits_with(0);
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
    load.wait_for_generation(2, LONG).unwrap();
    load.stop().assert_lossless();
    drop(silent);
    server.wait_for_end(pid);
    server.assert_only(server.pid());
}

/// Whatever a client attaches to what it says is closed, and nothing of it stays open in the server.
#[test]
fn fds_in_a_request() {
    let server = Server::http();
    let pid = server.pid();
    let before = server.settled_holdings(pid);
    let (mut reader, writer) = io::pipe().unwrap();
    let many = vec![writer.as_raw_fd(); 253];
    let clients: Vec<UnixStream> = (0..40)
        .map(|number| {
            let client = connect(&server);
            for part in [&b"{\"request\""[..], b":\"st", b"atus\"}"] {
                client.send_with_fd(part, &many).unwrap();
            }
            if number % 2 == 0 {
                (&client).write_all(b"\n").unwrap();
            }
            client
        })
        .collect();
    drop(writer);
    // Where one of ten thousand copies is held anywhere, the pipe has no end.
    let (sender, ended) = std::sync::mpsc::channel();
    thread::spawn(move || sender.send(reader.read(&mut [0]).unwrap()));
    assert_eq!(ended.recv_timeout(LONG), Ok(0));
    drop(clients);
    server.assert_holds(pid, &before);
    server.upgrade(&[]).exits_with(0);
}

/// Before it starts, something is put where its control socket is to be: it is replaced or refused, and what a link leads to
/// is left alone.
#[test]
fn something_planted_at_the_control_socket() {
    let home = Home::new();
    let victim = home.file("victim", b"untouched", 0o644);
    let start = |plant: &str, number: usize| {
        let script = format!(
            "umask 077; mkdir -p \"$HANDOVER_DIR\"; P=\"$HANDOVER_DIR/$$.sock\"; {plant}; exec {} --tcp http=127.0.0.1:0",
            fixture().display()
        );
        let mut command = home.command("/bin/sh");
        command.args(["-c", &script]).env("HANDOVER_DIR", home.path(format!("control-{number}")));
        command
    };
    let nowhere = home.path("nowhere");
    let plants = ["mkdir \"$P\"".to_owned(), format!("ln -s {} \"$P\"", nowhere.display())];
    for (number, plant) in plants.iter().enumerate() {
        let run = run(start(plant, number)).exits_with(1).complains("cannot listen on the control socket");
        run.complains("Address already in use");
    }
    let plants = ["echo planted >\"$P\"".to_owned(), format!("ln -s {} \"$P\"", victim.display())];
    for (number, plant) in plants.iter().enumerate() {
        let mut server = start(plant, 10 + number).stderr(std::process::Stdio::null()).spawn().unwrap();
        let pid = server.id().to_string();
        let status = || {
            let mut command = Command::new(HANDOVER);
            command.args(["status", "--pid", &pid]);
            (run(command).code == Some(0)).then_some(())
        };
        eventually("a server that answers", status);
        server.kill().unwrap();
        server.wait().unwrap();
    }
    assert_eq!(fs::read(&victim).unwrap(), b"untouched");
    assert!(!nowhere.exists());
}

/// Its own name of a pid file can be foreseen: `app.pid.<pid>`, for whoever may write to that directory.
#[test]
fn a_link_planted_where_the_pid_file_is_written() {
    let home = Home::new();
    let victim = home.file("victim", b"untouched", 0o644);
    let pid_file = home.path("app.pid");
    let script = format!(
        "ln -s {} {}.$$; exec {} --tcp http=127.0.0.1:0 --pid-file {}",
        victim.display(),
        pid_file.display(),
        fixture().display(),
        pid_file.display()
    );
    let command = home.logged("/bin/sh", &["-c", &script]);
    let server = Server::run(home, command);
    assert_eq!(fs::read(&victim).unwrap(), b"untouched");
    assert_eq!(fs::read_to_string(&pid_file).unwrap(), format!("{}\n", server.first_pid()));
    assert!(!fs::symlink_metadata(&pid_file).unwrap().is_symlink());
}

/// The pid of a server that was killed is given to something else.
#[test]
fn a_pid_that_is_another_programs_now() {
    if !is_root_or_skip("a pid given out again, in a pid namespace") {
        return;
    }
    let home = Home::new();
    let script = format!(
        "set -e
        {fixture} --tcp http=127.0.0.1:0 >&2 & old=$!
        until {HANDOVER} status --pid $old >&2; do :; done
        kill -KILL $old; wait $old || true
        echo $((old - 1)) >/proc/sys/kernel/ns_last_pid; sleep 60 & new=$!
        echo \"same=$([ $old = $new ] && echo yes)\"
        for verb in upgrade restart stop; do
            {HANDOVER} $verb --pid $old 2>&1 && code=0 || code=$?; echo \"pid=$code\"
            {HANDOVER} $verb --socket \"$HANDOVER_DIR/$old.sock\" 2>&1 && code=0 || code=$?; echo \"socket=$code\"
        done
        kill -0 $new && echo lives",
        fixture = fixture().display()
    );
    let mut command = home.command("unshare");
    command.args(["-p", "-f", "-m", "--mount-proc", "/bin/sh", "-c", &script]);
    let run = run(command).exits_with(0).says("same=yes\n").says("lives\n");
    let count = |line: &str| run.stdout.lines().filter(|one| *one == line).count();
    assert_eq!((count("pid=7"), count("socket=7")), (3, 3), "{run:?}");
}

/// An upgrade looks at the new build before it starts it; what it starts must be that.
#[cfg(feature = "fault-points")]
#[test]
fn a_build_swapped_when_it_has_been_looked_at() {
    use nix::sys::signal::Signal;
    let evil_elf = |server: &Server| drop(server.home.copy(Path::new("/bin/sleep"), "evil"));
    let evil_script = |server: &Server| drop(server.home.script("evil", "#!/bin/sh\nexec sleep 60\n"));
    for plant in [evil_elf as fn(&Server), evil_script] {
        let home = Home::new();
        let fired = home.path("fired");
        let mut command = home.fixture(&["--tcp", "http=127.0.0.1:0", "--trial", "100ms"]);
        command.env("HANDOVER_FAULT", format!("old: looked at,stop,{}", fired.display()));
        let server = Server::run(home, command);
        let old = server.first_pid();
        let build = server.home.copy_of_fixture("build");
        plant(&server);
        let upgrade = server.begin_upgrade(&["--exe", build.to_str().unwrap()]);
        eventually("a process that stands still", || {
            let stat = fs::read_to_string(format!("/proc/{old}/stat")).unwrap();
            stat.contains(") T ").then_some(())
        });
        fs::rename(server.home.path("evil"), &build).unwrap();
        server.signal(old, Signal::SIGCONT);
        let run = upgrade.finish().exits_with(1).complains("another was put there when it had been looked at");
        run.complains("serves on");
        server.assert_only(old);
        server.home.copy_of_fixture("good");
        fs::rename(server.home.path("good"), &build).unwrap();
        server.upgrade(&["--exe", build.to_str().unwrap()]).exits_with(0);
    }
}

/// At whatever moment of an upgrade the application starts a program: nothing of ours is open in it.
#[test]
fn a_thousand_grandchildren_inherit_nothing() {
    const EACH: usize = 250;
    let server = Server::http();
    let address = server.address();
    // What the tests were started with that had no CLOEXEC, and what `ls` reads the directory by.
    let at_rest = crate::client::get(address, "/fds");
    let asked: Vec<_> = (0..4)
        .map(|_| {
            thread::spawn(move || {
                let open = |_| crate::client::get(address, "/fds");
                (0..EACH).map(open).collect::<Vec<String>>()
            })
        })
        .collect();
    let mut upgrades = 0;
    while !asked.iter().all(thread::JoinHandle::is_finished) {
        server.upgrade(&["--trial", "10ms"]).exits_with(0);
        eventually("room for one more", || (server.serving().draining.len() < 4).then_some(()));
        upgrades += 1;
    }
    assert!(upgrades >= 5, "{upgrades}");
    for open in asked.into_iter().flat_map(|thread| thread.join().unwrap()) {
        assert_eq!(open, at_rest, "fds of a grandchild");
    }
}

/// What a build says can neither move a cursor nor pretend to be a line of the command's own.
#[test]
fn a_build_that_forges_what_is_printed() {
    let server = Server::http();
    for fault in ["forges-reason", "forges-refusal"] {
        let run = server.upgrade_with_fault(fault, &[]).exits_with(1);
        let printed = format!("{}{}", run.stdout, run.stderr);
        assert!(printed.contains("[2J"), "{printed}");
        assert!(printed.chars().all(|one| !one.is_control() || one == '\n'), "{printed:?}");
        assert!(printed.lines().all(|line| line != "upgraded to generation 2"), "{printed}");
        let status = server.handover(&["status", "--pid", &server.first_pid().to_string()]).exits_with(0);
        assert!(status.stdout.chars().all(|one| !one.is_control() || one == '\n'), "{:?}", status.stdout);
        assert!(!server.home.log().lines().any(|line| line.contains("ERROR handover") && line.contains('\x1b')));
    }
}

/// Whoever asks as root asks processes of others: what they answer is shown, and does nothing.
#[test]
fn a_process_that_forges_its_status() {
    let home = Home::new();
    let path = home.path("1.sock");
    let listener = UnixListener::bind(&path).unwrap();
    let mut command = Command::new(HANDOVER);
    command.arg("status").arg("--socket").arg(&path);
    let command = Running::start(command);
    let (mut stream, _) = listener.accept().unwrap();
    io::BufRead::read_line(&mut io::BufReader::new(&stream), &mut String::new()).unwrap();
    let forged = "\\u001b[2J\\nhandover: all is well";
    writeln!(stream, "{{\"event\":\"result\",\"result\":\"failed\",\"message\":\"{forged}\"}}").unwrap();
    drop(stream);
    let run = command.finish().exits_with(1).complains("[2J");
    assert!(!run.stderr.contains('\x1b') && run.stderr.lines().count() == 1, "{run:?}");
}
