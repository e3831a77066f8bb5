//! `handover stop`

use std::time::Duration;

use clap::Args;
use handover::control::{Answer, Client};

use super::exit::{Exit, Failure};
use super::output::Output;
use super::{Which, duration, interrupt};

/// Drain a process: it accepts no more, finishes its connections and exits
#[derive(Args, Debug)]
#[command(after_long_help = "Examples:\n  \
    handover stop --pid 4711\n  \
    handover stop --pid-file /run/app.pid --drain-timeout 5min")]
pub(crate) struct Arguments {
    #[command(flatten)]
    which: Which,
    /// How long its connections may take to finish; 0s for ever
    #[arg(long, value_name = "TIME", value_parser = duration)]
    drain_timeout: Option<Duration>,
    /// Print one JSON object a line
    #[arg(long)]
    pub(super) json: bool,
}

pub(super) fn run(arguments: &Arguments, output: &mut Output) -> Result<Exit, Failure> {
    let client = Client::connect(&arguments.which.named_target()?)?;
    let goes_on = format!("process {} goes on draining without this command", client.pid());
    let result = client.stop(arguments.drain_timeout, |answer| {
        if matches!(answer, Answer::Accepted(_)) {
            interrupt::explain(&goes_on);
        }
        output.answer("stopping", answer);
    })?;
    Ok(output.result(&result))
}
