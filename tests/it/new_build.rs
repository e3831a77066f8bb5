//! The new build is broken: the old one serves on, nothing is lost or left, and the operator is told why.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use crate::command::Run;
use crate::home::{Home, fixture};
use crate::server::{Server, children_of};
use crate::wait::{LONG, eventually};

/// Asks for an upgrade that cannot work, under load; then for one that can.
#[track_caller]
fn fails(server: &Server, arguments: &[&str]) -> Run {
    let pid = server.pid();
    let _ = server.get("/");
    let before = server.settled_holdings(pid);
    let load = server.load().start();
    load.wait_for_more(20, LONG).unwrap();
    let run = server.upgrade(arguments).exits_with(1).complains(&format!("process {pid} (generation 1) serves on"));
    load.wait_for_more(20, LONG).unwrap();
    let tally = load.stop();
    tally.assert_lossless();
    assert_eq!(tally.generations().len(), 1, "{tally}");
    assert_eq!(server.answerer().generation, 1);
    server.assert_holds(pid, &before);
    let status = server.status(pid);
    let last = status.last_upgrade.unwrap();
    assert!(run.stderr.contains(&last.message), "{last:?} is not in {run:?}");
    server.upgrade(&[]).exits_with(0).says("upgraded to generation 2");
    assert_eq!(server.answerer().generation, 2);
    run
}

#[track_caller]
fn fault(name: &str) -> Run {
    fault_with(name, &[])
}

#[track_caller]
fn fault_with(name: &str, arguments: &[&str]) -> Run {
    let fault = format!("FIXTURE_FAULT={name}");
    fails(&Server::http(), &[&["--env", &fault], arguments].concat())
}

#[track_caller]
fn program(path: &std::path::Path, server: &Server) -> Run {
    fails(server, &["--exe", path.to_str().unwrap()])
}

/// As the kernel makes whoever reaps it wait, where others read /proc at that moment.
#[test]
fn one_that_takes_long_to_be_reaped() {
    let home = Home::new();
    let held = home.path("held");
    let mut command = home.logged(fixture().to_str().unwrap(), &["--tcp", "http=127.0.0.1:0"]);
    command.env("HANDOVER_FAULT", format!("reaps,hold,{}", held.display()));
    let server = Server::run(home, command);
    let bad = server.home.script("bad", "#!/bin/sh\nexit 3\n");
    let upgrade = |exe: &Path| server.upgrade(&["--exe", exe.to_str().unwrap()]);
    upgrade(&bad).exits_with(1).complains("exited with status 3");
    eventually("the thread that reaps it", || held.exists().then_some(()));
    upgrade(&bad).exits_with(1).complains("exited with status 3");
    eventually("one that is not reaped", || (children_of(server.pid()).len() == 1).then_some(()));
    upgrade(&fixture()).exits_with(0);
    assert_eq!(server.answerer().generation, 2);
}

#[test]
fn one_that_a_realtime_signal_kills() {
    let server = Server::http();
    let bad = server.home.script("bad", "#!/bin/sh\nkill -40 $$\n");
    program(&bad, &server).complains("was killed by signal 40 before it was ready");
}

#[test]
fn missing() {
    let server = Server::http();
    program(&server.home.path("nothing"), &server).complains("No such file").complains("put the new build there");
}

#[test]
fn a_directory() {
    let server = Server::http();
    program(&server.home.path(""), &server).complains("it is a directory");
}

#[test]
fn not_executable() {
    let server = Server::http();
    let file = server.home.file("plain", b"#!/bin/sh\n", 0o644);
    program(&file, &server).complains("chmod +x");
}

#[test]
fn writable_to_all() {
    let server = Server::http();
    let file = server.home.copy_of_fixture("open");
    fs::set_permissions(&file, fs::Permissions::from_mode(0o757)).unwrap();
    program(&file, &server).complains("anybody may write to it (mode 0757)");
}

#[test]
fn in_a_directory_writable_to_all() {
    let server = Server::http();
    fs::create_dir(server.home.path("open")).unwrap();
    let file = server.home.copy_of_fixture("open/server");
    fs::set_permissions(server.home.path("open"), fs::Permissions::from_mode(0o777)).unwrap();
    program(&file, &server).complains("/open is writable to all");
}

#[test]
fn of_another_architecture() {
    let server = Server::http();
    let mut elf = fs::read(crate::home::fixture()).unwrap();
    let other: u16 = if cfg!(target_arch = "aarch64") { 62 } else { 183 };
    elf[18..20].copy_from_slice(&other.to_le_bytes());
    server.home.file("foreign.bytes", &elf[..4096], 0o755);
    let file = server.home.copy(&server.home.path("foreign.bytes"), "foreign");
    program(&file, &server).complains("it is built for").complains(std::env::consts::ARCH);
}

#[test]
fn a_damaged_program() {
    let server = Server::http();
    let file = server.home.script("text", "not a program");
    program(&file, &server).complains("neither an ELF program nor a script");
}

