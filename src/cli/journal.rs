//! Where stderr is the journal its lines say how grave they are: `<3>` to `<7>` at their start, `sd-daemon(3)`.

use std::fs::File;
use std::io::{self, IsTerminal, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;

use env_logger::fmt::Formatter;
use env_logger::{Env, Target, WriteStyle};
use log::{Level, Record};
use nix::poll::{PollFd, PollFlags, poll};
use nix::sys::stat::fstat;

const PATIENCE_MS: u8 = 20;

/// What this command and the library log goes to stderr: warnings, or what RUST_LOG says.
pub(crate) fn log_to_stderr() {
    let mut logger = env_logger::Builder::from_env(Env::default().default_filter_or("warn"));
    if stderr_is_journal() {
        logger.format(write_with_priority);
    }
    // A supervisor must not stand still when nobody reads what it has to say.
    if std::env::args_os().nth(1).is_some_and(|verb| verb == "exec") {
        let style = if io::stderr().is_terminal() { WriteStyle::Always } else { WriteStyle::Never };
        logger.write_style(style).target(Target::Pipe(Box::new(Impatient::new())));
    }
    logger.init();
}

/// Stderr, but what it does not take at once is lost.
struct Impatient {
    /// If it is one, opened once more to be non-blocking: it can be written to as soon as it has room for a byte.
    terminal: Option<File>,
}

impl Impatient {
    fn new() -> Self {
        let open = || {
            let non_blocking = libc::O_NONBLOCK | libc::O_NOCTTY;
            File::options().write(true).custom_flags(non_blocking).open("/proc/self/fd/2").ok()
        };
        Self { terminal: io::stderr().is_terminal().then(open).flatten() }
    }
}

impl Write for Impatient {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        let stderr = io::stderr();
        let mut fds = [PollFd::new(stderr.as_fd(), PollFlags::POLLOUT)];
        // Not after EINTR either: the end of a worker is a signal, and is what there is to tell.
        match poll(&mut fds, PATIENCE_MS) {
            Ok(1..) => match &self.terminal {
                Some(terminal) => (&*terminal).write(line).or(Ok(line.len())),
                None => stderr.lock().write(line),
            },
            _ => Ok(line.len()),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The start of a message that is printed to stderr and is no log line.
pub(super) fn error_prefix() -> &'static str {
    if stderr_is_journal() { "<3>" } else { "" }
}

/// JOURNAL_STREAM is device and inode of the stream that the journal reads, and is inherited by those whose stderr is
/// something else.
fn stderr_is_journal() -> bool {
    let named = std::env::var("JOURNAL_STREAM").unwrap_or_default();
    let stderr = fstat(io::stderr().as_fd());
    stderr.is_ok_and(|stream| named == format!("{}:{}", stream.st_dev, stream.st_ino))
}

/// The journal keeps the time itself.
fn write_with_priority(out: &mut Formatter, record: &Record<'_>) -> io::Result<()> {
    let priority = priority(record.level());
    for line in record.args().to_string().lines() {
        writeln!(out, "<{priority}>{}: {line}", record.target())?;
    }
    Ok(())
}

fn priority(level: Level) -> u8 {
    match level {
        Level::Error => 3,
        Level::Warn => 4,
        Level::Info => 6,
        Level::Debug | Level::Trace => 7,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn priorities_are_those_of_syslog() {
        assert_eq!([Level::Error, Level::Warn, Level::Info, Level::Debug].map(priority), [3, 4, 6, 7]);
    }
}
