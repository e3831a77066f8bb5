//! The library on both sides.

use handover::control::Status;

use super::{CLIENTS, Fault, Fired, Matrix, Step, TIMES, address, assert_lost_at_most, load};
use crate::home::{Home, fixture};
use crate::oracle::{Outcome as Ended, Running};
use crate::server::{Holdings, Server, fds_of};
use crate::wait::{LONG, eventually};

use Fault as F;

/// Few enough to be used up soon.
pub(super) const FDS_MAX: usize = 256;

pub(super) const NO_FRAME: (&[Fault], &str) = (&[F::Short, F::Count], "no frame is sent here");
pub(super) const NO_CHANNEL: (&[Fault], &str) = (&[F::Ended], "there is no channel");
pub(super) const NO_NEW_BUILD: (&[Fault], &str) =
    (&[F::Killed, F::StoppedAndKilled], "there is no new build yet: a server is killed, and nothing else");
pub(super) const TRIAL_OVER: (&[Fault], &str) =
    (&[F::Killed, F::StoppedAndKilled], "the upgrade is over: a server is killed, and nothing else");

pub(super) const fn step(
    point: &'static str,
    words: &'static str,
    left_out: &'static [(&'static [Fault], &'static str)],
) -> Step {
    Step { point, words, left_out }
}

const MATRIX: Matrix = Matrix {
    heading: "library: the fault comes when …",
    faults: &Fault::ALL,
    steps: &[
        step("old: asked", "the old process is asked", &[NO_FRAME, NO_CHANNEL, NO_NEW_BUILD]),
        step("old: spawned", "… has spawned the new build", &[NO_FRAME]),
        step("offer", "… says `offer`", &[]),
        step("old: offered", "… has said it", &[NO_FRAME]),
        step("old: adopted", "… has read `adopted`", &[NO_FRAME]),
        step("old: ready", "… has read `ready`", &[NO_FRAME]),
        step("commit", "… has shut its gate, says `commit`", &[]),
        step("old: committed", "… has said it: the trial begins", &[NO_FRAME]),
        step("settled", "… says `settled`: the trial is over", &[]),
        step("old: settled", "… has said it", &[NO_FRAME, NO_CHANNEL]),
        step("old: draining", "… drains", &[NO_FRAME, NO_CHANNEL]),
        step("new: started", "the new process looks for the offer", &[NO_FRAME]),
        step("new: offer", "… has read it, and no fd yet", &[NO_FRAME]),
        step("adopted", "… says `adopted`", &[]),
        step("new: adopted", "… has said it", &[NO_FRAME]),
        step("ready", "… says `ready`", &[]),
        step("new: ready", "… has said it", &[NO_FRAME]),
        step("new: commit", "… has read `commit`", &[NO_FRAME]),
        step("accepting", "… has opened its gate, says `accepting`", &[]),
        step("new: accepting", "… has said it", &[NO_FRAME]),
        step("new: settled", "… has read `settled`", &[NO_FRAME, NO_CHANNEL, TRIAL_OVER]),
    ],
};

/// Steps at which the new process may have accepted, and is killed by the old one.
const IN_THE_TRIAL: [&str; 4] = ["old: committed", "new: commit", "accepting", "new: accepting"];

#[test]
fn each_fault_at_each_step() {
    MATRIX.holds(cell);
}

/// Who serves in the end.
fn cell(step: Step, fault: Fault) -> &'static str {
    let cell = Cell::start(step, fault, &[]);
    let upgrade = cell.server.begin_upgrade(&[&["--json"], &TIMES[..]].concat());
    let failed = cell.fired.take_its_course(fault);
    let run = upgrade.finish();
    let outcome = cell.judge(failed);
    match outcome {
        "old" => drop(run.exits_with(1)),
        "new" => drop(run.exits_with(0)),
        _ => {}
    }
    outcome
}

/// A service under load.
pub(super) struct Cell {
    pub(super) server: Server,
    pub(super) fired: Fired,
    step: Step,
    fault: Fault,
    old: i32,
    cookie: u64,
    holdings: Holdings,
    load: Running,
}

