//! Every order in which the life of a supervised service can go, tried: the machine as it is, under a model checker.
//!
//! The checker plays the workers, the operators and the clock. How long anything takes is left open: each deadline may pass
//! before or after whatever else can happen, in any order with the others, so what holds here holds with all durations.
//!
//! That this finds faults is shown by an engine that is wrong on purpose ([`Flaw`]): each must be found out.

mod world;

use std::time::Instant;

use stateright::{Checker, Expectation, Model, Property};

use super::Phase;
use world::{Act, Budget, CameTo, World};

/// A fault in how the machine is driven.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Flaw {
    TellsOfNoDeath,
    TakesStartedForReady,
    EndsTheTrialEarly,
    KillsNobody,
    RunsTwoInARestart,
}

struct Service {
    workers: usize,
    overlap: bool,
    budget: Budget,
    flaw: Option<Flaw>,
}

impl Model for Service {
    type State = World;
    type Action = Act;

    fn init_states(&self) -> Vec<World> {
        vec![World::new(self.workers, self.overlap, self.budget, self.flaw)]
    }

    fn actions(&self, world: &World, acts: &mut Vec<Act>) {
        if world.broken_rule.is_none() {
            acts.extend(world.internal());
            acts.extend(world.external());
        }
    }

    fn next_state(&self, world: &World, act: Act) -> Option<World> {
        let mut next = world.clone();
        next.take(act);
        Some(next)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        let mut properties = vec![
            Property::always("the rules of each step", |_, world: &World| world.broken_rule.is_none()),
            Property::always("every path ends: all serve, or all have ended", |_, world: &World| {
                !world.internal().is_empty()
                    || match world.machine.phase() {
                        Phase::Serving => world.is_at_rest() && !world.stopped,
                        Phase::Ended => world.children.is_empty(),
                        _ => false,
                    }
            }),
            Property::sometimes("a last upgrade is committed", |_, world: &World| {
                world.budget.orders == 0 && world.is_at_rest() && world.machine.generation > 1
            }),
            Property::sometimes("one fails before its trial", |_, world: &World| {
                world.came_to == CameTo::Failure { in_trial: false }
            }),
            Property::sometimes("one is cut", |_, world: &World| world.came_to == CameTo::Cut),
        ];
        if self.budget.deaths > 0 {
            properties.push(Property::sometimes("one fails in its trial", |_, world: &World| {
                world.came_to == CameTo::Failure { in_trial: true }
            }));
        }
        if self.budget.orders > 1 {
            properties.push(Property::sometimes("one is refused", |_, world: &World| world.came_to == CameTo::Refusal));
        }
        if self.budget.stops > 0 {
            properties.push(Property::sometimes("all end when they are told to", |_, world: &World| {
                world.came_to == CameTo::TheEnd && world.stopped
            }));
        }
        properties
    }
}

fn check(name: &str, workers: usize, overlap: bool, budget: Budget) {
    let begun = Instant::now();
    let service = Service { workers, overlap, budget, flaw: None };
    let checker = service.checker().threads(2).spawn_bfs().join();
    checker.assert_properties();
    println!(
        "{name}: {workers} workers, {budget:?}: {} states, depth {}, {:.1} s",
        checker.unique_state_count(),
        checker.max_depth(),
        begun.elapsed().as_secs_f64()
    );
}

const SOME: Budget = Budget { orders: 1, deaths: 1, failures: 1, scales: 0, stops: 0 };

#[test]
fn one_worker_and_every_fault() {
    check("one worker", 1, true, Budget { orders: 3, deaths: 2, failures: 2, stops: 2, ..SOME });
}

#[test]
fn two_workers_and_every_fault() {
    check("two workers", 2, true, SOME);
}

#[test]
fn two_workers_and_two_upgrades() {
    check("two upgrades", 2, true, Budget { orders: 2, failures: 0, ..SOME });
}

#[test]
fn workers_that_are_scaled() {
    check("scaled", 2, true, Budget { scales: 1, deaths: 0, failures: 0, ..SOME });
}

#[test]
fn workers_that_are_stopped() {
    check("stopped", 2, true, Budget { stops: 2, ..SOME });
}

#[test]
fn workers_that_never_run_twice() {
    check("never two", 2, false, Budget { deaths: 2, ..SOME });
}

#[test]
fn a_flaw_is_found() {
    let all = [
        Flaw::TellsOfNoDeath,
        Flaw::TakesStartedForReady,
        Flaw::EndsTheTrialEarly,
        Flaw::KillsNobody,
        Flaw::RunsTwoInARestart,
    ];
    for flaw in all {
        let service = Service { workers: 1, overlap: true, budget: SOME, flaw: Some(flaw) };
        let checker = service.checker().threads(2).spawn_bfs().join();
        let found = checker.discoveries();
        let is_broken = |name: &str| {
            let mut properties = checker.model().properties().into_iter();
            properties.any(|one| one.name == name && matches!(one.expectation, Expectation::Always))
        };
        let broken = found.iter().find(|(name, _)| is_broken(name));
        let (name, path) = broken.unwrap_or_else(|| panic!("{flaw:?} was not found"));
        let rule = path.last_state().broken_rule.unwrap_or_default();
        println!("{flaw:?}: `{name}` ({rule}) is broken after {} steps", path.clone().into_actions().len());
    }
}
