//! Every signal at every stage of an upgrade, to each of the two processes: the table of docs/operations.md, cell by
//! cell. A request is in flight the whole time, and only a second signal of the stopping kind may cut it.

use std::net::TcpStream;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;
use std::thread;

use handover::control::State;
use nix::sys::signal::Signal;

use crate::client::{Asked, ask};
use crate::command::Running;
use crate::home::Held;
use crate::server::Server;
use crate::wait::{eventually, eventually_equal};

#[derive(Clone, Copy, Debug, PartialEq)]
enum Stage {
    Serving,
    NoHandlers,
    Adopted,
    Ready,
    Trial,
    Draining,
    Stopping,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum To {
    Old,
    New,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Outcome {
    Upgraded,
    Refused,
    Killed,
    Drains,
    Aborted,
    GivesUp,
    AbortedOrSettled,
    Settled,
    EndsAfterAll,
    Nothing,
    Cut,
}

use Outcome as O;

/// Stage, to whom, what SIGUSR2 and SIGHUP do, what SIGTERM, SIGINT and SIGQUIT do.
const TABLE: [(Stage, To, Outcome, Outcome); 12] = [
    (Stage::Serving, To::Old, O::Upgraded, O::Drains),
    (Stage::NoHandlers, To::Old, O::Refused, O::Aborted),
    (Stage::NoHandlers, To::New, O::Killed, O::Killed),
    (Stage::Adopted, To::Old, O::Refused, O::Aborted),
    (Stage::Adopted, To::New, O::Refused, O::GivesUp),
    (Stage::Ready, To::Old, O::Refused, O::AbortedOrSettled),
    (Stage::Ready, To::New, O::Refused, O::GivesUp),
    (Stage::Trial, To::Old, O::Refused, O::Settled),
    (Stage::Trial, To::New, O::Refused, O::EndsAfterAll),
    (Stage::Draining, To::Old, O::Refused, O::Nothing),
    (Stage::Draining, To::New, O::Upgraded, O::Drains),
    (Stage::Stopping, To::Old, O::Refused, O::Cut),
];

const UPGRADE: [Signal; 2] = [Signal::SIGUSR2, Signal::SIGHUP];
const STOP: [Signal; 3] = [Signal::SIGTERM, Signal::SIGINT, Signal::SIGQUIT];

impl Stage {
    fn words(self) -> &'static str {
        match self {
            Self::Serving => "serving",
            Self::NoHandlers => "the new build has not called `Handover::start`",
            Self::Adopted => "adopted, and not ready",
            Self::Ready => "ready, and not committed",
            Self::Trial => "trial",
            Self::Draining => "draining after an upgrade",
            Self::Stopping => "draining after a stop",
        }
    }
}

impl Outcome {
    fn words(self) -> &'static str {
        match self {
            Self::Upgraded => "upgraded",
            Self::Refused => "refused, and logged",
            Self::Killed => "killed by it: not upgraded (1), the old process serves on",
            Self::Drains => "drains, then ends",
            Self::Aborted => "the upgrade is aborted (8); drains, then ends",
            Self::GivesUp => "gives up: not upgraded (1), the old process serves on",
            Self::AbortedOrSettled => "as before it, or as in the trial",
            Self::Settled => "the trial is over (0): the new process serves, this one drains",
            Self::EndsAfterAll => "the trial is over (0): both drain, then end",
            Self::Nothing => "drains on",
            Self::Cut => "closes what is open, then ends",
        }
    }
}

#[test]
fn each_at_each_stage() {
    let mut cells = Vec::new();
    for (stage, to, upgrade, stop) in TABLE {
        cells.extend(UPGRADE.map(|signal| (stage, to, signal, upgrade)));
        cells.extend(STOP.map(|signal| (stage, to, signal, stop)));
    }
    let left = Mutex::new(cells);
    let failed = Mutex::new(Vec::new());
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                loop {
                    let Some((stage, to, signal, outcome)) = left.lock().unwrap().pop() else { return };
                    let cell = AssertUnwindSafe(|| Scene::at(stage).cell(to, signal, outcome));
                    if catch_unwind(cell).is_err() {
                        failed.lock().unwrap().push(format!("{signal} to {to:?} at {stage:?}: {outcome:?}"));
                    }
                }
            });
        }
    });
    assert_eq!(failed.into_inner().unwrap(), Vec::<String>::new());
}

