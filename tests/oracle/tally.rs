//! What was counted.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::ops::Bound;
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use serde_json::{Value, json};

use super::outcome::{Answer, Outcome};
use super::standstill;

/// Failures that are kept with all that is known of them.
pub const MAX_FAILURES: usize = 20;
/// A server that names more generations or pids than this is not believed; the rest is not listed.
const MAX_LISTED: usize = 10_000;
const MAX_LATENCY_MICROSECONDS: u64 = 600_000_000;

/// A kind of load.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// A new connection for every request.
    New,
    Kept,
    Slow,
    Stream,
    WebSocket,
    /// A line on a new connection.
    Echo,
    /// Lines on a kept connection.
    EchoKept,
}

impl Kind {
    pub fn name(self) -> &'static str {
        match self {
            Kind::New => "new",
            Kind::Kept => "kept",
            Kind::Slow => "slow",
            Kind::Stream => "stream",
            Kind::WebSocket => "websocket",
            Kind::Echo => "echo",
            Kind::EchoKept => "echo_kept",
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// One of the first failures.
#[derive(Clone, Debug)]
pub struct Failure {
    /// Since the start of the load.
    pub at: Duration,
    pub kind: Kind,
    pub outcome: Outcome,
    pub target: String,
    pub sent: String,
    pub came: String,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { at, kind, outcome, target, sent, came } = self;
        write!(f, "{:.6} s, {kind} to {target}, {outcome}: sent {sent}; came {came}", at.as_secs_f64())
    }
}

/// How the server let go of connections without losing a request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Closes {
    /// Announced, then closed.
    pub announced: u64,
    /// Closed between two requests.
    pub idle: u64,
    /// Reset after the last answer had been read.
    pub reset: u64,
    /// Announced, but still open a second later.
    pub left_open: u64,
}

/// A request that ended, as the clients report it.
pub(super) struct Entry {
    pub kind: Kind,
    pub outcome: Outcome,
    /// When it was due; latency counts from here.
    pub due: Instant,
    /// When its answer was complete.
    pub done: Instant,
    pub answer: Option<Answer>,
    /// The target and the start of the connection, if this was its first request.
    pub opened: Option<(usize, Instant)>,
}

/// Everything that a load has counted.
#[derive(Clone)]
pub struct Tally {
    started: Instant,
    ended: Option<Instant>,
    /// By the end, how long nobody ran on this machine.
    stood_still: Duration,
    stood_still_before: Duration,
    counts: BTreeMap<Kind, [u64; Outcome::ALL.len()]>,
    latencies: BTreeMap<Kind, Histogram<u64>>,
    generations: BTreeMap<u64, u64>,
    first_answers: BTreeMap<u64, Instant>,
    pids: BTreeSet<u32>,
    failures: Vec<Failure>,
    first_client_trouble: Option<String>,
    pub(super) closes: Closes,
    /// Whether the order of generations is watched, and per target what was seen of it.
    monotonic: bool,
    orders: Vec<Order>,
    backwards: u64,
}

impl Tally {
    pub(super) fn new(started: Instant, targets: usize, monotonic: bool) -> Self {
        Self {
            started,
            ended: None,
            stood_still_before: standstill::so_far(),
            stood_still: Duration::ZERO,
            counts: BTreeMap::new(),
            latencies: BTreeMap::new(),
            generations: BTreeMap::new(),
            first_answers: BTreeMap::new(),
            pids: BTreeSet::new(),
            failures: vec![],
            first_client_trouble: None,
            closes: Closes::default(),
            monotonic,
            orders: vec![Order::default(); targets],
            backwards: 0,
        }
    }

