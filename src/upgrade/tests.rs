use super::*;

/// The machine after these events, and the actions of the last one.
fn after(events: &[Event]) -> (Upgrade, Vec<Action>) {
    let mut upgrade = Upgrade::new();
    let mut actions = vec![];
    for event in events {
        actions = upgrade.on_event(*event);
    }
    (upgrade, actions)
}

const TO_STARTING: &[Event] = &[Event::Trigger(Origin::Push), Event::Spawned];
const TO_ADOPTED: &[Event] = &[Event::Trigger(Origin::Push), Event::Spawned, Event::Adopted];
const TO_COMMITTING: &[Event] = &[Event::Trigger(Origin::Push), Event::Spawned, Event::Adopted, Event::Ready];
const TO_TRIAL: &[Event] =
    &[Event::Trigger(Origin::Push), Event::Spawned, Event::Adopted, Event::Ready, Event::GateShut];

fn then(prefix: &[Event], event: Event) -> (Stage, Vec<Action>) {
    let (upgrade, actions) = after(&[prefix, &[event]].concat());
    (upgrade.stage(), actions)
}

#[test]
fn the_good_path_goes_through_every_stage() {
    let (mut upgrade, actions) = after(TO_TRIAL);
    assert_eq!(actions[0], Action::Commit);
    assert!(upgrade.on_event(Event::TimedOut(Timer::Trial)).contains(&Action::Settle));
    assert_eq!(upgrade.stage(), Stage::Draining);
    assert!(upgrade.on_event(Event::Idle).contains(&Action::Finish));
    assert_eq!(upgrade.stage(), Stage::Drained);
}

#[test]
fn commit_is_sent_only_when_the_gate_is_shut() {
    let (upgrade, actions) = after(TO_COMMITTING);
    assert_eq!(upgrade.stage(), Stage::Committing);
    assert!(actions.contains(&Action::ShutGate) && !actions.contains(&Action::Commit));
}

#[test]
fn every_failure_before_commit_leads_back_to_serving() {
    for prefix in [TO_STARTING, TO_ADOPTED, TO_COMMITTING] {
        for failure in [Failure::Exited, Failure::ChannelBroken, Failure::Refused, Failure::GaveUp] {
            let (stage, actions) = then(prefix, Event::Failed(failure));
            assert_eq!(stage, Stage::Serving);
            assert!(actions.contains(&Action::Abort(failure)));
            assert!(actions.contains(&Action::ReportFailed(failure)));
            assert_eq!(actions.contains(&Action::OpenGate), prefix == TO_COMMITTING);
        }
    }
    for prefix in [TO_STARTING, TO_ADOPTED] {
        let (stage, actions) = then(prefix, Event::TimedOut(Timer::Ready));
        assert_eq!(stage, Stage::Serving);
        assert!(actions.contains(&Action::ReportFailed(Failure::Silent)));
    }
}

#[test]
fn in_the_trial_the_new_process_is_dead_before_the_gate_opens() {
    for failure in [Failure::Exited, Failure::ChannelBroken, Failure::GaveUp, Failure::NotAccepting] {
        let (stage, actions) = then(TO_TRIAL, Event::Failed(failure));
        assert_eq!(stage, Stage::Serving);
        let position = |action| actions.iter().position(|other| *other == action).unwrap();
        assert!(position(Action::Kill(failure)) < position(Action::OpenGate));
    }
}

#[test]
fn a_second_trigger_is_refused_at_every_stage() {
    for prefix in [TO_STARTING, TO_ADOPTED, TO_COMMITTING, TO_TRIAL] {
        let (_, actions) = then(prefix, Event::Trigger(Origin::Pull));
        assert_eq!(actions, [Action::Refuse(Refusal::UpgradeUnderWay)]);
    }
    let (_, actions) = then(&[Event::Stop], Event::Trigger(Origin::Push));
    assert_eq!(actions, [Action::Refuse(Refusal::Draining)]);
}

#[test]
fn a_stop_before_commit_aborts_the_upgrade_and_drains() {
    for prefix in [TO_STARTING, TO_ADOPTED, TO_COMMITTING] {
        let (stage, actions) = then(prefix, Event::Stop);
        assert_eq!(stage, Stage::Draining);
        assert!(actions.contains(&Action::Abort(Failure::Stopped)) && actions.contains(&Action::Drain));
    }
}

