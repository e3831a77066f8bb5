//! Running a program that may hang, fork or write without end.

use std::io::{self, Read};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;

pub(super) const TIMEOUT: Duration = Duration::from_secs(5);
const OUTPUT_BYTES_MAX: u64 = 64 << 10;
const INTERVAL: Duration = Duration::from_millis(5);

#[derive(Debug)]
pub(super) struct Ran {
    /// stdout and stderr, as far as they were read.
    pub(super) output: String,
    /// `None`: it was killed at the end of its time.
    pub(super) status: Option<ExitStatus>,
}

/// Runs `command` in a process group of its own, which is killed when the time is over.
pub(super) fn run(mut command: Command, timeout: Duration) -> io::Result<Ran> {
    let deadline = Instant::now() + timeout;
    let (reader, writer) = io::pipe()?;
    command.stdin(Stdio::null()).stdout(writer.try_clone()?).stderr(writer).process_group(0);
    let mut child = command.spawn()?;
    // It holds the writing ends.
    drop(command);
    let (sender, output) = mpsc::channel();
    thread::spawn(move || {
        let mut bytes = Vec::new();
        // Beyond the bound the pipe is closed, and whoever goes on writing gets SIGPIPE.
        let _ = reader.take(OUTPUT_BYTES_MAX).read_to_end(&mut bytes);
        let _ = sender.send(bytes);
    });
    let bytes = output.recv_timeout(timeout).ok();
    let status = wait_until(&mut child, deadline)?;
    // Also when it has ended: what it has started is not ours to leave behind.
    let _ = killpg(Pid::from_raw(child.id().cast_signed()), Signal::SIGKILL);
    child.wait()?;
    // The group is gone, so the pipe is at its end.
    let bytes = bytes.or_else(|| output.recv_timeout(Duration::from_secs(1)).ok()).unwrap_or_default();
    Ok(Ran { output: String::from_utf8_lossy(&bytes).into_owned(), status })
}

fn wait_until(child: &mut Child, deadline: Instant) -> io::Result<Option<ExitStatus>> {
    loop {
        match child.try_wait()? {
            None if Instant::now() < deadline => thread::sleep(INTERVAL),
            ended => return Ok(ended),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str, timeout: Duration) -> Ran {
        let mut command = Command::new("/bin/sh");
        command.args(["-c", script]);
        run(command, timeout).unwrap()
    }

    #[test]
    fn what_it_says_and_how_it_ends_is_told() {
        let ran = shell("echo one; echo two >&2; exit 3", Duration::from_secs(30));
        assert_eq!((ran.output.as_str(), ran.status.and_then(|status| status.code())), ("one\ntwo\n", Some(3)));
    }

    #[test]
    fn one_that_hangs_is_killed_with_all_that_it_has_started() {
        let ran = shell("echo begun; sleep 600 & sleep 600", Duration::from_millis(100));
        assert_eq!((ran.output.as_str(), ran.status), ("begun\n", None));
    }

    #[test]
    fn one_that_writes_without_end_is_cut_short() {
        let ran = shell("while :; do echo yes || exit 7; done", Duration::from_secs(30));
        assert!(ran.output.len() as u64 == OUTPUT_BYTES_MAX && ran.status.is_some());
    }
}