    pub(super) fn record(&mut self, entry: &Entry) {
        self.counts.entry(entry.kind).or_default()[entry.outcome as usize] += 1;
        if entry.outcome == Outcome::Ok {
            self.record_latency(entry.kind, entry.done.saturating_duration_since(entry.due));
        }
        let Some(answer) = entry.answer else { return };
        if let Some(count) = slot(&mut self.generations, answer.generation) {
            *count += 1;
        }
        if self.first_answers.len() < MAX_LISTED || self.first_answers.contains_key(&answer.generation) {
            let first = self.first_answers.entry(answer.generation).or_insert(entry.done);
            *first = (*first).min(entry.done);
        }
        if self.pids.len() < MAX_LISTED {
            self.pids.insert(answer.pid);
        }
        if let Some((target, opened)) = entry.opened.filter(|_| self.monotonic) {
            if !self.orders[target].admits(answer.generation, opened, entry.done) {
                self.backwards += 1;
            }
        }
    }

    fn record_latency(&mut self, kind: Kind, latency: Duration) {
        let histogram = self.latencies.entry(kind).or_insert_with(|| {
            Histogram::new_with_bounds(1, MAX_LATENCY_MICROSECONDS, 3).expect("the bounds are valid")
        });
        histogram.saturating_record(u64::try_from(latency.as_micros()).unwrap_or(u64::MAX).max(1));
    }

    pub(super) fn describe(&mut self, failure: Failure) {
        if failure.outcome.is_failure() && self.failures.len() < MAX_FAILURES {
            self.failures.push(failure);
        } else if failure.outcome == Outcome::Client && self.first_client_trouble.is_none() {
            self.first_client_trouble = Some(failure.to_string());
        }
    }

    pub(super) fn end(&mut self) {
        self.ended = Some(Instant::now());
        self.stood_still = standstill::so_far().saturating_sub(self.stood_still_before);
    }

    pub(super) fn started(&self) -> Instant {
        self.started
    }

    pub fn elapsed(&self) -> Duration {
        self.ended.unwrap_or_else(Instant::now) - self.started
    }

    /// Requests that ended, however.
    pub fn requests(&self) -> u64 {
        self.counts.values().flatten().sum()
    }

    pub fn ok(&self) -> u64 {
        self.count(Outcome::Ok)
    }

    pub fn count(&self, outcome: Outcome) -> u64 {
        self.counts.values().map(|counts| counts[outcome as usize]).sum()
    }

    pub fn count_of(&self, kind: Kind, outcome: Outcome) -> u64 {
        self.counts.get(&kind).map_or(0, |counts| counts[outcome as usize])
    }

    /// Requests that the server lost.
    pub fn failed(&self) -> u64 {
        Outcome::ALL.into_iter().filter(|outcome| outcome.is_failure()).map(|outcome| self.count(outcome)).sum()
    }

    /// The first failures, up to [`MAX_FAILURES`].
    pub fn failures(&self) -> &[Failure] {
        &self.failures
    }

    /// Answers per generation.
    pub fn generations(&self) -> &BTreeMap<u64, u64> {
        &self.generations
    }

    /// When `generation` first answered, since the start of the load.
    pub fn first_answer(&self, generation: u64) -> Option<Duration> {
        self.first_answers.get(&generation).map(|instant| instant.saturating_duration_since(self.started))
    }

    pub fn pids(&self) -> &BTreeSet<u32> {
        &self.pids
    }

    /// Latencies of the requests that ended well, in microseconds.
    pub fn latency(&self, kind: Kind) -> Option<&Histogram<u64>> {
        self.latencies.get(&kind)
    }

    pub fn closes(&self) -> Closes {
        self.closes
    }

    /// New connections that a lower generation answered after a higher one had; a lower bound, see
    /// [`Load::monotonic`](super::Load::monotonic).
    pub fn backwards(&self) -> u64 {
        self.backwards
    }

    /// Whether something was asked and nothing was lost.
    pub fn lossless(&self) -> bool {
        self.ok() > 0 && self.failed() == 0 && self.backwards == 0
    }

    /// # Panics
    ///
    /// With the report, unless the run was lossless. A run without one answer proves nothing, so it panics too.
    #[track_caller]
    pub fn assert_lossless(&self) {
        assert!(self.lossless(), "requests were lost, or none was answered\n{self}");
    }

