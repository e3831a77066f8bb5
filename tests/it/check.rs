//! `handover check`: each thing that would make an upgrade fail is found before, and a good service is found good.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use nix::sys::signal::Signal;
use serde_json::Value;

use crate::command::{Run, run};
use crate::home::{HANDOVER, Home, fixture};
use crate::rights::is_root_or_skip;
use crate::server::Server;

fn check(arguments: &[&str]) -> Run {
    let mut command = Command::new(HANDOVER);
    command.arg("check").args(arguments);
    run(command)
}

fn check_server(server: &Server, arguments: &[&str]) -> Run {
    let pid = server.pid().to_string();
    check(&[&["--pid", &pid], arguments].concat())
}

#[track_caller]
fn check_program(program: &Path, arguments: &[&str]) -> Run {
    check(&[&["--exe", program.to_str().unwrap()], arguments].concat())
}

/// A line of that level has `part` in it.
#[track_caller]
fn finds(run: &Run, level: &str, about: &str, part: &str) {
    let start = format!("{level:<8} {about:<8} ");
    let found = run.stdout.lines().any(|line| line.starts_with(&start) && line.contains(part));
    assert!(found, "no `{start}…{part}` in {run:#?}");
}

#[test]
fn a_good_service_is_found_good() {
    let server = Server::http();
    let pid = server.pid();
    let run = check_server(&server, &[]).exits_with(0).says("nothing stands in the way of an upgrade\n");
    finds(&run, "ok", "process", &format!("process {pid} answers: generation 1, serving"));
    finds(&run, "ok", "process", "fds are open");
    finds(&run, "ok", "process", "is the build that runs: an upgrade starts it again");
    finds(&run, "ok", "process", "it catches SIGUSR2 and SIGHUP");
    finds(&run, "ok", "process", "its working directory");
    finds(&run, "ok", "binary", "and its libraries are there");
    assert_eq!(server.generation(), 1, "looking changes nothing");
    // What it says is true.
    server.upgrade(&[]).exits_with(0);
}

#[test]
fn as_json_every_finding_is_an_object() {
    let server = Server::http();
    let findings = check_server(&server, &["--json"]).exits_with(0).json();
    let (last, findings) = findings.split_last().unwrap();
    assert_eq!((&last["event"], &last["problems"], &last["exit_code"]), (&"result".into(), &0.into(), &0.into()));
    assert!(findings.len() > 4 && findings.iter().all(|one| one["level"] == "ok"), "{findings:?}");
    assert!(findings.iter().any(|one| one["about"] == "binary"), "{findings:?}");
    let last = check(&["--exe", "/no/such/program", "--json"]).exits_with(1).last_json();
    assert_eq!((&last["problems"], &last["exit_code"]), (&1.into(), &1.into()));
}

#[test]
fn a_process_that_is_none_of_ours_is_a_problem() {
    let pid = std::process::id().to_string();
    let run = check(&["--pid", &pid]).exits_with(1);
    finds(&run, "problem", "process", "is no handover process");
    let run = check(&["--pid-file", "/no/such/file"]).exits_with(1);
    finds(&run, "problem", "process", "cannot read the pid file");
    check(&["--pid", "0"]).exits_with(2);
    check(&["--pid", &pid, "--socket", "/x"]).exits_with(2);
}

#[test]
fn a_process_that_is_stopped_is_a_problem() {
    let server = Server::http();
    let pid = server.pid();
    server.freeze(pid);
    let run = check(&["--pid", &pid.to_string()]).exits_with(1);
    finds(&run, "problem", "process", "it is stopped (`kill -CONT` lets it go on; then ask again)");
    server.thaw(pid);
}

#[test]
fn one_that_drains_is_a_problem() {
    let server = Server::start(&["--tcp", "http=127.0.0.1:0", "--max-draining", "1"]);
    let first = server.pid();
    let slow = crate::client::ask(server.address(), "/slow/60");
    crate::wait::eventually("a request in flight", || (server.status(first).connections.open == 1).then_some(()));
    server.upgrade(&[]).exits_with(0);
    let run = check(&["--pid", &first.to_string()]).exits_with(1);
    finds(&run, "problem", "process", "is draining, and will not be upgraded any more (`handover ps` shows");
    let run = check_server(&server, &[]).exits_with(1);
    finds(&run, "problem", "process", &format!("1 older generations still drain (pid {first}), and at most 1 may"));
    drop(slow);
}

