//! What runs out, or is not there: disk, directories, fds, memory, time. Fds of the old process are in `limits.rs`, control
//! groups in `groups.rs`.

use std::collections::BTreeMap;
use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use handover::control::State;
use nix::sys::resource::{Resource, getrlimit};
use serde_json::Value;

use crate::client::ask;
use crate::command::{Run, run};
use crate::home::{HANDOVER, Home, fixture};
use crate::rights::{is_installed_or_skip, is_root_or_skip};
use crate::server::{SOON, Server};
use crate::wait::eventually;

/// A fixture in namespaces of its own, asked by its pid.
struct Confined {
    first: Child,
    home: Home,
}

impl Confined {
    /// `prepare` is shell code, with the directory `$SMALL` to mount something on.
    fn start(unshare: &[&str], prepare: &str, options: &str) -> Self {
        let home = Home::new();
        let small = home.path("small");
        fs::create_dir(&small).unwrap();
        let program = fixture();
        let script = format!("set -e; {prepare}; exec {} {} {options}", program.display(), SOON.join(" "));
        let mut command = home.logged("unshare", &[unshare, &["/bin/sh", "-c", &script]].concat());
        command.env("SMALL", &small).env("HANDOVER_DIR", small.join("control")).env_remove("RUNTIME_DIRECTORY");
        Self { first: command.spawn().unwrap(), home }
    }

    fn handover(&self, arguments: &[&str]) -> Run {
        let mut command = Command::new(HANDOVER);
        command.args(arguments);
        run(command)
    }

    /// What the process says of itself that serves, of this generation.
    #[track_caller]
    fn serving(&self, generation: u64) -> Value {
        eventually(&format!("generation {generation} to serve"), || {
            self.home.processes().into_iter().find_map(|pid| {
                let run = self.handover(&["status", "--json", "--pid", &pid.to_string()]);
                let status = (run.code == Some(0)).then(|| run.last_json())?;
                (status["generation"] == generation && status["state"] == "serving").then_some(status)
            })
        })
    }

    #[track_caller]
    fn upgrade(&self, arguments: &[&str]) -> Run {
        let pid = self.home.processes().into_iter().max().unwrap().to_string();
        self.handover(&[&["upgrade", "--wait", "drained", "--pid", &pid], arguments].concat())
    }

    /// The mounts of the process, from outside.
    fn small(&self) -> PathBuf {
        let inside = self.home.path("small");
        Path::new(&format!("/proc/{}/root", self.first.id())).join(inside.strip_prefix("/").unwrap())
    }
}

impl Drop for Confined {
    fn drop(&mut self) {
        let _ = self.first.kill();
        let _ = self.first.wait();
    }
}

const TINY_DISK: &str = "mount -t tmpfs -o size=64k,nr_inodes=16 none $SMALL";

/// No block is left for the pid file, and then no inode for a control socket: it is said, and served on.
#[test]
fn a_full_disk() {
    if !is_root_or_skip("a full disk, in a mount namespace") {
        return;
    }
    let options = "--tcp http=127.0.0.1:0 --pid-file $SMALL/app.pid";
    let confined = Confined::start(&["-m"], TINY_DISK, options);
    confined.serving(1);
    let fill = confined.small().join("fill");
    fs::write(&fill, vec![0; 1 << 20]).unwrap_err();
    let run = confined.upgrade(&[]).exits_with(1).complains("cannot write the pid file");
    run.complains("No space left on device").complains("serves on");
    let more = |number: i32| confined.small().join(number.to_string());
    let made = (0..1000).take_while(|number| fs::File::create(more(*number)).is_ok()).count();
    assert!((1..16).contains(&made), "{made}");
    let run = confined.upgrade(&[]).exits_with(1).complains("cannot listen on the control socket");
    run.complains("No space left on device").complains("serves on");
    assert_eq!(confined.serving(1)["connections"]["open"], 0);
    fs::remove_file(fill).unwrap();
    (0..1000).map(more).take_while(|file| fs::remove_file(file).is_ok()).for_each(drop);
    confined.upgrade(&[]).exits_with(0);
    confined.serving(2);
}

/// The only place that can be written to is that of the control sockets.
#[test]
fn a_read_only_root() {
    if !is_root_or_skip("a read-only root, in a mount namespace") {
        return;
    }
    let prepare = "mount -t tmpfs none $SMALL; mount -o remount,bind,ro /; ! touch /tmp/handover-it 2>/dev/null";
    let confined = Confined::start(&["-m"], prepare, "--tcp http=127.0.0.1:0");
    confined.serving(1);
    confined.upgrade(&[]).exits_with(0);
    confined.serving(2);
    let pid = confined.home.processes()[0].to_string();
    confined.handover(&["restart", "--pid", &pid]).exits_with(0);
    confined.serving(3);
}