    pub fn to_json(&self) -> Value {
        let outcomes = |count: &dyn Fn(Outcome) -> u64| {
            Outcome::ALL.iter().map(|&outcome| (outcome.name().to_owned(), count(outcome).into())).collect()
        };
        let kinds: serde_json::Map<_, Value> = self
            .counts
            .keys()
            .map(|&kind| {
                let mut counts: serde_json::Map<_, Value> = outcomes(&|outcome| self.count_of(kind, outcome));
                if let Some(latency) = self.latency(kind) {
                    counts.insert("latency_us".to_owned(), latency_json(latency));
                }
                (kind.name().to_owned(), Value::Object(counts))
            })
            .collect();
        let first_answers: serde_json::Map<_, Value> = self
            .first_answers
            .keys()
            .map(|&generation| {
                let seconds = self.first_answer(generation).map(|first| first.as_secs_f64());
                (generation.to_string(), seconds.into())
            })
            .collect();
        let generations: serde_json::Map<_, Value> =
            self.generations.iter().map(|(generation, &count)| (generation.to_string(), count.into())).collect();
        let failures: Vec<_> = self
            .failures
            .iter()
            .map(|failure| {
                json!({
                    "at_s": failure.at.as_secs_f64(),
                    "kind": failure.kind.name(),
                    "outcome": failure.outcome.name(),
                    "target": failure.target,
                    "sent": failure.sent,
                    "came": failure.came,
                })
            })
            .collect();
        let outcomes: serde_json::Map<_, Value> = outcomes(&|outcome| self.count(outcome));
        json!({
            "lossless": self.lossless(),
            "elapsed_s": self.elapsed().as_secs_f64(),
            "stood_still_s": self.stood_still.as_secs_f64(),
            "requests": self.requests(),
            "failed": self.failed(),
            "outcomes": outcomes,
            "kinds": kinds,
            "generations": generations,
            "first_answers_s": first_answers,
            "pids": self.pids,
            "closes": {
                "announced": self.closes.announced,
                "idle": self.closes.idle,
                "reset": self.closes.reset,
                "left_open": self.closes.left_open,
            },
            "backwards": self.monotonic.then_some(self.backwards),
            "failures": failures,
            "client_trouble": self.first_client_trouble,
        })
    }

    /// What has been counted, in a line.
    pub fn line(&self) -> String {
        let mut line = format!("{:7.1} s", self.elapsed().as_secs_f64());
        for outcome in Outcome::ALL {
            let count = self.count(outcome);
            if count > 0 || outcome == Outcome::Ok {
                line.push_str(&format!("  {outcome} {count}"));
            }
        }
        for (generation, count) in self.generations.iter().rev().take(3) {
            line.push_str(&format!("  gen={generation} {count}"));
        }
        line
    }
}

fn latency_json(latency: &Histogram<u64>) -> Value {
    json!({
        "p50": latency.value_at_quantile(0.5),
        "p90": latency.value_at_quantile(0.9),
        "p99": latency.value_at_quantile(0.99),
        "p999": latency.value_at_quantile(0.999),
        "max": latency.max(),
        "mean": latency.mean(),
    })
}