#[test]
fn too_few_fds_are_a_problem() {
    let home = Home::new();
    let script = home.script("few", "#!/bin/sh\nulimit -n 20\nexec \"$@\"\n");
    let arguments = [fixture().to_str().unwrap().to_owned(), "--tcp".into(), "http=127.0.0.1:0".into()];
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let command = home.logged(script, &arguments);
    let server = Server::run(home, command);
    let run = check_server(&server, &[]).exits_with(1);
    finds(&run, "problem", "process", "LimitNOFILE=1024");
    finds(&run, "problem", "process", "`prlimit --pid");
}

#[test]
fn a_working_directory_that_is_gone_is_a_problem() {
    let home = Home::new();
    fs::create_dir(home.path("release")).unwrap();
    let mut command = home.fixture(&["--tcp", "http=127.0.0.1:0", "--trial", "100ms"]);
    command.current_dir(home.path("release")).env("PWD", home.path("release"));
    let server = Server::run(home, command);
    fs::remove_dir(server.home.path("release")).unwrap();
    let run = check_server(&server, &[]).exits_with(1);
    finds(&run, "problem", "process", "release is gone, and a new process starts there");
    server.upgrade(&[]).exits_with(1).complains("working directory");
    fs::create_dir(server.home.path("release")).unwrap();
    check_server(&server, &[]).exits_with(0);
    server.upgrade(&[]).exits_with(0);
}

#[test]
fn a_build_that_was_replaced_is_told() {
    let home = Home::new();
    let program = home.copy_of_fixture("server");
    let command = home.logged(&program, &["--tcp", "http=127.0.0.1:0", "--trial", "100ms"]);
    let server = Server::run(home, command);
    fs::rename(server.home.copy_of_fixture("server.new"), &program).unwrap();
    let run = check_server(&server, &[]).exits_with(0);
    finds(&run, "ok", "process", "is another build than the one that runs: an upgrade starts it");
    fs::remove_file(&program).unwrap();
    let run = check_server(&server, &[]).exits_with(1);
    finds(&run, "problem", "binary", "No such file or directory");
    finds(&run, "problem", "binary", "put the new build there");
}

#[test]
fn what_an_upgrade_refuses_is_found_before() {
    let home = Home::new();
    let bad = |path: &Path, part: &str| finds(&check_program(path, &[]).exits_with(1), "problem", "binary", part);
    bad(&home.path("nothing"), "No such file");
    bad(&home.path(""), "it is a directory");
    bad(&home.file("plain", b"#!/bin/sh\n", 0o644), "chmod +x");
    bad(&home.file("text", b"hello", 0o755), "neither an ELF program nor a script");
    bad(&home.file("script", b"#!/no/such/shell\n", 0o755), "interpreter /no/such/shell, which does not exist");
    let open = home.copy_of_fixture("open");
    fs::set_permissions(&open, fs::Permissions::from_mode(0o757)).unwrap();
    bad(&open, "anybody may write to it (mode 0757)");
}

#[test]
fn a_binary_that_cannot_run_here_is_found() {
    let home = Home::new();
    let whole = fs::read(fixture()).unwrap();
    let half = home.file("half", &whole[..8192], 0o755);
    finds(&check_program(&half, &[]).exits_with(1), "problem", "binary", "half a copy");
    let mut foreign = whole.clone();
    let other: u16 = if cfg!(target_arch = "aarch64") { 62 } else { 183 };
    foreign[18..20].copy_from_slice(&other.to_le_bytes());
    let foreign = home.file("foreign", &foreign, 0o755);
    finds(&check_program(&foreign, &[]).exits_with(1), "problem", "binary", "is built for");
    // A loader of another system: the path in the file, changed to one as long.
    let loader = b"/lib64/ld-linux-x86-64.so.2";
    if let Some(at) = whole.windows(loader.len()).position(|part| part == loader) {
        let mut strange = whole;
        strange[at..at + 4].copy_from_slice(b"/nix");
        let strange = home.file("strange", &strange, 0o755);
        finds(&check_program(&strange, &[]).exits_with(1), "problem", "binary", "needs the dynamic loader /nix64/ld-");
    }
}