#[test]
fn a_stop_of_either_side_in_the_trial_does_not_open_the_gate_again() {
    for event in [Event::Stop, Event::NewIsStopping] {
        let (stage, actions) = then(TO_TRIAL, event);
        assert_eq!(stage, Stage::Draining);
        assert!(!actions.contains(&Action::OpenGate));
    }
}

const TO_RESTARTING: &[Event] = &[Event::Trigger(Origin::Restart), Event::Spawned];
const TO_RELEASED: &[Event] = &[Event::Trigger(Origin::Restart), Event::Spawned, Event::Adopted, Event::GateShut];

#[test]
fn a_restart_drains_as_soon_as_the_listeners_are_adopted_and_the_gate_is_shut() {
    let (stage, actions) = then(TO_RESTARTING, Event::Adopted);
    assert_eq!(stage, Stage::Committing);
    assert!(actions.contains(&Action::ShutGate) && actions.contains(&Action::Disarm(Timer::Ready)));
    let (upgrade, actions) = after(TO_RELEASED);
    assert_eq!(upgrade.stage(), Stage::Draining);
    assert_eq!(actions[..2], [Action::Release, Action::Drain]);
    assert!(!actions.contains(&Action::Commit));
}

#[test]
fn a_restart_that_fails_before_the_listeners_are_adopted_leaves_the_old_process_serving() {
    for event in [Event::Failed(Failure::Exited), Event::TimedOut(Timer::Ready)] {
        let (stage, actions) = then(TO_RESTARTING, event);
        assert_eq!(stage, Stage::Serving);
        assert!(actions.iter().any(|action| matches!(action, Action::ReportFailed(_))), "{actions:?}");
    }
    // The next one is an upgrade like any other.
    let failed = [TO_RESTARTING, &[Event::Failed(Failure::Exited)]].concat();
    let (stage, _) = then(&[&failed[..], TO_STARTING].concat(), Event::Adopted);
    assert_eq!(stage, Stage::Adopted);
    let (stage, _) = then(&[&failed[..], &[Event::Trigger(Origin::Pull)]].concat(), Event::Adopted);
    assert_eq!(stage, Stage::Adopted);
}

#[test]
fn the_loss_of_the_new_process_of_a_restart_is_told_once_and_opens_nothing() {
    let lost = Event::Failed(Failure::Exited);
    assert_eq!(then(TO_RELEASED, lost), (Stage::Draining, vec![Action::ReportLost(Failure::Exited)]));
    assert_eq!(then(&[TO_RELEASED, &[lost]].concat(), lost), (Stage::Draining, vec![]));
    let (stage, actions) = then(&[TO_RELEASED, &[Event::Idle]].concat(), lost);
    assert_eq!((stage, actions), (Stage::Drained, vec![Action::ReportLost(Failure::Exited)]));
    // One that was called off before has been reported already.
    assert_eq!(then(&[TO_RESTARTING, &[Event::Stop]].concat(), lost), (Stage::Draining, vec![]));
}

#[test]
fn a_second_stop_cuts_what_is_left() {
    let (stage, actions) = then(&[Event::Stop], Event::Stop);
    assert_eq!((stage, actions.contains(&Action::Cut)), (Stage::Draining, true));
}

#[test]
fn the_first_stop_of_a_process_that_drains_after_an_upgrade_cuts_nothing() {
    let over = [TO_TRIAL, &[Event::TimedOut(Timer::Trial)]].concat();
    assert_eq!(then(&over, Event::Stop), (Stage::Draining, vec![]));
    let (stage, actions) = then(&[&over[..], &[Event::Stop]].concat(), Event::Stop);
    assert_eq!((stage, actions.contains(&Action::Cut)), (Stage::Draining, true));
}

#[test]
fn nothing_starts_twice_and_nothing_late_matters() {
    for event in [
        Event::Spawned,
        Event::Adopted,
        Event::StillStarting,
        Event::Ready,
        Event::GateShut,
        Event::NewIsStopping,
        Event::Failed(Failure::Exited),
        Event::TimedOut(Timer::Ready),
        Event::TimedOut(Timer::Trial),
        Event::Idle,
    ] {
        assert_eq!(then(&[], event), (Stage::Serving, vec![]), "{event:?}");
    }
    for event in [Event::Adopted, Event::Ready, Event::Failed(Failure::Exited), Event::TimedOut(Timer::Trial)] {
        assert_eq!(then(&[Event::Stop], event), (Stage::Draining, vec![]), "{event:?}");
    }
}
