//! `handover restart`: the old process ends before the new one runs, and clients wait instead of being refused.

use std::fs;
use std::io::Read;
use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::process::Stdio;

use handover::control::State;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use crate::client::{Asked, ask, ask_unix};
use crate::command::Running;
use crate::home::{Home, fixture};
use crate::oracle::Outcome;
use crate::server::{Server, has_ended};
use crate::wait::{LONG, eventually, eventually_equal};

/// A server of which two at once are one too many: it locks a file.
fn locked(arguments: &[&str]) -> Server {
    let home = Home::new();
    let lock = home.path("lock");
    Server::start_in(home, &[&["--tcp", "http=127.0.0.1:0", "--lock", lock.to_str().unwrap()], arguments].concat())
}

/// Requests that are answered after a minute, and that the process has accepted.
fn in_flight(server: &Server, count: usize) -> Vec<Asked<TcpStream>> {
    let before = server.serving().connections.open;
    let asked = (0..count).map(|_| ask(server.address(), "/slow/60")).collect();
    eventually("requests in flight", || (server.serving().connections.open == before + count).then_some(()));
    asked
}

fn stages(lines: &[Value]) -> Vec<&str> {
    lines.iter().filter(|line| line["event"] == "stage").map(|line| line["stage"].as_str().unwrap()).collect()
}

/// Nothing is left of the service.
#[track_caller]
fn nothing_is_left(server: &Server) {
    eventually_equal("the processes", &vec![], || server.home.processes());
    assert_eq!(server.home.sockets(), Vec::<String>::new());
}

/// A request that fails is one of those that were cut and told, and none is refused.
#[test]
fn under_load_nobody_is_refused_and_two_never_run_at_once() {
    let server = locked(&[]);
    let cookie = server.serving().listeners[0].cookie;
    let load = server.load().new_connections(6).kept(6).monotonic().start();
    let mut cut = 0;
    for generation in 2..=6 {
        load.wait_for_more(50, LONG).unwrap();
        let _slow = in_flight(&server, 1);
        let result = server.restart(&["--json"]).exits_with(0).last_json();
        assert_eq!((&result["result"], &result["generation"]), (&"restarted".into(), &generation.into()));
        cut += result["cut"].as_u64().unwrap_or(0);
        load.wait_for_generation(generation, LONG).unwrap();
    }
    let tally = load.stop();
    assert_eq!(tally.count(Outcome::Refused), 0, "{tally}");
    assert!(tally.failed() <= cut && tally.backwards() == 0, "{cut} cut\n{tally}");
    assert!(cut >= 5, "a slow request was always open\n{tally}");
    assert_eq!(server.serving().listeners[0].cookie, cookie);
    server.assert_only(server.pid());
}

/// That the lock of these tests tells one process from two.
#[test]
fn such_a_server_cannot_be_upgraded() {
    let server = locked(&[]);
    server.upgrade(&[]).exits_with(1).complains("  | fixture: the lock: EAGAIN");
    assert_eq!(server.answerer().generation, 1);
}

#[test]
fn with_time_to_drain_nothing_is_lost() {
    let server = locked(&[]);
    let load = server.load().new_connections(6).kept(6).slow(2, 0.5).monotonic().start();
    for generation in 2..=4 {
        load.wait_for_more(50, LONG).unwrap();
        server.restart(&["--drain", "30s"]).exits_with(0).says(&format!("restarted as generation {generation} (pid "));
        load.wait_for_generation(generation, LONG).unwrap();
    }
    load.stop().assert_lossless();
    server.assert_only(server.pid());
}

#[test]
fn what_is_in_flight_is_cut_and_counted() {
    let server = locked(&[]);
    let old = server.pid();
    let slow = in_flight(&server, 3);
    let run = server.restart(&[]).exits_with(0);
    let new = server.pid();
    assert_eq!(
        run.stdout.lines().last(),
        Some(format!("restarted as generation 2 (pid {new}); 3 connections were closed").as_str())
    );
    assert!(run.stderr.is_empty() && has_ended(old), "{run:?}");
    for one in slow {
        assert_eq!(one.try_answer().unwrap_or_default(), "");
    }
    server.assert_only(new);
}

