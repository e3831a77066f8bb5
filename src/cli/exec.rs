//! `handover exec`

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, ValueEnum};
use handover::supervisor::{Ended, Hangup, Intercept, Listen, Options, Ready, StopSignal};

use super::duration;
use super::exit::{Exit, Failure};

/// What a shell says of a command that it cannot execute.
pub(crate) const NOT_EXECUTED: u8 = 127;

/// Run a program of any kind, and replace it without dropping a connection
///
/// Keeps one pid, holds the listening sockets (those of --listen, else those that the program binds by itself), and runs
/// the program below it with as many processes as it is told. At
/// `handover upgrade` it starts the new build beside the old one, waits until every new process is proved to be ready,
/// and only then tells the old ones to stop. A new build that fails is killed, and the old one serves on.
#[derive(Args, Debug)]
// What stands on the command line goes before what stands in the file.
#[command(args_override_self = true)]
#[command(after_long_help = "Examples:\n  \
    handover exec -- python3 -m http.server 8080\n  \
    handover exec --take-over 4711 -- ./server\n  \
    handover exec --listen 8080 -- ./takes-listen-fds\n  \
    handover exec --listen http=0.0.0.0:80 --workers 4 --user www --name web -- ./server\n  \
    handover exec --listen 8080 --ready message -- node server.js\n  \
    handover upgrade --name web          replace the program; or `kill -USR2`\n  \
    handover stop --name web             drain, then exit; or `kill -TERM`, or ^C\n\n\
    The program finds the sockets of --listen from fd 3 on (LISTEN_FDS, LISTEN_FDNAMES, LISTEN_PID as from systemd;\n\
    SERVER_STARTER_PORT; EINHORN_FD_0). It runs until it is told to stop; one that ends by itself is\n\
    started again.")]
