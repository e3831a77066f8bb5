//! `handover upgrade`

use std::time::Duration;

use clap::Args;
use handover::control::{Answer, Client, UpgradeRequest};

use super::build::Build;
use super::exit::{Exit, Failure};
use super::output::Output;
use super::{Wait, Which, duration, interrupt, milliseconds};

/// Replace a running process by its new build
///
/// The process starts the new build, hands its listeners over, and goes on accepting until the new build says that it
/// is ready. If anything goes wrong before that it serves on as if nothing had happened, and this command says what it
/// was and exits with 1.
#[derive(Args, Debug)]
#[command(after_long_help = "Examples:\n  \
    handover upgrade --pid 4711\n  \
    handover upgrade --pid-file /run/app.pid --wait drained\n  \
    handover upgrade --pid 4711 --exe /srv/app/releases/42/server -- --listen 0.0.0.0:8080\n  \
    handover upgrade --pid 4711 --previous             back to the build before\n  \
    handover upgrade --name web --self                 the supervisor of `handover exec`\n  \
    handover upgrade --pid 4711 --json | jq -r 'select(.event == \"result\").message'")]
pub(crate) struct Arguments {
    #[command(flatten)]
    which: Which,
    #[command(flatten)]
    build: Build,
    /// Of `handover exec`: replace the supervisor itself, by its own new build
    ///
    /// It stays the same process, and what it runs is not touched.
    #[arg(long = "self", conflicts_with_all = ["previous", "env", "cwd", "args", "wait", "trial", "drain_timeout", "ready_delay"])]
    itself: bool,
    /// When to return
    #[arg(long, value_name = "UNTIL", default_value = "healthy")]
    wait: Wait,
    /// How long after it accepts its death makes the old process accept again
    #[arg(long, value_name = "TIME", value_parser = duration)]
    trial: Option<Duration>,
    /// How long the old process's connections may take to finish; 0s for ever
    #[arg(long, value_name = "TIME", value_parser = duration)]
    drain_timeout: Option<Duration>,
    /// Print one JSON object a line
    #[arg(long)]
    pub(super) json: bool,
}

pub(super) fn run(arguments: Arguments, output: &mut Output) -> Result<Exit, Failure> {
    let target = arguments.which.named_target()?;
    let itself = arguments.itself;
    let request = request(arguments)?;
    let client = Client::connect(&target)?;
    if itself {
        let result = client.upgrade_self(&request, |answer| output.answer("replacing", answer))?;
        return Ok(output.result(&result));
    }
    let pid = client.pid();
    let goes_on =
        format!("the upgrade goes on without this command; `handover status --pid {pid}` tells what came of it");
    let result = client.upgrade(&request, |answer| {
        if matches!(answer, Answer::Accepted(_)) {
            interrupt::explain(&goes_on);
        }
        output.answer("upgrading", answer);
    })?;
    Ok(output.result(&result))
}

fn request(arguments: Arguments) -> Result<UpgradeRequest, Failure> {
    Ok(UpgradeRequest {
        wait: Some(arguments.wait.into()),
        trial_ms: arguments.trial.map(milliseconds),
        drain_timeout_ms: arguments.drain_timeout.map(milliseconds),
        ..arguments.build.request()?
    })
}
