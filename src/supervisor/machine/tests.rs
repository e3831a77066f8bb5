use super::*;

const SECOND: Duration = Duration::from_secs(1);

/// A machine with a clock of its own, and what it last wanted done.
struct Driven {
    machine: Machine,
    now: Instant,
    actions: Vec<Action>,
}

fn order() -> Order {
    Order { ready_timeout: 30 * SECOND, trial: SECOND, drain_timeout: 60 * SECOND, step: usize::MAX, overlap: true }
}

impl Driven {
    fn new(workers: usize, overlap: bool) -> Self {
        let (ready_timeout, drain_timeout) = (30 * SECOND, 60 * SECOND);
        let policy = Policy { workers, ready_timeout, drain_timeout, max_draining: 4, overlap };
        Self { machine: Machine::new(policy), now: Instant::now(), actions: vec![] }
    }

    fn serving(workers: usize) -> Self {
        let mut driven = Self::new(workers, true);
        driven.tell(Event::Start(Order { trial: Duration::ZERO, ..order() }));
        for id in 0..workers as u64 {
            driven.tell(Event::Ready(id));
        }
        assert_eq!(driven.machine.phase(), Phase::Serving);
        driven
    }

    fn tell(&mut self, event: Event) -> &[Action] {
        self.actions = self.machine.on_event(event, self.now);
        &self.actions
    }

    fn after(&mut self, time: Duration) -> &[Action] {
        self.now += time;
        self.tell(Event::Tick)
    }

    fn spawned(&self) -> Vec<(WorkerId, u64, Build)> {
        let spawn = |action: &Action| match action {
            Action::Spawn { worker, generation, build, .. } => Some((*worker, *generation, *build)),
            _ => None,
        };
        self.actions.iter().filter_map(spawn).collect()
    }
}

#[test]
fn the_first_generation_is_committed_when_all_are_ready() {
    let mut driven = Driven::new(2, true);
    driven.tell(Event::Start(Order { trial: Duration::ZERO, ..order() }));
    assert_eq!(driven.spawned(), [(0, 1, Build::New), (1, 1, Build::New)]);
    assert_eq!(driven.tell(Event::Ready(1)), []);
    assert_eq!(driven.machine.phase(), Phase::Starting);
    assert_eq!(driven.tell(Event::Ready(0)), [Action::LetAccept, Action::AllReady, Action::Commit]);
    assert_eq!((driven.machine.generation(), driven.machine.phase()), (1, Phase::Serving));
}

#[test]
fn a_first_generation_that_fails_is_the_end() {
    let mut driven = Driven::new(2, true);
    driven.tell(Event::Start(order()));
    let failed = Action::Fail { failure: Failure::Exited, worker: Some(1), in_trial: false };
    assert_eq!(driven.tell(Event::Exited(1)), [Action::Kill(0), failed]);
    assert_eq!(driven.tell(Event::Exited(0)), [Action::Finish]);
}

#[test]
fn no_old_worker_is_told_to_stop_before_all_new_ones_have_outlived_the_trial() {
    let mut driven = Driven::serving(2);
    driven.tell(Event::Upgrade(order()));
    assert_eq!(driven.spawned(), [(2, 2, Build::New), (3, 2, Build::New)]);
    assert_eq!(driven.tell(Event::Ready(2)), []);
    assert_eq!(driven.tell(Event::Ready(3)), [Action::LetAccept, Action::AllReady]);
    assert_eq!(driven.after(SECOND / 2), []);
    assert_eq!(driven.machine.phase(), Phase::Trial);
    assert_eq!(driven.after(SECOND / 2), [Action::Commit, Action::Stop(0), Action::Stop(1)]);
    assert_eq!(driven.machine.generation(), 2);
    assert_eq!(driven.tell(Event::Exited(0)), []);
    assert_eq!(driven.after(60 * SECOND), [Action::Cut(1)]);
    assert_eq!(driven.tell(Event::Exited(1)), []);
    assert_eq!(driven.machine.workers().count(), 2);
}

