//! Which build is started, and how: the same for every verb that starts one.

use std::env;
use std::path::{Path, PathBuf, absolute};
use std::time::Duration;

use clap::Args;
use handover::control::UpgradeRequest;

use super::exit::Failure;
use super::{duration, milliseconds};

/// The new build.
#[derive(Args, Debug)]
pub(crate) struct Build {
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
    /// How long it may be silent before it is ready [default: what the process is configured with]
    #[arg(long, value_name = "TIME", value_parser = duration)]
    ready_timeout: Option<Duration>,
    /// Of `handover exec`: take it for ready so long after its last `bind` or `listen`
    ///
    /// For a new build that does not listen any more where the old one does, or that cannot be seen to wait.
    #[arg(long, value_name = "TIME", value_parser = duration)]
    ready_delay: Option<Duration>,
    /// The arguments of the new build, without its name, instead of those of the running process
    #[arg(last = true, value_name = "ARGS")]
    args: Option<Vec<String>>,
}

impl Build {
    pub(super) fn request(self) -> Result<UpgradeRequest, Failure> {
        Ok(UpgradeRequest {
            exe: self.exe.as_deref().map(program).transpose()?,
            previous: self.previous,
            args: self.args,
            env: self.env.into_iter().collect(),
            cwd: self.cwd.as_deref().map(seen_from_here).transpose()?,
            ready_timeout_ms: self.ready_timeout.map(milliseconds),
            ready_delay_ms: self.ready_delay.map(milliseconds),
            ..UpgradeRequest::default()
        })
    }
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
