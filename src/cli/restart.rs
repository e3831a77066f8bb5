//! `handover restart`

use std::time::Duration;

use clap::Args;
use handover::control::{Answer, Client, UpgradeRequest};

use super::build::Build;
use super::exit::{Exit, Failure};
use super::output::Output;
use super::{Which, duration, interrupt, milliseconds};

/// End a running process, then start its new build; nobody is refused meanwhile
///
/// For servers of which two must never run at once, or that are stuck. The process starts the new build and hands its
/// listeners over, then closes its open connections and exits; only when it is gone does the new build go on. Clients wait
/// in the queues of the listeners. A new build that cannot be started, or does not take the listeners, changes nothing
/// (exit code 1); from then on there is no way back, and exit code 8 says that it did not become ready. Under
/// `handover exec` the build before is started again instead (exit code 1).
#[derive(Args, Debug)]
#[command(after_long_help = "Examples:\n  \
    handover restart --pid 4711\n  \
    handover restart --pid-file /run/app.pid --drain 30s\n  \
    handover restart --name web                        what `handover exec --name web` runs\n  \
    handover restart --pid 4711 --previous             with the build before")]
pub(crate) struct Arguments {
    #[command(flatten)]
    which: Which,
    #[command(flatten)]
    build: Build,
    /// How long open connections may take to finish, while new ones wait
    #[arg(long, value_name = "TIME", value_parser = duration, default_value = "0s")]
    drain: Duration,
    /// How long after that the process may take to exit before it is killed
    #[arg(long, value_name = "TIME", value_parser = duration, default_value = "10s")]
    kill_after: Duration,
    /// Print one JSON object a line
    #[arg(long)]
    pub(super) json: bool,
}

pub(super) fn run(arguments: Arguments, output: &mut Output) -> Result<Exit, Failure> {
    let target = arguments.which.named_target()?;
    let request = UpgradeRequest {
        drain_timeout_ms: Some(milliseconds(arguments.drain)),
        kill_after_ms: Some(milliseconds(arguments.kill_after)),
        ..arguments.build.request()?
    };
    let client = Client::connect(&target)?;
    let pid = client.pid();
    if client.resume()? {
        log::warn!("process {pid} was stopped: it is continued, so that it can hand its listeners over");
    }
    let result = client.restart(&request, |answer| {
        if matches!(answer, Answer::Accepted(_)) {
            interrupt::explain("the restart goes on without this command; `handover ps` tells what came of it");
        }
        output.answer("restarting", answer);
    })?;
    Ok(output.result(&result))
}