#[test]
fn one_new_worker_that_fails_rolls_all_back() {
    for (event, wait, failure) in [
        (Some(Event::Exited(3)), Duration::ZERO, Failure::Exited),
        (Some(Event::NotSpawned(3)), Duration::ZERO, Failure::NotSpawned),
        (None, 30 * SECOND, Failure::Silent),
    ] {
        let mut driven = Driven::serving(2);
        driven.tell(Event::Upgrade(order()));
        driven.tell(Event::Ready(2));
        driven.now += wait;
        let actions = driven.tell(event.unwrap_or(Event::Tick)).to_vec();
        // The one that is ready has clients by now; the one that is silent is not worth waiting for.
        let dismissed = if failure == Failure::Silent { vec![Action::Dismiss(3)] } else { vec![] };
        let failed = Action::Fail { failure, worker: Some(3), in_trial: false };
        assert_eq!(actions, [vec![Action::Stop(2)], dismissed, vec![failed]].concat());
        assert_eq!((driven.machine.generation(), driven.machine.phase()), (1, Phase::Serving));
        for id in [0, 1] {
            assert_eq!(driven.machine.worker(id).unwrap().stage, Stage::Ready);
        }
        driven.tell(Event::Exited(2));
        driven.tell(Event::Exited(3));
        assert_eq!(driven.spawned(), []);
        assert_eq!(driven.machine.workers().count(), 2);
    }
}

#[test]
fn a_death_in_the_trial_rolls_back_too() {
    let mut driven = Driven::serving(1);
    driven.tell(Event::Upgrade(order()));
    driven.tell(Event::Ready(1));
    let failed = Action::Fail { failure: Failure::Exited, worker: Some(1), in_trial: true };
    assert_eq!(driven.tell(Event::Exited(1)), [failed]);
    assert_eq!(driven.machine.generation(), 1);
}

#[test]
fn a_second_upgrade_meanwhile_is_refused_and_so_are_too_many_that_drain() {
    let mut driven = Driven::serving(1);
    driven.tell(Event::Upgrade(order()));
    assert_eq!(driven.tell(Event::Upgrade(order())), [Action::Refuse(Refusal::UnderWay)]);
    assert_eq!(driven.tell(Event::Scale(2)), [Action::Refuse(Refusal::UnderWay)]);
    let mut driven = Driven::serving(1);
    for id in 1..=4 {
        driven.tell(Event::Upgrade(Order { trial: Duration::ZERO, ..order() }));
        driven.tell(Event::Ready(id));
    }
    assert_eq!(driven.machine.generation(), 5);
    assert_eq!(driven.tell(Event::Upgrade(order())), [Action::Refuse(Refusal::TooManyDraining)]);
    driven.tell(Event::Exited(0));
    driven.tell(Event::Upgrade(order()));
    assert_eq!(driven.spawned().len(), 1);
}

/// A worker that is started again in the middle of an upgrade comes after the new ones, and is of the old generation still.
#[test]
fn a_generation_that_drains_is_counted_once() {
    let mut driven = Driven::serving(2);
    let at_once = Order { trial: Duration::ZERO, ..order() };
    driven.tell(Event::Upgrade(at_once));
    driven.tell(Event::Exited(1));
    assert_eq!(driven.spawned(), [(4, 1, Build::Committed)]);
    driven.tell(Event::Ready(2));
    driven.tell(Event::Ready(3));
    for id in [5, 7] {
        driven.tell(Event::Upgrade(at_once));
        driven.tell(Event::Ready(id));
        driven.tell(Event::Ready(id + 1));
    }
    assert_eq!(driven.machine.generation(), 4);
    driven.tell(Event::Upgrade(at_once));
    assert_eq!(driven.spawned().len(), 2);
}

