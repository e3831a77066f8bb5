//! One client: takes its turns, asks, and reports how each request ended.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::connection::{Connection, Ending};
use super::http::{self, Expected};
use super::load::{Load, Shared};
use super::outcome::{Answer, Outcome, Trouble, excerpt};
use super::tally::{Entry, Failure, Kind};
use super::target::Target;
use super::websocket::WebSocket;
use super::wire::Look;

/// Before the next request after one that failed, or an outage would be a busy loop.
const BREATH: Duration = Duration::from_millis(1);
/// How long an idle WebSocket is listened to before the client looks whether the load is over.
const LISTEN: Duration = Duration::from_millis(50);
const MAX_ECHO: usize = 64 * 1024;

/// When the next request is due.
#[derive(Clone)]
pub(super) enum Pace {
    /// As soon as the last was answered.
    Closed,
    Think(Duration),
    /// By the clock, whichever client is free.
    Rate(Arc<Schedule>),
}

pub(super) struct Schedule {
    start: Instant,
    period: f64,
    next: AtomicU64,
}

impl Schedule {
    pub(super) fn new(start: Instant, rate: f64) -> Self {
        Self { start, period: 1.0 / rate, next: AtomicU64::new(0) }
    }

    /// When the next request is due, unless time ends before.
    fn take(&self) -> Option<Instant> {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let after = Duration::try_from_secs_f64(number as f64 * self.period).ok()?;
        self.start.checked_add(after)
    }
}

pub(super) struct Client {
    pub(super) kind: Kind,
    pub(super) number: usize,
    pub(super) target: Target,
    pub(super) target_index: usize,
    pub(super) pace: Pace,
    pub(super) load: Arc<Load>,
    pub(super) shared: Arc<Shared>,
}

impl Client {
    pub(super) fn run(self) {
        let _end = End(Arc::clone(&self.shared));
        let turns = Turns { client: &self, taken: 0, failed: false };
        match self.kind {
            Kind::New | Kind::Slow | Kind::Stream | Kind::Echo => self.ask_anew(turns),
            Kind::Kept | Kind::EchoKept => self.ask_on(turns),
            Kind::WebSocket => self.converse(turns),
        }
    }

    /// Each request on its own connection.
    fn ask_anew(&self, mut turns: Turns<'_>) {
        while let Some(turn) = turns.next() {
            let question = self.question(&turn);
            let deadline = Instant::now() + self.load.patience;
            let mut exchange = self.exchange(&turn, &question);
            match Connection::open(&self.target, deadline) {
                Ok(mut connection) => {
                    exchange.opened = Some(connection.opened);
                    exchange.ask(&mut connection, deadline);
                    if exchange.trouble.is_none() {
                        if let Question::Line(_) = question {
                            connection.end_sending();
                        }
                        exchange.see_closed(connection);
                    }
                }
                Err(trouble) => exchange.fail(trouble, None),
            }
            turns.failed = exchange.report();
        }
    }

    /// All requests on one connection, for as long as the server keeps it.
    fn ask_on(&self, mut turns: Turns<'_>) {
        let mut kept: Option<Connection> = None;
        while let Some(turn) = turns.next() {
            let question = self.question(&turn);
            let deadline = Instant::now() + self.load.patience;
            let mut exchange = self.exchange(&turn, &question);
            if let Some(connection) = kept.take() {
                kept = self.ask_again(&mut exchange, connection, deadline);
            }
            if !exchange.begun {
                match Connection::open(&self.target, deadline) {
                    Ok(mut connection) => {
                        exchange.opened = Some(connection.opened);
                        exchange.ask(&mut connection, deadline);
                        kept = Some(connection);
                    }
                    Err(trouble) => exchange.fail(trouble, None),
                }
            }
            if exchange.trouble.is_some() {
                kept = None;
            } else if exchange.closes {
                if let Some(connection) = kept.take() {
                    exchange.see_closed(connection);
                }
            }
            turns.failed = exchange.report();
        }
    }

    /// Asks on a connection that has served before. If the server closed it since, the request has not begun.
    fn ask_again(
        &self,
        exchange: &mut Exchange<'_>,
        mut connection: Connection,
        deadline: Instant,
    ) -> Option<Connection> {
        match connection.look() {
            Look::Silent => {}
            Look::Closed => {
                self.shared.count(|tally| tally.closes.idle += 1);
                return None;
            }
            Look::Unread => {
                let trouble = connection.spoke_unasked();
                exchange.fail(trouble, None);
                return None;
            }
        }
        exchange.ask(&mut connection, deadline);
        if exchange.trouble.is_some() && connection.unsent() {
            // It was closed between the look and the first byte: still between two requests.
            exchange.trouble = None;
            exchange.begun = false;
            self.shared.count(|tally| tally.closes.idle += 1);
            return None;
        }
        if let Some((outcome @ Outcome::Reset, _)) = &mut exchange.trouble {
            // The server closed what it took for idle; whether that shows as an end or as a reset depends on
            // which side was faster. One name for the one fault.
            if connection.heard_nothing() {
                *outcome = Outcome::Cut;
            }
        }
        Some(connection)
    }