/// The table as operators read it is the one that is tested.
#[test]
fn the_table_of_the_page() {
    let page = include_str!("../../docs/operations.md");
    let (_, table) = page.split_once("| stage | sent to | SIGUSR2, SIGHUP | SIGTERM, SIGINT, SIGQUIT |\n").unwrap();
    let found: Vec<&str> = table.lines().skip(1).take_while(|line| line.starts_with('|')).collect();
    let wanted = TABLE.map(|(stage, to, upgrade, stop)| {
        let to = match (stage, to) {
            (Stage::Serving | Stage::Stopping, _) => "the process",
            (_, To::Old) => "the old process",
            (_, To::New) => "the new process",
        };
        format!("| {} | {to} | {} | {} |", stage.words(), upgrade.words(), stop.words())
    });
    assert_eq!(found, wanted);
}

/// A service in a stage.
struct Scene {
    stage: Stage,
    server: Server,
    old: i32,
    new: i32,
    /// The command whose upgrade, or stop, is under way.
    command: Option<Running>,
    held: Option<Held>,
    /// One with each process that accepts.
    in_flight: Vec<(i32, Asked<TcpStream>)>,
}

impl Scene {
    fn at(stage: Stage) -> Self {
        let server = Server::start(&["--tcp", "http=127.0.0.1:0", "--drain-timeout", "600s", "--trial", "60s"]);
        let old = server.pid();
        let mut scene = Self { stage, server, old, new: 0, command: None, held: None, in_flight: Vec::new() };
        scene.ask(old);
        match stage {
            Stage::Serving => {}
            Stage::NoHandlers => scene.hold("hold-before-start", ""),
            Stage::Adopted => scene.hold("hold-before-ready", ""),
            Stage::Ready => {
                let mark = scene.server.home.path("mark");
                scene.hold("hold-before-ready", &format!(",mark-ready={}", mark.display()));
                scene.server.freeze(old);
                scene.held = None;
                eventually("the new build to be ready", || std::fs::remove_file(&mark).ok());
                // When this is answered the word is sent.
                assert_eq!(scene.server.status(scene.new).state, State::Starting);
            }
            Stage::Trial => scene.upgrade_until("committed", &[]),
            Stage::Draining => scene.upgrade_until("draining", &["--trial", "100ms", "--wait", "drained"]),
            Stage::Stopping => {
                let stop = scene.server.handover_command(&["stop", "--json", "--pid", &old.to_string()]);
                let mut stop = Running::start(stop);
                stop.wait_for_line("draining");
                scene.command = Some(stop);
            }
        }
        scene
    }

    fn hold(&mut self, point: &str, more_faults: &str) {
        let hold = self.server.home.fifo("hold");
        let fault = hold.fault(point) + more_faults;
        let mut upgrade = self.server.begin_upgrade(&["--json", "--env", &fault, "--trial", "100ms"]);
        self.new = upgrade.new_pid();
        self.held = Some(hold.reached());
        // It answers again when the offer is made.
        assert_eq!(self.server.status(self.old).state, State::Upgrading);
        self.command = Some(upgrade);
    }

    fn upgrade_until(&mut self, stage: &str, arguments: &[&str]) {
        let mut upgrade = self.server.begin_upgrade(&[&["--json"], arguments].concat());
        self.new = upgrade.new_pid();
        upgrade.wait_for_line(stage);
        self.command = Some(upgrade);
        self.ask(self.new);
    }

    /// A request that ends when it is cut, and not before.
    fn ask(&mut self, pid: i32) {
        let address = self.server.status(pid).listeners[0].address.parse().unwrap();
        self.in_flight.push((pid, ask(address, "/slow/600")));
        self.is_open(pid);
    }

