//! Talking to a new worker that uses the library, as the old process of an upgrade talks to the new one.
//!
//! The sockets do not go this way: they are the supervisor's, and every program finds them where LISTEN_FDS says. What the
//! offer carries is the generation, and the right to say `starting`, `ready` and `gave-up`; and the worker waits for
//! `commit` before it accepts. A program that knows nothing of all that leaves the channel alone.

use std::io;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use nix::poll::PollFd;

use crate::channel::{Channel, Received, SHARES_MAX, poll_fd};
use crate::protocol::{Message, Offer, VERSIONS};
use crate::upgrade::{Action, Event, Failure, Origin, Stage, Upgrade};

/// What the offer says.
#[derive(Clone, Copy, Debug)]
pub(super) struct Terms {
    pub(super) generation: u64,
    pub(super) ready_timeout: Duration,
    pub(super) trial: Duration,
}

pub(super) struct Conversation {
    channel: Channel,
    upgrade: Upgrade,
}

/// What came of what the worker has said.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Heard {
    Adopted,
    Starting(String),
    Ready,
    /// The text completes "the new build …".
    Failed(String),
}

impl Conversation {
    /// Makes the offer, which waits in the channel until the program looks for it. The other end is for that.
    pub(super) fn begin(terms: Terms) -> io::Result<(Self, UnixStream)> {
        let (ours, theirs) = UnixStream::pair()?;
        let mut conversation = Self { channel: Channel::new(ours)?, upgrade: Upgrade::new() };
        let milliseconds = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        let offer = Offer {
            protocol: VERSIONS,
            generation: terms.generation,
            pid: std::process::id().cast_signed(),
            listeners: vec![],
            state: None,
            stderr: false,
            draining: vec![],
            ready_timeout_ms: milliseconds(terms.ready_timeout),
            trial_ms: milliseconds(terms.trial),
            build: None,
            program: None,
            restart: None,
        };
        conversation.upgrade.on_event(Event::Trigger(Origin::Push));
        conversation.upgrade.on_event(Event::Spawned);
        let sent = conversation.channel.send(&Message::Offer(offer.into()), vec![]);
        sent.map_err(|broken| io::Error::other(broken.to_string()))?;
        Ok((conversation, theirs))
    }