#[test]
fn a_script_without_its_interpreter() {
    let server = Server::http();
    let file = server.home.script("script", "#!/no/such/shell\n");
    program(&file, &server).complains("interpreter /no/such/shell, which does not exist");
}

#[test]
fn in_a_directory_that_is_gone() {
    let server = Server::http();
    fails(&server, &["--cwd", server.home.path("gone").to_str().unwrap()]).complains("working directory");
}

#[test]
fn exits_0() {
    fault("exit-0")
        .complains("exited with status 0 before it was ready")
        .complains("what to do: let it stay in the foreground");
}

#[test]
fn exits_1() {
    fault("exit-1")
        .complains("exited with status 1 before it was ready")
        .complains("the last lines that the new build wrote to stderr:\n")
        .complains("  | cannot open the database\n");
}

#[test]
fn is_killed() {
    fault("killed")
        .complains("was killed by SIGKILL before it was ready")
        .complains("what to do: out of memory? `dmesg` tells");
}

#[test]
fn aborts() {
    fault("abort").complains("was killed by SIGABRT");
}

#[test]
fn exits_after_it_has_adopted() {
    fault("exit-after-adopted").complains("exited with status 7 before it was ready");
}

#[test]
fn is_killed_after_it_has_adopted() {
    fault("killed-after-adopted").complains("was killed by SIGKILL before it was ready");
}

#[test]
fn panics() {
    fault("panic").complains("exited with status 101").complains("the configuration is not what was thought");
}

#[test]
fn hangs_before_it_has_the_offer() {
    fault_with("hang", &["--ready-timeout", "300ms"])
        .complains("was not ready within 300ms, and has not even called `Handover::start`")
        .complains("what to do: does it use the library?");
}

#[test]
fn hangs_after_it_has_adopted() {
    fault_with("hang-after-adopted", &["--ready-timeout", "300ms"])
        .complains("what to do: --ready-timeout gives it longer")
        .complains("was not ready within 300ms");
}

#[test]
fn hangs_after_it_asked_for_more_time() {
    fault_with("hangs-after-still-starting", &["--ready-timeout", "300ms"])
        .complains("was not ready within 300ms (it last said: warming the cache)");
}

/// However fast one reason follows another, whoever waits sees the last.
#[test]
fn why_it_still_starts_is_shown() {
    let server = Server::http();
    let mut upgrade = server.begin_upgrade(&["--env", "FIXTURE_FAULT=hangs-after-still-starting", "--json"]);
    let new = upgrade.new_pid();
    upgrade.wait_for_line("opening the database");
    upgrade.wait_for_line("warming the cache");
    server.signal(new, nix::sys::signal::Signal::SIGKILL);
    upgrade.finish().exits_with(1);
}

#[test]
fn writes_a_megabyte_to_stderr_and_dies() {
    let run = fault("stderr-megabyte").complains("exited with status 3 before it was ready");
    // The last lines only, and none that can move a cursor.
    assert!(run.stderr.lines().count() < 30 && run.stderr.len() < 30_000, "{}", run.stderr.len());
    assert!(run.stderr.ends_with("  | \u{fffd}[2Jthis is the last line\n"), "{:?}", run.stderr.lines().last());
}

#[test]
fn gives_up() {
    fault("give-up").complains("gave up: the database is of a later version");
}

#[test]
fn wants_a_listener_whose_address_is_taken() {
    let server = Server::http();
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let other = format!("other={}", taken.local_addr().unwrap());
    fails(&server, &["--", "--trial", "200ms", "--tcp", "http=127.0.0.1:0", "--tcp", &other])
        .complains("exited with status 1")
        .complains("cannot bind listener `other`")
        .complains("ss -lnp");
}

#[test]
fn has_no_use_for_a_listener_and_says_that_this_is_an_error() {
    let server = Server::start(&["--tcp", "http=127.0.0.1:0", "--tcp", "admin=127.0.0.1:0"]);
    fails(&server, &["--", "--trial", "200ms", "--tcp", "http=127.0.0.1:0", "--unclaimed", "fail"])
        .complains("it has no use for the listeners admin");
}

#[test]
fn cannot_hold_so_many_fds() {
    let server = Server::http();
    let script = server.home.script("few", "#!/bin/sh\nulimit -n 5\nexec \"$@\"\n");
    let fixture = crate::home::fixture();
    let arguments = ["--exe", script.to_str().unwrap(), "--", fixture.to_str().unwrap(), "--tcp", "http=127.0.0.1:0"];
    let run = fails(&server, &arguments);
    assert!(run.stderr.contains("ulimit -n") || run.stderr.contains("Too many open files"), "{run:?}");
}

#[test]
fn can_take_as_long_as_it_says_that_it_needs() {
    let server = Server::http();
    let load = server.load().start();
    let run = server.upgrade_with_fault("still-starting=8", &["--ready-timeout", "1500ms"]).exits_with(0);
    assert!(run.stdout.contains("step 1") && run.stdout.contains("step 8"), "{run:?}");
    load.wait_for_generation(2, LONG).unwrap();
    load.stop().assert_lossless();
}