    #[track_caller]
    fn is_open(&self, pid: i32) {
        eventually_equal("open connections", &1, || self.server.status(pid).connections.open);
    }

    #[track_caller]
    fn logs(&self, line: &str, times: usize) {
        eventually_equal(line, &times, || self.server.home.log().matches(line).count());
    }

    /// Sends it, and asserts what comes of it.
    fn cell(mut self, to: To, signal: Signal, outcome: Outcome) {
        let target = if to == To::Old { self.old } else { self.new };
        self.server.signal(target, signal);
        if self.stage == Stage::Ready {
            if outcome == O::GivesUp {
                self.server.wait_for_end(target);
            }
            self.server.thaw(self.old);
        }
        match outcome {
            O::Upgraded => {
                let generation = self.server.status(target).generation + 1;
                eventually("the next generation", || (self.server.generation() == generation).then_some(()));
                self.is_open(target);
            }
            O::Refused => self.is_refused(),
            O::Killed => self.fails(&format!("was killed by {signal} before it was ready")),
            O::GivesUp => self.fails("gave up: it was told to stop"),
            O::Aborted => {
                self.exits(8, "when this process was told to stop");
                self.drains_until_told_again(target, signal);
                assert_eq!(self.server.home.processes(), Vec::<i32>::new());
            }
            O::AbortedOrSettled => {
                let run = self.command.take().unwrap().finish();
                assert!(matches!(run.code, Some(0 | 8)), "{run:?}");
                self.drains_until_told_again(target, signal);
                if run.code == Some(0) {
                    assert_eq!(self.server.pid(), self.new);
                }
            }
            O::Settled => {
                self.exits(0, "upgraded to generation 2");
                assert_eq!(self.server.pid(), self.new);
                self.drains_until_told_again(target, signal);
                self.is_open(self.new);
            }
            O::EndsAfterAll => {
                self.exits(0, "upgraded to generation 2");
                self.is_open(self.old);
                self.drains_until_told_again(target, signal);
                assert_eq!(self.server.status(self.old).state, State::Draining);
            }
            O::Drains => self.drains_until_told_again(target, signal),
            O::Nothing => {
                self.drains_until_told_again(target, signal);
                self.exits(5, "1 connection was closed");
                assert_eq!(self.server.pid(), self.new);
                self.is_open(self.new);
            }
            O::Cut => {
                self.is_cut(target);
                self.exits(5, "1 connection was closed");
            }
        }
    }

    fn is_refused(&mut self) {
        self.logs("upgrade refused: ", 1);
        self.held = None;
        match self.stage {
            Stage::Stopping | Stage::Draining => assert_eq!(self.server.status(self.old).state, State::Draining),
            Stage::Trial => assert_eq!(self.server.status(self.old).state, State::Trial),
            _ => {
                self.exits(0, "upgraded to generation 2");
                assert_eq!(self.server.pid(), self.new);
            }
        }
        self.is_open(self.old);
    }

    fn fails(&mut self, why: &str) {
        self.exits(1, why);
        self.server.wait_for_end(self.new);
        assert_eq!((self.server.pid(), self.server.generation()), (self.old, 1));
        self.is_open(self.old);
    }

    #[track_caller]
    fn exits(&mut self, code: i32, why: &str) {
        let run = self.command.take().unwrap().finish().exits_with(code);
        let message = run.last_json()["message"].as_str().unwrap().to_owned();
        assert!(message.contains(why), "{message}");
    }

    fn drains_until_told_again(&mut self, pid: i32, signal: Signal) {
        self.logs("told to stop by signal", 1);
        eventually_equal("its state", &State::Draining, || self.server.status(pid).state);
        self.is_open(pid);
        self.server.signal(pid, signal);
        self.is_cut(pid);
    }

    fn is_cut(&mut self, pid: i32) {
        let place = self.in_flight.iter().position(|(with, _)| *with == pid).unwrap();
        assert_eq!(self.in_flight.remove(place).1.try_answer().unwrap_or_default(), "");
        self.server.wait_for_end(pid);
    }
}