    pub(super) fn poll_fd(&self) -> PollFd<'_> {
        poll_fd(&self.channel, self.channel.interest())
    }

    /// The worker has the offer: from now on it is ready when it says so here, and not before.
    pub(super) fn is_adopted(&self) -> bool {
        self.upgrade.stage() != Stage::Starting
    }

    /// All that it has said by now, and not only the share of one turn: what is decided next is decided by its last word. Bounded,
    /// because it may never stop talking.
    pub(super) fn hear_out(&mut self) -> Option<Vec<Heard>> {
        let mut all = self.hear()?;
        for _ in 1..SHARES_MAX {
            if !self.channel.has_more() || matches!(all.last(), Some(Heard::Failed(_))) {
                break;
            }
            // What came before the end counts.
            let Some(heard) = self.hear() else { break };
            all.extend(heard);
        }
        Some(all)
    }

    /// What has come, a share of it in each turn. None: the channel is closed, by a program that has no use for it or that has ended.
    pub(super) fn hear(&mut self) -> Option<Vec<Heard>> {
        let mut heard = Vec::new();
        loop {
            if let Err(error) = self.channel.flush() {
                log::debug!("a worker cannot be talked to: {error}");
            }
            match self.channel.receive() {
                Ok(Received::Nothing) => return Some(heard),
                Ok(Received::Message(message)) => heard.extend(self.on_message(message)),
                Ok(Received::End) if heard.is_empty() => return None,
                Ok(Received::End) => return Some(heard),
                Err(broken) => {
                    heard.push(self.failed(Failure::ChannelBroken, broken.to_string()));
                    return Some(heard);
                }
            }
        }
    }

    fn on_message(&mut self, message: Message) -> Option<Heard> {
        use Stage as S;
        let (event, heard) = match (self.upgrade.stage(), message) {
            (S::Starting, Message::Adopted { protocol, .. }) if !(VERSIONS.min..=VERSIONS.max).contains(&protocol) => {
                let cause = format!("chose version {protocol} of the protocol, which was not offered");
                return Some(self.failed(Failure::ChannelBroken, cause));
            }
            (S::Starting, Message::Adopted { .. }) => (Event::Adopted, Heard::Adopted),
            (S::Starting, Message::Refused { reason, .. }) => {
                return Some(self.failed(Failure::Refused, format!("refused the handover: {reason}")));
            }
            (S::Adopted, Message::Starting { reason }) => (Event::StillStarting, Heard::Starting(reason)),
            (S::Adopted, Message::Ready(_)) => (Event::Ready, Heard::Ready),
            (S::Adopted | S::Committing, Message::GaveUp { reason }) => {
                return Some(self.failed(Failure::GaveUp, format!("gave up: {reason}")));
            }
            // If it ends, that is seen.
            (S::Trial, _) => return None,
            // Given up already.
            (S::Serving, _) => return None,
            (_, other) => {
                let cause = format!("sent `{}` out of turn", other.name());
                return Some(self.failed(Failure::ChannelBroken, cause));
            }
        };
        self.tell(event, "");
        Some(heard)
    }

    fn failed(&mut self, failure: Failure, cause: String) -> Heard {
        self.tell(Event::Failed(failure), &cause);
        Heard::Failed(cause)
    }

    /// Every new worker of the step is ready: this one may accept. There is no gate to shut: the old ones accept, too, until
    /// the trial is over.
    pub(super) fn commit(&mut self) {
        self.tell(Event::GateShut, "");
    }

    /// There is no way back.
    pub(super) fn settle(&mut self) {
        self.tell(Event::TimedOut(crate::upgrade::Timer::Trial), "");
    }

    /// The new build is given up. A worker that accepts already is told to stop like an old one, and finishes what it has.
    pub(super) fn abort(&mut self, reason: &str) {
        match self.upgrade.stage() {
            Stage::Trial => self.settle(),
            _ => self.tell(Event::Failed(Failure::Stopped), reason),
        }
    }

    /// What the machine wants said. The rest of an upgrade (gates, timers, deaths) is the supervisor's own machine's affair.
    fn tell(&mut self, event: Event, reason: &str) {
        for action in self.upgrade.on_event(event) {
            let message = match action {
                Action::Commit => Message::Commit,
                Action::Settle => Message::Settled,
                Action::Abort(_) => Message::Aborted { reason: format!("the upgrade is off: {reason}") },
                _ => continue,
            };
            if let Err(broken) = self.channel.send(&message, vec![]) {
                log::debug!("a worker {broken}");
            }
        }
    }
}