/// Nowhere to put the socket: no server that nobody can reach, but a reason and what to do.
#[test]
fn no_run_directory() {
    if !is_root_or_skip("no /run, in a mount namespace") {
        return;
    }
    for (run_directory, error) in [("-o ro", "Read-only file system"), ("-o nr_inodes=1", "No space left on device")] {
        let home = Home::new();
        let script = format!("mount -t tmpfs {run_directory} none /run; exec \"$@\"");
        let start = |variable: Option<(&str, &Path)>| {
            let mut command = home.command("unshare");
            command.args(["-m", "/bin/sh", "-c", &script, "sh"]).arg(fixture()).args(["--tcp", "http=127.0.0.1:0"]);
            command.env_remove("HANDOVER_DIR").env_remove("RUNTIME_DIRECTORY").envs(variable);
            command
        };
        run(start(None))
            .exits_with(1)
            .complains(&format!("cannot use the control directory /run/handover: {error}"))
            .complains("set HANDOVER_DIR to a directory of this user, or RuntimeDirectory= in the unit");
        let mut served = start(Some(("RUNTIME_DIRECTORY", &home.path(""))));
        let mut served = served.stderr(fs::File::create(home.path("log")).unwrap()).spawn().unwrap();
        let pid = served.id().to_string();
        eventually("a server all the same", || {
            let mut command = Command::new(HANDOVER);
            command.args(["status", "--pid", &pid]);
            (run(command).code == Some(0)).then_some(())
        });
        served.kill().unwrap();
        served.wait().unwrap();
    }
}

/// The application's start-up finds no fd, with everything of the old process already in its hands.
#[test]
fn an_old_and_a_new_process_with_64_fds() {
    let home = Home::new();
    let script = format!("ulimit -n 64; exec {} \"$@\"", fixture().display());
    let listeners: Vec<String> = (0..40).map(|number| format!("l{number}=127.0.0.1:0")).collect();
    let listeners = listeners.iter().flat_map(|one| ["--tcp", one]);
    let arguments: Vec<&str> = ["-c", &script, "sh"].into_iter().chain(SOON).chain(listeners).collect();
    let command = home.logged("/bin/sh", &arguments);
    let server = Server::run(home, command);
    for generation in 2..=4 {
        server.upgrade(&["--wait", "drained"]).exits_with(0);
        assert_eq!(server.generation(), generation);
        assert_eq!(server.serving().listeners.len(), 40);
    }
    // The same build with more of its own than there is room for.
    let more: Vec<String> = (0..30).map(|number| format!("m{number}=127.0.0.1:0")).collect();
    let more: Vec<&str> = more.iter().flat_map(|one| ["--tcp", one.as_str()]).collect();
    let old = server.pid();
    server
        .upgrade(&[&["--"], &more[..]].concat())
        .exits_with(1)
        .complains("Too many open files")
        .complains("serves on");
    server.assert_only(old);
}

#[test]
fn two_thousand_listeners() {
    const LISTENERS: usize = 2000;
    if getrlimit(Resource::RLIMIT_NOFILE).unwrap().1 < 3 * LISTENERS as u64 {
        eprintln!("left out, because so many fds are not allowed here: {LISTENERS} listeners");
        return;
    }
    let home = Home::new();
    let script = format!("ulimit -n {}; exec {} \"$@\"", 3 * LISTENERS, fixture().display());
    let listeners: Vec<String> = (0..LISTENERS).map(|number| format!("l{number}=127.0.0.1:0")).collect();
    let listeners = listeners.iter().flat_map(|one| ["--tcp", one]);
    let arguments: Vec<&str> = ["-c", &script, "sh"].into_iter().chain(SOON).chain(listeners).collect();
    let command = home.logged("/bin/sh", &arguments);
    let server = Server::run(home, command);
    let sockets = || -> BTreeMap<String, (u64, String)> {
        let listeners = server.serving().listeners;
        listeners.into_iter().map(|one| (one.name, (one.cookie, one.address))).collect()
    };
    let before = sockets();
    assert_eq!(before.len(), LISTENERS);
    for generation in 2..=3 {
        server.upgrade(&["--wait", "drained"]).exits_with(0);
        assert_eq!(sockets(), before);
        for (_, address) in before.values().step_by(97) {
            let address: SocketAddr = address.parse().unwrap();
            assert_eq!(ask(address, "/").answerer().generation, generation);
        }
    }
    server.assert_only(server.pid());
}