impl Cell {
    pub(super) fn start(step: Step, fault: Fault, arguments: &[&str]) -> Self {
        let (home, address) = (Home::new(), address());
        let fired = Fired::new(&home);
        let server = start(home, &address, &fired.variable(&step, fault), arguments);
        let old = server.first_pid();
        let cookie = server.serving().listeners[0].cookie;
        let holdings = server.settled_holdings(old);
        let load = load(&address).monotonic().start();
        load.wait_for_more(5, LONG).unwrap();
        Self { server, fired, step, fault, old, cookie, holdings, load }
    }

    /// Who serves in the end, once the process in which it happened has failed, and whether all holds.
    #[track_caller]
    pub(super) fn judge(self, failed: i32) -> &'static str {
        let Self { server, step, fault, old, cookie, holdings, load, .. } = self;
        let serving = server.serving();
        load.wait_for(|tally| tally.pids().contains(&serving.pid.unsigned_abs()), LONG).unwrap();
        load.wait_for_more(10, LONG).unwrap();
        let tally = load.stop();
        let old_was_killed = fault.kills() && failed == old;
        let outcome = outcome(&serving, old);
        match outcome {
            "old" => {
                // The end of the channel is the death of the old process to it, until that kills it.
                let may_have_accepted = IN_THE_TRIAL.contains(&step.point) || fault == F::Ended;
                assert!(may_have_accepted || tally.generations().keys().eq(&[1]), "it has accepted too soon: {tally}");
                assert_lost_at_most(if may_have_accepted { CLIENTS } else { 0 }, &tally);
                server.assert_holds(old, &holdings);
            }
            "new" => {
                assert_eq!(tally.backwards(), 0, "both have accepted: {tally}");
                assert_lost_at_most(if old_was_killed { CLIENTS } else { 0 }, &tally);
            }
            _ => {
                assert!(old_was_killed, "{}", server.home.log());
                assert_eq!((tally.count(Ended::TimedOut), tally.count(Ended::Wrong)), (0, 0), "{tally}");
                remove_socket_of(&server, old);
            }
        }
        assert!(outcome == "new, afresh" || serving.listeners[0].cookie == cookie, "another socket");
        assert_next_upgrade_works(&server);
        outcome
    }
}

pub(super) fn outcome(serving: &Status, old: i32) -> &'static str {
    match (serving.pid == old, serving.generation) {
        (true, _) => "old",
        (false, 2) => "new",
        // It was not handed anything: what was in the queue was lost with the socket.
        (false, _) => "new, afresh",
    }
}

/// One that starts afresh does not know whom it follows; what others have left is removed by whoever starts a minute later.
pub(super) fn remove_socket_of(server: &Server, old: i32) {
    std::fs::remove_file(server.home.control().join(format!("{old}.sock"))).unwrap();
}

#[track_caller]
pub(super) fn assert_next_upgrade_works(server: &Server) {
    let serving = server.serving();
    eventually("fds again", || (fds_of(serving.pid).len() < FDS_MAX / 2).then_some(()));
    server.upgrade(&["--wait", "drained", "--trial", "100ms"]).exits_with(0);
    let next = server.serving();
    assert_eq!((next.generation, next.listeners[0].cookie), (serving.generation + 1, serving.listeners[0].cookie));
    assert_eq!(server.answerer().pid, next.pid.unsigned_abs());
    server.assert_only(next.pid);
}

pub(super) fn start(home: Home, address: &str, fault: &str, arguments: &[&str]) -> Server {
    let script = format!("ulimit -n {FDS_MAX}; exec {} \"$@\"", fixture().display());
    let http = format!("http={address}");
    let first = ["-c", &script, "sh", "--tcp", &http, "--linger", "100ms"];
    let mut command = home.logged("/bin/sh", &[&first, arguments].concat());
    command.env("HANDOVER_FAULT", fault);
    Server::run(home, command)
}