/// As for an upgrade: what was to finish and did not is worth an exit code.
#[test]
fn what_does_not_finish_in_time_is_cut_and_told() {
    let server = locked(&[]);
    let slow = in_flight(&server, 1);
    server.restart(&["--drain", "100ms"]).exits_with(5).complains("; 1 connection was closed at the drain deadline");
    assert_eq!(server.answerer().generation, 2);
    drop(slow);
}

#[test]
fn the_stages_in_their_order() {
    let server = locked(&[]);
    let run = server.restart(&[]).exits_with(0);
    let words: Vec<&str> = run.stdout.lines().map(|line| line.split_whitespace().next().unwrap()).collect();
    assert_eq!(words, ["restarting", "spawned", "adopted", "draining", "drained", "gone", "ready", "restarted"]);

    let slow = in_flight(&server, 1);
    let lines = server.restart(&["--json"]).exits_with(0).json();
    assert_eq!(stages(&lines), ["spawned", "adopted", "draining", "drained", "gone", "ready"]);
    let times: Vec<f64> = lines.iter().filter_map(|line| line["at_ms"].as_f64()).collect();
    assert!(times.is_sorted(), "{times:?}");
    let stage = |name: &str| lines.iter().find(|line| line["stage"] == name).unwrap();
    assert_eq!((&stage("drained")["cut"], &stage("ready")["kept"]), (&1.into(), &serde_json::json!(["http"])));
    let result = lines.last().unwrap();
    assert_eq!((&result["cut"], &result["exit_code"], &result["generation"]), (&1.into(), &0.into(), &3.into()));
    let last = server.serving().last_upgrade.unwrap();
    assert_eq!(last.message, format!("restarted as generation 3 (pid {})", server.pid()));
    drop(slow);
}

#[test]
fn a_new_build_that_does_not_take_the_listeners_changes_nothing() {
    let server = locked(&[]);
    let old = server.pid();
    let missing = server.home.path("missing");
    let _ = server.get("/");
    server.restart(&["--env", "FIXTURE_FAULT=exit-1"]).exits_with(1);
    let before = server.settled_holdings(old);
    let load = server.load().start();
    let serves_on = format!("process {old} (generation 1) serves on");
    let fails = |arguments: &[&str], message: &str| {
        server.restart(arguments).exits_with(1).complains("not restarted: ").complains(message).complains(&serves_on);
    };
    fails(&["--exe", missing.to_str().unwrap()], "No such file or directory");
    fails(&["--exe", "/etc/passwd"], "is it executable?");
    fails(&["--env", "FIXTURE_FAULT=exit-1"], "exited with status 1 before it was ready");
    fails(&["--env", "FIXTURE_FAULT=exit-1"], "  | cannot open the database");
    fails(&["--env", "FIXTURE_FAULT=killed"], "was killed by SIGKILL");
    fails(&["--env", "FIXTURE_FAULT=hang", "--ready-timeout", "300ms"], "was not ready within 300ms");
    fails(&["--env", "FIXTURE_FAULT=garbage"], "sent bytes that are no frame");
    // It answers as version 1 of the library did before there were restarts.
    fails(&["--env", "FIXTURE_FAULT=too-much"], "knows nothing of restarts");
    load.stop().assert_lossless();
    server.assert_holds(old, &before);
    server.restart(&[]).exits_with(0);
    assert_eq!(server.answerer().generation, 2);
}

#[test]
fn a_new_build_that_fails_when_the_old_one_is_gone_is_an_outage_and_told() {
    for (fault, message) in [
        ("exit-after-adopted", "before it was ready"),
        ("killed-after-adopted", "before it was ready"),
        ("give-up", "gave up: the database is of a later version"),
    ] {
        let server = locked(&[]);
        let old = server.pid();
        let run = server.restart(&["--json", "--env", &format!("FIXTURE_FAULT={fault}")]).exits_with(8);
        let said = run.last_json()["message"].as_str().unwrap().to_owned();
        assert!(said.contains(&format!("nothing serves: process {old} has ended")) && said.contains(message), "{said}");
        assert_eq!(stages(&run.json()), ["spawned", "adopted", "draining", "drained", "gone"]);
        eventually_equal("the processes", &vec![], || server.home.processes());
    }
}

