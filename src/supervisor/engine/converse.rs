//! The protocol with new workers that use the library: what they say, and when they are told to accept.

use super::Supervisor;
use super::answers::stage;
use crate::control::messages::{StageEvent, StageName};
use crate::control::service_of;
use crate::supervisor::conversation::{Conversation, Heard, Terms};
use crate::supervisor::machine::{Build as Which, Event, Order, WorkerId};

impl Supervisor {
    /// What a new build is offered, if the program that runs uses the library: it is known by its control socket. A new
    /// build that does not use it any more finds the sockets all the same.
    pub(super) fn terms_of(&self, order: &Order, generation: u64) -> Option<Terms> {
        let speaks = self.workers.values().any(|worker| service_of(worker.pid.as_raw()).is_ok());
        let (ready_timeout, trial) = (order.ready_timeout, order.trial);
        speaks.then_some(Terms { generation, ready_timeout, trial })
    }

    pub(super) fn terms(&self, which: Which) -> Option<Terms> {
        self.attempt.as_ref().filter(|_| which == Which::New).and_then(|attempt| attempt.terms)
    }

    pub(super) fn read_conversation(&mut self, id: WorkerId) {
        self.converse(id, Conversation::hear);
    }

    fn converse(&mut self, id: WorkerId, hear: fn(&mut Conversation) -> Option<Vec<Heard>>) {
        let Some(worker) = self.workers.get_mut(&id) else { return };
        let Some(conversation) = &mut worker.conversation else { return };
        let Some(heard) = hear(conversation) else {
            worker.conversation = None;
            return;
        };
        for one in heard {
            self.on_heard(id, one);
        }
    }

    /// All that they have said, by whatever way.
    pub(super) fn hear_workers(&mut self) {
        let ids: Vec<WorkerId> = self.workers.keys().copied().collect();
        for id in ids {
            if let Some(worker) = self.workers.get_mut(&id) {
                worker.read_notify();
                worker.read_channel();
            }
            self.converse(id, Conversation::hear_out);
        }
    }

    fn on_heard(&mut self, id: WorkerId, heard: Heard) {
        let said = |name: StageName, reason: Option<String>| {
            move |begun, pid| StageEvent { pid: Some(pid), reason, ..stage(name, begun) }
        };
        match heard {
            Heard::Adopted => self.say_of(id, said(StageName::Adopted, None)),
            Heard::Starting(reason) => {
                self.say_of(id, said(StageName::Starting, Some(reason)));
                self.tell(Event::StillStarting(id));
            }
            Heard::Ready => {
                let worker = self.workers.get_mut(&id);
                worker.into_iter().for_each(|worker| worker.proof = Some("says that it is ready".to_owned()));
            }
            Heard::Failed(cause) => {
                if let Some(attempt) = &mut self.attempt {
                    attempt.cause = Some(cause);
                }
                self.tell(Event::Refused(id));
            }
        }
    }

    /// Every new worker of the step is ready.
    pub(super) fn let_accept(&mut self) {
        self.conversations().for_each(Conversation::commit);
    }

    /// The old ones are told to stop.
    pub(super) fn settle(&mut self) {
        self.conversations().for_each(Conversation::settle);
        self.workers.values_mut().for_each(|worker| worker.conversation = None);
    }

    pub(super) fn abort_conversations(&mut self, reason: &str) {
        self.conversations().for_each(|conversation| conversation.abort(reason));
        self.workers.values_mut().for_each(|worker| worker.conversation = None);
    }

    fn conversations(&mut self) -> impl Iterator<Item = &mut Conversation> {
        self.workers.values_mut().filter_map(|worker| worker.conversation.as_mut())
    }
}
