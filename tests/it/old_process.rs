//! The old process is killed, told to stop or stopped, at each stage of the upgrade.

use std::net::TcpStream;
use std::time::{Duration, Instant};

use handover::control::State;
use nix::sys::signal::Signal;

use crate::client::{Asked, ask};
use crate::command::Running;
use crate::home::Held;
use crate::server::Server;
use crate::wait::{eventually, eventually_equal};

/// An upgrade whose new build waits at a point of its start.
struct Midway {
    server: Server,
    address: std::net::SocketAddr,
    cookie: u64,
    old: i32,
    new: i32,
    upgrade: Running,
    held: Option<Held>,
}

impl Midway {
    fn at(point: &str) -> Self {
        Self::with(point, "", &[])
    }

    fn with(point: &str, more_faults: &str, arguments: &[&str]) -> Self {
        let server = Server::http();
        let (address, old, cookie) = (server.address(), server.pid(), cookie(&server));
        let hold = server.home.fifo("hold");
        let fault = hold.fault(point) + more_faults;
        let mut upgrade = server.begin_upgrade(&[&["--json", "--env", &fault], arguments].concat());
        let new = upgrade.new_pid();
        let held = Some(hold.reached());
        // It answers again when the offer is made.
        assert_eq!(server.status(old).state, State::Upgrading);
        Self { server, address, cookie, old, new, upgrade, held }
    }

    /// Lets the new build go on.
    fn let_go(&mut self) {
        self.held = None;
    }

    /// Clients that nobody accepts, because the old process stands still.
    fn clients_in_the_queue(&self) -> Vec<Asked<TcpStream>> {
        self.server.freeze(self.old);
        (0..5).map(|_| ask(self.address, "/")).collect()
    }

    /// The new process serves: the clients, on the same socket, with nothing left of the old one; and it is told so.
    #[track_caller]
    fn succeeds_it(self, clients: Vec<Asked<TcpStream>>) {
        for client in clients {
            assert_eq!(client.answerer().generation, 2);
        }
        let run = self.upgrade.finish().exits_with(0);
        let message =
            format!("process {} died in the middle of the upgrade; process {} has taken over", self.old, self.new);
        assert_eq!(run.last_json()["message"], message.as_str(), "{run:?}");
        self.server.assert_only(self.new);
        assert_eq!(cookie(&self.server), self.cookie);
        self.server.upgrade(&["--env", "FIXTURE_FAULT="]).exits_with(0);
        assert_eq!(self.server.answerer().generation, 3);
    }
}

fn cookie(server: &Server) -> u64 {
    server.serving().listeners[0].cookie
}

#[test]
fn killed_before_its_offer_is_read() {
    let mut midway = Midway::at("hold-before-start");
    let clients = midway.clients_in_the_queue();
    midway.server.signal(midway.old, Signal::SIGKILL);
    midway.let_go();
    midway.succeeds_it(clients);
}

#[test]
fn killed_after_the_new_one_has_adopted() {
    let mut midway = Midway::at("hold-before-ready");
    let clients = midway.clients_in_the_queue();
    midway.server.signal(midway.old, Signal::SIGKILL);
    midway.let_go();
    midway.succeeds_it(clients);
}

/// `ready` lies in the channel, and the old process never reads it.
#[test]
fn killed_between_ready_and_commit() {
    let mark = std::env::temp_dir().join(format!("handover-it-{}-mark", std::process::id()));
    let mut midway = Midway::with("hold-before-ready", &format!(",mark-ready={}", mark.display()), &[]);
    let clients = midway.clients_in_the_queue();
    midway.let_go();
    eventually("the new build to be ready", || std::fs::remove_file(&mark).ok());
    // When this is answered the word is sent.
    assert_eq!(midway.server.status(midway.new).state, State::Starting);
    midway.server.signal(midway.old, Signal::SIGKILL);
    midway.succeeds_it(clients);
}

#[test]
fn killed_in_the_trial() {
    let server = Server::http();
    let (old, cookie_before) = (server.pid(), cookie(&server));
    server.upgrade(&["--wait", "ready", "--trial", "60s"]).exits_with(0);
    server.signal(old, Signal::SIGKILL);
    let answer = server.answerer();
    assert_eq!(answer.generation, 2);
    server.assert_only(answer.pid.cast_signed());
    assert_eq!(cookie(&server), cookie_before);
    server.upgrade(&[]).exits_with(0);
}

#[test]
fn killed_in_the_drain() {
    let server = Server::http();
    let old = server.pid();
    let slow = ask(server.address(), "/slow/60");
    eventually("a request in flight", || (server.status(old).connections.open == 1).then_some(()));
    let mut upgrade = server.begin_upgrade(&["--wait", "drained"]);
    upgrade.wait_for_line("draining");
    server.signal(old, Signal::SIGKILL);
    let new = server.pid();
    upgrade.finish().exits_with(0).says(&format!("process {old} died while it drained; process {new} has taken over"));
    // What it was answering is lost with it.
    assert_eq!(slow.try_answer().unwrap_or_default(), "");
    server.assert_only(new);
    assert_eq!(server.answerer().generation, 2);
}

#[test]
fn killed_with_the_new_one_nothing_serves_and_that_is_said() {
    let midway = Midway::at("hold-before-ready");
    midway.server.signal(midway.old, Signal::SIGKILL);
    midway.server.signal(midway.new, Signal::SIGKILL);
    let run = midway.upgrade.finish().exits_with(8);
    let message = run.last_json()["message"].as_str().unwrap().to_owned();
    assert!(message.contains("and so did the new process"), "{message}");
}