/// Late is not lost: the listeners are held, and clients wait.
#[test]
fn a_new_build_that_takes_long_is_told_of_and_serves_later() {
    let server = locked(&[]);
    let address = server.address();
    let hold = server.home.fifo("hold");
    let restart = server.begin_restart(&["--ready-timeout", "300ms", "--env", &hold.fault("hold-before-ready")]);
    let held = hold.reached();
    let clients: Vec<_> = (0..5).map(|_| ask(address, "/")).collect();
    restart.finish().exits_with(8).complains("is not ready within 300ms; it holds the listeners, and clients wait");
    held.let_go();
    for client in clients {
        assert_eq!(client.answerer().generation, 2);
    }
}

#[test]
fn a_new_build_that_says_that_it_is_starting_has_its_time() {
    let server = locked(&[]);
    let arguments = ["--json", "--ready-timeout", "1s", "--env", "FIXTURE_FAULT=still-starting=6"];
    let lines = server.restart(&arguments).exits_with(0).json();
    let starting: Vec<&Value> = lines.iter().filter(|line| line["stage"] == "starting").collect();
    assert_eq!((starting.len(), &starting[5]["reason"]), (6, &"step 6".into()));
}

/// It is looked at while there is still somebody who serves.
#[test]
fn a_new_build_whose_control_directory_is_wrong_changes_nothing() {
    let server = locked(&[]);
    let wrong = server.home.path("open-to-all");
    fs::create_dir(&wrong).unwrap();
    fs::set_permissions(&wrong, fs::Permissions::from_mode(0o777)).unwrap();
    let directory = format!("HANDOVER_DIR={}", wrong.display());
    let run = server.restart(&["--env", &directory]).exits_with(1);
    run.complains("others may write to it (mode 0777)").complains("serves on");
    assert_eq!(server.generation(), 1);
    server.restart(&[]).exits_with(0);
}

/// It answers whoever has asked the old one, and nobody else.
#[test]
fn a_new_build_without_a_control_socket_tells_how_it_ended() {
    let server = locked(&[]);
    let (address, old) = (server.address(), server.pid());
    let script = format!("#!/bin/sh\nexec {} \"$@\" --control none\n", fixture().display());
    let build = server.home.script("without", &script);
    let run = server.restart(&["--json", "--exe", build.to_str().unwrap()]).exits_with(0);
    let result = run.last_json();
    assert_eq!((&result["result"], &result["generation"]), (&"restarted".into(), &2.into()));
    assert_eq!(ask(address, "/").answerer().generation, 2);
    server.wait_for_end(old);
    assert_eq!(server.home.sockets(), Vec::<String>::new());
}

/// Its threads hang: the operator's case at three in the morning.
#[test]
fn an_old_process_that_does_not_exit_is_killed() {
    let home = Home::new();
    let lock = home.path("lock");
    let mut command = home.fixture(&["--tcp", "http=127.0.0.1:0", "--lock", lock.to_str().unwrap()]);
    command.env("FIXTURE_FAULT", "never-exits");
    let server = Server::run(home, command);
    let (address, old) = (server.address(), server.pid());
    let mut restart = server.begin_restart(&["--kill-after", "1s"]);
    restart.wait_for_line("drained");
    assert!(!has_ended(old));
    let clients: Vec<_> = (0..5).map(|_| ask(address, "/")).collect();
    restart.wait_for_line(&format!("process {old} was killed: it did not exit"));
    restart.finish().exits_with(0).says(&format!("; process {old} did not exit and was killed"));
    for client in clients {
        assert_eq!(client.answerer().generation, 2);
    }
    server.assert_only(server.pid());
}

