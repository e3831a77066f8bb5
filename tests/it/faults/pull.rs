//! A new process that was started by something else, and asks the old one for the handover.

use handover::control::State;

use super::library::{Cell, NO_CHANNEL, NO_FRAME, TRIAL_OVER, step};
use super::{Fault, Matrix, Step, TIMES};
use crate::server::has_ended;
use crate::wait::eventually;

const NOTHING_HANDED_OVER: (&[Fault], &str) =
    (&[Fault::Killed, Fault::StoppedAndKilled], "nothing is handed over yet: a server is killed, and nothing else");

const MATRIX: Matrix = Matrix {
    heading: "the new process asks: the fault comes when …",
    faults: &Fault::ALL,
    steps: &[
        step("offer", "the old process says `offer`", &[NOTHING_HANDED_OVER]),
        step("old: ready", "… has read `ready`", &[NO_FRAME]),
        step("commit", "… has shut its gate, says `commit`", &[]),
        step("old: committed", "… has said it: the trial begins", &[NO_FRAME]),
        step("settled", "… says `settled`: the trial is over", &[]),
        step("new: started", "the new process looks for the offer", &[NO_FRAME]),
        step("adopted", "… says `adopted`", &[]),
        step("ready", "… says `ready`", &[]),
        step("new: commit", "… has read `commit`", &[NO_FRAME]),
        step("accepting", "… has opened its gate, says `accepting`", &[]),
        step("new: settled", "… has read `settled`", &[NO_FRAME, NO_CHANNEL, TRIAL_OVER]),
    ],
};

#[test]
fn of_a_new_process_that_asks() {
    MATRIX.holds(cell);
}

fn cell(step: Step, fault: Fault) -> &'static str {
    let cell = Cell::start(step, fault, &TIMES);
    let old = cell.server.first_pid().to_string();
    let http = format!("http={}", cell.server.address());
    let mut command = cell.server.home.fixture(&["--tcp", &http, "--linger", "100ms", "--take-over", &old]);
    command.env("HANDOVER_FAULT", cell.fired.variable(&step, fault));
    let mut new = command.spawn().unwrap();
    let failed = cell.fired.take_its_course(fault);
    // It serves, or it has ended: the old process cannot kill it, but tells it.
    let server = &cell.server;
    eventually("one that serves", || {
        let ended = new.try_wait().unwrap().is_some();
        let serves = |pid: i32| server.try_status(pid).is_ok_and(|status| status.state == State::Serving);
        let old = server.first_pid();
        let alone = |pid: i32, other: bool| other && serves(pid);
        (alone(old, ended) || alone(new.id().cast_signed(), has_ended(old))).then_some(())
    });
    let outcome = cell.judge(failed);
    let _ = new.kill();
    new.wait().unwrap();
    outcome
}