#[track_caller]
fn is_aborted_by_sigterm(point: &str) {
    let midway = Midway::at(point);
    midway.server.signal(midway.old, Signal::SIGTERM);
    let run = midway.upgrade.finish().exits_with(8);
    let message = run.last_json()["message"].as_str().unwrap().to_owned();
    let wanted = format!("was not ready when this process was told to stop; process {} is draining", midway.old);
    assert!(message.contains(&wanted), "{message}");
    midway.server.wait_for_end(midway.old);
    eventually_equal("the processes", &vec![], || midway.server.home.processes());
    assert_eq!(midway.server.home.sockets(), Vec::<String>::new());
}

#[test]
fn told_to_stop_before_its_offer_is_read() {
    is_aborted_by_sigterm("hold-before-start");
}

#[test]
fn told_to_stop_after_the_new_one_has_adopted() {
    is_aborted_by_sigterm("hold-before-ready");
}

/// Somebody must serve, and the new one does already.
#[test]
fn told_to_stop_in_the_trial() {
    let server = Server::http();
    let old = server.pid();
    let load = server.load().start();
    let mut upgrade = server.begin_upgrade(&["--trial", "60s"]);
    upgrade.wait_for_line("committed");
    server.signal(old, Signal::SIGTERM);
    upgrade.finish().exits_with(0);
    load.wait_for_generation(2, crate::wait::LONG).unwrap();
    load.stop().assert_lossless();
    server.wait_for_end(old);
    server.assert_only(server.pid());
}

/// `systemctl stop` tells every process of the unit: this one finishes, as it would have. The second time it is cut.
#[test]
fn told_to_stop_in_the_drain() {
    let server = Server::http();
    let old = server.pid();
    let slow = ask(server.address(), "/slow/60");
    let short = ask(server.address(), "/slow/2");
    eventually("requests in flight", || (server.status(old).connections.open == 2).then_some(()));
    let mut upgrade = server.begin_upgrade(&["--wait", "drained"]);
    upgrade.wait_for_line("draining");
    server.signal(old, Signal::SIGTERM);
    assert_eq!(short.answerer().pid.cast_signed(), old);
    server.signal(old, Signal::SIGTERM);
    upgrade.finish().exits_with(5).complains("1 connection was closed at the drain deadline");
    drop(slow);
    server.wait_for_end(old);
    server.assert_only(server.pid());
}

#[test]
fn stopped_and_continued_it_goes_on() {
    let mut midway = Midway::at("hold-before-ready");
    let clients = midway.clients_in_the_queue();
    midway.let_go();
    midway.server.thaw(midway.old);
    for client in clients {
        let generation = client.answerer().generation;
        assert!(generation == 1 || generation == 2);
    }
    midway.upgrade.finish().exits_with(0);
    midway.server.wait_for_end(midway.old);
    midway.server.assert_only(midway.new);
}

/// What the new build has said in its time lies there unread, and it may be more than is read in one turn.
#[test]
fn stopped_until_the_time_of_the_new_one_is_over_it_hears_all_of_it() {
    let names = (0..200).map(|number| format!("{number}-{}=127.0.0.1:0", "x".repeat(200)));
    let listeners: Vec<String> = names.collect();
    let mut arguments = vec!["--tcp", "http=127.0.0.1:0"];
    arguments.extend(listeners.iter().flat_map(|one| ["--tcp", one]));
    let server = Server::start(&arguments);
    let (old, hold, mark) = (server.pid(), server.home.fifo("hold"), server.home.path("mark"));
    let fault = hold.fault("hold-before-ready") + &format!(",mark-ready={}", mark.display());
    let mut upgrade = server.begin_upgrade(&["--json", "--env", &fault, "--ready-timeout", "6s"]);
    let new = upgrade.new_pid();
    let held = hold.reached();
    server.freeze(old);
    let since = Instant::now();
    held.let_go();
    eventually("the new build to be ready", || mark.exists().then_some(()));
    // When this is answered the word is sent.
    assert_eq!(server.status(new).state, State::Starting);
    eventually("the end of its time", || (since.elapsed() > Duration::from_millis(6100)).then_some(()));
    server.thaw(old);
    upgrade.finish().exits_with(0);
    assert_eq!(server.answerer().generation, 2);
}

/// Nobody can be upgraded who does not move, and the command says so instead of waiting for ever.
#[test]
fn stopped_for_long_it_is_called_stopped() {
    let server = Server::http();
    let old = server.pid();
    server.freeze(old);
    let pid = old.to_string();
    let run = server.handover(&["upgrade", "--pid", &pid]).exits_with(1);
    let run = run.complains("it has said nothing for 10 s: it is stopped").complains("`kill -CONT` lets it go on");
    assert_eq!(run.stdout, "");
    server.thaw(old);
    assert_eq!(server.answerer().pid.cast_signed(), server.pid());
}

/// It was told to stop and not to fail: the old one serves on, as it would for a build that gives up.
#[test]
fn the_new_one_told_to_stop_before_it_is_ready() {
    let midway = Midway::at("hold-before-ready");
    midway.server.signal(midway.new, Signal::SIGTERM);
    let run = midway.upgrade.finish().exits_with(1);
    let message = run.last_json()["message"].as_str().unwrap().to_owned();
    assert!(message.contains("gave up: it was told to stop"), "{message}");
    midway.server.assert_only(midway.old);
}
