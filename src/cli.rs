//! What can be asked on the command line. Parsing only validates; one file a verb does it.

mod build;
mod check;
mod exec;
mod exit;
mod generate;
mod interrupt;
mod journal;
mod options_file;
mod output;
mod ps;
mod restart;
mod scale;
mod status;
mod stop;
mod upgrade;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzz;

use std::fs;
use std::io::Read;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};
use handover::ErrorKind;
use handover::control::{Client, Target, services};

pub(crate) use exec::NOT_EXECUTED;
pub(crate) use exit::Exit;
use exit::Failure;
pub(crate) use journal::log_to_stderr;
use output::Output;

/// More than a pid with white space around it takes.
const PID_FILE_BYTES_MAX: u64 = 64;

/// 100 years, as `humantime` counts them: the clock has an end.
const TIME_MAX: Duration = Duration::from_secs(100 * 31_557_600);

/// Replace a running server with its new build without dropping a connection
///
/// The process starts its new build, hands the listening sockets over and finishes its open connections. Nobody is
/// refused meanwhile; if the new build does not come up, the old one serves on and this command says why.
#[derive(Debug, Parser)]
#[command(version, about, max_term_width = 100, propagate_version = true, subcommand_required = true)]
#[command(disable_help_subcommand = true)]
#[command(after_help = "`handover VERB --help` has examples.")]
#[command(after_long_help = "Examples:\n  \
    handover ps                          what runs here\n  \
    handover check --pid 4711            will an upgrade work?\n  \
    handover upgrade --pid 4711          start the new build and hand over to it\n  \
    handover status --pid 4711           what serves now, and what came of the last upgrade\n  \
    handover restart --pid 4711          end it, then start the new build; clients wait\n  \
    handover stop --pid 4711             finish the open connections, then exit\n  \
    handover exec -- node server.js\n                                       \
    keep a pid and the sockets for any program\n\n\
    Exit codes:\n  \
    0  done\n  \
    1  failed, the old build serves on\n  \
    2  wrong usage\n  \
    3  busy: another upgrade is under way\n  \
    4  not permitted\n  \
    5  done, but connections were cut at the drain deadline\n  \
    7  not running, or no handover process\n  \
    8  nothing serves any more\n\n\
    RUST_LOG=debug in the environment shows whom it asks, and where.")]
pub(crate) struct Arguments {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    Upgrade(upgrade::Arguments),
    Restart(restart::Arguments),
    Status(status::Arguments),
    Ps(ps::Arguments),
    Stop(stop::Arguments),
    Check(check::Arguments),
    Exec(exec::Arguments),
    Scale(scale::Arguments),
}

/// Which process is asked.
#[derive(Args, Debug)]
#[group(required = false, multiple = false)]
pub(crate) struct Which {
    /// The process that serves now
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(i32).range(1..))]
    pid: Option<i32>,
    /// A file that its pid stands in
    #[arg(long, value_name = "FILE")]
    pid_file: Option<PathBuf>,
    /// The path of its control socket
    #[arg(long, value_name = "PATH")]
    socket: Option<PathBuf>,
    /// The name that `handover exec --name` gave it
    #[arg(long, value_name = "NAME")]
    name: Option<String>,
}

impl Which {
    /// The process named; `None` if none is.
    fn target(&self) -> Result<Option<Target>, Failure> {
        if let Some(file) = &self.pid_file {
            return pid_in(file).map(Some);
        }
        if let Some(name) = &self.name {
            return named(name).map(Some);
        }
        Ok(self.pid.map(Target::Pid).or_else(|| self.socket.clone().map(Target::Socket)))
    }

    /// For what changes something: it must be named.
    fn named_target(&self) -> Result<Target, Failure> {
        self.target()?.ok_or_else(|| {
            Failure::usage(
                "which process? Name it with --pid, --pid-file, --socket or --name (`handover ps` lists them)",
            )
        })
    }
}

fn pid_in(file: &PathBuf) -> Result<Target, Failure> {
    let mut bytes = Vec::new();
    // Whatever it is, it is not waited for.
    let opened = fs::File::options().read(true).custom_flags(libc::O_NONBLOCK).open(file);
    opened.and_then(|file| file.take(PID_FILE_BYTES_MAX).read_to_end(&mut bytes)).map_err(|error| {
        let message = format!("cannot read the pid file {}: {error} (is the service running?)", file.display());
        Failure::new(Exit::NotRunning, message)
    })?;
    let text = String::from_utf8_lossy(&bytes);
    match text.trim().parse() {
        Ok(pid) if pid > 0 => Ok(Target::Pid(pid)),
        _ => Err(Failure::usage(format!("the pid file {} has no pid in it (is it the right file?)", file.display()))),
    }
}