#[test]
fn an_old_process_that_is_stopped_is_continued() {
    let server = locked(&[]);
    let (address, old) = (server.address(), server.pid());
    server.freeze(old);
    let clients: Vec<_> = (0..5).map(|_| ask(address, "/")).collect();
    let run = server.handover(&["restart", "--pid", &old.to_string()]).exits_with(0);
    run.complains(&format!("process {old} was stopped: it is continued"));
    // Those that it had accepted in between are cut.
    let answered = clients.into_iter().filter_map(|client| client.try_answer().ok());
    assert!(answered.into_iter().all(|text| text.is_empty() || text.contains(" 200 ")));
    assert_eq!(server.answerer().generation, 2);
    server.assert_only(server.pid());
}

/// It has handed its listeners over, and moves no more.
#[test]
fn an_old_process_that_is_stopped_while_it_drains_is_killed() {
    let server = locked(&[]);
    let old = server.pid();
    let _slow = in_flight(&server, 1);
    let mut restart = server.begin_restart(&["--drain", "500ms", "--kill-after", "500ms"]);
    restart.wait_for_line("draining");
    server.freeze(old);
    restart.finish().exits_with(0).says(&format!("; process {old} did not exit and was killed"));
    assert_eq!(server.answerer().generation, 2);
    server.assert_only(server.pid());
}

#[test]
fn meanwhile_others_are_told_that_it_is_busy() {
    let server = locked(&[]);
    let old = server.pid().to_string();
    let _slow = in_flight(&server, 1);
    let hold = server.home.fifo("hold");
    let arguments = ["--drain", "60s", "--json", "--env", &hold.fault("hold-before-start")];
    let mut restart = server.begin_restart(&arguments);
    let new = restart.new_pid();
    let held = hold.reached();
    for verb in ["restart", "upgrade"] {
        server.handover(&[verb, "--pid", &old]).exits_with(3).complains("another upgrade is under way");
        server.handover(&[verb, "--json", "--pid", &old]).exits_with(3).tells_only_the_result();
    }
    held.let_go();
    restart.wait_for_line("draining");
    let message = format!("a restart is under way: process {new} takes over when process {old} has ended");
    for verb in ["restart", "upgrade"] {
        server.handover(&[verb, "--pid", &old]).exits_with(3).complains(&message);
    }
    // A stop that names a time shortens it.
    server.handover(&["stop", "--pid", &old, "--drain-timeout", "1ms"]).exits_with(5);
    restart.finish().exits_with(5);
    assert_eq!(server.answerer().generation, 2);
}

#[test]
fn while_an_older_generation_drains_it_is_refused() {
    let server = Server::http();
    let old = server.pid();
    let _slow = in_flight(&server, 1);
    server.upgrade(&[]).exits_with(0);
    let advice = format!("`handover stop --pid {old} --drain-timeout 1s`");
    server.restart(&[]).exits_with(3).complains("older generations still drain").complains(&advice);
    server.handover(&["stop", "--pid", &old.to_string(), "--drain-timeout", "1ms"]).exits_with(5);
    server.wait_for_end(old);
    server.restart(&[]).exits_with(0);
    assert_eq!(server.answerer().generation, 3);
}

#[test]
fn told_to_stop_before_the_listeners_are_taken() {
    let server = locked(&[]);
    let old = server.pid();
    let hold = server.home.fifo("hold");
    let restart = server.begin_restart(&["--env", &hold.fault("hold-before-start")]);
    let _held = hold.reached();
    server.signal(old, Signal::SIGTERM);
    restart.finish().exits_with(8).complains(&format!("told to stop; process {old} is draining"));
    nothing_is_left(&server);
}

/// A restart whose old process drains, because it has a request in flight.
struct Draining {
    server: Server,
    address: SocketAddr,
    old: i32,
    new: i32,
    restart: Running,
    slow: Vec<Asked<TcpStream>>,
}