/// Each leaves a worker that has clients by then, of the same generation as the next.
#[test]
fn too_many_that_failed_and_still_drain_are_too_many_as_well() {
    let mut driven = Driven::serving(2);
    for id in [2, 4, 6, 8] {
        driven.tell(Event::Upgrade(Order { drain_timeout: Duration::ZERO, ..order() }));
        driven.tell(Event::Ready(id));
        driven.tell(Event::Exited(id + 1));
        assert_eq!(driven.machine.phase(), Phase::Serving);
    }
    assert_eq!(driven.tell(Event::Upgrade(order())), [Action::Refuse(Refusal::TooManyDraining)]);
    driven.tell(Event::Exited(2));
    driven.tell(Event::Upgrade(order()));
    assert_eq!(driven.spawned().len(), 2);
}

#[test]
fn a_crashed_worker_is_started_again_from_the_committed_build_with_growing_delays() {
    let mut driven = Driven::serving(1);
    driven.now += SECOND;
    driven.tell(Event::Exited(0));
    assert_eq!(driven.spawned(), [(1, 1, Build::Committed)]);
    let mut delays = vec![];
    for id in 1..14 {
        driven.tell(Event::Exited(id));
        let [Action::Crashed { times, delay, .. }] = driven.actions[..] else { panic!("{:?}", driven.actions) };
        assert_eq!(u64::from(times), id + 1);
        delays.push(delay.as_millis());
        driven.after(delay);
        assert_eq!(driven.spawned(), [(id + 1, 1, Build::Committed)]);
    }
    assert_eq!(delays[..4], [100, 200, 400, 800]);
    assert_eq!(delays[12], 30_000);
    driven.tell(Event::Ready(14));
    driven.now += STEADY_AFTER;
    driven.tell(Event::Exited(14));
    assert_eq!(driven.spawned(), [(15, 1, Build::Committed)]);
    assert_eq!(driven.machine.crashes(0), 1);
}

#[test]
fn a_restarted_worker_that_never_becomes_ready_is_a_crash_too() {
    let mut driven = Driven::serving(1);
    driven.tell(Event::Exited(0));
    assert_eq!(driven.after(30 * SECOND), [Action::Kill(1)]);
    driven.tell(Event::Exited(1));
    assert!(matches!(driven.actions[..], [Action::Crashed { times: 2, .. }]), "{:?}", driven.actions);
}

#[test]
fn a_worker_that_asks_for_time_has_it_also_after_a_crash() {
    let mut driven = Driven::serving(1);
    driven.tell(Event::Exited(0));
    driven.tell(Event::NeedsTime(1, 45 * SECOND));
    // What is asked for is from now on, and never less than there was.
    driven.tell(Event::NeedsTime(1, SECOND));
    assert_eq!(driven.after(40 * SECOND), []);
    driven.tell(Event::NeedsTime(1, Duration::MAX));
    assert_eq!(driven.after(MORE_TIME_MAX), [Action::Kill(1)]);
    driven.tell(Event::NeedsTime(1, SECOND));
    driven.tell(Event::Exited(1));
    assert!(matches!(driven.actions[..], [Action::Crashed { times: 2, .. }]), "{:?}", driven.actions);
}

#[test]
fn an_old_worker_that_crashes_during_an_upgrade_is_started_again() {
    let mut driven = Driven::serving(1);
    driven.tell(Event::Upgrade(order()));
    driven.tell(Event::Exited(0));
    assert_eq!(driven.spawned(), [(2, 1, Build::Committed)]);
    driven.tell(Event::Ready(1));
    assert_eq!(driven.after(SECOND), [Action::Commit, Action::Stop(2)]);
}