fn slot(map: &mut BTreeMap<u64, u64>, key: u64) -> Option<&mut u64> {
    if map.len() >= MAX_LISTED && !map.contains_key(&key) {
        return None;
    }
    Some(map.entry(key).or_default())
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let verdict = if self.lossless() { "lossless" } else { "NOT LOSSLESS" };
        let seconds = self.elapsed().as_secs_f64();
        writeln!(
            f,
            "{verdict}: {} requests in {seconds:.3} s, {} ok, {} failed",
            self.requests(),
            self.ok(),
            self.failed()
        )?;
        write!(f, "{:11}", "")?;
        for outcome in Outcome::ALL {
            write!(f, " {outcome:>9}")?;
        }
        writeln!(f, "   p50 µs   p99 µs   max µs")?;
        for (kind, counts) in &self.counts {
            write!(f, "{kind:11}")?;
            for count in counts {
                write!(f, " {count:9}")?;
            }
            if let Some(latency) = self.latency(*kind) {
                let quantile = |quantile| latency.value_at_quantile(quantile);
                write!(f, " {:8} {:8} {:8}", quantile(0.5), quantile(0.99), latency.max())?;
            }
            writeln!(f)?;
        }
        for (generation, count) in &self.generations {
            let first = self.first_answer(*generation).unwrap_or_default().as_secs_f64();
            writeln!(f, "generation {generation}: {count} answers, the first at {first:.6} s")?;
        }
        let pids: Vec<_> = self.pids.iter().take(20).map(u32::to_string).collect();
        writeln!(f, "{} pids: {}", self.pids.len(), pids.join(" "))?;
        let Closes { announced, idle, reset, left_open } = self.closes;
        writeln!(
            f,
            "closed without loss: {announced} announced, {idle} between requests, {reset} by a reset; \
             {left_open} announced but left open"
        )?;
        if self.monotonic {
            writeln!(f, "backwards: {} new connections answered by a lower generation", self.backwards)?;
        }
        if !self.stood_still.is_zero() {
            writeln!(
                f,
                "this machine stood still for {:.1} s, for which nobody was waited",
                self.stood_still.as_secs_f64()
            )?;
        }
        if let Some(trouble) = &self.first_client_trouble {
            let count = self.count(Outcome::Client);
            writeln!(f, "THE CLIENT ITSELF failed {count} times, so this run proves less: {trouble}")?;
        }
        if !self.failures.is_empty() {
            writeln!(f, "the first {} of {} failures:", self.failures.len(), self.failed())?;
        }
        for failure in &self.failures {
            writeln!(f, "  {failure}")?;
        }
        Ok(())
    }
}

impl fmt::Debug for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// The order in which the generations answered new connections to one target.
#[derive(Clone, Default)]
struct Order {
    /// When each generation had first answered one.
    answered: BTreeMap<u64, Instant>,
    /// The latest start of a connection that each generation answered.
    opened: BTreeMap<u64, Instant>,
}

