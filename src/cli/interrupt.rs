//! ^C ends this command and not what it has asked for: that goes on in the server, and the operator should know.

use std::io::{self, IsTerminal, Read, Write};
use std::os::unix::net::UnixStream;
use std::thread;

use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::low_level::{emulate_default_handler, pipe};

use super::journal::error_prefix;
use super::output::{width, wrapped};

/// At SIGINT or SIGTERM says `message`, then ends as the signal would have ended this command without it.
pub(super) fn explain(message: &str) {
    for signal in [SIGINT, SIGTERM] {
        if let Err(error) = explain_one(signal, message.to_owned()) {
            log::debug!("signal {signal} will end this command without a word: {error}");
        }
    }
}

fn explain_one(signal: i32, message: String) -> io::Result<()> {
    let (mut reader, writer) = UnixStream::pair()?;
    pipe::register(signal, writer)?;
    let wait = move || {
        if reader.read_exact(&mut [0]).is_ok() {
            let mut stderr = io::stderr().lock();
            // Behind the `^C`, and whatever line is open.
            let start = if stderr.is_terminal() { "\n" } else { error_prefix() };
            let text = wrapped(&format!("handover: {message}"), width(&stderr), 2);
            let _ = writeln!(stderr, "{start}{text}");
            let _ = emulate_default_handler(signal);
        }
    };
    thread::Builder::new().name("handover-signals".into()).spawn(wait).map(drop)
}