#[test]
fn a_stop_ends_an_upgrade_and_a_second_one_cuts() {
    let mut driven = Driven::serving(1);
    driven.tell(Event::Upgrade(order()));
    let failed = Action::Fail { failure: Failure::Stopped, worker: None, in_trial: false };
    assert_eq!(driven.tell(Event::Stop(None)), [Action::Dismiss(1), failed, Action::Drain, Action::Stop(0)]);
    assert_eq!(driven.tell(Event::Upgrade(order())), [Action::Refuse(Refusal::Stopping)]);
    assert_eq!(driven.tell(Event::StopNow), [Action::Cut(0), Action::Cut(1)]);
    assert_eq!(driven.tell(Event::Exited(1)), []);
    assert_eq!(driven.tell(Event::Exited(0)), [Action::Finish]);
}

#[test]
fn a_stop_that_names_a_time_changes_a_drain_under_way() {
    let mut driven = Driven::serving(1);
    driven.tell(Event::Stop(None));
    driven.tell(Event::Stop(Some(SECOND)));
    assert_eq!(driven.after(SECOND), [Action::Cut(0)]);
    // It does not die.
    assert_eq!(driven.after(KILL_TIMEOUT), [Action::Abandon(0), Action::Finish]);
}

#[test]
fn in_steps_the_next_slots_wait_until_the_old_workers_are_gone() {
    let mut driven = Driven::serving(3);
    driven.tell(Event::Upgrade(Order { step: 2, ..order() }));
    assert_eq!(driven.spawned().len(), 2);
    driven.tell(Event::Ready(3));
    driven.tell(Event::Ready(4));
    assert_eq!(driven.after(SECOND), [Action::Stop(0), Action::Stop(1)]);
    assert_eq!(driven.tell(Event::Exited(0)), []);
    driven.tell(Event::Exited(1));
    assert_eq!(driven.spawned(), [(5, 2, Build::New)]);
    // The third fails: two old ones are missing, and are started again.
    let failed = Action::Fail { failure: Failure::Exited, worker: Some(5), in_trial: false };
    let actions = driven.tell(Event::Exited(5)).to_vec();
    assert_eq!(actions[..1], [failed]);
    assert_eq!(driven.spawned(), [(6, 1, Build::Committed), (7, 1, Build::Committed)]);
    // The new ones that serve are relieved by them.
    assert_eq!(driven.tell(Event::Upgrade(order())), [Action::Refuse(Refusal::UnderWay)]);
    assert_eq!(driven.tell(Event::Ready(6)), [Action::Stop(3)]);
    assert_eq!(driven.tell(Event::Ready(7)), [Action::Stop(4)]);
}

/// Or nobody could ever put it right: the build that serves in that place is one that has failed.
#[test]
fn one_that_cannot_be_rolled_back_can_be_upgraded() {
    let mut driven = Driven::serving(2);
    driven.tell(Event::Upgrade(Order { step: 1, trial: Duration::ZERO, ..order() }));
    driven.tell(Event::Ready(2));
    driven.tell(Event::Exited(0));
    assert_eq!(driven.spawned(), [(3, 2, Build::New)]);
    // The second new one fails, and the old build does not come up any more in the place of the first.
    driven.tell(Event::Exited(3));
    assert_eq!(driven.spawned(), [(4, 1, Build::Committed)]);
    assert_eq!(driven.tell(Event::Upgrade(order())), [Action::Refuse(Refusal::UnderWay)]);
    driven.tell(Event::Exited(4));
    assert_eq!(driven.spawned(), [(5, 1, Build::Committed)]);
    // Another build, which fails as well, and one that does not. Whoever serves goes on serving.
    driven.tell(Event::Upgrade(order()));
    assert_eq!(driven.spawned(), [(6, 3, Build::New), (7, 3, Build::New)]);
    driven.tell(Event::Ready(6));
    assert_eq!(driven.machine.phase(), Phase::Upgrading);
    let failed = Action::Fail { failure: Failure::Exited, worker: Some(7), in_trial: false };
    assert_eq!(driven.tell(Event::Exited(7)), [failed]);
    driven.tell(Event::Upgrade(order()));
    assert_eq!(driven.spawned(), [(8, 4, Build::New), (9, 4, Build::New)]);
    // It is up again after all, and is not waited for.
    driven.tell(Event::Ready(5));
    driven.tell(Event::Ready(8));
    driven.tell(Event::Ready(9));
    let stopped = [1, 2, 5, 6].map(Action::Stop);
    assert_eq!(driven.after(SECOND), [vec![Action::Commit], stopped.to_vec()].concat());
    assert_eq!(driven.machine.generation(), 4);
}

