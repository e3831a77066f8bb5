//! Every order in which an upgrade can go, tried: the two state machines of this crate as they are, under a model checker.
//!
//! The checker plays what lies around the machines: the channels with what is still on its way in them, timers, the
//! applications, the processes and their deaths, operators who ask again or stop the service. [`world`] says what each
//! action of a machine does, in the place of the [engine](crate::engine). Faults are few but may come at any step.
//!
//! That this finds faults is shown by machines that are wrong on purpose ([`Flaw`]): each must be found out.

mod world;

use std::time::Instant;

use stateright::{Checker, Model, Property};

use crate::upgrade::Origin;
use world::{Budget, Step, World};

/// A fault in the machines, or in how they are driven.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Flaw {
    CommitBeforeTheGateIsShut,
    OpensAgainBeforeTheNewProcessIsDead,
    TakesAnEndForAnAbort,
    AcceptsWhenReady,
    ForgetsTheReadyTimer,
    DrainsWithoutATrial,
    CommitsWithoutReady,
}

struct Upgrades {
    budget: Budget,
    flaw: Option<Flaw>,
}

impl Model for Upgrades {
    type State = World;
    type Action = Step;

    fn init_states(&self) -> Vec<World> {
        vec![World::new(self.budget.clone(), self.flaw)]
    }

    fn actions(&self, world: &World, steps: &mut Vec<Step>) {
        steps.extend(world.internal_steps());
        steps.extend(world.external_steps());
    }

    fn next_state(&self, world: &World, step: Step) -> Option<World> {
        let mut next = world.clone();
        next.take(step);
        Some(next)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        let mut properties = vec![
            Property::always("at most one generation accepts", |_, world: &World| world.accepting().count() <= 1),
            Property::always("somebody serves, or will without help", |_, world: &World| {
                !world.is_quiet() || world.service_was_ended() || world.accepting().count() == 1
            }),
            Property::always("every path ends: all that live serve", |_, world: &World| {
                !world.is_quiet() || world.alive().all(|process| process.has_settled_as_owner())
            }),
            Property::always("the rules of each step", |_, world: &World| world.broken_rule.is_none()),
        ];
        // That the model goes where the properties could be broken.
        properties.extend([
            Property::sometimes("a last generation serves alone", |_, world: &World| {
                world.is_quiet() && world.is_full() && world.accepting().any(|at| at + 1 == world.generations())
            }),
            Property::sometimes("an upgrade is rolled back in the trial", |_, world: &World| world.seen.rolled_back),
            Property::sometimes("an upgrade fails before commit", |_, world: &World| world.seen.failed),
            Property::sometimes("a restart goes through", |_, world: &World| world.seen.restarted),
            Property::sometimes("a second trigger is refused", |_, world: &World| world.seen.refused),
        ]);
        if self.budget.deaths > 0 {
            properties.push(Property::sometimes("a new process takes over from a dead one", |_, world: &World| {
                world.seen.taken_over
            }));
        }
        properties
    }
}

fn check(name: &str, budget: Budget) {
    let begun = Instant::now();
    let checker = Upgrades { budget: budget.clone(), flaw: None }.checker().threads(2).spawn_bfs().join();
    checker.assert_properties();
    println!(
        "{name}: {budget:?}: {} states, depth {}, {:.1} s",
        checker.unique_state_count(),
        checker.max_depth(),
        begun.elapsed().as_secs_f64()
    );
}

const SOME: Budget = Budget { generations: 3, deaths: 1, stops: 1, refused: 1, misbehaviours: 1, prolongations: 1 };

#[test]
fn one_upgrade_with_every_fault_twice() {
    check("one upgrade", Budget { generations: 2, deaths: 2, stops: 2, misbehaviours: 2, ..SOME });
}

#[test]
fn two_upgrades_with_every_fault_once() {
    check("two upgrades", SOME);
}

#[test]
fn three_upgrades_with_a_death() {
    check("three upgrades", Budget { generations: 4, deaths: 1, stops: 0, misbehaviours: 0, ..SOME });
}

#[test]
fn a_flaw_is_found() {
    for flaw in [
        Flaw::CommitBeforeTheGateIsShut,
        Flaw::OpensAgainBeforeTheNewProcessIsDead,
        Flaw::TakesAnEndForAnAbort,
        Flaw::AcceptsWhenReady,
        Flaw::ForgetsTheReadyTimer,
        Flaw::DrainsWithoutATrial,
        Flaw::CommitsWithoutReady,
    ] {
        let budget = Budget { generations: 2, ..SOME };
        let checker = Upgrades { budget, flaw: Some(flaw) }.checker().threads(2).spawn_bfs().join();
        let found = checker.discoveries();
        let broken = found.iter().find(|(name, _)| {
            checker
                .model()
                .properties()
                .iter()
                .any(|one| one.name == **name && matches!(one.expectation, stateright::Expectation::Always))
        });
        let (name, path) = broken.unwrap_or_else(|| panic!("{flaw:?} was not found"));
        println!("{flaw:?}: `{name}` is broken after {} steps", path.clone().into_actions().len());
    }
}
