//! `handover restart`: the old process ends before the new one runs.

use super::library::{
    NO_CHANNEL, NO_FRAME, NO_NEW_BUILD, assert_next_upgrade_works, outcome, remove_socket_of, start, step,
};
use super::{CLIENTS, Fault, Fired, Matrix, Step, address, assert_lost_at_most, load};
use handover::control::State;

use crate::home::Home;
use crate::oracle::Outcome as Ended;
use crate::server::has_ended;
use crate::wait::{LONG, eventually};

use Fault as F;

/// A process that stands still is killed before it is continued.
const TIMES: [&str; 6] = ["--ready-timeout", "4s", "--drain", "1s", "--kill-after", "2s"];

const MATRIX: Matrix = Matrix {
    heading: "`handover restart`: the fault comes when …",
    faults: &Fault::ALL,
    steps: &[
        step("old: asked", "the old process is asked", &[NO_FRAME, NO_CHANNEL, NO_NEW_BUILD]),
        step("old: spawned", "… has spawned the new build", &[NO_FRAME]),
        step("offer", "… says `offer`", &[]),
        step("old: offered", "… has said it", &[NO_FRAME]),
        step("old: adopted", "… has read `adopted`", &[NO_FRAME]),
        step("old: draining", "… has shut its gate, and drains", &[NO_FRAME]),
        step("old: drained", "… has drained, and is about to exit", &[NO_FRAME]),
        step("new: started", "the new process looks for the offer", &[NO_FRAME]),
        step("new: offer", "… has read it, and no fd yet", &[NO_FRAME]),
        step("adopted", "… says `adopted`", &[]),
        step("new: waits", "… waits for the end of the old one", &[NO_FRAME]),
        step("new: alone", "… has seen it, and is about to run", &[NO_FRAME]),
    ],
};

#[test]
fn of_a_restart() {
    MATRIX.holds(cell);
}

fn cell(step: Step, fault: Fault) -> &'static str {
    let (home, address) = (Home::new(), address());
    let fired = Fired::new(&home);
    let server = start(home, &address, &fired.variable(&step, fault), &[]);
    let old = server.first_pid();
    let cookie = server.serving().listeners[0].cookie;
    let load = load(&address).monotonic().start();
    load.wait_for_more(5, LONG).unwrap();
    let restart = server.begin_restart(&[&["--json"], &TIMES[..]].concat());
    let failed = fired.take_its_course(fault);
    let run = restart.finish();
    let serving = eventually("one process or none", || match server.home.processes().as_slice() {
        [] => Some(None),
        [pid] => server.try_status(*pid).ok().filter(|status| status.state == State::Serving).map(Some),
        _ => None,
    });
    if let Some(serving) = &serving {
        load.wait_for(|tally| tally.pids().contains(&serving.pid.unsigned_abs()), LONG).unwrap();
        load.wait_for_more(10, LONG).unwrap();
    }
    let tally = load.stop();
    assert_eq!(tally.backwards(), 0, "both have accepted: {tally}");
    assert_eq!((tally.count(Ended::TimedOut), tally.count(Ended::Wrong)), (0, 0), "{tally}");
    let Some(serving) = serving else {
        // The new process had no other to fall back on.
        assert!((fault.kills() || fault == F::NoFds) && failed != old, "nobody serves: {}", server.home.log());
        run.exits_with(8);
        return "nobody";
    };
    let outcome = outcome(&serving, old);
    match outcome {
        "old" => {
            run.exits_with(1);
            assert!(!has_ended(old));
            assert_lost_at_most(0, &tally);
        }
        "new" => {
            // It has read half of `adopted`, and serves while it waits for the rest: the new one kills it in the end.
            let waits_for_the_rest = step.point == "adopted" && fault == F::Short;
            let old_was_killed = waits_for_the_rest || failed == old && (fault.kills() || fault == F::Continued);
            assert_lost_at_most(if old_was_killed { CLIENTS } else { 0 }, &tally);
        }
        _ => remove_socket_of(&server, old),
    }
    assert!(outcome == "new, afresh" || serving.listeners[0].cookie == cookie, "another socket");
    assert_next_upgrade_works(&server);
    outcome
}