#[test]
fn a_library_that_is_missing_is_found() {
    let home = Home::new();
    let mut bytes = fs::read(fixture()).unwrap();
    let Some(at) = bytes.windows(13).position(|part| part == b"libgcc_s.so.1") else {
        eprintln!("left out, because the fixture needs no libgcc_s: a library that is missing is found");
        return;
    };
    bytes[at..at + 6].copy_from_slice(b"libzzz");
    let program = home.file("program", &bytes, 0o755);
    let run = check_program(&program, &[]).exits_with(1);
    finds(&run, "problem", "binary", "libzzz_s.so.1");
    finds(&run, "problem", "binary", "install the libraries");
}

#[test]
fn a_file_system_without_exec_is_found() {
    if !is_root_or_skip("a binary on a file system mounted with noexec") {
        return;
    }
    let home = Home::new();
    let script =
        "mount -t tmpfs -o noexec none \"$2\" && cp \"$1\" \"$2/server\" && exec \"$0\" check --exe \"$2/server\"";
    fs::create_dir(home.path("mount")).unwrap();
    let mut command = Command::new("unshare");
    command.args(["-m", "/bin/sh", "-c", script, HANDOVER]).arg(fixture()).arg(home.path("mount"));
    let run = run(command).exits_with(1);
    finds(&run, "problem", "binary", "its file system is mounted with noexec (install it elsewhere");
}

#[test]
fn a_version_is_asked_for_within_bounds() {
    let home = Home::new();
    let version = |name: &str, script: &str| check_program(&home.script(name, script), &["--run-version"]);
    let run = version("good", "#!/bin/sh\n[ \"$1\" = --version ] && echo app 2.1\n").exits_with(0);
    finds(&run, "ok", "binary", "--version says: app 2.1");
    let run = version("bad", "#!/bin/sh\necho no such option >&2; exit 64\n").exits_with(1);
    finds(&run, "problem", "binary", "ended with exit status: 64: no such option");
    let run = version("deaf", "#!/bin/sh\nsleep 600 & exec sleep 600\n").exits_with(0);
    finds(&run, "warning", "binary", "did not end within 5 s and was killed");
    let run = version("loud", "#!/bin/sh\nwhile :; do echo y || exit 0; done\n");
    assert!(run.stdout.lines().all(|line| line.len() < 1000), "{run:#?}");
    // Without being asked nothing is run.
    let mark = home.path("mark");
    let script = home.script("marks", &format!("#!/bin/sh\ntouch {}\n", mark.display()));
    check_program(&script, &[]).exits_with(0);
    assert!(!mark.exists());
}

/// Root asks about a process of another user, who may not get at the file.
#[test]
fn what_the_user_of_the_process_may_not_execute_is_found() {
    if !is_root_or_skip("a binary that the user of the process may not execute") {
        return;
    }
    const NOBODY: u32 = 65534;
    let home = Home::new();
    fs::set_permissions(home.path(""), fs::Permissions::from_mode(0o777)).unwrap();
    home.file("log", b"", 0o666);
    let program = home.copy_of_fixture("server");
    let mut command = home.logged(&program, &["--tcp", "http=127.0.0.1:0", "--trial", "100ms"]);
    command.uid(NOBODY).gid(NOBODY).current_dir("/").env("PWD", "/");
    let server = Server::run(home, command);
    fs::set_permissions(server.home.path(""), fs::Permissions::from_mode(0o755)).unwrap();
    let run = check_server(&server, &["--run-version"]);
    finds(&run, "ok", "binary", "its libraries are there");
    fs::set_permissions(&program, fs::Permissions::from_mode(0o700)).unwrap();
    let run = check_server(&server, &[]).exits_with(1);
    finds(&run, "problem", "binary", "uid 65534, which the process runs as, may not enter or execute");
    server.upgrade(&[]).exits_with(1);
}