/// While nobody can upgrade it, what has failed before is told to stop where the old build is back.
#[test]
fn whatever_failed_is_relieved_also_after_another_failure() {
    let mut driven = Driven::serving(2);
    driven.tell(Event::Upgrade(Order { step: 1, trial: Duration::ZERO, ..order() }));
    driven.tell(Event::Ready(2));
    driven.tell(Event::Exited(0));
    driven.tell(Event::Exited(3));
    driven.tell(Event::Exited(4));
    driven.tell(Event::Upgrade(order()));
    driven.tell(Event::Ready(5));
    let failed = Action::Fail { failure: Failure::Exited, worker: Some(7), in_trial: false };
    assert_eq!(driven.tell(Event::Exited(7)), [Action::Stop(2), Action::Dismiss(6), failed]);
}

#[test]
fn one_that_is_killed_because_it_is_never_ready_is_not_followed_before_it_is_dead() {
    let mut driven = Driven::serving(2);
    driven.tell(Event::Exited(0));
    assert_eq!(driven.after(30 * SECOND), [Action::Kill(2)]);
    driven.tell(Event::Exited(1));
    assert_eq!(driven.spawned(), [(3, 1, Build::Committed)]);
    driven.tell(Event::Exited(2));
    assert!(matches!(driven.actions[..], [Action::Crashed { slot: 0, times: 2, .. }]), "{:?}", driven.actions);
}

#[test]
fn without_overlap_the_old_one_goes_first_and_comes_back_if_the_new_one_fails() {
    let mut driven = Driven::new(1, false);
    driven.tell(Event::Start(Order { trial: Duration::ZERO, ..order() }));
    driven.tell(Event::Ready(0));
    let alone = Order { overlap: false, ..order() };
    assert_eq!(driven.tell(Event::Upgrade(alone)), [Action::Stop(0)]);
    driven.tell(Event::Exited(0));
    assert_eq!(driven.spawned(), [(1, 2, Build::New)]);
    driven.tell(Event::Ready(1));
    assert_eq!(driven.after(SECOND), [Action::Commit]);
    driven.tell(Event::Upgrade(alone));
    driven.tell(Event::Exited(1));
    // The new one hangs, is killed, and must be gone before the old build runs again.
    let actions = driven.after(30 * SECOND).to_vec();
    assert_eq!(actions[0], Action::Dismiss(2));
    assert_eq!(driven.spawned(), []);
    driven.tell(Event::Exited(2));
    assert_eq!(driven.spawned(), [(3, 2, Build::Committed)]);
}

/// A restart of a program that usually runs twice in an upgrade.
#[test]
fn a_restart_ends_all_at_once_also_those_that_drain_and_comes_back_if_the_new_build_fails() {
    let restart = Order { overlap: false, trial: Duration::ZERO, drain_timeout: 10 * SECOND, ..order() };
    let mut driven = Driven::serving(1);
    driven.tell(Event::Upgrade(Order { trial: Duration::ZERO, drain_timeout: Duration::ZERO, ..order() }));
    driven.tell(Event::Ready(1));
    assert_eq!(driven.tell(Event::Upgrade(restart)), [Action::Stop(1)]);
    assert_eq!(driven.tell(Event::Exited(1)), []);
    // The first would drain for ever.
    assert_eq!(driven.after(10 * SECOND), [Action::Cut(0)]);
    driven.tell(Event::Exited(0));
    assert_eq!((driven.actions[0], driven.spawned()), (Action::Cleared, vec![(2, 3, Build::New)]));
    // Two never run at once on the way back either.
    driven.after(30 * SECOND);
    assert_eq!((driven.actions[0], driven.spawned()), (Action::Dismiss(2), vec![]));
    driven.tell(Event::Exited(2));
    assert_eq!(driven.spawned(), [(3, 2, Build::Committed)]);
    driven.tell(Event::Ready(3));
    // The next upgrade is one as before.
    driven.tell(Event::Upgrade(order()));
    assert_eq!(driven.spawned(), [(4, 3, Build::New)]);
}

