//! `handover upgrade`

use std::env;
use std::path::{Path, PathBuf, absolute};
use std::time::Duration;

use clap::Args;
use handover::control::{Client, UpgradeRequest};

use super::exit::{Exit, Failure};
use super::output::Output;
use super::{Wait, Which, duration, milliseconds};

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
    handover upgrade --pid 4711 --json | jq -r 'select(.event == \"result\").message'")]
pub(crate) struct Arguments {
    #[command(flatten)]
    which: Which,
    /// Start this program instead of the path that the process was started with
    #[arg(long, value_name = "PATH")]
    exe: Option<PathBuf>,
    /// Start the build that served before the running one, if it is still where it was
    #[arg(long, conflicts_with = "exe")]
    previous: bool,
    /// Give it this variable beside those that the process has (repeatable)
    #[arg(long, value_name = "NAME=VALUE", value_parser = variable)]
    env: Vec<(String, String)>,
    /// Start it in this directory
    #[arg(long, value_name = "DIR")]
    cwd: Option<PathBuf>,
    /// When to return
    #[arg(long, value_name = "UNTIL", default_value = "healthy")]
    wait: Wait,
    /// How long it may be silent before it is ready [default: what the process is configured with]
    #[arg(long, value_name = "TIME", value_parser = duration)]
    ready_timeout: Option<Duration>,
    /// How long after it accepts its death makes the old process accept again
    #[arg(long, value_name = "TIME", value_parser = duration)]
    trial: Option<Duration>,
    /// How long the old process's connections may take to finish; 0s for ever
    #[arg(long, value_name = "TIME", value_parser = duration)]
    drain_timeout: Option<Duration>,
    /// Print one JSON object a line
    #[arg(long)]
    pub(super) json: bool,
    /// The arguments of the new build, without its name, instead of those of the running process
    #[arg(last = true, value_name = "ARGS")]
    args: Option<Vec<String>>,
}

pub(super) fn run(arguments: Arguments, output: &mut Output) -> Result<Exit, Failure> {
    let target = arguments.which.named_target()?;
    let request = request(arguments)?;
    let client = Client::connect(&target)?;
    let result = client.upgrade(&request, |answer| output.answer("upgrading", answer))?;
    Ok(output.result(&result))
}

fn request(arguments: Arguments) -> Result<UpgradeRequest, Failure> {
    Ok(UpgradeRequest {
        exe: arguments.exe.as_deref().map(program).transpose()?,
        previous: arguments.previous,
        args: arguments.args,
        env: arguments.env.into_iter().collect(),
        cwd: arguments.cwd.as_deref().map(seen_from_here).transpose()?,
        wait: Some(arguments.wait.into()),
        ready_timeout_ms: arguments.ready_timeout.map(milliseconds),
        trial_ms: arguments.trial.map(milliseconds),
        drain_timeout_ms: arguments.drain_timeout.map(milliseconds),
    })
}

/// A name without a slash that is no file here is looked for in PATH by the process that starts it.
fn program(named: &Path) -> Result<PathBuf, Failure> {
    let is_name = !named.as_os_str().as_encoded_bytes().contains(&b'/');
    if is_name && !named.exists() { Ok(named.to_path_buf()) } else { seen_from_here(named) }
}

/// The process has a working directory of its own.
pub(super) fn seen_from_here(path: &Path) -> Result<PathBuf, Failure> {
    absolute(path).map_err(|error| {
        let here = env::current_dir().unwrap_or_default();
        Failure::usage(format!("cannot tell where {} is, seen from {}: {error}", path.display(), here.display()))
    })
}

fn variable(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((name, value)) if !name.is_empty() => Ok((name.to_owned(), value.to_owned())),
        _ => Err("write NAME=VALUE".to_owned()),
    }
}
