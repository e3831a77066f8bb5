//! Each fault at each step of an upgrade, in either process, under load: the tables of docs/reliability.md, cell by cell.
//!
//! The library, and the command, have points at which they fail when they are told to (`src/fault.rs`, the feature
//! `fault-points`). Every cell is a service of its own, at an address of its own. It says who serves in the end, and fails if
//! more is lost than a process that was killed had accepted, if anybody is left over, or if the next upgrade does not work.
//!
//! `HANDOVER_CELL='commit' cargo test …` runs the cells of one step, `HANDOVER_CELL='commit,kill'` one of them.

mod exec;
mod library;
mod pull;
mod restart;

use std::collections::BTreeMap;
use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::home::Home;
use crate::oracle::{Load, Outcome as Ended, Tally};
use crate::server::has_ended;
use crate::wait::eventually;

/// Cells wait most of the time; how many at once a machine with two cores carries.
const AT_ONCE: usize = 24;

/// For the upgrade in which it happens. On a busy machine a good build takes a second to be ready.
const TIMES: [&str; 4] = ["--ready-timeout", "4s", "--trial", "1s"];

/// How long a process stands still: longer than the time to be ready, and than the trial.
const STANDS_STILL: Duration = Duration::from_millis(5500);

/// Clients of the load. Each has one request at a time with one process.
const CLIENTS: usize = 4;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Fault {
    Killed,
    Continued,
    StoppedAndKilled,
    Ended,
    Short,
    Count,
    NoFds,
    Delayed,
}

use Fault as F;

impl Fault {
    const ALL: [Self; 8] =
        [F::Killed, F::Continued, F::StoppedAndKilled, F::Ended, F::Short, F::Count, F::NoFds, F::Delayed];

    /// As HANDOVER_FAULT knows it.
    fn name(self) -> &'static str {
        match self {
            F::Killed => "kill",
            F::Continued | F::StoppedAndKilled => "stop",
            F::Ended => "end",
            F::Short => "short",
            F::Count => "count",
            F::NoFds => "fds",
            F::Delayed => "delay",
        }
    }

    fn words(self) -> &'static str {
        match self {
            F::Killed => "killed",
            F::Continued => "stopped, then continued",
            F::StoppedAndKilled => "stopped, then killed",
            F::Ended => "channel ends",
            F::Short => "frame cut short",
            F::Count => "wrong fd count",
            F::NoFds => "out of fds",
            F::Delayed => "delayed",
        }
    }

    fn kills(self) -> bool {
        matches!(self, F::Killed | F::StoppedAndKilled)
    }

    fn stops(self) -> bool {
        matches!(self, F::Continued | F::StoppedAndKilled)
    }
}

/// A point of the program.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Step {
    point: &'static str,
    words: &'static str,
    /// What makes no sense here, and why.
    left_out: &'static [(&'static [Fault], &'static str)],
}

/// It waits for the fault, and stops and continues or kills the process as that wants.
struct Fired {
    file: std::path::PathBuf,
}

impl Fired {
    fn new(home: &Home) -> Self {
        Self { file: home.path("fired") }
    }

    fn variable(&self, step: &Step, fault: Fault) -> String {
        format!("{},{},{}", step.point, fault.name(), self.file.display())
    }

    /// The process in which it happened.
    #[track_caller]
    fn process(&self) -> i32 {
        eventually("the fault to happen", || fs::read_to_string(&self.file).ok()?.trim().parse().ok())
    }

    /// Lets it take its course. Returns the process in which it happened.
    #[track_caller]
    fn take_its_course(&self, fault: Fault) -> i32 {
        let pid = self.process();
        if fault.stops() {
            let stands_still = || {
                let state = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
                (has_ended(pid) || state.contains(") T ")).then_some(())
            };
            eventually("a process that stands still", stands_still);
            // Time itself is the fault: nothing may happen that could be waited for.
            thread::sleep(STANDS_STILL);
            let signal = if fault.kills() { Signal::SIGKILL } else { Signal::SIGCONT };
            let _ = kill(Pid::from_raw(pid), signal);
        }
        if fault.kills() {
            eventually("its end", || has_ended(pid).then_some(()));
        }
        pid
    }
}

/// A table of the page, as it was seen.
struct Matrix {
    heading: &'static str,
    steps: &'static [Step],
    faults: &'static [Fault],
}

impl Matrix {
    fn cells(&self) -> Vec<(Step, Fault)> {
        let all = self.steps.iter().flat_map(|step| self.faults.iter().map(|fault| (*step, *fault)));
        all.filter(|(step, fault)| why_left_out(step, *fault).is_none()).collect()
    }