    fn converse(&self, mut turns: Turns<'_>) {
        let mut kept: Option<WebSocket> = None;
        while let Some(turn) = turns.next() {
            let text = format!("message {} of client {}", turn.number, self.number);
            let question = Question::Message(text);
            let mut exchange = self.exchange(&turn, &question);
            self.say(&mut exchange, &mut kept);
            turns.failed = exchange.report();
            let next = turn.due + self.load.interval;
            if let Some(trouble) = self.listen_until(next, &mut kept) {
                let silence = Question::Nothing;
                let mut exchange = self.exchange(&Turn { due: Instant::now(), ..turn }, &silence);
                exchange.fail(trouble, None);
                turns.failed = exchange.report();
            }
            self.shared.sleep_until(next);
        }
        if let Some(socket) = kept {
            socket.leave();
        }
    }

    /// Sends one message and reads its echo, on the kept WebSocket or a new one.
    fn say(&self, exchange: &mut Exchange<'_>, kept: &mut Option<WebSocket>) {
        let deadline = Instant::now() + self.load.patience;
        let opened = match kept.take() {
            Some(socket) => Ok(socket),
            None => WebSocket::open(&self.target, "/ws", deadline),
        };
        let mut socket = match opened {
            Ok(socket) => socket,
            Err(trouble) => return exchange.fail(trouble, None),
        };
        if socket.answered == 0 {
            exchange.opened = Some(socket.opened);
        }
        let Question::Message(text) = exchange.question else { return };
        match socket.echo(text, deadline) {
            Ok(answer) => {
                exchange.succeed(Some(answer));
                *kept = Some(socket);
            }
            Err(trouble) => {
                if trouble.outcome == Outcome::Announced {
                    self.shared.count(|tally| tally.closes.announced += 1);
                }
                exchange.fail(trouble, None);
            }
        }
    }

    /// Listens while nothing is to be said. Returns what went wrong.
    fn listen_until(&self, until: Instant, kept: &mut Option<WebSocket>) -> Option<Trouble> {
        let mut socket = kept.take()?;
        while Instant::now() < until && !self.shared.over() {
            match socket.idle(until.min(Instant::now() + LISTEN)) {
                Ok(()) => {}
                Err(trouble) if trouble.outcome == Outcome::Announced => {
                    self.shared.count(|tally| tally.closes.announced += 1);
                    return None;
                }
                Err(trouble) => return Some(trouble),
            }
        }
        *kept = Some(socket);
        None
    }

    fn question(&self, turn: &Turn) -> Question {
        let body = self.load.body.as_deref();
        let http = |path: &str, closes, body, expected| Question::Http {
            bytes: http::request(&self.target, path, closes, body),
            expected,
        };
        match self.kind {
            Kind::New => http("/", true, body, Expected::Identity),
            Kind::Kept => http("/", false, body, Expected::Identity),
            Kind::Slow => http(&format!("/slow/{}", self.load.slow_seconds), true, body, Expected::Identity),
            Kind::Stream => http("/stream", true, None, Expected::Lines(self.load.stream_lines)),
            Kind::Echo | Kind::EchoKept => Question::Line(format!("line {} of client {}\n", turn.number, self.number)),
            Kind::WebSocket => Question::Nothing,
        }
    }

    fn exchange<'a>(&'a self, turn: &Turn, question: &'a Question) -> Exchange<'a> {
        Exchange {
            client: self,
            question,
            due: turn.due,
            done: turn.due,
            begun: false,
            opened: None,
            answer: None,
            closes: false,
            trouble: None,
        }
    }
}

/// Tells that a client has ended, even if it panicked.
struct End(Arc<Shared>);

impl Drop for End {
    fn drop(&mut self) {
        self.0.client_ends();
    }
}

/// The turns of one client.
struct Turns<'a> {
    client: &'a Client,
    taken: u64,
    /// Whether the last request failed.
    failed: bool,
}

struct Turn {
    due: Instant,
    /// Of the turns of this client.
    number: u64,
}

