//! The new side of an upgrade: the one place that branches on its stage.
//!
//! Like [`Upgrade`](crate::upgrade::Upgrade) a plain value without I/O. A first generation is the same machine with no
//! old process: `Starting` to `Owner` as soon as the application is ready.
//!
//! ```text
//!  Starting ─ app ready ▶ Ready ─ commit ▶ Trial ─ settled ▶ Owner
//!     │ │                   │ │              └── old process died ──▶ Owner
//!     │ └ old process died ─┴─│─ (when ready) ──────────────────────▶ Owner
//!     └── aborted, gave up ───┴──▶ Refused
//! ```

pub(crate) mod receive;
pub(crate) mod restart;
pub(crate) mod socket_activation;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Stage {
    /// The application starts up; the gate is shut.
    Starting { old_process: bool },
    /// Ready, and the old process knows; commit has not come yet.
    Ready,
    /// Accepts; the old process would take over again.
    Trial,
    /// Accepts; nobody else does or will.
    Owner,
    /// The upgrade is off for this process.
    Refused,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Event {
    AppReady,
    AppStillStarting,
    AppGaveUp,
    Commit,
    Settled,
    Aborted,
    /// End of file or garbage: without a word before it, the old process died.
    ChannelEnded,
    Stop,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Action {
    SendStarting,
    SendReady,
    SendGaveUp,
    SendStopping,
    /// Lets this process accept, after stderr is put in place.
    OpenGate,
    ShutGate,
    /// Tells the application that it will never own the listeners.
    Refuse,
    /// This process may be upgraded in turn.
    Own,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Inherit {
    stage: Stage,
}

impl Inherit {
    pub(crate) fn new(old_process: bool) -> Self {
        Self { stage: Stage::Starting { old_process } }
    }

    pub(crate) fn stage(&self) -> Stage {
        self.stage
    }

    pub(crate) fn owns(&self) -> bool {
        self.stage == Stage::Owner
    }

    pub(crate) fn on_event(&mut self, event: Event) -> Vec<Action> {
        use Action as A;
        use Event as E;
        use Stage as S;
        let (next, actions) = match (self.stage, event) {
            (S::Starting { old_process: true }, E::AppReady) => (S::Ready, vec![A::SendReady]),
            (S::Starting { old_process: false }, E::AppReady) => (S::Owner, vec![A::OpenGate, A::Own]),
            (S::Starting { old_process: true }, E::AppStillStarting) => (self.stage, vec![A::SendStarting]),
            (S::Ready, E::Commit) => (S::Trial, vec![A::OpenGate]),
            (S::Trial, E::Settled) => (S::Owner, vec![A::Own]),

            (S::Starting { .. }, E::ChannelEnded) => (S::Starting { old_process: false }, vec![]),
            (S::Ready, E::ChannelEnded) => (S::Owner, vec![A::OpenGate, A::Own]),
            (S::Trial, E::ChannelEnded) => (S::Owner, vec![A::Own]),

            (S::Starting { old_process: true } | S::Ready, E::AppGaveUp | E::Stop) => {
                (S::Refused, vec![A::SendGaveUp, A::Refuse])
            }
            (S::Starting { old_process: false }, E::AppGaveUp | E::Stop) => (S::Refused, vec![A::Refuse]),
            (S::Starting { .. } | S::Ready, E::Aborted) => (S::Refused, vec![A::Refuse]),
            (S::Trial, E::Aborted) => (S::Refused, vec![A::ShutGate, A::Refuse]),
            (S::Trial, E::Stop) => (S::Owner, vec![A::SendStopping, A::Own]),

            (stage, _) => (stage, vec![]),
        };
        self.stage = next;
        actions
    }
}

/// The variables that say what this process is given.
#[cfg(any(test, fuzzing))]
pub(crate) fn fuzz(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    receive::fuzz(&text);
    socket_activation::fuzz(&text);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(old_process: bool, events: &[Event]) -> (Stage, Vec<Action>) {
        let mut inherit = Inherit::new(old_process);
        let actions = events.iter().flat_map(|event| inherit.on_event(*event)).collect();
        (inherit.stage(), actions)
    }

    #[test]
    fn a_first_generation_owns_when_it_is_ready() {
        assert_eq!(run(false, &[Event::AppReady]), (Stage::Owner, vec![Action::OpenGate, Action::Own]));
    }

    #[test]
    fn a_new_generation_accepts_only_after_commit() {
        let (stage, actions) = run(true, &[Event::AppStillStarting, Event::AppReady]);
        assert_eq!((stage, actions), (Stage::Ready, vec![Action::SendStarting, Action::SendReady]));
        let (stage, actions) = run(true, &[Event::AppReady, Event::Commit]);
        assert_eq!((stage, actions), (Stage::Trial, vec![Action::SendReady, Action::OpenGate]));
        assert_eq!(run(true, &[Event::AppReady, Event::Commit, Event::Settled]).0, Stage::Owner);
    }

    /// A commit that nobody could have sent opens nothing.
    #[test]
    fn commit_without_ready_is_ignored() {
        let starting = Stage::Starting { old_process: true };
        assert_eq!(run(true, &[Event::Commit, Event::Settled]), (starting, vec![]));
    }

    #[test]
    fn the_death_of_the_old_process_makes_it_take_over() {
        assert_eq!(run(true, &[Event::ChannelEnded, Event::AppReady]).0, Stage::Owner);
        for events in [&[Event::AppReady][..], &[Event::AppReady, Event::Commit]] {
            let (stage, actions) = run(true, &[events, &[Event::ChannelEnded]].concat());
            assert_eq!(stage, Stage::Owner);
            assert_eq!(actions.iter().filter(|action| **action == Action::OpenGate).count(), 1);
        }
    }

    #[test]
    fn after_an_abort_the_end_of_the_channel_opens_nothing() {
        for events in [&[][..], &[Event::AppReady]] {
            let rest = [Event::Aborted, Event::ChannelEnded, Event::AppReady, Event::Commit];
            let (stage, actions) = run(true, &[events, &rest].concat());
            assert_eq!(stage, Stage::Refused);
            assert!(!actions.contains(&Action::OpenGate));
        }
    }

    #[test]
    fn a_stop_before_commit_gives_up_and_in_the_trial_is_told() {
        assert!(run(true, &[Event::Stop]).1.contains(&Action::SendGaveUp));
        assert!(run(true, &[Event::AppReady, Event::Stop]).1.contains(&Action::SendGaveUp));
        assert!(run(true, &[Event::AppReady, Event::Commit, Event::Stop]).1.contains(&Action::SendStopping));
    }
}