pub(crate) struct Arguments {
    /// Read options from this file as well
    ///
    /// Those of the command line go before them.
    ///
    /// TOML, each option by its name without the dashes: `workers = 4`, `listen = ["http=8080"]`, `log-prefix = true`;
    /// and `program = ["node", "server.js"]`.
    #[arg(long = "config", value_name = "FILE")]
    _config: Option<PathBuf>,
    /// Listen there, and pass the socket to the program (repeatable)
    ///
    /// PORT, HOST:PORT, a path or @NAME for a Unix socket; `udp:` or `unix-datagram:` before it for datagrams.
    #[arg(long, value_name = "[NAME=]ADDRESS")]
    listen: Vec<Listen>,
    /// Keep the sockets that the program binds by itself
    ///
    /// Its calls of `bind` and `listen` wait for the supervisor (seccomp user notification), which gives the next
    /// generation the same sockets. So a program that knows nothing of all this is replaced without losing a connection.
    #[arg(long, value_name = "WHEN", default_value = "auto")]
    intercept: When,
    /// Take over a running server, whoever has started it
    ///
    /// The program is given the listening sockets of that process. When it is ready, the process gets the stop signal, and
    /// has the drain timeout to finish. If the program does not become ready, the process serves on as if nothing had
    /// happened. With --no-overlap it ends before the program is started.
    #[arg(long, value_name = "PID", value_parser = clap::value_parser!(i32).range(1..))]
    take_over: Option<i32>,
    /// Pass the sockets in non-blocking mode
    ///
    /// As with systemd's NonBlocking=, the default is a plain blocking socket. A program that polls and then accepts
    /// needs this unless it sets the mode itself: another process may take the connection in between.
    #[arg(long)]
    non_blocking: bool,
    /// How many processes of the program to run
    #[arg(long, value_name = "N", default_value = "1", value_parser = clap::value_parser!(u16).range(1..=1024))]
    workers: u16,
    /// What proves that a process can serve
    #[arg(long, value_name = "HOW", default_value = "any")]
    ready: ReadyWay,
    /// A shell command that must succeed as well
    ///
    /// Once that is proved, it is tried until it does.
    ///
    /// In its environment: HANDOVER_PID, the process; HANDOVER_WORKER, HANDOVER_GENERATION.
    #[arg(long, value_name = "COMMAND")]
    ready_cmd: Option<String>,
    /// Take it for ready so long after its last `bind` or `listen`
    ///
    /// For programs that cannot be seen to wait. A timer proves little.
    #[arg(long, value_name = "TIME", value_parser = duration)]
    ready_delay: Option<Duration>,
    /// How long it may take until it is ready
    #[arg(long, value_name = "TIME", value_parser = duration, default_value = "30s")]
    ready_timeout: Duration,
    /// How long new processes must live beside the old ones
    ///
    /// Only then these are told to stop.
    #[arg(long, value_name = "TIME", value_parser = duration, default_value = "1s")]
    trial: Duration,
    /// The signal that tells the program to drain and exit
    #[arg(long, value_name = "SIGNAL", default_value_t)]
    stop_signal: StopSignal,
    /// What SIGHUP means; SIGUSR1 is passed on in any case
    #[arg(long, value_name = "WHAT", default_value = "upgrade")]
    hup: HangupMeaning,
    /// A message on Node's channel instead of the signal
    ///
    /// The program gets it by `process.on('message', …)`.
    #[arg(long, value_name = "TEXT")]
    stop_message: Option<String>,
    /// How long it may take until it is killed; 0s for ever
    #[arg(long, value_name = "TIME", value_parser = duration, default_value = "60s")]
    drain_timeout: Duration,
    /// Replace so many processes at a time instead of all
    ///
    /// Where there is no memory for twice as many.
    #[arg(long, value_name = "K", value_parser = clap::value_parser!(u16).range(1..))]
    surge: Option<u16>,
    /// End the old processes before the new ones are started
    ///
    /// For programs that cannot run twice. Clients wait meanwhile. If a new process fails, the build before is started again.
    #[arg(long)]
    no_overlap: bool,
    /// Begin each line of a worker with generation and number
    ///
    /// As in `2.0 | `, on stdout and stderr.
    #[arg(long)]
    log_prefix: bool,
    /// Run the program as this user
    #[arg(long, value_name = "USER")]
    user: Option<String>,
    /// A name for the other verbs to find it by
    #[arg(long, value_name = "NAME")]
    name: Option<String>,
    /// A file for the pid, which never changes
    ///
    /// It is written once the program serves.
    #[arg(long, value_name = "FILE")]
    pid_file: Option<PathBuf>,
    /// Put the sockets into systemd's fd store
    ///
    /// So they outlive even this process. For FileDescriptorStoreMax= in the unit. From systemd 254 on this is so without the option.
    #[arg(long)]
    fd_store: bool,
    /// The program, a path or a name in PATH, with its arguments
    #[arg(last = true, required = true, value_name = "PROGRAM")]
    program: Vec<OsString>,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum When {
    /// If no --listen is given
    Auto,
    /// In any case: also what it binds beside --listen, or at the same address
    On,
    /// Never
    Off,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum ReadyWay {
    /// Whichever of the others comes first
    Any,
    /// It is seen to wait for connections on every listener
    Waits,
    /// It says READY=1 on NOTIFY_SOCKET (`sd_notify`)
    Notify,
    /// It sends `ready` on Node's channel: `process.send('ready')`
    Message,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum HangupMeaning {
    /// Replace the program, as SIGUSR2
    Upgrade,
    /// Pass it on to the program
    Pass,
    /// Nothing
    Ignore,
}

impl From<HangupMeaning> for Hangup {
    fn from(meaning: HangupMeaning) -> Self {
        match meaning {
            HangupMeaning::Upgrade => Self::Upgrade,
            HangupMeaning::Pass => Self::Pass,
            HangupMeaning::Ignore => Self::Ignore,
        }
    }
}

impl From<ReadyWay> for Ready {
    fn from(way: ReadyWay) -> Self {
        match way {
            ReadyWay::Any => Self::Any,
            ReadyWay::Waits => Self::Waits,
            ReadyWay::Notify => Self::Notify,
            ReadyWay::Message => Self::Message,
        }
    }
}

pub(super) fn run(arguments: Arguments) -> Result<Exit, Failure> {
    let intercept = match arguments.intercept {
        When::Off if arguments.take_over.is_some() => {
            return Err(Failure::usage("what --take-over takes is kept by interception: leave --intercept off out"));
        }
        _ if arguments.take_over.is_some() => Intercept::On,
        When::Auto if arguments.listen.is_empty() => Intercept::IfPossible,
        When::On => Intercept::On,
        When::Auto | When::Off => Intercept::Off,
    };
    if arguments.ready_delay.is_some() {
        if intercept == Intercept::Off {
            let message = "--ready-delay counts from what the program binds by itself, which is not seen: with --listen \
                           it needs --intercept on";
            return Err(Failure::usage(message));
        }
        if matches!(arguments.ready, ReadyWay::Notify | ReadyWay::Message) {
            return Err(Failure::usage(
                "--ready-delay is for a program that says nothing: it proves nothing with this --ready",
            ));
        }
    }
    let mut program = arguments.program.into_iter();
    exit_of(handover::supervisor::run(Options {
        program: program.next().unwrap_or_default(),
        arguments: program.collect(),
        intercept,
        take_over: arguments.take_over,
        listen: arguments.listen,
        non_blocking: arguments.non_blocking,
        workers: arguments.workers.into(),
        ready: arguments.ready.into(),
        ready_command: arguments.ready_cmd,
        ready_delay: arguments.ready_delay,
        ready_timeout: arguments.ready_timeout,
        trial: arguments.trial,
        stop_signal: arguments.stop_signal,
        hangup: arguments.hup.into(),
        stop_message: arguments.stop_message,
        drain_timeout: arguments.drain_timeout,
        overlap: !arguments.no_overlap,
        surge: arguments.surge.map(usize::from),
        log_prefix: arguments.log_prefix,
        user: arguments.user,
        name: arguments.name,
        fd_store: arguments.fd_store,
        pid_file: arguments.pid_file,
    }))
}

pub(super) fn exit_of(result: Result<Ended, handover::Error>) -> Result<Exit, Failure> {
    Ok(if result?.cut > 0 { Exit::Cut } else { Exit::Done })
}