/// A library that shifts the time of day by what a file says, for the program that it is loaded into.
const SHIM: &str = r#"
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

int clock_gettime(clockid_t clock, struct timespec *time) {
    int result = syscall(SYS_clock_gettime, clock, time);
    if (result == 0 && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) {
        char shift[32] = "0";
        int file = open(getenv("SHIFT"), O_RDONLY | O_CLOEXEC);
        if (file >= 0) {
            (void)!read(file, shift, sizeof shift - 1);
            close(file);
        }
        time->tv_sec += atol(shift);
    }
    return result;
}
"#;

const TEN_YEARS_S: i64 = 315_360_000;

/// The time of day jumps in the middle of everything, back and forth: whatever is waited for takes as long as it should.
#[test]
fn the_time_of_day_jumps() {
    if !is_installed_or_skip("cc", "jumps of the time of day") {
        return;
    }
    let home = Home::new();
    let (source, shim) = (home.file("shim.c", SHIM.as_bytes(), 0o644), home.path("shim.so"));
    assert!(Command::new("cc").args(["-shared", "-fPIC", "-o"]).args([&shim, &source]).status().unwrap().success());
    let file = home.file("shift", b"0", 0o644);
    // Whole at every instant.
    let jump_to = |seconds: i64| {
        let next = file.with_extension("next");
        fs::write(&next, seconds.to_string()).unwrap();
        fs::rename(&next, &file).unwrap();
    };
    let mut command = home.fixture(&["--tcp", "http=127.0.0.1:0", "--linger", "200ms"]);
    command.env("LD_PRELOAD", &shim).env("SHIFT", &file);
    let server = Server::run(home, command);
    let (old, begun) = (server.first_pid(), unix_ms());
    let shown = |pid: i32| i64::try_from(server.status(pid).since_unix_ms).unwrap() - begun;
    assert!(shown(old).abs() < 60_000, "{}", shown(old));

    let slow = ask(server.address(), "/slow/60");
    eventually("a request in flight", || (server.status(old).connections.open == 1).then_some(()));
    let hold = server.home.fifo("hold");
    let fault = hold.fault("hold-before-ready");
    let times = ["--ready-timeout", "20s", "--trial", "700ms", "--drain-timeout", "1500ms", "--wait", "drained"];
    let mut upgrade = server.begin_upgrade(&[&["--json", "--env", &fault], &times[..]].concat());
    let new = upgrade.new_pid();
    let held = hold.reached();
    jump_to(TEN_YEARS_S);
    // It answers, and has not lost patience.
    assert_eq!(server.status(old).state, State::Upgrading);
    held.let_go();
    upgrade.wait_for_line("committed");
    let committed = Instant::now();
    jump_to(-TEN_YEARS_S);
    upgrade.wait_for_line("healthy");
    let trial = committed.elapsed();
    assert!((Duration::from_millis(600)..Duration::from_secs(5)).contains(&trial), "{trial:?}");
    upgrade.wait_for_line("draining");
    let draining = Instant::now();
    jump_to(TEN_YEARS_S);
    upgrade.finish().exits_with(5);
    let drain = draining.elapsed();
    assert!((Duration::from_millis(1400)..Duration::from_secs(6)).contains(&drain), "{drain:?}");
    drop(slow);
    server.wait_for_end(old);

    // Which all goes to show nothing unless they have seen it.
    jump_to(-TEN_YEARS_S);
    server.upgrade(&["--env", "FIXTURE_FAULT=", "--trial", "100ms"]).exits_with(0);
    let (newest, jumped) = (server.pid(), -TEN_YEARS_S * 1000);
    assert!(newest != new && (shown(newest) - jumped).abs() < 120_000, "{}", shown(newest));
}

fn unix_ms() -> i64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
    i64::try_from(now.as_millis()).unwrap()
}

/// The clock that is used begins elsewhere there.
#[test]
fn in_a_time_namespace() {
    if !is_root_or_skip("a time namespace") {
        return;
    }
    let confined = Confined::start(
        &["-T", "-m", "--monotonic", "100000000"],
        "mount -t tmpfs none $SMALL",
        "--tcp http=127.0.0.1:0",
    );
    confined.serving(1);
    confined.upgrade(&[]).exits_with(0);
    let pid = confined.serving(2)["pid"].to_string();
    let run = confined.handover(&["restart", "--json", "--pid", &pid]).exits_with(0);
    let took = run.last_json()["at_ms"].as_f64().unwrap();
    assert!((0.0..20_000.0).contains(&took), "{took}");
    confined.serving(3);
}