fn unit(home: &Home, more: &str) -> std::path::PathBuf {
    let program = fixture();
    let text = format!(
        "[Unit]\nDescription=x\n[Service]\nType=notify\nExecStart={} --tcp http=127.0.0.1:0\n\
         ExecReload=handover upgrade --pid $MAINPID\nExecStop=-handover stop --pid $MAINPID\nRestart=always\n\
         OOMPolicy=continue\n{more}",
        program.display()
    );
    home.file("app.service", text.as_bytes(), 0o644)
}

#[test]
fn a_unit_file_is_read() {
    let home = Home::new();
    let file = unit(&home, "");
    let run = check(&["--unit", file.to_str().unwrap()]).exits_with(0).says("nothing stands in the way");
    finds(&run, "ok", "unit", "Type=notify, NotifyAccess=main");
    finds(&run, "ok", "unit", "ExecReload=handover upgrade --pid $MAINPID");
    finds(&run, "ok", "unit", "ExecStop=-handover stop --pid $MAINPID");
    finds(&run, "ok", "unit", "Restart=always");
    // Its program is looked at too.
    finds(&run, "ok", "binary", "libraries are there");
    let file = unit(
        &home,
        "Type=forking\nTimeoutStartSec=10\nWatchdogSec=5\nKillMode=none\nExecReload=\nExecStop=\nRestart=no\n",
    );
    let run = check(&["--unit", file.to_str().unwrap()]).exits_with(1).says("2 problems, 5 warnings\n");
    finds(&run, "problem", "unit", "Type=forking");
    finds(&run, "problem", "unit", "TimeoutStartSec=10s: systemd gives a reload up then, and an upgrade may take 31s");
    finds(&run, "warning", "unit", "WatchdogSec=5s");
    finds(&run, "warning", "unit", "KillMode=none");
    finds(&run, "warning", "unit", "there is no ExecReload=");
    finds(&run, "warning", "unit", "no ExecStop= that waits");
    finds(&run, "warning", "unit", "Restart=no");
    let run = check(&["--unit", "/no/such.service"]).exits_with(1);
    finds(&run, "problem", "unit", "cannot be read");
}

/// The process says how long an upgrade of it may take, what it starts, and what it catches.
#[test]
fn a_unit_is_held_against_the_process() {
    let server = Server::start(&["--tcp", "http=127.0.0.1:0", "--ready-timeout", "300s", "--drain-timeout", "100s"]);
    let with = |more: &str| {
        let file = unit(&server.home, more);
        check_server(&server, &["--unit", file.to_str().unwrap()])
    };
    finds(&with("").exits_with(1), "problem", "unit", "TimeoutStartSec=1m 30s: systemd gives a reload up");
    let run = with("TimeoutStartSec=10min\n").exits_with(0);
    finds(&run, "ok", "unit", &format!("ExecStart={}", fixture().display()));
    finds(&run, "warning", "unit", "TimeoutStopSec=1m 30s: what has not drained by then is killed");
    let run = with("TimeoutStartSec=10min\nExecStart=\nExecStart=/bin/true\n").exits_with(0);
    finds(&run, "warning", "unit", "ExecStart=/bin/true, and an upgrade starts");
    let run = with("TimeoutStartSec=10min\nExecReload=\nExecReload=/bin/kill -WINCH $MAINPID\n").exits_with(1);
    finds(&run, "problem", "unit", "sends SIGWINCH, for which the process has no handler");
    let run = with("TimeoutStartSec=10min\nExecReload=\nExecReload=/bin/kill -HUP $MAINPID\n").exits_with(0);
    finds(&run, "warning", "unit", "a signal answers nobody, so every reload succeeds");
}

/// `kill -USR2` of a process that leaves signals alone would be its end.
#[test]
fn a_signal_without_a_handler_is_told() {
    let home = Home::new();
    let mut other = home.command("sleep").arg("60").spawn().unwrap();
    let file = unit(&home, "ExecReload=\nExecReload=/bin/kill -USR2 $MAINPID\n");
    let pid = other.id().to_string();
    let run = check(&["--pid", &pid, "--unit", file.to_str().unwrap(), "--json"]).exits_with(1);
    let problem = |one: &Value| one["level"] == "problem" && one["about"] == "process";
    assert!(run.json().iter().any(problem), "{run:#?}");
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(other.id().cast_signed()), Signal::SIGKILL).unwrap();
    other.wait().unwrap();
}