impl Draining {
    fn start(arguments: &[&str]) -> Self {
        let server = locked(arguments);
        let (address, old) = (server.address(), server.pid());
        let slow = in_flight(&server, 1);
        let mut restart = server.begin_restart(&["--json", "--drain", "60s"]);
        let new = restart.new_pid();
        restart.wait_for_line("draining");
        Self { server, address, old, new, restart, slow }
    }

    /// The command says so at once; the old process finishes what it has, and cleans up as the last one.
    #[track_caller]
    fn loses_the_new_one(self, how: &str) {
        let run = self.restart.finish().exits_with(8);
        let message = run.last_json()["message"].as_str().unwrap().to_owned();
        let wanted = format!("{how} before it was ready, and process {} drains: nothing serves", self.old);
        assert!(message.contains(&wanted), "{message}");
        assert!(!has_ended(self.old));
        self.server.handover(&["stop", "--pid", &self.old.to_string(), "--drain-timeout", "1ms"]).exits_with(5);
        nothing_is_left(&self.server);
    }
}

#[test]
fn the_new_one_killed_while_the_old_one_drains() {
    let draining = Draining::start(&[]);
    draining.server.signal(draining.new, Signal::SIGKILL);
    draining.loses_the_new_one("was killed by SIGKILL");
}

/// `systemctl stop` tells every process of the unit.
#[test]
fn the_new_one_told_to_stop_while_the_old_one_drains() {
    let draining = Draining::start(&[]);
    draining.server.signal(draining.new, Signal::SIGTERM);
    draining.loses_the_new_one("exited with status 1");
}

#[test]
fn the_old_one_killed_while_it_drains() {
    let Draining { server, address, old, new, restart, slow } = Draining::start(&[]);
    let clients: Vec<_> = (0..5).map(|_| ask(address, "/")).collect();
    server.signal(old, Signal::SIGKILL);
    let result = restart.finish().exits_with(0).last_json();
    assert_eq!((&result["pid"], &result["result"]), (&new.into(), &"restarted".into()));
    for client in clients {
        assert_eq!(client.answerer().generation, 2);
    }
    assert_eq!(slow.into_iter().next().unwrap().try_answer().unwrap_or_default(), "");
    server.assert_only(new);
}

#[test]
fn the_old_one_killed_before_the_listeners_are_taken() {
    let server = locked(&[]);
    let old = server.pid();
    let hold = server.home.fifo("hold");
    let mut restart = server.begin_restart(&["--json", "--env", &hold.fault("hold-before-start")]);
    let new = restart.new_pid();
    let held = hold.reached();
    // Its offer is in the channel.
    assert_eq!(server.status(old).state, State::Upgrading);
    server.signal(old, Signal::SIGKILL);
    held.let_go();
    restart.finish().exits_with(0);
    assert_eq!(server.answerer().pid.cast_signed(), new);
    server.assert_only(new);
}

#[test]
fn every_kind_of_listener_keeps_its_socket_and_the_pid_file_follows() {
    let home = Home::new();
    let (socket, pid_file) = (home.path("http.sock"), home.path("pid"));
    let arguments = [
        "--tcp",
        "http=127.0.0.1:0",
        "--unix",
        &format!("unix={}", socket.display()),
        "--udp",
        "dns=127.0.0.1:0",
        "--pid-file",
        pid_file.to_str().unwrap(),
        "--state",
        "of the old one",
    ];
    let server = Server::start_in(home, &arguments);
    let sockets = |server: &Server| -> Vec<(String, String, u64)> {
        let listeners = server.serving().listeners.into_iter();
        listeners.map(|one| (one.name, one.address, one.cookie)).collect()
    };
    let (before, dns) = (sockets(&server), server.address_of("dns"));
    let hold = server.home.fifo("hold");
    let restart = server.begin_restart(&["--env", &hold.fault("hold-before-ready")]);
    let held = hold.reached();
    // Nobody serves now; each of these waits.
    let unix = ask_unix(&socket, "/");
    let datagram = UdpSocket::bind("127.0.0.1:0").unwrap();
    datagram.set_read_timeout(Some(LONG)).unwrap();
    datagram.send_to(b"7", &dns).unwrap();
    held.let_go();
    restart.finish().exits_with(0);
    assert_eq!(unix.answerer().generation, 2);
    let mut echo = [0; 64];
    let length = datagram.recv(&mut echo).unwrap();
    assert!(echo[..length].starts_with(b"gen=2 "), "{}", echo.escape_ascii());
    assert_eq!(sockets(&server), before);
    assert_eq!(fs::read_to_string(&pid_file).unwrap(), format!("{}\n", server.pid()));
    assert_eq!(server.get("/state"), "none", "a restart is a fresh start");
    server.handover(&["stop", "--pid-file", pid_file.to_str().unwrap()]).exits_with(0);
    assert!(!socket.exists() && !pid_file.exists());
}