/// Of all services that this user can see, the one of that name.
fn named(name: &str) -> Result<Target, Failure> {
    let status = |pid| Client::connect(&Target::Pid(pid))?.patience(ps::PATIENCE)?.status();
    let (mut found, mut silent) = (vec![], vec![]);
    for pid in services().into_iter().map(|service| service.pid) {
        match status(pid) {
            Ok(status) if status.name.as_deref() == Some(name) => found.push(pid),
            Err(error) if error.kind() == ErrorKind::Failed && was_named(pid, name) => silent.push(error),
            _ => {}
        }
    }
    match (found.as_slice(), silent.first()) {
        ([pid], _) => Ok(Target::Pid(*pid)),
        // Whoever takes it for not running would start a second one.
        ([], Some(error)) => {
            Err(Failure::new(Exit::Failed, format!("{error}; it may be `{name}`: if so name it with --pid")))
        }
        ([], None) => {
            let message =
                format!("no service named `{name}` runs here that this user can see (`handover ps` lists them)");
            Err(Failure::new(Exit::NotRunning, message))
        }
        (several, _) => {
            let pids: Vec<String> = several.iter().map(ToString::to_string).collect();
            Err(Failure::usage(format!("which `{name}`? There are {}: name one with --pid", pids.join(", "))))
        }
    }
}

/// Whether a supervisor that does not answer can have been given that name: by an option, or in a file of them.
fn was_named(pid: i32, name: &str) -> bool {
    let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let mut arguments = line.split(|byte| *byte == 0).map(String::from_utf8_lossy);
    arguments.any(|argument| {
        argument == name || argument.strip_prefix("--name=") == Some(name) || argument.starts_with("--config")
    })
}

/// A time with its unit: `30s`, `500ms`, `2min`.
fn duration(text: &str) -> Result<Duration, String> {
    if !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(format!("a time needs a unit, as in {text}s or {text}ms"));
    }
    let time = humantime::parse_duration(text).map_err(|error| error.to_string())?;
    if time > TIME_MAX { Err("a time is 100 years at the most".to_owned()) } else { Ok(time) }
}

fn milliseconds(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

/// Until when to be told.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum Wait {
    /// Until the new process accepts; it may still be rolled back
    Ready,
    /// Until the trial is over
    Healthy,
    /// Until the old process has no connection left and is gone
    Drained,
}

impl From<Wait> for handover::control::Wait {
    fn from(wait: Wait) -> Self {
        match wait {
            Wait::Ready => Self::Ready,
            Wait::Healthy => Self::Healthy,
            Wait::Drained => Self::Drained,
        }
    }
}

/// Does what the command line says.
///
/// # Errors
///
/// What is wrong with the command line; help and version are errors to clap as well.
pub(crate) fn run() -> Result<Exit, clap::Error> {
    // Before a word is read: it may be one of the build before.
    if let Some(result) = handover::supervisor::resume() {
        return Ok(ended(exec::exit_of(result), Output::new(false)));
    }
    Ok(match generate::parse()? {
        Ok(arguments) => do_verb(arguments),
        Err(arguments) => ended(generate::run(&arguments), Output::new(false)),
    })
}

fn do_verb(arguments: Arguments) -> Exit {
    let (result, output) = match arguments.verb {
        Verb::Upgrade(arguments) => {
            let mut output = Output::new(arguments.json);
            (upgrade::run(arguments, &mut output), output)
        }
        Verb::Status(arguments) => {
            let mut output = Output::new(arguments.json);
            (status::run(&arguments, &mut output), output)
        }
        Verb::Ps(arguments) => {
            let mut output = Output::new(arguments.json);
            (ps::run(&arguments, &mut output), output)
        }
        Verb::Restart(arguments) => {
            let mut output = Output::new(arguments.json);
            (restart::run(arguments, &mut output), output)
        }
        Verb::Stop(arguments) => {
            let mut output = Output::new(arguments.json);
            (stop::run(&arguments, &mut output), output)
        }
        Verb::Scale(arguments) => {
            let mut output = Output::new(arguments.json);
            (scale::run(&arguments, &mut output), output)
        }
        Verb::Exec(arguments) => (exec::run(arguments), Output::new(false)),
        Verb::Check(arguments) => {
            let mut output = Output::new(arguments.json);
            (check::run(&arguments, &mut output), output)
        }
    };
    ended(result, output)
}

fn ended(result: Result<Exit, Failure>, output: Output) -> Exit {
    match result {
        Ok(exit) => exit,
        Err(failure) => {
            output.failure(&failure);
            failure.exit
        }
    }
}

impl From<handover::Error> for Failure {
    fn from(error: handover::Error) -> Self {
        let exit = match error.kind() {
            ErrorKind::Busy => Exit::Busy,
            ErrorKind::NotPermitted => Exit::NotPermitted,
            ErrorKind::NotRunning => Exit::NotRunning,
            ErrorKind::NothingServes => Exit::NothingServes,
            ErrorKind::Invalid => Exit::Usage,
            _ => Exit::Failed,
        };
        Self::new(exit, error.to_string())
    }
}