impl Turns<'_> {
    /// Waits for the next turn; none when the load is over.
    fn next(&mut self) -> Option<Turn> {
        let shared = &self.client.shared;
        let now = Instant::now();
        let due = match &self.client.pace {
            Pace::Think(think) if self.taken > 0 => now + *think,
            Pace::Rate(schedule) => schedule.take()?,
            Pace::Closed if self.failed => now + BREATH,
            Pace::Closed | Pace::Think(_) => now,
        };
        if due > now {
            shared.sleep_until(due);
        }
        if !shared.ticket() {
            return None;
        }
        self.taken += 1;
        Some(Turn { due, number: self.taken })
    }
}

/// What is sent, and so what must come.
enum Question {
    Http { bytes: Vec<u8>, expected: Expected },
    Line(String),
    Message(String),
    Nothing,
}

impl Question {
    fn bytes(&self) -> &[u8] {
        match self {
            Question::Http { bytes, .. } => bytes,
            Question::Line(text) | Question::Message(text) => text.as_bytes(),
            Question::Nothing => b"",
        }
    }

    /// Reads the answer; says who gave it and whether the server announced a close.
    fn answer(&self, connection: &mut Connection) -> Result<(Option<Answer>, bool), Trouble> {
        match self {
            Question::Http { expected, .. } => {
                let response = http::response(connection)?;
                Ok((expected.check(&response.body)?, response.closes))
            }
            Question::Line(text) => {
                let line = connection.line(MAX_ECHO)?;
                match Answer::parse(&line) {
                    Some((answer, rest)) if rest.strip_prefix(b" ") == Some(text.as_bytes()) => {
                        Ok((Some(answer), false))
                    }
                    _ => Err(Trouble::wrong("not the echo")),
                }
            }
            Question::Message(_) | Question::Nothing => Ok((None, false)),
        }
    }
}

/// One request, from the time it was due to its end.
struct Exchange<'a> {
    client: &'a Client,
    question: &'a Question,
    due: Instant,
    done: Instant,
    begun: bool,
    /// Set if this is the first request of its connection.
    opened: Option<Instant>,
    answer: Option<Answer>,
    closes: bool,
    trouble: Option<(Outcome, String)>,
}

impl Exchange<'_> {
    fn ask(&mut self, connection: &mut Connection, deadline: Instant) {
        let result = connection.send(self.question.bytes(), deadline).and_then(|()| {
            let answer = self.question.answer(connection)?;
            connection.nothing_follows()?;
            Ok(answer)
        });
        match result {
            Ok((answer, closes)) => {
                connection.answered += 1;
                self.closes = closes;
                self.succeed(answer);
            }
            Err(trouble) => self.fail(trouble, Some(connection)),
        }
    }

    fn succeed(&mut self, answer: Option<Answer>) {
        self.begun = true;
        self.done = Instant::now();
        self.answer = answer;
    }

    fn fail(&mut self, trouble: Trouble, connection: Option<&Connection>) {
        self.begun = true;
        self.done = Instant::now();
        let came = connection.map(|connection| connection.came(&trouble.reason));
        self.trouble = Some((trouble.outcome, came.unwrap_or(trouble.reason)));
    }

    /// The answer is complete; how the server closes decides only whether more came than was due.
    fn see_closed(&mut self, connection: Connection) {
        let shared = &self.client.shared;
        match connection.see_closed() {
            // Here the client had asked for it.
            Ok(Ending::Closed) if self.client.kind != Kind::Kept => {}
            Ok(ending) => shared.count(|tally| match ending {
                Ending::Closed => tally.closes.announced += 1,
                Ending::Reset => tally.closes.reset += 1,
                Ending::LeftOpen => tally.closes.left_open += 1,
            }),
            Err(trouble) => self.fail(trouble, None),
        }
    }

    /// Counts the request; true if it did not end well.
    fn report(self) -> bool {
        let outcome = self.trouble.as_ref().map_or(Outcome::Ok, |(outcome, _)| *outcome);
        let Client { kind, target_index, .. } = *self.client;
        let entry = Entry {
            kind,
            outcome,
            due: self.due,
            done: self.done,
            answer: self.answer.filter(|_| outcome == Outcome::Ok),
            opened: self.opened.map(|opened| (target_index, opened)),
        };
        let failure = self.trouble.map(|(outcome, came)| {
            let target = self.client.target.to_string();
            (outcome, target, excerpt(self.question.bytes()), came)
        });
        self.client.shared.count(|tally| {
            tally.record(&entry);
            if let Some((outcome, target, sent, came)) = failure {
                let at = entry.done.saturating_duration_since(tally.started());
                tally.describe(Failure { at, kind, outcome, target, sent, came });
            }
        });
        outcome != Outcome::Ok
    }
}