impl Order {
    /// Whether a connection that began at `opened` may have been answered by `generation` at `done`.
    ///
    /// Only a connection that began after a higher generation had *finished* answering another violates the
    /// order: of two that overlap, either may have been accepted first. Clients report in any order, so a higher
    /// answer reported late is held against the connections that a lower generation has answered since; that
    /// finds whether there is one, not how many.
    fn admits(&mut self, generation: u64, opened: Instant, done: Instant) -> bool {
        if self.answered.len() >= MAX_LISTED && !self.answered.contains_key(&generation) {
            return true;
        }
        let higher = (Bound::Excluded(generation), Bound::Unbounded);
        let late = self.answered.range(higher).any(|(_, &answered)| answered < opened);
        let known = self.answered.get(&generation).copied();
        let first = known.map_or(done, |known| known.min(done));
        // Violations that this report brings to light, if it tells that the generation answered earlier.
        let overtaken = self
            .opened
            .range(..generation)
            .any(|(_, &lower)| first < lower && known.is_none_or(|known| known >= lower));
        self.answered.insert(generation, first);
        let latest = self.opened.entry(generation).or_insert(opened);
        *latest = (*latest).max(opened);
        !late && !overtaken
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Clock(Instant);

    impl Clock {
        fn at(&self, milliseconds: u64) -> Instant {
            self.0 + Duration::from_millis(milliseconds)
        }

        /// A new connection from `opened` to `done`, answered by `generation`.
        fn entry(&self, generation: u64, opened: u64, done: u64) -> Entry {
            Entry {
                kind: Kind::New,
                outcome: Outcome::Ok,
                due: self.at(opened),
                done: self.at(done),
                answer: Some(Answer { generation, pid: 1 }),
                opened: Some((0, self.at(opened))),
            }
        }

        fn backwards(&self, entries: &[(u64, u64, u64)]) -> u64 {
            let mut tally = Tally::new(self.0, 1, true);
            for &(generation, opened, done) in entries {
                tally.record(&self.entry(generation, opened, done));
            }
            tally.backwards()
        }
    }

    #[test]
    fn only_a_later_connection_is_backwards() {
        let clock = Clock(Instant::now());
        assert_eq!(clock.backwards(&[(1, 0, 1), (2, 2, 3), (2, 4, 5)]), 0);
        // It overlaps the answer of the higher generation.
        assert_eq!(clock.backwards(&[(2, 2, 5), (1, 4, 6)]), 0);
        assert_eq!(clock.backwards(&[(2, 2, 5), (1, 5, 6)]), 0);
        // Begun long before, answered long after.
        assert_eq!(clock.backwards(&[(2, 2, 5), (1, 1, 90)]), 0);
        assert_eq!(clock.backwards(&[(2, 2, 5), (1, 6, 7), (1, 6, 8), (2, 9, 10)]), 2);
        assert_eq!(clock.backwards(&[(u64::MAX, 2, 5), (1, 6, 7)]), 1);
        assert_eq!(clock.backwards(&[(1, 2, 5), (u64::MAX, 6, 7)]), 0);
    }

    #[test]
    fn a_higher_answer_reported_late_counts_too() {
        let clock = Clock(Instant::now());
        assert_eq!(clock.backwards(&[(1, 6, 7), (2, 2, 5)]), 1);
        assert_eq!(clock.backwards(&[(1, 4, 7), (2, 2, 5)]), 0);
        assert_eq!(clock.backwards(&[(1, 6, 7), (2, 8, 9), (2, 2, 5)]), 1);
    }

    #[test]
    fn targets_and_kept_requests_do_not_mix() {
        let clock = Clock(Instant::now());
        let mut tally = Tally::new(clock.0, 2, true);
        tally.record(&clock.entry(2, 2, 5));
        tally.record(&Entry { opened: Some((1, clock.at(6))), ..clock.entry(1, 6, 7) });
        tally.record(&Entry { opened: None, ..clock.entry(1, 6, 7) });
        assert_eq!(tally.backwards(), 0);
        assert_eq!(tally.generations(), &BTreeMap::from([(1, 2), (2, 1)]));
        assert_eq!(tally.first_answer(2), Some(Duration::from_millis(5)));
    }

    #[test]
    fn nothing_asked_is_not_lossless() {
        let clock = Clock(Instant::now());
        let mut tally = Tally::new(clock.0, 1, false);
        assert!(!tally.lossless());
        tally.record(&clock.entry(1, 0, 1));
        assert!(tally.lossless());
        tally.record(&Entry { outcome: Outcome::Client, answer: None, ..clock.entry(1, 0, 1) });
        tally.record(&Entry { outcome: Outcome::Announced, answer: None, ..clock.entry(1, 0, 1) });
        assert!(tally.lossless());
        tally.record(&Entry { outcome: Outcome::Cut, answer: None, ..clock.entry(1, 0, 1) });
        assert!(!tally.lossless());
        assert_eq!((tally.requests(), tally.ok(), tally.failed()), (4, 1, 1));
    }

    #[test]
    fn the_report_and_the_json_say_the_same() {
        let clock = Clock(Instant::now());
        let mut tally = Tally::new(clock.0, 1, false);
        tally.record(&clock.entry(1, 0, 1));
        for _ in 0..MAX_FAILURES + 5 {
            tally.record(&Entry { outcome: Outcome::Reset, answer: None, ..clock.entry(1, 0, 1) });
            tally.describe(Failure {
                at: Duration::from_millis(1),
                kind: Kind::New,
                outcome: Outcome::Reset,
                target: "there".to_owned(),
                sent: "this".to_owned(),
                came: "that".to_owned(),
            });
        }
        assert_eq!(tally.failures().len(), MAX_FAILURES);
        let report = tally.to_string();
        assert!(report.starts_with("NOT LOSSLESS: 26 requests"), "{report}");
        assert!(report.contains("0.001000 s, new to there, reset: sent this; came that"), "{report}");
        let json = tally.to_json();
        assert_eq!(json["outcomes"]["reset"], 25);
        assert_eq!(json["kinds"]["new"]["ok"], 1);
        assert_eq!(json["lossless"], false);
        assert_eq!(json["backwards"], Value::Null);
        assert_eq!(json["failures"].as_array().map(Vec::len), Some(MAX_FAILURES));
    }
}