/// What a worker says in answer to the offer. It has adopted it before it is ready, and after a failure nothing is heard.
#[cfg(any(test, fuzzing))]
pub(crate) fn fuzz(bytes: &[u8]) {
    use std::io::Write;
    let (pieces, _) = crate::fuzz::in_pieces(bytes);
    let terms = Terms { generation: 2, ready_timeout: Duration::ZERO, trial: Duration::ZERO };
    let Ok((mut conversation, mut worker)) = Conversation::begin(terms) else { return };
    let mut all = vec![];
    for piece in pieces {
        let _ = worker.write_all(piece);
        // After each read's worth it says once that there is nothing more for now.
        for _ in 0..2 {
            all.extend(conversation.hear().unwrap_or_default());
        }
        if all.ends_with(&[Heard::Ready]) {
            conversation.commit();
        }
    }
    let place = |wanted: &Heard| all.iter().position(|heard| heard == wanted);
    assert!(place(&Heard::Adopted) <= place(&Heard::Ready) || place(&Heard::Ready).is_none(), "{all:?}");
    let failed = all.iter().position(|heard| matches!(heard, Heard::Failed(_)));
    // A channel that is broken stays so, and says it as often as it is asked.
    let after = all.iter().skip(failed.unwrap_or(all.len()));
    assert!(after.clone().all(|heard| matches!(heard, Heard::Failed(_))), "{all:?}");
    conversation.settle();
    conversation.abort("the test is over");
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::Claims;

    fn conversation() -> (Conversation, Channel) {
        let second = Duration::from_secs(1);
        let terms = Terms { generation: 2, ready_timeout: second, trial: second };
        let (conversation, theirs) = Conversation::begin(terms).unwrap();
        let mut worker = Channel::new(theirs).unwrap();
        let (offer, fds) = worker.receive_offer(std::time::Instant::now() + second).unwrap().unwrap();
        assert_eq!((offer.generation, offer.listeners.len(), fds.len()), (2, 0, 0));
        (conversation, worker)
    }

    fn says(worker: &mut Channel, message: Message) {
        worker.send(&message, vec![]).unwrap();
    }

    fn adopted() -> Message {
        Message::Adopted { protocol: VERSIONS.max, listeners: vec![], restart: false }
    }

    #[track_caller]
    fn is_told(worker: &mut Channel, message: &str) {
        // After each read's worth it says once that there is nothing more for now.
        let told = (0..2).find_map(|_| match worker.receive() {
            Ok(Received::Message(told)) => Some(told.name()),
            _ => None,
        });
        assert_eq!(told, Some(message));
    }

    #[test]
    fn a_worker_accepts_when_it_is_told_and_not_before() {
        let (mut conversation, mut worker) = conversation();
        assert!(!conversation.is_adopted());
        says(&mut worker, adopted());
        says(&mut worker, Message::Starting { reason: "cache".into() });
        says(&mut worker, Message::Ready(Claims::default()));
        assert_eq!(conversation.hear().unwrap(), [Heard::Adopted, Heard::Starting("cache".into()), Heard::Ready]);
        assert!(matches!(worker.receive(), Ok(Received::Nothing)));
        conversation.commit();
        is_told(&mut worker, "commit");
        conversation.settle();
        is_told(&mut worker, "settled");
    }

    #[test]
    fn a_worker_with_much_to_say_is_heard_out() {
        let (mut conversation, mut worker) = conversation();
        says(&mut worker, adopted());
        let reason = "x".repeat(1000);
        for _ in 0..50 {
            says(&mut worker, Message::Starting { reason: reason.clone() });
        }
        says(&mut worker, Message::Ready(Claims::default()));
        let heard = conversation.hear_out().unwrap();
        assert_eq!((heard.len(), heard.last()), (52, Some(&Heard::Ready)));
        drop(worker);
        assert!(conversation.hear_out().is_none());
    }

    #[test]
    fn one_that_gives_up_or_talks_out_of_turn_is_given_up() {
        for (message, words) in [
            (Message::GaveUp { reason: "no database".into() }, "gave up: no database"),
            (Message::Commit, "sent `commit` out of turn"),
        ] {
            let (mut conversation, mut worker) = conversation();
            says(&mut worker, adopted());
            says(&mut worker, message);
            assert_eq!(conversation.hear().unwrap(), [Heard::Adopted, Heard::Failed(words.into())]);
            is_told(&mut worker, "aborted");
            // Whatever it says after that.
            says(&mut worker, Message::Ready(Claims::default()));
            assert_eq!(conversation.hear().unwrap(), []);
        }
    }

    #[test]
    fn a_failure_elsewhere_is_told_at_every_stage_and_once() {
        for ready in [false, true] {
            let (mut conversation, mut worker) = conversation();
            if ready {
                says(&mut worker, adopted());
                says(&mut worker, Message::Ready(Claims::default()));
                conversation.hear();
                conversation.commit();
                is_told(&mut worker, "commit");
            }
            conversation.abort("worker 1 has failed");
            conversation.abort("worker 2 has failed");
            is_told(&mut worker, if ready { "settled" } else { "aborted" });
            assert!(matches!(worker.receive(), Ok(Received::Nothing)));
        }
    }

    #[test]
    fn a_program_that_knows_nothing_of_it_closes_it_and_that_is_no_failure() {
        let (mut conversation, worker) = conversation();
        drop(worker);
        assert!(conversation.hear().is_none());
    }
}
