//! `handover ps`

use std::time::Duration;

use clap::Args;
use handover::control::{Client, Status, Target, services};
use handover::{Error, ErrorKind};
use serde_json::json;

use super::exit::{Exit, Failure};
use super::output::{Output, table};

pub(super) const PATIENCE: Duration = Duration::from_secs(1);

/// List the processes of this machine that can be upgraded
#[derive(Args, Debug)]
#[command(after_long_help = "Examples:\n  \
    handover ps\n  \
    handover ps --json | jq -r 'select(.status.state == \"serving\").pid'\n\n\
    Root sees all processes, also in containers; others see their own.")]
pub(crate) struct Arguments {
    /// Print one JSON object a line, each a process with its status
    #[arg(long)]
    pub(super) json: bool,
}

pub(super) fn run(_: &Arguments, output: &mut Output) -> Result<Exit, Failure> {
    let asked = services().into_iter().map(|service| {
        // One that is stopped must not hide the others.
        let client = Client::connect(&Target::Pid(service.pid)).and_then(|client| client.patience(PATIENCE));
        (service.pid, client.and_then(Client::status))
    });
    // One that has ended since it was found is none.
    let has_ended = |error: &Error| error.kind() == ErrorKind::NotRunning;
    let asked = asked.filter(|(_, status)| !status.as_ref().is_err_and(has_ended));
    if output.is_json() {
        for (pid, status) in asked {
            match status {
                Ok(status) => output.json_line(&json!({"pid": pid, "status": status})),
                Err(error) => output.json_line(&json!({"pid": pid, "error": error.to_string()})),
            }
        }
        return Ok(Exit::Done);
    }
    let head = ["PID", "GENERATION", "STATE", "OPEN", "LISTENERS", "PROGRAM"].map(str::to_owned).to_vec();
    let (mut rows, mut silent) = (vec![head], vec![]);
    for (pid, status) in asked {
        rows.push(match status {
            Ok(status) => row(pid, &status),
            Err(error) => {
                silent.push(error.to_string());
                vec![pid.to_string(), "?".to_owned(), "?".to_owned()]
            }
        });
    }
    table(&rows).iter().chain(&silent).for_each(|line| output.line(line));
    Ok(Exit::Done)
}

#[cfg(any(test, fuzzing))]
pub(super) fn fuzz(status: &Status) {
    row(status.pid, status);
}

fn row(pid: i32, status: &Status) -> Vec<String> {
    let mut addresses: Vec<&str> = status.listeners.iter().map(|listener| listener.address.as_str()).collect();
    let more = addresses.len().saturating_sub(3);
    addresses.truncate(3);
    let more = if more > 0 { format!(" +{more}") } else { String::new() };
    vec![
        pid.to_string(),
        status.generation.to_string(),
        status.state.to_string(),
        status.connections.open.to_string(),
        addresses.join(",") + &more,
        status.name.iter().map(|name| format!("{name}: ")).collect::<String>() + &status.program.to_string_lossy(),
    ]
}