    /// Runs every cell, prints the table, and compares it with that of the page.
    fn holds(&self, cell: impl Fn(Step, Fault) -> &'static str + Sync) {
        let only = std::env::var("HANDOVER_CELL").ok();
        let is_wanted = |step: &Step, fault: Fault| {
            let wanted = |only: &String| *only == step.point || *only == format!("{},{}", step.point, fault.name());
            only.as_ref().is_none_or(wanted)
        };
        let left: Mutex<Vec<(Step, Fault)>> =
            Mutex::new(self.cells().into_iter().rev().filter(|(step, fault)| is_wanted(step, *fault)).collect());
        let (seen, failed) = (Mutex::new(BTreeMap::new()), Mutex::new(Vec::new()));
        thread::scope(|scope| {
            for _ in 0..AT_ONCE {
                scope.spawn(|| {
                    loop {
                        let Some((step, fault)) = left.lock().unwrap().pop() else { return };
                        match catch_unwind(AssertUnwindSafe(|| cell(step, fault))) {
                            Ok(outcome) => drop(seen.lock().unwrap().insert((step, fault), outcome)),
                            Err(_) => failed.lock().unwrap().push(format!("{} {fault:?}", step.point)),
                        }
                    }
                });
            }
        });
        let table = self.table(&seen.into_inner().unwrap());
        println!("\n{table}");
        assert_eq!(failed.into_inner().unwrap(), Vec::<String>::new());
        if only.is_none() {
            assert_eq!(table_of_the_page(self.heading), table, "docs/reliability.md says otherwise");
        }
    }

    fn table(&self, seen: &BTreeMap<(Step, Fault), &str>) -> String {
        let mut reasons: Vec<&str> = Vec::new();
        let row = |cells: Vec<String>| format!("| {} |\n", cells.join(" | "));
        let head = std::iter::once(self.heading.to_owned());
        let mut table = row(head.chain(self.faults.iter().map(|fault| fault.words().to_owned())).collect());
        table += &format!("|{}\n", "---|".repeat(self.faults.len() + 1));
        for step in self.steps {
            let outcome = |fault: &Fault| match why_left_out(step, *fault) {
                Some(reason) => {
                    let known = reasons.iter().position(|one| *one == reason);
                    let number = known.unwrap_or_else(|| {
                        reasons.push(reason);
                        reasons.len() - 1
                    });
                    format!("– ({})", char::from(b'a' + number as u8))
                }
                None => seen.get(&(*step, *fault)).copied().unwrap_or("?").to_owned(),
            };
            table += &row(std::iter::once(step.words.to_owned()).chain(self.faults.iter().map(outcome)).collect());
        }
        for (number, reason) in reasons.iter().enumerate() {
            table += &format!("\n({}) {reason}", char::from(b'a' + number as u8));
        }
        table.trim_end().to_owned()
    }
}

fn why_left_out(step: &Step, fault: Fault) -> Option<&'static str> {
    step.left_out.iter().find(|(faults, _)| faults.contains(&fault)).map(|(_, reason)| *reason)
}

/// From its heading to the end of the reasons below it.
fn table_of_the_page(heading: &str) -> String {
    let page = include_str!("../../docs/reliability.md");
    let lines = page.lines().skip_while(|line| !line.starts_with(&format!("| {heading} |")));
    let is_of_it = |line: &&str| line.is_empty() || line.starts_with('|') || line.starts_with('(');
    let lines: Vec<&str> = lines.take_while(is_of_it).collect();
    lines.join("\n").trim_end().to_owned()
}

/// An address that nobody else has: below the ports that are given to clients, and not 127.0.0.1.
fn address() -> String {
    static COUNT: AtomicUsize = AtomicUsize::new(0);
    let number = COUNT.fetch_add(1, Ordering::Relaxed);
    format!("127.77.{}.{}:{}", number / 250, number % 250 + 1, 10_000 + std::process::id() % 20_000)
}

/// Little enough for many cells at once.
fn load(address: &str) -> Load {
    let address: std::net::SocketAddr = address.parse().unwrap();
    Load::new(address).new_connections(2).rate(40.0).kept(2).think(Duration::from_millis(25))
}

/// Whom a process that was killed has taken with it is lost, and nobody else.
#[track_caller]
fn assert_lost_at_most(most: usize, tally: &Tally) {
    for outcome in [Ended::Refused, Ended::TimedOut, Ended::Wrong] {
        assert_eq!(tally.count(outcome), 0, "{tally}");
    }
    let lost = tally.count(Ended::Reset) + tally.count(Ended::Cut);
    assert!(lost <= most as u64, "{lost} lost, of at most {most}: {tally}");
}