#[test]
fn scaling_starts_and_stops_workers_of_the_committed_build() {
    let mut driven = Driven::serving(2);
    driven.tell(Event::Scale(4));
    assert_eq!(driven.spawned(), [(2, 1, Build::Committed), (3, 1, Build::Committed)]);
    assert_eq!(driven.tell(Event::Scale(1)), [Action::Stop(1), Action::Stop(2), Action::Stop(3)]);
    for id in 1..=3 {
        assert_eq!(driven.tell(Event::Exited(id)), []);
    }
}

/// Whatever happens in whatever order: unless told to stop, the machine itself never takes the last ready worker away,
/// never runs two rolls at once, and comes to rest with every slot filled.
#[test]
fn somebody_always_serves() {
    let mut seed = 1_u64;
    let mut random = move |below: u64| {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        seed % below
    };
    for round in 0..3000 {
        let workers = 1 + random(3) as usize;
        let mut driven = Driven::serving(workers);
        // A restart takes them all away, to start others when they are gone.
        let restarts = round % 3 == 0;
        for _ in 0..60 {
            let ids: Vec<WorkerId> = driven.machine.workers().map(|(id, _)| id).collect();
            let any = ids.get(random(ids.len().max(1) as u64) as usize).copied().unwrap_or_default();
            let was_ready = |machine: &Machine| {
                machine
                    .workers()
                    .filter(|(_, worker)| worker.stage == Stage::Ready)
                    .map(|(id, _)| id)
                    .collect::<Vec<_>>()
            };
            let before = was_ready(&driven.machine);
            let (event, died) = match random(8) {
                0 if restarts => (Event::Upgrade(Order { overlap: random(2) == 0, ..order() }), None),
                0 => (Event::Upgrade(Order { step: 1 + random(3) as usize, ..order() }), None),
                1 | 2 => (Event::Ready(any), None),
                3 => (Event::Exited(any), Some(any)),
                4 => (Event::NotSpawned(any), Some(any)),
                _ => (Event::Tick, None),
            };
            driven.now += Duration::from_millis(random(2500));
            driven.tell(event);
            let survivors = before.iter().filter(|id| Some(**id) != died).count();
            let serve = was_ready(&driven.machine).len();
            assert!(survivors == 0 || serve > 0 || restarts, "{:?} {:?}", driven.actions, driven.machine);
        }
        // Everybody behaves from now on.
        for _ in 0..200 {
            let ids: Vec<(WorkerId, Stage)> = driven.machine.workers().map(|(id, worker)| (id, worker.stage)).collect();
            for (id, stage) in ids {
                match stage {
                    Stage::Starting { .. } => drop(driven.tell(Event::Ready(id)).len()),
                    Stage::Stopping { .. } | Stage::Killed { .. } => drop(driven.tell(Event::Exited(id)).len()),
                    Stage::Ready => {}
                }
            }
            driven.after(SECOND);
        }
        assert_eq!(driven.machine.phase(), Phase::Serving);
        assert_eq!(driven.machine.workers().count(), workers, "{:?}", driven.machine);
        let generation = driven.machine.generation();
        assert!(driven.machine.workers().all(|(_, worker)| worker.generation == generation));
    }
}