/// Nobody serves on the old socket any more, so it is not in the way.
#[test]
fn an_address_may_overlap_the_one_before() {
    let server = Server::start(&["--tcp", "http=127.0.0.1:0"]);
    let port = server.address().port();
    let wide = format!("http=0.0.0.0:{port}");
    server.upgrade(&["--", "--tcp", &wide]).exits_with(1).complains("it was handed over with the address 127.0.0.1:");
    server.restart(&["--", "--tcp", &wide]).exits_with(0);
    let listeners = server.serving().listeners;
    assert_eq!((listeners.len(), listeners[0].address.as_str()), (1, &wide["http=".len()..]));
    server.restart(&["--", "--tcp", &format!("http=127.0.0.1:{port}")]).exits_with(0);
    assert_eq!(server.answerer().generation, 3);
}

/// Connections are cut because that was asked for; the application still ends in its own way.
#[test]
fn drain_hooks_are_waited_for() {
    let home = Home::new();
    let hook = home.fifo("hook");
    let path = home.path("hook");
    let server = Server::start_in(home, &["--tcp", "http=127.0.0.1:0", "--drain-hook", path.to_str().unwrap()]);
    drop(hook);
    let slow = in_flight(&server, 1);
    let mut restart = server.begin_restart(&["--kill-after", "60s"]);
    restart.wait_for_line("draining");
    // Connections are not waited for any longer.
    for one in slow {
        assert_eq!(one.try_answer().unwrap_or_default(), "");
    }
    let mut reader = fs::File::options().read(true).custom_flags(libc::O_NONBLOCK).open(&path).unwrap();
    let mut text = String::new();
    eventually("the hook's words", || {
        let _ = reader.read_to_string(&mut text);
        (text == "hook\n").then_some(())
    });
    restart.finish().exits_with(0);
    assert_eq!(server.answerer().generation, 2);
}

#[test]
fn goes_on_when_the_command_is_interrupted() {
    let server = locked(&[]);
    let address = server.address();
    let hold = server.home.fifo("hold");
    let mut command = server.handover_command(&["restart", "--pid", &server.pid().to_string()]);
    command.args(["--env", &hold.fault("hold-before-ready")]);
    let restart = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    let held = hold.reached();
    kill(Pid::from_raw(restart.id().cast_signed()), Signal::SIGINT).unwrap();
    let output = restart.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(said, "handover: the restart goes on without this command; `handover ps` tells what came of it\n");
    held.let_go();
    assert_eq!(ask(address, "/").answerer().generation, 2);
    server.assert_only(server.pid());
}

#[test]
fn after_twenty_restarts_nothing_has_grown() {
    let server = locked(&["--udp", "dns=127.0.0.1:0"]);
    let measure = || {
        let pid = server.pid();
        server.assert_only(pid);
        let _ = server.get("/");
        let _ = server.settled_holdings(pid);
        (crate::server::fds_of(pid).len(), fs::read_dir(format!("/proc/{pid}/task")).unwrap().count())
    };
    server.restart(&[]).exits_with(0);
    let before = measure();
    for _ in 0..20 {
        server.restart(&[]).exits_with(0);
    }
    assert_eq!(measure(), before);
    assert_eq!(server.generation(), 22);
}
