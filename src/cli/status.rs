//! `handover status`

use std::fmt::Write;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use clap::Args;
use handover::control::{Client, Status, Target, services};

use super::Which;
use super::exit::{Exit, Failure};
use super::output::{Output, lasted, table};

/// Show what a process is doing: generation, build, listeners, connections, last upgrade
#[derive(Args, Debug)]
#[command(after_long_help = "Examples:\n  \
    handover status --pid 4711\n  \
    handover status                      if there is only one\n  \
    handover status --pid 4711 --json | jq .generation")]
pub(crate) struct Arguments {
    #[command(flatten)]
    which: Which,
    /// Print one JSON object
    #[arg(long)]
    pub(super) json: bool,
}

pub(super) fn run(arguments: &Arguments, output: &mut Output) -> Result<Exit, Failure> {
    let target = match arguments.which.target()? {
        Some(target) => target,
        None => the_only_one()?,
    };
    let status = Client::connect(&target)?.status()?;
    if output.is_json() {
        output.json_line(&status);
    } else {
        render(&status).iter().for_each(|line| output.line(line));
    }
    Ok(Exit::Done)
}

/// Looking does no harm, so the process need not be named where only one can be meant.
pub(super) fn the_only_one() -> Result<Target, Failure> {
    match services().as_slice() {
        [] => Err(Failure::new(Exit::NotRunning, "no handover process runs here that this user can see")),
        [only] => Ok(Target::Pid(only.pid)),
        several => {
            let pids: Vec<String> = several.iter().map(|service| service.pid.to_string()).collect();
            Err(Failure::usage(format!("which process? There are {}: name one with --pid", pids.join(", "))))
        }
    }
}

fn render(status: &Status) -> Vec<String> {
    let since = at(status.since_unix_ms);
    let age = SystemTime::now().duration_since(since).unwrap_or_default();
    let version = status.version.as_ref().map(|version| format!(" {version}")).unwrap_or_default();
    let build = &status.build;
    let mut lines: Vec<String> = status.name.iter().map(|name| format!("name         {name}")).collect();
    lines.extend([
        format!("generation   {}, pid {}, {}", status.generation, status.pid, status.state),
        format!("since        {} ({})", date(status.since_unix_ms), lasted(age)),
        format!("program      {}{version}", status.program.display()),
        format!("build        inode {}, {} bytes, written {}", build.inode, build.size, date(build.modified_unix_ms)),
    ]);
    lines.push(match status.workers.is_empty() {
        true => format!("connections  {} open, {} accepted", status.connections.open, status.connections.accepted),
        // Counted from outside, where those that have ended are not seen.
        false => format!("connections  {} open", status.connections.open),
    });
    if let Some(previous) = &status.previous {
        lines.push(format!("previous     {}, written {}", previous.path.display(), date(previous.modified_unix_ms)));
    }
    for older in status.draining.iter().filter(|_| status.workers.is_empty()) {
        let open = Client::connect(&Target::Pid(older.pid)).and_then(Client::status);
        let open = open.map(|status| format!(", {} connections open", status.connections.open)).unwrap_or_default();
        lines.push(format!("draining     generation {} (pid {}){open}", older.generation, older.pid));
    }
    if let Some(last) = &status.last_upgrade {
        lines.push(format!("last upgrade {}: {}", date(last.at_unix_ms), last.message));
    }
    let head = ["LISTENER", "KIND", "ADDRESS", "QUEUE", "SOURCE"].map(str::to_owned).to_vec();
    let rows = status.listeners.iter().map(|listener| {
        let queue = listener.queue.map_or_else(|| "-".to_owned(), |queue| queue.to_string());
        let kind = listener.kind.to_string();
        vec![listener.name.clone(), kind, listener.address.clone(), queue, listener.source.clone()]
    });
    let rows: Vec<Vec<String>> = std::iter::once(head).chain(rows).collect();
    lines.extend(table(&rows));
    lines.extend(workers(status));
    lines
}

/// The processes of a supervisor.
fn workers(status: &Status) -> Vec<String> {
    if status.workers.is_empty() {
        return vec![];
    }
    let head = ["WORKER", "GENERATION", "PID", "STATE", "OPEN", "SINCE", ""].map(str::to_owned).to_vec();
    let rows = status.workers.iter().map(|worker| {
        let age = SystemTime::now().duration_since(at(worker.since_unix_ms)).unwrap_or_default();
        let crashes = match worker.crashes {
            0 => String::new(),
            1 => "ended by itself once".to_owned(),
            times => format!("ended by itself {times} times in a row"),
        };
        let pid = worker.pid.map_or_else(|| "-".to_owned(), |pid| pid.to_string());
        let numbers = [worker.worker.to_string(), worker.generation.to_string(), pid];
        let said = worker.said.clone().unwrap_or_default();
        let rest = [worker.state.to_string(), worker.connections.to_string(), lasted(age), crashes, said];
        numbers.into_iter().chain(rest).collect()
    });
    table(&std::iter::once(head).chain(rows).collect::<Vec<Vec<String>>>())
}

/// What a process says of itself is shown, whatever it is.
#[cfg(any(test, fuzzing))]
pub(super) fn fuzz(bytes: &[u8]) {
    if let Ok(mut status) = serde_json::from_slice::<Status>(bytes) {
        super::ps::fuzz(&status);
        super::check::fuzz::statuses(&status);
        // Of which each would be asked.
        status.draining.clear();
        render(&status);
    }
    super::output::fuzz(bytes);
}

fn at(unix_ms: u64) -> SystemTime {
    UNIX_EPOCH + Duration::from_millis(unix_ms)
}

/// A process may say anything, and from the year 10,000 on there is no way to write it.
fn date(unix_ms: u64) -> String {
    let mut text = String::new();
    match write!(text, "{}", humantime::format_rfc3339_seconds(at(unix_ms))) {
        Ok(()) => text,
        Err(_) => "?".to_owned(),
    }
}
